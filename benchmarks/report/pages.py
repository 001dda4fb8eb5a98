"""Markdown: docs/performance.md, and the part of README.md between its markers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .results import ROOT, Group, Row, Run, read_runs

IMAGES = "images/benchmarks"

_MARKED = re.compile(
    r"(<!-- Figures of (?P<source>\S+\.json), by python -m benchmarks\.report -->\n).*?(<!-- End of figures -->)",
    re.DOTALL,
)

_INTRODUCTION = """\
# Performance

`python -m benchmarks.report` writes this page, its plots and the table in the [README](../README.md) from the JSON
files in [benchmarks/results](../benchmarks/results). [benchmarks/README.md](../benchmarks/README.md) says how each
figure is measured. To add a device, its GPU if it has one, run this on it while it is otherwise idle:

```bash
pip install ".[bench]" && python -m benchmarks.record
```

- **ratio**: the peer's median time over ours in the same run, on the same inputs, after the results were found to
  agree. Above 1 ours is faster; **bold** is below 1, where the peer is faster.
- The peers named detectron2 are its algorithms written in plain PyTorch; eager is the same computation in PyTorch's own
  operations.
- Times are medians; **20 to 80 %** is where the middle three fifths of our rounds lie.
- **MB**: memory at its highest point over what was in use before the call, the result included.
- **of copy**, **of matmul**: bytes and operations per second as a share of what PyTorch's own copy and matrix product
  reach on the device, the latter in the same dtype.
- Plots show the fastest of the peers.
"""


def significant(value: float) -> str:
    """Three significant digits without an exponent: 0.0763, 4.54, 89.5, 4,543."""
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:,.{max(2 - exponent, 0)}f}"


def ratio_text(ratio: float) -> str:
    """A ratio; bold where ours is slower."""
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"
    return f"**{text}**" if ratio < 1 else text


def _scaled(row: Row, name: str, unit: float) -> str:
    value = row.figure(name)
    return "" if value is None else significant(value / unit)


def _spread(row: Row) -> str:
    ends = row.info.get("from_20_to_80_percent_ms")
    return " to ".join(map(significant, ends)) if ends else ""


def table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """A Markdown table whose first `left` columns are text; columns without any entry are left out."""
    kept = [number for number in range(len(header)) if any(line[number] for line in lines)]
    rows = [header, ["---" if number < left else "--:" for number in range(len(header))], *lines]
    return [f"| {' | '.join(row[number] for number in kept)} |" for row in rows]


def _op_text(group: Group) -> str:
    op, comma, rest = group.op.partition(",")
    return f"`{op}`{comma}{rest}" if op.isidentifier() and not group.is_network else group.op


def _picture(name: str, run: Run, alt: str, base: str) -> list[str]:
    stem = f"{base}{IMAGES}/{run.name}/{name}"
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{stem}-dark.png">',
        f'  <img alt="{alt}" src="{stem}-light.png">',
        "</picture>",
        "",
    ]


def _caption(run: Run) -> list[str]:
    return ["", f"*{run.provenance}*", ""]


def _losses(run: Run, most: int | None = None) -> list[str]:
    """Says where a peer is faster, the worst first, and at most so many."""
    comparisons = sum(len(group.peers) for group in run.groups)
    if not run.losses:
        return [f"Ours is faster in all of the {comparisons} comparisons.", ""]
    worst = sorted(run.losses, key=lambda loss: loss[0].ratio(loss[1]))
    lines = [
        f"- {group.op}, {group.case}: {peer.contender} takes {ratio_text(group.ratio(peer))} of our time"
        for group, peer in worst[:most]
    ]
    if len(lines) < len(worst):
        lines.append(f"- and {len(worst) - len(lines)} more")
    return [f"In {len(worst)} of the {comparisons} comparisons the peer is faster:", "", *lines, ""]


def _ratios(run: Run) -> list[str]:
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
            _scaled(group.ours, "peak_memory_bytes", 1e6),
            _scaled(peer, "peak_memory_bytes", 1e6) if peer else "",
        )
        for group in run.ops
        for peer in group.peers or (None,)
    ]
    header = (
        "op",
        "case",
        "dtype",
        "ours, ms",
        "20 to 80 %",
        "peer",
        "peer, ms",
        "ratio",
        "ours, MB",
        "peer, MB",
    )
    return [
        "### Ops against their peers",
        "",
        *_picture("ratios", run, "Ratio of the fastest peer's time to ours for each op and case", ""),
        *table(header, lines, left=3),
        *_caption(run),
    ]


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
        "### How near to the device's limits",
        "",
        "Bytes are those that any implementation must read and write once, flops those of the plain algorithm. "
        f"The device copies {copy:.1f} GB/s, read and written, and multiplies large matrices at "
        f"{' and '.join(products)}, measured in the same run; the lines in the plot are those rates. Points above the "
        "slope found their inputs in a cache, or left out work that the plain algorithm does (NMS counts all pairs).",
        "",
        *_picture("roofline", run, "Roofline: GFLOP/s over flops per byte, with the device's own rates", ""),
        *table(("op", "case", "MB", "MFLOP", "GB/s", "of copy", "GFLOP/s", "of matmul"), lines, left=2),
        *_caption(run),
    ]


def shares(group: Group, two: Row) -> dict[str, float]:
    """What the shared network takes as a share of two networks, for each quantity that the run has."""
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
    return {**found, "time": group.ours.median / two.median}


def _shares_text(group: Group, two: Row) -> str:
    parts = [f"{share:.0%} of the {label}" for label, share in shares(group, two).items()]
    text = f"{', '.join(parts)} of two networks"
    once = group.ours.info.get("shared_share_of_flops")
    return (
        text
        if once is None
        else f"{text}; backbone and FPN, which those run twice, are {once:.0%} of its FLOPs"
    )


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
            "" if row.is_ours else ratio_text(group.ratio(row)),
        )
        for group in groups
        for row in group.rows
    ]
    header = (
        "what",
        "case",
        "network",
        "stride",
        "parameters, M",
        "GFLOP",
        "activations, M",
        "kept, MB",
        "peak, MB",
    )
    return table((*header, "ms", "images/s", "of matmul", "ratio"), lines, left=3)


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
        "### One shared network against two",
        "",
        "`ours` is one network for things and stuff; its peers are two, one for each, with the same backbone unless "
        "the name says another. Kept are the tensors that a backward pass needs, summed over both networks; training "
        "them one after the other takes only the larger. The shared network takes:",
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
        "Activations are the numbers that convolutions put out, as the paper counts them; kept are the tensors that a "
        "backward pass needs.",
        "",
        *_network_table(run.networks),
        *_caption(run),
    ]


def stage_names(stages: Iterable[dict[str, float]]) -> list[str]:
    """All stages of some rows, in the order in which they first appear."""
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
    return table(("what", "case", "network", *(f"{name}, {unit}" for name in names)), lines, left=3)


def _stages(run: Run) -> list[str]:
    return [
        "### Where the time goes",
        "",
        *_picture("stages", run, "Milliseconds of each stage of the network", ""),
        *_stage_table([(group, row, row.stages) for group, row in run.staged], "ms"),
        *_caption(run),
    ]


def plot_names(run: Run) -> list[str]:
    """The plots that the pages show of a run."""
    parts = {
        "highlights": run.highlights,
        "ratios": run.ops,
        "roofline": run.metered,
        "shared": [group for group in run.shared if group.two],
        "stages": run.staged,
    }
    return [name for name, shown in parts.items() if shown]


def performance_page(runs: Sequence[Run]) -> str:
    """The text of docs/performance.md: a chapter for each run."""
    lines = _INTRODUCTION.splitlines()
    for run in runs:
        lines += ["", f"## {run.device} ({run.source})", "", *_losses(run)]
        parts = (
            (run.ops, _ratios),
            (run.metered, _roofline),
            (run.shared, _shared),
            (run.networks, _networks),
        )
        for shown, write in (*parts, (run.staged, _stages)):
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
            group.fastest.contender,
            significant(1e3 * group.fastest.median),
            ratio_text(group.ratio(group.fastest)),
        )
        for group in run.highlights
    ]
    shared = [
        f"One network for things and stuff takes {_shares_text(group, group.two)} ({group.op}, {group.case})."
        for group in run.highlights
        if group.two is not None
    ][:1]
    return [
        *_picture("highlights", run, "Ratio of the fastest peer's time to ours", "docs/"),
        *table(("what", "case", "ours, ms", "fastest peer", "its, ms", "ratio"), lines, left=2),
        *_caption(run),
        *shared,
        *([""] if shared else []),
        *_losses(run, most=5),
        f"[docs/performance.md](docs/performance.md) has all of them, from [this file]({run.source}).",
    ]


def readme_with_figures(text: str, root: Path = ROOT) -> str:
    """Replaces what is between each pair of markers in README.md.

    Args:
        text: Of README.md.
        root: Folder that the files named in the markers are relative to.

    Returns:
        The new text.
    """

    def written(match: re.Match[str]) -> str:
        runs = read_runs(root / match["source"])
        body = "\n\n".join("\n".join(_highlights(run)) for run in runs)
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return _MARKED.sub(written, text)
