"""Registration: makes a timm entry point of every variant, with its manifest rows as pretrained configurations."""

import dataclasses
import inspect
import linecache
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from timm.layers import is_scriptable
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from ..checkpoints import Weight, load_manifest
from ._conversion import checkpoint_filter
from ._family import MODEL_ARGUMENTS, Family, families, make_model, split_options
from ._pretrained import download_path, forget_state_dict, is_unverified, read_weights, removed_on_error


def register(family: Family, module: str) -> None:
    """Register every variant of `family` with timm and make its entry point an attribute of the module `module`."""
    home: Any = sys.modules[module]
    # a module may register several families
    home.default_cfgs = {**getattr(home, "default_cfgs", {}), **generate_default_cfgs(_default_cfgs(family))}
    for name in family.variants:
        families[name] = family
        entry_point = _entry_point(family, name, home)
        setattr(home, name, entry_point)
        register_model(entry_point)


def _default_cfgs(family: Family) -> dict[str, Any]:
    shared = {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        **family.pretrained_cfg,
    }
    cfgs: dict[str, Any] = {}
    for name, cfg in family.variants.items():
        own = {**shared, "classifier": family.classifier(cfg)}
        weights = _weights(name)
        if not weights:
            side = family.reported[name][0] if name in family.reported else shared["input_size"][1]
            cfgs[name] = {**own, **_sized(side, family.stride)}
        for weight in weights:
            cfgs[weight.name] = {**own, **_weight_cfg(weight, family.stride)}
    return cfgs


def _weights(name: str) -> list[Weight]:
    return [weight for weight in load_manifest().values() if weight.model == name]


def _sized(side: int, stride: int) -> dict[str, Any]:
    return {"input_size": (3, side, side), "pool_size": (-(-side // stride),) * 2}


def _weight_cfg(weight: Weight, stride: int) -> dict[str, Any]:
    """A manifest row as fields of timm's pretrained configuration."""
    return {
        "url": weight.url,
        "license": weight.license,
        "origin_url": weight.source,
        "num_classes": weight.num_classes,
        **_sized(weight.input_size[1], stride),
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
        cfg, kwargs = split_options(default, {**(weight.options if weight else {}), **kwargs})
        build = partial(
            build_model_with_cfg,
            partial(make_model, family, cfg),
            name,
            pretrained,
            pretrained_filter_fn=partial(checkpoint_filter, name, cfg, is_unverified(name, pretrained_cfg)),
            # a new dict for every call: timm changes it
            feature_cfg={"out_indices": tuple(range(4)), "flatten_sequential": True, "feature_cls": "getter"},
        )
        if not pretrained:
            return build(**kwargs)
        # a download that does not fit the model is deleted
        with removed_on_error(download_path(name, pretrained_cfg, cache_dir)):
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
