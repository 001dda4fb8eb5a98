"""Declares a benchmark: the op, its peers, its cases, the check that results agree, and the least cost of the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .rounds import replayed

OURS = "ours"

Arguments = tuple[Any, ...]


def tensors(tree: Any) -> list[Tensor]:
    """Returns the tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def nbytes(tree: Any) -> int:
    """Returns the number of bytes of the tensors in nested arguments or results."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(tree))


def to_device(tree: Any, device: torch.device) -> Any:
    """Moves the tensors in nested arguments to a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


@dataclass(frozen=True)
class Cost:
    """The least work that any implementation must do, computed by a formula.

    Attributes:
        bytes: Bytes to read and write: each input that affects the result once, and the result once.
        flops: Floating-point operations of the plain algorithm.
    """

    bytes: int
    flops: int


def no_problem(device: torch.device) -> str | None:
    """The `problem` of a case or a peer that runs on every device."""
    return None


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs on which our op and its peers are timed.

    Attributes:
        name: Size, layout and dtype, where they differ between cases.
        arguments: Makes the arguments on the CPU.
        full: Whether the case runs with `--full` only.
        highlight: Whether README's table of figures shows the case.
        problem: Returns why the case cannot be timed on a device, or None if it can.
    """

    name: str
    arguments: Callable[[], Arguments]
    full: bool = False
    highlight: bool = False
    problem: Callable[[torch.device], str | None] = no_problem


@dataclass(frozen=True, eq=False)
class Peer:
    """Another implementation of the same computation.

    Attributes:
        name: Its name in tables.
        call: Takes the arguments of our op.
        problem: Returns why the peer cannot run on a device, or None if it can.
        full: Whether the peer runs with `--full` only.
        agree: Replaces the comparison's `agree` for a peer that computes nearly, but not exactly, the same.
        sample: Reduces the arguments for a peer that is too slow to be timed. Such a peer only checks results, and
            only where no other peer runs.
    """

    name: str
    call: Callable[..., Any]
    problem: Callable[[torch.device], str | None] = no_problem
    full: bool = False
    agree: Callable[[Any, Any], None] | None = None
    sample: Callable[[Arguments], Arguments] | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """One op, or one direction of it, against its peers.

    Attributes:
        op: Name of the op.
        ours: Our implementation.
        peers: The implementations to compare with.
        cases: The inputs.
        agree: Takes our result and a peer's; raises `AssertionError` if they differ.
        cost: Takes the arguments and our result, returns the least cost.
        devices: Types of the devices that the op runs on.
    """

    op: str
    ours: Callable[..., Any]
    peers: Sequence[Peer]
    cases: Sequence[Case]
    agree: Callable[[Any, Any], None]
    cost: Callable[[Arguments, Any], Cost]
    devices: Sequence[str] = ("cpu", "cuda")

    def rows(self) -> pytest.MarkDecorator:
        """Parametrises a test with one `row` for each case, device and contender; ours comes first."""
        params = []
        for case in self.cases:
            for device in self.devices:
                timed = [None, *(peer for peer in self.peers if peer.sample is None)]
                params += [_parameter(Row(self, case, torch.device(device), peer)) for peer in timed]
        return pytest.mark.parametrize("row", params)


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table: an implementation on a case and a device; `peer` is None for our implementation."""

    comparison: Comparison
    case: Case
    device: torch.device
    peer: Peer | None

    @property
    def contender(self) -> str:
        return OURS if self.peer is None else self.peer.name

    @property
    def is_ours(self) -> bool:
        """Whether this is our implementation, possibly in another layout or compiled."""
        return self.contender.partition(",")[0] == OURS

    @property
    def call(self) -> Callable[..., Any]:
        return self.comparison.ours if self.peer is None else self.peer.call

    @property
    def group(self) -> str:
        """Name of the group of rows that do the same work on the same inputs."""
        return f"{self.comparison.op}: {self.case.name} ({self.device.type})"

    def same_case(self, other: Row) -> bool:
        """Returns whether both rows do the same work on the same inputs."""
        mine = (self.comparison, self.case, self.device)
        return mine == (other.comparison, other.case, other.device)

    @property
    def full(self) -> bool:
        return self.case.full or (self.peer is not None and self.peer.full)


def _parameter(row: Row) -> Any:
    cuda = row.device.type == "cuda"
    marks = [pytest.mark.benchmark(group=row.group, timer=replayed)]
    if row.full:
        marks.append(pytest.mark.full)
    if cuda:
        missing = not torch.cuda.is_available()
        marks += [pytest.mark.cuda, pytest.mark.skipif(missing, reason="torch finds no CUDA GPU here")]
    words = (row.device.type, row.case.name, row.contender)
    name = "-".join(word.replace(",", "").replace(" ", "_") for word in words)
    return pytest.param(row, id=name, marks=marks)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case on a device, ready to be timed.

    Attributes:
        arguments: The arguments, on the device.
        cost: The least cost of one call.
        verdicts: For each compared peer, how its result differs from ours, or None if they agree.
    """

    arguments: Arguments
    cost: Cost
    verdicts: dict[str, str | None]


def prepare(comparison: Comparison, case: Case, device: torch.device, full: bool) -> Prepared:
    """Makes the inputs and compares our result with the result of every peer that will be timed.

    Args:
        comparison: The op and its peers.
        case: The inputs.
        device: The device to run on.
        full: Whether peers that need `--full` take part.

    Returns:
        The inputs and the verdicts. If no timed peer runs on the device, the first peer that runs gives the verdict.
    """
    arguments = to_device(case.arguments(), device)
    output = comparison.ours(*arguments)
    verdicts: dict[str, str | None] = {}
    able = [peer for peer in comparison.peers if peer.problem(device) is None]
    for peer in able:
        if peer.sample is None and (full or not peer.full):
            verdicts[peer.name] = _verdict(comparison, peer, arguments, output)
    if not verdicts:
        for peer in able[:1]:
            part = arguments if peer.sample is None else peer.sample(arguments)
            verdicts[peer.name] = _verdict(comparison, peer, part, comparison.ours(*part))
    return Prepared(arguments, comparison.cost(arguments, output), verdicts)


def _verdict(comparison: Comparison, peer: Peer, arguments: Arguments, output: Any) -> str | None:
    try:
        (peer.agree or comparison.agree)(output, peer.call(*arguments))
    except AssertionError as difference:
        return f"{comparison.op} and {peer.name} differ: {difference}"
    return None
