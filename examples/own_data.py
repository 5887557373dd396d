"""Write three small data sets, laid out like a user's own pictures, from the handwritten digits of scikit-learn.

    python examples/own_data.py [FOLDER]     FOLDER defaults to `own`

The pages docs/own_classify.md, own_segment.md and own_detect.md train on them:

    FOLDER/digits/0/*.png ...                         one folder of images per class
    FOLDER/scenes/images/*.jpg, masks/*.png           masks of class values, and classes.txt
    FOLDER/boxes/images/*.jpg, labels/*.txt           boxes in the format of YOLO, and classes.txt
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tessel.train.data.sources.digit_scenes import DigitScenes, SceneMasks

CLASSES = 3  # of the digit pictures: 0, 1 and 2
PER_CLASS = 40
SCENES = 60
SIDE = 160  # of a scene in pixels


def write_digits(folder: Path) -> None:
    """120 pictures of the digits 0, 1 and 2, 64 x 64 pixels."""
    images, labels = load_digits(n_class=CLASSES, return_X_y=True)
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(images[labels == label][:PER_CLASS]):
            picture = Image.fromarray((pixels.reshape(8, 8) * 15.9).astype(np.uint8))
            picture.resize((64, 64)).save(folder / str(label) / f"{number:03}.png")


def write_scenes(folder: Path) -> None:
    """Scenes of digits with a mask each: 0 is the background, 1 to 10 are the digits 0 to 9."""
    scenes = SceneMasks(DigitScenes("train", length=SCENES, side=SIDE))
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(len(scenes)):
        picture, mask = scenes[number]
        picture.save(folder / "images" / f"{number:03}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"{number:03}.png")
    (folder / "classes.txt").write_text("\n".join(scenes.classes) + "\n")


def write_boxes(folder: Path) -> None:
    """The scenes again, with a text file of boxes each: class, center x, center y, width, height as fractions."""
    scenes = DigitScenes("train", length=SCENES, side=SIDE)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(len(scenes)):
        scene, rows = scenes[number], []
        for place, label in enumerate(scene.labels, 1):
            y, x = np.nonzero(scene.instances == place)
            (left, top), (right, bottom) = (x.min(), y.min()), (x.max() + 1, y.max() + 1)
            box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
            rows.append(" ".join([str(label), *(f"{value / SIDE:.6f}" for value in box)]))
        scene.image.save(folder / "images" / f"{number:03}.jpg")
        (folder / "labels" / f"{number:03}.txt").write_text("\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("\n".join(scenes.classes) + "\n")


def main(folder: Path) -> None:
    write_digits(folder / "digits")
    write_scenes(folder / "scenes")
    write_boxes(folder / "boxes")
    print(f"wrote {folder}/digits, {folder}/scenes and {folder}/boxes")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own"))
