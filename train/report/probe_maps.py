"""Pictures of what the queries of an attentive probe take from each position of the feature maps."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

QUERIES = 6  # that are drawn of one map

Field = tuple[str, Tensor]  # heading, and values [B, h, w]


def query_fields(weights: Sequence[Tensor]) -> list[Field]:
    """The mean over the queries, and the first queries, of the weights [B, queries, h, w] of each map."""
    fields = []
    for number, one in enumerate(weights, start=1):
        name, queries = f"map {number}, " if len(weights) > 1 else "", one.shape[1]
        shown = range(min(queries, max(1, QUERIES // len(weights))))
        fields += [(f"{name}mean", one.mean(1))] if queries > 1 else []
        fields += [(f"{name}query {query + 1}", one[:, query]) for query in shown]
    return fields


def probe_figure(pictures: Sequence[Tensor], fields: Sequence[Field]) -> Figure:
    """A row per picture, a column per field; each is drawn by its own maximum. pictures: [H, W, 3] in 0..1."""
    width, height = 1.3 * (1 + len(fields)), 1.37 * len(pictures) + 0.4
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.005, "bottom": 0.01, "right": 0.995, "top": 1 - 0.4 / height, "wspace": 0.06, "hspace": 0.06}
    grid = figure.add_gridspec(len(pictures), 1 + len(fields), **margins)
    shades = LinearSegmentedColormap.from_list("shades", [rcParams["figure.facecolor"], "C0"])
    for row, picture in enumerate(pictures):
        _axes(figure, grid[row, 0], "image" if row == 0 else "").imshow(picture.numpy())
        for column, (title, field) in enumerate(fields, start=1):
            axes = _axes(figure, grid[row, column], title if row == 0 else "")
            axes.imshow(field[row].float().numpy(), cmap=shades, vmin=0, interpolation="nearest")
    return figure


def _axes(figure: Figure, place: Any, title: str) -> Axes:
    axes = figure.add_subplot(place)
    axes.set_axis_off()
    axes.set_title(title, fontsize="small", fontweight="normal")
    return axes


def probe_attention(model: Any, images: Tensor) -> list[Tensor]:
    """The weights of the probe for normalized images: [B, queries, h, w] for each map."""
    with torch.no_grad():
        return [one.cpu() for one in model.attention(images)]
