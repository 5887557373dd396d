"""FLOPs, throughput, utilization of a known GPU, memory, and the profiler trace."""

import json

import pytest
import timm
import torch
import trainer
from torch import nn

from tessel.train.distributed.world import World
from tessel.train.recipe.schema import Parallel
from tessel.train.run.profiling import ThroughputMeter, forward_gflops, peak_memory, peak_tflops


def test_a_multiply_add_counts_as_two_flops():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5)).train()
    assert forward_gflops(model, (torch.zeros(1, 3, 4, 4),)) * 1e9 == 2 * (3 * 9 * 8 * 16 + 8 * 16 * 5)
    assert model.training
    assert forward_gflops(timm.create_model("resnet18"), (torch.zeros(1, 3, 224, 224),)) == pytest.approx(3.6, rel=0.02)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 4 * 989.4),
        ("NVIDIA H100 PCIe", "bf16", 4 * 756),
        ("NVIDIA A100-SXM4-80GB", "fp16", 4 * 312),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("Some GPU", "bf16", None),
    ],
)
def test_peak_is_given_for_known_devices_only(monkeypatch, name, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    world = World(size=4, device=torch.device("cuda", 0))
    assert peak_tflops(Parallel(precision=precision), world) == expected
    assert peak_tflops(Parallel(precision=precision), World()) is None


def test_metrics_agree_with_each_other():
    meter = ThroughputMeter(10, gflops=2.0, peak=5.0, device=torch.device("cpu"))
    for _ in range(3):
        with meter.waiting():
            pass
    metrics = meter.read()
    assert metrics["tflops"] == pytest.approx(3 * 2.0 * metrics["images_per_second"] / 1e3, rel=1e-3)
    assert metrics["mfu"] == pytest.approx(metrics["tflops"] / 5.0, rel=1e-2)
    assert metrics["memory_gb"] > 0.1


def test_memory_is_that_of_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_000_000_000)
    assert peak_memory(torch.device("cuda", 0)) == 5.0
    assert 0.1 < peak_memory(torch.device("cpu")) < 100


def test_trace_of_ten_steps(tmp_path):
    model, data = {"name": "test_resnet", "drop_path_rate": None}, {"source": "digits", "micro_batch": 8}
    recipe = trainer.write_recipe(
        tmp_path / "tiny.yaml", model=model, data=data, sched={"steps": 15}, eval={"every": 15}
    )
    assert trainer.train(recipe, "log.profile=true", "ckpt.every=15") == 0
    trace = json.loads((tmp_path / "runs/tiny/profile/rank0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 10
    assert any("convolution" in name for name in names)
