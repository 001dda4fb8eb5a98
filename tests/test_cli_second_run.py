"""Several runs of `panfpn-fast predict` into one folder, also runs that were killed: the JSON lists every map."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from panfpn_fast.data import get_categories
from panfpn_fast.inference import CocoPanopticWriter, Predictor, decode_panoptic, video
from support.predict_runs import Loaded, OneDogModel, photo, predict, replace_load, written
from support.ranks import forked, run_ranks
from support.video_samples import frames, write_video

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    return replace_load(monkeypatch)


def listed(out: Path) -> dict[str, int]:
    """Returns the heights of the images in the JSON by the names of their maps, after comparing both."""
    content = json.loads((out / "predictions.json").read_text())
    heights = {}
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        assert image["id"] == annotation["image_id"]
        with Image.open(out / "predictions" / annotation["file_name"]) as opened:
            panoptic = decode_panoptic(np.asarray(opened))
        assert panoptic.shape == (image["height"], image["width"])
        assert [info["area"] for info in annotation["segments_info"]] == [(panoptic == 1).sum()]
        heights[annotation["file_name"].removesuffix(".png")] = image["height"]
    assert {path.stem for path in (out / "predictions").iterdir()} == heights.keys()
    return heights


def killed(run: Callable[[], object]) -> None:
    """Runs a function that kills its own process."""
    with forked(run) as process:
        process.join()
        assert process.exitcode == -signal.SIGKILL


def killing(height: int) -> OneDogModel:
    """Returns a network that kills the process at an image of that height, after resizing."""

    def kill(images: Sequence[Tensor]) -> None:
        if images[0].shape[1] == height:
            os.kill(os.getpid(), signal.SIGKILL)

    return OneDogModel(kill)


def test_another_image_is_added(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number, name in enumerate("bac"):
        assert predict(photo(tmp_path / f"{name}.png", 40 + number), out=out) == 0
    assert list(listed(out).items()) == [("b", 40), ("a", 41), ("c", 42)]
    assert len(list(out.glob("*_overlay.png"))) == 3


def test_the_same_image_is_replaced(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert predict(photo(tmp_path / "a.png", 40), photo(tmp_path / "b.png", 41), out=out) == 0
    photo(tmp_path / "a.png", 50)
    monkeypatch.chdir(tmp_path)
    assert predict(Path("a.png"), out=out) == 0  # by another path
    assert list(listed(out).items()) == [("a", 50), ("b", 41)]


def test_another_image_of_the_same_name(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    images = [photo(tmp_path / "one" / "a.png", 40), photo(tmp_path / "two" / "a.png", 41)]
    for image in (*images, *images):
        assert predict(image, out=out) == 0
    assert predict(*images, out=out) == 0
    assert listed(out) == {"a": 40, "a_2": 41}
    assert Image.open(out / "a_2_overlay.png").height == 41


def test_a_killed_run_loses_nothing(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    images = [photo(tmp_path / f"{name}.png", 40 + number) for number, name in enumerate("abc")]
    images.insert(2, photo(tmp_path / "high.png", 90, 30))  # 96 x 32 after resizing
    loaded["model"] = killing(96)
    killed(lambda: predict(*images, out=out))
    assert {path.stem for path in (out / "predictions").glob("*.png")} == {"a", "b"}
    loaded["model"] = OneDogModel()
    assert predict(images[3], out=out) == 0
    assert listed(out) == {"a": 40, "b": 41, "c": 42}
    assert predict(*images, out=out) == 0
    assert listed(out) == {"a": 40, "b": 41, "high": 90, "c": 42}


def test_a_run_that_is_killed_while_it_replaces(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    images = [photo(tmp_path / f"{name}.png", 40) for name in "ab"]
    high = photo(tmp_path / "high.png", 90, 30)
    assert predict(*images, out=out) == 0
    photo(images[0], 50)
    loaded["model"] = killing(96)
    killed(lambda: predict(images[0], high, images[1], out=out))
    loaded["model"] = OneDogModel()
    assert predict(high, out=out) == 0
    assert listed(out) == {"a": 50, "b": 40, "high": 90}


def test_without_the_json(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predict(photo(tmp_path / "a.png", 40), photo(tmp_path / "b.png", 41), out=out) == 0
    (out / "predictions.json").unlink()
    assert predict(photo(tmp_path / "c.png", 42), out=out) == 0
    assert listed(out) == {"a": 40, "b": 41, "c": 42}


def test_a_map_that_was_removed(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predict(photo(tmp_path / "a.png", 40), photo(tmp_path / "b.png", 41), out=out) == 0
    (out / "predictions" / "a.png").unlink()
    assert predict(photo(tmp_path / "c.png", 42), out=out) == 0
    assert listed(out) == {"b": 41, "c": 42}


def test_a_copied_folder(loaded: Loaded, tmp_path: Path) -> None:
    """All files of a copy may have one time."""
    out = tmp_path / "out"
    assert predict(photo(tmp_path / "a.png", 40), out=out) == 0
    shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copyfile)
    assert predict(photo(tmp_path / "c.png", 42), out=tmp_path / "copy") == 0
    assert listed(tmp_path / "copy") == {"a": 40, "c": 42}


def test_files_of_the_user_stay(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    own = photo(out / "predictions" / "a.png", 33)
    (out / "predictions" / "b.png").write_text("no image")
    before = own.read_bytes()
    images = [photo(tmp_path / f"{name}.png", 40 + number) for number, name in enumerate("ab")]
    for _ in range(2):
        assert predict(*images, out=out) == 0
        assert own.read_bytes() == before
        assert (out / "predictions" / "b.png").read_text() == "no image"
        content = json.loads((out / "predictions.json").read_text())
        assert [image["id"] for image in content["images"]] == ["a_2", "b_2"]


@pytest.mark.parametrize("with_json", [True, False])
def test_another_network(loaded: Loaded, tmp_path: Path, capsys: Printed, with_json: bool) -> None:
    out = tmp_path / "out"
    assert predict(photo(tmp_path / "a.png"), out=out) == 0
    if not with_json:
        (out / "predictions.json").unlink()
    files = {path: path.read_bytes() for path in out.rglob("*.*")}
    loaded["model"].config = SimpleNamespace(categories=get_categories("cityscapes"), score_threshold=0.05)
    assert predict(photo(tmp_path / "b.png"), out=out) == 2
    err = capsys.readouterr().err
    assert "results of a network with other classes" in err or "result of a network with other classes" in err
    assert f"{out}" in err
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == files


@pytest.mark.parametrize(
    "text", ["{}", "[1]", "no JSON", '{"images": [], "annotations": [{}], "categories": []}']
)
def test_a_json_of_another_kind(loaded: Loaded, tmp_path: Path, capsys: Printed, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.json").write_text(text)
    assert predict(photo(tmp_path / "b.png"), out=out) == 2
    assert (
        "predictions.json: not a JSON that predict wrote; give another folder, or remove"
        in capsys.readouterr().err
    )
    assert (out / "predictions.json").read_text() == text
    assert written(out) == {"predictions.json"}


def test_processes_add_to_the_results_of_one(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    images = [photo(tmp_path / f"{name}.png", 40 + number) for number, name in enumerate("abcde")]
    assert predict(*images[:3], out=out) == 0
    for number, image in enumerate(images):
        photo(image, 50 + number)
    run_ranks(2, lambda rank: sys.exit(predict(*images[1:], out=out)))
    assert list(listed(out).items()) == [("a", 40), ("b", 51), ("c", 52), ("d", 53), ("e", 54)]


def test_videos(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clips = [
        write_video(tmp_path / name / "clip.mp4", frames(count)) for name, count in (("one", 2), ("two", 4))
    ]
    for clip in (*clips, clips[0]):
        assert predict(clip, out=out) == 0
    assert written(out) == {f"clip{n}_{end}" for n in ("", "_2") for end in ("overlay.mp4", "segments.jsonl")}
    assert len((out / "clip_segments.jsonl").read_text().splitlines()) == 3
    assert len((out / "clip_2_segments.jsonl").read_text().splitlines()) == 5
    for name in ("own_overlay.mp4", "mine_segments.jsonl"):
        (out / name).write_text("of the user")
    for name in ("own", "mine"):
        assert predict(write_video(tmp_path / f"{name}.mp4", frames(1)), out=out) == 0
    assert (out / "own_overlay.mp4").read_text() == (out / "mine_segments.jsonl").read_text() == "of the user"
    assert {"own_2_overlay.mp4", "mine_2_segments.jsonl"} <= written(out)


def test_recordings_of_a_camera_are_not_replaced(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, out = write_video(tmp_path / "clip.mp4", frames(2)), tmp_path / "out"
    monkeypatch.setattr(video, "_open_camera", lambda av, number: av.open(str(clip)))
    for _ in range(2):
        assert predict("camera:0", "--frame-maps", out=out) == 0
    assert {"camera_0_overlay.mp4", "camera_0_2_overlay.mp4"} <= written(out)
    assert list(listed(out)) == [f"{name}_00000{n}" for name in ("camera_0", "camera_0_2") for n in (1, 2)]


def test_a_killed_video_leaves_the_earlier_result(loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clip = write_video(tmp_path / "clip.mp4", frames(2))
    assert predict(clip, out=out) == 0
    before = [(out / name).read_bytes() for name in ("clip_overlay.mp4", "clip_segments.jsonl")]
    loaded["model"] = killing(32)
    killed(lambda: predict(clip, out=out))
    assert [(out / name).read_bytes() for name in ("clip_overlay.mp4", "clip_segments.jsonl")] == before


def test_writers_in_python(tmp_path: Path) -> None:
    predictor = Predictor(OneDogModel(), "cpu", short_edge=32, instances="panoptic")
    result = predictor(np.zeros((40, 60, 3), np.uint8))
    for names in (["a", "b"], ["b", "c"]):
        with CocoPanopticWriter(tmp_path, predictor.categories) as writer:
            for name in names:
                writer.add(result, name, f"{name}.png")
    assert listed(tmp_path) == {"a": 40, "b": 40, "c": 40}
