"""When two results count as the same. Where rounding decides, only a small share may fall on the other side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Compilers contract multiply-adds on the GPU, each in its own way, so what hangs on the last bit may differ there.
_CUDA_SHARE = 2e-3

# Pixels whose interpolated value is this close to the threshold are few: one in ten thousand is on the safe side.
PIXEL_SHARE = 1e-4


def _share_on(tensor: Tensor) -> float:
    return _CUDA_SHARE if tensor.device.type == "cuda" else 0.0


def same_kept(share: float = 0.0) -> Callable[[Tensor, Tensor], None]:
    """Demands the same kept indices in the same order; on CUDA, or with a `share`, that few boxes differ."""

    def check(ours: Tensor, theirs: Tensor) -> None:
        allowed = max(share, _share_on(ours))
        if allowed == 0:
            assert torch.equal(ours, theirs), (
                f"{len(ours)} boxes kept, {len(theirs)} by the peer, not the same"
            )
            return
        differ = len(set(ours.tolist()) ^ set(theirs.tolist()))
        assert differ <= allowed * max(len(ours), 1), f"{differ} boxes are kept by one of them only"

    return check


def close_features(ours: Tensor, theirs: Tensor) -> None:
    """Demands equal means of bilinear samples of normally distributed features, up to rounding.

    Coordinates up to 336 are rounded to 3e-5 pixels, and neighbours differ by up to ten. Half-precision results may
    be one rounding step apart.
    """
    assert ours.shape == theirs.shape, f"shape {list(ours.shape)} and {list(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"dtype {ours.dtype} and {theirs.dtype}"
    relative = 1e-4 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps
    apart = ~torch.isclose(ours, theirs, rtol=relative, atol=5e-4)
    count = int(apart.sum())
    worst = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    assert count <= _share_on(ours) * ours.numel(), f"{count} of {ours.numel()} values, by up to {worst:.2g}"


def same_pixels(share: float = PIXEL_SHARE) -> Callable[[Tensor, Tensor], None]:
    """Demands equal masks or values, but for a share of the pixels that either of them sets; uint8 may differ by 1."""

    def check(ours: Tensor, theirs: Tensor) -> None:
        assert ours.shape == theirs.shape, f"shape {list(ours.shape)} and {list(theirs.shape)}"
        assert ours.dtype == theirs.dtype, f"dtype {ours.dtype} and {theirs.dtype}"
        differ = painted = 0
        # One mask at a time: all of them are gigabytes in the large case.
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
    """Demands the same segments in the same order and, but for few pixels, the same map."""
    panoptic, segments = ours
    found = list(zip(segments.isthing.tolist(), segments.label.tolist(), strict=True))
    expected_map, expected = theirs
    assert found == expected, f"segments (isthing, label) {found} and {expected}"
    differ = int((panoptic != expected_map).sum())
    assert differ <= PIXEL_SHARE * panoptic.numel(), f"{differ} of {panoptic.numel()} pixels"


def same_labels(ours: Tensor, theirs: Tensor) -> None:
    """Demands equal label maps, but for a few pixels whose two best classes differ by a rounding error."""
    assert ours.shape == theirs.shape, f"shape {list(ours.shape)} and {list(theirs.shape)}"
    differ = int((ours.to(torch.int64) != theirs).sum())
    assert differ <= PIXEL_SHARE * ours.numel(), f"{differ} of {ours.numel()} pixels"


class PanopticMap(NamedTuple):
    """A prediction of one image."""

    ids: Tensor  # int32 [H, W], 0 = void, s + 1 = segment s
    isthing: Tensor  # bool [S]
    label: Tensor  # int64 [S]


def same_share(ours: Tensor, theirs: Tensor) -> float:
    """Share of the pixels on which two maps [H, W] have the same segments, whatever their ids.

    A segment is taken for the one that has most of its pixels. Of the shares in both directions the lower counts, so
    that joining segments does not pay.
    """
    rows, columns = int(ours.max()) + 1, int(theirs.max()) + 1
    pairs = torch.bincount((ours.long() * columns + theirs).flatten(), minlength=rows * columns)
    counts = pairs.reshape(rows, columns)
    return float(min(counts.amax(0).sum(), counts.amax(1).sum())) / ours.numel()


def _classes(map: PanopticMap) -> Tensor:
    """A number for the class of each pixel, 0 where there is none."""
    of_segment = torch.cat((map.label.new_zeros(1), 2 * map.label + map.isthing + 1))
    return of_segment[map.ids.long()]


def same_maps(least: float) -> Callable[[Sequence[PanopticMap], Sequence[PanopticMap]], None]:
    """Demands that of each image's pixels a share, at least, has the same segment and the same class."""

    def check(ours: Sequence[PanopticMap], theirs: Sequence[PanopticMap]) -> None:
        for mine, other in zip(ours, theirs, strict=True):
            assert len(mine.label) > 0, "no segments, so nothing is compared"
            segments = same_share(mine.ids, other.ids)
            classes = float((_classes(mine) == _classes(other)).float().mean())
            assert min(segments, classes) >= least, (
                f"segments agree on {segments:.2%}, classes on {classes:.2%} of the pixels, not on {least:.2%}"
            )

    return check
