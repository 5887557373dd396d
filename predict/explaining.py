"""What the token mixers of a classifier do with an image, as a picture."""

from typing import Any

import torch
from matplotlib.figure import Figure

from ..train.errors import UserError
from ..train.report.attention_maps import attention_figure, capture
from .images import open_image
from .predictor import Predictor


def explain_image(predictor: Predictor, image: Any, query: tuple[float, float] | None = None) -> Figure:
    """For each stage, what its last token mixer takes from where: attention, regions, gates or its receptive field.

    image: as `Predictor.predict` takes it. query: the place that is asked about, (down, right) as fractions of the
    prepared image; None: one on the subject, and one on the background. Raises UserError for a model that has no token
    mixer of tessel or is no classifier of images with three channels.
    """
    model: Any = predictor.model
    network = getattr(model.network, "module", None)
    if predictor.task not in ("classify", "multilabel") or network is None or model.pixel_format.channels != 3:
        raise UserError(f"{predictor.name} cannot be explained: give a classifier of color images, or its run")
    _, picture = open_image(image, 0, model.pixel_format)
    pixels = model.transform(picture)
    # on the CPU: one image, and mixers that explain themselves in float32
    captures = capture(network.cpu(), model.normalize(pixels[None]))
    if not captures:
        raise UserError(f"{predictor.name} has no token mixer of tessel, which could be explained")
    height, width = pixels.shape[1:]
    chosen = None if query is None else (min(int(query[0] * height), height - 1), min(int(query[1] * width), width - 1))
    return attention_figure([pixels.permute(1, 2, 0) / torch.iinfo(torch.uint8).max], captures, chosen)
