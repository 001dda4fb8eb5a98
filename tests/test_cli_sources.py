"""`panfpn-fast predict` on videos, files with several frames, folders, lists and addresses."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from panfpn_fast.inference import decode_panoptic, video
from support.predict_runs import Loaded, OneDogModel, photo, predict, read_annotations, replace_load, written
from support.ranks import run_ranks
from support.video_samples import frames, read_whole, write_video
from support.web import QuietHandler, serving

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    return replace_load(monkeypatch)


def read_lines(path: Path) -> tuple[Any, list[Any]]:
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    return first, others


def save_gif(path: Path, count: int = 3) -> Path:
    pictures = [Image.new("RGB", (12, 8), (40 * number, 90, 250)) for number in range(count)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    return path


def read_images(out: Path) -> list[Any]:
    content: dict[str, list[Any]] = json.loads((out / "predictions.json").read_text())
    return content["images"]


def test_a_video(loaded: Loaded, tmp_path: Path, capsys: Printed) -> None:
    rate = Fraction(30_000, 1001)
    clip, out = write_video(tmp_path / "clip.mp4", frames(6), rate), tmp_path / "out"
    assert predict(clip, "--batch-size", "4", out=out) == 0
    assert written(out) == {"clip_overlay.mp4", "clip_segments.jsonl"}
    facts, decoded = read_whole(out / "clip_overlay.mp4")
    assert (facts["format"], facts["size"], len(decoded)) == ("yuv420p", (32, 48), 6)
    assert float(facts["rate"]) == pytest.approx(float(rate), rel=1e-3)
    plain = [picture for _, picture in read_whole(clip)[1]]
    for (_, picture), image in zip(decoded, plain, strict=True):
        assert np.abs(picture.astype(int) - image).mean() > 10  # the dog has a color
    about, lines = read_lines(out / "clip_segments.jsonl")
    assert (about["file_name"], about["width"], about["height"]) == ("clip.mp4", 48, 32)
    assert about["rate"] == pytest.approx(float(rate), rel=1e-3)
    assert len(about["categories"]) == 133
    assert [line["frame"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["time"] for line in lines] == pytest.approx([n / float(rate) for n in range(6)], abs=1e-4)
    [dog] = lines[0]["segments"]
    assert dog == {
        "id": 1,
        "category_id": 18,
        "name": "dog",
        "isthing": 1,
        "area": 32 * 48,
        "bbox": [0, 0, 48, 32],
        "score": 0.9,
    }
    captured = capsys.readouterr()
    assert f"clip.mp4: 6 frames -> {out / 'clip_overlay.mp4'} (" in captured.out
    assert "6/6" in captured.err


def test_maps_of_the_frames(loaded: Loaded, tmp_path: Path) -> None:
    clip, image = write_video(tmp_path / "clip.mp4", frames(5)), photo(tmp_path / "clip_000003.png")
    out = tmp_path / "out"
    assert predict(clip, image, "--frame-maps", "--every", "2", out=out) == 0
    assert {path.name for path in (out / "predictions").iterdir()} == {
        "clip_000001.png", "clip_000003.png", "clip_000003_2.png", "clip_000005.png"}  # fmt: skip
    names = [annotation["image_id"] for annotation in read_annotations(out)]
    assert names == [
        "clip_000001",
        "clip_000003_2",
        "clip_000005",
        "clip_000003",
    ]  # in the order of the arguments
    assert [(i["file_name"], i.get("frame")) for i in read_images(out)] == [
        ("clip.mp4", 1), ("clip.mp4", 3), ("clip.mp4", 5), ("clip_000003.png", None)]  # fmt: skip
    for annotation in read_annotations(out):
        panoptic = decode_panoptic(np.asarray(Image.open(out / "predictions" / annotation["file_name"])))
        assert panoptic.shape == ((40, 60) if annotation["image_id"] == "clip_000003" else (32, 48))


def test_some_frames_without_overlays(loaded: Loaded, tmp_path: Path) -> None:
    clip, out = write_video(tmp_path / "clip.mp4", frames(9)), tmp_path / "out"
    assert predict(clip, "--every", "3", "--max-frames", "2", "--overlay", "none", out=out) == 0
    assert written(out) == {"clip_segments.jsonl"}
    about, lines = read_lines(out / "clip_segments.jsonl")
    assert about["rate"] == pytest.approx(10 / 3, abs=1e-5)
    assert [(line["frame"], line["time"]) for line in lines] == [(1, 0.0), (4, 0.3)]


def test_a_camera_until_it_is_interrupted(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, out = write_video(tmp_path / "clip.mp4", frames(9)), tmp_path / "out"
    monkeypatch.setattr(video, "_open_camera", lambda av, number: av.open(str(clip)))
    calls: list[int] = []

    def interrupt(images: Sequence[Tensor]) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    loaded["model"] = OneDogModel(interrupt)
    assert predict("camera:0", "--frame-maps", out=out) == 130
    assert len(read_whole(out / "camera_0_overlay.mp4")[1]) == 3
    assert [line["frame"] for line in read_lines(out / "camera_0_segments.jsonl")[1]] == [1, 2, 3]
    assert [image["id"] for image in read_images(out)] == [f"camera_0_{n:06}" for n in (1, 2, 3)]


def test_videos_that_fail(loaded: Loaded, tmp_path: Path, capsys: Printed) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    clip, out = write_video(tmp_path / "clip.mp4", frames(3)), tmp_path / "out"
    assert predict(tmp_path / "bad.mp4", clip, out=out) == 1
    assert written(out) == {"clip_overlay.mp4", "clip_segments.jsonl"}
    err = capsys.readouterr().err
    assert "bad.mp4: cannot be decoded as a video" in err
    assert "1 of 2 files failed" in err

    def fail(images: Sequence[Tensor]) -> None:
        raise torch.OutOfMemoryError("no memory")

    loaded["model"] = OneDogModel(fail)
    assert predict(clip, out=tmp_path / "none") == 1
    assert capsys.readouterr().err.count("clip.mp4: not enough memory on cpu") == 1
    assert not written(tmp_path / "none")


def test_without_pyav(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    (tmp_path / "clip.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    assert predict(photo(tmp_path / "a.png"), tmp_path / "clip.mp4", out=tmp_path / "out") == 2
    assert "videos and cameras need PyAV" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert predict(photo(tmp_path / "a.png"), out=tmp_path / "out") == 0


def test_frames_of_image_files(loaded: Loaded, tmp_path: Path, capsys: Printed) -> None:
    out = tmp_path / "out"
    images = [save_gif(tmp_path / "x.gif"), photo(tmp_path / "x_0002.png"), photo(tmp_path / "y.png")]
    assert predict(*images, "--batch-size", "3", out=out) == 0
    assert [(i["id"], i["file_name"], i.get("frame")) for i in read_images(out)] == [
        ("x_0001", "x.gif", 1), ("x_0002_2", "x.gif", 2), ("x_0003", "x.gif", 3),
        ("x_0002", "x_0002.png", None), ("y", "y.png", None)]  # fmt: skip
    assert Image.open(out / "x_0002_overlay.png").size == (60, 40)
    assert Image.open(out / "x_0002_2_overlay.png").size == (12, 8)
    printed = capsys.readouterr()
    assert "x.gif, frame 3: 1 dog" in printed.out
    assert "3/3" in printed.err


def test_the_standard_input_and_patterns(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    for name in ("a.png", "b.png", "sub/c.png"):
        photo(tmp_path / name)
    lines = f"{tmp_path}/a.png\n{tmp_path}/nope.png\n{tmp_path}/s*/*.png\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert predict("-", tmp_path / "b.png", out=tmp_path / "out") == 1
    assert [image["id"] for image in read_images(tmp_path / "out")] == ["a", "c", "b"]
    assert "nope.png: no such file" in capsys.readouterr().err


def test_folders_in_folders(loaded: Loaded, tmp_path: Path, capsys: Printed) -> None:
    for name in ("in/a.png", "in/sub/a.png", "in/sub/b.jpg"):
        photo(tmp_path / name)
    (tmp_path / "in" / "notes.txt").touch()
    out = tmp_path / "in" / "out"
    for _ in range(2):  # the second run does not predict the results of the first one
        assert predict(tmp_path / "in", "--recursive", out=out) == 0
        assert [image["id"] for image in read_images(out)] == ["a", "a_2", "b"]
    assert "in: skipped 1 .json file, 1 .txt file, 6 results of predict" in capsys.readouterr().err


def test_overlays_and_quiet(loaded: Loaded, tmp_path: Path, capsys: Printed) -> None:
    photo(tmp_path / "in" / "a.png")
    photo(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "notes.txt").touch()
    assert predict(tmp_path / "in", "--overlay", "jpg", "--quiet", out=tmp_path / "jpg") == 0
    assert {"a_overlay.jpg", "b_overlay.jpg"} < written(tmp_path / "jpg")
    assert Image.open(tmp_path / "jpg" / "a_overlay.jpg").format == "JPEG"
    assert capsys.readouterr() == ("", "")
    assert predict(tmp_path / "in", "--overlay", "none", out=tmp_path / "none") == 0
    assert written(tmp_path / "none") == {"predictions.json", "predictions/a.png", "predictions/b.png"}
    assert f"a.png: 1 dog -> {tmp_path / 'none' / 'predictions' / 'a.png'} (" in capsys.readouterr().out
    assert predict(tmp_path / "in", tmp_path / "nope.png", "--quiet", out=tmp_path / "jpg") == 1
    assert capsys.readouterr() == ("", f"panfpn-fast: {tmp_path}/nope.png: no such file\n")


def test_an_overlay_that_is_too_large_for_a_jpeg(loaded: Loaded, tmp_path: Path, capsys: Printed) -> None:
    image, out = photo(tmp_path / "long.png", 1, 65_501), tmp_path / "out"
    assert predict(image, photo(tmp_path / "b.png"), "--overlay", "jpg", out=out) == 1
    assert f"{image}: path: Pillow cannot write" in capsys.readouterr().err
    assert written(out) == {"predictions.json", "predictions/long.png", "predictions/b.png", "b_overlay.jpg"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves the files of a folder, by the last part of the address."""

    class Site(QuietHandler):
        def do_GET(self) -> None:
            file = tmp_path / "site" / self.path.rpartition("/")[2].partition("?")[0]
            if not file.is_file():
                self.send_error(404)
                return
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with serving(Site, monkeypatch) as address:
        yield address


def test_addresses(loaded: Loaded, tmp_path: Path, site: str, capsys: Printed) -> None:
    photo(tmp_path / "site" / "a.png")
    write_video(tmp_path / "site" / "clip.mp4", frames(2))
    save_gif(tmp_path / "site" / "x.gif", 2)
    addresses = [f"{site}/{name}" for name in ("a.png", "b/a.png?c=d", "clip.mp4", "x.gif", "nope.png")]
    assert predict(*addresses, out=tmp_path / "out") == 1
    assert f"{site}/nope.png: the download failed" in capsys.readouterr().err
    assert [(image["id"], image["file_name"]) for image in read_images(tmp_path / "out")] == [
        ("a", "a.png"), ("a_2", f"{site}/b/a.png?c=d"), ("x_0001", "x.gif"), ("x_0002", "x.gif")]  # fmt: skip
    assert len(read_lines(tmp_path / "out" / "clip_segments.jsonl")[1]) == 2


def test_two_processes_share_videos(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [write_video(tmp_path / f"{name}.mp4", frames(3)) for name in "ab"]
    gif = save_gif(tmp_path / "x.gif")
    given = "".join(f"{path}\n" for path in [*clips, gif])

    def run(rank: int) -> None:
        # Only the first process reads the paths.
        content = given if rank == 0 else "nope"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        sys.exit(predict("-", "--frame-maps", out=tmp_path / "two"))

    run_ranks(2, run)
    assert predict(*clips, gif, "--frame-maps", out=tmp_path / "one") == 0
    assert written(tmp_path / "two") == written(tmp_path / "one")
    assert len(written(tmp_path / "one")) == 17
    one, two = (json.loads((tmp_path / out / "predictions.json").read_text()) for out in ("one", "two"))
    assert two == one
    assert [image["id"] for image in two["images"]][:4] == ["a_000001", "a_000002", "a_000003", "b_000001"]
