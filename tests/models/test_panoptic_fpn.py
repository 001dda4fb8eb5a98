"""The whole network: sizes, odd images, batches, invalid input and images without detections."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.models import PanopticFPN, PanopticFPNConfig, PanopticOutput
from panfpn_fast.models.outputs import InstanceOutput
from panfpn_fast.models.panoptic_fpn import merge


@pytest.fixture(scope="module")
def model() -> PanopticFPN:
    torch.manual_seed(0)
    model = PanopticFPN(
        num_things=3,
        num_stuff=4,
        fpn_channels=32,
        box_head_channels=32,
        mask_head_channels=16,
        semantic_channels=32,
        semantic_groups=8,
        rpn_pre_nms_topk=50,
        rpn_post_nms_topk=40,
        detections_per_image=12,
        instance_score_threshold=0.2,
        stuff_area_threshold=10,
    )
    # Makes an untrained network, whose activations are not normalised, detect segments of every kind.
    model.backbone.get_parameter("conv1.weight").detach().mul_(1e-4)
    for head in (model.box_head.class_logits, model.box_head.box_deltas):
        torch.nn.init.normal_(head.weight, std=0.1)
    return model.eval()


def _image(height: int, width: int, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def _check(output: PanopticOutput, height: int, width: int) -> None:
    assert output.panoptic.shape == output.semantic.shape == (height, width)
    assert (output.panoptic.dtype, output.semantic.dtype) == (torch.int32, torch.uint8)
    count = len(output.boxes)
    assert output.boxes.shape == (count, 4)
    assert output.scores.shape == output.classes.shape == (count,)
    assert output.mask_probs.shape == (count, 28, 28)
    assert output.classes.dtype == torch.int64
    assert (output.boxes >= 0).all()
    assert (output.boxes <= torch.tensor([width, height, width, height])).all()
    assert (output.scores.diff() <= 0).all()
    ids, areas = torch.unique(output.panoptic[output.panoptic > 0], return_counts=True)
    assert ids.tolist() == output.segments.id.tolist()
    assert areas.tolist() == output.segments.area.tolist()


@pytest.mark.parametrize(
    ("name", "millions"),
    [("panoptic_fpn_r50", 46.0), ("panoptic_fpn_r101", 64.9), ("panoptic_fpn_r50_cityscapes", 45.6)],
)
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = PanopticFPN.from_config(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert model.pixel_mean.device.type == model.rpn.cells.device.type == "cpu"


@pytest.mark.parametrize("size", [(33, 57), (1, 1), (64, 96), (31, 130)])
@pytest.mark.parametrize("output_size", [None, (41, 29)])
def test_sizes(model: PanopticFPN, size: tuple[int, int], output_size: tuple[int, int] | None) -> None:
    outputs = model([_image(*size)], None if output_size is None else [output_size])
    assert len(outputs) == 1
    _check(outputs[0], *(output_size or size))


def test_segments_are_found(model: PanopticFPN) -> None:
    [output] = model([_image(96, 128)])
    assert len(output.boxes) == 12
    assert output.segments.isthing.any()
    assert not output.segments.isthing.all()


def test_batch_equals_its_images_if_the_padding_is_equal(model: PanopticFPN) -> None:
    images = [_image(60, 90, 1), _image(64, 70, 2), _image(33, 96, 3)]
    batch = model.prepare(images)
    assert batch.images.shape == (3, 3, 64, 96)
    assert batch.sizes == [(60, 90), (64, 70), (33, 96)]
    together = model(images, [(60, 90), (128, 140), (33, 96)])
    for output, size in zip(together, [(60, 90), (128, 140), (33, 96)], strict=True):
        _check(output, *size)
    [alone] = model([images[0]])
    torch.testing.assert_close(together[0].boxes, alone.boxes, atol=1e-2, rtol=0)
    assert (together[0].panoptic == alone.panoptic).float().mean() > 0.99


def test_images_are_normalised_in_the_channel_order_of_the_backbone() -> None:
    image = torch.tensor([[[10.0]], [[20.0]], [[30.0]]])
    with torch.device("meta"):
        bgr = PanopticFPN(pixel_mean=(1, 2, 3), pixel_std=(1, 2, 4))
        rgb = PanopticFPN(pixel_mean=(1, 2, 3), pixel_std=(1, 2, 4), channel_order="RGB")
    for model, expected in ((bgr, [29.0, 9.0, 1.75]), (rgb, [9.0, 9.0, 6.75])):
        model.backbone.get_submodule("conv1").weight = torch.nn.Parameter(torch.zeros(64, 3, 7, 7))
        batch = model.prepare([image])
        assert batch.images.shape == (1, 3, 32, 32)
        assert batch.images[0, :, 0, 0].tolist() == expected
        assert batch.images.count_nonzero() == 3


def test_uint8_and_float_images_give_equal_results(model: PanopticFPN) -> None:
    image = _image(40, 50)
    assert torch.equal(model.prepare([image]).images, model.prepare([image.double()]).images)


def test_no_images(model: PanopticFPN) -> None:
    assert model([]) == []


def test_nothing_found(model: PanopticFPN) -> None:
    model = copy.deepcopy(model)
    assert model.box_head.class_logits.bias is not None
    torch.nn.init.constant_(model.box_head.class_logits.bias[-1:], 100.0)  # all background
    [output] = model([_image(33, 57)])
    _check(output, 33, 57)
    assert len(output.boxes) == 0
    assert not output.segments.isthing.any()
    assert len(output.segments.id) > 0


def test_no_proposals(model: PanopticFPN) -> None:
    model = copy.deepcopy(model)
    assert model.rpn.deltas.bias is not None
    torch.nn.init.constant_(model.rpn.deltas.bias, float("nan"))
    for output in model([_image(33, 57), _image(20, 20)], [(33, 57), (20, 20)]):
        assert len(output.boxes) == 0
        assert not output.segments.isthing.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(model: PanopticFPN, dtype: torch.dtype) -> None:
    other = copy.deepcopy(model).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert other.pixel_mean.dtype == other.rpn.cells.dtype == wide
    torch.testing.assert_close(other.pixel_mean.float(), model.pixel_mean, atol=0, rtol=0)
    [output] = other([_image(64, 96)])
    _check(output, 64, 96)
    assert output.boxes.dtype == output.mask_probs.dtype == wide


def test_devices(model: PanopticFPN, device: torch.device) -> None:
    other = copy.deepcopy(model).to(device)
    assert other.device.type == other.rpn.cells.device.type == device.type
    [output] = other([_image(64, 96)], [(100, 90)])
    assert all(x.device.type == device.type for x in output if isinstance(x, Tensor))
    [expected] = model([_image(64, 96)], [(100, 90)])
    assert (output.panoptic.cpu() == expected.panoptic).float().mean() > 0.98
    assert (output.semantic.cpu() == expected.semantic).float().mean() > 0.99


def test_native_ops_are_used(model: PanopticFPN, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def spy(name: str) -> None:
        op = getattr(ops, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(ops, name, run)

    for name in ("multiscale_roi_align", "batched_nms", "panoptic_merge"):
        spy(name)
    model([_image(64, 96)])
    assert called == [
        "batched_nms",
        "multiscale_roi_align",
        "batched_nms",
        "multiscale_roi_align",
        "panoptic_merge",
    ]


@pytest.mark.parametrize(
    ("images", "sizes", "error", "message"),
    [
        ([np.zeros((3, 4, 4), np.uint8)], None, TypeError, r"images\[0\]: expected a tensor, got ndarray"),
        ([torch.zeros(3, 4, 4, dtype=torch.int64)], None, TypeError, r"images\[0\]: .*got torch.int64"),
        (
            [torch.zeros(1, 4, 4)],
            None,
            ValueError,
            r"images\[0\]: expected shape \[3, h, w\], got \[1, 4, 4\]",
        ),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 0, 4)], None, ValueError, r"images\[1\]: .*got \[3, 0, 4\]"),
        ([torch.zeros(3, 4, 4)], [], ValueError, "output_sizes: expected 1 sizes, one per image, got 0"),
        ([torch.zeros(3, 4, 4)], [(0, 4)], ValueError, r"output_sizes\[0\]: .*got \(0, 4\)"),
        ([torch.zeros(3, 4, 4)], [(4, 4, 3)], ValueError, r"output_sizes\[0\]: .*got \(4, 4, 3\)"),
    ],
)
def test_bad_input(model: PanopticFPN, images: Any, sizes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(images, sizes)


def test_state_dict_contains_only_weights(model: PanopticFPN) -> None:
    names = set(model.state_dict())
    assert "backbone.layer1.0.shortcut.norm.running_var" in names
    assert not any("pixel" in name or "cells" in name for name in names)


def test_fusion_rule_comes_from_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = ops.panoptic_merge

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["rule"])
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "panoptic_merge", spy)
    nothing = InstanceOutput(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 28, 28)
    )
    for rule in ("detectron2", "mmdetection"):
        merge(PanopticFPNConfig().replace(fusion_rule=rule), nothing, torch.zeros(4, 5, dtype=torch.uint8))
    assert seen == ["detectron2", "mmdetection"]
