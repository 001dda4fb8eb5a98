"""Known answers for the panoptic quality that the parity tests use."""

from __future__ import annotations

import numpy as np
import pytest

from support.numpy_panoptic_quality import panoptic_quality


def test_equal_maps_have_quality_one() -> None:
    ids = np.array([[0, 1, 1, 2], [0, 1, 2, 2]])
    assert panoptic_quality(ids, {1: "a", 2: "b"}, ids * 7, {7: "a", 14: "b"}) == (1, 1, 1, 2, 0, 0)


def test_known_mixture() -> None:
    truth = np.repeat([1, 2], 10)
    predicted = np.r_[np.full(8, 5), np.full(12, 6)]
    # Segment 5 covers 8 of the 10 pixels of segment 1. Segment 6 covers segment 2 and has an area of 12.
    quality = panoptic_quality(truth, {1: "a", 2: "b"}, predicted, {5: "a", 6: "b"})
    assert quality.pq == pytest.approx((8 / 10 + 10 / 12) / 2)
    # Segments of different categories do not match: one is missed and one is wrong, in two categories.
    quality = panoptic_quality(truth, {1: "a", 2: "b"}, predicted, {5: "a", 6: "c"})
    assert quality.pq == pytest.approx(0.8 / 3)
    assert quality[3:] == (1, 1, 1)


def test_exactly_half_is_no_match() -> None:
    truth = np.array([1, 1, 0, 0])
    predicted = np.array([3, 0, 0, 0])
    assert panoptic_quality(truth, {1: "a"}, predicted, {3: "a"}).pq == 0


def test_void_in_the_truth_does_not_count_against_a_prediction() -> None:
    truth = np.array([1, 1, 1, 0, 0, 0, 0])
    predicted = np.array([3, 3, 3, 3, 4, 4, 4])
    assert panoptic_quality(truth, {1: "a"}, predicted, {3: "a", 4: "a"}) == (1, 1, 1, 1, 0, 0)


def test_an_id_without_an_entry_is_an_error() -> None:
    ids = np.array([1, 2])
    with pytest.raises(KeyError):
        panoptic_quality(ids, {1: "a"}, ids, {1: "a", 2: "b"})
