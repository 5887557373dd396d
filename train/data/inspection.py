"""What `tessel check` finds in a split: faults of samples, sizes of images, classes, and repeated images."""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..errors import WORKER_DIED, UserError, one_line
from .segmentation import IGNORE_INDEX
from .transform_errors import sample_name

IMBALANCE = 20  # ratio of the most to the least frequent class from which on there is a warning
MAX_COPIES = 5  # of one image, named in a message


@dataclass(frozen=True)
class Finding:
    """A sentence about the data. A warning does not keep a model from being trained and measured."""

    text: str
    is_error: bool = True


class Labels(NamedTuple):
    """What a target says of its sample.

    counts: (class, number of objects, or of pixels of a mask) in the order of the classes; unit: what is counted,
    "objects" or "pixels", "" for the class of a whole image; problems: sentences.
    """

    counts: tuple[tuple[int, int], ...] = ()
    unit: str = ""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """problems: sentences; size: width and height; digest: of the pixels. The last two are None if it is unreadable."""

    problems: tuple[str, ...]
    size: tuple[int, int] | None = None
    digest: bytes | None = None
    labels: Labels = Labels()

    @property
    def classes(self) -> list[int]:
        """The classes in the sample."""
        return [label for label, _ in self.labels.counts]


class InspectedDataset(Dataset[SampleFacts]):
    """[index] -> the facts of a sample of any data set; see `recipe.registry.SourceSpec` for what it may have."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.classes = len(dataset.classes) if hasattr(dataset, "classes") else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> SampleFacts:
        problems: tuple[str, ...] = ()
        own = hasattr(self.dataset, "problems")
        try:
            if own:
                problems = tuple(self.dataset.problems(index))
            image, target = self.dataset[index]
        except UserError as error:
            return SampleFacts(problems or (str(error),))
        except Exception as error:  # data sets of other packages raise what they like
            reason = f"{type(error).__name__}: {one_line(error)}"
            return SampleFacts(problems or (f"{sample_name(self.dataset, index)} cannot be read: {reason}",))
        size = image_size(image)
        labels = read_labels(target, size, self.classes)
        if not own:
            name = sample_name(self.dataset, index)
            problems = tuple(f"{name}: {problem}" for problem in labels.problems)
        return SampleFacts(problems, size, _digest(image), labels)


def image_size(image: Any) -> tuple[int, int] | None:
    """Width and height of a PIL image or an array [H, W] or [H, W, C]; None for anything else."""
    if isinstance(image, Image.Image):
        return image.size
    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        return image.shape[1], image.shape[0]
    return None


def read_labels(target: Any, size: tuple[int, int] | None, classes: int | None) -> Labels:
    """The classes in a target, and what is wrong with it.

    target: a class index, an array [classes] of 0 and 1, a mask [H, W], or a dict with boxes and labels. Anything else
    is left alone, and so is everything if `classes`, their number, is None. size: width and height of the image.
    """
    if isinstance(target, Image.Image):
        target = np.asarray(target)
    if classes is None:
        return Labels()
    found: list[str] = []
    if isinstance(target, dict) and {"boxes", "labels"} <= target.keys():
        values, unit = np.asarray(target["labels"]), "objects"
        found += _box_problems(np.asarray(target["boxes"]).reshape(-1, 4), size)
    elif isinstance(target, int | np.integer):
        values, unit = np.array([target]), ""
    elif isinstance(target, np.ndarray) and target.shape == (classes,):
        values, unit = np.flatnonzero(target), ""
    elif isinstance(target, np.ndarray) and target.ndim == 2:
        values, unit = target[target != IGNORE_INDEX], "pixels"
        if size not in (None, target.shape[::-1]):
            found.append("image {} x {}, mask {} x {}".format(*size, *target.shape[::-1]))  # type: ignore[misc]
    else:
        return Labels()
    kinds, numbers = np.unique(values, return_counts=True)
    pairs = list(zip(map(int, kinds), map(int, numbers), strict=True))
    found += [f"class {label} is not in 0 to {classes - 1}" for label, _ in pairs if not 0 <= label < classes]
    return Labels(tuple(pair for pair in pairs if 0 <= pair[0] < classes), unit, tuple(found))


def _box_problems(boxes: np.ndarray, size: tuple[int, int] | None) -> Iterator[str]:
    for box in boxes:
        if not (box[2:] > box[:2]).all():
            yield f"box {box.tolist()} has no area"
        elif size is not None and ((box[:2] < -1).any() or (box[2:] > np.add(size, 1)).any()):
            yield f"box {box.tolist()} extends beyond {size[0]} x {size[1]}"


def _digest(image: Any) -> bytes | None:
    """A hash of the decoded pixels: equal for copies of a file, also if they are stored in another lossless format."""
    if image_size(image) is None:
        return None
    pixels = np.asarray(image)
    return hashlib.blake2b(pixels.tobytes(), digest_size=16, person=f"{pixels.shape}"[:16].encode()).digest()


class SplitFacts:
    """What was found in the first samples of a split.

    samples: the facts of each; total: number of samples in the split; classes: names, None if it has none.
    """

    def __init__(self, name: str, dataset: Any, samples: list[SampleFacts]):
        self.name, self.dataset, self.samples, self.total = name, dataset, samples, len(dataset)
        self.classes: list[str] | None = getattr(dataset, "classes", None)

    @property
    def sizes(self) -> np.ndarray:
        """Width and height [N, 2] of the images that have some."""
        return np.array([sample.size for sample in self.samples if sample.size], np.int64).reshape(-1, 2)

    @property
    def unit(self) -> str:
        """What `amounts_by_class` counts; see `Labels`."""
        return next((sample.labels.unit for sample in self.samples if sample.labels.unit), "")

    def images_by_class(self) -> np.ndarray:
        """[classes] images that contain the class."""
        return self._per_class((label, 1) for sample in self.samples for label, _ in sample.labels.counts)

    def amounts_by_class(self) -> np.ndarray:
        """[classes] objects of the class, or pixels in masks."""
        return self._per_class(pair for sample in self.samples for pair in sample.labels.counts)

    def _per_class(self, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
        total = np.zeros(len(self.classes or ()), np.int64)
        for label, count in pairs:
            total[label] += count
        return total

    def findings(self) -> Iterator[Finding]:
        """Faults of samples, classes without a sample, imbalance, and images that occur more than once."""
        for sample in self.samples:
            yield from map(Finding, sample.problems)
        yield from self._class_findings()
        for copies in self.by_digest().values():
            if len(copies) > 1:
                names = [sample_name(self.dataset, index) for index in copies]
                differ = len({self.samples[index].labels.counts for index in copies}) > 1
                more = f" and {len(names) - MAX_COPIES} more" if len(names) > MAX_COPIES else ""
                listed = f"{', '.join(names[:MAX_COPIES])}{more} have the same pixels"
                yield Finding(f"{listed}, but different labels" if differ else listed, is_error=differ)

    def _class_findings(self) -> Iterator[Finding]:
        if self.classes is None:
            return
        images = self.images_by_class()
        seen = set(np.flatnonzero(images).tolist())
        if hasattr(self.dataset, "targets"):
            seen |= _classes_in(self.dataset.targets)
        elif len(self.samples) < self.total:
            return  # samples that were not inspected may have the missing classes
        if missing := [name for number, name in enumerate(self.classes) if number not in seen]:
            text = f"{len(missing)} of {len(self.classes)} classes have no sample: {', '.join(missing)}"
            yield Finding(text, is_error=self.name == "train")
        if images.any() and len(self.samples) == self.total:
            rarest, most = np.where(images, images, images.max()).argmin(), images.argmax()
            if images[most] >= IMBALANCE * images[rarest]:
                yield Finding(
                    f"the classes are unbalanced: {self.classes[most]} is in {images[most]:,} images, "
                    f"{self.classes[rarest]} in {images[rarest]:,}",
                    is_error=False,
                )

    def by_digest(self) -> dict[bytes, list[int]]:
        """Hash of the pixels -> indices of the images with these pixels."""
        found: defaultdict[bytes, list[int]] = defaultdict(list)
        for index, sample in enumerate(self.samples):
            if sample.digest is not None:
                found[sample.digest].append(index)
        return found


def _classes_in(targets: Any) -> set[int]:
    """Class indices in `targets`: [N] indices, or [N, classes] of 0 and 1."""
    labels = np.asarray(targets)
    return set((np.flatnonzero(labels.any(0)) if labels.ndim == 2 else np.unique(labels)).tolist())


def inspect_split(dataset: Any, *, name: str, limit: int | None = None, workers: int = 0) -> SplitFacts:
    """The facts of a split, or of its first `limit` samples, read by `workers` processes; a terminal shows progress.

    Raises UserError if a worker process dies.
    """
    from rich.progress import track

    count = len(dataset) if limit is None else min(limit, len(dataset))
    loader = DataLoader(
        InspectedDataset(dataset), batch_size=None, sampler=range(count), num_workers=min(workers, count)
    )
    rows: Iterable[SampleFacts] = loader
    try:
        samples = list(track(rows, f"{name}: {count} samples", total=count, disable=not sys.stderr.isatty()))
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise UserError(WORKER_DIED) from error
    return SplitFacts(name, dataset, samples)


def images_in_both(train: SplitFacts, val: SplitFacts) -> Iterator[Finding]:
    """Validation images whose pixels are also those of a training image."""
    known = train.by_digest()
    for digest, copies in val.by_digest().items():
        if digest in known:
            other = sample_name(train.dataset, known[digest][0])
            for index in copies:
                yield Finding(f"{sample_name(val.dataset, index)} has the same pixels as {other} of the training split")
