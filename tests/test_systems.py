"""Systems other than Linux and accelerators other than CUDA: what is missing there is taken away here."""

import errno
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainer

from tessel.blocks import frequency
from tessel.predict.networks import pick_device
from tessel.train import system
from tessel.train.distributed import device as devices
from tessel.train.distributed.parallel import autocast, prepare_model
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.evaluate import start
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.schema import Parallel
from tessel.train.run.directory import RunDirectory
from tessel.train.run.loss_meter import LossMeter
from tessel.train.run.profiling import ThroughputMeter, peak_memory
from tessel.train.trainer import build, describe

MPS = torch.device("mps")
WITHOUT_POSIX = """
import importlib, pkgutil, signal, sys
for name in ("fcntl", "resource", "triton"):
    sys.modules[name] = None
if hasattr(signal, "SIGUSR1"):
    del signal.SIGUSR1
import tessel
for room in ("blocks", "zoo", "checkpoints", "export", "predict", "cli"):
    package = importlib.import_module(f"tessel.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"tessel.{room}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
import timm, torch
print(tuple(timm.create_model("biformer_atto")(torch.zeros(1, 3, 64, 64)).shape))
"""
WITHOUT_PROC = """
import sys
sys.modules["resource"] = None

def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(arguments[0])

sys.addaudithook(refuse)
from tessel.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def mps(monkeypatch):
    """torch names mps as the accelerator. Without one, each attempt to use it fails: it lacks everything."""
    if torch.backends.mps.is_available():
        pytest.skip("this machine has mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: MPS)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)


@pytest.fixture
def recipe(tmp_path):
    return trainer.write_recipe(tmp_path / "tiny.yaml", data={"source": "digits"})


def test_all_but_the_trainer_imports_without_fcntl_resource_and_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 1000)"


@pytest.mark.skipif(sys.platform == "win32", reason="the trainer is for Linux and macOS")
def test_trainer_runs_without_resource_and_proc(recipe):
    command = [sys.executable, "-c", WITHOUT_PROC, str(recipe), "sched.steps=2", "sched.warmup=0", "log.every=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout and "memory" not in done.stdout
    run = recipe.parent / "runs/tiny"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert trained and not any("memory_gb" in record for record in trained)
    assert (run / ".lock").read_text().startswith("process ")


@pytest.mark.parametrize(("name", "factor"), [("linux", 1024), ("darwin", 1)])
def test_peak_resident_counts_in_bytes(monkeypatch, name, factor):
    if system.resource is None:
        pytest.skip("no resource module")
    peak = type("Usage", (), {"ru_maxrss": 5000})
    monkeypatch.setattr(system.resource, "getrusage", lambda who: peak)
    monkeypatch.setattr(sys, "platform", name)
    assert system.peak_resident() == 5000 * factor


def test_a_run_directory_opens_on_a_system_without_locks(monkeypatch, recipe):
    monkeypatch.setattr(system, "fcntl", None)
    with pytest.raises(OSError) as caught:
        system.lock_file(0)
    assert caught.value.errno == errno.ENOSYS
    with RunDirectory(load_recipe(str(recipe))).held() as run:
        assert run.open() is None
        assert (run.path / "recipe.yaml").is_file()


def test_windows_opens_no_directory(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    system.sync_directory(Path("missing"))


@pytest.mark.parametrize("task", ["classify", *trainer.SCENES])
def test_loaders_reach_workers_that_are_not_forked(tmp_path, task):
    """macOS and Windows start workers as new processes, to which the data set is sent."""
    sections = trainer.SCENES.get(task, {"data": {"source": "digits"}})
    file = trainer.write_recipe(tmp_path / "tiny.yaml", **sections)
    loaded, schedule, _ = build(load_recipe(str(file), ["data.workers=0"]), World())
    for batches in (loaded.train_batches(schedule, 0), loaded.eval_batches()):
        loader = batches.loader
        copy = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        assert type(copy[0]) is type(loader.dataset)
        batches.close()


def test_device_is_the_accelerator_that_torch_names(mps):
    one = {"processes": 1, "local_rank": 0}
    assert devices.choose_device("auto", **one) == devices.choose_device("mps", **one) == MPS
    assert devices.choose_device("cpu", **one) == torch.device("cpu")
    with pytest.raises(UserError, match="run.device=cuda, but torch finds only mps; use run.device=cpu or auto"):
        devices.choose_device("cuda", **one)
    assert pick_device("auto") == MPS


def test_several_processes_train_on_the_cpu_where_the_accelerator_has_no_collectives(mps):
    two = {"processes": 2, "local_rank": 1}
    device = devices.choose_device("auto", **two)
    assert device == torch.device("cpu")
    text = devices.describe_replacements("auto", Parallel(), device)
    assert text == "several processes cannot train on mps, so they train on the CPU"
    assert not devices.describe_replacements("cpu", Parallel(), device), "as asked"
    with pytest.raises(UserError, match="run.device=mps: .*start one process, or use run.device=cpu"):
        devices.choose_device("mps", **two)


def test_what_a_device_lacks_is_replaced_and_said_in_one_line(mps, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    devices.seed_accelerator(7)
    assert seeds == [7]
    assert devices.sum_dtype(MPS) == torch.float32 and devices.sum_dtype(torch.device("cpu")) == torch.float64
    assert not devices.has_bf16(MPS) and not devices.pins_memory(MPS) and devices.pins_memory(torch.device("cuda"))
    world = World(device=MPS)
    for precision in ("bf16", "fp16"):
        with autocast(Parallel(precision=precision), world):
            assert not torch.is_autocast_enabled("mps")
    text = devices.describe_replacements("auto", Parallel(precision="bf16"), MPS)
    assert "\n" not in text and text.startswith("on mps losses and metrics are summed in float32")
    assert "computes in fp32, since it cannot train in bf16" in text and "memory_gb" in text
    assert "bf16" not in devices.describe_replacements("auto", Parallel(), MPS)
    assert peak_memory(MPS) == peak_memory(torch.device("cpu"))
    assert ThroughputMeter(1, 1.0, None, MPS).read()["memory_gb"] > 0


def test_abilities_of_a_device_are_found(monkeypatch):
    """The CPU, asked as if it were another accelerator, has all of them."""
    assert devices._has_float64("cpu")
    state = torch.get_rng_state()
    assert devices._trains_in("cpu", torch.bfloat16) and devices._trains_in("cpu", torch.float16)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(devices, "_has_float64", lambda device: True)
    monkeypatch.setattr(devices, "_trains_in", lambda device, dtype: dtype == torch.bfloat16)
    xpu = torch.device("xpu")
    assert devices.sum_dtype(xpu) == torch.float64 and devices.has_bf16(xpu)
    assert devices.autocast_dtype("bf16", xpu) == torch.bfloat16 and devices.autocast_dtype("fp16", xpu) is None
    monkeypatch.setattr(devices, "peak_allocated", lambda device: 1)
    assert devices.describe_replacements("auto", Parallel(precision="bf16"), xpu) == ""


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        prepare_model(torch.nn.Linear(1, 1), Parallel(precision="fp16"), World())


def test_training_and_evaluation_log_the_line(mps, monkeypatch, recipe, capsys):
    """The sums are float32 from the first update to the log line."""
    tiny = load_recipe(str(recipe), ["data.workers=0", "run.device=auto"])
    _, _, engine = build(tiny, World())
    engine.world = World(device=MPS)
    assert any(line.startswith("on mps ") for line in describe(engine))
    with start(tiny) as world:
        assert world.device == MPS
    assert capsys.readouterr().err.startswith("on mps ")
    meter = LossMeter(World())
    monkeypatch.setattr("tessel.train.run.loss_meter.sum_dtype", lambda device: torch.float32)
    meter.restore({"loss": 3.0}, 1)
    meter.add({"loss": torch.tensor(1.0)})
    assert meter.sums["loss"].dtype == torch.float32 and meter.means() == {"loss": 2.0}


def test_filter_without_fourier_transforms_is_the_same(monkeypatch):
    module, x = frequency.AdaptiveFrequencyFilter(16), torch.randn(2, 16, 7, 10, requires_grad=True)
    want = module(x)
    (gradient,) = torch.autograd.grad(want.square().sum(), x)
    monkeypatch.setattr(frequency, "has_fft", lambda device: False)
    got = module(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), x)[0], gradient)


def test_a_device_without_fourier_transforms_is_found_and_named(mps):
    frequency._transforms.cache_clear()
    with pytest.warns(UserWarning, match="mps has no Fourier transforms .* products of matrices take their place"):
        assert not frequency.has_fft("mps")
    assert frequency._transforms("cpu")
