"""A whole run: from the recipe to a finished run directory, or its continuation, or a dry run."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .distributed.attention_backend import use_kernels
from .distributed.device import describe_replacements, has_bf16
from .distributed.parallel import full_state_dict
from .distributed.world import World, init_distributed
from .engine import Engine
from .errors import UserError
from .evaluation import save_evaluation
from .recipe.plan import Plan, plan
from .recipe.registry import task_spec
from .recipe.schema import Recipe
from .recipe.sizing import describe_auto, sized, starts_from_weights
from .run import checkpoint
from .run.checkpoint import Checkpoints
from .run.directory import RunDirectory
from .run.loggers import Loggers, LogRecord
from .run.profiling import count_parameters, peak_memory
from .run.signals import Signals, is_elastic_restart, job_identity
from .tasks.base import Task
from .tasks.models import no_weights, resolve_pretrained
from .threads import describe_waiting


def train(recipe: Recipe) -> None:
    """Train, or continue, the run that `recipe` names; at its end, evaluate and export it."""
    with (
        init_distributed(recipe.run, recipe.guard) as world,
        Signals().caught() as signals,
        # torchrun counts restarts per node, and only on nodes where a process failed
        RunDirectory(
            recipe, restart=world.any_rank(is_elastic_restart()), job=world.broadcast_object(job_identity())
        ).held() as run,
    ):
        say = print if world.main else lambda text: None
        use_kernels(recipe.parallel, world, say)
        with world.raise_on_all_ranks():
            begun = run.check()
        begun, done = world.broadcast_object((begun, begun and run.finished()))
        if done:
            say(f"{run.path} is finished: {_format(done)}\n{_next_steps(run)}")
            return
        with world.raise_on_all_ranks():
            if world.main:
                run.lock()
        # a continued run keeps the numbers that `auto` stood for at its start
        task, schedule, engine = build(run.recipe, world)
        run.recipe = engine.recipe
        with world.raise_on_all_ranks():
            aside = run.open() if world.main else None
        if aside:
            say(f"moved the old run to {aside}")
        checkpoints = resume_or_start(engine, run, world, say, begun)
        loggers = Loggers(engine.recipe, run.path, world, total=schedule.steps, step=engine.progress.step)
        try:
            for line in [*describe(engine), *describe_choices(recipe, engine.recipe)]:
                loggers.say(line)
            complete = engine.train(checkpoints, loggers, signals) and finish(engine, run)
        finally:
            checkpoints.close()
            loggers.close()
        step = engine.progress.step
        if complete:
            for line in engine.stream.describe_corrupt():
                say(line)
            say(f"finished {run.path}: {_format(engine.progress.metrics)}\n{_next_steps(run)}")
            return
        if world.main:
            run.mark("PREEMPTED", {"step": step})
        say(f"stopped by a signal; step {step} is saved. The same command continues from there")


def build(recipe: Recipe, world: World) -> tuple[Task, Plan, Engine]:
    """Task, plan and engine of a recipe; writes nothing."""
    with world.raise_on_all_ranks():
        recipe = resolve_pretrained(recipe)
        task: Task = task_spec(recipe).build(recipe, world)
        multiple = task.micro_batch_multiple
        # the number of images is known only to the task
        task.recipe = recipe = sized(
            recipe, samples=task.samples, processes=world.size, multiple=multiple, bf16=has_bf16(world.device)
        )
        schedule = plan(recipe, samples=task.samples, world_size=world.size, micro_batch_multiple=multiple)
    return task, schedule, Engine(recipe, task, world, schedule)


def resume_or_start(
    engine: Engine, run: RunDirectory, world: World, say: Callable[[str], None], begun: bool
) -> Checkpoints:
    """Restore the engine and the log from the newest checkpoint of the run, or from `ckpt.resume`, if there is one."""
    ckpt, start = run.recipe.ckpt, None
    checkpoints, resume = Checkpoints(run.checkpoints, world, say, background=ckpt.background), ckpt.resume
    with world.raise_on_all_ranks():
        if world.main:
            start = checkpoints.newest(run.recipe)
            if start and resume == "never" and not run.restart:
                raise UserError(
                    f"{run.path} is unfinished and ckpt.resume=never; use auto to continue it, or run.fresh=true to "
                    "start from scratch"
                )
            if start is None and resume not in ("auto", "never"):
                start = checkpoint_to_start_from(resume, engine.plan.steps)
    if start := world.broadcast_object(start):
        exactness = engine.resume(start)
        source = "" if start.parent == run.checkpoints else f" from {start}"
        say(
            f"resuming {run.path} at step {engine.progress.step}{source} ({exactness}); run.fresh=true starts from "
            "scratch"
        )
    elif begun:
        say(f"{run.path} was started before but has no checkpoint yet; starting at step 0")
    if world.main:
        lines = run.rewind(engine.progress.step, engine.progress.evaluated)
        if start and start.parent == run.checkpoints:
            tell_lost_lines(lines, start, run.metrics, say)
    return checkpoints


def tell_lost_lines(lines: list[str], start: Path, file: Path, say: Callable[[str], None]) -> None:
    """Say what metrics.jsonl has lost of the `lines` that it had when the checkpoint `start` was written."""
    before = checkpoint.read_manifest(start).get("metrics")
    if not before or LogRecord(lines).facts() == before:
        return
    count = before["lines"]
    lost = f"has {len(lines)} of its {count} lines" if len(lines) != count else f"has other text in its {count} lines"
    say(f"warning: {file} {lost} up to this step: it was damaged or changed since, which the report will show")


def checkpoint_to_start_from(resume: str, steps: int) -> Path:
    """The checkpoint `ckpt.resume` of another run. Raises UserError if it is damaged, or past the end of this run."""
    path = Path(resume)
    if problem := checkpoint.find_damage(path):
        raise UserError(f"ckpt.resume={resume} cannot be used ({problem}); {checkpoint.suggest_sibling(path)}")
    if (step := checkpoint.read_manifest(path)["step"]) >= steps:
        raise UserError(
            f"ckpt.resume={resume} is of step {step}, but this run ends at step {steps}; raise sched.steps or "
            "sched.epochs, or use an earlier checkpoint"
        )
    return path


def finish(engine: Engine, run: RunDirectory) -> bool:
    """Final evaluation, export and DONE. Returns False if a signal came first."""
    world, metric, patience = engine.world, engine.metric, engine.recipe.sched.patience
    facts = {"step": engine.load_best(), "checkpoint": str(run.path / "export")}
    if engine.stalled and metric:
        facts["ended"] = (
            f"after step {engine.progress.step}, because {patience} evaluations brought no better {metric.name} than "
            f"that of step {engine.progress.best_step} (sched.patience={patience})"
        )
        engine.loggers.say(f"training ended {facts['ended']}")
    accumulated = None
    if engine.metric is not None and (accumulated := engine.accumulate_metrics(keep=True)) is None:
        return False
    with engine.final_weights() as model:
        state = full_state_dict(model)
        with world.raise_on_all_ranks():
            if world.main:
                engine.task.export(model, run.path / "export", state)
    engine.progress.metrics = save_evaluation(run.path, accumulated, facts, world) if accumulated else facts
    if world.main:
        run.mark("DONE", engine.progress.metrics)
    return True


def dry_run(recipe: Recipe) -> None:
    """Build everything, print what the run would be, try one micro-batch; writes nothing."""
    with init_distributed(recipe.run, recipe.guard) as world:
        with world.raise_on_all_ranks():
            RunDirectory(recipe).check_place()
        task, schedule, engine = build(recipe, world)
        batches = task.train_batches(schedule, 0)
        try:
            with world.raise_on_all_ranks():
                batch = next(batches)
            loss = float(engine.backward([batch])["loss"])
        finally:
            batches.close()
        if world.main:
            print("\n".join([*describe(engine), *describe_choices(recipe, engine.recipe)]))
            print(f"forward: {engine.gflops:.3f} GFLOP per image")
            memory = peak_memory(world.device)
            print(f"one micro-batch: loss {loss:.4f}" + ("" if memory is None else f", peak memory {memory:.2f} GB"))
            print("dry run: nothing was written")


def describe(engine: Engine) -> Iterator[str]:
    """What will be trained, in three lines; on the CPU a fourth one about threads, elsewhere about what it lacks."""
    recipe, schedule, world = engine.recipe, engine.plan, engine.world
    size, precision = recipe.data.size, recipe.parallel.precision
    yield f"{recipe.model.name}: {count_parameters(engine.model) / 1e6:.2f} M parameters, {size} px, {precision}"
    yield (
        f"{engine.task.samples} images, {schedule.steps} steps of {recipe.data.batch} = {world.size} x "
        f"{schedule.accumulate} x {schedule.micro_batch} (processes, accumulated, micro-batch) on {world.device.type}"
    )
    yield f"{recipe.optim.name}, lr {schedule.lr_text}; {recipe.sched.name}, {schedule.warmup} steps of warm-up"
    if world.device.type == "cpu":
        yield f"CPU threads: {torch.get_num_threads()}, {describe_waiting()}"
    if text := describe_replacements(recipe.run.device, recipe.parallel, world.device):
        yield text


def describe_choices(asked: Recipe, recipe: Recipe) -> Iterator[str]:
    """What was chosen for the keys of the recipe `asked` that have the value auto."""
    if text := describe_auto(asked, recipe):
        yield text
    if asked.model.pretrained == "auto" and not starts_from_weights(recipe):
        yield no_weights(recipe.model.name)


def _format(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.2f}" for key, value in metrics.items() if isinstance(value, float))


def _next_steps(run: RunDirectory) -> str:
    path, spec = shlex.quote(str(run.path)), task_spec(run.recipe)
    commands = {
        f"tessel report {path}": "learning curves, metrics per class, errors",
        f"tessel evaluate {path}": "evaluate again, also on other data (--data)",
    }
    if spec.predicts:
        commands[f"tessel predict {path} IMAGE..."] = "predict your own pictures; a folder or a url is an IMAGE too"
    width = max(map(len, commands))
    lines = [f"{command:{width}}    {text}" for command, text in commands.items()]
    lines.append(spec.load_hint.format(path=f"{run.path}/export"))
    lines.append("run.fresh=true trains it again and keeps this run under another name")
    return "\n".join(f"  {line}" for line in lines)
