"""Pictures of detections: boxes, class names, scores and masks, ground truth beside prediction."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import nms
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

# distinguishable with color blindness, on light and dark ground (Okabe & Ito, 2008)
COLORS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
Box = Sequence[float]  # x1, y1, x2, y2
MIN_SCORE = 0.3  # of a drawn prediction
INSIDE = 8  # times the area of its name: a box at least so large may have it inside
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
        for mask, color in zip(masks, colors, strict=True):  # together, they would be black where they overlap
            canvas = draw_segmentation_masks(canvas, mask, alpha=0.5, colors=color)
    names = [classes[labels[number]] for number in chosen]
    if "scores" in objects:
        names = [f"{name} {objects['scores'][number]:.2f}" for name, number in zip(names, chosen, strict=True)]
    side = min(canvas.shape[-2:])
    drawn = draw_bounding_boxes(canvas, boxes[chosen], colors=list(colors), width=max(2, side // 120))
    return write_names(drawn, boxes[chosen].tolist(), names, colors)


def write_names(canvas: Tensor, boxes: Sequence[Box], names: Sequence[str], colors: Sequence[str]) -> Tensor:
    """The image with the name of each box beside it, where it hides no small box and no other name.

    A large box may have its name in its own upper left corner. A name without such a place is left out; the color of
    the box still says its class. canvas: uint8 [3, H, W].
    """
    image = to_pil_image(canvas)
    pen, side = ImageDraw.Draw(image), min(image.size)
    font = ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), max(12, side // 16))
    taken: list[Box] = []
    # large objects last: they have room for their name inside
    for number in sorted(range(len(boxes)), key=lambda n: _area(boxes[n])):
        left, top, right, bottom = boxes[number]
        _, _, width, height = pen.textbbox((2, 1), names[number], font=font, anchor="lt")
        width, height = width + 2, height + 3
        corners = [(left, top - height), (left, bottom), (right, top), (left - width, top)]
        # a large object is not hidden by a name on it
        large = INSIDE * width * height
        others = [*taken, *(box for box in [*boxes[:number], *boxes[number + 1 :]] if _area(box) <= large)]
        if _area(boxes[number]) > large:
            corners.append((left, top))
        for x, y in corners:
            x = min(max(x, 0), max(0, image.width - width))
            place = (x, y, x + width, y + height)
            inside = y >= 0 and place[3] <= image.height
            hidden = (x, y) != (left, top) and _overlap(place, boxes[number])
            if inside and not hidden and not any(_overlap(place, other) for other in others):
                pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colors[number])
                pen.text((x + 2, y + 1), names[number], fill="black", font=font, anchor="lt")
                taken.append(place)
                break
    return pil_to_tensor(image)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(one: Box, other: Box) -> bool:
    """Whether two boxes have more in common than an edge of a pixel."""
    return min(one[2], other[2]) - max(one[0], other[0]) > 1 and min(one[3], other[3]) - max(one[1], other[1]) > 1


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
