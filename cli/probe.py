"""`tessel probe`: several models with several probes side by side."""

from pathlib import Path
from typing import Any

import click

from .completion import complete_models
from .output import nearest, print_comparison


def parse_probes(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    from typing import get_args

    from ..train.tasks.classify.options import PROBES

    known, given = get_args(PROBES), tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in given:
        if name not in known:
            hint = nearest(name, known) or f"there are {', '.join(known)}"
            raise click.BadParameter(f"{name!r} is no probe; {hint}")
    return given


@click.command(short_help="Train probes of frozen models and compare their accuracy.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", shell_complete=complete_models)
@click.option(
    "--probes",
    default="linear,ep",
    show_default=True,
    callback=parse_probes,
    metavar="A,B",
    help="Values of task.probe.",
)
@click.option("--recipe", default="finetune/probe", show_default=True, help="Packaged recipe or file of the trainings.")
@click.option("--data", metavar="PATH", help="Folder of pictures, or of ImageNet (data.root).")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe, repeatable."
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Trainings of each probe.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="probes", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def probe(
    models: tuple[str, ...], data: str | None, overrides: tuple[str, ...], out: Path, as_json: bool, **options: Any
) -> int:
    """Train a classifier on the features of each frozen MODEL, by each probe, and write a table.

    A MODEL is a name of timm or tessel, whose published weights are loaded, or local-dir:RUN/export. The folder --out
    gets index.html, which needs no other file, with pictures of what the probes read, probes.json, probes.md, and the
    runs, which `tessel report` takes too. A comparison that was stopped goes on when it is started again.

    \b
    tessel probe cswin_tiny biformer_tiny --probes linear,ep,simpool --data PICTURES
    tessel probe vit_base_patch16_224.mae --probes ep --recipe finetune/probe_imagenet --data IMAGENET
    tessel probe local-dir:runs/digits/export --set data.source=digits --set data.size=64 --seeds 3
    """
    from ..train.errors import report_errors

    with report_errors() as outcome:
        import contextlib
        import sys

        from rich.console import Console
        from rich.progress import Progress

        from ..compare import probe as run
        from ..compare.probing import cells
        from ..train.tasks.models import check_name

        for name in models:
            check_name(name, "the model")
        given = (*([f"data.root={data}"] if data else []), *overrides)
        # the trainings print lines of their own, which are no part of the table
        with Progress(console=Console(stderr=True), transient=True) as bar, contextlib.redirect_stdout(sys.stderr):
            task = bar.add_task("", total=1.0)
            rows = run(
                list(dict.fromkeys(models)),
                out=out,
                overrides=given,
                progress=lambda text, done: bar.update(task, description=text, completed=done),
                **options,
            )
        print_comparison(rows, cells(rows), out, as_json)
    return outcome.code
