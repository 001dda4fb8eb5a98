from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast import ops
from support.compile_kernels import CAPABILITIES, Launch
from support.kernel_checks import check_compiled, check_op, check_traced, machine_code

pytest.importorskip("triton", reason="Triton is not installed")

from panfpn_fast.ops.triton.upsample_cross_entropy import upsample_cross_entropy
from panfpn_fast.ops.triton.upsample_cross_entropy_backward import upsample_cross_entropy_backward

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


def _losses(logits: Tensor, target: Tensor, scale: int, label_smoothing: float) -> Tensor:
    """Computes the loss of each pixel with PyTorch."""
    upsampled = F.interpolate(logits, scale_factor=scale, mode="bilinear")
    return F.cross_entropy(
        upsampled, target, ignore_index=255, label_smoothing=label_smoothing, reduction="none"
    )


@pytest.mark.parametrize(("scale", "label_smoothing"), [(4, 0.0), (3, 0.1), (20, 0.0)])
@pytest.mark.parametrize("step", [0.0, 20.0, 100.0, 1e5, 1e30])
def test_inputs_with_very_different_logits(
    step: float, scale: int, label_smoothing: float, triton_ops: torch.device
) -> None:
    """The largest logit of four inputs may be far above all logits between them: relative to it, the sum would be 0."""
    logits = torch.randn((1, 5, 2, 4), generator=torch.Generator().manual_seed(0))
    logits[:, :, 0, 1] += step
    logits[:, 2, 1, 3] += step
    logits[:, :, 1, 0] -= step
    target = torch.arange(2 * scale * 4 * scale).view(1, 2 * scale, 4 * scale) % 5
    target[0, 0, :3] = 255
    losses = ops.upsample_cross_entropy(
        logits.to(triton_ops), target.to(triton_ops), scale, reduction="none", label_smoothing=label_smoothing
    )
    expected = _losses(logits.double(), target, scale, label_smoothing)
    # Logits are rounded to float32 before exp(), up to five times, and the error grows with their size.
    error = torch.finfo(torch.float32).eps * 5 * (step + 4)
    torch.testing.assert_close(losses.cpu().double(), expected, atol=error, rtol=1e-6)
    assert (losses >= 0).all()


@pytest.mark.parametrize("scale", [4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(value: float, scale: int, triton_ops: torch.device) -> None:
    logits = torch.randn((4, 3, 3, 5), generator=torch.Generator().manual_seed(0))
    for image, (y, x) in enumerate([(0, 0), (1, 2), (2, 1), (1, 4)]):
        logits[image, 1, y, x] = value
    target = torch.arange(4 * 15 * scale**2).view(4, 3 * scale, 5 * scale) % 3
    losses = ops.upsample_cross_entropy(logits.to(triton_ops), target.to(triton_ops), scale, reduction="none")
    torch.testing.assert_close(losses.cpu(), _losses(logits, target, scale, 0.0), equal_nan=True)


def test_nothing_counted(triton_ops: torch.device) -> None:
    logits = torch.zeros((1, 3, 2, 5), device=triton_ops, requires_grad=True)
    target = torch.full((1, 4, 10), 255, device=triton_ops)
    loss = ops.upsample_cross_entropy(logits, target, 2)
    assert loss.isnan()
    assert ops.upsample_cross_entropy(logits, target, 2, reduction="sum") == 0


def test_instructions(compiled: dict[str, Any]) -> None:
    """Fails if the forward kernel needs more instructions than docs/gpu.md says."""
    whole, loops = machine_code(compiled["COCO, forward"], "_loss_kernel")
    four, one = (loop for loop in loops if loop.count("MUFU") and not loop.count("FMNMX"))
    (any_logits,) = (loop for loop in loops if loop.count("MUFU") and loop.count("FMNMX"))
    bounds = [loop for loop in loops if loop.count("FMNMX") and not loop.count("MUFU")]
    assert four.count("MUFU") == 32, "nothing but the exponentials of four classes"
    assert four.length <= 228
    warps, classes = 2 * 2121, _COCO[1]
    found = whole.length - sum(loop.length for loop in (four, one, any_logits, *bounds))
    found += classes // 4 * four.length + classes % 4 * one.length
    left = classes
    for loop in bounds:  # the compiler unrolls the loop over the classes by 16, 4 and 1
        found += left // loop.count("FMNMX") * loop.length
        left %= loop.count("FMNMX")
    assert warps * found <= 21.8e6
    assert warps * (found + classes * any_logits.length) <= 44.8e6


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles(name: str, capability: int, compiled: dict[str, Any]) -> None:
    check_compiled(compiled[name], LAUNCHES[name], capability)
    check_traced(compiled[name])
