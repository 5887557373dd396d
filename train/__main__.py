"""The command line: `python -m tessel.train RECIPE [key=value ...] [--dry-run]`, also as `tessel-train`."""

import argparse
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from .config import Plan, load_recipe, plan, recipe_hash
from .errors import UserError, report_errors
from .schema import Recipe, leaves

if typing.TYPE_CHECKING:
    from .checkpoint import Checkpoints
    from .engine import Engine
    from .launch import RunDir, World
    from .tasks import Task

EXAMPLES = """\
examples:
  python -m tessel.train demo/digits                            a packaged recipe: on the CPU, without a download
  python -m tessel.train my.yaml optim.lr=1e-3 run.name=fast    any key can be given here too
  torchrun --nproc-per-node 8 -m tessel.train my.yaml           on eight GPUs; data.batch stays the global batch
  python -m tessel.train my.yaml                                again: goes on from the last checkpoint
  python -m tessel.train my.yaml run.fresh=true                 starts over; the old run is moved aside
  python -m tessel.train.evaluate runs/my                       judges the result

sections and keys of a recipe, with default, meaning and type:
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = argparse.ArgumentParser(
        prog="tessel-train",
        usage="python -m tessel.train RECIPE [key=value ...] [--dry-run]",
        description="Train a model as a recipe says. Started again, it goes on where it stopped.",
        epilog=EXAMPLES + "\n".join(describe_keys()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, here or below the packaged tessel.configs")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a key of the recipe, like optim.lr=1e-3")
    parser.add_argument("--dry-run", action="store_true", help="build everything, try one batch, write nothing")
    options = parser.parse_intermixed_args(argv)
    with report_errors() as outcome:
        recipe = load_recipe(options.recipe, options.overrides)
        (dry_run if options.dry_run else train)(recipe)
    return outcome.code


def train(recipe: Recipe) -> None:
    """Train, or go on training, the run that `recipe` names; evaluate and export it at its end."""
    # torch and timm are loaded from here on, after help and mistakes in the recipe
    from .launch import RunDir, Signals, join, restarted
    from .loggers import Loggers

    with (
        join(recipe.run, recipe.guard) as world,
        Signals().caught() as signals,
        # torchrun counts by node, and only where a process failed
        RunDir(recipe, restart=world.agree(restarted())).held() as run,
    ):
        say = print if world.main else lambda text: None
        with world.together():
            begun = run.check()
        begun, done = world.share((begun, begun and run.finished()))
        if done:
            say(f"{run.path} is finished: {_figures(done)}\n{_next(run)}")
            return
        with world.together():
            if world.main:
                run.lock()
        task, schedule, engine = build(recipe, world)
        with world.together():
            aside = run.open() if world.main else None
        if aside:
            say(f"moved the old run to {aside}")
        checkpoints = take_up(engine, run, world, say, begun)
        loggers = Loggers(recipe, run.path, world, total=schedule.steps, step=engine.progress.step)
        try:
            for line in describe(engine):
                loggers.say(line)
            complete = engine.train(checkpoints, loggers, signals) and finish(engine, run)
        finally:
            checkpoints.close()
            loggers.close()
        step = engine.progress.step
        if complete:
            say(f"finished {run.path}: {_figures(engine.progress.figures)}\n{_next(run)}")
            return
        if world.main:
            run.mark("PREEMPTED", {"step": step})
        say(f"stopped by a signal at step {step}, which is saved; the same command goes on from there")


def build(recipe: Recipe, world: "World") -> "tuple[Task, Plan, Engine]":
    """Task, plan and engine of a recipe; nothing is written."""
    from .engine import Engine
    from .tasks import build_task

    with world.together():
        task = build_task(recipe, world)
        schedule = plan(recipe, samples=task.samples, world_size=world.size)
    return task, schedule, Engine(recipe, task, world, schedule)


def take_up(
    engine: "Engine", run: "RunDir", world: "World", say: typing.Callable[[str], None], begun: bool
) -> "Checkpoints":
    """Bring the engine to where the run stopped, and the run's metrics with it."""
    from .checkpoint import Checkpoints

    ckpt, start = run.recipe.ckpt, None
    checkpoints, resume = Checkpoints(run.checkpoints, world, say, background=ckpt.background), ckpt.resume
    with world.together():
        if world.main:
            start = checkpoints.newest(recipe_hash(run.recipe))
            if start and resume == "never" and not run.restart:
                raise UserError(
                    f"{run.path} is unfinished and ckpt.resume=never; auto goes on, run.fresh=true starts clean"
                )
            if start is None and resume not in ("auto", "never"):
                start = beginning(resume, engine.plan.steps)
    if start := world.share(start):
        exactness = engine.resume(start)
        source = "" if start.parent == run.checkpoints else f" from {start}"
        say(f"resuming {run.path} at step {engine.progress.step}{source} ({exactness}); run.fresh=true starts clean")
    elif begun:
        say(f"{run.path} was begun but holds no checkpoint yet; starting at step 0")
    if world.main:
        run.rewind(engine.progress.step, engine.progress.evaluated)
    return checkpoints


def beginning(resume: str, steps: int) -> Path:
    """The checkpoint to begin another run with. Raises UserError where it is broken or leaves nothing of its steps."""
    from .checkpoint import broken, manifest, sound_sibling

    path = Path(resume)
    if problem := broken(path):
        raise UserError(f"ckpt.resume={resume} is no good checkpoint ({problem}); {sound_sibling(path)}")
    if (step := manifest(path)["step"]) >= steps:
        raise UserError(
            f"ckpt.resume={resume} is of step {step}, which leaves nothing of this run's {steps} steps to train; give "
            "more sched.steps or sched.epochs, or an earlier checkpoint"
        )
    return path


def finish(engine: "Engine", run: "RunDir") -> bool:
    """Final evaluation, export and DONE; False if a signal came first."""
    from .evaluate import save_evaluation
    from .parallel import whole_state

    scores = engine.scores(keep=True)
    if scores is None:
        return False
    world, step = engine.world, engine.progress.step
    with engine.final_weights() as model:
        state = whole_state(model)
        with world.together():
            if world.main:
                engine.task.export(model, run.path / "export", state)
    facts = {"step": step, "checkpoint": str(run.path / "export")}
    engine.progress.figures = save_evaluation(run.path, scores, facts, world)
    if world.main:
        run.mark("DONE", engine.progress.figures)
    return True


def dry_run(recipe: Recipe) -> None:
    """Build everything, say what it comes to, try one micro-batch; nothing is written."""
    from .launch import join
    from .perf import peak_memory

    with join(recipe.run, recipe.guard) as world:
        task, schedule, engine = build(recipe, world)
        batches = task.train_batches(schedule, 0)
        try:
            with world.together():
                batch = next(batches)
            loss = float(engine.backward([batch])["loss"])
        finally:
            batches.close()
        if world.main:
            print("\n".join(describe(engine)))
            print(f"forward: {engine.gflops:.3f} GFLOP an image")
            print(f"one micro-batch: loss {loss:.4f}, peak memory {peak_memory(world.device):.2f} GB")
            print("dry run: nothing was written")


def describe(engine: "Engine") -> Iterator[str]:
    """What is about to be trained, in a few lines."""
    from .perf import parameters

    recipe, schedule, world = engine.recipe, engine.plan, engine.world
    size, precision = recipe.data.size, recipe.parallel.precision
    yield f"{recipe.model.name}: {parameters(engine.model) / 1e6:.2f} M parameters, {size} px, {precision}"
    yield (
        f"{engine.task.samples} images, {schedule.steps} steps of {recipe.data.batch} = {world.size} x "
        f"{schedule.accumulate} x {schedule.micro_batch} (processes, accumulated, micro-batch) on {world.device.type}"
    )
    yield f"{recipe.optim.name}, lr {schedule.lr_text}; {recipe.sched.name}, {schedule.warmup} steps of warm-up"


def describe_keys() -> Iterator[str]:
    """A line for each key of a recipe."""
    for key, hint, default, meaning in leaves():
        value = "required" if default is dataclasses.MISSING else json.dumps(default)
        yield f"  {key + ': ' + value:36s}  {meaning} [{_kind(hint)}]"


def _kind(hint: typing.Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join("null" if part is type(None) else _kind(part) for part in arguments)
    return "list" if hint.__name__ == "tuple" else hint.__name__


def _figures(figures: dict[str, typing.Any]) -> str:
    return ", ".join(f"{key} {value:.2f}" for key, value in figures.items() if isinstance(value, float))


def _next(run: "RunDir") -> str:
    path, kind = run.path, run.recipe.task.kind
    loader = f"import tessel.train.{kind}; tessel.train.{kind}.load('{path}/export')"
    if kind == "classify":
        loader = f"import tessel.zoo, timm; timm.create_model('local-dir:{path}/export', pretrained=True)"
    return (
        f"  python -m tessel.train.report {path}       curves, figures by class, mistakes\n"
        f"  python -m tessel.train.evaluate {path}     judge it again, also on other data (--data)\n"
        f"  {loader}\n"
        "  run.fresh=true trains it anew and keeps this one aside"
    )


if __name__ == "__main__":
    sys.exit(main())
