"""The learning rate schedule and the optimizer."""

from __future__ import annotations

import math

import torch
from torch import nn

from panfpn_fast.training.config import SolverConfig

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def learning_rate(solver: SolverConfig, step: int) -> float:
    """Returns the learning rate of a step; steps count from 0.

    Example:
        >>> solver = SolverConfig(learning_rate=0.1, warmup_steps=10, warmup_factor=0.0, milestones=[20])
        >>> learning_rate(solver, 5), learning_rate(solver, 19), round(learning_rate(solver, 20), 4)
        (0.05, 0.1, 0.01)
        >>> solver = SolverConfig(learning_rate=0.1, warmup_steps=0, schedule="cosine", steps=100)
        >>> [round(learning_rate(solver, step), 4) for step in (0, 50, 100)]
        [0.1, 0.05, 0.0]
    """
    rate = solver.peak_learning_rate
    if solver.schedule == "cosine":
        share = 0.5 + 0.5 * math.cos(math.pi * step / solver.steps)
        rate *= solver.final_factor + (1 - solver.final_factor) * share
    else:
        rate *= solver.gamma ** sum(step >= milestone for milestone in solver.milestones)
    if step < solver.warmup_steps:
        part = step / solver.warmup_steps
        rate *= solver.warmup_factor * (1 - part) + part
    return rate


def make_optimizer(network: nn.Module, solver: SolverConfig) -> torch.optim.Optimizer:
    """Returns the optimizer of all parameters that learn; those of normalization layers have no weight decay."""
    of_norms = {
        id(p) for module in network.modules() if isinstance(module, _NORMS) for p in module.parameters()
    }
    learning = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if id(p) not in of_norms], "weight_decay": solver.weight_decay},
        {"params": [p for p in learning if id(p) in of_norms], "weight_decay": 0.0},
    ]
    rate = solver.peak_learning_rate
    if solver.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=solver.momentum, fused=True)
    if solver.momentum > 0:
        # Without them, the fused implementation fails if parameters get their first gradients in different steps.
        for parameter in learning:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
