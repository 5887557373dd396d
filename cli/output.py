"""How commands print: tables, and JSON with `--json`."""

import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, ensure_ascii=False))


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, as_json: bool = False) -> None:
    """A table with these columns of the rows, a list of objects as JSON. A terminal folds long cells; a file does not.

    None is shown as an empty cell, a float with two digits, a list with commas.
    """
    if as_json:
        print_json([{column: row[column] for column in columns} for row in rows])
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numbers = all(isinstance(row[column], int | float) or row[column] is None for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(row[column]) for column in columns))
    _print(table, Console)


def print_comparison(
    rows: Sequence[Mapping[str, Any]], table: Sequence[Sequence[str]], out: Path, as_json: bool
) -> None:
    """The rows as JSON; else the table, whose first line are the headings, and where its page is."""
    if as_json:
        print_json(rows)
        return
    head, *body = table
    print_rows([dict(zip(head, row, strict=True)) for row in body], head)
    print(f"{out / 'index.html'}: written")


def print_facts(facts: Mapping[str, Any], *, as_json: bool = False) -> None:
    """One line per fact, its name first; a JSON object as JSON."""
    if as_json:
        print_json(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        for number, line in enumerate(cell(value).splitlines() or [""]):
            table.add_row("" if number else name, line)
    _print(table, Console)


def nearest(name: str, known: Iterable[str]) -> str:
    """A question with the nearest of the `known` names; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


def cell(value: Any) -> str:
    """The text of a value in a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}"
    return ", ".join(map(cell, value)) if isinstance(value, list | tuple) else str(value)


def _print(table: Any, console: Any) -> None:
    """Print without markup; into a file or a pipe with lines as long as they need to be."""
    width = None if sys.stdout.isatty() else 10_000
    console(width=width, markup=False, highlight=False, emoji=False).print(table)
