"""Times the rows of a case, records the quantities that accompany the times, and formats the table of ratios."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .comparison import Arguments, Prepared, Row, nbytes, tensors
from .measuring import cold_copies, device_name
from .rounds import Timing, middle, ratio, replay, time_interleaved


@dataclass(frozen=True)
class Limits:
    """The rates that PyTorch's own operations reach on a device, measured in the same run.

    Attributes:
        copy: Takes a device, returns the bytes per second of a copy, read plus written.
        matmul: Takes a device and a dtype, returns the operations per second of a matrix product.
    """

    copy: Callable[[torch.device], float]
    matmul: Callable[[torch.device, torch.dtype], float]


@dataclass(frozen=True)
class Result:
    """One timed row; `extra_info` is the dictionary that pytest-benchmark writes to its JSON."""

    timing: Timing
    extra_info: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.timing.seconds)


@dataclass
class Report:
    """The timed rows of a session."""

    results: list[tuple[Row, Result]] = field(default_factory=list)

    def add(self, row: Row, result: Result) -> None:
        """Records a row, its ratio to our row, and its ratios to or from the other rows of the case."""
        for other, earlier in self.of_case(row):
            _compare((row, result), (other, earlier))
            _compare((other, earlier), (row, result))
        self.results.append((row, result))

    def of_case(self, row: Row) -> list[tuple[Row, Result]]:
        """Returns the timed rows that do the same work on the same inputs."""
        return [(other, result) for other, result in self.results if other.same_case(row)]


def _compare(ours: tuple[Row, Result], theirs: tuple[Row, Result]) -> None:
    """Records the ratio of a row to one of ours in the `extra_info` of both."""
    (our_row, our), (their_row, their) = ours, theirs
    if not our_row.is_ours or (their_row.is_ours and our_row.peer is not None):
        return
    found = ratio(their.timing, our.timing)
    if our_row.peer is None:
        their.extra_info["times_ours"] = found.median
        their.extra_info["times_ours_from_20_to_80_percent"] = list(found.ends)
    if not their_row.is_ours:
        our.extra_info["ratio_to"][their_row.contender] = found.median
        our.extra_info["ratio_to_from_20_to_80_percent"][their_row.contender] = list(found.ends)


def _clone(arguments: Arguments) -> Arguments:
    def clone(leaf: Any) -> Any:
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    copy: Arguments = tree_map(clone, arguments)
    return copy


def _dtype(arguments: Arguments) -> torch.dtype | None:
    floating = [tensor.dtype for tensor in tensors(arguments) if tensor.is_floating_point()]
    return floating[0] if floating else None


def note_flops(benchmark: Any, flops: int) -> None:
    """Records the number of operations and their rate, replacing the number from the formula."""
    info = benchmark.extra_info
    info["flops"] = flops
    if benchmark.enabled:
        info["gflop_per_s"] = flops / float(benchmark.stats.stats.median) / 1e9
        info["share_of_matmul"] = info["gflop_per_s"] / info["matmul_gflop_per_s"]


def time_case(
    rows: Sequence[Row], prepared: Prepared, max_seconds: float, min_rounds: int
) -> dict[str, Timing]:
    """Times the contenders of a case in interleaved rounds.

    Args:
        rows: Rows that do the same work on the same inputs, and whose results agree.
        prepared: Their inputs.
        max_seconds: Time for all rounds, per row.
        min_rounds: Least number of rounds.

    Returns:
        The times of each row, by the name of its contender.
    """
    device = rows[0].device
    copies = cold_copies(device, nbytes(prepared.arguments))
    arguments = [prepared.arguments, *(_clone(prepared.arguments) for _ in range(copies - 1))]

    def calling(row: Row) -> Callable[[], Any]:
        turns = itertools.cycle(arguments)
        return lambda: row.call(*next(turns))

    return time_interleaved({row.contender: calling(row) for row in rows}, device, max_seconds, min_rounds)


def report_row(benchmark: Any, row: Row, prepared: Prepared, timing: Timing, limits: Limits) -> Result:
    """Passes the times of a row to pytest-benchmark and fills its `extra_info`.

    Args:
        benchmark: pytest-benchmark's fixture.
        row: The row.
        prepared: Its inputs.
        timing: Its times.
        limits: The rates of the device.
    """
    replay(benchmark, timing)
    result = Result(timing, benchmark.extra_info)
    copy = limits.copy(row.device)
    dtype = _dtype(prepared.arguments)
    rate = prepared.cost.bytes / result.median
    benchmark.extra_info.update(
        op=row.comparison.op,
        case=row.case.name,
        contender=row.contender,
        device=device_name(row.device),
        threads=torch.get_num_threads() if row.device.type == "cpu" else None,
        dtype=str(dtype).removeprefix("torch.") if dtype else "none",
        rounds="interleaved",
        from_20_to_80_percent_ms=[1e3 * end for end in middle(timing.seconds)],
        bytes=prepared.cost.bytes,
        gb_per_s=rate / 1e9,
        copy_gb_per_s=copy / 1e9,
        share_of_copy=rate / copy,
        matmul_gflop_per_s=limits.matmul(row.device, dtype or torch.float32) / 1e9,
        peak_memory_bytes=timing.memory,
        highlight=row.case.highlight,
    )
    note_flops(benchmark, prepared.cost.flops)
    if row.is_ours:
        benchmark.extra_info.update(ratio_to={}, ratio_to_from_20_to_80_percent={})
    return result


def _megabytes(result: Result) -> str:
    count = result.extra_info["peak_memory_bytes"]
    return "-" if count is None else f"{count / 1e6:.1f}"


def ratio_table(report: Report) -> list[str]:
    """Returns lines with our median and each peer's median; a ratio above 1 means that ours is faster."""
    cells = []
    for row, ours in report.results:
        if row.peer is not None:
            continue
        common = (
            row.comparison.op,
            row.case.name,
            row.device.type,
            f"{ours.median * 1e3:.3f}",
        )
        tail = (
            f"{ours.extra_info['gb_per_s']:.3g}",
            f"{ours.extra_info['share_of_copy']:.1%}",
            f"{ours.extra_info['share_of_matmul']:.1%}",
            _megabytes(ours),
        )
        compared = [(other, result) for other, result in report.of_case(row) if other is not row]
        for other, result in compared:
            info = result.extra_info
            ends = " to ".join(f"{end:.2f}" for end in info["times_ours_from_20_to_80_percent"])
            ratios = (f"{info['times_ours']:.2f}", ends)
            cells.append(
                (*common, other.contender, f"{result.median * 1e3:.3f}", *ratios, *tail, _megabytes(result))
            )
        if not compared:
            cells.append((*common, "none", "-", "-", "-", *tail, "-"))
    if not cells:
        return []
    header = (
        "op", "case", "device", "ours ms", "peer", "peer ms", "ratio", "20 to 80 %", "GB/s", "of copy", "of matmul",
        "MB", "peer MB",
    )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    left = {0, 1, 2, 4}
    lines = [
        "  ".join(
            text.ljust(width) if position in left else text.rjust(width)
            for position, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *cells)
    ]
    found = [result.extra_info for _, result in report.results]
    copies = sorted({(info["device"], info["copy_gb_per_s"]) for info in found})
    lines += [f"{name}: copies {speed:.1f} GB/s, read and written" for name, speed in copies]
    products = sorted({(info["device"], info["dtype"], info["matmul_gflop_per_s"]) for info in found})
    lines += [
        f"{name}: multiplies matrices of {dtype} at {speed:,.0f} GFLOP/s"
        for name, dtype, speed in products
        if dtype != "none"
    ]
    lines.append(
        "ratio: median of the rounds' ratios of peer to ours, and the range of their middle three fifths; the rounds "
        "are interleaved. GB/s and of copy: our rate for the least bytes to move. "
        "of matmul: our rate for the operations of the plain algorithm. MB: peak memory"
    )
    return lines
