"""save() and `panfpn-fast convert`: in each layout, the file reads back as the same network."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

import panfpn_fast
from panfpn_fast.checkpoints import CheckpointError, load, native, save
from panfpn_fast.cli.main import main
from panfpn_fast.data.categories import Categories, Category, numbered_categories
from panfpn_fast.models import PanopticFPN
from support.checkpoint_samples import (
    SMALL,
    save_mmdetection,
    save_pickle,
    small_mmdetection_weights,
    small_network,
    small_weights,
)
from support.tensors import assert_same_tensors

FOUR = Categories(
    "saved",
    tuple(Category(i, f"thing{i}", True, (i, 0, 0)) for i in (1, 2, 3)),
    tuple(Category(i, f"stuff{i}", False, (0, i, 0)) for i in (4, 5, 6, 7)),
)


@pytest.fixture
def model() -> PanopticFPN:
    """A network with its own classes, with settings that no tensor shows, and with channels-last weights."""
    settings = {"stride_in_1x1": False, "resize": "mmdetection", "pixel_std": (2, 3, 4), "categories": FOUR}
    made = PanopticFPN(**{**SMALL, **settings}).eval()
    made.load_state_dict(small_network().state_dict())
    for parameter in made.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return made


def _assert_equal(got: PanopticFPN, expected: PanopticFPN) -> None:
    assert got.config == expected.config
    assert_same_tensors(got.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("a.safetensors", None),
        ("a.pth", None),
        ("a.pkl", None),
        ("a.pth", "detectron2"),
        ("a.pth", "mmdetection"),
    ],
)
def test_round_trip(tmp_path: Path, model: PanopticFPN, name: str, layout: str | None) -> None:
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / name
    if layout is None:
        panfpn_fast.save(model, path)
    else:
        save(model, path, layout)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    got = load(path)
    _assert_equal(got, model)
    assert not got.training
    assert not any(tensor.is_meta for tensor in (*got.parameters(), *got.buffers()))
    assert dataclasses.asdict(got.config.categories) == dataclasses.asdict(FOUR)  # names and colors, too
    assert load(path, pixel_std=(1, 1, 1)).config.pixel_std == (1, 1, 1)


def test_detectron2_layout(tmp_path: Path, model: PanopticFPN) -> None:
    """The file has the names and arrays of detectron2's files, and the `__author__` by which its loader knows them."""
    panfpn_fast.save(model, tmp_path / "a.pkl")
    content = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert content["__author__"] == "panfpn_fast"
    expected = small_weights()
    assert content["model"].keys() == expected.keys()
    assert all((content["model"][name] == value).all() for name, value in expected.items())


def test_mmdetection_layout(tmp_path: Path, model: PanopticFPN) -> None:
    save(model, tmp_path / "a.pth", "mmdetection")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert content["meta"]["dataset_meta"]["classes"] == [c.name for c in FOUR.all]
    weights = content["state_dict"]
    assert weights["backbone.layer1.0.bn1.num_batches_tracked"].dtype == torch.int64
    bias = model.semantic_head.logits.bias
    assert bias is not None
    assert torch.equal(weights["semantic_head.conv_logits.bias"], torch.cat((bias[1:], bias[:1])))


def test_safetensors_alone(tmp_path: Path, model: PanopticFPN) -> None:
    """The reader of safetensors returns the tensors, and the other entries as text."""
    safetensors = pytest.importorskip("safetensors")
    panfpn_fast.save(model.half(), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["panfpn_fast"])
        assert set(file.keys()) == set(model.state_dict())
        assert file.get_tensor("fpn.output.p2.weight").dtype == torch.float16
    assert described["config"]["pixel_std"] == [2, 3, 4]
    assert described["categories"][3] == [4, "stuff4", False, [0, 4, 0]]
    got = load(tmp_path / "a.safetensors")
    assert got.dtype == torch.float32
    name = "fpn.output.p2.weight"
    assert torch.equal(got.get_parameter(name), model.get_parameter(name).float())


def test_other_safetensors_files(tmp_path: Path) -> None:
    """Files with a framework's names, with unknown names, with damaged metadata, and a truncated file."""
    torch_part = pytest.importorskip("safetensors.torch")
    tensors = {name: torch.from_numpy(value) for name, value in small_weights().items()}
    torch_part.save_file(tensors, tmp_path / "a.safetensors")
    _assert_equal(load(tmp_path / "a.safetensors"), small_network())
    torch_part.save_file({"x": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"b.safetensors: not a checkpoint of .*its first entries are x"
    ):
        load(tmp_path / "b.safetensors")
    torch_part.save_file({"x": torch.zeros(2)}, tmp_path / "c.safetensors", {"panfpn_fast": "{"})
    with pytest.raises(CheckpointError, match=r"c.safetensors: not a readable \.safetensors file"):
        load(tmp_path / "c.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "d.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"d.safetensors: not a readable \.safetensors file"):
        load(tmp_path / "d.safetensors")


def test_without_safetensors(
    tmp_path: Path, model: PanopticFPN, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    advice = r"a\.safetensors: .*pip install safetensors"
    with pytest.raises(ImportError, match=advice):
        panfpn_fast.save(model, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ImportError, match=advice):
        load(tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "a.pth")]) == 2
    assert "pip install safetensors" in capsys.readouterr().err


def test_classes_without_names(tmp_path: Path) -> None:
    """The classes of the small network are numbered. A file can also have no classes."""
    model = small_network()
    panfpn_fast.save(model, tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert native.is_native(content)
    assert [row[1] for row in content["categories"]] == [c.name for c in numbered_categories(3, 4).all]
    settings = {name: value for name, value in vars(model.config).items() if name != "categories"}
    assert content["config"] == {**settings, "dataset": "numbered"}
    torch.save({**content, "categories": None}, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        _assert_equal(load(tmp_path / name), model)


def test_damaged_settings(tmp_path: Path, model: PanopticFPN) -> None:
    """Files of a newer version, which has unknown settings, are among the cases."""
    panfpn_fast.save(model, tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    for change, message in (
        ({"panfpn_fast": 2}, "a newer panfpn_fast wrote this file: its format version is 2"),
        ({"config": {**content["config"], "new": 1}}, "damaged settings or categories: new: unknown setting"),
        (
            {"config": {**content["config"], "resize": "?"}},
            "damaged settings or categories: resize: expected",
        ),
        ({"categories": [[1]]}, "damaged settings or categories"),
        (
            {"categories": content["categories"][1:]},
            "damaged settings or categories: num_things: expected 2, as many",
        ),
        (
            {"categories": content["categories"] * 2},
            "damaged settings or categories: .*got 2 classes with the id 1",
        ),
        ({"model": {}}, "the tensors do not fit the network of the settings: .*Missing key"),
        ({"model": {"rpn.conv.bias": 3}}, "the tensors do not fit the network of the settings"),
    ):
        torch.save({**content, **change}, tmp_path / "b.pth")
        with pytest.raises(CheckpointError, match=f"(?s)b.pth: {message}"):
            load(tmp_path / "b.pth")


def test_networks_and_files_that_cannot_be_saved(tmp_path: Path, model: PanopticFPN) -> None:
    message = r"a\.onnx: a checkpoint in the native layout needs the suffix \.safetensors or \.pth"
    with pytest.raises(ValueError, match=message):
        panfpn_fast.save(model, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"in the mmdetection layout needs the suffix \.pth"):
        save(model, tmp_path / "a.pkl", "mmdetection")
    with pytest.raises(
        ValueError, match="layout: expected one of native, detectron2, mmdetection, got 'keras'"
    ):
        save(model, tmp_path / "a.pth", "keras")
    with pytest.raises(TypeError, match="model: expected a PanopticFPN, got dict"):
        save({}, tmp_path / "a.pth")  # type: ignore[arg-type]
    with torch.device("meta"):
        others = [PanopticFPN(**SMALL, fpn_groups=2), PanopticFPN(**SMALL, semantic_fusion="concat")]
    for other, what in zip(others, ("fpn.instance", "semantic_fusion='concat'"), strict=True):
        for layout in ("detectron2", "mmdetection"):
            with pytest.raises(
                ValueError, match=f"the {layout} layout cannot hold .* no counterpart of .*{what}"
            ):
                save(other, tmp_path / "a.pth", layout)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.pth").mkdir()
    with pytest.raises(OSError, match=r"path: expected the path of a file, got the folder .*a\.pth"):
        panfpn_fast.save(model, tmp_path / "a.pth")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"path: expected a folder, got the file .*file"):
        panfpn_fast.save(model, tmp_path / "file" / "a.pth")
    panfpn_fast.save(model, tmp_path / "new" / "folder" / "a.pth")
    assert (tmp_path / "new" / "folder" / "a.pth").is_file()


def test_convert_between_all_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(source: str, target: str, *more: str) -> str:
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), *more]) == 0
        return capsys.readouterr().out

    save_mmdetection(tmp_path / "mm.pth", small_mmdetection_weights())
    there = load(tmp_path / "mm.pth")
    assert "\nscore_threshold: 0.6\n" in convert("mm.pth", "native.pth")
    convert("native.pth", "d2.pkl")
    convert("d2.pkl", "d2.pth", "--to", "detectron2")
    out = convert("d2.pth", "back.pth", "--to", "mmdetection")
    assert out.endswith(f"{tmp_path / 'd2.pth'} -> {tmp_path / 'back.pth'}\n")
    for name in ("native.pth", "d2.pkl", "d2.pth", "back.pth"):
        _assert_equal(load(tmp_path / name), there)
    first, last = (torch.load(tmp_path / n, weights_only=True)["state_dict"] for n in ("mm.pth", "back.pth"))
    assert first.keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in first.items())


def test_convert_reports_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pickle(tmp_path / "a.pkl", {"model": small_weights()})
    for arguments, message in (
        (["nothing.pkl", "b.pth"], "nothing.pkl: no such file"),
        (["a.pkl", "b.bin"], "b.bin: a checkpoint in the native layout needs the suffix"),
        (["a.pkl", "b.pkl", "--to", "mmdetection"], "in the mmdetection layout needs the suffix .pth"),
    ):
        paths = [str(tmp_path / name) for name in arguments[:2]]
        assert main(["convert", *paths, *arguments[2:]]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]


def test_a_backbone_of_another_library(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = PanopticFPN(**{**SMALL, "backbone": "torchvision:mobilenet_v3_small"}).eval()
    panfpn_fast.save(model, tmp_path / "a.pth")
    got = load(tmp_path / "a.pth")
    _assert_equal(got, model)
    assert not any(tensor.is_meta for tensor in (*got.parameters(), *got.buffers()))
    with pytest.raises(ValueError, match="the detectron2 layout cannot hold this network"):
        panfpn_fast.save(model, tmp_path / "a.pkl")
    with pytest.raises(ValueError, match="the detectron2 layout cannot hold this network"):
        save(model, tmp_path / "b.pth", "detectron2")
