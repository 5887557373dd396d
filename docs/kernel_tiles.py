"""Draw docs/kernel_tiles.svg: the pixels and scores that one program of window attention owns.

python docs/kernel_tiles.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

PICTURE = Path(__file__).resolve().parent / "kernel_tiles.svg"
# readable on white and on black, because the background is transparent
INK, OWN, IDLE, GRID = "#7d8590", "#3b82d6", "#d6813b", "#7d859066"


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, alpha: float = 0.55) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, alpha=alpha, linewidth=0))


def lines(axes: Axes, at: list[float], side: float) -> None:
    for position in at:
        axes.plot([position, position], [0, side], color=GRID, linewidth=0.8)
        axes.plot([0, side], [position, position], color=GRID, linewidth=0.8)


def frame(axes: Axes, side: float, title: str, note: str) -> None:
    axes.add_patch(Rectangle((0, 0), side, side, fill=False, edgecolor=INK, linewidth=1.2))
    axes.set(xlim=(-0.03 * side, 1.03 * side), ylim=(1.03 * side, -0.03 * side), aspect="equal")
    axes.set_axis_off()
    axes.set_title(title, color=INK, fontsize=10, pad=8)
    axes.text(side / 2, 1.06 * side, note, color=INK, fontsize=8.5, ha="center", va="top")


def draw_map(axes: Axes) -> None:
    """A 14x14 map in two windows of 14x7, with the pixels numbered in the order of the tile."""
    box(axes, 0, 0, 7, 14, OWN, 0.3)
    lines(axes, list(range(1, 14)), 14)
    axes.plot([7, 7], [0, 14], color=INK, linewidth=1.6)
    for row in range(3):
        for column in range(7):
            axes.text(column + 0.5, row + 0.55, str(7 * row + column), color=INK, fontsize=6, ha="center", va="center")
    frame(
        axes,
        14,
        "the map: 14 x 14 pixels",
        "two windows of 14 x 7; one program owns\none head of the blue one, 98 pixels",
    )


def draw_one_tile(axes: Axes) -> None:
    """98 queries by 98 keys in a tile of 128."""
    box(axes, 0, 0, 98, 98, OWN)
    box(axes, 98, 0, 30, 128, IDLE, 0.35)
    box(axes, 0, 98, 98, 30, IDLE, 0.35)
    frame(axes, 128, "scores, one tile", "a tile of 128: keys from 98 on\nare -inf, rows from 98 on are not stored")


def draw_packed(axes: Axes) -> None:
    """16 windows of four pixels in a tile of 64."""
    for n in range(16):
        box(axes, 4 * n, 4 * n, 4, 4, OWN, 0.8)
    lines(axes, [4.0 * n for n in range(1, 16)], 64)
    frame(
        axes,
        64,
        "scores, packed",
        "windows of 2 x 2: sixteen in a tile of 64,\na query attends to the four keys of its window",
    )


def draw_loop(axes: Axes) -> None:
    """288 queries in tiles of 64, each of which loops over 288 keys in steps of 64."""
    box(axes, 0, 64, 288, 64, OWN, 0.3)
    box(axes, 288, 64, 32, 64, IDLE, 0.35)
    lines(axes, [64.0, 128.0, 192.0, 256.0], 320)
    for step in range(5):
        axes.text(
            64 * step + (16 if step == 4 else 32), 96, str(step + 1), color=INK, fontsize=8, ha="center", va="center"
        )
    axes.annotate("", (312, 148), (8, 148), arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1.2})
    frame(
        axes,
        320,
        "scores, a loop",
        "windows of 24 x 12: five programs of 64 queries,\neach loops over the 288 keys by 64",
    )


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "tessel", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(1, 4, figsize=(13, 4))
    for draw, panel in zip((draw_map, draw_one_tile, draw_packed, draw_loop), axes, strict=True):
        draw(panel)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.16, wspace=0.08)
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None, "Creator": None})
    text = PICTURE.read_text()
    PICTURE.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


if __name__ == "__main__":
    main()
