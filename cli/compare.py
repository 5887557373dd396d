"""`tessel compare`: models and mixers side by side."""

from pathlib import Path
from typing import Any

import click

from .completion import complete_models
from .output import print_comparison


def parse_sizes(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(",") if part.strip().isdigit())
    if not sizes or len(sizes) != len(text.split(",")) or min(sizes) < 1:
        raise click.BadParameter(f"{text!r} is no list of sides in pixels, such as 224,512")
    return sizes


@click.command(short_help="Compare models and mixers: cost, speed, reach, accuracy.")
@click.argument("subjects", nargs=-1, required=True, metavar="MODEL|MIXERS...", shell_complete=complete_models)
@click.option("--lab", default="tessel_lab_tiny", show_default=True, help="The model that MIXERS are put into.")
@click.option("--peers", is_flag=True, help="Also models of timm, of about 25 million parameters.")
@click.option(
    "--size", "sizes", default="224", show_default=True, callback=parse_sizes, metavar="A,B", help="Image sides."
)
@click.option("--match", type=click.Choice(["gmacs", "parameters"]), help="Give MIXERS the cost of the first, by 2 %.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images per batch, for speeds.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="Of timing, per model; 0: no timing.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, mps, xpu ...")
@click.option("--train", "recipe", metavar="RECIPE", help="Also train each model with this recipe.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Trainings of each model.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="comparison", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def compare(subjects: tuple[str, ...], lab: str, peers: bool, out: Path, as_json: bool, **options: Any) -> int:
    """Compare models of timm and tessel, and mixers within one structure (see `tessel_lab_tiny`), in one process.

    The folder --out gets index.html, which needs no other file, and comparison.json. A comparison that was stopped goes
    on when it is started again. With --match, width and depth of the lab's models are changed until their multiply-adds
    or parameters are those of the first model.

    \b
    tessel compare cswin_tiny swin_tiny_patch4_window7_224 --size 224,512
    tessel compare window 'hilo(alpha=0.9)' 'window, channel' --match gmacs
    tessel compare window halo --lab tessel_lab_atto --size 64 --train demo/digits --seeds 3
    """
    from ..train.errors import report_errors

    with report_errors() as outcome:
        from rich.console import Console
        from rich.progress import Progress

        from ..compare import PEERS, parse_subject
        from ..compare import compare as run
        from ..compare.page import cells
        from ..train.tasks.models import check_name

        check_name(lab, "--lab")
        given = [parse_subject(text, lab) for text in (*subjects, *(PEERS if peers else ()))]
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=1.0)
            rows = run(
                given, out, progress=lambda text, done: bar.update(task, description=text, completed=done), **options
            )
        print_comparison(rows, cells(rows), out, as_json)
    return outcome.code
