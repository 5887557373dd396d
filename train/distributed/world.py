"""The process group of a run: rank, world size, device and the small CPU collectives the trainer needs."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import WORKER_DIED, LocalRankError, UserError
from ..recipe.schema import Guard, Run
from .device import choose_device, collectives
from .rendezvous import restart_safe_store


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run, and collectives over them. Objects and CPU tensors go over gloo: no GPU sync.

    Without a process group (`size == 1`) every collective returns its argument.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    local_size: int = 1  # processes on this node
    timeout: timedelta = timedelta(minutes=30)  # of a collective

    @property
    def main(self) -> bool:
        return self.rank == 0

    def max(self, value: int) -> int:
        """The largest `value` of all processes."""
        if self.size == 1:
            return value
        code = torch.tensor(value)
        dist.all_reduce(code, dist.ReduceOp.MAX)
        return int(code)

    def any_rank(self, flag: bool = False, error: UserError | None = None) -> bool:
        """Whether `flag` is true on any process. Raises the `error` of any process on all of them."""
        code = self.max(2 if error else int(flag))
        if code == 2:
            raise next(found for found in self.gather(error) if found)
        return bool(code)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Run the block on every rank; if it raises a UserError on any, raise that error on all.

        The block must not contain collectives: a rank that failed would leave the others waiting in them.
        """
        problem = None
        try:
            yield
        except UserError as error:
            problem = error
        self.any_rank(error=problem)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, ordered by rank, on every rank (all_gather_object)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The `value` of rank 0, on every rank."""
        return self.gather(value)[0]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over the ranks, as a new CPU tensor; `values` itself is not changed."""
        total = values.detach().cpu().clone()  # all_reduce works in place
        if self.size > 1:
            dist.all_reduce(total)
        return total


@contextmanager
def init_distributed(run: Run, guard: Guard = Guard()) -> Iterator[World]:  # noqa: B008  frozen
    """Yield the World described by torchrun's environment variables, or a single process; destroy the group at the end.

    Also selects the device and sets deterministic algorithms for the block. The timeout of collectives is twice
    `guard.timeout`. Raises UserError for a `run.device` that is not there, and for the RuntimeErrors that
    `translate_error` knows.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(run.device, processes=size, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(run.deterministic)
    # longer than the data timeout: a rank whose loader hangs reports it before the others give up waiting for that rank
    timeout = timedelta(seconds=2 * guard.timeout)
    try:
        if size > 1:
            store, rank, size = restart_safe_store(timeout)
            dist.init_process_group(collectives(device), store=store, rank=rank, world_size=size, timeout=timeout)
        yield World(rank, size, device, int(os.environ.get("LOCAL_WORLD_SIZE", size)), timeout)
    except RuntimeError as error:
        if known := translate_error(error, timeout):
            raise known from error
        raise
    finally:
        torch.use_deterministic_algorithms(deterministic)
        if dist.is_initialized():
            dist.destroy_process_group()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the machine had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "MPS backend out of memory" in str(error)


def translate_error(error: RuntimeError, timeout: timedelta) -> UserError | None:
    """The UserError for a RuntimeError of torch whose cause is known, else None.

    Known are a dead loader worker, a collective that timed out, a lost connection to another rank, and a GPU that is
    out of memory. gloo's and the DataLoader's errors have no class of their own, so the message decides.
    """
    text = next(iter(str(error).strip().splitlines()), "")
    if "DataLoader worker" in text:
        return LocalRankError(WORKER_DIED)
    remote = isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text
    if remote and ("timed out" in text.lower() or "timeout" in text):
        return LocalRankError(
            f"another process of this run has not answered for {timeout.total_seconds():g} s, it probably hangs. Kill "
            "the remaining processes of the run (kill -9); the same command continues from the last checkpoint. If a "
            "process is only slow, raise guard.timeout"
        )
    if remote:
        return LocalRankError(
            f"another process of this run is gone ({text[:160]}); the same command continues from the last checkpoint"
        )
    if is_out_of_memory(error):
        return LocalRankError(
            f"the GPU is out of memory ({text}): lower data.micro_batch or set parallel.grad_checkpointing=true"
        )
    return None
