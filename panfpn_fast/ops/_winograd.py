"""When 3x3 convolutions on the CPU use Winograd's algorithm, and the switch that turns it off."""

from __future__ import annotations

import os
from types import TracebackType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from panfpn_fast import _load
from panfpn_fast.ops import _checks, _register

# With fewer channels, the transforms of inputs and outputs take longer than the saved multiplications.
_LEAST_CHANNELS = 16

# With fewer pixels, the transform of the weights takes longer than the saved multiplications.
_LEAST_PIXELS = 256

# Processors without AVX2 are left to torch.
_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _dtypes() -> tuple[torch.dtype, ...]:
    """Returns the dtypes of the algorithm on this processor, whose arithmetic is in float32.

    It takes a quarter of the multiplications. AVX512-BF16 has twice the rate of float32, which is less than that gains;
    the matrix unit AMX has 16 times the rate.
    """
    amx = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}
    halves = (dtype for dtype, name in amx.items() if not getattr(torch.cpu, name, lambda: False)())
    return torch.float32, *halves


_DTYPES = _dtypes()


# Whether the algorithm may be used in this process. torch.compile of torch 2.11 sees changes of a global, but not of an
# attribute of a class.
_is_on = os.environ.get("PANFPN_WINOGRAD") != "0"


class winograd:
    """Allows or forbids Winograd's algorithm for 3x3 convolutions on the CPU within a `with` block.

    It applies to `conv3x3`, to the ops of the semantic head and to the networks of this package, in all threads of the
    process. The environment variable PANFPN_WINOGRAD=0 forbids it from the start. Functions of torch.compile follow the
    switch: they are compiled again when it changes. Exported programs keep the convolutions that they were made with.

    Args:
        enabled: Whether the algorithm may be used.

    Raises:
        TypeError: If `enabled` is not a bool.

    Note:
        An instance can be used again, also within its own block.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> with ops.winograd(False):
        ...     ops.conv3x3(torch.ones(1, 16, 32, 32), torch.ones(16, 16, 3, 3))[0, 0, 1, 1]
        tensor(144.)
    """

    def __init__(self, enabled: bool) -> None:
        _checks.check_bool("enabled", enabled)
        self._enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> None:
        global _is_on
        self._before.append(_is_on)
        _is_on = self._enabled

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _is_on
        _is_on = self._before.pop()

    @staticmethod
    def prepare(weight: Tensor, tile: int = 4) -> Tensor | None:
        """Transforms the weights of `conv3x3` once for many calls.

        Args:
            weight: [K, C, 3, 3].
            tile: Outputs that are computed together along each axis: 4 for speed, or 2 for the smaller rounding error
                of F(2x2, 3x3).

        Returns:
            A float32 tensor [(tile + 2)^2, C, K rounded up to a multiple of 16], whose order of elements is the same on
            all processors; or None if `conv3x3` uses torch's convolution for these weights: float64, other devices than
            the CPU, fewer than 16 channels, processors without AVX2, and 16-bit dtypes on processors with AMX for them.
            It has 4 times (for `tile=2` 1.8 times) as many numbers as the weights.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or value.

        Note:
            Computed in float64 and rounded once. The result is a snapshot of the weights and not differentiable.
            Deterministic. No host sync.

        Example:
            >>> import torch
            >>> from panfpn_fast import ops
            >>> ops.winograd.prepare(torch.ones(8, 16, 3, 3)) is None
            True
        """
        _checks.check_tensor("weight", weight, _checks.FLOATING, "[K, C, 3, 3]", (4,))
        if weight.shape[2:] != (3, 3):
            raise ValueError(f"weight: expected shape [K, C, 3, 3], got {list(weight.shape)}")
        _checks.check_int("tile", tile)
        if tile not in (2, 4):
            raise ValueError(f"tile: expected 2 or 4, got {tile}")
        if not suits_winograd(weight):
            return None
        prepared: Tensor = torch.ops.panfpn_fast.conv3x3_prepare(weight.detach(), tile)
        return prepared


@_register.register_fake("conv3x3_prepare")
def _fake(weight: Tensor, tile: int) -> Tensor:
    size = ((tile + 2) ** 2, weight.shape[1], (weight.shape[0] + 15) // 16 * 16)
    return weight.new_empty(size, dtype=torch.float32)


def suits_winograd(weight: Tensor) -> bool:
    """Whether the algorithm is faster for weights [K, C, 3, 3], by device, dtype and number of channels."""
    return (
        _VECTORS
        and _load._cpu_error is None
        and weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and min(weight.shape[:2]) >= _LEAST_CHANNELS
    )


def is_transformed() -> bool:
    """Whether forward-mode AD or torch.func, which our op does not support, may transform a call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def takes_winograd(x: Tensor, weight: Tensor, prepared: bool = False) -> bool:
    """Whether a 3x3 convolution of `x` uses Winograd's algorithm, with weights that may be transformed already."""
    return (
        _is_on
        and suits_winograd(weight)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
        and (prepared or x.shape[0] * x.shape[2] * x.shape[3] >= _LEAST_PIXELS)
    )
