"""Data that needs no download: scikit-learn's 1,797 real handwritten digits."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

# the held-out digits are the same for every run, so figures of different seeds compare
SPLIT_SEED = 0


SIDE = 32


class Digits(Dataset[tuple[Image.Image, int]]):
    """Handwritten digits, white on black, as ([32, 32] RGB image, class) pairs."""

    def __init__(self, ink: np.ndarray, targets: np.ndarray):
        """ink: [N, 8, 8] in 0..16; targets: [N] in 0..9."""
        self.pixels = (ink * (255 / 16)).round().astype(np.uint8)
        self.targets: list[int] = targets.tolist()
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.pixels[index]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return image.convert("RGB"), self.targets[index]


def digits(split: str) -> Digits:
    """The digits of one split: 1,437 to train on, 360 held out, each class in its share (Alpaydin & Kaynak, UCI, 1998).

    Raises ValueError for another split than "train" and "val", ImportError without scikit-learn.
    """
    if split not in ("train", "val"):
        raise ValueError(f"the digits have no split={split!r}; use 'train' or 'val'")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the demo digits come with scikit-learn: pip install 'tessel[train]'") from error
    ink, targets = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(targets)), test_size=0.2, stratify=targets, random_state=SPLIT_SEED)
    chosen = parts[("train", "val").index(split)]
    return Digits(ink[chosen].reshape(-1, 8, 8), targets[chosen])
