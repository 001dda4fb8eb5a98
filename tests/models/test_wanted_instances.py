"""Leaving out the instances that merging drops changes no bit of the panoptic map and of the segments."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panfpn_fast.models import PanopticFPN, PanopticOutput, TwoNetworks
from panfpn_fast.models.config import TASKS, FusionRule
from panfpn_fast.models.conv_fusion import for_prediction
from panfpn_fast.models.outputs import ImageBatch
from panfpn_fast.models.panoptic_fpn import Wanted, merge

LIMITS = settings(max_examples=30, deadline=None)

# A CPU computes 16 masks at a time; this is no multiple of it.
MOST = 41


def make(**settings: Any) -> PanopticFPN:
    """Makes a network with random weights that detects `MOST` instances, with scores from 0.01 to 1."""
    torch.manual_seed(0)
    model = PanopticFPN(
        backbone="resnet10_narrow",
        num_things=3,
        num_stuff=4,
        fpn_channels=32,
        box_head_channels=32,
        mask_head_channels=32,
        semantic_channels=32,
        semantic_groups=8,
        rpn_pre_nms_topk=200,
        rpn_post_nms_topk=100,
        score_threshold=0.01,
        detections_per_image=MOST,
        **settings,
    )
    # Makes an untrained network, whose activations are not normalised, detect segments of every kind.
    model.backbone.get_parameter("conv1.weight").detach().mul_(1e-4)
    if "instance" in model.config.tasks:
        torch.nn.init.normal_(model.box_head.class_logits.weight, std=25)
        torch.nn.init.normal_(model.box_head.box_deltas.weight, std=10)
        torch.nn.init.normal_(model.mask_head.logits.weight, std=100)
    return model.eval()


def image(height: int, width: int, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


IMAGES = [image(64, 96, 1), image(40, 90, 2)]
SIZES = [(70, 100), (40, 90)]


class Predicted(NamedTuple):
    """A network, what it finds in `IMAGES`, and the features that it finds them with."""

    model: PanopticFPN
    outputs: list[PanopticOutput]
    batch: ImageBatch
    features: dict[str, Any]


@pytest.fixture(scope="module")
def predicted() -> Predicted:
    model = for_prediction(make()).to(memory_format=torch.channels_last)
    batch = model.prepare(IMAGES)
    with torch.no_grad():
        return Predicted(model, model(IMAGES, SIZES), batch, model.features(batch.images))


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether shapes, dtypes and bits are equal."""
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def check(reduced: Sequence[PanopticOutput], whole: Sequence[PanopticOutput], threshold: float) -> None:
    for few, every in zip(reduced, whole, strict=True):
        assert same(few.panoptic, every.panoptic)
        assert same(few.semantic, every.semantic)
        assert all(same(*columns) for columns in zip(few.segments, every.segments, strict=True))
        enough = [score >= threshold for score in every.scores.float().tolist()]
        count = enough.index(False) if False in enough else len(enough)
        assert not any(enough[count:])
        for name in ("boxes", "scores", "classes", "mask_probs"):
            assert same(getattr(few, name), getattr(every, name)[:count]), name


def test_the_network_has_instances_on_both_sides_of_the_threshold(predicted: Predicted) -> None:
    for output in predicted.outputs:
        assert len(output.boxes) == MOST
        assert 0 < int((output.scores >= 0.5).sum()) < MOST
        assert output.segments.isthing.any()


def thresholds(outputs: list[PanopticOutput]) -> st.SearchStrategy[float]:
    """Any share, or the score of a detection, or a float64 next to it."""
    scores = st.sampled_from([float(score) for output in outputs for score in output.scores])
    return st.one_of(st.floats(0, 1), scores, st.builds(math.nextafter, scores, st.sampled_from([0, 1])))


@LIMITS
@given(
    rule=st.sampled_from(get_args(FusionRule)),
    data=st.data(),
    overlap=st.floats(0, 1),
    area=st.integers(0, 400),
    mask=st.floats(0, 1),
    chosen=st.sampled_from([[0], [1], [0, 1], [1, 0]]),
)
def test_map_and_segments_are_equal(
    predicted: Predicted,
    rule: str,
    data: st.DataObject,
    overlap: float,
    area: int,
    mask: float,
    chosen: list[int],
) -> None:
    score = data.draw(thresholds(predicted.outputs))
    config = predicted.model.config.replace(
        fusion_rule=rule,
        instance_score_threshold=score,
        overlap_threshold=overlap,
        stuff_area_threshold=area,
        mask_threshold=mask,
    )
    model = copy.copy(predicted.model)
    model.config = config
    # The features and the label maps of these images, which do not depend on the configuration.
    features = {task: [level[chosen] for level in levels] for task, levels in predicted.features.items()}
    images, sizes = [predicted.batch.sizes[i] for i in chosen], [SIZES[i] for i in chosen]
    with torch.no_grad():
        every, few = (model.instances(features, images, sizes, wanted) for wanted in get_args(Wanted))
    labels = [predicted.outputs[i].semantic for i in chosen]
    reduced, whole = (list(map(partial(merge, config), found, labels)) for found in (few, every))
    check(reduced, whole, score)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, predicted: Predicted) -> None:
    """Scores in float64 are compared as the merging op compares them, in float32."""
    model = copy.deepcopy(predicted.model).to(dtype)
    scores = model(IMAGES, SIZES)[0].scores
    threshold = float(scores[17].float())
    model.config = model.config.replace(instance_score_threshold=threshold)
    check(model(IMAGES, SIZES, instances="panoptic"), model(IMAGES, SIZES), threshold)


def test_masks_that_are_not_wanted_are_not_computed(
    predicted: Predicted, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = predicted.model
    computed: list[int] = []
    original = network.mask_head.forward

    def spy(features: Any, boxes: Sequence[Tensor], classes: Tensor) -> Tensor:
        computed.append(len(classes))
        return original(features, boxes, classes)

    monkeypatch.setattr(network.mask_head, "forward", spy)
    network(IMAGES[:1])
    assert computed == [16, 16, 9]
    scores = network(IMAGES[:1], SIZES[:1])[0].scores.tolist()
    for count, expected in ((0, [0]), (1, [16]), (16, [16]), (17, [16, 16]), (40, [16, 16, 9])):
        computed.clear()
        model = copy.copy(network)
        threshold = math.nextafter(scores[count], 1)
        model.config = network.config.replace(instance_score_threshold=threshold)
        [output] = model(IMAGES[:1], SIZES[:1], "panoptic")
        assert len(output.boxes) == count
        assert output.mask_probs.shape == (count, 28, 28)
        assert computed == expected


def test_two_networks() -> None:
    model = TwoNetworks(*(make(tasks=(task,), stuff_area_threshold=10) for task in TASKS))
    check(model(IMAGES, SIZES, "panoptic"), model(IMAGES, SIZES), 0.5)


def test_network_without_instances() -> None:
    model = make(tasks=("semantic",))
    check(model(IMAGES, SIZES, "panoptic"), model(IMAGES, SIZES), 0.5)


@pytest.mark.parametrize("networks", [1, 2])
def test_another_word(networks: int) -> None:
    model = make() if networks == 1 else TwoNetworks(*(make(tasks=(task,)) for task in TASKS))
    with pytest.raises(ValueError, match="instances: expected 'all' or 'panoptic', got 'none'"):
        model(IMAGES, SIZES, "none")
