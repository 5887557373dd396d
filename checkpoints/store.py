"""Weight files: fetched into a cache, verified by hash, read without running code, written atomically."""

import argparse
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, url2pathname, urlopen

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from .manifest import Weight

try:
    import fcntl
except ImportError:  # not on windows: two processes that fetch one url at once are not kept apart there
    fcntl = None

_CHUNK = 1 << 17
_TIMEOUT = 30.0
_BY_HAND = "pass it with pretrained_cfg_overlay=dict(file=...)"
# where trainers put the weights. EMA copies are left out: whether a published number belongs to them is for
# `state_key` to say (that of BiFormer belongs to `model`, not to `model_ema`).
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")
# settings that trainers store beside the weights; the dict of yacs is read as a plain one
_SETTINGS = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]


def fetch(
    url: str,
    *,
    sha256: str = "",
    cache_dir: str | Path | None = None,
    filename: str | None = None,
    source: str = "",
    progress: bool = True,
) -> Path:
    """The file behind `url`, downloaded on first use; a path or a file:// url is checked and used in place.

    It is kept in `cache_dir`, else `$TESSEL_HOME/checkpoints`, else torch's hub folder `/checkpoints`, as `filename`,
    else under the url's last part with a hash of the url before it. A download that breaks off is resumed by the next
    call where the server allows; whatever is refused leaves nothing behind. `source` is the page an error points to.

    Raises ConnectionError where the url cannot be reached, ValueError where the sha256 (64 hex digits) does not match,
    also of a file already cached, which is then neither used nor removed, and OSError where the disk refuses.
    """
    sha256 = _digest(sha256) if sha256 else ""
    path = _local_path(url)
    if path is None:
        path = _cached_path(url, cache_dir, filename)
        try:
            if not path.exists() and _download(url, path, sha256=sha256, progress=progress):
                return path
        except ConnectionError as error:
            by_hand = f"download it by hand from {source or url} and put it at {path}, or {_BY_HAND}"
            raise ConnectionError(f"could not fetch {url}: {error}; {by_hand}") from error
        except OSError as error:
            reason = f"could not write to {path.parent}: {error.strerror}; set TESSEL_HOME to another folder"
            raise OSError(error.errno, reason) from error
    _require_file(path)
    if sha256:
        verify(path, sha256)
    return path


def fetch_weight(weight: Weight, *, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """`fetch` for a row of the manifest; ValueError with the reason where it has no url."""
    if not weight.url:
        reason = f"{weight.why_no_url}; get the file from {weight.source} and {_BY_HAND}"
        raise ValueError(f"{weight.name} cannot be fetched: {reason}")
    return fetch(weight.url, sha256=weight.sha256, cache_dir=cache_dir, source=weight.source, progress=progress)


def cached_path(url: str, *, cache_dir: str | Path | None = None) -> Path | None:
    """Where `fetch` keeps the download of `url`, whether it is there yet or not; None for what is used in place."""
    return _cached_path(url, cache_dir, None) if _local_path(url) is None else None


def sha256_of(path: str | Path) -> str:
    """The file's sha256 as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: str | Path, sha256: str) -> None:
    """Raise ValueError unless the file has this sha256."""
    expected, found = _digest(sha256), sha256_of(path)
    if found != expected:
        raise ValueError(f"{path}: refused, its sha256 is {found}, expected {expected}; remove or replace the file")


def read_state(path: str | Path, *, state_key: str = "") -> dict[str, Tensor]:
    """The state dict in a safetensors or PyTorch file, on the CPU, without a `module.` common to all keys.

    A PyTorch file holds it under `state_key`, or is the state dict, or holds it under the first it has of `model`,
    `state_dict`, `model_state` and `model_state_dict`. A safetensors file is flat and has no such key.
    No code from the file runs: beside tensors and containers only argparse's and yacs' settings are let through.

    Raises ValueError naming the file if it is damaged, asks to run code, or holds anything but tensors there.
    """
    path = Path(path)
    _require_file(path)
    state = _read(path, state_key)
    if strays := _strays(state):
        raise ValueError(f"{path}: beside tensors it holds {strays}; state_key must name the entry with the weights")
    if not state:
        raise ValueError(f"{path}: holds no tensors")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): tensor.detach() for key, tensor in state.items()}


def write_state(state: Mapping[str, Tensor], path: str | Path, *, overwrite: bool = False) -> None:
    """Write a safetensors file: complete or not at all.

    Raises ValueError for another suffix or for anything but tensors, FileExistsError unless `overwrite`, and OSError
    where the disk refuses.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists and is not overwritten; remove it or choose another name")
    if strays := _strays(state):
        raise ValueError(f"{path} not written: beside tensors there is {strays}")
    # safetensors refuses strided and shared memory
    flat = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # not by save_file, which keeps the file from everybody else
        temporary.write_bytes(save(flat, metadata={"format": "pt"}))
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")


def _digest(sha256: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 = {sha256!r} must be 64 hex digits")
    return sha256.lower()


def _local_path(url: str) -> Path | None:
    if "://" not in url:
        return Path(url).expanduser()
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"url = {url!r} must be http(s)://, file:// or a path")
    return None


def _cached_path(url: str, cache_dir: str | Path | None, filename: str | None) -> Path:
    if cache_dir is None:
        cache_dir = Path(os.environ.get("TESSEL_HOME") or torch.hub.get_dir(), "checkpoints")
    if filename is None:
        base = PurePosixPath(unquote(urlsplit(url).path)).name
        filename = f"{hashlib.sha256(url.encode()).hexdigest()[:10]}-{base}"
    if Path(filename).name != filename:
        raise ValueError(f"filename = {filename!r} must be a name without a folder")
    return Path(cache_dir).expanduser() / filename


def _download(url: str, target: Path, *, sha256: str, progress: bool) -> bool:
    """Fill `target`, or return False if another process has done it meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with _alone(part):
        keep = False
        try:
            if target.exists():
                return False
            _receive(url, part, progress)
            if sha256 and (found := sha256_of(part)) != sha256:
                raise ValueError(f"{url}: refused, its sha256 is {found}, expected {sha256}; nothing was kept")
            os.replace(part, target)
            return True
        except (ConnectionError, KeyboardInterrupt):
            keep = part.exists() and part.stat().st_size > 0
            raise
        finally:
            if not keep:
                part.unlink(missing_ok=True)


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Hold a lock on `part`: of the ranks of one run the first downloads, the others wait."""
    if fcntl is None:
        yield
        return
    while True:
        with part.open("ab") as lock:
            # some cluster file systems have no locks
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            # whoever held the lock before may have renamed or removed the file it is on
            ours = False
            with suppress(FileNotFoundError):
                ours = os.path.samestat(os.fstat(lock.fileno()), part.stat())
            if ours:
                yield
                return


def _receive(url: str, part: Path, progress: bool) -> None:
    """Append to `part` what it lacks of `url`, or start over where the server cannot resume."""
    from tqdm import tqdm

    got = part.stat().st_size if part.exists() else 0
    with _open(url, got) as reply, part.open("ab") as file:
        if reply.headers.get_content_type() == "text/html":
            raise ConnectionError("it answered with a web page, not a file")
        resumable = reply.status == HTTPStatus.PARTIAL_CONTENT or reply.headers.get("Accept-Ranges") == "bytes"
        if got and reply.status != HTTPStatus.PARTIAL_CONTENT:
            file.truncate(got := 0)
        total = None if reply.length is None else got + reply.length
        with tqdm(total=total, initial=got, unit="B", unit_scale=True, disable=None if progress else True) as bar:
            try:
                for chunk in _chunks(reply):
                    file.write(chunk)
                    bar.update(len(chunk))
                    got += len(chunk)
                if not got or got < (total or 0):
                    raise ConnectionError(f"it broke off after {got} of {total or 'unknown'} bytes")
            except ConnectionError:
                if not resumable:
                    file.truncate(0)
                raise


def _open(url: str, have: int) -> HTTPResponse:
    headers = {"User-Agent": "tessel"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        return urlopen(Request(url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        if have and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _open(url, 0)
        raise ConnectionError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise ConnectionError(getattr(error, "reason", error)) from error


def _chunks(reply: HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := reply.read(_CHUNK):
            yield chunk
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"the connection was lost ({error})") from error


def _read(path: Path, state_key: str) -> Mapping[str, Any]:
    flat = _is_safetensors(path)
    try:
        with torch.serialization.safe_globals(_SETTINGS):
            content = load_file(path) if flat else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            # torch's message goes on to explain how to run the code after all
            raise ValueError(f"{path}: refused, it asks for `{asked[1]}`, which can run code; none was run") from None
        raise ValueError(f"{path}: damaged, or not a checkpoint ({type(error).__name__})") from error
    return content if flat else _unwrap(content, state_key, path)


def _is_safetensors(path: Path) -> bool:
    # without the suffix by its start: the length of the header in eight bytes, then the header, which is JSON
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _unwrap(content: Any, state_key: str, path: Path) -> Mapping[str, Any]:
    if isinstance(content, Mapping):
        if state_key and state_key not in content:
            raise ValueError(f"{path}: no entry {state_key!r}; it has {_some(content)}")
        wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), "")
        content = content.get(state_key or wrapper, content)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__} where a state dict should be")
    return content


def _strays(state: Mapping[str, Any]) -> str:
    """The names of the entries that are not tensors."""
    return _some(key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor)))


def _some(names: Iterable[Any], most: int = 8) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
