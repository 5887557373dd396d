"""Pictures of what token mixers attended to.

`EXPLAINERS` maps a mixer's class to the function that draws it; a mixer without an entry is left out of the picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ...blocks import BiLevelRouting
from ..errors import UserError
from ..tasks.classify.augment import eval_transform, input_config
from ..tasks.classify.options import ClassifyData

EXAMPLES = 4  # images that are shown


Box = tuple[int, int, int, int]


Pixel = tuple[int, int]


@dataclass(frozen=True)
class Capture:
    """A mixer, the stage it ends (counted from 1) with that stage's stride, and the input it received."""

    stage: int
    stride: int
    mixer: nn.Module
    x: Tensor


def capture(model: nn.Module, images: Tensor) -> list[Capture]:
    """Run `images: [B, 3, H, W]` and return the last explainable mixer of each stage, if any, with its `[B, C, h, w]`.

    Stages and strides are those of timm's `feature_info`.
    """
    chosen: list[tuple[int, int, nn.Module]] = []
    for stage, info in enumerate(getattr(model, "feature_info", []), start=1):
        members = (module for name, module in model.named_modules() if name.startswith(f"{info['module']}."))
        explainable = [module for module in members if type(module) in EXPLAINERS]
        if explainable:
            chosen.append((stage, info["reduction"], explainable[-1]))

    inputs: dict[nn.Module, Tensor] = {}

    def remember(mixer: nn.Module, args: tuple[Tensor]) -> None:
        inputs[mixer] = args[0]

    hooks = [mixer.register_forward_pre_hook(remember) for _, _, mixer in chosen]
    try:
        # not inference_mode: what a mixer caches now must still serve training
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [Capture(stage, stride, mixer, inputs[mixer]) for stage, stride, mixer in chosen]


def region_boxes(n_win: int, map_size: tuple[int, int], stride: int, image_size: tuple[int, int]) -> list[Box]:
    """(left, top, right, bottom) in pixels of the n_win x n_win regions, row-major; sizes are (height, width).

    The regions tile the map after padding at the bottom and right; what lies beyond map or image is cut off, so a
    region of padding alone is an empty box.
    """
    rows, columns = (
        [min(i * -(-cells // n_win) * stride, cells * stride, pixels) for i in range(n_win + 1)]
        for cells, pixels in zip(map_size, image_size, strict=True)
    )
    return [
        (left, top, right, bottom)
        for top, bottom in zip(rows, rows[1:], strict=False)
        for left, right in zip(columns, columns[1:], strict=False)
    ]


def draw_routing(axes: Axes, picture: Tensor, seen: Capture, index: int, focus: Pixel) -> str:
    """Shade the regions that the region around `focus` was routed to (`BiLevelRouting`)."""
    mixer: Any = seen.mixer
    map_size, image_size = (seen.x.shape[2], seen.x.shape[3]), (picture.shape[0], picture.shape[1])
    boxes, (y, x) = region_boxes(mixer.n_win, map_size, seen.stride, image_size), focus
    # pixels that a stride dropped at the border belong to the last region before them
    full = (i for i, (left, top, right, bottom) in enumerate(boxes) if left < right and top < bottom)
    query = max(i for i in full if boxes[i][0] <= x and boxes[i][1] <= y)
    with torch.no_grad():
        routed = set(mixer.route(seen.x[index : index + 1])[0, query].tolist())

    def frame(region: int, **style: Any) -> None:
        left, top, right, bottom = boxes[region]
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, clip_on=False, **style))

    for region in range(len(boxes)):
        if region in routed:
            frame(region, facecolor="C0", alpha=0.55, linewidth=0)
        frame(region, fill=False, edgecolor="0.5", alpha=0.6, linewidth=0.4)
    frame(query, fill=False, edgecolor="C1", linewidth=2, joinstyle="miter", zorder=3)
    return f"{len(routed)} of {len(boxes)} regions"


# draws over the picture [H, W, 3] in `axes` what `seen.mixer` attended to at the pixel `focus` of image `index` of the
# batch, and returns a few words on how much that was
EXPLAINERS: dict[type[nn.Module], Callable[[Axes, Tensor, Capture, int, Pixel], str]] = {BiLevelRouting: draw_routing}


def focus_pixels(picture: Tensor) -> tuple[Pixel, Pixel]:
    """(y, x) of the subject and of the background in `picture: [H, W, 3]`.

    They are the centres of those sixteenths of the picture that differ most and least from its commonest grey.
    """
    grey = (picture.mean(-1) * 16).round()
    ink = F.adaptive_avg_pool2d((grey - grey.flatten().mode().values).abs()[None], 4)[0]
    height, width = grey.shape
    places = (divmod(int(place), 4) for place in (ink.argmax(), ink.argmin()))
    subject, background = (((2 * row + 1) * height // 8, (2 * column + 1) * width // 8) for row, column in places)
    return subject, background


def attention_figure(pictures: Sequence[Tensor], captures: Sequence[Capture]) -> Figure:
    """One row a picture `[H, W, 3]` in 0..1; one column a stage, for a query on the subject and one on the background.

    `captures` come from the batch of the same images, in the same order.
    """
    rows, stages, gap = len(pictures), len(captures), 0.2
    widths = [1, gap, *[1] * stages, gap, *[1] * stages]
    width, height = 1.3 * sum(widths), 1.37 * rows + 0.55
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.005, "bottom": 0.01, "right": 0.995, "top": 1 - 0.55 / height, "wspace": 0.06, "hspace": 0.06}
    grid = figure.add_gridspec(rows, len(widths), width_ratios=widths, **margins)

    def show(index: int, column: int, heading: str) -> Axes:
        axes = figure.add_subplot(grid[index, column])
        axes.set_axis_off()
        # the edges of pixels, not their centres, lie on whole numbers, where regions end
        axes.imshow(pictures[index].numpy(), extent=(0, pictures[index].shape[1], pictures[index].shape[0], 0))
        if index == 0:
            axes.annotate(heading, (0, 1), (0, 33), "axes fraction", "offset points", fontweight="bold")
        return axes

    for index, picture in enumerate(pictures):
        show(index, 0, "Image")
        subject, background = focus_pixels(picture)
        queries = (2, "A query on the subject", subject), (3 + stages, "A query on the background", background)
        for start, heading, focus in queries:
            for column, seen in enumerate(captures, start):
                axes = show(index, column, heading if column == start else "")
                words = EXPLAINERS[type(seen.mixer)](axes, picture, seen, index, focus)
                if index == 0:
                    axes.set_title(f"stage {seen.stage}\n{words}", fontsize="small", fontweight="normal", pad=7)
    return figure


def explain(model: Any, dataset: Any, data: ClassifyData) -> Callable[[], Figure]:
    """A function that draws what the mixers of `model` attend to in a few images of `dataset`, of different classes.

    Raises UserError if no mixer of the model can be explained.
    """
    examples: dict[int, Any] = {}
    for index in np.linspace(0, len(dataset) - 1, 8 * EXAMPLES, dtype=int):
        image, target = dataset[int(index)]
        examples.setdefault(target, image)
    transform, config = eval_transform(data, model.pretrained_cfg), input_config(data, model.pretrained_cfg)
    images = torch.stack([transform(examples[target]) for target in sorted(examples)[:EXAMPLES]])
    captures = capture(model, images)
    if not captures:
        raise UserError("the model has no mixer that can be explained")
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    return partial(attention_figure, [(image.permute(1, 2, 0) * std + mean).clamp(0, 1) for image in images], captures)
