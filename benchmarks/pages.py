"""The tables of benchmarks/results in the pages of docs/: `make bench-pages`, or `python -m benchmarks.pages`.

A page says where a file belongs by two comments, and what stands between them is the file:

    <!-- begin benchmarks/results/NAME.md -->
    <!-- end benchmarks/results/NAME.md -->

`--check` writes nothing, names the pages that differ and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BEGIN = re.compile(r"^<!-- begin (\S+) -->$", re.MULTILINE)
_INCLUDED = re.compile(r"^<!-- begin (\S+) -->\n(.*?)^<!-- end \1 -->$", re.MULTILINE | re.DOTALL)


def with_files(page: str, root: Path = ROOT) -> str:
    """The text of a page with each included file as it is under `root`.

    Raises:
        ValueError: a beginning has no end.
        FileNotFoundError: there is no such file.
    """
    begun, whole = _BEGIN.findall(page), [found[1] for found in _INCLUDED.finditer(page)]
    if begun != whole:
        raise ValueError(f"each of {begun} needs a comment `<!-- end NAME -->` before the next one begins")
    return _INCLUDED.sub(lambda found: _included(found[1], root), page)


def _included(name: str, root: Path) -> str:
    text = (root / name).read_text().strip("\n")
    return f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->"


def differing(root: Path = ROOT) -> dict[Path, str]:
    """The pages that are not as their files say, and what they would be."""
    wanted = {path: with_files(path.read_text(), root) for path in sorted((root / "docs").glob("*.md"))}
    return {path: text for path, text in wanted.items() if path.read_text() != text}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    pages = differing()
    for path, text in pages.items():
        print(f"{path.relative_to(ROOT)} {'differs from its files: make bench-pages' if args.check else 'written'}")
        if not args.check:
            path.write_text(text)
    sys.exit(1 if args.check and pages else 0)


if __name__ == "__main__":
    main()
