"""Run packaged recipes from beginning to end on miniature data sets.

    python tests/recipe_runner.py [PATTERN ...] [--short] [--out FOLDER]     all recipes; or those that match, as in
                                                                             'imagenet/cswin_*'

A run is stopped by a signal after its first update and resumed to the end. Then its export is evaluated and a report
written. The recipes keep all their keys except:

- model: the family's `_atto` row instead of the published size, with random weights (name, pretrained, init_from)
- data: the miniature set (root), 4 images an update in classification and 2 in the other tasks (batch), decoded in the
  training process (workers)
- length: 3 updates; warm-up and cooldown of one update each if the recipe has them, decay after the second (sched)
- how often: logging and checkpoints at every update, one evaluation (log.every, ckpt.every, eval.every)
- input: classification at most 224 pixels, crops of segmenters 128, short sides of detectors 192 (data.size,
  data.img_scale, model.kwargs.img_size, task.segment.test, task.detect.min_size, task.detect.max_size)
- samples: 128 instead of 512 boxes an image in Mask R-CNNs, and 20 instead of 100 detections (task.detect.kwargs)
- device: the CPU, hence fp32 (run.device, parallel.precision)

With --short, which CI runs, inputs have 64 pixels, the heads of segmenters and detectors few channels, Mask R-CNNs 32
boxes an image, and pictures and report are left out. The exit code is 1 if a recipe failed; FOLDER/NAME.log has
what it printed.
"""

import argparse
import fnmatch
import json
import math
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import miniatures
import torch
import trainer

import tessel.zoo
from tessel.train import evaluate
from tessel.train.__main__ import main as train_main
from tessel.train.evaluation import load_run
from tessel.train.recipe.load import PACKAGED, load_recipe
from tessel.train.recipe.schema import Recipe
from tessel.train.report.__main__ import main as report_main

COLLECTIONS = {"imagenet": miniatures.imagenet, "ade20k": miniatures.ade20k, "coco": miniatures.coco}
RECIPES = sorted(f"{folder}/{path.stem}" for folder in COLLECTIONS for path in (PACKAGED / folder).glob("*.yaml"))
STEPS = 3
WIDTHS = ("feature_size", "mask_feature_size", "hidden_dim")
# a small Mask2Former
NARROW_MASK2FORMER = {
    **{"feature_size": 64, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32},
    **{"encoder_layers": 1, "decoder_layers": 4, "dim_feedforward": 32, "num_queries": 10, "train_num_points": 128},
}
NARROW_PEM = {
    key: value for key, value in NARROW_MASK2FORMER.items() if key not in ("encoder_layers", "encoder_feedforward_dim")
}
# small query detectors, apart from their widths
LAYERS = {"num_queries": 20, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
NARROW_QUERIES: dict[str, dict[str, Any]] = {
    "mask2former": {key: value for key, value in NARROW_MASK2FORMER.items() if key not in WIDTHS},
    "pem": {key: value for key, value in NARROW_PEM.items() if key not in WIDTHS},
    "rtdetrv2": {**LAYERS, "num_denoising": 10},
    "d_fine": {**LAYERS, "num_denoising": 10},
    "deformable_detr": {**LAYERS, "encoder_layers": 1},
}


@cache
def smallest_variants() -> dict[str, str]:
    """The `_atto` row of the family of each model."""
    return {
        name: next(variant for variant in family.variants if variant.endswith("_atto"))
        for family in tessel.zoo.list_families()
        for name in family.variants
    }


def overrides(name: str, data: Path, out: Path, *, short: bool) -> list[str]:
    """What a run of the recipe `name` changes in it. data: folder of the miniature sets."""
    recipe = load_recipe(name)
    changed = {
        "run.out": out,
        "run.device": "cpu",
        "model.name": smallest_variants()[recipe.model.name.partition(".")[0]],
        "model.pretrained": False,
        "model.init_from": None,
        "data.root": data / name.partition("/")[0],
        "data.batch": 4 if recipe.task.kind == "classify" else 2,
        "data.micro_batch": None,
        "data.workers": 0,
        "parallel.precision": "fp32",
        "log.every": 1,
        "log.progress": "lines",
        "ckpt.every": 1,
        "eval.every": STEPS,
        **schedule(recipe),
        **{"classify": classify, "segment": segment}.get(recipe.task.kind, detect)(recipe, short),
    }
    if "img_size" in recipe.model.kwargs:
        changed["model.kwargs"] = {**recipe.model.kwargs, "img_size": changed["data.size"]}
    texts = {key: str(value) if isinstance(value, str | Path) else json.dumps(value) for key, value in changed.items()}
    return [f"{key}={text}" for key, text in texts.items()]


def schedule(recipe: Recipe) -> dict[str, Any]:
    sched = recipe.sched
    keys: dict[str, Any] = {"sched.epochs": None, "sched.steps": STEPS}
    keys |= {f"sched.{part}": 1 for part in ("warmup", "cooldown") if getattr(sched, part)}
    return keys | ({"sched.milestones": [STEPS - 1]} if sched.milestones else {})


def classify(recipe: Recipe, short: bool) -> dict[str, Any]:
    return {"data.size": 64 if short else min(recipe.data.size, 224)}


def segment(recipe: Recipe, short: bool) -> dict[str, Any]:
    size, options = 64 if short else 128, recipe.task.segment
    keys: dict[str, Any] = {"data.size": size, "data.img_scale": [4 * size, size]}
    if options.test.mode == "slide":
        keys |= {"task.segment.test.crop": size, "task.segment.test.stride": size * 2 // 3}
    if short and options.decode_head["type"] == "Mask2Former":
        keys["task.segment.decode_head"] = {**options.decode_head, **NARROW_MASK2FORMER}
    elif short and options.decode_head["type"] == "PEM":
        keys["task.segment.decode_head"] = {**options.decode_head, **NARROW_PEM}
    elif short:
        keys |= {
            f"task.segment.{part}.channels": 8 for part in ("decode_head", "auxiliary_head") if getattr(options, part)
        }
        keys |= {"task.segment.neck.out_channels": 8} if options.neck else {}
    return keys


def detect(recipe: Recipe, short: bool) -> dict[str, Any]:
    size, options = 64 if short else 192, recipe.task.detect
    keys: dict[str, Any] = {"data.size": size, "task.detect.max_size": 2 * size}
    if options.min_size:
        keys["task.detect.min_size"] = [size * side // recipe.data.size for side in options.min_size]
    if recipe.data.aug.crop:
        keys["data.aug.crop"] = size
    if options.detector.endswith("mask_rcnn"):
        samples, found = (32, 5) if short else (128, 20)
        fewer = {"box_batch_size_per_image": samples, "box_detections_per_img": found}
        keys["task.detect.kwargs"] = {**options.kwargs, **fewer}
    if options.detector in NARROW_QUERIES:
        narrow = {"task.detect.channels": 64, "task.detect.kwargs": NARROW_QUERIES[options.detector]}
        if "num_queries" in options.kwargs:  # of which small images have fewer places
            keys["task.detect.kwargs"] = {**options.kwargs, "num_queries": 100}
        return keys | (narrow if short else {})
    return keys | ({"task.detect.channels": 32} if short else {})


def run_recipe(name: str, data: Path, out: Path, *, short: bool) -> str:
    """Train, resume, evaluate and report `name`; what became of its loss. Raises an exception for any fault."""
    arguments = [name, *overrides(name, data, out, short=short)]
    run = out / load_recipe(name).run.name
    with trainer.before_step(1):
        assert train_main(arguments) == 0, "the first start failed"
    assert (run / "PREEMPTED").is_file() and not (run / "DONE").exists(), "the signal did not stop the run"
    assert train_main(arguments) == 0, "the run did not resume"
    losses = [record["loss"] for record in trainer.metrics(run) if record["kind"] == "train"]
    assert len(losses) == STEPS and all(map(math.isfinite, losses)), f"losses {losses}"
    done = json.loads((run / "DONE").read_text())
    assert done["step"] == STEPS and done["count"] > 0, f"DONE has {done}"
    assert sum(parameter.numel() for parameter in load_run(run)[1].parameters()), "the export has no parameters"
    pictures = [] if short or "top1" in done else ["--overlays", "2"]
    assert evaluate.main([str(run), *pictures]) == 0, "the evaluation failed"
    again = json.loads((run / "evaluation" / "evaluation.json").read_text())
    differ = {key for key, value in again.items() if isinstance(value, float) and not math.isclose(value, done[key])}
    assert not differ, f"the export has other metrics than the run: {differ}"
    if not short:
        assert report_main([str(run)]) == 0 and (run / "report" / "index.html").is_file(), "the report failed"
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


def write_data(folder: Path) -> Path:
    """Write the miniature sets into `folder`."""
    for name, write in COLLECTIONS.items():
        write(folder / name)
    return folder


def attempt(names: list[str], folder: Path, *, short: bool) -> Iterator[tuple[str, str]]:
    """(recipe, traceback or empty) for each recipe, with a line of progress."""
    data = write_data(folder / "data")
    for number, name in enumerate(names, 1):
        begun, fault, log = time.monotonic(), "", folder / f"{name.replace('/', '_')}.log"
        with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                text = run_recipe(name, data, folder / "runs", short=short)
            except Exception as error:
                fault, text = traceback.format_exc(), f"FAILED {type(error).__name__}: {error}"
                file.write(fault)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        print(f"[{number:3}/{len(names)}] {name:44} {time.monotonic() - begun:5.1f} s  {text}", flush=True)
        yield name, fault and log.read_text()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN", help="recipes, as in imagenet/cswin_*")
    parser.add_argument("--short", action="store_true", help="64 pixels, narrow heads, no report")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for data and logs; default: a temporary one")
    options = parser.parse_args(argv)
    names = [name for name in RECIPES if any(fnmatch.fnmatch(name, pattern) for pattern in options.patterns)]
    if not names:
        parser.error(f"no recipe matches {' '.join(options.patterns)}; there are for example {', '.join(RECIPES[:3])}")
    folder, begun = options.out or Path(tempfile.mkdtemp(prefix="recipes-")), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    failed = {name: log for name, log in attempt(names, folder, short=options.short) if log}
    for name, log in failed.items():
        print(f"\n== {name}\n{log[-3000:]}")
    ran, seconds = len(names) - len(failed), time.monotonic() - begun
    print(f"{ran} of {len(names)} recipes ran in {seconds:.0f} s; logs in {folder}")
    return int(bool(failed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
