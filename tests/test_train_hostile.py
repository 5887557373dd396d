"""Hostile files: none that a user may be given runs code, and each is refused in one line."""

import io
import os
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
import trainer
from PIL import Image

from tessel.checkpoints import read_state
from tessel.train import evaluate
from tessel.train.data.class_file import read_class_file
from tessel.train.data.image_io import read_file
from tessel.train.data.segmentation import read_mask
from tessel.train.data.sources.folder import ImageFolder
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.evaluation import load_run
from tessel.train.openmmlab.compat import load_from_local
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.schema import PixelFormat
from tessel.train.report.runs import read_run
from tessel.train.run import checkpoint

UNFINISHED = Path(__file__).with_name("artefacts") / "5fab7a6/digits_unfinished"


class Hostile:
    """An object whose pickle makes the folder `ran` when it is read."""

    def __init__(self, folder):
        self.ran = folder / "ran"

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


@pytest.fixture
def hostile(tmp_path):
    """Its pickle must run nothing in the test."""
    yield (found := Hostile(tmp_path))
    assert not found.ran.exists()


def sign(path):
    """Write the manifest of a checkpoint for the files that are there, as an attacker does."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": checkpoint._sha256(file)}
        for file in path.iterdir()
        if file.name != checkpoint.MANIFEST
    }
    trainer.rewrite_manifest(path, files=files)


def test_the_objects_of_these_tests_do_run_code(tmp_path):
    pickle.loads(pickle.dumps(found := Hostile(tmp_path)))
    assert found.ran.is_dir()


@pytest.mark.parametrize("where", ["metadata", "value"])
def test_checkpoint_runs_no_code(tmp_path, hostile, where, capfd):
    shutil.copytree(UNFINISHED, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-00000006"
    if where == "metadata":
        (path / ".metadata").write_bytes(pickle.dumps(hostile))
    else:  # DCP reads values that are not tensors by torch.load(weights_only=False)
        manifest = (path / checkpoint.MANIFEST).read_text()
        shutil.rmtree(path)
        names = timm.create_model("biformer_atto", num_classes=10).state_dict()
        with checkpoint._no_dist_warning():
            dcp.save(
                {part: dict.fromkeys(names, hostile) for part in ("model", "ema")}, checkpoint_id=path, no_dist=True
            )
        (path / checkpoint.MANIFEST).write_text(manifest)
    sign(path)
    assert evaluate.main([str(path)]) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: checkpoint {path} is refused: its ") and error.count("\n") == 1, error
    assert "no code was run" in error


def test_resume_from_a_hostile_checkpoint_runs_no_code(tmp_path, hostile, capfd):
    shutil.copytree(UNFINISHED, tmp_path / "other")
    path = tmp_path / "other/checkpoints/step-00000006"
    (path / ".metadata").write_bytes(pickle.dumps(hostile))
    sign(path)
    recipe = UNFINISHED.with_name("digits.yaml")
    assert trainer.train(recipe, f"run.out={tmp_path}", "run.name=new", f"ckpt.resume={path}") == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: checkpoint {path} is refused") and error.count("\n") == 1, error


def small_state():
    return {"model": {"weight": torch.ones(3, 2)}, "optimizer": {"lr": 0.1, "betas": (0.9, 0.999), "names": ["a"]}}


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Change some bytes, or write in the name of a function that would run code."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed))
        match rng.randrange(5):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                del changed[at : at + rng.randint(1, 20)]
            case 2:
                changed[at:at] = changed[(start := rng.randrange(len(changed))) : start + rng.randint(1, 40)]
            case 3:
                changed[at:at] = rng.choice([b"cos\nmkdir\n", b"cbuiltins\neval\n", b"(Vran\ntR", b"b", b"R", b"\x81"])
            case 4:
                changed = changed.replace(b"Metadata", rng.choice([b"__dict__", b"Metadatb"]), 1)
    return bytes(changed)


def fuzz_metadata(folder: Path, count: int, seed: int) -> None:
    """Read `count` mutations of a checkpoint's `.metadata`: each is read as data or refused as damaged."""
    with checkpoint._no_dist_warning():
        dcp.save(small_state(), checkpoint_id=folder, no_dist=True)
    content, rng, refused = (folder / ".metadata").read_bytes(), random.Random(seed), 0
    ran = Path("ran")  # which the function that is written in would make
    for number in range(count):
        (folder / ".metadata").write_bytes(mutate(content, rng))
        try:
            checkpoint.load(folder, small_state(), World())
        except UserError:
            refused += 1
        except Exception as error:
            pytest.fail(f"mutation {number} with seed {seed}: {error!r}")
        assert not ran.exists(), f"mutation {number} with seed {seed} ran code"
    print(f"seed {seed}: {refused} of {count} mutations refused, the others read as data")
    assert refused > count / 2


def test_mutated_metadata_is_read_as_data_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz_metadata(tmp_path / "step", 200, 0)


def hostile_files(folder: Path, hostile: Hostile) -> dict[str, Path]:
    """The same pickle as torch's archive, as torch's old format, bare, nested, and under the name of another format."""
    files = {name: folder / f"{name}.pth" for name in ("archive", "old", "bare", "nested")}
    torch.save({"state_dict": {"weight": hostile}}, files["archive"])
    torch.save(hostile, files["old"], _use_new_zipfile_serialization=False)
    files["bare"].write_bytes(pickle.dumps(hostile, protocol=2))
    torch.save({"model": {"weight": torch.ones(1)}, "args": [hostile]}, files["nested"])
    for name in ("safetensors", "npz", "npy"):
        files[name] = shutil.copy(files["bare"], folder / f"bare.{name}")
    return files


def test_files_of_weights_run_no_code(tmp_path, hostile):
    for file in hostile_files(tmp_path, hostile).values():
        with pytest.raises(ValueError) as caught:
            read_state(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["biformer_atto", "test_resnet"])
def test_initial_weights_run_no_code(tmp_path, hostile, model, capsys):
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", data={"source": "digits"}, model={"name": model})
    for file in hostile_files(tmp_path, hostile).values():
        assert trainer.train(recipe, f"model.init_from={file}") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error


def test_initial_weights_of_segmenters_run_no_code(tmp_path, hostile, capsys):
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **trainer.SCENES["segment"])
    for name, file in hostile_files(tmp_path, hostile).items():
        for key in ("task.segment.load_from", "model.init_from", "task.segment.decode_head.init_cfg.checkpoint"):
            overrides = [f"{key}={file}"]
            if "init_cfg" in key:
                overrides.append("task.segment.decode_head.init_cfg.type=Pretrained")
            code = trainer.train(recipe, *overrides, "data.aug={}", "--dry-run")
            error = capsys.readouterr().err
            assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, (name, key, error)


def test_data_run_no_code(tmp_path, hostile):
    """WebDataset columns, members of archives, class maps, arrays, masks, annotation files."""
    content = pickle.dumps(hostile)
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name, data in {"a.png": png.getvalue(), "a.cls": content, "a.pkl": content, "a.pyd": content}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    array = np.empty((2, 2), object)
    array.fill(hostile)
    np.save(tmp_path / "object.npy", array, allow_pickle=True)
    folder = tmp_path / "images"
    for name, data in {
        "train/a/object.npy": (tmp_path / "object.npy").read_bytes(),
        "train/a/bare.npy": content,
        "train/a/bare.npz": content,
        "train/a/bare.png": content,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (tmp_path / "classes.pkl").write_bytes(content)

    def refused(make):
        with pytest.raises(UserError) as caught:
            make()
        assert "\n" not in str(caught.value)

    open_source = trainer.open_source
    refused(lambda: open_source("wds", "train", root=str(tmp_path)))
    refused(lambda: open_source("wds", "train", root=str(tmp_path), class_map=f"{tmp_path}/classes.pkl"))
    refused(lambda: ImageFolder(folder / "train")[0])
    for name in ("train/a/object.npy", "train/a/bare.npy", "train/a/bare.npz", "train/a/bare.png"):
        refused(lambda name=name: read_file(str(folder / name)))
        refused(lambda name=name: read_file(str(folder / name), pixel_format=PixelFormat(5)))
        refused(lambda name=name: read_mask(str(folder / name)))
    for name in ("classes.yaml", "classes.json", "classes.csv", "classes.txt"):
        (tmp_path / name).write_bytes(content)
        refused(lambda name=name: read_class_file(tmp_path / name))
    (tmp_path / "tagged.yaml").write_text("- !!python/object/apply:os.mkdir [ran]")
    read_class_file(tmp_path / "tagged.yaml")
    refused(lambda: load_recipe(tmp_path / "tagged.yaml"))


def test_run_directories_and_exports_run_no_code(tmp_path, hostile):
    """The files of a run that `load_run`, `evaluate` and `report` read, each replaced by a pickle."""
    source = UNFINISHED.with_name("classify")
    for file in ("export/config.json", "DONE", "recipe.yaml"):
        shutil.copytree(source, run := tmp_path / file.replace("/", "-"))
        (run / file).write_bytes(pickle.dumps(hostile))
        with pytest.raises((UserError, ValueError)):
            load_run(run)
    shutil.copytree(source, run := tmp_path / "predictions")
    (run / "evaluation/predictions.npz").write_bytes(pickle.dumps(hostile))
    with pytest.raises(UserError, match="evaluation cannot be read"):
        read_run(run)


def test_checkpoints_of_mmengine_run_no_code(tmp_path, hostile):
    for file in hostile_files(tmp_path, hostile).values():
        with pytest.raises(Exception) as caught:
            load_from_local(str(file))
        assert not isinstance(caught.value, OSError)
