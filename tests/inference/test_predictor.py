from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from panfpn_fast.data import get_categories
from panfpn_fast.inference import ImageReadError, PanopticResult, Predictor, Segment, resize_shortest_edge

MakeModel = Callable[..., Any]
PHOTO = np.random.default_rng(3).integers(0, 256, (30, 50, 3), dtype=np.uint8)


def test_result(halves_model: MakeModel) -> None:
    result = Predictor(halves_model(), device="cpu", short_edge=60, max_edge=90)(PHOTO)
    assert isinstance(result, PanopticResult)
    assert (result.panoptic.dtype, tuple(result.panoptic.shape)) == (torch.int32, (30, 50))
    assert (result.semantic.dtype, tuple(result.semantic.shape)) == (torch.uint8, (30, 50))
    assert result.segments == [
        Segment(1, 18, "dog", True, 16, 0.75, 30 * 25, 0),
        Segment(2, 187, "sky-other-merged", False, 39, None, 30 * 25),
    ]
    assert result.summary() == "1 dog, sky"
    assert result.instances.boxes.tolist() == [[0.0, 0.0, 25.0, 30.0]]
    assert result.instances.boxes.dtype == torch.float32
    assert result.instances.mask_probs.shape == (1, 28, 28)
    assert result.instances.mask_probs.dtype == torch.float32
    assert result.instances.classes.dtype == torch.int64
    assert len(result.instances) == 1


def test_network_sees_the_resized_rgb_image(halves_model: MakeModel) -> None:
    model = halves_model()
    Predictor(model, device="cpu", short_edge=60, max_edge=90)(PHOTO)
    [seen] = model.seen
    assert (seen.dtype, tuple(seen.shape)) == (torch.uint8, (3, 54, 90))
    np.testing.assert_array_equal(seen.permute(1, 2, 0).numpy(), resize_shortest_edge(PHOTO, 60, 90))
    assert model.grad_enabled is False
    assert not model.training
    model = halves_model(resize="mmdetection")
    Predictor(model, device="cpu", short_edge=60, max_edge=90)(PHOTO)
    [seen] = model.seen
    np.testing.assert_array_equal(
        seen.permute(1, 2, 0).numpy(), resize_shortest_edge(PHOTO, 60, 90, "mmdetection")
    )


def test_all_kinds_of_images_give_the_same_result(halves_model: MakeModel, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(path)
    model = halves_model()
    predictor = Predictor(model, device="cpu", short_edge=30)
    reference = torch.from_numpy(PHOTO).permute(2, 0, 1)
    flipped = np.ascontiguousarray(PHOTO[:, ::-1])[:, ::-1]  # negative strides
    for image in (PHOTO, flipped, Image.fromarray(PHOTO), path, str(path)):
        assert predictor(image).summary() == "1 dog, sky"
        assert torch.equal(model.seen[0], reference)


def test_results_are_ordinary_tensors(halves_model: MakeModel) -> None:
    """They can be edited in place and used in a loss."""
    result = Predictor(halves_model(), "cpu")(np.zeros((48, 64, 3), np.uint8))
    tensors = (result.panoptic, result.semantic, *vars(result.instances).values())
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)
    factor = torch.ones((), requires_grad=True)
    (factor * result.instances.mask_probs).sum().backward()
    assert factor.grad is not None
    result.instances.boxes.mul_(2)


def test_several_images(halves_model: MakeModel) -> None:
    model = halves_model()
    predictor = Predictor(model, device="cpu", short_edge=20)
    results = predictor([PHOTO, Image.fromarray(PHOTO[:20])])
    assert [tuple(result.panoptic.shape) for result in results] == [(30, 50), (20, 50)]
    assert len(model.seen) == 2
    assert len(predictor((PHOTO,))) == 1
    assert len(predictor(np.stack([PHOTO] * 3))) == 3  # type: ignore[arg-type]
    assert predictor([]) == []


def test_warm_up_runs_the_network_at_each_size(halves_model: MakeModel) -> None:
    model = halves_model()
    predictor = Predictor(model, device="cpu", short_edge=20)
    predictor.warm_up()
    assert [tuple(image.shape) for image in model.seen] == [(3, 20, 27)]
    predictor.warm_up([(30, 50), (50, 30)])
    assert [tuple(image.shape[1:]) for image in model.seen[-1:]] == [(33, 20)]
    with pytest.raises(ValueError, match=r"sizes\[1\]: expected integers of at least 1, got \(0, 5\)"):
        predictor.warm_up([(8, 8), (0, 5)])


def test_files_are_turned_upright(halves_model: MakeModel, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(PHOTO).save(tmp_path / "turned.jpg", exif=exif)
    result = Predictor(halves_model(), device="cpu", short_edge=20)(tmp_path / "turned.jpg")
    assert tuple(result.panoptic.shape) == (50, 30)
    assert result.draw(tmp_path / "turned.jpg").size == (30, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_network_computes_in_dtype(halves_model: MakeModel, dtype: torch.dtype) -> None:
    model = halves_model()
    Predictor(model, device="cpu", dtype=dtype, short_edge=20)(PHOTO)
    assert model.product_dtype == dtype


def test_cityscapes(halves_model: MakeModel) -> None:
    predictor = Predictor(halves_model(categories=get_categories("cityscapes")), device="cpu")
    assert predictor.categories.things[0].name == "person"


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (PHOTO.astype(np.float32), TypeError, "image: expected dtype uint8"),
        (PHOTO[:, :, 0], ValueError, r"image: expected shape \[H, W, 3\].*got \[30, 50\]"),
        (torch.zeros(3, 4, 4), TypeError, r"image: expected dtype uint8 .* got torch\.float32"),
        (
            torch.zeros(4, 5, 3).byte(),
            ValueError,
            r"image: expected a tensor .* \[4, 5, 3\]; tensor\.permute\(2, 0, 1\)",
        ),
        (
            torch.zeros(1, 4, 5).byte(),
            ValueError,
            r"image: expected a tensor of shape \[3, H, W\].* got \[1, 4, 5\]; tensor\.expand\(3, -1, -1\)",
        ),
        (None, TypeError, "image: expected .* got NoneType"),
        ([PHOTO, 3], TypeError, r"image\[1\]: expected .* got int"),
        ([PHOTO, PHOTO[:0]], ValueError, r"image\[1\]: expected shape"),
        (np.zeros((2, 4, 4, 1), np.uint8), ValueError, r"image\[0\]: expected shape"),
    ],
)
def test_bad_images(halves_model: MakeModel, image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Predictor(halves_model(), device="cpu")(image)


def test_broken_file_is_named(halves_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(ImageReadError, match=r"broken\.jpg"):
        Predictor(halves_model(), device="cpu")(tmp_path / "broken.jpg")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": 3.5}, TypeError, "device: expected a string"),
        ({"device": "gpu"}, ValueError, "device: expected a device of this machine, got 'gpu'"),
        ({"device": "cuda:99"}, ValueError, "device: expected a device of this machine, got 'cuda:99'"),
        ({"dtype": "float16"}, TypeError, r"dtype: expected a torch\.dtype or None, got str"),
        ({"dtype": torch.int8}, ValueError, r"dtype: expected one of .* got torch\.int8"),
        ({"short_edge": 0}, ValueError, "short_edge: expected a positive number"),
        ({"max_edge": -5}, ValueError, "max_edge: expected a positive number"),
        ({"instances": "none"}, ValueError, "instances: expected 'all' or 'panoptic', got 'none'"),
        ({"short_edge": 800.0}, TypeError, "short_edge: expected an integer number"),
    ],
)
def test_bad_settings(
    halves_model: MakeModel, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Predictor(halves_model(), **arguments)


def test_instances_outside_the_map_are_left_out_on_request(halves_model: MakeModel) -> None:
    class Network(type(halves_model())):  # type: ignore[misc]
        def forward(self, images: Any, output_sizes: Any, instances: str = "all") -> Any:
            self.wanted = instances
            return super().forward(images, output_sizes)

    for wanted in ("all", "panoptic"):
        model = Network()
        predictor = Predictor(model, device="cpu", short_edge=20, instances=wanted)  # type: ignore[arg-type]
        predictor(PHOTO)
        assert model.wanted == predictor.instances == wanted
    with pytest.raises(
        TypeError, match='instances: "panoptic" needs a network whose forward has a parameter'
    ):
        Predictor(halves_model(), device="cpu", instances="panoptic")


@pytest.mark.parametrize("model", [None, torch.nn.Linear(1, 1)])
def test_bad_model(model: Any) -> None:
    with pytest.raises(
        TypeError, match="model: expected a PanopticFPN, or the path or name of a checkpoint, got"
    ):
        Predictor(model)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
def test_runs_on_the_gpu_by_default(halves_model: MakeModel) -> None:
    model = halves_model()
    predictor = Predictor(model, short_edge=20)
    result = predictor(PHOTO)
    assert predictor.device.type == "cuda"
    assert model.weight.is_cuda
    assert model.seen[0].is_cuda
    assert result.panoptic.device.type == "cpu"
