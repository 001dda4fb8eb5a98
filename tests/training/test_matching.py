"""Matching and sampling: rules, known answers, and samples that depend only on the seed."""

from __future__ import annotations

import pytest
import torch

from panfpn_fast.training.matching import match, pairwise_iou, random_keys, sample

CPU = torch.device("cpu")


def test_iou_equals_pixel_counts() -> None:
    random = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 12, (20, 2, 2), generator=random).sort(dim=1).values
    boxes = corners.flatten(1).float()

    def pixels(box: torch.Tensor) -> torch.Tensor:
        canvas = torch.zeros(12, 12, dtype=torch.bool)
        x1, y1, x2, y2 = box.long().tolist()
        canvas[y1:y2, x1:x2] = True
        return canvas

    found = pairwise_iou(boxes, boxes[:7])
    for i, box in enumerate(boxes):
        for j, other in enumerate(boxes[:7]):
            a, b = pixels(box), pixels(other)
            union = int((a | b).sum())
            expected = int((a & b).sum()) / union if union else 0.0
            assert float(found[i, j]) == pytest.approx(expected)


def test_match_labels() -> None:
    instances = torch.tensor([[0.0, 0, 10, 10], [20.0, 20, 30, 30]])
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [0.0, 0, 10, 5], [0.0, 0, 10, 2], [50.0, 50, 60, 60], [20.0, 20, 30, 21]]
    )  # IoU with the first instance 1, 0.5, 0.2 and 0; the last has 0.1 with the second instance
    plain = match(boxes, instances, 0.3, 0.7, keep_best=False)
    assert plain.label.tolist() == [1, -1, 0, 0, 0]
    assert plain.instance[[0, 4]].tolist() == [0, 1]
    best = match(boxes, instances, 0.3, 0.7, keep_best=True)
    assert best.label.tolist() == [1, -1, 0, 0, 1]
    exactly = match(boxes, instances, 0.5, 0.5, keep_best=False)
    assert exactly.label.tolist() == [1, 1, 0, 0, 0]


def test_an_instance_without_overlap_gives_no_object() -> None:
    found = match(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[5.0, 5, 6, 6]]), 0.3, 0.7, keep_best=True)
    assert found.label.tolist() == [0]


def test_without_instances_everything_is_background() -> None:
    found = match(torch.rand(4, 4), torch.zeros(0, 4), 0.3, 0.7, keep_best=True)
    assert found.label.tolist() == [0, 0, 0, 0]
    assert found.instance.tolist() == [0, 0, 0, 0]


def test_keys_are_uniform_and_depend_only_on_the_seed() -> None:
    keys = random_keys(100_000, 3, CPU)
    assert torch.equal(keys, random_keys(100_000, 3, CPU))
    assert torch.equal(keys[:10], random_keys(10, 3, CPU))
    counts = torch.histc(keys, 20, 0, 1)
    assert (counts - 5000).abs().max() < 5 * 5000**0.5
    for other in (4, ~3, 2**40, -1):
        correlation = torch.corrcoef(torch.stack([keys, random_keys(100_000, other, CPU)]))[0, 1]
        assert correlation.abs() < 0.02


def test_sample_takes_objects_first_and_then_background() -> None:
    label = torch.tensor([1] * 5 + [0] * 10 + [-1] * 5)
    chosen = sample(label, 8, 2, seed=1)
    assert chosen.label.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert (label[chosen.rows] == chosen.label).all()
    assert len(set(chosen.rows.tolist())) == 8
    everything = sample(label, 30, 8, seed=1)
    assert everything.label.tolist() == [1] * 5 + [0] * 10 + [-1] * 15
    assert set(everything.rows[:15].tolist()) == set(range(15))


def test_sample_is_fair() -> None:
    label = torch.tensor([1] * 4 + [0] * 12)
    counts = torch.zeros(16)
    for seed in range(2000):
        chosen = sample(label, 6, 2, seed)
        counts[chosen.rows] += 1
    assert (counts[:4] / 2000 - 1 / 2).abs().max() < 0.05
    assert (counts[4:] / 2000 - 1 / 3).abs().max() < 0.05


def test_sample_of_nothing() -> None:
    chosen = sample(torch.zeros(0, dtype=torch.int64), 3, 1, seed=0)
    assert chosen.label.tolist() == [-1, -1, -1]
    assert chosen.rows.tolist() == [0, 0, 0]
