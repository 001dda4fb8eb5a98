"""load() and init= find the weights in files of training runs, whatever wraps them."""

from __future__ import annotations

import argparse
import datetime
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from panfpn_fast.checkpoints import CheckpointError, detectron2, load, reader
from panfpn_fast.checkpoints.wrappers import find_weights
from panfpn_fast.training.initialize import initialize
from support.checkpoint_samples import save_torch
from support.training_samples import small_model

BACKBONE: dict[str, Any] = {"backbone": "resnet18", "backbone_norm": "frozen_bn", "mask_head_convs": 4}


def is_network(names: Any) -> bool:
    return "conv.weight" in names


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "module.module.",
        "model.",
        "model._orig_mod.",
        "_forward_module.model.",
        "_fsdp_wrapped_module.",
        "architecture.",
        "averaged_model.module.",
    ],
)
@pytest.mark.parametrize(
    "level", ["", "model", "state_dict", "model_state_dict", "ema_state_dict", "network"]
)
def test_prefixes_and_levels(prefix: str, level: str) -> None:
    weights = {f"{prefix}conv.weight": 1, f"{prefix}conv.bias": 2}
    content = {level: weights, "epoch": 3, "optimizer": {"state": {}}} if level else weights
    assert find_weights(content, is_network) == {"conv.weight": 1, "conv.bias": 2}


def test_what_torch_writes() -> None:
    network = nn.Sequential()
    network.add_module("conv", nn.Conv2d(1, 1, 1))
    compiled: Any = torch.compile(network)  # compiles nothing until it is called
    averaged = torch.optim.swa_utils.AveragedModel(network)
    part = nn.Sequential()
    compiled_part: Any = torch.compile(network.get_submodule("conv"))
    part.add_module("conv", compiled_part)
    for wrapped in (compiled, averaged, nn.DataParallel(network), nn.DataParallel(compiled), part):
        assert isinstance(wrapped, nn.Module)
        state = wrapped.state_dict()
        assert "conv.weight" not in state
        found = find_weights({"model": state}, is_network)
        assert found is not None
        assert found.keys() == network.state_dict().keys()


def test_the_network_is_preferred_to_its_average_and_to_other_modules() -> None:
    content = {
        "ema_state_dict": {"conv.weight": "average"},
        "state_dict": {
            "ema_model.conv.weight": "average",
            "loss.weight": "other",
            "model.conv.weight": "network",
        },
    }
    assert find_weights(content, is_network) == {"conv.weight": "network"}
    del content["state_dict"]["model.conv.weight"]
    assert find_weights(content, is_network) == {"conv.weight": "average"}


def test_files_without_a_network() -> None:
    assert find_weights({"model": {"a.weight": 1}, "epoch": 2}, is_network) == {"a.weight": 1}
    assert find_weights([1], is_network) is None
    assert find_weights({1: 2}, is_network) is None
    endless: dict[str, Any] = {}
    endless |= {"model": endless, "state_dict": endless, "module." * 5000 + "conv.weight": 1}
    found = find_weights(endless, is_network)
    assert found is not None
    assert found.keys() == endless.keys()


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "model."])
def test_load_and_initial_weights(tmp_path: Path, prefix: str) -> None:
    original = small_model(**BACKBONE)
    weights = {prefix + name: value.numpy() for name, value in detectron2.tensors(original).items()}
    weights["criterion.weight"] = np.ones(3, np.float32)
    path = save_torch(tmp_path / "a.pth", weights, iteration=9)
    # The semantic head's groups are not in the file.
    loaded = load(path, semantic_groups=original.config.semantic_groups)
    random = small_model(**BACKBONE)
    for tensor in random.state_dict().values():
        tensor.fill_(0)
    initialize(random, str(path))
    for name, value in original.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(loaded.state_dict()[name], value), name
            assert torch.equal(random.state_dict()[name], value), name


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod."])
def test_our_state_dict_as_initial_weights(tmp_path: Path, prefix: str) -> None:
    original, model = small_model(), small_model()
    state = {prefix + name: torch.full_like(value, 7) for name, value in original.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    [message] = initialize(model, str(tmp_path / "a.ckpt"))
    assert message.startswith(f"{len(state)} of {len(state)} tensors")
    assert all(bool((value == 7).all()) for value in model.state_dict().values())


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "model.backbone."])
def test_a_wrapped_backbone_as_initial_weights(tmp_path: Path, prefix: str) -> None:
    model = small_model()
    ours = model.backbone.state_dict()
    state = {prefix + name: torch.full_like(value, 7) for name, value in ours.items() if "conv" in name}
    torch.save({"state_dict": {**state, "head.fc.weight": torch.ones(2, 2)}}, tmp_path / "a.pth")
    messages = initialize(model, str(tmp_path / "a.pth"))
    assert messages[0].startswith(f"{len(state)} of ")


def test_values_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    names = small_model().state_dict()
    for value in ("text", None, [1.0]):
        torch.save({**names, "fpn.lateral.p2.weight": value}, tmp_path / "a.pth")
        with pytest.raises(
            CheckpointError, match=r"a\.pth: fpn\.lateral\.p2\.weight: expected a tensor, got "
        ):
            initialize(small_model(), str(tmp_path / "a.pth"))


def test_settings_of_a_run_beside_the_weights(tmp_path: Path) -> None:
    rates: defaultdict[str, list[float]] = defaultdict(list)
    rates["a"].append(0.1)
    content = {
        "state_dict": {"a": torch.ones(2)},
        "hyper_parameters": argparse.Namespace(out=Path("runs"), rate=0.1),
        "started": datetime.datetime(2024, 1, 2),
        "took": datetime.timedelta(hours=3),
        "rates": rates,
    }
    torch.save(content, tmp_path / "a.ckpt")
    assert torch.equal(reader.read(tmp_path / "a.ckpt")["state_dict"]["a"], torch.ones(2))


def test_omegaconf_beside_the_weights(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    settings = omegaconf.OmegaConf.create({"model": {"depth": 50, "sizes": [1, 2.5, "a", None, True]}})
    torch.save({"state_dict": {"a": torch.ones(2)}, "hyper_parameters": settings}, tmp_path / "a.ckpt")
    assert torch.equal(reader.read(tmp_path / "a.ckpt")["state_dict"]["a"], torch.ones(2))


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return getattr, (self.path, "touch")


def test_getattr_does_not_run(tmp_path: Path) -> None:
    """Its stub returns no attribute, so a file cannot reach a function through it."""
    torch.save({"a": _Runs(tmp_path / "made")}, tmp_path / "a.pth")
    assert type(reader.read(tmp_path / "a.pth")["a"]).__name__ == "_LeftOut"
