"""Folded batch norms, and convolutions with what follows them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.inference import Predictor
from panfpn_fast.models import PanopticFPN, TwoNetworks, fusion
from panfpn_fast.models.layers import FrozenBatchNorm2d

SMALL = {
    "backbone": "resnet50",
    "num_things": 2,
    "num_stuff": 3,
    "dataset": "none",
    "fpn_channels": 32,
    "box_head_channels": 16,
    "mask_head_channels": 16,
    "semantic_channels": 32,
}


def network(**settings: object) -> PanopticFPN:
    """A network whose batch norms do something."""
    torch.manual_seed(0)
    model = PanopticFPN(**{**SMALL, **settings}).eval()
    with torch.no_grad():
        for name, value in [*model.backbone.named_buffers(), *model.backbone.named_parameters()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif "norm" in name and value.is_floating_point():
                value.uniform_(0.2, 0.6)
    return model


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `_can_fuse` answers, call by call."""
    answers: list[bool] = []
    judge: Callable[..., bool] = fusion._can_fuse

    def noted(*arguments: object) -> bool:
        answers.append(judge(*arguments))
        return answers[-1]

    monkeypatch.setattr(fusion, "_can_fuse", noted)
    return answers


needs_onednn = pytest.mark.skipif(not fusion._HAS_FUSED_OPS, reason="torch is built without oneDNN")


@needs_onednn
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_added", [False, True])
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "bias": False}, {"groups": 4, "dilation": 2}])
def test_fused_is_what_follows_one_after_the_other(
    fused_calls: list[bool],
    memory_format: torch.memory_format,
    relu: bool,
    with_added: bool,
    settings: dict[str, int],
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1, **settings).to(memory_format=memory_format)  # type: ignore[arg-type,call-overload]
    x = torch.randn(2, 8, 13, 10).contiguous(memory_format=memory_format)
    plain = conv(x)
    added = torch.randn_like(plain) if with_added else None
    expected = plain if added is None else plain + added
    expected = F.relu(expected) if relu else expected
    with torch.no_grad():
        found = fusion.conv2d(conv, x, relu=relu, added=None if added is None else added.clone())
    assert fused_calls == [True]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # Where a gradient is wanted there is one, and nothing is overwritten.
    before = None if added is None else added.clone()
    assert torch.equal(fusion.conv2d(conv, x, relu=relu, added=added), expected)
    assert fused_calls[1:] == [False]
    if added is not None and before is not None:
        assert torch.equal(added, before)


@needs_onednn
def test_what_cannot_be_fused_is_computed_plainly(fused_calls: list[bool]) -> None:
    conv, x = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False), torch.randn(1, 4, 8, 8)

    @torch.no_grad()
    def check(layer: nn.Conv2d, image: Tensor) -> None:
        expected = F.relu(layer(image))
        fused_calls.clear()
        assert torch.equal(fusion.conv2d(layer, image, relu=True), expected)
        assert fused_calls == [False]

    check(copy.deepcopy(conv).double(), x.double())
    check(conv, x[:0])
    check(nn.Conv2d(4, 4, 3, padding="same").requires_grad_(False), x)
    check(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect").requires_grad_(False), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(conv, x)
    with torch.backends.mkldnn.flags(enabled=False):
        check(conv, x)
    watched = copy.deepcopy(conv)
    seen: list[Tensor] = []
    watched.register_forward_hook(lambda _, __, output: seen.append(output))
    check(watched, x)
    assert len(seen) == 2


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
@pytest.mark.parametrize("backbone", ["resnet50", "resnet18"])
def test_a_folded_network_computes_the_same(norm: str, backbone: str) -> None:
    model = network(backbone=backbone, backbone_norm=norm)
    folded = fusion.for_prediction(model)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        truth = copy.deepcopy(model).double().features(images.double())["instance"]
        plain, found = model.features(images)["instance"], folded.features(images)["instance"]
    for exact, before, after in zip(truth, plain, found, strict=True):
        largest = exact.abs().max()
        error, usual = (after - exact).abs().max() / largest, (before - exact).abs().max() / largest
        assert error < 2e-6 + 4 * usual


def test_features_are_not_overwritten() -> None:
    """Though each block may overwrite its input, and FPN what is added."""
    folded = fusion.for_prediction(network(backbone="resnet18"))
    kept: list[Tensor] = []
    for stage in range(1, 5):
        folded.backbone.get_submodule(f"layer{stage}").register_forward_hook(
            lambda _, __, output: kept.append(output.clone())
        )
    with torch.no_grad():
        found = folded.backbone(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_the_network_given_is_left_alone_and_shares_the_rest() -> None:
    model = network()
    state = copy.deepcopy(model.state_dict())
    folded = fusion.for_prediction(model)
    assert folded.rpn is model.rpn
    assert not any(isinstance(module, fusion._NORMS) for module in folded.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    assert not any(weight.requires_grad for weight in folded.backbone.parameters())
    model.requires_grad_(True)
    assert all(weight.requires_grad for weight in model.backbone.parameters())


def test_what_has_nothing_to_fold_is_returned_itself() -> None:
    model = network(backbone="resnet18", backbone_norm="gn")
    assert fusion.for_prediction(model) is model
    pair = TwoNetworks(network(backbone="resnet18", tasks=("instance",)), network(tasks=("semantic",)))
    folded = fusion.for_prediction(pair)
    assert isinstance(folded.instance.backbone.norm1, nn.Identity)
    assert isinstance(folded.semantic.backbone.norm1, nn.Identity)
    assert isinstance(pair.instance.backbone.norm1, FrozenBatchNorm2d)


def test_a_predictor_folds_before_it_rounds() -> None:
    model = network(dataset="synthetic", num_things=4, num_stuff=4)
    backbone: Any = model.backbone
    scale = backbone.norm1.weight * (backbone.norm1.running_var + 1e-5).rsqrt()
    expected = (backbone.conv1.weight * scale[:, None, None, None]).detach()
    predictor: Any = Predictor(model, "cpu", torch.bfloat16)
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(
        predictor.model.backbone.conv1.weight.detach().float(), expected, rtol=2**-8, atol=0
    )
    assert predictor.model.memory_format == torch.channels_last
