"""Time and memory of each token mixer by number of tokens, and peak memory of each family at 512 x 512.

    python benchmarks/scaling.py [--mixers NAME ...] [--out PATH]

Mixers have 64 channels and run on square maps of 16 to 128 pixels a side, on one CPU thread. The exponent e is the
least-squares slope of log(value) over log(tokens): cost grows as tokens**e. The script fails if the time of a mixer
that its paper calls linear has an exponent of 1.15 or more. Memory is the peak of a forward and backward pass minus the
level before it; each mixer runs in its own process. Results: benchmarks/results/scaling.{json,md,png}.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from measurement import facts, in_own_process, peak_of
from models import default_models
from torch import nn
from tqdm import tqdm

from tessel import blocks

RESULTS = Path(__file__).resolve().parent / "results"
SIDES = (16, 24, 32, 48, 64, 96, 128)
DIM, HEADS = 64, 2
LIMIT = 1.15
# name -> (module, its cost in the number of tokens N according to the paper)
MIXERS = {
    "Window": (lambda: blocks.Window(DIM, num_heads=HEADS, window=7), "N"),
    "Agent": (lambda: blocks.Agent(DIM, num_heads=HEADS, trained_size=56), "N"),
    "InLine": (lambda: blocks.InLine(DIM, num_heads=HEADS), "N"),
    "Channel": (lambda: blocks.Channel(DIM, num_heads=HEADS), "N"),
    "LinearGlobal": (lambda: blocks.LinearGlobal(DIM, num_heads=HEADS), "N"),
    "LargeKernel": (lambda: blocks.LargeKernel(DIM), "N"),
    "LongShortDistance": (lambda: blocks.LongShortDistance(DIM, num_heads=HEADS, group=7, interval=8), "N"),
    "Halo": (lambda: blocks.Halo(DIM, num_heads=HEADS, block_size=8, halo_size=3), "N"),
    "NeighborhoodAttention": (lambda: blocks.NeighborhoodAttention(DIM, num_heads=HEADS), "N"),
    "NeighborhoodAttention, dilated": (
        lambda: blocks.NeighborhoodAttention(DIM, num_heads=HEADS, dilation=2),
        "N",
    ),
    "Aggregated, fixed pool": (
        lambda: blocks.Aggregated(DIM, num_heads=HEADS, reduction=8, trained_size=56, pool_size=7),
        "N",
    ),
    "AttentiveConvolution": (lambda: blocks.AttentiveConvolution(DIM), "N"),
    "Flow": (lambda: blocks.Flow(DIM, num_heads=HEADS), "N"),
    "AdaptiveFrequencyFilter": (lambda: blocks.AdaptiveFrequencyFilter(DIM), "N log N"),
    "SpectralGating": (lambda: blocks.SpectralGating(DIM, trained_size=56), "N log N"),
    "BiLevelRouting": (lambda: blocks.BiLevelRouting(DIM, num_heads=HEADS, n_win=8, topk=4), "N^(4/3) at best"),
    "CrossShapedWindow": (lambda: blocks.CrossShapedWindow(DIM, num_heads=HEADS, stripe_width=2), "N^(3/2)"),
    "HiLo": (lambda: blocks.HiLo(DIM, num_heads=HEADS, window=2), "N^2 / 4 for half of the heads"),
    "Aggregated": (lambda: blocks.Aggregated(DIM, num_heads=HEADS, reduction=8, trained_size=56), "N^2 / 64"),
    "Strip": (lambda: blocks.Strip(DIM, num_heads=HEADS, reduction=8), "N^2 / 64"),
    "FullAttention": (lambda: blocks.FullAttention(DIM, num_heads=HEADS), "N^2"),
}


def measure(name: str, seconds: float) -> list[dict[str, float]]:
    """For each size, time of a forward pass in ms and peak memory of forward and backward in MiB; one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mixer: nn.Module = MIXERS[name][0]()
    rows = []
    for side in SIDES:
        x = torch.randn(1, DIM, side, side).contiguous(memory_format=torch.channels_last)
        mixer(x.clone().requires_grad_()).sum().backward()
        mixer.zero_grad(set_to_none=True)

        def train(x=x) -> None:
            mixer(x.requires_grad_()).sum().backward()

        memory = peak_of(train) / 2**20
        times, end = [], time.perf_counter() + seconds
        with torch.inference_mode():
            x = x.detach()
            while len(times) < 5 or (time.perf_counter() < end and len(times) < 500):
                start = time.perf_counter()
                mixer(x)
                times.append(time.perf_counter() - start)
        # the minimum is affected least by other work on the machine
        rows.append({"side": side, "ms": 1e3 * min(times), "median_ms": 1e3 * statistics.median(times), "mib": memory})
    return rows


def exponent(rows: list[dict[str, float]], key: str) -> float:
    tokens = np.log([row["side"] ** 2 for row in rows])
    return float(np.polyfit(tokens, np.log([max(row[key], 1e-3) for row in rows]), 1)[0])


def family_memory() -> dict[str, float]:
    """Peak MiB of a forward and backward pass of one image of 512 x 512, for one model of each family."""
    script = str(Path(__file__).with_name("models.py"))
    peaks = {}
    for name in tqdm(default_models(), "families at 512", disable=None):
        peaks[name] = float(in_own_process(script, "--one", name, "--size", "512", "--batch", "1", "--train"))
    return peaks


def table(results: dict[str, list[dict]], families: dict[str, float]) -> str:
    lines = ["| mixer | cost in its paper | exponent of time | of memory | ms at 128 x 128 | MiB at 128 x 128 |"]
    lines.append("|---|---|---|---|---|---|")
    for name, rows in results.items():
        last = rows[-1]
        lines.append(
            f"| {name} | {MIXERS[name][1]} | {exponent(rows, 'ms'):.2f} | {exponent(rows, 'mib'):.2f} "
            f"| {last['ms']:.1f} | {last['mib']:.0f} |"
        )
    lines += ["", "Forward and backward of one image of 512 x 512, peak minus the level before it:", ""]
    lines += ["| model | MiB |", "|---|---|", *(f"| {name} | {peak:.0f} |" for name, peak in families.items())]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict]], where: dict, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8))
    for axis, key, label in zip(axes, ("ms", "mib"), ("forward, ms", "forward and backward, peak MiB"), strict=True):
        for (name, rows), color in zip(results.items(), plt.get_cmap("tab20").colors, strict=False):
            legend = f"{name}: {exponent(rows, key):.2f}"
            axis.loglog([r["side"] ** 2 for r in rows], [r[key] for r in rows], "o-", ms=3, color=color, label=legend)
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.legend(fontsize=7, title="exponent", title_fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{DIM} channels, {HEADS} heads, one thread of {where['device']}, torch {where['torch']}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per mixer and size (default 1)")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling", help="path of the results without suffix")
    parser.add_argument("--one", metavar="NAME", choices=MIXERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.seconds)))
        return
    results = {
        name: json.loads(in_own_process(__file__, "--one", name, "--seconds", str(args.seconds)))
        for name in tqdm(args.mixers, "mixers", disable=None)
    }
    families = family_memory()
    where = {**facts(), "threads": 1}
    report = {**where, "dim": DIM, "heads": HEADS, "mixers": results, "families_at_512_mib": families}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(results, families))
    plot(results, where, args.out.with_suffix(".png"))
    print(table(results, families))
    linear = [name for name in results if MIXERS[name][1] in ("N", "N log N")]
    over = {name: round(exponent(results[name], "ms"), 3) for name in linear if exponent(results[name], "ms") >= LIMIT}
    if over:
        sys.exit(f"linear according to their papers, but their exponents of time are not below {LIMIT}: {over}")


if __name__ == "__main__":
    main()
