"""HTML of a report: page, sections, charts for light and dark screens, and images with captions.

A page is read on telephones too: charts are narrow, and a grid places as many beside each other as there is room for.
"""

import base64
import io
import os
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from ..errors import UserError

WIDTH = 9.2  # of a picture as wide as the page, inches; a telephone scrolls it sideways
NARROW = 4.4  # of a chart, inches: as wide as a telephone, and two or three beside each other on a large screen
MAX_PNG = 160  # longer side of an image that is embedded as PNG, in pixels; larger ones are JPEG
Section = Callable[[], tuple[str, str]]  # returns the text of a section and the HTML below it; UserError: left out

STYLE: dict[str, Any] = {
    **{"font.family": "DejaVu Sans", "font.size": 8.5, "savefig.dpi": 200},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.labelpad": 6},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6},
    **{"axes.titlelocation": "left", "axes.titlepad": 10, "axes.titlesize": "medium", "axes.titleweight": "bold"},
    **{"figure.titlesize": "medium", "figure.titleweight": "bold", "legend.frameon": False, "lines.linewidth": 1.6},
    **{f"{axis}tick.{rank}.size": 0 for axis in "xy" for rank in ("major", "minor")},
}


def _scheme(paper: str, ink: str, quiet: str, line: str, colors: str) -> dict[str, Any]:
    return {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        **dict.fromkeys(("text.color", "axes.titlecolor"), ink),
        **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), quiet),
        **dict.fromkeys(("grid.color", "axes.edgecolor"), line),
        "axes.prop_cycle": cycler(color=colors.split()),
    }


# suffix of the picture's file name -> colors; the browser shows the picture of its color scheme. One transparent
# picture for both would be harder to read: the best gray has a contrast of 4.3:1 on both, and WCAG AA asks for 4.5:1.
SCHEMES = {
    "": _scheme("#ffffff", "#1f2328", "#667079", "#e4e7eb", "#2b6cb0 #dd6b20 #2f855a #805ad5 #b7791f #718096"),
    "-dark": _scheme("#0d1117", "#e6edf3", "#8d96a0", "#272d36", "#63a4e8 #f08c4b #5fb98a #b197f5 #d9b04a #9aa5b1"),
}

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --quiet: #667079; --line: #e4e7eb; --accent: #2b6cb0;
  --alarm: #b3400d }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --quiet: #8d96a0; --line: #272d36; --accent: #63a4e8;
    --alarm: #f08c4b }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 980px; padding: 56px 30px 72px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { margin: 0; font-size: 34px; line-height: 1.15; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { margin: 60px 0 4px; font-size: 20px; letter-spacing: -.01em }
p { margin: 0 0 16px; max-width: 72ch; color: var(--quiet); overflow-wrap: anywhere }
picture { display: block }
img { display: block; width: 100%; height: auto }
.wide { overflow-x: auto }
.wide img { min-width: 720px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 14px 26px;
  align-items: start; margin-bottom: 14px }
.charts picture { max-width: 560px }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); gap: 18px;
  align-items: start }
figure { margin: 0; min-width: 0 }
figure img { max-height: 480px; object-fit: contain; object-position: left }
figure .png { image-rendering: pixelated }
figcaption { margin-top: 5px; color: var(--quiet); font-size: 13px; line-height: 1.4; overflow-wrap: anywhere }
figcaption b { display: inline-block; color: var(--ink); font-weight: 600; margin-right: 6px }
figcaption i, .legend i { display: inline-block; width: 10px; height: 10px; margin-right: 4px;
  border: 1px solid var(--line) }
.legend { font-size: 14.5px }
.legend span { display: inline-block; margin-right: 18px }
.error { color: var(--alarm); font-style: normal }
.text td:first-child, .text td:nth-child(2) { white-space: nowrap }
.text td:last-child { overflow-wrap: anywhere }
.text td { vertical-align: top }
.tiles { display: flex; flex-wrap: wrap; gap: 14px 52px; margin: 28px 0; padding: 22px 0;
  border: solid var(--line); border-width: 1px 0 }
.tiles b { display: block; font-size: 30px; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums }
.tiles div:first-child b { color: var(--accent) }
.tiles span, dt, th, summary { color: var(--quiet); font-size: 13.5px; font-weight: 400 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 24px; margin: 0; font-size: 14.5px }
dd { margin: 0; overflow-wrap: anywhere }
pre { overflow-x: auto; color: var(--ink); padding: 14px 16px; border: 1px solid var(--line); border-radius: 6px;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
summary { margin-top: 20px; cursor: pointer }
@media (max-width: 640px) {
  body { padding: 28px 16px 48px }
  h1 { font-size: 27px }
  h2 { margin-top: 44px }
  .tiles { gap: 14px 30px }
  dl { grid-template-columns: 1fr; gap: 0 }
  dd { margin-bottom: 9px }
}
table { width: 100%; margin: 28px 0; border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); text-align: left }
"""


def picture(folder: Path, name: str, alt: str, draw: Callable[[], Figure]) -> str:
    """Draw `name.png` and `name-dark.png` in the folder; return HTML that holds both, as data URLs.

    alt: what the picture shows, for screen readers.
    """
    inline = {}
    for suffix, colors in SCHEMES.items():
        file, part = folder / f"{name}{suffix}.png", folder / f".{name}{suffix}.png.part"
        try:
            settings: Any = STYLE | colors
            with rc_context(settings):
                draw().savefig(part, format="png", metadata={"Software": None})
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
        inline[suffix] = _data_url("png", file.read_bytes())
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{inline["-dark"]}">'
    return f'<picture>{dark}<img alt="{escape(alt)}" src="{inline[""]}"></picture>'


def charts(pictures: Iterable[str]) -> str:
    """HTML of pictures that are `NARROW` inches wide: beside each other where there is room, else below each other."""
    return f'<div class="charts">{"".join(pictures)}</div>'


def wide(html: str) -> str:
    """HTML of a table, or of a picture that is `WIDTH` inches wide, which a telephone scrolls sideways."""
    return f'<div class="wide">{html}</div>'


def card(image: Image.Image, caption: str, *, alt: str, title: str = "") -> str:
    """HTML of an image with a caption, which is HTML too. title: shown when the mouse is over the image."""
    content = io.BytesIO()
    # JPEG would blur the few pixels of a small image
    kind = "png" if max(image.size) <= MAX_PNG else "jpeg"
    image.save(content, kind, **({"quality": 88} if kind == "jpeg" else {}))
    hint = f' title="{escape(title)}"' if title else ""
    shown = f'<img class="{kind}" alt="{escape(alt)}"{hint} src="{_data_url(kind, content.getvalue())}">'
    return f"<figure>{shown}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"


def swatch(color: Iterable[int]) -> str:
    """HTML of a small square of a color (red, green, blue; 0 to 255), for a legend."""
    return '<i style="background:rgb({},{},{})"></i>'.format(*color)


def gallery(cards: Iterable[str], least: int = 200) -> str:
    """HTML of a grid of cards, each at least `least` pixels wide."""
    return f'<div class="gallery" style="--least: {least}px">{"".join(cards)}</div>'


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def code(text: str) -> str:
    """HTML of a code block."""
    return f"<pre>{escape(text)}</pre>"


def page(title: str, tiles: Iterable[tuple[str, str]], head: str, sections: Mapping[str, Section]) -> str:
    """The HTML page: tiles of (value, label), the HTML `head`, and sections by title.

    A section that raises UserError is left out; its message stands in its place.
    """
    row = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in tiles)
    body = []
    for name, section in sections.items():
        try:
            text, html = section()
        except UserError as error:
            text, html = f"Left out: {error}.", ""
        body.append(f"<section><h2>{escape(name)}</h2><p>{escape(text)}</p>{html}</section>")
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head>
<body>
<h1>{escape(title)}</h1>
{f'<div class="tiles">{row}</div>' if row else ""}
{head}
{"".join(body)}
</body>
</html>
"""


def shorten(name: str, length: int) -> str:
    """A name of at most `length` characters; a longer one ends in an ellipsis."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def duration(seconds: float) -> str:
    """Seconds as text: 112 -> "1 min 52 s", 3725 -> "1 h 2 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
