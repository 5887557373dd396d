"""From a pretrained configuration to checked weights, before timm adapts them to the model at hand."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoints import cached_path, fetch, fetch_weight, load_manifest, read_state


@contextmanager
def published_weights(
    name: str, cfg: Any, kwargs: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], Callable[[nn.Module], None]]]:
    """Read the weights that `cfg` (timm's PretrainedCfg) points to; timm takes them from `pretrained_cfg_overlay`.

    Yields the arguments for the builder, and a function that takes the weights out of the finished model's
    configuration again. A download that turns out not to be the model's weights is deleted. Sources that timm resolves
    itself (a hub, a local directory, a state dict) pass through untouched. Raises ValueError where nothing can be
    fetched, saying why.
    """
    if cfg.source in ("hf-hub", "local-dir") or cfg.state_dict or cfg.hf_hub_id:
        yield kwargs, _nothing
        return
    cache_dir = kwargs.get("cache_dir")
    cached = None if cfg.file or not cfg.url else cached_path(cfg.url, cache_dir=cache_dir)
    fresh = cached is not None and not cached.exists()
    try:
        state = _read(name, cfg, cache_dir)
        overlay = {**(kwargs.get("pretrained_cfg_overlay") or {}), "state_dict": state}
        yield {**kwargs, "pretrained_cfg_overlay": overlay}, _without_state
    except Exception:
        if cached is not None and fresh:
            cached.unlink(missing_ok=True)
        raise


def _read(name: str, cfg: Any, cache_dir: str | Path | None) -> dict[str, Tensor]:
    """The weights in the file that `cfg` points to, fetched if need be."""
    row = load_manifest().get(f"{name}.{cfg.tag}")
    if cfg.file:
        if row is not None:
            # a release may hold several sets of weights: the published number belongs to the manifest's entry
            with suppress(ValueError):
                return read_state(cfg.file, state_key=row.state_key)
        return read_state(cfg.file)
    if row is not None and (cfg.url or "") == row.url:
        return read_state(fetch_weight(row, cache_dir=cache_dir), state_key=row.state_key)
    if cfg.url:
        return read_state(fetch(cfg.url, cache_dir=cache_dir))
    raise ValueError(
        f"{name} has no published weights; build it with pretrained=False, or pass a file with "
        "pretrained_cfg_overlay=dict(file=...)"
    )


def _nothing(model: nn.Module) -> None:
    pass


def _without_state(model: Any) -> None:
    for holder in {id(m): m for m in (model, getattr(model, "model", model))}.values():
        for cfg in (holder.pretrained_cfg, holder.default_cfg):
            cfg.pop("state_dict", None)


def check_shapes(name: str, state: Mapping[str, Tensor], model: Any) -> None:
    """Raise ValueError where a tensor does not fit, except in layers timm adapts (first convolution, classifier)."""
    cfg = model.pretrained_cfg
    classes = state.get("head.fc.weight")
    if classes is not None and classes.shape[0] != cfg["num_classes"]:
        raise ValueError(
            f"{name}: the checkpoint has {classes.shape[0]} classes where {cfg['num_classes']} were expected; "
            f"if that is right, pass pretrained_cfg_overlay=dict(num_classes={classes.shape[0]}, ...)"
        )
    first = cfg["first_conv"]
    adapted = {f"{conv}.weight" for conv in ([first] if isinstance(first, str) else first or ())}
    own = {key: value.shape for key, value in model.state_dict().items()}
    for key, tensor in state.items():
        if key in own and key not in adapted and not key.startswith("head.fc.") and tensor.shape != own[key]:
            raise ValueError(
                f"{name}: {key} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(own[key])} in the model; "
                "is it a checkpoint of another variant?"
            )
