"""The size of the parts in which the plain definitions work, by device."""

from types import SimpleNamespace

import pytest
import torch

from tessel.kernels.halo import reference as halo
from tessel.kernels.routed import grouped
from tessel.kernels.working_size import working_bytes


def test_gpu_buffers_follow_its_memory(monkeypatch):
    working_bytes.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    assert working_bytes(torch.device("cuda", 0), cpu=4 << 20) == 5 << 30
    assert working_bytes(torch.device("mps"), cpu=4 << 20) == 1 << 30
    assert working_bytes(torch.device("cpu"), cpu=4 << 20) == 4 << 20
    working_bytes.cache_clear()


@pytest.mark.parametrize("device, groups", [("cpu", 25), ("meta", 1)])
def test_regions_are_grouped_by_the_device(device, groups):
    qkv = torch.empty(64, 56, 56, 3, 2, 32, device=device)
    index = torch.empty(64, 49, 1, dtype=torch.long, device=device)
    assert len(list(grouped.region_groups(qkv, index))) == groups


@pytest.mark.parametrize("device, split", [("cpu", True), ("meta", False)])
def test_windows_are_split_on_the_cpu(device, split, monkeypatch):
    calls, attend = [], halo.attend_windows
    monkeypatch.setattr(halo, "attend_windows", lambda *args: calls.append(args) or attend(*args))
    q, kv = (torch.zeros(2, 56, 56, 8, n, device=device) for n in (16, 32))
    tables = [torch.zeros(27, 16, device=device) for _ in range(2)]
    with torch.no_grad():
        halo.halo_attention_reference(q, kv, *tables, block_size=8, halo_size=3)
    assert (len(calls) > 1) is split
