"""The gradients of a step whose images are divided into parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from panfpn_fast.data.loader import Batch, TrainLoader
from panfpn_fast.data.sample import IGNORE
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.distributed import process_group
from panfpn_fast.training.accumulate import parts_of
from panfpn_fast.training.config import TrainConfig
from panfpn_fast.training.trainer import Trainer, make_model, make_transform
from support.ranks import run_ranks
from support.training_runs import ALONE, tiny

SEMANTIC: dict[str, Any] = {"tasks": ["semantic"]}


def some_batch(config: TrainConfig) -> Batch:
    """Returns a batch whose images differ in their number of pixels that are not void."""
    dataset = SyntheticDataset(8, config.seed)
    batch = next(
        iter(TrainLoader(dataset, make_transform(config.data, "detectron2"), config.solver.batch_size))
    )
    for row, target in enumerate(batch.targets):
        target.semantic[: 20 * row] = IGNORE
    return batch


def gradients(config: TrainConfig, batch: Batch, out: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the gradients and losses of one step."""
    dataset = SyntheticDataset(8, config.seed)
    trainer = Trainer(config, dataset, make_model(config, dataset), out, ALONE, quiet=True)
    losses = trainer._take_step(batch)
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return found, losses


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares up to rounding: a sum over images in another order."""
    assert found.keys() == expected.keys()
    scale = max(float(tensor.norm()) for tensor in expected.values())
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()) + 1e-7 * scale, name


def solver(accumulate: int) -> dict[str, Any]:
    return {"batch_size": 4, "accumulate": accumulate, "clip_gradients": 0.0}


@pytest.mark.parametrize("parts", [2, 4])
def test_the_semantic_loss_counts_the_pixels_of_the_whole_step(parts: int, tmp_path: Path) -> None:
    batch = some_batch(tiny(solver=solver(1)))
    whole, loss = gradients(tiny(solver=solver(1), model=SEMANTIC), batch, tmp_path / "whole")
    parted, sum_of_parts = gradients(tiny(solver=solver(parts), model=SEMANTIC), batch, tmp_path / "parts")
    assert_same_gradients(parted, whole)
    torch.testing.assert_close(sum_of_parts["loss_semantic"], loss["loss_semantic"])


def test_parts_with_equal_counts_equal_the_whole(tmp_path: Path) -> None:
    """Here both halves have the same images and random numbers, so every loss has the same count in both."""
    half = some_batch(tiny(solver={"batch_size": 2}))
    batch = Batch(half.images * 2, half.targets * 2, half.seeds * 2)
    whole, loss = gradients(tiny(solver=solver(1)), batch, tmp_path / "whole")
    parted, mean = gradients(tiny(solver=solver(2)), batch, tmp_path / "parts")
    assert_same_gradients(parted, whole)
    assert loss.keys() == mean.keys()
    for name, value in loss.items():
        torch.testing.assert_close(mean[name], value)


def test_each_part_has_the_same_weight_in_the_other_losses(tmp_path: Path) -> None:
    """The documented rule: each loss but the semantic one is the mean of those that the parts have alone."""
    batch = some_batch(tiny(solver=solver(1)))
    _, mean = gradients(tiny(solver=solver(2), lambda_panoptic=0.5), batch, tmp_path / "both")
    config = tiny(solver=solver(2) | {"batch_size": 2, "accumulate": 1}, lambda_panoptic=0.5)
    alone = [gradients(config, part, tmp_path / f"{n}")[1] for n, part in enumerate(parts_of(batch, 2))]
    for name in ("loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask", "loss_panoptic"):
        torch.testing.assert_close(mean[name], (alone[0][name] + alone[1][name]) / 2)


def test_two_processes_with_two_parts_equal_one_process(tmp_path: Path) -> None:
    config = tiny(solver=solver(2) | {"steps": 1, "batch_size": 4}, model=SEMANTIC)

    def take_step(rank: int) -> None:
        with process_group("cpu") as process:
            dataset = SyntheticDataset(8, config.seed)
            model = make_model(config, dataset)
            Trainer(config, dataset, model, tmp_path / "two", process, quiet=True).run()
            torch.save(model.state_dict(), tmp_path / f"{rank}.weights")

    run_ranks(2, take_step)
    first, second = (torch.load(tmp_path / f"{rank}.weights") for rank in (0, 1))
    alone = dataclasses.replace(config, solver=dataclasses.replace(config.solver, accumulate=1))
    dataset = SyntheticDataset(8, config.seed)
    model = make_model(alone, dataset)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Trainer(alone, dataset, model, tmp_path / "one", ALONE, quiet=True).run()
    for name, expected in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        # Gradients are summed in another order.
        allowed = 1e-4 * (expected - before[name]).norm() + 1e-6 * expected.norm()
        assert (first[name] - expected).norm() <= allowed, name


def test_batch_size_must_be_a_multiple_of_processes_and_parts(tmp_path: Path) -> None:
    config, dataset = tiny(solver=solver(2)), SyntheticDataset(8, 0)
    process = ALONE._replace(world_size=4)
    with pytest.raises(
        ValueError,
        match=r"solver\.batch_size: expected a multiple of the 4 processes times the 2 of solver\.accumulate, got 4",
    ):
        Trainer(config, dataset, make_model(config, dataset), tmp_path, process)
