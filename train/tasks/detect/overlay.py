"""Pictures of detections: boxes, class names, scores and masks, ground truth beside prediction."""

from pathlib import Path

import torch
from matplotlib import get_data_path
from PIL import Image
from torch import Tensor
from torchvision.ops import nms
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

# distinguishable with color blindness, on light and dark ground (Okabe & Ito, 2008)
COLORS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
MIN_SCORE = 0.3  # of a drawn prediction
NMS_IOU = 0.5  # of predictions of any class, of which only the one with the highest score is drawn


def draw_objects(
    image: Tensor, objects: dict[str, Tensor], classes: list[str], *, min_score: float = MIN_SCORE
) -> Tensor:
    """The image with its objects, uint8 [3, H, W].

    image: uint8 [3, H, W]; objects: boxes [N, 4], labels [N] and, if given, scores [N] and masks [N, 1, H, W].
    Predictions, which have scores, are filtered by `min_score` and non-maximum suppression over all classes; those with
    high scores are drawn last.
    """
    canvas = image
    boxes, labels = objects["boxes"], objects["labels"].tolist()
    chosen = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:, 0]
    if "scores" in objects:
        confident = chosen[objects["scores"][chosen] >= min_score]
        chosen = confident[nms(boxes[confident], objects["scores"][confident], NMS_IOU)].flip(0)
    if not len(chosen):
        return canvas
    colors = [COLORS[labels[number] % len(COLORS)] for number in chosen]
    if "masks" in objects:
        masks = (objects["masks"][chosen].reshape(-1, *canvas.shape[-2:]) > 0.5).bool()
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.5, colors=list(colors))
    names = [classes[labels[number]] for number in chosen]
    if "scores" in objects:
        names = [f"{name} {objects['scores'][number]:.2f}" for name, number in zip(names, chosen, strict=True)]
    side = min(canvas.shape[-2:])
    return draw_bounding_boxes(
        canvas,
        boxes[chosen],
        labels=names,
        colors=list(colors),
        width=max(2, side // 200),
        font=str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")),
        font_size=max(11, side // 40),
        label_colors="black",
        label_background_colors=list(colors),
        fill_labels=True,
    )


def side_by_side(
    image: Tensor, target: dict[str, Tensor], prediction: dict[str, Tensor], classes: list[str]
) -> Image.Image:
    """Ground truth on the left, prediction on the right. A small image is enlarged first, so that text fits in."""
    factor = max(1, 320 // max(image.shape[-2:]))
    panels = []
    for objects in (target, prediction):
        enlarged = {**objects, "boxes": objects["boxes"] * factor}
        if "masks" in objects:
            enlarged["masks"] = _enlarge(objects["masks"].reshape(-1, *image.shape[-2:]), factor)
        panels.append(draw_objects(_enlarge(image, factor), enlarged, classes))
    gap = torch.full((3, panels[0].shape[1], 4), 255, dtype=torch.uint8)
    return to_pil_image(torch.cat([panels[0], gap, panels[1]], dim=2))


def _enlarge(pixels: Tensor, factor: int) -> Tensor:
    """[..., H, W] with each pixel repeated `factor` times in both directions."""
    return pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
