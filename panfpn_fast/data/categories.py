"""The classes of a dataset: ids, names, colors, and the division into things and stuff."""

from __future__ import annotations

import colorsys
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from panfpn_fast.data import category_tables as tables

__all__ = ["Categories", "Category", "get_categories"]

MAX_STUFF = 4095
"""The largest number of stuff classes: `ops.panoptic_merge` takes labels up to this number."""

NUMBERED = "numbered"
"""Name of the sets that `numbered_categories` makes."""

_MAX_ID = 2**31 - 1


class Category(NamedTuple):
    """One class of a dataset.

    Attributes:
        id: Id of the class in the dataset (COCO panoptic: 1..200 with gaps), in 0..2147483647.
        name: Name of the class in the dataset, such as "sky-other-merged". Several classes may have one name.
        isthing: True for things, which are countable (person, car); False for stuff (sky, road).
        color: Color of the class in the dataset's own visualizations, (R, G, B) in 0..255.
    """

    id: int
    name: str
    isthing: bool
    color: tuple[int, int, int]

    @property
    def display_name(self) -> str:
        """The name without COCO's suffixes, for drawings and summaries: "sky" for "sky-other-merged"."""
        name = self.name
        for suffix in ("-merged", "-other", "-stuff"):
            name = name.removesuffix(suffix)
        return name


@dataclass(frozen=True, eq=False, repr=False)
class Categories:
    """The classes of a dataset. A class index is a position in `things` or in `stuff`.

    Networks, datasets and results each hold such an object. The constructor converts rows of id, name, whether the
    class is a thing, and color, as in JSON, to `Category` tuples.

    Attributes:
        name: Name of the set in messages. The set of a dataset in COCO's format has the name of its JSON file.
        things: Thing classes in ascending order of ids. Thing class i of a network is `things[i]`.
        stuff: Stuff classes in ascending order of ids, at most 4095. Semantic label i + 1 of a network is `stuff[i]`,
            and 0 is all things.

    Raises:
        ValueError: If a row has a wrong shape or value, is in the wrong group, or repeats an id, or there are too many
            stuff classes.

    Note:
        Two objects are equal if their classes have the same ids and names in the same order. Colors and the name of
        the set are not compared, because they do not change the meaning of a prediction: a copy of an annotation file
        with another name or other colors has the same classes.

    Example:
        >>> Categories("cells", things=[[1, "cell", True, [220, 20, 60]]], stuff=[[2, "glass", False, [90, 90, 90]]])
        Categories('cells', things: cell; stuff: glass)
    """

    name: str
    things: tuple[Category, ...]
    stuff: tuple[Category, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name: expected a string, got {self.name!r}")
        for group, isthing in (("things", True), ("stuff", False)):
            rows = getattr(self, group)
            if not isinstance(rows, list | tuple):
                raise ValueError(f"{group}: expected a list or tuple of classes, got {rows!r}")
            found = tuple(_category(row, f"{group}[{i}]", isthing) for i, row in enumerate(rows))
            object.__setattr__(self, group, found)
        if len(self.stuff) > MAX_STUFF:
            raise ValueError(f"stuff: expected at most {MAX_STUFF} classes, got {len(self.stuff)}")
        [(id_, count)] = Counter(c.id for c in self.all).most_common(1) or [(0, 0)]
        if count > 1:
            raise ValueError(f"things, stuff: expected unique ids, got {count} classes with the id {id_}")

    @property
    def all(self) -> tuple[Category, ...]:
        """All classes, things first."""
        return self.things + self.stuff

    def unique_names(self) -> dict[int, str]:
        """Returns a name of each class by its id, for tables: with the id where several classes have one name.

        Example:
            >>> window = [[1, "window", True, [0, 0, 0]]], [[2, "window", False, [0, 0, 0]]]
            >>> Categories("houses", *window).unique_names()
            {1: 'window (id 1)', 2: 'window (id 2)'}
        """
        count = Counter(c.name for c in self.all)
        names = {c.id: c.name if count[c.name] == 1 else f"{c.name} (id {c.id})" for c in self.all}
        if len(set(names.values())) == len(names):
            return names
        return {c.id: f"{c.name} (id {c.id})" for c in self.all}  # a name is "window (id 1)"

    def difference(self, other: Categories) -> str:
        """Describes the first difference from `other`, or returns an empty string if the two are equal."""
        for group, kind in (("things", "thing"), ("stuff", "stuff")):
            mine, theirs = getattr(self, group), getattr(other, group)
            if len(mine) != len(theirs):
                return f"{len(mine)} {kind} classes instead of {len(theirs)}"
            for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                if (a.id, a.name) != (b.id, b.name):
                    return f"{group}[{i}] is {a.name!r} with id {a.id} instead of {b.name!r} with id {b.id}"
        return ""

    def compared_with(self, network: Categories) -> str:
        """Describes how the classes of data differ from a network's, with both lists; empty if they are equal."""
        first = self.difference(network)
        return first and f"{first}. Data: {class_list(self.all)}. Network: {class_list(network.all)}"

    def __eq__(self, other: object) -> bool:
        """Returns whether ids and names are equal and in the same order."""
        if not isinstance(other, Categories):
            return NotImplemented
        return self._compared() == other._compared()

    def __hash__(self) -> int:
        """Returns a hash of the compared fields."""
        return hash(self._compared())

    def _compared(self) -> tuple[tuple[int, str, bool], ...]:
        return tuple((c.id, c.name, c.isthing) for c in self.all)

    def __repr__(self) -> str:
        """Returns the name of the set and its first classes, because all classes of COCO would fill the screen."""
        return f"Categories({self.name!r}, things: {_names(self.things)}; stuff: {_names(self.stuff)})"


def _category(row: Any, where: str, isthing: bool) -> Category:
    try:
        id_, name, is_a_thing, (red, green, blue) = row
        color = (operator.index(red), operator.index(green), operator.index(blue))
        category = Category(operator.index(id_), name, bool(is_a_thing), color)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected (id, name, isthing, (R, G, B)), got {row!r}") from None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: expected a nonempty string as the name, got {name!r}")
    if is_a_thing != isthing:
        raise ValueError(f"{where}: expected isthing to be {isthing}, got {row!r}")
    if not 0 <= category.id <= _MAX_ID:
        raise ValueError(f"{where}: expected an id in 0..{_MAX_ID}, got {category.id}")
    if not all(0 <= channel <= 255 for channel in color):
        raise ValueError(f"{where}: expected a color of three integers in 0..255, got {color}")
    return category


def _names(group: Sequence[Category]) -> str:
    names = [category.name for category in group[:3]]
    if len(group) > len(names):
        names.append(f"{len(group) - len(names)} more")
    return ", ".join(names) or "none"


def _built_in(name: str, things: Sequence[tables.Row], stuff: Sequence[tables.Row]) -> Categories:
    return Categories(
        name,
        things=tuple(Category(id_, label, True, color) for id_, label, color in things),
        stuff=tuple(Category(id_, label, False, color) for id_, label, color in stuff),
    )


BUILT_IN: Mapping[str, Categories] = MappingProxyType(
    {
        categories.name: categories
        for categories in (
            _built_in("cityscapes", tables.CITYSCAPES_THINGS, tables.CITYSCAPES_STUFF),
            _built_in("coco_panoptic", tables.COCO_THINGS, tables.COCO_STUFF),
            _built_in("synthetic", tables.SYNTHETIC_THINGS, tables.SYNTHETIC_STUFF),
        )
    }
)
"""The built-in sets of classes by name."""


def get_categories(name: str) -> Categories:
    """Returns a built-in set of classes.

    Args:
        name: "coco_panoptic" (80 things, 53 stuff), "cityscapes" (8 things, 11 stuff) or "synthetic" (4 and 4).

    Raises:
        ValueError: If no built-in set has the name; the message lists all names.

    Example:
        >>> coco = get_categories("coco_panoptic")
        >>> coco.things[16].name, coco.stuff[46].id, coco.stuff[39].display_name
        ('dog', 194, 'sky')
    """
    try:
        return BUILT_IN[name]
    except KeyError:
        raise ValueError(f"name: expected one of {', '.join(BUILT_IN)}, got {name!r}") from None


def to_categories(value: object) -> Categories:
    """Converts the value of an argument `categories` to a `Categories` object.

    Args:
        value: A `Categories` object, a name for `get_categories`, or a mapping of the fields of a `Categories` object,
            as returned by `dataclasses.asdict` or read from JSON.

    Raises:
        ValueError: If `value` is anything else, or a field has an invalid value.
    """
    if isinstance(value, Categories):
        return value
    if isinstance(value, str) and value in BUILT_IN:
        return BUILT_IN[value]
    if isinstance(value, Mapping) and value.keys() == Categories.__dataclass_fields__.keys():
        try:
            return Categories(**value)
        except ValueError as error:
            raise ValueError(f"categories: {error}") from None
    raise ValueError(
        f"categories: expected a Categories object or one of {', '.join(BUILT_IN)}, got {value!r}"
    )


def listed_categories(
    name: str, rows: Iterable[tuple[int, str, bool, tuple[int, int, int] | None]]
) -> Categories:
    """Makes classes of rows in any order; those without a color get one.

    Args:
        name: Name of the set.
        rows: Id, name, whether the class is a thing, and color or None of each class.

    Raises:
        ValueError: If two rows have one id, or there are too many stuff classes.
    """
    rows = sorted(rows, key=lambda row: row[0])
    colors = fill_colors([color for *_, color in rows])
    classes = [Category(*row[:3], color) for row, color in zip(rows, colors, strict=True)]
    things, stuff = (tuple(c for c in classes if c.isthing == isthing) for isthing in (True, False))
    return Categories(name, things, stuff)


def numbered_categories(num_things: int, num_stuff: int) -> Categories:
    """Returns numbered classes for a network whose classes have no names: "thing 1", ..., "stuff 1", ...

    The ids count from 1, things first.
    """
    names = [f"thing {i + 1}" for i in range(num_things)] + [f"stuff {i + 1}" for i in range(num_stuff)]
    return listed_categories(NUMBERED, [(i, name, i <= num_things, None) for i, name in enumerate(names, 1)])


def fill_colors(colors: Sequence[tuple[int, int, int] | None]) -> list[tuple[int, int, int]]:
    """Gives each class without a color one that differs from those of the other classes.

    The result depends only on the argument. Each new color is the one among some saturated colors that is farthest
    from all colors before it, which include all given ones.

    Args:
        colors: Colors (R, G, B) of the classes in 0..255, None for a class without one.

    Returns:
        The colors of all classes, in the same order.

    Example:
        >>> fill_colors([None, (0, 0, 0), None])
        [(140, 250, 255), (0, 0, 0), (230, 86, 69)]
    """
    taken = [color for color in colors if color is not None]
    filled = []
    for number, color in enumerate(colors):
        if color is None:
            candidates = [_color(_CANDIDATES * number + i) for i in range(_CANDIDATES)]
            near = np.array(taken[-_COMPARED:] or [(128, 128, 128)])
            distances = np.square(np.array(candidates)[:, None] - near).sum(axis=2).min(axis=1)
            color = candidates[int(distances.argmax())]
            taken.append(color)
        filled.append(color)
    return filled


# A new color is chosen among so many candidates, and compared with so many colors before it.
_CANDIDATES, _COMPARED = 48, 128


def _color(number: int) -> tuple[int, int, int]:
    """Returns a color of a sequence that covers all hues at three levels of saturation and value."""
    saturation, value = ((0.7, 0.9), (0.9, 0.6), (0.45, 1.0))[number % 3]
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, saturation, value)
    return (round(255 * red), round(255 * green), round(255 * blue))


def class_list(classes: Sequence[Category], most: int = 4) -> str:
    """Returns ids and names of classes for a message, shortened: "1 cell, 2 glass (stuff) and 3 more"."""
    return name_list(
        [f"{c.id} {c.name}" for c in classes], most, [" (stuff)" * (not c.isthing) for c in classes]
    )


def name_list(names: Sequence[str], most: int = 4, endings: Sequence[str] = ()) -> str:
    """Returns names for a message, shortened: "cell, glass and 3 more"."""
    shown = [name if len(name) <= 30 else f"{name[:27]}..." for name in names[:most]]
    shown = [f"{name}{ending}" for name, ending in zip(shown, endings or [""] * most, strict=False)]
    rest = len(names) - len(shown)
    return ", ".join(shown or ["none"]) + (f" and {rest} more" if rest else "")
