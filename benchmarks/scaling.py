"""Time, FLOPs and memory of each token mixer by number of tokens, and peak memory of each family at 512 x 512.

    python benchmarks/scaling.py [--mixers NAME ...] [--clock cpu] [--out PATH]

Mixers have 64 channels and run on square maps of 16 to 128 pixels a side, on one CPU thread. The exponent e is the
least-squares slope of log(value) over log(tokens): cost grows as tokens**e. The script fails if an exponent of a mixer
that its paper calls linear exceeds 1.1, in time or in FLOPs. FLOPs are those of matrix products, convolutions and fused
attention in a forward pass; they do not depend on the machine. Memory is the peak of a forward and backward pass minus
the level before it.

Each mixer is timed in a process of its own, and its memory is measured in another: there freed memory returns to the
system at once, and a call that asks for it again takes up to twice as long. --clock cpu measures the CPU time of the
process, which other work disturbs less. Results: benchmarks/results/scaling.{json,md,png}.
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
from measurement import CLOCKS, facts, in_own_process, peak_of
from models import default_models
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tessel import blocks

RESULTS = Path(__file__).resolve().parent / "results"
SIDES = (16, 24, 32, 48, 64, 96, 128)
DIM, HEADS = 64, 2
LIMIT = 1.1
# the largest side, of mixers that hold a number for each pair of positions
LARGEST = {"LengthScaledCosine": 64}
# name -> (module, its cost in the number of tokens N according to the paper)
MIXERS = {
    "Window": (lambda: blocks.Window(DIM, num_heads=HEADS, window=7), "N"),
    "ShiftedWindow": (lambda: blocks.ShiftedWindow(DIM, num_heads=HEADS, window=7, shift=3), "N"),
    "MixtureOfHeads, window": (
        lambda: blocks.MixtureOfHeads(DIM, attention=blocks.Window(DIM, num_heads=HEADS, window=7)),
        "N",
    ),
    "Agent": (lambda: blocks.Agent(DIM, num_heads=HEADS, trained_size=56), "N"),
    "InLine": (lambda: blocks.InLine(DIM, num_heads=HEADS), "N"),
    "Channel": (lambda: blocks.Channel(DIM, num_heads=HEADS), "N"),
    "LinearGlobal": (lambda: blocks.LinearGlobal(DIM, num_heads=HEADS), "N"),
    "LargeKernel": (lambda: blocks.LargeKernel(DIM), "N"),
    "LocalMhra": (lambda: blocks.LocalMhra(DIM), "N"),
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
    "FlooredBiLevelRouting": (
        lambda: blocks.FlooredBiLevelRouting(DIM, num_heads=HEADS, n_win=8, topk=4),
        "N^(4/3) at best",
    ),
    "CrossShapedWindow": (lambda: blocks.CrossShapedWindow(DIM, num_heads=HEADS, stripe_width=2), "N^(3/2)"),
    "HiLo": (lambda: blocks.HiLo(DIM, num_heads=HEADS, window=2), "N^2 / 4 for half of the heads"),
    "Aggregated": (lambda: blocks.Aggregated(DIM, num_heads=HEADS, reduction=8, trained_size=56), "N^2 / 64"),
    "Strip": (lambda: blocks.Strip(DIM, num_heads=HEADS, reduction=8), "N^2 / 64"),
    "Hierarchical": (lambda: blocks.Hierarchical(DIM, num_heads=HEADS, window=7), "49 N + N^2 / 2401"),
    "FullAttention": (lambda: blocks.FullAttention(DIM, num_heads=HEADS), "N^2"),
    "PositionTemperature": (lambda: blocks.PositionTemperature(DIM, num_heads=HEADS), "N^2"),
    "AffineScaled": (lambda: blocks.AffineScaled(DIM, num_heads=HEADS), "N^2"),
    "LengthScaledCosine": (lambda: blocks.LengthScaledCosine(DIM, num_heads=HEADS, trained_size=56), "N^2"),
}


def sides(name: str) -> list[int]:
    return [side for side in SIDES if side <= LARGEST.get(name, max(SIDES))]


def measure(name: str, seconds: float, clock: str) -> list[dict[str, float]]:
    """For each size, the time of a forward pass in ms; one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mixer: nn.Module = MIXERS[name][0]().eval()
    now, rows = CLOCKS[clock], []
    for side in sides(name):
        x = torch.randn(1, DIM, side, side).contiguous(memory_format=torch.channels_last)
        times: list[float] = []
        with torch.inference_mode():
            mixer(x)
            end = time.perf_counter() + seconds
            while len(times) < 5 or (time.perf_counter() < end and len(times) < 500):
                start = now()
                mixer(x)
                times.append(now() - start)
        # the minimum is affected least by other work on the machine
        rows.append({"side": side, "ms": 1e3 * min(times), "median_ms": 1e3 * statistics.median(times)})
    return rows


def memory(name: str) -> list[float]:
    """For each size, the peak of a forward and backward pass in MiB; one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mixer: nn.Module = MIXERS[name][0]()
    peaks = []
    for side in sides(name):
        x = torch.randn(1, DIM, side, side).contiguous(memory_format=torch.channels_last)

        def train(x=x) -> None:
            mixer(x.requires_grad_()).sum().backward()

        train(x.clone())
        mixer.zero_grad(set_to_none=True)
        peaks.append(peak_of(train) / 2**20)
    return peaks


def mflops(name: str) -> list[float]:
    """For each size, millions of FLOPs of a forward pass, of the operations that torch counts."""
    with torch.device("meta"):
        mixer: nn.Module = MIXERS[name][0]().eval()
        counts = []
        for side in sides(name):
            with FlopCounterMode(display=False) as counter:
                mixer(torch.empty(1, DIM, side, side))
            counts.append(counter.get_total_flops() / 1e6)
    return counts


def results_of(name: str, seconds: float, clock: str) -> list[dict[str, float]]:
    """For each size, time, memory and FLOPs of the mixer."""
    timing = in_own_process(__file__, "--one", name, "--seconds", str(seconds), "--clock", clock, returning=False)
    peaks = json.loads(in_own_process(__file__, "--one", name, "--memory"))
    rows = zip(json.loads(timing), peaks, mflops(name), strict=True)
    return [{**row, "mib": mib, "mflops": count} for row, mib, count in rows]


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
    lines = ["| mixer | cost in its paper | exponent of time | of FLOPs | of memory | side | ms | MFLOPs | MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name, rows in results.items():
        last = rows[-1]
        # torch counts no FLOPs of Fourier transforms
        flops = f"{exponent(rows, 'mflops'):.2f}" if last["mflops"] else "-"
        lines.append(
            f"| {name} | {MIXERS[name][1]} | {exponent(rows, 'ms'):.2f} | {flops} | {exponent(rows, 'mib'):.2f} "
            f"| {last['side']} | {last['ms']:.1f} | {last['mflops']:.0f} | {last['mib']:.0f} |"
        )
    lines += ["", "Forward and backward of one image of 512 x 512, peak minus the level before it:", ""]
    lines += ["| model | MiB |", "|---|---|", *(f"| {name} | {peak:.0f} |" for name, peak in families.items())]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict]], where: dict, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 6.5))
    colors = plt.get_cmap("turbo")(np.linspace(0.03, 0.97, len(results)))
    for axis, key, label in zip(axes, ("ms", "mib"), ("forward, ms", "forward and backward, peak MiB"), strict=True):
        for (name, rows), color in zip(results.items(), colors, strict=True):
            legend = f"{name}: {exponent(rows, key):.2f}"
            axis.loglog([r["side"] ** 2 for r in rows], [r[key] for r in rows], "o-", ms=3, color=color, label=legend)
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.legend(fontsize=6, title="exponent", title_fontsize=6, frameon=False)
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
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is measured (default wall)")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling", help="path of the results without suffix")
    parser.add_argument("--one", metavar="NAME", choices=MIXERS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(memory(args.one) if args.memory else measure(args.one, args.seconds, args.clock)))
        return
    results = {name: results_of(name, args.seconds, args.clock) for name in tqdm(args.mixers, "mixers", disable=None)}
    families = family_memory()
    where = {**facts(), "threads": 1, "clock": args.clock}
    report = {**where, "dim": DIM, "heads": HEADS, "mixers": results, "families_at_512_mib": families}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(results, families))
    plot(results, where, args.out.with_suffix(".png"))
    print(table(results, families))
    linear = [name for name in results if MIXERS[name][1] in ("N", "N log N")]
    for key, what in (("ms", "time"), ("mflops", "FLOPs")):
        found = {name: round(exponent(results[name], key), 3) for name in linear}
        if over := {name: value for name, value in found.items() if value > LIMIT}:
            sys.exit(f"linear according to their papers, but their exponents of {what} exceed {LIMIT}: {over}")


if __name__ == "__main__":
    main()
