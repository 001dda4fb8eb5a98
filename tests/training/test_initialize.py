"""Initial weights: all naming schemes are mapped correctly, and tensors that are not loaded are reported."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from panfpn_fast.checkpoints import CheckpointError, detectron2, hub, native
from panfpn_fast.models import PanopticFPN
from panfpn_fast.training.initialize import initialize
from support.checkpoint_samples import save_pickle, save_torch
from support.tensors import assert_same_tensors
from support.training_samples import small_model

TORCHVISION: dict[str, Any] = {
    "stride_in_1x1": False,
    "channel_order": "RGB",
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
}
Name = Callable[[str], str | None]


def torchvision_name(name: str) -> str:
    """Converts the name of a backbone tensor to the name in torchvision's ResNet."""
    name = name.replace("shortcut.conv", "downsample.0").replace("shortcut.norm", "downsample.1")
    return re.sub(r"\bnorm(\d)", r"bn\1", name)


def caffe2_name(name: str) -> str | None:
    """Converts the name of a backbone tensor to Caffe2's, for example res2_0_branch2a_w.

    Normalisation layers have only a scale (s) and a shift (b), so other tensors give None.
    """
    kind = {"weight": "w", "bias": "b"}.get(name.rsplit(".", 1)[1])
    if kind is None:
        return None
    if "norm" in name:
        kind = {"w": "bn_s", "b": "bn_b"}[kind]
    if not name.startswith("layer"):
        return f"res_conv1_{kind}" if "norm" in name else f"conv1_{kind}"
    stage, block, part = name.split(".")[:3]
    branch = "1" if part == "shortcut" else "2" + " abc"[int(part[-1])]
    return f"res{int(stage[-1]) + 1}_{block}_branch{branch}_{kind}"


def detectron2_name(name: str) -> str:
    return detectron2.key(f"backbone.{name}").removeprefix("backbone.bottom_up.")


def resnet(rename: Name, **settings: Any) -> tuple[PanopticFPN, PanopticFPN, dict[str, np.ndarray[Any, Any]]]:
    """Returns a network to initialise, a copy with the expected weights, and the backbone weights of the copy.

    The weights have the names that `rename` returns.
    """
    model = small_model(backbone="resnet50", **{"backbone_norm": "frozen_bn", **settings})
    wanted = copy.deepcopy(model)
    random = torch.Generator().manual_seed(1)
    weights = {}
    for name, tensor in wanted.backbone.state_dict().items():
        theirs = rename(name)
        if theirs is not None:
            tensor.uniform_(0.5, 1, generator=random)
            weights[theirs] = tensor.numpy().copy()
    return model, wanted, weights


def test_torchvision_names(tmp_path: Path) -> None:
    model, wanted, weights = resnet(torchvision_name, **TORCHVISION)
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.1.bias", "layer4.2.bn3.weight"} <= set(
        weights
    )
    extras = {"fc.weight": torch.ones(1000, 2048), "bn1.num_batches_tracked": torch.tensor(5)}
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    torch.save({**tensors, **extras}, tmp_path / "resnet50.pth")
    messages = initialize(model, str(tmp_path / "resnet50.pth"))
    assert_same_tensors(model.state_dict(), wanted.state_dict())
    assert messages == [
        f"{len(weights)} of {len(model.state_dict())} tensors are from {tmp_path}/resnet50.pth"
    ]


def test_settings_that_do_not_suit_the_weights_are_reported(tmp_path: Path) -> None:
    model, _, weights = resnet(torchvision_name)
    messages = initialize(model, str(save_torch(tmp_path / "a.pth", weights)))
    warned = [message for message in messages if message.startswith("warning: ")]
    assert [re.findall(r"with (\w+)=", message) for message in warned] == [[name] for name in TORCHVISION]
    assert warned[1].endswith("trained with channel_order='RGB', here it is 'BGR'")


@pytest.mark.parametrize("level", ["model", "blobs", ""])
def test_caffe2_names(tmp_path: Path, level: str) -> None:
    model, wanted, weights = resnet(caffe2_name)
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_w", "res5_2_branch2c_bn_b"} <= set(weights)
    content: dict[str, Any] = {
        **weights,
        "conv1_b": np.zeros(64, np.float32),
        "fc1000_b": np.ones(1000, np.float32),
    }
    path = save_pickle(tmp_path / "R-50.pkl", {level: content} if level else content)
    messages = initialize(model, str(path))
    assert_same_tensors(model.state_dict(), wanted.state_dict())
    assert len(messages) == 1
    # The file has no statistics, because its scale and shift include them.
    assert messages[0].startswith(f"{len(weights)} of ")
    assert not bool(model.backbone.get_submodule("norm1").get_buffer("running_mean").any())


def test_a_published_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted, weights = resnet(caffe2_name)
    monkeypatch.setattr(hub, "cache_dir", lambda: tmp_path)
    folder = tmp_path / "detectron2/ImageNetPretrained/MSRA"
    folder.mkdir(parents=True)
    save_pickle(folder / "R-50.pkl", {"model": weights})
    initialize(model, "detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert_same_tensors(model.state_dict(), wanted.state_dict())
    with pytest.raises(ValueError, match=r"unknown checkpoint .*MSRA/R-50.pkl"):
        initialize(model, "detectron2://ImageNetPretrained/MSRA/R-51.pkl")


def test_detectron2_names(tmp_path: Path) -> None:
    model, wanted, weights = resnet(detectron2_name)
    assert {"stem.conv1.norm.weight", "res2.0.shortcut.norm.running_mean"} <= set(weights)
    initialize(
        model, str(save_pickle(tmp_path / "R-50.pkl", {"model": weights, "matching_heuristics": True}))
    )
    assert_same_tensors(model.state_dict(), wanted.state_dict())


def test_group_norm_keeps_its_initial_values(tmp_path: Path) -> None:
    model, wanted, weights = resnet(torchvision_name, backbone_norm="gn", **TORCHVISION)
    for name, tensor in wanted.backbone.state_dict().items():
        if "norm" in name:
            tensor.copy_(model.backbone.state_dict()[name])
    messages = initialize(model, str(save_torch(tmp_path / "a.pth", weights)))
    assert_same_tensors(model.state_dict(), wanted.state_dict())
    assert messages[1:] == ["GroupNorm cannot use the values of the batch norms and keeps its initial values"]


def save_native(path: Path, model: PanopticFPN) -> str:
    torch.save(native.content_of(model.state_dict(), model.config), path)
    return str(path)


def changed(model: PanopticFPN) -> dict[str, Tensor]:
    """Sets all weights to a value that random initialisation does not give, and returns them."""
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    return model.state_dict()


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({}, ()),
        ({"num_things": 5}, ("box_head.class_logits.", "box_head.box_deltas.", "mask_head.logits.")),
        ({"num_stuff": 2}, ("semantic_head.logits.",)),
        ({"tasks": ("semantic",)}, ()),
    ],
)
def test_our_own_checkpoint(tmp_path: Path, settings: dict[str, Any], others: tuple[str, ...]) -> None:
    source = small_model()
    weights = changed(source)
    model = small_model(**settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    messages = initialize(model, save_native(tmp_path / "a.pth", source))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith(others) and others else weights[name]), (
            name
        )
    heads = [name for name in before if others and name.startswith(others)]
    assert messages[0] == f"{len(before) - len(heads)} of {len(before)} tensors are from {tmp_path}/a.pth"
    assert len(messages) == (2 if others else 1)
    if others:
        start = "these layers keep their random initial values, because the classes differ: "
        counts = [[len(tensors[f"{layer}bias"]) for tensors in (weights, before)] for layer in others]
        assert messages[1] == start + ", ".join(
            f"{layer[:-1]} ({there} outputs there, {here} here)"
            for layer, (there, here) in zip(others, counts, strict=True)
        )


def test_tensors_of_another_width_are_reported(tmp_path: Path) -> None:
    source = small_model()
    messages = initialize(small_model(semantic_channels=8), save_native(tmp_path / "a.pth", source))
    assert len(messages) == 2
    assert messages[1].startswith("these keep their random initial values, because their shapes differ: ")
    assert "semantic_head.logits.weight: [5, 16, 1, 1], here [5, 8, 1, 1]" in messages[1]


def test_other_classes_of_equal_number_are_reported(tmp_path: Path) -> None:
    source = small_model()
    renamed = source.config.categories
    renamed = dataclasses.replace(
        renamed, things=tuple(c._replace(name=f"my {c.name}") for c in renamed.things)
    )
    path = save_native(tmp_path / "a.pth", source)
    messages = initialize(small_model(categories=renamed), path)
    assert messages[1:] == [
        f"warning: {path} has other classes, and as many: 1 thing 1, 2 thing 2, 3 thing 3, here 1 my thing 1, 2 my "
        "thing 2, 3 my thing 3; each class starts from the weights of the class in its place"
    ]


def test_a_detectron2_network_with_other_classes(tmp_path: Path) -> None:
    settings = {"backbone": "resnet50", "backbone_norm": "frozen_bn", "mask_head_convs": 4}
    source = small_model(**settings)
    weights = changed(source)
    path = save_torch(tmp_path / "a.pth", {detectron2.key(name): x.numpy() for name, x in weights.items()})
    model = small_model(**settings, num_stuff=9)
    messages = initialize(model, str(path))
    assert messages[1].endswith("because the classes differ: semantic_head.logits (5 outputs there, 10 here)")
    assert torch.equal(model.box_head.class_logits.weight, weights["box_head.class_logits.weight"])


@pytest.mark.parametrize("content", [{}, [1, 2], {0: 1}, {"model": {}}, {"a": torch.ones(3)}])
def test_a_file_without_matching_tensors_is_reported(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "a.pth"))):
        initialize(small_model(), str(tmp_path / "a.pth"))
