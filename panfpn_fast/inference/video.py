"""Reads the frames of videos and cameras, and writes videos. PyAV is imported only here, and only when it is needed."""

from __future__ import annotations

import glob
import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from panfpn_fast._errors import OutputError, one_line
from panfpn_fast._files import atomic_write
from panfpn_fast.data.files import MissingFileError
from panfpn_fast.data.images import ImageArray, ImageReadError

VIDEO_SUFFIXES = frozenset(
    {
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".webm",
        ".wmv",
    }
)

# Before, it crashes on some MPEG files, and writes BT.601 colors in files of BT.709.
_OLDEST = 17
# PyAV's wheels have the first one. All players play it as MP4, and mpeg4 in the others.
_ENCODERS = ("libx264", "libopenh264", "mpeg4")
# A denominator of MPEG-4's time base has at most 16 bits; 1/60000 s is exact for most rates.
_TICKS = 60_000
_RATE = Fraction(30)
_BT709, _LIMITED, _FULL = 1, 1, 2


class VideoFrame(NamedTuple):
    """A frame: uint8 RGB [H, W, 3], its number from 1, and its time in seconds after the first frame."""

    image: ImageArray
    number: int
    time: Fraction


class VideoFacts(NamedTuple):
    """The mean number of frames per second, and the number of frames; each None if the file does not tell."""

    rate: Fraction | None
    frames: int | None


def require_av() -> Any:
    """Imports PyAV.

    Raises:
        ImportError: If it is not installed or too old; the message has the command.
    """
    try:
        av = importlib.import_module("av")
        if int(av.__version__.partition(".")[0]) < _OLDEST:
            raise ImportError(f"PyAV {av.__version__} is too old")
    except ImportError as error:
        raise ImportError(
            f'videos and cameras need PyAV ({error}): pip install "panfpn_fast[video]", or '
            f'pip install "av>={_OLDEST}"'
        ) from error
    return av


def read_video(path: str | os.PathLike[str], every: int = 1) -> Iterator[VideoFrame]:
    """Reads the frames of a video file one by one, turned upright by the rotation in the file.

    Args:
        path: The file. Of several video streams, the first one is read.
        every: Yields each `every`-th frame, beginning with the first one.

    Yields:
        The frames, in the order in which they are shown.

    Raises:
        ImportError: If PyAV is not installed.
        FileNotFoundError: If the file does not exist.
        ImageReadError: If the file cannot be opened, has no video, or is damaged. A damaged file may yield frames
            first.
    """
    with ExitStack() as stack:
        container = _open_file(path, stack)
        yield from _frames(container, os.fspath(path), every)


def video_facts(path: str | os.PathLike[str]) -> VideoFacts:
    """Returns the rate and the number of frames that a video file states; the errors are those of `read_video`."""
    with ExitStack() as stack:
        container = _open_file(path, stack)
        stream = container.streams.video[0]
        rate, count = stream.average_rate or None, stream.frames or None
        if count is None and rate and container.duration:  # in microseconds
            count = round(rate * Fraction(container.duration, 1_000_000))
        return VideoFacts(rate, count)


def read_camera(number: int, every: int = 1) -> Iterator[VideoFrame]:
    """Reads the frames of a camera one by one, without end.

    Args:
        number: The camera's, as in /dev/video0.
        every: Yields each `every`-th frame.

    Raises:
        ImportError: If PyAV is not installed.
        ImageReadError: If the camera cannot be opened or stops; the message lists the cameras of this machine.
    """
    av = require_av()
    name = f"camera:{number}"
    try:
        container = _open_camera(av, number)
    except OSError as error:  # PyAV's errors are OSErrors, too
        cameras = ", ".join(sorted(glob.glob("/dev/video*"))) or "none"
        raise ImageReadError(
            f"{name}: cannot be opened ({one_line(error)}); this machine has {cameras}"
        ) from error
    with container:
        yield from _frames(container, name, every)


def _open_camera(av: Any, number: int) -> Any:
    return av.open(f"/dev/video{number}", format="v4l2")


def _open_file(path: str | os.PathLike[str], stack: ExitStack) -> Any:
    av = require_av()
    name = os.fspath(path)
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise MissingFileError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageReadError(f"{name}: cannot be opened: {getattr(error, 'strerror', '') or error}") from None
    try:
        # Playlists name other files. Without the prefix, a name such as "http:a" would be an address.
        container = av.open(f"file:{os.path.abspath(name)}", options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, ValueError) as error:
        raise ImageReadError(f"{name}: cannot be decoded as a video: {_reason(error)}") from error
    stack.enter_context(container)
    if not container.streams.video:
        raise ImageReadError(f"{name}: has no video stream")
    return container


def _frames(container: Any, name: str, every: int) -> Iterator[VideoFrame]:
    av = require_av()
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    step = 1 / Fraction(stream.average_rate or _RATE)
    start: Fraction | None = None
    time = -step
    decoded = container.decode(stream)
    number = 0
    while True:
        try:
            frame = next(decoded, None)
            if frame is None:
                return
            number += 1
            # Some files lack times, and damaged ones have times that go back.
            at = None if frame.pts is None else frame.pts * Fraction(frame.time_base)
            start = at if start is None else start
            time = time + step if at is None or start is None or at - start <= time else at - start
            if (number - 1) % every:
                continue
            image = frame.to_ndarray(format="rgb24")
            quarters = round(frame.rotation / 90) % 4
        except (av.error.FFmpegError, ValueError, MemoryError) as error:
            raise ImageReadError(f"{name}: frame {number + 1} cannot be decoded: {_reason(error)}") from error
        yield VideoFrame(np.ascontiguousarray(np.rot90(image, quarters)), number, time)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or one_line(error)


class VideoWriter:
    """Writes pictures to an MP4 file that all players play: H.264, 4:2:0, BT.709.

    Use it as a context manager. The file appears when the block ends, also after an exception, if there was a picture.
    An odd height or width is extended by one pixel. All pictures get the size of the first one.

    Args:
        path: File to write.
        rate: Mean number of frames per second; None for 30. The times of the pictures decide when they are shown.

    Raises:
        ImportError: If PyAV is not installed.
        OSError: If the file cannot be written, or the pictures are too large for a video.
    """

    def __init__(self, path: Path, rate: Fraction | None = None) -> None:
        self.path = path
        self._av = require_av()
        self._rate = rate or _RATE
        self._file = ExitStack()
        self._container: Any = None
        self._stream: Any = None
        self._ticks = -1

    def add(self, picture: ImageArray, time: Fraction) -> None:
        """Writes a picture.

        Args:
            picture: uint8 RGB [H, W, 3].
            time: When it is shown, in seconds after the start; later than the picture before.
        """
        try:
            self._add(picture, time)
        except self._av.error.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            size = f"{picture.shape[1]} x {picture.shape[0]}"
            raise OutputError(
                f"{self.path}: a video of {size} pixels cannot be encoded ({_reason(error)})"
            ) from error

    def _add(self, picture: ImageArray, time: Fraction) -> None:
        height, width = picture.shape[:2]
        if height % 2 or width % 2:  # 4:2:0 has one color for 2 x 2 pixels
            picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._open(*picture.shape[:2])
        whole = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = whole.reformat(
            self._stream.width,
            self._stream.height,
            "yuv420p",
            dst_colorspace=_BT709,
            src_color_range=_FULL,
            dst_color_range=_LIMITED,
        )
        self._ticks = max(self._ticks + 1, round(time * _TICKS))
        frame.pts, frame.time_base = self._ticks, Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))

    def _open(self, height: int, width: int) -> None:
        with ExitStack() as opening:
            file = opening.enter_context(atomic_write(self.path))
            container = self._av.open(file, "w", format="mp4")
            encoder = next((name for name in _ENCODERS if name in self._av.codecs_available), _ENCODERS[-1])
            options = {"crf": "20", "preset": "veryfast"} if encoder == "libx264" else {}
            stream = container.add_stream(encoder, rate=self._rate.limit_denominator(1001), options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.time_base = Fraction(1, _TICKS)
            context.color_range, context.colorspace = _LIMITED, _BT709
            context.color_primaries = context.color_trc = _BT709
            context.open()  # an encoder that refuses the size leaves no file
            self._container, self._stream, self._file = container, stream, opening.pop_all()

    def __enter__(self) -> VideoWriter:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Completes the file."""
        with self._file:  # it is renamed if the rest is written
            if self._stream is not None:
                with self._container:
                    self._container.mux(self._stream.encode(None))
