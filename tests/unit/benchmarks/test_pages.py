"""Figures in docs/ are those of benchmarks/results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.pages import ROOT, differing, with_files

if TYPE_CHECKING:
    from pathlib import Path

PAGE = "before\n<!-- begin results/a.md -->\nold\n<!-- end results/a.md -->\nafter\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with a page that includes a file which was written since."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.md").write_text("\nnew\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    (tmp_path / "docs" / "other.md").write_text("no figures\n")
    return tmp_path


def test_the_pages_of_docs_show_the_files_of_benchmarks_results() -> None:
    """What stands between the comments of a page is the file; if this fails, run `make bench-pages`."""
    assert not [str(path.relative_to(ROOT)) for path in differing()]


def test_the_pages_of_figures_include_files() -> None:
    """Figures of the two pages are included and not typed: the comments are there."""
    for page in ("performance", "scaling"):
        assert "<!-- begin benchmarks/results/" in (ROOT / "docs" / f"{page}.md").read_text()


def test_an_included_file_replaces_what_stood_between_its_comments(tree: Path) -> None:
    """The comments and everything else stay."""
    assert with_files(PAGE, tree) == PAGE.replace("old", "new")


def test_a_page_that_shows_an_older_file_is_found(tree: Path) -> None:
    """Pages without included files are left alone, and so is a page once it was written."""
    page = tree / "docs" / "page.md"
    found = differing(tree)
    assert list(found) == [page]
    page.write_text(found[page])
    assert not differing(tree)


@pytest.mark.parametrize("end", ["", "<!-- end results/b.md -->"])
def test_an_inclusion_without_its_end_is_refused(tree: Path, end: str) -> None:
    """Else the rest of the page would be lost."""
    with pytest.raises(ValueError, match="needs a comment"):
        with_files(PAGE.replace("<!-- end results/a.md -->", end), tree)


def test_a_file_that_is_not_there_is_refused(tree: Path) -> None:
    """A page cannot show what was not measured."""
    with pytest.raises(FileNotFoundError):
        with_files(PAGE.replace("a.md", "b.md"), tree)
