"""Writes docs/performance.md and the figures of README.md in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .results import ROOT, Group, Row, Run, read_runs
from .tables import replace_between, table

IMAGES = "images/benchmarks"

_INTRODUCTION = """\
# Performance

`python -m benchmarks.scripts.report` writes this page, its plots and the table in the [README](../README.md) from the
JSON files in [benchmarks/results](../benchmarks/results). [benchmarks/README.md](../benchmarks/README.md) describes how
each figure is measured. To add your machine's GPU, or its CPU if it has no GPU, run this while it is otherwise idle:

```bash
pip install ".[bench]" && python -m benchmarks.scripts.record
```

- **ratio**: the peer's time divided by our time, on the same inputs, after a check that the results agree. The rounds
  of ours and the peers are interleaved; the ratio is the median of the rounds' ratios. The line below a table says so,
  or that the rounds were separate, as in older results; their ratio is that of the two medians. Ratios above 1 mean
  that ours is faster. Ratios below 1, where the peer is faster, are **bold**.
- **peer**: detectron2 stands for its algorithms, reimplemented in plain PyTorch; detectron2 0.6 for the installed
  package with its own model and post-processing. eager stands for the same computation with PyTorch's own operations.
- **ms**: the median time. **20 to 80 %** is the range of the middle three fifths of the ratios, or of our rounds.
- **MB**: peak memory above the memory in use before the call, including the result.
- **of copy**, **of matmul**: our bytes and operations per second, as a share of the rates that PyTorch's copy and
  matrix product reach on the device. The matrix product is in the same dtype.
- Plots show the fastest peer.
"""


def significant(value: float) -> str:
    """Formats three significant digits without an exponent: 0.0763, 4.54, 89.5, 4,543."""
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:,.{max(2 - exponent, 0)}f}"


def ratio_text(ratio: float) -> str:
    """Formats a ratio; bold if ours is slower."""
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"
    return f"**{text}**" if ratio < 1 else text


def _scaled(row: Row, name: str, unit: float) -> str:
    value = row.figure(name)
    return "" if value is None else significant(value / unit)


def _spread(row: Row) -> str:
    ends = row.info.get("from_20_to_80_percent_ms")
    return " to ".join(map(significant, ends)) if ends else ""


def _range_text(group: Group, peer: Row) -> str:
    ends = group.range(peer)
    return " to ".join(ratio_text(end).strip("*") for end in ends) if ends else ""


def _op_text(group: Group) -> str:
    op, comma, rest = group.op.partition(",")
    return f"`{op}`{comma}{rest}" if op.isidentifier() and not group.is_network else group.op


def _picture(name: str, run: Run, alt: str, base: str) -> list[str]:
    return [f"![{alt}]({base}{IMAGES}/{run.name}/{name}.svg)", ""]


def _caption(run: Run) -> list[str]:
    return ["", f"*{run.provenance}*", ""]


def _losses(run: Run, most: int | None = None) -> list[str]:
    """Lists the comparisons in which a peer is faster, the worst first, at most `most` of them."""
    comparisons = sum(len(group.peers) for group in run.groups)
    if not run.losses:
        return [f"Ours is faster in all {comparisons} comparisons.", ""]
    worst = sorted(run.losses, key=lambda loss: loss[0].ratio(loss[1]))
    lines = [
        f"- {group.op}, {group.case}: {peer.contender} takes {ratio_text(group.ratio(peer))} of our time"
        for group, peer in worst[:most]
    ]
    if len(lines) < len(worst):
        lines.append(f"- and {len(worst) - len(lines)} more")
    return [f"The peer is faster in {len(worst)} of {comparisons} comparisons:", "", *lines, ""]


def _ratio_table(groups: Iterable[Group]) -> list[str]:
    lines = [
        (
            _op_text(group),
            group.case,
            group.ours.info.get("dtype", ""),
            significant(1e3 * group.ours.median),
            _spread(group.ours),
            peer.contender if peer else "none",
            significant(1e3 * peer.median) if peer else "",
            ratio_text(group.ratio(peer)) if peer else "",
            _range_text(group, peer) if peer else "",
            _scaled(group.ours, "peak_memory_bytes", 1e6),
            _scaled(peer, "peak_memory_bytes", 1e6) if peer else "",
        )
        for group in groups
        for peer in group.peers or (None,)
    ]
    header = (
        "op",
        "case",
        "dtype",
        "ours, ms",
        "of ours, 20 to 80 %",
        "peer",
        "peer, ms",
        "ratio",
        "of the ratio, 20 to 80 %",
        "ours, MB",
        "peer, MB",
    )
    return table(header, lines, left=3)


def _ratios(run: Run) -> list[str]:
    return [
        "### Ops compared with their peers",
        "",
        *_picture("ratios", run, "Ratio of the fastest peer's time to ours for each op and case", ""),
        *_ratio_table(run.ops),
        *_caption(run),
    ]


def op_figures(runs: Iterable[Run], name: str) -> list[str]:
    """Formats the cases of one op for its page on the site: a table for each run that timed the op.

    Args:
        runs: The runs to search.
        name: The name of the op.

    Returns:
        The lines in Markdown; none if no run timed the op.
    """
    lines = []
    for run in runs:
        groups = [group for group in run.ops if group.op.partition(",")[0] == name]
        if groups:
            lines += [*_ratio_table(groups), *_caption(run)]
    return lines


def _share(row: Row, name: str) -> str:
    value = row.figure(name)
    return "" if value is None else f"{value:.1%}"


def _roofline(run: Run) -> list[str]:
    copy = run.metered[0].ours.info["copy_gb_per_s"]
    products = [f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in run.matmul.items()]
    lines = [
        (
            _op_text(group),
            group.case,
            _scaled(group.ours, "bytes", 1e6),
            _scaled(group.ours, "flops", 1e6),
            _scaled(group.ours, "gb_per_s", 1),
            _share(group.ours, "share_of_copy"),
            _scaled(group.ours, "gflop_per_s", 1),
            _share(group.ours, "share_of_matmul"),
        )
        for group in run.metered
    ]
    return [
        "### Share of the device's limits",
        "",
        "MB counts the bytes that any implementation must read and write once. MFLOP counts the operations of the "
        f"plain algorithm. The device copies {copy:.1f} GB/s (read plus written) and multiplies large matrices at "
        f"{' and '.join(products)}, measured in the same run. The lines in the plot show these rates. Points above "
        "the slope had their inputs in a cache, or skip work of the plain algorithm (NMS: comparing all pairs).",
        "",
        *_picture("roofline", run, "Roofline: GFLOP/s over flops per byte, with the rates of the device", ""),
        *table(("op", "case", "MB", "MFLOP", "GB/s", "of copy", "GFLOP/s", "of matmul"), lines, left=2),
        *_caption(run),
    ]


def shares(group: Group, two: Row) -> dict[str, float]:
    """Computes the cost of the shared network as a share of the cost of two, for each quantity in the run."""
    names = {
        "parameters": "parameters",
        "FLOPs": "flops",
        "tensors kept for backward": "saved_for_backward_bytes",
        "peak memory": "peak_memory_bytes",
    }
    found = {}
    for label, name in names.items():
        ours, theirs = group.ours.figure(name), two.figure(name)
        if ours and theirs:
            found[label] = ours / theirs
    return {**found, "time": 1 / group.ratio(two)}


def _shares_text(group: Group, two: Row) -> str:
    parts = [f"{share:.0%} of the {label}" for label, share in shares(group, two).items()]
    return f"{', '.join(parts)} of two networks"


def _variant_text(group: Group, row: Row) -> str:
    """Returns the ratio of the fastest peer to a variant of ours, with the name of the peer."""
    if row is group.ours or not group.peers:
        return ""
    peer = min(group.peers, key=lambda peer: group.ratio(peer, row))
    return f"{ratio_text(group.ratio(peer, row))} ({peer.contender})"


def _network_table(groups: Sequence[Group]) -> list[str]:
    lines = [
        (
            group.op,
            group.case,
            row.contender,
            f"{row.info['stride']}" if "stride" in row.info else "",
            _scaled(row, "parameters", 1e6),
            _scaled(row, "flops", 1e9),
            _scaled(row, "activations", 1e6),
            _scaled(row, "saved_for_backward_bytes", 1e6),
            _scaled(row, "peak_memory_bytes", 1e6),
            significant(1e3 * row.median),
            _scaled(row, "images_per_s", 1),
            _share(row, "share_of_matmul"),
            _variant_text(group, row) if row.is_ours else ratio_text(group.ratio(row)),
            "" if row.is_ours else _range_text(group, row),
        )
        for group in groups
        for row in group.rows
    ]
    header = (
        "benchmark",
        "case",
        "network",
        "stride",
        "parameters, M",
        "GFLOP",
        "activations, M",
        "kept, MB",
        "peak, MB",
    )
    return table((*header, "ms", "images/s", "of matmul", "ratio", "20 to 80 %"), lines, left=3)


def _shared(run: Run) -> list[str]:
    sentences = []
    for group in run.shared:
        if group.two is not None:
            sentences.append(f"- {group.op}, {group.case}: {_shares_text(group, group.two)}")
    operations = [
        (group, row, {stage: flops / 1e9 for stage, flops in row.info["flops_by_formula"].items()})
        for group in run.shared
        for row in group.rows
        if "flops_by_formula" in row.info
    ]
    pictures = (
        _picture("shared", run, "One shared network as a share of two separate ones", "") if sentences else []
    )
    return [
        "### One shared network compared with two",
        "",
        "`ours` is one network for things and stuff. Its peers are two networks, one for things and one for stuff, "
        "with the same backbone unless their name states another. The column **kept** is the memory of the tensors "
        "that a backward pass needs, summed over both networks. Training them one after the other needs only the "
        "larger of the two amounts. The shared network takes:",
        "",
        *sentences,
        "",
        *pictures,
        *_network_table(run.shared),
        "",
        *(_stage_table(operations, "GFLOP") if operations else []),
        *_caption(run),
    ]


def _networks(run: Run) -> list[str]:
    return [
        "### Networks and backbones",
        "",
        "Activations are counted as in the paper: the numbers that convolutions output. The column **kept** is the "
        "memory of the tensors that a backward pass needs.",
        "",
        *_network_table(run.networks),
        *_caption(run),
    ]


def stage_names(stages: Iterable[dict[str, float]]) -> list[str]:
    """Returns the names of all stages, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in stages for name in row))


def _stage_table(rows: Sequence[tuple[Group, Row, dict[str, float]]], unit: str) -> list[str]:
    names = stage_names(stages for _, _, stages in rows)
    lines = [
        (
            group.op,
            group.case,
            row.contender,
            *(significant(stages[name]) if name in stages else "" for name in names),
        )
        for group, row, stages in rows
    ]
    return table(("benchmark", "case", "network", *(f"{name}, {unit}" for name in names)), lines, left=3)


def _stages(run: Run) -> list[str]:
    return [
        "### Time per stage",
        "",
        *_picture("stages", run, "Milliseconds per stage of the network", ""),
        *_stage_table([(group, row, row.stages) for group, row in run.staged], "ms"),
        *_caption(run),
    ]


def _steps(run: Run) -> list[str]:
    return [
        "### Where a training step's time goes",
        "",
        "One image, each part by itself; in a training run, processes load images during the steps. **load** reads a "
        "photograph of COCO and its annotation, resizes and flips them, and makes the target, in one process. "
        "**targets** are the proposals, the sampled anchors and boxes and their targets. **optimizer** is SGD with "
        "momentum.",
        "",
        *_stage_table([(group, row, row.step) for group, row in run.steps], "ms"),
        *_caption(run),
    ]


def _loading(run: Run) -> list[str]:
    lines = [
        (
            group.case,
            f"{group.ours.info['images']}",
            _scaled(group.ours, "images_per_s", 1),
            peer.contender if peer else "none",
            _scaled(peer, "images_per_s", 1) if peer else "",
            ratio_text(group.ratio(peer)) if peer else "",
            _range_text(group, peer) if peer else "",
            _scaled(group.ours, "peak_memory_bytes", 1e6),
            _scaled(peer, "peak_memory_bytes", 1e6) if peer else "",
        )
        for group in run.loading
        for peer in group.peers or (None,)
    ]
    header = (
        "case",
        "images",
        "ours, images/s",
        "peer",
        "peer, images/s",
        "ratio",
        "20 to 80 %",
        "ours, MB",
        "peer, MB",
    )
    return [
        "### Loading of training data",
        "",
        "Images and targets of a training run: read, resized, flipped, and handed to the process that trains. The peer "
        "is a data set as in torchvision's tutorials, with a mask for each instance and its transforms, in torch's "
        "DataLoader. The time includes the start and the end of the workers. MB is the memory of the process that "
        "trains.",
        "",
        *table(header, lines, left=1),
        *_caption(run),
    ]


def plot_names(run: Run) -> list[str]:
    """Returns the names of the plots of a run that the pages show."""
    parts = {
        "highlights": run.highlights,
        "ratios": run.ops,
        "roofline": run.metered,
        "shared": [group for group in run.shared if group.two],
        "stages": run.staged,
    }
    return [name for name, shown in parts.items() if shown]


def performance_page(runs: Sequence[Run]) -> str:
    """Writes docs/performance.md, with a chapter for each run."""
    lines = _INTRODUCTION.splitlines()
    for run in runs:
        lines += ["", f"## {run.device} ({run.source})", "", *_losses(run)]
        parts = (
            (run.ops, _ratios),
            (run.metered, _roofline),
            (run.shared, _shared),
            (run.networks, _networks),
        )
        last = ((run.staged, _stages), (run.steps, _steps), (run.loading, _loading))
        for shown, write in (*parts, *last):
            if shown:
                lines += write(run)
    text = "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _highlights(run: Run) -> list[str]:
    lines = [
        (
            _op_text(group),
            group.case,
            significant(1e3 * group.ours.median),
            peer.contender,
            significant(1e3 * peer.median),
            ratio_text(group.ratio(peer)),
            _range_text(group, peer),
        )
        for group in run.highlights
        for peer in group.featured
    ]
    shared = [
        f"One network for things and stuff takes {_shares_text(group, group.two)} ({group.op}, {group.case})."
        for group in run.highlights
        if group.two is not None
    ][:1]
    return [
        *_picture("highlights", run, "Ratio of the fastest peer's time to ours", "docs/"),
        *table(
            ("benchmark", "case", "ours, ms", "peer", "peer, ms", "ratio", "20 to 80 %"),
            lines,
            left=2,
        ),
        *_caption(run),
        *shared,
        *([""] if shared else []),
        *_losses(run, most=5),
        "All comparisons are in [docs/performance.md](docs/performance.md), with data from "
        f"[{run.source}]({run.source}).",
    ]


def readme_with_figures(text: str, root: Path = ROOT) -> str:
    """Rewrites the figures between their markers in the text of README.md.

    Args:
        text: The text of README.md.
        root: The directory that the results named in the markers are relative to.

    Returns:
        The new text.
    """

    def write(source: str) -> list[str]:
        return [line for run in read_runs(root / source) for line in _highlights(run)]

    return replace_between(text, "figures", write)
