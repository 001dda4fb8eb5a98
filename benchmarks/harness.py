"""What a benchmark declares: the op, its peers, its cases, when results agree, and what the work costs at least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .measuring import cuda_timer

OURS = "ours"

Arguments = tuple[Any, ...]


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def nbytes(tree: Any) -> int:
    """Bytes of the tensors in nested arguments or results."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(tree))


def to_device(tree: Any, device: torch.device) -> Any:
    """Moves the tensors in nested arguments."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


@dataclass(frozen=True)
class Cost:
    """The least that any implementation must do, from a formula.

    Attributes:
        bytes: Inputs that the result depends on, read once, and the result, written once.
        flops: Floating-point operations of the plain algorithm.
    """

    bytes: int
    flops: int


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs, declared once for all that are timed on them.

    Attributes:
        name: Says size, layout and dtype where they vary.
        arguments: Makes the arguments on the CPU.
        full: Whether the case is only for `--full`.
    """

    name: str
    arguments: Callable[[], Arguments]
    full: bool = False


def _no_problem(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Peer:
    """Another way to compute the same.

    Attributes:
        name: In tables.
        call: Takes the arguments of our op.
        problem: Says why it cannot run on a device, or returns None.
        full: Whether it is only for `--full`.
        agree: Compares results in place of the comparison's own `agree`; for peers that compute nearly the same.
        sample: For a peer too slow to be timed: cuts the arguments down to what it can do. It then only checks, and
            only where no other peer runs.
    """

    name: str
    call: Callable[..., Any]
    problem: Callable[[torch.device], str | None] = _no_problem
    full: bool = False
    agree: Callable[[Any, Any], None] | None = None
    sample: Callable[[Arguments], Arguments] | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """One op, or one direction of it, against its peers.

    Attributes:
        op: Name of the op.
        ours: The op.
        peers: Whom to compare with.
        cases: On what.
        agree: Takes our result and a peer's; raises AssertionError where they differ.
        cost: Takes the arguments and our result.
        devices: Where the op runs.
    """

    op: str
    ours: Callable[..., Any]
    peers: Sequence[Peer]
    cases: Sequence[Case]
    agree: Callable[[Any, Any], None]
    cost: Callable[[Arguments, Any], Cost]
    devices: Sequence[str] = ("cpu", "cuda")

    def rows(self) -> pytest.MarkDecorator:
        """Parametrises a test with a `row` for each case, device and contender, ours first."""
        params = []
        for case in self.cases:
            for device in self.devices:
                timed = [None, *(peer for peer in self.peers if peer.sample is None)]
                params += [_parameter(Row(self, case, torch.device(device), peer)) for peer in timed]
        return pytest.mark.parametrize("row", params)


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table: an implementation on a case and a device; `peer` is None for our own."""

    comparison: Comparison
    case: Case
    device: torch.device
    peer: Peer | None

    @property
    def contender(self) -> str:
        return OURS if self.peer is None else self.peer.name

    @property
    def call(self) -> Callable[..., Any]:
        return self.comparison.ours if self.peer is None else self.peer.call

    def same_case(self, other: Row) -> bool:
        """Whether both do the same work on the same inputs."""
        mine = (self.comparison, self.case, self.device)
        return mine == (other.comparison, other.case, other.device)

    @property
    def full(self) -> bool:
        return self.case.full or (self.peer is not None and self.peer.full)


def _parameter(row: Row) -> Any:
    cuda = row.device.type == "cuda"
    marks = [
        pytest.mark.benchmark(
            group=f"{row.comparison.op}: {row.case.name} ({row.device.type})",
            **({"timer": cuda_timer} if cuda else {}),
        )
    ]
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
        arguments: On the device.
        cost: Of one call.
        verdicts: For each peer that was compared: None, or how its result differs from ours.
    """

    arguments: Arguments
    cost: Cost
    verdicts: dict[str, str | None]


def prepare(comparison: Comparison, case: Case, device: torch.device, full: bool) -> Prepared:
    """Makes the inputs and compares our result on them with that of every peer that will be timed.

    Args:
        comparison: The op and its peers.
        case: The inputs.
        device: Where to run.
        full: Whether peers for `--full` take part.

    Returns:
        The inputs with the verdicts; at least one, from a peer that only checks where no other one runs.
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
