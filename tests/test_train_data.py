"""A run goes on with the data that it began with: other classes and other samples are refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import trainer
from PIL import Image

from tessel.train.data.fingerprint import changes, fingerprint
from tessel.train.data.segmentation import SegmentationDataset, read_mask
from tessel.train.data.sources.coco import COCO, open_boxes
from tessel.train.data.sources.csv import CSV, open_labels
from tessel.train.run import checkpoint


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped at step 3; its data are in images/."""
    folder = tmp_path_factory.mktemp("stopped")
    trainer.draw_folder(folder / "images")
    options = {"model": {"name": "test_resnet", "drop_path_rate": None}, "sched": {"steps": 5, "warmup": 0}}
    recipe = trainer.write_recipe(folder / "tiny.yaml", data={"root": str(folder / "images")}, **options)
    with trainer.before_step(3):
        assert trainer.train(recipe) == 0
    return folder


def swap(root: Path) -> None:
    for split in ("train", "val"):
        names = [root / split / name for name in ("class_0", "kept", "class_2")]
        names[0].rename(names[1])
        names[2].rename(names[0])
        names[1].rename(names[2])


def rename(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "class_0").rename(root / split / "zebra")


def add(root: Path) -> None:
    for number in range(5):
        shutil.copy(root / "train/class_1/0.png", root / f"train/class_1/new{number}.png")


def remove(root: Path) -> None:
    for number in range(3):
        (root / f"val/class_1/{number}.png").unlink()


CHANGES = {
    swap: "the 36 samples of train have other sizes or labels, the 15 samples of val have other sizes or labels",
    rename: "class 0 is class_1, in training class_0",
    add: "train had 36 samples, now 41",
    remove: "val had 15 samples, now 12",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_data_are_refused_by_name(stopped, tmp_path, monkeypatch, capsys, change):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    images = stopped / "images"
    images.rename(kept := stopped / "kept")
    shutil.copytree(kept, images)
    try:
        change(images)
        recipe = stopped / "tiny.yaml"
        assert trainer.train(recipe, f"run.out={tmp_path}/runs") == 1
        error = capsys.readouterr().err
        assert CHANGES[change] in error and error.count("\n") == 1, error
        code = trainer.train(recipe, f"run.out={tmp_path}/runs", "ckpt.other_data=true")
        shown = capsys.readouterr()
        if change is rename:
            assert code == 1 and CHANGES[change] in shown.err
        else:
            assert code == 0 and f"at step 3 (not bitwise: {CHANGES[change]})" in shown.out, shown
            manifests = [tmp_path / f"runs/tiny/checkpoints/step-0000000{step}" for step in (3, 5)]
            before, after = (checkpoint.read_manifest(path)["data"] for path in manifests)
            assert ", ".join(changes(before, after)) == CHANGES[change]
    finally:
        shutil.rmtree(images)
        kept.rename(images)


def test_unchanged_data_resume_exactly(stopped, tmp_path, capsys):
    shutil.copytree(stopped / "runs", tmp_path / "runs")
    assert trainer.train(stopped / "tiny.yaml", f"run.out={tmp_path}/runs") == 0
    assert "at step 3 (exact)" in capsys.readouterr().out


def test_labels_count_for_every_kind_of_data(tmp_path):
    """The fingerprint changes with a label in a list, a box, and the size of a mask file."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")

    def listed(number):
        (tmp_path / "list.csv").write_text(f"path,label,part\na.png,x,val\nb.png,{'xy'[number]},train\n")
        data = CSV(root=str(tmp_path / "list.csv"), split_key="part", class_map=str(tmp_path / "classes.txt"))
        return open_labels(data, "train")

    def boxed(number):
        image = {"id": 1, "file_name": "a.png", "width": 8, "height": 8}
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2 + number, 3], "area": 9, "iscrowd": 0}
        content = {"images": [image], "categories": [{"id": 1, "name": "x"}], "annotations": [box]}
        (tmp_path / "boxes.json").write_text(json.dumps(content))
        return open_boxes(COCO(root=str(tmp_path), train=("boxes.json", "."), val=("boxes.json", ".")), "train")

    def masked(number):
        Image.new("L", (8 + 4000 * number, 8)).save(tmp_path / "mask.png")
        files = [tmp_path / "a.png"], [tmp_path / "mask.png"]
        return SegmentationDataset(*files, classes=["x"], palette=[[0, 0, 0]], reader=read_mask)

    (tmp_path / "classes.txt").write_text("x\ny\n")
    for make in (listed, boxed, masked):
        before, same, after = ({"train": fingerprint(make(number))} for number in (0, 0, 1))
        assert changes(before, same) == []
        assert changes(before, after) == ["the 1 samples of train have other sizes or labels"]
