"""Replacing the token mixers of a model's stages by others."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.layers import get_device_dtype
from torch import Tensor, nn

from ..blocks import MIXERS, Place, block
from ..blocks.registry import token_mixers
from ._backbone import Backbone, initialize_mixer
from ._specification import parse_stage

Shapes = tuple[torch.Size, torch.Size]  # of the input and the output of a mixer


def swap(model: Backbone, stages: Mapping[int | str, str]) -> Backbone:
    """Replace the token mixers in the given stages of `model`, and return the model; all other weights are kept.

    stages: number of the stage, from 0 -> specification of its mixers, which alternate, such as
    `{2: "halo(block_size=8, halo_size=3)"}`. The new mixers are initialized at random.

    Raises ValueError for a stage without mixers, and for a specification that is wrong or does not fit the stage.
    """
    if not isinstance(model, Backbone):
        raise TypeError(f"swap: {type(model).__name__} is not a model of tessel; give one that create_model returned")
    shapes = _mixer_shapes(model)
    # all are made before the first is replaced, so that an error leaves the model as it was
    for path, mixer in [
        pair for stage, text in stages.items() for pair in _new_mixers(model, int(stage), text, shapes)
    ]:
        model.set_submodule(path, mixer)
        model._no_weight_decay |= MIXERS[mixer.specification.partition("(")[0]].no_weight_decay
    options: dict[str, Any] = getattr(model, "_model_args", {})
    done = {str(stage): text for stage, text in {**options.get("swap", {}), **stages}.items()}
    # timm keeps the arguments of a model here, and writes them into its exports
    model._model_args = {**options, "swap": done}  # type: ignore[assignment]
    return model


def _new_mixers(model: Backbone, stage: int, text: str, shapes: Mapping[str, Shapes]) -> Iterator[tuple[str, Any]]:
    """The path of each mixer of a stage, and the one that replaces it."""
    specs = parse_stage(text)
    paths = [path for path in shapes if path.startswith(f"stages.{stage}.")]
    if not paths:
        able = sorted({path.split(".")[1] for path in shapes})
        raise ValueError(f"swap: stages.{stage} has no token mixer; stages with mixers are {', '.join(able) or 'none'}")
    if len(specs) > len(paths):
        raise ValueError(f"swap: stages.{stage} has {len(paths)} mixers, fewer than the {len(specs)} in {text!r}")
    for number, path in enumerate(paths):
        before, after = shapes[path]
        try:
            mixer = specs[number % len(specs)].make(Place(before[1], model.feature_info[stage]["reduction"]))
        except ValueError as error:
            raise ValueError(f"swap: stages.{stage}: {error}") from error
        where = get_device_dtype(model)
        mixer = _reshaped(mixer, before, after).to(where["device"], where["dtype"]).train(model.training)
        initialize_mixer(mixer)
        yield path, mixer


def _reshaped(mixer: nn.Module, before: torch.Size, after: torch.Size) -> nn.Module:
    """The mixer, and what makes its map of the shape `after` if it replaces one that changed the shape."""
    if before == after:
        return mixer
    stride = round(before[2] / after[2])
    layers = block(mixer=mixer, pool=nn.AvgPool2d(stride, ceil_mode=True), proj=nn.Conv2d(before[1], after[1], 1))
    layers.specification = mixer.specification
    del mixer.specification
    return layers


def specified_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """The mixers that were made from a specification, by their path."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "specification")}


def _mixer_shapes(model: Backbone) -> dict[str, Shapes]:
    """The shapes of input and output of every mixer, by its path, for an image of 224 pixels on the meta device.

    Mixers that are called with more than a map, such as a class token, are left out: others cannot replace them.
    """
    shapes: dict[str, Shapes] = {}

    def remember(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, others: Any, output: Tensor) -> None:
            if len(inputs) == 1 and not others:
                shapes[path] = inputs[0].shape, output.shape

        return hook

    hooks = [
        mixer.register_forward_hook(remember(path), with_kwargs=True) for path, mixer in token_mixers(model).items()
    ]
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    image = torch.empty(1, model.in_chans, 224, 224, device="meta", dtype=next(model.parameters()).dtype)
    training = model.training
    try:
        with torch.no_grad():
            torch.func.functional_call(model.eval(), {key: t.to("meta") for key, t in tensors.items()}, image)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return shapes
