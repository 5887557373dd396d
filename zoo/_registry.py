"""Registration: makes a timm entry point of every variant, with its manifest rows as pretrained configurations."""

import dataclasses
import inspect
import linecache
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import is_scriptable
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from ..checkpoints import Weight, load_manifest
from ._backbone import Backbone, BackboneParts
from ._keymap import KeyMap, KeyRule, MissingKeys, UnknownKeys, nearest
from ._pretrained import check_shapes, download_path, forget_state_dict, read_weights, removed_on_error

KeyMapping = Callable[[Any], Sequence[KeyRule]]

# arguments of every model, besides the fields of its configuration
MODEL_ARGUMENTS = ("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "device", "dtype")


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
    variants: model name -> configuration, a frozen dataclass whose fields are the columns of the paper's table; every
        field is also a keyword argument of `timm.create_model`.
    build: `build(cfg, *, in_chans, num_classes, global_pool, drop_rate, drop_path_rate)` makes the modules.
    key_mapping: `key_mapping(cfg)` lists the rules between the published state dict and ours.
    pretrained_cfg: fields of timm's pretrained configuration that all variants share.
    other_key_mappings: further layouts of state dicts that can be loaded, such as timm's.
    reported: for models without published weights, image side and ImageNet-1K top-1 (None: not reported) in the paper.
    dense_norm: the norms of the paper's dense backbone, None if it has none.
    """

    model: type[Backbone]
    variants: Mapping[str, Any]
    build: Callable[..., BackboneParts]
    key_mapping: KeyMapping
    pretrained_cfg: Mapping[str, Any]
    other_key_mappings: Sequence[KeyMapping] = ()
    reported: Mapping[str, tuple[int, float | None]] = dataclasses.field(default_factory=dict)
    dense_norm: DenseNorm | None = None


_families: dict[str, Family] = {}


def register(family: Family, module: str) -> None:
    """Register every variant of `family` with timm and make its entry point an attribute of the module `module`."""
    home: Any = sys.modules[module]
    home.default_cfgs = generate_default_cfgs(_default_cfgs(family))
    for name in family.variants:
        _families[name] = family
        entry_point = _entry_point(family, name, home)
        setattr(home, name, entry_point)
        register_model(entry_point)


def list_families() -> list[Family]:
    """All registered families, in order of registration."""
    return list(dict.fromkeys(_families.values()))


def list_models() -> list[str]:
    """Names of all models of this package, sorted; `timm.create_model` takes each."""
    return sorted(_families)


def from_published(name: str, state: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Convert a published state dict of the model `name` (or a dict of its gradients) to our keys.

    `options` are the arguments of `timm.create_model` that the model is made with. Integer buffers are dropped. Raises
    ValueError naming every unknown or missing key.
    """
    name, cfg = _configuration(name, options)
    return _matching_key_map(name, cfg, state).from_published(state)


def to_published(name: str, state: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The inverse of `from_published`: convert our state dict or gradients to the published keys."""
    name, cfg = _configuration(name, options)
    return _key_maps(name, cfg)[0].to_published(state)


def is_ours(name: str) -> bool:
    """Whether the model `name`, with or without a tag, is one of this package."""
    return name.partition(".")[0] in _families


def dense_norm(name: str) -> Callable[[int], nn.Module] | None:
    """`norm(channels)` makes the norm of a feature map in the paper's dense backbone; None if it has no such norms."""
    dense = _families[_architecture(name)].dense_norm
    return dense.norm if dense else None


def from_published_dense(name: str, state: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Convert the backbone of a published segmenter or detector to our keys, its norms to `norms.STAGE.*`.

    `state` may lack the classifier and the final norm; they are dropped. Raises ValueError naming every unknown or
    missing key.
    """
    name, cfg = _configuration(name, options)
    key_map, dense = _key_maps(name, cfg)[0], _families[name].dense_norm
    rule = KeyRule(dense.keys, "norms.{s}.{p}") if dense else None
    body, norms = {}, {}
    for key, tensor in state.items():
        norm_key = rule.to_ours(key) if rule else None
        if norm_key is None:
            body[key] = tensor
        else:
            norms[norm_key] = tensor
    dropped = frozenset(key for key in key_map.parameters | key_map.buffers if key.startswith(("norm.", "head.")))
    converted = key_map.from_published(body, optional=dropped)
    return {key: tensor for key, tensor in converted.items() if key not in dropped} | norms


def _architecture(name: str) -> str:
    architecture = name.partition(".")[0]
    if architecture not in _families:
        raise ValueError(f"no model of tessel is named {architecture!r}{nearest(architecture, _families)}")
    return architecture


def _configuration(name: str, options: Mapping[str, Any]) -> tuple[str, Any]:
    """The name without its tag, and the configuration of the model that `create_model(name, **options)` makes."""
    name = _architecture(name)
    cfg, others = _split(_families[name].variants[name], options)
    _check_arguments(_families[name], cfg, others.keys() - set(MODEL_ARGUMENTS))
    return name, cfg


def _split(cfg: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """`cfg` changed by those of `options` that are its fields, and the other options."""
    fields = {field.name for field in dataclasses.fields(cfg)}
    # configuration files have lists where configurations have tuples
    changed = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k in fields}
    return dataclasses.replace(cfg, **changed), {k: v for k, v in options.items() if k not in fields}


def _check_arguments(family: Family, cfg: Any, unknown: Sequence[str] | set[str]) -> None:
    """Raise TypeError naming the first of `unknown`, if there is any, and the arguments that the model takes."""
    for argument in unknown:
        fields = [field.name for field in dataclasses.fields(cfg)]
        known = [*fields, *MODEL_ARGUMENTS]
        hint = "; the model takes images of any size without it" if argument == "img_size" else nearest(argument, known)
        raise TypeError(
            f"{family.model.__name__}: unknown argument {argument!r}{hint}; the models of this family take "
            f"{', '.join(known)}"
        )


def _matching_key_map(name: str, cfg: Any, state: Mapping[str, Tensor]) -> KeyMap:
    """The first key map of `name` that knows every key of `state`; that of the published layout if none does."""
    maps = _key_maps(name, cfg)
    return next((key_map for key_map in maps if key_map.knows(state)), maps[0])


@cache
def _key_maps(name: str, cfg: Any) -> tuple[KeyMap, ...]:
    """The key maps of `name`: that of the published layout, then those of other layouts."""
    family = _families[name]
    model = _make(family, cfg, device="meta")
    parameters = {key for key, _ in model.named_parameters()}
    floating = {key for key, value in model.state_dict().items() if value.is_floating_point()}
    return tuple(
        KeyMap(rules(cfg), name=name, parameters=parameters, buffers=floating - parameters)
        for rules in (family.key_mapping, *family.other_key_mappings)
    )


def _default_cfgs(family: Family) -> dict[str, Any]:
    shared = {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "classifier": "head.fc",
        **family.pretrained_cfg,
    }
    cfgs: dict[str, Any] = {}
    for name in family.variants:
        weights = _weights(name)
        if not weights:
            cfgs[name] = {**shared, **_sized(family.reported[name][0])} if name in family.reported else shared
        for weight in weights:
            cfgs[weight.name] = {**shared, **_weight_cfg(weight)}
    return cfgs


def _weights(name: str) -> list[Weight]:
    return [weight for weight in load_manifest().values() if weight.model == name]


def _sized(side: int) -> dict[str, Any]:
    return {"input_size": (3, side, side), "pool_size": (-(-side // 32),) * 2}


def _weight_cfg(weight: Weight) -> dict[str, Any]:
    """A manifest row as fields of timm's pretrained configuration."""
    return {
        "url": weight.url,
        "license": weight.license,
        "origin_url": weight.source,
        "num_classes": weight.num_classes,
        **_sized(weight.input_size[1]),
        "crop_pct": weight.crop_pct,
        "crop_mode": weight.crop_mode,
        "interpolation": weight.interpolation,
        "mean": weight.mean,
        "std": weight.std,
    }


def _entry_point(family: Family, name: str, home: Any) -> Callable[..., nn.Module]:
    """The function that timm calls to make the model `name`."""
    default = family.variants[name]

    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if is_scriptable():
            raise NotImplementedError(
                f"{name} cannot be compiled by TorchScript (scriptable=True); use torch.compile, torch.export or "
                "torch.jit.trace"
            )
        overlay, cache_dir = kwargs.get("pretrained_cfg_overlay") or {}, kwargs.get("cache_dir")
        pretrained_cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay)
        weight = load_manifest().get(f"{name}.{pretrained_cfg.tag}")
        cfg, kwargs = _split(default, {**(weight.options if weight else {}), **kwargs})
        build = partial(
            build_model_with_cfg,
            partial(_make, family, cfg),
            name,
            pretrained,
            pretrained_filter_fn=partial(_to_ours, name, cfg),
            # a new dict for every call: timm changes it
            feature_cfg={"out_indices": tuple(range(4)), "flatten_sequential": True, "feature_cls": "getter"},
        )
        if not pretrained:
            return build(**kwargs)
        # a download that does not fit the model is deleted
        with removed_on_error(download_path(pretrained_cfg, cache_dir)):
            state = read_weights(name, pretrained_cfg, cache_dir)
            if state is None:
                return build(**kwargs)
            model = build(**{**kwargs, "pretrained_cfg_overlay": {**overlay, "state_dict": state}})
        forget_state_dict(model)
        return model

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = home.__name__
    entry_point.__doc__ = _entry_point_doc(family, name, home)
    # `inspect.getsource` and IPython's `??` then show the family's `build`, which makes the modules
    entry_point.__dict__.update(__signature__=inspect.signature(entry_point), __wrapped__=family.build)
    return entry_point


def _entry_point_doc(family: Family, name: str, home: Any) -> str:
    """The configuration, the weights and the source line of a model, as the docstring of its entry point."""
    cfg, title = family.variants[name], (home.__doc__ or name).partition("\n")[0]
    weights = _weights(name)
    pretrained_cfg = home.default_cfgs[name].default
    lines = [title, "", f"Configuration, a `{type(cfg).__name__}`; each field is also a keyword argument:"]
    lines += [f"    {field.name} = {getattr(cfg, field.name)!r}" for field in dataclasses.fields(cfg)]
    lines += [f"Further arguments: {', '.join(MODEL_ARGUMENTS)}."]
    lines += [f"Input size: {' x '.join(map(str, pretrained_cfg.input_size))}; other sizes work as well."]
    lines += [f"Weights: {', '.join(weight.tag for weight in weights) or 'none are published'}."]
    lines += [f"Source: {_source_line(home, name)}."]
    return "\n".join(lines)


def _source_line(home: Any, name: str) -> str:
    """File and line of a variant, such as `tessel/zoo/biformer.py:49`; the file alone if its source is not there."""
    path = Path(home.__file__)
    lines = linecache.getlines(str(path))
    line = next((f":{number}" for number, line in enumerate(lines, 1) if line.lstrip().startswith(f'"{name}":')), "")
    return f"{home.__name__.replace('.', '/')}{path.suffix}{line}"


def _make(
    family: Family,
    cfg: Any,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **unknown: Any,
) -> Backbone:
    _check_arguments(family, cfg, list(unknown))
    with _default_dtype(dtype), nullcontext() if device is None else torch.device(device):
        parts = family.build(
            cfg,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        return family.model(parts, num_classes=num_classes, in_chans=in_chans)


@contextmanager
def _default_dtype(dtype: torch.dtype | None):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype or previous)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _to_ours(name: str, cfg: Any, state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """timm's checkpoint filter: convert a checkpoint of `name` to our keys, and check it.

    The checkpoint may have published keys, those of another known layout, or ours, with or without the classifier.
    """
    classifier = frozenset({"head.fc.weight", "head.fc.bias"})
    published = _key_maps(name, cfg)[0]
    expected = published.parameters | published.buffers
    # decided by the majority: both layouts may share a few keys, such as those of the final norm
    if 2 * sum(key in expected for key in state) < len(state):
        state = _matching_key_map(name, cfg, state).from_published(state, optional=classifier)
    state = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    if unknown := sorted(set(state) - expected):
        raise UnknownKeys(f"{name}: the checkpoint has {len(unknown)} keys the model lacks: {', '.join(unknown[:5])}")
    needed = expected & set(model.state_dict()) - (frozenset() if _needs_classifier(model) else classifier)
    if missing := sorted(needed - set(state)):
        raise MissingKeys(f"{name}: the checkpoint lacks {len(missing)} keys: {', '.join(missing[:5])}")
    check_shapes(name, state, model)
    return state


def _needs_classifier(model: Any) -> bool:
    """Whether the model has as many classes as the checkpoint: otherwise timm makes a new classifier."""
    return model.num_classes == model.pretrained_cfg["num_classes"]
