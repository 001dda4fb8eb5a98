"""What the predictor takes: names, paths, tensors, addresses, folders and endless iterables."""

from __future__ import annotations

import io
import itertools
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import panfpn_fast
from panfpn_fast import PanopticFPN, PanopticResult, Predictor, predict
from panfpn_fast.inference import ImageReadError
from support.checkpoint_samples import SMALL
from support.web import QuietHandler, serving

MakeModel = Callable[..., Any]
PHOTO = np.random.default_rng(3).integers(0, 256, (30, 50, 3), dtype=np.uint8)


@pytest.fixture
def predictor(halves_model: MakeModel) -> Predictor:
    return Predictor(halves_model(), device="cpu", short_edge=30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.manual_seed(0)
    # Nothing is sure enough to enter the map, so no masks are computed.
    model = PanopticFPN(**SMALL, backbone="resnet10_narrow", instance_score_threshold=1.0)
    panfpn_fast.save(model.eval(), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with images of three sizes, and a file that is not an image."""
    made = tmp_path / "photos"
    made.mkdir()
    for number in (3, 1, 2):
        Image.fromarray(PHOTO[: 10 * number]).save(made / f"{number}.png")
    (made / "notes.txt").touch()
    return made


def test_a_result_keeps_its_image_and_source(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(path)
    sources: list[tuple[Any, str | None]] = [(PHOTO, None), (Image.fromarray(PHOTO), None)]
    sources += [(path, str(path)), (str(path), str(path))]
    for given, source in sources:
        result = predictor(given)
        assert result.source == source
        assert result.image is not None
        np.testing.assert_array_equal(result.image, PHOTO)
        assert result.draw().tobytes() == result.draw(PHOTO).tobytes()
    with Image.open(path) as opened:
        assert predictor(opened).source == str(path)
    assert predictor(PHOTO).image is PHOTO  # an array is not copied


def test_segments_name_their_instance(predictor: Predictor) -> None:
    dog, sky = predictor(PHOTO).segments
    assert (dog.instance, sky.instance) == (0, None)
    assert (dog.score, sky.score) == (0.75, None)
    assert dog.bbox == (0, 0, 25, 30)


def test_grey_images(predictor: Predictor, tmp_path: Path) -> None:
    grey = Image.fromarray(PHOTO[:, :, 0])
    grey.save(tmp_path / "grey.png")
    for image in (grey, tmp_path / "grey.png"):
        result = predictor(image)
        assert result.image is not None
        np.testing.assert_array_equal(result.image, PHOTO[:, :, :1].repeat(3, axis=2))
        assert result.draw().size == (50, 30)


def test_one_pixel(predictor: Predictor) -> None:
    result = predictor(PHOTO[:1, :1])
    assert [segment.name for segment in result.segments if segment.mask.any()] == ["sky-other-merged"]
    assert result.segments[1].bbox == (0, 0, 1, 1)
    assert result.draw(boxes=True, scores=True).size == (1, 1)


def test_tensors(predictor: Predictor) -> None:
    tensor = torch.from_numpy(PHOTO).permute(2, 0, 1)
    for given in (tensor, tensor.contiguous()):
        result = predictor(given)
        assert result.image is not None
        np.testing.assert_array_equal(result.image, PHOTO)
    assert [found.panoptic.shape for found in predictor(list(torch.stack([tensor] * 2)))] == [(30, 50)] * 2
    assert len(predictor([tensor, PHOTO])) == 2


@pytest.mark.usefixtures("one_thread")
def test_the_model_may_be_a_path(checkpoint: Path) -> None:
    expected = panfpn_fast.load(checkpoint).state_dict()
    for weights in (checkpoint, str(checkpoint)):
        predictor = Predictor(weights, "cpu", short_edge=32, instances="panoptic")
        found = predictor.model.state_dict()
        assert torch.equal(found["rpn.conv.weight"], expected["rpn.conv.weight"])
    result = predict(PHOTO, checkpoint, device="cpu", short_edge=32, instances="panoptic")
    assert isinstance(result, PanopticResult)
    assert len(result.categories.things) == SMALL["num_things"]


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nope\.pth: no such file; a published checkpoint has a name"
    ):
        Predictor(tmp_path / "nope.pth")
    with pytest.raises(ValueError, match="unknown checkpoint 'detectron2://panoptic'; similar names"):
        predict(PHOTO, weights="detectron2://panoptic")


class Site(QuietHandler):
    """Serves a photograph, half of one, and a text."""

    def do_GET(self) -> None:
        with io.BytesIO() as file:
            Image.fromarray(PHOTO).save(file, format="PNG")
            photo = file.getvalue()
        pages = {"/photo.png": photo, "/half.png": photo[: len(photo) // 2], "/text": b"no image"}
        content = pages.get(self.path.partition("?")[0])
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving(Site, monkeypatch) as address:
        yield address


def test_addresses(predictor: Predictor, site: str) -> None:
    result = predictor(f"{site}/photo.png?size=1")
    assert result.source == f"{site}/photo.png?size=1"
    assert result.image is not None
    np.testing.assert_array_equal(result.image, PHOTO)
    for page, message in (
        ("nope", "the download failed .*404"),
        ("text", "text: "),
        ("half.png", r"half\.png: "),
    ):
        with pytest.raises(ImageReadError, match=message) as caught:
            predictor(f"{site}/{page}")
        assert str(caught.value).startswith(f"{site}/{page}: ")
    with pytest.raises(ImageReadError, match="http://: the download failed"):
        predictor("http://")


def test_stream_equals_single_calls(predictor: Predictor, folder: Path) -> None:
    paths = [folder / f"{number}.png" for number in (1, 2, 3)]
    for batch_size in (1, 2, 5):
        results = list(predictor.stream(folder, batch_size=batch_size))
        assert [result.source for result in results] == list(map(str, paths))
        for result, path in zip(results, paths, strict=True):
            assert torch.equal(result.panoptic, predictor(path).panoptic)
    assert len(list(predictor.stream(PHOTO))) == 1
    assert len(list(predictor.stream(np.stack([PHOTO] * 3)))) == 3
    assert list(predictor.stream([])) == []


def test_stream_reads_no_further_than_needed(predictor: Predictor) -> None:
    """The source never ends, and no image is kept after its result is dropped."""
    alive: list[weakref.ref[Any]] = []

    def frames() -> Iterator[Any]:
        for number in itertools.count():
            frame = np.full((8, 8, 3), number % 256, np.uint8)
            alive.append(weakref.ref(frame))
            yield frame
            del frame

    results = predictor.stream(frames(), batch_size=2)
    assert not alive
    for number, result in enumerate(itertools.islice(results, 20)):
        assert len(alive) == 2 * (number // 2 + 1)
        assert result.image is not None
        assert (result.image == number).all()
        assert sum(frame() is not None for frame in alive) <= 4


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("tensors", [False, True])
def test_stream_copies_a_buffer_that_is_used_again(
    predictor: Predictor, batch_size: int, tensors: bool
) -> None:
    def frames() -> Iterator[Any]:
        buffer = np.zeros((8, 8, 3), np.uint8)
        for number in range(4):
            buffer[:] = number
            yield torch.from_numpy(buffer).permute(2, 0, 1) if tensors else buffer

    images = [result.image for result in predictor.stream(frames(), batch_size)]
    assert [np.unique(image).tolist() for image in images if image is not None] == [[0], [1], [2], [3]]


def test_stream_names_the_image_that_it_cannot_read(predictor: Predictor) -> None:
    results = predictor.stream([PHOTO, PHOTO, PHOTO[:, :, 0]])
    assert isinstance(next(results), PanopticResult)
    next(results)
    with pytest.raises(ValueError, match=r"sources\[2\]: expected shape \[H, W, 3\]"):
        next(results)


@pytest.mark.parametrize(("batch_size", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_batch_size(predictor: Predictor, batch_size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="batch_size: expected"):
        predictor.stream([], batch_size)


def test_predict_in_one_call(halves_model: MakeModel, predictor: Predictor, folder: Path) -> None:
    run = partial(predict, weights=halves_model(), device="cpu", short_edge=30)
    one = run(folder / "3.png")
    assert isinstance(one, PanopticResult)
    assert torch.equal(one.panoptic, predictor(folder / "3.png").panoptic)
    found, listed = run(folder), run([folder / "1.png"])
    assert isinstance(found, list)
    assert isinstance(listed, list)
    assert [result.source for result in found] == [str(folder / f"{number}.png") for number in (1, 2, 3)]
    for source in (PHOTO, [PHOTO]):
        lazy = run(source, stream=True)
        assert not isinstance(lazy, list | PanopticResult)
        [result] = lazy
        assert torch.equal(result.panoptic, predictor(PHOTO).panoptic)


def test_frames_of_an_image_file(halves_model: MakeModel, predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    others = [Image.fromarray(PHOTO[::-1]), Image.fromarray(PHOTO[:, ::-1])]
    Image.fromarray(PHOTO).save(path, save_all=True, append_images=others)
    assert [(result.frame, result.time) for result in predictor.stream(path)] == [
        (n, None) for n in (1, 2, 3)
    ]
    assert [result.frame for result in predictor.stream([path, PHOTO], batch_size=3)] == [1, 2, 3, None]
    assert predictor(path).frame is None  # a call predicts one image
    found = predict(path, halves_model(), device="cpu", short_edge=30)
    assert isinstance(found, list)
    assert [result.frame for result in found] == [1, 2, 3]


def test_patterns_and_the_standard_input(
    predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [str(folder / "1.png"), str(folder / "2.png")]
    pattern = f"{folder}/[12].*"
    sources: list[Any] = [pattern, Path(pattern), [pattern]]
    for source in sources:
        assert [result.source for result in predictor.stream(source)] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(expected).encode())))
    assert [result.source for result in predictor.stream("-")] == expected
    with pytest.raises(ValueError, match=r"9\*: no image or video has such a name"):
        predictor.stream(f"{folder}/9*")


def test_arrays_of_opencv(halves_model: MakeModel, predictor: Predictor, tmp_path: Path) -> None:
    """Arrays and tensors are turned to RGB; files and PIL images, which are RGB already, are not."""
    bgr = PHOTO[..., ::-1]
    path = tmp_path / "a.png"
    Image.fromarray(PHOTO).save(path)
    given: list[Any] = [bgr, torch.from_numpy(bgr.copy()).permute(2, 0, 1), Image.fromarray(PHOTO), path]
    called = [*(predictor(one, bgr=True) for one in given), *predictor(given, bgr=True)]
    found = [*called, *predictor.stream(given, bgr=True), *predictor.stream(np.stack([bgr] * 2), bgr=True)]
    last = predict(given, halves_model(), bgr=True, device="cpu", short_edge=30)
    assert isinstance(last, list)
    assert len(found + last) == 18
    for result in found + last:
        assert result.image is not None
        np.testing.assert_array_equal(result.image, PHOTO)
        assert result.image.flags.c_contiguous


def test_an_empty_folder_is_reported_before_the_weights(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images in this folder"):
        predict(tmp_path / "empty", weights="nope.pth")


def test_a_missing_image_is_reported_before_the_weights(tmp_path: Path) -> None:
    for source in (tmp_path / "typo.png", str(tmp_path / "typo.png")):
        for stream in (False, True):
            with pytest.raises(FileNotFoundError, match=r"typo\.png: no such file"):
                predict(source, weights="nope.pth", stream=stream)
    with pytest.raises(OSError, match="File name too long"):
        predict("x" * 300, weights="nope.pth")


GREY = PHOTO[:, :, 0]
ALPHA = np.dstack([PHOTO, GREY])


@pytest.mark.parametrize(
    "bad",
    [
        GREY,
        GREY[None],
        GREY[:, :, None],
        ALPHA,
        PHOTO.transpose(2, 0, 1),
        PHOTO / 255,
        torch.from_numpy(PHOTO / 255).permute(2, 0, 1),
        torch.from_numpy(GREY),
        torch.from_numpy(GREY)[None],
        torch.from_numpy(PHOTO),
        torch.from_numpy(ALPHA),
        torch.from_numpy(ALPHA).permute(2, 0, 1),
    ],
)
def test_the_remedy_of_a_wrong_array_works(predictor: Predictor, bad: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        predictor(bad)
    remedy = str(caught.value).partition("; ")[2]
    code = remedy.partition(" makes ")[0].partition(" drops ")[0].partition(" moves ")[0]
    code = code.partition(" converts ")[0]
    found = predictor(eval(code, {"np": np, "array": bad, "tensor": bad})).image
    grey = "gray image" in remedy
    assert found is not None
    np.testing.assert_array_equal(found, GREY[:, :, None].repeat(3, axis=2) if grey else PHOTO)


def test_lists_of_batches_of_one(predictor: Predictor) -> None:
    for batch, name in ((PHOTO[None], "array"), (torch.from_numpy(PHOTO).permute(2, 0, 1)[None], "tensor")):
        with pytest.raises(ValueError, match=rf"image\[0\]: .*; {name}\[0\] is one image$"):
            predictor([batch])
        predictor([batch[0]])


def test_what_is_no_image(predictor: Predictor, folder: Path) -> None:
    with pytest.raises(OSError, match=r"photos is a folder; .*predictor\.stream\(folder\)"):
        predictor(folder)
    assert len(list(predictor.stream(folder))) == 3
    with pytest.raises(TypeError, match=r"expected .* a uint8 RGB tensor .* or an address, got int"):
        predictor(3)  # type: ignore[call-overload]


def test_draws_on_any_source(predictor: Predictor, site: str) -> None:
    result = predictor(PHOTO)
    expected = result.draw().tobytes()
    assert result.draw(torch.from_numpy(PHOTO).permute(2, 0, 1)).tobytes() == expected
    assert result.draw(f"{site}/photo.png").tobytes() == expected
