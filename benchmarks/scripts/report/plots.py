"""SVG plots of a run, by matplotlib, for pages with a light or a dark background."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .pages import plot_names, shares, stage_names
from .results import Group, Run

_BAR = 0.26  # inches

# Each colour, and the colour that replaces it on a dark background.
_DARK = {
    "#1f2328": "#f0f6fc",
    "#d1d9e0": "#3d444d",
    "#cf222e": "#f85149",
    "#0969da": "#4493f8",
    "#bc4c00": "#f0883e",
    "#1a7f37": "#3fb950",
    "#8250df": "#ab7df8",
    "#9a6700": "#d29922",
    "#bf3989": "#db61a2",
    "#1b7c83": "#39c5cf",
    "#59636e": "#9198a1",
    "#6e4020": "#c8956c",
    "#4c8c00": "#a5d64c",
}
_TEXT, _GRID, _SLOWER, *_SERIES = _DARK
_OURS = _SERIES[0]
_MARKERS = "osD^vP"

# matplotlib measures text in this font, which is wider than most sans-serif fonts, so that text fits in those too.
_FONT = "DejaVu Sans"


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _label_bar(axes: Axes, end: float, row: int, text: str) -> None:
    axes.annotate(text, (end, row), (3, 0), textcoords="offset points", va="center", fontsize=7.5)


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _ratio_bars(groups: Sequence[Group]) -> Figure:
    shown = [group for group in groups if group.peers]
    figure, axes = _axes(8.6, 0.9 + _BAR * len(shown))
    axes.set_xscale("log")
    for row, group in enumerate(shown):
        ratio = group.ratio(group.fastest)
        axes.barh(row, ratio - 1, left=1, height=0.66, color=_OURS if ratio >= 1 else _SLOWER)
        ends = group.range(group.fastest)
        if ends:
            axes.plot(ends, (row, row), color=_TEXT, linewidth=0.8)
        text = f"{ratio:.1f}" if 1 <= ratio < 100 else f"{ratio:.2f}" if ratio < 1 else f"{ratio:.0f}"
        _label_bar(axes, max(ratio, 1, *(ends or ())), row, f"{text} {group.fastest.contender}")
    ratios = [group.ratio(group.fastest) for group in shown]
    _label_rows(axes, [f"{group.op}: {group.case}" for group in shown])
    axes.set_xlim(min(0.8, min(ratios) / 1.2), max(ratios) * 4)
    axes.axvline(1, color=_TEXT, linewidth=0.8)
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x")
    axes.set_xlabel("times as fast as the fastest peer (named at each bar)")
    return figure


def _roofline(run: Run) -> Figure:
    figure, axes = _axes(8.6, 5.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for number, op in enumerate(dict.fromkeys(group.op for group in run.metered)):
        colour = _SERIES[number % len(_SERIES)]
        marker = _MARKERS[number // len(_SERIES) % len(_MARKERS)]
        for first, group in enumerate(group for group in run.metered if group.op == op):
            info = group.ours.info
            x, y = info["flops"] / info["bytes"], info["gflop_per_s"]
            if group.peers:
                theirs = y / group.ratio(group.fastest)
                axes.plot([x, x], [y, theirs], color=colour, linewidth=0.8, zorder=2)
                axes.plot(x, theirs, marker, color=colour, markersize=5, markerfacecolor="none", zorder=3)
            axes.plot(x, y, marker, color=colour, markersize=5, zorder=3, label=None if first else op)
    copy = run.metered[0].ours.info["copy_gb_per_s"]
    ends = [10 ** math.floor(math.log10(axes.get_xlim()[0])), 10 ** math.ceil(math.log10(axes.get_xlim()[1]))]
    # The slope ends at the highest roof.
    top = min(max(run.matmul.values(), default=math.inf) / copy, ends[1])
    line: dict[str, Any] = {"color": _TEXT, "linewidth": 1.2}
    axes.plot([ends[0], top], [copy * ends[0], copy * top], label=f"copy, {copy:.1f} GB/s", **line)
    for (dtype, rate), style in zip(run.matmul.items(), itertools.cycle(("--", ":", "-."))):
        label = f"matrix product, {dtype}, {rate:,.0f} GFLOP/s"
        axes.plot([rate / copy, ends[1]], [rate, rate], linestyle=style, label=label, **line)
    axes.set_xlim(*ends)
    axes.grid()
    axes.set_xlabel("flops of the plain algorithm per byte to move")
    axes.set_ylabel("GFLOP/s (filled: ours, hollow: the fastest peer)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=7.5)
    return figure


def _shared_bars(run: Run) -> Figure:
    cases = [(group, shares(group, group.two)) for group in run.shared if group.two is not None]
    rows = [
        (f"{group.op}, {group.case}: {name}", share, name)
        for group, found in cases
        for name, share in found.items()
    ]
    colours = dict(zip(dict.fromkeys(name for _, _, name in rows), _SERIES, strict=False))
    figure, axes = _axes(8.6, 0.9 + _BAR * len(rows))
    for row, (_, share, name) in enumerate(rows):
        axes.barh(row, 100 * share, height=0.66, color=colours[name])
        _label_bar(axes, 100 * share, row, f"{share:.0%}")
    _label_rows(axes, [label for label, _, _ in rows])
    axes.axvline(50, color=_TEXT, linewidth=0.8, linestyle=":")
    axes.axvline(100, color=_TEXT, linewidth=0.8)
    axes.set_xlim(0, max(110, *(115 * share for _, share, _ in rows)))
    axes.grid(axis="x")
    axes.set_xlabel("one shared network, % of two separate networks")
    return figure


def _stage_bars(run: Run) -> Figure:
    names = stage_names(row.stages for _, row in run.staged)
    figure, axes = _axes(8.6, 1.3 + _BAR * len(run.staged))
    for row, (_, contender) in enumerate(run.staged):
        left = 0.0
        for number, name in enumerate(names):
            width = contender.stages.get(name, 0.0)
            colour = _SERIES[number % len(_SERIES)]
            axes.barh(row, width, left=left, height=0.66, color=colour, label=None if row else name)
            left += width
        _label_bar(axes, left, row, f"{left:,.3g}" if left < 1000 else f"{left:,.0f}")
    _label_rows(axes, [f"{group.op}, {group.case}: {row.contender}" for group, row in run.staged])
    axes.margins(x=0.1)
    axes.grid(axis="x")
    axes.set_xlabel("ms")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=7.5)
    return figure


_PLOTS: dict[str, Callable[[Run], Figure]] = {
    "highlights": lambda run: _ratio_bars(run.highlights),
    "ratios": lambda run: _ratio_bars(run.ops),
    "roofline": _roofline,
    "shared": _shared_bars,
    "stages": _stage_bars,
}


def _dark_rules() -> str:
    """Style rules that replace the colours in style attributes where the page is dark."""
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in _DARK.items()
        for kind in ("fill", "stroke")
    )
    return f'<style type="text/css">@media (prefers-color-scheme: dark){{{rules}}}</style>'


def _svg(figure: Figure) -> str:
    """Renders a figure without a background, with text in the reader's sans-serif font."""
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata=no_metadata)
    text = file.getvalue().replace(f"'{_FONT}'", "sans-serif")
    return text.replace("</defs>", f"{_dark_rules()}</defs>", 1)


def draw(run: Run, directory: Path) -> None:
    """Writes the plots of a run that its pages show to `<plot>.svg`.

    The same results and the same version of matplotlib give the same bytes.

    Args:
        run: The run to draw.
        directory: The directory of the files, created if it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    colours = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT
    )
    settings: dict[Any, Any] = {
        **colours,
        "grid.color": _GRID,
        "font.family": _FONT,
        "font.size": 8,
        "svg.fonttype": "none",
        "svg.hashsalt": "panfpn_fast",
    }
    with mpl.rc_context({**mpl.rcParamsDefault, **settings}):
        for name in plot_names(run):
            (directory / f"{name}.svg").write_text(_svg(_PLOTS[name](run)))
