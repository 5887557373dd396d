"""Train a classifier on a folder of images with the trainer, then use it through timm.

Without an argument the script first writes such a folder: handwritten digits 0, 1 and 2 as PNG files. It prints the
trainer's progress, the accuracy on the validation images (`top1`), and the prediction for one of them.

    python examples/own_folder.py [FOLDER]     FOLDER holds train/CLASS/*.png and val/CLASS/*.png (or .jpg)

For real images take a larger model and begin with published weights: `model.name=cswin_tiny model.pretrained=true
data.size=224`.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_model_data_config

import tessel.zoo  # noqa: F401  registers the models with timm


def write_digits(folder: Path) -> None:
    """360 training and 120 validation images of three classes, 64 x 64 pixels."""
    images, labels = load_digits(n_class=3, return_X_y=True)
    for number, (pixels, label) in enumerate(zip(images[:480], labels[:480], strict=True)):
        path = folder / ("val" if number % 4 == 0 else "train") / str(label) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.reshape(8, 8) * 15.9).astype("uint8")).resize((64, 64)).save(path)


def main(folder: Path, output: Path) -> None:
    settings = {
        "data.source": "folder",
        "data.root": folder,
        "data.batch": 32,
        "sched.epochs": 4,
        "log.every": 10,
        "run.name": "own_folder",
        "run.out": output,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-m", "tessel.train", "demo/digits", *overrides], check=True)

    run = output / "own_folder"
    # the export is an ordinary timm model; its configuration holds the preprocessing and the class names
    model = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    file = min((folder / "val").glob("*/*"))
    with torch.inference_mode():
        logits = model(transform(Image.open(file).convert("RGB"))[None])
    print(f"{file.relative_to(folder)} is predicted to be", model.pretrained_cfg["label_names"][logits.argmax()])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary) / "images"
        if len(sys.argv) == 1:
            write_digits(images)
        main(images, Path(temporary) / "runs")
