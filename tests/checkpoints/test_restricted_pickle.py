"""The restricted unpickler reads arrays of every origin and runs nothing."""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from panfpn_fast.checkpoints import CheckpointError, load, restricted_pickle
from support.checkpoint_samples import save_pickle


def _read(data: bytes) -> Any:
    return restricted_pickle.load(BytesIO(data))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_come_through(protocol: int) -> None:
    arrays = {
        "c order": np.arange(12, dtype=np.float32).reshape(3, 4),
        "fortran order": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
        "strided": np.arange(24, dtype=np.float16)[::2],
        "big endian": np.arange(3, dtype=">i4"),
        "no dimension": np.array(2.5, np.float32),
        "empty": np.empty((0, 5), np.float32),
        "bool": np.array([True, False]),
        "bytes": np.arange(256, dtype=np.uint8),
        "scalar": np.float32(1.5),
    }
    plain = {
        "list": [1, 2.5, None, "text"],
        "tuple": (1, (2,)),
        "bytes": b"\x00\xff",
        "none": b"",
    }
    content = {"model": OrderedDict(arrays), "plain": plain, "dtype": np.dtype("<f4"), "big": 1 << 70}
    got = _read(pickle.dumps(content, protocol))
    assert got.keys() == content.keys()
    assert got["plain"] == plain
    assert got["dtype"] == np.float32
    assert got["big"] == 1 << 70
    assert list(got["model"]) == list(arrays)
    for name, array in arrays.items():
        assert got["model"][name].dtype == array.dtype, name
        np.testing.assert_array_equal(got["model"][name], array, strict=True, err_msg=name)


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_both_names_of_the_numpy_core(package: str) -> None:
    array = np.arange(3, dtype=np.float32)
    data = pickle.dumps([array, np.float64(2)], protocol=2)
    for known in (b"numpy._core", b"numpy.core"):
        data = data.replace(b"c" + known + b".multiarray", b"c" + package.encode() + b".multiarray")
    got = _read(data)
    np.testing.assert_array_equal(got[0], array)
    assert got[1] == 2


def test_a_pickle_that_python_2_wrote() -> None:
    # {"w": np.array([1, 2], np.float32)} as written by Python 2.7 and NumPy 1.16 with protocol 2.
    data = (
        b"\x80\x02}q\x01U\x01wq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05"
        b"U\x01bq\x06\x87q\x07Rq\x08(K\x01K\x02\x85q\tcnumpy\ndtype\nq\nU\x02f4q\x0bK\x00K\x01\x87q\x0cRq\r(K\x03"
        b"U\x01<q\x0eNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0fb\x89U\x08\x00\x00\x80?\x00\x00\x00@q\x10"
        b"tq\x11bs."
    )
    np.testing.assert_array_equal(_read(data)["w"], np.array([1, 2], np.float32), strict=True)


def test_shared_and_cyclic_containers() -> None:
    array = np.ones(2)
    cycle: list[Any] = [array, array]
    cycle.append(cycle)
    got = _read(pickle.dumps(cycle))
    assert got[2] is got
    assert got[0] is got[1]
    # One array is reachable by 2 ** 60 paths; each container must be visited only once.
    nested: Any = [array]
    for _ in range(60):
        nested = [nested, nested]
    _read(pickle.dumps(nested))


def test_attributes_of_an_ordered_dict_are_dropped() -> None:
    state = torch.nn.Linear(1, 1).state_dict()
    content = OrderedDict((name, value.numpy()) for name, value in state.items())
    content._metadata = state._metadata  # type: ignore[attr-defined]
    assert list(_read(pickle.dumps(content))) == ["weight", "bias"]


class _Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function = function
        self.args = args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


def _named(module: str, name: str, *args: str) -> bytes:
    """Returns a protocol 4 pickle that calls `module.name` (the name may have dots) with strings."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + b"".join(map(text, args)) + b"tR."


# Each entry has a function that makes the pickle, and the name that the error must contain. The function takes the
# path of a file that the pickle would create if it ran.
ATTACKS: list[tuple[Callable[[str], bytes], str]] = [
    (lambda p: b"cos\nsystem\n(S'touch " + p.encode() + b"'\ntR.", "os.system"),
    (lambda p: b"(S'touch " + p.encode() + b"'\nios\nsystem\n.", "os.system"),
    (lambda p: b"\x80\x02c__builtin__\neval\n(X\x01\x00\x00\x001tR.", "__builtin__.eval"),
    (lambda p: _named("os", "system", f"touch {p}"), "os.system"),
    (lambda p: _named("posix", "system", f"touch {p}"), "posix.system"),
    (lambda p: _named("builtins", "eval", f"open({p!r}, 'w')"), "builtins.eval"),
    (lambda p: _named("builtins", "exec", f"open({p!r}, 'w')"), "builtins.exec"),
    (lambda p: _named("builtins", "open", p, "w"), "builtins.open"),
    (lambda p: _named("builtins", "__import__", "os"), "builtins.__import__"),
    (lambda p: _named("subprocess", "Popen", f"touch {p}"), "subprocess.Popen"),
    (lambda p: _named("builtins", "getattr", "", "join"), "builtins.getattr"),
    (lambda p: _named("operator", "attrgetter", "system"), "operator.attrgetter"),
    (lambda p: _named("functools", "partial", ""), "functools.partial"),
    # An allowed module does not allow its other names, and an allowed name does not allow its attributes.
    (lambda p: _named("numpy", "load", p), "numpy.load"),
    (lambda p: _named("numpy", "ndarray.tofile", p), "numpy.ndarray.tofile"),
    (lambda p: _named("numpy", "ndarray.__class__"), "numpy.ndarray.__class__"),
    (lambda p: _named("numpy.core.multiarray", "_reconstruct.__globals__"), "_reconstruct.__globals__"),
    (lambda p: _named("numpy.f2py", "os.system", f"touch {p}"), "numpy.f2py.os.system"),
    (lambda p: _named("collections", "namedtuple", "a", "b"), "collections.namedtuple"),
    (lambda p: _named("collections.abc", "OrderedDict"), "collections.abc.OrderedDict"),
    (lambda p: _named("panfpn_fast.checkpoints.restricted_pickle", "_GLOBALS"), "_GLOBALS"),
    (lambda p: _named("pickle", "loads", ""), "pickle.loads"),
    (lambda p: _named("torch._utils", "_rebuild_tensor_v2"), "torch._utils._rebuild_tensor_v2"),
    (lambda p: _named("copyreg", "_reconstructor"), "copyreg._reconstructor"),
    (lambda p: pickle.dumps({"model": {"w": _Calls(Path(p).touch)}}), "builtins.getattr"),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=[name for _, name in ATTACKS])
def test_a_malicious_pickle_runs_nothing_and_is_named(
    tmp_path: Path, attack: tuple[Callable[[str], bytes], str]
) -> None:
    make, name = attack
    marker = tmp_path / "marker"
    path = tmp_path / "model_final.pkl"
    path.write_bytes(make(str(marker)))
    with pytest.raises(CheckpointError, match="refused: the file asks for") as info:
        load(path)
    assert name in str(info.value)
    assert str(path) in str(info.value)
    assert not marker.exists()


def test_an_array_of_objects_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    array = np.array([_Calls(open, str(marker), "w")], object)
    with pytest.raises(CheckpointError, match=r"refused: the file asks for '(_?io|builtins)\.open'"):
        load(save_pickle(tmp_path / "a.pkl", {"model": {"w": array}}))
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_torch_file_runs_nothing_and_is_named(tmp_path: Path, legacy: bool) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "model_final.pth"
    torch.save({"model": _Calls(open, str(marker), "w")}, path, _use_new_zipfile_serialization=not legacy)
    marker.unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"refused: the file asks for '(_?io|builtins)\.open'"):
        load(path)
    assert not marker.exists()


def _array_with(shape: bytes, dtype: bytes, data: bytes) -> bytes:
    """Returns the pickle of an array with the given pickled shape, dtype and data."""
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\n("
        + dtype
        + b"tR\x89"
        + data
        + b"tb."
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_array_with(b"K\x02\x85", b"U\x02O8", b"U\x10" + bytes(16)), r"unsupported object dtype\('O8'"),
        (_array_with(b"K\x02\x85", b"U\x02V8", b"U\x10" + bytes(16)), r"unsupported object dtype\('V8'"),
        (
            _array_with(b"K\x02\x85", b"U\x05f4,O8", b"U\x10" + bytes(16)),
            r"unsupported object dtype\('f4,O8'",
        ),
        (_array_with(b"K\x02\x85", b"U\x02f8", b"U\x08" + bytes(8)), "in 8 bytes"),
        (_array_with(b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86", b"U\x02f4", b"U\x08" + bytes(8)), "shape"),
        (
            _array_with(b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"U\x02f4", b"U\x08" + bytes(8)),
            "in 8 bytes",
        ),
        (_array_with(b"G" + struct.pack(">d", 2.0) + b"\x85", b"U\x02f4", b"U\x08" + bytes(8)), "shape"),
        (_array_with(b"K\x02\x85", b"U\x02f4", b"]"), "not plain numbers"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.", r"unsupported object _reconstruct\(\)"),
        (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",
            "unsupported object _reconstruct",
        ),
        # BUILD on a global itself must not set attributes on it.
        (b"\x80\x02cnumpy\ndtype\n}U\x09_functionK\x01sb.", "TypeError: .*__setstate__"),
        (b"\x80\x02cnumpy\ndtype\nN}U\x09_functionK\x01s\x86b.", "TypeError: .*__setstate__"),
        (b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.", "TypeError: .*__setstate__"),
        (b"\x80\x02ccollections\nOrderedDict\n}U\x05itemsK\x01sb.", "TypeError"),
        (b"\x80\x02ccollections\nOrderedDict\nN}U\x05itemsK\x01s\x86b.", "TypeError: .*immutable"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", r"unsupported object ndarray\(\)"),
        (b"\x80\x02cnumpy\nndarray\n)R.", r"unsupported object ndarray\(\)"),
        (b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.", r"unsupported object bytes\(2147483647,\)"),
        (b"\x80\x02c_codecs\nencode\nU\x01aU\x03hex\x86R.", r"unsupported object encode\('a', 'hex'\)"),
        (b"\x80\x02U\x01aQ.", "persistent"),
        (b"\x80\x02\x82\x01.", "extension"),
        (b"\x80\x02(l" + b"]" * 10, "pickle"),
        (b"\x80\x63.", "pickle"),
    ],
)
def test_hostile_pickles_are_refused(data: bytes, message: str) -> None:
    def state() -> list[Any]:
        found = restricted_pickle._GLOBALS
        return [(name, value, dict(vars(value))) for name, value in found.items()]

    before = state()
    with pytest.raises(pickle.UnpicklingError, match=message):
        _read(data)
    assert before == state()


def test_an_error_message_stays_short() -> None:
    """60 levels of `x = [x, x]` are 300 bytes of pickle and 2 ** 60 elements of text."""
    nested: Any = []
    for _ in range(60):
        nested = [nested, nested]
    data = b"\x80\x02cnumpy\ndtype\n" + pickle.dumps(nested, protocol=2)[2:-1] + b"\x85R."
    with pytest.raises(pickle.UnpicklingError, match="unsupported object dtype") as info:
        _read(data)
    assert len(str(info.value)) < 100_000


def test_an_array_that_contains_itself_ends_in_an_error() -> None:
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87Rq\x00"
    with pytest.raises(pickle.UnpicklingError, match="RecursionError"):
        _read(b"\x80\x02" + array + b"(K\x01K\x02\x85h\x00\x89h\x00tb.")


def test_attributes_of_a_dictionary_are_not_called() -> None:
    """BUILD may set `items` on an OrderedDict; the reader must not use it."""
    data = b"\x80\x02ccollections\nOrderedDict\n)RK\x01K\x02s}U\x05itemscnumpy\nndarray\nsb."
    assert _read(data) == {1: 2}


def test_deep_nesting_ends_in_an_error() -> None:
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    with pytest.raises(pickle.UnpicklingError, match="RecursionError"):
        _read(deep)


def test_random_damage_never_escapes() -> None:
    rng = np.random.default_rng(0)
    whole = pickle.dumps({"model": {"a": np.arange(6.0), "b": np.float32(3)}, "n": [1, "x"]}, protocol=2)
    assert any(op.name == "REDUCE" for op, _, _ in pickletools.genops(whole))
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            # Opcodes with a memo index as their argument are left out: the index can make the memo huge.
            value = int(rng.integers(0, 256))
            damaged[rng.integers(2, len(damaged))] = ord(".") if value in b"rpgh" else value
        with contextlib.suppress(pickle.UnpicklingError):
            _read(bytes(damaged))
