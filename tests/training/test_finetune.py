"""Fine-tuning: the preset, schedules and optimizers, and resuming without settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import panfpn_fast
from panfpn_fast._errors import UserError
from panfpn_fast.checkpoints import read_config
from panfpn_fast.cli.main import main
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.training.config import SolverConfig, TrainConfig, get_train_preset
from panfpn_fast.training.schedule import learning_rate
from panfpn_fast.training.settings import read_settings, settings_of_run
from panfpn_fast.training.trainer import make_model
from support.checkpoint_samples import save_torch, small_network, small_weights
from support.tensors import assert_same_tensors
from support.training_runs import tiny, train, weights
from support.training_samples import small_model


@pytest.fixture
def other_classes(tmp_path: Path) -> str:
    """Returns a file with a network of other classes, of another width, than any preset."""
    model = small_model(num_things=3, num_stuff=2, pixel_mean=(1.0, 2.0, 3.0))
    panfpn_fast.save(model, tmp_path / "other.pth")
    return str(tmp_path / "other.pth")


SMALL = [
    *("data.kind=synthetic", "data.synthetic_val_count=1", "data.short_edges=[64]", "data.val_short_edge=64"),
    *("workers=0", "solver.batch_size=2", "solver.warmup_steps=0", "evaluate_every=1", "log_every=1"),
]  # fmt: skip


def test_finetunes_to_other_classes_and_resumes_without_settings(
    other_classes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("omegaconf", reason="the extra [train] is not installed")
    out = tmp_path / "run"
    own = [f"init={other_classes}", "solver.steps=1", "solver.optimizer=adamw", "solver.learning_rate=1e-3"]
    # Settings and options may be mixed.
    assert main(["train", *SMALL, "--preset", "finetune", *own, "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert (
        "these layers keep their random initial values, because the classes differ: box_head.class_logits "
        "(4 outputs there, 5 here), box_head.box_deltas (12 outputs there, 16 here), mask_head.logits "
        "(3 outputs there, 4 here), semantic_head.logits (3 outputs there, 5 here)\n"
    ) in printed
    assert "after step 1:" in printed
    assert "TP      FP      FN" in printed  # the table of classes
    found = read_config(out / "model.pth")
    assert found.pixel_mean == (1.0, 2.0, 3.0)
    assert found.categories.name == "synthetic"
    before = json.loads((out / "config.json").read_text())
    Path(other_classes).unlink()  # a resumed run has its own weights
    assert main(["train", "--resume", "solver.steps=2", "--out", str(out), "--device", "cpu"]) == 0
    after = json.loads((out / "config.json").read_text())
    before["solver"]["steps"] = 2
    assert after == before
    assert torch.load(out / "checkpoint_00000002.pth", weights_only=True)["settings"] == before


def test_the_preset_starts_from_published_weights() -> None:
    preset = get_train_preset("finetune")
    assert preset.init == "detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x"
    assert preset.solver.peak_learning_rate == pytest.approx(0.005)
    preset.check()


def test_network_of_a_detectron2_checkpoint(tmp_path: Path) -> None:
    source = small_network()
    path = save_torch(tmp_path / "a.pth", small_weights())
    config = dataclasses.replace(get_train_preset("finetune"), init=str(path), model={"score_threshold": 0.3})
    model = make_model(config, SyntheticDataset(1, 0))
    assert model.config.fpn_channels == source.config.fpn_channels
    assert (model.config.num_things, model.config.score_threshold) == (4, 0.3)


def test_resume_reads_every_setting(tmp_path: Path) -> None:
    pytest.importorskip("omegaconf", reason="the extra [train] is not installed")
    config = read_settings(
        "nuclei",
        None,
        ["solver.schedule=cosine", "solver.final_factor=1e-05", "solver.accumulate=2", "loggers=[wandb]",
         "best_by=mIoU", "model.backbone=resnet18", "evaluate_every=5", "early_stop=2", "pictures=1"],
    )  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dataclasses.asdict(config)))
    assert settings_of_run(file) == config
    file.write_text(json.dumps(dataclasses.asdict(TrainConfig())))
    assert settings_of_run(file) == TrainConfig()
    file.write_text("{}")  # settings that are newer than the run have their defaults
    assert settings_of_run(file) == TrainConfig()
    for content, message in (
        ('{"solver": {"step": 1}}', r"config\.json: solver\.step: no such setting"),
        ('{"solver"', r"resume: cannot read the settings of the run in .*config\.json"),
        ("[1]", r"resume: .*config\.json: expected settings by name, got \[1\]"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            settings_of_run(file)


def test_schedules() -> None:
    solver = SolverConfig(
        steps=10, batch_size=4, base_batch_size=16, learning_rate=0.4, warmup_steps=0, schedule="cosine"
    )
    rates = [learning_rate(solver, step) for step in range(11)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[5], rates[10]) == pytest.approx((0.1, 0.05, 0))
    # The scheduler of torch, from the same rate.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.02)
    theirs = []
    for _ in range(11):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    solver = dataclasses.replace(solver, final_factor=0.2)
    assert [learning_rate(solver, step) for step in range(11)] == pytest.approx(theirs)
    assert learning_rate(dataclasses.replace(solver, warmup_steps=4, warmup_factor=0.0), 0) == 0


def test_adamw_runs_resumes_and_is_not_replaced(tmp_path: Path) -> None:
    def adamw(steps: int) -> TrainConfig:
        return tiny(solver={"optimizer": "adamw", "learning_rate": 1e-3, "steps": steps, "milestones": []})

    whole = train(adamw(4), tmp_path / "whole")
    train(adamw(2), tmp_path / "part")
    resumed = train(adamw(4), tmp_path / "part", resume=True)
    assert_same_tensors(weights(resumed.model), weights(whole.model))
    decays = {group["weight_decay"] for group in whole.optimizer.param_groups}
    assert decays == {0.0, whole.config.solver.weight_decay}
    with pytest.raises(UserError, match=r"solver\.optimizer is 'adamw' there and 'sgd' now"):
        train(tiny(), tmp_path / "part", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": {"optimizer": "adamw"}}, r"at most 0\.005 with solver\.optimizer=adamw, got 0\.01; try"),
        (
            {"solver": {"optimizer": "adamw", "learning_rate": 0.004, "base_batch_size": 1}},
            r"at most 0\.005, scaled with the batch, with solver\.optimizer=adamw, got 0\.008",
        ),
        ({"preset": "init"}, "init: expected a checkpoint, because preset=init takes its network"),
        ({"early_stop": 2}, "early_stop: expected 0, because the run evaluates only at the end"),
        (
            {"early_stop": 2, "evaluate_every": 2},
            r"early_stop: expected evaluation data, got none; set data\.val_images .*, or early_stop=0$",
        ),
        ({"best_by": "PQ"}, "best_by: expected evaluation data, got none; set .*, or best_by=$"),
        ({"solver": {"accumulate": 3}}, r"solver\.accumulate: expected a divisor of solver\.batch_size"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_each_other(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    def check_and_train(config: TrainConfig) -> None:
        config.check()  # as `read_settings` does
        train(config, tmp_path / "run")

    with pytest.raises(UserError, match=message):
        check_and_train(tiny(**changes))
    assert not (tmp_path / "run").exists()
