"""The loggers of other projects, stood in for by modules that note their calls, and the curves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from panfpn_fast._errors import UserError
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.training.curves import draw_curves
from panfpn_fast.training.evaluations import Evaluated
from panfpn_fast.training.trainer import Trainer, make_model
from support.training_runs import ALONE, tiny, train


def evaluate(_: PanopticFPN) -> Evaluated:
    return Evaluated({"PQ": 7.0, "AP": float("nan")}, {}, "the table", Image.new("RGB", (4, 2)))


class Noted:
    """A module of this name, whose calls it notes."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Any]] = []
        module = ModuleType(name)
        module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        for function in ("start_run", "log_dict", "log_metrics", "log_image", "end_run", "init"):
            setattr(module, function, self._noting(function))
        module.Image = lambda picture: picture.size  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)

    def _noting(self, function: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((function, args or kwargs))
            return SimpleNamespace(
                id=kwargs.get("id") or "first",
                info=SimpleNamespace(run_id=kwargs.get("run_id") or "first"),
                define_metric=self._noting("define_metric"),
                log=self._noting("log"),
                finish=self._noting("finish"),
            )

        return call

    def of(self, function: str) -> list[Any]:
        return [arguments for name, arguments in self.calls if name == function]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Noted("wandb", monkeypatch)
    config = tiny(loggers=["wandb"], solver={"steps": 2})
    train(config, tmp_path / "run", evaluate=evaluate)
    [start] = wandb.of("init")
    assert (start["project"], start["name"], start["id"]) == ("panfpn_fast", "run", None)
    assert start["config"]["solver"]["steps"] == 2
    logged = [arguments[0] for arguments in wandb.of("log")]
    assert [line["step"] for line in logged] == [1, 2, 2, 2]
    assert "loss_mask" in logged[0]
    assert logged[2]["PQ"] == 7.0
    assert logged[3]["validation"] == (4, 2)
    assert wandb.calls[-1][0] == "finish"
    train(tiny(loggers=["wandb"], solver={"steps": 3}), tmp_path / "run", resume=True)
    assert wandb.of("init")[1]["id"] == "first"


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = Noted("mlflow", monkeypatch)
    config = tiny(loggers=["mlflow"], solver={"steps": 2})
    train(config, tmp_path / "run", evaluate=evaluate)
    assert mlflow.of("start_run") == [{"run_id": None, "run_name": "run"}]
    assert mlflow.of("log_metrics")[-1] == ({"PQ": 7.0},)  # without the NaN
    assert mlflow.of("log_image")[0][1] == "validation/00000002.png"
    assert mlflow.calls[-1][0] == "end_run"
    train(tiny(loggers=["mlflow"], solver={"steps": 3}), tmp_path / "run", resume=True)
    assert mlflow.of("start_run")[1] == {"run_id": "first", "run_name": None}


def test_a_logger_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="loggers: wandb is not installed; run pip install wandb, or leave"):
        train(tiny(loggers=["wandb"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_logger_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Noted("wandb", monkeypatch)

    def fail(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr("wandb.init", fail)
    with pytest.raises(UserError, match="loggers: wandb cannot start: no API key; see its documentation"):
        train(tiny(loggers=["wandb"]), tmp_path)


def test_a_lost_server_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Noted("mlflow", monkeypatch)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr("mlflow.log_metrics", fail)
    with pytest.warns(UserWarning, match="MLflow receives no more figures: gone") as caught:
        trainer = train(tiny(loggers=["mlflow"]), tmp_path)
    assert trainer.step == 4
    assert len([warning for warning in caught if "no more figures" in str(warning.message)]) == 1


def test_tensorboard_shows_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(solver={"steps": 1}), tmp_path, evaluate=evaluate)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("PQ")[0].value == 7.0
    [picture] = events.Images("validation")
    assert (picture.step, picture.width, picture.height) == (1, 4, 2)


def test_the_table_of_classes_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, dataset = tiny(solver={"steps": 1}), SyntheticDataset(8, 0)
    Trainer(config, dataset, make_model(config, dataset), tmp_path, ALONE, evaluate=evaluate).run()
    printed = capsys.readouterr().out
    assert "after step 1:\nthe table\n" in printed
    assert f"PQ 7.00 is the best so far: {tmp_path / 'best.pth'}" in printed


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert draw_curves(tmp_path) == (
            "curves.png is not drawn, because matplotlib is not installed; pip install matplotlib"
        )
    assert not (tmp_path / "curves.png").exists()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    train(tiny(evaluate_every=2), tmp_path, evaluate=evaluate)
    assert draw_curves(tmp_path) == f"curves: {tmp_path / 'curves.png'}"
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height
    (tmp_path / "evaluations.jsonl").unlink()  # a run without evaluation data has none
    draw_curves(tmp_path)
