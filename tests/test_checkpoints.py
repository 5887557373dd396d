"""The room `checkpoints`: what is fetched is complete and verified, what is refused leaves nothing, no file runs code."""

import argparse
import errno
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tessel.checkpoints import (
    fetch,
    fetch_weight,
    find_weight,
    load_manifest,
    manifest,
    read_state,
    sha256_of,
    store,
    verify,
    write_state,
)
from tessel.checkpoints import __main__ as cli

PAYLOAD = bytes(range(256)) * 16
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()
WRONG = "0" * 64


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.server.starts.append(start)
        if not self.path.startswith("/file"):
            self.send_error(404)
            return
        if not self.server.ranges:
            start = 0
        elif start >= len(PAYLOAD):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(PAYLOAD) - 1}/{len(PAYLOAD)}")
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", self.server.kind)
        self.send_header("Content-Length", str(len(PAYLOAD) - start))
        self.end_headers()
        self.server.go_on.wait()
        self.wfile.write(PAYLOAD[start : self.server.cut])

    def log_message(self, format, *args):
        pass


class Server(ThreadingHTTPServer):
    """Serves PAYLOAD under every path that starts with /file."""

    def __init__(self, ranges: bool):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = ranges
        self.kind = "application/octet-stream"
        self.cut: int | None = None  # break off at this byte
        self.starts: list[int] = []  # where each request asked to start
        self.go_on = threading.Event()
        self.go_on.set()

    def url(self, path: str = "/file.pth") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("TESSEL_HOME", str(tmp_path / "home"))


def serving(ranges: bool):
    with Server(ranges) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server():
    yield from serving(ranges=True)


@pytest.fixture
def plain_server():
    """Ignores Range."""
    yield from serving(ranges=False)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def message(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# fetch


def test_download_then_cache_hit_without_network(server, cache):
    path = fetch(server.url(), sha256=DIGEST.upper(), cache_dir=cache)
    assert path.read_bytes() == PAYLOAD
    assert fetch(server.url(), sha256=DIGEST, cache_dir=cache) == path
    assert server.starts == [0]
    assert content(cache) == [path.name]


def test_urls_with_one_base_name_do_not_collide(server, cache):
    paths = {fetch(server.url(f"/file/{folder}/best.pth"), cache_dir=cache) for folder in "ab"}
    assert len(paths) == 2
    assert all(path.name.endswith("-best.pth") for path in paths)
    assert fetch(server.url(), cache_dir=cache, filename="mine.pth") == cache / "mine.pth"


def test_one_download_for_many(server, cache):
    server.go_on.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(fetch, server.url(), sha256=DIGEST, cache_dir=cache) for _ in range(4)]
        server.go_on.set()
        paths = {future.result() for future in waiting}
    assert server.starts == [0]
    assert content(cache) == [path.name for path in paths]


def test_cache_order(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert fetch(server.url(), cache_dir=tmp_path / "given").parent == tmp_path / "given"
    assert fetch(server.url()).parent == tmp_path / "home" / "checkpoints"
    monkeypatch.delenv("TESSEL_HOME")
    assert fetch(server.url()).parent == Path(torch.hub.get_dir(), "checkpoints")
    assert tmp_path / "torch" in fetch(server.url()).parents


def test_broken_download_is_resumed(server, cache):
    server.cut = 1000
    with pytest.raises(ConnectionError, match=f"broke off after 1000 of {len(PAYLOAD)} bytes"):
        fetch(server.url(), sha256=DIGEST, cache_dir=cache)
    (part,) = cache.iterdir()
    assert part.suffix == ".part"
    assert part.read_bytes() == PAYLOAD[:1000]
    server.cut = 2000
    with pytest.raises(ConnectionError, match=f"broke off after 2000 of {len(PAYLOAD)} bytes"):
        fetch(server.url(), sha256=DIGEST, cache_dir=cache)
    server.cut = None
    path = fetch(server.url(), sha256=DIGEST, cache_dir=cache)
    assert path.read_bytes() == PAYLOAD
    assert server.starts == [0, 1000, 2000]
    assert content(cache) == [path.name]


def test_broken_download_that_cannot_be_resumed_leaves_nothing(plain_server, cache):
    plain_server.cut = 1000
    with pytest.raises(ConnectionError, match="broke off") as caught:
        fetch(plain_server.url(), cache_dir=cache)
    assert plain_server.url() in message(caught)
    assert content(cache) == []


def left_over(url: str, cache: Path, data: bytes) -> None:
    path = fetch(url, cache_dir=cache)
    path.unlink()
    path.with_name(path.name + ".part").write_bytes(data)


@pytest.mark.parametrize("size", [1000, len(PAYLOAD), len(PAYLOAD) + 1000])
def test_server_without_ranges_starts_over(plain_server, cache, size):
    left_over(plain_server.url(), cache, b"x" * size)
    path = fetch(plain_server.url(), cache_dir=cache)
    assert path.read_bytes() == PAYLOAD
    assert content(cache) == [path.name]


def test_complete_part_starts_over(server, cache):
    left_over(server.url(), cache, PAYLOAD)
    path = fetch(server.url(), cache_dir=cache)
    assert path.read_bytes() == PAYLOAD
    assert server.starts == [0, len(PAYLOAD), 0]


@pytest.mark.parametrize("begun", [b"", b"not what the server has"])
def test_wrong_hash_leaves_nothing(server, cache, begun):
    left_over(server.url(), cache, begun)
    with pytest.raises(ValueError, match="refused") as caught:
        fetch(server.url(), sha256=WRONG if not begun else DIGEST, cache_dir=cache)
    assert server.url() in message(caught)
    assert content(cache) == []


def test_cached_file_with_wrong_hash_is_refused_and_kept(server, cache):
    path = fetch(server.url(), cache_dir=cache)
    with pytest.raises(ValueError, match="refused") as caught:
        fetch(server.url(), sha256=WRONG, cache_dir=cache)
    assert str(path) in message(caught)
    assert DIGEST in message(caught)
    assert path.read_bytes() == PAYLOAD
    assert server.starts == [0]


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"url": "ftp://127.0.0.1/file"}, "ftp://127.0.0.1/file"),
        ({"sha256": "abc"}, "sha256 = 'abc'"),
        ({"filename": "../up.pth"}, "up.pth"),
    ],
    ids=["scheme", "digest", "filename"],
)
def test_bad_arguments_are_refused_before_any_request(server, cache, arguments, word):
    with pytest.raises(ValueError) as caught:
        fetch(**{"url": server.url(), "cache_dir": cache, **arguments})
    assert word in message(caught)
    assert server.starts == []
    assert content(cache) == []


def offline_url() -> str:
    with Server(ranges=True) as closed:
        return closed.url()


def test_offline_says_what_to_do(cache):
    url = offline_url()
    with pytest.raises(ConnectionError) as caught:
        fetch(url, cache_dir=cache, source="https://example.org/weights")
    text = message(caught)
    for word in (url, "refused", "https://example.org/weights", str(cache), "pretrained_cfg_overlay=dict(file="):
        assert word in text
    assert content(cache) == []


def test_offline_keeps_what_was_received(server, cache):
    left_over(server.url(), cache, PAYLOAD[:1000])
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError):
        fetch(server.url(), cache_dir=cache)
    (part,) = cache.iterdir()
    assert part.read_bytes() == PAYLOAD[:1000]


def test_file_put_by_hand_where_the_error_says(cache):
    url = offline_url()
    with pytest.raises(ConnectionError) as caught:
        fetch(url, cache_dir=cache)
    place = Path(message(caught).partition("put it at ")[2].partition(", or")[0])
    place.write_bytes(PAYLOAD)
    assert fetch(url, sha256=DIGEST, cache_dir=cache) == place


@pytest.mark.parametrize("path, kind, word", [("/gone", "", "HTTP 404"), ("/file", "text/html", "a web page")])
def test_answers_that_are_no_file(server, cache, path, kind, word):
    server.kind = kind
    with pytest.raises(ConnectionError, match=word) as caught:
        fetch(server.url(path), cache_dir=cache)
    assert server.url(path) in message(caught)
    assert content(cache) == []


def test_full_disk_leaves_nothing(server, cache):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    cache.mkdir()
    (cache / "weights.pth.part").symlink_to(full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        fetch(server.url(), cache_dir=cache, filename="weights.pth")
    assert caught.value.errno == errno.ENOSPC
    assert str(cache) in message(caught)
    assert content(cache) == []


def test_unusable_cache_folder(server, tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(OSError, match="TESSEL_HOME"):
        fetch(server.url(), cache_dir=tmp_path / "taken" / "cache")


@pytest.mark.parametrize("as_url", [str, lambda path: path.as_uri()], ids=["path", "file-url"])
def test_local_files_are_used_in_place(tmp_path, cache, as_url):
    path = tmp_path / "a file.pth"
    with pytest.raises(FileNotFoundError, match="a file.pth"):
        fetch(as_url(path), cache_dir=cache)
    path.write_bytes(PAYLOAD)
    assert fetch(as_url(path), sha256=DIGEST, cache_dir=cache) == path
    with pytest.raises(ValueError, match="refused"):
        fetch(as_url(path), sha256=WRONG, cache_dir=cache)
    assert path.read_bytes() == PAYLOAD
    assert content(cache) == []


def test_verify(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(PAYLOAD)
    assert sha256_of(path) == DIGEST
    verify(path, DIGEST)
    with pytest.raises(ValueError, match="refused"):
        verify(path, WRONG)
    with pytest.raises(ValueError, match="64 hex digits"):
        verify(path, "")


# read and write

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(3)}
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
    assert torch.serialization.get_safe_globals() == []


def test_prefix_is_stripped_only_if_common(tmp_path):
    path = tmp_path / "weights.pth"
    stored = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(stored, path)
    assert_state(read_state(path), stored)


def test_yacs_settings_beside_weights(tmp_path, monkeypatch):
    class CfgNode(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__["__immutable__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs = types.ModuleType("yacs.config")
    monkeypatch.setattr(yacs, "CfgNode", CfgNode, raising=False)
    path = tmp_path / "weights.pth"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", yacs)
        torch.save({"model": STATE, "config": CfgNode({"TRAIN": CfgNode({"EPOCHS": 300})})}, path)
    assert_state(read_state(path), STATE)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_read_safetensors_by_suffix_and_by_content(tmp_path, name):
    save_file({f"module.{key}": tensor for key, tensor in STATE.items()}, tmp_path / name)
    assert_state(read_state(tmp_path / name, state_key="model"), STATE)


class Malice:
    def __init__(self, marker: Path, call):
        self.marker, self.call = marker, call

    def __reduce__(self):
        return self.call, (f"open({str(self.marker)!r}, 'w')" if self.call is eval else f"touch {self.marker}",)


@pytest.mark.parametrize("call", [os.system, eval, subprocess.getoutput])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_is_refused_and_does_not_run(tmp_path, call, form):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    stored = {"model": STATE, "extra": Malice(marker, call)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malice(marker, call), protocol=2))
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="can run code; none was run") as caught:
        read_state(path)
    assert str(path) in message(caught)
    assert "weights_only" not in message(caught)
    assert not marker.exists()


def torch_bytes(tmp_path: Path) -> bytes:
    torch.save({"model": {"a": torch.zeros(1000)}}, tmp_path / "whole.pth")
    return (tmp_path / "whole.pth").read_bytes()


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "name, damage",
    [
        ("cut.pth", lambda tmp_path: torch_bytes(tmp_path)[:-100]),
        ("flipped.pth", lambda tmp_path: flipped(torch_bytes(tmp_path))),
        ("empty.pth", lambda tmp_path: b""),
        ("text.pth", lambda tmp_path: b"<html>not a checkpoint</html>"),
        ("cut_pickle.pth", lambda tmp_path: pickle.dumps({"a": [1, 2]}, protocol=2)[:-3]),
        ("cut.safetensors", lambda tmp_path: (save_file(STATE, tmp_path / "s"), (tmp_path / "s").read_bytes())[1][:-4]),
        ("empty.safetensors", lambda tmp_path: b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files_are_named(tmp_path, name, damage):
    path = tmp_path / name
    path.write_bytes(damage(tmp_path))
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
        ({1: torch.ones(1)}, "", ["holds 1"]),
        ({"model": 3}, "model", ["int"]),
        ([torch.ones(1)], "", ["list"]),
        ({"model": {}}, "", ["no tensors"]),
    ],
    ids=["missing", "bare", "stray", "nested", "ema", "number", "no-dict", "list", "empty"],
)
def test_files_without_a_state_dict(tmp_path, stored, state_key, words):
    path = tmp_path / "weights.pth"
    torch.save(stored, path)
    with pytest.raises(ValueError) as caught:
        read_state(path, state_key=state_key)
    for word in [str(path), *words]:
        assert word in message(caught)


def test_long_lists_of_keys_are_cut(tmp_path):
    torch.save({f"k{i}": torch.ones(1) for i in range(20)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="and 12 more$"):
        read_state(tmp_path / "weights.pth", state_key="model")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        read_state(tmp_path / "nothing.pth")


def test_write_round_trip(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"strided": base.T, "half": base[:1].bfloat16(), "shared": base, "learned": torch.nn.Parameter(base)}
    path = tmp_path / "weights.safetensors"
    write_state(state, path)
    assert_state(read_state(path), {key: tensor.detach() for key, tensor in state.items()})
    assert content(tmp_path) == ["weights.safetensors"]


def test_write_overwrites_only_on_request(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_state(STATE, path)
    with pytest.raises(FileExistsError, match="not overwritten"):
        write_state(OTHER, path)
    assert_state(load_file(path), STATE)
    write_state(OTHER, path, overwrite=True)
    assert_state(load_file(path), OTHER)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_full_disk_keeps_the_old_file_and_no_temporary(tmp_path, monkeypatch, error):
    path = tmp_path / "weights.safetensors"
    write_state(STATE, path)

    def fill_up(tensors, filename, metadata):
        Path(filename).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(store, "save_file", fill_up)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_state(OTHER, path, overwrite=True)
    assert str(path) in message(caught)
    assert content(tmp_path) == ["weights.safetensors"]
    assert_state(load_file(path), STATE)


@pytest.mark.parametrize(
    "name, state, word", [("weights.pth", STATE, ".safetensors"), ("weights.safetensors", {"a": 1}, "'a'")]
)
def test_write_refusals(tmp_path, name, state, word):
    with pytest.raises(ValueError, match=word):
        write_state(state, tmp_path / name)
    assert content(tmp_path) == []


# manifest


@pytest.mark.parametrize("weight", load_manifest().values(), ids=lambda weight: weight.name)
def test_row(weight):
    assert f"{weight.model}.{weight.tag}" == weight.name
    assert "in1k" in weight.tag or "in22k" in weight.tag
    assert weight.url.startswith("https://") if weight.url else weight.why_no_url
    assert weight.source.startswith("https://")
    assert weight.licence in {"MIT", "Apache-2.0"}
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


def test_callers_cannot_change_the_manifest():
    load_manifest().clear()
    assert load_manifest()


ROW = {
    "url": '"https://example.org/a.pth"',
    "sha256": f'"{DIGEST}"',
    "size": f"{len(PAYLOAD)}",
    "licence": '"MIT"',
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
        ({"licence": None}, ["'licence' is missing"]),
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
def test_manifest_that_is_no_table_of_rows(tmp_path, text):
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


def test_fetch_weight(own_manifest, server, cache):
    weight = replace(find_weight("some_tiny"), url=server.url())
    assert fetch_weight(weight, cache_dir=cache).read_bytes() == PAYLOAD
    with pytest.raises(ValueError, match="refused"):
        fetch_weight(replace(weight, sha256=WRONG), cache_dir=cache)
    with pytest.raises(ConnectionError, match="https://example.org"):
        fetch_weight(replace(weight, url=offline_url()), cache_dir=cache)


def test_fetch_weight_without_url_says_why(own_manifest):
    with pytest.raises(ValueError) as caught:
        fetch_weight(replace(find_weight("some_tiny"), url="", why_no_url="only on paper"))
    for word in ("some_tiny.in1k", "only on paper", "https://example.org", "pretrained_cfg_overlay=dict(file="):
        assert word in message(caught)


# command line


def run(capsys, *argv: str, fails: bool = False) -> str:
    """What the command prints; of one that fails, the one line on stderr."""
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


def test_list(capsys):
    lines = run(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines] == ["name", *load_manifest()]
    lines = run(capsys, "list", "biformer_s*").splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:6] == ["biformer_small.in1k", "-", "MIT", "83.80", "-", "no:"]
    assert "published only as a share link" in lines[1]
    assert "'nothing*'" in run(capsys, "list", "nothing*", fails=True)


def test_list_with_measured_values(own_manifest, capsys):
    assert run(capsys, "list").splitlines()[1].split() == ["some_tiny.in1k", "0.0", "MB", "MIT", "81.50", "-", "yes"]


def test_fetch_command(own_manifest, server, cache, capsys, monkeypatch):
    weight = replace(find_weight("some_tiny"), url=server.url())
    monkeypatch.setattr(cli, "find_weight", {"some_tiny": weight}.__getitem__)
    printed = run(capsys, "fetch", "some_tiny", "--cache-dir", str(cache))
    (path,) = cache.iterdir()
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
    assert "none of the manifest" in run(capsys, "verify", str(path))
    assert cli.main(["verify", str(path), "--name", "some_tiny"]) == 1
    assert "refused" in capsys.readouterr().err
    assert "nothing.pth" in run(capsys, "verify", str(tmp_path / "nothing.pth"), fails=True)


def test_verify_command_of_a_row_without_hash(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(PAYLOAD)
    assert "no sha256 yet" in run(capsys, "verify", str(path), "--name", "biformer_small")


@pytest.fixture
def zoo(monkeypatch):
    """Stands in for the zoo: our layout calls `a` what the published one calls `A`."""

    def renamed(name, state, old, new):
        if name != "cswin_tiny":
            raise ValueError(f"unknown model {name!r}")
        return {key.replace(old, new): tensor for key, tensor in state.items()}

    stub = types.ModuleType("tessel.zoo")
    stub.__dict__["from_published"] = lambda name, state: renamed(name, state, "A", "a")
    stub.__dict__["to_published"] = lambda name, state: renamed(name, state, "a", "A")
    monkeypatch.setitem(sys.modules, "tessel.zoo", stub)


def test_convert_both_ways(zoo, tmp_path, capsys):
    start, ours, back = tmp_path / "in.pth", tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    torch.save({"state_dict": {"A": torch.zeros(2)}, "state_dict_ema": {"A": torch.ones(2)}}, start)
    # the manifest knows that the published number of cswin_tiny.in1k belongs to the EMA weights
    printed = run(capsys, "convert", str(start), str(ours), "--model", "cswin_tiny.in1k")
    assert "1 tensors of cswin_tiny in the tessel layout" in printed
    assert_state(read_state(ours), {"a": torch.ones(2)})
    run(capsys, "convert", str(ours), str(back), "--model", "cswin_tiny", "--to", "published")
    assert_state(read_state(back), {"A": torch.ones(2)})
    again = tmp_path / "raw.safetensors"
    run(capsys, "convert", str(start), str(again), "--model", "cswin_tiny.in1k", "--state-key", "state_dict")
    assert_state(read_state(again), {"a": torch.zeros(2)})


def test_convert_errors(zoo, tmp_path, capsys):
    start, end = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"A": torch.ones(2)}, start)
    convert = ["convert", str(start), str(end), "--model"]
    assert "unknown model 'other'" in run(capsys, *convert, "other", fails=True)
    assert "no entry 'state_dict_ema'" in run(capsys, *convert, "cswin_tiny.in1k", fails=True)
    assert content(tmp_path) == ["in.pth"]
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


def test_import_brings_no_model():
    code = "import sys, tessel.checkpoints; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"timm", "tessel.zoo", "tessel.blocks", "tessel.train"} & set(done.stdout.split())
