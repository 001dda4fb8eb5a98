"""Checks that two results agree. Where rounding decides a result, only a small share may differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Each GPU compiler contracts multiply-adds in its own way, so results that depend on the last bit may differ there.
_CUDA_SHARE = 2e-3

# Few pixels have an interpolated value within rounding of the threshold; one in ten thousand is a safe bound.
PIXEL_SHARE = 1e-4


def _share_on(tensor: Tensor) -> float:
    return _CUDA_SHARE if tensor.device.type == "cuda" else 0.0


def same_kept(share: float = 0.0) -> Callable[[Tensor, Tensor], None]:
    """Requires equal kept indices in equal order. On CUDA, or with a `share`, few boxes may differ instead."""

    def check(ours: Tensor, theirs: Tensor) -> None:
        allowed = max(share, _share_on(ours))
        if allowed == 0:
            assert torch.equal(ours, theirs), (
                f"ours keeps {len(ours)} boxes, the peer {len(theirs)}, and they differ"
            )
            return
        differ = len(set(ours.tolist()) ^ set(theirs.tolist()))
        assert differ <= allowed * max(len(ours), 1), f"{differ} boxes are kept by only one of the two"

    return check


def close_features(ours: Tensor, theirs: Tensor) -> None:
    """Requires pooled features to be equal up to rounding: means of bilinear samples of normally distributed values.

    Coordinates up to 336 are rounded to 3e-5 pixels, and neighbouring values differ by up to ten. Half-precision
    results may differ by one rounding step.
    """
    assert ours.shape == theirs.shape, f"shape {list(ours.shape)} and {list(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"dtype {ours.dtype} and {theirs.dtype}"
    relative = 1e-4 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps
    apart = ~torch.isclose(ours, theirs, rtol=relative, atol=5e-4)
    count = int(apart.sum())
    worst = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    assert count <= _share_on(ours) * ours.numel(), f"{count} of {ours.numel()} values, by up to {worst:.2g}"


def close_norm(allowed: float) -> Callable[[Tensor | Sequence[Tensor], Tensor | Sequence[Tensor]], None]:
    """Requires the norm of the difference of each tensor to be at most a share of its norm.

    Single values may differ more, since rounding decides a ReLU near 0.
    """

    def check(ours: Tensor | Sequence[Tensor], theirs: Tensor | Sequence[Tensor]) -> None:
        pairs = [(ours, theirs)] if isinstance(ours, Tensor) else list(zip(ours, theirs, strict=True))
        for number, (mine, other) in enumerate(pairs):
            assert isinstance(mine, Tensor)
            assert isinstance(other, Tensor)
            assert mine.shape == other.shape, f"shape {list(mine.shape)} and {list(other.shape)}"
            difference = float((mine - other).norm() / other.norm())
            assert difference <= allowed, (
                f"result {number}: relative difference {difference:.2g}, at most {allowed:g} is allowed"
            )

    return check


def same_pixels(share: float = PIXEL_SHARE) -> Callable[[Tensor, Tensor], None]:
    """Requires equal masks, except for a share of the pixels that either one sets; uint8 values may differ by 1."""

    def check(ours: Tensor, theirs: Tensor) -> None:
        assert ours.shape == theirs.shape, f"shape {list(ours.shape)} and {list(theirs.shape)}"
        assert ours.dtype == theirs.dtype, f"dtype {ours.dtype} and {theirs.dtype}"
        differ = painted = 0
        # One mask at a time, since all masks of the large case take gigabytes.
        for mine, other in zip(ours, theirs, strict=True):
            if mine.dtype == torch.bool:
                apart = mine ^ other
            else:
                apart = (mine.to(torch.int16) - other.to(torch.int16)).abs() > 1
            differ += int(apart.sum())
            painted += int(((mine != 0) | (other != 0)).sum())
        assert differ <= share * painted, f"{differ} of {painted} pixels"

    return check


def same_panoptic(ours: Any, theirs: tuple[Tensor, list[tuple[bool, int]]]) -> None:
    """Requires equal segments in equal order and, except for a few pixels, equal maps."""
    panoptic, segments = ours
    found = list(zip(segments.isthing.tolist(), segments.label.tolist(), strict=True))
    expected_map, expected = theirs
    assert found == expected, f"segments (isthing, label) {found} and {expected}"
    differ = int((panoptic != expected_map).sum())
    assert differ <= PIXEL_SHARE * panoptic.numel(), f"{differ} of {panoptic.numel()} pixels"


def same_labels(ours: Tensor, theirs: Tensor) -> None:
    """Requires equal label maps, except for a few pixels whose two best classes differ by a rounding error."""
    assert ours.shape == theirs.shape, f"shape {list(ours.shape)} and {list(theirs.shape)}"
    differ = int((ours.to(torch.int64) != theirs).sum())
    assert differ <= PIXEL_SHARE * ours.numel(), f"{differ} of {ours.numel()} pixels"


class PanopticMap(NamedTuple):
    """The panoptic prediction for one image."""

    ids: Tensor  # int32 [H, W], 0 = void, s + 1 = segment s
    isthing: Tensor  # bool [S]
    label: Tensor  # int64 [S]


def same_share(ours: Tensor, theirs: Tensor) -> float:
    """Returns the share of pixels on which two maps [H, W] have the same segments, regardless of their ids.

    Each segment of one map is matched to the segment of the other map that covers most of it. The result is the lower
    of the shares in both directions, so that joining segments does not raise it.
    """
    rows, columns = int(ours.max()) + 1, int(theirs.max()) + 1
    pairs = torch.bincount((ours.long() * columns + theirs).flatten(), minlength=rows * columns)
    counts = pairs.reshape(rows, columns)
    return float(min(counts.amax(0).sum(), counts.amax(1).sum())) / ours.numel()


def _classes(map: PanopticMap) -> Tensor:
    """Returns a number for the class of each pixel, 0 for pixels without a segment."""
    of_segment = torch.cat((map.label.new_zeros(1), 2 * map.label + map.isthing + 1))
    return of_segment[map.ids.long()]


def same_maps(least: float) -> Callable[[Sequence[PanopticMap], Sequence[PanopticMap]], None]:
    """Requires at least a share of each image's pixels to have the same segment and the same class."""

    def check(ours: Sequence[PanopticMap], theirs: Sequence[PanopticMap]) -> None:
        for mine, other in zip(ours, theirs, strict=True):
            assert len(mine.label) > 0, "our result has no segments, so there is nothing to compare"
            segments = same_share(mine.ids, other.ids)
            classes = float((_classes(mine) == _classes(other)).float().mean())
            assert min(segments, classes) >= least, (
                f"segments agree on {segments:.2%}, classes on {classes:.2%} of the pixels; {least:.2%} is required"
            )

    return check
