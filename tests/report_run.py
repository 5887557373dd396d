"""A finished run of the digits, written without training, of which the tests make a report."""

import json

import numpy as np
import timm
import yaml

from tessel.train.data.sources.digits import load_digits
from tessel.train.tasks.export import export_classifier

STEPS, EVERY, STEP_SECONDS = 20, 5, 0.25
DATA = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": (3, 32, 32), "crop_pct": 1.0}


def make_run(path, *, wrong):
    """wrong: indices of the images that are classified as the next class."""
    path.mkdir()
    recipe = {
        "run": {"name": path.name, "out": str(path.parent), "seed": 3},
        "model": {"name": "biformer_atto"},
        "data": {"source": "digits", "size": 32, "batch": 64},
        "sched": {"steps": STEPS},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = []
    for step in range(EVERY, STEPS + 1, EVERY):
        common = {"step": step, "epoch": step / 22, "loss": 3 / step, "time": 1.8e9 + step}
        speed = {"images_per_second": 256.0, "data_wait": 0.03, "step_seconds": STEP_SECONDS}
        lines += [{"kind": "train", "lr": 1e-3, "grad_norm": 1.5, **speed, **common}]
        lines += [{"kind": "eval", "top1": 80.0 + step / 2, "top5": 99.0, "count": 360, **common}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_predictions(path, wrong)
    model = timm.create_model("biformer_atto", num_classes=10)
    export_classifier(model, path / "export", classes=load_digits("val").classes, data_config=DATA)
    (path / "DONE").write_text(json.dumps({"top1": 88.0, "count": 360, "step": STEPS}))
    return path


def save_predictions(path, wrong):
    target = np.array(load_digits("val").targets)
    prediction = target.copy()
    prediction[wrong] = (target[wrong] + 1) % 10
    probability = np.full((360, 10), 0.02)
    probability[np.arange(360), prediction] = 0.82 - np.arange(360) / 1000
    (path / "evaluation").mkdir(exist_ok=True)
    np.savez_compressed(
        path / "evaluation/predictions.npz", target=target, prediction=prediction, probability=probability
    )
    scores = {"top1": 100 * (1 - len(wrong) / 360), "top5": 100.0, "loss": 0.1, "count": 360, "step": STEPS}
    (path / "evaluation/evaluation.json").write_text(json.dumps(scores))
