"""Puts our ops in the place of a framework's functions, and takes them out again.

Which functions, and by what they are replaced, each framework's own module says: `integrations/torchvision.py` and its
neighbours have a `FRAMEWORK` each. docs/patching.md tells users what is patched and what is not.
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

_HOMES = {
    "torchvision": "panfpn_fast.integrations.torchvision",
    "detectron2": "panfpn_fast.integrations.detectron2",
    "mmdetection": "panfpn_fast.integrations.mmdetection",
}


@dataclass(frozen=True)
class Replacement:
    """One function of a framework's, and what takes its place.

    Attributes:
        target: Module, colon, dotted path: "torchvision.ops.boxes:nms" or "package.module:Class.method".
        op: The op of ours that serves it, for example "nms".
        make: Takes the original and returns a new function that replaces it, which falls back to the original for
            calls that our op cannot serve.
    """

    target: str
    op: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Framework:
    """What is patched in a framework.

    Attributes:
        package: What is imported.
        distribution: What pip installs.
        tested: The oldest and the newest version that it was tested with; "0.29" stands for every 0.29.x.
        replacements: All of them, in the order in which they are put in place.
    """

    package: str
    distribution: str
    tested: tuple[str, str]
    replacements: Sequence[Replacement]


@dataclass(frozen=True)
class _Site:
    """A replacement that is in place.

    Attributes:
        owner: Module or class that has the function.
        name: Of the attribute.
        before: What the attribute was; a staticmethod object, for example, and not the function in it.
        after: What it is now.
        inherited: Whether the attribute was a base class's, so that putting it back means to delete it.
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


# Around every look at, and change of, what is patched.
_LOCK = threading.RLock()
_ACTIVE: dict[str, _Active] = {}


class Patch:
    """What `patch` returns: says what is patched, and as a context manager takes it back at its end.

    At the end of a `with` block the framework is as it was before: if it had been patched already, it stays patched.
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
    """Makes an installed framework use our ops, for the calls that they can serve; others go on as before.

    Every module of the framework that holds one of the replaced functions gets the replacement. Names that other
    modules have taken by `from torchvision.ops import nms` before are not touched. Patching twice is patching once.

    Args:
        name: "torchvision", "detectron2" or "mmdetection".

    Returns:
        A handle that prints what was patched. `with panfpn_fast.patch("torchvision"):` patches for a block only.

    Raises:
        TypeError: `name` is not a string.
        ValueError: `name` is none of these.
        ImportError: The framework is not installed, or our native ops did not load.

    Note:
        Warns where the framework's version is not one that this was tested with, and where a function is not there;
        the others are patched nevertheless. If anything goes wrong, nothing stays patched. Of one process; new ones
        that do not inherit its memory patch for themselves.

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
    """Puts a framework's own functions back; does nothing if it is not patched.

    Every module that holds a replacement gets the original, those too that were imported meanwhile. Where something
    else has taken a replacement's place, that stays, with a warning.

    Args:
        name: "torchvision", "detectron2" or "mmdetection".

    Raises:
        TypeError: `name` is not a string.
        ValueError: `name` is none of these.

    Example:
        >>> import panfpn_fast
        >>> panfpn_fast.unpatch("torchvision")
    """
    _check_name(name)
    with _LOCK:
        active = _ACTIVE.pop(name, None)
        if active is None:
            return
        lost = [site.replacement.target for site in active.sites if not _is_in_place(site)]
        _remove(active.sites)
    if lost:
        warnings.warn(
            f"panfpn_fast.unpatch({name!r}): something else has replaced {', '.join(lost)} meanwhile; "
            "it was left alone",
            stacklevel=2,
        )


def patched() -> dict[str, dict[str, str]]:
    """What is patched now: for each framework its functions, and the op of ours that serves each.

    Returns:
        {"torchvision": {"torchvision.ops.boxes:nms": "nms", ...}}; frameworks that are not patched are not in it.

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
    """Whether our ops are for these values: plain dense tensors, all on one device that has native ops.

    Not so while torch.jit traces or torch.export exports, since what comes of it shall not need this library, and for
    subclasses of Tensor and stand-ins, which have rules of their own. Shapes and dtypes are for the caller to judge.
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
    takes = ", ".join(f'"{known}"' for known in _HOMES)
    if not isinstance(name, str):
        raise TypeError(f"name: expected one of {takes}, got {type(name).__name__}")
    if name not in _HOMES:
        raise ValueError(f"name: expected one of {takes}, got {name!r}")


def _install(name: str) -> bool:
    """Patches a framework; False if it is patched already."""
    _check_name(name)
    with _LOCK:
        if name in _ACTIVE:
            return False
        _load.native(torch.device("cpu"))  # raises where there is nothing to patch with
        framework: Framework = importlib.import_module(_HOMES[name]).FRAMEWORK
        version = _import_framework(name, framework)
        sites, missing = _prepare(framework)
        _put_in_place(sites, framework)
        _ACTIVE[name] = _Active(version, sites)
    problems = []
    if not _is_tested(version, framework.tested):
        problems.append("it was not tested with this version")
    if missing:
        problems.append(f"these are not there, and were left out: {', '.join(missing)}")
    if problems:
        warnings.warn(
            f"panfpn_fast.patch({name!r}): found {framework.distribution} {version}, tested are "
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
    """Makes the replacements without putting them in place; returns the targets that are not there as well."""
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
    """The replacement for an attribute, dressed as what it replaces."""
    if isinstance(before, (staticmethod, classmethod)):
        return type(before)(_make(replacement, before.__func__))
    after = replacement.make(before)
    if after is not before and isinstance(after, FunctionType) and isinstance(before, FunctionType):
        # Not its __dict__, whose marks tell torch to compile another function than the one at hand.
        functools.update_wrapper(after, before, updated=())
        # torch.jit.script asks for this and compiles the original: TorchScript could not compile the replacement.
        vars(after)["__prepare_scriptable__"] = lambda: before
    return after


def _put_in_place(sites: Sequence[_Site], framework: Framework) -> None:
    # A target may be in a companion of the framework's, as mmcv is of mmdetection's.
    packages = {framework.package, *(site.replacement.target.split(".")[0] for site in sites)}
    try:
        for site in sites:
            setattr(site.owner, site.name, site.after)
            for module, name in list(_places(site.before, packages)):
                setattr(module, name, site.after)
    except BaseException:
        _remove(sites)
        raise


def _is_in_place(site: _Site) -> bool:
    return vars(site.owner).get(site.name) is site.after


def _remove(sites: Sequence[_Site]) -> None:
    for site in reversed(sites):
        if _is_in_place(site):
            if site.inherited:
                delattr(site.owner, site.name)
            else:
                setattr(site.owner, site.name, site.before)
        for module, name in list(_places(site.after)):
            setattr(module, name, site.before)


def _places(value: Any, packages: set[str] | None = None) -> Iterator[tuple[ModuleType, str]]:
    """Modules, of these packages or all, and the names under which each holds a value itself."""
    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType):
            continue
        if packages is None or module_name.split(".")[0] in packages:
            for name, held in list(vars(module).items()):
                if held is value:
                    yield module, name
