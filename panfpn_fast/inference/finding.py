"""Finds the images and videos that a source names: a file, a folder, a pattern, an address, a camera, or a list."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from panfpn_fast._errors import UserError
from panfpn_fast.data.files import DataError, MissingFileError, missing_plugin
from panfpn_fast.data.images import IMAGE_SUFFIXES, ImageReadError
from panfpn_fast.inference.download import is_address
from panfpn_fast.inference.video import VIDEO_SUFFIXES, require_av

Place = str | Path
"""The path of a file, an address, or a camera such as "camera:0"."""

STANDARD_INPUT = "-"
"""The source that stands for the paths in the standard input."""


class Found(NamedTuple):
    """The files, addresses and cameras of several sources.

    Attributes:
        places: The files, addresses and cameras, without duplicates.
        problems: A message for each source that cannot be read.
        skipped: A message for each source with files that are left out.
    """

    places: list[Place]
    problems: list[str]
    skipped: list[str]


def camera_number(source: object) -> int | None:
    """Returns the number of a camera, which is named "camera:0"; None for other sources."""
    kind, _, number = source.partition(":") if isinstance(source, str) else ("", "", "")
    return int(number) if kind == "camera" and number.isascii() and number.isdecimal() else None


def place_of(source: str | os.PathLike[str]) -> Place:
    """Returns the path, the address or the camera that a text means."""
    if isinstance(source, str) and (is_address(source) or camera_number(source) is not None):
        return source
    return Path(source)


def is_video(source: object) -> bool:
    """Whether a source is a camera, or a file or an address whose suffix is that of a video."""
    return camera_number(source) is not None or (
        isinstance(source, str | os.PathLike) and Path(file_name(source)).suffix.lower() in VIDEO_SUFFIXES
    )


def file_name(place: str | os.PathLike[str]) -> str:
    """Returns the last part of a path or of the path in an address; of a camera, its name."""
    text = os.fspath(place)
    return Path(urlsplit(text).path if is_address(text) else text).name or text


def names_several(source: str | os.PathLike[str]) -> bool:
    """Whether a source is more than one file by its name: a pattern, a folder, a list of paths or a camera."""
    if is_address(source):
        return False
    if os.path.lexists(source):
        return os.path.isdir(source)
    return _is_pattern(source) or source == STANDARD_INPUT or camera_number(source) is not None


def find_sources(
    sources: Iterable[str | os.PathLike[str]], recursive: bool = False, out: Path | None = None
) -> Found:
    """Finds the images and videos that several sources name.

    Args:
        sources: Files, folders, patterns, addresses, cameras, and "-" for a list of them in the standard input.
        recursive: Whether the folders in folders are searched.
        out: Folder of results, which are left out of folders and patterns.

    Returns:
        Each image and video once. Of a folder or a pattern these are files with the suffix of an image, in the order of
        their paths; a pattern finds videos, too.

    Raises:
        ImportError: If there is a video or a camera and PyAV is not installed.
    """
    found = Found([], [], [])
    places: dict[Place, Place] = {}
    for source in sources:
        try:
            listed = _listed(source)
        except UserError as error:
            found.problems.append(str(error))
            continue
        for one in listed:
            try:
                for place in _find(one, recursive, out, found):
                    if is_video(place):
                        require_av()
                    places.setdefault(place.resolve() if isinstance(place, Path) else place, place)
            except UserError as error:
                found.problems.append(str(error))
    return found._replace(places=list(places.values()))


def find_source(source: str | os.PathLike[str]) -> list[Place]:
    """Finds the images and videos that one source names.

    Raises:
        FileNotFoundError: If it does not exist.
        ImageReadError: If it cannot be opened.
        ValueError: If a folder or a pattern has no images, or a source in the standard input is wrong.
        ImportError: If there is a video or a camera and PyAV is not installed.
    """
    found = Found([], [], [])
    places = [place for one in _listed(source) for place in _find(one, False, None, found)]
    if any(map(is_video, places)):
        require_av()
    return places


def _find(source: str | os.PathLike[str], recursive: bool, out: Path | None, found: Found) -> Iterator[Place]:
    text = os.fspath(source)
    if is_address(text) or (camera_number(text) is not None and not os.path.lexists(text)):
        yield text
        return
    path = Path(source)
    try:
        is_folder = path.is_dir()
        if not is_folder:
            path.stat()
    except FileNotFoundError:
        if not _is_pattern(text):
            raise MissingFileError(f"{text}: no such file") from None
        yield from _search(
            text, [Path(name) for name in sorted(glob.glob(text, recursive=True))], False, out, found
        )
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ImageReadError(f"{text}: {getattr(error, 'strerror', '') or error}") from None
    else:
        if is_folder:
            yield from _search(text, _files(path, recursive), recursive, out, found)
        else:
            yield path


def _is_pattern(source: str | os.PathLike[str]) -> bool:
    return glob.has_magic(os.fspath(source))


def _listed(source: str | os.PathLike[str]) -> Sequence[str | os.PathLike[str]]:
    """Returns the source itself; for "-", the lines of the standard input, without empty ones."""
    if source != STANDARD_INPUT:
        return [source]
    content = sys.stdin.buffer.read() if sys.stdin is not None else b""
    if b"\0" in content:
        raise DataError(
            "-: expected paths in the standard input, one a line, got other data; pass the file's path"
        )
    lines = [os.fsdecode(line.removesuffix(b"\r")) for line in content.split(b"\n")]
    if not any(lines):
        raise DataError("-: expected paths in the standard input, one a line, got nothing")
    return [line for line in lines if line]


def _files(folder: Path, recursive: bool) -> list[Path]:
    """Returns what is in a folder, and in the folders in it, which are left out then."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise ImageReadError(f"{folder}: {error.strerror or error}") from None
    if not recursive:
        return inside
    files = []
    for path in inside:
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):  # a link may lead back
            files += _files(path, recursive)
        else:
            files.append(path)
    return files


def _search(text: str, paths: list[Path], recursive: bool, out: Path | None, found: Found) -> Iterator[Place]:
    """Yields the images among the paths that a folder or a pattern gives; counts the others by kind."""
    pattern = not os.path.isdir(text)
    results = _Results(out)
    skipped: Counter[str] = Counter()
    taken = 0
    for path in paths:
        kind = _kind_to_skip(path, pattern, results)
        if kind:
            skipped[kind] += 1
        else:
            taken += 1
            yield path
    counted = ", ".join(f"{n} {kind.replace('*', 's' * (n > 1))}" for kind, n in sorted(skipped.items()))
    if taken:
        found.skipped.extend([f"{text}: skipped {counted}"] * bool(skipped))
        return
    ending = f"; it has {counted}" if skipped else ""
    if pattern:
        raise DataError(f"{text}: no image or video has such a name{ending}")
    within = "" if recursive else " (its subfolders are not searched)"
    raise DataError(f"{text}: no images in this folder{within}{ending}")


class _Results:
    """Tells the results in the folder that a run writes to from the images there."""

    def __init__(self, out: Path | None) -> None:
        self._out = None if out is None else out.resolve()

    def __contains__(self, path: Path) -> bool:
        if self._out is None:
            return False
        folder, maps = path.parent.resolve(), self._out / "predictions"
        name = path.stem.removesuffix("_overlay")
        if folder != self._out or name == path.stem:
            return folder == maps
        return (maps / f"{name}.png").is_file() or (self._out / f"{name}_segments.jsonl").is_file()


def _kind_to_skip(path: Path, pattern: bool, results: _Results) -> str:
    """Returns the kind of a file that is left out, with a star for the s of its plural; an empty text for an image."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return "folder*"
    if path.name.startswith("."):
        return "hidden file*"
    if not path.is_file():
        return "broken link* or device*"
    if path in results:
        return "result* of predict"
    if suffix in VIDEO_SUFFIXES:
        return "" if pattern else f"video* ({suffix})"
    if suffix not in IMAGE_SUFFIXES:
        return f"{suffix} file*" if suffix else "file* without suffix"
    missing = missing_plugin(suffix)
    return f"{suffix} file* ({missing})" if missing else ""
