"""torch.compile takes the whole network without a graph break."""

from __future__ import annotations

import torch
from training_samples import make_sample, small_model

from panfpn_fast.models.padded import PaddedPanopticFPN


def test_whole_network() -> None:
    """With the eager backend: inductor's code is tested by the export, which compiles the same graph."""
    padded = PaddedPanopticFPN(small_model(rpn_pre_nms_topk=60, rpn_post_nms_topk=50).eval(), (33, 80))
    compiled = torch.compile(padded, fullgraph=True, backend="aot_eager")
    images = make_sample(50, 70).image[None]
    torch.testing.assert_close(compiled(images), padded(images), atol=1e-4, rtol=1e-5)
