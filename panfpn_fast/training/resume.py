"""Checks that a checkpoint fits a run before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from panfpn_fast._errors import UserError
from panfpn_fast.training.config import TrainConfig

# Settings that determine the parts and shapes of the state.
_OF_THE_STATE = ("preset", "model", "data", "freeze_at", "precision", "solver.ema", "solver.optimizer")

_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "settings": dict,
    "categories": list,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "average": (dict, type(None)),
    "random_state": Tensor,
}


def check_fits(path: Path, state: Any, config: TrainConfig, expected: Mapping[str, Any]) -> None:
    """Compares a checkpoint with the run that is to continue from it.

    Args:
        path: File of the checkpoint, for messages.
        state: Content of the file.
        config: Settings of the run.
        expected: The state of the run before it loads the checkpoint.

    Raises:
        UserError: If the checkpoint does not fit; the message names the settings that differ.
    """
    for name, kind in _ENTRIES.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise UserError(f"{path}: not a checkpoint of a training run: its entry {name!r} is not usable")
    if state["step"] > config.solver.steps:
        raise UserError(
            f"solver.steps: expected at least {state['step']}, the steps of {path}, got {config.solver.steps}"
        )
    try:
        problem = _problem(state, expected) or _other_optimizer(state, config)
    except (KeyError, TypeError, AttributeError) as error:  # an entry within the entries is damaged
        raise UserError(
            f"{path}: not a checkpoint of a training run, or a damaged one ({error!r:.60})"
        ) from error
    if problem is None:
        return
    there, here = _flat(state["settings"]), _flat(dataclasses.asdict(config))
    differences = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} now"
        for name in sorted(there.keys() | here.keys())
        if name.startswith(_OF_THE_STATE) and there.get(name) != here.get(name)
    ]
    raise UserError(
        f"resume: {path} does not fit: {'; '.join(differences) or problem}. Use the settings of that run, "
        "or another folder"
    )


def _problem(state: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Returns a description of the first difference in the parts and shapes of two states."""
    if state["categories"] != expected["categories"]:
        return "the classes of the data set differ"
    for part in ("model", "average"):
        found, wanted = _shapes(state[part]), _shapes(expected[part])
        if found != wanted:
            names = sorted(
                name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
            )
            return f"its {part} differs in {names[0]}"
    learning = [[len(group["params"]) for group in s["optimizer"]["param_groups"]] for s in (state, expected)]
    if learning[0] != learning[1]:
        return f"{sum(learning[0])} parameters learn there and {sum(learning[1])} now"
    if bool(state["scaler"]) != bool(expected["scaler"]):
        return "only one of them scales its losses"
    return None


def _other_optimizer(state: Mapping[str, Any], config: TrainConfig) -> str | None:
    # Checkpoints of the first versions, which had only SGD, do not name it.
    theirs = state["settings"].get("solver", {}).get("optimizer", "sgd")
    return None if theirs == config.solver.optimizer else f"its optimizer is {theirs}"


def _shapes(weights: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]]:
    return {} if weights is None else {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found
