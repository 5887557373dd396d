"""Pictures of what token mixers did with an image: what the last mixer of each stage explains of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ...blocks import explain
from ...blocks.registry import token_mixers
from ..errors import UserError
from ..tasks.classify.augment import Normalizer, eval_transform, input_config
from ..tasks.classify.options import ClassifyData

EXAMPLES = 4  # images that are drawn

Pixel = tuple[int, int]  # y, x


@dataclass(frozen=True)
class CapturedMixer:
    """A mixer and the input `x: [B, C, h, w]` it received in a forward.

    stage: counted from 1; stride: a position of `x` is `stride` x `stride` pixels of the image.
    """

    stage: int
    stride: int
    mixer: nn.Module
    x: Tensor


def capture(model: nn.Module, images: Tensor) -> list[CapturedMixer]:
    """Run the model on `images: [B, 3, H, W]`; return the last token mixer of each class in each stage, and its input.

    Stages are those of timm's `feature_info`. Mixers that are called with more than a map, such as a class token, are
    left out, and so are stages without a mixer.
    """
    mixers, chosen = token_mixers(model), []
    for stage, info in enumerate(getattr(model, "feature_info", []), start=1):
        members = [mixer for path, mixer in mixers.items() if path.startswith(f"{info['module']}.")]
        chosen += [(stage, mixer) for mixer in {type(mixer): mixer for mixer in members}.values()]

    inputs: dict[nn.Module, Tensor] = {}

    def remember(mixer: nn.Module, args: tuple[Tensor, ...], others: dict[str, Any]) -> None:
        if len(args) == 1 and not others:
            inputs[mixer] = args[0]

    hooks = [mixer.register_forward_pre_hook(remember, with_kwargs=True) for _, mixer in chosen]
    try:
        # not inference_mode: tensors that a mixer caches in it could not be used in training later
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    height = images.shape[2]
    return [
        CapturedMixer(stage, max(1, round(height / inputs[mixer].shape[2])), mixer, inputs[mixer])
        for stage, mixer in chosen
        if mixer in inputs
    ]


def draw(axes: Axes, picture: Tensor, captured: CapturedMixer, index: int, focus: Pixel) -> str:
    """Draw into `axes`, over the picture `[H, W, 3]`, what the mixer explains of itself; return a caption.

    index: of the image in the batch; focus: the pixel of the query. Positions that the query takes something from are
    shaded, the more the darker; the query is outlined. What is not of positions takes the place of the picture.
    """
    (height, width), stride = captured.x.shape[2:], captured.stride
    # pixels beyond the last position, which a strided convolution dropped, count as part of it
    row, column = min(focus[0] // stride, height - 1), min(focus[1] // stride, width - 1)
    explanation = explain(captured.mixer, captured.x[index : index + 1], (row, column))
    values = explanation.values.cpu().float().abs()
    shares = (values / values.max().clamp_min(1e-30)).numpy()
    if explanation.over != "positions":
        shades = LinearSegmentedColormap.from_list("shades", [rcParams["figure.facecolor"], "C0"])
        axes.imshow(shares, cmap=shades, extent=(0, picture.shape[1], picture.shape[0], 0))
        return explanation.text
    shade = np.empty((height, width, 4))
    shade[..., :3], shade[..., 3] = to_rgb("C0"), np.where(shares > 0, 0.2 + 0.55 * shares, 0)
    axes.imshow(shade, extent=(0, width * stride, height * stride, 0), interpolation="nearest")
    query = Rectangle(
        (column * stride, row * stride), stride, stride, fill=False, edgecolor="C1", linewidth=1.5, zorder=3
    )
    axes.add_patch(query)
    axes.set(xlim=(0, picture.shape[1]), ylim=(picture.shape[0], 0))
    return explanation.text


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


def attention_figure(
    pictures: Sequence[Tensor], captures: Sequence[CapturedMixer], chosen: Pixel | None = None
) -> Figure:
    """A row per picture, a column per stage: first for a query on the subject, then for one on the background.

    pictures: [H, W, 3] in 0..1; captures: of the batch of these images, in the same order. chosen: the one query, if
    it is given.
    """
    rows, stages, gap = len(pictures), len(captures), 0.2
    headings = ["The query"] if chosen else ["A query on the subject", "A query on the background"]
    widths = [1, *[gap, *[1] * stages] * len(headings)]
    width, height = 1.3 * sum(widths), 1.37 * rows + 0.55
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.005, "bottom": 0.01, "right": 0.995, "top": 1 - 0.55 / height, "wspace": 0.06, "hspace": 0.06}
    grid = figure.add_gridspec(rows, len(widths), width_ratios=widths, **margins)

    def show(index: int, column: int, heading: str) -> Axes:
        axes = figure.add_subplot(grid[index, column])
        axes.set_axis_off()
        # this extent puts the edges of pixels, not their centers, on whole numbers
        axes.imshow(pictures[index].numpy(), extent=(0, pictures[index].shape[1], pictures[index].shape[0], 0))
        if index == 0:
            axes.annotate(heading, (0, 1), (0, 33), "axes fraction", "offset points", fontweight="bold")
        return axes

    for index, picture in enumerate(pictures):
        show(index, 0, "Image")
        focuses = [chosen] if chosen else focus_pixels(picture)
        for number, (heading, focus) in enumerate(zip(headings, focuses, strict=True)):
            for column, captured in enumerate(captures, 2 + number * (1 + stages)):
                axes = show(index, column, "" if captured is not captures[0] else heading)
                caption = draw(axes, picture, captured, index, focus)
                if index == 0:
                    axes.set_title(f"stage {captured.stage}\n{caption}", fontsize="small", fontweight="normal", pad=7)
    return figure


def examples(model: Any, dataset: Any, data: ClassifyData) -> tuple[list[Tensor], Tensor]:
    """Pictures `[H, W, 3]` in 0..1 of up to `EXAMPLES` images of different classes, and the model's input."""
    images: dict[int, Any] = {}
    for index in np.linspace(0, len(dataset) - 1, 8 * EXAMPLES, dtype=int):
        image, target = dataset[int(index)]
        images.setdefault(target, image)
    transform, config = eval_transform(data, model.pretrained_cfg), input_config(data, model.pretrained_cfg)
    pixels = torch.stack([transform(images[target]) for target in sorted(images)[:EXAMPLES]])
    return [image.permute(1, 2, 0) / 255 for image in pixels], Normalizer(config, pixels.device)(pixels)


def capture_examples(model: Any, dataset: Any, data: ClassifyData) -> tuple[list[Tensor], list[CapturedMixer]]:
    """Pictures and captures for `attention_figure`, of `examples`.

    Raises UserError if the model has no mixer that can be drawn.
    """
    pictures, images = examples(model, dataset, data)
    captures = capture(model, images)
    if not captures:
        raise UserError("the model has no token mixer of tessel, which could be drawn")
    return pictures, captures
