"""The training loop."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from panfpn_fast.checkpoints import own
from panfpn_fast.data.loader import Batch, PanopticDataset, TrainLoader
from panfpn_fast.data.transforms import Compose, Crop, Flip, Photometric, Resize, Transform
from panfpn_fast.distributed import Process
from panfpn_fast.models.backbone import ResNet
from panfpn_fast.models.config import get_preset
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.training.checkpoint import Checkpoints, save_atomically
from panfpn_fast.training.config import DataConfig, TrainConfig
from panfpn_fast.training.logging import TrainingLog
from panfpn_fast.training.network import TrainingNetwork, total
from panfpn_fast.training.schedule import learning_rate, make_optimizer

Evaluate = Callable[[PanopticFPN], dict[str, float]]


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved its state."""


def make_transform(data: DataConfig, resize: str) -> Transform:
    """The random changes of training images that a configuration asks for; `resize` is the network's."""
    steps: list[Transform] = [Resize(data.short_edges, data.max_edge, data.continuous_edges, resize)]
    if data.crop:
        steps.append(Crop((data.crop[0], data.crop[1]), data.crop_most_of_one_class))
    steps.append(Flip(data.flip))
    if data.photometric:
        steps.append(Photometric())
    return Compose(steps)


def make_model(config: TrainConfig, dataset: PanopticDataset) -> PanopticFPN:
    """The network for a data set, with random weights that depend on the seed alone."""
    categories = dataset.categories
    fields = {
        "num_things": len(categories.things),
        "num_stuff": len(categories.stuff),
        "dataset": categories.name,
        **config.model,
    }
    torch.manual_seed(config.seed)
    return PanopticFPN.from_config(get_preset(config.preset).replace(**fields))


def freeze(model: PanopticFPN, stages: int) -> None:
    """Takes the first stages of the backbone out of the training: 1 is the stem, 2 the first stage too.

    Raises:
        ValueError: The backbone is no ResNet, and has no stages that are known.
    """
    if stages > 0 and not isinstance(model.backbone, ResNet):
        raise ValueError(f"freeze_at: expected 0 with the backbone {model.config.backbone!r}, got {stages}")
    names = ["conv1", "norm1"] if stages > 0 else []
    names += [f"layer{stage}" for stage in range(1, stages)]
    for name in names:
        for parameter in model.backbone.get_submodule(name).parameters():
            parameter.requires_grad_(False)


class Average:
    """An exponential moving average of a network's weights and statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the network as it is."""
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor, 1 - self.decay)
            else:
                self.state[name].copy_(tensor)


@contextmanager
def _signals(handle: Callable[..., None]) -> Iterator[None]:
    """Handles SIGTERM and SIGINT, where this is the main thread."""
    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """Trains a network and keeps its state on disk.

    Args:
        config: The run.
        dataset: What to train on.
        model: The network, with the weights to begin with.
        out: Folder for checkpoints, the log and the result.
        process: This process' place.
        resume: Go on from the newest checkpoint in the folder, if there is one. Without it the folder must have none.
        evaluate: Called with the network now and then and at the end; its figures go to the log.
        quiet: No progress bar.

    Note:
        A run that is stopped and resumed takes the very steps of one that is not: what is random depends on the seed
        the step alone. On the CPU, and with deterministic algorithms on CUDA, the weights are equal bit for bit.
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
        if config.solver.batch_size % process.world_size:
            raise ValueError(
                f"solver.batch_size: expected a multiple of the {process.world_size} processes, "
                f"got {config.solver.batch_size}"
            )
        self.config = config
        self.dataset = dataset
        self.process = process
        self.out = out
        self.evaluate = evaluate
        self.quiet = quiet or not process.is_first
        self.step = 0
        self._stop = False

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
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=config.precision == "float16")
        self.average = Average(self.model, config.solver.ema) if config.solver.ema > 0 else None
        self.checkpoints = Checkpoints(out)
        if resume:
            self._load(self.checkpoints.load_newest())
        elif self.checkpoints.exist():
            raise ValueError(
                f"out: {out} holds the checkpoints of another run; resume it, or give another folder"
            )
        if process.is_first:
            out.mkdir(parents=True, exist_ok=True)
        self.network: nn.Module = network
        if process.world_size > 1:
            self.network = DistributedDataParallel(
                network,
                device_ids=[process.device] if process.device.type == "cuda" else None,
                find_unused_parameters=config.alternate,
            )

    def run(self) -> dict[str, float]:
        """Trains to the end.

        Returns:
            The last evaluation's figures; none without `evaluate`.

        Raises:
            Stopped: SIGTERM or SIGINT came; the state is saved.
            FloatingPointError: The loss is no longer a number.
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
        if process.is_first:
            (self.out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
        metrics: dict[str, float] = {}
        with (
            TrainingLog(self.out, config.solver.steps, self.step, process.device, self.quiet) as log,
            _signals(self._ask_to_stop),
        ):
            batches = iter(loader)
            while self.step < config.solver.steps:
                losses = self._take_step(next(batches))
                self.step += 1
                log.advance()
                if self.step % config.log_every == 0 or self.step == config.solver.steps:
                    self._log(log, losses)
                done = self.step == config.solver.steps
                stop = self._anyone_stops()
                if stop or done or self.step % config.checkpoint_every == 0:
                    self._save()
                if stop and not done:
                    raise Stopped(f"stopped after step {self.step}; --resume goes on")
                if self.evaluate and (
                    done or (config.evaluate_every and self.step % config.evaluate_every == 0)
                ):
                    metrics = self._evaluate(log)
            if loader.skipped:
                log.say(f"{len(loader.skipped)} images could not be read and were skipped")
        return metrics

    def _take_step(self, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        rate = learning_rate(config.solver, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = self.process.device
        targets = [target.to(device, non_blocking=True) for target in batch.targets]
        branches: Sequence[str] = self.model.config.tasks
        if config.alternate:
            branches = (branches[self.step % len(branches)],)
        dtype = getattr(torch, config.precision)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            losses: dict[str, Tensor] = self.network(batch.images, targets, batch.seeds, branches)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total(losses)).backward()
        if config.solver.clip_gradients > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.solver.clip_gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        return losses

    def _log(self, log: TrainingLog, losses: dict[str, Tensor]) -> None:
        # The only read of the device's numbers in the loop.
        values = torch.stack([loss.detach() for loss in losses.values()])
        if self.process.world_size > 1:
            torch.distributed.all_reduce(values)
            values /= self.process.world_size
        if not bool(values.isfinite().all()):
            raise FloatingPointError(
                f"the loss is no longer a number after step {self.step}: "
                f"{dict(zip(losses, values.tolist(), strict=True))}; try a lower solver.learning_rate or "
                "solver.clip_gradients"
            )
        if self.process.is_first:
            rate = learning_rate(self.config.solver, self.step - 1)
            found = dict(zip(losses, values.tolist(), strict=True))
            log.losses(self.step, found, rate, self.config.solver.batch_size)

    def _evaluate(self, log: TrainingLog) -> dict[str, float]:
        """Evaluates the network, or its average, and leaves it as it was."""
        assert self.evaluate is not None
        own = None
        if self.average is not None:
            own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(self.average.state)
        self.model.eval()
        metrics = self.evaluate(self.model)
        self.model.train()
        if own is not None:
            self.model.load_state_dict(own)
        if self.process.is_first:
            log.metrics(self.step, metrics)
        return metrics

    def _ask_to_stop(self, *_: object) -> None:
        self._stop = True

    def _anyone_stops(self) -> bool:
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if self.process.world_size == 1:
            return self._stop
        if self.step % self.config.log_every:  # asking waits for the device
            return False
        stop = torch.tensor(int(self._stop), device=self.process.device)
        torch.distributed.all_reduce(stop)
        return bool(stop)

    def _save(self) -> None:
        if not self.process.is_first:
            return
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state,
            "random_state": torch.get_rng_state(),
        }
        self.checkpoints.save(self.step, state)

    def _load(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["average"] is not None:
            self.average.state = {n: t.to(self.process.device) for n, t in state["average"].items()}
        torch.set_rng_state(state["random_state"])

    def save_result(self, path: Path) -> None:
        """Writes what `panfpn_fast.load` reads: weights (their average where there is one), settings and classes."""
        if not self.process.is_first:
            return
        weights = self.model.state_dict() if self.average is None else self.average.state
        config = dataclasses.asdict(self.model.config)
        save_atomically(own.content_of(weights, config, self.dataset.categories), path)
