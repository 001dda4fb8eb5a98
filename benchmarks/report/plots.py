"""PNG plots of a run, for pages on a light and on a dark background, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .pages import plot_names, shares, stage_names
from .results import Group, Run

_DPI = 130
_BAR = 0.26  # inches


@dataclass(frozen=True)
class _Theme:
    """Colours that read well on a page's background."""

    text: str
    grid: str
    ours: str
    slower: str
    series: Sequence[str]


_THEMES = {
    "light": _Theme(
        text="#1f2328",
        grid="#d1d9e0",
        ours="#0969da",
        slower="#cf222e",
        series=("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#bf3989", "#1b7c83", "#59636e"),
    ),
    "dark": _Theme(
        text="#f0f6fc",
        grid="#3d444d",
        ours="#4493f8",
        slower="#f85149",
        series=("#4493f8", "#f0883e", "#3fb950", "#ab7df8", "#d29922", "#db61a2", "#39c5cf", "#9198a1"),
    ),
}
_MARKERS = "osD^vP"


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _ratio_bars(groups: Sequence[Group], theme: _Theme) -> Figure:
    shown = [group for group in groups if group.peers]
    figure, axes = _axes(8.6, 0.9 + _BAR * len(shown))
    axes.set_xscale("log")
    for row, group in enumerate(shown):
        ratio = group.ratio(group.fastest)
        axes.barh(row, ratio - 1, left=1, height=0.66, color=theme.ours if ratio >= 1 else theme.slower)
        text = f" {ratio:.1f}" if 1 <= ratio < 100 else f" {ratio:.2f}" if ratio < 1 else f" {ratio:.0f}"
        axes.text(max(ratio, 1), row, f"{text}  {group.fastest.contender}", va="center", fontsize=7.5)
    ratios = [group.ratio(group.fastest) for group in shown]
    _label_rows(axes, [f"{group.op}: {group.case}" for group in shown])
    axes.set_xlim(min(0.8, min(ratios) / 1.2), max(ratios) * 4)
    axes.axvline(1, color=theme.text, linewidth=0.8)
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x")
    axes.set_xlabel("times as fast as the fastest peer (named at each bar)")
    return figure


def _roofline(run: Run, theme: _Theme) -> Figure:
    figure, axes = _axes(8.6, 5.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for number, op in enumerate(dict.fromkeys(group.op for group in run.metered)):
        colour = theme.series[number % len(theme.series)]
        marker = _MARKERS[number // len(theme.series) % len(_MARKERS)]
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
    # The slope ends where it meets the highest of the roofs.
    top = min(max(run.matmul.values(), default=math.inf) / copy, ends[1])
    axes.plot([ends[0], top], [copy * ends[0], copy * top], color=theme.text, linewidth=1.2)
    near: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
    axes.annotate(f"copies, {copy:.1f} GB/s", (ends[0], copy * ends[0]), (26, 10), **near)
    for dtype, rate in run.matmul.items():
        axes.plot([rate / copy, ends[1]], [rate, rate], color=theme.text, linewidth=1.2)
        text = f"matrix product, {dtype}, {rate:,.0f} GFLOP/s"
        axes.annotate(text, (ends[1], rate), (-4, 3), ha="right", va="bottom", **near)
    axes.set_xlim(*ends)
    axes.grid()
    axes.set_xlabel("flops of the plain algorithm per byte that must move")
    axes.set_ylabel("GFLOP/s (filled: ours, hollow: the fastest peer)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=7.5)
    return figure


def _shared_bars(run: Run, theme: _Theme) -> Figure:
    cases = [(group, shares(group, group.two)) for group in run.shared if group.two is not None]
    rows = [
        (f"{group.op}, {group.case}: {name}", share, name)
        for group, found in cases
        for name, share in found.items()
    ]
    colours = dict(zip(dict.fromkeys(name for _, _, name in rows), theme.series, strict=False))
    figure, axes = _axes(8.6, 0.9 + _BAR * len(rows))
    for row, (_, share, name) in enumerate(rows):
        axes.barh(row, 100 * share, height=0.66, color=colours[name])
        axes.text(100 * share, row, f" {share:.0%}", va="center", fontsize=7.5)
    _label_rows(axes, [label for label, _, _ in rows])
    axes.axvline(50, color=theme.text, linewidth=0.8, linestyle=":")
    axes.axvline(100, color=theme.text, linewidth=0.8)
    axes.set_xlim(0, max(110, *(115 * share for _, share, _ in rows)))
    axes.grid(axis="x")
    axes.set_xlabel("one shared network, % of two separate networks")
    return figure


def _stage_bars(run: Run, theme: _Theme) -> Figure:
    names = stage_names(row.stages for _, row in run.staged)
    figure, axes = _axes(8.6, 1.3 + _BAR * len(run.staged))
    for row, (_, contender) in enumerate(run.staged):
        left = 0.0
        for number, name in enumerate(names):
            width = contender.stages.get(name, 0.0)
            # Colours repeat after eight stages, with hatching.
            axes.barh(
                row,
                width,
                left=left,
                height=0.66,
                color=theme.series[number % len(theme.series)],
                hatch="///" if number >= len(theme.series) else None,
                edgecolor=theme.grid,
                linewidth=0.4,
                label=None if row else name,
            )
            left += width
        axes.text(left, row, f" {left:,.3g}" if left < 1000 else f" {left:,.0f}", va="center", fontsize=7.5)
    _label_rows(axes, [f"{group.op}, {group.case}: {row.contender}" for group, row in run.staged])
    axes.margins(x=0.1)
    axes.grid(axis="x")
    axes.set_xlabel("ms")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=7.5)
    return figure


_PLOTS: dict[str, Callable[[Run, _Theme], Figure]] = {
    "highlights": lambda run, theme: _ratio_bars(run.highlights, theme),
    "ratios": lambda run, theme: _ratio_bars(run.ops, theme),
    "roofline": _roofline,
    "shared": _shared_bars,
    "stages": _stage_bars,
}


def draw(run: Run, folder: Path) -> None:
    """Writes the plots of a run that its pages show, `<plot>-light.png` and `<plot>-dark.png` with no background.

    The same results and version of matplotlib give the same bytes.

    Args:
        run: What to draw.
        folder: Where the files go; made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for mode, theme in _THEMES.items():
        colours = dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), theme.text
        )
        settings: dict[Any, Any] = {
            **colours,
            "grid.color": theme.grid,
            "font.family": "DejaVu Sans",
            "font.size": 8,
        }
        with mpl.rc_context({**mpl.rcParamsDefault, **settings}):
            for name in plot_names(run):
                _PLOTS[name](run, theme).savefig(
                    folder / f"{name}-{mode}.png",
                    dpi=_DPI,
                    transparent=True,
                    bbox_inches="tight",
                    metadata={"Software": None},
                )
