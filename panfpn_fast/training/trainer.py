"""The training loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from panfpn_fast._errors import UserError, one_line
from panfpn_fast._files import atomic_write, prepare_file
from panfpn_fast.checkpoints import native, read_config
from panfpn_fast.data.loader import Batch, PanopticDataset, TrainLoader
from panfpn_fast.data.transforms import (
    Compose,
    Crop,
    Exposure,
    Flip,
    KeepBoxes,
    Photometric,
    QuarterTurn,
    Resize,
    Transform,
)
from panfpn_fast.distributed import Process, broadcast
from panfpn_fast.models.backbone import ResNet
from panfpn_fast.models.config import PanopticFPNConfig, get_preset
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.training.accumulate import labelled_pixels, parts_of
from panfpn_fast.training.average import Average
from panfpn_fast.training.config import OF_INIT, DataConfig, TrainConfig
from panfpn_fast.training.evaluations import FILE, Evaluated, Evaluations, best_figure
from panfpn_fast.training.logging import GALLERY, LOG, TrainingLog
from panfpn_fast.training.network import TrainingNetwork, total
from panfpn_fast.training.resume import check_fits
from panfpn_fast.training.run_state import Checkpoints
from panfpn_fast.training.schedule import learning_rate, make_optimizer
from panfpn_fast.training.signals import StopSignals
from panfpn_fast.training.trackers import check_installed, start_trackers

RESULT = "model.pth"
"""Name of the file with the result of a run, in the folder of the run."""

BEST = "best.pth"
"""Name of the file with the weights of the best evaluation, in the folder of the run."""

SETTINGS = "config.json"
"""Name of the file with the settings of a run, in its folder."""

Evaluate = Callable[[PanopticFPN], Evaluated]


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved its state."""


class Diverged(UserError, FloatingPointError):
    """The losses or weights are not finite; nothing was saved since they were."""


def make_transform(data: DataConfig, resize: str) -> Transform:
    """Returns the augmentation that a configuration asks for; `resize` is the resize filter of the network."""
    steps: list[Transform] = [KeepBoxes()] if data.boxes == "annotation" else []
    steps.append(Resize(data.short_edges, data.max_edge, data.continuous_edges, resize))
    if data.crop:
        steps.append(Crop((data.crop[0], data.crop[1]), data.crop_most_of_one_class))
    steps.append(Flip(data.flip))
    if data.quarter_turns:
        steps.append(QuarterTurn())
    if data.exposure > 1:
        steps.append(Exposure(data.exposure))
    if data.photometric:
        steps.append(Photometric())
    return Compose(steps)


def make_model(
    config: TrainConfig, dataset: PanopticDataset, base: PanopticFPNConfig | None = None
) -> PanopticFPN:
    """Builds the network for a data set, in float32 on the CPU, with random weights that depend only on the seed.

    Args:
        config: The run's settings.
        dataset: The data set, whose classes the network gets.
        base: The network to which the settings apply; None for that of `config.preset`.

    Raises:
        UserError: If a setting of the network is invalid; the message names it, such as `model.fpn_channels`.
        OSError, ValueError: If the preset is "init" and the checkpoint cannot be read.
        ImportError: If the backbone's library is not installed.
    """
    if base is None and config.preset == OF_INIT:
        base = read_config(config.init)
    torch.manual_seed(config.seed)
    data = config.data
    edges = {"short_edge": data.val_short_edge, "max_edge": data.val_max_edge}
    fields = {"categories": dataset.categories, **config.model, **edges}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        settings = (base or get_preset(config.preset)).replace(**fields)
        with torch.device("cpu"):  # random numbers differ between devices
            return PanopticFPN.from_config(settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.{error}") from error
    finally:
        torch.set_default_dtype(default)


def freeze(model: PanopticFPN, stages: int) -> None:
    """Stops the first parts of the backbone from learning: 1 is the stem, 2 also the first stage.

    Raises:
        ValueError: If the backbone is not one of our ResNets, whose stages are known.
    """
    if stages > 0 and not isinstance(model.backbone, ResNet):
        raise ValueError(f"freeze_at: expected 0 with the backbone {model.config.backbone!r}, got {stages}")
    names = ["conv1", "norm1"] if stages > 0 else []
    names += [f"layer{stage}" for stage in range(1, stages)]
    for name in names:
        for parameter in model.backbone.get_submodule(name).parameters():
            parameter.requires_grad_(False)


class Trainer:
    """Trains a network and keeps its state on disk.

    Args:
        config: Settings of the run.
        dataset: Annotated images to train on.
        model: The network with its initial weights.
        out: Folder for checkpoints, the log and the result.
        process: Rank, world size and device of this process.
        resume: Whether to continue from the newest checkpoint in the folder, if there is one. If False, the folder must
            not contain checkpoints.
        evaluate: Called with the network every `evaluate_every` steps and at the end; its figures are logged, and the
            weights with the best figure are saved. None for no evaluation.
        quiet: Whether to hide the progress bar.

    Note:
        A run that is stopped and resumed takes exactly the steps of an uninterrupted run: random choices depend only on
        the seed and the step. On the CPU, and with deterministic algorithms on CUDA, the weights are equal bit for bit.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: PanopticDataset,
        model: PanopticFPN,
        out: Path,
        process: Process,
        *,
        resume: bool = False,
        evaluate: Evaluate | None = None,
        quiet: bool = False,
    ) -> None:
        config.check()
        solver = config.solver
        if solver.batch_size % (process.world_size * solver.accumulate):
            parts = "" if solver.accumulate == 1 else f" times the {solver.accumulate} of solver.accumulate"
            raise ValueError(
                f"solver.batch_size: expected a multiple of the {process.world_size} processes{parts}, "
                f"got {solver.batch_size}"
            )
        for setting, value in (("best_by=", config.best_by), ("early_stop=0", config.early_stop)):
            if value and evaluate is None:
                raise UserError(
                    f"{setting.partition('=')[0]}: expected evaluation data, got none; set data.val_images and "
                    f"data.val_annotations, or {setting}"
                )
        figure = best_figure(config.best_by, model.config)
        check_installed(config.loggers)
        learned, given = model.config.categories, dataset.categories
        if learned != given:
            raise ValueError(
                f"model: its classes ({learned.name}) are not the data set's ({given.name}): "
                + given.compared_with(learned)
                + ". Leave out model.categories: the network takes the classes of the data"
            )
        self.config = config
        self.dataset = dataset
        self.process = process
        self.out = out
        self.evaluate = evaluate
        self.quiet = quiet or not process.is_first
        self.step = 0
        self._signals = StopSignals(interrupts=process.world_size == 1)

        self.model = model.to(process.device).train()
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        freeze(self.model, config.freeze_at)
        network = TrainingNetwork(
            self.model,
            config.lambda_instance,
            config.lambda_semantic,
            config.lambda_panoptic,
            config.rpn_samples,
            config.box_samples,
        )
        self.optimizer = make_optimizer(network, config.solver)
        self._saved_step = -1
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=config.precision == "float16")
        self.average = Average(self.model, config.solver.ema) if config.solver.ema > 0 else None
        self.checkpoints = Checkpoints(out)
        if resume:
            self._load()
        elif self.checkpoints.newest is not None:
            raise UserError(
                f"out: {out} holds the checkpoints of another run; resume it, or give another folder"
            )
        self.evaluations = broadcast(Evaluations(out, figure, self.step))
        if process.is_first:
            for name in (RESULT, BEST, SETTINGS, LOG, FILE, GALLERY):
                prepare_file(out / name, "out")
        self.network: nn.Module = network
        if process.world_size > 1:
            self.network = DistributedDataParallel(
                network,
                device_ids=[process.device] if process.device.type == "cuda" else None,
                find_unused_parameters=config.alternate,
            )

    def run(self) -> dict[str, float]:
        """Trains until the last step, or until `early_stop` ends the run.

        Returns:
            The figures of the last evaluation; empty without `evaluate`.

        Raises:
            Stopped: If SIGTERM or SIGINT arrived; the state is saved.
            Diverged: If the losses or the weights are not finite.
            UserError: If an image cannot be read.
            OSError: If a file cannot be written.
        """
        config, process = self.config, self.process
        loader = TrainLoader(
            self.dataset,
            make_transform(config.data, self.model.config.resize),
            config.solver.batch_size // process.world_size,
            seed=config.seed,
            workers=config.workers,
            rank=process.rank,
            world_size=process.world_size,
            start=self.step,
            subset=config.subset or None,
            skip_bad=config.skip_bad,
        )
        settings = dataclasses.asdict(config)
        trackers = []
        if process.is_first:
            trackers = start_trackers(self.out, config.loggers, settings, resumed=self.step > 0)
            with atomic_write(self.out / SETTINGS) as file:
                file.write(json.dumps(settings, indent=1).encode())
            self.evaluations.truncate_file()
        with (
            TrainingLog(
                self.out, config.solver.steps, self.step, process.device, trackers, self.quiet
            ) as log,
            self._signals,
            closing(loader),
        ):
            batches = iter(loader)
            last: Batch | None = None
            while True:
                if self._evaluation_is_due() and not self._evaluate(log):
                    self._save(last)
                    raise self._stopped()
                if self.step >= config.solver.steps:
                    break
                if self._ends_early(log):
                    self._save(last)
                    break
                batch = self._signals.interruptible(partial(next, batches))
                if batch is None:
                    self._save(last)
                    raise self._stopped()
                losses = self._take_step(batch)
                last = batch
                self.step += 1
                log.advance()
                done = self.step == config.solver.steps
                stop = self._anyone_stops()
                save = stop or done or self.step % config.checkpoint_every == 0
                if save or self.step % config.log_every == 0:
                    values = self._finite_values(losses)
                    if done or self.step % config.log_every == 0:
                        self._log(log, values)
                if save:
                    self._save(batch)
                if stop and not done:
                    raise self._stopped()
            if loader.skipped:
                log.say(f"{len(loader.skipped)} images could not be read and were skipped")
        return self.evaluations.figures

    def _take_step(self, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        rate = learning_rate(config.solver, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        branches: Sequence[str] = self.model.config.tasks
        if config.alternate:
            branches = (branches[self.step % len(branches)],)
        parts = parts_of(batch, config.solver.accumulate)
        pixels = labelled_pixels(parts, self.process.device)
        losses: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts:
            with self._without_exchange() if part is not parts[-1] else nullcontext():
                found = self._losses(part, branches, pixels)
                self.scaler.scale(total(found) / len(parts)).backward()
            for name, loss in found.items():
                losses[name] = losses.get(name, 0) + loss.detach() / len(parts)
        if config.solver.clip_gradients > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.solver.clip_gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        return losses

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Returns a `with` block whose gradients the processes do not average."""
        network = self.network
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()

    def _losses(
        self, batch: Batch, branches: Sequence[str], pixels: Tensor | None = None
    ) -> dict[str, Tensor]:
        device = self.process.device
        targets = [target.to(device, non_blocking=True) for target in batch.targets]
        dtype = getattr(torch, self.config.precision)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            losses: dict[str, Tensor] = self.network(batch.images, targets, batch.seeds, branches, pixels)
        return losses

    def _finite_values(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Returns the mean losses over all processes. Waits for the device, so that not every step reads them.

        Raises:
            Diverged: If a loss is not finite, in every process.
        """
        values = torch.stack([loss.detach() for loss in losses.values()])
        if self.process.world_size > 1:
            torch.distributed.all_reduce(values)
            values /= self.process.world_size
        found = dict(zip(losses, values.tolist(), strict=True))
        if not bool(values.isfinite().all()):
            raise self._diverged("loss", str(found))
        return found

    def _check_weights(self, batch: Batch) -> None:
        """Checks that weights are finite and have finite losses; changes neither buffers nor random states.

        The losses of a step precede its update of the weights, so they do not show that the update was good.

        Raises:
            Diverged: If a weight or a loss is not finite, in every process.
        """
        self._check_finite(self.model.state_dict())
        if self.average is not None:
            self._check_finite(self.average.state)
        device = self.process.device
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            found = [
                self._losses(part, self.model.config.tasks)
                for part in parts_of(batch, self.config.solver.accumulate)
            ]
            for buffer, before in buffers:
                buffer.copy_(before)
        for losses in found:
            self._finite_values(losses)

    def _check_finite(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise self._diverged("network", name)

    def _diverged(self, what: str, detail: str) -> Diverged:
        return Diverged(
            f"the {what} is not finite after step {self.step}: {detail}; try a lower solver.learning_rate or "
            "solver.clip_gradients"
        )

    def _log(self, log: TrainingLog, losses: dict[str, float]) -> None:
        if self.process.is_first:
            rate = learning_rate(self.config.solver, self.step - 1)
            log.losses(self.step, losses, rate, self.config.solver.batch_size)

    def _evaluation_is_due(self) -> bool:
        """Whether the run evaluates at this step and has not done so yet."""
        every = self.config.evaluate_every
        due = self.step == self.config.solver.steps or (
            every > 0 and self.step > 0 and self.step % every == 0
        )
        return due and self.evaluate is not None and self.evaluations.last_step < self.step

    def _evaluate(self, log: TrainingLog) -> bool:
        """Evaluates the network, or its average, and restores the weights; returns False if a signal interrupts."""
        assert self.evaluate is not None
        if self._signals.arrived and self.process.world_size == 1:
            return False
        weights = None
        if self.average is not None:
            weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(self.average.state)
        self.model.eval()
        try:
            evaluated = self._signals.interruptible(partial(self.evaluate, self.model))
        finally:
            self.model.train()
            if weights is not None:
                self.model.load_state_dict(weights)
        if evaluated is None:
            return False
        if not isinstance(evaluated, Evaluated):
            raise TypeError(
                f"evaluate: expected a function that returns an Evaluated, got a {type(evaluated).__name__}; "
                "return Evaluated(figures)"
            )
        # The first process decides for all which evaluation is the best, and when the run ends.
        evaluated = dataclasses.replace(evaluated, figures=broadcast(evaluated.figures))
        best = self.evaluations.best
        self.evaluations.add(self.step, evaluated)
        is_better = self.evaluations.best != best
        if is_better:
            self.save_result(self.out / BEST)
        if self.process.is_first:
            self.evaluations.append_to_file()
            log.evaluation(self.step, evaluated)
            if is_better:
                figure = self.evaluations.figure
                log.say(f"{figure} {evaluated.figures[figure]:.2f} is the best so far: {self.out / BEST}")
        return True

    def _ends_early(self, log: TrainingLog) -> bool:
        evaluations = self.evaluations
        if not 0 < self.config.early_stop <= evaluations.since_best:
            return False
        best = (
            "no evaluation gave a number"
            if evaluations.best is None
            else f"best after step {evaluations.best[0]}"
        )
        log.say(f"early_stop: the run ends after step {self.step} ({evaluations.figure}: {best})")
        return True

    def _stopped(self) -> Stopped:
        return Stopped(f"stopped after step {self.step}; --resume continues")

    def _anyone_stops(self) -> bool:
        """Whether any process was asked to stop; all must leave the loop at the same step."""
        if self.process.world_size == 1:
            return self._signals.arrived
        if self.step % self.config.log_every:  # this waits for the device
            return False
        stop = torch.tensor(int(self._signals.arrived), device=self.process.device)
        torch.distributed.all_reduce(stop)
        return bool(stop)

    def _save(self, batch: Batch | None) -> None:
        """Writes a checkpoint; every process must call this, because the check of the weights computes losses.

        Args:
            batch: The last batch; None if this process has taken no step, and there is nothing to save.
        """
        if batch is None or self._saved_step == self.step:
            return
        self._check_weights(batch)
        self._saved_step = self.step
        if self.process.is_first:
            self.checkpoints.save(self.step, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            **native.description_of(self.model.config),  # with it, `panfpn_fast.load` reads checkpoints, too
            "settings": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state,
            "random_state": torch.get_rng_state(),
        }

    def _load(self) -> None:
        path = self.checkpoints.newest
        if path is None:
            return
        state = self.checkpoints.load(path)
        expected = self._state()
        check_fits(path, state, self.config, expected)
        self.step = state["step"]
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.average is not None:
                self.average.state = {n: t.to(self.process.device) for n, t in state["average"].items()}
            torch.set_rng_state(state["random_state"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{path}: damaged ({one_line(error):.80}); delete it to use an older one"
            ) from error

    def save_result(self, path: Path) -> None:
        """Writes weights (their average if there is one), settings and classes, for `panfpn_fast.load`.

        Raises:
            Diverged: If a weight is not finite; nothing is written.
            OSError: If the file cannot be written.
        """
        weights = self.model.state_dict() if self.average is None else self.average.state
        self._check_finite(weights)
        if not self.process.is_first:
            return
        with atomic_write(path, durable=True) as file:
            torch.save(native.content_of(weights, self.model.config), file)
