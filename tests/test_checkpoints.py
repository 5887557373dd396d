"""`tessel.checkpoints`: downloads are complete, resumable or deleted, and a file behind a URL stays the same."""

import errno
import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from tessel.checkpoints import cached_path, fetch, fetch_weight, find_weight, read_state, store, verify

PAYLOAD = bytes(range(256)) * 16
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()
WRONG = "0" * 64
STATE, OTHER = {"weight": torch.arange(6.0)}, {"weight": torch.zeros(6)}


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
    torch.testing.assert_close(read_state(path), STATE)
    assert store.keep_imported(weight, OTHER, cache_dir=cache) == path
    torch.testing.assert_close(read_state(fetch_weight(weight, cache_dir=cache)), OTHER)
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
