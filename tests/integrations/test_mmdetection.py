"""Compares the replacements with stand-ins for mmdetection's functions, and with mmdetection and mmcv if installed."""

from __future__ import annotations

import functools
import importlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.integrations.mmdetection import FRAMEWORK
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
    sentinel,
)

# The stand-ins behave as mmdetection's functions do. The replacement for the fusion head's function looks these two
# names up in the module of the original, which in these tests is this module.
INSTANCE_OFFSET = 1000
PixelData = SimpleNamespace


def mmcv_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float = 0, max_num: int = -1
) -> tuple[Tensor, Tensor]:
    order = scores.sort(0, descending=True)[1]
    if score_threshold > 0:
        order = order[scores[order] > score_threshold]
    threshold = float(np.float32(iou_threshold))
    kept = order[reference.nms(boxes[order], scores[order], threshold)]
    kept = kept[:max_num] if max_num > 0 else kept
    return torch.cat([boxes[kept], scores[kept, None]], dim=1), kept


@pytest.mark.parametrize(
    "settings",
    [
        {"iou_threshold": 0.3},
        {"iou_threshold": 0.3, "score_threshold": 0.2, "max_num": 5},
        {"iou_threshold": 0.5, "offset": 0},
    ],
    ids=str,
)
def test_nms(settings: dict[str, Any]) -> None:
    nms = replace(FRAMEWORK, ":nms", never)
    boxes, scores = random_boxes(90, (60, 60), 0).round(), torch.rand(90, generator=generator(1))
    expected = mmcv_nms(boxes, scores, **{k: v for k, v in settings.items() if k != "offset"})
    torch.testing.assert_close(nms(boxes, scores, **settings), expected, rtol=0, atol=0)
    # The IoU is 30 of 100 pixels. It equals the float32 nearest to 0.3, which mmcv compares with, so both boxes stay.
    pair, order = torch.tensor([[0.0, 0, 10, 6.5], [0.0, 3.5, 10, 10]]), torch.tensor([0.9, 0.8])
    assert len(nms(pair, order, 0.3)[1]) == 2
    assert len(nms(boxes[:0], scores[:0], 0.5)[1]) == 0


def test_nms_falls_back() -> None:
    nms = replace(FRAMEWORK, ":nms", lambda *args, **kwargs: (sentinel, args))
    boxes, scores = random_boxes(9, (60, 60), 0), torch.rand(9)
    for args in (
        (boxes.numpy(), scores.numpy(), 0.5),
        (boxes, scores, 0.5, 1),  # boxes that include their last pixel
        (boxes, scores),
        (boxes.double(), scores.double(), 0.5),
        (boxes, scores[:3], 0.5),
    ):
        assert nms(*args) == (sentinel, args)
    assert nms(boxes, scores, iou_thr=0.5) == (sentinel, (boxes, scores))  # mmcv translates this old name


@framework_class("mmcv")
class RoIAlign(nn.Module):
    """Stand-in for the RoIAlign of one level."""

    def __init__(self, scale: float, pool_mode: str = "avg", output_size: tuple[int, int] = (5, 5)) -> None:
        super().__init__()
        self.output_size, self.spatial_scale, self.pool_mode = output_size, scale, pool_mode
        self.sampling_ratio, self.aligned = 0, True

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        return reference.roi_align(input, rois, self.output_size, self.spatial_scale, 0, True)


@framework_class("mmdet")
class SingleRoIExtractor(nn.Module):
    """Stand-in that pools from a pyramid of levels."""

    def __init__(self, *layers: nn.Module, finest_scale: int = 20) -> None:
        super().__init__()
        self.roi_layers = nn.ModuleList(layers)
        self.out_channels, self.finest_scale = 3, finest_scale

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor) -> Tensor:
        scale = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
        level = torch.floor(torch.log2(scale / self.finest_scale + 1e-6)).clamp(0, len(feats) - 1).long()
        pooled = feats[0].new_zeros(len(rois), 3, 5, 5)
        for i, feat in enumerate(feats):
            [members] = torch.nonzero(level == i, as_tuple=True)
            pooled = pooled.index_put((members,), self.roi_layers[i](feat, rois[members]))
        return pooled


SCALES = (0.25, 0.125, 0.0625)


def pyramid(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(random_features((2, 3, 48 >> i, 64 >> i), i).to(dtype) for i in range(3))


def rois() -> Tensor:
    # Some are squares at the borders between levels (20, 40 and 80 pixels), where the epsilon decides.
    borders = torch.tensor([[1, 3, 4, 3 + side, 4 + side] for side in (20.0, 40.0, 39.9999, 80.0)])
    inverted = torch.tensor([[0, 50.0, 20.0, 30.0, 90.0]])  # negative area: it has no level
    return torch.cat([random_rois(12, 2, (190, 250), 0), borders, inverted])


def test_extractor() -> None:
    extractor = SingleRoIExtractor(*map(RoIAlign, SCALES))
    forward = replace(FRAMEWORK, "SingleRoIExtractor.forward", never)
    feats, others = (tuple(x.requires_grad_() for x in pyramid()) for _ in range(2))
    with Calls() as calls:
        got = forward(extractor, feats, rois())
        got.square().sum().backward()
    assert calls.ops == {"multiscale_roi_align": 1, "multiscale_roi_align_backward": 1}
    expected = extractor(others, rois())
    expected.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for feat, other in zip(feats, others, strict=True):
        torch.testing.assert_close(feat.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(  # the finest level alone
        forward(extractor, feats[:1], rois()[:-1]), extractor(feats[:1], rois()[:-1]), rtol=1e-5, atol=1e-5
    )


def test_extractor_falls_back() -> None:
    class Subclass(SingleRoIExtractor):
        pass

    forward = replace(FRAMEWORK, "SingleRoIExtractor.forward", return_sentinel)
    layers = [RoIAlign(scale) for scale in SCALES]
    extractor = SingleRoIExtractor(*layers)
    falls_back(forward, Subclass(*layers), pyramid(), rois())
    falls_back(forward, SingleRoIExtractor(*(RoIAlign(s, "max") for s in SCALES)), pyramid(), rois())
    falls_back(forward, SingleRoIExtractor(*(RoIAlign(1 / s) for s in (6, 12, 24))), pyramid(), rois())
    falls_back(forward, extractor, pyramid(), rois(), 1.5)
    falls_back(forward, extractor, pyramid(torch.float16), rois())  # mmdetection rounds boxes first
    falls_back(forward, extractor, pyramid(), rois()[:, :4])


def test_roi_align() -> None:
    roi_align = replace(FRAMEWORK, ":roi_align", never)
    features = pyramid()[0]
    got = roi_align(features, rois(), (5, 5), 0.25, 0, "avg", True)
    torch.testing.assert_close(got, RoIAlign(0.25)(features, rois()), rtol=1e-5, atol=1e-5)

    roi_align = replace(FRAMEWORK, ":roi_align", return_sentinel)
    falls_back(roi_align, features, rois(), (5, 5), 0.25, 0, "max", True)
    falls_back(
        roi_align, features.half(), rois().half(), (5, 5), 0.25
    )  # mmcv computes positions in half precision
    falls_back(roi_align, features, rois().double(), (5, 5), 0.25)


META = {"scale_factor": (0.6, 0.6), "ori_shape": (100, 150)}
META |= {"img_shape": (60, 90), "batch_input_shape": (64, 96)}
CONFIG = SimpleNamespace(mask_thr_binary=0.5)


def predicted(count: int = 7, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mask logits, boxes in pixels of the network's input, and labels."""
    logits = torch.logit(random_masks(count * classes, 28, 28, 0)).reshape(count, classes, 28, 28)
    return logits, random_boxes(count, (60, 90), 1), torch.arange(count) % classes


@pytest.mark.parametrize("rescale", [True, False])
def test_masks(rescale: bool) -> None:
    predict = replace(FRAMEWORK, "FCNMaskHead._predict_by_feat_single", never)
    head, (logits, boxes, labels) = SimpleNamespace(class_agnostic=False), predicted()
    size = (100, 150) if rescale else (60, 90)
    scaled = boxes / torch.tensor([0.6] * 4) if rescale else boxes.clone()
    got = predict(head, logits, boxes, labels, META, CONFIG, rescale)
    assert torch.equal(boxes, scaled)  # modified in place
    chosen = logits.sigmoid()[range(7), labels]
    assert torch.equal(got, paste(chosen, scaled, size))
    agnostic = SimpleNamespace(class_agnostic=True)
    got = predict(agnostic, logits[:, :1], boxes, labels, META, CONFIG)
    assert torch.equal(got, paste(logits[:, 0].sigmoid(), boxes, (60, 90)))


def test_masks_fall_back() -> None:
    predict = replace(FRAMEWORK, "FCNMaskHead._predict_by_feat_single", return_sentinel)
    head, (logits, boxes, labels) = SimpleNamespace(class_agnostic=False), predicted()
    before = boxes.clone()
    falls_back(predict, head, logits, boxes, labels, META, SimpleNamespace(mask_thr_binary=0.3), True)
    falls_back(predict, head, logits, boxes, labels, META, SimpleNamespace(mask_thr_binary=-1), True)
    falls_back(predict, head, logits, boxes, labels, META, CONFIG, True, True)
    falls_back(predict, head, logits, boxes.double(), labels, META, CONFIG, True)
    assert torch.equal(boxes, before)
    boxes[2, 2] = boxes[2, 0]  # mmdetection paints a stripe for it
    falls_back(predict, head, logits, boxes, labels, META, CONFIG, True)


@framework_class("mmdet")
class CrossEntropyLoss:
    """Stand-in for mmdetection's loss."""

    def __init__(self, **settings: Any) -> None:
        defaults = {"use_sigmoid": False, "use_mask": False, "reduction": "mean", "class_weight": None}
        vars(self).update(defaults, ignore_index=255, loss_weight=0.5, avg_non_ignore=False)
        vars(self).update(settings)

    def __call__(self: Any, predictions: Tensor, targets: Tensor) -> Any:
        weight = None if self.class_weight is None else predictions.new_tensor(self.class_weight)
        ignored = -100 if self.ignore_index is None else self.ignore_index
        losses = F.cross_entropy(predictions, targets, weight, reduction="none", ignore_index=ignored)
        count = len(targets) - int((targets == ignored).sum()) if self.avg_non_ignore else len(targets)
        return self.loss_weight * losses.sum() / count


class SemanticHead:
    """Stand-in with two things and four stuff classes that predicts the given logits and counts its runs."""

    num_classes = 5

    def __init__(self, logits: Tensor, loss: Any, seg_rescale_factor: float = 0.25) -> None:
        self.logits, self.loss_seg, self.seg_rescale_factor, self.runs = logits, loss, seg_rescale_factor, 0

    def __call__(self, x: Any) -> dict[str, Tensor]:
        self.runs += 1
        return {"seg_preds": self.logits}

    forward = __call__

    def _set_things_to_void(self, targets: Tensor) -> Tensor:
        targets = targets.int()
        stuff = torch.where((targets >= 2) & (targets < 6), targets - 2, targets)
        return torch.where(targets < 2, 4, stuff)


def semantic_loss(self: Any, x: Any, samples: list[Any]) -> dict[str, Tensor]:
    predictions = self(x)["seg_preds"]
    targets = torch.stack([sample.gt_sem_seg.sem_seg for sample in samples])
    if self.seg_rescale_factor != 1:
        targets = F.interpolate(targets.float(), scale_factor=self.seg_rescale_factor, mode="nearest")
    targets = self._set_things_to_void(targets.squeeze(1))
    if predictions.shape[2:] != targets.shape[1:]:
        predictions = F.interpolate(predictions, targets.shape[1:], mode="bilinear", align_corners=False)
    flat = predictions.permute(0, 2, 3, 1).reshape(-1, self.num_classes)
    return {"loss_seg": self.loss_seg(flat, targets.reshape(-1).long())}


def targets() -> list[Any]:
    maps = torch.randint(0, 6, (2, 1, 24, 32), generator=generator(1))
    maps[:, :, :5] = 255
    return [SimpleNamespace(gt_sem_seg=SimpleNamespace(sem_seg=of_image)) for of_image in maps]


@pytest.mark.parametrize(
    "settings", [{}, {"avg_non_ignore": True}, {"class_weight": [1, 2, 0.5, 1, 3]}], ids=str
)
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
def test_semantic_loss(settings: dict[str, Any], factor: float) -> None:
    logits, other = (random_features((2, 5, 6, 8), 0).requires_grad_() for _ in range(2))
    loss = CrossEntropyLoss(**settings)
    replacement = replace(FRAMEWORK, "PanopticFPNHead.loss", never)
    with Calls() as calls:
        got = replacement(SemanticHead(logits, loss, factor), None, targets())
        got["loss_seg"].backward()
    assert calls.ops == {"upsample_cross_entropy": 1, "upsample_cross_entropy_backward": 1}
    expected = semantic_loss(SemanticHead(other, loss, factor), None, targets())
    expected["loss_seg"].backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(logits.grad, other.grad)


def test_semantic_loss_falls_back_without_a_second_run() -> None:
    class Subclass(CrossEntropyLoss):
        pass

    logits = random_features((2, 5, 6, 8), 0)
    fallback = replace(FRAMEWORK, "PanopticFPNHead.loss", semantic_loss)
    for head in (
        SemanticHead(logits, Subclass()),
        SemanticHead(logits[:, :, :5, :7], CrossEntropyLoss(), 0.5),
        SemanticHead(logits.double(), CrossEntropyLoss()),
    ):
        with Calls() as calls:
            got = fallback(head, None, targets())
        assert (calls.ops, head.runs) == ({}, 1)
        assert torch.equal(got["loss_seg"], semantic_loss(head, None, targets())["loss_seg"])


@framework_class("mmdet")
class PanopticFPN:
    """Stand-in for a Panoptic FPN whose parts are stand-ins too."""

    def __init__(self, **changes: Any) -> None:
        self.logits, self.boxes, self.labels = predicted(8, 2)
        self.scores = (torch.rand(8, generator=generator(2)) * 4).round() / 4  # some are equal
        self.rescale = True
        self.semantic_logits = random_features((1, 5, 16, 24), 3)
        self.mask_head = framework_class("mmdet")(type("FCNMaskHead", (), {"class_agnostic": False}))()
        vars(self).update(changes)

    @property
    def roi_head(self) -> Any:
        return self._part("StandardRoIHead", mask_head=self.mask_head)

    @property
    def semantic_head(self) -> Any:
        return self._part("PanopticFPNHead", forward=lambda x: {"seg_preds": self.semantic_logits})

    @property
    def panoptic_fusion_head(self) -> Any:
        fusion = self._part("HeuristicFusionHead", num_things_classes=2, num_stuff_classes=4, num_classes=6)
        fusion.test_cfg = SimpleNamespace(mask_overlap=0.5, stuff_area_limit=300.5)
        type(fusion)._predict_single = fuse_replacement
        return fusion

    def _part(self, name: str, **attributes: Any) -> Any:
        part = framework_class("mmdet")(type(name, (), {}))()
        vars(part).update(attributes)
        return part


def mask_original(
    self: Any, logits: Tensor, boxes: Tensor, labels: Tensor, meta: Any, config: Any, *settings: Any
) -> Tensor:
    boxes /= boxes.new_tensor(META["scale_factor"]).repeat(2)
    return paste(logits.sigmoid()[range(len(labels)), labels], boxes, (100, 150))


def semantic_original(self: Any, x: Any, metas: Any, rescale: bool) -> list[Tensor]:
    upsampled = F.interpolate(self.forward(x)["seg_preds"], (64, 96), mode="bilinear", align_corners=False)
    cropped = upsampled[:, :, :60, :90]
    return list(F.interpolate(cropped, (100, 150), mode="bilinear", align_corners=False))


def fuse_original(self: Any, results: Any, logits: Tensor) -> Any:
    """Runs the steps of HeuristicFusionHead."""
    taken, labels = torch.zeros(100, 150, dtype=torch.long), []
    for i in torch.argsort(-results.scores).tolist():
        mask = results.masks[i]
        area = mask.sum()
        if area == 0 or (mask & (taken > 0)).sum() / (area + 1e-5) > self.test_cfg.mask_overlap:
            continue
        labels.append(results.labels[i])
        taken = torch.where(mask & (taken == 0), len(labels), taken)
    fused, instance = logits.argmax(dim=0) + self.num_things_classes, 1
    for i, label in enumerate(labels):
        if (taken == i + 1).any():
            fused[taken == i + 1] = label + instance * INSTANCE_OFFSET
            instance += 1
    for label, count in zip(*torch.unique(fused % INSTANCE_OFFSET, return_counts=True), strict=True):
        if label >= self.num_things_classes and count < self.test_cfg.stuff_area_limit:
            fused[fused == label] = self.num_classes
    return PixelData(sem_seg=fused[None].int())


mask_replacement = replace(FRAMEWORK, "FCNMaskHead._predict_by_feat_single", mask_original)
semantic_replacement = replace(FRAMEWORK, "BaseSemanticHead.predict", semantic_original)
fuse_replacement = replace(FRAMEWORK, "HeuristicFusionHead._predict_single", fuse_original)


def predict_with(masks: Any, semantic: Any, fuse: Any, network: Any) -> tuple[Tensor, Any]:
    """Runs the steps of the network's `predict`; returns the map and the masks passed to the fusion head."""
    boxes = network.boxes.clone()
    results = SimpleNamespace(bboxes=boxes, labels=network.labels, scores=network.scores)
    results.masks = torch.zeros(0, 100, 150, dtype=torch.bool)
    if len(boxes) > 0:
        arguments = (network.logits, boxes, network.labels, META, CONFIG, True)
        results.masks = masks(network.mask_head, *arguments)
    given = results.masks
    [logits] = semantic(network.semantic_head, None, [META], True)
    return fuse(network.panoptic_fusion_head, results, logits).sem_seg, given


def panoptic(network: Any, batch_inputs: Tensor, samples: Any, rescale: bool = True) -> Any:
    return predict_with(mask_replacement, semantic_replacement, fuse_replacement, network)


def run(network: Any) -> tuple[Tensor, Any, Calls]:
    predict = replace(FRAMEWORK, "TwoStagePanopticSegmentor.predict", panoptic)
    with Calls() as calls:
        fused, masks = predict(network, torch.zeros(1, 3, 64, 96), [])
    return fused, masks, calls


def expected_map(network: Any) -> Tensor:
    return predict_with(mask_original, semantic_original, fuse_original, network)[0]


def test_panoptic_map() -> None:
    fused, masks, calls = run(PanopticFPN())
    assert calls.ops == {"upsample_argmax": 1, "panoptic_merge": 1}
    assert not isinstance(masks, Tensor)
    expected = expected_map(PanopticFPN())
    assert fused.dtype == expected.dtype == torch.int32
    assert len(expected.unique()) > 5
    assert torch.equal(fused, expected)


def test_panoptic_map_without_instances() -> None:
    logits, boxes, labels = predicted(0, 2)
    network = partial(PanopticFPN, logits=logits, boxes=boxes, labels=labels, scores=torch.zeros(0))
    fused, _, calls = run(network())
    assert calls.ops == {"upsample_argmax": 1, "panoptic_merge": 1}
    assert torch.equal(fused, expected_map(network()))


def test_panoptic_map_where_ops_do_not_support_the_inputs() -> None:
    stripe = predicted(8, 2)[1]
    stripe[3, 3] = stripe[3, 1]
    for changes, ops in (
        ({"boxes": stripe}, set()),  # masks are pasted, so logits are upsampled
        ({"semantic_logits": random_features((1, 5, 16, 24), 3).double()}, {"paste_masks"}),
        ({"semantic_logits": random_features((1, 7, 16, 24), 3)}, {"paste_masks"}),
        ({"semantic_logits": random_features((1, 5, 15, 24), 3)}, {"paste_masks"}),
    ):
        fused, _, calls = run(PanopticFPN(**changes))
        assert set(calls.ops) == ops
        assert torch.equal(fused, expected_map(PanopticFPN(**changes)))


def test_a_subclass_of_the_network_defers_nothing() -> None:
    class Subclass(PanopticFPN):
        pass

    network = Subclass()
    predict = replace(FRAMEWORK, "TwoStagePanopticSegmentor.predict", panoptic)
    with Calls() as calls:
        fused, masks = predict(network, torch.zeros(1, 3, 64, 96), [])
    assert calls.ops == {"paste_masks": 1}
    assert isinstance(masks, Tensor)
    assert torch.equal(fused, expected_map(PanopticFPN()))


def installed(module: str) -> Any:
    pytest.importorskip("mmdet", reason="mmdetection is not installed")
    return importlib.import_module(module)


def installed_network() -> Any:
    """A small Panoptic FPN of mmdetection with random weights that detect a few things."""
    mmdet = installed("mmdet")
    installed("mmdet.utils").register_all_modules()
    config = Path(mmdet.__file__).parent / ".mim/configs/panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py"
    model = installed("mmengine").Config.fromfile(config).model
    changes = {
        "backbone": {"depth": 18, "init_cfg": None},
        "neck": {"in_channels": [64, 128, 256, 512], "out_channels": 32},
        "rpn_head": {"in_channels": 32, "feat_channels": 32},
        "semantic_head": {"in_channels": 32, "inner_channels": 32},
        "roi_head.bbox_roi_extractor": {"out_channels": 32},
        "roi_head.mask_roi_extractor": {"out_channels": 32},
        "roi_head.bbox_head": {"in_channels": 32, "fc_out_channels": 64},
        "roi_head.mask_head": {"in_channels": 32, "conv_out_channels": 16, "num_convs": 1},
        "test_cfg.rpn": {"nms_pre": 200, "max_per_img": 100},
        "test_cfg.rcnn": {"score_thr": 0.3},
        "test_cfg.panoptic": {"stuff_area_limit": 200},
        "train_cfg.rpn_proposal": {"nms_pre": 200, "max_per_img": 100},
    }
    for path, change in changes.items():
        functools.reduce(getattr, path.split("."), model).update(change)
    torch.manual_seed(0)
    network = installed("mmdet.registry").MODELS.build(model).eval()
    for name, deviation in {
        "roi_head.bbox_head.fc_cls": 1.0,
        "roi_head.bbox_head.fc_reg": 0.3,
        "roi_head.mask_head.conv_logits": 1.0,
        "semantic_head.conv_logits": 0.3,
        "rpn_head.rpn_cls": 0.3,
        "rpn_head.rpn_reg": 0.3,
    }.items():
        nn.init.normal_(network.get_submodule(name).weight, std=deviation)
    return network


def data_samples(training: bool) -> list[Any]:
    structures, data = installed("mmdet.structures"), installed("mmengine.structures")
    masks_of = installed("mmdet.structures.mask").BitmapMasks
    samples = []
    for image, (height, width) in enumerate([(96, 128), (90, 120)]):
        meta: dict[str, Any] = {"img_shape": (height, width), "ori_shape": (144, 200)}
        meta |= {"scale_factor": (width / 200, height / 144)}
        meta |= dict.fromkeys(("batch_input_shape", "pad_shape"), (96, 128))
        sample = structures.DetDataSample(metainfo=meta)
        if training:
            masks = np.zeros((2, 96, 128), np.uint8)
            masks[0, 12:48, 12:58] = masks[1, 35:84, 60:112] = 1
            sample.gt_instances = data.InstanceData(
                bboxes=torch.tensor([[10.0, 10, 60, 50], [50.0, 30, 115, 85]]),
                labels=torch.tensor([1, 3]),
                masks=masks_of(masks, 96, 128),
            )
            semantic = torch.randint(0, 133, (1, 96, 128), generator=generator(image))
            semantic[:, :10] = 255
            sample.gt_sem_seg = data.PixelData(sem_seg=semantic)
        samples.append(sample)
    return samples


@torch.no_grad()
def test_installed_network() -> None:
    network, images = installed_network(), random_features((2, 3, 96, 128), 0)

    def predict() -> list[Tensor]:
        results = network(images, data_samples(training=False), mode="predict")
        return [sample.pred_panoptic_seg.sem_seg for sample in results]

    def agree(got: list[Tensor], expected: list[Tensor]) -> None:
        for patched, original in zip(got, expected, strict=True):
            assert (patched.dtype, patched.shape) == (original.dtype, original.shape)
            assert original.max() > 2 * INSTANCE_OFFSET
            # Our RoIAlign sums in a different order, so single pixels may fall on the other side of a threshold.
            assert (patched != original).float().mean() < 1e-3

    served = ("nms", "multiscale_roi_align", "upsample_argmax", "panoptic_merge")
    same("mmdetection", predict, *served, agree=agree)


@torch.no_grad()
def test_installed_instances() -> None:
    network, images = installed_network(), random_features((2, 3, 96, 128), 0)

    def predict() -> list[Any]:
        features, samples = network.extract_feat(images), data_samples(training=False)
        proposals = network.rpn_head.predict(features, samples, rescale=False)
        return list(network.roi_head.predict(features, proposals, samples, rescale=True))

    def agree(got: list[Any], expected: list[Any]) -> None:
        for patched, original in zip(got, expected, strict=True):
            assert patched.masks.shape == original.masks.shape
            assert patched.masks.dtype == original.masks.dtype
            assert torch.equal(patched.labels, original.labels)
            torch.testing.assert_close(patched.bboxes, original.bboxes, rtol=1e-4, atol=1e-3)
            assert (patched.masks != original.masks).float().mean() < 1e-4

    same("mmdetection", predict, "nms", "multiscale_roi_align", "paste_masks", agree=agree)


def test_installed_training() -> None:
    network, images = installed_network().train(), random_features((2, 3, 96, 128), 0)

    def step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        network.zero_grad()
        total, losses = network.parse_losses(network(images, data_samples(training=True), mode="loss"))
        total.backward()
        return dict(losses), gradients(network)

    same(
        "mmdetection",
        step,
        *("nms", "multiscale_roi_align", "multiscale_roi_align_backward", "roi_align"),
        *("upsample_cross_entropy", "upsample_cross_entropy_backward"),
        agree=same_step,
    )


@pytest.mark.parametrize("count", [1, 60, 900])
def test_installed_nms(count: int) -> None:
    mmcv = installed("mmcv.ops")
    boxes = random_boxes(count, (200, 200), 0).abs().round()
    scores = (torch.rand(count, generator=generator(1)) * 50).round() / 50  # some are equal
    idxs = torch.randint(0, 4, (count,), generator=generator(2))
    same("mmdetection", lambda: mmcv.nms(boxes, scores, 0.3), "nms")
    same("mmdetection", lambda: mmcv.nms(boxes, scores, 0.6, score_threshold=0.2, max_num=10), "nms")
    configs: list[dict[str, Any]] = [
        {},
        {"split_thr": 50, "max_num": 30},
        {"split_thr": 50, "class_agnostic": True},
    ]
    for config in configs:
        config = {"type": "nms", "iou_threshold": 0.5, **config}
        same(
            "mmdetection",
            partial(lambda config: mmcv.batched_nms(boxes, scores, idxs, config), config),
            "nms",
        )
    same("mmdetection", lambda: mmcv.nms(boxes, scores, 0.5, 1))
