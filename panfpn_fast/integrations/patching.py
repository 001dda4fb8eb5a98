"""Replaces functions of a framework by panfpn_fast ops, and restores them.

Each framework has a module, such as `integrations/torchvision.py`, whose `FRAMEWORK` lists the functions and their
replacements. docs/patching.md documents for users which functions are patched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load

_MODULES = {
    "torchvision": "panfpn_fast.integrations.torchvision",
    "detectron2": "panfpn_fast.integrations.detectron2",
    "mmdetection": "panfpn_fast.integrations.mmdetection",
}


@dataclass(frozen=True)
class Replacement:
    """A function of a framework and its replacement.

    Attributes:
        target: Module and dotted path, separated by a colon: "torchvision.ops.boxes:nms" or
            "package.module:Class.method".
        op: Name of the panfpn_fast op that the replacement uses, for example "nms".
        make: Takes the original function and returns a new function that replaces it. The new function calls the
            original where the op does not support a call.
    """

    target: str
    op: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Framework:
    """A framework and the functions that are patched in it.

    Attributes:
        package: Name of the Python package to import.
        distribution: Name of the distribution that pip installs.
        tested: The oldest and the newest tested version; "0.29" covers every 0.29.x.
        replacements: All replacements, in the order in which they are installed.
    """

    package: str
    distribution: str
    tested: tuple[str, str]
    replacements: Sequence[Replacement]


@dataclass(frozen=True)
class _Site:
    """An attribute of a module or class that a replacement is installed in.

    Attributes:
        replacement: The replacement.
        owner: Module or class that has the attribute.
        name: Name of the attribute.
        before: The original value, as stored: a staticmethod object, for example, not the function inside it.
        after: The value that replaces it.
        inherited: Whether the original value comes from a base class. The attribute is then deleted to restore it.
    """

    replacement: Replacement
    owner: Any
    name: str
    before: Any
    after: Any
    inherited: bool


@dataclass(frozen=True)
class _Active:
    version: str
    sites: Sequence[_Site]


# Guards every read and every change of `_ACTIVE` and of the patched attributes.
_LOCK = threading.RLock()
_ACTIVE: dict[str, _Active] = {}


class Patch:
    """Handle that `patch` returns: prints the patched functions and, as a context manager, restores them at its end.

    A `with` block leaves the framework in the state in which it found it. A framework that was patched before the
    block stays patched.
    """

    def __init__(self, name: str, installed: bool) -> None:
        self.name = name
        self._installed = installed

    def __enter__(self) -> Patch:
        self._installed = _install(self.name) or self._installed
        return self

    def __exit__(self, *error: object) -> None:
        if self._installed:
            self._installed = False
            unpatch(self.name)

    def __repr__(self) -> str:
        return f"<panfpn_fast.patch({self.name!r}), functions patched: {len(patched().get(self.name, ()))}>"

    def __str__(self) -> str:
        with _LOCK:
            if self.name not in _ACTIVE:
                return f"{self.name} is not patched"
            active = _ACTIVE[self.name]
            lines = [f"{site.replacement.target} uses ops.{site.replacement.op}" for site in active.sites]
        return "\n".join([f"{self.name} {active.version}, patched:", *lines])


def patch(name: str) -> Patch:
    """Makes an installed framework use panfpn_fast ops for the calls that the ops support.

    All other calls go to the framework's own functions. Every module of the framework that holds one of the replaced
    functions gets the replacement. Names that other modules imported earlier, as in `from torchvision.ops import nms`,
    still refer to the original functions. Patching a patched framework has no effect.

    Args:
        name: "torchvision", "detectron2" or "mmdetection".

    Returns:
        A handle that prints the patched functions. `with panfpn_fast.patch("torchvision"):` patches for a block only.

    Raises:
        TypeError: If `name` is not a string.
        ValueError: If `name` is not one of the three frameworks.
        ImportError: If the framework is not installed, or the native ops did not load.

    Note:
        Warns if the framework's version was not tested, and if it lacks a function that should be patched; the
        remaining functions are patched. If an error occurs, nothing stays patched. The patch applies to the current
        process and to processes forked from it; a spawned process must call `patch` again.

    Example:
        >>> import panfpn_fast
        >>> with panfpn_fast.patch("torchvision") as patch:  # doctest: +SKIP
        ...     print(patch)
        torchvision 0.29.2, patched:
        torchvision.ops.boxes:nms uses ops.nms
        ...
    """
    return Patch(name, _install(name))


def unpatch(name: str) -> None:
    """Restores a framework's own functions; does nothing if the framework is not patched.

    Every module that holds a replacement gets the original back, including modules imported after `patch`. A function
    that other code has replaced since then is left unchanged, with a warning.

    Args:
        name: "torchvision", "detectron2" or "mmdetection".

    Raises:
        TypeError: If `name` is not a string.
        ValueError: If `name` is not one of the three frameworks.

    Example:
        >>> import panfpn_fast
        >>> panfpn_fast.unpatch("torchvision")
    """
    _check_name(name)
    with _LOCK:
        active = _ACTIVE.pop(name, None)
        if active is None:
            return
        lost = [site.replacement.target for site in active.sites if not _is_installed(site)]
        _remove(active.sites)
    if lost:
        warnings.warn(
            f"panfpn_fast.unpatch({name!r}): other code has replaced {', '.join(lost)} since patch; that replacement "
            "was left in place. To avoid this, undo the other replacement before unpatch",
            stacklevel=2,
        )


def patched() -> dict[str, dict[str, str]]:
    """Returns the functions that are patched now, with the op that each of them uses, by framework.

    Returns:
        {"torchvision": {"torchvision.ops.boxes:nms": "nms", ...}}. Frameworks that are not patched are left out.

    Example:
        >>> import panfpn_fast
        >>> panfpn_fast.patched()
        {}
    """
    with _LOCK:
        return {
            name: {site.replacement.target: site.replacement.op for site in active.sites}
            for name, active in _ACTIVE.items()
        }


def _native(kind: str) -> bool:
    try:
        return _load.native(torch.device(kind))
    except ImportError:
        return False


_DEVICES = tuple(kind for kind in ("cpu", "cuda") if _native(kind))


def servable(*tensors: Any) -> bool:
    """Whether ops of this library may serve a call: all values are plain dense tensors on one device with native ops.

    False while torch.jit traces or torch.export exports, because traced and exported programs must run without this
    library. False for subclasses of Tensor and tensor-like objects, because they may override behaviour. The caller
    checks shapes and dtypes.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined]
        return False
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return False
        if tensor.is_quantized or tensor.device != tensors[0].device:
            return False
    return len(tensors) > 0 and tensors[0].device.type in _DEVICES


def _check_name(name: str) -> None:
    takes = ", ".join(f'"{known}"' for known in _MODULES)
    if not isinstance(name, str):
        raise TypeError(f"name: expected one of {takes}, got {type(name).__name__}")
    if name not in _MODULES:
        raise ValueError(f"name: expected one of {takes}, got {name!r}")


def _install(name: str) -> bool:
    """Patches a framework; returns False if it was patched already."""
    _check_name(name)
    with _LOCK:
        if name in _ACTIVE:
            return False
        _load.native(torch.device("cpu"))  # raises if the native ops did not load
        framework: Framework = importlib.import_module(_MODULES[name]).FRAMEWORK
        version = _import_framework(name, framework)
        sites, missing = _prepare(framework)
        _install_sites(sites, framework)
        _ACTIVE[name] = _Active(version, sites)
    problems = []
    if missing:
        problems.append(f"not found and not patched: {', '.join(missing)}")
    if not _is_tested(version, framework.tested):
        problems.append("compare results with and without the patch, or install a tested version")
    if problems:
        warnings.warn(
            f"panfpn_fast.patch({name!r}): found {framework.distribution} {version}, tested with "
            f"{framework.tested[0]} to {framework.tested[1]}; {'; '.join(problems)}",
            stacklevel=3,
        )
    return True


def _import_framework(name: str, framework: Framework) -> str:
    """Imports a framework and returns its version."""
    if framework.package not in sys.modules and importlib.util.find_spec(framework.package) is None:
        raise ImportError(
            f"panfpn_fast.patch({name!r}): {framework.package} is not installed: "
            f"pip install {framework.distribution}"
        )
    package = importlib.import_module(framework.package)
    try:
        return importlib.metadata.version(framework.distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(package, "__version__", "of unknown version"))


def _is_tested(version: str, tested: tuple[str, str]) -> bool:
    def release(text: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", text)[0])))

    found, oldest, newest = release(version), release(tested[0]), release(tested[1])
    return oldest <= found and found[: len(newest)] <= newest


def _prepare(framework: Framework) -> tuple[list[_Site], list[str]]:
    """Makes the replacements without installing them; returns them and the targets that were not found."""
    sites, missing = [], []
    for replacement in framework.replacements:
        module_name, _, path = replacement.target.partition(":")
        *owners, attribute = path.split(".")
        try:
            owner: Any = functools.reduce(getattr, owners, importlib.import_module(module_name))
            before = inspect.getattr_static(owner, attribute)
        except (ImportError, AttributeError):
            missing.append(replacement.target)
            continue
        sites.append(
            _Site(
                replacement,
                owner,
                attribute,
                before,
                _make(replacement, before),
                inherited=attribute not in vars(owner),
            )
        )
    return sites, missing


def _make(replacement: Replacement, before: Any) -> Any:
    """Makes the replacement for an attribute, with the name, signature and kind of the original."""
    if isinstance(before, (staticmethod, classmethod)):
        return type(before)(_make(replacement, before.__func__))
    after = replacement.make(before)
    if after is not before and isinstance(after, FunctionType) and isinstance(before, FunctionType):
        # Attributes in the original's __dict__ are not copied: some make torch compile a different function.
        functools.update_wrapper(after, before, updated=())
        # TorchScript cannot compile the replacement. With this hook, torch.jit.script compiles the original.
        vars(after)["__prepare_scriptable__"] = lambda: before
    return after


def _install_sites(sites: Sequence[_Site], framework: Framework) -> None:
    # A target may be in another package that the framework uses: mmdetection's ops are in mmcv.
    packages = {framework.package, *(site.replacement.target.split(".")[0] for site in sites)}
    try:
        for site in sites:
            setattr(site.owner, site.name, site.after)
            for module, name in list(_references(site.before, packages)):
                setattr(module, name, site.after)
    except BaseException:
        _remove(sites)
        raise


def _is_installed(site: _Site) -> bool:
    return vars(site.owner).get(site.name) is site.after


def _remove(sites: Sequence[_Site]) -> None:
    for site in reversed(sites):
        if _is_installed(site):
            if site.inherited:
                delattr(site.owner, site.name)
            else:
                setattr(site.owner, site.name, site.before)
        for module, name in list(_references(site.after)):
            setattr(module, name, site.before)


def _references(value: Any, packages: set[str] | None = None) -> Iterator[tuple[ModuleType, str]]:
    """Yields every module of these packages, or of all, that has `value` as an attribute, with the attribute's name."""
    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType):
            continue
        if packages is None or module_name.split(".")[0] in packages:
            for name, held in list(vars(module).items()):
                if held is value:
                    yield module, name
