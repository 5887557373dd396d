"""Own images for classification: a folder that is split by itself, and CSV and parquet files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import trainer
from PIL import Image

from tessel.train.errors import UserError
from tessel.train.recipe.load import make_recipe
from tessel.train.recipe.registry import open_dataset


def draw(path: Path, number: int = 0) -> None:
    """Write a picture whose red value is `number`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (number, 0, 0)).save(path)


def write_csv(path: Path, rows: list[dict[str, object]], delimiter: str = ",") -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def names(dataset) -> list[str]:
    return [Path(path.decode()).name for path in dataset.paths]


def red(dataset) -> list[int]:
    """The red values of the pictures."""
    return [np.asarray(dataset[index][0])[0, 0, 0].item() for index in range(len(dataset))]


def label_sets(split: str, **data):
    """A split of a CSV file with several labels per picture."""
    sections = {
        "model": {"name": "test_resnet"},
        "task": {"kind": "multilabel"},
        "data": {"source": "csv", **data},
        "sched": {"steps": 1},
    }
    return open_dataset(make_recipe(json.loads(json.dumps(sections)), source="test"), split)


@pytest.fixture
def plain(tmp_path):
    """A folder per class, without train/ and val/."""
    for label, count in (("cat", 20), ("dog", 10), ("emu", 2)):
        for number in range(count):
            draw(tmp_path / "pets" / label / f"{number:02}.png", number)
    return tmp_path / "pets"


def test_a_folder_without_splits_is_split(plain):
    train, val = (trainer.open_source("folder", split, root=str(plain)) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog", "emu"]
    assert len(train) + len(val) == 32 and not set(train.paths) & set(val.paths)
    assert all(0 < (val.targets == label).sum() < (train.targets == label).sum() + 1 for label in range(3))
    before = set(val.paths)
    draw(plain / "cat" / "new.png")
    after = set(trainer.open_source("folder", "val", root=str(plain)).paths)
    assert before <= after, "a new picture moves no other"
    wide = open_dataset(trainer.recipe_of(source="folder", root=str(plain), split=0.6), "val")
    assert before <= set(wide.paths) and len(wide) > 2 * len(before)


def test_the_split_does_not_depend_on_the_place(plain, tmp_path):
    before = names(trainer.open_source("folder", "val", root=str(plain)))
    plain.rename(tmp_path / "elsewhere")
    assert names(trainer.open_source("folder", "val", root=str(tmp_path / "elsewhere"))) == before


def test_a_part_of_train_is_held_out_without_val(plain, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    plain.rename(root / "train")
    train, val = (trainer.open_source("folder", split, root=str(root)) for split in ("train", "val"))
    assert len(train) + len(val) == 32 and len(val) > 3
    draw(root / "valid/cat/1.png")
    assert len(trainer.open_source("folder", "val", root=str(root))) == 1
    assert len(trainer.open_source("folder", "train", root=str(root))) == 32


def test_folders_that_do_not_fit_are_errors(plain, tmp_path):
    draw(tmp_path / "a/val/cat/1.png")
    with pytest.raises(UserError, match="has the folder val, but no folder train; data.root must contain"):
        trainer.open_source("folder", "train", root=str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"data.val_split=test: image folder .*test cannot be read"):
        trainer.open_source("folder", "train", root=str(plain), val_split="test")
    draw(tmp_path / "b/cat/1.png")
    with pytest.raises(UserError, match="one image per class, too few for validation"):
        trainer.open_source("folder", "val", root=str(tmp_path / "b"))


def test_a_folder_of_arrays(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(4):
            np.save(tmp_path / label / f"{number}.npy", np.full((3, 4), number, np.uint8))
    train = trainer.open_source("folder", "train", root=str(tmp_path))
    assert train.classes == ["a", "b"] and set(red(train)) <= set(range(4))
    draw(tmp_path / "a/9.png", 9)
    with pytest.raises(UserError, match="class b .* has no images"):
        trainer.open_source("folder", "train", root=str(tmp_path))


@pytest.fixture
def table(tmp_path):
    rows = []
    for number in range(30):
        draw(tmp_path / "images" / f"{number}.png", number)
        rows.append({"path": f"images/{number}.png", "label": number % 3 + 9})
    return write_csv(tmp_path / "list.csv", rows)


def test_classes_are_read_from_a_file(table):
    parts = {split: trainer.open_source("csv", split, root=str(table)) for split in ("train", "val")}
    for dataset in parts.values():
        assert dataset.classes == ["9", "10", "11"], "numbers are sorted as numbers"
        assert all(number % 3 == label for number, label in zip(red(dataset), dataset.targets, strict=True))
    assert sorted(red(parts["train"]) + red(parts["val"])) == list(range(30))
    assert all((parts["val"].targets == label).any() for label in range(3))


def test_columns_separators_and_roots_are_keys(tmp_path, table):
    rows = [{"file": f"{number}.png", "kind": "ab"[number % 2], "set": "test"[number % 4 :]} for number in range(8)]
    listed = write_csv(tmp_path / "other.txt", rows, "|")
    keys = {"input_key": "file", "target_key": "kind", "split_key": "set", "train_split": "test", "val_split": "st"}
    for split, expected in (("train", [0, 4]), ("val", [2, 6])):
        found = trainer.open_source(
            "csv", split, root=str(listed), delimiter="|", images=str(tmp_path / "images"), **keys
        )
        assert red(found) == expected and found.classes == ["a"]
    (tmp_path / "map.txt").write_text("b\na\n")
    mapped = trainer.open_source(
        "csv",
        "train",
        root=str(listed),
        delimiter="|",
        images=str(tmp_path / "images"),
        class_map=str(tmp_path / "map.txt"),
        **keys,
    )
    assert mapped.classes == ["b", "a"] and mapped.targets.tolist() == [1, 1]


def test_a_second_file_is_the_validation_split(tmp_path, table):
    lines = table.read_text().splitlines()
    val = tmp_path / "val.tsv"
    val.write_text("\ufeffpath\tlabel\n" + "\n".join(line.replace(",", "\t") for line in lines[1:5]))
    table.write_text("\n".join([lines[0], *lines[5:]]))
    parts = [trainer.open_source("csv", split, root=str(table), val=str(val)) for split in ("train", "val")]
    assert [red(part) for part in parts] == [list(range(4, 30)), list(range(4))]
    assert parts[0].classes == parts[1].classes


def test_parquet_files_are_read(table):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    columns = {
        "path": [row["path"] for row in rows],
        "label": [int(row["label"]) for row in rows],
        "tags": [["a", "b"][: number % 3] for number in range(len(rows))],
    }
    file = table.with_suffix(".parquet")
    parquet.write_table(pyarrow.table(columns), file)
    one, other = (trainer.open_source("csv", "train", root=str(path)) for path in (table, file))
    assert one.paths.tolist() == other.paths.tolist() and one.targets.tolist() == other.targets.tolist()
    sets = label_sets("train", root=str(file), target_key="tags")
    assert sets.classes == ["a", "b"] and sets[red(sets).index(1)][1].tolist() == [1, 0]
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"list.parquet cannot be read"):
        trainer.open_source("csv", "train", root=str(file))


def test_parquet_without_pyarrow_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="parquet files need the package pyarrow: pip install pyarrow"):
        trainer.open_source("csv", "train", root=str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("rows", "keys", "fragment"),
    [
        ([{"file": "0.png", "label": 1}], {}, "has no column path, its columns are file, label; set data.input_key"),
        ([{"path": "0.png", "label": ""}], {}, "line 2 has no class in the column label; .*task.kind=multilabel"),
        ([{"path": "", "label": "1"}], {}, "line 2 has no path in the column path"),
        ([{"path": "0.png", "label": "a"}, {"path": "0.png", "label": "b"}], {}, "line 3 has the class b for 0.png"),
        ([{"path": "0.png", "label": "a"}], {"split_key": "set"}, "has no column set"),
        ([{"path": "0.png", "label": "a", "set": "x"}], {"split_key": "set"}, "the column set leaves no images for"),
        ([{"path": "0.png", "label": "a"}], {"label_columns": ["a"]}, "which task.kind=multilabel trains on"),
        ([{"path": "9.png", "label": "a"}] * 2, {}, "its images are missing, for example .*9.png; set data.images"),
        ([{"path": "0.png", "label": "a"}], {"split_key": "label", "val": "x.csv"}, "together with data.val"),
        ([{"path": "0.png", "label": "a"}], {"val": "gone.csv"}, "gone.csv cannot be read"),
        (
            [{"path": "0.png", "label": "a", "set": "train"}, {"path": "0.png", "label": "a", "set": "val"}],
            {"split_key": "set"},
            "line 3: 0.png is in both splits",
        ),
    ],
)
def test_wrong_lines_are_named(tmp_path, rows, keys, fragment):
    draw(tmp_path / "0.png")
    file = write_csv(tmp_path / "list.csv", rows)
    with pytest.raises(UserError, match=fragment):
        trainer.open_source("csv", "train", root=str(file), **keys)


def test_files_that_are_no_tables_are_errors(tmp_path):
    file = tmp_path / "list.csv"
    for content, fragment in (
        (b"", "no lines below"),
        (b"path,label\n", "no lines below"),
        (b"path,label\na.png,b,c\n", "line 2 has more columns"),
        (b"\xff\xfe\x00", "cannot be read"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=fragment):
            trainer.open_source("csv", "train", root=str(file))


def test_labels_of_one_column_of_several_and_of_several_lines_are_the_same(tmp_path):
    wanted = [["sea"], ["sea", "sky"], [], ["sky", "tree"], ["tree"], ["sea", "tree"]] * 5
    classes = ["sea", "sky", "tree"]
    for number in range(len(wanted)):
        draw(tmp_path / f"{number}.png", number)
    joined = [{"path": f"{n}.png", "label": " ; ".join(found)} for n, found in enumerate(wanted)]
    columns = [{"path": f"{n}.png"} | {c: int(c in found) for c in classes} for n, found in enumerate(wanted)]
    long = [{"path": f"{n}.png", "label": label} for n, found in enumerate(wanted) for label in found or [""]]
    data = [
        ({"root": str(write_csv(tmp_path / "joined.csv", joined))}, True),
        ({"root": str(write_csv(tmp_path / "columns.csv", columns)), "label_columns": classes}, False),
        ({"root": str(write_csv(tmp_path / "long.csv", long))}, True),
    ]
    for split in ("train", "val"):
        seen = [label_sets(split, **keys) for keys, _ in data]
        for dataset in seen:
            assert dataset.classes == classes and dataset.paths.tolist() == seen[0].paths.tolist()
            for index, number in enumerate(red(dataset)):
                hot = dataset[index][1]
                assert hot.dtype == np.float32
                assert [c for c, one in zip(classes, hot, strict=True) if one] == wanted[number]
        assert sorted(set(seen[0].targets.tolist())) == [0, 1, 2], "each label is in both splits"


@pytest.mark.parametrize(
    ("row", "keys", "fragment"),
    [
        ({"path": "0.png", "a": "2"}, {"label_columns": ["a"]}, "line 2 has '2' in the column a; it must be 1 or 0"),
        ({"path": "0.png", "label": ""}, {}, "no labels in the column label"),
        ({"path": "0.png", "a": "1"}, {"label_columns": ["a", "b"]}, "has no column b"),
    ],
)
def test_wrong_labels_are_named(tmp_path, row, keys, fragment):
    draw(tmp_path / "0.png")
    file = write_csv(tmp_path / "list.csv", [row])
    with pytest.raises(UserError, match=fragment):
        label_sets("train", root=str(file), **keys)
