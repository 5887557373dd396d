"""Evaluation: `python -m tessel.train.evaluate RUN|CHECKPOINT|NAME [key=value ...] [--sets NAME=FOLDER ...]`.

Judges an exported run, or one of its checkpoints, on the validation split and writes RUN/evaluation/, with --overlays N
also pictures of N predictions of a segmenter or detector; with --sets on ImageNet's further sets instead (val, real,
v2, a, r, sketch, c), into RUN/sets.json. NAME is a timm or tessel model with published weights, judged with its own
preprocessing: `evaluate cswin_tiny.in1k --data root=IMAGENET` prints the figures on IMAGENET/val/CLASS/*; --weights
takes a file that is already here. Of a recipe's other keys those that judging heeds can be given anew, for example
task.segment.test.flip=true or run.device=cpu.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo

from .distributed.parallel import prepare_model
from .distributed.world import init_distributed
from .errors import UserError, report_errors
from .evaluation import (
    _finished,
    _same_classes,
    draw,
    load_checkpoint,
    load_run,
    opened,
    run_evaluation,
    save_evaluation,
)
from .files import write_atomically, writing
from .recipe.load import make_recipe
from .run import checkpoint
from .tasks.build import build_task
from .tasks.classify.imagenet_variants import VariantEvaluator, lines, parse
from .tasks.classify.task import ClassifyTask
from .tasks.export import exported_classes, load_weights
from .tasks.models import check_name, create_model

# keys of a recipe that judging heeds
EVAL_KEYS = (
    *("data.", "task.segment.test.", "task.detect.val", "task.detect.longest", "task.detect.kwargs"),
    *("parallel.precision", "parallel.channels_last", "run.device", "guard.timeout"),
)


# of these, how it is done and not what is found
RUNTIME_ONLY_EVAL_KEYS = ("data.eval_batch", "data.workers", "parallel.channels_last", "run.device", "guard.timeout")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tessel.train.evaluate", description=__doc__)
    parser.add_argument("target", type=Path, help="a run directory, one of its checkpoints/step-*, or a model")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what judging heeds of the recipe's keys")
    parser.add_argument("--data", nargs="+", default=[], metavar="key=value", help="data section, for example size=96")
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME=FOLDER", help="v2, a, r, sketch, c, real or val")
    parser.add_argument("--overlays", type=_count, default=0, metavar="N", help="draw the first N predictions")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of the model, instead of its published ones")
    options = parser.parse_intermixed_args(argv)
    with report_errors() as outcome:
        overrides = check_eval_keys([*options.overrides, *(_whole(text) for text in options.data)])
        sets, target = parse(options.sets), options.target
        is_run = any((target / name).is_file() for name in ("recipe.yaml", checkpoint.MANIFEST))
        if options.weights and is_run:
            raise UserError(f"--weights has no effect on {target}, which has weights of its own; remove it")
        is_model = not is_run and (timm.is_model(str(target)) or options.weights is not None)
        if options.overlays and (is_model or sets):
            raise UserError("--overlays draws what a run predicts on its validation split; remove it or --sets")
        if is_model:
            evaluate_model(str(target), overrides, sets, options.weights)
        elif sets:
            evaluate_sets(target, overrides, sets)
        else:
            evaluate(target, overrides, options.overlays)
    return outcome.code


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no number of pictures")
    return int(text)


def _whole(text: str) -> str:
    """A key of --data as the recipe has it."""
    return text if text.startswith(EVAL_KEYS) else f"data.{text}"


def check_eval_keys(overrides: list[str]) -> list[str]:
    """`overrides`. Raises UserError for a key that changes nothing of an evaluation."""
    for text in overrides:
        if not text.startswith(EVAL_KEYS):
            raise UserError(f"{text} has no effect on an evaluation, which heeds {', '.join(EVAL_KEYS)}; remove it")
    return overrides


def evaluate_model(name: str, overrides: list[str], sets: dict[str, Path], weights: Path | None) -> None:
    """VariantEvaluator a model with published weights, or with those of a file, on folders of ImageNet's classes."""
    check_name(name, "the model")
    published = timm.models.get_pretrained_cfg(name)
    assert published is not None
    side = published.input_size[-1]
    sections = {"model": {"name": name}, "data": {"source": "folder", "root": ".", "size": side}, "sched": {"steps": 1}}
    recipe = make_recipe(sections, overrides, source=f"evaluation of {name}")
    if not (weights or published.has_weights):
        raise UserError(f"{name} has no weights that can be fetched; --weights FILE judges those of a file")
    if weights and not weights.is_file():
        raise UserError(f"--weights {weights}: there is no such file")
    if recipe.data.source != "folder":
        raise UserError(f"data.source={recipe.data.source}: a model without a run is judged on folders of classes")
    folders = sets or {"val": Path(str(recipe.data.root)) / (recipe.data.val_split or "val")}
    own = {"pretrained_cfg_overlay": {"file": str(weights)}} if weights else {}
    with init_distributed(recipe.run, recipe.guard) as world:
        with world.raise_on_all_ranks():
            model = create_model(name, recipe.data.size, key="the model", pretrained=True, num_classes=None, **own)
        classes = ImageNetInfo().label_names()
        if model.num_classes != len(classes):
            raise UserError(f"{name} tells {model.num_classes} classes apart, ImageNet-1K has {len(classes)}")
        judge = VariantEvaluator(recipe, prepare_model(model, recipe.parallel, world).eval(), classes, world)
        found = {title: judge.judge(title, folder) for title, folder in folders.items()}
        if world.main:
            print("\n".join(lines(found)))


def evaluate_sets(target: Path, overrides: list[str], sets: dict[str, Path]) -> None:
    """Evaluate a run, or a checkpoint where its training data is, on further sets; keep and print what was found."""
    run, recipe = opened(target, overrides)
    if recipe.task.kind != "classify":
        raise UserError(f"--sets has no effect with task.kind={recipe.task.kind}: these are sets of ImageNet's classes")
    with init_distributed(recipe.run, recipe.guard) as world:
        if run == target:
            model: Any = load_run(run)[1]
            side = model.pretrained_cfg["input_size"][-1]
            if model.pretrained_cfg.get("fixed_input_size") and side != recipe.data.size:
                raise UserError(f"data.size={recipe.data.size}: the model of {run} takes images of {side} alone")
            classes, step = list(model.pretrained_cfg["label_names"]), _finished(run)["step"]
        else:
            task = ClassifyTask(recipe, world)
            model, classes = task.build_model(), task.classes
            step = load_checkpoint(target, model, world)
        judge, file = (
            VariantEvaluator(recipe, prepare_model(model, recipe.parallel, world).eval(), classes, world),
            run / "sets.json",
        )
        found = {name: judge.judge(name, folder) | {"folder": str(folder)} for name, folder in sets.items()}
        with world.raise_on_all_ranks():
            if world.main:
                known = json.loads(file.read_text()) if file.is_file() else {}
                known |= {name: figures | {"step": step} for name, figures in found.items()}
                with writing(file):
                    write_atomically(file, json.dumps(known, indent=1) + "\n")
                print("\n".join([*lines(found), f"written to {file}"]))


def evaluate(target: Path, overrides: list[str], overlays: int = 0) -> None:
    """VariantEvaluator a run or a checkpoint and print what was found; draw the first `overlays` predictions."""
    run, recipe = opened(target, overrides)
    at_checkpoint = run != target
    with init_distributed(recipe.run, recipe.guard) as world:
        task: Any = build_task(recipe, world)
        if overlays and not hasattr(task, "pictures"):
            raise UserError(f"--overlays has no effect with task.kind={recipe.task.kind}; remove it")
        task.kept = max(overlays, getattr(task, "kept", 0))
        model = task.build_model()
        if at_checkpoint:
            _same_classes(task.classes, checkpoint.manifest(target).get("classes"), target)
            step = load_checkpoint(target, model, world)
        else:
            step = _finished(run)["step"]
            _same_classes(task.classes, exported_classes(run / "export"), run)
            load_weights(model, run / "export")
        prepare_model(model, recipe.parallel, world)
        scores = run_evaluation(task, model, world, recipe.parallel, keep=True)
        assert scores is not None
        judged = str(target if at_checkpoint else run / "export")
        otherwise = [text for text in overrides if not text.startswith(RUNTIME_ONLY_EVAL_KEYS)]
        facts = {"step": step, "checkpoint": judged, "overrides": otherwise}
        figures = save_evaluation(run, scores, facts, world)
        if overlays:
            predictions = scores.predictions()
            with world.raise_on_all_ranks():
                if world.main:
                    draw(task, predictions, run / "evaluation" / "overlays", overlays)
        if world.main:
            print(", ".join(f"{key} {value:.2f}" for key, value in figures.items() if isinstance(value, float)))
            print(f"{figures['count']} images; written to {run / 'evaluation'}")


if __name__ == "__main__":
    sys.exit(main())
