"""Predicts single images on a GPU by replaying CUDA graphs; the host waits once for each image.

The steps of an image: one upload (pixels, tables for resizing, sizes), the resize, the replay of the network's
branches, the maps, and one download of all that a result needs. The host submits all steps and then waits for the last.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from panfpn_fast._device import is_out_of_memory
from panfpn_fast.data.device_resize import resize_pixels, resize_plan
from panfpn_fast.data.images import ImageArray, resize_shortest_edge, resized_shape
from panfpn_fast.models.backbone import ResNet
from panfpn_fast.models.outputs import InstanceOutput, PanopticOutput
from panfpn_fast.models.padded import PaddedPanopticFPN, unpad
from panfpn_fast.models.panoptic_fpn import PanopticFPN, Wanted, enough_score

T = TypeVar("T")

MAX_GRAPHS = 48
"""Padded shapes whose graphs are kept. Edges of 800 and 1333 give 35 up to an aspect ratio of 5 to 3."""

_UPLOADED = {"sizes": torch.int64, "rows": torch.int32, "columns": torch.int32, "pixels": torch.uint8}
_MOST_INT16 = torch.iinfo(torch.int16).max


class Gpu(Protocol):
    """Operations on a GPU that a prediction needs besides those on tensors. The tests implement them on the CPU."""

    device: torch.device
    pins_memory: bool

    def active(self) -> AbstractContextManager[Any]:
        """Returns a context in which this GPU is the current one."""
        ...

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Captures a function; returns its outputs, and a function that computes them again in the same memory."""
        ...

    def run_both(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """Runs two functions at the same time; returns both results."""
        ...

    def wait(self) -> None:
        """Waits for all that was submitted."""
        ...


class CudaGraphs:
    """A CUDA GPU with a memory pool that all of its graphs share.

    Graphs may share memory since they are replayed one after the other, and outputs are read before the next replay.

    Args:
        device: The GPU, with its index.
    """

    pins_memory = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with self.active():
            self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
            self._main, self._side = torch.cuda.Stream(), torch.cuda.Stream()
            self._done = torch.cuda.Event()

    def active(self) -> AbstractContextManager[Any]:
        """See `Gpu`."""
        return torch.cuda.device(self.device)

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """See `Gpu`; the function runs once before, which compiles and loads kernels."""
        run()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU during the capture.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._main, capture_error_mode="thread_local"
            ):
                outputs = run()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise RuntimeError(
                f"the network cannot be captured in a CUDA graph: {error}; create the Predictor with graphs=False"
            ) from error
        return outputs, graph.replay

    def run_both(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """See `Gpu`; the first function runs on a stream of its own."""
        stream = torch.cuda.current_stream()
        self._side.wait_stream(stream)
        with torch.cuda.stream(self._side):
            one = first()
        other = second()
        stream.wait_stream(self._side)
        return one, other

    def wait(self) -> None:
        """See `Gpu`."""
        self._done.record()
        self._done.synchronize()


class Field(NamedTuple):
    """A tensor in a buffer of bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its length."""
        length: int = torch.Size(self.shape).numel() * self.dtype.itemsize
        return length


def pack(tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[Field]]:
    """Copies tensors to one uint8 tensor on their device; returns it and what it contains."""
    fields = _aligned(Field(name, value.dtype, tuple(value.shape)) for name, value in tensors.items())
    parts = [tensors[field.name].contiguous().reshape(-1).view(torch.uint8) for field in fields]
    return torch.cat(parts), fields


def unpack(packed: Tensor, fields: Sequence[Field]) -> dict[str, Tensor]:
    """Returns the tensors in a uint8 tensor, as views, also if it is a copy on another device."""
    parts = packed.split([field.bytes for field in fields])
    return {
        field.name: part.view(field.dtype).view(field.shape)
        for field, part in zip(fields, parts, strict=True)
    }


def _aligned(fields: Iterable[Field]) -> list[Field]:
    """Sorts fields by the sizes of their elements, so that every field begins at a multiple of its own."""
    return sorted(fields, key=lambda field: -field.dtype.itemsize)


class _HostBuffer:
    """Memory of the host that GPUs reach without a further copy. It grows as needed."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def get(self, size: int) -> Tensor:
        """Returns uint8 [size], the same memory as before if it suffices."""
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return self._bytes[:size]


class _Graph(NamedTuple):
    """A captured network for the images of one padded shape."""

    images: Tensor  # uint8 [1, 3, H, W]
    sizes: Tensor  # int64 [2, 1, 2]: height and width of the image without padding, and of the result
    outputs: tuple[dict[str, Tensor], Tensor | None]
    replay: Callable[[], None]


class GraphPredictor:
    """Predicts images one by one, with a graph for each padded shape.

    Graphs are captured at the first image of a shape. The least recently used one is dropped when there are too many.
    Threads take turns.

    Args:
        model: A network in evaluation mode on the GPU.
        short_edge: See `Predictor`.
        max_edge: See `Predictor`.
        gpu: The GPU.
        instances: See `Predictor`.
        max_graphs: Largest number of graphs.
        max_candidates: See `PaddedPanopticFPN`.
    """

    def __init__(
        self,
        model: PanopticFPN,
        short_edge: int,
        max_edge: int,
        gpu: Gpu,
        instances: Wanted = "all",
        max_graphs: int = MAX_GRAPHS,
        max_candidates: int = 4096,
    ) -> None:
        self._network = PaddedPanopticFPN(model, max_candidates=max_candidates)
        self._edges = (short_edge, max_edge)
        self._gpu = gpu
        self._instances = instances
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()
        self._uploads, self._downloads = (_HostBuffer(gpu.pins_memory) for _ in range(2))
        self._lock = threading.Lock()
        # Graphs have the addresses of the weights. If the module gets others, their memory must not go to others.
        self._weights = [value.detach() for value in (*model.parameters(), *model.buffers())]

    def __call__(self, image: ImageArray) -> PanopticOutput | None:
        """Predicts an image.

        Args:
            image: uint8 RGB [H, W, 3].

        Returns:
            The prediction in the size of the image, on the CPU; None if a limit of the static shapes might have changed
            it, so that `PanopticFPN` must predict the image.
        """
        config = self._network.model.config
        old = (image.shape[0], image.shape[1])
        size = resized_shape(*old, *self._edges, config.resize)
        with self._lock, self._gpu.active(), torch.no_grad():
            multiple = config.size_divisibility
            graph = self._graph((-(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple))
            self._submit_image(image, size, graph)
            graph.replay()
            outputs = self._fetch(self._network.merge(*graph.outputs, size, old))
        if outputs is None:
            return None
        [output] = unpad(outputs)
        if self._instances == "all":
            return output
        count = enough_score(config, output.scores)
        return output._replace(**{name: getattr(output, name)[:count] for name in InstanceOutput._fields})

    def _graph(self, shape: tuple[int, int]) -> _Graph:
        """Returns the graph of a padded shape."""
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            return self._graphs[shape]
        while len(self._graphs) >= self._max_graphs:
            self._graphs.popitem(last=False)
        device, network = self._gpu.device, self._network
        images = torch.zeros(1, 3, *shape, dtype=torch.uint8, device=device)
        sizes = torch.tensor([[shape], [shape]], dtype=torch.int64, device=device)
        anchors = network.anchors(*shape)
        outputs, replay = self._gpu.capture(
            lambda: network.branches(images, sizes[0], sizes[1], anchors, self._gpu.run_both)
        )
        self._graphs[shape] = _Graph(images, sizes, outputs, replay)
        return self._graphs[shape]

    def _submit_image(self, image: ImageArray, size: tuple[int, int], graph: _Graph) -> None:
        """Uploads and resizes an image, and writes it and its sizes to the graph's inputs."""
        config, old = self._network.model.config, (image.shape[0], image.shape[1])
        plan = None if size == old else resize_plan(old, size, config.resize)
        arrays: dict[str, npt.NDArray[Any]] = {"sizes": np.array([[size], [old]], np.int64)}
        if plan is not None:
            arrays |= {"rows": plan.rows, "columns": plan.columns, "pixels": image}
        elif size == old:
            arrays["pixels"] = image
        else:
            arrays["pixels"] = resize_shortest_edge(image, *self._edges, resize=config.resize)
        inputs = self._upload(arrays)
        pixels = inputs["pixels"]
        if plan is not None:
            pixels = resize_pixels(pixels, plan, inputs["rows"], inputs["columns"])
        graph.sizes.copy_(inputs["sizes"])
        # The pixels around this image, of an earlier one, are padding; their values do not matter.
        graph.images[0, :, : size[0], : size[1]].copy_(pixels.permute(2, 0, 1))

    def _upload(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
        """Copies arrays to the GPU at once."""
        fields = _aligned(Field(name, _UPLOADED[name], value.shape) for name, value in arrays.items())
        buffer = self._uploads.get(sum(field.bytes for field in fields))
        for name, value in unpack(buffer, fields).items():
            np.copyto(value.numpy(), arrays[name])
        return unpack(buffer.to(self._gpu.device, non_blocking=True), fields)

    def _fetch(self, outputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Copies outputs to the host at once and waits for them; None if a limit was exceeded."""
        if outputs["segment_id"].shape[1] <= _MOST_INT16:  # half as many bytes
            outputs["panoptic"] = outputs["panoptic"].to(torch.int16)
        packed, fields = pack(outputs)
        buffer = self._downloads.get(len(packed))
        buffer.copy_(packed, non_blocking=True)
        self._gpu.wait()
        found = unpack(buffer, fields)
        if bool(found["overflow"].any()):
            return None
        # The buffer is overwritten by the next image.
        copies = {name: value.clone() for name, value in found.items() if name != "panoptic"}
        return {**copies, "panoptic": found["panoptic"].to(torch.int32, copy=True)}


def make_graph_predictor(
    model: nn.Module,
    wanted: bool | None,
    device: torch.device,
    short_edge: int,
    max_edge: int,
    instances: Wanted,
) -> GraphPredictor | None:
    """Returns what replays graphs for the network of a `Predictor`, or None; for the arguments see there."""
    if wanted is not None and not isinstance(wanted, bool):
        raise TypeError(f"graphs: expected True, False or None, got {type(wanted).__name__}")
    on_cuda = device.type == "cuda" and torch.version.hip is None
    if wanted and not on_cuda:
        raise ValueError(f'graphs: True needs device="cuda", got {device}; use None or False')
    if wanted and not isinstance(model, PanopticFPN):
        raise ValueError(f"graphs: True needs a PanopticFPN, got a {type(model).__name__}; use None or False")
    # A class of the user may predict differently, and another library's backbone may read tensors on the host.
    unknown = type(model) is not PanopticFPN or not isinstance(model.backbone, ResNet)
    if wanted is False or not on_cuda or (wanted is None and unknown):
        return None
    assert isinstance(model, PanopticFPN)
    return GraphPredictor(model, short_edge, max_edge, CudaGraphs(model.device), instances)
