"""One model over several processes: replicas or shards of it, precision, and the moving average of its weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os.path import commonprefix
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.models import group_parameters
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from ..recipe.schema import Parallel
from .world import World

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_model(model: nn.Module, parallel: Parallel, world: World) -> nn.Module:
    """The model on its device, in its memory format, with what the recipe asks for switched on."""
    if parallel.precision == "fp16" and world.device.type != "cuda":
        raise UserError("parallel.precision=fp16 needs cuda; use bf16 or fp32 on the cpu")
    if parallel.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except AssertionError as error:
            raise UserError(f"parallel.grad_checkpointing: not with this model ({error}); remove it") from error
    if parallel.sync_batch_norm and world.size > 1 and world.device.type == "cuda":
        model = convert_sync_batchnorm(model)  # timm's: torch's loses the activations that some norms hold
    # shards need contiguous weights; the images' format is enough to steer the kernels
    sharded = world.size > 1 and parallel.strategy != "ddp"
    layout = torch.contiguous_format if sharded else memory_format(parallel)
    model = model.to(world.device, memory_format=layout)  # type: ignore[call-overload]
    if parallel.compile:
        model.compile()
    return model


def memory_format(parallel: Parallel) -> torch.memory_format:
    return torch.channels_last if parallel.channels_last else torch.contiguous_format


def wrap_distributed(model: nn.Module, parallel: Parallel, world: World) -> nn.Module:
    """The module to train: gradients are averaged over the processes.

    ddp: each holds the whole model; fsdp: a share of every layer's weights, gradients and optimizer state; hsdp: a
    share within its group of `parallel.shard` processes. Raises UserError where they do not divide into groups.
    """
    if world.size == 1:
        return model
    if parallel.strategy == "ddp":
        return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)
    shape, names = (world.size,), ("shard",)
    if parallel.strategy == "hsdp":
        group = parallel.shard or world.local_size
        if world.size % group:
            raise UserError(f"parallel.shard={group} does not divide the {world.size} processes; choose one that does")
        shape, names = (world.size // group, group), ("replicate", "shard")
    broadcast_tensors(model.state_dict().values(), world)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    for name in names:
        dist.distributed_c10d._set_pg_timeout(world.timeout, mesh.get_group(name))
    try:
        for layer in [*layers(model), model]:
            fully_shard(layer, mesh=mesh)
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"this model cannot be sharded ({error}); parallel.strategy=ddp trains it in replicas"
        ) from error
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    """The smallest module around each of the layers that timm's `group_matcher` names, inner ones first."""
    if not hasattr(model, "group_matcher"):
        return []
    named = dict(model.named_modules())
    paths = set()
    for names in group_parameters(model, model.group_matcher()).values():  # type: ignore[operator]
        common = commonprefix([name.split(".")[:-1] for name in names])
        # a list of modules is no module to be called
        while isinstance(named[".".join(common)], nn.ModuleList | nn.ModuleDict):
            common = common[:-1]
        paths.add(tuple(common))
    return [named[".".join(path)] for path in sorted(paths - {()}, key=len, reverse=True)]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Within: a sharded model holds all its weights, so that each process may call it as often as it has batches."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield model
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def full_state_dict(model: nn.Module) -> Mapping[str, Any]:
    """The state of a model on the CPU, shards put together; every process calls it, rank 0 gets it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def accumulating(replicas: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around one micro-batch of an update: gradients are exchanged in the last one only."""
    if isinstance(replicas, FSDPModule):
        replicas.set_requires_gradient_sync(last)
    if last or not isinstance(replicas, DistributedDataParallel):
        return nullcontext()
    return replicas.no_sync()


def autocast(parallel: Parallel, world: World) -> AbstractContextManager[Any]:
    dtype = DTYPES.get(parallel.precision)
    return torch.autocast(world.device.type, dtype, enabled=dtype is not None)


def arithmetic(parallel: Parallel, world: World, micro_batch: int) -> dict[str, Any]:
    """What may change between two starts of a run and decides the order of its sums, hence their last bits."""
    device = world.device.type
    threads = torch.get_num_threads() if device == "cpu" else 0
    strategy = parallel.strategy if world.size > 1 else "alone"
    processes = {"processes": world.size, "strategy": strategy, "micro_batch": micro_batch}
    return processes | {"device": device, "threads": threads}


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def broadcast_tensors(tensors: Iterable[torch.Tensor], world: World) -> None:
    """Give every process rank 0's values, as DDP does with buffers before a forward."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
