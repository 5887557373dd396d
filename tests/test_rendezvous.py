"""The processes of one start agree on a key prefix, whatever an earlier start left in the store."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tessel.train.distributed import rendezvous

SOON = timedelta(seconds=20)


def agree(store: dist.Store, delays: list[float]) -> list[str | None]:
    """The prefix of each rank; rank i arrives after `delays[i]` seconds. None if it got none."""
    prefixes: list[str | None] = [None] * len(delays)

    def run(rank: int) -> None:
        time.sleep(delays[rank])
        exchange = rendezvous.receive_prefix if rank else rendezvous.publish_prefix
        prefixes[rank] = exchange(store.clone(), rank, len(delays), SOON)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(delays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return prefixes


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=SOON)


@pytest.mark.parametrize("delays", [[0, 0.2, 0], [0.2, 0, 0], [0, 0, 0.3]])
def test_each_start_has_its_own_prefix(store, delays):
    first, second = agree(store, delays), agree(store, delays[::-1])
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] and second[0] and first[0] != second[0]


def test_keys_of_a_killed_process_are_not_used(store):
    """A killed rank 1 has left its token, which rank 0 answers before the new rank 1 arrives."""
    store.set("arrived/1", "old-token")
    prefixes = agree(store, [0, 0.3])
    assert prefixes[0] == prefixes[1]


def test_waiting_times_out(store):
    with pytest.raises(RuntimeError, match=r"timed out waiting for the processes \[1\]"):
        rendezvous.publish_prefix(store, 0, 2, timedelta(seconds=0.1))
    with pytest.raises(dist.DistError):
        rendezvous.receive_prefix(store, 1, 2, timedelta(seconds=0.1))
