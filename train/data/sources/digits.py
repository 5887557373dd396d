"""`data.source=digits`: scikit-learn's 1,797 real handwritten digits, without a download."""

import numpy as np
from PIL import Image

from ...errors import UserError
from ...recipe.registry import SourceSpec
from ...recipe.schema import Source

# fixed, so that metrics of runs with different seeds are comparable
SPLIT_SEED = 0
SIDE = 32


class Digits:
    """Handwritten digits, white on black, as ([32, 32] RGB image, class index)."""

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


def load_digits(split: str) -> Digits:
    """1,437 digits to train on or 360 to validate on, stratified by class (Alpaydin & Kaynak, UCI, 1998).

    Raises ValueError for a split other than "train" and "val", UserError without scikit-learn.
    """
    if split not in ("train", "val"):
        raise ValueError(f"the digits have no split={split!r}; use 'train' or 'val'")
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError("the digits are part of scikit-learn: pip install 'tessel[train]'") from error
    ink, targets = load(return_X_y=True)
    parts = train_test_split(np.arange(len(targets)), test_size=0.2, stratify=targets, random_state=SPLIT_SEED)
    chosen = parts[("train", "val").index(split)]
    return Digits(ink[chosen].reshape(-1, 8, 8), targets[chosen])


def open_digits(data: Source, split: str) -> Digits:
    return load_digits(split)


SPEC = SourceSpec(
    name="digits", summary="1,797 handwritten digits, without a download", datasets={"labels": open_digits}
)
