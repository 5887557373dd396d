"""Prediction on images: `tessel.load(NAME).predict("cat.jpg")`.

`load` takes a model's name, a run, its export, or a file of `tessel export`. The result of an image is a
`Classification`, a `Segmentation` or a `Detection`, with `plot()`, `save(path)` and `to_dict()`.
"""

from .images import Unreadable, find_images
from .loading import load
from .predictor import Predictor
from .results import Classification, Detection, Prediction, Segmentation

__all__ = [
    "Classification",
    "Detection",
    "Prediction",
    "Predictor",
    "Segmentation",
    "Unreadable",
    "find_images",
    "load",
]
