"""Known results of the metrics of label maps."""

from __future__ import annotations

import math

import pytest
import torch

from panfpn_fast.metrics import SemanticQuality


def test_iou_and_its_means() -> None:
    quality = SemanticQuality(4)
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 255, 255]])
    predicted = torch.tensor([[0, 0, 0, 1, 1, 255, 2, 0]])  # a pixel of class 1 is predicted as no class
    quality.add(truth, predicted)
    result = quality.result()
    assert result["iou"][:2] == pytest.approx([3 / 4, 1 / 3])
    assert all(
        math.isnan(value) for value in result["iou"][2:]
    )  # class 2 is predicted on ignored pixels only
    assert result["miou"] == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert result["fiou"] == pytest.approx(4 / 6 * 3 / 4 + 2 / 6 / 3)


def test_a_class_that_is_only_predicted_counts_in_one_of_the_means() -> None:
    quality = SemanticQuality(2)
    quality.add(torch.tensor([[0, 0]]), torch.tensor([[0, 1]]))
    result = quality.result()
    assert result["iou"] == [0.5, 0.0]
    assert result["miou"] == 0.25
    assert result["miou_annotated"] == 0.5
    assert result["fiou"] == 0.5


def test_instances_have_equal_weight() -> None:
    quality = SemanticQuality(2, instance_sizes={1: 6.0})
    truth = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    instances = torch.tensor([[7, 7, 9, 9, 9, 9, 9, 9, 0, 0]])
    predicted = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 0]])
    quality.add(truth, predicted, instances)
    # Both instances have the weight 6: one is found, the other is missed, and one pixel is wrong.
    assert quality.result()["iiou"] == pytest.approx(6 / (6 + 6 + 1))
    assert quality.result()["iou"][1] == pytest.approx(6 / 9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_large_numbers_of_instances(dtype: torch.dtype) -> None:
    """The largest id of a COCO PNG, of an int32 and of an int64, with as many classes as COCO has."""
    truth = torch.tensor([[5, 5, 5, 5, 6, 6]])
    predicted = torch.tensor([[5, 5, 5, 0, 6, 6]])
    results = []
    for number in (1, 2**24 - 1, torch.iinfo(dtype).max, torch.iinfo(dtype).min):
        quality = SemanticQuality(133, 255, {5: 100.0})
        quality.add(truth, predicted, torch.tensor([[number] * 4 + [0, 0]], dtype=dtype))
        results.append(quality.result()["iiou"])
    assert results == [0.75] * 4


def test_images_add_up() -> None:
    both, once = SemanticQuality(3), SemanticQuality(3)
    random = torch.Generator().manual_seed(0)
    truth, predicted = torch.randint(0, 3, (2, 2, 9, 7), generator=random)
    for i in range(2):
        both.add(truth[i], predicted[i])
    once.add(truth.reshape(18, 7), predicted.reshape(18, 7))
    assert both.result() == once.result()


def test_parts_merge_into_the_whole() -> None:
    random = torch.Generator().manual_seed(1)
    truth, predicted = torch.randint(0, 3, (2, 6, 9, 7), generator=random)
    instances = torch.randint(0, 4, (6, 9, 7), generator=random)
    sizes = {1: 7.3, 2: 11.1}
    whole, parts = SemanticQuality(3, 255, sizes), [SemanticQuality(3, 255, sizes) for _ in range(2)]
    for i in range(6):
        whole.add(truth[i], predicted[i], instances[i])
        parts[i % 2].add(truth[i], predicted[i], instances[i])
    parts[1].merge(parts[0])
    assert parts[1].result() == whole.result()


def test_any_predicted_label_is_allowed() -> None:
    quality = SemanticQuality(2, ignore_label=-1)
    quality.add(torch.tensor([[0, 0, 0, 1, -1]]), torch.tensor([[0, -1, 2**31 - 1, 1, 0]]))
    assert quality.result()["iou"] == pytest.approx([1 / 3, 1])


def test_labels_beyond_int32_are_no_classes() -> None:
    quality = SemanticQuality(2)
    quality.add(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 2**32, 1 - 2**32]]))
    assert quality.result()["iou"] == [0.5, 0.0]
    with pytest.raises(ValueError, match="truth: expected labels"):
        quality.add(torch.tensor([[2**32]]), torch.tensor([[0]]))


def test_bad_input() -> None:
    quality = SemanticQuality(3)
    with pytest.raises(ValueError, match="predicted: expected shape"):
        quality.add(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected labels 0\.\.2 or 255, got \[3\]"):
        quality.add(torch.tensor([[0, 3]]), torch.tensor([[0, 0]]))


def test_the_ignored_label_is_not_a_class() -> None:
    with pytest.raises(
        ValueError, match="ignore_label: expected a label that is not one of the 300 classes, such as"
    ):
        SemanticQuality(300)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        SemanticQuality(0)
    quality = SemanticQuality(300, -1)
    quality.add(torch.tensor([[255, 299, 0, -1]]), torch.tensor([[255, 299, 1, 1]]))
    assert quality.result()["iou"][254:256] == pytest.approx([math.nan, 1], nan_ok=True)
    assert quality.result()["iou"][299] == 1


def test_nothing_counted() -> None:
    quality = SemanticQuality(2)
    quality.add(torch.full((2, 2), 255), torch.zeros(2, 2))
    assert math.isnan(quality.result()["miou"])
    assert math.isnan(quality.result()["miou_annotated"])
    assert math.isnan(quality.result()["fiou"])
