"""What the CPU cannot show: models and kernels on a GPU, training in fp16, and collectives of NCCL.

pytest tests/gpu.py                             on a GPU; `make gpu` runs it too
TESSEL_TEST_DEVICE=cpu pytest tests/gpu.py      on the CPU with bf16 and gloo, to see that the tests run
"""

import os
import shutil
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import trainer
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tessel.train.distributed.device import collectives

DEVICE = torch.device(os.environ.get("TESSEL_TEST_DEVICE", "cuda"))
HALF = "fp16" if DEVICE.type == "cuda" else "bf16"
OPERATORS = ("routed", "window", "halo", "aggregated", "neighborhood")

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="torch sees no GPU")


def logits_and_gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.double().sin().sum().backward()
    # some models have parameters that only training uses
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_model_computes_what_it_computes_on_the_cpu(model_name):
    model = timm.create_model(model_name, num_classes=3, drop_path_rate=0.0).double().eval()
    x = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:], dtype=torch.float64)
    want = logits_and_gradients(model, x)
    got = [y.cpu() for y in logits_and_gradients(model.to(DEVICE), x.to(DEVICE))]
    largest = max(value.abs().max().item() for value in want[1:])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7 * largest)
    model, x = model.float(), x.to(DEVICE, torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert all(y.isfinite().all() for y in logits_and_gradients(model, x))
    with torch.autocast(DEVICE.type, torch.float16):  # gradients may overflow: there is no GradScaler
        assert model(x).isfinite().all()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.skipif(DEVICE.type != "cuda", reason="kernels need a GPU")
def test_kernel_is_right(operator):
    from tessel.kernels.verification.correctness import check_correctness
    from tessel.kernels.verification.problems import PROBLEMS, cases

    for name, case in cases(operator, interpreted=True).items():
        for dtype in (torch.float16, torch.bfloat16):
            check = check_correctness(PROBLEMS[operator], case, dtype, "cuda")
            assert check["passed"], (name, dtype, check["reasons"])


def test_training_in_half_precision_learns_and_resumes(tmp_path, capfd):
    """On handwritten digits; a copy of the run resumes in the middle and ends with the same bits."""
    sections = {
        "run": {"device": DEVICE.type, "deterministic": True},
        "parallel": {"precision": HALF},
        "data": {"source": "digits", "batch": 64, "micro_batch": 64, "aug": {"mixup": 0.0, "cutmix": 0.0}},
        "log": {"every": 1},
    }
    recipe = trainer.write_recipe(tmp_path / "half.yaml", **sections)
    shared = [recipe, "run.name=half", "sched.steps=24", "ckpt.every=12", "eval.every=12"]
    assert trainer.train(*shared) == 0
    whole, again = tmp_path / "runs/half", tmp_path / "again/half"
    losses = [r["loss"] for r in trainer.metrics(whole) if r["kind"] == "train"]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("DONE", "step-00000024"))
    assert trainer.train(*shared, f"run.out={again.parent}") == 0
    assert "(exact)" in capfd.readouterr().out
    trainer.assert_same_checkpoint(*(run / "checkpoints/step-00000024" for run in (whole, again)))


@pytest.fixture
def group(monkeypatch):
    """A process group of one process, with the backends of the trainer."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    dist.init_process_group(collectives(DEVICE), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard], ids=["ddp", "fsdp"])
def test_collectives_leave_one_process_as_it_is(group, wrap):
    model = timm.create_model("cswin_atto", num_classes=3, drop_path_rate=0.0).to(DEVICE).eval()
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    want = [y.clone() for y in logits_and_gradients(model, x)]
    got = logits_and_gradients(wrap(model), x)
    for one, other in zip(got, want, strict=True):
        one = one.full_tensor() if hasattr(one, "full_tensor") else one
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE.type == "cuda" and torch.cuda.device_count() < 2, reason="NCCL needs a GPU per process")
def test_two_processes_learn_what_one_learns(tmp_path):
    data = {"root": str(trainer.draw_folder(tmp_path / "images")), "micro_batch": 2}
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", data=data, run={"device": DEVICE.type})
    shared = ["model.name=test_convnext", "log.every=1", "sched.steps=3"]
    assert trainer.train(recipe, *shared, "run.name=one") == 0
    ways = {"ddp": [], "fsdp": ["parallel.strategy=fsdp"]}
    done = trainer.run_processes(2, *([recipe, *shared, *way, f"run.name={name}"] for name, way in ways.items()))
    assert trainer.exit_codes(done) == [[0, 0]] * 2, done.stdout + done.stderr
    one = [r["loss"] for r in trainer.metrics(tmp_path / "runs/one") if r["kind"] == "train"]
    for name in ways:
        losses = [r["loss"] for r in trainer.metrics(tmp_path / "runs" / name) if r["kind"] == "train"]
        assert losses == pytest.approx(one, rel=1e-3)
