from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from panfpn_fast.ops import reference
from support.compile_kernels import CAPABILITIES, Launch
from support.kernel_checks import check_compiled, check_op, check_traced

pytest.importorskip("triton", reason="Triton is not installed")

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


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles(name: str, capability: int, compiled: dict[str, Any]) -> None:
    check_compiled(compiled[name], LAUNCHES[name], capability)
    check_traced(compiled[name])
