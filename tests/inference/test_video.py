"""Videos and cameras: reading frames, and writing videos that players play."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from panfpn_fast import Predictor, predict
from panfpn_fast.inference import ImageReadError, video
from panfpn_fast.inference.sources import read_frames
from panfpn_fast.inference.video import VideoWriter, read_camera, read_video, video_facts
from support.processes import run
from support.video_samples import frames, gray_levels, read_whole, write_video
from support.web import QuietHandler, serving

MakeModel = Callable[..., Any]


@pytest.fixture
def predictor(halves_model: MakeModel) -> Predictor:
    return Predictor(halves_model(), device="cpu", short_edge=16)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mpg"])
def test_frames_in_order(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"a.{suffix}", frames(7), Fraction(25))
    found = list(read_video(path))
    assert [frame.number for frame in found] == [1, 2, 3, 4, 5, 6, 7]
    assert gray_levels([frame.image for frame in found]) == [0, 1, 2, 3, 4, 5, 6]
    assert all((f.image.shape, f.image.dtype) == ((32, 48, 3), np.dtype(np.uint8)) for f in found)
    for frame in found:
        assert float(frame.time) == pytest.approx(
            (frame.number - 1) / 25, abs=0.0011
        )  # mkv counts milliseconds
    assert [frame.number for frame in read_video(path, every=3)] == [1, 4, 7]
    assert gray_levels([frame.image for frame in read_video(path, every=3)]) == [0, 3, 6]


def test_uneven_times(tmp_path: Path) -> None:
    """As phones record them."""
    times = [Fraction(0), Fraction(1, 10), Fraction(1, 4), Fraction(2), Fraction(21, 10)]
    path = write_video(tmp_path / "a.mp4", frames(5), times=times)
    assert [frame.time for frame in read_video(path)] == times


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_frames_are_upright(tmp_path: Path, rotation: int, corner: tuple[int, int]) -> None:
    path = write_video(tmp_path / "a.mp4", frames(2), rotation=rotation)
    image = next(read_video(path)).image
    assert image.shape == ((32, 48, 3) if rotation == 180 else (48, 32, 3))
    assert image[corner].min() > 240
    assert image[-1 - corner[0], -1 - corner[1]].max() < 40
    assert image.flags.c_contiguous


def test_facts(tmp_path: Path) -> None:
    assert video_facts(write_video(tmp_path / "a.mp4", frames(7), Fraction(30_000, 1001))).frames == 7
    rate, count = video_facts(write_video(tmp_path / "a.mkv", frames(8), Fraction(20)))
    assert rate == 20
    assert count == 8


def test_what_is_no_video(tmp_path: Path) -> None:
    garbage, empty = tmp_path / "garbage.mp4", tmp_path / "empty.mp4"
    garbage.write_bytes(b"no video at all " * 40)
    empty.touch()
    for path in (garbage, empty):
        with pytest.raises(ImageReadError, match=rf"{path.name}: cannot be decoded as a video"):
            next(read_video(path))
    with pytest.raises(FileNotFoundError, match=r"nope\.mp4: no such file"):
        next(read_video(tmp_path / "nope.mp4"))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ImageReadError, match=r"folder\.mp4: cannot be opened: Is a directory"):
        next(read_video(tmp_path / "folder.mp4"))


def test_sound_alone(tmp_path: Path) -> None:
    av: Any = pytest.importorskip("av", reason="av is not installed")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ImageReadError, match=r"a\.mkv: has no video stream"):
        next(read_video(tmp_path / "a.mkv"))


def test_a_cut_file_yields_what_it_has(tmp_path: Path) -> None:
    content = write_video(tmp_path / "a.mkv", frames(12)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 2 // 3])
    assert 0 < len(list(read_video(tmp_path / "cut.mkv"))) < 12


def test_a_damaged_frame_is_named(tmp_path: Path) -> None:
    av: Any = pytest.importorskip("av", reason="av is not installed")
    path = write_video(tmp_path / "a.mp4", frames(3))

    class Damaged:
        """A container whose third frame cannot be decoded."""

        def __init__(self, container: Any) -> None:
            self.streams = container.streams
            self._container = container

        def decode(self, stream: Any) -> Iterator[Any]:
            yield from itertools.islice(self._container.decode(stream), 2)
            raise av.error.InvalidDataError(1, "Invalid data found")

    with av.open(str(path)) as container:
        decoding = video._frames(Damaged(container), "a.mp4", 1)
        assert [next(decoding).number for _ in range(2)] == [1, 2]
        with pytest.raises(ImageReadError, match=r"a\.mp4: frame 3 cannot be decoded: Invalid data found"):
            next(decoding)


def test_playlists_open_no_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Site(QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with serving(Site, monkeypatch) as site:
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{site}/a.ts\n#EXT-X-ENDLIST\n"
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(ImageReadError, match=r"list\.mp4: "):
            list(read_video(tmp_path / "list.mp4"))
    assert not asked


def test_names_that_look_like_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", frames(1)).rename(tmp_path / "http:é.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(list(read_video("http:é.mp4"))) == 1


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predictor: Predictor) -> None:
    (tmp_path / "a.mp4").touch()
    for module in (None, SimpleNamespace(__version__="16.1.0")):
        monkeypatch.setitem(sys.modules, "av", module)
        for source in (tmp_path / "a.mp4", "camera:0"):
            with pytest.raises(
                ImportError, match=r'pip install "panfpn_fast\[video\]", or pip install "av>=17"'
            ):
                predictor.stream(source)


def test_pyav_is_imported_only_when_it_is_needed() -> None:
    run(
        [
            sys.executable,
            "-c",
            "import sys, panfpn_fast.inference.folder as _; assert 'av' not in sys.modules",
        ]
    )


def test_stream_of_a_video(predictor: Predictor, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames(12))
    for batch_size in (1, 5):
        alive: list[weakref.ref[Any]] = []
        for number, result in enumerate(predictor.stream(path, batch_size), 1):
            assert (result.source, result.frame) == (str(path), number)
            assert result.time == pytest.approx((number - 1) / 10)
            assert result.image is not None
            assert gray_levels([result.image]) == [number - 1]
            alive.append(weakref.ref(result.image))
            assert sum(image() is not None for image in alive) <= 2 * batch_size
        assert len(alive) == 12


def test_a_video_in_one_call(halves_model: MakeModel, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames(3))
    found = predict(str(path), halves_model(), device="cpu", short_edge=16)
    assert isinstance(found, list)
    assert [result.frame for result in found] == [1, 2, 3]
    [first] = itertools.islice(predict(path, halves_model(), stream=True, device="cpu", short_edge=16), 1)
    assert first.frame == 1


def test_a_call_takes_no_video(predictor: Predictor, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames(3))
    for source, kind in ((path, "a video"), ("camera:0", "a camera"), ("*.none", "a pattern")):
        with pytest.raises(ImageReadError, match=rf"image: .* is {kind}.*predictor\.stream\('"):
            predictor(source)


def test_frames_of_a_list(predictor: Predictor, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames(9))
    results = predictor.stream([path, frames(1)[0], *read_frames(path, every=4)])
    assert [result.frame for result in results] == [*range(1, 10), None, 1, 5, 9]
    for every in (0, True, 1.5):
        with pytest.raises(ValueError, match="every: expected a positive integer, got"):
            read_frames(path, every)  # type: ignore[arg-type]


def test_a_dropped_stream_closes_its_file(predictor: Predictor, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames(9))
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("this system has no /proc")

    def count() -> int:
        return sum(file.resolve() == path for file in opened.iterdir())

    results = predictor.stream(path)
    next(results)
    assert count() == 1
    del results
    assert count() == 0


def test_cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predictor: Predictor) -> None:
    path = write_video(tmp_path / "a.mp4", frames(5))
    asked: list[int] = []

    def opened(av: Any, number: int) -> Any:
        asked.append(number)
        return av.open(str(path))

    monkeypatch.setattr(video, "_open_camera", opened)
    assert [frame.number for frame in read_camera(3, every=2)] == [1, 3, 5]
    results = list(predictor.stream("camera:2"))
    assert [(result.source, result.frame) for result in results] == [("camera:2", n) for n in range(1, 6)]
    assert asked == [3, 2]
    with pytest.raises(ValueError, match=r"camera:2 never ends.*stream=True"):
        predict("camera:2", predictor.model)


def test_a_camera_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason="av is not installed")
    monkeypatch.setattr("glob.glob", lambda _: ["/dev/video1", "/dev/video0"])
    with pytest.raises(ImageReadError, match=r"camera:99: cannot be opened .*has /dev/video0, /dev/video1"):
        next(read_camera(99))


@pytest.mark.parametrize(("height", "width"), [(32, 48), (31, 47), (1, 1), (2, 301)])
def test_videos_that_all_players_play(tmp_path: Path, height: int, width: int) -> None:
    pytest.importorskip("av", reason="av is not installed")
    path, rate = tmp_path / "a.mp4", Fraction(24_000, 1001)
    colors = [(200, 30, 60), (20, 180, 90), (255, 255, 255), (0, 0, 0)]
    with VideoWriter(path, rate) as writer:
        for number, color in enumerate(colors):
            writer.add(np.full((height, width, 3), color, np.uint8), number / rate)
    facts, decoded = read_whole(path)
    assert facts["codec"] in ("h264", "libx264", "mpeg4")
    assert (facts["format"], facts["size"]) == ("yuv420p", (height + height % 2, width + width % 2))
    assert "mp4" in facts["container"]
    assert float(facts["rate"]) == pytest.approx(float(rate), rel=1e-3)
    for number, (time, picture) in enumerate(decoded):
        assert time == pytest.approx(number / float(rate), abs=1e-4)
        assert np.abs(picture.astype(int) - colors[number]).max() <= 4


def test_written_times_are_those_of_the_frames(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="av is not installed")
    times = [Fraction(0), Fraction(1, 3), Fraction(1, 3), Fraction(2)]  # one that is not later
    with VideoWriter(tmp_path / "a.mp4") as writer:
        for time, picture in zip(times, frames(4), strict=True):
            writer.add(picture, time)
    assert [time for time, _ in read_whole(tmp_path / "a.mp4")[1]] == pytest.approx(
        [0, 1 / 3, 1 / 3, 2], abs=1e-4
    )


def test_pictures_of_another_size(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="av is not installed")
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.add(frames(1)[0], Fraction(0))
        writer.add(frames(1, 64, 64)[0], Fraction(1))
    assert [picture.shape for _, picture in read_whole(tmp_path / "a.mp4")[1]] == [(32, 48, 3)] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_video_is_kept(tmp_path: Path, error: type[BaseException]) -> None:
    pytest.importorskip("av", reason="av is not installed")

    def write() -> None:
        with VideoWriter(tmp_path / "a.mp4") as writer:
            for number, picture in enumerate(frames(3)):
                writer.add(picture, Fraction(number))
            raise error

    with pytest.raises(error):
        write()
    assert len(read_whole(tmp_path / "a.mp4")[1]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_no_picture_makes_no_file(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="av is not installed")
    with VideoWriter(tmp_path / "a.mp4"):
        pass
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_too_large_for_a_video(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="av is not installed")
    with (
        pytest.raises(OSError, match=r"a\.mp4: a video of 70001 x 2 pixels cannot be encoded"),
        VideoWriter(tmp_path / "a.mp4") as writer,
    ):
        writer.add(np.zeros((2, 70_001, 3), np.uint8), Fraction(0))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system limits no files")
    pytest.importorskip("av", reason="av is not installed")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)

    def write() -> None:
        with VideoWriter(tmp_path / "a.mp4") as writer:
            for number, picture in enumerate(noise):
                writer.add(picture, Fraction(number))

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
