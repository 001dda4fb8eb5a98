"""Backbones from torchvision and timm, if these are installed."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from panfpn_fast.models import PanopticFPN, get_preset
from panfpn_fast.models.feature_extractor import FeatureExtractor
from panfpn_fast.models.layers import FrozenBatchNorm2d
from panfpn_fast.training.initialize import initialize
from panfpn_fast.training.network import TrainingNetwork, total
from panfpn_fast.training.trainer import freeze
from support.training_samples import make_batch, make_sample, small_model

BATCH_NORMS = {
    "frozen_bn": FrozenBatchNorm2d,
    "bn": nn.BatchNorm2d,
    "sync_bn": nn.SyncBatchNorm,
    "gn": nn.GroupNorm,
}


@pytest.fixture
def torchvision() -> ModuleType:
    models: ModuleType = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return models


@pytest.fixture
def timm() -> ModuleType:
    module: ModuleType = pytest.importorskip("timm", reason="timm is not installed")
    return module


def check_maps(extractor: FeatureExtractor, channels: list[int]) -> None:
    assert extractor.out_channels == channels
    with torch.no_grad():
        maps = extractor.eval()(torch.rand(2, 3, 64, 96))
    assert [list(x.shape) for x in maps] == [
        [2, c, 64 // stride, 96 // stride] for c, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        # A MobileNet's blocks widen their input before they halve its resolution.
        ("mobilenet_v3_large", [72, 240, 672, 960]),
        ("efficientnet_b0", [144, 240, 672, 1280]),
        ("convnext_tiny", [96, 192, 384, 768]),
        ("swin_t", [96, 192, 384, 768]),
    ],
)
def test_torchvision_networks(torchvision: ModuleType, name: str, channels: list[int]) -> None:
    extractor = FeatureExtractor(f"torchvision:{name}", "bn")
    check_maps(extractor, channels)
    # The classifier is removed, and the other layers keep torchvision's names.
    with torch.device("meta"):
        whole = torchvision.get_model(name, weights=None)
    assert set(extractor.body.state_dict()) < set(whole.state_dict())
    assert not [key for key in extractor.body.state_dict() if key.startswith(("classifier", "head"))]


def test_last_map_of_a_stride_is_used(torchvision: ModuleType, tmp_path: Path) -> None:
    """The feature maps of a ResNet are the outputs of its stages, as in our ResNet."""
    torch.manual_seed(0)
    ours = small_model(backbone="resnet18", backbone_norm="frozen_bn", stride_in_1x1=False)
    model = small_model(backbone="torchvision:resnet18", backbone_norm="bn")
    torch.save(model.backbone.get_submodule("body").state_dict(), tmp_path / "a.pth")
    initialize(ours, str(tmp_path / "a.pth"))
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for found, expected in zip(model.eval().backbone(x), ours.eval().backbone(x), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm", BATCH_NORMS)
def test_batch_norms_are_replaced(torchvision: ModuleType, norm: str) -> None:
    extractor = FeatureExtractor("torchvision:mobilenet_v3_large", norm)
    kinds = {type(m) for m in extractor.modules() if isinstance(m, tuple(BATCH_NORMS.values()))}
    assert kinds == {BATCH_NORMS[norm]}
    assert {m.eps for m in extractor.modules() if isinstance(m, BATCH_NORMS[norm])} == {0.001}
    assert extractor.training
    check_maps(extractor, [72, 240, 672, 960])


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_network_trains_and_predicts(torchvision: ModuleType, norm: str) -> None:
    model = small_model(backbone="torchvision:mobilenet_v3_large", backbone_norm=norm)
    total(TrainingNetwork(model)(*make_batch(make_sample(64, 96, 1), make_sample(64, 64, 2)))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    other = copy.deepcopy(model).eval()
    image = make_sample(50, 70, 1).image
    [expected], [found] = model.eval()([image]), other([image])
    assert torch.equal(found.panoptic, expected.panoptic)
    again = PanopticFPN.from_config(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again([image])[0].semantic, expected.semantic)


def test_torchvision_weights_are_loaded(torchvision: ModuleType, tmp_path: Path) -> None:
    whole = torchvision.get_model("mobilenet_v3_large", weights=None)
    torch.save(whole.state_dict(), tmp_path / "a.pth")
    model = small_model(backbone="torchvision:mobilenet_v3_large", backbone_norm="frozen_bn")
    initialize(model, str(tmp_path / "a.pth"))
    expected = whole.state_dict()
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, expected[name.removeprefix("body.")]), name


def test_unsuitable_networks_are_rejected(torchvision: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"backbone: torchvision has no network 'resnet19'"):
        PanopticFPN(backbone="resnet19")
    with pytest.raises(ValueError, match=r"'torchvision:vit_b_16' does not take images of any size: .*224"):
        FeatureExtractor("torchvision:vit_b_16", "bn")
    with pytest.raises(
        ValueError, match=r"'torchvision:squeezenet1_0' has no feature maps at the strides \[4, 8, 16, 32\]"
    ):
        FeatureExtractor("torchvision:squeezenet1_0", "bn")
    model = small_model(backbone="torchvision:mobilenet_v3_large")
    freeze(model, 0)
    with pytest.raises(
        ValueError, match=r"freeze_at: expected 0 with the backbone 'torchvision:mobile.*got 2"
    ):
        freeze(model, 2)


@pytest.mark.parametrize("name", ["panoptic_fpn_mobilenet", "panoptic_fpn_mobilenet_cityscapes"])
def test_mobilenet_presets(torchvision: ModuleType, name: str) -> None:
    with torch.device("meta"):
        model = PanopticFPN.from_config(name)
    assert model.config == get_preset(name)
    assert model.pixel_mean.device.type == "cpu"


@pytest.mark.parametrize("library", ["torchvision.models", "timm"])
def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    package = library.split(".")[0]
    name = f"{package}:resnet18"
    with pytest.raises(ImportError, match=rf"backbone: '{name}' .*Run pip install {package}, or"):
        FeatureExtractor(name, "bn")


@pytest.mark.parametrize(
    ("name", "channels"), [("resnet18", [64, 128, 256, 512]), ("convnext_atto", [40, 80, 160, 320])]
)
def test_timm_networks(timm: ModuleType, name: str, channels: list[int]) -> None:
    model = small_model(backbone=f"timm:{name}", backbone_norm="frozen_bn")
    assert isinstance(model.backbone, FeatureExtractor)
    check_maps(model.backbone, channels)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.modules())
    with pytest.raises(ValueError, match="backbone: timm cannot make a feature extractor from 'resnet19'"):
        FeatureExtractor("timm:resnet19", "bn")
