"""Export a model with torch.export, load it again, and compare the speed of two models.

Exports with a batch size that stays free, saves the program to a file, loads it, checks that it computes the same, and
prints images per second of both models side by side. The loaded program needs torch, but not tessel.

    python examples/export_and_compare.py [MODEL MODEL]
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch
from torch.utils.benchmark import Timer

import tessel.zoo  # noqa: F401  registers the models with timm

names = sys.argv[1:] or ["cswin_atto", "litv2_atto"]
images = torch.randn(4, 3, 224, 224)
models = {name: timm.create_model(name, num_classes=10).eval() for name in names}

with tempfile.TemporaryDirectory() as folder:
    for name, model in models.items():
        file = Path(folder) / f"{name}.pt2"
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        torch.export.save(program, file)
        loaded = torch.export.load(file).module()
        with torch.inference_mode():
            difference = (loaded(images[:3]) - model(images[:3])).abs().max()
        print(f"{name}: exported to {file.stat().st_size / 1e6:.1f} MB; largest difference {difference:.1e}")

with torch.inference_mode():
    for name, model in models.items():
        timer = Timer("model(images)", globals={"model": model, "images": images}, num_threads=torch.get_num_threads())
        print(
            f"{name}: {len(images) / timer.blocked_autorange(min_run_time=2).median:.0f} images/s at 224 x 224 pixels"
        )
