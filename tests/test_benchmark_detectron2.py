"""Tests of the installed detectron2 as a peer of the benchmarks, on a small image."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from support.repository import repository

SIZE = (192, 256)
CPU = torch.device("cpu")


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    return repository(monkeypatch)


@pytest.fixture
def installed(root: Path) -> None:
    pytest.importorskip("detectron2", reason="detectron2 is not installed")


def test_a_missing_package_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.networks import detectron2_network

    monkeypatch.setitem(sys.modules, "detectron2", None)  # as if it were not installed
    assert detectron2_network.problem.__wrapped__(CPU) == "detectron2 is not installed"


def test_an_incomplete_package_is_named(root: Path, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.networks import detectron2_network

    monkeypatch.setitem(sys.modules, "detectron2.modeling", None)
    problem = str(detectron2_network.problem.__wrapped__(CPU))
    assert problem.startswith("detectron2 cannot be imported: ")
    assert "detectron2.modeling" in problem


def test_predictions_and_their_stages(root: Path, installed: None) -> None:
    from benchmarks.harness import inputs, stages
    from benchmarks.harness.agreement import same_maps
    from benchmarks.networks import detectron2_network
    from benchmarks.networks.stand_in import stand_in
    from benchmarks.networks.test_end_to_end import copy_to_host

    assert detectron2_network.problem(CPU) is None
    images = [inputs.image(SIZE, seed=seed) for seed in range(2)]
    found = detectron2_network.predict("resnet50", CPU, images)
    same_maps(0.999)(copy_to_host(stand_in("resnet50", CPU)(images)), found)

    network = stand_in("resnet50", CPU)
    seconds = stages.stage_seconds(
        lambda: detectron2_network.predict("resnet50", CPU, images),
        detectron2_network.parts_of("resnet50", CPU),
        CPU,
    )
    assert list(seconds) == [
        *dict.fromkeys(part.stage for part in stages.parts_of(network)),
        "copy",
        "rest",
    ]
    assert min(seconds.values()) > 0


def test_losses_and_gradients(root: Path, installed: None) -> None:
    from benchmarks.harness import inputs
    from benchmarks.networks import detectron2_network
    from benchmarks.networks.stand_in import stand_in
    from benchmarks.networks.training_inputs import annotation
    from panfpn_fast.training.network import TrainingNetwork, total

    image, target = inputs.image(SIZE), annotation(SIZE)
    network = TrainingNetwork(stand_in("resnet50", CPU))
    ours = network([image], [target], [0])
    theirs = detectron2_network.losses("resnet50", image, target)
    assert theirs.keys() == ours.keys()
    # Those of the two classifications depend on the sampled background.
    for name in ("loss_rpn_box", "loss_box", "loss_mask", "loss_semantic"):
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=0.0)

    weights = detectron2_network.weights("resnet50", CPU)
    expected = [list(part.parameters()) for part in network.model.children()]
    assert [[w.shape for w in part] for part in weights] == [[w.shape for w in part] for part in expected]
    gradients = torch.autograd.grad(total(theirs), [weight for part in weights for weight in part])
    assert all(bool((gradient != 0).any()) for gradient in gradients)
