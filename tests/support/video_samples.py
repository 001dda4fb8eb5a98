"""Small videos, encoded in the test by PyAV and not by the package."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Frames = Sequence[npt.NDArray[np.uint8]]


def frames(count: int, height: int = 32, width: int = 48) -> list[npt.NDArray[np.uint8]]:
    """Returns plain gray frames that get lighter, with a white block in the upper left corner."""
    made = []
    for number in range(count):
        frame = np.full((height, width, 3), 16 * number + 20, np.uint8)
        frame[: height // 2, : width // 2] = 255
        made.append(frame)
    return made


def gray_levels(images: Frames) -> list[int]:
    """Returns the number of the gray of each frame, which survives encoding."""
    return [round((int(image[-1, -1].mean()) - 20) / 16) for image in images]


def write_video(
    path: Path,
    pictures: Frames,
    rate: Fraction = Fraction(10),
    times: Sequence[Fraction] | None = None,
    rotation: int = 0,
) -> Path:
    """Writes a video whose container is that of the suffix.

    Args:
        path: The file.
        pictures: uint8 RGB [H, W, 3] of even sizes.
        rate: Frames per second.
        times: Seconds at which the frames are shown; by default by the rate.
        rotation: Degrees, counterclockwise, by which players turn the frames.
    """
    av: Any = pytest.importorskip("av", reason="av is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pictures[0].shape[:2]
    base = 1 / rate if times is None else Fraction(1, 12_000)
    codec = {".mpg": "mpeg2video", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    options = {"bf": "0", "g": "4"} if codec == "libx264" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = base
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            time = number / rate if times is None else times[number]
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_whole(path: Path) -> tuple[Any, list[Any]]:
    """Returns what a video's stream states, and its frames, read by PyAV alone."""
    av: Any = pytest.importorskip("av", reason="av is not installed")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        context = stream.codec_context
        facts = {
            "codec": context.name,
            "format": context.pix_fmt,
            "size": (context.height, context.width),
            "rate": stream.average_rate,
            "container": container.format.name,
        }
    return facts, decoded
