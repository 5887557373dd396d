"""The sections of a recipe that every task and every data source shares, strict in keys and types.

The docstring below a key is its description in `--help` and in docs/recipes.md. A task adds its own keys by a subclass
of `Task` and `Data`, a data source by a subclass of `Source` (see `registry.py`). This room imports no torch, so
that help and errors in a recipe appear at once.
"""

import dataclasses
import os
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
Probability = Annotated[float, Field(ge=0, le=1)]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
Level = Annotated[int, Field(ge=0, le=255)]
# epochs or steps; the limit keeps their products finite
Length = Annotated[float, Field(ge=0, le=1e12)]
if typing.TYPE_CHECKING:
    # a run begins with the number that `sizing.sized` puts in the place of "auto"
    AutoInt = int
    AutoLength = float
    AutoPositiveLength = float
    AutoFraction = float
    AutoDecay = float
    AutoPair = tuple[int, int]
else:
    AutoInt = PositiveInt | Literal["auto"]
    AutoLength = Length | Literal["auto"]
    AutoPositiveLength = Annotated[float, Field(gt=0, le=1e12)] | Literal["auto"]
    AutoFraction = Annotated[float, Field(gt=0, le=1)] | Literal["auto"]
    AutoDecay = Annotated[float, Field(gt=0, lt=1)] | Literal["auto"]
    AutoPair = tuple[PositiveInt, PositiveInt] | Literal["auto"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Run:
    name: Annotated[str, Field(pattern=r"^(\w[\w.+-]*)?$")] = ""
    """directory of the run; empty: the file name of the recipe"""
    out: FilePath = "runs"
    """directory that holds the runs"""
    seed: NonNegativeInt = 0
    """seed of the weights, the data order, the augmentation and drop path"""
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    """auto: the accelerator that torch finds, else cpu"""
    deterministic: bool = False
    """use deterministic torch kernels only (slower)"""
    fresh: bool = False
    """rename an existing run of this name and start from scratch; ignored on automatic restarts (torchrun, SLURM)"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    name: str
    """a model of timm or tessel; local-dir:RUN/export takes an exported one"""
    pretrained: bool | Literal["auto"] = False
    """start from the published weights of the model; auto: if they can be downloaded, else from random weights"""
    init_from: str | None = None
    """start from the weights of another model with the same parameters: a timm name, local-dir:RUN/export, or a file"""
    freeze: Literal["backbone"] | PositiveInt | None = None
    """do not train the backbone, or its stem and first N stages; their batch norms keep their running statistics"""
    drop_path_rate: Probability | None = None
    """stochastic depth rate; null: the default of the model"""
    in_chans: PositiveInt | None = None
    """channels of the input; null: 3, red, green and blue"""
    swap: dict[int, str] = dataclasses.field(default_factory=dict)
    """stage, from 0 -> other token mixers for it: {2: "halo(block_size=8)"}; models of tessel only"""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """further arguments of timm.create_model"""

    @property
    def arguments(self) -> dict[str, Any]:
        """`kwargs`, and `swap` if there is one."""
        return {**self.kwargs, **({"swap": self.swap} if self.swap else {})}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dense:
    batch_norm: Literal["train", "eval", "frozen"] = "train"
    """batch norms of the backbone; eval: use the running statistics; frozen: freeze weights and biases too"""
    sync_batch_norm: bool = True
    """false: parallel.sync_batch_norm synchronizes the batch norms of the heads only, not those of the backbone"""
    norms: tuple[bool, ...] | None = None
    """add a norm to each output, one value per output; null: the norms of the paper, none for models of timm"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Task:
    """Base of the section `task`. A task subclasses it with its own keys."""

    kind: str = "classify"
    """the task"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Aug:
    """Base of the section `data.aug`: what every task's augmentation takes."""

    hflip: Probability = 0.0
    """probability of a horizontal flip"""
    vflip: Probability = 0.0
    """probability of a vertical flip"""
    repeated_aug: PositiveInt = 1
    """repeated augmentation: copies of an image in a batch; the length of an epoch does not change"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """Base of the section `data`. A task subclasses it with its own keys; those of the source are added to it."""

    source: str
    """the data source"""
    size: Annotated[int, Field(gt=0, le=32768)] = 224
    """side of the input in pixels; in detection, its short side"""
    batch: AutoInt = 256
    """global batch size: images per update over all processes; auto: by the number of training images"""
    micro_batch: PositiveInt | None = None
    """images per forward pass and process; null: batch / processes"""
    eval_batch: PositiveInt = 256
    """images per forward pass and process in evaluation"""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """data loader workers per process"""
    background: tuple[Level, Level, Level] = (255, 255, 255)
    """color below transparent pixels: red, green and blue in 0 to 255"""
    aug: Aug = Aug()

    @property
    def location(self) -> str:
        """Where the data are: the folder or the name that the source has, else the source."""
        return str(getattr(self, "root", None) or getattr(self, "name", None) or self.source)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Source:
    """Base of the keys that a data source adds to the section `data`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optim:
    name: str = "adamw"
    """any of timm.optim.list_optimizers()"""
    lr: PositiveFloat = 1e-3
    """peak learning rate, before lr_rule"""
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    """scale lr with batch / lr_base_batch"""
    lr_base_batch: PositiveInt = 256
    """batch size that lr is given for, used by lr_rule"""
    weight_decay: NonNegativeFloat = 0.05
    """not applied to biases, norms and the model's no_weight_decay list"""
    decay_norms: bool = False
    """apply weight decay to biases and norms too"""
    layer_decay: AutoFraction | None = None
    """layer-wise learning rate decay: factor from each layer to the one below; auto: 0.9, null from random weights"""
    lr_factors: dict[str, PositiveFloat] = dataclasses.field(default_factory=dict)
    """regular expression -> factor on lr for parameters whose names match; the first match wins"""
    clip: PositiveFloat | None = None
    """gradient clipping threshold; null: no clipping"""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """clip the global norm, each value, or the norm of each unit (adaptive gradient clipping)"""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """further arguments of the optimizer, for example {betas: [0.9, 0.95]}"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sched:
    name: Literal["cosine", "poly", "tanh", "wsd", "rsqrt", "step", "multistep", "constant"] = "cosine"
    """learning rate schedule of timm, a function of the step"""
    epochs: AutoPositiveLength | None = None
    """length of the training in epochs; give this or steps; auto: by the number of training images"""
    steps: PositiveInt | None = None
    """length of the training in updates"""
    warmup: AutoLength = 0.0
    """length of the linear warm-up, in epochs or steps like the length of the training; auto: 5 % of it"""
    warmup_lr: NonNegativeFloat = 1e-6
    """learning rate at the start of the warm-up"""
    min_lr: NonNegativeFloat = 0.0
    """learning rate at the end of the schedule"""
    cooldown: Length = 0.0
    """last part of the training, held at min_lr (cosine, poly, tanh)"""
    decay_rate: PositiveFloat | None = None
    """factor (step, multistep; null: 0.1) or power (poly; null: 1)"""
    decay_steps: PositiveInt | None = None
    """interval between decays (step) or length of the decay (wsd, rsqrt), in updates"""
    milestones: tuple[Annotated[float, Field(gt=0, le=1e12)], ...] | None = None
    """when multistep decays, in epochs or steps like the length of the training"""
    freeze: Length = 0.0
    """first part of the training, in which the backbone does not change; in epochs or steps like its length"""
    patience: AutoInt | None = None
    """stop after this many evaluations without a better one, and export the best weights; null: train to the end;
    auto: 10 if training starts from weights, else null"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Ema:
    decay: AutoDecay | None = None
    """decay of the exponential moving average of the weights; null: off; auto: by the number of updates"""
    warmup: bool = True
    """start with the decay min(decay, (1 + step) / (10 + step))"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Parallel:
    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """replicate the model, shard it over all processes, or shard it within groups of processes"""
    shard: PositiveInt | None = None
    """processes per group (hsdp); null: those of a node"""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """autocast dtype; fp16 needs a GPU; auto: bf16 on a GPU that has it, else fp32"""
    compile: bool = False
    """torch.compile the model"""
    kernels: Literal["auto", "verify", "reference", "triton"] = "auto"
    """implementation of attention. auto: Triton where a verdict on this GPU found it faster; verify: the same, and make
    the verdict at the start if there is none, in two minutes; reference: plain PyTorch; triton: always Triton"""
    channels_last: bool = False
    """channels_last memory format"""
    sync_batch_norm: bool = True
    """synchronize batch norm statistics over the GPUs"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Ckpt:
    every: AutoInt | None = None
    """steps between checkpoints; null: an epoch; auto: with each evaluation"""
    keep_last: PositiveInt = 2
    """number of newest checkpoints to keep; the best one is kept too"""
    background: bool = False
    """write from a copy while the training continues, one checkpoint at a time"""
    other_data: bool = False
    """continue although the samples are not those that the run has learned from so far"""
    resume: FilePath = "auto"
    """auto: continue this run; PATH: start a new run from that checkpoint; never: refuse to continue"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Log:
    every: AutoInt = 50
    """steps between lines of metrics.jsonl; auto: 100 lines over the training, at least one in 50 steps"""
    profile: bool = False
    """write a torch.profiler trace of ten updates to profile/ in the run directory"""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """progress bar or one line per log.every; auto: a bar on a terminal"""
    tensorboard: bool = False
    """also write tensorboard/ in the run directory"""
    wandb: Literal["off", "auto", "online", "offline"] = "off"
    """auto: online if an API key is set"""
    wandb_project: str = "tessel"
    """project of the wandb run"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Eval:
    every: AutoInt | None = None
    """steps between evaluations; null: an epoch; auto: 30 over the training, at most two an epoch"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Guard:
    max_skips: NonNegativeInt = 0
    """maximum number of consecutive updates with a NaN or infinite gradient that are skipped; then the run stops"""
    max_corrupt: Annotated[int, Field(ge=0, le=2**31)] | None = None
    """maximum number of unreadable training samples that are replaced by others; then the run stops; null: a thousandth
    of the training samples, at least 3"""
    timeout: Annotated[float, Field(gt=0, le=1e6)] = 900.0
    """seconds to wait for a batch before the run stops; collectives wait twice as long"""

    def corrupt_limit(self, samples: int) -> int:
        """`max_corrupt`, or its default for this number of training samples."""
        return max(3, samples // 1000) if self.max_corrupt is None else self.max_corrupt


TaskT = TypeVar("TaskT", bound=Task)
DataT = TypeVar("DataT", bound=Data)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe(Generic[TaskT, DataT]):
    """All sections. `task` and `data` are of the classes that the recipe's task and data source register."""

    run: Run = Run()
    model: Model
    task: TaskT
    data: DataT
    optim: Optim = Optim()
    sched: Sched
    ema: Ema = Ema()
    parallel: Parallel = Parallel()
    ckpt: Ckpt = Ckpt()
    log: Log = Log()
    eval: Eval = Eval()
    guard: Guard = Guard()


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """How a data set reads the pixels of image files."""

    channels: int = 3
    background: tuple[int, int, int] = (255, 255, 255)  # below transparent pixels


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str  # dotted
    hint: Any
    default: Any  # dataclasses.MISSING for a required key
    description: str


def keys(section: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of a section, with those of the sections inside it."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{field.name}.")
        else:
            default = {} if field.default_factory is not dataclasses.MISSING else field.default
            yield Key(prefix + field.name, hint, default, _description(section, field.name))


def _description(section: type, name: str) -> str:
    """The docstring below the key, in the class that defines it."""
    for owner in section.__mro__:
        field = vars(owner).get("__pydantic_fields__", {}).get(name)
        if field is not None and field.description:
            return " ".join(field.description.split())
    return ""
