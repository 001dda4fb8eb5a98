"""torch.compile compiles the network without a graph break.

These tests use the eager backend. The tests of export compile the same graph with Inductor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panfpn_fast.models.padded import PaddedPanopticFPN
from support.training_samples import make_sample, small_model


def test_dense_part() -> None:
    model = small_model().eval()

    def dense(images: Tensor) -> tuple[Any, Tensor]:
        features = model.features(images)
        return model.rpn(features["instance"]), model.semantic_head(features["semantic"])

    images = model.prepare([make_sample(50, 70).image]).images
    compiled = torch.compile(dense, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), dense(images), atol=1e-5, rtol=1e-5)


def test_whole_network() -> None:
    padded = PaddedPanopticFPN(small_model(rpn_pre_nms_topk=60, rpn_post_nms_topk=50).eval(), (33, 80))
    compiled = torch.compile(padded, fullgraph=True, backend="aot_eager")
    images = make_sample(50, 70).image[None]
    torch.testing.assert_close(compiled(images), padded(images), atol=1e-4, rtol=1e-5)
