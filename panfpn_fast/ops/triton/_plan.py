"""Plans: the recorded steps of a host function, which later calls with the same key repeat.

A host function takes 30 to 90 us of host time: checks, sizes, grids, and Triton's own work per launch, which is to
specialize the arguments and to look up the compiled kernel. All of this depends only on shapes, strides, dtypes,
alignment and settings. So the first call for each of these records what the host function does: allocations, torch ops
and launches of compiled kernels. Later calls only repeat these steps on their own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.runtime.driver import driver

from panfpn_fast.ops.triton import _launch

_MAX_PLANS = 1024
"""Plans that an op keeps. A plan has a few kilobytes; images come in hundreds of sizes."""

_ALIGNMENT = 16
"""Bytes. Triton compiles other code for pointers that are not multiples of it."""

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


_STREAM = object()
"""Stands for the current stream in the arguments of a recorded launch."""


def _has_hooks() -> bool:
    """Whether a profiler has hooked into Triton's launches; only Triton itself calls the hooks."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class _Plan(NamedTuple):
    """The steps of a host function for one key.

    Attributes:
        on_stream: Whether the steps launch compiled kernels, which need the current stream.
        constants: Arguments that are the same in each call.
        steps: Functions, each with a selector of its arguments. It selects from one list: the stream, the arguments of
            the op, the constants, and the results of the earlier steps.
        result: Selector of the host function's result from that list.
    """

    on_stream: bool
    constants: tuple[Any, ...]
    steps: tuple[tuple[Callable[..., Any], Callable[[list[Any]], Any]], ...]
    result: Callable[[list[Any]], Any]

    def run(self, device: int, args: tuple[Any, ...]) -> Any:
        stream = driver.active.get_current_stream(device) if self.on_stream else None
        values = [stream, *args, *self.constants]
        for function, select in self.steps:
            values.append(function(*select(values)))
        return self.result(values)


class _Recorder(TorchDispatchMode):
    """Runs a host function's torch ops and launches and records them."""

    def __init__(self, args: Sequence[Any]) -> None:
        super().__init__()
        # The stream, the arguments and the results of the steps. These and the aliases stay alive, so ids are unique.
        self._values: list[Any] = [_STREAM, *args]
        self._aliases: list[Tensor] = []
        self._first_result = len(self._values)
        self._indices = {id(value): index for index, value in enumerate(self._values)}
        self._constants: list[Any] = []
        self._steps: list[tuple[Callable[..., Any], list[int]]] = []
        self._launching = False
        self._on_stream = False
        self._complete = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            self._launching
        ):  # ops of Triton's interpreter, which are part of the launch, or of a called function
            return result
        if func is torch.ops.aten.detach.default:  # torch.empty ends with it; the same tensor for a plan
            self._aliases.append(result)
            self._indices[id(result)] = self._index(args[0])
        elif func in _ALLOCATIONS:
            function = partial(
                torch.empty_strided, result.shape, result.stride(), dtype=result.dtype, device=result.device
            )
            self._record(function, (), result)
        else:
            nested = tree_leaves((kwargs, [arg for arg in args if not isinstance(arg, Tensor)]))
            self._complete &= not any(isinstance(leaf, Tensor) for leaf in nested)
            self._record(partial(func, **(kwargs or {})), args, result)
        return result

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """See `_launch.Recorder`."""
        self._launching = True
        try:
            compiled = kernel[grid](*args, **options)
        finally:
            self._launching = False
        if compiled is None:  # Triton's interpreter
            self._record(partial(kernel[grid], **options), args, None)
        else:
            # The call with which Triton ends its own launch, without its search for the compiled kernel.
            self._on_stream = True
            constants = [options[name] for name in kernel.arg_names[len(args) :]]
            no_hooks = (None, None, None)
            self._record(
                partial(compiled.run, *(*grid, 1, 1)[:3]),
                (_STREAM, compiled.function, compiled.packed_metadata, *no_hooks, *args, *constants),
                None,
            )

    def call(self, function: Callable[[], Tensor]) -> Tensor:
        """See `_launch.Recorder`."""
        self._launching = True
        try:
            result = function()
        finally:
            self._launching = False
        self._record(function, (), result)
        return result

    def _record(self, function: Callable[..., Any], args: Sequence[Any], result: Tensor | None) -> None:
        self._steps.append((function, [self._index(arg) for arg in args]))
        if result is not None:
            self._indices[id(result)] = len(self._values)
        self._values.append(result)

    def _index(self, value: Any) -> int:
        """Returns the index of the stream or a tensor in `_values`; for constants -1, -2, and so on."""
        if isinstance(value, Tensor) or value is _STREAM:
            if id(value) not in self._indices:
                # Made by an op that dispatch modes do not see, for example inside of another mode's implementation.
                self._complete = False
            return self._indices.get(id(value), 0)
        self._constants.append(value)
        return -len(self._constants)

    def plan(self, result: Tensor | tuple[Tensor, ...]) -> _Plan | None:
        """Returns the plan, given the result of the host function; None if a step could not be recorded."""
        constant_count = len(self._constants)

        def position(index: int) -> int:
            if index < 0:
                return self._first_result - 1 - index
            return index if index < self._first_result else index + constant_count

        def selector(indices: list[int]) -> Callable[[list[Any]], Any]:
            positions = [position(index) for index in indices]
            if len(positions) > 1:
                return itemgetter(*positions)
            return itemgetter(slice(positions[0], positions[0] + 1) if positions else slice(0))

        results = [self._index(value) for value in (result if isinstance(result, tuple) else (result,))]
        if not self._complete:
            return None
        return _Plan(
            self._on_stream,
            tuple(self._constants),
            tuple((function, selector(indices)) for function, indices in self._steps),
            itemgetter(*map(position, results)),
        )


class Planned:
    """An op's implementation by a host function: it runs on the device of its tensors, from the second call by a plan.

    Attributes:
        function: The host function. Its first argument is a tensor.
    """

    def __init__(self, function: Callable[..., Any], settings: Callable[..., Any] | None = None) -> None:
        """Wraps a host function.

        Args:
            function: The host function.
            settings: Returns, hashable, all global settings that the host function reads for its arguments.
        """
        self.function = function
        self._settings = settings
        self._plans: dict[Any, _Plan] = {}

    def __call__(self, *args: Any) -> Any:
        device = args[0].get_device()
        key: Any = [
            (arg.shape, arg.stride(), arg.dtype, arg.data_ptr() % _ALIGNMENT)
            if isinstance(arg, Tensor)
            else arg
            for arg in args
        ]
        key.append(device)
        if self._settings is not None:
            key.append(self._settings(*args))
        if (
            device < 0 or device == torch.cuda.current_device()
        ):  # tests run kernels on CPU tensors, on device -1
            return self._run(tuple(key), device, args)
        with torch.cuda.device(device):
            return self._run(tuple(key), device, args)

    def _run(self, key: tuple[Any, ...], device: int, args: tuple[Any, ...]) -> Any:
        plan = self._plans.get(key)
        if plan is None or _has_hooks():
            return self._record(key, args)
        return plan.run(device, args)

    def _record(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        # A tensor that is passed twice stands for two, which may differ in a later call.
        seen: set[int] = set()
        distinct = []
        for arg in args:
            distinct.append(arg.detach() if isinstance(arg, Tensor) and id(arg) in seen else arg)
            seen.add(id(arg))
        recorder = _Recorder(distinct)
        outer, _launch.recording.recorder = _launch.recording.recorder, recorder
        try:
            with recorder:
                result = self.function(*distinct)
        finally:
            _launch.recording.recorder = outer
        plan = recorder.plan(result)
        if plan is not None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return result
