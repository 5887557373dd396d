"""Processes find those of their own start, whatever an earlier start left in the store."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tessel.train.distributed import rendezvous

SOON = timedelta(seconds=20)


def start(store: dist.Store, delays: list[float]) -> list[str | None]:
    """The names that ranks 0, 1, ... agree on, each of which comes after its delay; None: it never does."""
    names: list[str | None] = [None] * len(delays)

    def one(rank: int) -> None:
        time.sleep(delays[rank])
        meet = rendezvous.receive_prefix if rank else rendezvous.publish_prefix
        names[rank] = meet(store.clone(), rank, len(delays), SOON)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(delays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=SOON)


@pytest.mark.parametrize("delays", [[0, 0.2, 0], [0.2, 0, 0], [0, 0, 0.3]])
def test_each_start_has_a_name_of_its_own(store, delays):
    first, second = start(store, delays), start(store, delays[::-1])
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] and second[0] and first[0] != second[0]


def test_what_a_dead_process_left_is_not_taken(store):
    """A rank 1 that came and died has been told a name already."""
    store.set("arrived/1", "of the dead")
    names = start(store, [0, 0.3])
    assert names[0] == names[1] != "of the dead"


def test_waiting_ends(store):
    with pytest.raises(RuntimeError, match=r"timed out waiting for the processes \[1\]"):
        rendezvous.publish_prefix(store, 0, 2, timedelta(seconds=0.1))
    with pytest.raises(dist.DistError):
        rendezvous.receive_prefix(store, 1, 2, timedelta(seconds=0.1))
