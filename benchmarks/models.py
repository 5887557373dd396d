"""Images per second, FLOPs, parameters and peak memory of models, beside timm's models of the same size.

    python benchmarks/models.py                                    one model of each family (about 25 M parameters)
    python benchmarks/models.py --models cswin_tiny litv2_small --peers swin_tiny_patch4_window7_224 --batch 1,8
    python benchmarks/models.py --variants eager --train           float32 alone, inference and training
    python benchmarks/models.py --set small --resume               the smallest published model of each family
    python benchmarks/models.py --set hosts --variants eager       agent and InLine attention beside other mixers
    python benchmarks/models.py --device cuda --batch 64 --train   bfloat16, kernels on and off, eager and compiled

The variants are how a model runs. On the CPU: eager in float32, eager under bfloat16 autocast (bf16), and compiled in
float32. On a GPU all are in bfloat16. A model and those that it is compared with run alternately in one process, in all
variants, so that other work on the machine affects all of them. Memory is the peak of a run minus the level before it;
on the CPU each model has its own process. Results are written to benchmarks/results/models_DEVICE.{json,md,png} or to
the path given by --out, after every batch size; --resume keeps those of the same version and measures the rest.

The hosts are layouts of agent and InLine attention, at 512 x 512 pixels, beside the same layout with full or window
attention and beside a well-known model. --clock cpu measures the CPU time of the process, which other work disturbs
less.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import timm
import torch
from measurement import (
    CLOCKS,
    DEVICES,
    allocated,
    check,
    facts,
    in_own_process,
    peak_of,
    precision,
    ratio,
    side_by_side,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import tessel.zoo
from tessel.blocks import Agent, InLine, ShiftedWindow
from tessel.kernels import dispatch

RESULTS = Path(__file__).resolve().parent / "results"
# well-known models of timm; each model is compared with those nearest to it in parameters
TIMM = (
    "convnext_atto", "convnext_nano", "convnext_tiny", "convnext_small", "convnext_base", "convnext_large",
    "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224",
    "mobilevitv2_050", "mobilevitv2_100", "mobilevitv2_150", "resnet50",
)  # fmt: skip
# at this size the first three stages of a hierarchical host have more than 1,000 tokens, as have all blocks of DeiT
HOST_SIZE = 512
# what each host is compared with. "NAME with MIXER" is NAME with another mixer in place of its agent or InLine
# attention. Mixers that take more than a map cannot be replaced: those of DeiT, for which timm has the layout, and
# InLine's of CSWin, whose layout is that of agent attention
HOSTS = {
    "agent_deit_tiny": ("deit_tiny_patch16_224",),
    "inline_deit_tiny": ("deit_tiny_patch16_224",),
    "agent_deit_small": ("deit_small_patch16_224",),
    "agent_pvt_tiny": ("agent_pvt_tiny with full_attention", "pvt_v2_b1"),
    "inline_pvt_tiny": ("inline_pvt_tiny with full_attention", "pvt_v2_b1"),
    "agent_swin_tiny": ("agent_swin_tiny with shifted_window", "swin_tiny_patch4_window7_224"),
    "inline_swin_tiny": ("inline_swin_tiny with shifted_window", "swin_tiny_patch4_window7_224"),
    "agent_cswin_tiny": ("agent_cswin_tiny with cross_shaped_window", "cswin_tiny"),
    "inline_cswin_tiny": ("agent_cswin_tiny with cross_shaped_window", "cswin_tiny"),
}
COMPILE_SECONDS = 60  # about what compiling a model takes
COLUMNS = (
    "model", "parameters", "gmacs", "size", "batch", "setting", "images_per_second", "ratio", "to_eager", "peak_mib",
)  # fmt: skip
# variants by device
VARIANTS = {
    "cpu": ("eager", "bf16", "compiled"),
    "cuda": ("eager, no kernels", "eager, kernels", "compiled, no kernels", "compiled, kernels"),
    "mps": ("eager", "compiled"),
    "xpu": ("eager", "compiled"),
}


def default_models(parameters: float = 25e6) -> list[str]:
    """Of each family the published model whose size is nearest to `parameters`."""

    def distance(name: str) -> float:
        model = timm.create_model(name, device="meta")
        return abs(sum(p.numel() for p in model.parameters()) - parameters)

    return [min(names, key=distance) for names in published_models()]


def small_models() -> list[str]:
    """Of each family the smallest published model: the first."""
    return [names[0] for names in published_models()]


def published_models() -> list[list[str]]:
    """The models of each family, without the one named atto, which is for tests."""
    return [[n for n in family.variants if not n.endswith("_atto")] for family in tessel.zoo.list_families()]


def build(name: str, size: int) -> nn.Module:
    """The model for square images of `size` pixels; see `HOSTS` for names with a mixer."""
    name, _, mixer = name.partition(" with ")
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size and config.input_size[-1] != size
    model = timm.create_model(name, **({"img_size": size} if fixed else {}))
    if mixer:
        own = {path: m for path, m in model.named_modules() if isinstance(m, (Agent, InLine))}
        tessel.zoo.swap(model, {p.split(".")[1]: f"{mixer}(num_heads={m.num_heads})" for p, m in own.items()})
        for path, m in model.named_modules():
            if isinstance(m, ShiftedWindow):  # every second block shifts its windows, as in Swin
                _, _, _, block, *_ = path.split(".")
                m.shift = m.window // 2 * (int(block) % 2)
    return model


def cost(name: str, size: int) -> tuple[float, float]:
    """Parameters in millions and multiply-adds of one image in billions."""
    with torch.device("meta"):
        model = build(name, size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


def peers(name: str, size: int, count: int = 2) -> list[str]:
    """timm's own model of the same architecture, if there is one, and `count` of `TIMM` nearest in parameters."""
    own = [name.removeprefix("tessel_")] if timm.is_model(name.removeprefix("tessel_")) and "tessel_" in name else []
    target, _ = cost(name, size)
    nearest: dict[str, str] = {}
    for peer in sorted(TIMM, key=lambda n: abs(cost(n, size)[0] / target - 1)):
        nearest.setdefault(peer.split("_")[0], peer)
    return own + list(nearest.values())[:count]


def inference(model: nn.Module, x: torch.Tensor, precision: Callable) -> Callable:
    def run() -> None:
        with torch.inference_mode(), precision():
            model(x)

    return run


def training(model: nn.Module, x: torch.Tensor, precision: Callable) -> Callable:
    def run() -> None:
        with precision():
            loss = model(x).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


class Setting:
    """How a model is run: device, inference or training, and one of `VARIANTS`."""

    def __init__(self, device: str, variant: str, *, train: bool):
        self.device, self.variant, self.train = device, variant, train
        self.name = f"{'training' if train else 'inference'}, {variant}"
        self.kernels = "triton" if variant.endswith(", kernels") else "reference" if "kernels" in variant else "auto"

    @property
    def baseline(self) -> str:
        """The variant that this one is compared with: the first."""
        return VARIANTS[self.device][0]

    def prepare(self, name: str, size: int, batch: int) -> Callable:
        """Make the model and return the call to time, after one call as warm-up."""
        torch.manual_seed(0)
        layout = torch.channels_last
        model = build(name, size).to(self.device, memory_format=layout).train(self.train)
        x = torch.randn(batch, 3, size, size, device=self.device).contiguous(memory_format=layout)
        if self.variant.startswith("compiled"):
            model.compile()
        call = (training if self.train else inference)(model, x, self._precision)

        def run() -> None:
            # set before each call, since runs with and without kernels alternate in one process
            dispatch.default_backend = self.kernels
            call()

        run()
        return run

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16) if self.variant == "bf16" else precision(self.device)


def has_variant(name: str, variant: str) -> bool:
    """Whether the model can run so: only ours have kernels."""
    return not variant.endswith(", kernels") or name in tessel.zoo.list_models()


def peak_mib(name: str, size: int, batch: int, setting: Setting) -> float:
    if setting.device == "cpu":
        arguments = ["--one", name, "--size", str(size), "--batch", str(batch), "--variants", setting.variant]
        return float(in_own_process(__file__, *arguments, *(["--train"] if setting.train else [])))
    run = setting.prepare(name, size, batch)
    before, peak = allocated(run)
    return (peak - before) / 2**20


def compare(
    name: str, others: list[str], size: int, batch: int, settings: list[Setting], args: argparse.Namespace
) -> list[dict]:
    """Measurements of the model and of each of its peers that accepts images of this size, in all settings."""
    # otherwise a limit on the number of compiled models is reached, and a second batch size compiles for any
    torch.compiler.reset()
    runs: dict[str, Callable] = {}
    keys = [(n, s) for s in settings for n in [name, *others] if has_variant(n, s.variant)]
    keys = [(n, s) for n, s in keys if n == name or s.variant in args.peer_variants]
    for n, setting in keys:
        try:
            runs[f"{n} {setting.name}"] = setting.prepare(n, size, batch)
        except Exception as error:  # timm's models raise various types
            if n == name:
                raise
            print(f"{n} is left out: {type(error).__name__} at {size} px: {error}", file=sys.stderr)
    times = side_by_side(runs, seconds=args.seconds, device=settings[0].device, clock=CLOCKS[args.clock])
    del runs
    rows = []
    for n, setting in keys:
        key = f"{n} {setting.name}"
        if key not in times:
            continue
        eager = key.replace(setting.variant, setting.baseline)
        ours = f"{name} {setting.name}"
        parameters, gmacs = cost(n, size)
        values = (
            n, round(parameters, 2), round(gmacs, 2), size, batch, setting.name,
            round(batch / statistics.median(times[key]), 2), round(ratio(times, ours, key), 3),
            round(ratio(times, key, eager), 3) if eager in times else None,
            round(peak_mib(n, size, batch, setting), 1),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def table(groups: dict[str, list[dict]]) -> str:
    head = (
        "model",
        "M parameters",
        "GMACs",
        "px",
        "batch",
        "setting",
        "images/s",
        "ours is faster by",
        "to eager",
        "peak MiB",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, rows in groups.items():
        for row in rows:
            values = [f"**{row['model']}**" if row["model"] == name else row["model"]]
            values += [str(row[c]) for c in COLUMNS[1:]]
            values[7] = "" if row["model"] == name else f"{row['ratio']:.2f}x"
            values[8] = "" if row["to_eager"] is None else f"{row['to_eager']:.2f}x"
            lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def plot(groups: dict[str, list[dict]], facts: dict, path: Path) -> None:
    """Images per second: a bar for each model, ours in color; a panel for each batch size and setting."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((row["batch"], row["setting"]) for rows in groups.values() for row in rows))
    entries = sum(len({row["model"] for row in rows}) for rows in groups.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 0.32 * entries + 1.5), sharey=True, squeeze=False
    )
    for axis, (batch, setting) in zip(axes[0], panels, strict=True):
        at, ticks = 0.0, []
        for name, rows in groups.items():
            for row in rows:
                if (row["batch"], row["setting"]) == (batch, setting):
                    speed = row["images_per_second"]
                    axis.barh(at, speed, color="#2a6fbb" if row["model"] == name else "#b9c2cc")
                    axis.text(speed, at, f" {speed:.1f}", va="center", fontsize=7)
                    ticks.append((at, row["model"]))
                    at += 1
            at += 0.6
        axis.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=7)
        axis.set_xlabel("images/s")
        axis.set_title(f"{setting}, batch {batch}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12, y=0.01)
    axes[0, 0].invert_yaxis()
    figure.suptitle(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="models (default: those of --set)")
    parser.add_argument(
        "--set",
        choices=("medium", "small", "hosts"),
        default="medium",
        help="of each family the model nearest to 25 M "
        "parameters (medium, default) or the smallest, or the hosts of agent and InLine attention",
    )
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME", help="models to compare with (default: timm's nearest in size)"
    )
    parser.add_argument("--batch", default="1,8", help="batch sizes, with commas (default 1,8)")
    parser.add_argument("--size", type=int, help="image side in pixels (default: the size each model is published for)")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--train", action="store_true", help="also forward and backward")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each model, batch and setting (default 5)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="how to run them (default: all, see above)")
    parser.add_argument("--peer-variants", nargs="+", metavar="NAME", help="how to run the other models (default: all)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is measured (default wall)")
    parser.add_argument("--resume", action="store_true", help="keep the results of this version, measure the others")
    parser.add_argument("--budget", type=float, default=float("inf"), help="begin nothing new after so many seconds")
    parser.add_argument("--out", type=Path, help="path of the results without suffix")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        args.batch = [int(b) for b in args.batch.split(",")]
    except ValueError:
        parser.error(f"--batch {args.batch} must be whole numbers with commas, as 1,8")
    known = VARIANTS[args.device]
    for option in ("variants", "peer_variants"):
        if unknown := [variant for variant in getattr(args, option) or () if variant not in known]:
            flag = f"--{option.replace('_', '-')}"
            parser.error(f"{flag} {unknown[0]!r} is unknown with --device {args.device}; it has {', '.join(known)}")
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu measures the time of the CPU; leave it out for another device")
    args.variants = args.variants or known
    args.peer_variants = args.peer_variants or args.variants
    sets = {"medium": default_models, "small": small_models, "hosts": lambda: list(HOSTS)}
    args.models = args.models or ([] if args.one else sets[args.set]())
    check(parser, args)
    return args


def previous(where: dict, out: Path) -> dict[str, list[dict]]:
    """The results at `out` if they were measured by this version on this device, else none."""
    path = out.with_suffix(".json")
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found["groups"] if all(found.get(key) == value for key, value in where.items()) else {}


def estimate(jobs: int, args: argparse.Namespace) -> float:
    """Seconds that so many comparisons take, by the number of models in each; a rough guide."""
    peer_count = 2 if args.peers is None else len(args.peers)
    total = 0.0
    for variants, models in ((args.variants, 1), (args.peer_variants, peer_count)):
        for variant in variants:
            # a model is timed, and started again in a process of its own for its memory
            total += models * (args.seconds + 10 + 2 * COMPILE_SECONDS * variant.startswith("compiled"))
    return jobs * total


def write(groups: dict[str, list[dict]], where: dict, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({**where, "groups": groups}, indent=1) + "\n")
    heading = f"{where['device']}, {where['threads']} threads, torch {where['torch']}\n\n"
    out.with_suffix(".md").write_text(heading + table(groups))


def main() -> None:
    args, start = parse(), time.time()
    if args.one:
        setting = Setting("cpu", args.variants[0], train=args.train)
        print(peak_of(setting.prepare(args.one, args.size, args.batch[0])) / 2**20)
        return
    where, out = {**facts(args.device), "clock": args.clock}, args.out or RESULTS / f"models_{args.device}"
    groups = previous(where, out) if args.resume else {}
    done = {(n, row["batch"], row["setting"].split(",")[0]) for n, rows in groups.items() for row in rows}
    passes = ("inference", "training") if args.train else ("inference",)
    jobs = [(n, b, p) for n in args.models for b in args.batch for p in passes if (n, b, p) not in done]
    print(f"{len(jobs)} comparisons, in about {estimate(len(jobs), args) / 60:.0f} minutes", file=sys.stderr)
    for name, batch, direction in tqdm(jobs, "measuring", disable=None):
        if time.time() - start > args.budget:
            print(f"no time was left for {name} at batch {batch}", file=sys.stderr)
            continue
        peers_of, size = (HOSTS.get(name), HOST_SIZE) if args.set == "hosts" else (None, None)
        size = args.size or size or timm.get_pretrained_cfg(name).input_size[-1]
        others = args.peers if args.peers is not None else list(peers_of or peers(name, size))
        settings = [Setting(args.device, variant, train=direction == "training") for variant in args.variants]
        groups.setdefault(name, []).extend(compare(name, others, size, batch, settings, args))
        write(groups, where, out)
    plot(groups, where, out.with_suffix(".png"))
    print(table(groups))
    print(f"written: {out}.json, .md, .png", file=sys.stderr)


if __name__ == "__main__":
    main()
