"""The manifest of published weights, and the commands of `python -m tessel.checkpoints`."""

import hashlib
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

import tessel.zoo  # noqa: F401  (registers the models)
from tessel.checkpoints import __main__ as cli
from tessel.checkpoints import fetch_weight, find_weight, load_dense_manifest, load_manifest, manifest, read_state

PAYLOAD = bytes(range(256)) * 16
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()


def message(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("weight", load_manifest().values(), ids=lambda weight: weight.name)
def test_rows_of_the_manifest_are_valid(weight):
    assert f"{weight.model}.{weight.tag}" == weight.name
    assert "in1k" in weight.tag or "in22k" in weight.tag
    assert weight.url.startswith("https://") if weight.url else weight.why_no_url
    assert weight.source.startswith("https://")
    # NOASSERTION is SPDX's word for weights that come without a license
    assert weight.license in {"MIT", "Apache-2.0"} or (weight.license == "NOASSERTION" and not weight.url)
    assert weight.interpolation in {"bicubic", "bilinear"}
    assert weight.crop_mode in {"center", "squash"}
    assert weight.published_top1 is not None or weight.note
    assert weight.input_size[0] == 3


def test_no_two_rows_share_a_file():
    urls = [weight.url for weight in load_manifest().values() if weight.url]
    assert len(urls) == len(set(urls))


def test_released_biformers_are_listed():
    for name, top1 in {"biformer_tiny": 81.4, "biformer_small": 83.8, "biformer_base": 84.3}.items():
        weight = load_manifest()[f"{name}.in1k"]
        assert (weight.published_top1, weight.state_key, weight.crop_pct) == (top1, "model", 0.875)


def test_model_options_of_a_row_reach_the_model():
    for tag, alpha in {"alpha00_in1k": 0.0, "alpha05_in1k": 0.5, "in1k": 0.9}.items():
        mixer = timm.create_model(f"litv2_small.{tag}").stages[2].blocks[0].mixer.fn
        assert mixer.low_heads == int(12 * alpha)
    assert timm.create_model("litv2_small.alpha05_in1k", alpha=1.0).stages[2].blocks[0].mixer.fn.high_heads == 0


def test_callers_cannot_change_the_manifest():
    load_manifest().clear()
    assert load_manifest()


ROW = {
    "url": '"https://example.org/a.pth"',
    "sha256": f'"{DIGEST}"',
    "size": f"{len(PAYLOAD)}",
    "license": '"MIT"',
    "source": '"https://example.org"',
    "published_top1": "81.5",
    "input_size": "[3, 224, 224]",
    "crop_pct": "0.875",
    "interpolation": '"bicubic"',
    "num_classes": "1000",
    "state_key": '"model"',
}


def write_manifest(path: Path, *, name: str = "some_tiny.in1k", **changes: str | None) -> Path:
    fields = {key: value for key, value in {**ROW, **changes}.items() if value is not None}
    path.write_text("\n".join([f'["{name}"]', *(f"{key} = {value}" for key, value in fields.items())]))
    return path


@pytest.fixture
def own_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MANIFEST", write_manifest(tmp_path / "manifest.toml"))


def test_load_manifest(tmp_path):
    (weight,) = load_manifest(write_manifest(tmp_path / "m.toml", reproduced_top1="81.4")).values()
    assert (weight.name, weight.model, weight.tag) == ("some_tiny.in1k", "some_tiny", "in1k")
    assert (weight.published_top1, weight.reproduced_top1, weight.size) == (81.5, 81.4, len(PAYLOAD))
    assert weight.input_size == (3, 224, 224)
    assert weight.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"colour": '"red"'}, ["unknown field 'colour'", "crop_pct"]),
        ({"license": None}, ["'license' is missing"]),
        ({"size": '"12"'}, ["'size' = '12'", "int"]),
        ({"size": "true"}, ["'size' = True", "int"]),
        ({"size": "-1"}, ["'size' = -1"]),
        ({"crop_pct": "1"}, ["'crop_pct' = 1 ", "float"]),
        ({"crop_pct": "87.5"}, ["'crop_pct' = 87.5"]),
        ({"published_top1": '""'}, ["'published_top1'", "float"]),
        ({"published_top1": "815.0"}, ["'published_top1' = 815.0"]),
        ({"input_size": "[3, 224]"}, ["'input_size'"]),
        ({"mean": "[0, 0, 0]"}, ["'mean'", "float"]),
        ({"num_classes": "0"}, ["'num_classes' = 0"]),
        ({"sha256": '"12ab"'}, ["'sha256' = '12ab'"]),
        ({"url": '"http://example.org/a.pth"'}, ["'url'", "https"]),
        ({"url": '""'}, ["'why_no_url'"]),
        ({"why_no_url": '"gone"'}, ["'why_no_url'"]),
        ({"source": '""'}, ["'source'"]),
        ({"name": "some_tiny"}, ["model.tag"]),
    ],
)
def test_manifest_errors_name_row_and_field(tmp_path, changes, words):
    path = write_manifest(tmp_path / "m.toml", **changes)
    with pytest.raises(ValueError) as caught:
        load_manifest(path)
    for word in [str(path), changes.get("name", "some_tiny.in1k"), *words]:
        assert word in message(caught)


@pytest.mark.parametrize("text", ["[a", "version = 1"])
def test_manifest_without_rows_is_an_error(tmp_path, text):
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_manifest(path)
    assert str(path) in message(caught)


def test_find_weight():
    assert find_weight("biformer_small.in1k").name == "biformer_small.in1k"
    assert find_weight("cswin_large").name == "cswin_large.in22k_ft_in1k"
    with pytest.raises(ValueError, match="did you mean biformer_small.in1k"):
        find_weight("biformer_smal.in1k")
    with pytest.raises(ValueError, match="list"):
        find_weight("?")


def test_fetch_weight_without_url_says_why():
    weight = find_weight("biformer_small.in1k")
    with pytest.raises(ValueError) as caught:
        fetch_weight(weight)
    for word in (weight.name, weight.why_no_url, weight.source, "pretrained_cfg_overlay=dict(file="):
        assert word in message(caught)


# command line


def run(capsys, *argv: str, fails: bool = False) -> str:
    """Run the command. Returns its output, or with `fails` its error, which must be a single line on stderr."""
    status = cli.main(argv)
    printed = capsys.readouterr()
    assert status == (1 if fails else 0)
    if not fails:
        assert not printed.err
        return printed.out
    assert not printed.out
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_list_command(capsys):
    lines = run(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines] == ["name", *load_manifest(), *load_dense_manifest()]
    lines = run(capsys, "list", "biformer_sm*").splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:7] == ["biformer_small.in1k", "-", "MIT", "top-1", "83.80", "-", "no:"]
    assert "published only as a share link" in lines[1]
    assert "'nothing*'" in run(capsys, "list", "nothing*", fails=True)


def test_list_command_shows_size_and_accuracy(own_manifest, capsys):
    row = ["some_tiny.in1k", "0.0", "MB", "MIT", "top-1", "81.50", "-", "yes"]
    assert run(capsys, "list").splitlines()[1].split() == row


def test_fetch_command(own_manifest, tmp_path, capsys, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(PAYLOAD)
    monkeypatch.setattr(cli, "find_weight", {"some_tiny": replace(find_weight("some_tiny"), url=str(path))}.get)
    printed = run(capsys, "fetch", "some_tiny", "--cache-dir", str(tmp_path / "cache"))
    for word in (str(path), DIGEST, str(len(PAYLOAD)), "some_tiny.in1k"):
        assert word in printed


def test_fetch_command_errors(capsys):
    assert "no longer answers" in run(capsys, "fetch", "biformer_small", fails=True)
    assert "did you mean" in run(capsys, "fetch", "biformer_smal", fails=True)


def test_verify_command(own_manifest, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(PAYLOAD)
    for argv in (["verify", str(path)], ["verify", str(path), "--name", "some_tiny.in1k"]):
        printed = run(capsys, *argv)
        for word in (DIGEST, str(len(PAYLOAD)), "some_tiny.in1k"):
            assert word in printed
    path.write_bytes(PAYLOAD[1:])
    assert "no weights in the manifest" in run(capsys, "verify", str(path))
    assert cli.main(["verify", str(path), "--name", "some_tiny"]) == 1
    assert "refused" in capsys.readouterr().err
    assert "nothing.pth" in run(capsys, "verify", str(tmp_path / "nothing.pth"), fails=True)


def test_verify_command_of_a_row_without_hash(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(PAYLOAD)
    printed = run(capsys, "verify", str(path), "--name", "biformer_small")
    assert "not in the manifest yet" in printed and "no sha256 to compare it with" in printed and "unusable" in printed


@pytest.fixture
def zoo(monkeypatch):
    """A stub of `tessel.zoo` whose published key `A` is our key `a`."""

    def renamed(name, state, old, new):
        if name != "cswin_tiny":
            raise ValueError(f"unknown model {name!r}")
        return {key.replace(old, new): tensor for key, tensor in state.items()}

    stub = types.ModuleType("tessel.zoo")
    stub.__dict__["from_published"] = lambda name, state: renamed(name, state, "A", "a")
    stub.__dict__["to_published"] = lambda name, state: renamed(name, state, "a", "A")
    monkeypatch.setitem(sys.modules, "tessel.zoo", stub)


def test_convert_command_in_both_directions(zoo, tmp_path, capsys):
    start, ours, back = tmp_path / "in.pth", tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    torch.save({"state_dict": {"A": torch.zeros(2)}, "state_dict_ema": {"A": torch.ones(2)}}, start)
    # the manifest's state_key of cswin_tiny.in1k is that of the EMA weights
    printed = run(capsys, "convert", str(start), str(ours), "--model", "cswin_tiny.in1k")
    assert "1 tensors of cswin_tiny with tessel keys" in printed
    assert {key: tensor.tolist() for key, tensor in read_state(ours).items()} == {"a": [1, 1]}
    run(capsys, "convert", str(ours), str(back), "--model", "cswin_tiny", "--to", "published")
    assert {key: tensor.tolist() for key, tensor in read_state(back).items()} == {"A": [1, 1]}
    again = tmp_path / "raw.safetensors"
    run(capsys, "convert", str(start), str(again), "--model", "cswin_tiny.in1k", "--state-key", "state_dict")
    assert {key: tensor.tolist() for key, tensor in read_state(again).items()} == {"a": [0, 0]}


def test_convert_command_errors(zoo, tmp_path, capsys):
    start, end = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"A": torch.ones(2)}, start)
    convert = ["convert", str(start), str(end), "--model"]
    assert "unknown model 'other'" in run(capsys, *convert, "other", fails=True)
    assert "no entry 'state_dict_ema'" in run(capsys, *convert, "cswin_tiny.in1k", fails=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]
    end.write_bytes(b"precious")
    assert "not overwritten" in run(capsys, *convert, "cswin_tiny", fails=True)
    assert end.read_bytes() == b"precious"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for command in ("list", "fetch", "verify", "convert"):
        assert command in printed


def test_importing_checkpoints_loads_no_models():
    code = "import sys, tessel.checkpoints; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"timm", "tessel.zoo", "tessel.blocks", "tessel.train"} & set(done.stdout.split())
