"""PLACEHOLDER train/optim/ema.py"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..distributed.parallel import to_local
from ..recipe.schema import Ema


class WeightAverage:
    """Exponential moving average of a model's state: average += (1 - decay) * (weights - average), on local tensors."""

    def __init__(self, model: nn.Module, ema: Ema):
        self.ema = ema
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` updates."""
        decay = float(self.ema.decay or 0.0)
        if self.ema.warmup:
            decay = min(decay, (1 + step) / (10 + step))
        current = model.state_dict()
        real = [name for name, tensor in current.items() if tensor.is_floating_point()]
        average, weights = ([to_local(state[name]) for name in real] for state in (self.state, current))
        torch._foreach_lerp_(average, weights, 1 - decay)
        for name in current.keys() - set(real):
            self.state[name].copy_(current[name])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within: `model`, which it yields, has the averaged weights."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield model
        finally:
            model.load_state_dict(own)
