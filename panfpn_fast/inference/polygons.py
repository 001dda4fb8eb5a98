"""The outlines of a mask as polygons along the edges of its pixels."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt

Point = tuple[int, int]  # x, y


def mask_polygons(mask: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Returns the polygons that cover exactly the pixels of a mask.

    Pixel (x, y) is the square between (x, y) and (x + 1, y + 1). There is one polygon for each group of pixels that
    are connected by their edges. A hole is joined to the outline around it by a cut, a line that the polygon follows
    in both directions, because polygons in COCO's format have no holes.

    Args:
        mask: bool [H, W].

    Returns:
        x1, y1, x2, y2, ... of each polygon, clockwise, ordered by their topmost corners.

    Example:
        >>> mask_polygons(np.array([[True, True, False], [False, True, False]]))
        [[0, 0, 2, 0, 2, 2, 1, 2, 1, 1, 0, 1]]
    """
    outlines = _Outlines(mask)
    return [[side for point in outlines.polygon(ring) for side in point] for ring in outlines.outer]


class _Outlines:
    """The corners of a mask's outlines, the rings that they form, and the cuts from holes to other rings.

    Where two pixels touch at one point only, two rings meet, and the corner is listed twice.
    """

    def __init__(self, mask: npt.NDArray[np.bool_]) -> None:
        self._mask = np.pad(mask, 1)
        upper_left, upper_right = self._mask[:-1, :-1], self._mask[:-1, 1:]
        lower_left, lower_right = self._mask[1:, :-1], self._mask[1:, 1:]
        # A grid point is a corner if one or three of the four pixels around it are set, and a crossing if only two
        # diagonally opposite ones are.
        crossing = (upper_left == lower_right) & (upper_right == lower_left) & (upper_left != upper_right)
        y, x = np.nonzero((upper_left ^ upper_right ^ lower_left ^ lower_right) | crossing)
        copies = 1 + crossing[y, x].astype(np.int64)
        y, x = y.repeat(copies), x.repeat(copies)
        # The first copy of a crossing ends the line from the left, and the second copy begins the line to the right.
        second = np.zeros(len(x), dtype=bool)
        second[1:] = (x[1:] == x[:-1]) & (y[1:] == y[:-1])
        # One of them ends the line from above: the first one if the pixel on the upper left is set.
        begins_down = np.where(upper_left[y, x], second, ~second)
        self._by_column = np.lexsort((begins_down, y, x))
        self._key = (x * len(self._mask) + y)[self._by_column]
        self._points: list[Point] = list(zip(x.tolist(), y.tolist(), strict=True))
        self._rings = self._trace()
        # By corner: the hole that is joined to it, and the holes that are joined to the line below it.
        self._at: dict[int, int] = {}
        self._along: dict[int, list[tuple[Point, int]]] = defaultdict(list)
        self.outer: list[int] = []
        self._holes: set[int] = set()
        for number, ring in enumerate(self._rings):
            x0, y0 = self._points[ring[0]]
            if self._mask[y0 + 1, x0 + 1]:
                self.outer.append(number)
            else:
                self._holes.add(number)
                self._join(number, x0, y0)

    def _trace(self) -> list[list[int]]:
        """Follows the lines, which join the corners of each row, and of each column, two by two."""
        count = len(self._points)
        other = np.arange(count) ^ 1
        down = np.empty(count, dtype=np.int64)
        down[self._by_column] = self._by_column[other]
        across, vertical = other.tolist(), down.tolist()
        seen = [False] * count
        rings = []
        for start in range(count):
            ring: list[int] = []
            here = start  # topmost and leftmost in its ring, so its lines go right and down
            while not seen[here]:
                there = across[here]
                seen[here] = seen[there] = True
                ring += (here, there)
                here = vertical[there]
            if ring:
                rings.append(ring)
        return rings

    def _join(self, hole: int, x: int, y: int) -> None:
        """Cuts from a hole's first corner to the left, through set pixels, to another ring."""
        inside = self._mask[y, : x + 1] & self._mask[y + 1, : x + 1]
        end = int(np.flatnonzero(~inside)[-1])
        key = end * len(self._mask) + y
        place = int(np.searchsorted(self._key, key, side="right")) - 1
        corner = int(self._by_column[place])
        if self._key[place] == key:
            self._at[corner] = hole
        else:
            self._along[corner].append(((end, y), hole))

    def polygon(self, ring: int) -> list[Point]:
        """Returns the corners of a ring and of the holes that are joined to it."""
        polygon: list[Point] = []
        pending = [iter(self._stops(ring))]
        while pending:  # not by recursion, because holes can be joined in long chains
            for point, hole in pending[-1]:
                polygon.append(point)
                if hole is not None:
                    pending.append(iter(self._stops(hole)))
                    break
            else:
                pending.pop()
        return polygon

    def _stops(self, number: int) -> list[tuple[Point, int | None]]:
        """Returns the points of a ring in order, each with the hole to visit there; that point follows once more."""
        ring = self._rings[number]
        if number in self._holes:
            ring = [ring[0], *ring[:0:-1]]  # the other way round, so that the mask is on the same side
        stops: list[tuple[Point, int | None]] = []
        for here, there in zip(ring, [*ring[1:], ring[0]], strict=True):
            point, following = self._points[here], self._points[there]
            if here in self._at:
                stops.append((point, self._at[here]))
            stops.append((point, None))
            if point[0] == following[0]:
                downwards = point[1] < following[1]
                for cut in sorted(self._along.get(here if downwards else there, ()), reverse=not downwards):
                    stops += (cut, (cut[0], None))
        if number in self._holes:
            stops.append((self._points[ring[0]], None))
        return stops
