"""Host code of the compiled path, on a fake GPU: launches, variants, tracing, exporting.

Each test runs a script in a process of its own, because Triton's interpreter runs kernels in this one.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from support.processes import environment, run

pytest.importorskip("triton", reason="Triton is not installed")

_START = """
import json, torch
from support import fake_gpu
from support.head_calls import EPS, call, head_calls
from support.kernel_checks import implemented_in_triton
gpu = fake_gpu.install()
import panfpn_fast.ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

def fake(args):
    return tree_map_only(
        torch.Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda"), args)
"""


def report(script: str, before: str = "") -> Any:
    """Runs a script, with `_START` and something before it; returns the JSON of the last line that it prints."""
    command = [sys.executable, "-c", f"{before}\n{_START}\n{script}"]
    return json.loads(run(command, env=environment(TRITON_INTERPRET=None)).stdout.splitlines()[-1])


def test_plans_launch_as_triton_does() -> None:
    """The second call's plan gives Triton's launcher what Triton itself gave it in the first call."""
    found = report("""
def described(launched, args):
    def text(arg):
        if not isinstance(arg, torch.Tensor):
            return repr(arg)
        is_argument = [other is arg for other in args]
        return f"{is_argument.index(True) if any(is_argument) else 'new'} {arg.shape} {arg.stride()} {arg.dtype}"
    return [str(launched[:-1]), *map(text, launched.args)]

found = {}
with implemented_in_triton(torch.device("cpu")):
    for name, args in head_calls().items():
        calls = []
        for _ in range(2):
            before = gpu.compiled
            call(name, args)
            calls.append([described(launched, args) for launched in gpu.launches])
            gpu.launches.clear()
        found[name] = [*calls, gpu.compiled - before]
print(json.dumps(found))
""")
    assert len(found) == 9
    for name, (by_triton, by_plan, compiled) in found.items():
        assert by_triton, name
        assert by_plan == by_triton, name
        assert compiled == 0, name


def test_hooks_see_every_launch() -> None:
    """Profilers hook into launches, which only Triton's own path serves."""
    found = report("""
from triton import knobs
names, args = [], head_calls()["upsample_argmax"]
hook = lambda metadata: names.append(metadata.get()["name"])
with implemented_in_triton(torch.device("cpu")):
    call("upsample_argmax", args)
    original = fake_gpu._Kernel.run.fget
    def run(self):
        launch = original(self)
        def hooked(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *rest):
            if enter is not None:
                enter(launch_metadata)
            launch(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *rest)
        return hooked
    fake_gpu._Kernel.run = property(run)
    knobs.runtime.launch_enter_hook.add(hook)
    call("upsample_argmax", args)
    call("upsample_argmax", args)
    knobs.runtime.launch_enter_hook.remove(hook)
    call("upsample_argmax", args)
print(json.dumps(names))
""")
    assert found == ["_planar_kernel", "_label_kernel"] * 2


def test_photographs_of_all_sizes_share_variants() -> None:
    """The label kernel is not specialised by sizes, of which COCO has thousands."""
    found = report("""
import random
from panfpn_fast.ops.triton import _launch, upsample_argmax as module

def resized(height, width, short=800, long=1333):
    scale = min(short / min(height, width), long / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)

class Recorder:
    def launch(self, kernel, grid, args, options):
        types = [arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args]
        kernel.warmup(*types, grid=(1,), **options)
        tiles.add((options["ROWS"], options["INPUT_ROWS"]))

_launch.recording.recorder = Recorder()
module.planar = lambda logits: logits
generator, tiles = random.Random(0), set()
for _ in range(2000):
    side = generator.randint(300, 640)
    size = generator.choice([(480, 640), (640, 480), (side, 640), (640, side)])
    crop = resized(*size)
    padded = [(side + 31) // 32 * 8 for side in crop]
    logits = torch.empty(1, 54, *padded, dtype=torch.bfloat16, device="meta")
    module.upsample_argmax(logits, 4, *crop, *size, False)
print(json.dumps([len(tiles), [len(cache[0]) for cache in module._label_kernel.device_caches.values()]]))
""")
    tiles, variants = found
    assert tiles == 2  # a compile-time choice: whether 8 rows of the output need at most 6 rows of the input
    assert variants == [tiles]


_GRAPH = """
from torch._functorch.aot_autograd import aot_function
from torch.fx.experimental.symbolic_shapes import ShapeEnv

def graph(name, args, opaque=False):
    nodes, env = [], ShapeEnv()
    def look(module, inputs):
        nodes.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward
    with FakeTensorMode(shape_env=env):
        function = lambda *args: call(name, args)
        aot_function(function, fw_compiler=look, dynamic=True)(*fake(args))
    return nodes, [str(guard.expr) for guard in env.guards if guard.expr.is_Equality]
"""


def test_torch_compile_sees_the_kernels_and_no_size_is_fixed() -> None:
    """AOTAutograd's graph, which Inductor compiles, has the kernels in place of the op, and dynamic sizes."""
    found = report(
        _GRAPH
        + """
found = {}
for name, args in head_calls(200, 336).items():
    nodes, guards = graph(name, args)
    found[name] = [
        sum("triton_kernel_wrapper" in node for node in nodes),
        [node for node in nodes if node.startswith("panfpn_fast")],
        guards,
    ]
print(json.dumps(found))
"""
    )
    launches = {
        "bilinear_upsample_backward": 1,
        "conv3x3_statistics": 1,
        "group_norm_relu_project": 1,
        "group_norm_relu_upsample": 1,
        "group_norm_relu_upsample_backward": 3,
        "group_norm_statistics": 1,
        "upsample_argmax": 2,
        "upsample_cross_entropy": 2,
        "upsample_cross_entropy_backward": 3,
    }
    assert {name: kernels for name, (kernels, _, _) in found.items()} == launches
    sizes = {"200", "336", "100", "168", "400", "672", "800", "1344", "67200", "16800"}
    for name, (_, opaque, guards) in found.items():
        assert not opaque, name
        assert not sizes & set(re.findall(r"\d+", " ".join(guards))), name


def test_without_torchs_private_names_ops_are_opaque() -> None:
    """A later torch may not have the names with which we make ops traceable; torch.compile then calls the ops."""
    script = (
        _GRAPH
        + """
print(json.dumps([graph(name, head_calls()[name])[0] for name in ("conv3x3_statistics", "upsample_argmax")]))
"""
    )
    of_convolution, of_labels = report(
        script, before="import torch._library.triton as t; del t.triton_ops_to_kernels"
    )
    assert "panfpn_fast.conv3x3_statistics.default" in of_convolution
    assert "panfpn_fast.upsample_argmax.default" in of_labels
    assert not any("triton" in node for node in (*of_convolution, *of_labels))


_EXPORT = """
from panfpn_fast.ops import conv_gn_relu_project, conv_gn_relu_upsample, group_norm_relu_upsample, upsample_argmax

class Head(torch.nn.Module):
    def forward(self, x, weight, norm, matrix):
        y = conv_gn_relu_upsample(x, weight, *norm, 8)
        y = group_norm_relu_upsample(y, *norm, 8)
        return upsample_argmax(conv_gn_relu_project(y, weight, *norm, 8, matrix), 4)

def exported(device):
    with FakeTensorMode():
        norm = (torch.empty(16), torch.empty(16))
        args = (torch.empty(1, 16, 8, 12), torch.empty(16, 16, 3, 3), norm, torch.empty(5, 16))
        args = tree_map_only(torch.Tensor, lambda x: torch.empty(x.shape, device=device), args)
        return torch.export.export(Head(), args)

def names(program):
    return sorted(str(node.target) for node in program.graph.nodes if str(node.target).startswith("panfpn_fast"))
"""


def test_an_archive_names_the_same_ops_for_every_device() -> None:
    on_cpu, on_cuda = report(_EXPORT + 'print(json.dumps([names(exported("cpu")), names(exported("cuda"))]))')
    assert on_cpu == on_cuda
    assert {name.split(".")[1] for name in on_cpu} == {
        "conv3x3_statistics",
        "group_norm_relu_project",
        "group_norm_relu_upsample",
        "group_norm_statistics",
        "upsample_argmax",
    }


def test_fakes_have_the_layouts_of_the_kernels() -> None:
    found = report("""
found = {}
for name, args in head_calls().items():
    with FakeTensorMode():
        results = call(name, fake(args))
    with implemented_in_triton(torch.device("cpu")):
        real = call(name, args)
    described = [
        [(list(x.shape), list(x.stride()), str(x.dtype)) for x in (all if isinstance(all, tuple) else (all,))]
        for all in (results, real)
    ]
    found[name] = described
print(json.dumps(found))
""")
    for name, (of_fake, of_kernels) in found.items():
        assert of_fake == of_kernels, name
