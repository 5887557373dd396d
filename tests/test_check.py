"""`tessel.train.check`: it lists every fault of the data, its exit code says whether there is one, and its page."""

import re
import shutil
from html.parser import HTMLParser

import detection
import numpy as np
import pytest
import scenery
import trainer
from PIL import Image

from tessel.train import check
from tessel.train.data.annotations import AnnotatedImage, read_all
from tessel.train.data.files import check_exist
from tessel.train.data.inspection import IMBALANCE, images_in_both, inspect_split
from tessel.train.errors import FaultsError, UserError
from tessel.train.report.data_page import choose
from tessel.train.report.page import STYLE


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
    assert (
        "train: checked 8 of 8 samples, found no errors" in out
        and "val: checked 6 of 6 samples, found no errors" in out
    )
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
    out = capsys.readouterr().out
    assert "instances_val2017.json: annotation 8 has the bbox [nan, nan, nan, nan]" in out
    assert "val: cannot be opened, found 1 error" in out and "train: checked 8 of 8" in out


def test_unreadable_images_of_classes_are_listed(tmp_path, capsys):
    root = trainer.draw_folder(tmp_path / "images")
    recipe = trainer.write_recipe(tmp_path / "f.yaml", data={"root": str(root)})
    for name in ("class_0/3.png", "class_2/1.png"):
        (root / "train" / name).write_bytes(b"nothing")
    assert check.main([str(recipe), "data.workers=1"]) == 1
    out = capsys.readouterr().out
    assert all(f"{name} cannot be decoded" in out for name in ("class_0/3.png", "class_2/1.png"))
    assert (
        "train: checked 36 of 36 samples, found 2 errors" in out
        and "val: checked 15 of 15 samples, found no errors" in out
    )
    assert check.main([str(recipe), "data.root=/nowhere"]) == 1
    assert "/nowhere" in capsys.readouterr().out


class Samples:
    """Gray images with targets of any kind, without classes; the images can be given too."""

    def __init__(self, *targets, images=None):
        self.targets_, self.images = targets, images

    def __len__(self):
        return len(self.targets_)

    def __getitem__(self, index):
        target = self.targets_[index]
        if target is None:
            raise FileNotFoundError("no mask")
        return self.images[index] if self.images else Image.new("L", (8, 6), 5 * index), target


class Pictures(Samples):
    classes = ["ground", "wall", "door"]


class Named(Pictures):
    def image_path(self, index):
        return f"{index}.png"


def found(dataset, name="train", limit=None):
    return [(one.text, one.is_error) for one in inspect_split(dataset, name=name, limit=limit).findings()]


def errors(dataset, **options):
    return [text for text, is_error in found(dataset, **options) if is_error]


def test_masks_are_checked():
    sound = np.array([0, 1, 2, 255] * 12, np.uint8).reshape(6, 8)
    assert found(Pictures(sound, Image.fromarray(sound))) == []
    assert errors(Pictures(sound[:, :7] * 0, None, np.full((6, 8), 3), sound)) == [
        "sample 0: image 8 x 6, mask 7 x 6",
        "sample 1 cannot be read: FileNotFoundError: no mask",
        "sample 2: class 3 is not in 0 to 2",
    ]
    missing = "2 of 3 classes have no sample: wall, door"
    assert found(Pictures(sound * 0)) == [(missing, True)] and found(Pictures(sound * 0), "val") == [(missing, False)]
    assert found(Pictures(sound * 0, sound), limit=1) == []


def test_classes_and_several_classes_of_an_image_are_checked():
    assert found(Pictures(0, 1, np.int64(2))) == []
    assert errors(Pictures(0, 1, 2, 3)) == ["sample 3: class 3 is not in 0 to 2"]
    several = Pictures(np.array([1, 0, 1], np.float32), np.array([0, 0, 0], np.float32))
    assert errors(several) == ["1 of 3 classes have no sample: wall"]
    facts = inspect_split(several, name="train")
    assert facts.images_by_class().tolist() == facts.amounts_by_class().tolist() == [1, 0, 1] and facts.unit == ""


def test_boxes_are_checked():
    def boxes(*rows, labels=(0, 1, 2)):
        return {"boxes": np.array(rows, np.float32), "labels": np.array(labels)}

    assert found(Pictures(boxes([0, 0, 8, 6], [1, 1, 2, 2], [1, 2, 3, 4]))) == []
    assert errors(Named(boxes([0, 0, 9.5, 6], [3, 3, 3, 4], [1, 2, 3, 4]), boxes([1, 1, 2, 2], labels=[7]))) == [
        "image 0.png: box [0.0, 0.0, 9.5, 6.0] extends beyond 8 x 6",
        "image 0.png: box [3.0, 3.0, 3.0, 4.0] has no area",
        "image 1.png: class 7 is not in 0 to 2",
    ]


def test_a_data_set_may_check_its_own_samples():
    class Own(Named):
        targets = [0, 1, 1]

        def problems(self, index):
            return [f"{index} is odd"] * (index % 2)

    assert errors(Own(7, None)) == ["1 is odd", "1 of 3 classes have no sample: door"]


def test_a_data_set_without_classes():
    """For example of a task of another package: an array instead of a picture, and anything as a target."""
    data = Samples("text", {"any": 1}, None, "text", images=[*[np.zeros((5, 4, 6))] * 3, "no image at all"])
    facts = inspect_split(data, name="train")
    assert [one.text for one in facts.findings()] == [
        "sample 2 cannot be read: FileNotFoundError: no mask",
        "sample 0, sample 1 have the same pixels",
    ]
    assert facts.sizes.tolist() == [[4, 5], [4, 5]]


def test_images_that_occur_more_than_once():
    white, black, gray = (Image.new("RGB", (4, 4), color) for color in ("white", "black", "gray"))
    train = Named(0, 0, 1, 2, 1, images=[white, white, black, gray, black])
    assert found(train) == [
        ("image 0.png, image 1.png have the same pixels", False),
        ("image 2.png, image 4.png have the same pixels", False),
    ]
    train.targets_ = 0, 2, 1, 2, 1
    assert errors(train) == ["image 0.png, image 1.png have the same pixels, but different labels"]
    # as many bytes in another shape are another image
    val = Named(0, 1, images=[Image.new("RGB", (2, 8), "white"), gray])
    both = images_in_both(*(inspect_split(one, name="") for one in (train, val)))
    assert [one.text for one in both] == ["image 1.png has the same pixels as image 3.png of the training split"]


def test_unbalanced_classes_are_a_warning():
    images = [Image.new("L", (9, 9), n) for n in range(IMBALANCE + 2)]
    data = Named(*[0] * IMBALANCE, 1, 2, images=images)
    assert found(data) == [(f"the classes are unbalanced: ground is in {IMBALANCE} images, wall in 1", False)]
    data.targets_ = (1, *data.targets_[1:])
    assert found(data) == []


def test_workers_find_the_same():
    data = Named(0, None, 1, 2, 9)
    alone, shared = (inspect_split(data, name="train", workers=workers) for workers in (0, 2))
    assert alone.samples == shared.samples


def test_copies_in_both_splits_and_warnings_alone(tmp_path, capsys):
    root = trainer.draw_folder(tmp_path / "images", train=4, val=2)
    recipe = str(trainer.write_recipe(tmp_path / "f.yaml", data={"root": str(root)}))
    shutil.copy(root / "train/class_1/0.png", root / "train/class_1/copy.png")
    assert check.main([recipe]) == 0
    out = capsys.readouterr().out
    assert (
        f"train: warning: image {root}/train/class_1/0.png, image {root}/train/class_1/copy.png have the same pixels\n"
        in out
    )
    assert "train: checked 13 of 13 samples, found no errors and 1 warning" in out
    # stored in another format, it is still the same image
    Image.open(root / "train/class_2/3.png").save(root / "val/class_2/other.bmp")
    assert check.main([recipe]) == 1
    out = capsys.readouterr().out
    assert (
        f"val: error: image {root}/val/class_2/other.bmp has the same pixels as image {root}/train/class_2/3.png of"
        in out
    )
    assert "val: checked 7 of 7 samples, found 1 error\n" in out


def test_tables_of_sizes_and_classes(tmp_path, coco, capsys):
    root = trainer.draw_folder(tmp_path / "images", train=4, val=2)
    Image.new("RGB", (90, 40)).save(root / "train/class_1/large.png")
    check.main([str(trainer.write_recipe(tmp_path / "f.yaml", data={"root": str(root)}))])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    side = str(trainer.SIZE)
    assert ["train", "13", side, "to", "90", side, "to", "40", side, "x", side] in rows
    assert ["val", "6", side, side, side, "x", side] in rows
    assert rows[rows.index(["class", "train", "images", "val", "images"]) + 2] == ["class_1", "5", "2"]
    check.main([str(coco[1])])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["class", "train", "images", "train", "objects", "val", "images", "val", "objects"] in rows
    assert ["bottle", "6", "6", "4", "4"] in rows


def test_all_faults_of_annotation_files_and_all_missing_files_are_listed(tmp_path, coco, capsys):
    """Also where the data set cannot be opened, and of both splits."""
    root, recipe = coco
    for split in ("train", "val"):
        detection.change(root, split, lambda c: [one.update(bbox=[1, 2]) for one in c["annotations"][:2]])
    assert check.main([str(recipe)]) == 1
    out = capsys.readouterr().out
    for split in ("train", "val"):
        assert out.count(f"instances_{split}2017.json: annotation ") == 2
        assert f"{split}: cannot be opened, found 2 errors" in out
    ade = scenery.ade20k(tmp_path / "ade")
    names = [ade / f"annotations/training/ADE_train_0000000{number}.png" for number in (1, 3)]
    for name in names:
        name.unlink()
    with pytest.raises(FaultsError, match="2 of 4 masks are missing") as caught:
        check_exist([*names, *(ade / "annotations/training").iterdir()], "masks")
    assert caught.value.faults == [f"{name} is missing" for name in names]


def test_annotation_files_of_pascal_voc_are_all_read(tmp_path):
    def read(name):
        if name in "bd":
            raise UserError(f"{name}.xml is torn")
        return AnnotatedImage(name)

    assert [image.path for image in read_all("ac", read)] == ["a", "c"]
    with pytest.raises(FaultsError, match=r"b.xml is torn \(and 1 more faults\)") as caught:
        read_all("abcd", read)
    assert caught.value.faults == ["b.xml is torn", "d.xml is torn"]


class Page(HTMLParser):
    """Text of a page, and the addresses in it."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text, self.links, self.alts = "", [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href")]
        self.alts += [value for name, value in attrs if name == "alt"]

    def handle_data(self, data):
        self.text += data


def write_page(tmp_path, recipe, *overrides):
    check.main([str(recipe), *overrides, "--report", str(tmp_path / "new/page.html")])
    return Page(tmp_path / "new/page.html")


def test_the_page_is_self_contained_and_shows_each_class(tmp_path, monkeypatch):
    monkeypatch.setitem(STYLE, "savefig.dpi", 40)
    root = trainer.draw_folder(tmp_path / "images", train=20, val=2)
    Image.new("RGB", (300, 400)).save(root / "val/class_1/<large>.png")
    (root / "train/class_0/9.png").write_bytes(b"nothing")
    page = write_page(tmp_path, trainer.write_recipe(tmp_path / "f.yaml", data={"root": str(root)}))
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search("https?:|url\\(|@import", re.sub('data:image/[a-z]*;base64,[^"]*', "", page.source))
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new/page.html"]
    assert page.alts.count("images by class") == 1 and sum("with its labels" in alt for alt in page.alts) == 24 + 7
    assert f"{root}/train/class_0/9.png cannot be decoded" in page.text and "<large>.png" in page.text
    assert "Widths of 32 to 300 pixels, heights of 32 to 400; 2 different sizes." in page.text


@pytest.mark.parametrize("kind", ["boxes", "instance masks", "semantic masks"])
def test_the_page_draws_labels(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(STYLE, "savefig.dpi", 40)
    if kind == "semantic masks":
        recipe = trainer.write_recipe(tmp_path / "s.yaml", **trainer.SCENES["segment"])
        page = write_page(tmp_path, recipe)
        names = ["background", "7"]
    else:
        root = detection.draw_coco(tmp_path / "coco")
        detection.change(root, "train", edit_first(bbox=[50, 5, 30, 9]))
        detector = "mask_rcnn" if kind == "instance masks" else "fcos"
        page = write_page(
            tmp_path, detection.write_recipe(tmp_path / "r.yaml", root), f"task.detect.detector={detector}"
        )
        names = ["bottle", "person", "extends beyond the image of 68 x 50"]
        # the sample with an error comes first
        first = page.text.index("000000000004.jpg", page.text.index("Samples of train"))
        assert "extends beyond" in page.text[first : first + 400]
    assert all(name in page.text for name in names)
    assert sum("with its labels" in alt for alt in page.alts) >= 14


def test_the_choice_of_samples_has_every_class_and_repeats_itself():
    class Many(Named):
        classes = [str(n) for n in range(40)]

    rng = np.random.default_rng(0)
    targets = [*(int(n) for n in rng.integers(0, 20, 400)), *range(20, 40)]
    images = [Image.fromarray(rng.integers(0, 255, (4, 4), dtype=np.uint8)) for _ in targets]
    facts = inspect_split(Many(*targets, None, images=[*images, None]), name="train")
    chosen = choose(facts, seed=3)
    assert {targets[index] for index in chosen} == set(range(40)) and len(set(chosen)) == len(chosen) == 40
    assert chosen == choose(facts, seed=3) != choose(facts, seed=4)


def test_wrong_numbers_are_errors(tmp_path, capsys):
    recipe = str(trainer.write_recipe(tmp_path / "f.yaml", data={"root": str(tmp_path)}))
    for option, value in (("--limit", "0"), ("--workers", "-1")):
        assert check.main([recipe, option, value]) == 1
        assert f"{option} {value} must be at least" in capsys.readouterr().err
