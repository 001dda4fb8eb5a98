"""Errors that the user can fix."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix: a setting, an argument, or a missing or damaged file.

    The message names it in one line. The command line prints that line without a traceback.
    """


class OutputError(OSError, UserError):
    """A file or a folder cannot be written; the message names the argument and the path."""


def one_line(error: BaseException) -> str:
    """Returns an error's message on one line, or its type if it has no message.

    An operating system error about a file gives the file and the reason.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = error.filename if error.filename2 is None else error.filename2
        return f"{os.fsdecode(name) if isinstance(name, str | bytes) else name}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def similar(name: str, known: Iterable[str], most: int = 3) -> str:
    """Returns the names that are most similar to a misspelt one, separated by commas."""
    # The last parts are compared too, because users leave out what is before them.
    scores = {
        one: max(
            difflib.SequenceMatcher(None, name.lower(), part.lower()).ratio()
            for part in (one, one.rpartition(".")[2], one.rpartition("/")[2])
        )
        for one in known
    }
    return ", ".join(sorted(scores, key=lambda one: -scores[one])[:most])
