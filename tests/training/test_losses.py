"""Compares each loss of Mask R-CNN and of the semantic branch with its formula in NumPy, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.data.sample import Target
from panfpn_fast.models import PanopticFPN
from panfpn_fast.training import losses
from panfpn_fast.training.matching import random_keys
from panfpn_fast.training.network import INSTANCE_LOSSES, TrainingNetwork, predict_masks, total
from panfpn_fast.training.targets import (
    SampledBoxes,
    mask_targets,
    propose,
    sample_boxes,
    semantic_labels,
)
from support.training_samples import make_batch, make_sample, small_model

Array = npt.NDArray[Any]
THINGS = 3
# The scenes need little padding. Anchors on padding have exactly equal scores, so their order would be arbitrary.
SCENES = {
    "instances": [make_sample(60, 91, 1), make_sample(64, 88, 2, things=5)],
    "one image without instances": [make_sample(60, 91, 1), make_sample(57, 96, 2, things=0)],
    "no instances": [make_sample(60, 91, 1, things=0), make_sample(64, 88, 2, things=0)],
    "crowds alone": [make_sample(60, 91, 1, crowd=True)],
    "void alone": [make_sample(60, 91, 1, void=True)],
    "one image of void": [make_sample(60, 91, 1, void=True), make_sample(64, 88, 2)],
}


# The definitions of the losses. They process one box or pixel at a time where this is fast enough.


def iou(boxes: Array, others: Array) -> Array:
    table = np.zeros((len(boxes), len(others)))
    for j, (x1, y1, x2, y2) in enumerate(others):
        width = np.minimum(boxes[:, 2], x2) - np.maximum(boxes[:, 0], x1)
        height = np.minimum(boxes[:, 3], y2) - np.maximum(boxes[:, 1], y1)
        shared = np.where((width > 0) & (height > 0), width * height, 0)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        table[:, j] = shared / (areas + (x2 - x1) * (y2 - y1) - shared)
    return table


def deltas_to(targets: Array, boxes: Array, weights: Sequence[float]) -> Array:
    size, target_size = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    centre, target_centre = (boxes[:, :2] + boxes[:, 2:]) / 2, (targets[:, :2] + targets[:, 2:]) / 2
    return np.hstack([(target_centre - centre) / size, np.log(target_size / size)]) * np.array(weights)


def moved(boxes: Array, deltas: Array) -> Array:
    size, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2
    centre = centre + deltas[:, :2] * size
    half = np.exp(np.minimum(deltas[:, 2:], math.log(1000 / 16))) * size / 2
    return np.hstack([centre - half, centre + half])


def draw(label: Array, count: int, most_positive: int, seed: int) -> tuple[Array, Array]:
    """Samples rows of objects and rows of background: those with the highest random keys."""
    key = random_keys(len(label), seed, torch.device("cpu")).numpy()
    positive, negative = (sorted(np.flatnonzero(label == kind), key=lambda row: -key[row]) for kind in (1, 0))
    positive = positive[:most_positive]
    return np.array(positive, int), np.array(negative[: count - len(positive)], int)


def sigmoid_cross_entropy(logits: Array, truth: Array) -> float:
    return float((np.log1p(np.exp(-np.abs(logits))) + np.maximum(logits, 0) - logits * truth).sum())


def rpn_expected(
    anchors: Array, logits: Array, deltas: Array, targets: list[Target], seeds: list[int]
) -> dict[str, float]:
    found = {"loss_rpn_cls": 0.0, "loss_rpn_box": 0.0}
    for image, (target, seed) in enumerate(zip(targets, seeds, strict=True)):
        boxes = target.boxes.double().numpy()
        label = np.zeros(len(anchors), int)
        if len(boxes):
            overlap = iou(anchors, boxes)
            label[overlap.max(1) >= 0.3] = -1
            label[overlap.max(1) >= 0.7] = 1
            for column in overlap.T:
                label[column == column.max()] = 1
        positive, negative = draw(label, 256, 128, seed)
        found["loss_rpn_cls"] += sigmoid_cross_entropy(logits[image, positive], np.ones(len(positive)))
        found["loss_rpn_cls"] += sigmoid_cross_entropy(logits[image, negative], np.zeros(len(negative)))
        if len(boxes):
            wanted = deltas_to(boxes[overlap.argmax(1)[positive]], anchors[positive], (1, 1, 1, 1))
            found["loss_rpn_box"] += np.abs(deltas[image, positive] - wanted).sum()
    return {name: value / (256 * len(targets)) for name, value in found.items()}


def proposals_expected(
    anchors: list[Array], logits: list[Array], deltas: list[Array], size: tuple[int, int]
) -> Array:
    """Computes the proposals of one image.

    It takes the best 2000 boxes of each level, applies NMS at 0.7 within each level, and keeps the best 1000 boxes.
    """
    kept: list[tuple[float, Array]] = []
    for level_anchors, level_logits, level_deltas in zip(anchors, logits, deltas, strict=True):
        best = np.argsort(-level_logits, kind="stable")[:2000]
        boxes = moved(level_anchors[best], level_deltas[best])
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, size[1])
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, size[0])
        full = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        best, boxes = best[full], boxes[full]
        alive = np.ones(len(boxes), bool)
        for i in range(len(boxes)):
            if alive[i]:
                kept.append((level_logits[best[i]], boxes[i]))
                alive[i + 1 :] &= iou(boxes[i + 1 :], boxes[i : i + 1])[:, 0] <= 0.7
    kept.sort(key=lambda each: -each[0])
    return np.array([box for _, box in kept[:1000]]).reshape(-1, 4)


def drawn_boxes(proposals: Array, target: Target, seed: int) -> tuple[Array, Array, Array, int]:
    """Returns sampled boxes, their classes and instances, and the number of objects, which come first."""
    truth = target.boxes.double().numpy()
    candidates = np.vstack([proposals, truth])
    label, instance = np.zeros(len(candidates), int), np.zeros(len(candidates), int)
    if len(truth):
        overlap = iou(candidates, truth)
        instance = overlap.argmax(1)
        label = (overlap.max(1) >= 0.5).astype(int)
    positive, negative = draw(label, 512, 128, seed)
    rows = np.concatenate([positive, negative])
    classes = np.full(len(rows), THINGS)
    if len(positive):
        classes[: len(positive)] = target.classes.numpy()[instance[positive]]
    return candidates[rows], classes, instance[rows], len(positive)


def covered(mask: Array, box: Array, size: int) -> Array:
    """Computes aligned ROIAlign of a map; the samples per bin are the size of a bin in pixels, rounded up."""
    x1, y1, x2, y2 = box - 0.5
    grid_x, grid_y = math.ceil((x2 - x1) / size), math.ceil((y2 - y1) / size)
    xs = x1 + (np.arange(size * grid_x) + 0.5) * (x2 - x1) / (size * grid_x)
    ys = y1 + (np.arange(size * grid_y) + 0.5) * (y2 - y1) / (size * grid_y)

    def weights(at: Array, length: int) -> Array:
        """Returns the weight of each pixel (column) for each sample (row).

        Samples are clamped to the border, and are 0 if they are more than one pixel outside.
        """
        near = np.maximum(1 - np.abs(np.clip(at, 0, length - 1)[:, None] - np.arange(length)), 0)
        return np.where(((at < -1) | (at > length))[:, None], 0, near)

    samples = weights(ys, mask.shape[0]) @ mask @ weights(xs, mask.shape[1]).T
    return samples.reshape(size, grid_y, size, grid_x).mean((1, 3))


@torch.no_grad()
def expected_losses(
    model: PanopticFPN, images: list[Tensor], targets: list[Target], seeds: list[int]
) -> dict[str, float]:
    """Computes all losses of a float64 network from its predictions."""
    batch = model.prepare(images)
    shared = model.features(batch.images)
    features = shared["instance"]
    level_logits, level_deltas = ([level.numpy() for level in levels] for levels in model.rpn(features))
    level_anchors = [level.numpy() for level in model.rpn.anchors(features)]
    found = rpn_expected(
        np.vstack(level_anchors), np.hstack(level_logits), np.hstack(level_deltas), targets, seeds
    )

    drawn = []
    for image, (target, seed) in enumerate(zip(targets, seeds, strict=True)):
        proposals = proposals_expected(
            level_anchors,
            [x[image] for x in level_logits],
            [x[image] for x in level_deltas],
            batch.sizes[image],
        )
        drawn.append(drawn_boxes(proposals, target, ~seed))
    logits, deltas = (x.numpy() for x in model.box_head(features, [torch.from_numpy(d[0]) for d in drawn]))
    classes = np.concatenate([d[1] for d in drawn])
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    found["loss_cls"] = -np.log(probabilities[np.arange(len(classes)), classes]).sum() / len(classes)
    found["loss_box"], first = 0.0, 0
    for (boxes, own, instance, count), target in zip(drawn, targets, strict=True):
        if count:
            near = target.boxes.double().numpy()[instance[:count]]
            wanted = deltas_to(near, boxes[:count], model.config.box_weights)
            of_class = 0 if model.config.class_agnostic_boxes else own[:count]
            difference = deltas[first + np.arange(count), of_class] - wanted
            found["loss_box"] += np.abs(difference).sum() / len(classes)
        first += len(boxes)

    objects = [torch.from_numpy(d[0][: d[3]]) for d in drawn]
    own_classes = torch.from_numpy(np.concatenate([d[1][: d[3]] for d in drawn]))
    masks = model.mask_head(features, objects, own_classes).numpy()
    truth = [
        covered((target.instances == number + 1).numpy().astype(float), box, masks.shape[-1]) >= 0.5
        for (boxes, _, instance, count), target in zip(drawn, targets, strict=True)
        for box, number in zip(boxes[:count], instance[:count], strict=True)
    ]
    found["loss_mask"] = sigmoid_cross_entropy(masks, np.array(truth)) / masks.size if masks.size else 0.0

    large = F.interpolate(
        model.semantic_head(shared["semantic"]), scale_factor=4.0, mode="bilinear", align_corners=False
    )
    logs = large.log_softmax(1).numpy()
    sums, count = 0.0, 0
    for image, target in enumerate(targets):
        for label in range(1 + model.config.num_stuff):
            y, x = np.nonzero(target.semantic.numpy() == label)
            sums -= logs[image, label, y, x].sum()
            count += len(y)
    found["loss_semantic"] = sums / max(count, 1)
    return found


@pytest.fixture(scope="module")
def model() -> PanopticFPN:
    return small_model().double()


@pytest.mark.parametrize(
    "settings", [{"fpn_groups": 2}, {"class_agnostic_boxes": True, "class_agnostic_masks": True}]
)
def test_losses_of_other_networks_equal_their_definitions(settings: dict[str, Any]) -> None:
    other = small_model(**settings).double()
    images, targets, seeds = make_batch(*SCENES["instances"])
    with torch.no_grad():
        found = TrainingNetwork(other, 1.0, 1.0)(images, targets, seeds)
    for name, value in expected_losses(other, images, targets, seeds).items():
        assert float(found[name]) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("scene", SCENES)
def test_every_loss_equals_its_definition(model: PanopticFPN, scene: str) -> None:
    images, targets, seeds = make_batch(*SCENES[scene])
    with torch.no_grad():
        found = TrainingNetwork(model, lambda_instance=1.0, lambda_semantic=1.0)(images, targets, seeds)
    expected = expected_losses(model, images, targets, seeds)
    assert set(found) == set(expected)
    for name, value in expected.items():
        # The sums are float64 in a different order. Boxes of instances are float32, but have integer coordinates.
        assert float(found[name]) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    if scene == "instances":
        assert min(expected.values()) > 0
    if "void" not in scene:
        assert float(found["loss_semantic"]) > 0
    if scene in ("no instances", "crowds alone", "void alone"):
        assert [float(found[name]) for name in ("loss_rpn_box", "loss_box", "loss_mask")] == [0, 0, 0]
    if scene == "void alone":
        assert float(found["loss_semantic"]) == 0


def test_lambdas_weigh_the_branches(model: PanopticFPN) -> None:
    images, targets, seeds = make_batch(*SCENES["instances"])
    plain = TrainingNetwork(model, 1.0, 1.0)(images, targets, seeds)
    weighted = TrainingNetwork(model, 0.25, 3.0)(images, targets, seeds)
    for name, loss in plain.items():
        factor = 0.25 if name in INSTANCE_LOSSES else 3.0
        torch.testing.assert_close(weighted[name], factor * loss)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_and_reach_every_parameter(scene: str, dtype: torch.dtype) -> None:
    model = small_model()
    images, targets, seeds = make_batch(*SCENES[scene])
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        found = TrainingNetwork(model)(images, targets, seeds)
    total(found).backward()
    assert all(bool(loss.isfinite()) for loss in found.values())
    for name, parameter in model.named_parameters():
        # DistributedDataParallel waits for all gradients, even if a batch has no objects.
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_half_precision_is_close_to_float32() -> None:
    """Only losses over the same anchors and pixels are compared; rounded scores lead to different proposals."""
    model = small_model()
    images, targets, seeds = make_batch(*SCENES["instances"])
    network = TrainingNetwork(model)
    expected = network(images, targets, seeds)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(images, targets, seeds)
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        if name.startswith(("loss_rpn", "loss_semantic")):
            # bfloat16 keeps 8 bits: a dozen layers round by 0.4 % each, averaged over hundreds of positions.
            assert float(loss.detach()) == pytest.approx(float(expected[name].detach()), rel=0.02), name


def test_void_pixels_and_padding_do_not_count() -> None:
    """The semantic logits have no gradient there."""
    _, targets, _ = make_batch(make_sample(50, 70, 1))
    logits = torch.rand(1, 5, 16, 24, requires_grad=True)
    losses.semantic_loss(logits, semantic_labels(targets, 64, 96), 4).backward()
    assert logits.grad is not None
    # Rows from 48 on are void, and the image has 70 columns. A pixel depends on two positions of the quarter-size map
    # along each axis.
    assert logits.grad[:, :, 13:].count_nonzero() == 0
    assert logits.grad[:, :, :, 19:].count_nonzero() == 0
    assert logits.grad[:, :, :12, :17].count_nonzero() == logits.grad[:, :, :12, :17].numel()


def test_proposals_are_limited_to_2000_per_level_and_1000_in_total(model: PanopticFPN) -> None:
    """The first level has 2500 disjoint boxes; the boxes of the second level score below 900 of them."""
    grid = torch.stack(torch.meshgrid(torch.arange(50.0), torch.arange(50.0), indexing="xy"), -1).reshape(
        -1, 2
    )
    first = torch.cat((grid * 10, grid * 10 + 8), dim=1).double()
    second = first[:200] + 500
    logits = [torch.arange(2500, 0, -1.0).double()[None], torch.linspace(1600.4, 1600.2, 200).double()[None]]
    deltas = [torch.zeros(1, len(boxes), 4).double() for boxes in (first, second)]
    boxes, valid = propose(model.rpn, [first, second], logits, deltas, [(1000, 1000)])
    assert boxes.shape == (1, 1000, 4)
    assert bool(valid.all())
    torch.testing.assert_close(boxes[0], torch.cat((first[:900], second[:100])))

    # Now the second level scores far lower, and 600 of the 2000 boxes are copies of others. NMS keeps 1400 and 200
    # boxes, and the best 1000 remain.
    first[900:1500] = first[:600]
    boxes, valid = propose(model.rpn, [first, second], [logits[0], logits[1] - 5000], deltas, [(1000, 1000)])
    torch.testing.assert_close(boxes[0], torch.cat((first[:900], first[1500:1600])))

    # Now all but 700 of the best 2000 boxes are identical. The other 500 boxes of the level are not candidates.
    first[700:] = first[0]
    first[2000:] = torch.tensor([600.0, 600.0, 620.0, 620.0])
    boxes, valid = propose(
        model.rpn,
        [first, second[:0]],
        [logits[0], logits[1][:, :0]],
        [deltas[0], deltas[1][:, :0]],
        [(1000, 1000)],
    )
    assert int(valid.sum()) == 700
    torch.testing.assert_close(boxes[0][valid[0]], first[:700])


def test_proposals_exclude_empty_and_non_finite_boxes(model: PanopticFPN) -> None:
    anchors = torch.tensor(
        [[0.0, 0, 8, 8], [60.0, 0, 68, 8], [20.0, 0, 28, 8], [30.0, 0, 38, 8], [40.0, 0, 48, 8]]
    )
    logits = torch.tensor([[1.0, 5.0, 4.0, float("nan"), 2.0]])
    deltas = torch.zeros(1, 5, 4)
    deltas[0, 2, 0] = float("inf")
    boxes, valid = propose(small_model().rpn, [anchors], [logits], [deltas], [(50, 50)])
    assert valid[0].nonzero()[:, 0].tolist() == [0, 1]
    assert boxes[0][valid[0]].tolist() == [anchors[4].tolist(), anchors[0].tolist()]


def test_ground_truth_is_among_the_candidates() -> None:
    target = make_batch(make_sample(50, 70, 1))[1][0]
    nothing, valid = torch.zeros(7, 4), torch.zeros(7, dtype=torch.bool)
    found = sample_boxes(nothing, valid, target, THINGS, seed=0)
    count = len(target.boxes)
    order = found.instance.argsort()
    assert torch.equal(found.boxes[order], target.boxes)
    assert torch.equal(found.classes[order], target.classes)
    assert found.positives == count == 3


def test_unused_slots_change_nothing(model: PanopticFPN) -> None:
    """On a GPU there are always 512 slots, and 128 enter the mask head; this test adds unused slots on the CPU."""
    images, targets, seeds = make_batch(*SCENES["one image without instances"])
    features = model.features(model.prepare(images).images)["instance"]
    random = torch.Generator().manual_seed(5)
    sampled, padded = [], []
    for target, seed in zip(targets, seeds, strict=True):
        proposals = torch.rand(40, 2, generator=random).double() * 30
        proposals = torch.cat((proposals, proposals + 4 + 20 * torch.rand(40, 2, generator=random)), dim=1)
        one = sample_boxes(proposals, torch.ones(40, dtype=torch.bool), target, THINGS, seed)
        sampled.append(one)
        extra = 9
        # The mask head also gets slots after the objects, which are background, as on a GPU.
        padded.append(
            SampledBoxes(
                torch.cat((one.boxes, torch.zeros(extra, 4).double())),
                torch.cat((one.classes, torch.full((extra,), -1))),
                torch.cat((one.instance, torch.zeros(extra, dtype=torch.int64))),
                torch.cat((one.target_boxes, torch.full((extra, 4), float("nan")).double())),
                one.positives + 5,
            )
        )

    def of(images: list[SampledBoxes]) -> dict[str, Tensor]:
        logits, deltas = model.box_head(features, [image.boxes for image in images])
        found = losses.box_losses(logits, deltas, images, THINGS, model.box_head.weights)
        return found | {"loss_mask": losses.mask_loss(predict_masks(model, features, targets, images))}

    parameters = [*model.box_head.parameters(), *model.mask_head.parameters()]
    results = []
    for chosen in (sampled, padded):
        found = of(chosen)
        results.append((found, torch.autograd.grad(total(found), parameters, retain_graph=True)))
    (found, gradients), (with_padding, padded_gradients) = results
    assert float(found["loss_mask"].detach()) > 0
    for name, loss in found.items():
        torch.testing.assert_close(with_padding[name], loss, msg=name)
    for gradient, other in zip(gradients, padded_gradients, strict=True):
        torch.testing.assert_close(other, gradient)


def test_mask_targets_are_bins_that_are_at_least_half_covered() -> None:
    instances = torch.zeros(8, 8, dtype=torch.int32)
    instances[2:6, 2:6] = 1
    instances[:, 7] = 2
    target = Target(
        torch.tensor([[2.0, 2, 6, 6], [7.0, 0, 8, 8]]),
        torch.tensor([0, 1]),
        instances,
        instances.to(torch.uint8),
    )
    boxes = torch.tensor([[2.0, 2, 6, 6], [0.0, 0, 8, 8], [4.0, 0, 8, 8]])
    found = mask_targets(target, boxes, torch.tensor([0, 0, 1]), 2)
    assert found.tolist() == [[[1, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 1], [0, 1]]]
    random = np.random.default_rng(0)
    boxes = torch.from_numpy(np.sort(random.uniform(0, 8, (20, 2, 2)), axis=1).reshape(20, 4)).float()
    for number in (0, 1):
        found = mask_targets(target, boxes, torch.full((20,), number), 4)
        for box, one in zip(boxes, found, strict=True):
            share = covered((instances == number + 1).numpy().astype(float), box.double().numpy(), 4)
            assert ((share >= 0.5) == one.numpy().astype(bool))[np.abs(share - 0.5) > 1e-5].all()
