"""Rendezvous that survives restarts by torchrun.

torchrun keeps one TCPStore for all restarts of a job, so keys written by killed processes are still there when the
next ones start, and `init_process_group` would read the address of a dead peer (pytorch issue 135712). Here the
processes of each start first agree on a random key prefix: rank 0 publishes it, the other ranks receive it.

Keys of the handshake, in the shared store:

    arrived/RANK         written by RANK: its random token. It may be left over from a killed process.
    answer/TOKEN         written by rank 0: the prefix, for the process that wrote TOKEN.
    taken/PREFIX/RANK    written by RANK: it has received PREFIX.
"""

import os
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist


def restart_safe_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Store, rank and world size for `init_process_group`, from the environment variables that torchrun sets.

    Raises RuntimeError if not all processes have arrived within `timeout`.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        prefix = (publish_prefix if rank == 0 else receive_prefix)(store, rank, size, timeout)
        store = dist.PrefixStore(prefix, store)
    return store, rank, size


def publish_prefix(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Rank 0: choose a new prefix and answer every token that arrives until all other ranks have taken the prefix.

    A token may belong to a killed process; its successor overwrites it with a new one, which is answered in turn.
    """
    prefix, waiting, end = uuid4().hex, set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while waiting:
        if time.monotonic() > end:
            raise RuntimeError(f"gloo: timed out waiting for the processes {sorted(waiting)}")
        for other in sorted(waiting):
            if store.check([f"arrived/{other}"]):
                store.set(f"answer/{store.get(f'arrived/{other}').decode()}", prefix)
            if store.check([f"taken/{prefix}/{other}"]):
                waiting.discard(other)
        time.sleep(0.01)
    return prefix


def receive_prefix(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Other ranks: announce a random token and wait for rank 0's answer to it.

    The token is new in each start, so an answer given to a killed process is never read.
    """
    token = uuid4().hex
    store.set(f"arrived/{rank}", token)
    store.wait([f"answer/{token}"], timeout)
    prefix = store.get(f"answer/{token}").decode()
    store.set(f"taken/{prefix}/{rank}", "")
    return prefix
