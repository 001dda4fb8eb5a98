"""The network with static shapes predicts as the eager network, apart from padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from panfpn_fast import _load
from panfpn_fast.models import PanopticFPN, PanopticFPNConfig, PanopticOutput
from panfpn_fast.models.padded import PaddedPanopticFPN, unpad
from panfpn_fast.models.roi_heads import BoxHead
from support.same_outputs import assert_same
from support.training_samples import make_sample, small_model

FEW: dict[str, Any] = {
    "rpn_pre_nms_topk": 60,
    "rpn_post_nms_topk": 50,
    "detections_per_image": 20,
    "instance_score_threshold": 0.2,
}
MMDETECTION: dict[str, Any] = {
    "rpn_ranking": "probability",
    "clamp_shrinking": True,
    "class_agnostic_nms": True,
    "score_threshold": 0.3,
    "instance_score_threshold": 0.0,
    "fusion_rule": "mmdetection",
    "channel_order": "RGB",
}


def images(height: int = 50, width: int = 70) -> Tensor:
    return torch.stack([make_sample(height, width, seed).image for seed in (1, 2)])


def check(
    model: PanopticFPN, given: Tensor, output_size: tuple[int, int] | None = None
) -> list[PanopticOutput]:
    """Compares with the eager network, checks the padding, and returns the prediction."""
    padded = PaddedPanopticFPN(model, output_size)(given)
    outputs = unpad(padded)
    sizes = None if output_size is None else [output_size] * len(given)
    for found, expected in zip(outputs, model(list(given), sizes), strict=True):
        assert_same(found, expected)
    most = model.config.detections_per_image if "instance" in model.config.tasks else 0
    assert padded["boxes"].shape == (len(given), most, 4)
    assert padded["segment_id"].shape == (len(given), most + model.config.num_stuff)
    assert not bool(padded["overflow"].any())
    for i, output in enumerate(outputs):
        for name in ("boxes", "scores", "classes", "mask_probs"):
            assert not bool(padded[name][i, len(output.boxes) :].any())
    return outputs


@pytest.mark.parametrize(
    ("settings", "output_size"),
    [
        ({}, None),
        ({}, (81, 47)),
        ({"score_threshold": 0.0}, None),
        ({"score_threshold": 0.34}, (64, 90)),
        (MMDETECTION, None),
        ({"fusion_rule": "panopticapi", "class_agnostic_boxes": True, "class_agnostic_masks": True}, None),
        ({"fpn_groups": 2, "semantic_fusion": "concat", "size_divisibility": 64}, (20, 30)),
    ],
    ids=["default", "resized", "every-class", "one-class", "mmdetection", "agnostic", "groups"],
)
def test_equals_the_eager_network(settings: dict[str, Any], output_size: tuple[int, int] | None) -> None:
    outputs = check(small_model(**{**FEW, **settings}).eval(), images(), output_size)
    assert all(bool(output.segments.isthing.any()) for output in outputs)


def test_few_detections() -> None:
    """There are fewer detections than rows, and their number differs between the images."""
    model = small_model(**{**FEW, "detections_per_image": 100, "class_agnostic_nms": True}).eval()
    counts = [len(output.boxes) for output in check(model, images())]
    assert 0 < min(counts) < max(counts) < 100


def test_detections_without_area() -> None:
    """Boxes outside the image are dropped after the best were selected, and later boxes move up."""
    model = small_model(**{**FEW, "box_weights": (0.2, 0.2, 5.0, 5.0)}).eval()
    outputs = check(model, images())
    assert 0 < min(len(output.boxes) for output in outputs) < 20


@pytest.mark.parametrize("layer", ["class_logits", "deltas"])
def test_nothing_found(layer: str) -> None:
    model = small_model(**FEW).eval()
    if layer == "class_logits":
        torch.nn.init.constant_(model.box_head.class_logits.bias[-1:], 100.0)  # all background
    else:
        torch.nn.init.constant_(model.rpn.get_parameter("deltas.bias"), float("nan"))  # no proposals
    for output in check(model, images()):
        assert len(output.boxes) == 0
        assert len(output.segments.id) > 0


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_one_branch(task: str) -> None:
    check(small_model(tasks=(task,), **FEW).eval(), images(), (33, 80))


def test_other_dtypes() -> None:
    model = small_model(**FEW).eval().double()
    check(model, images().double())
    found = PaddedPanopticFPN(model.bfloat16())(images())
    assert found["boxes"].dtype == found["mask_probs"].dtype == torch.float32


def test_too_many_candidates() -> None:
    """Omitted candidates are reported only if they could have changed the result."""
    model = small_model(**FEW, score_threshold=0.0).eval()
    expected = model(list(images()))
    assert all(len(output.boxes) == 20 for output in expected)
    enough = PaddedPanopticFPN(model, max_candidates=149)(images())
    assert enough["overflow"].tolist() == [False, False]
    for found, other in zip(unpad(enough), expected, strict=True):
        assert_same(found, other)
    few = PaddedPanopticFPN(model, max_candidates=20)(images())
    assert few["overflow"].tolist() == [True, True]


def test_equal_scores_keep_their_order() -> None:
    """Rows are equal, so only their order decides which are in the output and in which order."""
    config = PanopticFPNConfig(fpn_channels=4, num_things=3, box_head_channels=4, detections_per_image=7)
    head = BoxHead(config.replace(score_threshold=0.1))
    corners = torch.arange(12.0)[:, None] * 20
    proposals = torch.cat((corners, corners, corners + 9, corners + 9), dim=1)
    logits = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(12, 1)
    deltas = torch.zeros(12, 3, 4)
    [expected] = head.detect(logits, deltas, [proposals], [(300, 300)])
    every = torch.ones(1, 12, dtype=torch.bool)
    found = head.detect_padded(logits, deltas, proposals[None], every, (300, 300), 1000)
    assert torch.equal(found.boxes[0], expected.boxes)
    assert torch.equal(found.classes[0], expected.classes)
    # The worst candidate within the limit scores as high as the omitted ones.
    found = head.detect_padded(logits, deltas, proposals[None], every, (300, 300), 10)
    assert found.overflow.tolist() == [True]


def test_no_gradients_and_no_copies() -> None:
    model = small_model(**FEW).eval()
    padded = PaddedPanopticFPN(model)
    assert padded.model is model
    assert not any(value.requires_grad for value in padded(images()).values())


def with_padding(model: PanopticFPN, image: Tensor) -> Tensor:
    """Returns a batch of an image [3, H, W], padded as the network pads it but with random pixels."""
    multiple = model.config.size_divisibility
    shape = [-(-side // multiple) * multiple for side in image.shape[1:]]
    batch = torch.randint(0, 256, (1, 3, *shape), dtype=torch.uint8)
    batch[0, :, : image.shape[1], : image.shape[2]] = image
    return batch


@pytest.mark.parametrize(
    "settings",
    [{}, MMDETECTION, {"tasks": ("instance",)}, {"tasks": ("semantic",)}, {"size_divisibility": 64}],
    ids=["default", "mmdetection", "things", "stuff", "multiple-of-64"],
)
def test_sizes_in_tensors(settings: dict[str, Any]) -> None:
    """All images of a padded shape give the same bits as with sizes in integers, and as the eager network."""
    model = small_model(**{**FEW, **settings}).eval()
    padded = PaddedPanopticFPN(model)
    anchors = padded.anchors(64, 96 if model.config.size_divisibility == 32 else 128)
    for size in ((50, 70), (64, 96), (33, 65), (63, 81)):
        image = make_sample(*size, seed=size[0]).image
        for output_size in (size, (81, 47), (20, 300)):
            expected = PaddedPanopticFPN(model, output_size)(image[None])
            tensors = torch.tensor([size]), torch.tensor([output_size])
            found = padded.branches(with_padding(model, image), *tensors, anchors)
            outputs = padded.merge(*found, size, output_size)
            assert outputs.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(outputs[name], value), (size, output_size, name)
            [output], [eager] = unpad(outputs), model([image], [output_size])
            assert_same(output, eager)


def test_sizes_of_each_image_in_tensors() -> None:
    model = small_model(**FEW).eval()
    padded = PaddedPanopticFPN(model)
    sizes = (50, 70), (64, 96)
    given = [make_sample(*size, seed=size[0]).image for size in sizes]
    batch = torch.cat([with_padding(model, image) for image in given])
    found, _ = padded.branches(batch, torch.tensor(sizes), torch.tensor([(20, 30), (81, 47)]))
    for i, eager in enumerate(model(given, [(20, 30), (81, 47)])):
        count = int(found["count"][i])
        assert count == len(eager.boxes) > 0
        torch.testing.assert_close(found["boxes"][i, :count], eager.boxes, atol=1e-4, rtol=0)
        assert torch.equal(found["classes"][i, :count], eager.classes)


class OnTheGpu(TorchDispatchMode):
    """Requires that each operation computes on the GPU, from what is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, found)):
            assert not isinstance(value, Tensor) or value.device.type in ("cuda", "meta"), func
        return found


@pytest.mark.parametrize("settings", [{}, MMDETECTION], ids=["detectron2", "mmdetection"])
def test_no_host_sync(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors, whatever the host needs to read is an error, as is an upload."""
    monkeypatch.setattr(_load, "_cuda_error", None)
    with FakeTensorMode():
        with torch.device("cuda"):
            model = small_model(**{**FEW, **settings}).eval()
            given = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
            size = torch.zeros(1, 2, dtype=torch.int64)
        padded = PaddedPanopticFPN(model)
        with OnTheGpu():
            found = padded.branches(given, size, size)
            outputs = padded.merge(*found, (50, 70), (81, 47))
        assert outputs["panoptic"].shape == (1, 81, 47)
        with pytest.raises(AssertionError), OnTheGpu():
            size.to("cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
def test_cuda_graph() -> None:
    padded = PaddedPanopticFPN(small_model(**FEW).eval().cuda())
    given = images().cuda()
    padded(given)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = padded(given)
    given.copy_(given.flip(0))
    graph.replay()
    for found, expected in zip(unpad(captured), unpad(padded(given)), strict=True):
        assert_same(found, expected)


def test_invalid_input_is_rejected() -> None:
    model = small_model(**FEW)
    with pytest.raises(TypeError, match="model: expected a PanopticFPN, got Identity"):
        PaddedPanopticFPN(torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: expected a network in evaluation mode"):
        PaddedPanopticFPN(model)
    model.eval()
    with pytest.raises(ValueError, match=r"output_size: expected .*\(0, 4\)"):
        PaddedPanopticFPN(model, (0, 4))
    with pytest.raises(ValueError, match="max_candidates: expected an integer of at least 1, got 0"):
        PaddedPanopticFPN(model, max_candidates=0)
    padded = PaddedPanopticFPN(model)
    bad: list[tuple[Any, type[Exception], str]] = [
        ([torch.zeros(3, 4, 4)], TypeError, "expected a tensor, got list"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(3, 4, 4), ValueError, r"expected shape \[N, 3, H, W\], got \[3, 4, 4\]"),
        (torch.zeros(1, 3, 0, 4), ValueError, r"got \[1, 3, 0, 4\]"),
    ]
    for value, error, message in bad:
        with pytest.raises(error, match=f"images: .*{message}"):
            padded(value)
