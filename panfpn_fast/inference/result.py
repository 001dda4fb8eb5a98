"""What a prediction is: the panoptic map, its segments, and the two branches' own outputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from panfpn_fast.data import Category, get_categories
from panfpn_fast.inference.preprocess import ImageSource, to_rgb_array
from panfpn_fast.inference.visualize import draw_panoptic

__all__ = ["Instances", "PanopticResult", "Segment"]


@dataclass(frozen=True)
class Segment:
    """One region of a panoptic map: a thing instance, or all pixels of one stuff class.

    Attributes:
        id: The value of its pixels in `PanopticResult.panoptic`, from 1.
        category_id: The data set's own id of its class (COCO panoptic: 1..200).
        name: The data set's own name of its class.
        isthing: True for an instance of a thing, False for stuff.
        class_index: Position of its class among the things, or among the stuff, from 0.
        score: Confidence of the detection, 0..1; 0.0 for stuff, which has none.
        area: Number of its pixels in the map, at least 1.
    """

    id: int
    category_id: int
    name: str
    isthing: bool
    class_index: int
    score: float
    area: int


@dataclass(frozen=True, eq=False)
class Instances:
    """What the instance branch found before merging, by descending score; N may be 0.

    Attributes:
        boxes: float32 [N, 4], x1, y1, x2, y2 in pixels of the image as given.
        scores: float32 [N], 0..1.
        classes: int64 [N], position among the things.
        mask_probs: float32 [N, 28, 28], the mask within its box, 0..1.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    mask_probs: Tensor

    def __len__(self) -> int:
        """Number of instances."""
        return self.boxes.shape[0]


@dataclass(frozen=True, eq=False, repr=False)
class PanopticResult:
    """The prediction for one image; all tensors are on the CPU.

    Attributes:
        panoptic: int32 [H, W] at the image's own size: segment ids, 0 = void.
        segments: One `Segment` per id in `panoptic`: things by descending score, then stuff by class.
        instances: What the instance branch found, also what merging dropped.
        semantic: uint8 [H, W] label map of the semantic branch: 0 = 'other' (things), i + 1 = stuff class i.
        dataset: Which categories the segments speak of, a name for `panfpn_fast.data.get_categories`.
    """

    panoptic: Tensor
    segments: list[Segment]
    instances: Instances
    semantic: Tensor
    dataset: str = "coco_panoptic"

    def category(self, segment: Segment) -> Category:
        """Returns the class of a segment, with the data set's colour."""
        categories = get_categories(self.dataset)
        return (categories.things if segment.isthing else categories.stuff)[segment.class_index]

    def summary(self) -> str:
        """Says in one line what was found: "3 person, 1 dog, sky, grass"; stuff by descending area."""
        things = Counter(self.category(s).display_name for s in self.segments if s.isthing)
        stuff = sorted((s for s in self.segments if not s.isthing), key=lambda s: -s.area)
        parts = [f"{count} {name}" for name, count in things.most_common()]
        parts += dict.fromkeys(self.category(s).display_name for s in stuff)
        return ", ".join(parts) or "nothing"

    def draw(self, image: ImageSource, *, opacity: float = 0.5, labels: bool = True) -> Image.Image:
        """Draws the segments over their image: colours, outlines and class names.

        Args:
            image: The image that was predicted: uint8 RGB array [H, W, 3], PIL image or path.
            opacity: How much the colours cover the photograph, 0..1.
            labels: Whether to write class names.

        Returns:
            An RGB picture of the image's size.

        Raises:
            ValueError: If the image has another size than the panoptic map, or `opacity` is outside 0..1.

        Note:
            Deterministic. Void pixels show the photograph. Instances of one class get shades of its colour.
        """
        segments = [(segment.id, self.category(segment)) for segment in self.segments]
        return draw_panoptic(
            to_rgb_array(image), self.panoptic.cpu().numpy(), segments, opacity=opacity, labels=labels
        )

    def __repr__(self) -> str:
        """Size and contents; the tensors would fill the screen."""
        height, width = self.panoptic.shape
        return f"PanopticResult({height} x {width}: {self.summary()})"
