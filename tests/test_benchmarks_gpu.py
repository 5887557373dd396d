"""The benchmarks of the kernels and the steps for a GPU, without one: dry runs, and their behavior on errors."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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
