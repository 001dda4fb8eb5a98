"""Replacements made by `served` call the framework's own function wherever an op does not serve the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from panfpn_fast.integrations import patching
from panfpn_fast.integrations._calls import REFUSED, attempt, integer_threshold, served


def half(x: int, *, repeats: int = 1) -> Any:
    """Serves even numbers only."""
    return None if x % 2 else ("served", x // 2**repeats)


def original(*args: Any, **kwargs: Any) -> Any:
    return "original", args, kwargs


def test_served_calls_get_the_result_of_serve() -> None:
    replacement = served(half)(original)
    assert replacement(6) == ("served", 3)
    assert replacement(x=8, repeats=2) == ("served", 2)


def test_other_calls_get_the_result_of_the_original_for_the_same_arguments() -> None:
    replacement = served(half)(original)
    assert replacement(5) == ("original", (5,), {})
    assert replacement(x=5, repeats=2) == ("original", (), {"x": 5, "repeats": 2})
    assert replacement(6, 7, unknown=8) == ("original", (6, 7), {"unknown": 8})  # not the signature of `half`


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_call_goes_to_the_original(kind: type[Exception]) -> None:
    def refuse(x: int) -> None:
        raise kind("not supported")

    assert served(refuse)(original)(3) == ("original", (3,), {})
    assert attempt(refuse, 3) is None


def test_an_error_of_the_original_is_raised_without_that_of_the_op() -> None:
    def refuse(x: int) -> None:
        raise ValueError("the op does not support this")

    def fail(x: int) -> None:
        raise ValueError("the framework does not support this")

    with pytest.raises(ValueError, match="the framework does not support this") as caught:
        served(refuse)(fail)(3)
    assert caught.value.__context__ is None


def test_other_errors_of_an_op_are_raised() -> None:
    def fail(x: int) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        served(fail)(original)(3)


def test_falsy_results_are_results() -> None:
    assert served(lambda x: [])(original)(3) == []


def scale(x: Tensor) -> Tensor:
    """A function that `Scaling` finds in this module."""
    return 3 * x


class Scaling(nn.Module):
    """Stand-in for a framework's module with a patched method."""

    def forward(self, x: Tensor) -> Tensor:
        return scale(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_jit_script_compiles_the_original_of_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    replacement = patching.Replacement("scaling:forward", "scale", served(lambda self, x: 5 * x))
    monkeypatch.setattr(Scaling, "forward", patching._make(replacement, Scaling.forward))
    one = torch.ones(1)
    assert Scaling()(one) == 5
    assert torch.jit.script(Scaling())(one) == 3


@pytest.mark.parametrize(("threshold", "expected"), [(3, 3), (3.0, 3), (2.5, 3), (-0.5, 0)])
def test_integer_threshold(threshold: float, expected: int) -> None:
    assert integer_threshold(threshold) == expected
    assert all((area < threshold) == (area < expected) for area in range(6))


def test_integer_threshold_takes_finite_numbers() -> None:
    with pytest.raises(ValueError, match="threshold: expected a finite number, got inf"):
        integer_threshold(float("inf"))
