"""Convolutions that cuDNN fuses with the operations that follow, on a stand-in that computes on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast._layout import channels_last_only
from panfpn_fast.models import PanopticFPN, conv_fusion, cudnn_fusion


class Cudnn:
    """Stands in for PyTorch's fused operations on CUDA.

    Attributes:
        calls: The number of calls of each operation.
        refuses: Raises an error for some inputs.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.refuses: Callable[[Tensor], None] = lambda x: None
        monkeypatch.setattr(cudnn_fusion, "DEVICE_TYPE", "cpu")
        monkeypatch.setattr(cudnn_fusion, "_refused", set())
        for name, convolve in (
            ("cudnn_convolution_relu", self._relu),
            ("cudnn_convolution_add_relu", self._add_relu),
        ):
            monkeypatch.setattr(torch.ops.aten, name, self._checked(getattr(torch.ops.aten, name), convolve))

    def _checked(self, real: Any, convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *arguments: Any) -> Tensor:
            self.calls[real.__name__] += 1
            # PyTorch accepts the arguments and then finds no implementation for the CPU.
            with pytest.raises(NotImplementedError, match="backend"):
                real(x, *arguments)
            self.refuses(x)
            return convolve(x, *arguments).to(x.dtype)

        return call

    @staticmethod
    def _relu(x: Tensor, weight: Tensor, bias: Tensor, *where: Any) -> Tensor:
        return F.relu(F.conv2d(x.double(), weight.double(), bias.double(), *where))

    @staticmethod
    def _add_relu(x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *where: Any) -> Tensor:
        return F.relu(F.conv2d(x.double(), weight.double(), bias.double(), *where) + alpha * z.double())


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Cudnn:
    # On CUDA, no convolution takes Winograd's algorithm.
    monkeypatch.setattr(conv_fusion, "takes_winograd", lambda *arguments, **options: False)
    return Cudnn(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_added", [False, True])
@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"groups": 4, "dilation": 2}])
def test_fused_equals_separate_operations(
    cudnn: Cudnn, dtype: torch.dtype, with_added: bool, settings: dict[str, int]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1, **settings).to(dtype)  # type: ignore[arg-type]
    x = torch.randn(2, 8, 13, 10).to(dtype)
    with torch.no_grad():
        expected = conv(x)
        added = torch.randn_like(expected) if with_added else None
        before = None if added is None else added.clone()
        expected = F.relu(expected if added is None else expected + added)
        found = conv_fusion.conv2d(conv, x, relu=True, added=added)
    assert found.dtype == dtype
    assert cudnn.calls == {"cudnn_convolution_add_relu" if with_added else "cudnn_convolution_relu": 1}
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=4 * epsilon, atol=8 * epsilon)
    if added is not None and before is not None:
        assert torch.equal(added, before)


def test_what_cudnn_does_not_fuse_is_computed_unfused(cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv, without_bias = nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3, bias=False)
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        assert torch.equal(conv_fusion.conv2d(conv, x), conv(x))  # cuDNN's operations always apply ReLU
        assert torch.equal(conv_fusion.conv2d(without_bias, x, relu=True), without_bias(x).relu())
        conv_fusion.conv2d(conv.double(), x.double(), relu=True)
        conv.float()
        with torch.autocast("cpu", torch.bfloat16):
            conv_fusion.conv2d(conv, x, relu=True)
        for name, value in (("enabled", False), ("deterministic", True)):
            with monkeypatch.context() as patch:
                patch.setattr(torch.backends.cudnn, name, value)
                conv_fusion.conv2d(conv, x, relu=True)
        torch.use_deterministic_algorithms(True)
        try:
            conv_fusion.conv2d(conv, x, relu=True)
        finally:
            torch.use_deterministic_algorithms(False)
    conv_fusion.conv2d(conv, x, relu=True)  # gradients are on
    assert not cudnn.calls
    with torch.no_grad():
        conv_fusion.conv2d(conv, x, relu=True)
    assert cudnn.calls.total() == 1


def test_a_refused_convolution_is_not_tried_again(cudnn: Cudnn) -> None:
    def refuse(x: Tensor) -> None:
        if x.shape[1] == 8:
            raise RuntimeError("GET was unable to find an engine to execute this computation")

    cudnn.refuses = refuse
    torch.manual_seed(0)
    refused, accepted = nn.Conv2d(8, 16, 3), nn.Conv2d(4, 16, 3)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(1, 8, 9, 9)
            assert torch.equal(conv_fusion.conv2d(refused, x, relu=True), refused(x).relu())
        assert cudnn.calls.total() == 1
        for _ in range(3):
            conv_fusion.conv2d(accepted, torch.randn(1, 4, 9, 9), relu=True)
    assert cudnn.calls.total() == 4


def test_a_lack_of_memory_is_an_error(cudnn: Cudnn) -> None:
    def refuse(x: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cudnn.refuses = refuse
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        conv_fusion.conv2d(nn.Conv2d(4, 8, 3), torch.randn(1, 4, 9, 9), relu=True)
    assert not cudnn_fusion._refused


def test_a_network_for_prediction_fuses_what_it_can(cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = PanopticFPN(
        backbone="resnet50",
        num_things=2,
        num_stuff=3,
        fpn_channels=32,
        box_head_channels=16,
        mask_head_channels=16,
        semantic_channels=32,
        score_threshold=0.0,
        detections_per_image=5,
    ).eval()
    with ops.winograd(False):
        network = conv_fusion.for_prediction(model)
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        network([torch.rand(3, 96, 128) * 255])
        # The stem, two convolutions of each of 16 blocks, the RPN's at five levels and the mask head's four. The last
        # convolution of each block adds the shortcut.
        assert cudnn.calls == {"cudnn_convolution_relu": 1 + 2 * 16 + 5 + 4, "cudnn_convolution_add_relu": 16}
        fused = network.backbone(x)
        monkeypatch.setattr(cudnn_fusion, "DEVICE_TYPE", "cuda")
        for found, expected in zip(fused, network.backbone(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_added", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_on_a_gpu(dtype: torch.dtype, with_added: bool, kernel_size: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 128, kernel_size, padding=kernel_size // 2).to("cuda", dtype)
    x = torch.randn(1, 64, 48, 64).to("cuda", dtype, memory_format=torch.channels_last)
    bias = conv.bias
    assert bias is not None
    added = torch.randn(1, 128, 48, 64).to("cuda", dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        expected = F.conv2d(x.double(), conv.weight.double(), bias.double(), padding=kernel_size // 2)
        expected = F.relu(expected + added if with_added else expected)
        found = conv_fusion.conv2d(conv, x, relu=True, added=added if with_added else None)
    print(f"refused by cuDNN: {sorted(map(str, cudnn_fusion._refused))}")
    assert channels_last_only(found)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 2**-9  # float32 uses TF32
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
