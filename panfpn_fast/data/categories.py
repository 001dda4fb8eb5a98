"""The classes of a data set: ids, names, colours, and what is a thing and what is stuff."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from panfpn_fast.data import category_tables as tables

__all__ = ["Categories", "Category", "get_categories", "register_categories"]


@dataclass(frozen=True)
class Category:
    """One class of a data set.

    Attributes:
        id: The data set's own id (COCO panoptic: 1..200 with gaps).
        name: The data set's own name, such as "sky-other-merged".
        isthing: True for things, which are counted (person, car); False for stuff (sky, road).
        color: The colour that the data set's authors draw it in, (R, G, B) in 0..255.
    """

    id: int
    name: str
    isthing: bool
    color: tuple[int, int, int]

    @property
    def display_name(self) -> str:
        """The name without COCO's suffixes, for pictures and summaries: "sky" for "sky-other-merged"."""
        name = self.name
        for suffix in ("-merged", "-other", "-stuff"):
            name = name.removesuffix(suffix)
        return name


@dataclass(frozen=True)
class Categories:
    """The classes of a data set; a class index is a position in `things` or in `stuff`.

    Attributes:
        name: What `get_categories` knows the set by.
        things: Thing classes in ascending id order; a network's thing class i is `things[i]`.
        stuff: Stuff classes in ascending id order; a network's semantic label i + 1 is `stuff[i]` (0 is
            'other').
    """

    name: str
    things: tuple[Category, ...]
    stuff: tuple[Category, ...]

    @property
    def all(self) -> tuple[Category, ...]:
        """Every class, things first."""
        return self.things + self.stuff


def _categories(name: str, things: Sequence[tables.Row], stuff: Sequence[tables.Row]) -> Categories:
    return Categories(
        name,
        things=tuple(Category(id_, label, True, color) for id_, label, color in things),
        stuff=tuple(Category(id_, label, False, color) for id_, label, color in stuff),
    )


_KNOWN = {
    known.name: known
    for known in (
        _categories("coco_panoptic", tables.COCO_THINGS, tables.COCO_STUFF),
        _categories("cityscapes", tables.CITYSCAPES_THINGS, tables.CITYSCAPES_STUFF),
        _categories("synthetic", tables.SYNTHETIC_THINGS, tables.SYNTHETIC_STUFF),
    )
}


def get_categories(name: str) -> Categories:
    """Returns the classes of a data set.

    Args:
        name: "coco_panoptic" (80 things, 53 stuff), "cityscapes" (8 things, 11 stuff), "synthetic" (4 and 4), or one
            that `register_categories` was given.

    Raises:
        ValueError: If there is no data set of that name; the message lists the known ones.

    Example:
        >>> coco = get_categories("coco_panoptic")
        >>> coco.things[16].name, coco.stuff[46].id, coco.stuff[39].display_name
        ('dog', 194, 'sky')
    """
    try:
        return _KNOWN[name]
    except KeyError:
        raise ValueError(f"name: expected one of {', '.join(sorted(_KNOWN))}, got {name!r}") from None


def register_categories(categories: Categories) -> None:
    """Makes the classes of another data set known by their name, so that a network can be told it.

    Raises:
        ValueError: A data set of that name is known and has other classes.
    """
    known = _KNOWN.setdefault(categories.name, categories)
    if known != categories:
        raise ValueError(f"categories: {categories.name!r} is known already, with other classes")
