"""Any entry of a checkpoint that is missing or has another type gives a `CheckpointError`, not an error of Python."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from panfpn_fast.checkpoints import CheckpointError, detectron2, load, mmdetection, native
from panfpn_fast.training.initialize import initialize
from support.training_samples import small_model

ABSENT = object()
VALUES: list[Any] = [None, "text", -1, 0.5, math.nan, [], {"a": 1}, torch.zeros(2)]


def content_of(layout: str) -> dict[str, Any]:
    model = small_model(backbone="resnet18", backbone_norm="frozen_bn", mask_head_convs=4)
    if layout == "native":
        model = small_model()
        return native.content_of(model.state_dict(), model.config)
    described = native.attach(native.description_of(model.config))
    if layout == "detectron2":
        return {"model": detectron2.tensors(model), **described}
    meta = {"dataset_meta": {"classes": [c.name for c in model.config.categories.all]}}
    return {"state_dict": mmdetection.tensors(model), "meta": meta}


def paths(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths to all entries; of long lists and of the tensors to the first ones."""
    keys = (
        list(content)
        if isinstance(content, dict)
        else range(len(content))
        if isinstance(content, list)
        else []
    )
    if len(path) and path[-1] in ("model", "state_dict"):
        keys = list(keys)[:2]
    if isinstance(content, list):
        keys = list(keys)[:2]
    return [found for key in keys for found in ((*path, key), *paths(content[key], (*path, key)))]


@pytest.mark.parametrize("layout", ["native", "detectron2", "mmdetection"])
def test_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    content = content_of(layout)
    network = small_model()
    file = tmp_path / "a.pth"
    file.touch()
    for path in paths(content):
        for value in [ABSENT, *VALUES]:
            changed = copy.copy(content)
            level: Any = changed
            for key in path[:-1]:  # tensors are shared with the original
                level[key] = copy.copy(level[key])
                level = level[key]
            if value is ABSENT:
                del level[path[-1]]
            else:
                level[path[-1]] = value
            monkeypatch.setattr("panfpn_fast.checkpoints.reader.read", lambda _, changed=changed: changed)
            # A name that is unknown here may be a backbone of a library that is not installed.
            expected = (CheckpointError, ImportError) if path[-1] == "backbone" else (CheckpointError,)
            for function in (load, lambda name: initialize(network, str(name))):
                try:
                    with contextlib.suppress(*expected):
                        function(file)
                except Exception as error:
                    raise AssertionError(f"{path} = {value!r}") from error
