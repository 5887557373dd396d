"""`tessel list`: models with filters and columns, or the packaged recipes."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from .output import json_option, nearest, print_rows

DEFAULT_COLUMNS = ("model", "params", "input", "top1", "weights")
COLUMNS = ("model", "family", "params", "macs", "memory", "input", "top1", "license", "weights", "paper")
RECIPE_COLUMNS = ("recipe", "task", "model", "epochs")


def parse_columns(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    if text is None:
        return DEFAULT_COLUMNS
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in COLUMNS]:
        raise click.BadParameter(f"{unknown[0]!r} is no column; there are {', '.join(COLUMNS)}")
    return names


@click.command("list", short_help="List models, or the packaged recipes, with filters and columns.")
@click.argument("pattern", required=False)
@click.option("--recipes", is_flag=True, help="List the packaged recipes instead of models.")
@click.option("--family", help="Only this family, by a part of its name: cswin, halonet, ...")
@click.option("--pretrained", is_flag=True, help="Only models whose weights can be downloaded or are in the cache.")
@click.option("--min-params", type=float, metavar="M", help="Only models with at least M million parameters.")
@click.option("--max-params", type=float, metavar="M", help="Only models with at most M million parameters.")
@click.option("--tests", is_flag=True, help="Also the test models, named _atto.")
@click.option("--sort", type=click.Choice(COLUMNS), default="model", show_default=True, help="Order by this column.")
@click.option("--columns", callback=parse_columns, metavar="A,B,...", help=f"Columns, of {', '.join(COLUMNS)}.")
@json_option
def listing(
    pattern: str | None,
    recipes: bool,
    family: str | None,
    pretrained: bool,
    min_params: float | None,
    max_params: float | None,
    tests: bool,
    sort: str,
    columns: tuple[str, ...],
    as_json: bool,
) -> int:
    """List models, or with --recipes the packaged recipes, whose name matches PATTERN, such as 'cswin_*'.

    Parameters are in millions, multiply-adds (macs) in billions, and memory, of one image in inference without the
    weights, in MB; macs and memory are counted on the spot, which takes a second per model. top1 is the published
    accuracy on ImageNet-1K; weights are the tags of the published files, the default first.

    \b
    tessel list --pretrained --max-params 30
    tessel list 'cswin_*' --columns model,params,macs,license --sort params
    tessel list --recipes 'ade20k/*'
    """
    if recipes:
        rows = [row for row in recipe_rows() if pattern is None or fnmatchcase(row["recipe"], pattern)]
        return show(rows, RECIPE_COLUMNS, pattern, [row["recipe"] for row in recipe_rows()], as_json)
    from .. import zoo
    from .facts import MODEL_FACTS, family_name, parameters

    names = [name for name in zoo.list_models() if pattern is None or fnmatchcase(name, pattern)]
    if not tests and pattern is None:
        names = [name for name in names if not name.endswith("_atto")]
    if family is not None:
        names = [name for name in names if family.lower() in family_name(name).lower()]
    if pretrained:
        names = [name for name in names if zoo.has_weights(name)]
    if min_params is not None or max_params is not None:
        low, high = min_params or 0.0, float("inf") if max_params is None else max_params
        names = [name for name in names if low <= parameters(name) <= high]
    facts: dict[str, Callable[[str], Any]] = {name: MODEL_FACTS[name] for name in {*columns, sort}}
    rows = [{column: fact(name) for column, fact in facts.items()} for name in names]
    rows.sort(key=lambda row: (row[sort] is None, row[sort] if row[sort] is not None else 0))
    return show(rows, columns, pattern, zoo.list_models(), as_json)


def show(
    rows: list[dict[str, Any]], columns: tuple[str, ...], pattern: str | None, names: list[str], as_json: bool
) -> int:
    """Print the rows; an error with the nearest of the `names` if there are none."""
    if not rows and not as_json:
        hint = nearest(pattern or "", names) or "`tessel list` lists all models"
        raise click.ClickException(f"nothing matches {pattern or 'these filters'}; {hint}")
    print_rows(rows, columns, as_json=as_json)
    return 0


def recipe_rows() -> list[dict[str, Any]]:
    """One row per packaged recipe: its name, and some of its keys as they stand in the file."""
    import yaml

    folder = Path(__file__).resolve().parents[1] / "configs"
    rows = []
    for path in sorted(folder.rglob("*.yaml")):
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows.append(
            {
                "recipe": path.relative_to(folder).with_suffix("").as_posix(),
                "task": keys.get("task", {}).get("kind", "classify"),
                "model": keys.get("model", {}).get("name"),
                "epochs": keys.get("sched", {}).get("epochs"),
            }
        )
    return rows
