"""Own boxes and instance masks: YOLO's text files, Pascal VOC's XML files, and COCO's with any names."""

import json

import numpy as np
import own_data
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from own_data import CLASSES, save, voc_object, write, write_coco, write_voc, write_yolo, yolo_line
from PIL import Image

from tessel.train.data.detection import DetectionDataset
from tessel.train.data.inspection import inspect_split
from tessel.train.errors import UserError
from tessel.train.recipe.load import make_recipe
from tessel.train.recipe.registry import SOURCES
from tessel.train.tasks.detect.augment import TrainTransform

COCO = {"train": ("shapes.json", "photos"), "val": None}


def opened(source, root, part="train", kind="boxes", **keys):
    """A split of a source with these keys."""
    spec = SOURCES[source]
    return spec.datasets[kind](spec.options(root=str(root), **keys), part)  # type: ignore[call-arg]


def samples(dataset):
    """Name of the image -> sample."""
    objects = getattr(dataset, "objects", dataset)
    return {objects.location(i)[0].rpartition("/")[2].partition(".")[0]: dataset[i] for i in range(len(dataset))}


def both(source, root, kind="boxes", **keys):
    """The samples of both splits, which must not share an image."""
    train, val = (samples(opened(source, root, part, kind, **keys)) for part in ("train", "val"))
    assert train and val and not train.keys() & val.keys()
    return train | val


FORMATS = [("coco", write_coco, COCO), ("yolo", write_yolo, {}), ("voc", write_voc, {})]


@pytest.mark.parametrize(("source", "draw", "keys"), FORMATS)
def test_every_image_and_box_is_read(tmp_path, source, draw, keys):
    found = both(source, draw(tmp_path), **keys)
    assert opened(source, tmp_path, **keys).classes == CLASSES
    assert found.keys() == {one.name for one in own_data.drawings(8)}, "images without objects are kept"
    for one in own_data.drawings(8):
        image, target = found[one.name]
        assert image.size == one.image.size and target["labels"].tolist() == [label for label, _ in one.objects]
        boxes = [[*polygon.min(0), *polygon.max(0)] for _, polygon in one.objects]
        np.testing.assert_allclose(target["boxes"], np.reshape(boxes, (-1, 4)), atol=1e-3)
        assert not target["iscrowd"].any() and (target["area"] > 0).all()


@pytest.mark.parametrize(("source", "draw", "keys"), FORMATS[:2])
def test_polygons_become_masks(tmp_path, source, draw, keys):
    instances = both(source, draw(tmp_path), "instance masks", **keys)
    semantic = both(source, tmp_path, "semantic masks", **keys)
    part = opened(source, tmp_path, "train", "semantic masks", **keys)
    assert part.classes == ["background", *CLASSES] and len(part.palette) == 3
    for one in own_data.drawings(8):
        masks, mask = instances[one.name][1]["masks"], semantic[one.name][1]
        assert len(masks) == len(one.objects) and mask.shape == one.mask.shape and mask.dtype == np.uint8
        # PIL fills the pixels that an outline touches, COCO's tools those whose centers it holds
        assert (mask != one.mask).mean() < 0.03 and set(np.unique(mask)) == set(np.unique(one.mask))
        for (label, _), found in zip(one.objects, masks, strict=True):
            assert (mask[found > 0] == label + 1).all()


def test_smaller_objects_are_drawn_over_larger_ones(tmp_path):
    write_coco(tmp_path, 2)
    square = lambda a, b: [[a, a, b, a, b, b, a, b]]  # noqa: E731
    content = json.loads((tmp_path / "shapes.json").read_text())
    content["annotations"] = [
        {"id": n, "image_id": image, "category_id": 3 + 4 * label, "bbox": [0, 0, 9, 9], "segmentation": square(*span)}
        for n, (image, label, span) in enumerate([(0, 0, (10, 20)), (0, 1, (5, 40)), (1, 0, (0, 9)), (1, 1, (0, 9))])
    ]
    crowd = {"counts": [50 * 90, 90, 120 * 90 - 51 * 90], "size": [90, 120]}  # column 50
    more = {"id": 9, "image_id": 0, "category_id": 3, "bbox": [50, 0, 1, 90], "iscrowd": 1, "segmentation": crowd}
    content["annotations"].append(more)
    (tmp_path / "shapes.json").write_text(json.dumps(content))
    keys = {"train": ("shapes.json", "photos"), "val": ("shapes.json", "photos")}
    first = opened("coco", tmp_path, "val", "semantic masks", **keys)[0][1]
    assert first[15, 15] == 1 and first[30, 30] == 2 and first[2, 2] == 0 and (first[:, 50] == 1).all()
    ignored = opened("coco", tmp_path, "val", "semantic masks", background_class=None, **keys)
    assert ignored.classes == CLASSES and ignored[0][1][2, 2] == 255 and ignored[0][1][15, 15] == 0
    shared = opened("coco", tmp_path, "val", "semantic masks", background_class="circle", **keys)
    assert shared.classes == CLASSES and shared[0][1][2, 2] == 0 and shared[0][1][30, 30] == 1
    assert {int(label) for label in opened("coco", tmp_path, "val", "semantic masks", **keys).targets} == {0, 1, 2}
    content["categories"] = [{"id": number, "name": str(number)} for number in range(300)]
    (tmp_path / "shapes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has 301 classes"):
        opened("coco", tmp_path, "val", "semantic masks", **keys)


def test_coco_files_of_any_name_and_place(tmp_path):
    root = write_coco(tmp_path / "set")
    (tmp_path / "set/shapes.json").rename(tmp_path / "labels.json")
    keys = {"train": (str(tmp_path / "labels.json"), str(root / "photos")), "val": None}
    assert len(both("coco", "/", **keys)) == 8
    with pytest.raises(UserError, match=r"instances_train2017.json cannot be read .*data.train=\[FILE.json, FOLDER\]"):
        opened("coco", root)
    (tmp_path / "labels.json").rename(root / "shapes.json")
    with pytest.raises(UserError, match=r"there is .*set/shapes.json\); data.val=null holds out"):
        opened("coco", root, train=("other.json", "photos"))
    sections = {
        "model": {"name": "test_resnet"},
        "task": {"kind": "detect"},
        "data": {"source": "coco", "root": str(root)},
        "sched": {"steps": 1},
    }
    recipe = make_recipe(sections, ["data.train=[~/shapes.json, photos]", "data.val=null"], source="test")
    assert recipe.data.train[0].endswith("/shapes.json") and "~" not in recipe.data.train[0] and recipe.data.val is None


def listing(root, text, name="data.yaml"):
    write(root / name, text)
    return root


@pytest.mark.parametrize(
    "text",
    [
        "names: [circle, square]\nnc: 2\ntrain: images\n",
        "names: {1: square, 0: circle}\ntrain: [images]\nval: ''\n",
        "path: /a/folder/of/another/machine\ntrain: images\nnames: [circle, square]\n",
        "path: .\ntrain: ../images\nnames: [circle, square]\n",
        "train: all.txt\nnames: [circle, square]\n",
    ],
)
def test_yolo_files_as_tools_write_them(tmp_path, text):
    root = listing(write_yolo(tmp_path), text)
    names = sorted(f"./images/{file.name}" for file in (root / "images").iterdir())
    write(root / "all.txt", "\n".join(names) + "\n")
    assert len(both("yolo", root)) == 8 and opened("yolo", root).classes == CLASSES
    assert len(both("yolo", root / "data.yaml")) == 8
    (root / "data.yaml").rename(root / "shapes.yml")
    assert len(both("yolo", root)) == 8


@pytest.mark.parametrize("val", ["val", "valid"])
def test_yolo_with_a_validation_part(tmp_path, val):
    """The data set itself lies below a folder images."""
    root = tmp_path / "images"
    for part, count in (("train", 4), (val, 2)):
        write_yolo(root / part, count)
    listing(root, f"train: ../train/images\n{val}: ../{val}/images\nnames: [circle, square]\n")
    assert [len(opened("yolo", root, part)) for part in ("train", "val")] == [4, 2]
    assert len(opened("yolo", root).labels) == 4


def test_yolo_without_data_yaml(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(UserError, match="neither data.yaml nor images/, labels/ and classes.txt"):
        opened("yolo", tmp_path)
    write(tmp_path / "classes.txt", "circle\nsquare\n")
    assert len(both("yolo", tmp_path)) == 8
    for part, numbers in (("train", range(5)), ("val", range(5, 8))):
        for number in numbers:
            for folder, end in (("images", "jpg"), ("labels", "txt")):
                file = tmp_path / folder / f"photo_{number:03d}.{end}"
                if file.exists():
                    (tmp_path / folder / part).mkdir(exist_ok=True)
                    file.rename(tmp_path / folder / part / file.name)
    assert [len(opened("yolo", tmp_path, part)) for part in ("train", "val")] == [5, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images\n", "KeyError: 'names'"),
        ("names: [a, a]\ntrain: images\n", "two classes are called a"),
        ("names: {1: a, 2: b}\ntrain: images\n", "must number the classes from 0"),
        ("names: [a, b]\nnc: 3\ntrain: images\n", "nc=3, but names has 2"),
        ("names: [a, b]\n", "it has no train"),
        ("names: [a, b\n", "not a data.yaml"),
        ("- a\n", "not a data.yaml"),
        ("names: [a, b]\ntrain: pictures\n", "names pictures, which is neither .*correct path"),
    ],
)
def test_errors_in_data_yaml(tmp_path, text, message):
    with pytest.raises(UserError, match=f"data.yaml .*{message}" if "data.yaml" not in message else message):
        opened("yolo", listing(write_yolo(tmp_path), text))


@pytest.mark.parametrize(
    ("line", "box", "label"),
    [
        ("1 0.5 0.5 0.2 0.4", (48, 27, 72, 63), 1),
        ("1.0 0.5 0.5 0.2 0.4 0.87", (48, 27, 72, 63), 1),
        ("0 0.1 0.1 0.3 0.1 0.3 0.5", (12, 9, 36, 45), 0),
        ("0 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5", (12, 9, 36, 45), 0),
        ("0 0.95 0.5 0.2 0.2", (102, 36, 126, 54), 0),
    ],
)
def test_rows_of_label_files(tmp_path, line, box, label):
    write_yolo(tmp_path, 4)
    write(tmp_path / "labels/photo_000.txt", f"\n{line}\n")
    target = both("yolo", tmp_path)["photo_000"][1]
    assert target["boxes"][0].tolist() == pytest.approx(box, abs=1e-3) and target["labels"].tolist() == [label]


def test_keypoints_are_left_out(tmp_path):
    listing(write_yolo(tmp_path, 4), "names: [circle, square]\ntrain: images\nkpt_shape: [2, 2]\n")
    for file in (tmp_path / "labels").iterdir():
        write(file, "1 0.5 0.5 0.2 0.4 0.5 0.5 0.4 0.4\n")
    assert both("yolo", tmp_path)["photo_000"][1]["boxes"][0].tolist() == pytest.approx([48, 27, 72, 63])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.2 0.4", "class 2 is not one of 0 to 1, which .*data.yaml names"),
        ("0.5 0.5 0.5 0.2 0.4", "class 0.5 is not"),
        ("0 0.5 0.5 0.2", "a line is class x y width height, or class and at least three points"),
        ("0 0.1 0.1 0.3 0.1 0.3 0.5 0.7", "at least three points"),
        ("0 60 45 nan 20", "fractions of the width and height"),
        ("0 600 45 20 20", "fractions of the width and height"),
        ("circle 0.5 0.5 0.2 0.4", "could not convert"),
    ],
)
def test_errors_in_label_files(tmp_path, line, message):
    write_yolo(tmp_path)
    for name in ("photo_000.txt", "photo_003.txt"):
        write(tmp_path / "labels" / name, f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(UserError, match=rf"photo_000.txt: line 2 .*{message}.*photo_003.txt: line 2"):
        opened("yolo", tmp_path)


def test_boxes_are_no_instance_masks(tmp_path):
    root = write_yolo(tmp_path, polygons=False)
    assert len(both("yolo", root)) == 8
    with pytest.raises(UserError, match="photo_000.txt: line 1 is a box, not a polygon"):
        opened("yolo", root, kind="instance masks")


def test_yolo_files_that_are_missing_or_double_are_named(tmp_path):
    root = write_yolo(tmp_path, 4)
    save(Image.new("RGB", (9, 9)), root / "images/photo_000.png")
    with pytest.raises(UserError, match="photo_000.jpg and .*photo_000.png have the same label file"):
        opened("yolo", root)
    (root / "images/photo_000.png").unlink()
    listing(root, "train: some.txt\nnames: [a, b]\n")
    write(root / "some.txt", "images/photo_000.jpg\nimages/gone.jpg\n")
    with pytest.raises(UserError, match="1 images of .*some.txt are missing: .*gone.jpg"):
        opened("yolo", root)
    listing(root, "train: images\nnames: [a, b]\n")
    (root / "labels").rename(root / "truth")
    with pytest.raises(UserError, match="none of the 4 images has a label file; .* would be .*labels/photo_000.txt"):
        opened("yolo", root)


@pytest.mark.parametrize("turn", range(1, 9))
def test_yolo_boxes_refer_to_the_turned_image(tmp_path, turn):
    """A white rectangle at the upper left of the upright image."""
    upright = Image.new("RGB", (60, 40))
    upright.paste((255, 255, 255), (6, 4, 30, 12))
    flips = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    method = (flips | {7: "TRANSVERSE", 8: "ROTATE_270"}).get(turn)
    stored = upright.transpose(Image.Transpose[method]) if method else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    for number in range(2):
        (tmp_path / "images").mkdir(exist_ok=True)
        stored.save(tmp_path / f"images/{number}.jpg", exif=exif, quality=95)
        write(tmp_path / f"labels/{number}.txt", yolo_line(0, np.array([[0.1, 0.1], [0.5, 0.3]]), False))
    listing(tmp_path, "train: images\nnames: [white]\n")
    image, target = opened("yolo", tmp_path)[0]
    assert image.size == (60, 40) and target["boxes"][0].tolist() == pytest.approx([6, 4, 30, 12], abs=1e-3)
    pixels = np.asarray(image.convert("L"))
    assert pixels[5:11, 8:28].min() > 200 and pixels[15:].max() < 50 and pixels[:, 35:].max() < 50


@pytest.mark.parametrize(("images", "annotations"), [("JPEGImages", "Annotations"), (".", "."), ("pics", "xml")])
def test_places_of_voc_files(tmp_path, images, annotations):
    write_voc(tmp_path, images=images, annotations=annotations)
    keys = {"images": "pics", "annotations": "xml"} if images == "pics" else {}
    assert len(both("voc", tmp_path, **keys)) == 8
    if images == "JPEGImages":
        write(tmp_path / "ImageSets/Main/train.txt", "photo_000\nphoto_001\n")
        write(tmp_path / "ImageSets/Main/val.txt", "photo_005\n")
        assert [len(opened("voc", tmp_path, part)) for part in ("train", "val")] == [2, 1]


def test_voc_files_beside_the_images_of_each_split(tmp_path):
    for part in ("train", "valid"):
        write_voc(tmp_path / part, 4, images=".", annotations=".")
    assert [len(opened("voc", tmp_path, part)) for part in ("train", "val")] == [4, 4]


@pytest.mark.parametrize(("offset", "box"), [(0, (12.5, 5, 30, 20)), (1, (11.5, 4, 30, 20))])
def test_voc_offset(tmp_path, offset, box):
    write_voc(tmp_path)
    write(tmp_path / "annotations/photo_000.xml", f"<annotation>{voc_object('circle', 12.5, 5, 30, 20)}</annotation>")
    found = both("voc", tmp_path, voc_offset=offset)["photo_000"][1]
    assert found["boxes"].tolist() == [list(box)] and found["area"][0] == (box[2] - box[0]) * (box[3] - box[1])


def test_classes_of_voc_files(tmp_path):
    write_voc(tmp_path)
    write(tmp_path / "classes.txt", "square\ncircle\n")
    assert opened("voc", tmp_path).classes == ["square", "circle"]
    write(tmp_path / "classes.txt", "square\n")
    with pytest.raises(UserError, match=r"photo_\d+.xml is not a valid .*'circle' is not one of the classes square"):
        opened("voc", tmp_path)
    (tmp_path / "classes.txt").unlink()
    val = {path.rpartition("/")[2] for path in opened("voc", tmp_path, "val").paths.astype(str)}
    name = min(val).replace("jpg", "xml")
    write(tmp_path / "annotations" / name, f"<annotation>{voc_object('star', 1, 1, 9, 9)}</annotation>")
    with pytest.raises(UserError, match=f"{name} is not a valid .*'star' is not one of the classes circle, square"):
        opened("voc", tmp_path, "val")
    assert opened("voc", tmp_path).classes == CLASSES
    (tmp_path / "images/photo_000.jpg").unlink()
    with pytest.raises(UserError, match="1 annotations of .* have no image in .*: photo_000"):
        opened("voc", tmp_path)
    write_voc(tmp_path / "none", 3)
    for file in (tmp_path / "none/annotations").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no XML file of a training image that names an object"):
        opened("voc", tmp_path / "none")
    with pytest.raises(UserError, match="gone is not a folder"):
        opened("voc", tmp_path / "gone")


def test_boxes_outside_the_image_are_told_and_clipped(tmp_path):
    write_yolo(tmp_path, 4)
    write(tmp_path / "labels/photo_000.txt", "0 0.9 0.9 0.4 0.4\n1 1.5 0.5 0.2 0.2\n")
    data = opened("yolo", tmp_path, split=0.01)
    index = [data.location(i)[0].endswith("photo_000.jpg") for i in range(len(data))].index(True)
    assert len([text for text in data.problems(index) if "extends beyond the image of 120 x 90" in text]) == 2
    told = [finding.text for finding in inspect_split(data, name="train").findings()]
    assert any("line 1 of photo_000.txt" in text and "extends beyond" in text for text in told)
    sections = {
        "model": {"name": "test_resnet"},
        "task": {"kind": "detect"},
        "data": {"source": "yolo", "root": ".", "size": 90},
        "sched": {"steps": 1},
    }
    torch.manual_seed(0)
    image, target = TrainTransform(make_recipe(sections, source="test"))(*data[index])
    assert target["labels"].tolist() == [0] and image.shape == (3, 90, 120)
    assert target["boxes"][0].tolist() == pytest.approx([84, 63, 120, 90], abs=1e-3)


@pytest.mark.parametrize(("source", "draw", "keys"), FORMATS)
def test_damaged_images_are_told_when_they_are_read(tmp_path, source, draw, keys):
    root = draw(tmp_path)
    image = next(root.rglob("photo_000.jpg"))
    image.write_bytes(b"no image")
    data = [opened(source, root, part, **keys) for part in ("train", "val")]
    found = [(one, i) for one in data for i in range(len(one)) if one.location(i)[0].endswith("photo_000.jpg")]
    with pytest.raises(UserError, match="photo_000.jpg cannot be decoded"):
        found[0][0][found[0][1]]
    assert "cannot be decoded" in found[0][0].problems(found[0][1])[0]


def test_annotations_are_arrays(tmp_path):
    for source, draw, keys in FORMATS:
        data = opened(source, draw(tmp_path / source), **keys)
        assert isinstance(data, DetectionDataset)
        assert all(isinstance(value, np.ndarray | bool | str | list) for value in vars(data).values())


@settings(max_examples=50, deadline=None)
@given(
    size=st.tuples(st.integers(20, 300), st.integers(20, 300)),
    points=st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 2), min_size=3, max_size=12, unique=True),
    label=st.integers(0, 1),
)
def test_polygons_survive_writing_and_reading(tmp_path_factory, size, points, label):
    """A polygon as fractions in a text file gives its box, its area and its mask."""
    root = tmp_path_factory.mktemp("yolo")
    polygon = np.array(points)
    for number in range(2):
        save(Image.new("RGB", size), root / f"images/{number}.png")
        write(root / f"labels/{number}.txt", yolo_line(label, polygon, True))
    listing(root, "train: images\nnames: [circle, square]\n")
    data = opened("yolo", root, kind="instance masks")
    image, target = data[0]
    pixels = polygon * size
    assert image.size == size and target["labels"].tolist() == [label]
    np.testing.assert_allclose(target["boxes"][0], [*pixels.min(0), *pixels.max(0)], atol=1e-3)
    x, y = pixels.T
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    assert target["area"][0] == pytest.approx(area, abs=0.1)
    rows, columns = np.nonzero(target["masks"][0])
    x1, y1, x2, y2 = target["boxes"][0]
    assert not len(rows) or (
        rows.min() >= y1 - 1 and rows.max() <= y2 and columns.min() >= x1 - 1 and columns.max() <= x2
    )
