"""Images with a class for every pixel, from data sets in the layout in which they are handed out, and digit scenes.

A data set is a sequence of (PIL.Image RGB, uint8 mask [H, W], 255: not known) with `classes` and `palette`.
Paths lie in numpy arrays, so that loader processes share their memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ..data import as_rgb, decoding
from ..demo_scenes import DigitScenes, split_length
from ..errors import UserError
from ..openmmlab import mmseg_modules
from ..schema import Data

IGNORED = 255
UNKNOWN = -1
ORIENTATION = 0x0112  # the EXIF tag
LISTED = 20  # missing files, at most
MISSING = "; the folder must be as it comes out of the published archive"


class Pairs(Dataset[tuple[Image.Image, np.ndarray]]):
    """Image files and mask files, side by side."""

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path],
        *,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        table: Mapping[int, int],
    ):
        """table: value in a mask file to class or IGNORED; another value there is an error."""
        self.images, self.masks = (np.array([str(path).encode() for path in paths]) for paths in (images, masks))
        self.classes, self.palette = list(classes), [list(colour) for colour in palette]
        self.table = np.full(2**16, UNKNOWN, np.int16)
        self.table[list(table)] = list(table.values())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image_path, mask_path = self.images[index].decode(), self.masks[index].decode()
        image, mask = read_image(image_path), self.translated(read_mask(mask_path), mask_path)
        return oriented(image, mask, f"image {image_path} and mask {mask_path}"), mask

    def translated(self, values: np.ndarray, path: str) -> np.ndarray:
        """File values to classes."""
        if values.size and not 0 <= values.min() <= values.max() < len(self.table):
            raise UserError(
                f"mask {path} holds the value {values.min() if values.min() < 0 else values.max()}, no class"
            )
        mask = self.table[values]
        if mask.size and mask.min() == UNKNOWN:
            strange = sorted(set(np.unique(values[mask == UNKNOWN]).tolist()))[:5]
            raise UserError(
                f"mask {path} holds the values {', '.join(map(str, strange))}, which stand for none of the "
                f"{len(self.classes)} classes; is it of another data set, or recoloured?"
            )
        return mask.astype(np.uint8)


class Scenes(Dataset[tuple[Image.Image, np.ndarray]]):
    """Scenes of handwritten digits: class 0 is background, class 1 + d the digit d."""

    def __init__(self, split: str, *, length: int, side: int):
        self.scenes = DigitScenes(split, length=length, side=side, heights=HEIGHTS)
        self.classes = ["background", *self.scenes.classes]
        self.palette = [[0, 0, 0], *DIGIT_COLOURS]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        scene = self.scenes[index]
        return scene.image, np.concatenate([[0], 1 + scene.labels])[scene.instances].astype(np.uint8)


HEIGHTS = (0.4, 0.7)  # of a digit, as shares of the scene: strokes of several cells of the finest map
DIGIT_COLOURS = [
    *([230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48]),
    *([145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60], [170, 110, 40]),
]


def build_dataset(data: Data, split: str) -> Any:
    """The "train" or "val" split. Raises UserError naming a folder, list or mask that is missing."""
    if data.source == "digit_scenes":
        try:
            return Scenes(split, length=split_length(split, data.scenes), side=data.size)
        except ImportError as error:
            raise UserError(str(error)) from error
    mmseg_modules()
    builders = {"ade20k": ade20k, "cityscapes": cityscapes, "voc2012": voc2012, "voc2012_aug": voc2012_aug}
    return builders[data.source](Path(str(data.root)), split)


def ade20k(root: Path, split: str) -> Pairs:
    """ADE20K scene parsing (SceneParse150): `{images,annotations}/{training,validation}/*`; 0 in a mask is no class."""
    root = inside(root, "ADEChallengeData2016", "images")
    part = {"train": "training", "val": "validation"}[split]
    images = _files(root / "images" / part, "*.jpg", root)
    masks = _present([root / "annotations" / part / f"{image.stem}.png" for image in images], "masks")
    table = {0: IGNORED, 255: IGNORED} | {value: value - 1 for value in range(1, 151)}
    return Pairs(images, masks, **_facts("ade20k"), table=table)


def cityscapes(root: Path, split: str) -> Pairs:
    """Cityscapes with fine annotations: 19 of its labels are classes, the others are ignored."""
    from torchvision.datasets import Cityscapes

    images = _files(root / "leftImg8bit" / split, "*/*_leftImg8bit.png", root)
    masks = []
    for image in images:
        name = image.name.removesuffix("_leftImg8bit.png") + "_gtFine_labelIds.png"
        masks.append(root / "gtFine" / split / image.parent.name / name)
    labels = [label for label in Cityscapes.classes if label.id >= 0]
    table = {label.id: IGNORED if label.ignore_in_eval else label.train_id for label in labels}
    # the licence plate is -1, which is 255 in a byte
    return Pairs(images, _present(masks, "masks"), **_facts("cityscapes"), table=table | {255: IGNORED})


def voc2012(root: Path, split: str) -> Pairs:
    """Pascal VOC 2012, the lists `train` and `val` of its segmentation."""
    return _voc(root, split, "SegmentationClass")


def voc2012_aug(root: Path, split: str) -> Pairs:
    """Pascal VOC 2012 with the further training masks of Hariharan et al. (ICCV 2011), in the list `trainaug`."""
    if split == "val":
        return _voc(root, split, "SegmentationClass")
    return _voc(root, "trainaug", "SegmentationClassAug")


def _voc(root: Path, name: str, folder: str) -> Pairs:
    for inner in ("VOCdevkit/VOC2012", "VOC2012"):
        root = inside(root, inner, "JPEGImages")
    listing = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    try:
        # a line of the augmented list may also be the paths of image and mask
        names = [Path(line.split()[0]).stem for line in listing.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"list {listing} cannot be read ({error.strerror}){MISSING}") from error
    if not names:
        raise UserError(f"list {listing} names no images{MISSING}")
    images = _present([root / "JPEGImages" / f"{name}.jpg" for name in names], f"images of {listing}")
    masks = _present([root / folder / f"{image.stem}.png" for image in images], f"masks of {listing}")
    return Pairs(images, masks, **_facts("voc"), table={255: IGNORED} | {value: value for value in range(21)})


def read_image(path: str) -> Image.Image:
    """RGB as stored; the orientation it asks for in EXIF is still in `info`."""
    with decoding(f"image {path}"), Image.open(path) as image:
        turn = image.getexif().get(ORIENTATION, 1)
        colours = as_rgb(image)
    colours.info = {"orientation": turn}
    return colours


def read_mask(path: str) -> np.ndarray:
    """The values [H, W] of a mask: palette indices, or grey levels of 8 or 16 bits."""
    with decoding(f"mask {path}"), Image.open(path) as mask:
        if mask.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise UserError(f"mask {path} is a picture of mode {mask.mode}; it must hold class numbers, one a pixel")
        return np.array(mask).astype(np.int32)


def oriented(image: Image.Image, mask: np.ndarray, names: str) -> Image.Image:
    """The image as its mask was drawn on it: turned as EXIF says, unless only the image as stored has the mask's size.

    None of the data sets here says which it is. Annotators see a turned image and their masks carry no tag, so turned
    is right where both sizes fit; where only the stored size fits, the masks were made by a tool that ignores the tag.
    """
    stored, turned = image.size, image
    if (turn := image.info.get("orientation", 1)) != 1:
        exif = Image.Exif()
        exif[ORIENTATION] = turn
        tagged = image.copy()
        tagged.info["exif"] = exif.tobytes()
        turned = ImageOps.exif_transpose(tagged)
    wanted = (mask.shape[1], mask.shape[0])
    for candidate in (turned, image):
        if candidate.size == wanted:
            return candidate
    raise UserError(
        f"{names} differ in size: {stored[0]} x {stored[1]} and {wanted[0]} x {wanted[1]} pixels; a mask needs the "
        "size of its image"
    )


def _facts(name: str) -> dict[str, Any]:
    from mmseg.utils import get_classes, get_palette

    return {"classes": get_classes(name), "palette": get_palette(name)}


def inside(root: Path, folder: str, sign: str) -> Path:
    """`root`, or the folder in it that archives unpack to."""
    return root / folder if not (root / sign).is_dir() and (root / folder / sign).is_dir() else root


def _files(folder: Path, pattern: str, root: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"data.root={root} lacks the folder {folder.relative_to(root)}{MISSING}")
    if not (found := sorted(folder.glob(pattern))):
        raise UserError(f"{folder} holds no {pattern}{MISSING}")
    return found


def _present(paths: list[Path], kind: str) -> list[Path]:
    """`paths`, all of which are there: a training must not come upon a missing file hours later."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        listed = ", ".join(missing[:LISTED]) + ", ..." * (len(missing) > LISTED)
        raise UserError(f"{len(missing)} of {len(paths)} {kind} are missing: {listed}{MISSING}")
    return paths
