"""`tessel.train.check`: it lists every fault of the data, and its exit code says whether there is one."""

import detection
import numpy as np
import pytest
import trainer
from PIL import Image

from tessel.train import check


@pytest.fixture
def coco(tmp_path):
    root = detection.draw_coco(tmp_path / "coco")
    return root, detection.write_recipe(tmp_path / "r.yaml", root)


def test_valid_data_pass(tmp_path, coco, capsys):
    root, recipe = coco
    detection.change(
        root, "val", lambda c: c["annotations"].remove(next(a for a in c["annotations"] if not a["bbox"][2]))
    )
    detection.change(
        root, "train", lambda c: c["annotations"].remove(next(a for a in c["annotations"] if not a["bbox"][2]))
    )
    assert check.main([str(recipe), "task.detect.detector=mask_rcnn", "data.workers=1"]) == 0
    out = capsys.readouterr().out
    # two of the training images have no object to learn; they are checked too
    assert "train: checked 8 of 8 samples, found no" in out and "val: checked 6 of 6 samples, found no" in out
    folder = trainer.write_recipe(tmp_path / "f.yaml", data={"root": str(trainer.draw_folder(tmp_path / "images"))})
    assert check.main([str(folder), "--limit", "4"]) == 0
    assert "train: checked 4 of 36 samples" in capsys.readouterr().out
    scenes = detection.write_recipe(tmp_path / "s.yaml", None)
    assert check.main([str(scenes), "data.scenes=40"]) == 0, capsys.readouterr().out


def edit_first(**values):
    """Change an object of COCO's annotations that is not a crowd."""
    return lambda c: next(a for a in c["annotations"] if a["image_id"] == 104).update(values)


def edit_only_object(**values):
    """Remove all objects of an image except one, and change that one."""

    def edit(content):
        kept = next(a for a in content["annotations"] if a["image_id"] == 104)
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 104 or a is kept]
        kept.update(values)

    return edit


SQUARE = [5, 5, 15, 5, 15, 15, 5, 15]


@pytest.mark.parametrize(
    ("edit", "fragment"),
    [
        (edit_first(bbox=[50, 5, 30, 9]), "extends beyond the image of 68 x 50"),
        (edit_first(bbox=[-5, 5, 30, 9]), "extends beyond the image of 68 x 50"),
        (edit_first(bbox=[5, 5, 0, 9]), "annotation 8, box [5.0, 5.0, 5.0, 14.0] has no area"),
        (edit_only_object(bbox=[4, 4, 0, 10]), "box [4.0, 4.0, 4.0, 14.0] has no area"),
        (edit_only_object(bbox=[9, 4, -5, 10]), "box [9.0, 4.0, 4.0, 14.0] has no area"),
        (edit_first(category_id=99), "has a category that the annotation file does not list"),
        (edit_first(segmentation={"size": [50, 68]}), "neither polygons nor RLE"),
        (edit_first(segmentation={"counts": [3000], "size": [50, 60]}), "json has a mask of size (50, 60)"),
        (edit_first(segmentation={"counts": [-5, 3405], "size": [50, 68]}), "annotation 8 of /"),
        (edit_first(segmentation={"counts": "garbage", "size": [50, 68]}), "neither polygons nor RLE"),
        (edit_first(segmentation=[[5, 5, 20, 20]]), "has a segmentation without a polygon"),
        (edit_first(segmentation=[["a"] * 6]), "has a segmentation without a polygon"),
        (edit_first(segmentation=[[1, 1, 4, 4], SQUARE]), "annotation 8 has a polygon that is not x and y"),
        (edit_first(segmentation=[SQUARE, [*SQUARE, 5]]), "annotation 8 has a polygon that is not x and y"),
        (lambda c: c["images"][3].update(width=99), "its annotation is for 99 x 50"),
        (lambda c: c["images"][3].update(file_name="gone.jpg"), "gone.jpg cannot be decoded"),
        (lambda c: c["categories"].append({"id": 90, "name": "toothbrush"}), "1 of 4 classes have no sample: toothbr"),
    ],
)
def test_faulty_annotations_are_listed(coco, capsys, edit, fragment):
    root, recipe = coco
    for split in ("train", "val"):
        detection.change(root, split, edit)
    assert check.main([str(recipe), "task.detect.detector=mask_rcnn"]) == 1
    out = capsys.readouterr().out
    for split in ("train", "val"):
        assert any(line.startswith(f"{split}: ") and fragment in line for line in out.splitlines()), out


def test_boxes_that_are_not_numbers_are_errors(coco, capsys):
    root, recipe = coco
    detection.change(root, "val", edit_first(bbox=[float("nan")] * 4))
    assert check.main([str(recipe)]) == 1
    assert "instances_val2017.json: annotation 8 has the bbox [nan, nan, nan, nan]" in capsys.readouterr().err


def test_unreadable_images_of_classes_are_listed(tmp_path, capsys):
    root = trainer.draw_folder(tmp_path / "images")
    recipe = trainer.write_recipe(tmp_path / "f.yaml", data={"root": str(root)})
    for name in ("class_0/3.png", "class_2/1.png"):
        (root / "train" / name).write_bytes(b"nothing")
    assert check.main([str(recipe), "data.workers=1"]) == 1
    out = capsys.readouterr().out
    assert all(f"{name} cannot be decoded" in out for name in ("class_0/3.png", "class_2/1.png"))
    assert "train: checked 36 of 36 samples, found 2" in out and "val: checked 15 of 15 samples, found no" in out
    assert check.main([str(recipe), "data.root=/nowhere"]) == 1
    assert "/nowhere" in capsys.readouterr().err


class Masks:
    """A segmentation data set: images with a class for every pixel."""

    classes = ["ground", "wall", "door"]

    def __init__(self, *masks):
        self.masks = masks

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, index):
        mask = self.masks[index]
        if mask is None:
            raise FileNotFoundError("no mask")
        return Image.new("RGB", (8, 6)), mask


def listed(dataset, limit=None):
    return list(check.find_problems(dataset, limit=limit, workers=0, name="train"))


def test_masks_are_checked():
    sound = np.array([0, 1, 2, 255] * 12, np.uint8).reshape(6, 8)
    assert listed(Masks(sound, Image.fromarray(sound))) == []
    found = listed(Masks(sound[:, :7] * 0, None, np.full((6, 8), 3), sound))
    assert found == [
        "sample 0: image 8 x 6, mask 7 x 6",
        "sample 1 cannot be read: FileNotFoundError: no mask",
        "sample 2: class 3 is not in 0 to 2",
    ]
    assert listed(Masks(sound * 0)) == ["2 of 3 classes have no sample: wall, door"]
    assert listed(Masks(sound * 0, sound), limit=1) == []


def test_a_data_set_may_check_its_own_samples():
    class Own(Masks):
        targets = [0, 1, 1]

        def problems(self, index):
            return [f"{index} is odd"] * (index % 2)

    assert listed(Own(None, None)) == ["1 is odd", "1 of 3 classes have no sample: door"]
