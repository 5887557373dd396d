"""A strip below a picture that says which color stands for which class."""

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Color = Any  # of PIL: a tuple of red, green, blue, or "#RRGGBB"


def with_legend(picture: Image.Image, colors: Mapping[str, Color]) -> Image.Image:
    """The picture, and below it on white a square of each color beside its name, in as many lines as they need.

    A picture that is narrower than a name gets a white margin on the right. Without colors it is returned as it is.
    """
    if not colors:
        return picture
    size = max(10, min(picture.size) // 28)
    gap, font = size // 2, ImageFont.load_default(size)
    widths = {name: 2 * size + gap + round(font.getlength(name)) for name in colors}
    width = max(picture.width, max(widths.values()) + gap)
    places, x, y = {}, gap, picture.height + gap
    for name in colors:
        if x > gap and x + widths[name] > width:
            x, y = gap, y + size + gap
        places[name] = x, y
        x += widths[name]
    canvas = Image.new("RGB", (width, y + size + gap), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for name, (x, y) in places.items():
        draw.rectangle((x, y, x + size - 1, y + size - 1), fill=colors[name])
        draw.text((x + size + gap, y + size // 2), name, fill="black", font=font, anchor="lm")
    return canvas
