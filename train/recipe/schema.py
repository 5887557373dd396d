"""The recipe's schema: a section a concern, strict in keys and types.

Every key says here what it does; `python -m tessel.train --help` prints these lines. No torch in this file and in
`config`, so that help and mistakes in a recipe are answered at once.
"""

import dataclasses
import os
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


Share = Annotated[float, Field(ge=0, le=1)]


Place = Annotated[str, AfterValidator(os.path.expanduser)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Run:
    name: Annotated[str, Field(pattern=r"^(\w[\w.+-]*)?$")] = ""
    """directory of the run; empty: the recipe's file name"""
    out: Place = "runs"
    """directory that holds the runs"""
    seed: NonNegativeInt = 0
    """fixes weights, data order, augmentation and drop path"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU"""
    deterministic: bool = False
    """allow deterministic torch kernels only (slower)"""
    fresh: bool = False
    """move an existing run of this name aside and start clean; not again where torchrun or SLURM restarts it"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    name: str
    """a timm or tessel model; local-dir:RUN/export takes an exported one"""
    pretrained: bool = False
    """start from the model's published weights"""
    init_from: str | None = None
    """begin with the weights of another model of the same parameters: a timm name, or local-dir:RUN/export"""
    drop_path: Share | None = None
    """stochastic depth rate; null: the model's own"""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """further arguments of timm.create_model"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Distill:
    teacher: str | None = None
    """learn from this model too: a timm name with weights, or local-dir:RUN/export"""
    kind: Literal["soft", "hard"] = "soft"
    """match the teacher's probabilities, or its most probable class"""
    weight: Share = 0.5
    """share of the teacher's loss; the labels have the rest"""
    temperature: PositiveFloat = 1.0
    """divides the logits of both, with kind=soft"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dense:
    batch_norm: Literal["train", "eval", "frozen"] = "train"
    """batch norms of the backbone; eval: the statistics stay as they are; frozen: weights and biases too"""
    norms: tuple[bool, ...] | None = None
    """which maps that are read have a norm; null: as the paper's dense backbone, none on models that are not ours"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SegmentTest:
    mode: Literal["whole", "slide"] = "whole"
    """the image at once, or in overlapping windows whose logits are averaged"""
    crop: PositiveInt | None = None
    """side of a window; null: data.size"""
    stride: PositiveInt | None = None
    """from one window to the next; null: two thirds of a window"""
    flip: bool = False
    """average with the prediction of the mirrored image"""
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    """average the predictions of the image at these sizes, as factors of its own"""
    divisor: PositiveInt | None = None
    """enlarge an image until its sides are multiples of this, for example 32"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Segment:
    decode_head: dict[str, Any] = dataclasses.field(default_factory=dict)
    """mmsegmentation's words, for example {type: UPerHead, channels: 512}; what backbone and data say is filled in"""
    auxiliary_head: dict[str, Any] = dataclasses.field(default_factory=dict)
    """a second head that is trained along, for example {type: FCNHead, channels: 256}; empty: none"""
    neck: dict[str, Any] = dataclasses.field(default_factory=dict)
    """between backbone and heads, for example {type: FPN, out_channels: 256}; empty: none"""
    class_weight: dict[str, NonNegativeFloat] = dataclasses.field(default_factory=dict)
    """weight in the loss by class name, for example {background: 0.2}; 1 where not given"""
    load_from: Place | None = None
    """begin with a published segmenter's file, by mmsegmentation's names"""
    test: SegmentTest = SegmentTest()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Detect:
    detector: Literal["faster_rcnn", "mask_rcnn", "retinanet", "fcos"] = "fcos"
    """torchvision's detector; mask_rcnn learns instance masks too"""
    channels: PositiveInt = 256
    """width of the feature pyramid and of what reads it"""
    anchor: PositiveInt | None = None
    """side of the smallest anchors, pixels, doubled from map to map; null: 32; fcos has none"""
    short: tuple[PositiveInt, ...] | None = None
    """short sides to train at, drawn for each image; null: data.size, which is the one of evaluation"""
    longest: PositiveInt = 1333
    """an image whose long side would exceed this is scaled to it instead"""
    crop: tuple[PositiveInt, PositiveInt] | None = None
    """range of the sides of a random crop that half of the training images get before they are scaled"""
    empty: bool = False
    """train also on images without objects; crowds do not count as objects"""
    train: tuple[str, str] = ("annotations/instances_train2017.json", "train2017")
    """annotations and images below data.root, with data.source=coco"""
    val: tuple[str, str] = ("annotations/instances_val2017.json", "val2017")
    """the same to judge by"""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """further arguments of torchvision's detector, for example {score_thresh: 0.1}"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Task:
    kind: Literal["classify", "segment", "detect"] = "classify"
    """what is learned"""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """null: as many as the data has"""
    loss: Literal["ce", "bce"] = "ce"
    """softmax or per-class sigmoid cross entropy"""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """label smoothing"""
    probe: Literal["linear", "attentive"] | None = None
    """freeze the model and train a classifier of its pooled features, or of attention over its last map"""
    distill: Distill = Distill()
    dense: Dense = Dense()
    segment: Segment = Segment()
    detect: Detect = Detect()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Aug:
    scale: tuple[float, float] = (1.0, 1.0)
    """area range of the random resized crop; 1, 1: no crop"""
    ratio: tuple[float, float] = (1.0, 1.0)
    """aspect ratio range of the crop"""
    hflip: Share = 0.0
    """probability of a horizontal flip"""
    vflip: Share = 0.0
    """probability of a vertical flip"""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """affine: rotation, up to +- degrees"""
    translate: Share = 0.0
    """affine: shift, up to +- this share of the side"""
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """affine: scale within 1 +- this"""
    shear: Annotated[float, Field(ge=0, lt=90)] = 0.0
    """affine: shear, up to +- degrees"""
    color_jitter: NonNegativeFloat = 0.0
    """brightness, contrast, saturation; not beside auto_augment"""
    auto_augment: str | None = None
    """timm policy, for example rand-m9-mstd0.5-inc1"""
    erasing: Share = 0.0
    """probability of random erasing, on the device"""
    mixup: NonNegativeFloat = 0.0
    """mixup's beta parameter, on the device; 0: off"""
    cutmix: NonNegativeFloat = 0.0
    """cutmix's beta parameter, on the device; 0: off"""
    mix_prob: Share = 1.0
    """share of micro-batches that are mixed"""
    switch_prob: Share = 0.5
    """share of cutmix where both are on"""
    repeats: PositiveInt = 1
    """repeated augmentation: copies of an image in a batch; an epoch keeps its length"""
    resize: tuple[float, float] = (1.0, 1.0)
    """range of the random factor on data.fit, before the crop (segment)"""
    crop_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """a crop in which one class has more than this share is drawn again, up to ten times (segment)"""
    photometric: bool = False
    """brightness, contrast, saturation, hue, each at random (segment)"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    source: Literal[
        "digits",
        "folder",
        "tar",
        "wds",
        "hfds",
        "tfds",
        "digit_scenes",
        "ade20k",
        "cityscapes",
        "voc2012",
        "voc2012_aug",
        "coco",
    ]
    """embedded digits or scenes of them; root/{train,val}/CLASS/*.jpg; tar files; WebDataset, Hugging Face or
    TensorFlow datasets; ADE20K, Cityscapes, Pascal VOC or COCO in their own layouts below root"""
    root: Place | None = None
    """folder of the data: root/{train,val}/*.tar or root/{train,val}.tar; hfds, tfds: their store"""
    name: str | None = None
    """hfds, tfds: name of the dataset; hfds: or its folder"""
    train_split: str | None = None
    """null: train; tar, wds: also a pattern like imagenet-train-*.tar"""
    val_split: str | None = None
    """null: val, with hfds and tfds validation"""
    input_key: str | None = None
    """hfds, tfds: column of the images (null: image); wds: endings of them, like jpg;png"""
    target_key: str | None = None
    """hfds, tfds: column of the classes (null: label); wds: their key in KEY.json (null: they are in KEY.cls)"""
    class_map: Place | None = None
    """text file that lists the classes, a line each (null: those that are found)"""
    size: PositiveInt = 224
    """side of the input, pixels; the short side in detection"""
    fit: tuple[PositiveInt, PositiveInt] | None = None
    """longer and shorter side that an image is resized to fit in, its ratio kept; null: as it is (segment)"""
    scenes: PositiveInt = 1000
    """training scenes of source=digit_scenes, drawn anew by their number; a fifth as many are held out, 200 at most"""
    batch: PositiveInt = 256
    """images per update, over all processes"""
    micro_batch: PositiveInt | None = None
    """images per forward and process; null: batch / processes"""
    eval_batch: PositiveInt = 256
    """images per forward in evaluation"""
    workers: NonNegativeInt = 0
    """loader processes per process"""
    interpolation: Literal["bilinear", "bicubic", "random"] | None = None
    """null: the model's own"""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    """centre crop in evaluation; null: the model's own"""
    aug: Aug = Aug()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optim:
    name: str = "adamw"
    """any of timm.optim.list_optimizers()"""
    lr: PositiveFloat = 1e-3
    """peak learning rate, before lr_rule"""
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    """scale lr by batch / lr_base_batch"""
    lr_base_batch: PositiveInt = 256
    """batch that lr is meant for, with an lr_rule"""
    weight_decay: NonNegativeFloat = 0.05
    """not on biases, norms and the model's no_weight_decay list"""
    decay_norms: bool = False
    """weight decay on biases and norms too"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """lr factor from each layer to the one below"""
    lr_factors: dict[str, PositiveFloat] = dataclasses.field(default_factory=dict)
    """peak lr of the parameters whose names a pattern finds, as a factor of lr; the first pattern counts"""
    clip: PositiveFloat | None = None
    """gradient clipping threshold"""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """what clip limits"""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """further arguments, for example {betas: [0.9, 0.95]}"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sched:
    name: Literal["cosine", "poly", "tanh", "wsd", "rsqrt", "step", "multistep", "constant"] = "cosine"
    """timm schedule, a function of the step alone"""
    epochs: PositiveFloat | None = None
    """length of the training; this or steps"""
    steps: PositiveInt | None = None
    """length of the training in updates"""
    warmup: NonNegativeFloat = 0.0
    """linear warm-up, in the unit of the length"""
    warmup_lr: NonNegativeFloat = 1e-6
    """where the warm-up starts"""
    min_lr: NonNegativeFloat = 0.0
    """where the schedule ends"""
    cooldown: NonNegativeFloat = 0.0
    """last part of the length, held at min_lr (cosine, poly, tanh)"""
    decay_rate: PositiveFloat | None = None
    """factor (step, multistep; null: 0.1) or power (poly; null: 1)"""
    decay_steps: PositiveInt | None = None
    """interval (step) or length of the decay (wsd, rsqrt)"""
    milestones: tuple[PositiveFloat, ...] | None = None
    """where multistep decays, in the unit of the length"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Ema:
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """moving average of the weights; null: off"""
    warmup: bool = True
    """begin with min(decay, (1 + step) / (10 + step))"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Parallel:
    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """replicas of the model; shards of it; shards within groups of processes"""
    shard: PositiveInt | None = None
    """hsdp: processes of a group; null: those of a node"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """autocast type; fp16 needs cuda"""
    compile: bool = False
    """torch.compile the model"""
    channels_last: bool = False
    """channels_last memory format"""
    sync_batch_norm: bool = True
    """batch norms see the images of all GPUs, so that their number changes nothing; false: each its own"""
    grad_checkpointing: bool = False
    """recompute activations: less memory, more time"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Ckpt:
    every: PositiveInt | None = None
    """steps between checkpoints; null: an epoch"""
    keep_last: PositiveInt = 2
    """newest checkpoints kept, beside the best one"""
    background: bool = False
    """write from a copy while the training goes on, one checkpoint at a time"""
    resume: Place = "auto"
    """auto: continue this run; PATH: begin with that checkpoint; never"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Log:
    every: PositiveInt = 50
    """steps between lines of metrics.jsonl"""
    profile: bool = False
    """write a trace of ten updates into profile/ of the run"""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """auto: a bar on a terminal"""
    tensorboard: bool = False
    """also write tensorboard/ into the run"""
    wandb: Literal["off", "auto", "online", "offline"] = "off"
    """auto: online where a key is set"""
    wandb_project: str = "tessel"
    """project of the wandb run"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Eval:
    every: PositiveInt | None = None
    """steps between evaluations; null: an epoch"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Guard:
    max_skips: NonNegativeInt = 0
    """updates in a row skipped for a non-finite gradient before stopping"""
    max_corrupt: NonNegativeInt = 0
    """training samples that cannot be read and are replaced before stopping; evaluation replaces none"""
    timeout: PositiveFloat = 900.0
    """seconds to wait for a batch, and twice as long for another process, before stopping"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    run: Run = Run()
    model: Model
    task: Task = Task()
    data: Data
    optim: Optim = Optim()
    sched: Sched
    ema: Ema = Ema()
    parallel: Parallel = Parallel()
    ckpt: Ckpt = Ckpt()
    log: Log = Log()
    eval: Eval = Eval()
    guard: Guard = Guard()


def leaves(section: type = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted key, type, default, meaning) of every key of the recipe; the default of a required one is MISSING."""
    hints, documented = typing.get_type_hints(section), vars(section)["__pydantic_fields__"]
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            default = {} if field.default_factory is not dataclasses.MISSING else field.default
            yield prefix + field.name, hint, default, " ".join(documented[field.name].description.split())
