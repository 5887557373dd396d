"""Evaluation: `tessel evaluate RUN|CHECKPOINT|MODEL [key=value ...] [--sets NAME=FOLDER ...]`.

Evaluates a finished run, or one of its checkpoints, on the validation split, and writes RUN/evaluation/; with
--overlays N also pictures of N predictions of a segmenter or detector. With --sets it evaluates a classifier on
variants of ImageNet instead (val, real, v2, a, r, sketch, c, fgsm, pgd) and writes RUN/sets.json; a name without a
folder is looked for in the folder of --data root=. MODEL is a timm or tessel model with published weights, evaluated
with its own preprocessing: `evaluate cswin_tiny.in1k --data root=IMAGENET` prints the metrics on IMAGENET/val/CLASS/*,
also as a row of timm's tables of results; --weights takes a local file instead. Keys of the recipe that matter in
evaluation can be overridden, for example task.segment.test.flip=true or run.device=cpu.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo

from ..zoo import has_weights
from .distributed.device import describe_replacements
from .distributed.parallel import prepare_model
from .distributed.world import World, init_distributed
from .errors import UserError, report_errors
from .evaluation import (
    check_classes,
    load_checkpoint,
    load_run,
    open_run,
    read_done,
    run_evaluation,
    save_evaluation,
    save_pictures,
)
from .files import damaged_file, write_atomically, writing
from .recipe.load import make_recipe
from .recipe.registry import TASKS, task_spec
from .recipe.schema import Recipe
from .run import checkpoint
from .tasks.base import Task
from .tasks.classify.imagenet_variants import VariantEvaluator, format_lines, parse_sets, timm_rows
from .tasks.classify.task import ClassifyTask
from .tasks.export import load_weights, read_classes
from .tasks.models import check_name, create_model

# prefixes of keys that an evaluation accepts, besides the `eval_keys` of the tasks
EVAL_KEYS = ("data.", "parallel.precision", "parallel.channels_last", "run.device", "guard.timeout")
# those that change how the evaluation runs, not its result
RUNTIME_ONLY_EVAL_KEYS = ("data.eval_batch", "data.workers", "parallel.channels_last", "run.device", "guard.timeout")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = argparse.ArgumentParser(prog="tessel evaluate", description=__doc__)
    parser.add_argument("target", type=Path, help="a run directory, one of its checkpoints/step-*, or a model")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    parser.add_argument("--data", nargs="+", default=[], metavar="key=value", help="data section, for example size=96")
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME[=FOLDER]", help="see above")
    parser.add_argument("--overlays", type=_count, default=0, metavar="N", help="draw the first N predictions")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights of MODEL, instead of the published ones")
    options = parser.parse_intermixed_args(argv)
    with report_errors() as outcome:
        overrides = check_eval_keys([*options.overrides, *(_data_key(text) for text in options.data)])
        root = next((text.partition("=")[2] for text in overrides if text.startswith("data.root=")), "")
        sets, target = parse_sets(options.sets, Path(root) if root else None), options.target
        is_run = any((target / name).is_file() for name in ("recipe.yaml", checkpoint.MANIFEST))
        if options.weights and is_run:
            raise UserError(f"--weights has no effect on {target}, which has its own weights; remove it")
        is_model = not is_run and (timm.is_model(str(target)) or options.weights is not None)
        if options.overlays and (is_model or sets):
            raise UserError("--overlays draws predictions of a run on its validation split; remove it or --sets")
        if is_model:
            evaluate_model(str(target), overrides, sets, options.weights)
        elif sets:
            evaluate_sets(target, overrides, sets)
        else:
            evaluate(target, overrides, options.overlays)
    return outcome.code


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of pictures")
    return int(text)


def _eval_keys() -> tuple[str, ...]:
    return (*EVAL_KEYS, *(key for task in TASKS.values() for key in task.eval_keys))


def _data_key(text: str) -> str:
    """An override of --data, by its name in the recipe."""
    return text if text.startswith(_eval_keys()) else f"data.{text}"


def check_eval_keys(overrides: list[str]) -> list[str]:
    """`overrides`, unchanged. Raises UserError for a key that has no effect on an evaluation."""
    for text in overrides:
        if not text.startswith(_eval_keys()):
            raise UserError(
                f"{text} has no effect on an evaluation, which accepts {', '.join(_eval_keys())}; remove it"
            )
    return overrides


@contextmanager
def start(recipe: Recipe) -> Iterator[World]:
    """`init_distributed`, and a line on stderr on what the device lacks."""
    with init_distributed(recipe.run, recipe.guard) as world:
        text = describe_replacements(recipe.run.device, recipe.parallel, world.device)
        if text and world.main:
            print(text, file=sys.stderr)
        yield world


def evaluate_model(
    name: str, overrides: list[str], sets: dict[str, Path], weights: Path | None
) -> dict[str, dict[str, Any]]:
    """Evaluate a model with its published weights, or those of a file, on folders of ImageNet's classes.

    Prints the metrics of each set, and returns them by its name.
    """
    check_name(name, "the model")
    published = timm.models.get_pretrained_cfg(name)
    assert published is not None
    side = published.input_size[-1]
    sections = {"model": {"name": name}, "data": {"source": "folder", "root": ".", "size": side}, "sched": {"steps": 1}}
    recipe = make_recipe(sections, overrides, source=f"evaluation of {name}")
    if not (weights or has_weights(name)):
        raise UserError(f"{name} has no weights that can be downloaded; --weights FILE evaluates those of a file")
    if weights and not weights.is_file():
        raise UserError(f"--weights {weights}: no such file")
    if recipe.data.source != "folder":
        raise UserError(f"data.source={recipe.data.source}: a model without a run is evaluated on folders of classes")
    folders = sets or {"val": Path(str(recipe.data.root)) / (recipe.data.val_split or "val")}
    own = {"pretrained_cfg_overlay": {"file": str(weights)}} if weights else {}
    with start(recipe) as world:
        with world.raise_on_all_ranks():
            model = create_model(name, recipe.data.size, key="the model", pretrained=True, num_classes=None, **own)
        classes = ImageNetInfo().label_names()
        if model.num_classes != len(classes):
            raise UserError(f"{name} has {model.num_classes} classes, but ImageNet-1K has {len(classes)}")
        evaluator = VariantEvaluator(recipe, prepare_model(model, recipe.parallel, world).eval(), classes, world)
        facts = {"size": recipe.data.size}
        found = {title: evaluator.evaluate(title, folder) | facts for title, folder in folders.items()}
        if world.main:
            print("\n".join([*format_lines(found), *timm_rows(model, name, found)]))
        return found


def evaluate_sets(target: Path, overrides: list[str], sets: dict[str, Path]) -> None:
    """Evaluate a run or a checkpoint on variants of ImageNet; print the metrics and add them to RUN/sets.json."""
    run, recipe = open_run(target, overrides)
    if recipe.task.kind != "classify":
        raise UserError(f"--sets has no effect with task.kind={recipe.task.kind}: these sets have ImageNet's classes")
    with start(recipe) as world:
        if run == target:
            model: Any = load_run(run)[1]
            side = model.pretrained_cfg["input_size"][-1]
            if model.pretrained_cfg.get("fixed_input_size") and side != recipe.data.size:
                raise UserError(f"data.size={recipe.data.size}: the model of {run} accepts images of size {side} only")
            classes, step = list(model.pretrained_cfg["label_names"]), read_done(run)["step"]
        else:
            task = ClassifyTask(recipe, world)
            model, classes = task.build_model(), task.classes
            step = load_checkpoint(target, model, world)
        evaluator = VariantEvaluator(recipe, prepare_model(model, recipe.parallel, world).eval(), classes, world)
        file = run / "sets.json"
        found = {name: evaluator.evaluate(name, folder) | {"folder": str(folder)} for name, folder in sets.items()}
        with world.raise_on_all_ranks():
            if world.main:
                known = known_sets(file)
                known |= {name: metrics | {"step": step} for name, metrics in found.items()}
                with writing(file):
                    write_atomically(file, json.dumps(known, indent=1) + "\n")
                print("\n".join([*format_lines(found), f"written to {file}"]))


def known_sets(file: Path) -> dict[str, Any]:
    """The metrics in a run's sets.json, if it has one. Raises UserError if it is damaged."""
    if not file.is_file():
        return {}
    with damaged_file(file, "delete it, and evaluate again"):
        return {**json.loads(file.read_text(encoding="utf-8"))}


def evaluate(target: Path, overrides: list[str], overlays: int = 0) -> None:
    """Evaluate a run or a checkpoint and print the metrics; draw the first `overlays` predictions."""
    run, recipe = open_run(target, overrides)
    if task_spec(recipe).metric is None:
        raise UserError(f"task.kind={recipe.task.kind} has no evaluation")
    is_checkpoint = run != target
    with start(recipe) as world:
        task: Task = task_spec(recipe).build(recipe, world)
        if overlays and type(task).pictures is Task.pictures:
            raise UserError(f"--overlays has no effect with task.kind={recipe.task.kind}; remove it")
        task.keep_pictures(overlays)
        model = task.build_model()
        if is_checkpoint:
            check_classes(task.classes, checkpoint.read_manifest(target).get("classes"), target)
            step = load_checkpoint(target, model, world)
        else:
            step = read_done(run)["step"]
            check_classes(task.classes, read_classes(run / "export"), run)
            load_weights(model, run / "export")
        prepare_model(model, recipe.parallel, world)
        accumulated = run_evaluation(task, model, world, recipe.parallel, keep=True)
        assert accumulated is not None
        evaluated = str(target if is_checkpoint else run / "export")
        changed = [text for text in overrides if not text.startswith(RUNTIME_ONLY_EVAL_KEYS)]
        facts = {"step": step, "checkpoint": evaluated, "overrides": changed}
        metrics = save_evaluation(run, accumulated, facts, world)
        if overlays:
            predictions = accumulated.predictions()
            with world.raise_on_all_ranks():
                if world.main:
                    save_pictures(task, predictions, run / "evaluation" / "overlays", overlays)
        if world.main:
            print(", ".join(f"{key} {value:.2f}" for key, value in metrics.items() if isinstance(value, float)))
            print(f"{metrics['count']} images; written to {run / 'evaluation'}")


if __name__ == "__main__":
    sys.exit(main())
