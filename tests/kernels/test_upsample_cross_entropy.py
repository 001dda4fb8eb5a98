from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from panfpn_fast import ops
from support.compile_kernels import CAPABILITIES, Launch
from support.kernel_checks import check_compiled, check_op, check_traced, machine_code

pytest.importorskip("triton", reason="Triton is not installed")

from panfpn_fast.ops.triton.upsample_cross_entropy import (
    upsample_cross_entropy,
    upsample_cross_entropy_backward,
)

_COCO = (2, 54, 200, 336)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _launches(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: int, labels: torch.dtype, **options: Any
) -> dict[str, Launch]:
    logits, size = _meta(shape, dtype), (shape[0], shape[2] * scale, shape[3] * scale)
    target = _meta(size, labels)
    weight = _meta((shape[1],), torch.float32) if options.get("weighted") else None
    reduction = options.get("reduction", "mean")
    settings = (scale, 255, options.get("label_smoothing", 0.0), reduction)
    grad = _meta(size if reduction == "none" else (), torch.float32)
    saved = (_meta(size, torch.float32), _meta((), torch.float32))
    return {
        f"{name}, forward": Launch(upsample_cross_entropy, (logits, target, weight, *settings)),
        f"{name}, backward": Launch(
            upsample_cross_entropy_backward,
            (grad, logits, target, weight, *saved, *settings),
        ),
    }


LAUNCHES = {
    **_launches("COCO", _COCO, torch.bfloat16, 4, torch.int64),
    **_launches("float32 logits", _COCO, torch.float32, 4, torch.int16),
    **_launches(
        "all options", (2, 19, 64, 128), torch.float16, 8, torch.int64,
        weighted=True, label_smoothing=0.1, reduction="none",
    ),
    **_launches("3x", (1, 150, 33, 65), torch.bfloat16, 3, torch.int32, reduction="sum"),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, None), (torch.float16, 1)], ids=str)
def test_checks(dtype: torch.dtype, count: int | None, triton_ops: torch.device) -> None:
    check_op("upsample_cross_entropy", dtype, triton_ops, count)


def test_a_target_that_is_no_class_makes_the_loss_nan(triton_ops: torch.device) -> None:
    logits = torch.zeros((1, 3, 2, 5), device=triton_ops, requires_grad=True)
    target = torch.zeros((1, 4, 10), dtype=torch.int64, device=triton_ops)
    target[0, 2, 3] = 3
    loss = ops.upsample_cross_entropy(logits, target, 2)
    assert loss.isnan()
    losses = ops.upsample_cross_entropy(logits, target, 2, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[0, 2, 3]]


def test_nothing_counted(triton_ops: torch.device) -> None:
    logits = torch.zeros((1, 3, 2, 5), device=triton_ops, requires_grad=True)
    target = torch.full((1, 4, 10), 255, device=triton_ops)
    loss = ops.upsample_cross_entropy(logits, target, 2)
    assert loss.isnan()
    assert ops.upsample_cross_entropy(logits, target, 2, reduction="sum") == 0


def test_instructions(compiled: dict[str, Any]) -> None:
    """Fails if the forward kernel needs more instructions than docs/gpu.md says."""
    whole, loops = machine_code(compiled["COCO, forward"], "_loss_kernel")
    four, one = sorted((loop for loop in loops if loop.count("MUFU")), key=lambda loop: -loop.length)
    assert four.count("MUFU") == 40, "the exponentials of four classes, and eight of a change of the maximum"
    assert four.length <= 345
    warps, classes = 2 * 2121, _COCO[1]
    found = whole.length - four.length - one.length + classes // 4 * four.length + classes % 4 * one.length
    assert warps * found <= 25.5e6


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles(name: str, capability: int, compiled: dict[str, Any]) -> None:
    check_compiled(compiled[name], LAUNCHES[name], capability)
    check_traced(compiled[name])
