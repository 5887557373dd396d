"""Detection data: the published layouts, errors that name faulty files, and joint augmentation."""

import json

import detection
import numpy as np
import pytest
import torch
from PIL import Image

from tessel.train.data.loader import SeededDataset
from tessel.train.data.sampler import seed_all
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.registry import open_dataset
from tessel.train.recipe.schema import PixelFormat
from tessel.train.tasks.detect.augment import EvalTransform, RandomSizeCrop, TrainTransform
from tessel.train.tasks.detect.task import DetectTask

MASKS = "task.detect.detector=mask_rcnn"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return detection.draw_coco(tmp_path_factory.mktemp("coco"))


def recipe(path, root, *overrides):
    return load_recipe(detection.write_recipe(path / "r.yaml", root), overrides)


def test_coco_is_read_as_published(coco, tmp_path):
    val = open_dataset(recipe(tmp_path, coco, MASKS), "val")
    assert val.classes == ["person", "dog", "bottle"] and len(val) == 6
    content = json.loads((coco / "annotations/instances_val2017.json").read_text())
    for index, (number, image) in enumerate(sorted((one["id"], one) for one in content["images"])):
        pixels, target = val[index]
        theirs = [one for one in content["annotations"] if one["image_id"] == number]
        assert pixels.size == (image["width"], image["height"]) and len(target["boxes"]) == len(theirs)
        assert target["masks"].shape == (len(theirs), image["height"], image["width"])
        names = {one["id"]: one["name"] for one in content["categories"]}
        for row, one in enumerate(theirs):
            x, y, w, h = one["bbox"]
            assert target["boxes"][row] == pytest.approx([x, y, x + w, y + h], abs=1e-4)
            assert val.classes[target["labels"][row]] == names[one["category_id"]]
            assert target["iscrowd"][row] == one["iscrowd"] and target["area"][row] == pytest.approx(one["area"])
            seen = np.argwhere(target["masks"][row])
            if w:
                box = [*seen.min(0)[::-1], *seen.max(0)[::-1] + 1]
                assert box == pytest.approx([x, y, x + w, y + h], abs=1.01)
    assert {target["iscrowd"].sum() for _, target in (val[i] for i in range(6))} == {0, 1}


def test_images_without_objects_are_evaluated_and_trained_on_if_asked(coco, tmp_path):
    task = DetectTask(recipe(tmp_path, coco), World())
    # of 8 training images, one has no object and one only a crowd
    assert (len(task.train), len(task.val)) == (6, 6)
    assert len(DetectTask(recipe(tmp_path, coco, "task.detect.empty=true"), World()).train) == 8


def test_annotations_are_arrays(coco, tmp_path):
    held = vars(open_dataset(recipe(tmp_path, coco, MASKS), "train"))
    assert all(isinstance(value, np.ndarray | bool | str | list | PixelFormat) for value in held.values())
    assert [name for name, value in held.items() if isinstance(value, list)] == ["classes"]


def test_crowds_and_boxes_without_area_are_not_learned(coco, tmp_path):
    config = recipe(tmp_path, coco, MASKS, "task.detect.empty=true", "data.aug.hflip=0", "data.aug.color_jitter=0")
    train, transform = open_dataset(config, "train"), TrainTransform(config)
    assert len(train[3][1]["boxes"]) == 4
    image, target = transform(*train[3])
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == 2
    for index in (1, 2):
        image, target = transform(*train[index])
        assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, *image.shape[-2:])
    image, target = EvalTransform()(*train[3])
    assert len(target["boxes"]) == 4 and image.shape == (3, 60, 60) and image.dtype == torch.uint8


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_names_of_files(coco, tmp_path, split):
    names = f"data.{split}=[annotations/instances_val2017.json, val2017]"
    assert len(open_dataset(recipe(tmp_path, coco, names, "task.detect.empty=true"), split)) == 6


def marked(width, height):
    """An image whose left half is red, stored rotated by 90 degrees, and the EXIF data that says so."""
    upright = np.zeros((height, width, 3), np.uint8)
    upright[:, : width // 2, 0] = 255
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored, exif


@pytest.mark.parametrize("annotated", ["upright", "stored", "neither"])
def test_annotated_size_decides_on_exif_rotation(tmp_path, annotated):
    root = detection.draw_coco(tmp_path / "coco")
    stored, exif = marked(66, 50)
    stored.save(root / "val2017/000000000000.jpg", exif=exif)
    size = {"upright": (66, 50), "stored": (50, 66), "neither": (50, 50)}[annotated]
    detection.change(root, "val", lambda c: c["images"][-1].update(width=size[0], height=size[1]))
    val = open_dataset(recipe(tmp_path, root), "val")
    if annotated == "neither":
        with pytest.raises(UserError, match=r"000000000000.jpg is .* pixels, .* 50 x 50"):
            val[0]
        return
    assert val[0][0].size == size
    if annotated == "upright":
        assert val[0][0].getpixel((5, 25))[0] > 200 > 60 > val[0][0].getpixel((60, 25))[0]


def first(**values):
    """Change the first annotation of a file."""
    return lambda content: content["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("edit", "fragments"),
    [
        (lambda c: c.pop("categories"), ["instances_train2017.json", "categories"]),
        (lambda c: c["annotations"][0].pop("bbox"), ["bbox"]),
        (first(image_id=7), ["annotation 14 has the image_id 7"]),
        (first(image_id=[7]), ["annotation 14 has the image_id [7]"]),
        (first(category_id=None), ["annotation 14 has the category_id None"]),
        (first(bbox=["a", 1, 2, 3]), ["annotation 14 has the bbox ['a', 1, 2, 3]", "four numbers"]),
        (first(bbox=[1, 2, 3]), ["annotation 14 has the bbox [1, 2, 3]"]),
        (first(bbox=[1, 2, 3, float("nan")]), ["annotation 14 has the bbox [1, 2, 3, nan]"]),
        (first(bbox=[1, 2, 3, 10**400]), ["annotation 14 has the bbox [1, 2, 3, 1000"]),
        (first(iscrowd=None), ["annotation 14 has the iscrowd None", "0 or 1"]),
        (first(area="x"), ["annotation 14 has the area 'x'"]),
        (first(id=12), ["2 annotations have the id 12"]),
        (lambda c: c["images"][0].update(id=106), ["2 images have the id 106"]),
        (lambda c: c["categories"][0].update(id=1), ["2 categories have the id 1"]),
        (lambda c: c["images"][0].update(height=None), ["image 107 has the height None", "whole number"]),
        (lambda c: c["images"][0].update(width=60.5), ["image 107 has the width 60.5"]),
        (lambda c: c["images"][0].update(file_name=5), ["image 107 has the file_name 5"]),
        (lambda c: [one.update(area="x") for one in c["annotations"]], ["annotation 14", "(and 14 more faults)"]),
        (lambda c: c.update(annotations=[]), ["has no images with objects"]),
        (lambda c: c["annotations"][0].pop("segmentation"), ["annotation 14 has no segmentation"]),
    ],
)
def test_errors_name_the_faulty_annotation(tmp_path, edit, fragments):
    root = detection.draw_coco(tmp_path / "coco")
    detection.change(root, "train", edit)
    with pytest.raises(UserError) as caught:
        assert DetectTask(recipe(tmp_path, root, MASKS), World()).train
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize("odd", [[5, 5, 20, 20], [5, 5, 20, 20, 5], [5, 5, 20, 20, 5, "x"], [5, 5, 20, 20, 5, 1e9]])
def test_polygons_without_three_points_are_skipped(tmp_path, odd):
    """COCO's tools would read four numbers as a box, and the polygons after them too."""
    root = detection.draw_coco(tmp_path / "coco")
    square = [5, 5, 15, 5, 15, 15, 5, 15]
    detection.change(root, "train", first(segmentation=[odd, square]))
    train = open_dataset(recipe(tmp_path, root, MASKS), "train")
    assert train[len(train) - 1][1]["masks"][0].sum() == 100
    detection.change(root, "train", first(segmentation=[odd]))
    train = open_dataset(recipe(tmp_path, root, MASKS), "train")
    with pytest.raises(
        UserError, match=r"annotation 14 of .*instances_train2017.json has a segmentation without a pol"
    ):
        train[len(train) - 1]


def test_missing_files_are_named(tmp_path):
    root = detection.draw_coco(tmp_path / "coco")
    (root / "val2017").rename(root / "images")
    with pytest.raises(UserError, match="val2017 is not a folder"):
        open_dataset(recipe(tmp_path, root), "val")
    (root / "images").rename(root / "val2017")
    (root / "val2017/000000000000.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="000000000000.jpg cannot be decoded"):
        open_dataset(recipe(tmp_path, root), "val")[0]
    (root / "annotations/instances_val2017.json").unlink()
    with pytest.raises(UserError, match="instances_val2017.json cannot be read"):
        open_dataset(recipe(tmp_path, root), "val")


def draw_voc(root):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    objects = [("dog", 0, (1, 1, 20, 30)), ("person", 1, (5, 6, 50, 40))]
    for number, found in enumerate([objects, objects[1:], []]):
        Image.new("RGB", (60, 40)).save(root / f"JPEGImages/2007_{number}.jpg")
        boxes = "".join(
            f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
            f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox><part><name>head</name></part></object>"
            for name, hard, box in found
        )
        size = "<size><width>60.0</width><height>40</height><depth>3</depth></size>"
        (root / f"Annotations/2007_{number}.xml").write_text(f"<annotation>{size}{boxes}</annotation>")
    for split in ("train", "val"):
        (root / f"ImageSets/Main/{split}.txt").write_text("2007_0\n2007_1\n2007_2\n")
    return root


def test_pascal_voc_is_read_as_published(tmp_path):
    config = recipe(tmp_path, draw_voc(tmp_path / "VOC2012"), "data.source=voc2012")
    val = open_dataset(config, "val")
    assert len(val.classes) == 20 and [len(val[i][1]["boxes"]) for i in range(3)] == [2, 1, 0]
    target = val[0][1]
    assert target["boxes"].tolist() == [[0, 0, 20, 30], [4, 5, 50, 40]] and target["iscrowd"].tolist() == [0, 1]
    assert [val.classes[label] for label in target["labels"]] == ["dog", "person"]
    assert len(DetectTask(config, World()).train) == 1
    (tmp_path / "VOC2012/Annotations/2007_1.xml").unlink()
    with pytest.raises(UserError, match="2007_1.xml"):
        open_dataset(config, "val")


@pytest.mark.parametrize("above", ["VOCdevkit/VOC2012", "VOC2012"])
def test_pascal_voc_is_found_in_the_folder_it_was_unpacked_to(tmp_path, above):
    draw_voc(tmp_path / above)
    assert len(open_dataset(recipe(tmp_path, tmp_path, "data.source=voc2012"), "val")) == 3


@pytest.mark.parametrize(
    ("old", "new", "fragments"),
    [
        ("</annotation>", "", ["ParseError"]),
        ("annotation>", "notes>", ["KeyError: 'annotation'"]),
        ("<difficult>1", "<difficult>yes", ["difficult is 'yes'"]),
        ("<difficult>1", "<difficult>2", ["difficult is '2'", "0 or 1"]),
        ("bndbox", "box", ["KeyError: 'bndbox'"]),
        ("<xmin>5</xmin>", "", ["KeyError: 'xmin'"]),
        ("<xmin>5", "<xmin>nan", ["xmin is 'nan'"]),
        ("<width>60.0", "<width>60.5", ["60.5 x 40"]),
        ("<name>person", "<name>persona", ["'persona'"]),
    ],
)
def test_errors_name_the_faulty_voc_file(tmp_path, old, new, fragments):
    file = draw_voc(tmp_path / "VOC2012") / "Annotations/2007_1.xml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError) as caught:
        open_dataset(recipe(tmp_path, tmp_path / "VOC2012", "data.source=voc2012"), "val")
    message = str(caught.value)
    assert message.startswith(f"{file} is not a valid Pascal VOC") and "UserError" not in message
    assert all(fragment in message for fragment in fragments) and "\n" not in message, message


def test_digit_scenes(tmp_path):
    config = recipe(tmp_path, None, MASKS, "data.scenes=20", "data.size=96")
    train, val = (open_dataset(config, split) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (20, 4, [str(digit) for digit in range(10)])
    image, target = train[3]
    scene = train.scenes[3]
    assert (target["labels"] == scene.labels).all() and len(target["boxes"]) == len(scene.labels) > 0
    for number, (x1, y1, x2, y2) in enumerate(target["boxes"].astype(int)):
        seen = scene.instances == number + 1
        assert seen[y1:y2, x1:x2].sum() == seen.sum() == target["area"][number] == target["masks"][number].sum()
        assert seen[y1].any() and seen[y2 - 1].any() and seen[:, x1].any() and seen[:, x2 - 1].any()


def squares():
    """An image of two bright rectangles, and its target."""
    pixels, masks = np.zeros((80, 120, 3), np.uint8), np.zeros((2, 80, 120), np.uint8)
    boxes = [[10, 20, 40, 60], [70, 5, 110, 35]]
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        pixels[y1:y2, x1:x2, number] = 255
        masks[number, y1:y2, x1:x2] = 1
    target = {"boxes": np.array(boxes, np.float32), "labels": np.array([0, 1]), "iscrowd": np.zeros(2, np.int64)}
    return Image.fromarray(pixels), target | {"masks": masks, "area": masks.sum((1, 2)).astype(np.float32)}


@pytest.mark.parametrize("aug", ["hflip=1", "vflip=1", "hflip=0.5"])
@pytest.mark.parametrize("crop", ["null", "[40, 60]"])
def test_boxes_and_masks_stay_with_the_image(tmp_path, aug, crop):
    keys = [
        "data.aug.color_jitter=0",
        f"data.aug.{aug}",
        f"task.detect.crop={crop}",
        "task.detect.min_size=[40, 64, 90]",
    ]
    transform, image, target = TrainTransform(recipe(tmp_path, None, MASKS, *keys)), *squares()
    shapes, counts = set(), set()
    for seed in range(24):
        seed_all(seed)
        pixels, found = transform(image, target)
        shapes.add(tuple(pixels.shape[-2:]))
        counts.add(len(found["boxes"]))
        assert max(pixels.shape) <= 120 and pixels.dtype == torch.uint8 and type(found["boxes"]) is torch.Tensor
        for (x1, y1, x2, y2), label, mask in zip(found["boxes"], found["labels"], found["masks"], strict=True):
            bright = pixels[label] > 127
            inside = bright[int(y1.round()) : int(y2.round()), int(x1.round()) : int(x2.round())]
            assert inside.float().mean() > 0.9 and inside.sum() > 0.9 * bright.sum()
            assert (mask.bool() ^ bright).float().mean() < 0.06  # nearest-neighbor resizing is off by up to one pixel
    assert len(shapes) == 3 if crop == "null" else len(shapes) > 6
    if crop == "null":
        assert shapes == {(40, 60), (64, 96), (80, 120)} and counts == {2}  # the third is limited by max_size


def jitter(size):
    keys = [f"crop={size}", "scale_jitter=[0.1, 2]", "hflip=0", "color_jitter=0"]
    return ["task.detect.min_size=null", *(f"data.aug.{key}" for key in keys)]


def test_scale_jitter_crops_and_pads_to_a_fixed_size(tmp_path):
    transform, (image, target) = TrainTransform(recipe(tmp_path, None, MASKS, *jitter(96))), squares()
    scales, padded = [], 0
    for seed in range(40):
        seed_all(seed)
        pixels, found = transform(image, target)
        assert pixels.shape == (3, 96, 96) and all(len(found["boxes"]) == len(value) for value in found.values())
        for (x1, y1, x2, y2), label, mask in zip(found["boxes"], found["labels"], found["masks"], strict=True):
            bright = (pixels[label] > 127) & (pixels[1 - label] < 64) & (pixels[2] < 64)
            assert mask.any() and (mask.bool() ^ bright).sum() <= 2 * (y2 - y1 + x2 - x1)
            assert not mask[:, int(x2.ceil()) :].any() and not mask[: int(y1)].any()
            if x1 > 0 and y1 > 0 and x2 < 95 and y2 < 95:  # the rectangle is not cut
                scales.append(float(y2 - y1) / (40, 30)[label])
        gray = (pixels == 128).all(0)
        padded += bool(gray[-1].all())
        assert not gray[:, 0].all() and not gray[0].all()
    # of an image with 120 columns, factors of 0.1 to 2 on the way to 96
    assert 0.08 < min(scales) < 0.3 and 1 < max(scales) < 1.6 and 15 < padded < 40


def test_distorted_colors_leave_objects_and_padding(tmp_path):
    keys = ["data.aug.hflip=0", "data.aug.color_jitter=0", "data.aug.crop=130", "task.detect.min_size=[80]"]
    plain, distorted = (
        TrainTransform(recipe(tmp_path, None, MASKS, *keys, f"data.aug.photometric={on}")) for on in ("false", "true")
    )
    (before, objects), changed = plain(*squares()), 0
    for seed in range(12):
        seed_all(seed)
        after, found = distorted(*squares())
        assert after.dtype == torch.uint8 and all(torch.equal(found[name], value) for name, value in objects.items())
        assert (after[:, 80:] == 128).all() and (after[:, :, 120:] == 128).all()
        changed += not torch.equal(after, before)
    assert changed > 6


def test_objects_without_a_pixel_in_the_crop_are_dropped(tmp_path):
    """A frame around the image, whose box covers crops that have no pixel of it."""
    frame = np.zeros((1, 80, 120), np.uint8)
    frame[:] = 1
    frame[:, 15:-15, 15:-15] = 0
    target = {"boxes": np.array([[0, 0, 120, 80]], np.float32), "labels": np.zeros(1, np.int64)}
    target |= {"iscrowd": np.zeros(1, np.int64), "area": np.ones(1, np.float32), "masks": frame}
    transform, counts = TrainTransform(recipe(tmp_path, None, MASKS, "data.aug.crop=16")), set()
    for seed in range(40):
        seed_all(seed)
        found = transform(Image.fromarray(np.zeros((80, 120, 3), np.uint8)), target)[1]
        counts.add(len(found["masks"]))
        assert found["masks"].flatten(1).any(1).all() and len(found["boxes"]) == len(found["masks"])
    assert counts == {0, 1}


def test_crop_of_a_smaller_image_keeps_its_size():
    torch.manual_seed(0)
    assert RandomSizeCrop(90, 200)(torch.zeros(3, 60, 80)).shape == (3, 60, 80)
    sizes = {tuple(RandomSizeCrop(10, 12)(torch.zeros(3, 60, 80)).shape) for _ in range(60)}
    assert sizes == {(3, h, w) for h in (10, 11, 12) for w in (10, 11, 12)}


@pytest.mark.parametrize("keys", [["task.detect.crop=[40, 60]"], jitter(64)])
def test_samples_depend_on_their_key_alone(coco, tmp_path, keys):
    config = recipe(tmp_path, coco, MASKS, *keys)
    data = SeededDataset(open_dataset(config, "train"), TrainTransform(config), seed=3)
    one, other, third = data[(1, 2)], data[(1, 2)], data[(2, 2)]
    assert torch.equal(one[0], other[0]) and all(torch.equal(one[1][key], other[1][key]) for key in one[1])
    assert one[0].shape != third[0].shape or not torch.equal(one[0], third[0])


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("data.source=folder", ["data.source=folder", "task.kind=detect", "coco"]),
        ("data.aug.mixup=0.2", ["data.aug.mixup has no effect"]),
        ("data.aug.scale=[0.5, 1]", ["data.aug.scale has no effect"]),
        ("data.crop_pct=0.9", ["data.crop_pct has no effect"]),
        ("task.smoothing=0.1", ["task.smoothing has no effect"]),
        ("task.detect.anchor=8", ["task.detect.anchor has no effect", "task.detect.detector=fcos"]),
        ("task.detect.channels=32", ["task.detect.channels=32", "task.detect.detector=fcos", "at least 64"]),
        ("task.detect.channels=80", ["task.detect.channels=80", "task.detect.detector=fcos", "multiple of 32"]),
        ("task.detect.crop=[9, 3]", ["task.detect.crop=[9, 3]"]),
        ("data.aug.scale_jitter=[0.1, 2]", ["data.aug.scale_jitter needs data.aug.crop"]),
        ("data.aug.scale_jitter=[2, 0.1]", ["data.aug.scale_jitter=[2.0, 0.1]"]),
        ("task.kind=classify", ["task.detect has no effect", "task.kind=detect"]),
    ],
)
def test_conflicting_keys_are_errors(coco, tmp_path, override, fragments):
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, coco, override)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
