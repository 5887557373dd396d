"""`Predictor`: reads images, hands them to a model of one task in batches, and gives a result for each."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ..train.data.image_io import Picture
from ..train.errors import UserError
from ..train.recipe.schema import PixelFormat
from .images import Unreadable, as_list, open_images
from .results import Prediction


class TaskModel(Protocol):
    """A model together with what comes before and after it."""

    task: str
    """classify, segment or detect"""
    classes: list[str]
    """names of the outputs"""
    network: Any
    """computes the outputs; the `module` of a `TorchNetwork`, or an ONNX file"""
    pixel_format: PixelFormat
    """channels of the images, and what lies below transparent pixels"""

    def metadata(self) -> dict[str, Any]:
        """Task, classes and preprocessing, as an exported file carries them."""
        ...

    @property
    def predict(self) -> Callable[..., list[Any]]:
        """Called with [(name, picture)] and the options of the task; returns the results in the same order."""
        ...


class Predictor:
    """A model that is ready to predict; `tessel.load` makes it.

    Attributes: `name`, `task` ("classify", "segment" or "detect"), `classes` (names of the outputs), and `model`, which
    holds the network and its preprocessing.
    """

    def __init__(self, name: str, model: TaskModel):
        self.name, self.model, self.task, self.classes = name, model, model.task, model.classes

    def __repr__(self) -> str:
        return f"<Predictor {self.name}: {self.task}, {len(self.classes)} classes>"

    def predict(self, images: Any, *, batch_size: int = 16, **options: Any) -> list[Any]:
        """The result of each image, in a list also if there is one image only.

        images: paths, urls, PIL images, arrays [H, W(, C)] or tensors [C, H, W]: one of them, a list, or a batch
        [N, ...]. Arrays and tensors hold integers of 8 or 16 bits or floats in 0..1; for a model of other than 1 or 3
        channels the values that it was trained with. options: `topk` (default 5) of a classifier, `min_score` (default
        0.3) of a detector.

        Returns `Classification`, `Segmentation` or `Detection` objects. Raises UserError naming an image that cannot be
        read; `stream` skips it instead.
        """
        results = []
        for result in self.stream(images, batch_size=batch_size, **options):
            if isinstance(result, Unreadable):
                raise UserError(result.reason)
            results.append(result)
        return results

    def stream(self, images: Any, *, batch_size: int = 16, **options: Any) -> Iterator[Prediction | Unreadable]:
        """Like `predict`, one result after the other, with an `Unreadable` in the place of what cannot be read.

        The images of the next batch are read while the model computes.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        for opened in _read_ahead(as_list(images), batch_size, self.model.pixel_format):
            readable = [one for one in opened if not isinstance(one, Unreadable)]
            results = iter(self.model.predict(readable, **options) if readable else ())
            for one in opened:
                yield one if isinstance(one, Unreadable) else next(results)


def _read_ahead(
    images: list[Any], batch_size: int, pixel_format: PixelFormat
) -> Iterator[list[tuple[str, Picture] | Unreadable]]:
    """Batches of images, opened; another thread opens the next batch meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for start in range(0, len(images), batch_size):
            opening = pool.submit(open_images, images[start : start + batch_size], start + 1, pixel_format)
            if waiting is not None:
                yield waiting.result()
            waiting = opening
        if waiting is not None:
            yield waiting.result()
