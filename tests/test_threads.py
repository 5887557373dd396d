"""How threads wait: set before torch is loaded, unless the user has."""

import json
import os
import subprocess
import sys

import pytest
import trainer

from tessel.train.threads import SPINNING, describe_waiting, limit_spinning

CODE = "import json, os; from tessel.train.threads import limit_spinning; limit_spinning(); "


def start(then="", **variables):
    """(environment, what OpenMP says of its settings) of a process that limits spinning and then runs `then`."""
    clean = {name: value for name, value in os.environ.items() if name not in SPINNING}
    run = subprocess.run(
        [sys.executable, "-c", f"{CODE}{then}print(json.dumps(dict(os.environ)))"],
        capture_output=True,
        text=True,
        check=True,
        env=clean | {"OMP_DISPLAY_ENV": "verbose"} | variables,
    )
    return json.loads(run.stdout), run.stderr


def test_threads_sleep_soon():
    environment, said = start("import torch; ")
    assert environment["GOMP_SPINCOUNT"] == "1000" and "OMP_WAIT_POLICY" not in environment
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("torch does not use GNU OpenMP here")
    assert "GOMP_SPINCOUNT = '1000'" in said


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "active")])
def test_choice_of_the_user_stays(name, value):
    environment, _ = start(**{name: value})
    assert {key: environment[key] for key in SPINNING if key in environment} == {name: value}


def test_nothing_changes_once_torch_is_loaded(monkeypatch):
    for name in SPINNING:
        monkeypatch.delenv(name, raising=False)
    limit_spinning()
    assert not any(name in os.environ for name in SPINNING)
    assert describe_waiting() == "waiting as OpenMP does by default"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert describe_waiting() == "waiting by GOMP_SPINCOUNT=5"


def test_log_names_the_threads(tmp_path, capsys):
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", data={"source": "digits"}, sched={"steps": 1, "warmup": 0})
    assert trainer.train(recipe, "--dry-run") == 0
    assert "CPU threads: 1, waiting " in capsys.readouterr().out
