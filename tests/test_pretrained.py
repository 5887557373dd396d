"""`create_model(..., pretrained=True)` with a file served from a local URL, and the files that it must reject."""

import dataclasses
import functools
import hashlib
import http.server
import pickle
import threading
from pathlib import Path

import golden
import pytest
import timm
import torch

import tessel.zoo
from tessel.checkpoints import load_manifest

NAME = "biformer_tiny"
ROW = "biformer_tiny.in1k"


@pytest.fixture(scope="module")
def published():
    return {key: value.float() for key, value in golden.published_state(golden.load(NAME)).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, published):
    """A folder with a checkpoint like the published one: the weights under `model`, and other entries."""
    root = tmp_path_factory.mktemp("release")
    counters = {k: torch.zeros(s, dtype=torch.int64) for k, s, _ in golden.load(NAME)["index_buffers"]}
    torch.save({"model": {**published, **counters}, "epoch": 299}, root / "model.pth")
    return root


@pytest.fixture(scope="module")
def server(folder):
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture
def from_manifest(monkeypatch, server, folder, tmp_path):
    """Build the model as if the manifest's row pointed to `file` on the server, with the given sha256."""

    def build(file: str = "model.pth", *, sha256: str = "", **kwargs):
        url = f"{server}/{file}"
        row = dataclasses.replace(load_manifest()[ROW], url=url, sha256=sha256)
        monkeypatch.setattr("tessel.zoo._pretrained.load_manifest", lambda: {ROW: row})
        overlay = {"url": url, **kwargs.pop("overlay", {})}
        return timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache", **kwargs
        )

    return build


def cached_files(tmp_path: Path) -> list[Path]:
    """The files in the cache, without the empty lock files and the records of hashes."""
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and not path.name.startswith(".")]


def test_pretrained_downloads_verifies_converts_and_loads(from_manifest, folder, published, tmp_path):
    digest = hashlib.sha256((folder / "model.pth").read_bytes()).hexdigest()
    model = from_manifest(sha256=digest)
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    ours = tessel.zoo.from_published(NAME, published)
    assert state.keys() == ours.keys() and all(torch.equal(state[k], ours[k]) for k in ours)
    assert len(cached_files(tmp_path)) == 1, "the cached file"
    assert not model.pretrained_cfg.get("state_dict"), "the weights must not stay in the configuration"


def test_pretrained_adapts_to_in_chans_num_classes_and_features_only(from_manifest, published):
    gray = from_manifest(in_chans=1)
    stem = published["downsample_layers.0.0.weight"]
    torch.testing.assert_close(gray.stem[0].conv.weight, stem.sum(1, keepdim=True))
    other = from_manifest(num_classes=7)
    assert other.head.fc.weight.shape == (7, 512)
    torch.testing.assert_close(other.stem[0].conv.weight, stem)
    features = from_manifest(features_only=True)
    torch.testing.assert_close(features.model.stem[0].conv.weight, stem)


def test_a_local_file_loads(folder, published):
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(folder / "model.pth")})
    torch.testing.assert_close(model.stem[0].conv.weight, published["downsample_layers.0.0.weight"])


def test_a_state_dict_with_our_keys_loads(tmp_path):
    model = timm.create_model(NAME)
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    again = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "ours.pt")})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_hub_export_round_trip(tmp_path):
    model = timm.create_model(NAME, num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))


def test_model_without_weights_is_an_error():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for biformer_atto.*pretrained=False"):
        timm.create_model("biformer_atto", pretrained=True)


def test_weights_without_url_are_an_error_with_the_reason():
    with pytest.raises(RuntimeError, match=r"biformer_small\.in1k.*no longer answers.*file="):
        timm.create_model("biformer_small", pretrained=True)


class RunsCode:
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def write_broken_files(folder: Path, published: dict, marker: Path) -> dict[str, Path]:
    """Write checkpoints that must be refused; the one named `code` creates the file `marker` if its code runs."""

    def save(name: str, content) -> Path:
        torch.save(content, folder / name)
        return folder / name

    truncated = folder / "truncated.pth"
    truncated.write_bytes((folder / "model.pth").read_bytes()[:-1000])
    code = folder / "code.pth"
    code.write_bytes(pickle.dumps({"model": {"weight": RunsCode(marker)}}))
    first, *rest = published
    ten = {k: v[:10] if k.startswith("head.") else v for k, v in published.items()}
    return {
        "truncated": truncated,
        "code": code,
        "missing": save("missing.pth", {"model": {k: published[k] for k in rest}}),
        "unexpected": save("unexpected.pth", {"model": {**published, "extra.weight": torch.zeros(1)}}),
        "classes": save("classes.pth", {"model": ten}),
        "variant": save("variant.pth", {"model": {**published, "norm.weight": torch.zeros(3)}}),
    }


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated.pth"),
        ("code", "code.pth"),
        ("missing", r"downsample_layers\.0\.0\.weight"),
        ("unexpected", r"extra\.weight"),
        ("classes", "10 classes.*1000"),
        ("variant", r"norm\.weight.*\(3,\).*\(512,\)"),
    ],
)
def test_unusable_file_is_refused_and_deleted(kind, message, from_manifest, folder, published, tmp_path):
    marker = tmp_path / "ran"
    file = write_broken_files(folder, published, marker)[kind]
    with pytest.raises(ValueError, match=message) as caught:
        from_manifest(file.name)
    assert "\n" not in str(caught.value), "one clear message"
    assert not marker.exists(), "nothing in the file may run"
    assert cached_files(tmp_path) == []


def test_file_with_wrong_hash_is_refused_and_deleted(from_manifest, tmp_path):
    with pytest.raises(ValueError, match="sha256"):
        from_manifest(sha256="0" * 64)
    assert cached_files(tmp_path) == []


def test_an_older_download_is_not_deleted(from_manifest, folder, published, tmp_path):
    from_manifest()
    (cached,) = cached_files(tmp_path)
    with pytest.raises(ValueError, match="sha256"):
        from_manifest(sha256="0" * 64)
    assert cached_files(tmp_path) == [cached]
