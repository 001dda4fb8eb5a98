"""From images to panoptic results: reading, resizing, the network, and the names of classes."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from panfpn_fast import DEFAULT_WEIGHTS
from panfpn_fast._device import resolve_device
from panfpn_fast.data import Categories
from panfpn_fast.data.images import resize_shortest_edge, resized_shape
from panfpn_fast.inference.finding import camera_number
from panfpn_fast.inference.result import Instances, PanopticResult
from panfpn_fast.inference.segment import Segment
from panfpn_fast.inference.sources import Photograph, Source, is_one_image, photographs_of, read_source
from panfpn_fast.ops._checks import int_pair

if TYPE_CHECKING:
    from panfpn_fast.models.outputs import PanopticOutput

__all__ = ["Predictor", "predict"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Predictor:
    """Predicts panoptic segmentations of images of any size.

    Resizes images so that the shorter edge has `short_edge` pixels and the longer one at most `max_edge`. Results have
    the original sizes of the images.

    Args:
        model: A `PanopticFPN`, or a module with the same `forward` and `config`, or the path or name of a checkpoint,
            as `panfpn_fast.load` takes it. A module is put in evaluation mode and moved to `device` in place. The
            predictor shares its weights, except for a ResNet with batch norms, whose folded weights are copies. Create
            a new predictor after further training.
        device: Device to run on, such as "cpu", "cuda:0" or its number 0; by default a CUDA GPU if there is one, else
            the CPU.
        dtype: Dtype to convert the model's weights to, in place: torch.float32, torch.bfloat16 or torch.float16. None
            keeps the dtype.
        short_edge: Length of the resized shorter edge, in pixels; None for the network's own, which is in its
            configuration.
        max_edge: Upper limit for the longer edge, in pixels; None for the network's own.
        instances: The content of `PanopticResult.instances`: "all" for all detections, or "panoptic" for those that
            can get pixels of the panoptic map, whose score is at least `model.config.instance_score_threshold`. No
            masks are computed for the others, which saves time. The panoptic map and the segments are bit-identical.
        graphs: Whether to replay CUDA graphs for single images, which makes the host wait once per image. None does so
            on CUDA for a `PanopticFPN` with a ResNet of this package.

    Attributes:
        short_edge: The length in use.
        max_edge: The limit in use.

    Raises:
        TypeError: If `model` is not such a module, `device`, `dtype` or `graphs` is of another kind, or `instances` is
            "panoptic" and `model.forward` has no parameter `instances`.
        ValueError: If the device is not available, the dtype is not one of the three, an edge is not positive,
            `instances` is another word, `graphs` is True without CUDA or for another network than a `PanopticFPN`, or
            a checkpoint has an unknown name or cannot be loaded.
        OSError: If a checkpoint cannot be read or downloaded.

    Note:
        A network of this package was evaluated with the edges in its configuration. Published networks of detectron2
        and mmdetection have 800 and 1333. The configuration also selects the filter (`resize`).

        bfloat16 halves the memory of weights and features. On a CPU it is faster than float32 where the processor
        multiplies it (`lscpu` lists avx512_bf16 or amx_bf16), and slower elsewhere, since PyTorch then emulates all but
        the 3x3 convolutions. A GPU of compute capability 8.0 or newer has tensor cores for bfloat16, with twice the
        rate of TF32. The default, None, does not choose bfloat16 there: published checkpoints are predicted in float32.

        A CUDA graph is captured at the first image of a padded shape, or by `warm_up`. Graphs keep memory; docs/gpu.md
        says how much. Forward hooks on modules of the network run during a capture only.

        Weights that change later, by training or `load_state_dict`, reach a predictor only where it shares them. Its
        folded weights are a snapshot.

    Example:
        >>> from panfpn_fast import PanopticFPN
        >>> predictor = Predictor(PanopticFPN(), device="cpu", short_edge=64)  # untrained
        >>> predictor(np.zeros((48, 64, 3), np.uint8)).panoptic.shape
        torch.Size([48, 64])
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | None = None,
        short_edge: int | None = None,
        max_edge: int | None = None,
        instances: Literal["all", "panoptic"] = "all",
        graphs: bool | None = None,
    ) -> None:
        self.device = resolve_device(device)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype or None, got {type(dtype).__name__}")
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        if isinstance(model, str | os.PathLike):
            from panfpn_fast.checkpoints import load

            model = load(model)
        self.categories = _model_categories(model)
        self.short_edge = getattr(model.config, "short_edge", 800) if short_edge is None else short_edge
        self.max_edge = getattr(model.config, "max_edge", 1333) if max_edge is None else max_edge
        # Invalid edges are errors now, not at the first image.
        resized_shape(1, 1, self.short_edge, self.max_edge)
        self._resize = getattr(model.config, "resize", "detectron2")
        # Imported here, so that results can be read and drawn without the networks.
        from panfpn_fast.inference.graphs import make_graph_predictor
        from panfpn_fast.models.conv_fusion import fold_norms, prepare_convolutions
        from panfpn_fast.models.panoptic_fpn import check_wanted

        check_wanted(instances)
        if instances != "all" and not _takes_instances(model):
            raise TypeError(
                f'instances: "{instances}" needs a network whose forward has a parameter `instances`; '
                f'{type(model).__name__} has none; use "all"'
            )
        self.instances = instances

        # Batch norms are folded before weights are rounded to `dtype`, and weights are transformed after it.
        folded = fold_norms(model.eval())
        for network in (model, folded):
            network.to(device=self.device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = prepare_convolutions(folded)
        self._graphs = make_graph_predictor(
            self.model, graphs, self.device, self.short_edge, self.max_edge, instances
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The branches of the network: "instance", "semantic" or both."""
        return getattr(self.model.config, "tasks", ("instance", "semantic"))

    def warm_up(self, sizes: Sequence[tuple[int, int]] = ((480, 640),)) -> None:
        """Predicts black images, so that the first real image does not wait for compilers.

        On a GPU the first image of a process compiles the Triton kernels of the semantic head and loads all kernels,
        which takes several seconds, or less if an earlier process left them in Triton's cache on disk. Images of other
        sizes use the same kernels; cuDNN chooses its algorithms, and a CUDA graph is captured, for each padded shape.

        Args:
            sizes: Heights and widths of images, before resizing.

        Raises:
            TypeError: If a size is not a pair of integers.
            ValueError: If a size is below 1.

        Example:
            >>> from panfpn_fast import PanopticFPN
            >>> Predictor(PanopticFPN(), device="cpu", short_edge=64).warm_up([(48, 64)])
        """
        checked = [int_pair(f"sizes[{i}]", size, 1) for i, size in enumerate(sizes)]
        for height, width in checked:
            self._predict([Photograph(np.zeros((height, width, 3), np.uint8), None)])

    # A str is also a sequence of str, so the overloads overlap. Type checkers use the first one that fits.
    @overload
    def __call__(self, image: Source, *, bgr: bool = False) -> PanopticResult: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, image: Sequence[Source], *, bgr: bool = False) -> list[PanopticResult]: ...

    def __call__(
        self, image: Source | Sequence[Source], *, bgr: bool = False
    ) -> PanopticResult | list[PanopticResult]:
        """Predicts one image, or several in one pass through the network.

        Args:
            image: A uint8 RGB array [H, W, 3], a uint8 RGB tensor [3, H, W], a PIL image, a path, or an address that
                begins with http:// or https://; or a list or tuple of these, or an array [N, H, W, 3] or a tensor
                [N, 3, H, W]. The EXIF orientation of files and PIL images is applied. Of a file with several frames,
                such as a GIF, the first one is predicted; `stream` predicts all.
            bgr: Whether arrays and tensors have the channels blue, green, red, as those that OpenCV reads. The result's
                image is RGB.

        Returns:
            A `PanopticResult` with the size of the upright image; a list of them, in order, for several images.

        Raises:
            TypeError: If an image has another type or dtype.
            ValueError: If the shape of an array is not [H, W, 3], or that of a tensor is not [3, H, W].
            OSError: If a file or an address cannot be read; the message names it.

        Note:
            Several images form one padded batch, so memory grows with their number; `stream` has bounded memory. As in
            detectron2, padding affects pixels near the borders of the smaller images, so results may differ slightly
            from those of single calls.
        """
        several = isinstance(image, list | tuple) or (
            isinstance(image, np.ndarray | Tensor) and not is_one_image(image)
        )
        if several:
            return self._predict([read_source(one, f"image[{i}]", bgr=bgr) for i, one in enumerate(image)])  # type: ignore[arg-type]
        # Raises the error for an unsupported type, with the same message as for an element of a list.
        return self._predict([read_source(image, bgr=bgr)])[0]  # type: ignore[arg-type]

    def stream(
        self, sources: Source | Iterable[Source | Photograph], batch_size: int = 1, *, bgr: bool = False
    ) -> Iterator[PanopticResult]:
        """Predicts any number of images one after the other, and holds only a few of them.

        Args:
            sources: One image as in a call, or what has a name and holds several: a folder, whose image files are
                predicted in the order of their names; a pattern such as "photos/**/*.jpg"; a GIF, TIFF, APNG, WebP or
                AVIF with several frames; a video; a camera, such as "camera:0"; or "-" for the paths in the standard
                input, one a line. Or any iterable of these, such as a list of paths, a generator of arrays, or
                `read_frames`. An image is read when its result is needed.
            batch_size: Images per pass through the network. 1 gives the same results as single calls.
            bgr: As in a call.

        Returns:
            An iterator over the results, in order. It holds the images of at most two batches. Each result has an image
            of its own, so `sources` may yield one array or tensor again and again with other pixels.

        Raises:
            TypeError, ValueError, OSError: As in a call, when the image's batch is reached; the iteration then ends.
            ValueError: If `batch_size` is below 1, or a folder or a pattern has no images; at once.
            OSError: If `sources` is a path that does not exist; at once.
            ImportError: If a video or a camera needs PyAV and it is not installed; the message has the command.

        Example:
            >>> from panfpn_fast import PanopticFPN
            >>> predictor = Predictor(PanopticFPN(), device="cpu", short_edge=64)  # untrained
            >>> frames = (np.full((48, 64, 3), grey, np.uint8) for grey in range(2))
            >>> [tuple(result.panoptic.shape) for result in predictor.stream(frames)]
            [(48, 64), (48, 64)]
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(f"batch_size: expected an integer, got {type(batch_size).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        return self._stream(photographs_of(sources, bgr), batch_size)

    def _stream(self, photographs: Iterator[Photograph], batch_size: int) -> Iterator[PanopticResult]:
        while batch := list(itertools.islice(photographs, batch_size)):
            yield from self._predict(batch)

    def _predict(self, photographs: list[Photograph]) -> list[PanopticResult]:
        if not photographs:
            return []
        images = [photograph.image for photograph in photographs]
        if self._graphs is not None and len(images) == 1:
            output = self._graphs(images[0])
            if output is not None:
                return [_to_result(output, self.categories, photographs[0])]
        inputs = [
            torch.from_numpy(resize_shortest_edge(image, self.short_edge, self.max_edge, self._resize))
            .permute(2, 0, 1)
            .contiguous()
            .to(self.device)
            for image in images
        ]
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        with torch.no_grad():  # autograd refuses the tensors that inference_mode makes
            # A network of another kind need not have the parameter.
            extra = {} if self.instances == "all" else {"instances": self.instances}
            outputs = self.model(inputs, sizes, **extra)
        return [
            _to_result(output, self.categories, photograph)
            for output, photograph in zip(outputs, photographs, strict=True)
        ]


@overload
def predict(
    source: Source | Iterable[Source | Photograph],
    weights: nn.Module | str | os.PathLike[str] = ...,
    *,
    stream: Literal[True],
    bgr: bool = ...,
    **predictor_arguments: Any,
) -> Iterator[PanopticResult]: ...


@overload
def predict(
    source: Source | Iterable[Source | Photograph],
    weights: nn.Module | str | os.PathLike[str] = ...,
    stream: Literal[False] = False,
    bgr: bool = ...,
    **predictor_arguments: Any,
) -> PanopticResult | list[PanopticResult]: ...


def predict(
    source: Source | Iterable[Source | Photograph],
    weights: nn.Module | str | os.PathLike[str] = DEFAULT_WEIGHTS,
    stream: bool = False,
    bgr: bool = False,
    **predictor_arguments: Any,
) -> PanopticResult | list[PanopticResult] | Iterator[PanopticResult]:
    """Predicts an image, or several, in one call.

    Args:
        source: What `Predictor.stream` takes: an image (array, tensor, PIL image, path, address), a folder, a pattern,
            a video, a camera, the standard input, or any iterable of these.
        weights: Path or name of a checkpoint, as `panfpn_fast.load` takes it, or a network. By default detectron2's
            published COCO network, which is downloaded once.
        stream: Whether to return an iterator, which predicts an image when its result is needed.
        bgr: Whether arrays and tensors have the channels blue, green, red, as those that OpenCV reads.
        **predictor_arguments: Other arguments of `Predictor`, such as `device="cuda"`.

    Returns:
        A `PanopticResult` for one image, or a list of them, in order, for a source of several. With `stream`, an
        iterator over the results in each case.

    Raises:
        TypeError, ValueError, OSError, ImportError: As `Predictor`, its call and `stream`; before the network is loaded
            if a path does not exist, or a folder or a pattern has no images.
        ValueError: If `source` is a camera without `stream`, which would never end.

    Note:
        Each call loads the network. Make a `Predictor` to predict more than once. A list of results holds all images; a
        long video needs `stream`.

    Example:
        >>> from panfpn_fast import PanopticFPN, predict
        >>> image = np.zeros((48, 64, 3), np.uint8)
        >>> result = predict(image, weights=PanopticFPN(), device="cpu", short_edge=64)  # untrained
        >>> result.panoptic.shape
        torch.Size([48, 64])
    """
    # Reports a wrong path before the network is loaded.
    photographs = photographs_of(source, bgr)
    one = is_one_image(source)
    if camera_number(source) is not None and not stream:
        raise ValueError(f"source: {source} never ends, so it has no list of results; pass stream=True")
    results = Predictor(weights, **predictor_arguments)._stream(photographs, 1)
    if stream:
        return results
    return next(results) if one else list(results)


def _to_result(output: PanopticOutput, categories: Categories, photograph: Photograph) -> PanopticResult:
    found = output.segments
    segments = []
    columns = (found.id, found.isthing, found.label, found.score, found.area, found.instance)
    for id_, isthing, label, score, area, instance in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        class_index = label if isthing else label - 1  # semantic label 0 is 'other'
        category = (categories.things if isthing else categories.stuff)[class_index]
        own = (score, area, instance) if isthing else (None, area, None)
        segments.append(Segment(id_, category.id, category.name, isthing, class_index, *own))
    instances = Instances(
        boxes=_host(output.boxes).float(),
        scores=_host(output.scores).float(),
        classes=_host(output.classes),
        mask_probs=_host(output.mask_probs).float(),
    )
    return PanopticResult(
        _host(output.panoptic), segments, instances, _host(output.semantic), categories, *photograph
    )


def _takes_instances(model: nn.Module) -> bool:
    found = inspect.signature(model.forward).parameters.values()
    return any(each.name == "instances" or each.kind is each.VAR_KEYWORD for each in found)


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _model_categories(model: Any) -> Categories:
    categories = getattr(getattr(model, "config", None), "categories", None)
    if not isinstance(model, nn.Module) or not isinstance(categories, Categories):
        raise TypeError(
            f"model: expected a PanopticFPN, or the path or name of a checkpoint, got {type(model).__name__}"
        )
    return categories
