"""Attention maps: pictures of the regions that token mixers attended to.

`ATTENTION_DRAWERS` maps the class of a mixer to the function that draws it. Mixers of other classes are not drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from ..tasks.classify.augment import Normalizer, eval_transform, input_config
from ..tasks.classify.options import ClassifyData

EXAMPLES = 4  # images that are drawn

Box = tuple[int, int, int, int]  # left, top, right, bottom
Pixel = tuple[int, int]  # y, x


@dataclass(frozen=True)
class CapturedMixer:
    """A mixer and the input `x: [B, C, h, w]` it received in a forward.

    stage: counted from 1; stride: of the stage, so that a cell of `x` is `stride` x `stride` pixels of the image.
    """

    stage: int
    stride: int
    mixer: nn.Module
    x: Tensor


def capture(model: nn.Module, images: Tensor) -> list[CapturedMixer]:
    """Run the model on `images: [B, 3, H, W]`; return the last mixer of each stage that can be drawn, with its input.

    Stages and strides are those of timm's `feature_info`. A stage without such a mixer is left out.
    """
    chosen: list[tuple[int, int, nn.Module]] = []
    for stage, info in enumerate(getattr(model, "feature_info", []), start=1):
        members = (module for name, module in model.named_modules() if name.startswith(f"{info['module']}."))
        drawable = [module for module in members if type(module) in ATTENTION_DRAWERS]
        if drawable:
            chosen.append((stage, info["reduction"], drawable[-1]))

    inputs: dict[nn.Module, Tensor] = {}

    def remember(mixer: nn.Module, args: tuple[Tensor]) -> None:
        inputs[mixer] = args[0]

    hooks = [mixer.register_forward_pre_hook(remember) for _, _, mixer in chosen]
    try:
        # not inference_mode: tensors that a mixer caches in it could not be used in training later
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [CapturedMixer(stage, stride, mixer, inputs[mixer]) for stage, stride, mixer in chosen]


def region_boxes(n_win: int, map_size: tuple[int, int], stride: int, image_size: tuple[int, int]) -> list[Box]:
    """Boxes, in image pixels, of the n_win x n_win regions of a feature map, row by row; sizes are (height, width).

    The regions divide the map after it is padded at the bottom and right. Boxes are clipped to map and image, so a
    region that consists of padding has an empty box.
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


def draw_routing(axes: Axes, picture: Tensor, captured: CapturedMixer, index: int, focus: Pixel) -> str:
    """Outline the region around `focus` and shade the regions it was routed to (for `BiLevelRouting`)."""
    mixer: Any = captured.mixer
    map_size, image_size = (captured.x.shape[2], captured.x.shape[3]), (picture.shape[0], picture.shape[1])
    boxes, (y, x) = region_boxes(mixer.n_win, map_size, captured.stride, image_size), focus
    # pixels beyond the last cell, which a strided convolution dropped, count as part of the last region
    full = (i for i, (left, top, right, bottom) in enumerate(boxes) if left < right and top < bottom)
    query = max(i for i in full if boxes[i][0] <= x and boxes[i][1] <= y)
    with torch.no_grad():
        routed = set(mixer.route(captured.x[index : index + 1])[0, query].tolist())

    def frame(region: int, **style: Any) -> None:
        left, top, right, bottom = boxes[region]
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, clip_on=False, **style))

    for region in range(len(boxes)):
        if region in routed:
            frame(region, facecolor="C0", alpha=0.55, linewidth=0)
        frame(region, fill=False, edgecolor="0.5", alpha=0.6, linewidth=0.4)
    frame(query, fill=False, edgecolor="C1", linewidth=2, joinstyle="miter", zorder=3)
    return f"{len(routed)} of {len(boxes)} regions"


# (axes, picture [H, W, 3], captured mixer, index of the image in the batch, focus) -> caption: draws, over the picture
# in `axes`, what the mixer attended to from the pixel `focus`; the caption says how much that is
ATTENTION_DRAWERS: dict[type[nn.Module], Callable[[Axes, Tensor, CapturedMixer, int, Pixel], str]] = {
    BiLevelRouting: draw_routing
}


def focus_pixels(picture: Tensor) -> tuple[Pixel, Pixel]:
    """A pixel on the subject and one on the background of `picture: [H, W, 3]`.

    The picture is divided into 4 x 4 cells. The pixels are the centers of the cells that differ most and least from the
    most frequent gray value of the picture.
    """
    gray = (picture.mean(-1) * 16).round()
    difference = F.adaptive_avg_pool2d((gray - gray.flatten().mode().values).abs()[None], 4)[0]
    height, width = gray.shape
    cells = (divmod(int(cell), 4) for cell in (difference.argmax(), difference.argmin()))
    subject, background = (((2 * row + 1) * height // 8, (2 * column + 1) * width // 8) for row, column in cells)
    return subject, background


def attention_figure(pictures: Sequence[Tensor], captures: Sequence[CapturedMixer]) -> Figure:
    """A row per picture, a column per stage: first for a query on the subject, then for one on the background.

    pictures: [H, W, 3] in 0..1; captures: of the batch of these images, in the same order.
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
        # this extent puts the edges of pixels, not their centers, on whole numbers, as in `region_boxes`
        axes.imshow(pictures[index].numpy(), extent=(0, pictures[index].shape[1], pictures[index].shape[0], 0))
        if index == 0:
            axes.annotate(heading, (0, 1), (0, 33), "axes fraction", "offset points", fontweight="bold")
        return axes

    for index, picture in enumerate(pictures):
        show(index, 0, "Image")
        subject, background = focus_pixels(picture)
        queries = (2, "A query on the subject", subject), (3 + stages, "A query on the background", background)
        for start, heading, focus in queries:
            for column, captured in enumerate(captures, start):
                axes = show(index, column, heading if column == start else "")
                caption = ATTENTION_DRAWERS[type(captured.mixer)](axes, picture, captured, index, focus)
                if index == 0:
                    axes.set_title(f"stage {captured.stage}\n{caption}", fontsize="small", fontweight="normal", pad=7)
    return figure


def capture_examples(model: Any, dataset: Any, data: ClassifyData) -> tuple[list[Tensor], list[CapturedMixer]]:
    """Pictures and captures for `attention_figure`, from up to `EXAMPLES` images of different classes of `dataset`.

    Raises UserError if the model has no mixer that can be drawn.
    """
    examples: dict[int, Any] = {}
    for index in np.linspace(0, len(dataset) - 1, 8 * EXAMPLES, dtype=int):
        image, target = dataset[int(index)]
        examples.setdefault(target, image)
    transform, config = eval_transform(data, model.pretrained_cfg), input_config(data, model.pretrained_cfg)
    pixels = torch.stack([transform(examples[target]) for target in sorted(examples)[:EXAMPLES]])
    captures = capture(model, Normalizer(config, pixels.device)(pixels))
    if not captures:
        raise UserError("the model has no token mixer whose attention can be drawn")
    return [image.permute(1, 2, 0) / 255 for image in pixels], captures
