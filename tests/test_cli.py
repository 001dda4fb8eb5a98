from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

import panfpn_fast
from panfpn_fast import DEFAULT_WEIGHTS, PanopticFPN
from panfpn_fast.checkpoints.native import content_of
from panfpn_fast.cli._annotations import KINDS
from panfpn_fast.cli.main import main
from panfpn_fast.inference import Predictor, decode_panoptic
from panfpn_fast.training.config import get_train_preset
from support.predict_runs import Loaded, OneDogModel, photo, predict, read_annotations, replace_load, written
from support.processes import run
from support.ranks import run_ranks


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    return replace_load(monkeypatch)


def test_one_image(loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = photo(tmp_path / "000000000042.jpg"), tmp_path / "new" / "out"
    assert predict(image, out=out) == 0
    assert written(out) == {"000000000042_overlay.png", "predictions/000000000042.png", "predictions.json"}
    overlay = Image.open(out / "000000000042_overlay.png")
    assert (overlay.size, overlay.mode) == ((60, 40), "RGB")
    assert np.asarray(overlay).tolist() != np.asarray(Image.open(image)).tolist()
    [annotation] = read_annotations(out)
    assert annotation["image_id"] == 42
    panoptic = decode_panoptic(np.asarray(Image.open(out / "predictions" / annotation["file_name"])))
    assert (panoptic == annotation["segments_info"][0]["id"]).all()
    assert annotation["segments_info"][0]["category_id"] == 18
    captured = capsys.readouterr()
    said, line = captured.out.splitlines()
    assert said.startswith(
        f"{DEFAULT_WEIGHTS}: shorter edge 32, longer edge at most 1333 pixels; Categories('coco"
    )
    assert line.startswith(f"000000000042.jpg: 1 dog -> {out / '000000000042_overlay.png'} (")
    assert captured.err == ""
    assert loaded["weights"] == DEFAULT_WEIGHTS
    assert loaded["overrides"] == {}


def test_folder_and_progress(loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    for name in ("b.JPG", "a.png", ".hidden.png", "sub/c.png"):
        photo(folder / name)
    (folder / "notes.txt").write_text("not an image")
    assert predict(folder, "--batch-size", "2", out=tmp_path / "out") == 0
    assert [a["image_id"] for a in read_annotations(tmp_path / "out")] == ["a", "b"]
    captured = capsys.readouterr()
    assert captured.out.count(" -> ") == 2
    assert "2/2" in captured.err


def test_unreadable_image_among_good_ones(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 not an image")
    images = [photo(tmp_path / "first.png"), broken, photo(tmp_path / "last.png")]
    for batch_size in ("1", "3"):
        out = tmp_path / f"out{batch_size}"
        assert predict(*images, "--batch-size", batch_size, out=out) == 1
        assert [a["image_id"] for a in read_annotations(out)] == ["first", "last"]
        assert "broken_overlay.png" not in written(out)
        captured = capsys.readouterr()
        assert "cannot be decoded" in captured.err
        assert str(broken) in captured.err
        assert "1 of 3 files failed" in captured.err
        assert "Traceback" not in captured.err


def test_missing_image_among_good_ones(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(tmp_path / "nowhere.jpg", photo(tmp_path / "here.png"), out=tmp_path / "out") == 1
    assert [a["image_id"] for a in read_annotations(tmp_path / "out")] == ["here"]
    assert "nowhere.jpg: no such file" in capsys.readouterr().err


def test_nothing_to_do_stops_before_loading(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert predict(tmp_path / "nowhere.jpg", tmp_path / "empty", out=tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "nowhere.jpg: no such file" in captured.err
    assert "empty: no images in this folder" in captured.err
    assert "weights" not in loaded
    assert not (tmp_path / "out").exists()


def test_same_names_do_not_overwrite_each_other(loaded: Loaded, tmp_path: Path) -> None:
    images = [
        photo(tmp_path / "a" / "x.png", 20),
        photo(tmp_path / "b" / "x.png", 30),
        photo(tmp_path / "b" / "X.jpg", 40),
        photo(tmp_path / "c" / "x_2.png", 50),
    ]
    out = tmp_path / "out"
    assert predict(*images, images[0], out=out) == 0  # the last is a duplicate and counts once
    sizes = {
        a["image_id"]: Image.open(out / "predictions" / a["file_name"]).height for a in read_annotations(out)
    }
    assert sizes == {"x": 20, "x_2": 30, "X_3": 40, "x_2_2": 50}
    assert len(list(out.glob("*_overlay.png"))) == 4
    sources = [i["file_name"] for i in json.loads((out / "predictions.json").read_text())["images"]]
    assert sources == ["x.png", images[1].as_posix(), images[2].as_posix(), images[3].as_posix()]


def test_images_are_never_overwritten(loaded: Loaded, tmp_path: Path) -> None:
    images = [
        photo(tmp_path / "x.png"),
        photo(tmp_path / "x_overlay.png"),
        photo(tmp_path / "predictions" / "y.png"),
    ]
    before = [image.read_bytes() for image in images]
    assert predict(*images, photo(tmp_path / "other" / "y.png"), out=tmp_path) == 0
    assert [image.read_bytes() for image in images] == before
    assert len(read_annotations(tmp_path)) == 4


def test_ctrl_c_keeps_finished_images(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(images: Sequence[Tensor]) -> None:
        if images[0].shape[2] == 32:  # the square image
            raise KeyboardInterrupt

    loaded["model"] = OneDogModel(interrupt)
    images = [photo(tmp_path / "a.png"), photo(tmp_path / "b.png", 32, 32), photo(tmp_path / "c.png")]
    assert predict(*images, out=tmp_path / "out") == 130
    assert [a["image_id"] for a in read_annotations(tmp_path / "out")] == ["a"]
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert "Traceback" not in captured.err


def test_a_bug_keeps_its_traceback_and_finished_images(loaded: Loaded, tmp_path: Path) -> None:
    def fail(images: Sequence[Tensor]) -> None:
        if images[0].shape[2] == 32:
            raise RuntimeError("a bug")

    loaded["model"] = OneDogModel(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        predict(photo(tmp_path / "a.png"), photo(tmp_path / "b.png", 32, 32), out=tmp_path / "out")
    assert [a["image_id"] for a in read_annotations(tmp_path / "out")] == ["a"]


def test_too_little_memory_for_a_batch_retries_one_by_one(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(images: Sequence[Tensor]) -> None:
        if len(images) > 1 or images[0].shape[2] == 32:
            raise torch.OutOfMemoryError("no memory")

    loaded["model"] = OneDogModel(fail)
    images = [photo(tmp_path / "a.png"), photo(tmp_path / "b.png", 32, 32), photo(tmp_path / "c.png")]
    assert predict(*images, "--batch-size", "3", out=tmp_path / "out") == 1
    assert [a["image_id"] for a in read_annotations(tmp_path / "out")] == ["a", "c"]
    assert "b.png: not enough memory" in capsys.readouterr().err


def test_settings_reach_the_model_and_predictor(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {}

    class Spy(Predictor):
        def __init__(self, model: nn.Module, **keywords: Any) -> None:
            settings.update(keywords)
            super().__init__(model, **keywords)

    monkeypatch.setattr("panfpn_fast.inference.Predictor", Spy)
    arguments = [
        "predict",
        str(photo(tmp_path / "a.png")),
        "--out",
        str(tmp_path / "out"),
        "--weights",
        "w.pkl",
    ]
    arguments += ["--device", "cpu", "--dtype", "bfloat16", "--short-edge", "64", "--max-edge", "96"]
    assert main([*arguments, "--score-threshold", "0.3"]) == 0
    assert loaded["weights"] == "w.pkl"
    assert loaded["overrides"] == {"instance_score_threshold": 0.3}
    device = torch.device("cpu")
    assert settings == {
        "device": device,
        "dtype": torch.bfloat16,
        "short_edge": 64,
        "max_edge": 96,
        "instances": "panoptic",
    }
    del arguments[-4:]
    assert main([*arguments, "--score-threshold", "0.01"]) == 0
    assert settings["short_edge"] is settings["max_edge"] is None  # the network's own
    assert loaded["overrides"] == {"instance_score_threshold": 0.01, "score_threshold": 0.01}
    loaded["model"].config.score_threshold = 0.6  # as in mmdetection's networks
    assert main([*arguments, "--score-threshold", "0.3"]) == 0
    assert loaded["overrides"] == {"instance_score_threshold": 0.3, "score_threshold": 0.3}


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("w.pkl: no such file"), ValueError("w.pkl: damaged\nreally"), OSError("no network")],
)
def test_weights_that_do_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def load(weights: str) -> nn.Module:
        raise error

    monkeypatch.setattr(panfpn_fast, "load", load)
    assert predict(photo(tmp_path / "a.png"), out=tmp_path / "out") == 2
    message = " ".join(str(error).split())
    assert capsys.readouterr().err == f"panfpn-fast: {message}\n"


def test_ops_that_did_not_load(loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(images: Sequence[Tensor]) -> None:
        raise ImportError("the native ops did not load: reinstall")

    loaded["model"] = OneDogModel(fail)
    assert predict(photo(tmp_path / "a.png"), out=tmp_path / "out") == 2
    assert capsys.readouterr().err.endswith("panfpn-fast: the native ops did not load: reinstall\n")


def test_unknown_device(loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(photo(tmp_path / "a.png"))
    assert main(["predict", image, "--out", str(tmp_path / "out"), "--device", "toaster"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("panfpn-fast: device: expected a device of this machine, got 'toaster'")
    assert err.count("\n") == 1


def test_output_directory_that_cannot_be_created(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert predict(photo(tmp_path / "a.png"), out=tmp_path / "file" / "out") == 2
    assert "--out: cannot write to the folder" in capsys.readouterr().err
    assert "weights" not in loaded
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions").write_text("in the way")
    assert predict(photo(tmp_path / "a.png"), out=tmp_path / "out") == 2
    assert "--out: expected a folder, got the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["predict"],
        ["predict", "a.png", "--short-edge", "0"],
        ["predict", "a.png", "--batch-size", "many"],
        ["predict", "a.png", "--score-threshold", "1.5"],
        ["predict", "a.png", "--dtype", "int8"],
        ["paint", "a.png"],
    ],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: panfpn-fast" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--help"], ("predict", "info")),
        (["predict", "--help"], ("--weights", DEFAULT_WEIGHTS, "predictions.json", "exit status")),
        (
            ["train", "--help"],
            ("data.kind", ", ".join(KINDS), "data.categories=''", 'pip install ".[train]"'),
        ),
        (["convert", "--help"], ("mmdetection", "IN", "OUT")),
        (["info", "--help"], ("built",)),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        out = capsys.readouterr().out
        for text in expected:
            assert text in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"panfpn-fast {panfpn_fast.__version__}\n"


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    report = {"panfpn_fast": "1.2.3", "CUDA ops": "not loaded: no driver\ninstall one", "GPUs": ""}
    monkeypatch.setattr("panfpn_fast._load.build_report", lambda: report)
    assert main(["info"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "panfpn_fast: 1.2.3",
        "CUDA ops:    not loaded: no driver",
        "             install one",
        "GPUs:",
    ]
    monkeypatch.undo()
    assert main(["info"]) == 0
    assert panfpn_fast.__version__ in capsys.readouterr().out


def test_a_real_network(loaded: Loaded, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # The network is narrow and untrained, so it finds something only with low thresholds.
    loaded["model"] = panfpn_fast.PanopticFPN(
        fpn_channels=32,
        box_head_channels=32,
        mask_head_channels=32,
        semantic_channels=32,
        rpn_post_nms_topk=10,
        score_threshold=0.0,
        instance_score_threshold=0.0,
        stuff_area_threshold=0,
    )
    assert predict(photo(tmp_path / "a.png"), photo(tmp_path / "b.png", 50, 30), out=tmp_path / "out") == 0
    for annotation in read_annotations(tmp_path / "out"):
        panoptic = decode_panoptic(
            np.asarray(Image.open(tmp_path / "out" / "predictions" / annotation["file_name"]))
        )
        ids = {info["id"] for info in annotation["segments_info"]}
        assert ids
        assert set(np.unique(panoptic).tolist()) - {0} == ids
        assert sum(info["area"] for info in annotation["segments_info"]) == (panoptic != 0).sum()


def test_two_processes_write_the_same_as_one(loaded: Loaded, tmp_path: Path) -> None:
    names = ["1.png", "01.png", "b.png", "c.png", "a/b.png"]
    images = [photo(tmp_path / "in" / name, 20 + number) for number, name in enumerate(names)]
    (tmp_path / "in" / "broken.png").write_text("not an image")
    images.insert(1, tmp_path / "in" / "broken.png")
    assert predict(*images, out=tmp_path / "one") == 1

    run_ranks(2, lambda rank: sys.exit(predict(*images, out=tmp_path / "two") - (rank == 0)))
    assert written(tmp_path / "two") == written(tmp_path / "one")
    one, two = (json.loads((tmp_path / out / "predictions.json").read_text()) for out in ("one", "two"))
    assert [image["id"] for image in two["images"]] == [1, "01", "b", "c", "b_2"]
    assert two == one


def test_one_of_two_processes_is_interrupted(loaded: Loaded, tmp_path: Path) -> None:
    images = [photo(tmp_path / f"{name}.png", 20 + number) for number, name in enumerate("abcd")]

    def run(rank: int) -> None:
        if rank == 1:
            calls = itertools.count()

            def interrupt(images: Sequence[Tensor]) -> None:
                if next(calls) == 1:
                    raise KeyboardInterrupt

            loaded["model"] = OneDogModel(interrupt)
        sys.exit(predict(*images, out=tmp_path / "out"))

    # The first process that is seen to end can be rank 1, or rank 0, which fails because it lost rank 1.
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        run_ranks(2, run)
    left = {path.stem for path in (tmp_path / "out" / "predictions").glob("*.png")}
    assert "b" in left
    # Rank 0 may have been killed before it could list the other's results. The next run lists them.
    assert predict(photo(tmp_path / "e.png"), out=tmp_path / "out") == 0
    assert {annotation["image_id"] for annotation in read_annotations(tmp_path / "out")} == {*left, "e"}


def test_torchrun(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PanopticFPN(**get_train_preset("tiny").model, categories="synthetic")
    weights = tmp_path / "model.pth"
    torch.save(content_of(model.state_dict(), model.config), weights)
    images = [photo(tmp_path / f"{name}.png", 20 + number) for number, name in enumerate("abc")]
    arguments = ["predict", *images, "--out", tmp_path / "out", "--weights", weights, "--short-edge", "64"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*torchrun, "-m", "panfpn_fast.cli", *arguments, "--device", "cpu"])
    assert [a["image_id"] for a in read_annotations(tmp_path / "out")] == ["a", "b", "c"]
    assert done.stdout.count(" -> ") == 3


def test_output_that_cannot_be_written() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    script = (
        "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); "
        "from panfpn_fast.cli.main import main; sys.exit(main(['info']))"
    )
    done = run([sys.executable, "-c", script], check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "panfpn-fast: cannot write the output: [Errno 28] No space left on device\n",
    )


def test_module_can_be_run() -> None:
    done = run([sys.executable, "-m", "panfpn_fast.cli", "predict", "--help"])
    assert "SOURCE" in done.stdout
