"""Own images and masks: layouts, values and colors, class files, and errors that say what to write."""

import json

import numpy as np
import own_data
import pytest
import scenery
from hypothesis import given, settings
from hypothesis import strategies as st
from own_data import save, write, write_masks
from PIL import Image

from tessel.train.data.class_file import default_palette, hex_color, read_class_file
from tessel.train.errors import UserError
from tessel.train.recipe.load import make_recipe
from tessel.train.recipe.registry import SOURCES, open_dataset


def opened(root, part="train", **keys):
    """A split of the source `masks` with these keys."""
    spec = SOURCES["masks"]
    return spec.datasets["semantic masks"](spec.options(root=str(root), **keys), part)  # type: ignore[call-arg]


def stems(dataset):
    return [path.decode().rpartition("/")[2].rpartition(".")[0] for path in dataset.images]


def paint(root, *masks, mode=None):
    """Write images/N.jpg and masks/N.png, for each mask an array of values or colors."""
    for number, values in enumerate(masks):
        mask = Image.fromarray(np.asarray(values))
        mask = mask if mode is None else mask.convert(mode, palette=Image.Palette.ADAPTIVE)
        save(Image.new("RGB", mask.size, (90, 120, number)), root / f"images/{number}.jpg")
        save(mask, root / f"masks/{number}.png")
    return root


def halves(*values, dtype=np.uint8):
    """A mask [4, 2 N] with two columns of each value."""
    return np.repeat(np.array(values, dtype), 2)[None].repeat(4, 0)


def colors(*values):
    return np.repeat(np.array(values, np.uint8), 2, 0)[None].repeat(4, 0)


def test_the_classes_and_values_are_those_of_the_files(tmp_path):
    write_masks(tmp_path)
    parts = {split: opened(tmp_path, split) for split in ("train", "val")}
    assert sorted(stems(parts["train"]) + stems(parts["val"])) == [one.name for one in own_data.drawings(8)]
    for part in parts.values():
        assert part.classes == ["background", "circle", "square"] and len(part.palette) == 3
    drawn = {one.name: one for one in own_data.drawings(8)}
    for part in parts.values():
        for index, name in enumerate(stems(part)):
            image, mask = part[index]
            assert image.size == drawn[name].image.size and np.array_equal(mask, drawn[name].mask)


@pytest.mark.parametrize("layout", ["images/{part}", "{part}/images"])
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_a_folder_for_each_split(tmp_path, layout, val):
    for part, first in (("train", 0), (val, 5)):
        images = layout.format(part=part)
        write_masks(tmp_path, 3, images=images, masks=images.replace("images", "masks"), first=first)
    assert stems(opened(tmp_path)) == ["photo_000", "photo_001", "photo_002"]
    assert stems(opened(tmp_path, "val")) == ["photo_005", "photo_006", "photo_007"]


@pytest.mark.parametrize("folder", ["", "ImageSets/Segmentation"])
def test_a_list_for_each_split(tmp_path, folder):
    write_masks(tmp_path)
    write(tmp_path / folder / "train.txt", "photo_003\nimages/photo_001.jpg\n\n")
    write(tmp_path / folder / "val.txt", "photo_000.jpg\n")
    assert stems(opened(tmp_path)) == ["photo_003", "photo_001"] and stems(opened(tmp_path, "val")) == ["photo_000"]
    write(tmp_path / "few.txt", "photo_007\n")
    assert stems(opened(tmp_path, train_split="few.txt")) == ["photo_007"]
    write(tmp_path / "few.txt", "photo_007\nphoto_070\nphoto_071\n")
    with pytest.raises(UserError, match="2 names of the list are not in .*images: photo_070, photo_071; remove them"):
        opened(tmp_path, train_split="few.txt")
    write(tmp_path / "few.txt", "photo_007\nphoto_007.jpg\n")
    with pytest.raises(UserError, match="few.txt names photo_007 twice"):
        opened(tmp_path, train_split="few.txt")


def test_a_new_image_moves_no_other_one_between_the_splits(tmp_path):
    before = {split: stems(opened(write_masks(tmp_path, 30), split)) for split in ("train", "val")}
    after = {split: stems(opened(write_masks(tmp_path, 40), split)) for split in ("train", "val")}
    assert set(before["train"]) < set(after["train"]) and set(before["val"]) <= set(after["val"])
    assert len(after["train"]) + len(after["val"]) == 40 and 2 <= len(after["val"]) <= 14
    assert len(opened(tmp_path, "val", split=0.6)) > len(after["val"])


def test_other_names_of_folders_and_masks(tmp_path):
    write_masks(tmp_path, images="JPEGImages", masks="truth")
    assert opened(tmp_path, images="JPEGImages", masks="truth")[0][1].max() > 0
    for mask in (tmp_path / "truth").iterdir():
        mask.rename(mask.with_name(f"{mask.stem}_mask.png"))
    with pytest.raises(UserError, match="data.mask_suffix=_mask would fit"):
        opened(tmp_path, images="JPEGImages", masks="truth")
    found = opened(tmp_path, images="JPEGImages", masks="truth", mask_suffix="_mask")
    assert found[0][1].max() > 0
    for file in [*(tmp_path / "truth").iterdir(), *(tmp_path / "JPEGImages").iterdir()]:
        save(Image.open(file), tmp_path / "all" / f"{file.stem}.png")
    assert stems(opened(tmp_path, images="all", masks="all", mask_suffix="_mask")) == stems(found)


def test_missing_and_double_files_are_named(tmp_path):
    root = write_masks(tmp_path)
    (root / "masks/photo_001.png").unlink()
    (root / "masks/photo_004.png").unlink()
    with pytest.raises(
        UserError, match="2 images of .*images have no mask in .*masks: photo_001, photo_004; add each mask"
    ):
        opened(root)
    write_masks(root)
    (root / "images/photo_003.jpg").unlink()
    with pytest.raises(UserError, match="1 masks of .*masks have no image in .*images: photo_003; add the images"):
        opened(root)
    write_masks(root)
    save(Image.new("RGB", (9, 9)), root / "images/photo_003.png")
    with pytest.raises(UserError, match="photo_003.jpg and .*photo_003.png have the same name"):
        opened(root)
    (root / "images/photo_003.png").rename(root / "images/._photo_003.jpg")  # as macOS leaves them
    assert len(opened(root)) + len(opened(root, "val")) == 8
    with pytest.raises(UserError, match="nowhere is not a folder"):
        opened(root / "nowhere")
    with pytest.raises(UserError, match="images/train and labels/train, .* images and labels alone"):
        opened(root, masks="labels")
    with pytest.raises(UserError, match="data.train_split=part names no part"):
        opened(root, train_split="part")
    (root / "images/val").mkdir(), (root / "masks/val").mkdir()
    with pytest.raises(UserError, match="val.* is there, but no training part"):
        opened(root)


@pytest.mark.parametrize(("names", "value"), [(None, 255), (None, 1), ("sky\nplane\n", 255), ("sky\nplane\n", 1)])
@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_black_and_white_masks_have_two_classes(tmp_path, names, value, mode):
    if mode != "L" and value == 1:
        value = 255
    paint(tmp_path, *[halves(0, value), halves(value, 0), halves(0, 0)], mode=mode)
    if names:
        write(tmp_path / "classes.txt", names)
    train = opened(tmp_path)
    assert train.classes == (["sky", "plane"] if names else ["background", "foreground"])
    masks = [opened(tmp_path, split)[i][1] for split in ("train", "val") for i in range(len(opened(tmp_path, split)))]
    assert {tuple(np.unique(mask)) for mask in masks} == {(0, 1), (0,)} and (0 in train.reader.classes.table)


def test_255_is_ignored_unless_it_is_a_class(tmp_path):
    paint(tmp_path, *[halves(0, 1, 255)] * 4)
    assert opened(tmp_path).classes == ["background", "foreground"]
    assert opened(tmp_path)[0][1][0].tolist() == [0, 0, 1, 1, 255, 255]
    write(tmp_path / "classes.csv", "name,value\nground,0\ntree,1\nedge,255\n")
    assert opened(tmp_path)[0][1][0].tolist() == [0, 0, 1, 1, 2, 2]
    assert opened(tmp_path, ignore=("tree",))[0][1][0].tolist() == [0, 0, 255, 255, 1, 1]
    with pytest.raises(UserError, match="the masks have 1 classes"):
        opened(tmp_path, ignore=("tree", "edge"))


def test_values_without_a_class_file(tmp_path):
    paint(tmp_path, halves(0, 1), halves(2, 1), halves(3, 255))
    assert opened(tmp_path).classes == ["0", "1", "2", "3"]
    paint(tmp_path / "gap", halves(0, 1), halves(7, 1))
    with pytest.raises(UserError, match="without gaps .*classes.csv with the lines: name,value / class0,0 / .*,7 / "):
        opened(tmp_path / "gap")
    write(tmp_path / "gap/classes.csv", "name,value\nroad,0\nwall,1\ncar,7\n")
    assert opened(tmp_path / "gap").classes == ["road", "wall", "car"]


def test_16_bit_values(tmp_path):
    paint(tmp_path, *[halves(0, 1000, 40000, 65535, dtype=np.uint16)] * 4)
    write(tmp_path / "classes.csv", "value,name\n0,road\n1000,wall\n40000,car\n")
    for value in (-1, 65536):
        with pytest.raises(UserError, match=f"the value {value} is not one of 0 to 65535"):
            opened(tmp_path, ignore=(value,))
    assert opened(tmp_path, ignore=(65535,))[0][1][0, ::2].tolist() == [0, 1, 2, 255]
    with pytest.raises(
        UserError, match=r"masks/\d.png has values that are no class, on 8 pixels .25 %.: 65535 .8.\."
    ) as error:
        opened(tmp_path)[0]
    assert "255" not in str(error.value), "the value of unlabelled pixels is not one of a class"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.csv", "name,color\nroad,#804080\ncar,#00008e\n"),
        ("classes.csv", "name,r,g,b\nroad,128,64,128\ncar,0,0,142\n"),
        ("classes.json", '[{"name": "road", "color": [128, 64, 128]}, {"name": "car", "color": "#00008E"}]'),
        ("classes.yaml", "- {name: road, color: '128 64 128'}\n- name: car\n  color: [0, 0, 142]\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad:128,64,128::\ncar:0,0,142::\n"),
    ],
)
@pytest.mark.parametrize("paletted", [False, True])
def test_color_masks(tmp_path, file, text, paletted):
    """Also where a tool has stored the colors as a palette in another order."""
    paint(tmp_path, *[colors((0, 0, 142), (128, 64, 128), (255, 255, 255))] * 4, mode="P" if paletted else None)
    write(tmp_path / file, text)
    found = opened(tmp_path, ignore=("#ffffff",))
    assert (found.classes, found.palette) == (["road", "car"], [[128, 64, 128], [0, 0, 142]])
    assert found[0][1][0, ::2].tolist() == [1, 0, 255]
    for ignore, message in (
        ((255,), "has the color of" if paletted else "255 .* color"),
        (("#fffffg",), "#fffffg"),
        (("#ffffff", "sky"), "'sky' is none"),
    ):
        with pytest.raises(UserError, match=message):
            opened(tmp_path, ignore=ignore)


def test_masks_with_a_palette(tmp_path):
    for number in range(4):
        scenery.mask(tmp_path / f"masks/{number}.png", halves(0, 1, 2), palette=True)
        save(Image.new("RGB", (6, 4)), tmp_path / f"images/{number}.jpg")
    found = opened(tmp_path)
    expected = np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).reshape(-1, 3)[:3]
    assert found.classes == ["0", "1", "2"] and found.palette == expected.tolist()
    assert found[0][1][0].tolist() == [0, 0, 1, 1, 2, 2]


def test_values_beyond_16_bits_are_told(tmp_path):
    """A 32-bit TIFF file may have them."""
    write(tmp_path / "classes.txt", "ground\ntree\n")
    for number in range(3):
        mask = Image.fromarray(halves(0, 70000, dtype=np.int32))
        save(mask, tmp_path / f"masks/{number}.tif")
        save(Image.new("RGB", mask.size), tmp_path / f"images/{number}.jpg")
    with pytest.raises(UserError, match=r"masks/\d.tif has values that are no class, .*70000"):
        opened(tmp_path)[0]


def test_colors_without_a_class_file(tmp_path):
    paint(tmp_path, *[colors((0, 0, 0), (255, 0, 0), (0, 255, 0))] * 3)
    with pytest.raises(UserError, match="colors .*#ff0000 on 24 pixels.*classes.csv .*name,color / class0,#000000 /"):
        opened(tmp_path)
    write(tmp_path / "classes.txt", "ground\ncar\ntree\n")
    with pytest.raises(UserError, match="classes.txt gives none; .* name,color / ground,#000000 /"):
        opened(tmp_path)


def test_blended_and_lossy_masks_are_named(tmp_path):
    rng = np.random.default_rng(0)
    paint(tmp_path, *[colors((0, 0, 0), (255, 0, 0))] * 6)
    write(tmp_path / "classes.csv", "name,color\nground,#000000\ncar,#ff0000\n")
    border = np.array(colors((0, 0, 0), (255, 0, 0)).repeat(8, 0).repeat(8, 1))
    border[:, :9, 0] = np.arange(9) * 20
    paint(tmp_path, *[border] * 6)
    with pytest.raises(UserError, match=r"has colors that are no class, on 256 pixels .* and 3 more.*antialiased"):
        opened(tmp_path)[0]
    paint(tmp_path, rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"masks/0.png has 1,\d\d\d colors; it is no mask, or was antialiased"):
        opened(tmp_path)
    for mask in (tmp_path / "masks").iterdir():
        mask.unlink()
    for number in range(6):
        save(Image.new("L", (4, 4)), tmp_path / f"masks/{number}.jpg")
    with pytest.raises(UserError, match=r"masks/\d.jpg is a JPEG file, .* save masks as PNG"):
        opened(tmp_path)


@pytest.mark.parametrize(("alpha", "fine"), [(255, True), (254, False)])
def test_transparent_masks_are_refused(tmp_path, alpha, fine):
    values = np.concatenate([colors((0, 0, 0), (255, 255, 255)), np.full((4, 4, 1), alpha, np.uint8)], 2)
    paint(tmp_path, *[values] * 3)
    write(tmp_path / "classes.txt", "ground\ncar\n")
    if fine:
        assert opened(tmp_path)[0][1][0].tolist() == [0, 0, 1, 1]
    else:
        with pytest.raises(UserError, match="is transparent in part"):
            opened(tmp_path)[0]


def test_damaged_masks_are_told_when_they_are_read(tmp_path):
    root = write_masks(tmp_path)
    first = opened(root).masks[0].decode()
    write(root / "masks" / first.rpartition("/")[2], "no image")
    with pytest.raises(UserError, match=f"mask {first} cannot be decoded"):
        opened(root)[0]
    save(Image.new("L", (5, 5)), root / "masks" / first.rpartition("/")[2])
    with pytest.raises(UserError, match="pixels, but its annotation is for 5 x 5"):
        opened(root)[0]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("classes.txt", "", "names no classes"),
        ("classes.txt", "a\n\nb\n", "line 2 is empty"),
        ("classes.txt", "a\na\n", "two classes have the name a"),
        ("classes.csv", "label,color\na,#000000\n", "no name; its columns are label, color"),
        ("classes.csv", "name,color\na,red\nb,#000000\n", "red"),
        ("classes.csv", "name,color\na,#000000\nb,\n", "1 of 2 classes have a color"),
        ("classes.csv", "name,value\na,0\nb,0\n", "two classes have the value 0"),
        ("classes.csv", "name,value\na,0\nb,1.5\n", "'1.5' must be a whole number"),
        ("classes.csv", "name,r,g,b\na,0,0,256\n", "numbers from 0 to 255"),
        ("classes.json", "3", "a list of classes, or a mapping"),
        ("classes.json", "{", "classes.json cannot be read"),
        ("classes.yaml", "[a: b", "classes.yaml cannot be read"),
    ],
)
def test_errors_in_class_files(tmp_path, file, text, message):
    write_masks(tmp_path)
    (tmp_path / "classes.txt").unlink()
    write(tmp_path / file, text)
    with pytest.raises(UserError, match=f"{file} cannot be read.*{message}" if "cannot" not in message else message):
        opened(tmp_path)


def test_class_files_of_other_names_and_forms(tmp_path):
    write_masks(tmp_path)
    write(tmp_path / "names.json", json.dumps({"2": "square", "0": "nothing", "1": "circle"}))
    assert opened(tmp_path, class_map="names.json").classes == ["nothing", "circle", "square"]
    write(tmp_path / "names.yaml", "[no, on, 1]")
    assert opened(tmp_path, class_map=str(tmp_path / "names.yaml")).classes == ["no", "on", "1"]
    with pytest.raises(UserError, match="class file .*gone.txt cannot be read"):
        opened(tmp_path, class_map="gone.txt")


NAMES = st.lists(
    st.text("abcdefghijklmnopqrstuvwxyz_-. 0123456789", min_size=1, max_size=12)
    .map(str.strip)
    .filter(lambda name: name and not name.startswith("#")),
    min_size=2,
    max_size=20,
    unique=True,
)
COLORS = st.tuples(*[st.integers(0, 255)] * 3)


@settings(max_examples=60, deadline=None)
@given(names=NAMES, data=st.data())
def test_classes_and_colors_survive_writing_and_reading(tmp_path_factory, names, data):
    """Names and colors of a class file, and the classes of every pixel of color masks, come back."""
    root = tmp_path_factory.mktemp("colors")
    palette = data.draw(st.lists(COLORS, min_size=len(names), max_size=len(names), unique=True))
    rows = [{"name": name, "color": hex_color(color)} for name, color in zip(names, palette, strict=True)]
    write(root / "classes.json", json.dumps(rows))
    assert [(entry.name, entry.color) for entry in read_class_file(root / "classes.json")] == [
        *zip(names, palette, strict=True)
    ]
    labels = np.random.default_rng(len(names)).integers(0, len(names), (6, 9))
    paint(root, *[np.array(palette, np.uint8)[labels]] * 2)
    found = opened(root)
    assert found.classes == names and found.palette == [list(color) for color in palette]
    assert np.array_equal(found[0][1], labels)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 65535), min_size=2, max_size=30, unique=True),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_index_masks_survive_writing_and_reading(tmp_path_factory, values, size):
    root = tmp_path_factory.mktemp("values")
    write(root / "classes.csv", "\n".join(["name,value", *(f"c{value},{value}" for value in values)]))
    labels = np.random.default_rng(0).integers(0, len(values), size)
    paint(root, *[np.array(values, np.uint16)[labels]] * 2)
    assert np.array_equal(opened(root)[0][1], labels)


def test_the_default_palette_is_that_of_pascal_voc():
    assert default_palette(4) == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert default_palette(256)[255] == (224, 224, 192) and len(set(default_palette(256))) == 256


@pytest.mark.parametrize("key", ["data.class_map=classes.txt", "data.ignore=[0]"])
def test_keys_of_own_masks_are_named_where_they_have_no_effect(key):
    sections = {
        "model": {"name": "test_resnet"},
        "data": {"source": "ade20k", "root": "."},
        "task": {"kind": "segment", "segment": {"decode_head": {"type": "FCNHead"}}},
        "sched": {"steps": 1},
    }
    with pytest.raises(UserError, match="it is a key of data.source=.*masks"):
        make_recipe(sections, [key], source="test")


def test_values_of_other_data_point_to_the_source_of_own_masks(tmp_path):
    root = scenery.ade20k(tmp_path)
    path = min((root / "annotations/training").glob("*.png"))
    scenery.mask(path, np.full((40, 48), 200, np.uint8))
    spec = SOURCES["ade20k"]
    with pytest.raises(UserError, match="data.source=masks"):
        spec.datasets["semantic masks"](spec.options(root=str(root)), "train")[0]  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("source", "kind"),
    [("masks", "segment"), ("yolo", "segment"), ("yolo", "detect")],
    ids=["masks", "objects", "boxes"],
)
@pytest.mark.parametrize("mode", ["transparent", "gray", "16 bits", "turned"])
def test_pictures_are_read_as_they_are_meant_to_be_seen(tmp_path, source, kind, mode):
    """Transparency over data.background, gray levels and 16 bits as RGB, and the EXIF orientation, for every sample."""
    exif, pixels = Image.Exif(), np.full((4, 6), 200, np.uint8)
    image = {
        "transparent": Image.fromarray(np.zeros((4, 6, 4), np.uint8), "RGBA"),
        "gray": Image.fromarray(pixels),
        "16 bits": Image.fromarray(pixels.astype(np.uint16) * 256),
        "turned": Image.fromarray(pixels.T.copy()).convert("RGB"),
    }[mode]
    if mode == "turned":
        exif[scenery.ORIENTATION] = 6
    for number in range(3):
        own_data.write(tmp_path / f"labels/{number}.txt", "0 0.1 0.1 0.9 0.1 0.9 0.9\n")
        save(Image.fromarray(halves(0, 1, 1)), tmp_path / f"masks/{number}.png")
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / f"images/{number}.png", exif=exif)
    write(tmp_path / "data.yaml", "train: images\nnames: [thing]\n")
    sections = {
        "model": {"name": "test_resnet"},
        "task": {"kind": kind} | ({"segment": {"decode_head": {"type": "FCNHead"}}} if kind == "segment" else {}),
        "data": {"source": source, "root": str(tmp_path), "background": [10, 20, 30]},
        "sched": {"steps": 1},
    }
    picture, _ = open_dataset(make_recipe(sections, source="test"), "train")[0]
    assert picture.mode == "RGB" and picture.size == (6, 4)
    assert picture.getpixel((3, 2)) == ((10, 20, 30) if mode == "transparent" else (200, 200, 200))
