"""The table as a picture: one panel a row, one bar a contender."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.contender import CONTENDERS
from benchmarks.rows import ROWS

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.results import Results
    from benchmarks.tables import Table

COLUMNS = 3
OURS, OTHERS = "#1f6fb4", "#b4b4b4"


def draw(table: Table, results: Results, facts: str, path: Path) -> None:
    """Write the picture to `path`."""
    rows = [key for key in table.rows if key in results.rows]
    contenders = [key for key in table.contenders if key in results.contenders]
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lines = -(-len(rows) // COLUMNS)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(5 * COLUMNS, 2.4 * lines + 0.6), squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, key in zip(axes.flat, rows, strict=False):
        _draw_row(panel, contenders, results, key)
    figure.text(0.01, 0.004, facts, fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_row(panel: Any, contenders: list[str], results: Results, key: str) -> None:
    row = ROWS[key]
    shown = [contender for contender in contenders if CONTENDERS[contender].speaks_torch or not row.torch_only]
    values = [results.median(contender, key) or 0.0 for contender in shown]
    colours = [OURS if contender.startswith("zrpc") else OTHERS for contender in shown]
    bars = panel.barh(range(len(shown)), values, color=colours)
    panel.bar_label(bars, labels=[results.cell(contender, row=key) for contender in shown], padding=3, fontsize=8)
    panel.set_axis_on()
    panel.set_yticks(range(len(shown)), [CONTENDERS[contender].label for contender in shown], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, max([*values, 1e-9]) * 1.25)
    panel.tick_params(axis="x", labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    better = "less" if row.less_is_better else "more"
    panel.set_title(f"{row.label}, {row.unit} ({better} is better)", fontsize=9, loc="left")
