"""Compares the replacements with stand-ins for detectron2's functions, and with detectron2 if it is installed."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.integrations import patch
from panfpn_fast.integrations.detectron2 import FRAMEWORK
from panfpn_fast.ops import reference
from support.op_samples import generator, random_boxes, random_features, random_masks, random_rois
from support.patch_samples import (
    Calls,
    falls_back,
    framework_class,
    gradients,
    never,
    paste,
    replace,
    return_sentinel,
    same,
    same_step,
)

# The stand-ins behave as detectron2's functions do. The replacement for `inference` looks functions up by name in the
# module of the original `inference`, which in these tests is this module.


class Boxes:
    """Box corners in a wrapper that functions modify in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, item: Tensor) -> Boxes:
        return Boxes(self.tensor[item])


class Instances:
    """Fields of equal length."""

    def __init__(self, image_size: tuple[int, int], **fields: Any) -> None:
        vars(self).update(image_size=image_size, fields=fields)

    def __getattr__(self, name: str) -> Any:
        return self.fields[name]

    def has(self, name: str) -> bool:
        return name in self.fields

    def get(self, name: str) -> Any:
        return self.fields[name]

    def set(self, name: str, value: Any) -> None:
        assert all(len(field) == len(value) for field in self.fields.values())
        self.fields[name] = value

    def remove(self, name: str) -> None:
        del self.fields[name]


@framework_class("detectron2")
class ROIAlign(nn.Module):
    """Stand-in for the pooler of one level."""

    def __init__(self, scale: float, output_size: tuple[int, int] = (5, 5), sampling_ratio: int = 0) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = output_size, scale
        self.sampling_ratio, self.aligned = sampling_ratio, True

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        settings = (self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)
        return reference.roi_align(input, rois.to(input.dtype), *settings)


class Pooler(nn.Module):
    """Stand-in for ROIPooler, which pools from a pyramid of levels."""

    def __init__(self, *levels: nn.Module) -> None:
        super().__init__()
        self.level_poolers = nn.ModuleList(levels)
        self.canonical_box_size, self.canonical_level = 60, 4

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        boxes = torch.cat([of_image.tensor for of_image in box_lists])
        image = torch.cat([torch.full((len(b), 1), float(i)) for i, b in enumerate(box_lists)])
        size = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        level = torch.floor(self.canonical_level + torch.log2(size / self.canonical_box_size + 1e-8))
        level = level.clamp(2, 1 + len(x)).to(torch.int64) - 2
        pooled = x[0].new_zeros(len(boxes), x[0].shape[1], 5, 5)
        for i, pooler in enumerate(self.level_poolers):
            [members] = torch.nonzero(level == i, as_tuple=True)
            rois = torch.cat([image, boxes], dim=1)[members]
            pooled = pooled.index_put((members,), pooler(x[i], rois))
        return pooled


def pyramid(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random_features((2, 3, 48 >> i, 64 >> i), i).to(dtype) for i in range(3)]


def box_lists(dtype: torch.dtype = torch.float32) -> list[Boxes]:
    inverted = torch.tensor([[50.0, 20.0, 30.0, 90.0]])  # negative area: it has no level
    first = torch.cat([random_boxes(9, (190, 250), 0), inverted])
    return [Boxes(first.to(dtype)), Boxes(random_boxes(6, (90, 60), 1).to(dtype))]


SCALES = (0.25, 0.125, 0.0625)


def test_pooler() -> None:
    pooler = Pooler(*map(ROIAlign, SCALES))
    forward = replace(FRAMEWORK, "ROIPooler.forward", never)
    features, others = ([x.requires_grad_() for x in pyramid()] for _ in range(2))
    with Calls() as calls:
        got = forward(pooler, features, box_lists())
        got.square().sum().backward()
    assert calls.ops == {"multiscale_roi_align": 1, "multiscale_roi_align_backward": 1}
    expected = pooler(others, box_lists())
    expected.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for feature, other in zip(features, others, strict=True):
        torch.testing.assert_close(feature.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_pooler_falls_back() -> None:
    class RoIPool(ROIAlign):
        pass

    forward = replace(FRAMEWORK, "ROIPooler.forward", return_sentinel)
    pooler, features, boxes = Pooler(*map(ROIAlign, SCALES)), pyramid(), box_lists()
    falls_back(forward, Pooler(*map(RoIPool, SCALES)), features, boxes)
    falls_back(forward, Pooler(*(ROIAlign(s, (5, 5), i) for i, s in enumerate(SCALES))), features, boxes)
    falls_back(forward, Pooler(*(ROIAlign(s, (5, 6)) for s in SCALES)), features, boxes)
    falls_back(forward, pooler, features[:2], boxes)
    falls_back(forward, pooler, features, boxes[:1])
    falls_back(forward, pooler, features, [])
    falls_back(forward, pooler, [level[:0] for level in features], [])
    falls_back(forward, pooler, pyramid(torch.bfloat16), boxes)  # detectron2 rounds boxes first
    falls_back(forward, pooler, features, box_lists(torch.float64))
    falls_back(forward, pooler, features, [Boxes(torch.rand(2, 5)), Boxes(torch.rand(1, 5))])  # rotated
    falls_back(forward, Pooler(ROIAlign(0.25), ROIAlign(0.125), ROIAlign(0.125)), features, boxes)


def test_calls_without_boxes() -> None:
    pooler, features, none = Pooler(*map(ROIAlign, SCALES)), pyramid(), torch.zeros(0, 4)
    forward = replace(FRAMEWORK, "ROIPooler.forward", never)
    assert forward(pooler, features, [Boxes(none), Boxes(none)]).shape == (0, 3, 5, 5)
    forward = replace(FRAMEWORK, "ROIAlign.forward", never)
    for level in (features[0], features[0][:0]):
        assert forward(ROIAlign(0.25), level, torch.zeros(0, 5)).shape == (0, 3, 5, 5)


def test_roi_align() -> None:
    pooler, features, rois = ROIAlign(0.25), pyramid()[0], random_rois(7, 2, (190, 250), 3)
    forward = replace(FRAMEWORK, "ROIAlign.forward", never)
    torch.testing.assert_close(forward(pooler, features, rois), pooler(features, rois), rtol=1e-5, atol=1e-5)
    channels_last = features.contiguous(memory_format=torch.channels_last)
    assert forward(pooler, channels_last, rois).is_contiguous()
    half = features.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # under autocast detectron2 pools in float32
        got = forward(pooler, half, rois)
    expected = pooler(half.float(), rois.bfloat16().float()).bfloat16()
    torch.testing.assert_close(got, expected)

    forward = replace(FRAMEWORK, "ROIAlign.forward", return_sentinel)
    falls_back(forward, pooler, half, rois)
    falls_back(forward, pooler, features, rois[:, :4])
    falls_back(forward, ROIAlign(0.25, (5, 5), 5000), features, rois)


def shifted_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    return reference.nms(boxes + (idxs * (boxes.max() + 1))[:, None], scores, iou_threshold)


@pytest.mark.parametrize("count", [0, 300, 1001])  # above 1000 boxes torchvision runs one NMS per class
def test_nms(count: int) -> None:
    boxes = random_boxes(count, (100, 100), 0).abs()
    scores = (torch.rand(count, generator=generator(1)) * 40).round()
    idxs = torch.randint(0, 3, (count,), generator=generator(2))
    nms = replace(FRAMEWORK, ":nms", never)
    assert torch.equal(nms(boxes, scores, 0.5), reference.nms(boxes, scores, 0.5))
    batched_nms = replace(FRAMEWORK, ":batched_nms", never)
    suppress = shifted_nms if 0 < count < 1000 else reference.batched_nms
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.5), suppress(boxes, scores, idxs, 0.5))


def test_nms_falls_back() -> None:
    boxes, scores, idxs = random_boxes(5, (100, 100), 0), torch.rand(5), torch.zeros(5, dtype=torch.int64)
    nms = replace(FRAMEWORK, ":nms", return_sentinel)
    falls_back(nms, boxes.half(), scores.half(), 0.5)
    falls_back(nms, boxes, scores[:3], 0.5)
    batched_nms = replace(FRAMEWORK, ":batched_nms", return_sentinel)
    falls_back(batched_nms, boxes, scores, idxs.float(), 0.5)
    falls_back(batched_nms, boxes[:, :3], scores, idxs, 0.5)


def test_paste_masks() -> None:
    masks, boxes = random_masks(6, 28, 28, 0), random_boxes(6, (60, 80), 1)
    paste_masks = replace(FRAMEWORK, ":paste_masks_in_image", never)
    for corners in (boxes, Boxes(boxes)):
        assert torch.equal(paste_masks(masks, corners, (60, 80)), paste(masks, boxes, (60, 80)))

    fallback = replace(FRAMEWORK, ":paste_masks_in_image", return_sentinel)
    falls_back(fallback, masks[:0], boxes[:0], (60, 80))  # detectron2 returns uint8
    falls_back(fallback, masks, boxes, (60, 80), 0.4)  # detectron2 crops masks to a window
    falls_back(fallback, masks, boxes, (60, 80), threshold=-1)
    falls_back(fallback, masks.half(), boxes, (60, 80))
    falls_back(fallback, masks[:, :20], boxes, (60, 80))
    falls_back(fallback, masks, boxes[:2], (60, 80))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_semantic_losses(dtype: torch.dtype) -> None:
    head = SimpleNamespace(common_stride=4, ignore_value=255, loss_weight=0.5)
    logits, other = (random_features((2, 5, 6, 7), 0).to(dtype).requires_grad_() for _ in range(2))
    targets = torch.randint(0, 5, (2, 24, 28), generator=generator(1))
    targets[:, :3] = 255
    losses = replace(FRAMEWORK, "SemSegFPNHead.losses", never)(head, logits, targets)
    losses["loss_sem_seg"].backward()
    upsampled = F.interpolate(other.float(), scale_factor=4, mode="bilinear", align_corners=False)
    expected = 0.5 * F.cross_entropy(upsampled, targets, ignore_index=255)
    expected.backward()
    torch.testing.assert_close(losses, {"loss_sem_seg": expected})
    torch.testing.assert_close(logits.grad, other.grad)
    of_void = replace(FRAMEWORK, "SemSegFPNHead.losses", never)(head, logits, torch.full_like(targets, 255))
    assert of_void["loss_sem_seg"].isnan()  # as in detectron2: the mean over no pixels

    fallback = replace(FRAMEWORK, "SemSegFPNHead.losses", return_sentinel)
    falls_back(fallback, head, logits, targets[:, :20])


@framework_class("detectron2")
class SemSegFPNHead(nn.Module):
    """Stand-in that predicts the given logits."""

    common_stride = 4

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def layers(self, features: Any) -> Tensor:
        return self.logits


def sem_seg_postprocess(logits: Tensor, crop: tuple[int, int], height: int, width: int) -> Tensor:
    cropped = logits[None, :, : crop[0], : crop[1]]
    return F.interpolate(cropped, size=(height, width), mode="bilinear", align_corners=False)[0]


def detector_postprocess(instances: Instances, height: int, width: int) -> Instances:
    scale = torch.tensor([width / instances.image_size[1], height / instances.image_size[0]]).repeat(2)
    boxes = (instances.pred_boxes.tensor * scale).clamp(min=0)
    instances.pred_boxes.tensor = torch.minimum(boxes, torch.tensor([width, height] * 2))
    boxes = instances.pred_boxes.tensor
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    processed = Instances((height, width), **{name: v[kept] for name, v in instances.fields.items()})
    processed.fields["pred_masks"] = paste(
        processed.pred_masks[:, 0], processed.pred_boxes.tensor, (height, width)
    )
    return processed


def combine_semantic_and_instance_outputs(
    instances: Instances, labels: Tensor, overlap: float, stuff_area: float, least_score: float
) -> tuple[Tensor, list[dict[str, Any]]]:
    panoptic, segments = torch.zeros_like(labels, dtype=torch.int32), list[dict[str, Any]]()
    for index in torch.argsort(-instances.scores).tolist():
        score, mask = instances.scores[index].item(), instances.pred_masks[index]
        if score < least_score:
            break
        taken = mask & (panoptic > 0)
        if not mask.any() or taken.sum().item() / mask.sum().item() > overlap:
            continue
        panoptic[mask & (panoptic == 0)] = len(segments) + 1
        category = instances.pred_classes[index].item()
        thing = {"id": len(segments) + 1, "isthing": True, "score": score, "category_id": category}
        segments.append({**thing, "instance_id": index})
    for label in torch.unique(labels).tolist():
        free = (labels == label) & (panoptic == 0)
        if label == 0 or free.sum().item() < stuff_area:
            continue
        stuff = {"id": len(segments) + 1, "isthing": False, "category_id": label, "area": free.sum().item()}
        panoptic[free] = len(segments) + 1
        segments.append(stuff)
    return panoptic, segments


def inference(self: Any, inputs: list[dict[str, Any]], do_postprocess: bool = True) -> Any:
    """Original of the replacement, which looks the other functions up in this function's module."""
    return return_sentinel()


def network(count: int = 12, **settings: Any) -> SimpleNamespace:
    boxes = random_boxes(count, (64, 96), 0).clamp(min=0)
    boxes[1::4, 2] = boxes[1::4, 0]  # empty: removed
    scores = (torch.rand(count, generator=generator(1)) * 8).round() / 8  # some are equal
    instances = Instances(
        (60, 90),
        pred_boxes=Boxes(boxes),
        scores=scores,
        pred_classes=torch.arange(count) % 5,
        pred_masks=random_masks(count, 28, 28, 2)[:, None],
    )
    images = SimpleNamespace(tensor=torch.zeros(1, 3, 64, 96), image_sizes=[(60, 90)])
    return SimpleNamespace(
        pixel_mean=torch.zeros(3),
        sem_seg_head=SemSegFPNHead(random_features((1, 4, 16, 24), 3)).eval(),
        preprocess_image=lambda inputs: images,
        backbone=lambda images: {},
        proposal_generator=lambda *args: (None, {}),
        roi_heads=lambda *args: ([instances], {}),
        **{
            "combine_overlap_thresh": 0.5,
            "combine_stuff_area_thresh": 200.5,
            "combine_instances_score_thresh": 0.25,
        }
        | settings,
    )


def plain_inference(self: Any) -> dict[str, Any]:
    """Runs the steps of detectron2's inference."""
    [instances], _ = self.roi_heads()
    upsampled = F.interpolate(self.sem_seg_head.logits, scale_factor=4, mode="bilinear", align_corners=False)
    semantic = sem_seg_postprocess(upsampled[0], (60, 90), 100, 150)
    processed = detector_postprocess(instances, 100, 150)
    thresholds = (
        self.combine_overlap_thresh,
        self.combine_stuff_area_thresh,
        self.combine_instances_score_thresh,
    )
    panoptic = combine_semantic_and_instance_outputs(processed, semantic.argmax(dim=0), *thresholds)
    return {"sem_seg": semantic, "instances": processed, "panoptic_seg": panoptic}


def assert_same_result(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got["sem_seg"], expected["sem_seg"])
    patched, original = got["instances"].fields, expected["instances"].fields
    assert patched.keys() == original.keys()
    assert torch.equal(patched["pred_masks"], original["pred_masks"])
    assert torch.equal(patched["pred_boxes"].tensor, original["pred_boxes"].tensor)
    # In this sample, no pixel has two best classes within a rounding error.
    assert torch.equal(got["panoptic_seg"][0], expected["panoptic_seg"][0])
    assert got["panoptic_seg"][0].dtype == torch.int32
    assert got["panoptic_seg"][1] == expected["panoptic_seg"][1]


@pytest.mark.parametrize("count", [12, 0])
def test_inference(count: int) -> None:
    with Calls() as calls:
        [got] = replace(FRAMEWORK, "PanopticFPN.inference", inference)(
            network(count), [{"height": 100, "width": 150}]
        )
    assert calls.ops == {"upsample_argmax": 1, "panoptic_merge": 1}
    assert_same_result(got, plain_inference(network(count)))


@pytest.mark.parametrize(
    "settings", [{"combine_overlap_thresh": 1.0}, {"combine_stuff_area_thresh": 0}], ids=str
)
def test_inference_uses_detectron2s_merge_where_segments_may_be_empty(settings: dict[str, Any]) -> None:
    with Calls() as calls:
        [got] = replace(FRAMEWORK, "PanopticFPN.inference", inference)(
            network(**settings), [{"height": 100, "width": 150}]
        )
    assert calls.ops == {"upsample_argmax": 1}
    assert_same_result(got, plain_inference(network(**settings)))


def test_inference_falls_back() -> None:
    class Subclass(SemSegFPNHead):
        pass

    forward, inputs = replace(FRAMEWORK, "PanopticFPN.inference", inference), [{"height": 100, "width": 150}]
    falls_back(forward, network(), inputs, do_postprocess=False)
    other = network()
    other.sem_seg_head = Subclass(torch.zeros(1, 4, 16, 24)).eval()
    falls_back(forward, other, inputs)
    hooked = network()
    hooked.sem_seg_head.register_forward_hook(print)
    falls_back(forward, hooked, inputs)


def installed(module: str) -> Any:
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    return importlib.import_module(module)


def installed_network() -> Any:
    """A small Panoptic FPN of detectron2 with random weights that detect a few things."""
    cfg = installed("detectron2.config").get_cfg()
    stages, levels = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5"]
    settings: dict[str, Any] = {
        "DEVICE": "cpu",
        "META_ARCHITECTURE": "PanopticFPN",
        "BACKBONE.NAME": "build_resnet_fpn_backbone",
        "BACKBONE.FREEZE_AT": 0,
        "RESNETS.DEPTH": 18,
        "RESNETS.NORM": "BN",
        "RESNETS.RES2_OUT_CHANNELS": 64,
        "RESNETS.OUT_FEATURES": stages,
        "FPN.IN_FEATURES": stages,
        "FPN.OUT_CHANNELS": 32,
        "ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "RPN.IN_FEATURES": [*levels, "p6"],
        **dict.fromkeys(("RPN.PRE_NMS_TOPK_TRAIN", "RPN.PRE_NMS_TOPK_TEST"), 200),
        **dict.fromkeys(("RPN.POST_NMS_TOPK_TRAIN", "RPN.POST_NMS_TOPK_TEST"), 100),
        "ROI_HEADS.NAME": "StandardROIHeads",
        "ROI_HEADS.IN_FEATURES": levels,
        "ROI_HEADS.NUM_CLASSES": 5,
        "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "ROI_BOX_HEAD.NUM_FC": 1,
        "ROI_BOX_HEAD.FC_DIM": 32,
        "ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MASK_ON": True,
        "ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "ROI_MASK_HEAD.NUM_CONV": 1,
        "ROI_MASK_HEAD.CONV_DIM": 16,
        "SEM_SEG_HEAD.NUM_CLASSES": 6,
        "SEM_SEG_HEAD.CONVS_DIM": 32,
        "PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": 200,
        "PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": 0.2,
    }
    cfg.merge_from_list([part for key, value in settings.items() for part in (f"MODEL.{key}", value)])
    torch.manual_seed(0)
    model = installed("detectron2.modeling").build_model(cfg).eval()
    deviations = {
        "roi_heads.box_predictor.cls_score": 0.02,
        "roi_heads.box_predictor.bbox_pred": 0.002,
        "roi_heads.mask_head.predictor": 1.0,
        "sem_seg_head.predictor": 0.3,
        "proposal_generator.rpn_head.objectness_logits": 0.3,
        "proposal_generator.rpn_head.anchor_deltas": 0.03,
    }
    for name, deviation in deviations.items():
        nn.init.normal_(model.get_submodule(name).weight, std=deviation)
    nn.init.constant_(model.roi_heads.box_predictor.cls_score.bias[-1:], -100.0)  # no box is background
    return model


def random_image(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=generator(7), dtype=torch.uint8)


def assert_same_results(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for patched, original in zip(got, expected, strict=True):
        assert patched.keys() == original.keys()
        assert torch.equal(patched["sem_seg"], original["sem_seg"])
        a, b = patched["instances"], original["instances"]
        assert len(a) == len(b) > 0
        assert a.get_fields().keys() == b.get_fields().keys()
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
        # Our ROIAlign sums in a different order, so single pixels may fall on the other side of a threshold.
        assert (a.pred_masks != b.pred_masks).float().mean() < 1e-4
        assert (patched["panoptic_seg"][0] != original["panoptic_seg"][0]).float().mean() < 1e-3
        for a, b in zip(patched["panoptic_seg"][1], original["panoptic_seg"][1], strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"score", "area"}:
                assert (key, a[key], type(a[key])) == (key, b[key], type(b[key]))


@torch.no_grad()
def test_installed_network() -> None:
    model = installed_network()
    inputs = [{"image": random_image(96, 128), "height": 150, "width": 200}, {"image": random_image(90, 120)}]
    same(
        "detectron2",
        lambda: model(inputs),
        *("nms", "multiscale_roi_align", "paste_masks", "upsample_argmax", "panoptic_merge"),
        agree=assert_same_results,
    )


def test_installed_training() -> None:
    structures, model = installed("detectron2.structures"), installed_network().train()
    events = installed("detectron2.utils.events")
    semantic = torch.randint(0, 6, (96, 128), generator=generator(1))
    semantic[:10] = 255
    masks = torch.zeros(2, 96, 128, dtype=torch.bool)
    masks[0, 12:48, 12:58] = masks[1, 35:90, 60:115] = True

    def step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        model.zero_grad()
        instances = structures.Instances((96, 128))
        instances.gt_boxes = structures.Boxes(torch.tensor([[10.0, 10, 60, 50], [50.0, 30, 120, 90]]))
        instances.gt_classes = torch.tensor([1, 3])
        instances.gt_masks = structures.BitMasks(masks)
        losses = model([{"image": random_image(96, 128), "instances": instances, "sem_seg": semantic}])
        sum(losses.values()).backward()
        return {name: loss.detach() for name, loss in losses.items()}, gradients(model)

    with events.EventStorage():
        same(
            "detectron2",
            step,
            *("nms", "multiscale_roi_align", "multiscale_roi_align_backward", "roi_align"),
            *("upsample_cross_entropy", "upsample_cross_entropy_backward"),
            agree=same_step,
        )


def test_installed_functions() -> None:
    layers, poolers = installed("detectron2.layers"), installed("detectron2.modeling.poolers")
    structures = installed("detectron2.structures")
    boxes, scores = random_boxes(1500, (190, 250), 0).abs(), torch.rand(1500, generator=generator(1))
    idxs = torch.randint(0, 4, (1500,), generator=generator(2))

    def suppress(count: int) -> Any:
        return layers.batched_nms(boxes[:count], scores[:count], idxs[:count], 0.5)

    same("detectron2", partial(suppress, 900), "nms")
    same("detectron2", partial(suppress, 1500), "batched_nms")

    pooler = poolers.ROIPooler(7, SCALES, 0, "ROIAlignV2", canonical_box_size=60)
    lists = [structures.Boxes(of_image.tensor) for of_image in box_lists()]
    same(
        "detectron2",
        lambda: pooler(pyramid(), lists),
        "multiscale_roi_align",
        agree=lambda got, expected: torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same("detectron2", lambda: pooler(pyramid(torch.bfloat16), lists), "roi_align")

    masks, size = random_masks(6, 28, 28, 0), (60, 80)
    inside = torch.cat([torch.rand(6, 2) * 20, 30 + torch.rand(6, 2) * 30], dim=1)

    def paste_masks(count: int, threshold: float) -> Any:
        return layers.paste_masks_in_image(masks[:count], inside[:count], size, threshold)

    same("detectron2", partial(paste_masks, 6, 0.5), "paste_masks")
    for count, threshold in ((6, 0.3), (6, -1.0), (0, 0.5)):
        same("detectron2", partial(paste_masks, count, threshold))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_installed_functions() -> None:
    structures = installed("detectron2.structures")
    masks, boxes = random_masks(3, 28, 28, 0), torch.tensor([[1.0, 1, 20, 20]] * 3)

    def bitmasks(masks: Tensor, boxes: Tensor) -> Tensor:
        roi_masks = structures.ROIMasks(masks)
        pasted: Tensor = roi_masks.to_bitmasks(
            structures.Boxes(boxes), torch.tensor(40), torch.tensor(50)
        ).tensor
        return pasted

    expected = torch.jit.trace(bitmasks, (masks, boxes))(masks, boxes)
    with patch("detectron2"):
        traced = torch.jit.trace(bitmasks, (masks, boxes))
    assert torch.equal(traced(masks, boxes), expected)
