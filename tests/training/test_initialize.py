"""Weights to begin with: each naming goes where it belongs, and what is not taken over is said."""

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
from checkpoint_samples import save_pickle, save_torch
from torch import Tensor
from training_samples import small_model

from panfpn_fast.checkpoints import CheckpointError, detectron2, hub, own
from panfpn_fast.data.categories import Categories, Category
from panfpn_fast.models import PanopticFPN
from panfpn_fast.training.initialize import initialize

TORCHVISION: dict[str, Any] = {
    "stride_in_1x1": False,
    "channel_order": "RGB",
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
}
Name = Callable[[str], str | None]


def torchvision_name(name: str) -> str:
    """Of one of our backbone's tensors, by the names that torchvision's ResNet documents."""
    name = name.replace("shortcut.conv", "downsample.0").replace("shortcut.norm", "downsample.1")
    return re.sub(r"\bnorm(\d)", r"bn\1", name)


def caffe2_name(name: str) -> str | None:
    """The same, by Caffe2's: res2_0_branch2a_w; normalisations have a scale (s) and a shift (b) alone."""
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
    """A network to fill, the one that its backbone shall be, and that one's weights by other names."""
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


def assert_equal(model: PanopticFPN, wanted: PanopticFPN) -> None:
    expected = wanted.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_torchvisions_naming(tmp_path: Path) -> None:
    model, wanted, weights = resnet(torchvision_name, **TORCHVISION)
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.1.bias", "layer4.2.bn3.weight"} <= set(
        weights
    )
    extras = {"fc.weight": torch.ones(1000, 2048), "bn1.num_batches_tracked": torch.tensor(5)}
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    torch.save({**tensors, **extras}, tmp_path / "resnet50.pth")
    messages = initialize(model, str(tmp_path / "resnet50.pth"))
    assert_equal(model, wanted)
    assert messages == [
        f"{len(weights)} of {len(model.state_dict())} tensors are from {tmp_path}/resnet50.pth"
    ]


def test_settings_that_the_weights_do_not_suit_are_named(tmp_path: Path) -> None:
    model, _, weights = resnet(torchvision_name)
    messages = initialize(model, str(save_torch(tmp_path / "a.pth", weights)))
    warned = [message for message in messages if message.startswith("warning: ")]
    assert [re.findall(r"with (\w+)=", message) for message in warned] == [[name] for name in TORCHVISION]
    assert warned[1].endswith("trained with channel_order='RGB', here it is 'BGR'")


@pytest.mark.parametrize("level", ["model", "blobs", ""])
def test_caffe2s_naming(tmp_path: Path, level: str) -> None:
    model, wanted, weights = resnet(caffe2_name)
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_w", "res5_2_branch2c_bn_b"} <= set(weights)
    content: dict[str, Any] = {
        **weights,
        "conv1_b": np.zeros(64, np.float32),
        "fc1000_b": np.ones(1000, np.float32),
    }
    path = save_pickle(tmp_path / "R-50.pkl", {level: content} if level else content)
    messages = initialize(model, str(path))
    assert_equal(model, wanted)
    assert len(messages) == 1
    # Statistics are not in the file, being part of scale and shift there.
    assert messages[0].startswith(f"{len(weights)} of ")
    assert not bool(model.backbone.get_submodule("norm1").get_buffer("running_mean").any())


def test_a_published_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted, weights = resnet(caffe2_name)
    monkeypatch.setattr(hub, "cache_dir", lambda: tmp_path)
    folder = tmp_path / "detectron2/ImageNetPretrained/MSRA"
    folder.mkdir(parents=True)
    save_pickle(folder / "R-50.pkl", {"model": weights})
    initialize(model, "detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert_equal(model, wanted)
    with pytest.raises(ValueError, match=r"unknown checkpoint .*MSRA/R-50.pkl"):
        initialize(model, "detectron2://ImageNetPretrained/MSRA/R-51.pkl")


def test_detectron2s_naming(tmp_path: Path) -> None:
    model, wanted, weights = resnet(detectron2_name)
    assert {"stem.conv1.norm.weight", "res2.0.shortcut.norm.running_mean"} <= set(weights)
    initialize(
        model, str(save_pickle(tmp_path / "R-50.pkl", {"model": weights, "matching_heuristics": True}))
    )
    assert_equal(model, wanted)


def test_group_norm_begins_anew(tmp_path: Path) -> None:
    model, wanted, weights = resnet(torchvision_name, backbone_norm="gn", **TORCHVISION)
    for name, tensor in wanted.backbone.state_dict().items():
        if "norm" in name:
            tensor.copy_(model.backbone.state_dict()[name])
    messages = initialize(model, str(save_torch(tmp_path / "a.pth", weights)))
    assert_equal(model, wanted)
    assert messages[1:] == ["GroupNorm cannot use the batch norms' values and begins anew"]


def save_own(path: Path, model: PanopticFPN) -> str:
    config = model.config
    count = config.num_things + config.num_stuff
    labels = [Category(i + 1, f"c{i}", i < config.num_things, (i, i, i)) for i in range(count)]
    categories = Categories("other", tuple(labels[: config.num_things]), tuple(labels[config.num_things :]))
    torch.save(own.content_of(model.state_dict(), dataclasses.asdict(config), categories), path)
    return str(path)


def changed(model: PanopticFPN) -> dict[str, Tensor]:
    """Weights that differ from any that are made at random."""
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
    messages = initialize(model, save_own(tmp_path / "a.pth", source))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith(others) and others else weights[name]), (
            name
        )
    heads = [name for name in before if others and name.startswith(others)]
    assert messages[0] == f"{len(before) - len(heads)} of {len(before)} tensors are from {tmp_path}/a.pth"
    assert len(messages) == (2 if others else 1)
    if others:
        assert messages[1].startswith("other classes or sizes, so these begin at random: ")
        told = dict(part.split(": ") for part in messages[1].partition(": ")[2].split("; "))
        assert set(told) == set(heads)
        name = others[0] + "weight"
        assert told[name] == f"{list(weights[name].shape)}, here {list(before[name].shape)}"


def test_a_detectron2_network_of_other_classes(tmp_path: Path) -> None:
    settings = {"backbone": "resnet50", "backbone_norm": "frozen_bn", "mask_head_convs": 4}
    source = small_model(**settings)
    weights = changed(source)
    path = save_torch(tmp_path / "a.pth", {detectron2.key(name): x.numpy() for name, x in weights.items()})
    model = small_model(**settings, num_stuff=9)
    messages = initialize(model, str(path))
    assert "semantic_head.logits.weight: [5, 16, 1, 1], here [10, 16, 1, 1]" in messages[1]
    assert torch.equal(model.box_head.class_logits.weight, weights["box_head.class_logits.weight"])


@pytest.mark.parametrize("content", [{}, [1, 2], {0: 1}, {"model": {}}, {"a": torch.ones(3)}])
def test_a_file_of_which_nothing_fits_is_named(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "a.pth"))):
        initialize(small_model(), str(tmp_path / "a.pth"))
