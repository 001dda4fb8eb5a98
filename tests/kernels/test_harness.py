"""The checks of Triton kernels detect planted faults and accept kernels without faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.compile_kernels import CAPABILITIES, Launch
from support.kernel_checks import check_compiled, check_traced

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from panfpn_fast.ops.triton import _launch  # noqa: E402
from panfpn_fast.ops.triton._launch import launch  # noqa: E402


@triton.jit
def _scale_kernel(x, y, length, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index, index < length) * factor, index < length)


@triton.jit
def _row_sums_kernel(x, y, rows, columns, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        total += tl.load(x + row * columns + index, index < columns, other=0.0)
    tl.store(y + index, total, index < columns)


@triton.jit
def _square_kernel(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(x + index)
    tl.store(y + index, tl.dot(tile, tile))


def _scale(x: Tensor, factor: float, block: int) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() > 0:
        grid = (_launch.cdiv(x.numel(), block),)
        launch(_scale_kernel, grid, x, y, x.numel(), factor, BLOCK=block, num_warps=1)
    return y


def _square(x: Tensor) -> Tensor:
    y = torch.empty_like(x, dtype=torch.float32)
    launch(_square_kernel, (1,), x, y, SIZE=x.shape[0])
    return y


scale = torch.library.triton_op("panfpn_fast_test::scale", _scale, mutates_args=())

_VECTOR = torch.empty(1000, dtype=torch.bfloat16, device="meta")
LAUNCHES = {
    "sound": Launch(scale, (_VECTOR, 2.0, 256)),
    "spilling": Launch(scale, (_VECTOR, 2.0, 8192)),
    "tensor cores": Launch(
        _square, (torch.empty(64, 64, dtype=torch.float16, device="meta"),), ("_square_kernel",)
    ),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["sound", "tensor cores"])
def test_sound_kernels_pass(name: str, capability: int, compiled: dict[str, Any]) -> None:
    check_compiled(compiled[name], LAUNCHES[name], capability)
    check_traced(compiled[name])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_spilling_is_seen(capability: int, compiled: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="_scale_kernel"):
        check_compiled(compiled["spilling"], LAUNCHES["spilling"], capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_missing_tensor_cores_are_seen(capability: int, compiled: dict[str, Any]) -> None:
    launch = Launch(scale, LAUNCHES["sound"].args, ("_scale_kernel",))
    with pytest.raises(AssertionError, match="_scale_kernel"):
        check_compiled(compiled["sound"], launch, capability)


def test_kernels_run(kernel_device: torch.device) -> None:
    x = torch.randn(77, 13, device=kernel_device)
    torch.testing.assert_close(scale(x, 2.0, 256), 2.0 * x)
    assert scale(x[:0], 2.0, 256).shape == (0, 13)


def test_loops_run_as_long_as_arguments_say(kernel_device: torch.device) -> None:
    x = torch.randn(7, 13, device=kernel_device)
    y = torch.empty(13, device=kernel_device)
    launch(_row_sums_kernel, (1,), x, y, 7, 13, BLOCK=16)
    torch.testing.assert_close(y, x.sum(0))


def test_powers_of_two() -> None:
    assert [_launch.next_power_of_2(n) for n in (1, 2, 3, 54, 64, 65)] == [1, 2, 4, 64, 64, 128]
