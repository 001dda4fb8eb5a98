"""Layers and initialisations that several parts of the network share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and a fixed affine transform.

    All four vectors are buffers, so that optimisers ignore them and they do not count as parameters.

    Args:
        channels: Number of channels C.
        eps: Value added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` [N, C, H, W]."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def extra_repr(self) -> str:
        """Returns the number of channels and eps for the printed network."""
        return f"{self.weight.numel()}, eps={self.eps}"


def make_norm(kind: str, channels: int) -> nn.Module:
    """Makes a normalisation layer of a kind listed in `PanopticFPNConfig.backbone_norm`."""
    if kind == "frozen_bn":
        return FrozenBatchNorm2d(channels)
    if kind == "bn":
        return nn.BatchNorm2d(channels)
    if kind == "sync_bn":
        return nn.SyncBatchNorm(channels)
    most = min(32, max(1, channels // 8))
    return nn.GroupNorm(next(groups for groups in range(most, 0, -1) if channels % groups == 0), channels)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of coordinates and scores: float32, or float64 for float64 features."""
    return torch.promote_types(dtype, torch.float32)


class ExactConstants(nn.Module):
    """A module with constants: buffers that move with the module but are never rounded to half precision.

    Checkpoints do not contain them. They therefore have values even in a module built under `torch.device("meta")`,
    whose parameters a loader then replaces.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, Sequence[object]] = {}

    def add_constant(self, name: str, values: Sequence[object]) -> None:
        """Registers `values`, nested sequences of numbers, as the buffer `name`."""
        self._constants[name] = values
        device = torch.get_default_device()
        if device.type == "meta":
            device = torch.device("cpu")
        self.register_buffer(name, torch.tensor(values, dtype=torch.float32, device=device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactConstants:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in self._constants.items():
            moved = self.get_buffer(name)
            exact = torch.tensor(values, dtype=at_least_float32(moved.dtype), device=moved.device)
            setattr(self, name, exact)
        return self


def init_msra(module: nn.Module) -> None:
    """Initialises a layer before a ReLU with He's method: normal, fan out; the bias is zero."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_xavier(module: nn.Module) -> None:
    """Initialises a layer with Caffe2's Xavier method: uniform with variance 1 / fan in; the bias is zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_uniform_(module.weight, a=1)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_normal(module: nn.Module, std: float) -> None:
    """Initialises a layer with a normal distribution of standard deviation `std`; the bias is zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
