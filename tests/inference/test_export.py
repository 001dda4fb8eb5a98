"""Exported programs run in a process that has the ops but no other module of this package."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._inductor
from torch import Tensor

import panfpn_fast
from panfpn_fast.cli.main import main
from panfpn_fast.inference import export as module
from panfpn_fast.inference.export import compiler, export
from panfpn_fast.models import PanopticFPN, conv_fusion
from panfpn_fast.models.padded import PaddedPanopticFPN
from panfpn_fast.ops._winograd import _VECTORS
from support.processes import environment, run
from support.training_samples import make_sample, small_model

# These settings shorten compilation at the cost of slower code.
QUICK = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "cpp_cache_precompile_headers": False,
}

LOADED_ELSEWHERE = """
import sys
from importlib.abc import MetaPathFinder

class OpsOnly(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("panfpn_fast.") and not name.startswith(("panfpn_fast.ops", "panfpn_fast._")):
            raise ImportError(f"an exported program must not import {name}")

sys.meta_path.insert(0, OpsOnly())
import torch
import panfpn_fast.ops

kind, path, images, results = sys.argv[1:]
if kind == "export":
    extra = {"panfpn_fast.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    description = extra["panfpn_fast.json"]
else:
    program = torch._inductor.aoti_load_package(path)
    description = program.get_metadata()["panfpn_fast"]
images = torch.load(images)
torch.save((program(images), description), results)
try:
    program(images[..., 1:])
except (AssertionError, RuntimeError):
    pass
else:
    raise SystemExit("ran on an image of another size")
assert "panfpn_fast.models" not in sys.modules
"""


@pytest.fixture(scope="module")
def model() -> PanopticFPN:
    return small_model(
        backbone_norm="frozen_bn",
        pixel_std=(60.0, 60.0, 60.0),
        rpn_pre_nms_topk=60,
        rpn_post_nms_topk=50,
        detections_per_image=20,
        instance_score_threshold=0.2,
    ).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return make_sample(64, 96).image[None]


def run_elsewhere(kind: str, path: Path, images: Tensor, folder: Path) -> tuple[dict[str, Tensor], Any]:
    torch.save(images, folder / "images.pth")
    arguments = [kind, str(path), str(folder / "images.pth"), str(folder / "results.pth")]
    command = [sys.executable, "-c", LOADED_ELSEWHERE, *arguments]
    run(command, env=environment(AOTI_RUNTIME_CHECK_INPUTS="1"))
    found, description = torch.load(folder / "results.pth")
    return found, json.loads(description)


def check_description(description: Any, model: PanopticFPN, found: dict[str, Tensor]) -> None:
    settings = {name: value for name, value in vars(model.config).items() if name != "categories"}
    assert description["config"] == json.loads(
        json.dumps({**settings, "dataset": model.config.categories.name})
    )
    assert len(description["categories"]) == model.config.num_things + model.config.num_stuff
    assert description["input"]["shape"] == [1, 3, 64, 96]
    assert description["input"]["dtype"] == "uint8"
    assert description["outputs"]["panoptic"] == {"shape": [1, 33, 80], "dtype": "int32"}
    assert list(description["outputs"]) == list(found)
    assert (description["device"], description["dtype"]) == ("cpu", "float32")


def test_archive(
    model: PanopticFPN,
    images: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exports on the command line. Without fused ops, the archive runs the same operations and gives equal results."""
    panfpn_fast.save(model, tmp_path / "model.pth")
    out = tmp_path / "out"
    out.mkdir()
    sizes = ["--size", "64", "96", "--output-size", "33", "80"]
    arguments = ["export", str(tmp_path / "model.pth"), str(out / "net"), *sizes, "--format", "export"]
    assert main([*arguments, "--device", "cpu"]) == 0
    said, path = capsys.readouterr().out.splitlines()
    assert said.startswith(
        f"{tmp_path / 'model.pth'}: images of 64 x 96 pixels; Categories('numbered', things: "
    )
    assert path == str(out / "net.pt2")
    assert [path.name for path in out.iterdir()] == ["net.pt2"]
    found, description = run_elsewhere("export", out / "net.pt2", images, tmp_path)
    check_description(description, model, found)
    monkeypatch.setattr(conv_fusion, "_HAS_FUSED_OPS", False)
    expected = PaddedPanopticFPN(model, (33, 80))(images)
    assert int(expected["count"]) > 0
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.skipif(not _VECTORS, reason="Winograd's algorithm needs AVX2")
def test_weights_can_be_transformed_before_the_export(
    model: PanopticFPN, images: Tensor, tmp_path: Path
) -> None:
    """As docs/export.md says. Otherwise the program transforms them in each call."""
    ops = {}
    for name, network in [("plain", model), ("prepared", conv_fusion.for_prediction(model))]:
        [path] = export(network, tmp_path / name, (64, 96), formats=["export"])
        program = torch.export.load(path)
        ops[name] = {str(node.target).removeprefix("panfpn_fast.") for node in program.graph.nodes}
        assert program.module()(images)["panoptic"].shape == (1, 64, 96)
    assert "conv3x3.default" in ops["plain"]
    assert "conv3x3_prepared.default" not in ops["plain"]
    assert "conv3x3_prepared.default" in ops["prepared"]
    assert not {"conv3x3.default", "conv3x3_prepare.default"} & ops["prepared"]


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler for AOTInductor")
def test_package(model: PanopticFPN, images: Tensor, tmp_path: Path) -> None:
    """Compiled code sums in a different order: here probabilities differ by at most 3e-6, integers are equal."""
    [path] = export(
        model, tmp_path / "net.pt2", (64, 96), output_size=(33, 80), formats=["aoti"], options=QUICK
    )
    assert path == tmp_path / "net.aoti.pt2"
    found, description = run_elsewhere("aoti", path, images, tmp_path)
    check_description(description, model, found)
    expected = PaddedPanopticFPN(model, (33, 80))(images)
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-5)
        elif name in ("panoptic", "semantic"):
            assert (found[name] == value).float().mean() > 0.995
        elif name != "segment_area":
            assert torch.equal(found[name], value), name


def test_a_failed_export_keeps_the_old_file(
    model: PanopticFPN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.pt2").write_text("an older one")

    def fail(program: Any, file: Any, **kwargs: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "_describe", lambda *args: {})
    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        export(model, tmp_path / "net", (64, 96), formats=["export"])
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]
    assert (tmp_path / "net.pt2").read_text() == "an older one"


def test_the_size_is_by_default_that_of_the_networks_images(
    model: PanopticFPN, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def note(model: PanopticFPN, path: Path, size: tuple[int, int], **_: Any) -> list[Path]:
        seen.append(size)
        return []

    monkeypatch.setattr(module, "export", note)
    network = PanopticFPN.from_config(model.config.replace(short_edge=64, max_edge=90))
    panfpn_fast.save(network, tmp_path / "model.pth")
    assert main(["export", str(tmp_path / "model.pth"), str(tmp_path / "net"), "--device", "cpu"]) == 0
    assert seen == [(60, 90)]
    assert "images of 60 x 90 pixels" in capsys.readouterr().out


def test_no_compiler(
    model: PanopticFPN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler: install g\+\+, or set CXX"):
        export(model, tmp_path / "net", (64, 96))
    # The weights, which may be a download, come later.
    assert main(["export", "missing.pth", str(tmp_path / "net"), "--size", "64", "96"]) == 2
    assert capsys.readouterr().err.startswith("panfpn-fast: AOTInductor needs a C++ compiler")


def test_onnx_without_its_packages(
    model: PanopticFPN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", ModuleType("onnx"))
    remedy = r'onnxscript.*\. ONNX files need the extra \[onnx\]: run pip install "\.\[onnx\]"'
    with pytest.raises(ImportError, match=remedy):
        export(model, tmp_path / "net", (64, 96), formats=["onnx"])
    assert main(["export", "missing.pth", str(tmp_path / "net"), "--format", "onnx"]) == 2
    assert re.search(f"^panfpn-fast: .*{remedy}", capsys.readouterr().err)


def test_onnx_takes_float32(model: PanopticFPN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    half = copy.deepcopy(model).bfloat16()
    with pytest.raises(ValueError, match=r"model: expected torch\.float32 for onnx, got torch\.bfloat16"):
        export(half, tmp_path / "net", (64, 96), formats=["onnx"])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": torch.nn.Identity()}, TypeError, "model: expected a PanopticFPN, got Identity"),
        ({"size": (0, 96)}, ValueError, r"size: .*\(0, 96\)"),
        ({"size": (64.0, 96)}, TypeError, "size: expected a Python int, got float"),
        ({"batch": 0}, ValueError, "batch: expected an integer of at least 1, got 0"),
        ({"output_size": (3,)}, ValueError, "output_size: "),
        (
            {"formats": ["tflite"]},
            ValueError,
            r"formats: expected a list of names among export, aoti, onnx, got \['tflite'\]",
        ),
        ({"formats": []}, ValueError, "formats: "),
        ({"formats": "aoti"}, ValueError, "formats: "),
        (
            {"size": None, "formats": ["export"]},
            ValueError,
            r"size: expected \(height, width\) for export, aoti",
        ),
    ],
)
def test_bad_input(
    model: PanopticFPN, tmp_path: Path, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"model": model, "size": (64, 96), "path": tmp_path / "net", **changed}
    with pytest.raises(error, match=message):
        export(**given)
    assert list(tmp_path.iterdir()) == []
