"""Compares torchvision with and without the patch, and checks which ops the patched functions use."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import panfpn_fast
from panfpn_fast.integrations.torchvision import FRAMEWORK
from support.op_samples import DEGENERATE_BOXES, generator, random_boxes
from support.patch_samples import Calls

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
detection = torchvision.models.detection
tv = torchvision.ops

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def unpatched_afterwards() -> Iterator[None]:
    yield
    panfpn_fast.unpatch("torchvision")


def both(call: Callable[[], Any]) -> tuple[Any, Any, Calls]:
    """Returns the results with and without the patch, and the op calls with the patch."""
    panfpn_fast.unpatch("torchvision")
    with Calls() as calls:
        expected = call()
    assert not calls.ops
    with panfpn_fast.patch("torchvision"), Calls() as calls:
        got = call()
    return got, expected, calls


def assert_same(call: Callable[[], Tensor], op: str, rtol: float = 0, atol: float = 0) -> None:
    """Asserts equal results with and without the patch, and that the patched call uses `op`."""
    got, expected, calls = both(call)
    assert set(calls.ops) == {op}
    assert not calls.torchvision_ops
    assert got.is_contiguous() == expected.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def assert_original(call: Callable[[], Any]) -> None:
    """Asserts that the patched call uses torchvision's own function, and raises the same error if it raises one."""

    def outcome() -> Any:
        try:
            return call()
        except Exception as error:  # whatever torchvision raises
            return f"{type(error)}: {error}"

    got, expected, calls = both(outcome)
    assert not calls.ops
    if isinstance(expected, str):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def sample(count: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns boxes, scores (some are equal) and classes."""
    boxes = random_boxes(count, (200, 300), seed)
    scores = torch.randint(0, 200, (count,), generator=generator(seed)) / 200
    classes = torch.randint(0, 3, (count,), generator=generator(seed + 1))
    return boxes.to(device), scores.to(device), classes.to(device)


def test_every_function_is_there() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panfpn_fast.patch("torchvision")
    targets = {replacement.target: replacement.op for replacement in FRAMEWORK.replacements}
    assert panfpn_fast.patched() == {"torchvision": targets}
    assert torchvision.ops.nms is torchvision.ops.boxes.nms
    assert torchvision.ops.roi_align is detection.roi_heads.roi_align is torchvision.ops.poolers.roi_align


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [0, 1, 700])
def test_nms(count: int, dtype: torch.dtype, device: torch.device) -> None:
    boxes, scores, _ = sample(count, device)
    boxes = torch.cat((boxes, DEGENERATE_BOXES.to(boxes)))
    scores = torch.cat((scores, torch.linspace(0, 1, len(DEGENERATE_BOXES)).to(scores)))
    assert_same(lambda: tv.nms(boxes.to(dtype), scores.to(dtype), 0.45), "nms")


# torchvision shifts the classes apart for up to 1,000 boxes on the CPU and 25,000 on CUDA. For more boxes it runs one
# NMS per class.
@pytest.mark.parametrize("count", [0, 300, 1500])
def test_batched_nms(count: int, device: torch.device) -> None:
    boxes, scores, classes = sample(count, device)
    boxes[:, :2] -= 50  # with negative coordinates, shifted classes overlap
    assert_same(
        lambda: tv.batched_nms(boxes, scores, classes, 0.45), "nms" if count <= 1000 else "batched_nms"
    )


def test_one_nms_per_class(device: torch.device) -> None:
    boxes, scores, classes = sample(300, device)
    # No two scores are equal, because torchvision's sort is not stable on CUDA.
    scores = torch.rand(300, generator=generator(3)).to(device)
    vanilla = "_batched_nms_vanilla"
    assert_same(lambda: getattr(tv.boxes, vanilla)(boxes, scores, classes, 0.45), "batched_nms")


def features(device: torch.device, size: int = 64, levels: int = 1, channels: int = 5) -> list[Tensor]:
    shapes = [(2, channels, size >> level, (size + 32) >> level) for level in range(levels)]
    return [torch.randn(shape, generator=generator(i)).to(device) for i, shape in enumerate(shapes)]


def boxes_of_images(device: torch.device, count: int = 40) -> list[Tensor]:
    return [random_boxes(count, (250, 350), seed).to(device) for seed in (0, 1)]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_roi_align(memory_format: torch.memory_format, aligned: bool, device: torch.device) -> None:
    x = features(device)[0].to(memory_format=memory_format)
    boxes = boxes_of_images(device)
    rois = torch.cat(
        [torch.cat((torch.full((40, 1), float(i)).to(b), b), dim=1) for i, b in enumerate(boxes)]
    )
    close = {"atol": 1e-4}  # coordinates up to 90 have a rounding error of 1e-5
    assert_same(lambda: tv.roi_align(x, boxes, (7, 5), 0.25, 2, aligned), "roi_align", **close)
    assert_same(
        lambda: tv.roi_align(x, rois, output_size=7, spatial_scale=0.25, aligned=aligned),
        "roi_align",
        **close,
    )
    assert_same(lambda: tv.RoIAlign(3, 0.25, -1, aligned)(x, rois), "roi_align", **close)
    assert_same(lambda: tv.roi_align(x, rois[:0], 3), "roi_align")


def test_roi_align_in_half_precision(device: torch.device) -> None:
    x = features(device)[0].half()
    boxes = [b.round().half() for b in boxes_of_images(device)]
    # torchvision's coordinates are in half precision: below 64 pixels their error is up to 2**-5 pixels.
    assert_same(lambda: tv.roi_align(x, boxes, 7, 0.125, 2), "roi_align", atol=0.25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    x = features(device)[0].to(dtype)
    boxes, scores, classes = sample(1500, device)
    with torch.autocast(device.type, dtype=dtype):
        step = torch.finfo(dtype).eps  # the results differ by one rounding
        assert_same(
            lambda: tv.roi_align(x, boxes_of_images(device), 7, 0.25), "roi_align", rtol=step, atol=1e-4
        )
        assert_same(lambda: tv.nms(boxes.to(dtype), scores.to(dtype), 0.45), "nms")
        assert_same(
            lambda: tv.batched_nms(boxes.to(dtype), scores, classes, 0.45),
            "nms" if device.type == "cuda" else "batched_nms",
        )
        few = [value[:200] for value in (boxes.to(dtype), scores, classes)]
        assert_same(lambda: tv.batched_nms(*few, 0.45), "nms")


def test_gradients_of_roi_align(device: torch.device) -> None:
    x = features(device)[0]
    weights = torch.randn(80, 5, 7, 7, generator=generator(9)).to(device)

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        (tv.roi_align(leaf, boxes_of_images(device), 7, 0.25) * weights).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    got, expected, calls = both(gradient)
    assert set(calls.ops) == {"roi_align", "roi_align_backward"}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)  # sums of contributions of up to 80 boxes


def pooler() -> Any:
    return tv.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)


def pool(pyramid: Sequence[Tensor], boxes: list[Tensor], pooler: Any) -> Tensor:
    named = {str(level): x for level, x in enumerate(pyramid)}
    return pooler(named, boxes, [(4 * pyramid[0].shape[2], 4 * pyramid[0].shape[3])] * len(boxes))


def test_multiscale_roi_align(device: torch.device) -> None:
    pyramid = features(device, levels=4)
    boxes = boxes_of_images(device)
    assert_same(lambda: pool(pyramid, boxes, pooler()), "multiscale_roi_align", atol=1e-4)
    assert_same(lambda: pool(pyramid, [b[:0] for b in boxes], pooler()), "multiscale_roi_align")
    last = [x.to(memory_format=torch.channels_last) for x in pyramid]
    assert_same(lambda: pool(last, boxes, pooler()), "multiscale_roi_align", atol=1e-4)
    half = [x.bfloat16() for x in pyramid]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        step = torch.finfo(torch.bfloat16).eps
        assert_same(lambda: pool(half, boxes, pooler()), "multiscale_roi_align", rtol=step, atol=1e-4)


def test_gradients_of_multiscale_roi_align(device: torch.device) -> None:
    pyramid = features(device, levels=4)

    def gradients() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in pyramid]
        return list(
            torch.autograd.grad(pool(leaves, boxes_of_images(device), pooler()).square().sum(), leaves)
        )

    got, expected, calls = both(gradients)
    assert set(calls.ops) == {"multiscale_roi_align", "multiscale_roi_align_backward"}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_levels_are_torchvisions_at_every_threshold(device: torch.device) -> None:
    """Uses boxes of about 112, 224 and 448 pixels.

    Their sides grow in steps of a rounding error, so that torchvision's level changes among them.
    """
    pyramid = [torch.full_like(x, float(i)) for i, x in enumerate(features(device, levels=4))]
    steps = (1 + torch.arange(-30, 31, dtype=torch.float64) * 1e-7).float()
    sides = torch.cat([side * steps for side in (112.0, 224.0, 448.0)])
    zeros = torch.zeros_like(sides)
    boxes = [torch.stack((zeros, zeros, sides, sides), dim=1).to(device)] * 2
    for scattered in (boxes, [b.double() for b in boxes]):
        levels = tv.poolers.LevelMapper(2, 5)(scattered)
        assert len(levels.unique()) == 4
        x = [level.to(scattered[0]) for level in pyramid]
        if device.type == "cpu" or scattered is boxes:
            got, expected, calls = both(lambda x=x, boxes=scattered: pool(x, boxes, pooler()))  # type: ignore[misc]
            assert set(calls.ops) == {"roi_align"}  # one call per level, as in torchvision
            torch.testing.assert_close(got, expected)


def test_boxes_without_area_get_torchvisions_level(device: torch.device) -> None:
    pyramid = features(device, levels=4)
    flat = torch.tensor([[10.0, 10.0, 10.0, 80.0], [20.0, 20.0, 60.0, 90.0]], device=device)
    assert_same(lambda: pool(pyramid, [flat, flat], pooler()), "multiscale_roi_align", atol=1e-4)
    turned = torch.tensor([[60.0, 10.0, 20.0, 80.0]], device=device)  # torchvision returns zeros
    assert_same(lambda: pool(pyramid, [turned, flat], pooler()), "roi_align", atol=1e-4)


def test_levels_that_are_not_powers_of_two_apart(device: torch.device) -> None:
    pyramid = features(device, levels=4)[::2]
    two = tv.MultiScaleRoIAlign(["0", "1"], 7, 2)
    assert_same(lambda: pool(pyramid, boxes_of_images(device), two), "roi_align", atol=1e-4)


class PlainSubclass(Tensor):
    """A subclass that overrides nothing."""


def test_unsupported_calls_go_to_torchvision(device: torch.device) -> None:
    boxes, scores, classes = sample(30, device)
    x = features(device)[0]
    both_images = [of_image / 8 for of_image in boxes_of_images(device, 3)]
    half = boxes.half(), scores.half()
    calls: list[Callable[[], Any]] = [
        lambda: tv.nms(*half, 0.5),
        lambda: tv.nms(boxes.bfloat16(), scores.bfloat16(), 0.5),
        lambda: tv.nms(boxes, scores.double(), 0.5),
        lambda: tv.nms(boxes, scores[:-1], 0.5),
        lambda: tv.nms(boxes[:, :3], scores, 0.5),
        lambda: tv.nms(boxes[0], scores, 0.5),
        lambda: tv.nms(boxes, scores[0], 0.5),
        lambda: tv.nms(boxes, scores, torch.tensor(0.5)),
        lambda: tv.nms(boxes, scores, float("nan")),
        lambda: tv.nms(boxes, scores, "0.5"),
        lambda: tv.nms(boxes.tolist(), scores, 0.5),
        lambda: tv.nms(boxes.as_subclass(PlainSubclass), scores, 0.5),
        lambda: tv.nms(boxes.to("meta"), scores.to("meta"), 0.5).dtype,
        lambda: tv.batched_nms(boxes.bfloat16(), scores.bfloat16(), classes, 0.5),
        lambda: tv.roi_align(x, both_images[:1], 7),
        lambda: tv.roi_align(x, [b.double() for b in both_images], 7),
        lambda: tv.roi_align(x.bfloat16(), [b.bfloat16() for b in both_images], 7),
        lambda: tv.roi_align(x, both_images, [7, 7, 7]),
        lambda: tv.roi_align(x[:1, :1], both_images[0][:1].unsqueeze(0).unbind(), 1, sampling_ratio=1025),
        lambda: tv.roi_align(x, both_images, 7, aligned=1),
        lambda: tv.roi_align(x, both_images, 0),
        lambda: tv.roi_align(x, both_images[0], 7),
        lambda: tv.roi_align(x, [], 7),
        lambda: tv.roi_align(x[0], both_images, 7),
        lambda: tv.roi_align(x, both_images, "7"),
        lambda: tv.MultiScaleRoIAlign(["0", "1"], 7, 2)({"0": x, "1": x}, [], [(256, 384)]),
    ]
    for call in calls:
        assert_original(call)


def test_classes_of_other_dtypes_and_lengths(device: torch.device) -> None:
    boxes, scores, classes = sample(30, device)
    for idxs in (classes.float(), classes.bool(), classes[:1]):
        # torchvision shifts the boxes itself and calls our NMS.
        assert_same(lambda idxs=idxs: tv.batched_nms(boxes, scores, idxs, 0.5), "nms")  # type: ignore[misc]


def test_quantized_tensors() -> None:
    boxes, scores, _ = sample(30, torch.device("cpu"))
    quantized = [torch.quantize_per_tensor(value, 1.0, 0, torch.quint8) for value in (boxes, scores * 100)]
    assert_original(lambda: tv.nms(*quantized, 0.5))


# Models with random weights, without a score threshold so that they return many detections.


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(3, *size, generator=generator(i)) for i, size in enumerate(sizes)]


SMALL = {"weights": None, "weights_backbone": None, "num_classes": 6, "min_size": 96, "max_size": 160}


def detections(model: Any, inputs: list[Tensor]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return model(inputs)


def test_mask_rcnn() -> None:
    """Compares the boxes, labels, scores and masks of the network that the benchmark uses."""
    torch.manual_seed(0)
    few: dict[str, Any] = {"rpn_post_nms_top_n_test": 40, "box_detections_per_img": 10}
    model = detection.maskrcnn_resnet50_fpn_v2(**SMALL, **few, box_score_thresh=0.0).eval()
    # Without this hook, one class of the untrained network has the highest score in every box.
    model.roi_heads.box_predictor.cls_score.register_forward_hook(lambda _, __, out: out - out.mean(0))
    inputs = images((100, 150), (96, 110))
    got, expected, calls = both(lambda: detections(model, inputs))
    # There are many proposals and few detections, so torchvision uses both ways of batched NMS.
    assert set(calls.ops) == {"nms", "batched_nms", "multiscale_roi_align"}
    assert not calls.torchvision_ops
    for patched, original in zip(got, expected, strict=True):
        assert len(original["boxes"]) == 10
        assert len(original["labels"].unique()) > 1
        assert torch.equal(patched["labels"], original["labels"])
        # Pooled values differ by rounding, and about forty layers amplify the difference.
        torch.testing.assert_close(patched["scores"], original["scores"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(patched["boxes"], original["boxes"], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(patched["masks"], original["masks"], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "build",
    [
        lambda: detection.retinanet_resnet50_fpn(**SMALL, score_thresh=0.0),
        lambda: detection.fcos_resnet50_fpn(**SMALL, score_thresh=0.0),
        lambda: detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=6, score_thresh=0.0
        ),
    ],
    ids=["retinanet", "fcos", "ssdlite"],
)
def test_detectors_that_use_only_nms(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    [got], [expected], calls = both(lambda: detections(model, images((96, 120))))
    assert set(calls.ops) <= {"nms", "batched_nms"}
    assert calls.ops
    assert not calls.torchvision_ops
    assert len(expected["boxes"]) > 20
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def small_mask_rcnn() -> Any:
    torch.manual_seed(0)
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5
    )
    return detection.MaskRCNN(
        backbone, num_classes=4, min_size=96, max_size=128, rpn_post_nms_top_n_train=100
    )


def test_training() -> None:
    """Compares the losses and all gradients of one step."""
    model = small_mask_rcnn().train()
    target = {
        "boxes": torch.tensor([[5.0, 5.0, 60.0, 70.0], [30.0, 20.0, 90.0, 80.0]]),
        "labels": torch.tensor([1, 2]),
        "masks": torch.zeros(2, 96, 128, dtype=torch.uint8),
    }
    target["masks"][:, 20:60, 30:55] = 1
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def step() -> tuple[dict[str, Tensor], list[Tensor]]:
        model.load_state_dict(buffers, strict=False)
        torch.manual_seed(1)  # sampling of proposals is random
        losses = model(images((96, 128)), [target])
        wanted = [p for p in model.parameters() if p.requires_grad]
        return losses, list(torch.autograd.grad(sum(losses.values()), wanted, materialize_grads=True))

    (losses, gradients), (expected, expected_gradients), calls = both(step)
    assert {"roi_align", "multiscale_roi_align", "multiscale_roi_align_backward"} <= set(calls.ops)
    assert not calls.torchvision_ops
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-5)
    for got, original in zip(gradients, expected_gradients, strict=True):
        scale = float(original.abs().max())
        torch.testing.assert_close(got, original, rtol=1e-3, atol=1e-3 * scale + 1e-6)


# TorchScript, FX, torch.compile and torch.export


def test_torch_jit_compiles_the_originals() -> None:
    model = small_mask_rcnn().eval()
    boxes, scores, classes = sample(30, torch.device("cpu"))
    pyramid = features(torch.device("cpu"), levels=4)
    with panfpn_fast.patch("torchvision"):
        torch.jit.script(model)
        function = torch.jit.script(tv.batched_nms)
        scripted_pooler = torch.jit.script(pooler())
        traced = torch.jit.trace(lambda boxes: tv.batched_nms(boxes, scores, classes, 0.5), boxes)
    for name, graph in (
        ("nms", function.inlined_graph),
        ("roi_align", scripted_pooler.inlined_graph),
        ("nms", traced.inlined_graph),
    ):
        assert f"torchvision::{name}" in str(graph)
        assert "panfpn_fast" not in str(graph)
    assert torch.equal(function(boxes, scores, classes, 0.5), tv.batched_nms(boxes, scores, classes, 0.5))
    images_boxes = boxes_of_images(torch.device("cpu"))
    expected = pool(pyramid, images_boxes, pooler())
    assert torch.equal(pool(pyramid, images_boxes, scripted_pooler), expected)


def test_symbolic_traces_use_our_ops() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pooler = tv.MultiScaleRoIAlign(["0", "1"], 3, 2)

        def forward(self, x: Any, boxes: Any) -> Any:
            return self.pooler(x, boxes, [(256, 384)])

    pyramid = {str(i): x for i, x in enumerate(features(torch.device("cpu"), levels=2))}
    boxes = boxes_of_images(torch.device("cpu"))
    expected = Pooling()(pyramid, boxes)
    with panfpn_fast.patch("torchvision"), Calls() as calls:
        got = torch.fx.symbolic_trace(Pooling())(pyramid, boxes)
    assert set(calls.ops) == {"multiscale_roi_align"}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="this torch reports torch.compile as an export")
def test_torch_compile_makes_one_graph_with_our_ops() -> None:
    """Also with a pooler, and with lengths that the compiler does not know, which our ops do not support."""
    boxes, scores, classes = sample(40, torch.device("cpu"))
    x = features(torch.device("cpu"))[0]
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    def compiled(call: Callable[..., Tensor], *arguments: Any) -> set[str]:
        torch._dynamo.reset()
        graphs.clear()
        expected = call(*arguments)
        with panfpn_fast.patch("torchvision"):
            got = torch.compile(call, backend=backend, fullgraph=True)(*arguments)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        return set(re.findall(r"torch\.ops\.(\w+\.\w+)\]", "".join(graphs)))

    settings = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # type: ignore[attr-defined]
    with settings:
        assert compiled(lambda b, s: tv.nms(b, s, 0.5), boxes, scores) == {"panfpn_fast.nms"}
        assert compiled(lambda b, s, i: tv.batched_nms(b, s, i, 0.5), boxes, scores, classes) == {
            "panfpn_fast.nms"
        }
        assert compiled(lambda b, s: tv.nms(b[s > 0.5], s[s > 0.5], 0.5), boxes, scores) == {
            "torchvision.nms"
        }
        assert compiled(lambda x, b: tv.roi_align(x, [b, b[b[:, 0] > 9]], 3), x, boxes) == {
            "panfpn_fast.roi_align"
        }
        pyramid = features(torch.device("cpu"), levels=2)
        two = tv.MultiScaleRoIAlign(["0", "1"], 3, 2)
        pool(pyramid, [boxes, boxes], two)  # computes and stores the scales
        assert compiled(lambda a, b, c: pool([a, b], [c, c], two), *pyramid, boxes) == {
            "panfpn_fast.roi_align"
        }


def test_exported_programs_do_not_need_this_library() -> None:
    class Suppress(nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
            return tv.nms(boxes, scores, 0.5)

    boxes, scores, _ = sample(40, torch.device("cpu"))
    for strict in (False, True):
        with panfpn_fast.patch("torchvision"):
            program = torch.export.export(Suppress(), (boxes, scores), strict=strict)
        text = str(program.graph)
        assert "torchvision.nms" in text
        assert "panfpn_fast" not in text
