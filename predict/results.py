"""What a model says of an image: a class, a mask, or boxes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..train.errors import UserError
from .legend import with_legend


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Prediction:
    """The result of one image: its name (a path, a url, or `image N`), and the RGB image that was read."""

    source: str
    image: Image.Image

    def plot(self) -> Image.Image:
        """The image with the result drawn on it."""
        raise NotImplementedError

    def summary(self) -> str:
        """The result in one line."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The result as data for JSON."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write `plot()` as a picture, or `to_dict()` if the name ends in .json. Returns the path.

        Folders are made. Raises UserError if the file cannot be written, or PIL does not know the ending.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            else:
                self.plot().save(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be written: {error}") from error
        return path


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Classification(Prediction):
    """The most probable classes, the best first; of a model with several labels per image all predicted labels.

    labels: their names; indices: their numbers in the model's output; probabilities: in 0..1, by softmax over all
    classes, or of each label by itself.
    """

    labels: list[str]
    indices: list[int]
    probabilities: list[float]

    @property
    def label(self) -> str:
        """The name of the most probable class."""
        return self.labels[0]

    def summary(self) -> str:
        return ", ".join(f"{100 * p:.1f}% {label}" for p, label in self._pairs()) or "no label"

    def to_dict(self) -> dict[str, Any]:
        rows = zip(self.labels, self.indices, self.probabilities, strict=True)
        return {
            "source": self.source,
            "classes": [{"label": label, "index": index, "probability": p} for label, index, p in rows],
        }

    def plot(self) -> Image.Image:
        canvas = self.image.copy()
        draw = ImageDraw.Draw(canvas, "RGBA")
        size = max(10, min(canvas.size) // 24)
        text = "\n".join(f"{100 * p:.1f}% {label}" for p, label in self._pairs()) or "no label"
        font, at = ImageFont.load_default(size), (size // 2, size // 2)
        left, top, right, bottom = draw.multiline_textbbox(at, text, font=font)
        draw.rectangle((left - size // 3, top - size // 3, right + size // 3, bottom + size // 3), fill=(0, 0, 0, 160))
        draw.multiline_text(at, text, font=font, fill="white")
        return canvas

    def _pairs(self) -> list[tuple[float, str]]:
        return list(zip(self.probabilities, self.labels, strict=True))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Segmentation(Prediction):
    """A class for every pixel: `mask`, uint8 or uint16 [H, W], holds indices into `classes` and `palette`."""

    mask: np.ndarray
    classes: list[str]
    palette: list[list[int]]

    def shares(self) -> dict[str, float]:
        """Share of the pixels of each class that occurs, the largest first."""
        indices, counts = np.unique(self.mask, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {self.classes[indices[i]]: float(counts[i] / self.mask.size) for i in order}

    def summary(self) -> str:
        return ", ".join(f"{100 * share:.1f}% {name}" for name, share in self.shares().items())

    def to_dict(self) -> dict[str, Any]:
        height, width = self.mask.shape
        return {"source": self.source, "width": width, "height": height, "classes": self.shares()}

    def plot(self, *, legend: bool = True) -> Image.Image:
        """The image under the colors of its classes; `legend`: with their names below it, the largest class first."""
        from ..train.tasks.segment.overlay import overlay

        drawn = overlay(self.image, [self.mask], self.palette)
        colors = {name: tuple(self.palette[self.classes.index(name)]) for name in self.shares()}
        return with_legend(drawn, colors) if legend else drawn

    def mask_image(self) -> Image.Image:
        """The mask as an image whose pixels are class indices: with the colors of `palette` up to 256 classes."""
        if len(self.classes) > 256:
            return Image.fromarray(self.mask.astype(np.uint16))
        image = Image.fromarray(self.mask.astype(np.uint8), "P")
        image.putpalette([value for color in self.palette for value in color])
        return image


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Detection(Prediction):
    """Objects, the most confident first.

    boxes: float32 [N, 4], left, top, right, bottom in pixels; labels: a class name each; indices: its number;
    scores: float32 [N] in 0..1; masks: bool [N, H, W], None from a model that finds boxes only.
    """

    boxes: np.ndarray
    labels: list[str]
    indices: list[int]
    scores: np.ndarray
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def summary(self) -> str:
        counts = {label: self.labels.count(label) for label in dict.fromkeys(self.labels)}
        return ", ".join(f"{count} {label}" for label, count in counts.items()) or "nothing found"

    def to_dict(self) -> dict[str, Any]:
        """Masks are run lengths of COCO, uncompressed: column by column, beginning with the background."""
        rows = zip(self.labels, self.indices, self.scores.tolist(), self.boxes.tolist(), strict=True)
        objects: list[dict[str, Any]] = [
            {"label": label, "index": index, "score": score, "box": box} for label, index, score, box in rows
        ]
        for row, mask in zip(objects, self.masks if self.masks is not None else (), strict=False):
            row["mask"] = {"size": list(mask.shape), "counts": run_lengths(mask)}
        return {"source": self.source, "width": self.image.width, "height": self.image.height, "objects": objects}

    def plot(self, *, legend: bool = True) -> Image.Image:
        """The image with boxes, names, scores and masks; `legend`: with the names and their colors below it."""
        import torch
        from torchvision.transforms.v2.functional import to_pil_image

        from ..train.tasks.detect.overlay import COLORS, draw_objects
        from .images import image_tensor

        objects = {
            "boxes": torch.from_numpy(self.boxes),
            "labels": torch.tensor(self.indices, dtype=torch.int64),
            "scores": torch.from_numpy(self.scores),
        }
        if self.masks is not None:
            objects["masks"] = torch.from_numpy(self.masks)[:, None].float()
        names = dict(zip(self.indices, self.labels, strict=True))
        classes = [names.get(index, "") for index in range(max(self.indices, default=-1) + 1)]
        drawn = to_pil_image(draw_objects(image_tensor(self.image), objects, classes, min_score=0.0))
        colors = {name: COLORS[index % len(COLORS)] for index, name in sorted(names.items())}
        return with_legend(drawn, colors) if legend else drawn


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of equal values in a bool mask [H, W], column by column; the first run is of False."""
    flat = np.concatenate([[False], mask.flatten(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
