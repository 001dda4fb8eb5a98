"""Our own format: weights with their settings and classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from panfpn_fast.checkpoints.reader import KEY, CheckpointError
from panfpn_fast.data.categories import Categories, Category, register_categories
from panfpn_fast.models.config import PanopticFPNConfig

_ATTACHED = "panfpn_fast_settings"


def is_own(content: object) -> bool:
    """Whether this package wrote it, in its own format."""
    return isinstance(content, Mapping) and KEY in content


def description_of(config: Mapping[str, Any], categories: Categories | None) -> dict[str, Any]:
    """What is written beside the weights: plain containers, that JSON can hold.

    Args:
        config: the fields of a ``PanopticFPNConfig``.
        categories: its classes; None if they have no names.
    """
    rows = None
    if categories is not None:
        rows = [[c.id, c.name, c.isthing, list(c.color)] for c in categories.all]
    return {KEY: 1, "config": dict(config), "categories": rows}


def content_of(
    model_state: Mapping[str, Any], config: Mapping[str, Any], categories: Categories | None
) -> dict[str, Any]:
    """What is written: plain containers and tensors."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model_state.items()}
    return {**description_of(config, categories), "model": weights}


def attach(description: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into another framework's file beside its own, so that reading it back gives the same network."""
    return {_ATTACHED: dict(description)}


def attached_settings(content: object) -> dict[str, Any]:
    """Reads what :func:`attach` put into another framework's file; nothing of a file that it did not.

    Raises:
        CheckpointError: It is damaged, or another version of this package wrote it.
    """
    if not isinstance(content, Mapping):
        return {}
    for place in (content, content.get("meta")):
        if isinstance(place, Mapping) and is_own(place.get(_ATTACHED)):
            return settings(place[_ATTACHED])
    return {}


def settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the settings, and makes the classes known.

    Raises:
        CheckpointError: A part is missing or damaged, or another version of this package wrote it.
    """
    if content[KEY] != 1:
        raise CheckpointError(f"layout {content[KEY]!r} of a newer panfpn_fast; this one reads layout 1")
    try:
        config = dict(vars(PanopticFPNConfig().replace(**content["config"])))
        if content["categories"] is None:
            return config
        found = [
            Category(int(i), str(name), bool(thing), tuple(color))
            for i, name, thing, color in content["categories"]
        ]
        things = tuple(category for category in found if category.isthing)
        stuff = tuple(category for category in found if not category.isthing)
        register_categories(Categories(config["dataset"], things, stuff))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged settings or categories: {error}") from error
    return config
