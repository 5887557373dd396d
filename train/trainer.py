"""PLACEHOLDER train/trainer.py"""

import typing
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError
from .recipe.load import recipe_hash
from .recipe.plan import Plan, plan
from .recipe.schema import Recipe

if typing.TYPE_CHECKING:
    from .distributed.world import World
    from .engine import Engine
    from .run.checkpoint import Checkpoints
    from .run.directory import RunDirectory
    from .tasks.base import Task


def train(recipe: Recipe) -> None:
    """Train, or go on training, the run that `recipe` names; evaluate and export it at its end."""
    # torch and timm are loaded from here on, after help and mistakes in the recipe
    from .distributed.world import init_distributed
    from .run.directory import RunDirectory
    from .run.loggers import Loggers
    from .run.signals import Signals, is_elastic_restart

    with (
        init_distributed(recipe.run, recipe.guard) as world,
        Signals().caught() as signals,
        # torchrun counts by node, and only where a process failed
        RunDirectory(recipe, restart=world.any_rank(is_elastic_restart())).held() as run,
    ):
        say = print if world.main else lambda text: None
        with world.raise_on_all_ranks():
            begun = run.check()
        begun, done = world.broadcast_object((begun, begun and run.finished()))
        if done:
            say(f"{run.path} is finished: {_figures(done)}\n{_next(run)}")
            return
        with world.raise_on_all_ranks():
            if world.main:
                run.lock()
        task, schedule, engine = build(recipe, world)
        with world.raise_on_all_ranks():
            aside = run.open() if world.main else None
        if aside:
            say(f"moved the old run to {aside}")
        checkpoints = resume_or_start(engine, run, world, say, begun)
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
    from .tasks.build import build_task

    with world.raise_on_all_ranks():
        task = build_task(recipe, world)
        schedule = plan(recipe, samples=task.samples, world_size=world.size)
    return task, schedule, Engine(recipe, task, world, schedule)


def resume_or_start(
    engine: "Engine", run: "RunDirectory", world: "World", say: typing.Callable[[str], None], begun: bool
) -> "Checkpoints":
    """Bring the engine to where the run stopped, and the run's metrics with it."""
    from .run.checkpoint import Checkpoints

    ckpt, start = run.recipe.ckpt, None
    checkpoints, resume = Checkpoints(run.checkpoints, world, say, background=ckpt.background), ckpt.resume
    with world.raise_on_all_ranks():
        if world.main:
            start = checkpoints.newest(recipe_hash(run.recipe))
            if start and resume == "never" and not run.restart:
                raise UserError(
                    f"{run.path} is unfinished and ckpt.resume=never; auto goes on, run.fresh=true starts clean"
                )
            if start is None and resume not in ("auto", "never"):
                start = checkpoint_to_start_from(resume, engine.plan.steps)
    if start := world.broadcast_object(start):
        exactness = engine.resume(start)
        source = "" if start.parent == run.checkpoints else f" from {start}"
        say(f"resuming {run.path} at step {engine.progress.step}{source} ({exactness}); run.fresh=true starts clean")
    elif begun:
        say(f"{run.path} was begun but holds no checkpoint yet; starting at step 0")
    if world.main:
        run.rewind(engine.progress.step, engine.progress.evaluated)
    return checkpoints


def checkpoint_to_start_from(resume: str, steps: int) -> Path:
    """The checkpoint to begin another run with. Raises UserError where it is broken or leaves nothing of its steps."""
    from .run.checkpoint import broken, manifest, sound_sibling

    path = Path(resume)
    if problem := broken(path):
        raise UserError(f"ckpt.resume={resume} is no good checkpoint ({problem}); {sound_sibling(path)}")
    if (step := manifest(path)["step"]) >= steps:
        raise UserError(
            f"ckpt.resume={resume} is of step {step}, which leaves nothing of this run's {steps} steps to train; give "
            "more sched.steps or sched.epochs, or an earlier checkpoint"
        )
    return path


def finish(engine: "Engine", run: "RunDirectory") -> bool:
    """Final evaluation, export and DONE; False if a signal came first."""
    from .distributed.parallel import full_state_dict
    from .evaluation import save_evaluation

    scores = engine.scores(keep=True)
    if scores is None:
        return False
    world, step = engine.world, engine.progress.step
    with engine.final_weights() as model:
        state = full_state_dict(model)
        with world.raise_on_all_ranks():
            if world.main:
                engine.task.export(model, run.path / "export", state)
    facts = {"step": step, "checkpoint": str(run.path / "export")}
    engine.progress.figures = save_evaluation(run.path, scores, facts, world)
    if world.main:
        run.mark("DONE", engine.progress.figures)
    return True


def dry_run(recipe: Recipe) -> None:
    """Build everything, say what it comes to, try one micro-batch; nothing is written."""
    from .distributed.world import init_distributed
    from .run.profiling import peak_memory

    with init_distributed(recipe.run, recipe.guard) as world:
        task, schedule, engine = build(recipe, world)
        batches = task.train_batches(schedule, 0)
        try:
            with world.raise_on_all_ranks():
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
    from .run.profiling import count_parameters

    recipe, schedule, world = engine.recipe, engine.plan, engine.world
    size, precision = recipe.data.size, recipe.parallel.precision
    yield f"{recipe.model.name}: {count_parameters(engine.model) / 1e6:.2f} M parameters, {size} px, {precision}"
    yield (
        f"{engine.task.samples} images, {schedule.steps} steps of {recipe.data.batch} = {world.size} x "
        f"{schedule.accumulate} x {schedule.micro_batch} (processes, accumulated, micro-batch) on {world.device.type}"
    )
    yield f"{recipe.optim.name}, lr {schedule.lr_text}; {recipe.sched.name}, {schedule.warmup} steps of warm-up"


def _figures(figures: dict[str, typing.Any]) -> str:
    return ", ".join(f"{key} {value:.2f}" for key, value in figures.items() if isinstance(value, float))


def _next(run: "RunDirectory") -> str:
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
