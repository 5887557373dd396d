"""Exponential moving average (EMA) of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..distributed.parallel import to_local
from ..recipe.schema import Ema


class WeightAverage:
    """EMA of a model's state dict: `average += (1 - decay) * (weight - average)`, on local shards if it is sharded.

    Integer buffers are copied. With `ema.warmup` the decay after `step` updates is at most `(1 + step) / (10 + step)`.
    `state` is stored in checkpoints under the key `ema`.

    torch's AveragedModel and timm's ModelEmaV3 do not fit: both deep-copy the model, which FSDP2 refuses, and neither
    has this warm-up (AveragedModel also takes the first update unaveraged).
    """

    def __init__(self, model: nn.Module, ema: Ema):
        self.ema = ema
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in the weights of `model` after `step` updates."""
        decay = float(self.ema.decay or 0.0)
        if self.ema.warmup:
            decay = min(decay, (1 + step) / (10 + step))
        current = model.state_dict()
        floating = [name for name, tensor in current.items() if tensor.is_floating_point()]
        average, weights = ([to_local(state[name]) for name in floating] for state in (self.state, current))
        torch._foreach_lerp_(average, weights, 1 - decay)
        for name in current.keys() - set(floating):
            self.state[name].copy_(current[name])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield `model` with the averaged weights; restore its own weights at the end of the block."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield model
        finally:
            model.load_state_dict(own)
