"""Time, FLOPs and memory of each token mixer by number of tokens, and peak memory of each family at 512 x 512.

    python benchmarks/scaling.py [--mixers NAME ...] [--families NAME ...] [--clock cpu] [--resume] [--out PATH]

Mixers have 64 channels and run on square maps of 16 to 128 pixels a side, on one CPU thread. The exponent e is the
least-squares slope of log(value) over log(tokens): cost grows as tokens**e. The script fails if an exponent of a mixer
that its paper calls linear exceeds 1.1, in time or in FLOPs. FLOPs are those of matrix products, convolutions and fused
attention in a forward pass; they do not depend on the machine. Memory is the peak of a forward and backward pass minus
the level before it; its exponent is that of peaks of at least 1 MiB.

Time and memory are measured in different processes: where memory is measured, what is freed returns to the system at
once, and a call that asks for it again takes up to twice as long. --clock cpu measures the CPU time of the process,
which other work disturbs less. Results: benchmarks/results/scaling.{json,md,png}, written after some mixers; --resume
keeps those of the same device and versions and measures the rest.
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
# mixers in one process, since starting one takes longer than measuring a mixer
GROUP = 6
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


def results_of(names: list[str], seconds: float, clock: str) -> dict[str, list[dict[str, float]]]:
    """For each mixer and size, time, memory and FLOPs."""
    timing = in_own_process(__file__, "--time", *names, "--seconds", str(seconds), "--clock", clock, returning=False)
    times, peaks = json.loads(timing), json.loads(in_own_process(__file__, "--memory", *names))
    results = {}
    for name in names:
        rows = zip(times[name], peaks[name], mflops(name), strict=True)
        results[name] = [{**row, "mib": mib, "mflops": count} for row, mib, count in rows]
    return results


def exponent(rows: list[dict[str, float]], key: str) -> float:
    # the resident set, in pages and with parts that are used again, does not resolve smaller peaks
    resolved = [row for row in rows if key != "mib" or row["mib"] >= 1]
    rows = resolved if len(resolved) > 1 else rows
    tokens = np.log([row["side"] ** 2 for row in rows])
    return float(np.polyfit(tokens, np.log([max(row[key], 1e-3) for row in rows]), 1)[0])


def family_memory(name: str) -> float:
    """Peak MiB of a forward and backward pass of one image of 512 x 512."""
    script = str(Path(__file__).with_name("models.py"))
    return float(in_own_process(script, "--one", name, "--size", "512", "--batch", "1", "--train"))


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


def previous(where: dict, out: Path) -> tuple[dict[str, list[dict]], dict[str, float]]:
    """Mixers and families at `out`, if they were measured with the same device, versions and clock."""
    path = out.with_suffix(".json")
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    same = all(found.get(key) == value for key, value in where.items() if key != "commit")
    return (found["mixers"], found["families_at_512_mib"]) if same else ({}, {})


def write(results: dict[str, list[dict]], families: dict[str, float], where: dict, out: Path) -> None:
    results = {name: results[name] for name in MIXERS if name in results}
    report = {**where, "mixers": results, "families_at_512_mib": families}
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(results, families))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--families", nargs="*", metavar="NAME", help="models for the memory at 512 px (default: all)")
    parser.add_argument("--resume", action="store_true", help="keep the results at --out, measure the others")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per mixer and size (default 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is measured (default wall)")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling", help="path of the results without suffix")
    parser.add_argument("--time", nargs="+", metavar="NAME", choices=MIXERS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs="+", metavar="NAME", choices=MIXERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time or args.memory:
        found = {name: measure(name, args.seconds, args.clock) for name in args.time or ()}
        print(json.dumps(found or {name: memory(name) for name in args.memory}))
        return
    where = {**facts(), "threads": 1, "clock": args.clock, "dim": DIM, "heads": HEADS}
    results, families = previous(where, args.out) if args.resume else ({}, {})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    left = [name for name in args.mixers if name not in results]
    for start in tqdm(range(0, len(left), GROUP), "mixers", disable=None):
        results |= results_of(left[start : start + GROUP], args.seconds, args.clock)
        write(results, families, where, args.out)
    chosen = default_models() if args.families is None else args.families
    for name in tqdm([name for name in chosen if name not in families], "families at 512", disable=None):
        families[name] = family_memory(name)
        write(results, families, where, args.out)
    plot(results, where, args.out.with_suffix(".png"))
    print(table(results, families))
    linear = [name for name in results if MIXERS[name][1] in ("N", "N log N")]
    for key, what in (("ms", "time"), ("mflops", "FLOPs")):
        found = {name: round(exponent(results[name], key), 3) for name in linear}
        if over := {name: value for name, value in found.items() if value > LIMIT}:
            sys.exit(f"linear according to their papers, but their exponents of {what} exceed {LIMIT}: {over}")


if __name__ == "__main__":
    main()
