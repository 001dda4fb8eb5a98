from __future__ import annotations

from panfpn_fast.demo.comparisons import Comparison, compare_networks, compare_ops, format_comparison


def test_two_networks_take_longer_than_nothing() -> None:
    found = compare_networks((64, 96), "resnet18", seconds=0)
    assert found.what == "prediction, 64 x 96, resnet18"
    assert found.ours > 0
    assert found.theirs > 0


def test_each_op_equals_its_peer() -> None:
    # A comparison checks the results first, at a quarter of the size here.
    found = list(compare_ops(scale=4, seconds=0))
    assert [one.what.partition(",")[0] for one in found] == [
        "conv3x3",
        "group_norm_relu_upsample",
        "upsample_argmax",
        "upsample_cross_entropy",
    ]


def test_format() -> None:
    assert format_comparison(Comparison("nms", 0.001, "PyTorch", 0.0025)).split() == (
        ["nms", "1.00", "ms", "PyTorch", "2.50", "ms", "2.50", "times", "as", "fast"]
    )
