"""The benchmark scripts of models, data and trainer: dry runs from end to end, and their behavior on errors."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch

import tessel.zoo

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of the folder by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.slow
def test_dry_run_of_the_loader(tmp_path):
    pytest.importorskip("torchcodec")
    command = [sys.executable, str(BENCHMARKS / "loader.py"), "--dry-run", "--out", str(tmp_path / "found.json")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["dry_run"] and {"device", "torch", "commit", "load_average_before", "workers"} <= found.keys()
    assert list(found["loaders"]) == ["timm", "pil", "torchcodec"] and 25 < found["kilobytes_a_picture"] < 60
    for row in found["loaders"].values():
        assert row["images_per_second"] == [row["median"]] == [row["best"]] and row["cpu_ms_an_image"] > 0
    assert found["goals"].keys() == {"pil", "torchcodec"}


@pytest.mark.large
def test_dry_run_of_the_threads(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "threads.py"), "--dry-run", "--out", str(tmp_path / "found.json")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["other_processes"] == {"idle": 0, "busy": found["cores"]}
    for case in ("idle", "busy"):
        assert list(found["images_per_second"][case]) == ["trainer", "default", "one thread", "passive"]
        assert all(rate > 0 for rate in found["images_per_second"][case].values())


@pytest.mark.slow
def test_dry_run_of_the_trainer(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "trainer.py"), "--dry-run", "--out", str(tmp_path / "found.json")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["dry_run"] and {"device", "torch", "commit", "load_average", "model"} <= found.keys()
    assert found["overhead"]["ours_ms_a_step"] > 0 < found["overhead"]["bare_ms_a_step"]
    costs = {f"{way}_{cost}_percent" for way in ("background", "foreground") for cost in ("saving", "stall")}
    assert costs <= found["saving"].keys()
    assert all(size > 50 for size in found["memory"]["resident_mib"].values())
    parts = found["startup_seconds"]
    assert list(parts) == ["imports", "data", "model", "first_step", "total"]
    assert sum(list(parts.values())[:-1]) == pytest.approx(parts["total"], abs=0.01)
    assert set(found["goals"]) == {
        "overhead_percent",
        "memory_growth_percent",
        "background_stall_percent",
        "background_saving_percent",
    }


@pytest.fixture
def script(benchmark, monkeypatch):
    """Run a benchmark script in this process, including the runs for which it would start new processes."""

    def run(name: str, *arguments: str, returning: bool = True) -> str:
        module = benchmark(Path(name).stem)
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sys, "argv", [name, *arguments])
            if hasattr(module, "in_own_process"):
                patch.setattr(module, "in_own_process", run)
            module.main()
        return printed.getvalue()

    return run


FACTS = {"device", "threads", "python", "torch", "timm", "commit"}


def test_models_dry_run(script, tmp_path):
    small = ("--size", "64", "--batch", "1,2", "--seconds", "0", "--train", "--out", str(tmp_path / "models"))
    variants = ("--variants", "eager", "bf16")
    script("models.py", "--models", "biformer_atto", "--peers", "convnext_atto", *small, *variants)
    found = json.loads((tmp_path / "models.json").read_text())
    assert found.keys() >= FACTS and list(found["groups"]) == ["biformer_atto"]
    rows = found["groups"]["biformer_atto"]
    assert [(row["model"], row["batch"], row["setting"]) for row in rows] == [
        (model, batch, setting)
        for batch in (1, 2)
        for setting in ("inference, eager", "inference, bf16", "training, eager", "training, bf16")
        for model in ("biformer_atto", "convnext_atto")
    ]
    assert all(row["ratio"] == 1 for row in rows if row["model"] == "biformer_atto")
    assert all(row["to_eager"] == 1 for row in rows if row["setting"].endswith("eager"))
    assert all(row["images_per_second"] > 0 and row["ratio"] > 0 and row["to_eager"] > 0 for row in rows)
    assert all(row["peak_mib"] >= 0 for row in rows)
    convnext = rows[1]
    assert convnext["parameters"] == 3.7 and convnext["gmacs"] == pytest.approx(0.55 * (64 / 224) ** 2, abs=0.01)
    assert "| **biformer_atto** |" in (tmp_path / "models.md").read_text()
    assert (tmp_path / "models.png").stat().st_size > 1000
    script("models.py", "--models", "biformer_atto", "--peers", *small, *variants, "--resume")
    assert json.loads((tmp_path / "models.json").read_text()) == found, "everything was measured already"


def test_models_clock_and_variants_of_the_peers(script, tmp_path):
    small = ("--size", "64", "--batch", "1", "--seconds", "0", "--out", str(tmp_path / "models"))
    names = ("--models", "biformer_atto", "--peers", "convnext_atto")
    script("models.py", *names, *small, "--variants", "eager", "bf16", "--peer-variants", "eager", "--clock", "cpu")
    found = json.loads((tmp_path / "models.json").read_text())
    assert found["clock"] == "cpu"
    assert [(row["model"], row["setting"]) for row in found["groups"]["biformer_atto"]] == [
        ("biformer_atto", "inference, eager"),
        ("convnext_atto", "inference, eager"),
        ("biformer_atto", "inference, bf16"),
    ]


def test_models_of_the_sets_exist(benchmark):
    models, families = benchmark("models"), tessel.zoo.list_families()
    small = models.small_models()
    assert [name in family.variants for name, family in zip(small, families, strict=True)] == [True] * len(families)
    assert "biformer_tiny" in small and "litv2_small" in small and not any(name.endswith("_atto") for name in small)
    names = {name for host, peers in models.HOSTS.items() for name in (host, *peers)}
    assert all(timm.is_model(name.partition(" with ")[0]) for name in names)


def test_hosts_with_other_mixers(benchmark):
    models = benchmark("models")
    with torch.device("meta"):
        model = models.build("agent_pvt_tiny with full_attention", 224)
    kinds = [type(module).__name__ for module in model.modules()]
    assert (kinds.count("FullAttention"), kinds.count("Agent")) == (8, 0)
    heads = [module.num_heads for module in model.modules() if hasattr(module, "num_heads")]
    assert heads == [1, 1, 2, 2, 5, 5, 8, 8]


def test_models_rejects_unknown_models_and_batch_sizes(script, capsys):
    for arguments, message in {
        ("--models", "biformer_huge"): "biformer_huge is not a registered model",
        ("--batch", "1;2"): "--batch 1;2 must be whole numbers with commas",
        ("--variants", "fast"): "--variants 'fast' is unknown with --device cpu; it has eager, bf16, compiled",
        ("--peer-variants", "fast"): "--peer-variants 'fast' is unknown with --device cpu",
    }.items():
        with pytest.raises(SystemExit):
            script("models.py", *arguments)
        assert message in capsys.readouterr().err


def test_scaling_dry_run(benchmark, script, monkeypatch, tmp_path):
    scaling = benchmark("scaling")
    monkeypatch.setattr(scaling, "SIDES", (8, 12, 16))
    monkeypatch.setattr(scaling, "default_models", lambda: ["biformer_atto"])
    small = ("--mixers", "FullAttention", "HiLo", "--seconds", "0", "--out", str(tmp_path / "scaling"))
    script("scaling.py", *small)
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert found.keys() >= FACTS and found["threads"] == 1
    assert list(found["mixers"]) == ["HiLo", "FullAttention"], "the order of MIXERS"
    for rows in found["mixers"].values():
        assert [row["side"] for row in rows] == [8, 12, 16]
        assert all(0 < row["ms"] <= row["median_ms"] and row["mib"] >= 0 for row in rows)
    assert [row["mflops"] for row in found["mixers"]["FullAttention"]] == [
        2 * (4 * 64 * 64 * n + 2 * 64 * n**2) / 1e6 for n in (64, 144, 256)
    ]
    assert found["families_at_512_mib"].keys() == {"biformer_atto"}
    text = (tmp_path / "scaling.md").read_text()
    assert "| FullAttention | N^2 |" in text and "| biformer_atto |" in text
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_exponent(benchmark):
    scaling = benchmark("scaling")
    rows = [{"side": side, "ms": (side**2) ** 1.5} for side in (8, 16, 32)]
    assert scaling.exponent(rows, "ms") == pytest.approx(1.5)
    peaks = [{"side": side, "mib": mib} for side, mib in ((8, 0.0), (16, 2.0), (32, 8.0))]
    assert scaling.exponent(peaks, "mib") == pytest.approx(1)


def test_scaling_fails_where_linear_is_not(benchmark, script, monkeypatch, tmp_path):
    scaling = benchmark("scaling")
    monkeypatch.setattr(scaling, "SIDES", (8, 16))
    monkeypatch.setattr(scaling, "measure", lambda *_: [{"side": n, "ms": n**exponent} for n in (8, 16)])
    monkeypatch.setattr(scaling, "memory", lambda *_: [1.0, 1.0])
    arguments = ("--mixers", "InLine", "FullAttention", "--families", "--out", str(tmp_path / "scaling"))
    exponent = 3
    with pytest.raises(SystemExit, match=r"exponents of time exceed 1\.1: \{'InLine': 1\.5\}"):
        script("scaling.py", *arguments)
    exponent = 2
    monkeypatch.setattr(scaling, "mflops", lambda *_: [1.0, 16.0])
    with pytest.raises(SystemExit, match=r"exponents of FLOPs exceed 1\.1: \{'InLine': 2\.0\}"):
        script("scaling.py", *arguments)


def test_scaling_has_every_mixer(benchmark):
    with torch.device("meta"):
        measured = {type(make()) for make, _ in benchmark("scaling").MIXERS.values()}
    assert measured == {mixer.kind for mixer in tessel.blocks.MIXERS.values()}


@pytest.mark.parametrize("name", ["N", "N log N"])
def test_flops_of_linear_mixers_grow_as_the_tokens(benchmark, name):
    scaling = benchmark("scaling")
    linear = [mixer for mixer, (_, cost) in scaling.MIXERS.items() if cost == name]
    for mixer in linear:
        rows = [{"side": n, "mflops": count} for n, count in zip(scaling.SIDES, scaling.mflops(mixer), strict=True)]
        assert scaling.exponent(rows, "mflops") <= 1.1, mixer


def test_hilo_dry_run(script, tmp_path):
    printed = script("hilo.py", "--batch", "1,2", "--seconds", "0", "--out", str(tmp_path / "hilo.json"))
    found = json.loads((tmp_path / "hilo.json").read_text())
    assert found.keys() >= FACTS and (found["dim"], found["heads"], found["side"]) == (384, 12, 14)
    names = ["HiLo", "spatial reduction (timm)", "7x7 windows (timm)", "7x7 windows (ours)"]
    assert [(row["batch"], row["mixer"]) for row in found["rows"]] == [(b, name) for b in (1, 2) for name in names]
    assert all(row["ms"] > 0 and row["hilo_faster_by"] > 0 for row in found["rows"])
    assert all(row["hilo_faster_by"] == 1 for row in found["rows"] if row["mixer"] == "HiLo")
    assert printed.count("HiLo") == 3


def test_dense_dry_run(script, tmp_path):
    pytest.importorskip("mmseg")
    dry = ("--dry-run", "--seconds", "0", "--rounds", "1", "--out", str(tmp_path / "dense"))
    script("dense.py", *dry)
    found = json.loads((tmp_path / "dense.json").read_text())
    assert found.keys() >= FACTS and found["dry_run"]
    rows = found["rows"]
    assert [(row["task"], row["pass"], row["model"]) for row in rows] == [
        (task, direction, model)
        for task in ("upernet", "mask_rcnn")
        for direction in ("inference", "training")
        for model in ("biformer_atto", "convnext_atto")
    ]
    assert {(row["task"], row["height"], row["width"]) for row in rows} == {("upernet", 64, 64), ("mask_rcnn", 64, 96)}
    assert all(row["ratio"] == 1 for row in rows if row["model"] == "convnext_atto")
    assert all(row["images_per_second"] > 0 and row["peak_mib"] > 50 for row in rows)
    biformer, convnext = rows[:2]
    assert convnext["parameters"] - biformer["parameters"] == pytest.approx(2.9, abs=0.5), "the backbones differ"
    assert convnext["gmacs"] > biformer["gmacs"] > 0
    assert (tmp_path / "dense.md").read_text().count("| mask_rcnn |") == 4

    script("dense.py", *dry, "--add", "--tasks", "upernet", "--passes", "inference", "--models", "cswin_atto")
    added = json.loads((tmp_path / "dense.json").read_text())["rows"]
    assert added[:6] == rows[2:] and [row["model"] for row in added[6:]] == ["cswin_atto", "convnext_atto"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mask2former", "pem", "freqfusion", "rtdetrv2", "d_fine", "deformable_detr", "fcos"])
def test_dense_heads_dry_run(task, script, tmp_path):
    pytest.importorskip("mmseg")
    dry = ("--dry-run", "--seconds", "0", "--rounds", "1", "--out", str(tmp_path / "heads"), "--clock", "cpu")
    model = ("--models", "convnext_atto", "--peers", "convnext_atto")
    script("dense.py", *dry, "--heads", "--tasks", task, "--batch", "2", *model)
    found = json.loads((tmp_path / "heads.json").read_text())
    used, trained = found["rows"]
    assert found["clock"] == "cpu" and (used["pass"], trained["pass"]) == ("inference", "training")
    assert used["loss_share"] is None and used["gmacs"] > 0 and trained["peak_mib"] > 50
    assert trained["loss_share"] is None if task in ("freqfusion", "fcos") else 0 < trained["loss_share"] < 1


def test_peak_is_the_highest_level_within_the_run(benchmark, monkeypatch):
    measurement = benchmark("measurement")
    level, seen = 40, threading.Event()

    def resident() -> int:
        if level == 100:
            seen.set()
        return level

    def run() -> None:
        nonlocal level
        level = 100
        assert seen.wait(60)
        level = 50

    monkeypatch.setattr(measurement, "resident", resident)
    assert measurement.peak_of(run) == 60


def test_measurement(benchmark, tmp_path):
    measurement = benchmark("measurement")
    assert measurement.ratio({"a": [1.0, 2.0, 4.0], "b": [2.0, 6.0, 40.0]}, "a", "b") == 3
    calls = []
    times = measurement.side_by_side({n: lambda n=n: calls.append(n) for n in "ab"}, seconds=0, least=2)
    assert calls == list("ababab") and [len(seconds) for seconds in times.values()] == [2, 2]
    (tmp_path / "good.py").write_text("import os, sys; print(sys.argv[1], os.environ['MALLOC_TRIM_THRESHOLD_'])")
    assert measurement.in_own_process(str(tmp_path / "good.py"), "x") == "x 65536\n"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
    with pytest.raises(SystemExit, match="KeyError"):
        measurement.in_own_process(str(tmp_path / "good.py"), "x", returning=False)
    (tmp_path / "bad.py").write_text("raise ValueError('out of paper')")
    with pytest.raises(SystemExit, match="(?s)bad.py failed.*out of paper"):
        measurement.in_own_process(str(tmp_path / "bad.py"))


@pytest.mark.slow
def test_transnext_dispatches_less_than_four_times_swin(benchmark):
    count = benchmark("dispatch_count").count
    for ours, swin in zip(count("transnext_micro", 128), count("swin_tiny_patch4_window7_224", 128), strict=True):
        assert ours < 4 * swin
