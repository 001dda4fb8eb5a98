"""Training the semantic head never creates logits at the resolution of the image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from panfpn_fast import ops
from panfpn_fast.models import PanopticFPNConfig
from panfpn_fast.models.semantic_head import SemanticHead
from support.resident_memory import peak_rise

_BATCH, _HEIGHT, _WIDTH = 2, 800, 1344
_FEW, _MANY = 4, 54
_LOGITS_OF_THE_OTHERS = _BATCH * (_MANY - _FEW) * _HEIGHT * _WIDTH * 4


def _step(classes: int, device: torch.device) -> Callable[[], None]:
    """Runs a training step of a head with a number of classes."""
    torch.manual_seed(0)
    head = SemanticHead(PanopticFPNConfig(num_stuff=classes - 1)).to(device)
    features = [
        torch.randn(_BATCH, 256, _HEIGHT // stride, _WIDTH // stride, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for stride in (4, 8, 16, 32)
    ]
    targets = torch.randint(0, classes, (_BATCH, _HEIGHT, _WIDTH), device=device)

    def run() -> None:
        ops.upsample_cross_entropy(head(features), targets, head.stride).backward()  # type: ignore[no-untyped-call]

    return run


def _peak_on_a_gpu(run: Callable[[], None]) -> int:
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _check(peak: Callable[[Callable[[], None]], int], device: torch.device) -> None:
    """More classes cost memory for logits at 1/4 of the resolution, a 16th of full-resolution logits."""
    few, many = (peak(_step(classes, device)) for classes in (_FEW, _MANY))
    assert many - few < _LOGITS_OF_THE_OTHERS / 2


def test_training_creates_no_logits_at_full_resolution() -> None:
    _check(peak_rise, torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
def test_training_creates_no_logits_at_full_resolution_on_a_gpu() -> None:
    _check(_peak_on_a_gpu, torch.device("cuda"))
