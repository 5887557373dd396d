"""`tessel.checkpoints`: files of weights are read without running their code, and written whole or not at all."""

import argparse
import errno
import io
import math
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from tessel.checkpoints import read_state, store, write_state


def message(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(3)}


def test_every_changed_byte_of_a_tensor_in_an_archive_is_noticed(tmp_path):
    """torch.load compares no checksums."""
    torch.save({"weight": torch.zeros(64)}, path := tmp_path / "weights.pth")
    content, at = path.read_bytes(), path.read_bytes().index(bytes(256))
    for offset in (0, 100, 255):
        changed = bytearray(content)
        changed[at + offset] = 1
        path.write_bytes(changed)
        assert torch.load(path)["weight"].any()
        with pytest.raises(ValueError, match=r"weights.pth: damaged, its entry .*/data/0 does not match its checksum"):
            read_state(path)
    path.write_bytes(content)
    assert store.unknown_of(path) == []


def test_archive_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.zeros(64)}, path := tmp_path / "weights.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_state(path)["weight"].shape == (64,)


def test_what_a_file_does_not_tell_is_said(tmp_path):
    torch.save({"weight": torch.tensor([1.0, math.nan])}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    checksums, finite = store.unknown_of(tmp_path / "old.pth")
    assert "has no checksums" in checksums and "not all values are finite, in 'weight'" in finite


OTHER = {key: tensor + 1 for key, tensor in STATE.items()}


def assert_state(state, expected):
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    "stored, state_key",
    [
        (STATE, ""),
        ({"model": STATE, "model_ema": OTHER, "epoch": 3}, ""),
        ({"state_dict": STATE, "state_dict_ema": OTHER}, ""),
        ({"state_dict": OTHER, "state_dict_ema": STATE}, "state_dict_ema"),
        ({"model": STATE, "state_dict": OTHER}, ""),
        ({"model_state": STATE, "model": "biformer"}, ""),
        ({"model_state_dict": STATE}, ""),
        ({f"module.{key}": tensor for key, tensor in STATE.items()}, ""),
        ({key: torch.nn.Parameter(tensor, tensor.is_floating_point()) for key, tensor in STATE.items()}, ""),
        ({"model": STATE, "args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.999)), "scaler": None}, ""),
    ],
    ids=["bare", "ema", "state_dict", "key", "first", "name", "long", "module", "parameters", "namespace"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_read_torch_files(tmp_path, stored, state_key, zipped):
    path = tmp_path / "weights.pth"
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    state = read_state(path, state_key=state_key)
    assert_state(state, STATE)
    assert not any(tensor.requires_grad for tensor in state.values())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_weights_with_yacs_settings_can_be_read(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    settings = node(TRAIN=node(EPOCHS=300))
    settings.frozen = True
    with monkeypatch.context() as patch:
        for name in ("yacs", "yacs.config"):
            patch.setitem(sys.modules, name, types.SimpleNamespace(CfgNode=node))
        torch.save({"model": STATE, "config": settings}, path)
    assert_state(read_state(path), STATE)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_read_safetensors_by_suffix_and_by_content(tmp_path, name):
    save_file({f"module.{key}": tensor for key, tensor in STATE.items()}, tmp_path / name)
    assert_state(read_state(tmp_path / name, state_key="model"), STATE)
    with pytest.raises(FileNotFoundError, match=f"no_{name}"):
        read_state(tmp_path / f"no_{name}")


class RunsCode:
    """Creates the file `marker` with `call` when it is unpickled."""

    def __init__(self, marker: Path, call):
        self.marker, self.call = marker, call

    def __reduce__(self):
        return self.call, (f"open({str(self.marker)!r}, 'w')" if self.call is eval else f"touch {self.marker}",)


@pytest.mark.parametrize("call", [os.system, eval, subprocess.getoutput])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_is_refused_and_does_not_run(tmp_path, call, form):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    stored = {"model": STATE, "extra": RunsCode(marker, call)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(RunsCode(marker, call), protocol=2))
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="no code was run") as caught:
        read_state(path)
    assert str(path) in message(caught)
    assert "weights_only" not in message(caught)
    assert not marker.exists()


def saved(stored) -> bytes:
    torch.save(stored, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, data",
    [
        ("cut.pth", saved(STATE)[:-100]),
        ("start.pth", saved(STATE)[:100]),
        ("empty.pth", b""),
        ("text.pth", b"<html>not a checkpoint</html>"),
        ("pickle.pth", pickle.dumps({"a": [1, 2]}, protocol=2)[:-3]),
        ("cut.safetensors", safetensors.torch.save(STATE)[:-4]),
        ("empty.safetensors", b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_file_is_an_error_that_names_it(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged") as caught:
        read_state(path)
    assert str(path) in message(caught)


@pytest.mark.parametrize(
    "stored, state_key, words",
    [
        ({"model": STATE, "epoch": 3}, "ema", ["no entry 'ema'", "'model', 'epoch'"]),
        (STATE, "model", ["no entry 'model'", "'a.weight'"]),
        ({**STATE, "epoch": 3}, "", ["'epoch'", "state_key"]),
        ({"model": {**STATE, "inner": STATE}}, "", ["'inner'"]),
        ({"model_ema": STATE}, "", ["'model_ema'", "state_key"]),
        ({1: torch.ones(1)}, "", ["entries 1 are"]),
        ({"model": 3}, "model", ["int"]),
        ([torch.ones(1)], "", ["list"]),
        ({"model": {}}, "", ["no tensors"]),
        ({f"k{i}": torch.ones(1) for i in range(20)}, "model", ["'k7' and 12 more"]),
    ],
    ids=["missing", "bare", "stray", "nested", "ema", "number", "no-dict", "list", "empty", "many"],
)
def test_files_without_a_state_dict_are_errors(tmp_path, stored, state_key, words):
    path = tmp_path / "weights.pth"
    torch.save(stored, path)
    with pytest.raises(ValueError) as caught:
        read_state(path, state_key=state_key)
    for word in [str(path), *words]:
        assert word in message(caught)


def test_written_state_reads_back(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"module.strided": base.T, "half": base[:1].bfloat16(), "shared": base, "learned": torch.nn.Parameter(base)}
    path = tmp_path / "weights.safetensors"
    write_state(state, path)
    assert_state(read_state(path), {key: tensor.detach() for key, tensor in state.items()})
    assert os.listdir(tmp_path) == ["weights.safetensors"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_overwrites_only_on_request(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_state(STATE, path)
    with pytest.raises(FileExistsError, match="not overwritten"):
        write_state(OTHER, path)
    assert_state(load_file(path), STATE)
    write_state(OTHER, path, overwrite=True)
    assert_state(load_file(path), OTHER)


def test_full_disk_keeps_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_state(STATE, path)

    def fill_up(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_state(OTHER, path, overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert str(path) in message(caught)
    assert os.listdir(tmp_path) == ["weights.safetensors"]
    assert_state(load_file(path), STATE)


@pytest.mark.parametrize(
    "name, state, word", [("weights.pth", STATE, ".safetensors"), ("weights.safetensors", {"a": 1}, "'a'")]
)
def test_state_that_cannot_be_written_is_refused(tmp_path, name, state, word):
    with pytest.raises(ValueError, match=word):
        write_state(state, tmp_path / name)
    assert os.listdir(tmp_path) == []


# records, mirror and imported files
