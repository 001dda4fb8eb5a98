"""Training the semantic head never makes logits at the image's resolution."""

from __future__ import annotations

import pytest
import torch
from resident_memory import peak_rise
from torch import Tensor

from panfpn_fast.models import PanopticFPNConfig
from panfpn_fast.models.semantic_head import SemanticHead

_BATCH, _CLASSES, _HEIGHT, _WIDTH = 2, 54, 800, 1344
_FULL_LOGITS = _BATCH * _CLASSES * _HEIGHT * _WIDTH * 4


def _step(device: torch.device) -> tuple[SemanticHead, list[Tensor], Tensor]:
    torch.manual_seed(0)
    head = SemanticHead(PanopticFPNConfig(num_stuff=_CLASSES - 1)).to(device)
    features = [
        torch.randn(_BATCH, 256, _HEIGHT // stride, _WIDTH // stride, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for stride in (4, 8, 16, 32)
    ]
    return head, features, torch.randint(0, _CLASSES, (_BATCH, _HEIGHT, _WIDTH), device=device)


def _train(head: SemanticHead, features: list[Tensor], targets: Tensor) -> None:
    head.loss(head(features), targets).backward()  # type: ignore[no-untyped-call]


def test_training_stays_below_full_resolution_logits() -> None:
    head, features, targets = _step(torch.device("cpu"))
    small = [feature[:, :, :16, :16] for feature in features[:1]] + [
        feature[:, :, : 16 // 2**i, : 16 // 2**i] for i, feature in enumerate(features[1:], start=1)
    ]
    _train(head, small, targets[:, :64, :64])  # the gradients' own memory, and what libraries keep
    assert peak_rise(lambda: _train(head, features, targets)) < _FULL_LOGITS


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
def test_training_stays_below_full_resolution_logits_on_a_gpu() -> None:
    head, features, targets = _step(torch.device("cuda"))
    _train(head, features, targets)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _train(head, features, targets)
    assert torch.cuda.max_memory_allocated() - before < _FULL_LOGITS
