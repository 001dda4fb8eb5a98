"""Settings that decide how annotations without a panoptic format are read, and the classes that result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from panfpn_fast.data.categories import Categories, listed_categories, name_list, to_categories
from panfpn_fast.data.class_check import ListedClass, check_classes
from panfpn_fast.data.files import DataError

BACKGROUND = "background"
"""Name of the stuff class of all pixels that no annotation covers."""


@dataclass(frozen=True)
class ReadingRules:
    """How annotations that are not panoptic are read.

    Attributes:
        background: "stuff": pixels that no annotation covers are the stuff class "background". "void": they belong to
            no class.
        stuff: Names of the classes that are stuff; all other classes are things.
        classes: Names of the classes, for annotations that do not list them. The first name is class 1 in id masks.
            For LabelMe, no names select all labels in alphabetical order.
        label_divisor: Meaning of the values in id masks; see `IdMasksDataset`.
        void_values: Values in id masks that are void.

    Raises:
        DataError: If a value is invalid; the message names the setting.
    """

    background: str = "stuff"
    stuff: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    label_divisor: int = 0
    void_values: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.background not in ("stuff", "void"):
            raise DataError(f"background: expected stuff or void, got {self.background!r}")
        for name in ("stuff", "classes"):
            names = getattr(self, name)
            if not all(isinstance(one, str) and one for one in names) or len(set(names)) != len(names):
                raise DataError(f"{name}: expected different names that are not empty, got {list(names)}")
        if self.label_divisor < 0:
            raise DataError(f"label_divisor: expected at least 0, got {self.label_divisor}")


class FoundClass(NamedTuple):
    """A class that annotations list.

    Attributes:
        id: Its id.
        name: Its name.
        isthing: Whether it is a thing, or None if the annotations do not state it.
        color: Its color, or None if it has none.
    """

    id: int
    name: str
    isthing: bool | None = None
    color: tuple[int, int, int] | None = None


def choose_categories(
    path: Path, found: Sequence[FoundClass], given: Categories | str | None, rules: ReadingRules
) -> Categories:
    """Returns the given classes after a comparison with those that annotations list, or makes them of these.

    Args:
        path: The file of the annotations.
        found: The classes that it lists, with unique ids.
        given: The classes, or a name for `get_categories`; None for those of the file.
        rules: See `make_categories`.

    Raises:
        ClassMismatchError: If a class is not among the given ones.
        DataError: See `make_categories`.
    """
    if given is None:
        return make_categories(path, found, rules)
    categories = to_categories(given)
    check_classes(path, [ListedClass(*one[:3]) for one in found], categories)
    return categories


def make_categories(path: Path, found: Sequence[FoundClass], rules: ReadingRules) -> Categories:
    """Makes the classes of a data set from those that its annotations list.

    Args:
        path: The file or folder of the annotations; its stem becomes the name of the set.
        found: The classes, with unique ids.
        rules: Decides which classes are stuff, and whether a class "background" is added, with the next free id.

    Raises:
        DataError: If there is no class, or there are too many, `rules.stuff` has a name that is no class, or the class
            "background" is a thing.
    """
    if not found:
        raise DataError(f"{path}: expected at least one class, found none")
    names = [one.name for one in found]
    missing = [name for name in rules.stuff if name not in names and name != BACKGROUND]
    if missing:
        raise DataError(
            f"stuff: expected classes of {path}, got {missing[0]!r}; it has {name_list(names, 6)}"
        )
    rows = [one._replace(isthing=one.isthing is not False and one.name not in rules.stuff) for one in found]
    if rules.background == "stuff":
        if BACKGROUND not in names:
            rows.append(FoundClass(max(one.id for one in found) + 1, BACKGROUND, isthing=False))
        elif any(row.name == BACKGROUND and row.isthing for row in rows):
            raise DataError(
                f"{path}: expected the class 'background' to be stuff; name it in stuff, or set background to "
                "void if it is a thing"
            )
    try:
        return listed_categories(
            path.stem, [(row.id, row.name, bool(row.isthing), row.color) for row in rows]
        )
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
