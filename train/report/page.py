"""A page: its looks, in light and dark, its sections, and the pictures in them."""

import base64
import os
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..errors import UserError

WIDTH = 9.2  # inches of a picture as wide as the page
Contents = Callable[[], tuple[str, str]]  # of a section: text, and HTML below it

STYLE: dict[str, Any] = {
    **{"font.family": "DejaVu Sans", "font.size": 8.5, "savefig.dpi": 200},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.labelpad": 6},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6},
    **{"axes.titlelocation": "left", "axes.titlepad": 10, "axes.titlesize": "medium", "axes.titleweight": "bold"},
    **{"figure.titlesize": "medium", "figure.titleweight": "bold", "legend.frameon": False, "lines.linewidth": 1.6},
    **{f"{axis}tick.{rank}.size": 0 for axis in "xy" for rank in ("major", "minor")},
}


def _scheme(paper: str, ink: str, quiet: str, line: str, colours: str) -> dict[str, Any]:
    return {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        **dict.fromkeys(("text.color", "axes.titlecolor"), ink),
        **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), quiet),
        **dict.fromkeys(("grid.color", "axes.edgecolor"), line),
        "axes.prop_cycle": cycler(color=colours.split()),
    }


# by the ending of the picture's file name; the page shows the one that suits the reader's screen
SCHEMES = {
    "": _scheme("#ffffff", "#1f2328", "#667079", "#e4e7eb", "#2b6cb0 #dd6b20 #2f855a #805ad5 #b7791f #718096"),
    "-dark": _scheme("#0d1117", "#e6edf3", "#8d96a0", "#272d36", "#63a4e8 #f08c4b #5fb98a #b197f5 #d9b04a #9aa5b1"),
}

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --quiet: #667079; --line: #e4e7eb; --accent: #2b6cb0 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --quiet: #8d96a0; --line: #272d36; --accent: #63a4e8 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 980px; padding: 56px 30px 72px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { margin: 0; font-size: 34px; line-height: 1.15; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { margin: 60px 0 4px; font-size: 20px; letter-spacing: -.01em }
p { margin: 0 0 16px; max-width: 72ch; color: var(--quiet); overflow-wrap: anywhere }
img { display: block; width: 100%; height: auto }
.tiles { display: flex; flex-wrap: wrap; gap: 14px 52px; margin: 28px 0; padding: 22px 0;
  border: solid var(--line); border-width: 1px 0 }
.tiles b { display: block; font-size: 30px; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums }
.tiles div:first-child b { color: var(--accent) }
.tiles span, dt, th, summary { color: var(--quiet); font-size: 13.5px; font-weight: 400 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 24px; margin: 0; font-size: 14.5px }
dd { margin: 0; overflow-wrap: anywhere }
pre { overflow-x: auto; padding: 14px 16px; border: 1px solid var(--line); border-radius: 6px;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
summary { margin-top: 20px; cursor: pointer }
table { width: 100%; margin: 28px 0; border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); text-align: left }
"""


def picture(folder: Path, name: str, words: str, draw: Callable[[], Figure]) -> str:
    """Draw in every colour scheme, write `name*.png` into the folder, and return the HTML that holds them all."""
    inline = {}
    for ending, colours in SCHEMES.items():
        file, part = folder / f"{name}{ending}.png", folder / f".{name}{ending}.png.part"
        settings: Any = STYLE | colours
        try:
            with rc_context(settings):
                draw().savefig(part, format="png", metadata={"Software": None})
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
        inline[ending] = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{inline["-dark"]}">'
        f'<img alt="{escape(words)}" src="{inline[""]}"></picture>'
    )


def page(title: str, tiles: Iterable[tuple[str, str]], head: str, sections: Mapping[str, Contents]) -> str:
    """The HTML page: tiles of (figure, what it is), further HTML, and titled sections."""
    row = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles)
    body = []
    for name, contents in sections.items():
        try:
            text, shown = contents()
        except UserError as error:
            text, shown = f"Left out: {error}.", ""
        body.append(f"<section><h2>{escape(name)}</h2><p>{escape(text)}</p>{shown}</section>")
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


def duration(seconds: float) -> str:
    """3725 -> 1 h 2 min"""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
