"""Draws what a network has learned: images, annotations and predictions side by side."""

from __future__ import annotations

import numpy as np
from PIL import Image

from panfpn_fast.data.files import DataError
from panfpn_fast.data.loader import PanopticDataset
from panfpn_fast.data.sample import Sample
from panfpn_fast.inference import Predictor
from panfpn_fast.inference.annotations import draw_sample
from panfpn_fast.inference.drawing import draw_panoptic

_EDGE = 384
"""Pixels of the longer edge of a picture. Smaller images are enlarged by a whole factor, as far as they stay below."""


def gallery(
    predictor: Predictor, dataset: PanopticDataset, count: int, skip_bad: bool = False
) -> Image.Image:
    """Draws the first images of a data set, one in a row: the image, its annotation and the prediction.

    Args:
        predictor: Predictor of a network with the classes of the data set.
        dataset: Annotated images.
        count: Largest number of rows.
        skip_bad: Whether images that cannot be read are left out.

    Returns:
        An RGB picture with three columns. It has one pixel if there is no image.

    Raises:
        DataError, OSError: If an image cannot be read; the message names the file.
    """
    rows = []
    for index in range(min(count, len(dataset))):
        try:
            sample = dataset.load(index)
        except (DataError, OSError):
            if not skip_bad:
                raise
            continue
        rows.append(_row(predictor, dataset, sample))
    width = max((row[0].width for row in rows), default=0)
    sheet = Image.new("RGB", (max(1, 3 * width), max(1, sum(row[0].height for row in rows))))
    top = 0
    for row in rows:
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * width, top))
        top += row[0].height
    return sheet


def _row(predictor: Predictor, dataset: PanopticDataset, sample: Sample) -> list[Image.Image]:
    image = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
    enlarge = max(1, _EDGE // max(sample.size))
    result = predictor(image)
    large = image.repeat(enlarge, 0).repeat(enlarge, 1)
    found = [(segment.id, result.category(segment)) for segment in result.segments]
    ids = result.panoptic.numpy().repeat(enlarge, 0).repeat(enlarge, 1)
    truth, prediction = draw_sample(sample, dataset.categories, enlarge), draw_panoptic(large, ids, found)
    pictures = [Image.fromarray(large), truth, prediction]
    for picture in pictures:
        picture.thumbnail((_EDGE, _EDGE))  # only makes it smaller
    return pictures
