"""Instance masks from the segmentations of COCO: polygons or run-length encoding (RLE)."""

from typing import Any, cast

import numpy as np

from ..errors import one_line
from .annotations import are_numbers


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The uint8 mask [H, W] of one object. Raises ValueError if the segmentation is invalid."""
    from faster_coco_eval.core import mask as coder

    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if is_polygon(polygon)]
        if not polygons:
            raise ValueError("has a segmentation without a polygon of at least three points")
        return coder.decode(coder.merge(cast(Any, coder.frPyObjects(polygons, height, width))))
    try:
        counts, size = segmentation["counts"], tuple(segmentation["size"])
        if size == (height, width):
            return coder.decode(coder.frPyObjects(segmentation, *size) if isinstance(counts, list) else segmentation)
    # the library raises RuntimeError for invalid RLE
    except (TypeError, KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"has a segmentation that is neither polygons nor RLE ({one_line(error)})") from error
    raise ValueError(f"has a mask of size {size}, but its image is {(height, width)}")


def is_polygon(polygon: Any) -> bool:
    """Whether `polygon` is a list of x and y of at least three points.

    The library reads four numbers as a box, and takes time proportional to the outline, so coordinates are limited.
    """
    return (
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and are_numbers(polygon, len(polygon))
    )
