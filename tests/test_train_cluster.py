"""On a cluster: how the SLURM script reacts to signals and exits, and torchrun's restart after a process is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trainer

from tessel.train.recipe.load import PACKAGED, load_recipe
from tessel.train.run.directory import RunDirectory

SCRIPT = PACKAGED / "slurm/train.sbatch"


@pytest.fixture
def cluster(tmp_path):
    """A folder with stubs of SLURM's commands; they write their calls to the file `calls`."""
    commands = {
        "srun": 'echo "srun $@" >> calls; exec bash -c "$STEP"',
        "scontrol": 'echo "scontrol $@" >> calls; echo node1',
        "scancel": 'echo "scancel $@" >> calls; touch told',
    }
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return tmp_path


def submit(cluster, step, *arguments):
    """Start the batch script with the stubs; `srun` then executes the shell code `step`."""
    environment = os.environ | {"PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", "STEP": step, "SLURM_JOB_ID": "7"}
    environment["HOME"] = str(cluster)
    command = ["bash", str(SCRIPT), "demo/digits.yaml", *arguments]
    return subprocess.Popen(command, cwd=cluster, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("out", ["out", "~/out"])
@pytest.mark.parametrize(("marker", "code", "requeued"), [("DONE", 0, False), ("PREEMPTED", 0, True), (None, 1, False)])
def test_run_markers_take_precedence_over_the_exit_code(cluster, marker, code, requeued, out):
    """The marker of an earlier start is ignored. The exit code of torchrun is 1 in every case."""
    (run := cluster / "out/first").mkdir(parents=True)
    (run / "PREEMPTED").touch()
    step = f"touch out/first/{marker}; exit 1" if marker else "exit 1"
    job = submit(cluster, step, "run.name=first", f"run.out={out}")
    _, error = job.communicate(timeout=30)
    calls = (cluster / "calls").read_text()
    assert job.returncode == code and ("scontrol requeue 7" in calls) == requeued
    assert ("the training failed" in error) == (code == 1)
    assert f"-m tessel.train demo/digits.yaml run.name=first run.out={out}" in calls


def test_signal_is_forwarded_and_the_script_waits_for_the_save(cluster):
    step = (
        "mkdir -p runs/digits; touch up; until [ -e told ]; do sleep 0.05; done; sleep 0.3; touch runs/digits/PREEMPTED"
    )
    job = submit(cluster, step)
    end = time.monotonic() + 20
    while not (cluster / "up").exists() and time.monotonic() < end:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    calls = (cluster / "calls").read_text()
    assert job.returncode == 0 and "scancel --signal=USR1 7.0" in calls and "scontrol requeue 7" in calls


def test_restart_renames_an_older_run_if_the_first_start_died_before(tmp_path):
    """And does not rename the run that the first start of its own job began."""
    recipe = load_recipe(trainer.write_recipe(tmp_path / "tiny.yaml", data={"source": "digits"}), ["run.fresh=true"])
    (run := tmp_path / "runs/tiny").mkdir(parents=True)
    (run / "of_an_older_run").touch()

    def opens(**options):
        with RunDirectory(recipe, **options).held() as directory:
            return directory.open()

    assert opens(restart=True, job="slurm 7") == tmp_path / "runs/tiny.old-1"
    assert opens(restart=True, job="slurm 7") is None
    assert opens(restart=True, job="slurm 8") == tmp_path / "runs/tiny.old-2"
    assert opens(restart=False, job="slurm 8") == tmp_path / "runs/tiny.old-3"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun_restart_after_a_killed_process_gives_the_same_result(tmp_path, strategy):
    """The second process is killed at step 4 of the first start; torchrun restarts both."""
    recipe = trainer.write_recipe(
        tmp_path / "tiny.yaml",
        model={"name": "test_resnet", "drop_path_rate": None},
        data={"source": "digits", "micro_batch": 4},
        parallel={"strategy": strategy},
    )
    done = trainer.run_processes(2, [recipe, "run.name=straight"])
    assert trainer.exit_codes(done) == [[0, 0]], done.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    trainer_script = str(Path(__file__).with_name("mortal.py"))
    done = subprocess.run(
        [*command, "--max-restarts", "1", trainer_script, "1:4", str(recipe), "run.fresh=true"],
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "at step 3 (exact)" in done.stdout
    paths = (tmp_path / f"runs/{name}/checkpoints/step-00000009" for name in ("straight", "tiny"))
    trainer.assert_same_checkpoint(*paths)
