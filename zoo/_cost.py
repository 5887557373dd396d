"""What a model costs, counted on the meta device: parameters, multiply-adds, and the memory of one image."""

import dataclasses
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary


@dataclasses.dataclass(frozen=True)
class Cost:
    """input_size: (channels, height, width) of the image; the bytes are those of float32."""

    parameters: int
    macs: int
    activation_bytes: int
    """largest sum of the sizes of all tensors that exist at one time in inference, without the weights"""
    input_size: tuple[int, int, int]

    @property
    def weight_bytes(self) -> int:
        return 4 * self.parameters


@cache
def count_parameters(name: str) -> int:
    """Number of parameters of the model `name` of timm or tessel, with its classifier."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


@cache
def model_cost(name: str) -> Cost:
    """The cost of the model `name` of timm or tessel for one image of the size that its weights were trained with.

    Multiply-adds are those of matrix products and convolutions, as torch's FlopCounterMode counts them.
    """
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    return cost_of(model, model.pretrained_cfg["input_size"][-1])


def cost_of(model: Any, size: int) -> Cost:
    """The cost of a model on the meta device, for one square image with sides of `size`."""
    shape = (getattr(model, "in_chans", 3), size, size)
    image = torch.empty(1, *shape, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as flops, _LiveBytes() as live:
        model.eval()(image)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, flops.get_total_flops() // 2, live.peak, shape)


class _LiveBytes(TorchDispatchMode):
    """`peak`: the largest number of bytes in tensors that were made within the context and alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.live = 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        for tensor in tree_leaves(result):
            # views and in-place operations make no new storage
            if isinstance(tensor, Tensor) and all(tensor.untyped_storage() is not storage for storage in given):
                self.live[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result
