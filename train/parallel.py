"""One model over several processes: replication, precision, and the moving average of its weights."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .launch import World
from .schema import Ema, Parallel, UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def place(model: nn.Module, parallel: Parallel, world: World) -> nn.Module:
    """The model on its device, in its memory format, with what the recipe asks for switched on."""
    if parallel.precision == "fp16" and world.device.type != "cuda":
        raise UserError("parallel.precision=fp16 needs cuda; use bf16 or fp32 on the cpu")
    if parallel.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if world.size > 1 and world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(world.device, memory_format=memory_format(parallel))  # type: ignore[call-overload]
    if parallel.compile:
        model.compile()
    return model


def memory_format(parallel: Parallel) -> torch.memory_format:
    return torch.channels_last if parallel.channels_last else torch.contiguous_format


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The module to train: gradients are averaged over the processes."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


def accumulating(replicas: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around one micro-batch of an update: gradients are exchanged in the last one only."""
    if last or not isinstance(replicas, DistributedDataParallel):
        return nullcontext()
    return replicas.no_sync()


def autocast(parallel: Parallel, world: World) -> AbstractContextManager[Any]:
    dtype = DTYPES.get(parallel.precision)
    return torch.autocast(world.device.type, dtype, enabled=dtype is not None)


def arithmetic(world: World, micro_batch: int) -> dict[str, Any]:
    """What may change between two starts of a run and decides the order of its sums, hence their last bits."""
    device = world.device.type
    threads = torch.get_num_threads() if device == "cpu" else 0
    return {"processes": world.size, "micro_batch": micro_batch, "device": device, "threads": threads}


def share(tensors: Iterable[torch.Tensor], world: World) -> None:
    """Give every process rank 0's values, as DDP does with buffers before a forward."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


class MovingAverage:
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
        torch._foreach_lerp_([self.state[name] for name in real], [current[name] for name in real], 1 - decay)
        for name in current.keys() - set(real):
            self.state[name].copy_(current[name])

    @contextmanager
    def worn_by(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within: `model`, which it yields, has the averaged weights."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield model
        finally:
            model.load_state_dict(own)
