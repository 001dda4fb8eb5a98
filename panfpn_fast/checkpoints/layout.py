"""Maps the tensor names of detectron2 and mmdetection to ours, and derives settings from the shapes of tensors."""

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
from panfpn_fast.models.config import BACKBONES, CITYSCAPES, TASKS
from panfpn_fast.models.panoptic_fpn import PanopticFPN

_NUMBER = re.compile(r"\{(\d)([-+*])(\d)\}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A framework's names for the tensors of a Panoptic FPN.

    Attributes:
        framework: Name of the framework.
        rules: Pairs of a pattern for our names and a template for the framework's name. `{1+1}` in a template is the
            number in the first group plus 1.
        block: Pattern for the beginning of the framework's names in the backbone; its groups are the numbers of the
            stage and the block.
        first_stage: The framework's number of the stage that outputs C2.
        branches: Prefixes of the framework's names in each branch.
        ignored: Pattern for the framework's names of tensors that are not weights.
    """

    framework: str
    rules: tuple[tuple[str, str], ...]
    block: str
    first_stage: int
    branches: Mapping[str, tuple[str, ...]]
    ignored: str

    def key(self, name: str) -> str:
        """Converts our name of a tensor to the framework's name.

        Args:
            name: A key of `PanopticFPN.state_dict()`, for example `"fpn.lateral.p2.weight"`.

        Returns:
            The framework's name of the tensor.

        Raises:
            KeyError: If the framework's network has no such tensor.
        """
        for pattern, template in self.rules:
            match = re.fullmatch(pattern, name)
            if match:
                return match.expand(_NUMBER.sub(partial(_number, match), template))
        raise KeyError(name)

    def settings(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Derives the settings of a network from the names and shapes of its tensors.

        Args:
            weights: Tensors or arrays by the framework's names.

        Returns:
            The fields of `PanopticFPNConfig` that names and shapes determine.

        Raises:
            CheckpointError: If the depth of the backbone is not that of a known ResNet.
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
            # With one class, class-agnostic and class-specific heads have equal shapes.
            if self.key(name) in weights and found.get("num_things", 1) > 1:
                found[field] = np.shape(weights[self.key(name)])[:1] == (rows,)
        if (found.get("num_things"), found.get("num_stuff")) == (8, 11):
            found |= CITYSCAPES
        return found

    def _tasks(self, weights: Collection[str]) -> tuple[str, ...]:
        """Returns the branches that have tensors. Without any, returns both, and `fill` reports the missing tensors."""
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
        # Axis 1 of a convolution's weight is the number of input channels per group.
        columns = np.shape(weights.get(self.key("backbone.layer1.0.conv2.weight"), ()))[1:2]
        for name, layout in published.items():
            fits = (depth, bottleneck) == (layout.blocks, layout.bottleneck)
            if fits and (not bottleneck or columns in ((), (layout.group_width,))):
                return name
        raise CheckpointError(
            f"unknown backbone with {depth} {'bottlenecks' if bottleneck else 'basic blocks'} per stage; the known "
            "backbones are " + ", ".join(f"{name} {layout.blocks}" for name, layout in published.items())
        )

    def fill(self, model: PanopticFPN, weights: Mapping[str, Any]) -> None:
        """Replaces the tensors of a network by those of a checkpoint.

        Args:
            model: The network. It may be on the meta device and may have only one branch.
            weights: Tensors or arrays by the framework's names.

        Raises:
            CheckpointError: If tensors are missing, unexpected or of another shape; the message lists all of them.
        """
        state = model.state_dict()
        names, unmatched = self._names(state)
        # Trained batch norms have a counter of batches, which starts at 0.
        counters = [names.pop(name) for name in list(names) if re.search(self.ignored, name)]
        absent = tuple(p for task in TASKS if task not in model.config.tasks for p in self.branches[task])
        unexpected = [
            name
            for name in weights
            if name not in names and not re.search(self.ignored, name) and not name.startswith(absent)
        ]
        problems = [
            f"missing: {name} {list(state[name].shape)} has no counterpart in {self.framework}"
            for name in unmatched
        ]
        problems += [
            f"missing: {theirs} {list(state[ours].shape)}"
            for theirs, ours in names.items()
            if theirs not in weights
        ]
        problems += [f"unexpected: {name} {list(np.shape(weights[name]))}" for name in unexpected]
        for theirs, ours in names.items():
            if theirs in weights and tuple(np.shape(weights[theirs])) != tuple(state[ours].shape):
                problems.append(
                    f"wrong shape: {theirs} is {list(np.shape(weights[theirs]))}, "
                    f"this network needs {list(state[ours].shape)}"
                )
        if problems:
            raise CheckpointError(
                f"{len(problems)} tensors do not fit a {model.config.backbone} network with "
                f"{model.config.num_things} thing and {model.config.num_stuff} stuff classes:\n  "
                + "\n  ".join(problems)
            )
        filled = {ours: float32(weights[theirs], theirs) for theirs, ours in names.items()}
        model.load_state_dict(
            {**filled, **{name: torch.tensor(0, device="cpu") for name in counters}}, assign=True
        )

    def tensors(self, model: PanopticFPN) -> dict[str, Tensor]:
        """Returns the tensors of a network by the framework's names, in float32 on the CPU.

        Raises:
            ValueError: If a part of the network has no counterpart in the framework.
        """
        state = model.state_dict()
        names, unmatched = self._names(state)
        if model.config.semantic_fusion != "sum" and "semantic" in model.config.tasks:
            unmatched = [f"semantic_fusion={model.config.semantic_fusion!r}", *unmatched]
        if unmatched:
            more = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
            raise ValueError(
                f"the {self.framework} layout cannot hold this network, because {self.framework} has no counterpart of "
                f"{', '.join(unmatched[:3])}{more}; save it in the native layout"
            )
        return {
            theirs: float32(state[ours].cpu(), theirs)
            for theirs, ours in names.items()
            if not re.search(self.ignored, theirs)
        }

    def _names(self, state: Collection[str]) -> tuple[dict[str, str], list[str]]:
        """Returns our names by the framework's names, and the list of our names that have no counterpart."""
        names, unmatched = {}, []
        for name in state:
            try:
                names[self.key(name)] = name
            except KeyError:
                unmatched.append(name)
        return names, unmatched


def _number(groups: re.Match[str], found: re.Match[str]) -> str:
    """Returns the value of an expression such as `{1+1}` in a template, given the groups of the matched name."""
    value, operand = int(groups[int(found[1])]), int(found[3])
    return str({"+": value + operand, "-": value - operand, "*": value * operand}[found[2]])


def float32(value: object, name: str) -> Tensor:
    """Returns a contiguous float32 copy.

    Raises:
        CheckpointError: If `value` is not a floating-point tensor or array.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float32, copy=True).contiguous()
    kind = getattr(value, "dtype", type(value).__name__)
    raise CheckpointError(f"{name}: expected a floating-point tensor, got {kind}")
