"""The command line: `tessel train RECIPE [key=value ...] [--dry-run]`, also as `python -m tessel.train`."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator

from .. import __version__
from .errors import report_errors
from .recipe.explain import describe_type
from .recipe.load import describe_packaged, load_recipe
from .recipe.registry import SOURCES, TASKS, key_groups, task_spec
from .system import allow_cpu_operators
from .tasks.names import check_spelling
from .threads import limit_spinning

EXAMPLES = """\
examples:
  tessel train --list                                     the packaged recipes
  tessel train finetune/classify data.root=PATH           fine-tunes a model on your own pictures
  tessel train demo/digits                                a packaged recipe: on the CPU, without a download
  tessel train my.yaml optim.lr=1e-3 run.name=fast        any key can be overridden
  torchrun --nproc-per-node 8 -m tessel train my.yaml     on eight GPUs; data.batch is the global batch size
  tessel train my.yaml                                    again: continues from the last checkpoint
  tessel train my.yaml run.fresh=true                     starts from scratch; renames the old run
  tessel evaluate runs/my                                 evaluates the result
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = argparse.ArgumentParser(
        prog="tessel train",
        usage="tessel train RECIPE [key=value ...] [--dry-run]\n       tessel train --list",
        description="Train a model as a recipe says. Started again, it continues from the last checkpoint.",
        epilog=EXAMPLES + "\n".join(describe_keys()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="override a key, for example optim.lr=1e-3")
    parser.add_argument("--dry-run", action="store_true", help="build everything and try one batch; writes nothing")
    parser.add_argument("--list", action="store_true", help="list the packaged recipes")
    options = parser.parse_intermixed_args(argv)
    if options.list or options.recipe is None:
        print("packaged recipes:", *describe_packaged(), sep="\n")
        print(f"usage: {parser.usage}")
        return 0 if options.list else 2
    if os.environ.get("RANK", "0") == "0":
        # at once: importing torch and timm takes seconds
        print(f"tessel {__version__}, recipe {options.recipe}: loading", flush=True)
    with report_errors() as outcome:
        recipe = load_recipe(options.recipe, options.overrides)
        if task_spec(recipe).models_of_timm:
            check_spelling(recipe.model.name, "model.name")
            check_spelling(recipe.model.init_from, "model.init_from")
        limit_spinning()
        allow_cpu_operators()
        # imports torch and timm, after help and errors in the recipe
        from . import trainer

        (trainer.dry_run if options.dry_run else trainer.train)(recipe)
    return outcome.code


def describe_keys() -> Iterator[str]:
    """The help on tasks, data sources and all keys of a recipe."""
    yield "\ntasks (task.kind):"
    yield from (f"  {task.kind:14s}{task.summary}" for task in TASKS.values())
    yield "\ndata sources (data.source):"
    yield from (f"  {source.name:14s}{source.summary}" for source in SOURCES.values())
    for heading, keys in key_groups():
        yield f"\nkeys of {heading}, with default, meaning and type:"
        for key in keys:
            value = "required" if key.default is dataclasses.MISSING else json.dumps(key.default)
            yield f"  {key.name + ': ' + value:36s}  {key.description} [{describe_type(key.hint)}]"


if __name__ == "__main__":
    sys.exit(main())
