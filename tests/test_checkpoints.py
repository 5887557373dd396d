"""`tessel.checkpoints`: downloads are complete, resumable or deleted, and files are read without running their code."""

import argparse
import errno
import hashlib
import io
import json
import math
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
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from tessel.checkpoints import cached_path, fetch, fetch_weight, find_weight, read_state, store, verify, write_state

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
        self.server.may_send.wait()
        self.wfile.write(PAYLOAD[start : self.server.cut])

    def log_message(self, format, *args):
        pass


class Server(ThreadingHTTPServer):
    """A server that returns PAYLOAD for every path that starts with /file."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = True
        self.kind = "application/octet-stream"
        self.cut: int | None = None  # send only the bytes before this one
        self.starts: list[int] = []  # the first byte that each request asks for
        self.may_send = threading.Event()
        self.may_send.set()

    def url(self, path: str = "/file.pth") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


@pytest.fixture(autouse=True)
def isolated_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("TESSEL_HOME", str(tmp_path / "home"))


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def content(folder: Path) -> list[str]:
    """Names of the files in a cache folder, without the empty lock files and the records of hashes."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return [name for name in names if not (name.endswith(".lock") or (name[0] == "." and name.endswith(".json")))]


def message(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


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


def test_concurrent_fetches_share_one_download(server, cache):
    server.may_send.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(fetch, server.url(), sha256=DIGEST, cache_dir=cache) for _ in range(4)]
        server.may_send.set()
        paths = {future.result() for future in waiting}
    assert server.starts == [0]
    assert content(cache) == [path.name for path in paths]


def test_waiting_downloads_resume_after_a_failed_one(server, cache):
    """Each resumes the partial file of the one before it; no two write it at the same time."""
    server.cut = 1000
    server.may_send.clear()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(fetch, server.url(), sha256=DIGEST, cache_dir=cache) for _ in range(3)]
        server.may_send.set()
        errors = [future.exception() for future in waiting]
    assert all(isinstance(error, ConnectionError) for error in errors)
    assert server.starts == [0, 1000, 1000]
    server.cut = None
    assert fetch(server.url(), sha256=DIGEST, cache_dir=cache).read_bytes() == PAYLOAD


def test_precedence_of_cache_folders(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert fetch(server.url(), cache_dir=tmp_path / "given").parent == tmp_path / "given"
    assert fetch(server.url()).parent == tmp_path / "home" / "checkpoints"
    monkeypatch.delenv("TESSEL_HOME")
    assert fetch(server.url()).parent == Path(torch.hub.get_dir(), "checkpoints")
    assert tmp_path / "torch" in fetch(server.url()).parents


def test_broken_download_is_resumed(server, cache):
    server.cut = 1000
    with pytest.raises(ConnectionError, match=f"ended after 1000 of {len(PAYLOAD)} bytes"):
        fetch(server.url(), sha256=DIGEST, cache_dir=cache)
    (part,) = cache.glob("*.part")
    assert part.suffix == ".part"
    assert part.read_bytes() == PAYLOAD[:1000]
    server.cut = 2000
    with pytest.raises(ConnectionError, match=f"ended after 2000 of {len(PAYLOAD)} bytes"):
        fetch(server.url(), sha256=DIGEST, cache_dir=cache)
    server.cut = None
    path = fetch(server.url(), sha256=DIGEST, cache_dir=cache)
    assert path.read_bytes() == PAYLOAD
    assert server.starts == [0, 1000, 2000]
    assert content(cache) == [path.name]


def test_broken_download_that_cannot_be_resumed_is_deleted(server, cache):
    server.ranges = False
    server.cut = 1000
    with pytest.raises(ConnectionError, match="ended after") as caught:
        fetch(server.url(), cache_dir=cache)
    assert server.url() in message(caught)
    assert content(cache) == []


def leave_partial_file(url: str, cache: Path, data: bytes) -> None:
    """Put `data` into the cache as a partial download of `url`."""
    path = fetch(url, cache_dir=cache)
    path.unlink()
    path.with_name(path.name + ".part").write_bytes(data)


@pytest.mark.parametrize("ranges, more", [(False, -1), (False, 0), (False, 1), (True, 0), (True, 1)])
def test_download_that_cannot_be_resumed_starts_over(server, cache, ranges, more):
    server.ranges = ranges
    leave_partial_file(server.url(), cache, b"x" * (len(PAYLOAD) + more))
    path = fetch(server.url(), cache_dir=cache)
    assert path.read_bytes() == PAYLOAD
    assert content(cache) == [path.name]


@pytest.mark.parametrize("partial", [b"", b"not what the server has"])
def test_download_with_wrong_hash_is_deleted(server, cache, partial):
    leave_partial_file(server.url(), cache, partial)
    with pytest.raises(ValueError, match="refused") as caught:
        fetch(server.url(), sha256=WRONG if not partial else DIGEST, cache_dir=cache)
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
    """The URL of a server that has been closed."""
    with Server() as closed:
        return closed.url()


def test_offline_error_explains_the_manual_download(cache):
    url = offline_url()
    with pytest.raises(ConnectionError, match="refused") as caught:
        fetch(url, cache_dir=cache, source="https://example.org/weights")
    assert content(cache) == []
    place = cached_path(url, cache_dir=cache)
    assert place is not None
    for word in (url, "by hand from https://example.org/weights", f"put it at {place}", "_overlay=dict(file="):
        assert word in message(caught)
    place.write_bytes(PAYLOAD)
    assert fetch(url, sha256=DIGEST, cache_dir=cache) == place


def test_offline_keeps_the_partial_file(server, cache):
    leave_partial_file(server.url(), cache, PAYLOAD[:1000])
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError):
        fetch(server.url(), cache_dir=cache)
    (part,) = cache.glob("*.part")
    assert part.read_bytes() == PAYLOAD[:1000]


@pytest.mark.parametrize("path, kind, word", [("/gone", "", "HTTP 404"), ("/file", "text/html", "a web page")])
def test_http_errors_and_web_pages_are_refused(server, cache, path, kind, word):
    server.kind = kind
    with pytest.raises(ConnectionError, match=word) as caught:
        fetch(server.url(path), cache_dir=cache)
    assert server.url(path) in message(caught)
    assert content(cache) == []


def test_full_disk_leaves_no_partial_file(server, cache):
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


def test_unusable_cache_folder_is_an_error(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="TESSEL_HOME"):
        fetch(server.url(), cache_dir=tmp_path / "file" / "cache")


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
    assert cached_path(as_url(path), cache_dir=cache) is None


def test_fetch_weight(server, cache):
    weight = replace(find_weight("cswin_tiny.in1k"), url=server.url())
    assert fetch_weight(weight, cache_dir=cache).read_bytes() == PAYLOAD
    with pytest.raises(ValueError, match="refused"):
        fetch_weight(replace(weight, sha256=WRONG), cache_dir=cache)
    with pytest.raises(ConnectionError, match=f"by hand from {weight.source} "):
        fetch_weight(replace(weight, url=offline_url()), cache_dir=cache)


def test_verify(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(PAYLOAD)
    assert store.sha256_of(path) == DIGEST
    verify(path, DIGEST)
    with pytest.raises(ValueError, match="refused"):
        verify(path, WRONG)
    with pytest.raises(ValueError, match="64 hex digits"):
        verify(path, "")


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
    assert content(tmp_path) == ["weights.safetensors"]
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
    assert content(tmp_path) == ["weights.safetensors"]
    assert_state(load_file(path), STATE)


@pytest.mark.parametrize(
    "name, state, word", [("weights.pth", STATE, ".safetensors"), ("weights.safetensors", {"a": 1}, "'a'")]
)
def test_state_that_cannot_be_written_is_refused(tmp_path, name, state, word):
    with pytest.raises(ValueError, match=word):
        write_state(state, tmp_path / name)
    assert content(tmp_path) == []


# records, mirror and imported files


def test_first_fetch_records_hash_and_size_and_later_ones_compare(server, cache):
    path = fetch(server.url(), cache_dir=cache)
    record = json.loads(path.with_name(f".{path.name}.json").read_text())
    assert record == {"sha256": DIGEST, "size": len(PAYLOAD)}
    assert fetch(server.url(), cache_dir=cache) == path
    path.write_bytes(PAYLOAD + b"x")
    with pytest.raises(ValueError, match="refused") as caught:
        fetch(server.url(), cache_dir=cache)
    for word in (DIGEST, "written by the first fetch", f".{path.name}.json"):
        assert word in message(caught)
    assert path.read_bytes() == PAYLOAD + b"x", "the user's file is kept"


def test_another_file_behind_the_same_url_is_refused_and_deleted(server, cache, monkeypatch):
    path = fetch(server.url(), cache_dir=cache)
    path.unlink()
    monkeypatch.setitem(globals(), "PAYLOAD", PAYLOAD[::-1])
    with pytest.raises(ValueError, match="the download is deleted.*written by the first fetch"):
        fetch(server.url(), cache_dir=cache)
    assert content(cache) == []
    store.remove_cached(path)
    assert fetch(server.url(), cache_dir=cache).read_bytes() == PAYLOAD, "without the record it is accepted"


def test_file_of_a_cache_that_cannot_be_written_is_used_without_a_record(server, cache, monkeypatch):
    path = fetch(server.url(), cache_dir=cache)
    path.with_name(f".{path.name}.json").unlink()

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store, "_write_record", refuse)
    assert fetch(server.url(), cache_dir=cache) == path


def test_damaged_record_is_an_error_that_names_it(server, cache):
    path = fetch(server.url(), cache_dir=cache)
    path.with_name(f".{path.name}.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged") as caught:
        fetch(server.url(), cache_dir=cache)
    assert f".{path.name}.json" in message(caught)


def test_mirror_serves_the_files_of_the_cache(server, cache, monkeypatch):
    url = offline_url()
    monkeypatch.setenv("TESSEL_WEIGHTS_URL", server.url("/file/mirror/"))
    path = fetch(url, cache_dir=cache)
    assert path.read_bytes() == PAYLOAD and path == cached_path(url, cache_dir=cache)
    weight = find_weight("biformer_small.in1k")
    assert fetch_weight(weight, cache_dir=cache) == cache / "biformer_small.in1k.safetensors"
    monkeypatch.setenv("TESSEL_WEIGHTS_URL", offline_url())
    with pytest.raises(ConnectionError, match=r"/biformer_tiny\.in1k\.safetensors: .*by hand"):
        fetch_weight(find_weight("biformer_tiny.in1k"), cache_dir=cache)


def test_imported_weights_come_before_a_download(cache):
    weight = find_weight("cswin_tiny.in1k")
    assert store.find_local(weight, cache_dir=cache) is None
    path = store.keep_imported(weight, STATE, cache_dir=cache)
    assert fetch_weight(weight, cache_dir=cache) == path == store.find_local(weight, cache_dir=cache)
    assert_state(read_state(path), STATE)
    assert store.keep_imported(weight, OTHER, cache_dir=cache) == path
    assert_state(read_state(fetch_weight(weight, cache_dir=cache)), OTHER)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="refused"):
        fetch_weight(weight, cache_dir=cache)


def test_available_are_rows_with_a_url_a_mirror_or_an_import(cache, monkeypatch):
    with_url, without = find_weight("cswin_tiny.in1k"), find_weight("biformer_small.in1k")
    assert store.is_available(with_url, cache_dir=cache) and not store.is_available(without, cache_dir=cache)
    store.keep_imported(without, STATE, cache_dir=cache)
    assert store.is_available(without, cache_dir=cache)
    monkeypatch.setenv("TESSEL_WEIGHTS_URL", "https://example.org")
    assert store.is_available(without, cache_dir=cache / "other")
