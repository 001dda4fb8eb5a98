from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from panfpn_fast.ops import reference
from panfpn_fast.ops.reference.upsample_argmax import resampled_logits
from support.compile_kernels import CAPABILITIES, Launch
from support.kernel_checks import check_compiled, check_op, check_traced, machine_code

pytest.importorskip("triton", reason="Triton is not installed")

from panfpn_fast.ops.triton import upsample_argmax as module
from panfpn_fast.ops.triton.upsample_argmax import upsample_argmax


def _logits(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


_NHWC, _NCHW = torch.channels_last, torch.contiguous_format
_COCO = (1, 54, 200, 336)

LAUNCHES = {
    "4x": Launch(upsample_argmax, (_logits(_COCO, torch.bfloat16, _NHWC), 4, 800, 1344, 800, 1344, False)),
    "4x, NCHW": Launch(
        upsample_argmax, (_logits(_COCO, torch.float32, _NCHW), 4, 800, 1344, 800, 1344, True)
    ),
    "photograph": Launch(
        upsample_argmax, (_logits(_COCO, torch.bfloat16, _NHWC), 4, 800, 1199, 427, 640, False)
    ),
    "enlarged": Launch(
        upsample_argmax, (_logits(_COCO, torch.float16, _NHWC), 4, 800, 1333, 2048, 4096, True)
    ),
    "2x": Launch(
        upsample_argmax, (_logits((2, 19, 33, 65), torch.float16, _NCHW), 2, 66, 130, 66, 130, False)
    ),
}


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, None), (torch.float16, 1)], ids=str)
def test_checks(dtype: torch.dtype, count: int | None, triton_ops: torch.device) -> None:
    check_op("upsample_argmax", dtype, triton_ops, count)


def test_first_of_equals_and_nan(kernel_device: torch.device) -> None:
    logits = torch.zeros((1, 5, 4, 6), device=kernel_device)
    labels, _ = upsample_argmax(logits, 2, 8, 12, 8, 12, False)
    assert (labels == 0).all()
    logits[0, 3, 1, 1] = float("nan")
    logits[0, 1, 3, 5] = float("inf")
    for size in ((8, 12), (5, 7)):
        labels, probabilities = upsample_argmax(logits, 2, 8, 12, *size, True)
        expected = reference.upsample_argmax(logits, 2, size=size, return_prob=True)
        assert torch.equal(labels, expected[0])
        torch.testing.assert_close(probabilities, expected[1], equal_nan=True)


def _regions(leads: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Makes logits [1, 5, 4, 24] of which class 3 leads by so much on the left and class 1 on the right."""
    logits = torch.randn((1, 5, 4, 24), generator=torch.Generator().manual_seed(0))
    top = logits.amax(1)
    logits[:, 3, :, :14] = top[:, :, :14] + leads
    logits[:, 1, :, 14:] = top[:, :, 14:] + leads
    return logits.to(dtype)


_SIZES = pytest.mark.parametrize(("crop", "size"), [((16, 96), (16, 96)), ((15, 91), (11, 60))])


@_SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_at_once_and_others(
    crop: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    logits = _regions(0.5, dtype)
    labels, _ = upsample_argmax(logits.to(kernel_device), 4, *crop, *size, False)
    exact = resampled_logits(logits.double(), 4, crop, size)
    assert torch.equal(labels.cpu().long(), exact.argmax(1))


@_SIZES
def test_where_one_class_leads_nothing_is_interpolated(
    crop: tuple[int, int],
    size: tuple[int, int],
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernel_device.type == "cuda":
        pytest.skip("a compiled kernel cannot be changed")
    label = _with_calls(module._best_classes, monkeypatch)
    for logits, needed in (
        (_regions(0.5)[..., :12], False),
        (_regions(0.5), True),
        (_regions(0.0)[..., :12], True),  # another class is as high
        (_regions(1e-5)[..., :12], True),  # rounding errors could decide
        (_regions(0.5)[..., :12].index_fill(1, torch.tensor([2]), float("-inf")), False),  # switched off
        (_regions(0.5)[..., :12].index_fill(1, torch.tensor([2]), float("nan")), True),
        (_regions(0.5)[..., :12].index_fill(1, torch.tensor([3]), float("inf")), True),
        (_regions(0.5)[:, 3:4], False),  # there is only one class
    ):
        width = logits.shape[3] * 4
        here = (crop[0], min(crop[1], width)), (size[0], min(size[1], width))
        label.clear()
        labels, _ = upsample_argmax(logits, 4, *here[0], *here[1], False)
        assert bool(label) == needed
        if not needed:
            assert torch.equal(labels, torch.full_like(labels, 0 if logits.shape[1] == 1 else 3))


def _with_calls(function: Any, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Returns a list that grows by one at each call of an interpreted function of the module."""
    calls: list[None] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, function.__name__, counted)
    return calls


def test_instructions(compiled: dict[str, Any]) -> None:
    """Fails if the kernel needs more instructions than docs/gpu.md says of Triton 3.8. Triton 3.6 makes 9 % more."""
    whole, loops = machine_code(compiled["4x"], "_label_kernel")
    search = min((loop for loop in loops if loop.count("FMNMX") == 18), key=lambda loop: loop.length)
    labels = min((loop for loop in loops if loop.count("FFMA") > 8), key=lambda loop: loop.length)
    assert search.count("LDG") == 6, "six classes at a time"
    assert search.length <= 66
    assert labels.length <= 62
    tiles, classes = 101 * 42, _COCO[1]
    at_once = tiles * (whole.length - labels.length - search.length + classes // 6 * search.length)
    others = tiles * classes * labels.length
    assert at_once <= 5.8e6
    assert others <= 14.3e6


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles(name: str, capability: int, compiled: dict[str, Any]) -> None:
    check_compiled(compiled[name], LAUNCHES[name], capability)
    check_traced(compiled[name])
