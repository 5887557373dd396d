"""The trainer's commands: `tessel train` is `python -m tessel.train`, with the same arguments; the others likewise."""

from pkgutil import resolve_name

import click

_ANYTHING = {"ignore_unknown_options": True, "help_option_names": []}


def forwarded(name: str, main: str, usage: str, text: str, prefix: tuple[str, ...] = ()) -> click.Command:
    """A command that hands `prefix` and all its arguments, `--help` too, to the function `main` ("module:function")."""

    def call(arguments: tuple[str, ...]) -> int:
        return resolve_name(main)([*prefix, *arguments])

    return click.Command(
        name,
        callback=call,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED, metavar=usage)],
        context_settings=_ANYTHING,
        add_help_option=False,
        short_help=text,
    )


PACKAGE = __name__.partition(".cli")[0]

train = forwarded(
    "train", f"{PACKAGE}.train.__main__:main", "RECIPE [key=value ...]", "Train a model as a recipe says, or go on."
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
    "check", f"{PACKAGE}.train.check:main", "RECIPE [key=value ...]", "Check the data of a recipe before training."
)
