"""`tessel predict`: classes, masks or boxes for images."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import click

from .completion import complete_models


@click.command(short_help="Predict images: classes, masks or boxes.")
@click.argument("model", shell_complete=complete_models)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE|FOLDER|PATTERN|URL...")
@click.option(
    "--topk", type=click.IntRange(min=1), metavar="K", help="Classes per image, by a classifier. [default: 5]"
)
@click.option(
    "--min-score", type=click.FloatRange(0, 1), metavar="P", help="Least confidence of an object. [default: 0.3]"
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write pictures, masks and JSON there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image and line.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="Weights of MODEL from this file.")
@click.option("--size", type=click.IntRange(min=1), metavar="PIXELS", help="Side of a classifier's images.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Images per batch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps, xpu ...")
def predict(
    model: str,
    images: tuple[str, ...],
    topk: int | None,
    min_score: float | None,
    out: Path | None,
    as_json: bool,
    weights: Path | None,
    size: int | None,
    batch_size: int,
    device: str,
) -> int:
    """Predict images with MODEL: the name of a model, or of a recipe whose segmenter or detector is published; a
    finished run, its export, or a file of `tessel export`.

    A classifier prints its most probable classes, a segmenter the share of each class, a detector the objects that it
    found. With --out DIR, the folder gets predictions.jsonl, and for each image a picture with the result drawn on it
    and a segmenter's mask (NAME_mask.png, class indices with their colors). Unreadable images are named and skipped;
    the exit code is then 1.

    \b
    tessel predict cswin_tiny cat.jpg https://example.org/dog.jpg
    tessel predict coco/mask_rcnn_3x_nat_tiny street.jpg --out predicted
    tessel predict runs/digits 'scans/*.png' --topk 1 --json
    tessel predict runs/street photos/ --out predicted
    """
    from ..train.errors import UserError, report_errors

    with report_errors() as outcome:
        from ..predict import Unreadable, find_images, load

        sources = find_images(images)
        predictor = load(model, device=device, weights=weights, size=size)
        options = options_of(predictor.task, topk=topk, min_score=min_score)
        writer = Writer(out) if out else None
        skipped = 0
        with progress(len(sources)) as advance:
            for result in predictor.stream(sources, batch_size=batch_size, **options):
                if isinstance(result, Unreadable):
                    skipped += 1
                    print(f"skipped: {result.reason}", file=sys.stderr)
                else:
                    print(
                        json.dumps(result.to_dict(), ensure_ascii=False)
                        if as_json
                        else f"{result.source}: {result.summary()}"
                    )
                    if writer:
                        writer.write(result)
                advance()
        if writer and not as_json:
            print(f"results of {len(sources) - skipped} of {len(sources)} images written to {out}", file=sys.stderr)
        if skipped:
            raise UserError(f"{skipped} of {len(sources)} images could not be read")
    return outcome.code


def options_of(task: str, **given: Any) -> dict[str, Any]:
    """The options that were given. Raises UserError for one that the task does not have."""
    from ..train.errors import UserError

    tasks = {"topk": "classify", "min_score": "detect"}
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if tasks[name] != task:
            raise UserError(f"--{name.replace('_', '-')} has no effect with task {task}; remove it")
    return options


class Writer:
    """Writes pictures, masks and predictions.jsonl into a folder.

    A picture is named after its image; a second image of one name is called NAME-2, and so on.
    """

    def __init__(self, folder: Path):
        from ..train.errors import UserError

        self.folder, self.used = folder, set[str]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "predictions.jsonl").write_text("")
        except OSError as error:
            raise UserError(f"--out {folder} cannot be written: {error}") from error

    def write(self, result: Any) -> None:
        from ..predict import Segmentation

        source = result.source.partition("?")[0] if "://" in result.source else result.source
        stem = name = PurePosixPath(Path(source).as_posix()).stem or "image"
        number = 1
        while self.used & {f"{name}.png", f"{name}_mask.png"}:
            number += 1
            name = f"{stem}-{number}"
        files = {"picture": f"{name}.png"}
        result.save(self.folder / files["picture"])
        if isinstance(result, Segmentation):
            files["mask"] = f"{name}_mask.png"
            result.mask_image().save(self.folder / files["mask"])
        self.used.update(files.values())
        with open(self.folder / "predictions.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(result.to_dict() | files, ensure_ascii=False) + "\n")


@contextmanager
def progress(count: int):
    """A progress bar on stderr, for several images on a terminal; yields the function that advances it."""
    if count < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    # lines on the same terminal appear above the bar; lines that go into a file must not be redirected
    bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty(), transient=True)
    with bar:
        task = bar.add_task("predicting", total=count)
        yield lambda: bar.advance(task)
