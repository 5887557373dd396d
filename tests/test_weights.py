"""`tessel weights import`, `reproduce` and `push`, and what `pretrained=True` accepts."""

import json
import shutil
import types
from pathlib import Path

import golden
import huggingface_hub
import pytest
import timm
import torch
import trainer
import yaml
from PIL import Image

import tessel
import tessel.zoo
from tessel.checkpoints import find_weight, store
from tessel.cli import main

NAME = "biformer_tiny"
RUN = Path(__file__).with_name("artefacts") / "5fab7a6" / "classify"
SYNSETS = timm.data.ImageNetInfo().label_names()


@pytest.fixture(scope="module")
def published():
    return {key: value.float() for key, value in golden.published_state(golden.load(NAME)).items()}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSEL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TESSEL_WEIGHTS_URL", raising=False)
    return tmp_path / "home"


@pytest.fixture
def file(tmp_path, published):
    """A file like the published one: raw weights, an EMA copy, and more."""
    ema = {key: torch.zeros_like(value) for key, value in published.items()}
    torch.save({"model": published, "model_ema": ema, "epoch": 299}, tmp_path / "best.pth")
    return tmp_path / "best.pth"


def test_imported_weights_are_found_by_pretrained(file, published, capsys, home):
    with pytest.raises(RuntimeError, match=rf"tessel weights import {NAME}\.in1k FILE"):
        timm.create_model(NAME, pretrained=True)
    assert not tessel.zoo.has_weights(NAME)
    assert main(["weights", "import", NAME, str(file)]) == 0
    assert "kept" in capsys.readouterr().out and tessel.zoo.has_weights(NAME)
    file.unlink()
    model = timm.create_model(NAME, pretrained=True)
    wanted = tessel.zoo.from_published(NAME, published)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in wanted.items())
    assert timm.create_model(NAME, pretrained=True, num_classes=3).head.fc.weight.shape[0] == 3
    assert main(["weights", "list", "biformer_t*"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "imported"
    assert main(["weights", "fetch", NAME]) == 0
    assert f"weights {NAME}.in1k, imported" in capsys.readouterr().out
    assert main(["info", NAME]) == 0
    assert f"in the cache: {home / 'checkpoints' / NAME}.in1k.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["missing", "nan", "shape", "unknown"])
def test_files_that_are_not_whole_are_not_imported(kind, published, tmp_path, capsys, home):
    state = dict(published)
    key = "head.weight"
    if kind == "missing":
        del state[key]
    elif kind == "nan":
        state[key] = state[key].clone()
        state[key][3, 4] = float("nan")
    elif kind == "shape":
        state[key] = state[key][:, :-1]
    else:
        state["more"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "best.pth")
    assert main(["weights", "import", NAME, str(tmp_path / "best.pth")]) == 1
    error = capsys.readouterr().err
    words = {
        "missing": "lacks 1 keys: head.fc.weight",
        "nan": "not finite",
        "shape": "size mismatch",
        "unknown": "more",
    }
    assert "best.pth does not hold the weights biformer_tiny.in1k: " in error
    assert words[kind] in error and error.count("\n") == 1
    assert not list(home.rglob("*.safetensors"))


def test_import_of_unknown_weights_or_files_is_an_error(file, capsys, monkeypatch):
    assert main(["weights", "import", "biformer_smal", str(file)]) == 1
    assert "did you mean biformer_small" in capsys.readouterr().err
    assert main(["weights", "import", NAME, "nowhere.pth"]) == 2
    assert "nowhere.pth" in capsys.readouterr().err


def test_published_file_of_unknown_hash_must_hold_the_classifier_too(published, tmp_path, monkeypatch):
    """Also where timm would make a new one: what lacks it is another file than the published one."""
    part = {key: value for key, value in published.items() if not key.startswith("head.")}
    weight = find_weight(NAME)
    store.keep_imported(weight, tessel.zoo.from_published(NAME, published))
    whole = timm.create_model(NAME, pretrained=True, num_classes=3)
    path = store.imported_path(weight)
    store.remove_cached(path)
    store.write_state(part, path)
    with pytest.raises(ValueError, match=r"the checkpoint lacks 2 keys|2 published keys are missing"):
        timm.create_model(NAME, pretrained=True, num_classes=3)
    overlay = {"file": str(path)}
    own = timm.create_model(NAME, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert torch.equal(own.stem[0].conv.weight, whole.stem[0].conv.weight)


@pytest.mark.parametrize("name", ["halonet26t", "halonet50ts", "sehalonet33ts", "davit_tiny"])
def test_entries_of_timms_hub(name, tmp_path):
    """The row names timm's own entry, and a file with random weights of timm's model gives the same logits here."""
    theirs = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    cfg = theirs.pretrained_cfg
    row = find_weight(f"tessel_{name}.{cfg['tag']}")
    assert row.url == f"https://huggingface.co/{cfg['hf_hub_id']}/resolve/main/model.safetensors"
    for key in ("input_size", "crop_pct", "interpolation", "mean", "std", "num_classes"):
        assert getattr(row, key) == cfg[key], key
    store.write_state(theirs.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    ours = timm.create_model(row.name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.fixture
def imagenet(tmp_path):
    """A validation folder with two images of each of three classes."""
    images = trainer.draw_folder(tmp_path / "images", train=1, val=2)
    for number in range(3):
        (images / "val" / f"class_{number}").rename(images / "val" / SYNSETS[number])
    return images


def test_reproduce_compares_with_the_published_accuracy(file, imagenet, capsys):
    argv = ["weights", "reproduce", NAME, "--data", str(imagenet), "run.device=cpu", "data.workers=0"]
    assert main(argv) == 1
    assert "no weights that can be downloaded" in capsys.readouterr().err
    assert main(["weights", "import", NAME, str(file)]) == 0
    capsys.readouterr()
    assert main(argv) == 1, "random weights do not reach 81.4"
    printed, error = capsys.readouterr()
    assert "is not the published 81.4" in error
    model = timm.create_model(NAME, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    hits = []
    for number in range(3):
        for path in sorted((imagenet / "val" / SYNSETS[number]).iterdir()):
            with torch.no_grad():
                hits.append(int(model(transform(Image.open(path).convert("RGB"))[None])[0, :3].argmax()) == number)
    top1 = 100 * sum(hits) / len(hits)
    assert f"reproduced_top1 = {top1:.3f}" in printed and f'["{NAME}.in1k"]' in printed
    row = next(line for line in printed.splitlines() if line.startswith(f"{NAME}.in1k,val,"))
    assert row.split(",")[2:4] == [f"{top1:.3f}", f"{100 - top1:.3f}"] and row.split(",")[7:] == [
        "224",
        "0.875",
        "bicubic",
    ]


def test_dry_run_of_push_prints_the_model_card(file, capsys):
    assert main(["weights", "import", NAME, str(file)]) == 0
    capsys.readouterr()
    assert main(["weights", "push", NAME, "someone/biformer", "--dry-run"]) == 0
    card = capsys.readouterr().out
    for words in ("license: mit", "hf-hub:someone/biformer", "arxiv.org/abs/2303.08810", "Params (M): 13.1", "81.4"):
        assert words in card


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the place of the Hugging Face hub: uploads go there, downloads come from there."""
    root = tmp_path / "hub"

    def create_repo(self, repo_id, *, private, exist_ok):
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (root / repo_id / ".private").write_text(str(private))
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"https://hub.example/{repo_id}"

    def download(repo_id, filename, **options):
        if not (root / repo_id / filename).is_file():
            raise huggingface_hub.utils.EntryNotFoundError(filename)
        return str(root / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "file_exists",
        lambda self, *, repo_id, filename, **_: (root / repo_id / filename).exists(),
    )
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return root


def test_a_pushed_run_is_a_model_of_the_hub(hub, capsys):
    argv = ["weights", "push", str(RUN), "someone/digits", "--private"]
    assert main(argv) == 1 and not hub.exists()
    assert "the license of these weights is not known; give it with --license" in capsys.readouterr().err
    assert main([*argv, "--license", "MIT"]) == 0
    assert "https://hub.example/someone/digits" in capsys.readouterr().out
    files = {path.name for path in (hub / "someone/digits").iterdir()}
    assert files == {".private", "README.md", "config.json", "model.safetensors"}
    assert (hub / "someone/digits/.private").read_text() == "True"
    head, card = (hub / "someone/digits/README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head)["license"] == "mit" and "tessel" in yaml.safe_load(head)["tags"]
    for words in (
        "# Model card for digits",
        "Trained with tessel",
        'tessel.load("hf-hub:someone/digits")',
        "Classes: 10",
    ):
        assert words in card
    config = json.loads((hub / "someone/digits/config.json").read_text())
    assert config["label_names"] == [str(digit) for digit in range(10)]
    image = Image.effect_noise((40, 30), 90)
    pushed, run = (tessel.load(source, device="cpu") for source in ("hf-hub:someone/digits", RUN))
    (found,), (wanted,) = (model.predict(image, topk=10) for model in (pushed, run))
    assert found.labels == wanted.labels and found.probabilities == pytest.approx(wanted.probabilities)
    # a card that is there already is kept
    (hub / "someone/digits/README.md").write_text("mine")
    assert main([*argv, "--license", "MIT"]) == 0 and (hub / "someone/digits/README.md").read_text() == "mine"


def test_published_weights_are_pushed_with_their_license(file, published, hub, capsys):
    assert main(["weights", "import", NAME, str(file)]) == 0
    assert main(["weights", "push", NAME, "someone/biformer"]) == 0
    card = (hub / "someone/biformer/README.md").read_text()
    assert "license: mit" in card and f"Published weights `{NAME}.in1k`, converted" in card
    state = timm.create_model("hf-hub:someone/biformer", pretrained=True).state_dict()
    for key, tensor in tessel.zoo.from_published(NAME, published).items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("source", ["segment", "detect"])
def test_only_classifiers_are_pushed(source, hub, capsys):
    assert main(["weights", "push", str(RUN.with_name(source)), "someone/x", "--license", "mit"]) == 1
    assert "only classifiers, by name or as a run, have timm's format" in capsys.readouterr().err and not hub.exists()


def test_list_as_json(capsys):
    assert main(["weights", "list", "cswin_tiny*", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "cswin_tiny.in1k" and row["published_top1"] == 82.8


def test_reproduced_accuracy_within_the_tolerance_is_a_success(monkeypatch, capsys, tmp_path):
    found = {"top1": 81.35, "count": 50_000}
    monkeypatch.setattr("tessel.train.evaluate.evaluate_model", lambda *arguments: {"val": found})
    assert main(["weights", "reproduce", NAME, "--data", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "top-1 81.350 on 50000 images, published 81.400, difference -0.050" in printed
    assert main(["weights", "reproduce", NAME, "--data", str(tmp_path), "--tolerance", "0.01"]) == 1
