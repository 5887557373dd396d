"""The command `tessel`: its help is quick, its tables are right, and the trainer's commands get their arguments."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tessel
from tessel.checkpoints import load_manifest
from tessel.cli import application, main
from tessel.cli.output import print_rows

COMMANDS = [
    *(
        "list",
        "info",
        "predict",
        "explain",
        "compare",
        "probe",
        "export",
        "weights",
        "train",
        "evaluate",
        "report",
        "check",
        "kernels",
        "completion",
    )
]
OWN = ["list", "info", "predict", "explain", "compare", "export", "weights", "completion"]


def test_help_loads_neither_torch_nor_the_trainer():
    code = """
import sys
from tessel.cli import main
codes = [main(argv) for argv in (["--help"], ["list", "--help"], ["predict", "--help"], ["weights", "--help"])]
print(codes, {"torch", "timm", "numpy", "pydantic", "rich"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0] set()"


def test_python_m_tessel_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "tessel", "--version"], capture_output=True, text=True, check=True)
    assert tessel.__version__ in done.stdout


def test_help_lists_every_command_with_a_sentence(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.partition("Commands:")[2].splitlines()
    listed = {words[0]: " ".join(words[1:]) for line in lines if line.startswith("  ") and (words := line.split())}
    assert list(listed)[: len(COMMANDS)] == COMMANDS
    assert all(text.endswith(".") and "..." not in text for text in (listed[name] for name in COMMANDS))


@pytest.mark.parametrize("name", OWN)
def test_own_commands_explain_themselves(name, capsys):
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: tessel {name}")


@pytest.mark.parametrize("name", ["train", "evaluate", "report", "check"])
def test_the_commands_of_the_trainer_get_all_their_arguments(name, monkeypatch):
    given: list[list[str]] = []
    module = {"train": "__main__", "report": "report.__main__"}.get(name, name)
    monkeypatch.setattr(f"tessel.train.{module}.main", given.append)
    arguments = ["demo/digits", "optim.lr=1e-3", "--dry-run", "--help", "-x"]
    assert main([name, *arguments]) == 0
    assert given == [arguments]


@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
def test_the_lines_at_the_end_of_a_training_are_commands(task, tmp_path, capsys):
    kept = Path(__file__).with_name("artefacts") / "5fab7a6" / task
    name = yaml.safe_load((kept / "recipe.yaml").read_text())["run"]["name"]
    run = shutil.copytree(kept, tmp_path / "my runs" / name)
    assert main(["train", str(run / "recipe.yaml"), f"run.out={run.parent}"]) == 0
    lines = capsys.readouterr().out.partition(f"{run} is finished")[2].splitlines()
    typed = [shlex.split(line) for line in lines if line.startswith("  tessel ")]
    assert [words[1] for words in typed] == ["report", "evaluate", "predict"]
    assert all(words[2] == str(run) for words in typed)


def test_exit_code_and_error_of_a_trainer_command_are_its_own(capsys):
    assert main(["train", "no/such/recipe"]) == 1
    assert "there is no recipe 'no/such/recipe'" in capsys.readouterr().err


def test_wrong_arguments_end_with_2_and_a_hint(capsys):
    assert main(["lst"]) == 2
    assert "lst" in capsys.readouterr().err
    assert main(["list", "--columns", "model,colour"]) == 2
    assert "'colour' is no column; there are model, family" in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'mmseg'", name="mmseg.models")

    monkeypatch.setattr(application.tessel, "main", fail)
    requires = ["torch>=2", 'mmsegmentation==1.2.2; extra == "dense"', 'mmengine==0.10.7; extra == "dense"']

    class Metadata:
        def get_all(self, name):
            return requires

    monkeypatch.setattr(application, "metadata", lambda name: Metadata())
    assert main([]) == 1
    assert "mmseg.models is not installed; pip install 'tessel[dense]' installs it" in capsys.readouterr().err
    requires.pop(1)
    with pytest.raises(ModuleNotFoundError):
        main([])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "_TESSEL_COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, offered",
    [
        ("tessel pre", "predict"),
        ("tessel predict cswin_ti", "cswin_tiny.in1k"),
        ("tessel train demo/dig", "demo/digits"),
        ("tessel weights re", "reproduce"),
        ("tessel list --fam", "--family"),
    ],
)
def test_shells_are_offered_commands_models_and_recipes(words, offered):
    code = "import sys; from tessel.cli import main; sys.exit(main())"
    asked = {"_TESSEL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked})
    assert f"plain,{offered}" in done.stdout.splitlines()


def listed(capsys, *argv: str) -> list[dict]:
    assert main(["list", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_filters_and_columns(capsys):
    rows = listed(capsys, "cswin_*", "--columns", "model,family,top1,license,weights,input,paper")
    large = next(row for row in rows if row["model"] == "cswin_large")
    assert large == {
        "model": "cswin_large",
        "family": "CSWin Transformer",
        "top1": load_manifest()["cswin_large.in22k_ft_in1k"].published_top1,
        "license": "MIT",
        "weights": "in22k_ft_in1k, in22k",
        "input": 224,
        "paper": "https://arxiv.org/abs/2107.00652",
    }
    assert {row["model"] for row in rows} > {"cswin_atto", "cswin_base_384"}
    names = [row["model"] for row in listed(capsys, "--family", "litv2", "--columns", "model")]
    assert names == ["litv2_base", "litv2_base_384", "litv2_medium", "litv2_small"], "without the test model"


def test_list_by_weights_and_size(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TESSEL_HOME", str(tmp_path))
    with_weights = {row["model"] for row in listed(capsys, "--pretrained", "--columns", "model")}
    assert {"cswin_tiny", "tessel_davit_tiny"} <= with_weights
    assert not with_weights & {"biformer_small", "s2aformer_tiny", "affnet_tiny"}
    rows = listed(capsys, "affnet_*", "--max-params", "3", "--sort", "params", "--columns", "model,params")
    assert [row["model"] for row in rows] == ["affnet_atto", "affnet_extra_tiny", "affnet_tiny"]
    assert rows[1]["params"] == pytest.approx(1.4, abs=0.05)


def test_list_without_a_match_is_an_error(capsys):
    assert main(["list", "nothing*"]) == 1
    assert "nothing matches nothing*" in capsys.readouterr().err
    assert listed(capsys, "nothing*") == []


def test_list_of_recipes(capsys):
    rows = listed(capsys, "--recipes", "ade20k/cswin_tiny*")
    assert {row["recipe"] for row in rows} == {"ade20k/cswin_tiny_fpn", "ade20k/cswin_tiny_upernet"}
    assert {(row["task"], row["model"]) for row in rows} == {("segment", "cswin_tiny")}
    assert len(listed(capsys, "--recipes")) > 100


def test_info_of_a_model(capsys):
    assert main(["info", "cswin_tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == pytest.approx(22.3e6, rel=0.01)
    assert facts["multiply-adds"] == pytest.approx(4.3e9, rel=0.05)
    # the map after the stem, of 64 channels and 56 x 56 pixels, lies beside the four times wider one of the MLP
    assert facts["memory of one image"] >= 4 * 5 * 64 * 56 * 56
    assert facts["weights"][0]["name"] == "cswin_tiny.in1k" and facts["weights"][0]["license"] == "MIT"
    assert facts["table row"]["dims"] == [64, 128, 256, 512]
    assert main(["info", "cswin_large.in22k"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "CSWin Transformer: A General",
        "https://arxiv.org/abs/2107.00652",
        "cswin_large.in22k, ",
        "M",
        "MIT",
    ):
        assert words in printed


@pytest.mark.parametrize(
    "name, words",
    [("cswin_tny", "did you mean cswin_tiny"), ("cswin_tiny.in3k", "no weights 'in3k'; its tags are in1k")],
)
def test_info_of_an_unknown_model_is_an_error(name, words, capsys):
    assert main(["info", name]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "info biformer_smal",
        "list biformer_smal",
        "predict biformer_smal x.png",
        "export biformer_smal",
        "evaluate biformer_smal --data root=x",
        "train demo/digits model.name=biformer_smal run.name=unused",
        "weights fetch biformer_smal",
        "weights import biformer_smal README.md",
        "weights reproduce biformer_smal --data x",
        "weights push biformer_smal owner/name --dry-run",
    ],
)
def test_every_command_names_the_models_nearest_to_a_wrong_name(command, monkeypatch, capsys):
    monkeypatch.chdir(Path(tessel.__file__).parent)
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert "did you mean" in error and "biformer_small" in error and error.count("\n") == 1


def test_list_offers_the_nearest_recipes(capsys):
    assert main(["list", "--recipes", "demo/digts"]) == 1
    assert "did you mean demo/digits" in capsys.readouterr().err


def test_tables_in_a_pipe_keep_long_lines_and_markup(capsys):
    print_rows([{"a": "x" * 300, "b": None}, {"a": "[bold]", "b": 1.5}], ["a", "b"])
    lines = capsys.readouterr().out.splitlines()
    assert any("x" * 300 in line for line in lines) and any("[bold]" in line and "1.50" in line for line in lines)
