"""Cost of the trainer: time per step compared with a plain loop, memory over many steps, start-up time, and saving.

    python benchmarks/trainer.py                      on the CPU, a few minutes; --dry-run takes seconds, to see it run
    python benchmarks/trainer.py --device cuda --model biformer_tiny --size 224 --batch 128 --workers 8

overhead   time per step of the trainer compared with a loop of forty lines of PyTorch that has the same model, loader,
           precision and optimizer; the two alternate
memory     growth of the resident set from step 200 to step 2,000 of a tiny model, with logging, evaluation, checkpoints
startup    seconds from the start of the process to the end of the first step, median of several processes
saving     time of some steps with a checkpoint among them compared with as many steps without, for saving in the
           background and in the foreground; the two alternate. "stall" is the part of the time in which no step runs

Goals: at most 3 % overhead, 1 % growth, 5 % for saving in the background. Results: results/trainer_DEVICE.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
GOALS = {
    "overhead_percent": 3.0,
    "memory_growth_percent": 1.0,
    "background_stall_percent": 5.0,
    "background_saving_percent": 5.0,
}


def make_digits_recipe(args: argparse.Namespace, out: str, **sections: dict):
    """The recipe of a run on the digits, too long to reach its end; `sections` override its keys."""
    from tessel.train.recipe.load import make_recipe

    recipe = {
        "run": {"name": "bench", "out": out, "device": args.device},
        "model": {"name": args.model},
        "data": {"source": "digits", "size": args.size, "batch": args.batch, "workers": args.workers},
        "sched": {"steps": 10**6},
        "parallel": {"precision": "bf16" if args.device == "cuda" else "fp32"},
        **{section: {"every": 10**6} for section in ("eval", "ckpt")},
    }
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section
    return make_recipe(recipe, [], source="benchmark")


class TrainerLoop:
    """The loop of the trainer, a given number of steps at a time. Repeats what `Engine.train` does before its loop."""

    def __init__(self, recipe, world):
        from tessel.train.data.batch_stream import BatchStream
        from tessel.train.run.directory import RunDirectory
        from tessel.train.run.loggers import Loggers
        from tessel.train.run.signals import Signals
        from tessel.train.trainer import build, resume_or_start

        self.task, self.plan, self.engine = build(recipe, world)
        engine, run = self.engine, RunDirectory(recipe)
        run.open()
        engine.checkpoints, engine.signals = resume_or_start(engine, run, world, print, False), Signals()
        engine.loggers = Loggers(recipe, run.path, world, total=self.plan.steps, step=0)
        engine.loggers.active.remove(engine.loggers.console)
        engine.batches = self.task.train_batches(self.plan, 0)
        engine.stream = BatchStream(engine.batches, world, engine.progress.corrupt, 0, run.path / "corrupt.jsonl")
        engine.meter.restart()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.log_evaluate_save_if_due()
            self.engine.step()

    def saving(self, count: int) -> float:
        """Save and train `count` steps, then wait for the checkpoint; the fraction of the time without steps."""
        start = time.perf_counter()
        self.engine.save()
        first = time.perf_counter()
        self.steps(count)
        last = time.perf_counter()
        self.engine.checkpoints.wait()
        return 1 - (last - first) / (time.perf_counter() - start)

    def close(self) -> None:
        self.engine.batches.close()
        self.engine.checkpoints.close()
        self.engine.loggers.close()


class PlainLoop:
    """A plain PyTorch loop with the model, data and optimizer of a `TrainerLoop`."""

    def __init__(self, trainer: TrainerLoop):
        import timm.optim
        import torch

        recipe, self.device = trainer.engine.recipe, trainer.engine.world.device
        self.model, self.normalize = trainer.task.build_model().to(self.device), trainer.task.normalize
        self.optimizer = timm.optim.create_optimizer_v2(
            self.model, recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay
        )
        self.criterion = torch.nn.CrossEntropyLoss()
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.parallel.precision == "bf16")
        self.batches = trainer.task.train_batches(trainer.plan, 0)

    def steps(self, count: int) -> None:
        for _ in range(count):
            images, targets, _ = next(self.batches)
            images = self.normalize(images.to(self.device, non_blocking=True))
            targets = targets.to(self.device, non_blocking=True)
            with self.autocast:
                loss = self.criterion(self.model(images), targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def close(self) -> None:
        self.batches.close()


def overhead(args: argparse.Namespace, world) -> dict:
    """Time per step of the trainer and of the plain loop."""
    from measurement import ratio, side_by_side

    block = 2 if args.dry_run else args.block
    with tempfile.TemporaryDirectory() as out:
        trainer = TrainerLoop(make_digits_recipe(args, out), world)
        plain = PlainLoop(trainer)
        cpu_seconds: dict[str, list[float]] = {"trainer": [], "plain": []}

        def timed(name: str, loop: TrainerLoop | PlainLoop) -> None:
            start = time.process_time()
            loop.steps(block)
            cpu_seconds[name].append(time.process_time() - start)

        runs = {"trainer": lambda: timed("trainer", trainer), "plain": lambda: timed("plain", plain)}
        times = side_by_side(runs, seconds=args.seconds, device=args.device)
        trainer.close()
        plain.close()
    milliseconds = {name: round(1e3 * statistics.median(found) / block, 3) for name, found in times.items()}
    return {
        "ours_ms_a_step": milliseconds["trainer"],
        "bare_ms_a_step": milliseconds["plain"],
        "overhead_percent": round(100 * (ratio(times, "plain", "trainer") - 1), 2),
        # CPU time, which other processes on the machine do not lengthen
        "overhead_cpu_time_percent": round(100 * (ratio(cpu_seconds, "plain", "trainer") - 1), 2),
        "rounds": len(times["trainer"]),
        "steps_a_round": block,
    }


def saving(args: argparse.Namespace, world) -> dict:
    """Cost of a checkpoint, written in the background and in the foreground."""
    from measurement import ratio, side_by_side

    every = 2 if args.dry_run else args.every
    found = {"every_steps": every}
    for mode in ("background", "foreground"):
        with tempfile.TemporaryDirectory() as out:
            recipe = make_digits_recipe(args, out, ckpt={"background": mode == "background"})
            trainer = TrainerLoop(recipe, world)
            stalls: list[float] = []
            runs = {
                "none": lambda trainer=trainer: trainer.steps(every),
                mode: lambda trainer=trainer, stalls=stalls: stalls.append(trainer.saving(every)),
            }
            times = side_by_side(runs, seconds=args.seconds, device=args.device)
            trainer.close()
        found[f"{mode}_saving_percent"] = round(100 * (ratio(times, "none", mode) - 1), 2)
        found[f"{mode}_stall_percent"] = round(100 * statistics.median(stalls), 2)
        found["rounds"] = len(times["none"])
    return found


def memory(args: argparse.Namespace) -> None:
    """Print the resident set at several steps of a whole run, as JSON."""
    from measurement import resident

    from tessel.train import engine, trainer

    step, sizes = engine.Engine.step, {}
    first, last = (4, 12) if args.dry_run else (200, 2000)

    def hooked(self):
        done = self.progress.step
        if done == first or (done > first and done % (last // 10) == 0):
            sizes[done] = resident()
        return step(self)

    engine.Engine.step = hooked
    with tempfile.TemporaryDirectory() as out:
        every = {"every": last // 4}
        tiny = {"model": {"name": "test_resnet"}, "data": {"batch": 8, "size": 32}}
        recipe = make_digits_recipe(
            args, out, **tiny, sched={"steps": last}, eval=every, ckpt=every, log={"progress": "lines"}
        )
        stdout, sys.stdout = sys.stdout, sys.stderr
        try:
            trainer.train(recipe)
        finally:
            sys.stdout = stdout
    sizes[last] = resident()
    growth = 100 * (max(sizes.values()) / sizes[first] - 1)
    mib = {step: round(size / 2**20, 1) for step, size in sizes.items()}
    print(json.dumps({"resident_mib": mib, "memory_growth_percent": round(growth, 2)}))


def startup(args: argparse.Namespace) -> None:
    """Print the seconds that each part of a start takes, as JSON."""
    import torch

    from tessel.train.distributed.world import init_distributed
    from tessel.train.engine import Engine
    from tessel.train.recipe.plan import plan
    from tessel.train.recipe.registry import task_spec

    marks = {"imports": time.time()}
    torch.set_num_threads(args.threads)
    recipe = make_digits_recipe(args, "nowhere")
    with init_distributed(recipe.run) as world:
        task = task_spec(recipe).build(recipe, world)
        marks["data"] = time.time()
        engine = Engine(recipe, task, world, schedule := plan(recipe, samples=task.samples, world_size=1))
        marks["model"] = time.time()
        batches = task.train_batches(schedule, 0)
        engine.backward([next(batches)])
        engine.optimizer.step()
        marks["first_step"] = time.time()
        batches.close()
    begin, parts = args.since, {}
    for name, mark in marks.items():
        parts[name], begin = round(mark - begin, 3), mark
    print(json.dumps(parts | {"total": round(marks["first_step"] - args.since, 3)}))


def in_new_process(part: str, args: argparse.Namespace) -> dict:
    """Measure a part in a new process."""
    from measurement import RETURNING

    values = ("device", "model", "size", "batch", "workers", "threads")
    options = [word for name in values for word in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, __file__, "--part", part, *options, *(["--dry-run"] if args.dry_run else [])]
    run = subprocess.run([*command, "--since", repr(time.time())], capture_output=True, text=True, env=RETURNING)
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "mps", "xpu"], default="cpu")
    parser.add_argument("--model", default="biformer_atto")
    parser.add_argument("--size", type=int, default=32, help="pixels (default 32)")
    parser.add_argument("--batch", type=int, default=32, help="images (default 32)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of two alternatives (default 60)")
    parser.add_argument("--block", type=int, default=10, help="steps per round of the overhead (default 10)")
    parser.add_argument("--every", type=int, default=50, help="steps per checkpoint (default 50)")
    parser.add_argument("--starts", type=int, default=3, help="processes to start for startup (default 3)")
    parts = "overhead,saving,memory,startup"
    parser.add_argument("--parts", default=parts, help=f"what to measure (default {parts})")
    parser.add_argument("--dry-run", action="store_true", help="a few steps of each part, to see that it runs")
    parser.add_argument("--out", type=Path, help="the JSON (default benchmarks/results/trainer_DEVICE.json)")
    parser.add_argument("--part", choices=["memory", "startup"], help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.starts, args.seconds = (1, 0.0) if args.dry_run else (args.starts, args.seconds)
    if args.dry_run and not (args.out or args.part):
        parser.error("--dry-run writes meaningless numbers: give a file for them with --out")
    return args


def main() -> None:
    args = parse()
    if args.part == "startup":
        return startup(args)
    import torch

    torch.set_num_threads(args.threads)
    if args.part == "memory":
        return memory(args)
    from measurement import facts

    from tessel.train.distributed.world import init_distributed

    settings = {name: getattr(args, name) for name in ("model", "size", "batch", "workers")}
    out = args.out or RESULTS / f"trainer_{args.device}.json"
    found = {"dry_run": args.dry_run, **facts(args.device), "cores": os.cpu_count(), **settings, "load_average": {}}
    with init_distributed(make_digits_recipe(args, "nowhere").run) as world:
        parts = {
            "overhead": lambda: overhead(args, world),
            "saving": lambda: saving(args, world),
            "memory": lambda: in_new_process("memory", args),
            "startup_seconds": lambda: median_startup(args),
        }
        for name in (name for name in parts if name.startswith(tuple(args.parts.split(",")))):
            found[name] = parts[name]()
            found["load_average"][name] = round(os.getloadavg()[0], 2)
            out.write_text(json.dumps(found, indent=1) + "\n")  # after each part: all of them take minutes
            print(f"{name}: {found[name]}", flush=True)
    metrics = found.get("overhead", {}) | found.get("saving", {}) | found.get("memory", {})
    goals = {name: goal for name, goal in GOALS.items() if name in metrics}
    found["goals"] = {name: {"at_most": goal, "met": metrics[name] <= goal} for name, goal in goals.items()}
    out.write_text(json.dumps(found, indent=1) + "\n")
    for name, goal in goals.items():
        print(f"{name:28}{metrics[name]:8.2f}  (at most {goal:g}: {'met' if metrics[name] <= goal else 'not met'})")
    print(f"load average {found['load_average']} on {os.cpu_count()} cores; written to {out}")


def median_startup(args: argparse.Namespace) -> dict:
    """The median over several starts, part by part."""
    starts = [in_new_process("startup", args) for _ in range(args.starts)]
    return {name: statistics.median(start[name] for start in starts) for name in starts[0]}


if __name__ == "__main__":
    main()
