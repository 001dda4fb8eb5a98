"""Draws annotated images as predictions are drawn."""

from __future__ import annotations

import numpy as np
from PIL import Image

from panfpn_fast.data.categories import Categories
from panfpn_fast.data.sample import Sample
from panfpn_fast.inference.drawing import draw_panoptic


def draw_sample(sample: Sample, categories: Categories, enlarge: int = 1) -> Image.Image:
    """Draws the annotation of an image over it: colors, outlines and class names.

    Args:
        sample: The annotated image.
        categories: The classes of its data set.
        enlarge: Factor on height and width.

    Returns:
        An RGB picture.
    """
    image = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy()).repeat(enlarge, 0).repeat(enlarge, 1)
    segments = sample.segments.numpy().repeat(enlarge, 0).repeat(enlarge, 1)
    return draw_panoptic(image, segments, list(enumerate(sample.classes(categories), 1)))
