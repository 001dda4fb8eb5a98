"""The choice between convolutions: the order of its sources, its files, and the measurements of `tune`."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import panfpn_fast

pytest.importorskip("triton", reason="Triton is not installed")
from panfpn_fast.ops.triton import _conv_choice as conv_choice
from panfpn_fast.ops.triton import _conv_timing as conv_timing
from panfpn_fast.ops.triton._conv_choice import CUDNN, Problem, choose, size_class

PROBLEM = Problem("NVIDIA H200", "bfloat16", 65536, 256, 128)
OTHER_GPU = Problem("NVIDIA A100", "bfloat16", 65536, 256, 128)
NAMES = ("ours", "other", CUDNN)


def choices(name: str, versions: str = "some versions", problem: Problem = PROBLEM) -> conv_choice.Choices:
    return {str(problem.gpu): {versions: {problem.key: name}}}


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PANFPN_CONV", raising=False)
    monkeypatch.delenv("PANFPN_TUNING", raising=False)
    conv_choice.forget()
    yield
    conv_choice.forget()


def test_the_rule_decides_where_nothing_is_known() -> None:
    assert choose(PROBLEM, NAMES) == "ours"
    assert choose(PROBLEM, (CUDNN, "ours")) == CUDNN


def test_a_choice_leaves_nothing_behind() -> None:
    """Tracing chooses as well, on machines without a GPU; its choice must not affect later ones."""
    before = conv_choice.generation
    assert choose(Problem(None, "bfloat16", None, 256, 128), NAMES) == "ours"
    assert choose(PROBLEM, NAMES) == "ours"
    assert choose(PROBLEM, tuple(reversed(NAMES))) == CUDNN
    assert conv_choice.generation == before


def test_sources_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, named = tmp_path / "shipped.json", tmp_path / "named.json"
    monkeypatch.setattr(conv_choice, "_SHIPPED", shipped)
    conv_choice.write_choices(shipped, choices("other"))
    conv_choice.forget()
    assert choose(PROBLEM, NAMES) == "other"
    assert choose(OTHER_GPU, NAMES) == "ours"

    conv_choice.write_choices(named, choices(CUDNN))
    monkeypatch.setenv("PANFPN_TUNING", str(named))
    assert choose(PROBLEM, NAMES) == "other"  # files are read once
    conv_choice.forget()
    assert choose(PROBLEM, NAMES) == CUDNN

    conv_choice.use(choices("ours"))
    assert choose(PROBLEM, NAMES) == "ours"

    monkeypatch.setenv("PANFPN_CONV", "cudnn")
    assert choose(PROBLEM, NAMES) == CUDNN
    monkeypatch.setenv("PANFPN_CONV", "triton")
    assert choose(PROBLEM, (CUDNN, "other", "ours")) == "other"
    assert choose(PROBLEM, (CUDNN,)) == CUDNN


def test_a_table_names_only_what_can_be_run() -> None:
    """An older table may name a configuration that no longer exists."""
    conv_choice.use(choices("gone"))
    assert choose(PROBLEM, NAMES) == "ours"


def test_the_newest_versions_decide() -> None:
    conv_choice.use(choices("other", "old"))
    conv_choice.use(choices(CUDNN, "new"))
    assert choose(PROBLEM, NAMES) == CUDNN


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANFPN_CONV", "measure")
    with pytest.raises(ValueError, match="PANFPN_CONV: expected triton or cudnn or nothing, got 'measure'"):
        choose(PROBLEM, NAMES)


def test_the_shipped_table_is_valid() -> None:
    conv_choice.read_choices(conv_choice._SHIPPED)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"format": 2, "choices": {}}',
        '{"format": 1}',
        '{"format": 1, "choices": []}',
        '{"format": 1, "choices": {"gpu": {"versions": {"problem": 1}}}}',
        "\x00",
    ],
)
def test_a_damaged_file_is_named(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tuning\.json: expected a tuning file"):
        panfpn_fast.load_tuning(path)
    monkeypatch.setenv("PANFPN_TUNING", str(path))
    with pytest.raises(ValueError, match=r"tuning\.json: expected a tuning file"):
        choose(PROBLEM, NAMES)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        panfpn_fast.load_tuning(tmp_path / "missing.json")


def test_choices_need_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: object = None) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert choose(PROBLEM, NAMES) == "ours"


@pytest.mark.parametrize("pixels", [1, 2, 3, 1000, 65535, 65536, 92681, 92682, 131071])
def test_size_classes(pixels: int) -> None:
    bound = size_class(pixels)
    assert bound <= pixels < bound * 2
    assert size_class(bound) == bound
    assert math.log2(pixels / bound) < 0.5 + 1e-3 or pixels < 4
    assert size_class(0) == 0


class Asking(nn.Module):
    """A network that asks for convolutions, and for more of them if images are larger."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Sequence[torch.Tensor]) -> None:
        _, height, width = images[0].shape
        problem = Problem("NVIDIA H200", "bfloat16", size_class(len(images) * height * width), 256, 128)
        choose(problem, NAMES)


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Returns `tune` for a machine without a GPU, where the last implementation is always the fastest."""
    from panfpn_fast.models import tuning

    def measured(problem: Problem, names: Sequence[str], device: torch.device) -> dict[str, float]:
        return {name: 1.0 / (i + 1) for i, name in enumerate(names)}

    monkeypatch.setattr(conv_timing, "measure", measured)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return lambda sizes, path=None, batch=1: tuning._tune(Asking(), sizes, path, batch, torch.device("cpu"))


def test_tune_measures_and_uses(tune: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "folder" / "tuning.json"
    found = tune([(64, 64), (128, 128), (64, 65)], path)
    assert found == {f"bfloat16 {pixels} pixels 256 to 128 channels": CUDNN for pixels in (4096, 16384)}
    small = Problem("NVIDIA H200", "bfloat16", 4096, 256, 128)
    assert choose(small, NAMES) == CUDNN
    assert choose(PROBLEM, NAMES) == "ours"  # was not measured
    conv_choice.forget()
    assert choose(small, NAMES) == "ours"
    panfpn_fast.load_tuning(path)
    assert choose(small, NAMES) == CUDNN
    assert json.loads(path.read_text())["made"].startswith("panfpn_fast.tune, ")


def test_tune_drops_what_fails(tune: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_timing, "measure", lambda problem, names, _: dict.fromkeys(names, math.inf))
    assert tune([(64, 64)]) == {}
    assert tune([]) == {}


def test_tune_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match=r"model: expected a model on a CUDA device.*cpu"):
        panfpn_fast.tune(Asking(), [(64, 64)])
    with pytest.raises(TypeError, match="model: expected a PanopticFPN, got str"):
        panfpn_fast.tune("model.pth", [(64, 64)])  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match=r"sizes\[1\]"):
        panfpn_fast.tune(Asking(), [(64, 64), (0, 64)])
    with pytest.raises(ValueError, match="batch: expected an integer of at least 1, got 0"):
        panfpn_fast.tune(Asking(), [(64, 64)], batch=0)


def test_measuring_runs_each_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures on random values of the problem's size class, dtype and channels."""
    seen: list[tuple[str, tuple[int, ...], torch.dtype, tuple[int, ...]]] = []

    def run(name: str, x: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> None:
        assert weight.shape[0] % groups == 0
        seen.append((name, tuple(x.shape), x.dtype, tuple(weight.shape)))

    def timer(calls: Sequence[Callable[[], object]]) -> list[float]:
        for call in calls:
            call()
        return list(itertools.accumulate([1.0] * len(calls)))

    monkeypatch.setattr(conv_timing, "run", run)
    problem = Problem("NVIDIA H200", "tf32", 4096, 32, 24)
    times = conv_timing.measure(problem, NAMES, torch.device("cpu"), timer)
    assert times == {"ours": 1.0, "other": 2.0, CUDNN: 3.0}
    height, width = seen[0][1][2:]
    assert size_class(height * width) == 4096
    assert seen == [(name, (1, 32, height, width), torch.float32, (24, 32, 3, 3)) for name in NAMES]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
def test_tune_on_a_gpu(tmp_path: Path) -> None:
    model = panfpn_fast.PanopticFPN(backbone="resnet10_narrow").eval().to("cuda", torch.bfloat16)
    found = panfpn_fast.tune(model, [(128, 192)], tmp_path / "tuning.json")
    assert found
    panfpn_fast.load_tuning(tmp_path / "tuning.json")
