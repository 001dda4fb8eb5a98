"""The best checkpoint, the early end of a run, and that both survive an interruption."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import panfpn_fast
from panfpn_fast._errors import UserError
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.distributed import process_group
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.training.evaluations import Evaluated, Evaluations, best_figure
from panfpn_fast.training.trainer import Trainer, make_model
from panfpn_fast.training.validation import Validation
from support.ranks import run_ranks
from support.tensors import assert_same_tensors
from support.training_runs import ALONE, tiny, train, weights
from support.training_samples import small_model


class Scripted:
    """Returns given figures one after the other, and notes the weights."""

    def __init__(self, *values: float) -> None:
        self.values: Iterator[float] = iter(values)
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, model: PanopticFPN) -> Evaluated:
        self.seen.append(weights(model))
        return Evaluated({"PQ": next(self.values)})


def steps_of(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_best_weights_are_kept(ema: float, tmp_path: Path) -> None:
    evaluate = Scripted(math.nan, 30.0, 30.0, 20.0)
    trainer = train(tiny(evaluate_every=1, solver={"ema": ema}), tmp_path, evaluate=evaluate)
    assert trainer.evaluations.best == (2, 30.0)
    assert trainer.evaluations.figures == {"PQ": 20.0}
    # Equal figures keep the earlier weights.
    assert_same_tensors(weights(panfpn_fast.load(tmp_path / "best.pth")), evaluate.seen[1])
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_early_stop(tmp_path: Path) -> None:
    config = tiny(evaluate_every=1, early_stop=2, solver={"steps": 9}, checkpoint_every=100)
    trainer = train(config, tmp_path, evaluate=Scripted(1.0, 3.0, 2.0, 3.0, 9.0))
    assert trainer.step == 4
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_00000004.pth"]
    # It has ended, unless it gets more patience.
    assert train(config, tmp_path, evaluate=Scripted(), resume=True).step == 4
    config = tiny(evaluate_every=1, early_stop=3, solver={"steps": 9}, checkpoint_every=100)
    assert train(config, tmp_path, evaluate=Scripted(2.0), resume=True).step == 5
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_early_stop_without_numbers(tmp_path: Path) -> None:
    config = tiny(evaluate_every=1, early_stop=2, solver={"steps": 9})
    assert train(config, tmp_path, evaluate=Scripted(math.nan, math.nan)).step == 2
    assert not (tmp_path / "best.pth").exists()


def test_interrupted_evaluation_is_repeated(tmp_path: Path) -> None:
    """The run is killed in the evaluation after a checkpoint; the resumed run evaluates before its next step."""
    config = tiny(evaluate_every=2, early_stop=1, solver={"steps": 8})
    evaluate = Scripted(5.0)

    def killed(model: PanopticFPN) -> Evaluated:
        if evaluate.seen:
            raise KeyboardInterrupt
        return evaluate(model)

    with pytest.raises(KeyboardInterrupt):  # after step 4
        train(config, tmp_path, evaluate=killed)
    again = Scripted(4.0)
    resumed = train(config, tmp_path, evaluate=again, resume=True)
    assert resumed.step == 4
    assert resumed.evaluations.best == (2, 5.0)
    assert_same_tensors(weights(panfpn_fast.load(tmp_path / "best.pth")), evaluate.seen[0])


def test_evaluations_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    config = tiny(evaluate_every=1, checkpoint_every=2)
    train(config, tmp_path, evaluate=Scripted(1.0, 2.0, 9.0, 3.0))
    (tmp_path / "checkpoint_00000004.pth").unlink()  # as if the run had been killed before
    resumed = train(config, tmp_path, evaluate=Scripted(3.0, 4.0), resume=True)
    assert resumed.evaluations.best == (4, 4.0)
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_damaged_history_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text('{"step": 2, "summary": {"PQ": 3}}\n{"step": 4, "summ')
    evaluations = Evaluations(tmp_path, "PQ", 4)
    assert (evaluations.last_step, evaluations.best, evaluations.since_best) == (2, (2, 3.0), 0)
    evaluations.truncate_file()
    assert steps_of(tmp_path) == [2]


def test_all_processes_end_at_the_same_step(tmp_path: Path) -> None:
    """The first process decides, even if the others measure something else."""

    def run_part(rank: int) -> None:
        with process_group("cpu") as process:
            config = tiny(evaluate_every=1, early_stop=1, solver={"steps": 9})
            dataset = SyntheticDataset(8, config.seed)
            evaluate = Scripted(*((3.0, 4.0, 2.0) if rank == 0 else (9.0, 8.0, 7.0)))
            model = make_model(config, dataset)
            trainer = Trainer(config, dataset, model, tmp_path, process, evaluate=evaluate, quiet=True)
            assert trainer.run() == {"PQ": 2.0}
            assert (trainer.step, trainer.evaluations.best) == (3, (2, 4.0))
            torch.distributed.barrier()  # until the first process has written the checkpoint
            trainer = Trainer(
                config, dataset, model, tmp_path, process, evaluate=evaluate, quiet=True, resume=True
            )
            trainer.run()
            assert trainer.step == 3

    run_ranks(2, run_part)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_the_figure_that_is_compared() -> None:
    both, things = small_model().config, small_model(num_stuff=0).config
    assert best_figure("", both) == "PQ"
    assert best_figure("", things) == "mask_AP"
    assert best_figure("", small_model(tasks=("instance",)).config) == "mask_AP"
    assert best_figure("mIoU", both) == "mIoU"
    with pytest.raises(UserError, match=r"best_by: expected a figure that .*, got 'mIoU'; similar ones: "):
        best_figure("mIoU", things)


@pytest.mark.parametrize("best_by", ["", "mask_AP"])
def test_validation_gives_figures_classes_and_pictures(best_by: str, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    config = tiny(best_by=best_by, pictures=2)
    dataset = SyntheticDataset(3, 5)
    model = make_model(config, dataset)
    validation = Validation(config, dataset, model)
    trainer = Trainer(config, dataset, model, tmp_path, ALONE, evaluate=validation, quiet=True)
    figures = trainer.run()
    assert ("mask_AP" in figures) == (best_by == "mask_AP")
    line = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert line["classes"]
    assert set(line["classes"]) <= {category.name for category in dataset.categories.all}
    with Image.open(tmp_path / "gallery.png") as picture:
        assert picture.size == (3 * 384, 2 * 256)


def test_evaluation_that_returns_something_else(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"evaluate: .* returns an Evaluated, got a dict; return Evaluated"):
        train(tiny(solver={"steps": 1}), tmp_path, evaluate=lambda model: {"PQ": 1.0})


def test_ap_without_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    config, dataset = tiny(best_by="box_AP"), SyntheticDataset(1, 0)
    with pytest.raises(UserError, match=r"best_by: box_AP: .*pip install pycocotools, or set best_by=PQ"):
        Validation(config, dataset, make_model(config, dataset))
