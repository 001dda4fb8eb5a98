"""Folded batch norms, and convolutions fused with the operations that follow."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from panfpn_fast import ops
from panfpn_fast.inference import Predictor
from panfpn_fast.models import PanopticFPN, TwoNetworks, conv_fusion
from panfpn_fast.models.feature_extractor import FeatureExtractor
from panfpn_fast.models.layers import FrozenBatchNorm2d
from panfpn_fast.ops import winograd
from panfpn_fast.ops._winograd import _VECTORS

SMALL = {
    "backbone": "resnet50",
    "num_things": 2,
    "num_stuff": 3,
    "fpn_channels": 32,
    "box_head_channels": 16,
    "mask_head_channels": 16,
    "semantic_channels": 32,
}

# With enough channels for Winograd's algorithm everywhere.
WIDE = {"mask_head_channels": 32}


def network(**settings: object) -> PanopticFPN:
    """Makes a network whose batch norms are not the identity."""
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
    """Records the result of each call of `_can_fuse`."""
    answers: list[bool] = []
    judge: Callable[..., bool] = conv_fusion._can_fuse

    def noted(*arguments: object) -> bool:
        answers.append(judge(*arguments))
        return answers[-1]

    monkeypatch.setattr(conv_fusion, "_can_fuse", noted)
    return answers


needs_winograd = pytest.mark.skipif(not _VECTORS, reason="Winograd's algorithm needs AVX2")
needs_onednn = pytest.mark.skipif(not conv_fusion._HAS_FUSED_OPS, reason="torch is built without oneDNN")


@needs_onednn
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_added", [False, True])
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "bias": False}, {"groups": 4, "dilation": 2}])
def test_fused_equals_separate_operations(
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
        found = conv_fusion.conv2d(conv, x, relu=relu, added=None if added is None else added.clone())
    assert fused_calls == [True]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # With gradients on, the gradients exist and nothing is overwritten.
    before = None if added is None else added.clone()
    assert torch.equal(conv_fusion.conv2d(conv, x, relu=relu, added=added), expected)
    assert fused_calls[1:] == [False]
    if added is not None and before is not None:
        assert torch.equal(added, before)


@needs_onednn
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "layouts", list(itertools.product([torch.contiguous_format, torch.channels_last], repeat=2))
)
def test_bfloat16_in_any_layouts(
    fused_calls: list[bool], layouts: tuple[torch.memory_format, torch.memory_format], relu: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 8, 13, 10).to(torch.bfloat16, memory_format=layouts[0])
    added = torch.randn(2, 16, 13, 10).to(torch.bfloat16, memory_format=layouts[1])
    expected = copy.deepcopy(conv).double()(x.double()) + added.double()
    expected = F.relu(expected) if relu else expected
    with torch.no_grad():
        found = conv_fusion.conv2d(conv, x, relu=relu, added=added)
    assert fused_calls == [torch.ops.mkldnn._is_mkldnn_bf16_supported()]
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)


@needs_onednn
def test_unfusable_convolutions_are_computed_unfused(fused_calls: list[bool]) -> None:
    conv, x = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False), torch.randn(1, 4, 8, 8)

    @torch.no_grad()
    def check(layer: nn.Conv2d, image: Tensor) -> None:
        expected = F.relu(layer(image))
        fused_calls.clear()
        assert torch.equal(conv_fusion.conv2d(layer, image, relu=True), expected)
        assert fused_calls == [False]

    check(copy.deepcopy(conv).double(), x.double())
    check(conv, x[:0])
    check(nn.Conv2d(4, 4, 3, padding="same").requires_grad_(False), x)
    check(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect").requires_grad_(False), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(conv, x)
    with torch.backends.mkldnn.flags(enabled=False):
        check(conv, x)


def hooks_of_all_modules(kind: str) -> Callable[..., Any]:
    """Returns torch's function that registers a hook of this kind for all modules."""
    hooks: Callable[..., Any] = getattr(nn.modules.module, kind.replace("register", "register_module"))
    return hooks


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("every_module", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_hooks_see_the_convolution_called(kind: str, every_module: bool, channels: int) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
    x = torch.randn(2, channels, 16, 16, requires_grad=True)
    expected = F.relu(norm(F.relu(conv(x))))
    seen: list[tuple[nn.Module, Any]] = []

    def hook(module: nn.Module, *values: Any) -> None:
        tensors = [value for value in values[-1] if value is not None]
        seen.extend((module, (tensor, tensor.clone())) for tensor in tensors)

    if every_module:
        handles = [hooks_of_all_modules(kind)(hook)]
    else:
        handles = [getattr(module, kind)(hook) for module in (conv, norm)]
    try:
        for layer in (conv, conv_fusion.PreparedConv2d.of(conv)):
            seen.clear()
            y = conv_fusion.conv2d(layer, x, relu=True)
            found = conv_fusion.conv_norm(nn.Identity(), norm, y, relu=True)
            found.sum().backward()
            assert {module for module, _ in seen} >= {layer, norm}
            assert all(torch.equal(kept, value) for _, (kept, value) in seen)  # not overwritten
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
@pytest.mark.parametrize("backbone", ["resnet50", "resnet18"])
def test_folded_network_computes_the_same(norm: str, backbone: str) -> None:
    model = network(backbone=backbone, backbone_norm=norm)
    folded = conv_fusion.for_prediction(model)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        truth = copy.deepcopy(model).double().features(images.double())["instance"]
        plain, found = model.features(images)["instance"], folded.features(images)["instance"]
    for exact, before, after in zip(truth, plain, found, strict=True):
        largest = exact.abs().max()
        error, usual = (after - exact).abs().max() / largest, (before - exact).abs().max() / largest
        assert error < 2e-6 + 4 * usual


def test_features_are_not_overwritten() -> None:
    """The input is unchanged although each block may overwrite its input, and the FPN the tensor that it adds."""
    folded = conv_fusion.for_prediction(network(backbone="resnet18"))
    kept: list[Tensor] = []
    for stage in range(1, 5):
        folded.backbone.get_submodule(f"layer{stage}").register_forward_hook(
            lambda _, __, output: kept.append(output.clone())
        )
    with torch.no_grad():
        found = folded.backbone(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_original_network_is_unchanged_and_shares_other_weights() -> None:
    model = network()
    state = copy.deepcopy(model.state_dict())
    folded = conv_fusion.for_prediction(model)
    assert folded.box_head is model.box_head
    assert folded.rpn.conv.weight is model.rpn.conv.weight
    assert type(model.rpn.conv) is nn.Conv2d
    assert not any(isinstance(module, conv_fusion._NORMS) for module in folded.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    assert not any(weight.requires_grad for weight in folded.backbone.parameters())
    model.requires_grad_(True)
    assert all(weight.requires_grad for weight in model.backbone.parameters())


def test_module_without_foldable_norms_is_returned_itself() -> None:
    model = network(backbone="resnet18", backbone_norm="gn")
    assert conv_fusion.for_prediction(model.box_head) is model.box_head
    pair = TwoNetworks(network(backbone="resnet18", tasks=("instance",)), network(tasks=("semantic",)))
    folded = conv_fusion.for_prediction(pair)
    assert isinstance(folded.instance.backbone.norm1, nn.Identity)
    assert isinstance(folded.semantic.backbone.norm1, nn.Identity)
    assert isinstance(pair.instance.backbone.norm1, FrozenBatchNorm2d)


def test_predictor_folds_before_it_rounds() -> None:
    model = network()
    backbone: Any = model.backbone
    scale = backbone.norm1.weight * (backbone.norm1.running_var + 1e-5).rsqrt()
    expected = (backbone.conv1.weight * scale[:, None, None, None]).detach()
    predictor: Any = Predictor(model, "cpu", torch.bfloat16)
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(
        predictor.model.backbone.conv1.weight.detach().float(), expected, rtol=2**-8, atol=0
    )
    assert predictor.model.memory_format == torch.channels_last


def convolutions(function: Callable[[], object]) -> dict[str, int]:
    """Returns how often a call runs our 3x3 convolutions or transforms their weights, by the name of the op."""
    with torch.profiler.profile() as profile:
        function()
    names = [f"panfpn_fast::{op}" for op in ("conv3x3", "conv3x3_prepare", "conv3x3_prepared")]
    return {event.key.split("::")[1]: event.count for event in profile.key_averages() if event.key in names}


@needs_winograd
def test_predictor_transforms_weights_once() -> None:
    model = network(**WIDE)
    # ResNet-50 has 16 convolutions, the FPN 4, the RPN one, the mask head 4, the semantic head 7.
    assert convolutions(lambda: Predictor(model, "cpu")) == {"conv3x3_prepare": 16 + 4 + 1 + 4 + 7}


@needs_winograd
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_all_3x3_convolutions_of_a_prediction_use_the_prepared_weights(
    memory_format: torch.memory_format,
) -> None:
    model: Any = network(**WIDE).to(memory_format=memory_format)  # type: ignore[call-overload]
    prepared: Any = conv_fusion.for_prediction(model)
    images = torch.randn(1, 3, 64, 96).contiguous(memory_format=memory_format)
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [0.0, 0.0, 90.0, 60.0]])

    @torch.no_grad()
    def predict(net: Any) -> list[Tensor]:
        features = net.features(images)
        masks = net.mask_head(features["instance"], [boxes], torch.zeros(2, dtype=torch.int64))
        logits, deltas = net.rpn(features["instance"])
        return [*features["instance"], *logits, *deltas, masks, net.semantic_head(features["semantic"])]

    # ResNet-50 has 16, the FPN 4, the RPN one for each of 5 levels, the mask head 4, the semantic head 7.
    assert convolutions(lambda: predict(prepared)) == {"conv3x3_prepared": 16 + 4 + 5 + 4 + 7}
    found = predict(prepared)
    with winograd(False):
        assert convolutions(lambda: predict(prepared)) == {}
        expected = predict(prepared)
    for got, wanted in zip(found, expected, strict=True):
        # Rounding errors of some fifty layers, relative to the largest value.
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@needs_winograd
def test_prepared_weights_follow_the_weights() -> None:
    conv = nn.Conv2d(16, 32, 3, padding=1)
    layer = conv_fusion.PreparedConv2d.of(conv)
    assert layer.prepared is not None
    assert layer.weight is conv.weight
    assert list(layer.state_dict()) == list(conv.state_dict())
    copies: list[Any] = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for copied in copies:
        assert torch.equal(copied.prepared, layer.prepared)
    small = pickle.dumps(layer)
    assert len(small) < 2 * len(pickle.dumps(conv))
    layer.to(torch.float64)
    assert layer.prepared is None
    layer.to(torch.bfloat16)
    layer.to(torch.float32)
    rounded = winograd.prepare(conv.weight.detach())
    assert rounded is not None
    assert torch.equal(layer.prepared, rounded)
    layer.to("meta")
    assert layer.prepared is None


def double(conv: nn.Conv2d) -> dict[str, Tensor]:
    return {name: 2 * value for name, value in conv.state_dict().items()}


def scale_in_place(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight.mul_(2)
        assert conv.bias is not None
        conv.bias.mul_(2)


def replace_parameters(conv: nn.Conv2d) -> None:
    for name, value in double(conv).items():
        setattr(conv, name, nn.Parameter(value))


def round_to_bfloat16(conv: nn.Conv2d) -> None:
    conv.to(torch.bfloat16).to(torch.float32)


@needs_winograd
@pytest.mark.parametrize(
    "change",
    [
        lambda conv: conv.load_state_dict(double(conv)),
        lambda conv: conv.load_state_dict(double(conv), assign=True),
        scale_in_place,
        torch.inference_mode()(scale_in_place),
        replace_parameters,
        round_to_bfloat16,
    ],
    ids=["load", "assign", "in_place", "inference_mode", "replace", "dtype"],
)
@pytest.mark.parametrize("through_original", [False, True])
def test_changed_weights_are_prepared_again(
    change: Callable[[nn.Conv2d], object], through_original: bool
) -> None:
    """Also if the change goes through the convolution that shares its weights with the prepared one."""
    conv = nn.Conv2d(16, 32, 3, padding=1)
    layer = conv_fusion.PreparedConv2d.of(conv)
    x = torch.randn(1, 16, 9, 12)
    before = layer.prepared
    change(conv if through_original else layer)
    with torch.no_grad():
        found = conv_fusion.conv2d(layer, x)
        # The next call need not transform them.
        assert convolutions(lambda: conv_fusion.conv2d(layer, x)) == {"conv3x3_prepared": 1}
    torch.testing.assert_close(found, F.conv2d(x, layer.weight, layer.bias, padding=1), atol=2e-5, rtol=1e-5)
    assert layer.prepared is not before


@needs_winograd
def test_loaded_weights_reach_a_compiled_layer() -> None:
    layer = conv_fusion.PreparedConv2d.of(nn.Conv2d(16, 32, 3, padding=1))
    x = torch.randn(1, 16, 9, 12)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return conv_fusion.conv2d(layer, x)

    with torch.no_grad():
        run(x)
        layer.load_state_dict(double(layer))
        expected = F.conv2d(x, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(run(x), expected, atol=2e-5, rtol=1e-5)


@needs_winograd
def test_weights_of_inference_mode_are_prepared() -> None:
    with torch.inference_mode():
        layer = conv_fusion.PreparedConv2d.of(nn.Conv2d(16, 32, 3, padding=1))
        x = torch.randn(1, 16, 9, 12)
        assert convolutions(lambda: conv_fusion.conv2d(layer, x)) == {"conv3x3_prepared": 1}


@needs_winograd
def test_for_prediction_prepares_again() -> None:
    """The only way after a change that the layer cannot see."""
    conv = nn.Conv2d(16, 32, 3, padding=1)
    first: Any = conv_fusion.for_prediction(nn.Sequential(conv))
    conv.weight.data.mul_(2)
    second: Any = conv_fusion.for_prediction(first)
    assert torch.equal(second[0].prepared, 2 * first[0].prepared)


@needs_winograd
def test_other_modules_that_call_a_prepared_convolution_use_its_weights() -> None:
    conv = nn.Conv2d(16, 32, 3, padding=1)
    model: Any = conv_fusion.for_prediction(nn.Sequential(conv, nn.ReLU()))
    x = torch.randn(1, 16, 9, 12)
    with torch.no_grad():
        assert convolutions(lambda: model(x)) == {"conv3x3_prepared": 1}
        expected = F.relu(conv(x))
        torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(model(x[0]), expected[0], atol=2e-5, rtol=1e-5)  # without batch axis
        moved = copy.copy(model[0])
        moved.stride = (2, 2)
        torch.testing.assert_close(moved(x), conv(x)[:, :, ::2, ::2], atol=2e-5, rtol=1e-5)


@needs_winograd
def test_backbones_of_torchvision_use_the_prepared_weights() -> None:
    pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    extractor = FeatureExtractor("torchvision:resnet18", "bn").eval()
    prepared = conv_fusion.for_prediction(extractor)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        # Each stage has four 3x3 convolutions. In the last three stages, the first one has stride 2.
        assert convolutions(lambda: prepared(images)) == {"conv3x3_prepared": 4 + 3 * 3}
        for got, wanted in zip(prepared(images), extractor(images), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@needs_winograd
def test_training_uses_winograd_and_gets_the_gradients_of_torch() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(2, 16, 20, 21, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        output = conv_fusion.conv2d(conv, x, relu=True)
        leaves: list[Tensor] = [x, *conv.parameters()]
        return torch.autograd.grad(output.square().sum(), leaves)

    assert convolutions(gradients) == {"conv3x3": 2}
    with winograd(False):
        expected = gradients()
    # Sums of up to a thousand terms of order ten.
    for got, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("channels", [4, 16])
def test_forward_mode_and_torch_func_work(channels: int) -> None:
    layer = conv_fusion.PreparedConv2d.of(nn.Conv2d(channels, 16, 3, padding=1).requires_grad_(False))
    x = torch.randn(1, channels, 16, 16)
    with torch.no_grad():
        found = torch.func.jvp(lambda x: conv_fusion.conv2d(layer, x), (x,), (x,))[1]
    torch.testing.assert_close(found, F.conv2d(x, layer.weight, padding=1), atol=2e-5, rtol=1e-5)
    # The weights have no address inside vmap.
    parameters = {"weight": torch.stack([layer.weight, 2 * layer.weight]), "bias": torch.zeros(2, 16)}
    both = torch.func.vmap(lambda given: torch.func.functional_call(layer, given, (x,)))(parameters)
    torch.testing.assert_close(both, torch.stack([found, 2 * found]), atol=4e-5, rtol=1e-5)


@needs_winograd
def test_prepared_network_can_be_exported_and_compiled() -> None:
    prepared: Any = conv_fusion.for_prediction(network(**WIDE))
    images = torch.randn(1, 3, 64, 96)

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = prepared

        def forward(self, x: Tensor) -> list[Tensor]:
            return [*self.network.features(x)["instance"]]

    with torch.no_grad():
        expected = Features()(images)
        program = torch.export.export(Features(), (images,), strict=False)
        names = [str(node.target) for node in program.graph.nodes]
        assert names.count("panfpn_fast.conv3x3_prepared.default") == 16 + 4
        compiled = torch.compile(Features(), fullgraph=True, backend="aot_eager")
        for found in (program.module()(images), compiled(images)):
            for got, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_results_of_other_modules_are_not_overwritten() -> None:
    x = torch.tensor([-1.0, 2.0]).reshape(1, 2, 1, 1)
    found = conv_fusion.conv2d(nn.Identity(), x, relu=True)
    assert found.flatten().tolist() == [0.0, 2.0]
    assert x.flatten().tolist() == [-1.0, 2.0]
    x.requires_grad_()
    conv_fusion.conv2d(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sigmoid()), x, relu=True).sum().backward()
    assert x.grad is not None


def test_a_prepared_layer_can_be_traced_by_fx() -> None:
    prepared: Any = conv_fusion.for_prediction(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).eval())
    traced = torch.fx.symbolic_trace(prepared)
    x = torch.randn(1, 16, 20, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(traced(x), prepared(x), rtol=1e-4, atol=1e-4)


def test_a_shared_layer_stays_shared() -> None:
    network: Any = nn.Module()
    network.a = network.b = nn.Conv2d(16, 16, 3, padding=1)
    prepared: Any = conv_fusion.for_prediction(network)
    assert prepared.a is prepared.b
    assert type(prepared.a) is conv_fusion.PreparedConv2d
    assert type(network.a) is nn.Conv2d


def test_a_gradient_within_forward_mode_has_its_tangent() -> None:
    """The gradient of the input is linear in the gradient of the output, so its tangent is that of the dual's."""
    random = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(1, 16, 40, 40, generator=random) for _ in range(2))
    weight = torch.randn(16, 16, 3, 3, generator=random) / 12
    x.requires_grad_()
    y = ops.conv3x3(x, weight)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.zeros_like(y), grad)
        (found,) = torch.autograd.grad(y, x, dual)
        tangent = forward_ad.unpack_dual(found).tangent
    expected = F.conv_transpose2d(grad, weight, padding=1)
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("with_added", [False, True])
@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"kernel_size": 1, "padding": 0}, {"bias": True}])
def test_training_folds_frozen_norms(settings: dict[str, Any], with_added: bool, hooked: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"kernel_size": 3, "padding": 1, "bias": False, **settings}
    conv, norm = nn.Conv2d(16, 32, **options).double(), FrozenBatchNorm2d(32).double()
    for value in norm.buffers():
        value.uniform_(0.5, 2)
    calls: list[int] = []
    if hooked:
        norm.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 16, 20, 24, dtype=torch.float64, requires_grad=True)
    y = F.batch_norm(conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    added = torch.randn_like(y).requires_grad_() if with_added else None
    expected = F.relu(y if added is None else y + added)
    found = conv_fusion.conv_norm(conv, norm, x, relu=True, added=added)
    torch.testing.assert_close(found, expected)
    assert len(calls) == hooked
    inputs = [x, *conv.parameters(), *([] if added is None else [added])]
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
    )


def test_training_keeps_one_map_of_a_convolution_and_its_frozen_norm() -> None:
    conv, norm = nn.Conv2d(32, 32, 3, padding=1, bias=False), FrozenBatchNorm2d(32)
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.shape[2:] == (30, 40):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    x = torch.randn(1, 32, 30, 40)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = conv_fusion.conv_norm(conv, norm, x, relu=True)
    assert kept == {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_two_1x1_convolutions_in_one_pass(memory_format: torch.memory_format, bias: bool) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 12, 1, bias=bias)
    x = torch.randn(2, 16, 20, 24).contiguous(memory_format=memory_format)
    expected = first(x), second(x)
    with torch.no_grad():
        torch.testing.assert_close(conv_fusion.conv1x1_of_both(first, second, x), expected)
    found = conv_fusion.conv1x1_of_both(first, second, x)
    torch.testing.assert_close(found, expected)
    parameters = [*first.parameters(), *second.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found[0].sum() + found[1].square().sum(), parameters),
        torch.autograd.grad(expected[0].sum() + expected[1].square().sum(), parameters),
    )


def test_hooks_see_both_1x1_convolutions_called() -> None:
    first, second = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 12, 1)
    calls: list[str] = []
    first.register_forward_hook(lambda *_: calls.append("first"))
    conv_fusion.conv1x1_of_both(first, second, torch.randn(1, 16, 4, 4))
    assert calls == ["first"]
