"""Box and mask heads: detections against a one-box-at-a-time oracle, masks against the full predictor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.models import PanopticFPNConfig
from panfpn_fast.models.boxes import clip_boxes, decode_boxes, nonempty, scale_boxes
from panfpn_fast.models.roi_heads import BoxHead, MaskHead
from support.head_oracles import clip, decode, nms

CONFIG = PanopticFPNConfig(fpn_channels=4, num_things=3, box_head_channels=16, mask_head_channels=8)


def _features(batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(batch, 4, 32 // 2**i, 40 // 2**i, dtype=dtype) for i in range(4)]


def test_decode_known_answers() -> None:
    box = torch.tensor([[10.0, 20.0, 20.0, 40.0]])
    moved = decode_boxes(torch.tensor([[0.1, -0.2, 0.0, math.log(2)]]), box, (1, 1, 1, 1))
    torch.testing.assert_close(moved, torch.tensor([[11.0, 6.0, 21.0, 46.0]]))
    moved = decode_boxes(torch.tensor([[1.0, -2.0, 0.0, 5 * math.log(2)]]), box, (10, 10, 5, 5))
    torch.testing.assert_close(moved, torch.tensor([[11.0, 6.0, 21.0, 46.0]]))
    # Deltas have the upper limit log(1000 / 16), and no lower limit.
    moved = decode_boxes(torch.tensor([[0.0, 0.0, 99.0, -9.0]]), box, (1, 1, 1, 1))
    height = 20 * math.exp(-9)
    torch.testing.assert_close(
        moved, torch.tensor([[15 - 312.5, 30 - height / 2, 15 + 312.5, 30 + height / 2]])
    )
    # mmdetection also has a lower limit.
    moved = decode_boxes(torch.tensor([[0.0, 0.0, 99.0, -9.0]]), box, (1, 1, 1, 1), clamp_shrinking=True)
    torch.testing.assert_close(moved, torch.tensor([[15 - 312.5, 30 - 0.16, 15 + 312.5, 30 + 0.16]]))


def test_box_arithmetic() -> None:
    boxes = torch.tensor([[-5.0, 2.0, 30.0, 50.0], [3.0, 3.0, 3.0, 9.0], [float("nan"), 0.0, 4.0, 4.0]])
    assert clip_boxes(boxes, (40, 20))[:2].tolist() == [[0, 2, 20, 40], [3, 3, 3, 9]]
    assert nonempty(boxes).tolist() == [True, False, False]
    assert scale_boxes(boxes[:1], (10, 20), (30, 10)).tolist() == [[-2.5, 6, 15, 150]]
    assert clip_boxes(torch.empty(0, 4), (4, 4)).shape == (0, 4)
    assert scale_boxes(torch.empty(0, 4), (1, 1), (2, 2)).shape == (0, 4)
    assert nonempty(torch.empty(0, 4)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_in_tensors_give_the_same_bits(dtype: torch.dtype) -> None:
    boxes = 700 * torch.rand(500, 4, dtype=dtype) - 100
    boxes[3] = float("nan")
    for old, new in (((800, 1067), (427, 640)), ((333, 7), (800, 1)), ((3, 3), (3, 3))):
        sizes = torch.tensor(old), torch.tensor(new)
        for found, expected in (
            (clip_boxes(boxes, sizes[0]), clip_boxes(boxes, old)),
            (scale_boxes(boxes, *sizes), scale_boxes(boxes, old, new)),
        ):
            assert found.dtype == dtype
            assert torch.equal(found.nan_to_num(-1e9), expected.nan_to_num(-1e9))


@pytest.mark.parametrize("seed", range(4))
def test_detections_equal_the_oracle(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = BoxHead(CONFIG.replace(detections_per_image=17, score_threshold=0.15))
    counts, sizes = [14, 0, 23], [(30, 40), (30, 40), (25, 33)]
    corners = randn(37, 2).abs() * 10
    proposals = torch.cat((corners, corners + 4 + randn(37, 2).abs() * 8), dim=1)
    logits, deltas = 2 * randn(37, 4), 3 * randn(37, 3, 4)
    logits[2, 1] = float("nan")
    deltas[20, 2, 1] = float("inf")  # one infinite coordinate drops all classes of the proposal
    detections = head.detect(logits, deltas, torch.split(proposals, counts), sizes)

    start = 0
    for detection, count, (height, width) in zip(detections, counts, sizes, strict=True):
        candidates = []
        for i in range(start, start + count):
            probabilities = [math.exp(v) / sum(map(math.exp, logits[i].tolist())) for v in logits[i].tolist()]
            if not all(map(math.isfinite, [*logits[i].tolist(), *deltas[i].flatten().tolist()])):
                continue
            for c in range(3):
                if probabilities[c] > 0.15:
                    box = decode(proposals[i].tolist(), deltas[i, c].tolist(), (10, 10, 5, 5))
                    candidates.append((probabilities[c], clip(box, height, width), c))
        expected = nms(candidates, 0.5)[:17]
        start += count
        assert detection.boxes.shape == (len(expected), 4)
        boxes = torch.tensor([box for _, box, _ in expected], dtype=torch.float64).reshape(-1, 4)
        torch.testing.assert_close(detection.boxes, boxes)
        torch.testing.assert_close(
            detection.scores, torch.tensor([s for s, _, _ in expected], dtype=torch.float64)
        )
        assert detection.classes.tolist() == [c for _, _, c in expected]
        assert detection.classes.dtype == torch.int64


def test_nms_over_all_classes() -> None:
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 7.0], [10.0, 0.0, 18.0, 8.0]])
    logits = torch.tensor([[5.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    for agnostic, expected in ((False, [0, 1, 2]), (True, [0, 2])):
        head = BoxHead(CONFIG.replace(score_threshold=0.6, class_agnostic_nms=agnostic))
        [detection] = head.detect(logits, torch.zeros(3, 3, 4), [boxes], [(20, 20)])
        assert detection.classes.tolist() == expected


def test_score_equal_to_the_threshold_is_not_a_candidate() -> None:
    head = BoxHead(CONFIG.replace(score_threshold=0.25))
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    [detection] = head.detect(torch.zeros(1, 4), torch.zeros(1, 3, 4), [boxes], [(20, 20)])
    assert len(detection.boxes) == 0


def test_heads_accept_zero_boxes() -> None:
    nothing = [torch.empty(0, 4), torch.empty(0, 4)]
    head = BoxHead(CONFIG).eval()
    with torch.no_grad():
        logits, deltas = head(_features(2), nothing)
        assert (logits.shape, deltas.shape) == ((0, 4), (0, 3, 4))
        for detection in head.detect(logits, deltas, nothing, [(128, 160)] * 2):
            assert [list(x.shape) for x in detection] == [[0, 4], [0], [0]]
        masks = MaskHead(CONFIG).eval()(_features(2), nothing, torch.empty(0, dtype=torch.int64))
    assert masks.shape == (0, 28, 28)


def test_mask_logits_belong_to_the_class_of_each_box() -> None:
    head = MaskHead(CONFIG).double().eval()
    features = _features(1, torch.float64)
    boxes = [torch.tensor([[3.0, 4.0, 60.0, 50.0], [0.0, 0.0, 9.0, 9.0], [20.0, 8.0, 150.0, 120.0]])]
    classes = torch.tensor([2, 0, 2])
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
        got = head(features, boxes, classes)
        x = ops.multiscale_roi_align(features, boxes, 14, [1 / 4, 1 / 8, 1 / 16, 1 / 32])
        for conv in head.convs:
            x = conv(x).relu()
        everything = head.logits(head.deconv(x).relu())
    assert everything.shape == (3, 3, 28, 28)
    torch.testing.assert_close(got, everything[torch.arange(3), classes])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("boxes", [0, 7])
def test_masks_and_their_gradients_equal_those_of_the_transposed_convolution(
    boxes: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    head = MaskHead(CONFIG).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    features = [f.contiguous(memory_format=memory_format) for f in _features(1, torch.float64)]
    corners = torch.rand(boxes, 2) * 60
    places = [torch.cat((corners, corners + 5 + torch.rand(boxes, 2) * 40), dim=1)]
    classes = torch.arange(boxes) % 3
    weights = torch.randn(boxes, 28, 28, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        inputs = [f.clone().requires_grad_() for f in features]
        logits = head(inputs, places, classes)
        results.append(logits.detach())
        return list(torch.autograd.grad((logits * weights).sum(), [*inputs, *head.parameters()]))

    results: list[Tensor] = []
    found = gradients()
    calls: list[int] = []
    with head.deconv.register_forward_hook(lambda *_: calls.append(1)):  # a hook sees the layer called
        expected = gradients()
    assert calls == [1]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(found, expected)


def test_half_precision_features_give_float32_predictions() -> None:
    head = BoxHead(CONFIG).to(torch.bfloat16).eval()
    features = [f.bfloat16() for f in _features(1)]
    with torch.no_grad():
        logits, deltas = head(features, [torch.tensor([[0.0, 0.0, 50.0, 50.0]])])
    assert logits.dtype == deltas.dtype == torch.float32


def test_class_agnostic_heads_equal_class_specific_heads_with_equal_rows() -> None:
    torch.manual_seed(0)
    settings = CONFIG.replace(class_agnostic_boxes=True, class_agnostic_masks=True, score_threshold=0.1)
    features = _features(2)
    corners = torch.rand(2, 9, 2) * 60
    proposals = list(torch.cat((corners, corners + 5 + torch.rand(2, 9, 2) * 40), dim=2))
    classes = torch.arange(18) % 3

    def thrice(head: torch.nn.Module, layer: str) -> dict[str, Tensor]:
        state = head.state_dict()
        return {name: torch.cat([x] * 3) if name.startswith(layer) else x for name, x in state.items()}

    agnostic, specific = BoxHead(settings), BoxHead(CONFIG.replace(score_threshold=0.1))
    torch.nn.init.normal_(agnostic.box_deltas.weight)
    assert agnostic.box_deltas.weight.shape == (4, 16)
    specific.load_state_dict(thrice(agnostic, "box_deltas"))
    logits, deltas = agnostic(features, proposals)
    other_logits, other_deltas = specific(features, proposals)
    assert deltas.shape == (18, 1, 4)
    torch.testing.assert_close(deltas.expand(-1, 3, -1), other_deltas)
    sizes = [(100, 110), (90, 120)]
    for found, expected in zip(
        agnostic.detect(logits, deltas, proposals, sizes),
        specific.detect(other_logits, other_deltas, proposals, sizes),
        strict=True,
    ):
        assert len(found.boxes) > 9
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)

    masks, specific_masks = MaskHead(settings), MaskHead(CONFIG)
    torch.nn.init.normal_(masks.logits.weight)
    assert masks.logits.weight.shape == (1, 8, 1, 1)
    state = masks.state_dict()
    specific_masks.load_state_dict(
        {k: v.repeat(3, *[1] * (v.ndim - 1)) if "logits" in k else v for k, v in state.items()}
    )
    found_masks = masks(features, proposals, classes)
    torch.testing.assert_close(found_masks, specific_masks(features, proposals, classes))
    assert torch.equal(found_masks, masks(features, proposals, classes.flip(0)))
