"""Data parallelism: device placement, DDP and FSDP2, mixed precision, and state of sharded models."""

import warnings
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
from .device import autocast_dtype
from .world import World

SYNC_BATCH_NORM_DEVICES = ("cuda", "xpu")


def prepare_model(model: nn.Module, parallel: Parallel, world: World) -> nn.Module:
    """Move the model to its device and memory format; apply gradient checkpointing, SyncBatchNorm and torch.compile.

    Raises UserError for fp16 on the CPU and for a model without gradient checkpointing.
    """
    if parallel.precision == "fp16" and world.device.type == "cpu":
        raise UserError("parallel.precision=fp16 needs a GPU (run.device=cuda); use bf16 or fp32 on the CPU")
    if parallel.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except AssertionError as error:
            raise UserError(
                f"parallel.grad_checkpointing: this model does not support it ({error}); remove it"
            ) from error
    if parallel.sync_batch_norm and world.size > 1 and world.device.type in SYNC_BATCH_NORM_DEVICES:
        model = synchronize_batch_norms(model)
    # fully_shard needs contiguous weights; convolutions then follow the memory format of the images
    sharded = world.size > 1 and parallel.strategy != "ddp"
    layout = torch.contiguous_format if sharded else memory_format(parallel)
    model = model.to(world.device, memory_format=layout)  # type: ignore[call-overload]
    if parallel.compile:
        model.compile()
    return model


def synchronize_batch_norms(model: nn.Module) -> nn.Module:
    """The model with SyncBatchNorm for its batch norms, except in parts whose attribute `local_batch_norm` is true."""
    parts = {name: part for name, part in model.named_modules() if getattr(part, "local_batch_norm", False)}
    for name in parts:
        model.set_submodule(name, nn.Identity())
    model = convert_sync_batchnorm(model)  # timm's: torch's drops the activation inside BatchNormAct2d
    for name, part in parts.items():
        model.set_submodule(name, part)
    return model


def memory_format(parallel: Parallel) -> torch.memory_format:
    """The memory format of image batches and, unless sharded, of the weights."""
    return torch.channels_last if parallel.channels_last else torch.contiguous_format


def wrap_distributed(model: nn.Module, parallel: Parallel, world: World) -> nn.Module:
    """Wrap the model so that its gradients are averaged over the processes (no wrapper for a single process).

    ddp: every process holds the whole model (DistributedDataParallel). fsdp: weights, gradients and optimizer state
    of each layer are sharded over all processes (FSDP2's fully_shard). hsdp: sharded within groups of
    `parallel.shard` processes and replicated between the groups. Raises UserError if the number of processes is not a
    multiple of `parallel.shard`, or if FSDP2 cannot shard the model.
    """
    if world.size == 1:
        return model
    if parallel.strategy == "ddp":
        # gradients of depthwise convolutions [C, 1, k, k] have another stride in their dimension of size 1, which
        # changes no address; DDP compares the numbers and warns
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return DistributedDataParallel(model, device_ids=None if world.device.type == "cpu" else [world.device])
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
        for layer in [*fsdp_units(model), model]:
            fully_shard(layer, mesh=mesh)
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"this model cannot be sharded ({error}); use parallel.strategy=ddp, which replicates it"
        ) from error
    return model


def fsdp_units(model: nn.Module) -> list[nn.Module]:
    """The FSDP units: for each layer of timm's `group_matcher`, the smallest module that contains its parameters.

    Inner modules come before the modules around them. Empty for a model without `group_matcher`.
    """
    if not hasattr(model, "group_matcher"):
        return []
    named = dict(model.named_modules())
    paths = set()
    for names in group_parameters(model, model.group_matcher()).values():  # type: ignore[operator]
        common = commonprefix([name.split(".")[:-1] for name in names])
        # fully_shard hooks `forward`, which a ModuleList or ModuleDict does not have: take its parent
        while isinstance(named[".".join(common)], nn.ModuleList | nn.ModuleDict):
            common = common[:-1]
        paths.add(tuple(common))
    return [named[".".join(path)] for path in sorted(paths - {()}, key=len, reverse=True)]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Hold all weights of a sharded model in the block, so that `forward` runs no collectives.

    Ranks may then call the model a different number of times, as in an evaluation.
    """
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
    """The unsharded state dict on the CPU: on rank 0, empty on the others. Every process must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
    """Context for one micro-batch: its backward averages gradients over the processes only if `enabled`.

    With gradient accumulation, only the last micro-batch of a step needs it. model: of `wrap_distributed`.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def autocast(parallel: Parallel, world: World) -> AbstractContextManager[Any]:
    """torch.autocast in the precision of the recipe; disabled for fp32, and where the device lacks that precision."""
    dtype = autocast_dtype(parallel.precision, world.device)
    if dtype is None and not torch.amp.is_autocast_available(world.device.type):
        return nullcontext()
    return torch.autocast(world.device.type, dtype, enabled=dtype is not None)


def numerics_config(parallel: Parallel, world: World, micro_batch: int) -> dict[str, Any]:
    """The settings that fix the order of floating-point sums: runs repeat each other bit for bit only if these agree.

    All of them may differ between two starts of one run; a checkpoint stores them as `arithmetic`.
    """
    device = world.device.type
    threads = torch.get_num_threads() if device == "cpu" else 0
    strategy = parallel.strategy if world.size > 1 else "alone"
    processes = {"processes": world.size, "strategy": strategy, "micro_batch": micro_batch}
    return processes | {"device": device, "threads": threads}


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def broadcast_tensors(tensors: Iterable[torch.Tensor], world: World) -> None:
    """Overwrite the tensors on every rank with rank 0's values, as DDP does with buffers before a forward."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
