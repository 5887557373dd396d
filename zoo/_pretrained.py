"""Reading and checking the weights that a pretrained configuration of timm points to."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg
from torch import Tensor

from ..checkpoints import (
    cached_path,
    fetch,
    fetch_weight,
    imported_path,
    is_available,
    load_manifest,
    read_state,
    remove_cached,
)


def read_weights(name: str, pretrained_cfg: Any, cache_dir: str | Path | None) -> dict[str, Tensor] | None:
    """The weights that `pretrained_cfg` (timm's PretrainedCfg) points to, downloaded if need be.

    None for sources that timm reads itself: the Hugging Face hub, a local directory, a given state dict. Raises
    RuntimeError, as timm does, where the model has no weights to download.
    """
    if pretrained_cfg.source in ("hf-hub", "local-dir") or pretrained_cfg.state_dict or pretrained_cfg.hf_hub_id:
        return None
    row = load_manifest().get(f"{name}.{pretrained_cfg.tag}")
    if pretrained_cfg.file:
        if row is not None:
            # a file may hold several sets of weights; the manifest knows which one has the published accuracy
            with suppress(ValueError):
                return read_state(pretrained_cfg.file, state_key=row.state_key)
        return read_state(pretrained_cfg.file)
    remedy = "use pretrained=False for random weights, or pass a file with pretrained_cfg_overlay=dict(file=...)"
    if row is not None and (pretrained_cfg.url or "") == row.url:
        if not is_available(row, cache_dir=cache_dir):
            raise RuntimeError(
                f"The pretrained weights of {row.name} cannot be downloaded: {row.why_no_url}; download the file of "
                f"{row.source} by hand and keep it with `tessel weights import {row.name} FILE`, or {remedy}"
            )
        return read_state(fetch_weight(row, cache_dir=cache_dir), state_key=row.state_key)
    if pretrained_cfg.url:
        return read_state(fetch(pretrained_cfg.url, cache_dir=cache_dir))
    raise RuntimeError(f"No pretrained weights exist for {name}; {remedy}")


def has_weights(name: str) -> bool:
    """Whether `create_model(name, pretrained=True)` finds weights: to download, or imported to the cache."""
    cfg = get_pretrained_cfg(name)
    if cfg is None:
        return False
    row = load_manifest().get(f"{name.partition('.')[0]}.{cfg.tag}")
    return is_available(row) if row is not None else bool(cfg.has_weights)


def download_path(name: str, pretrained_cfg: Any, cache_dir: str | Path | None) -> Path | None:
    """Where `read_weights` stores what it downloads; None where it downloads nothing."""
    if pretrained_cfg.file:
        return None
    if pretrained_cfg.url:
        return cached_path(pretrained_cfg.url, cache_dir=cache_dir)
    row = load_manifest().get(f"{name}.{pretrained_cfg.tag}")
    return imported_path(row, cache_dir=cache_dir) if row else None


def is_unverified(name: str, pretrained_cfg: Any) -> bool:
    """Whether `read_weights` reads a published file whose hash is not in the manifest."""
    row = load_manifest().get(f"{name}.{pretrained_cfg.tag}")
    return row is not None and not (row.sha256 or pretrained_cfg.file or pretrained_cfg.state_dict)


@contextmanager
def removed_on_error(path: Path | None) -> Iterator[None]:
    """If the block raises, remove the file at `path`, unless it was there before the block."""
    existed = path is None or path.exists()
    try:
        yield
    except Exception:
        if path is not None and not existed:
            remove_cached(path)
        raise


def forget_state_dict(model: Any) -> None:
    """Remove the state dict from the pretrained configuration of `model` and of the model that it wraps."""
    for holder in (model, getattr(model, "model", model)):
        for pretrained_cfg in (holder.pretrained_cfg, holder.default_cfg):
            pretrained_cfg.pop("state_dict", None)


def check_finite(name: str, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for weights that are infinite or not a number."""
    bad = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"{name}: {len(bad)} tensors of the checkpoint are not finite: {', '.join(bad[:5])}; the file is damaged"
        )


def classifier_keys(pretrained_cfg: Mapping[str, Any]) -> frozenset[str]:
    """Weights and biases of the layers with one output per class, which timm makes anew for other classes."""
    layers = pretrained_cfg["classifier"]
    names = [layers] if isinstance(layers, str) else layers
    return frozenset(f"{name}.{part}" for name in names for part in ("weight", "bias"))


def check_shapes(name: str, state: Mapping[str, Tensor], model: Any) -> None:
    """Raise ValueError for a tensor of another shape, except in the layers that timm adapts to the model.

    These are the first convolution and the classifier.
    """
    pretrained_cfg = model.pretrained_cfg
    classifier = state.get("head.fc.weight")
    if classifier is not None and classifier.shape[0] != pretrained_cfg["num_classes"]:
        raise ValueError(
            f"{name}: the checkpoint has {classifier.shape[0]} classes, but {pretrained_cfg['num_classes']} are "
            f"expected; if that is right, pass pretrained_cfg_overlay=dict(num_classes={classifier.shape[0]}, ...)"
        )
    first = pretrained_cfg["first_conv"]
    adapted = {f"{conv}.weight" for conv in ([first] if isinstance(first, str) else first or ())}
    adapted |= classifier_keys(pretrained_cfg)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for key, tensor in state.items():
        if key in shapes and key not in adapted and tensor.shape != shapes[key]:
            raise ValueError(
                f"{name}: {key} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(shapes[key])} in the model; "
                "is it a checkpoint of another variant?"
            )
