"""From images to panoptic results: reading, resizing, the network, and the data set's names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from panfpn_fast._device import check_device
from panfpn_fast.data import Categories, get_categories
from panfpn_fast.inference.preprocess import ImageSource, resize_shortest_edge, resized_shape, to_rgb_array
from panfpn_fast.inference.result import Instances, PanopticResult, Segment

if TYPE_CHECKING:
    from panfpn_fast.models.panoptic_fpn import PanopticOutput

__all__ = ["Predictor"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Predictor:
    """Predicts panoptic segmentations of images of any size.

    Images are resized to `short_edge` (never beyond `max_edge`), go through the network, and the results come
    back at the images' own sizes.

    Args:
        model: A `PanopticFPN`, or a module with the same `forward` and `config`. It is put in evaluation mode
            and moved to `device` in place. What predicts shares its weights but for those of a ResNet with batch
            norms, which are copied as they are now, folded: make another predictor after training on.
        device: Where to run, such as "cuda:0" or "cpu"; by default a CUDA GPU if there is one, else the CPU.
        dtype: What the model's weights are converted to, in place: torch.float32, torch.bfloat16 or
            torch.float16. None leaves them as they are.
        short_edge: Length that the image's shorter edge is resized to, in pixels.
        max_edge: Limit for the longer edge, in pixels.

    Raises:
        TypeError: If `model` is not such a module, or `device` or `dtype` is of another kind.
        ValueError: If the device is not there, the dtype is not one of the three, an edge is not positive, or
            the model's class counts are not those of its data set.

    Note:
        `short_edge=800, max_edge=1333` are detectron2's and mmdetection's test settings; the filter is the one that the
        model's configuration says, `resize`.

    Example:
        >>> from panfpn_fast import PanopticFPN
        >>> predictor = Predictor(PanopticFPN(), device="cpu", short_edge=64)  # untrained
        >>> predictor(np.zeros((48, 64, 3), np.uint8)).panoptic.shape
        torch.Size([48, 64])
    """

    def __init__(
        self,
        model: nn.Module,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        short_edge: int = 800,
        max_edge: int = 1333,
    ) -> None:
        self.categories = _model_categories(model)
        self.device = check_device(device)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype or None, got {type(dtype).__name__}")
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        resized_shape(1, 1, short_edge, max_edge)  # refuses bad edges now rather than at the first image
        self.short_edge = short_edge
        self.max_edge = max_edge
        self._resize = getattr(model.config, "resize", "detectron2")
        from panfpn_fast.models.fusion import for_prediction  # whose package needs this one

        # Folded before weights are rounded to dtype.
        self.model = for_prediction(model.eval())
        for network in (model, self.model):
            network.to(device=self.device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The branches that the network has: "instance", "semantic" or both."""
        return getattr(self.model.config, "tasks", ("instance", "semantic"))

    # A str is a sequence of str, so the two overlap; type checkers take the first that fits.
    @overload
    def __call__(self, image: ImageSource) -> PanopticResult: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, image: Sequence[ImageSource]) -> list[PanopticResult]: ...

    def __call__(self, image: ImageSource | Sequence[ImageSource]) -> PanopticResult | list[PanopticResult]:
        """Predicts one image, or several in one pass through the network.

        Args:
            image: A uint8 RGB array [H, W, 3], a PIL image or a path; or a list or tuple of these, or an
                array [N, H, W, 3]. Files and PIL images are turned upright by their EXIF orientation.

        Returns:
            A `PanopticResult` at the (upright) image's own size; for several images a list in their order.

        Raises:
            TypeError: If an image is of another kind or dtype.
            ValueError: If an array's shape is not [H, W, 3].
            OSError: If a file cannot be read; the message names it.

        Note:
            Several images share one padded batch, so memory grows with their number. Padding reaches into the
            borders of the smaller ones, as in detectron2, so their results may differ slightly from those of
            single calls.
        """
        if isinstance(image, (str, os.PathLike, Image.Image)):
            return self._predict([to_rgb_array(image)])[0]
        if isinstance(image, np.ndarray) and image.ndim != 4:
            return self._predict([to_rgb_array(image)])[0]
        if isinstance(image, (list, tuple, np.ndarray)):
            return self._predict([to_rgb_array(one, f"image[{i}]") for i, one in enumerate(image)])
        # An unsupported kind: the same message as for an element.
        return self._predict([to_rgb_array(image)])  # type: ignore[arg-type]

    def _predict(self, images: list[npt.NDArray[np.uint8]]) -> list[PanopticResult]:
        if not images:
            return []
        inputs = [
            torch.from_numpy(resize_shortest_edge(image, self.short_edge, self.max_edge, self._resize))
            .permute(2, 0, 1)
            .contiguous()
            .to(self.device)
            for image in images
        ]
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        with torch.inference_mode():
            outputs = self.model(inputs, sizes)
        return [_to_result(output, self.categories) for output in outputs]


def _to_result(output: PanopticOutput, categories: Categories) -> PanopticResult:
    found = output.segments
    segments = []
    for id_, isthing, label, score, area in zip(
        *(column.tolist() for column in (found.id, found.isthing, found.label, found.score, found.area)),
        strict=True,
    ):
        class_index = label if isthing else label - 1  # semantic label 0 is 'other'
        category = (categories.things if isthing else categories.stuff)[class_index]
        segments.append(Segment(id_, category.id, category.name, isthing, class_index, score, area))
    instances = Instances(
        boxes=_host(output.boxes).float(),
        scores=_host(output.scores).float(),
        classes=_host(output.classes),
        mask_probs=_host(output.mask_probs).float(),
    )
    return PanopticResult(
        _host(output.panoptic), segments, instances, _host(output.semantic), dataset=categories.name
    )


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _model_categories(model: Any) -> Categories:
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "dataset"):
        hint = (
            "; panfpn_fast.load makes one from a path or name"
            if isinstance(model, (str, os.PathLike))
            else ""
        )
        raise TypeError(f"model: expected a PanopticFPN, got {type(model).__name__}{hint}")
    categories = get_categories(config.dataset)
    expected = (len(categories.things), len(categories.stuff))
    if (config.num_things, config.num_stuff) != expected:
        raise ValueError(
            f"model: expected {expected[0]} things and {expected[1]} stuff classes, as its data set "
            f"{config.dataset!r} has, got {config.num_things} and {config.num_stuff}"
        )
    return categories
