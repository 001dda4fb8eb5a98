"""The CUDA ops, compiled for the CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest
import torch

from cuda_on_host.build import OPS_VARIABLE, ORDERS, build_ops, cached_folder, missing_for_ops


@pytest.fixture(scope="session")
def host_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Builds _C_cuda_on_host.so and registers its ops."""
    path = os.environ.get(OPS_VARIABLE)
    if path is None:
        if reason := missing_for_ops():
            pytest.skip(reason)
        path = str(build_ops(cached_folder("cuda_on_host", request.config, tmp_path_factory)))
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.panfpn_host_launch_count.restype = ctypes.c_ulonglong
    library.panfpn_host_set_order.argtypes = [ctypes.c_int, ctypes.c_ulonglong]
    return library


@pytest.fixture(params=ORDERS)
def thread_order(request: pytest.FixtureRequest, host_library: ctypes.CDLL) -> Iterator[str]:
    """Runs the threads of each block in different orders, one of which reveals a missing barrier."""
    host_library.panfpn_host_set_order(ORDERS[request.param], 1)
    yield request.param
    host_library.panfpn_host_set_order(ORDERS["forward"], 0)
