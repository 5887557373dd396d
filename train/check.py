"""Check the data of a recipe before training: `python -m tessel.train.check RECIPE [key=value ...] [--limit N]`.

Reads the training and the validation split of any task and lists what is wrong: files that are missing or unreadable,
masks or annotations whose size differs from the image, class indices out of range, boxes outside the image or without
an area, and classes without a sample. The exit code is 1 if anything is wrong.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .data.segmentation import IGNORE_INDEX
from .errors import UserError, report_errors
from .recipe.load import load_recipe
from .recipe.registry import open_dataset
from .recipe.schema import Recipe

MAX_PRINTED = 100  # problems per split; all are counted


class Checked(Dataset[tuple[list[str], list[int]]]):
    """[index] -> (problems of a sample, classes in it).

    A data set may have a method `problems(index) -> list[str]`, and `targets`, the classes of all its objects; from
    others, samples are taken and checked.
    """

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
        problems, labels = check_sample(image, target, self.classes)
        return [f"sample {index}: {problem}" for problem in problems], labels


def check_sample(image: Image.Image, target: Any, classes: int) -> tuple[list[str], list[int]]:
    """Problems of an image and its target (class index, mask or boxes), and the classes in it."""
    if isinstance(target, dict):
        labels = np.asarray(target["labels"])
        found = [f"box {box.tolist()} has no area" for box in target["boxes"] if not (box[2:] > box[:2]).all()]
        outside = (box for box in target["boxes"] if (box[:2] < -1).any() or (box[2:] > np.add(image.size, 1)).any())
        found += [f"box {box.tolist()} extends beyond {image.width} x {image.height}" for box in outside]
    elif isinstance(target, int | np.integer):
        labels, found = np.array([target]), []
    else:
        mask = np.asarray(target)
        height, width = mask.shape[-2:]
        found = (
            [] if (width, height) == image.size else [f"image {image.width} x {image.height}, mask {width} x {height}"]
        )
        labels = np.unique(mask)
        labels = labels[labels != IGNORE_INDEX]
    wrong = sorted({int(label) for label in labels if not 0 <= label < classes})
    found += [f"class {label} is not in 0 to {classes - 1}" for label in wrong]
    return found, [int(label) for label in labels if 0 <= label < classes]


def find_problems(dataset: Any, *, limit: int | None, workers: int, name: str) -> Iterator[str]:
    """All problems of the first `limit` samples of a split, with a progress bar on a terminal."""
    from rich.progress import track

    count = len(dataset) if limit is None else min(limit, len(dataset))
    loader = DataLoader(Checked(dataset), batch_size=None, sampler=range(count), num_workers=workers)
    seen: set[int] = set()
    rows: Iterable[tuple[list[str], list[int]]] = loader
    for problems, labels in track(rows, f"{name}: {count} samples", total=count, disable=not sys.stderr.isatty()):
        seen |= set(labels)
        yield from problems
    if hasattr(dataset, "targets"):
        seen = {int(label) for label in np.unique(np.asarray(dataset.targets))}
    elif count < len(dataset):
        return  # samples that were not checked may have the missing classes
    if missing := [name for number, name in enumerate(dataset.classes) if number not in seen]:
        yield f"{len(missing)} of {len(dataset.classes)} classes have no sample: {', '.join(missing)}"


def check(recipe: Recipe, limit: int | None = None) -> int:
    """Print the problems of the data of a recipe. Returns their number."""
    total = 0
    for name in ("train", "val"):
        dataset, count = open_dataset(recipe, name), 0
        for count, problem in enumerate(find_problems(dataset, limit=limit, workers=recipe.data.workers, name=name), 1):
            if count <= MAX_PRINTED:
                print(f"{name}: {problem}")
        if count > MAX_PRINTED:
            print(f"{name}: and {count - MAX_PRINTED} more")
        checked = len(dataset) if limit is None else min(limit, len(dataset))
        print(f"{name}: checked {checked} of {len(dataset)} samples, found {count or 'no'} problems")
        total += count
    return total


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tessel.train.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="override a key, like data.root=FOLDER")
    parser.add_argument("--limit", type=int, metavar="N", help="check only the first N samples of each split")
    options = parser.parse_intermixed_args(argv)
    found = 0
    with report_errors() as outcome:
        if options.limit is not None and options.limit < 1:
            raise UserError(f"--limit {options.limit} must be at least 1")
        found = check(load_recipe(options.recipe, options.overrides), options.limit)
    return outcome.code or int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
