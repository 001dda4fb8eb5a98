"""load(): both file formats of detectron2, and the errors for files that do not fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import panfpn_fast
from panfpn_fast.checkpoints import CheckpointError, detectron2, load, native
from panfpn_fast.data.categories import Categories, Category, get_categories
from panfpn_fast.inference import Predictor
from panfpn_fast.models import PanopticFPN
from panfpn_fast.training.initialize import initialize
from support.checkpoint_samples import SMALL, Weights, save_pickle, save_torch, small_network, small_weights
from support.tensors import assert_same_tensors
from support.training_samples import small_model

CATEGORIES = [Category(i, f"c{i}", i < 4, (i, i, i)) for i in range(1, 8)]


@pytest.fixture
def original() -> PanopticFPN:
    return small_network()


@pytest.fixture
def weights() -> Weights:
    return small_weights()


def _assert_equal(model: PanopticFPN, original: PanopticFPN) -> None:
    assert not model.training
    assert_same_tensors(model.state_dict(), original.state_dict())
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32, name
        assert value.device.type == "cpu", name
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert not tensor.is_meta, name
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.rpn.cells, original.rpn.cells)


def test_pickle(tmp_path: Path, weights: Weights, original: PanopticFPN) -> None:
    content = {"model": weights, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    model = load(save_pickle(tmp_path / "model_final.pkl", content))
    _assert_equal(model, original)
    assert model.config == original.config
    [output] = model([torch.zeros(3, 40, 60, dtype=torch.uint8)])
    assert output.panoptic.shape == (40, 60)


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_file_with_training_state(
    tmp_path: Path, weights: Weights, original: PanopticFPN, legacy: bool
) -> None:
    training = {"optimizer": {"state": {0: torch.ones(2)}}, "scheduler": {"last_epoch": 5}, "iteration": 9}
    _assert_equal(load(save_torch(tmp_path / "model.pth", weights, legacy, **training)), original)


def test_the_content_determines_the_format(tmp_path: Path, weights: Weights, original: PanopticFPN) -> None:
    _assert_equal(load(save_torch(tmp_path / "a.pkl", weights)), original)
    _assert_equal(load(str(save_pickle(tmp_path / "b.pth", {"model": weights}))), original)
    _assert_equal(load(save_pickle(tmp_path / "weights without extension", weights)), original)


def test_the_public_name(tmp_path: Path, weights: Weights, original: PanopticFPN) -> None:
    _assert_equal(panfpn_fast.load(save_pickle(tmp_path / "a.pkl", {"model": weights})), original)


def test_changes_to_the_network_do_not_reach_the_callers_arrays(
    tmp_path: Path, weights: Weights, original: PanopticFPN
) -> None:
    path = save_pickle(tmp_path / "a.pkl", {"model": weights})
    with torch.no_grad():
        for parameter in load(path).parameters():
            parameter.zero_()
    _assert_equal(load(path), original)


def test_old_and_harmless_extras(tmp_path: Path, weights: Weights, original: PanopticFPN) -> None:
    extras: dict[str, Any] = {
        "pixel_mean": np.array([[[1.0]], [[2.0]], [[3.0]]], np.float32),
        "pixel_std": np.ones((3, 1, 1), np.float32),
        "backbone.bottom_up.stem.conv1.norm.num_batches_tracked": np.int64(7),
    }
    for level, cells in enumerate(original.rpn.cells):
        extras[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = cells.numpy()
    model = load(save_pickle(tmp_path / "a.pkl", {"model": {**weights, **extras}}))
    _assert_equal(model, original)
    assert model.config.pixel_mean == (1, 2, 3)
    assert model.pixel_mean.tolist() == [1, 2, 3]


def test_other_anchors_are_refused(tmp_path: Path, weights: Weights) -> None:
    name = "proposal_generator.anchor_generator.cell_anchors.0"
    extras = {name: np.zeros((3, 4), np.float32)}
    with pytest.raises(CheckpointError, match=name):
        load(save_pickle(tmp_path / "a.pkl", {"model": {**weights, **extras}}))


def test_weights_saved_from_data_parallel(tmp_path: Path, weights: Weights, original: PanopticFPN) -> None:
    prefixed = {f"module.{name}": value for name, value in weights.items()}
    _assert_equal(load(save_pickle(tmp_path / "a.pkl", {"model": prefixed})), original)


def test_other_float_types_become_float32(tmp_path: Path, weights: Weights, original: PanopticFPN) -> None:
    wide = {name: value.astype(">f8") for name, value in weights.items()}
    _assert_equal(load(save_pickle(tmp_path / "a.pkl", {"model": wide})), original)


def test_overrides(tmp_path: Path, weights: Weights) -> None:
    path = save_pickle(tmp_path / "a.pkl", {"model": weights})
    model = load(path, score_threshold=0.2, stride_in_1x1=False)
    assert model.config.score_threshold == model.box_head.score_threshold == 0.2
    assert model.backbone.get_submodule("layer2.0.conv1").stride == (1, 1)
    with pytest.raises(ValueError, match=r"nms_threshold: .*got 2"):
        load(path, nms_threshold=2)
    with pytest.raises(TypeError, match="nms_treshold"):
        load(tmp_path / "not even there", nms_treshold=0.5)


def test_the_names_determine_the_depth(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = PanopticFPN(
            **{**SMALL, "backbone": "resnet101", "num_things": 8, "num_stuff": 11}
        ).state_dict()
    zeros = {detectron2.key(name): np.zeros(value.shape, np.float16) for name, value in shapes.items()}
    model = load(save_pickle(tmp_path / "a.pkl", {"model": zeros}))
    assert model.config.backbone == "resnet101"
    assert model.config.categories == get_categories("cityscapes")


def test_everything_that_does_not_fit_is_named_in_one_error(tmp_path: Path, weights: Weights) -> None:
    del weights["roi_heads.mask_head.deconv.bias"]
    del weights["backbone.bottom_up.res4.3.conv2.norm.running_mean"]
    weights["sem_seg_head.p5.0.weight"] = np.zeros((32, 31, 3, 3), np.float32)
    weights["roi_heads.box_predictor.bbox_pred.weight"] = np.zeros((5, 16), np.float32)
    weights["roi_heads.keypoint_head.conv_fcn1.weight"] = np.zeros((2, 2), np.float32)
    path = save_pickle(tmp_path / "a.pkl", {"model": weights})
    with pytest.raises(CheckpointError) as info:
        load(path)
    lines = str(info.value).splitlines()
    assert lines[0].startswith(f"{path}: 5 tensors do not fit a resnet50 network with 3 thing and 4 stuff")
    assert {line.strip() for line in lines[1:]} == {
        "missing: roi_heads.mask_head.deconv.bias [8]",
        "missing: backbone.bottom_up.res4.3.conv2.norm.running_mean [256]",
        "unexpected: roi_heads.keypoint_head.conv_fcn1.weight [2, 2]",
        "wrong shape: sem_seg_head.p5.0.weight is [32, 31, 3, 3], this network needs [32, 32, 3, 3]",
        "wrong shape: roi_heads.box_predictor.bbox_pred.weight is [5, 16], this network needs [12, 16]",
    }


def test_a_tensor_of_integers_is_named(tmp_path: Path, weights: Weights) -> None:
    name = "sem_seg_head.predictor.bias"
    content = {"model": {**weights, name: np.zeros(5, np.int64)}}
    with pytest.raises(CheckpointError, match=f"{name}: expected a floating-point tensor, got int64"):
        load(save_pickle(tmp_path / "a.pkl", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"conv1_w": np.zeros(3, np.float32)}}, "only the weights of a backbone"),
        (
            {"state_dict": {"neck.lateral_convs.0.conv.weight": np.zeros(3)}},
            r"unknown backbone with \(0, 0, 0, 0\) basic blocks",
        ),
        (
            {"model": {"transformer.weight": np.zeros(3)}},
            "not a checkpoint of panfpn_fast, detectron2 or mmdetection.*transformer.weight",
        ),
        (
            {"model": {"backbone.fpn_lateral2.weight": np.zeros(3)}},
            r"unknown backbone with \(0, 0, 0, 0\) basic blocks",
        ),
        ({}, "not a checkpoint of"),
        ([1, 2], "expected a dictionary of tensors with string keys, got list"),
        ({"model": 3}, "not a checkpoint of"),
        ({3: np.zeros(3)}, "expected a dictionary of tensors with string keys"),
    ],
)
def test_other_layouts_are_explained(tmp_path: Path, content: Any, message: str) -> None:
    path = save_pickle(tmp_path / "a.pkl", content)
    with pytest.raises(CheckpointError, match=message) as info:
        load(path)
    assert str(path) in str(info.value)


def test_files_that_are_not_checkpoints(tmp_path: Path, weights: Weights) -> None:
    whole = save_torch(tmp_path / "whole.pth", {"a": np.zeros(1000, np.float32)}).read_bytes()
    legacy = save_torch(tmp_path / "old.pth", {"a": np.zeros(1000, np.float32)}, legacy=True).read_bytes()
    plain = pickle.dumps({"model": {"a": np.zeros(1000, np.float32)}})
    for content, message in [
        (b"", "not a checkpoint: expected a pickle"),
        (b"<html>404</html>", "not a checkpoint: expected a pickle"),
        (whole[: len(whole) // 2], "not a readable checkpoint"),
        (legacy[: len(legacy) // 2], "not a readable checkpoint"),
        (plain[: len(plain) // 2], "not a readable checkpoint"),
        (b"PK\x03\x04 and then something else", "not a readable checkpoint"),
    ]:
        path = tmp_path / "a.pkl"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as info:
            load(path)
        assert str(path) in str(info.value)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file.*detectron2://COCO-Panoptic"):
        load(tmp_path / "missing.pkl")
    with pytest.raises(FileNotFoundError, match=r"PanopticFPN.from_config\('panoptic_fpn_r50'\)"):
        load("panoptic_fpn_r50")
    with pytest.raises(
        ValueError, match=r"unknown checkpoint 'mmdetection://x'.*panoptic_fpn_r101_fpn_1x_coco"
    ):
        load("mmdetection://x")
    with pytest.raises(ValueError, match=r"unknown checkpoint 'detectron2://COCO.*panoptic_fpn_R_101_3x"):
        load("detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_18_1x")
    with pytest.raises(TypeError, match="path_or_name"):
        load(b"model.pkl")  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"expected a checkpoint file, such as .*, got a folder"):
        load(tmp_path)


def test_loading_draws_no_random_numbers(tmp_path: Path, weights: Weights, original: PanopticFPN) -> None:
    save_pickle(tmp_path / "a.pkl", {"model": weights})
    panfpn_fast.save(original, tmp_path / "a.pth")
    before = torch.get_rng_state()
    load(tmp_path / "a.pkl")
    load(tmp_path / "a.pth")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("default", [torch.device("meta"), torch.float64, torch.float16])
@pytest.mark.parametrize("layout", ["native", "detectron2", "mmdetection"])
def test_the_default_device_and_dtype_do_not_matter(
    tmp_path: Path, request: pytest.FixtureRequest, layout: str, default: torch.device | torch.dtype
) -> None:
    network = small_model(backbone="resnet18", backbone_norm="bn", mask_head_convs=4, score_threshold=0.0)
    panfpn_fast.save(network, tmp_path / "a.pth", layout)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    expected = Predictor(load(tmp_path / "a.pth"), "cpu", short_edge=64)(image)
    request.addfinalizer(lambda: torch.set_default_device(None))
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    if isinstance(default, torch.device):
        torch.set_default_device(default)
    else:
        torch.set_default_dtype(default)
    model = load(tmp_path / "a.pth")
    assert {value.dtype for value in model.state_dict().values()} <= {torch.float32, torch.int64}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    result = Predictor(model, "cpu", short_edge=64)(image)
    assert torch.equal(result.panoptic, expected.panoptic)
    assert result.segments == expected.segments
    panfpn_fast.save(model, tmp_path / "b.pth", layout)
    initialize(network, str(tmp_path / "b.pth"))


@pytest.mark.parametrize(
    ("task", "others"), [("instance", "sem_seg_head."), ("semantic", ("proposal_generator.", "roi_heads."))]
)
def test_one_branch(tmp_path: Path, weights: Weights, task: str, others: Any) -> None:
    """A checkpoint with one branch, such as a Mask R-CNN, and one branch of a checkpoint with both."""
    alone = {name: value for name, value in weights.items() if not name.startswith(others)}
    model = load(save_pickle(tmp_path / "a.pkl", {"model": alone}))
    assert model.config.tasks == (task,)
    chosen = load(save_pickle(tmp_path / "b.pkl", {"model": weights}), tasks=[task])
    assert chosen.config.tasks == (task,)
    for name, value in model.state_dict().items():
        assert torch.equal(value, torch.from_numpy(weights[detectron2.key(name)])), name
        assert torch.equal(value, chosen.state_dict()[name]), name
    [output] = model([torch.zeros(3, 40, 60, dtype=torch.uint8)])
    assert output.panoptic.shape == (40, 60)
    with pytest.raises(CheckpointError, match="missing: "):
        load(tmp_path / "a.pkl", tasks=("instance", "semantic"))


def test_one_branch_of_the_native_format(tmp_path: Path, original: PanopticFPN) -> None:
    categories = Categories("four", tuple(CATEGORIES[:3]), tuple(CATEGORIES[3:]))
    config = original.config.replace(categories=categories)
    torch.save(native.content_of(original.state_dict(), config), tmp_path / "a.pth")
    assert load(tmp_path / "a.pth").config.tasks == ("instance", "semantic")
    model = load(tmp_path / "a.pth", tasks=("semantic",))
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "fpn", "semantic_head"}
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.config.categories == categories
    torch.save(native.content_of(model.state_dict(), model.config), tmp_path / "b.pth")
    assert load(tmp_path / "b.pth").config.tasks == ("semantic",)
    with pytest.raises(CheckpointError, match="Missing key"):
        load(tmp_path / "b.pth", tasks=("instance", "semantic"))


def test_class_agnostic_heads(tmp_path: Path, weights: Weights) -> None:
    for name, rows in (("box_predictor.bbox_pred", 4), ("mask_head.predictor", 1)):
        for kind in ("weight", "bias"):
            weights[f"roi_heads.{name}.{kind}"] = weights[f"roi_heads.{name}.{kind}"][:rows]
    model = load(save_pickle(tmp_path / "a.pkl", {"model": weights}))
    assert model.config.class_agnostic_boxes
    assert model.config.class_agnostic_masks
    assert not load(save_pickle(tmp_path / "b.pkl", {"model": small_weights()})).config.class_agnostic_boxes
