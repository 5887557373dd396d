"""Weight files: download to a cache, check by hash, read without running pickled code, write atomically.

A file whose sha256 is not in the manifest has a record `.NAME.json` beside it in the cache, with its sha256 and size,
written when it arrived. A file that differs from its record is refused. A mirror (`TESSEL_WEIGHTS_URL`) serves a copy
of such a folder.
"""

import argparse
import hashlib
import json
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, url2pathname, urlopen
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from filelock import FileLock
from safetensors.torch import load_file, save
from torch import Tensor

from .manifest import WeightFile

_CHUNK = 1 << 17
_TIMEOUT = 30.0
_MIRROR = "TESSEL_WEIGHTS_URL"
_BY_HAND = "pass its path: pretrained_cfg_overlay=dict(file=...) in Python, --weights on the command line"
# keys under which trainers store the weights. EMA copies are not among them: only the manifest's `state_key` knows
# whether the published accuracy belongs to the EMA weights (BiFormer's belongs to `model`, not to `model_ema`).
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")
# classes of settings that trainers store beside the weights; yacs' CfgNode is read as an OrderedDict
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
    """Download `url` on first use and return the path; a path or a file:// url is checked and returned.

    The cache folder is `cache_dir`, else `$TESSEL_HOME/checkpoints`, else `checkpoints` in torch's hub folder. The file
    is stored as `filename`, by default the last part of the url with a hash of the url before it. If several processes
    fetch the same url, one downloads and the others wait. An interrupted download is resumed by the next call if the
    server allows it. `source` is the web page that errors refer to. If the environment variable TESSEL_WEIGHTS_URL is
    set, the file is downloaded from TESSEL_WEIGHTS_URL/FILENAME instead, FILENAME being its name in the cache.

    The first fetch records sha256 and size of the file; a file that differs from its record later is refused.

    Raises ConnectionError if the url cannot be reached, OSError if the file cannot be written, and ValueError if its
    sha256 (64 hex digits) is another one: the download is then deleted, a file that was there before is kept.
    """
    sha256 = _digest(sha256) if sha256 else ""
    path = _local_path(url)
    if path is not None:
        _require_file(path)
        if sha256:
            verify(path, sha256)
        return path
    path = _cached_path(url, cache_dir, filename)
    expected, origin = sha256 or _recorded(path), _mirror_url(path.name) or url
    try:
        downloaded = not path.exists() and _download(origin, path, sha256=expected, progress=progress)
        if expected and not downloaded:
            verify(path, expected)
        if not expected:
            # a folder that only others may write has no records
            with nullcontext() if downloaded else suppress(OSError):
                _write_record(path)
    except ConnectionError as error:
        by_hand = f"download it by hand from {source or url} and put it at {path}, or {_BY_HAND}"
        raise ConnectionError(f"could not fetch {origin}: {error}; {by_hand}") from error
    except OSError as error:
        reason = f"could not write to {path.parent}: {error.strerror}; set TESSEL_HOME to another folder"
        raise OSError(error.errno, reason) from error
    except ValueError as error:
        if sha256:
            raise
        raise ValueError(f"{error}; {_record_path(path)}, written by the first fetch, expects it") from error
    return path


def fetch_weight(weight: WeightFile, *, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """`fetch` the file of a row of either manifest; the imported file, if there is one (see `keep_imported`).

    Raises ValueError with the reason if the row has no url and TESSEL_WEIGHTS_URL names no mirror.
    """
    imported = imported_path(weight, cache_dir=cache_dir)
    if imported.is_file():
        if recorded := _recorded(imported):
            verify(imported, recorded)
        return imported
    url, filename = weight.url, None
    if not url:
        url, filename = _mirror_url(imported.name), imported.name
    if not url:
        reason = f"{weight.why_no_url}; get the file from {weight.source} and {_BY_HAND}"
        raise ValueError(f"{weight.name} cannot be fetched: {reason}")
    return fetch(
        url, sha256=weight.sha256, cache_dir=cache_dir, filename=filename, source=weight.source, progress=progress
    )


def imported_path(weight: WeightFile, *, cache_dir: str | Path | None = None) -> Path:
    """Where the cache keeps the weights of a row that were imported: a safetensors file with our keys."""
    return _cache(cache_dir) / f"{weight.name}.safetensors"


def is_available(weight: WeightFile, *, cache_dir: str | Path | None = None) -> bool:
    """Whether `fetch_weight` has a file to return or a url to try."""
    return bool(weight.url or os.environ.get(_MIRROR)) or imported_path(weight, cache_dir=cache_dir).is_file()


def find_local(weight: WeightFile, *, cache_dir: str | Path | None = None) -> Path | None:
    """The file of a row in the cache, imported or downloaded; None if there is none."""
    paths = [imported_path(weight, cache_dir=cache_dir)]
    if weight.url:
        paths.append(_cached_path(weight.url, cache_dir, None))
    return next((path for path in paths if path.is_file()), None)


def keep_imported(weight: WeightFile, state: Mapping[str, Tensor], *, cache_dir: str | Path | None = None) -> Path:
    """Keep `state`, the weights of a row with our keys, in the cache; `fetch_weight` returns this file from now on.

    An earlier import of the row is replaced. Raises OSError if the file cannot be written.
    """
    path = imported_path(weight, cache_dir=cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(state, path, overwrite=True)
    _write_record(path)
    return path


def remove_cached(path: Path) -> None:
    """Delete a file of the cache and its record."""
    path.unlink(missing_ok=True)
    _record_path(path).unlink(missing_ok=True)


def cached_path(url: str, *, cache_dir: str | Path | None = None) -> Path | None:
    """The path to which `fetch` downloads `url`; None for local files, which are not copied."""
    return _cached_path(url, cache_dir, None) if _local_path(url) is None else None


def sha256_of(path: str | Path) -> str:
    """The file's sha256 as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: str | Path, sha256: str) -> None:
    """Raise ValueError if the file has another sha256."""
    expected, found = _digest(sha256), sha256_of(path)
    if found != expected:
        raise ValueError(f"{path}: refused, its sha256 is {found}, expected {expected}; delete or replace the file")


def read_state(path: str | Path, *, state_key: str = "") -> dict[str, Tensor]:
    """Read the state dict of a safetensors or PyTorch file, on the CPU, without a `module.` common to all keys.

    In a PyTorch file the state dict is the entry `state_key`; if that is empty, the first of the entries `model`,
    `state_dict`, `model_state` and `model_state_dict`; if there is none, the whole file. Safetensors files have no
    entries, and `state_key` is ignored. PyTorch files are read with `weights_only`: no pickled code runs. Besides
    tensors and containers they may hold settings of argparse or yacs.

    The checksums in a zip archive, which torch does not compare, are compared here.

    Raises ValueError naming the file if it is damaged, needs code to be loaded, or has values that are not tensors.
    """
    path = Path(path)
    _require_file(path)
    state = _read(path, state_key)
    if names := _not_tensors(state):
        raise ValueError(f"{path}: the entries {names} are not tensors; name the one with the weights by state_key")
    if not state:
        raise ValueError(f"{path}: there are no tensors in it")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): tensor.detach() for key, tensor in state.items()}


def write_state(state: Mapping[str, Tensor], path: str | Path, *, overwrite: bool = False) -> None:
    """Write a state dict to a safetensors file, atomically.

    Raises ValueError if the suffix of `path` is not .safetensors or a value is not a tensor, FileExistsError if the
    file exists and `overwrite` is False, and OSError if it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists and is not overwritten; delete it or choose another name")
    if names := _not_tensors(state):
        raise ValueError(f"{path} not written: the entries {names} are not tensors")
    # safetensors rejects strided tensors and tensors that share memory
    flat = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # `save_file` would make a file that other users cannot read
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


def _cache(cache_dir: str | Path | None) -> Path:
    if cache_dir is None:
        cache_dir = Path(os.environ.get("TESSEL_HOME") or torch.hub.get_dir(), "checkpoints")
    return Path(cache_dir).expanduser()


def _mirror_url(filename: str) -> str:
    """The url of a file of the cache on the mirror; empty if no mirror is set."""
    base = os.environ.get(_MIRROR, "").rstrip("/")
    return f"{base}/{quote(filename)}" if base else ""


def _record_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def _write_record(path: Path) -> None:
    record = _record_path(path)
    part = record.with_name(f"{record.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"sha256": sha256_of(path), "size": path.stat().st_size}) + "\n")
    os.replace(part, record)


def _recorded(path: Path) -> str:
    """The sha256 in the record of a file of the cache; empty if it has none."""
    record = _record_path(path)
    if not record.exists():
        return ""
    try:
        return _digest(json.loads(record.read_text())["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} is damaged ({error}); delete it, and fetch the file again") from error


def _cached_path(url: str, cache_dir: str | Path | None, filename: str | None) -> Path:
    if filename is None:
        base = PurePosixPath(unquote(urlsplit(url).path)).name
        filename = f"{hashlib.sha256(url.encode()).hexdigest()[:10]}-{base}"
    if Path(filename).name != filename:
        raise ValueError(f"filename = {filename!r} must be a name without a folder")
    return _cache(cache_dir) / filename


def _download(url: str, target: Path, *, sha256: str, progress: bool) -> bool:
    """Download `url` to `target`; False if another process did so while this one waited."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return False
        keep = False
        try:
            _receive(url, part, progress)
            if sha256 and (found := sha256_of(part)) != sha256:
                raise ValueError(f"{url}: refused, its sha256 is {found}, expected {sha256}; the download is deleted")
            os.replace(part, target)
            return True
        except (ConnectionError, KeyboardInterrupt):
            keep = part.exists() and part.stat().st_size > 0
            raise
        finally:
            if not keep:
                part.unlink(missing_ok=True)


def _receive(url: str, part: Path, progress: bool) -> None:
    """Download the missing part of `url` and append it to `part`; start again if the server cannot resume."""
    from tqdm import tqdm

    got = part.stat().st_size if part.exists() else 0
    with _open(url, got) as reply, part.open("ab") as file:
        if reply.headers.get_content_type() == "text/html":
            raise ConnectionError("the server answered with a web page, not a file")
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
                    raise ConnectionError(f"the download ended after {got} of {total or 'unknown'} bytes")
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
    if bad := _damaged_entry(path):
        raise ValueError(f"{path}: damaged, its entry {bad} does not match its checksum")
    try:
        with torch.serialization.safe_globals(_SETTINGS):
            content = load_file(path) if flat else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            # without torch's message, which explains how to run the code
            raise ValueError(f"{path}: refused, loading it would call `{asked[1]}`; no code was run") from None
        raise ValueError(f"{path}: damaged, or not a checkpoint ({type(error).__name__})") from error
    return content if flat else _unwrap(content, state_key, path)


def unknown_of(path: str | Path) -> list[str]:
    """What the content of a file of weights does not tell about it, a sentence each: damage that nothing would show.

    Raises ValueError like `read_state`.
    """
    path = Path(path)
    state = read_state(path)
    found = [] if is_zipfile(path) else ["its format has no checksums, so changed values would not be noticed"]
    if bad := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        found.append(f"not all values are finite, in {_some(bad)}: it is damaged, or meant to be so")
    return found


def _damaged_entry(path: Path) -> str | None:
    """The first entry of a zip archive that does not match its checksum.

    torch.save can leave the checksums out; then no entry matches, and None is returned.
    """
    if not is_zipfile(path):
        return None
    bad, good = [], False
    try:
        with ZipFile(path) as archive:
            for entry in archive.infolist():
                try:
                    with archive.open(entry) as file:
                        while file.read(_CHUNK):
                            pass
                    good = True
                except (BadZipFile, zlib.error, EOFError):
                    bad.append(entry.filename)
    except Exception as error:  # a damaged archive can fail in any way
        return type(error).__name__
    return bad[0] if bad and good else None


def _is_safetensors(path: Path) -> bool:
    # files without the suffix are recognized by their start: eight bytes of length, then a JSON header
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _unwrap(content: Any, state_key: str, path: Path) -> Mapping[str, Any]:
    if isinstance(content, Mapping):
        if state_key and state_key not in content:
            raise ValueError(f"{path}: no entry {state_key!r}; its entries are {_some(content)}")
        wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), "")
        content = content.get(state_key or wrapper, content)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict, found a {type(content).__name__}")
    return content


def _not_tensors(state: Mapping[str, Any]) -> str:
    """The names of the entries that are not tensors."""
    return _some(key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor)))


def _some(names: Iterable[Any], most: int = 8) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
