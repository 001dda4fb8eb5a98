"""Timing of one row, what is noted beside the time, and the table of ratios at the end."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .harness import Arguments, Prepared, Row, nbytes, tensors
from .measuring import cold_copies, device_name, peak_memory

_MOST_ROUNDS = 500

# Three rounds give a median. A call that takes longer than this gets no more, and needs no warming up but the calls
# that checked it and counted its memory.
_SLOW_SECONDS = 0.25
_SLOW_ROUNDS = 3

# A round of calls on the GPU lasts this long, so that the events around it weigh little.
_ROUND_SECONDS = 2e-3


@dataclass(frozen=True)
class Limits:
    """What a device reaches in PyTorch's own operations, in the same run.

    Attributes:
        copy: Bytes per second, read plus written, of a device.
        matmul: Operations per second of a device in a dtype.
    """

    copy: Callable[[torch.device], float]
    matmul: Callable[[torch.device, torch.dtype], float]


@dataclass(frozen=True)
class Result:
    """One timed row; `extra_info` is the dictionary that pytest-benchmark writes to its JSON."""

    median: float
    extra_info: dict[str, Any]


@dataclass
class Report:
    """The timed rows of a session."""

    results: list[tuple[Row, Result]] = field(default_factory=list)

    def add(self, row: Row, result: Result) -> None:
        """Notes a row and, since ours comes first in each case, its ratio to ours on both sides."""
        ours = self.ours(row)
        self.results.append((row, result))
        if row.peer is not None and ours is not None:
            ratio = result.median / ours.median
            result.extra_info["times_ours"] = ratio
            ours.extra_info["ratio_to"][row.contender] = ratio

    def ours(self, row: Row) -> Result | None:
        """Our own row on the case and device of another, if it was timed."""
        for other, result in self.results:
            if other.peer is None and other.same_case(row):
                return result
        return None


def _clone(arguments: Arguments) -> Arguments:
    def clone(leaf: Any) -> Any:
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    copy: Arguments = tree_map(clone, arguments)
    return copy


def _dtype(arguments: Arguments) -> torch.dtype | None:
    floating = [tensor.dtype for tensor in tensors(arguments) if tensor.is_floating_point()]
    return floating[0] if floating else None


def note_flops(benchmark: Any, flops: int) -> None:
    """Notes operations and their rate beside a median; in place of the formula's if they were counted since."""
    info = benchmark.extra_info
    info["flops"] = flops
    if benchmark.enabled:
        info["gflop_per_s"] = flops / float(benchmark.stats.stats.median) / 1e9
        info["share_of_matmul"] = info["gflop_per_s"] / info["matmul_gflop_per_s"]


def measure(
    benchmark: Any,
    row: Row,
    prepared: Prepared,
    limits: Limits,
    config: pytest.Config,
) -> Result | None:
    """Times a row with pytest-benchmark and fills its `extra_info`.

    Args:
        benchmark: pytest-benchmark's fixture.
        row: What to time.
        prepared: Its inputs, already checked.
        limits: Of the device.
        config: For --benchmark-max-time and --benchmark-min-rounds.

    Returns:
        The result, or None where --benchmark-disable asks for the checks alone.
    """
    benchmark.name = row.contender
    benchmark.params = {"case": row.case.name, "device": row.device.type, "contender": row.contender}
    if not benchmark.enabled:
        benchmark.pedantic(row.call, args=prepared.arguments)
        return None
    copies = cold_copies(row.device, nbytes(prepared.arguments))
    turns = itertools.cycle([prepared.arguments, *(_clone(prepared.arguments) for _ in range(copies - 1))])

    def call() -> Any:
        return row.call(*next(turns))

    # The call that counts memory also says how many rounds the time allows.
    memory, seconds = peak_memory(row.device, call)
    iterations = max(1, min(int(_ROUND_SECONDS / seconds), 100)) if row.device.type == "cuda" else 1
    allowed = int(float(config.getoption("benchmark_max_time")) / (seconds * iterations))
    slow = seconds > _SLOW_SECONDS
    least = _SLOW_ROUNDS if slow else int(config.getoption("benchmark_min_rounds"))
    rounds = max(least, min(allowed, _MOST_ROUNDS))
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=0 if slow else 1)

    median = float(benchmark.stats.stats.median)
    fifths = statistics.quantiles(benchmark.stats.stats.data, n=5, method="inclusive")
    copy = limits.copy(row.device)
    dtype = _dtype(prepared.arguments)
    rate = prepared.cost.bytes / median
    benchmark.extra_info.update(
        op=row.comparison.op,
        case=row.case.name,
        contender=row.contender,
        device=device_name(row.device),
        threads=torch.get_num_threads() if row.device.type == "cpu" else None,
        dtype=str(dtype).removeprefix("torch.") if dtype else "none",
        from_20_to_80_percent_ms=[1e3 * fifths[0], 1e3 * fifths[-1]],
        bytes=prepared.cost.bytes,
        gb_per_s=rate / 1e9,
        copy_gb_per_s=copy / 1e9,
        share_of_copy=rate / copy,
        matmul_gflop_per_s=limits.matmul(row.device, dtype or torch.float32) / 1e9,
        peak_memory_bytes=memory,
    )
    note_flops(benchmark, prepared.cost.flops)
    if row.peer is None:
        benchmark.extra_info["ratio_to"] = {}
    return Result(median, benchmark.extra_info)


def _megabytes(result: Result) -> str:
    count = result.extra_info["peak_memory_bytes"]
    return "-" if count is None else f"{count / 1e6:.1f}"


def ratio_table(report: Report) -> list[str]:
    """Lines that set our median beside each peer's; a ratio above 1 means that ours is faster."""
    cells = []
    for row, ours in report.results:
        if row.peer is not None:
            continue
        beside = [
            (other.contender, result)
            for other, result in report.results
            if other.peer is not None and other.same_case(row)
        ]
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
        for name, result in beside:
            ratio = result.median / ours.median
            cells.append(
                (*common, name, f"{result.median * 1e3:.3f}", f"{ratio:.2f}", *tail, _megabytes(result))
            )
        if not beside:
            cells.append((*common, "none", "-", "-", *tail, "-"))
    if not cells:
        return []
    header = (
        "op", "case", "device", "ours ms", "peer", "peer ms", "ratio", "GB/s", "of copy", "of matmul", "MB", "peer MB"
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
        "ratio: peer's median / ours. GB/s, of copy: ours, of the bytes it must move; of matmul: of the plain "
        "algorithm's operations. MB: memory at its peak"
    )
    return lines
