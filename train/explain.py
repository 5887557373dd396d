"""Pictures of what token mixers attended to.

`EXPLAINERS` maps a mixer's class to the function that draws it; a mixer without an entry is left out of the picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ..blocks import BiLevelRouting

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
        with torch.inference_mode():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [Capture(stage, stride, mixer, inputs[mixer]) for stage, stride, mixer in chosen]


def region_boxes(n_win: int, map_size: tuple[int, int], stride: int, image_size: tuple[int, int]) -> list[Box]:
    """(left, top, right, bottom) in pixels of the n_win x n_win regions, row-major; sizes are (height, width).

    The regions tile the map after padding at the bottom and right; what lies beyond the image is cut off, so a region
    of padding alone is an empty box.
    """
    rows, columns = (
        [min(i * -(-cells // n_win) * stride, pixels) for i in range(n_win + 1)]
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
    height, width = picture.shape[:2]
    boxes = region_boxes(mixer.n_win, (seen.x.shape[2], seen.x.shape[3]), seen.stride, (height, width))
    y, x = focus
    query = next(i for i, (left, top, right, bottom) in enumerate(boxes) if left <= x < right and top <= y < bottom)
    with torch.inference_mode():
        routed = set(mixer.route(seen.x[index : index + 1])[0, query].tolist())

    def rectangle(region: int, **style: Any) -> None:
        left, top, right, bottom = boxes[region]
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))

    for region in range(len(boxes)):
        if region in routed:
            rectangle(region, facecolor="C0", alpha=0.55, linewidth=0)
        rectangle(region, fill=False, edgecolor="0.5", alpha=0.6, linewidth=0.4)
    rectangle(query, fill=False, edgecolor="C1", linewidth=2.2, joinstyle="miter")
    return f"{len(routed)} of {len(boxes)} regions"


# draws over the picture [H, W, 3] in `axes` what `seen.mixer` attended to at the pixel `focus` of image `index` of the
# batch, and returns a few words on how much that was
EXPLAINERS: dict[type[nn.Module], Callable[[Axes, Tensor, Capture, int, Pixel], str]] = {BiLevelRouting: draw_routing}


def focus_pixels(picture: Tensor) -> tuple[Pixel, Pixel]:
    """(y, x) where `picture: [H, W, 3]` stands out most from its own median, and where it does least."""
    grey = picture.mean(-1)
    cell = max(1, min(grey.shape) // 8)
    ink = F.avg_pool2d((grey - grey.median()).abs()[None], cell)[0]

    def centre(flat: Tensor) -> Pixel:
        row, column = divmod(int(flat), ink.shape[1])
        return row * cell + cell // 2, column * cell + cell // 2

    return centre(ink.argmax()), centre(ink.argmin())


def attention_figure(pictures: Sequence[Tensor], captures: Sequence[Capture]) -> Figure:
    """One row a picture `[H, W, 3]` in 0..1; one column a stage, for a query on the subject and one on the background.

    `captures` come from the batch of the same images, in the same order.
    """
    stages = len(captures)
    figure = Figure(figsize=(1.15 * (1 + 2 * stages), 1.2 * len(pictures) + 0.6), layout="constrained")
    parts = figure.subfigures(1, 3, width_ratios=[1, stages, stages], wspace=0.03)
    grids = [part.subplots(len(pictures), n, squeeze=False) for part, n in zip(parts, (1, stages, stages), strict=True)]
    for part, title in zip(parts, ("image", "a query on the subject", "a query on the background"), strict=True):
        part.suptitle(title)
    for index, picture in enumerate(pictures):
        for grid in grids:
            for axes in grid[index]:
                axes.imshow(picture.numpy(), interpolation="nearest")
                axes.set_axis_off()
        for grid, focus in zip(grids[1:], focus_pixels(picture), strict=True):
            for axes, seen in zip(grid[index], captures, strict=True):
                words = EXPLAINERS[type(seen.mixer)](axes, picture, seen, index, focus)
                if index == 0:
                    axes.set_title(f"stage {seen.stage}\n{words}", fontsize="x-small")
    return figure
