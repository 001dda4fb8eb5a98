"""Plans: a call that repeats the recorded steps of an earlier one has the same result, on the right device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.head_calls import call, head_calls

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from panfpn_fast.ops.triton import IMPLEMENTATIONS, _plan  # noqa: E402
from panfpn_fast.ops.triton import _conv_choice as conv_choice  # noqa: E402
from panfpn_fast.ops.triton import conv3x3_statistics as conv  # noqa: E402
from panfpn_fast.ops.triton._launch import launch  # noqa: E402
from panfpn_fast.ops.triton._plan import Planned  # noqa: E402

OPS = sorted(IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def no_plans() -> None:
    for implementation in IMPLEMENTATIONS.values():
        implementation._plans.clear()


def leaves(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_equal(actual: Any, expected: Any) -> None:
    for found, wanted in zip(leaves(actual), leaves(expected), strict=True):
        assert found.shape == wanted.shape
        assert found.stride() == wanted.stride()
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


def test_every_op_is_called() -> None:
    assert sorted(head_calls()) == OPS


@pytest.mark.parametrize("layout", ["channels-last", "NCHW"])
@pytest.mark.parametrize("name", OPS)
def test_a_plan_has_the_result_of_the_host_function(name: str, layout: str, triton_ops: torch.device) -> None:
    args = head_calls(2, 4, device=str(triton_ops))[name]
    if layout == "NCHW":
        args = tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)
    other = tuple(
        arg * 0.5 if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in copied(args)
    )
    assert_equal(call(name, args), IMPLEMENTATIONS[name].function(*args))
    assert len(IMPLEMENTATIONS[name]._plans) == 1
    # Other tensors with other values, by the same plan.
    assert_equal(call(name, other), IMPLEMENTATIONS[name].function(*other))
    assert len(IMPLEMENTATIONS[name]._plans) == 1


@triton.jit
def _add_kernel(x, y, out, length, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < length
    tl.store(out + index, tl.load(x + index, mask) + factor * tl.load(y + index, mask), mask)


def _add(x: Tensor, y: Tensor, factor: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(_add_kernel, (1,), x.contiguous(), y.contiguous(), out, x.numel(), factor, BLOCK=64, num_warps=1)
    return out


def test_a_tensor_that_was_passed_twice_stands_for_two(kernel_device: torch.device) -> None:
    add = Planned(_add)
    x, y = torch.arange(12.0, device=kernel_device), torch.ones(12, device=kernel_device)
    assert torch.equal(add(x, x, 2.0), 3 * x)
    assert torch.equal(add(x, y, 2.0), x + 2)
    assert len(add._plans) == 1


def test_what_a_plan_depends_on(kernel_device: torch.device) -> None:
    settings = ["one"]
    add = Planned(_add, lambda *_: settings[0])
    x = torch.arange(12.0, device=kernel_device)
    y = torch.arange(13.0, device=kernel_device)[1:]  # not aligned to 16 bytes
    strided = torch.arange(24.0, device=kernel_device)[::2]
    for count, args in enumerate(
        [(x, x, 1.0), (x, x, 2.0), (x, y, 1.0), (x, strided, 1.0), (x[:8], x[:8], 1.0)], 1
    ):
        assert torch.equal(add(*args), args[0] + args[2] * args[1])
        assert torch.equal(add(*args), args[0] + args[2] * args[1])
        assert len(add._plans) == count
    settings[0] = "another"
    add(x, x, 1.0)
    assert len(add._plans) == 6


def test_other_ops_are_recorded(kernel_device: torch.device) -> None:
    def host(x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.empty((2, *x.shape), dtype=x.dtype, device=x.device).copy_(x)
        return _add(x, both.sum(0), 1.0), torch.full_like(x, 7.0)

    planned = Planned(host)
    for scale in (1.0, 2.0):
        x = scale * torch.arange(12.0, device=kernel_device)
        added, sevens = planned(x)
        assert torch.equal(added, 3 * x)
        assert (sevens == 7).all()
    assert len(planned._plans) == 1


def test_steps_that_cannot_be_recorded_make_no_plan(kernel_device: torch.device) -> None:
    hidden = torch.ones(12, device=kernel_device)
    planned = Planned(lambda x: _add(x, hidden, 1.0))
    x = torch.arange(12.0, device=kernel_device)
    assert torch.equal(planned(x), x + 1)
    hidden = torch.zeros(12, device=kernel_device)
    assert torch.equal(planned(x), x)
    assert not planned._plans
    nested = Planned(lambda x, y: torch.cat([x, y]))
    assert torch.equal(nested(x, 2 * x), torch.cat([x, 2 * x]))
    assert not nested._plans


def test_errors_make_no_plan(kernel_device: torch.device) -> None:
    def host(x: Tensor) -> Tensor:
        raise ValueError("no")

    planned = Planned(host)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            planned(torch.ones(3, device=kernel_device))
    add = Planned(_add)  # and the next one is recorded as ever
    x = torch.arange(12.0, device=kernel_device)
    assert torch.equal(add(x, x, 1.0), 2 * x)
    assert len(add._plans) == 1


def test_the_number_of_plans_is_limited(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "_MAX_PLANS", 3)
    add = Planned(_add)
    for length in range(1, 10):
        x = torch.arange(float(length), device=kernel_device)
        assert torch.equal(add(x, x, 1.0), 2 * x)
        assert len(add._plans) <= 3


def test_fresh_memory_of_a_plan_is_poisoned(kernel_device: torch.device) -> None:
    planned = Planned(lambda x: torch.empty_like(x))
    for _ in range(2):
        assert planned(torch.ones(5, device=kernel_device)).isnan().all()
    assert len(planned._plans) == 1


def test_gradients_by_plans(triton_ops: torch.device) -> None:
    x, weight, groups, eps = head_calls(2, 4, dtype=torch.float32, device=str(triton_ops))[
        "conv3x3_statistics"
    ]
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y, _mean, _rstd = call("conv3x3_statistics", (leaf, weight, groups, eps))
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        exact = x.double().requires_grad_()
        expected = torch.nn.functional.conv2d(exact, weight.double(), padding=1)
        (wanted,) = torch.autograd.grad(expected.sum(), exact)
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-3, atol=1e-3)


def test_a_new_choice_of_convolution_makes_new_plans(triton_ops: torch.device) -> None:
    x, weight, groups, eps = head_calls(2, 4, device=str(triton_ops))["conv3x3_statistics"]
    problem, names = conv._problem(x, weight)
    asked = []
    try:
        for _ in range(2):
            with conv_choice.recorded() as problems:
                for _ in range(3):
                    call("conv3x3_statistics", (x, weight, groups, eps))
            asked.append(dict(problems))
        assert asked == [{problem: names}] * 2
        plans = len(IMPLEMENTATIONS["conv3x3_statistics"]._plans)
        conv_choice.use({})
        call("conv3x3_statistics", (x, weight, groups, eps))
        assert len(IMPLEMENTATIONS["conv3x3_statistics"]._plans) == plans + 1
    finally:
        conv_choice.forget()


class _OnGpu(Tensor):
    """A CPU tensor that claims to be on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    index = 0

    def get_device(self) -> int:
        return self.index


def on_gpu(index: int) -> Tensor:
    tensor = torch.arange(12.0).as_subclass(_OnGpu)
    tensor.index = index
    return tensor


def test_the_device_of_the_tensors_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    def exchange(index: int) -> int:
        before, current[0] = current[0], index
        return before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    seen: list[Any] = []

    def host(x: Tensor) -> Tensor:
        seen.append(current[0])
        return torch.empty(3)

    planned = Planned(host)
    monkeypatch.setattr(_plan._Plan, "run", lambda plan, device, args: seen.append((device, current[0])))
    for index in (0, 1, 1, 0, 2):
        planned(on_gpu(index))
        assert current == [0]
    # The first call on each device runs the host function and makes a plan, which is for that device alone.
    assert seen == [0, 1, (1, 1), (0, 0), 2]
    assert len(planned._plans) == 3

    current[0] = 1

    def fails(x: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Planned(fails)(on_gpu(3))
    assert current == [1]
