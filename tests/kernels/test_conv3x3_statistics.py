"""The convolution with GroupNorm's statistics: compared with float64, and compiled for three targets."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.compile_kernels import CAPABILITIES, Launch
from support.kernel_checks import check_compiled, check_traced
from support.processes import environment, run

pytest.importorskip("triton", reason="Triton is not installed")
from panfpn_fast.ops.triton import _conv_choice as conv_choice
from panfpn_fast.ops.triton import conv3x3_statistics as conv
from panfpn_fast.ops.triton._conv_choice import CUDNN

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = "64x64-4-4"


def make_inputs(
    shape: tuple[int, int, int, int], out_channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) + 0.5
    conv_weight = torch.randn(out_channels, shape[1], 3, 3, generator=generator) / (9 * shape[1]) ** 0.5
    return x.to(device, dtype), conv_weight.to(device, dtype)


def check(x: Tensor, conv_weight: Tensor, num_groups: int, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    y, mean, rstd = outputs
    expected = F.conv2d(x.double(), conv_weight.double(), padding=1)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    # The result is rounded once, by at most half of eps, after float32 sums of up to 9 * C_in products. On a GPU,
    # float32 may mean tf32, whose eps equals the one of float16.
    eps = torch.finfo(torch.float16 if x.is_cuda and x.dtype == torch.float32 else x.dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=2e-6 if eps < 1e-6 else eps)

    # The statistics are computed from the rounded result.
    groups = y.double().reshape(y.shape[0], num_groups, -1)
    variance, true_mean = torch.var_mean(groups, dim=2, correction=0)
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), true_mean, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(rstd.double(), (variance + EPS).rsqrt(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "out_channels", "num_groups"),
    [
        ((2, 16, 7, 11), 24, 8),  # groups of 3 channels; 77 pixels are no multiple of the tiles of 64
        ((1, 70, 9, 13), 128, 32),  # the last block of input channels is not full
        ((3, 3, 1, 5), 6, 1),
        ((1, 8, 67, 1), 80, 5),  # the second tile of channels is not full
        ((2, 64, 8, 8), 16, 16),
    ],
)
def test_forward(
    shape: tuple[int, int, int, int],
    out_channels: int,
    num_groups: int,
    dtype: torch.dtype,
    kernel_device: torch.device,
) -> None:
    x, conv_weight = make_inputs(shape, out_channels, dtype, kernel_device)
    check(x, conv_weight, num_groups, conv.run(SMALL, x, conv_weight, num_groups, EPS))


@pytest.mark.parametrize("name", sorted(conv._CONFIGURATIONS))
def test_configurations(name: str, kernel_device: torch.device) -> None:
    if kernel_device.type == "cuda":
        major = torch.cuda.get_device_capability()[0]
        names = [c.name for p in ("tf32", "float32") for c in conv.configurations(p, major, 192)]
        if name not in names:
            pytest.skip("the configuration is for other GPUs")
    # There is more than one tile of pixels and of channels. Only the widest configuration has a full tile.
    x, conv_weight = make_inputs((1, 16, 13, 21), 192, torch.bfloat16, kernel_device)
    check(x, conv_weight, 3, conv.run(name, x, conv_weight, 3, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_convolution(dtype: torch.dtype, kernel_device: torch.device) -> None:
    x, conv_weight = make_inputs((2, 16, 7, 11), 24, dtype, kernel_device)
    check(x, conv_weight, 8, conv.run(CUDNN, x, conv_weight, 8, EPS))


def test_large_mean(kernel_device: torch.device) -> None:
    x, conv_weight = make_inputs((1, 16, 12, 15), 32, torch.float32, kernel_device)
    # A 1x1 convolution with ones sums 16 channels to a mean of 32,000 with a standard deviation of 4.
    conv_weight = F.pad(torch.ones(32, 16, 1, 1, device=kernel_device), (1, 1, 1, 1))
    y, mean, rstd = conv.run(SMALL, x + 2000.0, conv_weight, 4, EPS)
    groups = y.double().reshape(4, -1)
    variance, true_mean = torch.var_mean(groups, dim=1, correction=0)
    # A sum of squares would lose the variance: float32 has 7 digits, and the variance begins at the ninth.
    torch.testing.assert_close(mean[0].double(), true_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(rstd[0].double(), (variance + EPS).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    ],
    ids=["channels_last", "transposed", "strided"],
)
def test_layouts(view: Callable[[Tensor], Tensor], kernel_device: torch.device) -> None:
    x, conv_weight = make_inputs((2, 16, 6, 9), 32, torch.float32, kernel_device)
    expected = conv.run(SMALL, x, conv_weight, 2, EPS)
    for found, wanted in zip(conv.run(SMALL, view(x), view(conv_weight), 2, EPS), expected, strict=True):
        assert found.equal(wanted)


def test_images_do_not_mix_and_runs_repeat(kernel_device: torch.device) -> None:
    x, conv_weight = make_inputs((3, 16, 9, 9), 32, torch.float32, kernel_device)
    together = conv.run(SMALL, x, conv_weight, 2, EPS)
    alone = conv.run(SMALL, x[1:2], conv_weight, 2, EPS)
    again = conv.run(SMALL, x, conv_weight, 2, EPS)
    for first, second, third in zip(together, alone, again, strict=True):
        assert first[1:2].equal(second)
        assert first.equal(third)


def test_empty_batch(triton_ops: torch.device) -> None:
    x, conv_weight = make_inputs((0, 16, 9, 9), 32, torch.float32, triton_ops)
    y, mean, rstd = torch.ops.panfpn_fast.conv3x3_statistics(x, conv_weight, 8, EPS)
    assert y.shape == (0, 32, 9, 9)
    assert mean.shape == rstd.shape == (0, 8)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 5, 3, 3), "weight: expected 3 input channels"),
        (torch.ones(4, 3, 1, 1), r"weight: expected shape \[C_out, C_in, 3, 3\]"),
        (torch.ones(4, 3, 3, 3, dtype=torch.float16), "weight: expected the input's dtype torch.float32"),
    ],
)
def test_memory_is_safe(weight: Tensor, message: str, triton_ops: torch.device) -> None:
    x = torch.ones(1, 3, 5, 5, device=triton_ops)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.panfpn_fast.conv3x3_statistics(x, weight.to(triton_ops), 2, EPS)


@pytest.mark.parametrize("needs_grad", [(True, True), (True, False), (False, True)])
def test_gradients(
    needs_grad: tuple[bool, bool], triton_ops: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PANFPN_CONV", "triton")
    conv_choice.forget()  # plans keep the choice
    inputs = make_inputs((2, 16, 7, 5), 32, torch.float32, triton_ops)
    x, conv_weight = (t.requires_grad_(need) for t, need in zip(inputs, needs_grad, strict=True))
    y, mean, rstd = torch.ops.panfpn_fast.conv3x3_statistics(x, conv_weight, 8, EPS)
    assert not mean.requires_grad
    assert not rstd.requires_grad
    grad = torch.randn_like(y)
    wanted = [t for t in (x, conv_weight) if t.requires_grad]
    found = torch.autograd.grad(y, wanted, grad)
    expected = torch.autograd.grad(F.conv2d(x, conv_weight, padding=1), wanted, grad)
    torch.testing.assert_close(found, expected)


def test_opcheck(triton_ops: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANFPN_CONV", "triton")
    conv_choice.forget()  # plans keep the choice
    x, conv_weight = make_inputs((2, 16, 7, 5), 32, torch.float32, triton_ops)
    op = torch.ops.panfpn_fast.conv3x3_statistics.default
    arguments = (x.requires_grad_(), conv_weight.requires_grad_(), 8, EPS)
    if x.is_cuda:
        torch.library.opcheck(op, arguments)
    else:  # interpreted kernels cannot be traced
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration"))


def _launch(tile: conv.Configuration, precision: str, capability: int) -> Launch:
    dtype = torch.float32 if precision in ("tf32", "float32") else getattr(torch, precision)
    shapes = ((2, 256, 50, 84), (tile.block_n, 256, 3, 3))
    x, conv_weight = (
        torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last) for shape in shapes
    )

    def run(x: Tensor, conv_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.backends.cudnn.flags(allow_tf32=precision == "tf32"):
            return conv.run(tile.name, x, conv_weight, 32, EPS)

    tensor_cores = () if precision == "float32" else ("_conv_kernel",)
    return Launch(run, (x, conv_weight), tensor_cores, (capability,))


# Every shipped configuration, for its GPUs. float16 compiles as bfloat16 does.
LAUNCHES: dict[str, Launch] = {}
for _precision in ("bfloat16", "tf32", "float32"):
    for _capability in CAPABILITIES:
        for _channels in (64, 128, 256):
            for _tile in conv.configurations(_precision, _capability // 10, _channels):
                LAUNCHES[f"{_precision} {_tile.name} {_capability}"] = _launch(_tile, _precision, _capability)


# The op itself. The rule chooses, because nothing can be measured without a GPU.
LAUNCHES["the op"] = Launch(
    conv.conv3x3_statistics,
    (*LAUNCHES["bfloat16 64x128-4-4 90"].args, 32, EPS),
    ("_conv_kernel",),
    (90,),
)

# Run without the interpreter, whose kernels cannot be traced.
_TRACE = """
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from panfpn_fast.ops.triton.conv3x3_statistics import conv3x3_statistics

x, conv_weight = (
    torch.empty(shape, device="meta", memory_format=torch.channels_last) for shape in ((2, 16, 50, 84), (32, 16, 3, 3))
)
traced = make_fx(lambda x, w: conv3x3_statistics(x, w, 8, 1e-5), tracing_mode="symbolic")(x, conv_weight)
print(sorted(str(guard.expr) for guard in traced.shape_env.guards if guard.expr.is_Equality))
print([node.target for node in traced.graph.nodes].count(torch.ops.higher_order.triton_kernel_wrapper_mutation))
"""


def test_one_graph_serves_all_sizes() -> None:
    result = run([sys.executable, "-c", _TRACE], env=environment(TRITON_INTERPRET=None))
    guards, kernels = result.stdout.splitlines()
    # Only the channels and the kernel size 3 are constants of the graph; N, H and W stay dynamic.
    assert sorted(re.findall(r", (\d+)\)", guards)) == ["16", "3", "32"]
    assert kernels == "1"


@pytest.mark.parametrize(
    ("name", "capability"), [(name, *launch.capabilities) for name, launch in LAUNCHES.items()]
)
def test_compiles(name: str, capability: int, compiled: dict[str, Any]) -> None:
    check_compiled(compiled[name], LAUNCHES[name], capability)
    check_traced(compiled[name])
    (kernel,) = (
        k["targets"][str(capability)] for k in compiled[name]["kernels"] if k["name"] == "_conv_kernel"
    )
    # Tiles of the input are copied to shared memory 16 bytes at a time, without passing through registers.
    copies = {opcode for opcode in kernel["instructions"] if opcode.startswith("cp.async.c")}
    assert copies <= {"cp.async.ca.shared.global", "cp.async.cg.shared.global"}
    assert copies
    if capability == 90 and LAUNCHES[name].tensor_cores:
        assert any(opcode.startswith("wgmma.mma") for opcode in kernel["instructions"])
    loads = {o for o in kernel["instructions"] if o.startswith(("ld.global", "st.global"))}
    assert any(".v4" in opcode for opcode in loads)
