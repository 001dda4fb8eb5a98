"""Reads a pickle that holds NumPy arrays and plain containers, and nothing else.

``pickle.load`` runs whatever a file asks for. Here a file may name only the few globals of :data:`_GLOBALS`,
and even those are stand-ins of our own: no function of NumPy sees a value that a stranger chose. An array is
rebuilt from its bytes after its shape, dtype and length have been checked.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_KINDS = "fiub"  # floating, signed, unsigned, bool: what weights and counters are made of


class RefusedGlobalError(pickle.UnpicklingError):
    """The file names a global that arrays and plain containers do not need."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the pickle asks for {name!r}; only NumPy arrays and plain containers are read")
        self.name = name


class _Sealed:
    """Base of the stand-ins: a pickle's BUILD instruction must not set attributes on them."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"a state for {type(self).__name__}")


class _Function(_Sealed):
    """A function that a pickle may call."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)


class _Type(_Sealed):
    """A class that a pickle may only mention."""

    __slots__ = ()


class _Mapping(dict[Any, Any]):
    """What an OrderedDict becomes; attributes that were attached to it (``_metadata``) are dropped."""

    def __setstate__(self, state: object) -> None:
        pass


class _DType:
    """A dtype: kind and size from the constructor, byte order from the state."""

    __slots__ = ("value",)

    def __init__(self, *args: object) -> None:
        code = args[0] if args else None
        if not isinstance(code, str) or code[:1] not in _KINDS or not code[1:].isdecimal():
            raise pickle.UnpicklingError(f"dtype {code!r}")
        self.value: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("a dtype with fields or a sub-array")
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"byte order {state[1]!r}")
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """An array, empty until its state arrives."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: npt.NDArray[Any] | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array without a state of version, shape, dtype, order and data")
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: object, dtype: object, shape: object, order: object) -> npt.NDArray[Any]:
    if isinstance(data, str):  # Python 2 wrote bytes as a string
        data = data.encode("latin1")
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array whose elements are no plain numbers")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError(f"an array of shape {shape!r}")
    if order not in ("C", "F"):
        raise pickle.UnpicklingError(f"an array in order {order!r}")
    if math.prod(shape) * dtype.value.itemsize != len(data):
        raise pickle.UnpicklingError(
            f"an array of shape {shape} and dtype {dtype.value} in {len(data)} bytes"
        )
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(kind: object, shape: object, typecode: object) -> _Array:
    return _Array()


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.value = _array(data, dtype, shape, order)
    return array


def _scalar(dtype: object, data: object) -> object:
    return _array(data, dtype, (), "C")[()]


def _dtype(*args: object) -> _DType:
    return _DType(*args)


def _mapping(*args: object) -> _Mapping:
    return _Mapping(*args)


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """How protocols 0 to 2 of Python 3 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


def _empty_bytes(*args: object) -> bytes:
    if args:
        raise pickle.UnpicklingError("bytes made from an argument")
    return b""


_GLOBALS: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _Type(),
    ("numpy", "dtype"): _Function(_dtype),
    ("collections", "OrderedDict"): _Function(_mapping),
    ("_codecs", "encode"): _Function(_encode),
    ("builtins", "bytes"): _Function(_empty_bytes),
    ("__builtin__", "bytes"): _Function(_empty_bytes),
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _GLOBALS[f"{_core}.multiarray", "_reconstruct"] = _Function(_reconstruct)
    _GLOBALS[f"{_core}.multiarray", "scalar"] = _Function(_scalar)
    _GLOBALS[f"{_core}.numeric", "_frombuffer"] = _Function(_frombuffer)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _GLOBALS[module_name, global_name]
        except KeyError:
            raise RefusedGlobalError(f"{module_name}.{global_name}") from None


def load(file: BinaryIO) -> object:
    """Reads one pickle.

    Args:
        file: a pickle of any protocol, also one that Python 2 wrote (strings are taken as Latin-1).

    Returns:
        What was pickled: NumPy arrays (read-only) and scalars, dict, list, tuple, str, bytes and numbers.

    Raises:
        RefusedGlobalError: the file names any other global; its ``name`` says which. Nothing of it has run.
        pickle.UnpicklingError: the file is damaged, or holds arrays of something else than numbers.
    """
    try:
        return _unwrap(_Unpickler(file, encoding="latin1").load(), {})
    except pickle.UnpicklingError:
        raise
    # A damaged or hostile file makes the unpickler fail in any way; which one does not matter to the caller.
    except Exception as error:
        raise pickle.UnpicklingError(f"damaged pickle ({type(error).__name__}: {error})") from error


def _unwrap(value: Any, done: dict[int, Any]) -> Any:
    """Replaces the stand-ins by arrays and dtypes. ``done`` keeps what was seen, so that cycles end."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array without data")
        return value.value
    if isinstance(value, _DType):
        return value.value
    if isinstance(value, dict):
        mapping: dict[Any, Any] = {}
        done[id(value)] = mapping
        mapping.update((key, _unwrap(item, done)) for key, item in dict.items(value))
        return mapping
    if isinstance(value, list):
        items: list[Any] = []
        done[id(value)] = items
        items.extend(_unwrap(item, done) for item in value)
        return items
    if isinstance(value, tuple):
        done[id(value)] = result = tuple(_unwrap(item, done) for item in value)
        return result
    return value
