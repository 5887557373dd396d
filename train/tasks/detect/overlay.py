"""Boxes, classes, scores and masks drawn into an image."""

from pathlib import Path

import torch
from matplotlib import get_data_path
from PIL import Image
from torch import Tensor
from torchvision.ops import nms
from torchvision.transforms.v2.functional import to_dtype, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

# distinct colours on light and dark ground (Okabe & Ito, 2008)
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]


SHOWN = 0.3  # the least score of what is drawn


SAME = 0.5  # overlap (IoU) from which two predictions are of one place


def drawn(image: Tensor, found: dict[str, Tensor], classes: list[str]) -> Tensor:
    """image: [3, H, W] in 0..1; found: boxes, labels, maybe scores and masks. -> uint8 [3, H, W]

    Of predictions one box is shown where several classes claim the same place, and the surest one on top.
    """
    canvas, (boxes, labels) = to_dtype(image, torch.uint8, scale=True), (found["boxes"], found["labels"].tolist())
    chosen = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:, 0]
    if "scores" in found:
        sure = chosen[found["scores"][chosen] >= SHOWN]
        chosen = sure[nms(boxes[sure], found["scores"][sure], SAME)].flip(0)
    if not len(chosen):
        return canvas
    colours = [COLOURS[labels[number] % len(COLOURS)] for number in chosen]
    if "masks" in found:
        masks = (found["masks"][chosen].reshape(-1, *canvas.shape[-2:]) > 0.5).bool()
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.5, colors=list(colours))
    names = [classes[labels[number]] for number in chosen]
    if "scores" in found:
        names = [f"{name} {found['scores'][number]:.2f}" for name, number in zip(names, chosen, strict=True)]
    side = min(canvas.shape[-2:])
    return draw_bounding_boxes(
        canvas,
        boxes[chosen],
        labels=names,
        colors=list(colours),
        width=max(2, side // 200),
        font=str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")),
        font_size=max(11, side // 40),
        label_colors="black",
        label_background_colors=list(colours),
        fill_labels=True,
    )


def side_by_side(image: Tensor, target: dict[str, Tensor], found: dict[str, Tensor], classes: list[str]) -> Image.Image:
    """Ground truth on the left, prediction on the right; a small image is enlarged first, so that words fit in."""
    factor = max(1, 320 // max(image.shape[-2:]))
    halves = []
    for what in (target, found):
        grown = {**what, "boxes": what["boxes"] * factor}
        if "masks" in what:
            grown["masks"] = _grown(what["masks"].reshape(-1, *image.shape[-2:]), factor)
        halves.append(drawn(_grown(image, factor), grown, classes))
    gap = torch.full((3, halves[0].shape[1], 4), 255, dtype=torch.uint8)
    return to_pil_image(torch.cat([halves[0], gap, halves[1]], dim=2))


def _grown(pixels: Tensor, factor: int) -> Tensor:
    return pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
