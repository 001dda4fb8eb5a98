"""Tests that run_op_checks detects faulty ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

from support import op_checks
from support.op_checks import Op, Sample, Tolerance


@dataclass(frozen=True)
class Stub(Op):
    """An op that is defined by two functions."""

    native: Callable[..., Tensor] = torch.neg
    twin: Callable[..., Tensor] = torch.neg

    @property
    def dispatcher_ops(self) -> set[str]:
        return set()

    @property
    def function(self) -> Callable[..., Tensor]:
        return self.native

    @property
    def reference(self) -> Callable[..., Tensor]:
        return self.twin


SAMPLES = [Sample((torch.rand(rows, 3, 5, 7),)) for rows in (2, 4, 9, 0)]


def negate(x: Tensor) -> Tensor:
    return -x


def test_a_good_op_passes() -> None:
    op_checks.run_op_checks(Stub("good", native=negate), SAMPLES)


@pytest.mark.parametrize(
    "native",
    [
        lambda x: x,
        lambda x: -x.double(),
        lambda x: -x[..., :3],
        lambda x: -torch.as_strided(x, x.shape, torch.empty(x.shape).stride()),
        lambda x: x.matmul(-torch.eye(7)),
    ],
    ids=["value", "dtype", "shape", "ignores strides", "loses precision under autocast"],
)
def test_a_result_that_differs_from_the_reference_fails(native: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError, match="bad"):
        op_checks.check_forward(Stub("bad", native=native), SAMPLES[0])


def test_only_undecided_elements_may_differ() -> None:
    x = torch.linspace(0, 1, 200)
    x[90] = 0.4999999
    op = Stub("threshold", native=lambda x: x >= 0.4999998, twin=lambda x: x >= 0.5)
    with pytest.raises(AssertionError):
        op_checks.check_forward(op, Sample((x,)))
    undecided = (x - 0.5).abs() < op_checks.FLIP_MARGIN
    op_checks.check_forward(op, Sample((x,), tolerance=Tolerance("rounding", undecided=undecided)))


def test_an_op_that_recompiles_for_each_size_fails() -> None:
    def specialised(x: Tensor) -> Tensor:
        return -x if x.shape[0] % 2 else -x * 1

    op_checks.check_compiled(Stub("general", native=negate), SAMPLES)
    with pytest.raises(FailOnRecompileLimitHit):
        op_checks.check_compiled(Stub("specialised", native=specialised), SAMPLES[:3])


def test_an_op_with_a_graph_break_fails() -> None:
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return -x

    with pytest.raises(Unsupported):
        op_checks.check_compiled(Stub("broken", native=broken), SAMPLES)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def test_gradients_are_compared_if_the_op_has_them() -> None:
    sample = Sample((torch.rand(2, 3, dtype=torch.float64),))

    def wrong(x: Tensor) -> Tensor:
        negated: Tensor = _WrongGradient.apply(x)  # type: ignore[no-untyped-call]
        return negated

    def right(x: Tensor) -> Tensor:
        return -x

    op_checks.check_gradients(Stub("none", native=wrong, twin=right), sample)
    op_checks.check_gradients(Stub("right", ("x",), native=right, twin=right), sample)
    with pytest.raises(AssertionError, match="gradient"):
        op_checks.check_gradients(Stub("wrong", ("x",), native=wrong, twin=right), sample)
    with pytest.raises(RuntimeError, match="Jacobian"):
        op_checks.check_gradients(Stub("wrong alike", ("x",), native=wrong, twin=wrong), sample)


def test_samples_must_cover_empty_and_odd_inputs() -> None:
    with pytest.raises(AssertionError, match="empty"):
        op_checks.check_coverage(SAMPLES[:3])
    with pytest.raises(AssertionError, match="odd"):
        op_checks.check_coverage([Sample((torch.zeros(0, 4), torch.zeros(6)))])
