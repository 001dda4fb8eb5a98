"""Every op of the package goes through the checks."""

from __future__ import annotations

from pathlib import Path

import torch

import panfpn_fast.ops
from support.op_checks import OPS


def test_every_dispatcher_op_is_listed() -> None:
    dir(panfpn_fast.ops)
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("panfpn_fast::")
    }
    assert names == set().union(*(op.dispatcher_ops for op in OPS.values()))


def test_every_listed_op_runs_the_checks() -> None:
    for name in OPS:
        source = (Path(__file__).parent / f"test_{name}.py").read_text()
        assert f'run_op_checks(OPS["{name}"]' in source, name


def test_every_listed_op_has_a_docstring() -> None:
    for op in OPS.values():
        documentation = op.function.__doc__ or ""
        for section in ("Args:", "Returns:", "Raises:", ">>>"):
            assert section in documentation, f"{op.name}: {section}"


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
