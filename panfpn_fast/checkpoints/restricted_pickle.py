"""Reads pickles that hold NumPy arrays and plain containers, and nothing else.

`pickle.load` calls whatever a file names. Here a file can name only the globals in `_GLOBALS`, and each of them except
`OrderedDict` resolves to a stub that records its arguments. Arrays are built from the stubs after the whole file has
been read, once shape, dtype and size have been checked. No function of NumPy receives an unchecked value.
"""

from __future__ import annotations

import math
import pickle
import re
import reprlib
from collections import OrderedDict
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt


class RefusedGlobalError(pickle.UnpicklingError):
    """The file names a global outside the allow-list; the message is the global's full name."""


class _Stub:
    """Records the arguments and the state of an object in the pickle.

    `__setstate__` also keeps a BUILD instruction from setting attributes on the stub classes themselves.
    """

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


_CORE = ("numpy.core", "numpy._core")  # NumPy 1 and 2
_GLOBALS: dict[tuple[str, str], type] = {
    (module, name): type(name, (_Stub,), {})
    for module, name in [
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        *((f"{core}.multiarray", name) for core in _CORE for name in ("_reconstruct", "scalar")),
        *((f"{core}.numeric", "_frombuffer") for core in _CORE),
        ("_codecs", "encode"),  # protocols 0 to 2 write bytes as _codecs.encode(text, "latin1")
        ("builtins", "bytes"),
        ("__builtin__", "bytes"),
    ]
} | {("collections", "OrderedDict"): OrderedDict}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _GLOBALS:
            raise RefusedGlobalError(f"{module}.{name}")
        return _GLOBALS[module, name]


def load(file: BinaryIO) -> object:
    """Reads one pickle.

    Args:
        file: A pickle of any protocol. Strings that Python 2 wrote are decoded as Latin-1.

    Returns:
        The unpickled object, made of NumPy arrays (read-only) and scalars, dict, list, tuple, str, bytes and numbers.

    Raises:
        RefusedGlobalError: If the file names any other global. Nothing of the file has run.
        pickle.UnpicklingError: If the file is damaged or holds arrays of anything but numbers.
    """
    try:
        return _resolve(_Unpickler(file, encoding="latin1").load(), {})
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged or hostile file can raise any type
        raise pickle.UnpicklingError(f"damaged pickle ({type(error).__name__}: {error})") from error


def _resolve(value: Any, done: dict[int, Any]) -> Any:
    """Replaces stubs by the objects they stand for; `done` maps visited ids to results, so that cycles end."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, dict):
        mapping: dict[Any, Any] = {}
        done[id(value)] = mapping
        mapping.update((_resolve(key, done), _resolve(item, done)) for key, item in dict.items(value))
    elif isinstance(value, list):
        items: list[Any] = []
        done[id(value)] = items
        items.extend(_resolve(item, done) for item in value)
    elif isinstance(value, tuple):
        done[id(value)] = tuple(_resolve(item, done) for item in value)
    elif isinstance(value, _Stub):
        args, state = _resolve(value.args, done), _resolve(value.state, done)
        done[id(value)] = _build(type(value).__name__, args, state)
    else:
        return value
    return done[id(value)]


def _build(name: str, args: Any, state: Any) -> Any:
    """Builds an object from a call that NumPy or pickle itself writes; refuses every other call."""
    match name, args, state:
        case "dtype", (str(code), *_), None | (_, "<" | ">" | "|" | "=", None, None, None, *_) if (
            re.fullmatch("[fiub][0-9]+", code)
        ):
            return np.dtype(code).newbyteorder(state[1] if state else "=")
        case "_reconstruct", _, (_, shape, dtype, fortran, data):
            return _array(data, dtype, shape, "F" if fortran else "C")
        case "_frombuffer", (data, dtype, shape, "C" | "F" as order), None:
            return _array(data, dtype, shape, order)
        case "scalar", (dtype, data), None:
            return _array(data, dtype, (), "C")[()]
        case "encode", (str(text), "latin1"), None:
            return text.encode("latin1")
        case "bytes", (), None:
            return b""
    # reprlib bounds the text: a few bytes of pickle can nest lists that have 2 ** 60 paths.
    raise pickle.UnpicklingError(
        f"unsupported object {name}{reprlib.repr(args)} with state {reprlib.repr(state)}"
    )


def _array(data: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> npt.NDArray[Any]:
    if isinstance(data, str):  # Python 2 wrote bytes as a string
        data = data.encode("latin1")
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array whose elements are not plain numbers")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError(f"an array of shape {reprlib.repr(shape)}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise pickle.UnpicklingError(
            f"an array of shape {reprlib.repr(shape)} and dtype {dtype} in {len(data)} bytes"
        )
    return np.frombuffer(data, dtype).reshape(shape, order=order)
