"""Registration: variants as rows become timm entry points, with their manifest rows as pretrained configurations."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from ..checkpoints import Weight, load_manifest
from ._backbone import Backbone, Parts
from ._keymap import KeyMap, MissingKeys, Rule, UnknownKeys, nearest
from ._pretrained import check_shapes, published_weights

KeysOf = Callable[[Any], Sequence[Rule]]


def _keep_tables(state: dict[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    """The default of `Family.resize`: nothing depends on the input size."""
    return state


@dataclasses.dataclass(frozen=True)
class DenseNorm:
    """What a paper's dense backbone puts on each map for the decoder, and its published keys, `{s}` the level."""

    norm: Callable[[int], nn.Module]
    keys: str


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One paper's models.

    `variants` maps a name to its row, a frozen dataclass whose fields are the columns of the paper's table; every field
    is also a keyword of `timm.create_model`. `build(row, in_chans=, num_classes=, global_pool=, drop_rate=,
    drop_path_rate=)` makes the modules; `keys(row)` lists the rules of the published key layout; `cfg` holds what all
    variants share of timm's pretrained configuration. `layouts` are further layouts that can be read (timm's, say);
    `resize(state, model)` fits size-dependent tables of a state dict in our layout to `model` by the published rule.
    `reported` holds, for models without published weights, the image side and the ImageNet-1K top-1 of their paper.
    `dense` are the norms of the paper's dense backbone, None where it has none.
    """

    variants: Mapping[str, Any]
    build: Callable[..., Parts]
    keys: KeysOf
    cfg: Mapping[str, Any]
    layouts: Sequence[KeysOf] = ()
    resize: Callable[[dict[str, Tensor], Backbone], dict[str, Tensor]] = _keep_tables
    reported: Mapping[str, tuple[int, float | None]] = dataclasses.field(default_factory=dict)
    dense: DenseNorm | None = None


_families: dict[str, Family] = {}


def register(family: Family, module: str) -> None:
    """Register every variant of `family` with timm as models of the module named `module`."""
    home: Any = sys.modules[module]
    home.default_cfgs = generate_default_cfgs(_default_cfgs(family))
    for name, row in family.variants.items():
        _families[name] = family
        register_model(_entry_point(family, name, row, module))


def list_families() -> list[Family]:
    """All registered families, in order of registration."""
    return list(dict.fromkeys(_families.values()))


def list_models() -> list[str]:
    """Names of all models of this package, sorted; `timm.create_model` takes each."""
    return sorted(_families)


def from_published(name: str, state: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """A published state dict of the model `name` (or a dict of its gradients) in our key layout.

    Integer buffers are dropped. Tables that depend on the input size are fitted to the model that
    `create_model(name, **options)` makes. Raises ValueError naming every unknown or missing key.
    """
    name = _architecture(name)
    family = _families[name]
    row, others = _split(family.variants[name], options)
    converted = _layout(name, row, state).from_published(state)
    return family.resize(converted, _make(family, row, device="meta", **others))


def to_published(name: str, state: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The inverse of `from_published`: our state dict or gradients in the published key layout."""
    name = _architecture(name)
    row, _ = _split(_families[name].variants[name], options)
    return _key_maps(name, row)[0].to_published(state)


def is_ours(name: str) -> bool:
    """Whether timm's model `name`, with or without a tag, is of this package."""
    return name.partition(".")[0] in _families


def dense_norm(name: str) -> Callable[[int], nn.Module] | None:
    """The norm that the paper of the model `name` puts on each map for dense prediction."""
    dense = _families[_architecture(name)].dense
    return dense.norm if dense else None


def from_published_dense(name: str, state: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The published backbone of a segmenter or detector in our layout: the body's keys, and `norms.LEVEL.*`.

    Neither classifier nor final norm need be there. Raises ValueError naming every unknown or missing key.
    """
    name = _architecture(name)
    family = _families[name]
    row, others = _split(family.variants[name], options)
    classifier, dense = _key_maps(name, row)[0], family.dense
    norms = Rule(dense.keys, "norms.{s}.{p}") if dense else None
    known = {key: tensor for key, tensor in state.items() if norms is None or not norms.published[0].match(key)}
    left = frozenset(key for key in classifier.parameters | classifier.buffers if key.startswith(("norm.", "head.")))
    body = classifier.from_published(known, optional=left)
    body = family.resize(body, _make(family, row, device="meta", **others))
    body = {key: tensor for key, tensor in body.items() if key not in left}
    if norms is None:
        return body
    found = {key: norms.published[0].match(key) for key in state.keys() - known.keys()}
    return body | {norms.ours[0].fill(values): state[key] for key, values in found.items() if values is not None}


def _architecture(name: str) -> str:
    architecture = name.partition(".")[0]
    if architecture not in _families:
        raise ValueError(f"no model of tessel is named {architecture!r}{nearest(architecture, _families)}")
    return architecture


def _split(row: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The row with those of `options` that are its columns, and the other options."""
    columns = {field.name for field in dataclasses.fields(row)}
    # a configuration file holds lists where rows hold tuples
    changed = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k in columns}
    return dataclasses.replace(row, **changed), {k: v for k, v in options.items() if k not in columns}


def _layout(name: str, row: Any, state: Mapping[str, Tensor]) -> KeyMap:
    """The first layout of `name` that knows every key of `state`; the published one where none does."""
    maps = _key_maps(name, row)
    return next((key_map for key_map in maps if key_map.knows(state)), maps[0])


@cache
def _key_maps(name: str, row: Any) -> tuple[KeyMap, ...]:
    family = _families[name]
    model = _make(family, row, device="meta")
    parameters = {key for key, _ in model.named_parameters()}
    floating = {key for key, value in model.state_dict().items() if value.is_floating_point()}
    return tuple(
        KeyMap(keys(row), name=name, parameters=parameters, buffers=floating - parameters)
        for keys in (family.keys, *family.layouts)
    )


def _default_cfgs(family: Family) -> dict[str, Any]:
    shared = {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "classifier": "head.fc",
        **family.cfg,
    }
    cfgs: dict[str, Any] = {}
    for name in family.variants:
        weights = [w for w in load_manifest().values() if w.model == name]
        if not weights:
            cfgs[name] = {**shared, **_sized(family.reported[name][0])} if name in family.reported else shared
        for weight in weights:
            cfgs[weight.name] = {**shared, **_weight_cfg(weight)}
    return cfgs


def _sized(side: int) -> dict[str, Any]:
    return {"input_size": (3, side, side), "pool_size": (-(-side // 32),) * 2}


def _weight_cfg(weight: Weight) -> dict[str, Any]:
    """A manifest row in timm's words."""
    return {
        "url": weight.url,
        "license": weight.licence,
        "origin_url": weight.source,
        "num_classes": weight.num_classes,
        **_sized(weight.input_size[1]),
        "crop_pct": weight.crop_pct,
        "crop_mode": weight.crop_mode,
        "interpolation": weight.interpolation,
        "mean": weight.mean,
        "std": weight.std,
    }


def _entry_point(family: Family, name: str, row: Any, module: str) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        weight = load_manifest().get(f"{name}.{cfg.tag}")
        changed, kwargs = _split(row, {**(weight.options if weight else {}), **kwargs})
        build = partial(
            build_model_with_cfg,
            partial(_make, family, changed),
            name,
            pretrained,
            pretrained_filter_fn=partial(_to_ours, name, changed),
            # a fresh dict: timm consumes it
            feature_cfg={"out_indices": tuple(range(4)), "flatten_sequential": True, "feature_cls": "getter"},
        )
        if not pretrained:
            return build(**kwargs)
        with published_weights(name, cfg, kwargs) as (kwargs, discard):
            model = build(**kwargs)
            discard(model)
        return model

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = f"{name}: {row}"
    return entry_point


def _make(
    family: Family,
    row: Any,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Backbone:
    for option in options:
        columns = [field.name for field in dataclasses.fields(row)]
        raise TypeError(f"unknown argument {option!r}{nearest(option, columns)}; this family takes {columns}")
    with _default_dtype(dtype), nullcontext() if device is None else torch.device(device):
        parts = family.build(
            row,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        return Backbone(parts, num_classes=num_classes, in_chans=in_chans)


@contextmanager
def _default_dtype(dtype: torch.dtype | None):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype or previous)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _to_ours(name: str, row: Any, state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A checkpoint of `name`, published or ours, with or without its classifier, as timm loads it into `model`."""
    classifier = frozenset({"head.fc.weight", "head.fc.bias"})
    published = _key_maps(name, row)[0]
    expected = published.parameters | published.buffers
    # a few keys (the final norm's) may be the same in both layouts
    if 2 * sum(key in expected for key in state) < len(state):
        state = _layout(name, row, state).from_published(state, optional=classifier)
    state = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    if unknown := sorted(set(state) - expected):
        raise UnknownKeys(f"{name}: the checkpoint has {len(unknown)} keys the model lacks: {', '.join(unknown[:5])}")
    needed = expected & set(model.state_dict()) - (frozenset() if _needs_classifier(model) else classifier)
    if missing := sorted(needed - set(state)):
        raise MissingKeys(f"{name}: the checkpoint lacks {len(missing)} keys: {', '.join(missing[:5])}")
    state = _families[name].resize(state, model)
    check_shapes(name, state, model)
    return state


def _needs_classifier(model: Any) -> bool:
    return model.num_classes == model.pretrained_cfg["num_classes"]
