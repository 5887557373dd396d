"""The trainer's commands: `tessel train` is `python -m tessel.train`, with the same arguments; the others likewise."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import click

from .completion import complete_recipes

Complete = Callable[[click.Context, click.Parameter, str], Any]
_ANYTHING = {"ignore_unknown_options": True, "help_option_names": []}


def forwarded(
    name: str, main: str, usage: str, text: str, *, prefix: tuple[str, ...] = (), complete: Complete | None = None
) -> click.Command:
    """A command that hands `prefix` and all its arguments, `--help` too, to the function `main` ("module:function")."""

    def call(arguments: tuple[str, ...]) -> int:
        return resolve_name(main)([*prefix, *arguments])

    return click.Command(
        name,
        callback=call,
        params=[
            click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED, metavar=usage, shell_complete=complete)
        ],
        context_settings=_ANYTHING,
        add_help_option=False,
        short_help=text,
    )


PACKAGE = __name__.partition(".cli")[0]

train = forwarded(
    "train",
    f"{PACKAGE}.train.__main__:main",
    "RECIPE [key=value ...]",
    "Train a model as a recipe says, or go on.",
    complete=complete_recipes,
)
evaluate = forwarded(
    "evaluate",
    f"{PACKAGE}.train.evaluate:main",
    "RUN|CHECKPOINT|MODEL [key=value ...]",
    "Evaluate a run, a checkpoint or published weights.",
)
report = forwarded(
    "report", f"{PACKAGE}.train.report.__main__:main", "RUN...", "Write an HTML report on runs: curves, mistakes."
)
check = forwarded(
    "check",
    f"{PACKAGE}.train.check:main",
    "RECIPE [key=value ...]",
    "Check the data of a recipe before training.",
    complete=complete_recipes,
)
kernels = forwarded(
    "kernels",
    f"{PACKAGE}.kernels.__main__:main",
    "verify [--quick|--all|--show|--forget]",
    "Test and time the Triton kernels on this GPU.",
)
