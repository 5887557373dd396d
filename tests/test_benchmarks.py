"""The benchmark scripts without a GPU: dry runs from end to end, and their behavior on errors."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import timm
import torch

import tessel.zoo

OPERATORS = ("routed", "window", "halo", "aggregated", "neighborhood")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of the folder by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def verification(name):
    """A module of tessel.kernels.verification, which needs Triton."""
    pytest.importorskip("triton")
    return importlib.import_module(f"tessel.kernels.verification.{name}")


@pytest.mark.slow
def test_dry_run(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--dry-run", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "# Kernels and their baselines" in run.stdout
    found = json.loads((tmp_path / "kernels_dry_run.json").read_text())
    assert found["dry_run"] and {"device", "torch", "triton", "commit"} <= found["facts"].keys()
    assert all(check["passed"] for check in found["checks"]), [check["reasons"] for check in found["checks"]]
    assert {(check["operator"], check["dtype"]) for check in found["checks"]} == {
        (operator, dtype) for operator in OPERATORS for dtype in ("float64", "float32", "bfloat16")
    }
    assert not any(key.endswith(("_us", "_percent", "_mib")) for row in found["rows"] for key in row)
    ran = {(row["operator"], row["implementation"], row["direction"]) for row in found["rows"] if "reason" not in row}
    assert ran >= {
        (operator, implementation, direction)
        for operator in OPERATORS
        for implementation in ("triton", "eager", "compiled")
        for direction in ("forward", "forward+backward")
    }
    assert ("routed", "masked SDPA", "forward+backward") in ran
    assert {("window", "FlexAttention", "forward"), ("halo", "FlexAttention", "forward")} <= ran
    assert all(row["least_bytes"] > 0 and row["flop"] > 0 for row in found["rows"])


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


GPU_STEPS = ["correctness", "verify", "kernels", "models", "trainer", "processes"]


@pytest.mark.large
def test_dry_run_of_all_that_wants_a_gpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("step_*.json")]
    assert {record["step"].split()[0] for record in records} == set(GPU_STEPS)
    assert {record["status"] for record in records} == {"done"}
    assert {"kernels_dry_run.json", "trainer.json", "models_biformer_atto.json"} <= {p.name for p in tmp_path.iterdir()}
    assert "| biformer_atto | training, bf16 |" in (tmp_path / "summary.md").read_text()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("done before") == len(GPU_STEPS)


def test_steps_for_a_gpu_fit_into_25_minutes_and_need_one(benchmark, monkeypatch, capsys, tmp_path):
    gpu = benchmark("gpu")
    steps = gpu.steps(tmp_path)
    assert list(dict.fromkeys(step.name.split()[0] for step in steps)) == GPU_STEPS
    assert list(dict.fromkeys(step.name.split()[0] for step in gpu.miniature_steps(tmp_path))) == GPU_STEPS
    assert sum(step.seconds for step in steps) <= gpu.LIMIT == 25 * 60
    for step in steps:
        assert all((BENCHMARKS.parent / word).exists() for word in step.command if word.endswith(".py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith("this torch sees no GPU; --dry-run needs none")


def test_steps_are_run_in_order_and_go_on_after_a_kill(benchmark, monkeypatch, tmp_path):
    gpu, where = benchmark("gpu"), {"device": "a GPU", "commit": "abc"}
    monkeypatch.setattr(gpu, "GRACE", 1)
    out, log = tmp_path / "out", tmp_path / "log"

    def step(name, code="", seconds=20.0):
        start = f"import os, signal, time; open({str(log)!r}, 'a').write('{name} ')"
        return gpu.Step(name, seconds, (sys.executable, "-S", "-c", f"{start}; {code}"))

    def status():
        return {record["step"]: record["status"] for record in map(gpu.read, out.glob("step_*.json"))}

    def run(*, fresh=False, limit=60.0, facts=where, third="os.kill(os.getppid(), signal.SIGTERM); time.sleep(20)"):
        log.write_text("")
        steps = [step("one"), step("two fails", "raise SystemExit(3)"), step("three", third), step("four")]
        steps[3:3] = [step("slow", "time.sleep(60)", 1)]
        good = gpu.run(steps, out, facts, limit=limit, fresh=fresh)
        return good, log.read_text().split()

    # killed in the third step
    child = os.fork()
    if not child:
        with contextlib.redirect_stdout(io.StringIO()):
            run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -15
    assert status() == {"one": "done", "two fails": "failed"}
    # what is done is not run again, what failed is; a step that takes too long does not stop the others
    assert run(third="") == (False, ["two", "fails", "three", "slow", "four"])
    assert status() == {"one": "done", "two fails": "failed", "three": "done", "slow": "out of time", "four": "done"}
    record = gpu.read(out / "step_two_fails.json")
    assert record.keys() == {"step", "status", "seconds", "exit_code", *where} and record["exit_code"] == 3
    assert "| slow | out of time |" in (out / "summary.md").read_text()
    # a damaged record, another commit, and what the user asks for are run again; without time nothing is
    (out / "step_one.json").write_text("{")
    assert run(third="")[1] == ["one", "two", "fails", "slow"]
    assert run(third="", facts=where | {"commit": "def"})[1][:4] == ["one", "two", "fails", "three"]
    assert run(third="", fresh=True)[1][:4] == ["one", "two", "fails", "three"]
    assert run(third="", fresh=True, limit=0) == (False, []) and status()["one"] == "done"


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


def test_missing_gpu_and_unknown_case_are_errors(benchmark, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    with pytest.raises(SystemExit):
        benchmark("kernels").parse()
    assert "sees no GPU; --dry-run needs none" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--operator", "halo", "--case", "h1"])
    with pytest.raises(SystemExit):
        benchmark("kernels").parse()
    assert "--case h1 is not a case of halo" in capsys.readouterr().err


def passing(y):
    return y


FAILING = {
    "wrong by a hundredth": lambda y: y * 1.01,
    "not a number": lambda y: y * torch.nan,
    "never the same": lambda y: y * (1 + 1e-2 * torch.rand(())),
}


@pytest.mark.parametrize("change", [passing, *FAILING.values()], ids=["right", *FAILING])
def test_correctness_check(monkeypatch, change):
    correctness, problems = verification("correctness"), verification("problems")

    class Kind(problems.Routed):
        def triton(self, *tensors):
            return change(self.eager(*tensors))

    limit = 2e-2 if change is FAILING["never the same"] else 5e-3
    monkeypatch.setitem(correctness.MAX_ERROR_INTERPRETED, torch.bfloat16, limit)
    dtype = torch.float64 if change is FAILING["not a number"] else torch.bfloat16
    record = correctness.check_correctness(Kind, (2, (4, 4), (2, 2), 1, 8, 2), dtype, "cpu")
    assert record["passed"] is (change is passing)


def test_correctness_check_of_a_kernel_that_does_not_run():
    problems = verification("problems")

    class Kind(problems.Routed):
        def triton(self, *tensors):
            raise RuntimeError("invalid argument\nwith a second line")

    record = verification("correctness").check_correctness(Kind, (1, (4, 4), (2, 2), 1, 8, 2), torch.float64, "cpu")
    assert not record["passed"] and record["reasons"] == ["RuntimeError: invalid argument"]


def test_error_limits():
    limit = verification("correctness").error_limit
    assert limit(4e-3, torch.bfloat16, "cuda") == pytest.approx(6e-3)
    assert limit(9e-3, torch.bfloat16, "cuda") == 1e-2, "the cap"
    assert limit(1e-5, torch.bfloat16, "cuda") == pytest.approx(1.5 * 2**-8), "one rounding of an operand"
    assert limit(1.0, torch.float16, "cuda") == 2e-3


CHILD = """
import json, sys, time

def emit(**record):
    print("@" + json.dumps(record), flush=True)

for job in sys.argv[1:]:
    emit(start=job.split("/"))
    if job == "op/dies":
        sys.exit("illegal memory access")
    if job == "op/hangs":
        time.sleep(60)
    emit(row=job)
    emit(done=job.split("/"))
"""


def run_isolated(names, *, seconds):
    records = []
    lost = verification("isolated_runner").run_isolated(
        [sys.executable, "-c", CHILD],
        [("op", name) for name in names],
        environment=dict(os.environ),
        until=time.time() + seconds,
        grace=0,
        on_record=lambda record: records.append(record["row"]) if "row" in record else None,
    )
    return records, lost


def test_continues_after_a_job_that_crashes():
    records, lost = run_isolated(["first", "dies", "last"], seconds=60)
    assert records == ["op/first", "op/last"]
    assert lost == {("op", "dies"): "its process died: illegal memory access"}


def test_ends_on_time():
    records, lost = run_isolated(["first", "hangs", "last"], seconds=4)
    assert records == ["op/first"]
    assert lost == {("op", "hangs"): "no time was left", ("op", "last"): "no time was left"}


def test_child_process_that_does_not_start_is_reported():
    with pytest.raises(SystemExit, match="did not start.*No module named 'nothing'"):
        verification("isolated_runner").run_isolated(
            [sys.executable, "-c", "import nothing"],
            [("op", "a")],
            environment=dict(os.environ),
            until=time.time() + 60,
            grace=0,
            on_record=print,
        )


def rows(case, **medians):
    at = {"operator": "halo", "case": case, "direction": "forward+backward", "floor_us": 10.0}
    return [{**at, "implementation": name, "median_us": median} for name, median in medians.items()]


def test_report(benchmark):
    report = benchmark("kernels_report")
    goal = report.Goal("halo", "-256$", "forward+backward", "eager", 3.0)
    fast, slow = rows("a-256", triton=20.0, eager=80.0), rows("b-256", triton=20.0, eager=40.0, FlexAttention=15.0)
    unknown = [
        {k: v for k, v in row.items() if k != "median_us"} | {"reason": "died"} for row in rows("c-256", triton=1.0)
    ]
    assert "met (worst 4.00x at a-256; 1 of 1 cases)" in report.goal_status(goal, report.Times(fast))
    assert "not met (worst 2.00x at b-256; 2 of 2 cases)" in report.goal_status(goal, report.Times(fast + slow))
    assert "met where measured (worst 4.00x at a-256; 1 of 2" in report.goal_status(goal, report.Times(fast + unknown))
    assert report.goal_status(goal, report.Times([])).endswith("not measured")
    bytes_goal = goal._replace(against="floor", factor=1.7)
    assert "not met (worst 2.00x at a-256" in report.goal_status(bytes_goal, report.Times(fast))
    assert report.lost_cases(report.Times(fast + slow + unknown)) == [
        "halo, b-256, forward+backward: FlexAttention takes 15.0 us, ours 20.0 us"
    ]


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
