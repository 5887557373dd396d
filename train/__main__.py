"""The command line: `python -m tessel.train RECIPE [key=value ...] [--dry-run]`, also as `tessel-train`."""

import argparse
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator

from .errors import report_errors
from .recipe.load import load_recipe
from .recipe.schema import leaves

if typing.TYPE_CHECKING:
    pass

from .trainer import dry_run, train

EXAMPLES = """\
examples:
  python -m tessel.train demo/digits                            a packaged recipe: on the CPU, without a download
  python -m tessel.train my.yaml optim.lr=1e-3 run.name=fast    any key can be given here too
  torchrun --nproc-per-node 8 -m tessel.train my.yaml           on eight GPUs; data.batch stays the global batch
  python -m tessel.train my.yaml                                again: goes on from the last checkpoint
  python -m tessel.train my.yaml run.fresh=true                 starts over; the old run is moved aside
  python -m tessel.train.evaluate runs/my                       judges the result

sections and keys of a recipe, with default, meaning and type:
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = argparse.ArgumentParser(
        prog="tessel-train",
        usage="python -m tessel.train RECIPE [key=value ...] [--dry-run]",
        description="Train a model as a recipe says. Started again, it goes on where it stopped.",
        epilog=EXAMPLES + "\n".join(describe_keys()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, here or below the packaged tessel.configs")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a key of the recipe, like optim.lr=1e-3")
    parser.add_argument("--dry-run", action="store_true", help="build everything, try one batch, write nothing")
    options = parser.parse_intermixed_args(argv)
    with report_errors() as outcome:
        recipe = load_recipe(options.recipe, options.overrides)
        (dry_run if options.dry_run else train)(recipe)
    return outcome.code


def describe_keys() -> Iterator[str]:
    """A line for each key of a recipe."""
    for key, hint, default, meaning in leaves():
        value = "required" if default is dataclasses.MISSING else json.dumps(default)
        yield f"  {key + ': ' + value:36s}  {meaning} [{_kind(hint)}]"


def _kind(hint: typing.Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join("null" if part is type(None) else _kind(part) for part in arguments)
    return "list" if hint.__name__ == "tuple" else hint.__name__


if __name__ == "__main__":
    sys.exit(main())
