"""Masks of objects out of the words of COCO's annotations: polygons, or run lengths."""

from typing import Any, cast

import numpy as np

from ..errors import one_line
from .annotations import are_numbers


def decoded(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask [H, W] of an object in an image of this size. Raises ValueError saying why there is none."""
    from faster_coco_eval.core import mask as coder

    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if is_polygon(polygon)]
        if not polygons:
            raise ValueError("has a segmentation without a polygon of three points or more")
        return coder.decode(coder.merge(cast(Any, coder.frPyObjects(polygons, height, width))))
    try:
        counts, size = segmentation["counts"], tuple(segmentation["size"])
        if size == (height, width):
            return coder.decode(coder.frPyObjects(segmentation, *size) if isinstance(counts, list) else segmentation)
    # the coder's own error is a RuntimeError
    except (TypeError, KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"has a segmentation that is neither polygons nor RLE ({one_line(error)})") from error
    raise ValueError(f"has a mask of {size}, its image is {(height, width)}")


def is_polygon(polygon: Any) -> bool:
    """Whether these are x and y of three points or more: COCO's tools take four numbers for a box.

    Points far outside of any image are none: the tools walk the outline pixel by pixel.
    """
    return (
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and are_numbers(polygon, len(polygon))
    )
