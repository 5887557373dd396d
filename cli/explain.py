"""`tessel explain`: what the token mixers of a model do with an image."""

from pathlib import Path
from typing import Any

import click

from .completion import complete_models

FRACTION = click.FloatRange(0, 1)


@click.command(short_help="Draw what each token mixer attends to in an image.")
@click.argument("model", shell_complete=complete_models)
@click.option("--image", required=True, metavar="FILE|URL", help="The image.")
@click.option(
    "--query", type=(FRACTION, FRACTION), metavar="DOWN RIGHT", help="The place that is asked about, in 0..1."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="explained.png", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="Weights of MODEL from this file.")
@click.option("--size", type=click.IntRange(min=1), metavar="PIXELS", help="Side of the image. [default: as trained]")
@click.option("--random", is_flag=True, help="Random weights instead of the published ones.")
def explain(
    model: str,
    image: str,
    query: tuple[float, float] | None,
    out: Path,
    weights: Path | None,
    size: int | None,
    random: bool,
) -> int:
    """Draw, for each stage of MODEL, what its last token mixer takes from where, for one query in the image.

    MODEL is a classifier: a model's name, a finished run, or its export. Attention is drawn as weights, with the
    windows, stripes or regions that the query reaches; channel and frequency mixers as their gates; other mixers as
    their receptive field. Without --query there are two: on the subject and on the background.

    \b
    tessel explain cswin_tiny --image cat.jpg
    tessel explain runs/digits --image 7.png --query 0.5 0.5 --out seven.png
    """
    from ..train.errors import UserError, report_errors

    with report_errors() as outcome:
        from matplotlib import rc_context

        from ..predict import load
        from ..predict.explaining import explain_image
        from ..train.report.page import SCHEMES, STYLE

        predictor = load(model, device="cpu", weights=weights, size=size, pretrained=not random)
        settings: Any = STYLE | SCHEMES[""]
        with rc_context(settings):
            figure = explain_image(predictor, image, query)
            try:
                figure.savefig(out, format="png")
            except OSError as error:
                raise UserError(f"--out {out} cannot be written: {error}") from error
        print(f"{out}: written")
    return outcome.code
