"""Check the data of a recipe before training: `tessel check RECIPE [key=value ...]`.

Reads both splits of any task and any data source and lists errors: files that are missing or unreadable, masks or
annotations whose size differs from the image, class indices out of range, boxes outside the image or without an area,
classes without a training sample, one image with different labels, and images that are in both splits. Warnings are
unbalanced classes, classes without a validation sample, and images that occur twice. Prints how many images each class
has and how large they are. The exit code is 1 if there is an error.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from .data.inspection import Finding, SplitFacts, images_in_both, inspect_split
from .errors import FaultsError, UserError, report_errors
from .files import write_atomically
from .recipe.load import load_recipe
from .recipe.registry import open_dataset
from .recipe.schema import Recipe

MAX_PRINTED = 100  # errors and warnings per split; all are counted
MAX_CLASSES = 40  # rows in the table of classes
SPLITS = ("train", "val")


def check(recipe: Recipe, limit: int | None = None, workers: int | None = None, report: Path | None = None) -> int:
    """Print what is wrong with the data of a recipe, and write the page `report`. Returns the number of errors.

    limit: check only the first samples of each split; workers: processes that read, None: data.workers.
    """
    splits: dict[str, SplitFacts] = {}
    findings: dict[str, list[Finding]] = {}
    for name in SPLITS:
        try:
            dataset = open_dataset(recipe, name)
        except UserError as error:
            faults = error.faults if isinstance(error, FaultsError) else [str(error)]
            findings[name] = [Finding(fault) for fault in faults]
        else:
            number = recipe.data.workers if workers is None else workers
            splits[name] = inspect_split(dataset, name=name, limit=limit, workers=number)
            findings[name] = list(splits[name].findings())
    if len(splits) == len(SPLITS):
        findings["val"] += images_in_both(splits["train"], splits["val"])
        findings["val"] += _class_differences(splits["train"], splits["val"])
    for name, found in findings.items():
        print("\n".join(_lines(name, found, splits.get(name))))
    print_tables(list(splits.values()))
    if report is not None:
        write_page(recipe, splits, findings, report)
        print(f"report: {report} (open it in a browser)")
    return sum(finding.is_error for found in findings.values() for finding in found)


def write_page(
    recipe: Recipe, splits: Mapping[str, SplitFacts], findings: Mapping[str, Sequence[Finding]], file: Path
) -> None:
    """Write the page on the data. Raises UserError if the file cannot be written."""
    from .report.data_page import data_page

    html = data_page(recipe, splits, findings)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, html)
    except OSError as error:
        raise UserError(f"--report {file} cannot be written ({error.strerror or error}); name another file") from error


def _class_differences(train: SplitFacts, val: SplitFacts) -> Iterator[Finding]:
    if train.classes != val.classes:
        names = sorted(set(train.classes or ()) ^ set(val.classes or ())) or ["the same classes in another order"]
        yield Finding(f"its classes differ from those of the training split: {', '.join(names)}")


def _lines(name: str, found: Sequence[Finding], facts: SplitFacts | None) -> Iterator[str]:
    # errors first, so that many warnings do not hide them
    for finding in sorted(found, key=lambda one: not one.is_error)[:MAX_PRINTED]:
        yield f"{name}: {'error' if finding.is_error else 'warning'}: {finding.text}"
    if len(found) > MAX_PRINTED:
        yield f"{name}: and {len(found) - MAX_PRINTED} more"
    errors = sum(finding.is_error for finding in found)
    totals = [f"{errors or 'no'} error{'' if errors == 1 else 's'}"]
    if warnings := len(found) - errors:
        totals.append(f"{warnings} warning{'' if warnings == 1 else 's'}")
    checked = f"checked {len(facts.samples):,} of {facts.total:,} samples" if facts else "cannot be opened"
    yield f"{name}: {checked}, found {' and '.join(totals)}"


def print_tables(splits: Sequence[SplitFacts]) -> None:
    """Print the sizes of the images, and how often each class occurs."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # a file has no width, in which a table would have to fit
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)

    def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for number, name in enumerate(head):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)

    if sized := [split for split in splits if len(split.sizes)]:
        columns = ("split", "images", "width", "height", "median")
        show("Sizes in pixels", columns, [_size_row(split) for split in sized])
    named = [split for split in splits if split.classes and split.images_by_class().any()]
    agree = all(split.classes == named[0].classes for split in named)
    for group in [named] if agree and named else [[split] for split in named]:
        head, rows = class_table(group)
        shown = rows
        if len(rows) > MAX_CLASSES:
            half, blank = MAX_CLASSES // 2, ["..."] + [""] * (len(head) - 1)
            shown = [*rows[:half], blank, *rows[-half:]]
        show("Classes, the most frequent first", head, shown)


def _size_row(split: SplitFacts) -> list[str]:
    low, high, middle = split.sizes.min(0), split.sizes.max(0), np.median(split.sizes, 0)
    ranges = [f"{low[side]} to {high[side]}" if low[side] < high[side] else f"{low[side]}" for side in (0, 1)]
    return [split.name, f"{len(split.sizes):,}", *ranges, f"{middle[0]:g} x {middle[1]:g}"]


def class_table(splits: Sequence[SplitFacts]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: images of each class by split, and its objects or its fraction of the labelled pixels."""
    head, columns, order = ["class"], [], np.zeros(len(splits[0].classes or ()), np.int64)
    for split in splits:
        images, amounts = split.images_by_class(), split.amounts_by_class()
        order = order + images
        head.append(f"{split.name} images")
        columns.append([f"{count:,}" for count in images])
        if split.unit:
            total = max(1, amounts.sum()) / 100
            head.append(f"{split.name} {split.unit}")
            columns.append([f"{one / total:.1f} %" if split.unit == "pixels" else f"{one:,}" for one in amounts])
    rows = [[name, *(column[number] for column in columns)] for number, name in enumerate(splits[0].classes or ())]
    return head, [rows[number] for number in np.argsort(-order, kind="stable")]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = argparse.ArgumentParser(
        prog="tessel check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="override a key, like data.root=FOLDER")
    parser.add_argument("--limit", type=int, metavar="N", help="check only the first N samples of each split")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read files; default: data.workers")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with samples and their labels")
    options = parser.parse_intermixed_args(argv)
    found = 0
    with report_errors() as outcome:
        for name, least in (("limit", 1), ("workers", 0)):
            if (value := getattr(options, name)) is not None and value < least:
                raise UserError(f"--{name} {value} must be at least {least}")
        recipe = load_recipe(options.recipe, options.overrides)
        found = check(recipe, options.limit, options.workers, options.report)
    return outcome.code or int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
