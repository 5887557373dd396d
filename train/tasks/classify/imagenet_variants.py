"""Evaluation of a classifier on variants of ImageNet.

`val`, `v2`, `a`, `r` and `sketch` are FOLDER/CLASS/*; `c` is FOLDER/[GROUP/]CORRUPTION/SEVERITY/CLASS/*; `real` is the
validation folder with the reassessed labels of its file names; `fgsm` and `pgd` are the validation images, attacked
with the gradient of the model. If a set has fewer classes than the model, the logits of the other classes are masked.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo
from timm.data.real_labels import RealLabelsImagenet
from torch import Tensor, nn

from ...data.loader import Loader, SeededDataset
from ...data.sampler import eval_batches
from ...data.sources.folder import ImageFolder
from ...distributed.device import pins_memory, sum_dtype
from ...distributed.parallel import autocast, memory_format
from ...distributed.world import World
from ...errors import UserError
from ...recipe.schema import Recipe
from .augment import Normalizer, eval_transform, image_only, input_config

NAMES = ("val", "real", "v2", "a", "r", "sketch", "c", "fgsm", "pgd")
# as in RVT (Mao et al., arXiv 2105.07926): no pixel changes by more than EPSILON of 0..1; number and size of the steps
EPSILON = 1 / 255
ATTACKS = {"fgsm": (1, EPSILON), "pgd": (5, EPSILON / 2)}


# names of the folders in which these sets are unpacked
USUAL_FOLDERS = {
    "val": ("val",),
    "real": ("val",),
    "v2": ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency", "imagenet-v2", "imagenetv2"),
    "a": ("imagenet-a",),
    "r": ("imagenet-r",),
    "sketch": ("sketch", "imagenet-sketch"),
    "c": ("imagenet-c",),
    "fgsm": ("val",),
    "pgd": ("val",),
}


VALIDATION_IMAGES = 50_000


# top-1 error of AlexNet by corruption (Hendrycks and Dietterich, arXiv 1903.12261), by which mCE is normalised
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


CorrectClasses = Callable[
    [Tensor, Tensor], Tensor
]  # indices in the folder [B], labels [B] -> correct classes [B, classes], bool


class VariantEvaluator:
    """Evaluates one classifier, whose outputs are `classes`, with its own preprocessing."""

    def __init__(self, recipe: Recipe, model: nn.Module, classes: list[str], world: World):
        self.recipe, self.model, self.classes, self.world = recipe, model, classes, world
        self.transform = partial(image_only, eval_transform(recipe.data, model.pretrained_cfg))
        self.normalize = Normalizer(input_config(recipe.data, model.pretrained_cfg), world.device)

    def evaluate(self, name: str, folder: Path) -> dict[str, Any]:
        """The metrics on the set `name` in `folder`: top1 and top5 in percent, count, and others of the set."""
        if name == "c":
            return self.corruptions(folder)
        images = ImageFolder(folder)
        if name == "real":
            return self.accuracy(images, list(range(len(self.classes))), reassessed(images, self.classes))
        columns = class_columns(images.classes, self.classes, folder)
        right = torch.eye(len(columns), dtype=torch.bool)
        return self.accuracy(images, columns, lambda _, labels: right[labels], attack=ATTACKS.get(name))

    def corruptions(self, folder: Path) -> dict[str, Any]:
        """Top-1 over all corruptions and severities, the error of each corruption, and mCE if all 15 are there."""
        folders = corrupted(folder)
        errors: dict[str, list[float]] = {}
        for corruption, severity in folders:
            images = ImageFolder(severity)
            columns = class_columns(images.classes, self.classes, severity)
            eye = torch.eye(len(columns), dtype=torch.bool)
            found = self.accuracy(images, columns, lambda _, labels, eye=eye: eye[labels])
            errors.setdefault(corruption, []).append(100 - found["top1"])
        mean = {corruption: float(np.mean(values)) for corruption, values in errors.items()}
        complete = set(ALEXNET_ERROR) <= set(mean) and all(len(errors[name]) == 5 for name in ALEXNET_ERROR)
        relative = [mean[name] / reference for name, reference in ALEXNET_ERROR.items() if complete]
        return {
            "top1": 100 - float(np.mean(list(mean.values()))),
            "mce": float(np.mean(relative)) if complete else None,
            "errors": mean,
            "folders": len(folders),
        }

    def accuracy(
        self,
        images: ImageFolder,
        columns: list[int],
        correct_classes: CorrectClasses,
        attack: tuple[int, float] | None = None,
    ) -> dict[str, Any]:
        """Top-1 and top-5 over one folder; an image without a correct class does not count.

        attack: number and size of the steps by which the images are attacked before.
        """
        data, world = self.recipe.data, self.world
        keys = eval_batches(len(images), data.eval_batch, world.rank, world.size)
        dataset = SeededDataset(images, self.transform, self.recipe.run.seed)
        pin, timeout = pins_memory(world.device), self.recipe.guard.timeout
        batches = Loader(dataset, keys, workers=data.workers, prefetch=2, pin=pin, timeout=timeout)
        sums = torch.zeros(3, dtype=sum_dtype(world.device), device=world.device)
        try:
            with world.raise_on_all_ranks(), torch.no_grad(), autocast(self.recipe.parallel, world):
                for pixels, labels, positions in batches:
                    correct = correct_classes(positions, labels).to(world.device)
                    pixels = self.normalize(pixels.to(world.device))
                    pixels = pixels.contiguous(memory_format=memory_format(self.recipe.parallel))
                    if attack is not None:
                        pixels = self.attacked(pixels, labels.to(world.device), columns, *attack)
                    best = self.model(pixels)[:, columns].float().topk(min(5, len(columns))).indices
                    hits = correct.gather(1, best)
                    sums += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), correct.any(1).sum()])
        finally:
            batches.close()
        top1, top5, count = world.sum(sums).tolist()
        percent = 100 / max(count, 1)
        return {"top1": percent * top1, "top5": percent * top5, "count": int(count), "classes": len(columns)}

    def attacked(self, images: Tensor, labels: Tensor, columns: list[int], steps: int, size: float) -> Tensor:
        """Normalized images [B, C, H, W] changed by at most EPSILON, so that the loss of their labels [B] grows.

        FGSM (Goodfellow et al., arXiv 1412.6572) is one step in the direction of the gradient's sign; PGD (Madry et
        al., arXiv 1706.06083) several, each followed by a projection. It starts at the image itself.
        """
        mean, std = self.normalize.mean, self.normalize.std
        low = torch.maximum(images - EPSILON / std, -mean / std)
        high = torch.minimum(images + EPSILON / std, (1 - mean) / std)
        found = images
        for _ in range(steps):
            found = found.detach().requires_grad_()
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(self.model(found)[:, columns].float(), labels)
            (gradient,) = torch.autograd.grad(loss, found)
            found = torch.clamp(found.detach() + size / std * gradient.sign(), low, high)
        return found


def class_columns(folders: list[str], classes: list[str], where: Path) -> list[int]:
    """The index of the model's output for each class folder, by name, or by number if all are numbers (ImageNet-V2)."""
    position = {name: index for index, name in enumerate(classes)}
    unknown = [name for name in folders if name not in position]
    if unknown and all(name.isdecimal() for name in folders):
        unknown = [name for name in folders if int(name) >= len(classes)]
        position = {name: int(name) for name in folders}
    if unknown:
        raise UserError(
            f"{where} has the class {unknown[0]}, which the model does not have ({', '.join(classes[:3])}, ...); name "
            "class folders as in training, or number them from 0"
        )
    return [position[name] for name in folders]


def reassessed(images: ImageFolder, classes: list[str]) -> CorrectClasses:
    """The ReaL labels (Beyer et al., arXiv 2006.07159), by file name (ILSVRC2012_val_00000001.JPEG ...)."""
    labels = RealLabelsImagenet(range(VALIDATION_IMAGES)).real_labels
    position, synsets = {name: index for index, name in enumerate(classes)}, ImageNetInfo().label_names()
    table = torch.zeros(len(images), len(classes), dtype=torch.bool)
    for row, path in enumerate(images.paths):
        file = f"{Path(path.decode()).stem}.JPEG"
        if file not in labels:
            raise UserError(f"{path.decode()} is not named like an image of ImageNet's validation set, as real needs")
        known = [position[synsets[label]] for label in labels[file] if synsets[label] in position]
        table[row, known] = True
    return lambda positions, _: table[positions]


def corrupted(folder: Path) -> list[tuple[str, Path]]:
    """(corruption, FOLDER/[GROUP/]CORRUPTION/SEVERITY) for every severity found."""
    found = [path for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/[1-5]")) if path.is_dir()]
    if not found:
        raise UserError(f"{folder} has no CORRUPTION/SEVERITY/CLASS folders with severities 1 to 5")
    return [(path.parent.name, path) for path in found]


def parse_sets(texts: list[str], root: Path | None = None) -> dict[str, Path]:
    """Parse NAME=FOLDER arguments; a NAME alone is a folder of the usual name in `root`, several with commas.

    Raises UserError for an unknown name, and if no folder of the usual names exists.
    """
    sets = {}
    for text in (part for argument in texts for part in argument.split(",")):
        name, equals, folder = text.partition("=")
        if name not in NAMES or bool(equals) != bool(folder) or not (folder or root):
            raise UserError(
                f"--sets {text!r} must be NAME=FOLDER with NAME one of {', '.join(NAMES)}, or NAME alone with --data "
                "root=FOLDER that holds it"
            )
        sets[name] = Path(folder) if folder or root is None else usual_folder(name, root)
    return sets


def usual_folder(name: str, root: Path) -> Path:
    """The folder of the set `name` in or beside `root`, the folder of ImageNet. Raises UserError if there is none."""
    for folder in (base / usual for base in (root, root.parent) for usual in USUAL_FOLDERS[name]):
        if folder.is_dir():
            return folder
    raise UserError(
        f"--sets {name}: neither in {root} nor beside it is a folder {' or '.join(USUAL_FOLDERS[name])}; give "
        f"{name}=FOLDER"
    )


def timm_rows(model: Any, name: str, metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The columns of timm's tables of results as lines of CSV, with the name of the set in a column of its own."""
    cfg = model.pretrained_cfg
    yield "model,set,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    for title, found in metrics.items():
        numbers = [found["top1"], 100 - found["top1"]]
        numbers += [found["top5"], 100 - found["top5"]] if "top5" in found else [None, None]
        cells = ["" if number is None else f"{number:.3f}" for number in numbers]
        size = found["size"]
        yield ",".join(
            [name, title, *cells, f"{millions:.2f}", str(size), f"{cfg['crop_pct']:.3f}", cfg["interpolation"]]
        )


def format_lines(metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One line per set."""
    for name, found in metrics.items():
        numbers = [f"{key} {found[key]:.2f}" for key in ("top1", "top5", "mce") if found.get(key) is not None]
        extent = (
            f"{found['count']} images of {found['classes']} classes"
            if "count" in found
            else f"{found['folders']} of 75 folders"
        )
        yield f"{name}: {', '.join(numbers)} ({extent})"
