"""The models of the three tasks: preprocessing, network, and the result of each image.

`network` takes tensors of any device and returns them on its own, `network.device` (see `networks`).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from ..train.data.bands import viewable
from ..train.data.image_io import RGB, Picture
from ..train.errors import UserError
from ..train.recipe.schema import PixelFormat
from .images import image_tensor
from .results import Classification, Detection, Segmentation

Named = list[tuple[str, Image.Image]]
NamedPictures = list[tuple[str, Picture]]
Color = tuple[int, int, int]
Network = Any  # a TorchNetwork or an ExportedNetwork
# of timm's data config: how an image becomes a tensor
CONFIG_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


class Classifier:
    """`network`: images [B, C, H, W] to logits [B, classes]; `config`: timm's, of resolve_data_config.

    `background` lies below transparent pixels.
    """

    task = "classify"

    def __init__(
        self,
        network: Network,
        classes: Sequence[str],
        config: Mapping[str, Any],
        *,
        background: Color = RGB.background,
    ):
        from timm.data import create_transform

        from ..train.tasks.classify.augment import Normalizer
        from ..train.tasks.classify.channels import channel_steps

        self.pixel_format = PixelFormat(config["input_size"][0], background)
        self.network, self.classes = network, list(classes)
        self.config = {key: config[key] for key in CONFIG_KEYS if key in config}
        self.config["interpolation"] = {"random": "bicubic"}.get(config["interpolation"], config["interpolation"])
        before, after = channel_steps(self.pixel_format.channels)
        steps: list[Any] = [*before, create_transform(**self.config, normalize=False), *after]
        self.transform, self.normalize = Compose(steps), Normalizer(self.config, torch.device("cpu"))

    def metadata(self) -> dict[str, Any]:
        """What an exported file says of itself, by the keys of `tessel.export.metadata` and a few more."""
        preprocessing = {key: value for key, value in self.config.items() if key != "input_size"}
        return {
            "task": self.task,
            "class_names": self.classes,
            "background": list(self.pixel_format.background),
            **preprocessing,
        }

    def predict(self, named: NamedPictures, *, topk: int = 5) -> list[Classification]:
        if topk < 1:
            raise UserError(f"topk={topk} must be at least 1")
        best = self.logits(named).softmax(1).topk(min(topk, len(self.classes)))
        chosen = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [self.result(*pair, *best) for pair, best in zip(named, chosen, strict=True)]

    def logits(self, named: NamedPictures) -> Tensor:
        """float32 [N, classes], on the CPU."""
        images = self.normalize(torch.stack([cast(Tensor, self.transform(image)) for _, image in named]))
        return self.network(images).float().cpu()

    def result(self, source: str, picture: Picture, indices: list[int], probabilities: list[float]) -> Classification:
        """The result of an image, from the numbers of its classes and their probabilities."""
        image, labels = viewable(picture), [self.classes[index] for index in indices]
        return Classification(source=source, image=image, labels=labels, indices=indices, probabilities=probabilities)


class MultiLabelClassifier(Classifier):
    """A classifier with any number of labels per image: those that are at least as probable as their threshold."""

    task = "multilabel"

    def __init__(
        self,
        network: Network,
        classes: Sequence[str],
        config: Mapping[str, Any],
        *,
        thresholds: Mapping[str, float],
        background: Color = RGB.background,
    ):
        super().__init__(network, classes, config, background=background)
        self.thresholds = dict(thresholds)

    def metadata(self) -> dict[str, Any]:
        return {**super().metadata(), "thresholds": self.thresholds}

    def predict(self, named: NamedPictures) -> list[Classification]:
        limits = torch.tensor([self.thresholds[name] for name in self.classes])
        results = []
        for (source, image), row in zip(named, self.logits(named).sigmoid(), strict=True):
            order = row.argsort(descending=True)
            indices = order[row[order] >= limits[order]].tolist()
            results.append(self.result(source, image, indices, row[indices].tolist()))
        return results


class Segmenter:
    """`network`: images [B, 3, H, W], normalized with mean and std, to logits [B, classes, h, w].

    test: a `SegmentTest`, or the same as a dict: whole images or windows, flips, scales, divisor; img_scale, size:
    `data.img_scale` and `data.size`. fixed_size: (height, width) of a network that takes no other: images are then
    resized to it, whatever their ratio, and predicted as a whole. background: see `Classifier`.
    """

    task = "segment"

    def __init__(
        self,
        network: Network,
        classes: Sequence[str],
        *,
        palette: Sequence[Sequence[int]],
        mean: Sequence[float],
        std: Sequence[float],
        test: Any = None,
        img_scale: Sequence[int] | None = None,
        size: int | None = None,
        fixed_size: tuple[int, int] | None = None,
        background: Color = RGB.background,
    ):
        from pydantic import TypeAdapter

        from ..train.tasks.segment.augment import Normalizer, eval_transform
        from ..train.tasks.segment.options import SegmentTest

        self.network, self.classes, self.palette = network, list(classes), [list(color) for color in palette]
        plain = dataclasses.asdict(test) if isinstance(test, SegmentTest) else test or {}
        self.test = TypeAdapter(SegmentTest).validate_json(json.dumps(plain))
        self.mean, self.std, self.img_scale, self.size = tuple(mean), tuple(std), img_scale, size
        self.fixed_size, self.pixel_format = fixed_size, PixelFormat(background=background)
        if fixed_size is not None:
            self.test, img_scale = SegmentTest(flip=self.test.flip), None
        # what the transform of a run's evaluation reads of the recipe
        data: Any = SimpleNamespace(img_scale=img_scale)
        self.transform = eval_transform(data, self.test)
        self.normalize = Normalizer({"mean": self.mean, "std": self.std}, network.device)

    def metadata(self) -> dict[str, Any]:
        """What an exported file says of itself, by the keys of `tessel.export.metadata` and a few more."""
        return {
            "task": self.task,
            "class_names": self.classes,
            "palette": self.palette,
            "mean": self.mean,
            "std": self.std,
            "test": dataclasses.asdict(self.test),
            "img_scale": self.img_scale,
            "size": self.size,
            "background": list(self.pixel_format.background),
        }

    def predict(self, named: Named) -> list[Segmentation]:
        samples = []
        for source, image in named:
            resized = image
            if self.fixed_size is not None:
                resized = image.resize((self.fixed_size[1], self.fixed_size[0]), Image.Resampling.BILINEAR)
            views, _ = self.transform(resized, np.zeros(resized.size[::-1], np.uint8))
            samples.append((source, image, views))
        results = []
        # images of one size are computed together
        for _, group in groupby(samples, lambda sample: (sample[1].size, [view.shape for view in sample[2]])):
            results += self._predict_equal(list(group))
        return results

    def _predict_equal(self, samples: list[tuple[str, Image.Image, list[Tensor]]]) -> Iterable[Segmentation]:
        from ..train.tasks.segment.metrics import predict

        network, device = self.network, self.network.device
        width, height = samples[0][1].size
        window = self.test.crop or self.size or max(height, width)
        views = [
            self.normalize(torch.stack(list(images)).to(device))
            for images in zip(*(sample[2] for sample in samples), strict=True)
        ]
        masks = predict(network, views, (height, width), self.test, window)
        dtype = np.uint8 if len(self.classes) <= 256 else np.uint16
        for (source, image, _), mask in zip(samples, masks, strict=True):
            yield Segmentation(
                source=source,
                image=image,
                mask=mask.cpu().numpy().astype(dtype),
                classes=self.classes,
                palette=self.palette,
            )


class Detector:
    """`network`: a list of images [3, H, W] in 0..1 to a list of dicts with boxes, labels, scores and maybe masks.

    size: side to which it resizes the short side of an image. padding: color, in 0..1, of pixels that are added to an
    image so that it has a fixed size. panoptic: how queries become segments, see `ExportedDetector`. background: see
    `Classifier`.
    """

    task = "detect"

    def __init__(
        self,
        network: Network,
        classes: Sequence[str],
        *,
        size: int,
        padding: Sequence[float],
        panoptic: Mapping[str, Any] | None = None,
        background: Color = RGB.background,
    ):
        self.network, self.classes, self.size, self.padding = network, list(classes), size, list(padding)
        self.panoptic = panoptic
        self.pixel_format = PixelFormat(background=background)

    def metadata(self) -> dict[str, Any]:
        """What an exported file says of itself, by the keys of `tessel.export.metadata` and a few more."""
        return {
            "task": self.task,
            "class_names": self.classes,
            "size": self.size,
            "padding": self.padding,
            **({} if self.panoptic is None else {"panoptic": dict(self.panoptic)}),
            "background": list(self.pixel_format.background),
        }

    def predict(self, named: Named, *, min_score: float = 0.3) -> list[Detection]:
        if not 0 <= min_score <= 1:
            raise UserError(f"min_score={min_score} must lie in 0..1")
        found = self.network([image_tensor(image) for _, image in named])
        return [
            self._result(source, image, objects, min_score)
            for (source, image), objects in zip(named, found, strict=True)
        ]

    def _result(self, source: str, image: Image.Image, found: dict[str, Tensor], min_score: float) -> Detection:
        objects = {name: tensor.cpu() for name, tensor in found.items()}
        order = objects["scores"].argsort(descending=True, stable=True)
        chosen = order[objects["scores"][order] >= min_score]
        indices = objects["labels"][chosen].tolist()
        masks = objects["masks"][chosen, 0] > 0.5 if "masks" in objects else None
        return Detection(
            source=source,
            image=image,
            boxes=objects["boxes"][chosen].float().numpy(),
            labels=[self.classes[index] for index in indices],
            indices=indices,
            scores=objects["scores"][chosen].float().numpy(),
            masks=None if masks is None else masks.numpy(),
        )
