"""What detectron2's and mmdetection's checkpoints have in common: names that stand for ours, and shapes that tell."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panfpn_fast.checkpoints.reader import CheckpointError
from panfpn_fast.models.config import BACKBONES, TASKS
from panfpn_fast.models.panoptic_fpn import PanopticFPN

_NUMBER = re.compile(r"\{(\d)([-+*])(\d)\}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A framework's names for the tensors of a Panoptic FPN.

    Attributes:
        framework: whose.
        rules: our name, as a pattern, and theirs, as a template, in which ``{1+1}`` is one more than the first group.
        block: a pattern of their names that begins with a block of the backbone; its groups are stage and block.
        first_stage: their number of C2's.
        branches: where the tensors of each branch are.
        ignored: a pattern of what is no weight.
    """

    framework: str
    rules: tuple[tuple[str, str], ...]
    block: str
    first_stage: int
    branches: Mapping[str, tuple[str, ...]]
    ignored: str

    def key(self, name: str) -> str:
        """Returns their name of one of our tensors.

        Args:
            name: a key of ``PanopticFPN.state_dict()``, for example ``"fpn.lateral.p2.weight"``.

        Returns:
            Their name of it.

        Raises:
            KeyError: their network has no such tensor.
        """
        for pattern, template in self.rules:
            match = re.fullmatch(pattern, name)
            if match:
                return match.expand(_NUMBER.sub(partial(_number, match), template))
        raise KeyError(name)

    def settings(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Reads off the tensors what network they belong to.

        Args:
            weights: tensors or arrays by their names.

        Returns:
            Fields of ``PanopticFPNConfig``, as far as the tensors tell.

        Raises:
            CheckpointError: the backbone has a depth that no known ResNet has.
        """
        found: dict[str, Any] = {"backbone": self._backbone(weights), "tasks": self._tasks(weights)}
        for field, name, axis, extra in (
            ("num_things", "box_head.class_logits.weight", 0, 1),
            ("num_stuff", "semantic_head.logits.weight", 0, 1),
            ("semantic_channels", "semantic_head.logits.weight", 1, 0),
            ("fpn_channels", "fpn.lateral.p2.weight", 0, 0),
            ("box_head_channels", "box_head.fc1.weight", 0, 0),
            ("mask_head_channels", "mask_head.convs.0.weight", 0, 0),
        ):
            shape = np.shape(weights.get(self.key(name), ()))
            if len(shape) > axis and shape[axis] > extra:
                found[field] = int(shape[axis]) - extra
        for field, name, rows in (
            ("class_agnostic_boxes", "box_head.box_deltas.weight", 4),
            ("class_agnostic_masks", "mask_head.logits.weight", 1),
        ):
            # Of a single class, both are the same.
            if self.key(name) in weights and found.get("num_things", 1) > 1:
                found[field] = np.shape(weights[self.key(name)])[:1] == (rows,)
        if (found.get("num_things"), found.get("num_stuff")) == (8, 11):
            found["dataset"] = "cityscapes"
        return found

    def _tasks(self, weights: Collection[str]) -> tuple[str, ...]:
        """The branches that the tensors belong to; both where they belong to neither, which is told later."""
        found = tuple(task for task in TASKS if any(name.startswith(self.branches[task]) for name in weights))
        return found or TASKS

    def _backbone(self, weights: Mapping[str, Any]) -> str:
        blocks: list[set[int]] = [set(), set(), set(), set()]
        for name in weights:
            match = re.match(self.block, name)
            if match and 0 <= int(match[1]) - self.first_stage < 4:
                blocks[int(match[1]) - self.first_stage].add(int(match[2]))
        depth = tuple(len(found) for found in blocks)
        third = self.key("backbone.layer1.0.conv3.weight").removesuffix("weight")
        bottleneck = any(name.startswith(third) for name in weights)
        published = {name: layout for name, layout in BACKBONES.items() if layout.width == 64}
        # A convolution's weight has as many columns as one of its groups has channels.
        columns = np.shape(weights.get(self.key("backbone.layer1.0.conv2.weight"), ()))[1:2]
        for name, layout in published.items():
            fits = (depth, bottleneck) == (layout.blocks, layout.bottleneck)
            if fits and (not bottleneck or columns in ((), (layout.group_width,))):
                return name
        raise CheckpointError(
            f"a backbone of {depth} {'bottlenecks' if bottleneck else 'basic blocks'} per stage; known are "
            + ", ".join(f"{name} {layout.blocks}" for name, layout in published.items())
        )

    def fill(self, model: PanopticFPN, weights: Mapping[str, Any]) -> None:
        """Puts a checkpoint's tensors into a network, replacing its own.

        Args:
            model: a network; it may be on the meta device, and lack a branch.
            weights: tensors or arrays by their names.

        Raises:
            CheckpointError: tensors are missing, unknown, or of another shape; the message lists them all.
        """
        own = model.state_dict()
        names, foreign = self._names(own)
        # A batch norm that is trained counts its batches; here it begins anew.
        counters = [names.pop(name) for name in list(names) if re.search(self.ignored, name)]
        absent = tuple(p for task in TASKS if task not in model.config.tasks for p in self.branches[task])
        unexpected = [
            name
            for name in weights
            if name not in names and not re.search(self.ignored, name) and not name.startswith(absent)
        ]
        problems = [
            f"missing: {name} {list(own[name].shape)}, of which {self.framework} has no like"
            for name in foreign
        ]
        problems += [
            f"missing: {theirs} {list(own[ours].shape)}"
            for theirs, ours in names.items()
            if theirs not in weights
        ]
        problems += [f"unexpected: {name} {list(np.shape(weights[name]))}" for name in unexpected]
        for theirs, ours in names.items():
            if theirs in weights and tuple(np.shape(weights[theirs])) != tuple(own[ours].shape):
                problems.append(
                    f"wrong shape: {theirs} is {list(np.shape(weights[theirs]))}, "
                    f"this network needs {list(own[ours].shape)}"
                )
        if problems:
            raise CheckpointError(
                f"{len(problems)} tensors do not fit a {model.config.backbone} network with "
                f"{model.config.num_things} thing and {model.config.num_stuff} stuff classes:\n  "
                + "\n  ".join(problems)
            )
        state = {ours: float32(weights[theirs], theirs) for theirs, ours in names.items()}
        model.load_state_dict({**state, **{name: torch.tensor(0) for name in counters}}, assign=True)

    def tensors(self, model: PanopticFPN) -> dict[str, Tensor]:
        """Returns a network's tensors by their names, in float32 on the CPU.

        Raises:
            ValueError: the framework has no such network.
        """
        own = model.state_dict()
        names, foreign = self._names(own)
        if model.config.semantic_fusion != "sum" and "semantic" in model.config.tasks:
            foreign = ["the levels' concatenation (semantic_fusion)", *foreign]
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise ValueError(
                f"this network is none of {self.framework}'s, which has no like of {', '.join(foreign[:3])}{more}"
            )
        return {
            theirs: float32(own[ours].cpu(), theirs)
            for theirs, ours in names.items()
            if not re.search(self.ignored, theirs)
        }

    def _names(self, own: Collection[str]) -> tuple[dict[str, str], list[str]]:
        """Our names by theirs, and those of ours that they have not."""
        names, foreign = {}, []
        for name in own:
            try:
                names[self.key(name)] = name
            except KeyError:
                foreign.append(name)
        return names, foreign


def _number(groups: re.Match[str], found: re.Match[str]) -> str:
    """Computes ``{1+1}``, found in a template, for what a name's pattern matched."""
    value, operand = int(groups[int(found[1])]), int(found[3])
    return str({"+": value + operand, "-": value - operand, "*": value * operand}[found[2]])


def float32(value: object, name: str) -> Tensor:
    """Returns a contiguous float32 copy, which nothing else holds.

    Raises:
        CheckpointError: it is no tensor of floating-point numbers.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float32, copy=True).contiguous()
    kind = getattr(value, "dtype", type(value).__name__)
    raise CheckpointError(f"{name}: expected a floating-point tensor, got {kind}")
