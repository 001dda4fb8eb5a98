"""Registers the ops' fakes, gradients and Python implementations with the dispatcher.

csrc/library.cpp defines the schemas, and the C++ libraries register their implementations. The CUDA implementations of
the semantic head's ops are Triton host functions (`panfpn_fast.ops.triton`). They are registered here, also on machines
without a GPU or Triton, so that programs for CUDA can be traced and opened anywhere. The first call that needs the
kernels imports Triton.

If the CPU library did not load, there are no schemas, and the functions that register do nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from panfpn_fast import _load

_F = TypeVar("_F", bound=Callable[..., Any])

_library = torch.library.Library("panfpn_fast", "IMPL")
_triton_error: Exception | None = None


def register_fake(op: str) -> Callable[[_F], _F]:
    """Registers the decorated function as the fake of an op, see `torch.library.register_fake`."""
    if _load._cpu_error is not None:
        return lambda function: function
    return torch.library.register_fake(f"panfpn_fast::{op}")


def register_autograd(
    op: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """Registers the gradient of an op, see `torch.library.register_autograd`."""
    if _load._cpu_error is None:
        torch.library.register_autograd(f"panfpn_fast::{op}", backward, setup_context=setup_context)


def block_double_backward(op: str) -> None:
    """Makes backward through `<op>_backward` an error; torch itself would only warn and give no gradient."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"panfpn_fast.ops.{op} has no second derivative; detach its gradient")

    register_autograd(f"{op}_backward", backward)


def implement_in_triton(*ops: str, on_cpu: Callable[..., Any] | None = None) -> None:
    """Makes the Triton host functions of these names the CUDA implementations of the ops.

    torch.compile traces the host functions and sees their kernels. torch.export keeps the ops.

    Args:
        ops: Names of ops.
        on_cpu: The CPU implementation, a function that calls other ops, for an op without one in C++. torch.compile
            traces it too.
    """
    if _load._cpu_error is not None:
        return
    for op in ops:
        _library.impl(op, _triton_stub(op), "CUDA")
        if on_cpu is not None:
            _library.impl(op, on_cpu, "CPU")
        _make_traceable(op, on_cpu)


def triton_implementation(op: str) -> Any:
    """Returns the Triton implementation of an op, and imports Triton and all kernels first if necessary.

    Raises:
        ImportError: If the import fails, now or earlier. The message has the first error and a remedy.
    """
    global _triton_error
    if _triton_error is None:
        try:
            return importlib.import_module("panfpn_fast.ops.triton").IMPLEMENTATIONS[op]
        except Exception as error:  # a broken Triton raises errors of all kinds
            _triton_error = error
    raise ImportError(
        f"panfpn_fast: the Triton kernels that run {op} on CUDA cannot be imported: {_triton_error!r}\n"
        "PyTorch's CUDA builds for Linux install the Triton version that fits. Reinstall torch, or: pip install triton"
    ) from _triton_error


def _triton_stub(op: str) -> Callable[..., Any]:
    """Returns a function that imports the Triton implementation of an op at its first call, and then calls it."""
    implementation: Any = None

    def call(*args: Any) -> Any:
        nonlocal implementation
        if implementation is None:
            implementation = triton_implementation(op)
        return implementation(*args)

    return call


def _kernels() -> list[Any]:
    """Returns all Triton kernels; none without Triton, or if Triton interprets them, which torch cannot trace."""
    try:
        triton_implementation("upsample_argmax")
    except ImportError:
        return []
    return list(importlib.import_module("panfpn_fast.ops.triton").KERNELS)


class _Kernels:
    """Iterates over all Triton kernels, which are imported by then."""

    def __iter__(self) -> Iterator[Any]:
        return iter(_kernels())


def _make_traceable(op: str, on_cpu: Callable[..., Any] | None) -> None:
    """Lets AOTAutograd, and so torch.compile, trace through the Python implementations of an op.

    This does what `torch.library.triton_op` does, which only takes ops that it defines itself, and uses the same
    private names of torch. If a later torch has not got them, torch.compile treats the op like any op in C++.
    """
    try:
        from torch._functorch import config
        from torch._library.triton import triton_ops_to_kernels
        from torch._subclasses.functional_tensor import FunctionalTensorMode

        config.decompose_custom_triton_ops  # noqa: B018
    except (ImportError, AttributeError):
        return

    def trace(mode: Any, overload: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = None
        if config.decompose_custom_triton_ops:  # torch.export turns this off; an archive cannot hold kernels
            if args[0].device.type == "cpu":
                function = on_cpu
            elif args[0].device.type == "cuda" and _kernels():
                function = triton_implementation(op).function
        if function is None:
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        with mode:
            return function(*args, **kwargs)

    torch.library.register_torch_dispatch(f"panfpn_fast::{op}", FunctionalTensorMode, trace)
    # The caches of torch.compile depend on the source of the kernels that an op launches.
    triton_ops_to_kernels[f"panfpn_fast::{op}"] = _Kernels()  # type: ignore[assignment]
