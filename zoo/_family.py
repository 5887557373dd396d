"""The description of a family, and `make_model`, which makes a model from a configuration."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ._backbone import Backbone, BackboneParts
from ._keymap import KeyRule, nearest
from ._swap import swap as replace_mixers

KeyMapping = Callable[[Any], Sequence[KeyRule]]

# arguments of every model, besides the fields of its configuration
MODEL_ARGUMENTS = ("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "device", "dtype", "swap")


@dataclasses.dataclass(frozen=True)
class DenseNorm:
    """The norm of each feature map in the paper's dense backbone, and the pattern of its published keys.

    `norm(channels)` makes the norm; `{s}` in `keys` is the number of the stage, from 0.
    """

    norm: Callable[[int], nn.Module]
    keys: str


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """The models of one paper.

    model: the class of the models, a subclass of `Backbone` that adds a name and a docstring.
    variants: model name -> configuration, the smaller models first. A configuration is a frozen dataclass whose fields
        are the columns of the paper's table; every field is also a keyword argument of `timm.create_model`.
    build: `build(cfg, *, in_chans, num_classes, global_pool, drop_rate, drop_path_rate)` makes the modules.
    key_mapping: `key_mapping(cfg)` lists the rules between the published state dict and ours.
    pretrained_cfg: fields of timm's pretrained configuration that all variants share.
    other_key_mappings: the same for other state dicts that can be loaded, such as those of timm's models.
    reported: for models without published weights, image side and ImageNet-1K top-1 (None: not reported) in the paper.
    dense_norm: the norms of the paper's dense backbone, None if it has none.
    dense_options: arguments of `timm.create_model` that the paper's dense backbone is made with.
    global_pool: the pooling of the published classifier.
    stride: of the last feature map.
    classifier: `classifier(cfg)` is the layer with one output per class, or a tuple of such layers, `head.fc` first.
    """

    model: type[Backbone]
    variants: Mapping[str, Any]
    build: Callable[..., BackboneParts]
    key_mapping: KeyMapping
    pretrained_cfg: Mapping[str, Any]
    other_key_mappings: Sequence[KeyMapping] = ()
    reported: Mapping[str, tuple[int, float | None]] = dataclasses.field(default_factory=dict)
    dense_norm: DenseNorm | None = None
    dense_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    global_pool: str = "avg"
    stride: int = 32
    classifier: Callable[[Any], str | tuple[str, ...]] = lambda cfg: "head.fc"


# model name -> its family; filled by `zoo._registry.register`
families: dict[str, Family] = {}


def list_families() -> list[Family]:
    """All registered families, in order of registration."""
    return list(dict.fromkeys(families.values()))


def list_models() -> list[str]:
    """Names of all models of this package, sorted; `timm.create_model` takes each."""
    return sorted(families)


def is_ours(name: str) -> bool:
    """Whether the model `name`, with or without a tag, is one of this package."""
    return name.partition(".")[0] in families


def dense_norm(name: str) -> Callable[[int], nn.Module] | None:
    """`norm(channels)` makes the norm of a feature map in the paper's dense backbone; None if it has no such norms."""
    dense = families[architecture(name)].dense_norm
    return dense.norm if dense else None


def dense_options(name: str) -> dict[str, Any]:
    """Arguments of `timm.create_model` that the paper's dense backbone is made with; none for timm's models."""
    return dict(families[architecture(name)].dense_options) if is_ours(name) else {}


def architecture(name: str) -> str:
    """The name of a model without its tag. Raises ValueError for an unknown model."""
    model = name.partition(".")[0]
    if model not in families:
        raise ValueError(f"no model of tessel is named {model!r}{nearest(model, families)}")
    return model


def configuration(name: str, options: Mapping[str, Any]) -> tuple[str, Any]:
    """The name without its tag, and the configuration of the model that `create_model(name, **options)` makes.

    Raises ValueError for an unknown model and TypeError for an unknown option.
    """
    name = architecture(name)
    cfg, others = split_options(families[name].variants[name], options)
    reject_arguments(families[name], cfg, [option for option in others if option not in MODEL_ARGUMENTS])
    return name, cfg


def split_options(cfg: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """`cfg` changed by those of `options` that are its fields, and the other options."""
    fields = {field.name for field in dataclasses.fields(cfg)}
    changed = {k: tuples(v) for k, v in options.items() if k in fields}
    return dataclasses.replace(cfg, **changed), {k: v for k, v in options.items() if k not in fields}


def tuples(value: Any) -> Any:
    """`value` with tuples in place of lists: configuration files have lists where configurations have tuples."""
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def reject_arguments(family: Family, cfg: Any, unknown: Sequence[str]) -> None:
    """If `unknown` is not empty, raise TypeError naming its first argument and those that the models take."""
    if not unknown:
        return
    argument, known = unknown[0], [*(field.name for field in dataclasses.fields(cfg)), *MODEL_ARGUMENTS]
    hint = "; the model takes images of any size without it" if argument == "img_size" else nearest(argument, known)
    raise TypeError(
        f"{family.model.__name__}: unknown argument {argument!r}{hint}; the models of this family take "
        f"{', '.join(known)}"
    )


def make_model(
    family: Family,
    cfg: Any,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    swap: Mapping[int | str, str] | None = None,
    **unknown: Any,
) -> Backbone:
    """Make the model of `cfg` on `device` with weights of `dtype`; arguments as for every model of timm.

    swap: other mixers for some stages, as `zoo.swap` takes them.
    """
    reject_arguments(family, cfg, list(unknown))
    with _default_dtype(dtype), nullcontext() if device is None else torch.device(device):
        parts = family.build(
            cfg,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=family.global_pool if global_pool is None else global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        model = family.model(parts, num_classes=num_classes, in_chans=in_chans)
        return replace_mixers(model, swap) if swap else model


@contextmanager
def _default_dtype(dtype: torch.dtype | None):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype or previous)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
