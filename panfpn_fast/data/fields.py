"""Checks the fields of entries in annotation files; errors name the file, the entry and the field."""

from __future__ import annotations

import math
import reprlib
from pathlib import Path
from typing import Any

from panfpn_fast.data.files import DataError

MAX_INTEGER = 2**31 - 1
"""Largest id of a category, and largest number of pixels."""


# The text of a nested value can be exponentially long: YAML can repeat a part of the file by its name.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


class Fields:
    """One entry of an annotation file; each method returns a field and checks its type and range.

    Args:
        path: The file, for messages.
        where: Name of the entry in messages, such as "annotations[3]"; empty for the whole file.
        entry: The entry as the file has it.

    Raises:
        DataError: If the entry is no object. All methods raise it if the field is missing or wrong.
    """

    def __init__(self, path: Path, where: str, entry: object) -> None:
        self.path, self.where = path, where
        if not isinstance(entry, dict):
            raise DataError(f"{path}: {where or 'content'}: expected an object, got {short(entry)}")
        self.entry: dict[str, Any] = entry

    def error(self, key: str, expected: str) -> DataError:
        """Returns the error that a field is not as expected."""
        name = f"{self.where}.{key}" if self.where else key
        return DataError(f"{self.path}: {name}: expected {expected}, got {short(self.entry.get(key))}")

    def value(self, key: str) -> Any:
        """Returns the field, which is not checked."""
        if key not in self.entry:
            raise DataError(f"{self.path}: {self.where}{' ' if self.where else ''}lacks {key!r}")
        return self.entry[key]

    def image_id(self, key: str) -> int | str:
        """Returns an id of an image, an integer or a string."""
        value = self.value(key)
        if isinstance(value, str) or is_integer(value, -MAX_INTEGER, 2**63 - 1):
            return value  # type: ignore[no-any-return]
        raise self.error(key, "an integer or a string")

    def integer(self, key: str, low: int, high: int) -> int:
        """Returns an integer in low..high."""
        value = self.value(key)
        if not is_integer(value, low, high):
            raise self.error(key, f"an integer in {low}..{high}")
        return value  # type: ignore[no-any-return]

    def text(self, key: str) -> str:
        """Returns a string that is not empty."""
        value = self.value(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a string that is not empty")
        return value

    def list_of(self, key: str) -> list[Any]:
        """Returns a list, whose elements are not checked."""
        value = self.value(key)
        if not isinstance(value, list):
            raise self.error(key, "a list")
        return value

    def flag(self, key: str, default: bool | None = None) -> int:
        """Returns 0 or 1; with a default, the field may be absent."""
        if default is not None and key not in self.entry:
            return int(default)
        value = self.value(key)
        if not isinstance(value, int) or value not in (0, 1):  # false and true are integers here
            raise self.error(key, "0 or 1")
        return int(value)

    def area(self, key: str) -> float:
        """Returns a number of pixels."""
        value = self.value(key)
        number = isinstance(value, float) and math.isfinite(value) and 0 <= value <= MAX_INTEGER
        if not number and not is_integer(value, 0, MAX_INTEGER):
            raise self.error(key, "a number of pixels, at least 0")
        return value  # type: ignore[no-any-return]

    def color(self, key: str) -> tuple[int, int, int] | None:
        """Returns a color, or None if the entry has none."""
        if key not in self.entry:
            return None
        value = self.entry[key]
        if isinstance(value, list | tuple) and len(value) == 3 and all(is_integer(v, 0, 255) for v in value):
            return (value[0], value[1], value[2])
        raise self.error(key, "three integers in 0..255")


def is_integer(value: object, low: int, high: int) -> bool:
    """Whether a value is an integer in low..high; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def short(value: object) -> str:
    """Returns a value for a message, with at most 40 characters."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:37]}..."
