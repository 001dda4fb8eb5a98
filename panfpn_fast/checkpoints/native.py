"""The native format: weights with the settings and the classes of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from panfpn_fast.checkpoints.reader import KEY, CheckpointError
from panfpn_fast.data.categories import Categories
from panfpn_fast.models.config import PanopticFPNConfig

_ATTACHED = "panfpn_fast_settings"


def is_native(content: object) -> bool:
    """Returns whether the content of a file is in the native format."""
    return isinstance(content, Mapping) and KEY in content


def description_of(config: PanopticFPNConfig) -> dict[str, Any]:
    """Returns the entries of a file except the weights, made of plain containers that JSON can hold.

    The classes become the rows of `categories`; in `config`, `dataset` is the name of the set.
    """
    fields = dict(vars(config))
    categories: Categories = fields.pop("categories")
    rows = [[c.id, c.name, c.isthing, list(c.color)] for c in categories.all]
    return {KEY: 1, "config": {**fields, "dataset": categories.name}, "categories": rows}


def content_of(model_state: Mapping[str, Any], config: PanopticFPNConfig) -> dict[str, Any]:
    """Returns the entries of a file, made of plain containers and tensors on the CPU."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model_state.items()}
    return {**description_of(config), "model": weights}


def weights(content: Mapping[str, Any]) -> Any:
    """Returns the tensors of a file: of a training run's checkpoint the moving average, if it has one."""
    average = content.get("average")
    return content["model"] if average is None else average


def attach(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entry that keeps a network's settings in a file of another framework."""
    return {_ATTACHED: dict(description)}


def attached_settings(content: object) -> dict[str, Any]:
    """Reads the settings that `attach` put into a file of another framework; returns no settings for other files.

    Raises:
        CheckpointError: If the settings are damaged, or a newer version of this package wrote them.
    """
    if not isinstance(content, Mapping):
        return {}
    for level in (content, content.get("meta")):
        if isinstance(level, Mapping) and is_native(level.get(_ATTACHED)):
            return settings(level[_ATTACHED])
    return {}


def settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the settings, including the classes as `categories`.

    If the file has no names of classes, the classes are numbered.

    Raises:
        CheckpointError: If an entry is missing or damaged, or a newer version of this package wrote it.
    """
    version = content[KEY]
    if type(version) is not int or version < 1:
        raise CheckpointError(f"damaged settings: {KEY}: expected a format version of 1, got {version!r}")
    if version > 1:
        raise CheckpointError(
            f"a newer panfpn_fast wrote this file: its format version is {version}, "
            "and this panfpn_fast reads version 1. Upgrade the package"
        )
    try:
        config = dict(content["config"])
        name, rows = config.pop("dataset"), content["categories"]
        if rows is not None:
            things, stuff = ([row for row in rows if bool(row[2]) == isthing] for isthing in (True, False))
            config["categories"] = Categories(name, tuple(things), tuple(stuff))
        return dict(vars(PanopticFPNConfig().replace(**config)))
    # RuntimeError: a tensor in place of a number has no truth value.
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"damaged settings or categories: {error}") from error
