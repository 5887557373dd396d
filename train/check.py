"""A look at all the data before hours are spent: `python -m tessel.train.check RECIPE [key=value ...] [--limit N]`.

Goes through the training and the validation split of any task and lists what is wrong: files that are missing or
unreadable, masks or annotations of another size than the image, classes out of range, boxes outside the image or
without area, classes without an example. The exit code is 1 if anything is.

A data set may tell what is wrong with one of its samples, `problems(index) -> list[str]`, the classes of all its
objects, `targets`, and itself with the samples that training leaves out, `whole()`; of one that does not, samples are
taken and looked at.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .distributed.world import World
from .errors import UserError, report_errors
from .recipe.load import load_recipe
from .recipe.schema import Recipe
from .tasks.build import build_task

IGNORED = 255  # the class of pixels that are not judged
SHOWN = 100  # problems of a split that are printed; all of them are counted


class Inspected(Dataset[tuple[list[str], list[int]]]):
    """[index] -> what is wrong with a sample, and the classes in it."""

    def __init__(self, dataset: Any):
        self.dataset, self.classes = dataset, len(dataset.classes)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[list[str], list[int]]:
        if hasattr(self.dataset, "problems"):
            return self.dataset.problems(index), []
        try:
            image, target = self.dataset[index]
        except UserError as error:
            return [str(error)], []
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            return [f"sample {index} cannot be read: {type(error).__name__}: {error}"], []
        problems, labels = looked_at(image, target, self.classes)
        return [f"sample {index}: {problem}" for problem in problems], labels


def looked_at(image: Image.Image, target: Any, classes: int) -> tuple[list[str], list[int]]:
    """What is wrong with an image and its class, its mask of classes or its objects, and the classes in it."""
    if isinstance(target, dict):
        labels = np.asarray(target["labels"])
        found = [f"box {box.tolist()} has no area" for box in target["boxes"] if not (box[2:] > box[:2]).all()]
        outside = (box for box in target["boxes"] if (box[:2] < -1).any() or (box[2:] > np.add(image.size, 1)).any())
        found += [f"box {box.tolist()} reaches out of {image.width} x {image.height}" for box in outside]
    elif isinstance(target, int | np.integer):
        labels, found = np.array([target]), []
    else:
        mask = np.asarray(target)
        height, width = mask.shape[-2:]
        fits = (width, height) == image.size
        found = [] if fits else [f"image {image.width} x {image.height}, mask {width} x {height}"]
        labels = np.unique(mask)
        labels = labels[labels != IGNORED]
    wrong = sorted({int(label) for label in labels if not 0 <= label < classes})
    found += [f"class {label} is none of 0 to {classes - 1}" for label in wrong]
    return found, [int(label) for label in labels if 0 <= label < classes]


def inspect(dataset: Any, *, limit: int | None, workers: int, name: str) -> Iterator[str]:
    """All that is wrong with a split, its first `limit` samples looked at, behind a progress bar on a terminal."""
    from rich.progress import track

    count = len(dataset) if limit is None else min(limit, len(dataset))
    loader = DataLoader(Inspected(dataset), batch_size=None, sampler=range(count), num_workers=workers)
    seen: set[int] = set()
    rows: Iterable[tuple[list[str], list[int]]] = loader
    for problems, labels in track(rows, f"{name}: {count} samples", total=count, disable=not sys.stderr.isatty()):
        seen |= set(labels)
        yield from problems
    if hasattr(dataset, "targets"):
        seen = {int(label) for label in np.unique(np.asarray(dataset.targets))}
    elif count < len(dataset):
        return  # those not looked at may have the rest
    if missing := [name for number, name in enumerate(dataset.classes) if number not in seen]:
        yield f"{len(missing)} of {len(dataset.classes)} classes have no example: {', '.join(missing)}"


def check(recipe: Recipe, limit: int | None = None) -> int:
    """Print what is wrong with the data of a recipe; how much that is."""
    task: Any = build_task(recipe, World())
    total = 0
    for name, dataset in (("train", task.train), ("val", task.val)):
        count = 0
        dataset = dataset.whole() if hasattr(dataset, "whole") else dataset
        for count, problem in enumerate(inspect(dataset, limit=limit, workers=recipe.data.workers, name=name), 1):
            if count <= SHOWN:
                print(f"{name}: {problem}")
        if count > SHOWN:
            print(f"{name}: and {count - SHOWN} more")
        looked = len(dataset) if limit is None else min(limit, len(dataset))
        print(f"{name}: {looked} of {len(dataset)} samples looked at, {count or 'no'} problems")
        total += count
    return total


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tessel.train.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, here or below the packaged tessel.configs")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a key of the recipe, like data.root=FOLDER")
    parser.add_argument("--limit", type=int, metavar="N", help="look at the first N samples of each split only")
    options = parser.parse_intermixed_args(argv)
    wrong = 0
    with report_errors() as outcome:
        if options.limit is not None and options.limit < 1:
            raise UserError(f"--limit {options.limit}: at least one sample has to be looked at")
        wrong = check(load_recipe(options.recipe, options.overrides), options.limit)
    return outcome.code or int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
