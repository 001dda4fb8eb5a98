"""The network with its losses: which branches are trained, and which parameters get gradients."""

from __future__ import annotations

import pytest
import torch

from panfpn_fast.training.network import INSTANCE_LOSSES, SEMANTIC_LOSSES, TrainingNetwork, total
from support.training_samples import make_batch, make_sample, small_model

SCENES = [make_sample(50, 70, 1), make_sample(64, 64, 2)]
LOSSES = {"instance": INSTANCE_LOSSES, "semantic": SEMANTIC_LOSSES}


@pytest.mark.parametrize("task", LOSSES)
def test_one_branch_has_the_same_losses_alone_and_in_a_shared_network(task: str) -> None:
    joint = small_model()
    alone = small_model(tasks=(task,))
    state = joint.state_dict()
    alone.load_state_dict({name: state[name] for name in alone.state_dict()})
    batch = make_batch(*SCENES)
    everything = TrainingNetwork(joint)(*batch)
    assert list(everything) == [*INSTANCE_LOSSES, *SEMANTIC_LOSSES]
    turn = TrainingNetwork(joint)(*batch, branches=(task,))
    found = TrainingNetwork(alone)(*batch)
    assert set(found) == set(turn) == set(LOSSES[task])
    for name, loss in found.items():
        assert torch.equal(loss, turn[name])
        assert torch.equal(loss, everything[name])
    total(found).backward()
    total(turn).backward()
    parameters = dict(joint.named_parameters())
    for name, parameter in alone.named_parameters():
        # DistributedDataParallel waits for all gradients.
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, parameters[name].grad)


def test_a_branch_that_the_network_does_not_have_is_rejected() -> None:
    network = TrainingNetwork(small_model(tasks=("semantic",)))
    with pytest.raises(ValueError, match=r"branches: expected some of the network's, \('semantic',\)"):
        network(*make_batch(*SCENES), branches=("instance",))


def test_losses_depend_only_on_the_seed() -> None:
    network = TrainingNetwork(small_model())
    images, targets, seeds = make_batch(*SCENES)
    first = network(images, targets, seeds)
    torch.rand(7)
    again = network(images, targets, seeds)
    other = network(images, targets, [seed + 1 for seed in seeds])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["loss_rpn_cls"], other["loss_rpn_cls"])
    assert torch.equal(first["loss_semantic"], other["loss_semantic"])
