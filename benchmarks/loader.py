"""Images per second of the input of classification, compared with timm's loader; no model runs.

    python benchmarks/loader.py                      a few minutes; --dry-run takes seconds, to see it run

The loaders read the same JPEG files of about 500 x 375 pixels and 43 kB, drawn by this script, with the augmentation of
the ImageNet recipes, in batches of normalized and erased float32 images on the device:

timm          timm's `create_loader(use_prefetcher=True)`
pil           tessel's loader
torchcodec    tessel's loader with data.decoder=torchcodec

In each round every loader starts anew, in an order that is shuffled. The first two batches are not counted: the first
waits for the workers to start, and timm's prefetcher hands out each batch one later than it is ready.
Goals: at least 1.1 times timm with pil, 1.3 times with torchcodec. Results: results/loader_DEVICE.json.
"""

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from measurement import DEVICES, facts, synchronize
from PIL import Image
from timm.data import create_dataset, create_loader
from tqdm import tqdm

from tessel.train.data.sampler import seed_all
from tessel.train.distributed.device import pins_memory
from tessel.train.distributed.world import World
from tessel.train.recipe.load import make_recipe
from tessel.train.recipe.plan import plan
from tessel.train.recipe.registry import task_spec

RESULTS = Path(__file__).resolve().parent / "results"
GOALS = {"pil": 1.1, "torchcodec": 1.3}
SIZE, SKIPPED = 224, 2
# the recipes have mstd0.5: with it timm asks Pillow 13 for posterizing to 0 bits, which is an error
POLICY = "rand-m9-mstd0-inc1"
AUG = {
    "scale": [0.08, 1.0],
    "ratio": [0.75, 1.3333333],
    "hflip": 0.5,
    "auto_augment": POLICY,
    "erasing": 0.25,
}


def draw_pictures(root: Path, files: int, pictures: int) -> None:
    """Write `files` JPEG files of two classes to root/train and root/val; `pictures` of them differ."""
    rng = np.random.default_rng(0)
    for number in tqdm(range(pictures), "pictures", disable=None):
        width, height = (500, 375) if number % 3 else (375, 500)
        data = texture(rng, width, height)
        first = None
        for copy in range(number, files, pictures):
            for split in ("train", "val"):
                path = root / split / f"class_{copy % 2}" / f"{copy:06d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                if first is None:
                    data.save(first := path, "JPEG", quality=85)
                else:
                    os.link(first, path)


def texture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Random color patches of several sizes: coarse ones are strong and fine ones weak, as in photographs."""
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, strength in ((4, 60), (16, 50), (64, 40), (160, 14)):
        shape = (max(2, height * cells // width), cells, 3)
        noise = rng.normal(0, 1, shape) * 0.4 + 0.75 * rng.normal(0, 1, (*shape[:2], 1))
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel].astype(np.float32))
            pixels[..., channel] += strength * np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tessel_batches(root: Path, args: argparse.Namespace, world: World, decoder: str, seed: int) -> Iterator[object]:
    """Batches of tessel's loader with `data.decoder=decoder`, as the training sees them."""
    data = {"source": "folder", "root": str(root), "size": SIZE, "batch": args.batch, "workers": args.workers}
    sections = {
        "run": {"seed": seed},
        "model": {"name": "test_resnet"},
        "data": {**data, "interpolation": "bicubic", "decoder": decoder, "aug": AUG},
        "sched": {"steps": args.batches + SKIPPED},
    }
    recipe = make_recipe(sections, source="benchmark")
    task = task_spec(recipe).build(recipe, world)
    task.build_model()
    batches = task.train_batches(plan(recipe, samples=task.samples, world_size=1), 0)
    try:
        for batch in batches:
            images, targets = task.to_device(batch)
            yield task.erasing(images), targets
    finally:
        batches.close()


def timm_batches(root: Path, args: argparse.Namespace, device: torch.device, seed: int) -> Iterator[object]:
    """Batches of timm's loader with its prefetcher."""
    seed_all(seed)
    loader = create_loader(
        create_dataset("", root=str(root / "train")),
        input_size=(3, SIZE, SIZE),
        batch_size=args.batch,
        is_training=True,
        use_prefetcher=True,
        re_prob=AUG["erasing"],
        re_mode="pixel",
        scale=AUG["scale"],
        ratio=AUG["ratio"],
        hflip=AUG["hflip"],
        color_jitter=None,
        auto_augment=POLICY,
        interpolation="bicubic",
        num_workers=args.workers,
        pin_memory=pins_memory(device),
        persistent_workers=False,
        device=device,
    )
    yield from loader


def rate(batches: Iterator[object], args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Images per second over `args.batches` batches; CPU milliseconds per image of this process and its workers."""
    used = cpu_seconds()
    for _ in range(SKIPPED):
        next(batches)
    start = time.perf_counter()
    for _ in range(args.batches):
        next(batches)
    synchronize(device.type)
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    gc.collect()  # timm's loader ends its workers when it is deleted; they count once they have ended
    milliseconds = 1e3 * (cpu_seconds() - used) / ((args.batches + SKIPPED) * args.batch)
    return round(args.batches * args.batch / seconds, 1), round(milliseconds, 3)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(root: Path, args: argparse.Namespace, device: torch.device) -> dict[str, list[tuple[float, float]]]:
    """What `rate` finds of each loader in each round."""
    world = World(device=device)
    loaders: dict[str, Callable[[int], Iterator[object]]] = {
        "timm": lambda seed: timm_batches(root, args, device, seed),
        **{name: lambda seed, name=name: tessel_batches(root, args, world, name, seed) for name in GOALS},
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for seed in tqdm(range(args.rounds), "rounds", disable=None):
        order = list(loaders)
        random.Random(seed).shuffle(order)
        for name in order:
            rates[name].append(rate(loaders[name](seed), args, device))
    return rates


def summary(rounds: dict[str, list[tuple[float, float]]]) -> dict[str, dict]:
    """Median, best and their ratios to timm, of each loader."""
    rates = {name: [speed for speed, _ in found] for name, found in rounds.items()}
    milliseconds = {name: [time for _, time in found] for name, found in rounds.items()}
    theirs = rates["timm"]
    return {
        name: {
            "median": statistics.median(found),
            "best": max(found),
            # of the quotients of the rounds, because load of the machine changes from round to round
            "median_ratio": round(statistics.median(a / b for a, b in zip(found, theirs, strict=True)), 3),
            "best_ratio": round(max(found) / max(theirs), 3),
            # other work on the machine lengthens it least
            "cpu_ms_an_image": statistics.median(milliseconds[name]),
            "images_per_second": found,
        }
        for name, found in rates.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default 2)")
    parser.add_argument("--batch", type=int, default=32, help="images (default 32)")
    parser.add_argument("--batches", type=int, default=30, help="counted in each round (default 30)")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--pictures", type=int, default=128, help="different pictures (default 128)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the main process (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="two batches of each loader, to see that it runs")
    parser.add_argument("--out", type=Path, help="the JSON (default benchmarks/results/loader_DEVICE.json)")
    args = parser.parse_args()
    if args.dry_run and not args.out:
        parser.error("--dry-run writes meaningless numbers: give a file for them with --out")
    if args.dry_run:
        args.batch, args.batches, args.rounds, args.pictures = 4, 2, 1, 8
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device, load = torch.device(args.device), round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        files = (args.batches + SKIPPED) * args.batch
        draw_pictures(Path(folder), files, args.pictures)
        sizes = [path.stat().st_size for path in Path(folder).glob("train/*/*.jpg")]
        rates = measure(Path(folder), args, device)
    found = summary(rates)
    names = ("workers", "batch", "batches", "rounds", "pictures")
    settings = {name: getattr(args, name) for name in names} | {"size": SIZE, **AUG}
    goals = {
        name: {"at_least": goal, "met": min(found[name]["median_ratio"], found[name]["best_ratio"]) >= goal}
        for name, goal in GOALS.items()
    }
    report = {
        "dry_run": args.dry_run,
        **facts(args.device),
        "cores": os.cpu_count(),
        "load_average_before": load,
        **settings,
        "kilobytes_a_picture": round(statistics.mean(sizes) / 1e3, 1),
        "loaders": found,
        "goals": goals,
    }
    out = args.out or RESULTS / f"loader_{args.device}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    for name, row in found.items():
        goal = f"at least {GOALS[name]}: {'met' if goals[name]['met'] else 'not met'}" if name in GOALS else ""
        print(
            f"{name:12}{row['median']:8.1f} images/s (best {row['best']:.1f}), {row['median_ratio']:.2f} times timm "
            f"(best {row['best_ratio']:.2f}), {row['cpu_ms_an_image']:.2f} ms of CPU an image  {goal}"
        )
    print(f"load average {load} on {os.cpu_count()} cores; written to {out}")


if __name__ == "__main__":
    main()
