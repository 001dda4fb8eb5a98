"""Compares the classes that an annotation file lists with the classes that it is read with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from panfpn_fast.data.categories import Categories, class_list, name_list
from panfpn_fast.data.fields import short
from panfpn_fast.data.files import DataError


class ClassMismatchError(DataError):
    """Annotations have classes that a network, or the data that it learns from, does not have."""


class ListedClass(NamedTuple):
    """A class as a file lists it.

    Attributes:
        id: Its id.
        name: Its name, or None if the file does not state it.
        isthing: Whether it is a thing, or None if the file does not state it.
    """

    id: int
    name: str | None
    isthing: bool | None


def check_classes(path: Path, listed: Sequence[ListedClass], given: Categories) -> None:
    """Checks that every class of a file is among the given classes, with the same name and kind.

    Given classes may be missing from the file: a small data set need not have all classes of a network.

    Args:
        path: The file, for messages.
        listed: Its classes.
        given: The classes that the file is read with.

    Raises:
        ClassMismatchError: If a class differs. The message has both lists, shortened.
    """
    known = {category.id: category for category in given.all}
    for one in listed:
        mine = known.get(one.id)
        if mine is None:
            problem = (
                f"category {one.id} is {short(one.name)}, an id that the given classes ({given.name}) lack"
            )
        elif (one.name or mine.name, mine.isthing if one.isthing is None else one.isthing) != mine[1:3]:
            isthing = mine.isthing if one.isthing is None else one.isthing
            problem = (
                f"category {one.id} is {short(one.name or mine.name)} ({_kind(isthing)}), but {short(mine.name)} "
                f"({_kind(mine.isthing)}) in the given classes ({given.name})"
            )
        else:
            continue
        names = name_list([f"{one.id} {one.name or '(no name)'}" for one in listed])
        raise ClassMismatchError(f"{path}: {problem}. File: {names}. Given: {class_list(given.all)}")


def check_names(path: Path, names: Sequence[str], given: Categories) -> None:
    """Checks that annotations without ids have only names of the given classes.

    Args:
        path: The file or folder of the annotations, for messages.
        names: The names in it.
        given: The classes that it is read with.

    Raises:
        ClassMismatchError: If a name is missing from the given classes. The message has both lists, shortened.
    """
    known = {category.name for category in given.all}
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise ClassMismatchError(
            f"{path}: {short(missing)} is not among the given classes ({given.name}). Annotations: "
            f"{name_list(names)}. "
            f"Given: {class_list(given.all)}"
        )


def _kind(isthing: bool) -> str:
    return "thing" if isthing else "stuff"
