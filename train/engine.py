"""The training loop. It knows no task; what is learned is behind `tasks.base.Task`.

The state is the model, the optimizer, the gradient scaler, the moving average and `Progress`. The schedule is a
function of the step, and randomness one of (seed, step, chunk of the global batch), so a resumed run repeats an
uninterrupted one bit for bit.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..blocks import collect_losses
from .data.batch_stream import BatchStream
from .data.fingerprint import changes
from .data.sampler import seed_all
from .distributed.device import autocast_dtype, sum_dtype
from .distributed.parallel import (
    autocast,
    broadcast_tensors,
    gradient_sync,
    numerics_config,
    prepare_model,
    unsharded,
    wrap_distributed,
)
from .distributed.world import World
from .errors import UserError
from .evaluation import check_classes, load_checkpoint, run_evaluation
from .files import write_atomically, writing
from .optim.ema import WeightAverage
from .optim.freeze import FrozenBackbone, freeze_parameters
from .optim.gradients import NonFiniteError, NonFiniteGuard, clip_gradients
from .optim.optimizer import build_optimizer
from .optim.schedule import build_schedule
from .recipe.load import as_dict
from .recipe.plan import Plan
from .recipe.registry import task_spec
from .recipe.schema import Recipe
from .run import checkpoint
from .run.checkpoint import Checkpoints
from .run.loggers import Loggers
from .run.loss_meter import LossMeter
from .run.profiling import StepProfiler, ThroughputMeter, forward_gflops, peak_tflops
from .run.signals import Signals
from .tasks.base import MetricAccumulator, Task
from .tasks.models import input_errors


@dataclasses.dataclass
class Progress:
    """How far a run is; part of every checkpoint. A checkpoint may lack fields, or have fields of another version."""

    step: int = 0
    evaluated: int = 0  # step of the last evaluation
    best_step: int = 0
    best: float | None = None  # primary metric at best_step
    best_loss: float | None = None  # loss of the evaluation at best_step
    stalled: int = 0  # evaluations since best_step
    losses: dict[str, float] = dataclasses.field(default_factory=dict)  # sums since the last line of the log
    updates: int = 0  # in these sums
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of the last evaluation
    corrupt: dict[str, str] = dataclasses.field(default_factory=dict)  # unreadable samples: index -> reason

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Progress":
        """From the manifest of a checkpoint of any format."""
        facts = {"metrics": facts.get("figures", {}), **facts}  # its name in format 1
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in facts.items() if name in names})


class Engine:
    """Trains the model of one task."""

    def __init__(self, recipe: Recipe, task: Task, world: World, plan: Plan):
        self.recipe, self.task, self.world, self.plan = recipe, task, world, plan
        self.metric = task_spec(recipe).metric
        seed_all(recipe.run.seed, devices=True)
        with world.raise_on_all_ranks():
            model, prefix = task.build_model(), task_spec(recipe).backbone_prefix
            freeze_parameters(model, prefix, recipe.model.freeze)
            self.model = prepare_model(model, recipe.parallel, world)
            example = task.example()
            with input_errors(f"model.name={recipe.model.name}", example[0][0]):
                self.gflops = forward_gflops(self.model, example)
        self.replicas = wrap_distributed(self.model, recipe.parallel, world)
        self.frozen = FrozenBackbone(
            self.model, prefix, freeze=recipe.model.freeze is not None, first_steps=plan.freeze
        )
        with world.raise_on_all_ranks():
            split = self.frozen.split if plan.freeze else None
            self.optimizer = build_optimizer(self.model, recipe.optim, plan.lr, split)
        self.schedule = build_schedule(self.optimizer, recipe, plan)
        self.average = WeightAverage(self.model, recipe.ema) if recipe.ema.decay else None
        half = autocast_dtype(recipe.parallel.precision, world.device) == torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=half)
        self.guard = NonFiniteGuard(recipe.guard.max_skips, self.scaler)
        self.meter = ThroughputMeter(recipe.data.batch, self.gflops, peak_tflops(recipe.parallel, world), world.device)
        self.progress = Progress()
        self.saved = 0
        self.losses = LossMeter(world)
        self.norm = torch.zeros(())

    def train(self, checkpoints: Checkpoints, loggers: Loggers, signals: Signals) -> bool:
        """Train to the last step (True) or until a signal (False). The state is saved in both cases."""
        self.checkpoints, self.loggers, self.signals = checkpoints, loggers, signals
        with self.world.raise_on_all_ranks():
            _ = self.fingerprints  # of the data as they are now, not when the first checkpoint is written
        self.batches = self.task.train_batches(self.plan, self.progress.step)
        run, max_corrupt = checkpoints.path.parent, self.recipe.guard.corrupt_limit(self.task.samples)
        profiler = StepProfiler(run, self.world.rank, enabled=self.recipe.log.profile)
        self.stream = BatchStream(self.batches, self.world, self.progress.corrupt, max_corrupt, run / "corrupt.jsonl")
        self.meter.restart()
        try:
            complete = False
            while (
                self.log_evaluate_save_if_due()
                and not (complete := self.progress.step >= self.plan.steps or self.stalled)
                and self.step()
            ):
                profiler.step()
            self.save()
            self.checkpoints.wait()
            return complete
        except NonFiniteError as error:
            raise self.describe_non_finite(error) from error
        finally:
            self.batches.close()
            profiler.close()

    def step(self) -> bool:
        """One update on one global batch. Returns False, without an update, after a signal to any process."""
        with self.meter.waiting():
            self.stream.next_batches(self.plan.accumulate)
        if self.stream.sync_errors(self.signals.raised, self.loggers.say):
            return False
        step = self.progress.step
        self.schedule.step_update(step)
        self.frozen.apply(self.optimizer, step)
        losses = self.backward(self.stream.batches)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.optimizer, self.recipe.optim)
        if self.guard.should_apply(step, norm, losses["loss"]):
            self.scaler.step(self.optimizer)
            self.losses.add(losses)
            self.norm = norm
        else:
            self.loggers.say(f"update {step} skipped: its gradient norm is {norm:g}")
        self.scaler.update()
        self.optimizer.zero_grad()
        self.progress.step = step + 1
        if self.average:
            self.average.update(self.model, step + 1)
        return True

    def backward(self, batches: list[Any]) -> dict[str, torch.Tensor]:
        """Accumulate the gradients of the mean loss over micro-batches. Returns the means of the loss and its parts."""
        means: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(batches):
            chunk = self.world.rank * len(batches) + number
            seed_all(self.recipe.run.seed, self.progress.step, chunk, devices=True)
            with gradient_sync(self.replicas, enabled=number == len(batches) - 1):
                with autocast(self.recipe.parallel, self.world), collect_losses(self.model) as auxiliary:
                    parts = self.task.loss(self.replicas, batch)
                if auxiliary:
                    parts = parts | {"auxiliary_loss": torch.stack(auxiliary).mean()}
                loss = torch.stack([value for name, value in parts.items() if "loss" in name]).sum()
                self.scaler.scale(loss / len(batches)).backward()
            for name, value in (parts | {"loss": loss}).items():
                means[name] = means.get(name, 0.0) + (value.detach() / len(batches)).to(sum_dtype(value.device))
        return means

    def finalize_step(self) -> None:
        """Before an evaluation or a checkpoint: run the deferred check for NaN, and broadcast buffers from rank 0."""
        self.guard.check_deferred()
        tensors = dict(self.model.named_buffers())
        averaged = self.average.state if self.average else {}
        broadcast_tensors([*tensors.values(), *(averaged[name] for name in tensors if name in averaged)], self.world)

    def log_evaluate_save_if_due(self) -> bool:
        """Log, evaluate and save, each if due at this step. Returns False if a signal interrupted the evaluation."""
        recipe, progress, epoch = self.recipe, self.progress, self.plan.epoch_steps
        self.loggers.advance(progress.step)
        if self.is_due(recipe.log.every) and self.losses.updates:
            self.log()
        due = self.metric is not None and self.is_due(recipe.eval.every or epoch)
        if due and progress.evaluated < progress.step and not self.evaluate():
            return False
        if self.is_due(recipe.ckpt.every or epoch) or progress.best_step == progress.step:
            self.save()
        return True

    def is_due(self, every: int) -> bool:
        return (step := self.progress.step) > 0 and (step % every == 0 or step >= self.plan.steps)

    def log(self) -> None:
        """Write one line about the updates since the last one."""
        self.guard.check_deferred()
        metrics = {
            **self.losses.means(),
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "grad_norm": float(self.norm),
        }
        self.loggers.log({"kind": "train", **self.position(), **metrics, **self.meter.read()})

    def evaluate(self) -> bool:
        """Evaluate the weights, averaged ones if the recipe has them. Returns False if a signal interrupted it."""
        assert self.metric is not None
        with self.meter.paused():
            try:
                accumulated = self.accumulate_metrics()
                metrics = accumulated.compute() if accumulated else None
            except UserError:  # raised on all processes; save what was learned since the last checkpoint
                self.save()
                raise
            if metrics is None:
                return False
            progress = self.progress
        self.loggers.log({"kind": "eval", **self.position(), **metrics})
        progress.evaluated, progress.metrics = progress.step, metrics
        value, loss = metrics[self.metric.key], metrics.get("loss")
        if self.metric.is_better(value, progress.best) or (value == progress.best and self.breaks_tie(loss)):
            progress.best, progress.best_loss = value, loss
            progress.best_step, progress.stalled = progress.step, 0
        elif progress.step > self.plan.freeze:
            progress.stalled += 1
        return True

    def breaks_tie(self, loss: float | None) -> bool:
        """Whether an evaluation with `loss` is better than the best one, which has the same primary metric.

        On few images, many evaluations share the best accuracy. A task without a loss on the validation split, whose
        metric can stay 0 for long, has the later one as the better.
        """
        before = self.progress.best_loss
        return loss < before if loss is not None and before is not None else loss is None

    @property
    def stalled(self) -> bool:
        """Whether the last `sched.patience` evaluations were no better than the one before them."""
        return self.progress.stalled >= (self.recipe.sched.patience or math.inf)

    def load_best(self) -> int:
        """With `sched.patience`, load the weights of the best evaluation. Returns the step of the model's weights."""
        progress = self.progress
        if not self.recipe.sched.patience or progress.best_step in (0, progress.step):
            return progress.step
        path = self.checkpoints.at(progress.best_step)
        if damage := self.world.broadcast_object(checkpoint.find_damage(path) if self.world.main else None):
            self.loggers.say(f"warning: the best checkpoint {path} is damaged ({damage}); using the last weights")
            return progress.step
        load_checkpoint(path, self.model, self.world)
        self.average = None  # the weights that were loaded are averaged ones, if the recipe has them
        return progress.best_step

    def accumulate_metrics(self, *, keep: bool = False) -> MetricAccumulator | None:
        """The metrics over the validation split; None if a signal interrupted the evaluation."""
        self.finalize_step()
        with self.final_weights() as model, unsharded(model):
            return run_evaluation(
                self.task, model, self.world, self.recipe.parallel, keep=keep, stop=lambda: self.signals.raised
            )

    def final_weights(self) -> AbstractContextManager[nn.Module]:
        """Context in which the model has the weights that would be exported now."""
        return self.average.applied_to(self.model) if self.average else nullcontext(self.model)

    def save(self) -> None:
        """Save this step; delete all other checkpoints but the best one and the last ones."""
        if (progress := self.progress).step == self.saved:
            return
        with self.meter.paused():
            self.finalize_step()
            progress.losses, progress.updates = self.losses.totals(), self.losses.updates
            facts = {
                "step": progress.step,
                "consumed_samples": progress.step * self.recipe.data.batch,
                "recipe": as_dict(self.recipe),
                "arithmetic": numerics_config(self.recipe.parallel, self.world, self.plan.micro_batch),
                "averaged": self.average is not None,
                "classes": self.task.classes,
                "data": self.fingerprints,
                "metrics": self.loggers.record(),
                "progress": dataclasses.asdict(progress),
            }
            self.checkpoints.save(self.state(), facts, best=progress.best_step, last=self.recipe.ckpt.keep_last)
            self.saved = progress.step

    def resume(self, path: Path) -> str:
        """Continue from the checkpoint at `path`. Returns how exactly that repeats the uninterrupted run."""
        facts, state = checkpoint.read_manifest(path), self.state()
        same_recipe = not checkpoint.other_recipe(path, self.recipe)
        other_data = self.check_data(facts, path) if same_recipe else []
        checkpoint.load(path, state, self.world)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress.read(facts["progress"])
        self.saved = self.progress.step
        self.losses.restore(self.progress.losses, self.progress.updates)
        if not same_recipe:
            self.progress.best, self.progress.best_step, self.progress.corrupt = None, 0, {}
            self.progress.stalled = 0
            self.losses.restore({}, 0)
            return "with another recipe than that of the checkpoint"
        if other_data:
            self.progress.corrupt = {}
        now = numerics_config(self.recipe.parallel, self.world, self.plan.micro_batch)
        return checkpoint.exactness(facts["arithmetic"], now, self.model, self.recipe.parallel, other_data)

    def check_data(self, facts: Mapping[str, Any], path: Path) -> list[str]:
        """What changed in the data since the checkpoint at `path` with the manifest `facts`.

        Raises UserError for other classes, and for other samples without `ckpt.other_data`.
        """
        found: list[str] = []
        with self.world.raise_on_all_ranks():
            check_classes(self.task.classes, facts.get("classes"), path)
            if self.world.main:
                found = changes(facts.get("data", {}), self.fingerprints)
            if found and not self.recipe.ckpt.other_data:
                raise UserError(
                    f"the data are not those that {path} has learned from: {', '.join(found)}. Restore them, or set "
                    "ckpt.other_data=true to continue with these; run.fresh=true starts from scratch"
                )
        return self.world.broadcast_object(found)

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """What is recorded of the data; only on rank 0."""
        return self.task.fingerprints() if self.world.main else {}

    def state(self) -> dict[str, Any]:
        """The tensors of a checkpoint, to be saved or to be filled in place."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": self.scaler.state_dict()}
        return state | ({"ema": self.average.state} if self.average else {})

    def position(self) -> dict[str, float]:
        """Step and epoch, as they appear in the log."""
        epoch = self.progress.step * self.recipe.data.batch / self.task.samples
        return {"step": self.progress.step, "epoch": round(epoch, 4)}

    def describe_non_finite(self, error: NonFiniteError) -> UserError:
        """The error for a NaN or infinite update; also writes which samples it used."""
        self.checkpoints.wait()
        dump = self.checkpoints.path.parent / f"nonfinite-{error.step:08d}.json"
        if self.world.main:
            keys = self.task.sample_keys(self.plan, error.step)
            facts = {"step": error.step, "loss": str(error.loss), "grad_norm": str(error.norm)}
            with writing(dump):
                write_atomically(dump, json.dumps(facts | {"samples (epoch, index)": keys}) + "\n")
        return UserError(
            f"{error}: stopped; {dump} lists the images of that update, and the checkpoints up to step {self.saved} "
            "are good. To continue from one, set ckpt.resume=CHECKPOINT and another run.name, and lower optim.lr, set "
            "optim.clip or raise guard.max_skips"
        )
