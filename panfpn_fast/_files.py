"""Files that appear complete or not at all, the files in the package, and the cache directory."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from panfpn_fast._errors import OutputError


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """Opens a file that appears under its name only when it is complete.

    The content goes to a temporary file in the same directory, which is then renamed. An exception inside the block
    leaves an existing file as it was. A device or a pipe, such as /dev/stdout, is written directly.

    Args:
        path: The file; an existing one is replaced.
        durable: Whether the content is flushed to the disk before the rename, so that a power failure cannot
            leave an empty file.

    Raises:
        OSError: If the file cannot be written; the message names it.
    """
    if _is_special(path):
        with open(path, "wb") as file:
            yield file
        return
    # Processes on several machines may write to one folder, and their numbers may be equal.
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError while it handles the OSError of a full disk.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None or cause.filename is not None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def prepare_folder(path: Path, name: str) -> None:
    """Makes a folder and its parents, and checks that a file can be made in it.

    Args:
        path: The folder; it may exist.
        name: Name of the argument in error messages.

    Raises:
        OutputError: If the folder cannot be made or written to.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{name}: expected a folder, got the file {path}; give another one")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"{name}: cannot write to the folder {path} ({reason}); give another one"
        ) from error


def prepare_file(path: Path, name: str) -> None:
    """Makes the folder of a file, and checks that the file can be written; an existing file stays as it is.

    Args:
        path: The file.
        name: Name of the argument in error messages.

    Raises:
        OutputError: If the path is a folder, or the file's folder cannot be made or written to.
    """
    if path.is_dir():
        raise OutputError(f"{name}: expected the path of a file, got the folder {path}; give another path")
    if not _is_special(path):
        prepare_folder(path.parent, name)


def _is_special(path: Path) -> bool:
    """Whether a path is a device or a pipe, which must not be replaced by a file."""
    return path.exists() and not path.is_file() and not path.is_dir()


def builtin_folder() -> Path:
    """Returns the folder of the networks and samples that are part of the package."""
    return Path(__file__).parent / "builtin"


def cache_dir() -> Path:
    """Returns the cache directory: `$PANFPN_CACHE`, else `$XDG_CACHE_HOME/panfpn_fast`, else `~/.cache/panfpn_fast`.

    Raises:
        RuntimeError: If none of these is set and the user has no home directory.
    """
    if chosen := os.environ.get("PANFPN_CACHE"):
        return Path(chosen).expanduser()
    # The XDG specification: unset, empty and relative values count as ~/.cache.
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "panfpn_fast"
