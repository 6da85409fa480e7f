"""Points as a table and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.results import show
from benchmarks.scaling.modes import MODES

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.scaling.point import Point

_COLUMNS: list[tuple[str, str]] = [
    ("init_s", "init, s"),
    ("first_fan_out_ms", "first fan-out, ms"),
    ("fan_out_ms", "fan-out, ms"),
    ("fan_out_calls_per_s", "fan-out, calls/s"),
    ("first_all_to_all_s", "first all-to-all, s"),
    ("all_to_all_calls_per_s", "all-to-all, calls/s"),
    ("fds_max", "descriptors"),
    ("shutdown_s", "shutdown, s"),
]

_EXPLANATION = """\
All workers are processes of one machine, forked with everything imported. *init*: from when all may call `init_rpc` \
until it has returned in all. *fan-out*: worker 0 calls every worker at once (itself too) with `rpc_async` and waits \
for all; the first one makes the connections. *all-to-all*: everybody fans out at once. *descriptors*: files that \
the framework has open then, in the worker with most of them. *shutdown*: until it has returned in all."""

_PANELS = (
    ("init_s", "init_rpc, seconds", True),
    ("fan_out_calls_per_s", "fan-out from worker 0, calls/s", False),
    ("all_to_all_calls_per_s", "all to all, calls/s", False),
    ("shutdown_s", "shutdown, seconds", True),
)
_COLOURS = {"zrpc-file": "#1f6fb4", "zrpc-tcp": "#5ba3d9", "zrpc-broker": "#12395f", "tensorpipe": "#d9822b"}


def markdown(points: list[Point], facts: str) -> str:
    """The table, with what it depends on, and the errors under it."""
    head = ["", "workers", *(label for _, label in _COLUMNS)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for point in points:
        values = [getattr(point, name) for name, _ in _COLUMNS]
        cells = ["failed" if point.error and value is None else _cell(value) for value in values]
        lines.append([MODES[point.mode].label, str(point.n), *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    errors = [f"- {MODES[p.mode].label} with {p.n} workers: `{p.error}`" for p in points if p.error]
    failures = "\n\nFailures:\n\n" + "\n".join(errors) if errors else ""
    return f"{facts}.\n\n{_EXPLANATION}\n\n{table}{failures}\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else show(value)


def draw(points: list[Point], facts: str, path: Path) -> None:
    """Write the picture to `path`: a curve a mode; a cross where a mode failed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(4.4 * len(_PANELS), 4.2))
    for panel, (name, title, logarithmic) in zip(axes, _PANELS, strict=True):
        _draw_panel(panel, points, name, logarithmic)
        panel.set_title(title, fontsize=10, loc="left")
    axes[0].legend(fontsize=8)
    figure.text(0.01, 0.01, facts, fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_panel(panel: Any, points: list[Point], name: str, logarithmic: bool) -> None:
    sizes = sorted({point.n for point in points})
    for key in dict.fromkeys(point.mode for point in points):
        mine = [point for point in points if point.mode == key]
        reached = [point for point in mine if getattr(point, name) is not None]
        line = {"color": _COLOURS[key], "label": MODES[key].label, "marker": "o", "markersize": 4}
        panel.plot([point.n for point in reached], [getattr(point, name) for point in reached], **line)
        for point in mine:
            if point not in reached:
                place = {"xycoords": panel.get_xaxis_transform(), "color": _COLOURS[key], "ha": "center", "fontsize": 8}
                panel.annotate("x\nfailed", (point.n, 0.9), **place)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()
    if logarithmic:
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.set_xlabel("workers", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(visible=True, color="#e4e4e4")
    panel.spines[["top", "right"]].set_visible(False)
