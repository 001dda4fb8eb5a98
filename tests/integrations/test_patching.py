"""Tests of `patch` and `unpatch` on a small framework that the tests create."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import panfpn_fast
from panfpn_fast import _load
from panfpn_fast.integrations import patching
from panfpn_fast.integrations.patching import Framework, Patch, Replacement, patch, patched, unpatch

PACKAGE = {
    "__init__.py": "from tiny.core import double\n__version__ = '1.5.2'\n",
    "core.py": """
def double(x):
    '''Twice as much.'''
    return 2 * x

class Base:
    def inherited(self, x):
        return 2 * x

class Thing(Base):
    def method(self, x):
        return 2 * x

    @staticmethod
    def static(x):
        return 2 * x

    @classmethod
    def of_class(cls, x):
        return 2 * x
""",
    "user.py": "from tiny import double as twice\n",
    "late.py": "from tiny.core import double\n",
    "broken.py": "raise ImportError('a library is missing')\n",
}

Make = Callable[[Callable[..., Any]], Callable[..., Any]]


def add_thousand(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: 1000 + original(*args)


DOUBLE = Replacement("tiny.core:double", "nms", add_thousand)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Creates a framework `tiny`, registers it with these replacements and returns its imported package."""
    (tmp_path / "tiny").mkdir()
    for name, text in PACKAGE.items():
        (tmp_path / "tiny" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def make(*replacements: Replacement, tested: tuple[str, str] = ("1.4", "1.5")) -> ModuleType:
        module: Any = ModuleType("module_of_tiny")
        module.FRAMEWORK = Framework("tiny", "tiny", tested, replacements or (DOUBLE,))
        monkeypatch.setitem(sys.modules, "module_of_tiny", module)
        monkeypatch.setitem(patching._MODULES, "tiny", "module_of_tiny")
        importlib.import_module("tiny.user")
        return importlib.import_module("tiny")

    yield make
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patching._ACTIVE.pop("tiny", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "tiny"]:
        del sys.modules[name]


def test_every_copy_in_the_frameworks_modules_is_replaced_and_put_back(tiny: Any) -> None:
    package = tiny()
    original = package.core.double
    patch("tiny")
    late = importlib.import_module("tiny.late")
    assert package.double is package.core.double is package.user.twice is late.double is not original
    assert package.double(2) == 1004
    unpatch("tiny")
    assert package.double is package.core.double is package.user.twice is late.double is original


def test_other_modules_keep_functions_imported_before_the_patch(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tiny()
    mine: Any = ModuleType("mine")
    mine.before = package.double
    monkeypatch.setitem(sys.modules, "mine", mine)
    with patch("tiny"):
        assert mine.before(2) == 4
        mine.during = package.double
        assert mine.during(2) == 1004
    assert mine.during is mine.before


def test_methods_of_every_kind(tiny: Any) -> None:
    names = ("method", "static", "of_class", "inherited")
    package = tiny(*(Replacement(f"tiny.core:Thing.{name}", "nms", add_thousand) for name in names))
    core = package.core
    before = dict(vars(core.Thing))
    thing = core.Thing()
    with patch("tiny"):
        assert [getattr(thing, name)(2) for name in names] == [1004] * 4
        assert [core.Thing.static(2), core.Thing.of_class(2)] == [1004] * 2
        assert core.Base().inherited(2) == 4
    assert [getattr(thing, name)(2) for name in names] == [4] * 4
    assert dict(vars(core.Thing)) == before


def test_patched_functions_are_listed(tiny: Any) -> None:
    tiny()
    assert "tiny" not in patched()
    handle = patch("tiny")
    assert patched()["tiny"] == {"tiny.core:double": "nms"}
    assert str(handle) == "tiny 1.5.2, patched:\ntiny.core:double uses ops.nms"
    assert repr(handle) == "<panfpn_fast.patch('tiny'), functions patched: 1>"
    unpatch("tiny")
    assert "tiny" not in patched()
    assert str(handle) == "tiny is not patched"


def test_patching_twice_has_no_effect(tiny: Any) -> None:
    package = tiny()
    patch("tiny")
    replacement = package.double
    patch("tiny")
    assert package.double is replacement
    assert package.double(2) == 1004
    unpatch("tiny")
    unpatch("tiny")
    assert package.double(2) == 4


def test_a_block_restores_the_state_before_it(tiny: Any) -> None:
    package = tiny()
    with patch("tiny") as handle:
        assert isinstance(handle, Patch)
        assert package.double(2) == 1004
    assert package.double(2) == 4
    with pytest.raises(TypeError), patch("tiny"):
        package.double(None)
    assert package.double(2) == 4
    with handle:  # a second time
        assert package.double(2) == 1004
    assert package.double(2) == 4
    with patch("tiny"):
        with patch("tiny"):
            pass
        assert package.double(2) == 1004
    assert package.double(2) == 4
    with patch("tiny"):
        unpatch("tiny")
    assert package.double(2) == 4


def test_replacements_look_like_originals(tiny: Any) -> None:
    package = tiny()
    original = package.double
    with patch("tiny"):
        assert package.double.__name__ == "double"
        assert package.double.__doc__ == "Twice as much."
        assert package.double.__module__ == "tiny.core"
        assert inspect.unwrap(package.double)(2) == 4
        assert inspect.signature(package.double) == inspect.signature(original)
        assert pickle.loads(pickle.dumps(package.double)) is package.double


def test_missing_functions_are_listed_in_one_warning(tiny: Any) -> None:
    gone = ("tiny.core:triple", "tiny.core:Nothing.method", "tiny.absent:double", "tiny.broken:double")
    package = tiny(*(Replacement(target, "nms", add_thousand) for target in gone), DOUBLE)
    with pytest.warns(UserWarning, match="not patched") as caught:
        patch("tiny")
    [warning] = caught
    assert str(warning.message) == (
        "panfpn_fast.patch('tiny'): found tiny 1.5.2, tested with 1.4 to 1.5; "
        f"not found and not patched: {', '.join(gone)}"
    )
    assert warning.filename == __file__
    assert patched()["tiny"] == {"tiny.core:double": "nms"}
    assert package.double(2) == 1004


@pytest.mark.parametrize("tested", [("1.6", "1.7"), ("1.2", "1.4"), ("1.5.3", "1.5.3"), ("1.4", "1.5.1")])
def test_untested_versions_are_reported(tiny: Any, tested: tuple[str, str]) -> None:
    package = tiny(tested=tested)
    with pytest.warns(UserWarning, match=rf"found tiny 1\.5\.2, tested with {tested[0]} to {tested[1]}"):
        patch("tiny")
    assert package.double(2) == 1004


@pytest.mark.parametrize("version", ["1.5.2", "1.5", "1.4.0", "1.5.2+cu130", "1.5.9.dev1", "1.4a1"])
def test_tested_versions_are_silent(tiny: Any, version: str) -> None:
    tiny().__version__ = version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch("tiny")


def test_a_failure_leaves_nothing_patched(tiny: Any) -> None:
    def fail(original: Callable[..., Any]) -> Callable[..., Any]:
        raise RuntimeError("on purpose")

    package = tiny(DOUBLE, Replacement("tiny.core:Thing.method", "nms", fail))
    with pytest.raises(RuntimeError, match="on purpose"):
        patch("tiny")
    assert package.double(2) == package.user.twice(2) == 4
    assert "tiny" not in patched()


def test_a_failure_halfway_restores_everything(tiny: Any) -> None:
    target = "tiny.core:Unchangeable.method"
    package = tiny(DOUBLE, Replacement(target, "nms", add_thousand))

    class Refusing(type):
        def __setattr__(cls, name: str, value: Any) -> None:
            raise TypeError(f"{name} cannot be set")

    package.core.Unchangeable = Refusing("Unchangeable", (), {"method": lambda self: None})
    with pytest.raises(TypeError, match="method cannot be set"):
        patch("tiny")
    assert package.double(2) == package.core.double(2) == package.user.twice(2) == 4
    assert "tiny" not in patched()


def test_unpatch_keeps_a_replacement_by_other_code(tiny: Any) -> None:
    package = tiny()
    original = package.core.double
    patch("tiny")
    package.core.double = others = lambda x: -x
    with pytest.warns(UserWarning, match="other code has replaced tiny.core:double") as caught:
        unpatch("tiny")
    assert caught[0].filename == __file__
    assert package.core.double is others
    assert package.double is original


def test_a_framework_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("module_of_tiny")
    module.FRAMEWORK = Framework("tiny_that_is_not_there", "tiny-not-there", ("1", "1"), ())
    monkeypatch.setitem(sys.modules, "module_of_tiny", module)
    monkeypatch.setitem(patching._MODULES, "tiny", "module_of_tiny")
    with pytest.raises(
        ImportError, match="tiny_that_is_not_there is not installed: pip install tiny-not-there"
    ):
        patch("tiny")


def test_an_import_error_of_the_framework_is_raised_unchanged(tiny: Any, tmp_path: Path) -> None:
    tiny()
    for name in [name for name in sys.modules if name.split(".")[0] == "tiny"]:
        del sys.modules[name]
    (tmp_path / "tiny" / "__init__.py").write_text("import tiny.broken\n")
    with pytest.raises(ImportError, match="a library is missing"):
        patch("tiny")


def test_patch_needs_native_ops(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tiny()
    monkeypatch.setattr(_load, "_cpu_error", "no binaries")
    with pytest.raises(ImportError, match="no binaries"):
        patch("tiny")
    assert package.double(2) == 4


@pytest.mark.parametrize("function", [patch, unpatch])
def test_names(function: Callable[[Any], Any]) -> None:
    takes = 'expected one of "torchvision", "detectron2", "mmdetection", got'
    with pytest.raises(ValueError, match=f"name: {takes} 'pytorch'"):
        function("pytorch")
    with pytest.raises(TypeError, match=f"name: {takes} int"):
        function(3)


def test_concurrent_threads_patch_once(tiny: Any) -> None:
    made = []

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        made.append(original)
        return add_thousand(original)

    package = tiny(Replacement("tiny.core:double", "nms", make))
    threads = [threading.Thread(target=patch, args=("tiny",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert package.double(2) == 1004


def test_public_names() -> None:
    assert panfpn_fast.patch is patch
    assert panfpn_fast.unpatch is unpatch
    assert panfpn_fast.patched is patched


def test_servable() -> None:
    class Subclass(torch.Tensor):
        pass

    plain = torch.zeros(2, 2)
    assert patching.servable(plain, torch.nn.Parameter(plain))
    assert not patching.servable()
    assert not patching.servable(plain, [plain])
    assert not patching.servable(plain.as_subclass(Subclass))
    assert not patching.servable(plain, plain.to_sparse())
    assert not patching.servable(plain.to("meta"))
    assert not patching.servable(torch.quantize_per_tensor(plain, 1.0, 0, torch.quint8))
    traced = torch.jit.trace(lambda x: x + int(patching.servable(x)), plain, check_trace=False)
    assert torch.equal(traced(plain), plain)
