"""Where the processes of a run find one another, also when torchrun has started them anew.

torchrun keeps one store for all its starts. What a killed process wrote there is still there for its successor: it
would take a dead one's address for that of its peer (pytorch issue 135712). So the processes of each start agree on a
name first, below which nothing has been written.
"""

import os
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist


def restart_safe_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Store, rank and size for `init_process_group`, from the environment of torchrun or of anything that is like it.

    Raises RuntimeError where not all processes have come within `timeout`.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        name = (publish_prefix if rank == 0 else receive_prefix)(store, rank, size, timeout)
        store = dist.PrefixStore(name, store)
    return store, rank, size


def publish_prefix(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Tell a new name to whoever has arrived until every other rank has taken it; an arrival may be a dead one's."""
    name, waiting, end = uuid4().hex, set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while waiting:
        if time.monotonic() > end:
            raise RuntimeError(f"gloo: timed out waiting for the processes {sorted(waiting)}")
        for other in sorted(waiting):
            if store.check([f"arrived/{other}"]):
                store.set(f"told/{store.get(f'arrived/{other}').decode()}", name)
            if store.check([f"taken/{name}/{other}"]):
                waiting.discard(other)
        time.sleep(0.01)
    return name


def receive_prefix(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Ask for the name under a word of one's own, so that no earlier answer is taken for this one."""
    word = uuid4().hex
    store.set(f"arrived/{rank}", word)
    store.wait([f"told/{word}"], timeout)
    name = store.get(f"told/{word}").decode()
    store.set(f"taken/{name}/{rank}", "")
    return name
