"""What training writes: weights with their settings and classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from panfpn_fast.checkpoints.reader import CheckpointError
from panfpn_fast.data.categories import Categories, Category, register_categories

_KEY = "panfpn_fast"


def is_own(content: object) -> bool:
    """Whether this package's training wrote it."""
    return isinstance(content, Mapping) and _KEY in content


def content_of(
    model_state: Mapping[str, Any], config: Mapping[str, Any], categories: Categories
) -> dict[str, Any]:
    """What is written: plain containers and tensors."""
    return {
        _KEY: 1,
        "config": dict(config),
        "categories": [[c.id, c.name, c.isthing, list(c.color)] for c in categories.all],
        "model": {name: tensor.detach().cpu() for name, tensor in model_state.items()},
    }


def settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the settings, and makes the classes known.

    Raises:
        CheckpointError: A part is missing or damaged, or another version of this package wrote it.
    """
    if content[_KEY] != 1:
        raise CheckpointError(f"layout {content[_KEY]!r} of a newer panfpn_fast; this one reads layout 1")
    try:
        config = dict(content["config"])
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
