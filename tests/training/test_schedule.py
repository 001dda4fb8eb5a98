"""The optimizers, whose steps are fused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from panfpn_fast.training.config import SolverConfig
from panfpn_fast.training.schedule import make_optimizer


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_equal_those_of_plain_optimizers(name: str, momentum: float) -> None:
    solver = SolverConfig(optimizer=name, learning_rate=0.004, momentum=momentum, weight_decay=0.01)

    def weights(fused: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)).double()
        first, norm, last = network
        if fused:
            optimizer = make_optimizer(network, solver)
        else:
            groups = [
                {"params": [*first.parameters(), *last.parameters()], "weight_decay": 0.01},
                {"params": list(norm.parameters()), "weight_decay": 0.0},
            ]
            if name == "adamw":
                optimizer = torch.optim.AdamW(groups, lr=0.004, foreach=False)
            else:
                optimizer = torch.optim.SGD(groups, lr=0.004, momentum=momentum, foreach=False)
        for step in range(4):
            optimizer.zero_grad()
            # The last layer gets its first gradient in the second step.
            x = first(torch.randn(2, 3, 5, 5, dtype=torch.float64))
            (last(norm(x)) if step % 2 else norm(x)).square().sum().backward()
            optimizer.step()
        return [parameter.detach() for parameter in network.parameters()]

    torch.testing.assert_close(weights(fused=True), weights(fused=False))
