"""The differentiable panoptic quality: known answers, direction, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from panfpn_fast.training.network import TrainingNetwork, total
from panfpn_fast.training.panoptic_quality_loss import panoptic_quality_loss, stuff_quality, thing_quality
from support.training_samples import make_batch, make_sample, small_model

LABELS = torch.tensor([[[1, 1, 2, 0], [1, -1, 2, 0]], [[3, 3, 3, 3], [3, 3, 0, -1]]], dtype=torch.int16)
TRUTH = torch.tensor([[[1, 1], [0, 0]], [[0, 1], [0, 1]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]])
COUNTED = torch.tensor([True, True, True, True])
INSTANCE = torch.tensor([0, 0, 2, 1])
CLASSES = torch.tensor([1, 0, 1])


def right(sharpness: float) -> tuple[Tensor, Tensor]:
    """Returns logits that favour the ground truth if `sharpness` is positive and oppose it if it is negative."""
    stuff = (LABELS[:, None] == torch.arange(4)[:, None, None]).double() * sharpness
    return stuff, (TRUTH * 2 - 1).double() * sharpness


def loss_of(stuff: Tensor, things: Tensor, counted: Tensor = COUNTED) -> Tensor:
    return panoptic_quality_loss(
        [stuff_quality(stuff, LABELS), thing_quality(things, TRUTH, counted, INSTANCE, CLASSES, 3)]
    )


def test_a_perfect_prediction_costs_nothing() -> None:
    assert float(loss_of(*right(60))) == pytest.approx(0, abs=1e-9)


def test_a_better_prediction_costs_less() -> None:
    costs = [float(loss_of(*right(sharpness))) for sharpness in torch.linspace(-6, 12, 40).tolist()]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 40
    assert costs[0] > 5


def test_known_answers() -> None:
    found = stuff_quality(torch.zeros(2, 4, 2, 4).double(), LABELS)
    assert found.segments.tolist() == [1, 1, 1]

    def quality(iou: float) -> float:
        return iou * (1 + math.exp(-5)) / (1 + math.exp(-(iou - 0.5) / 0.1))

    # In each image, 7 pixels are not void and have probability 1/4. The classes cover 3, 2 and 6 of them.
    expected = [quality(area / 4 / (7 / 4 + area - area / 4)) for area in (3, 2, 6)]
    torch.testing.assert_close(found.quality, torch.tensor(expected).double())

    things = torch.zeros(4, 2, 2).double()
    found = thing_quality(things, TRUTH, COUNTED, INSTANCE, CLASSES, 3)
    # A box that contains no part of its instance does not count, so instance 1 and class 0 do not occur.
    assert found.segments.tolist() == [0, 2, 0]
    torch.testing.assert_close(found.quality, torch.tensor([0, quality(1 / 3) + quality(2 / 4), 0]).double())
    both = panoptic_quality_loss([stuff_quality(torch.zeros(2, 4, 2, 4).double(), LABELS), found])
    mean = (sum(expected) + (quality(1 / 3) + quality(1 / 2)) / 2) / 4
    assert float(both) == pytest.approx(-math.log(mean), abs=1e-4)  # the loss adds 1e-6 to stay finite


def test_gradients() -> None:
    random = torch.Generator().manual_seed(0)
    stuff = torch.randn(2, 4, 2, 4, generator=random, dtype=torch.float64, requires_grad=True)
    things = torch.randn(4, 2, 2, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss_of, (stuff, things))
    gradients = torch.autograd.grad(loss_of(stuff, things), (stuff, things))
    assert not bool(gradients[0][0, :, 1, 1].any()), "void"
    assert not bool(gradients[1][3].any()), "a box that contains no part of its instance"


def test_unused_slots_change_nothing() -> None:
    stuff, things = right(1)
    other = things.clone()
    other[2] = 50
    counted = torch.tensor([True, True, False, True])
    assert torch.equal(loss_of(stuff, things, counted), loss_of(stuff, other, counted))
    assert not torch.equal(loss_of(stuff, things), loss_of(stuff, other))


def test_an_empty_batch_costs_nothing() -> None:
    stuff = torch.randn(1, 4, 2, 4, requires_grad=True)
    things = torch.randn(0, 2, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = panoptic_quality_loss(
        [
            stuff_quality(stuff, torch.full((1, 2, 4), -1, dtype=torch.int16)),
            thing_quality(things, things.detach(), none.bool(), none, none, 3),
        ]
    )
    assert float(loss.detach()) == 0
    for gradient in torch.autograd.grad(loss, (stuff, things)):
        assert not bool(gradient.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_off_unless_it_has_a_weight(dtype: torch.dtype) -> None:
    model = small_model()
    batch = make_batch(make_sample(50, 70, 1), make_sample(64, 64, 2, things=0))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        assert "loss_panoptic" not in TrainingNetwork(model)(*batch)
        single = TrainingNetwork(model, lambda_panoptic=1.0)(*batch)
        double = TrainingNetwork(model, lambda_panoptic=2.0)(*batch)
    torch.testing.assert_close(double["loss_panoptic"], 2 * single["loss_panoptic"])
    torch.testing.assert_close(double["loss_mask"], single["loss_mask"])
    assert float(single["loss_panoptic"].detach()) > 0
    total({"loss_panoptic": single["loss_panoptic"]}).backward()
    for part in ("mask_head.logits", "semantic_head.logits"):
        gradient = model.get_submodule(part).get_parameter("weight").grad
        assert gradient is not None
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_one_branch_has_its_own_quality(task: str) -> None:
    model = small_model(tasks=(task,))
    found = TrainingNetwork(model, lambda_panoptic=1.0)(*make_batch(make_sample(50, 70, 1)))
    assert 0 < float(found["loss_panoptic"].detach()) < 14


def test_training_reduces_the_loss() -> None:
    torch.manual_seed(0)
    stuff, things = torch.randn(2, 4, 2, 4), torch.randn(4, 2, 2)
    parameters = [stuff.requires_grad_(), things.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    first = float(loss_of(stuff, things).detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss = loss_of(stuff, things)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * first
