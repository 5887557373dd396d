"""Sources other than folders (tar, WebDataset, Hugging Face, TFDS) give the same images and classes as folders."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import trainer
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from tessel.train.data.loader import Loader, SeededDataset
from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return trainer.draw_folder(tmp_path_factory.mktemp("images"))


def files(images, split):
    """(class, path) of the images of a split, in the order of the folder source."""
    return [(path.parent.name, path) for path in sorted((images / split).rglob("*.png"))]


def pack(archive: Path, members: list[tuple[str, bytes]]) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def one_archive(images, root, split):
    pack(root / f"{split}.tar", [(f"data/{label}/{p.name}", p.read_bytes()) for label, p in files(images, split)])


def archive_of_each_class(images, root, split):
    for wanted in sorted({label for label, _ in files(images, split)}):
        members = [(p.name, p.read_bytes()) for label, p in files(images, split) if label == wanted]
        pack(root / split / f"{wanted}.tar", members)


def archives_in_an_archive(images, root, split):
    archive_of_each_class(images, root / "parts", split)
    pack(root / f"{split}.tar", [(p.name, p.read_bytes()) for p in sorted((root / "parts" / split).iterdir())])


def write_shards(images, root, split, label=str, places=("shard-{}.tar",)):
    """Write a split as three WebDataset shards."""
    found = files(images, split)
    classes = sorted({name for name, _ in found})
    for shard in range(3):
        members = []
        for number in range(shard * len(found) // 3, (shard + 1) * len(found) // 3):
            name, path = found[number]
            sidecars = {"cls": label(classes.index(name)), "json": json.dumps({"kind": {"a": 1}, "wnid": name})}
            members += [(f"./s{number:04d}.{key}", text.encode()) for key, text in sidecars.items()]
            members.append((f"./s{number:04d}.PNG", path.read_bytes()))
        pack(root / split / f"shard-{shard}.tar", members)


def assert_same_samples(dataset, reference):
    assert len(dataset) == len(reference)
    for index in np.random.default_rng(0).permutation(len(reference)):
        (image, target), (expected, label) = dataset[int(index)], reference[int(index)]
        assert image.mode == "RGB" and target == label and np.array_equal(image, expected)


@pytest.mark.parametrize("layout", [one_archive, archive_of_each_class, archives_in_an_archive])
def test_tar_source_equals_the_folder_source(images, tmp_path, layout):
    for split in ("train", "val"):
        layout(images, tmp_path, split)
        reference = trainer.open_source("folder", split, root=str(images))
        dataset = trainer.open_source("tar", split, root=str(tmp_path))
        assert dataset.classes == reference.classes
        assert_same_samples(dataset, reference)
        # timm's reader of tar files finds the same classes
        single = tmp_path / f"{split}.tar"
        theirs = ReaderImageInTar(str(single if single.exists() else tmp_path / split))
        pairs = zip(theirs.targets, theirs.filenames(basename=True), strict=True)
        found = sorted((theirs.class_idx_to_name[target], name) for target, name in pairs)
        assert found == sorted((label, path.name) for label, path in files(images, split))


@pytest.mark.parametrize(
    ("keys", "label", "classes"),
    [
        ({}, str, ["0", "1", "2"]),
        ({"class_map": "names.txt"}, "  {}\n".format, ["class_0", "class_1", "class_2"]),
        ({"class_map": "names.txt"}, "class_{}".format, ["class_0", "class_1", "class_2"]),
        ({}, "kind {}".format, ["kind 0", "kind 1", "kind 2"]),
        ({"target_key": "wnid"}, str, ["class_0", "class_1", "class_2"]),
        ({"input_key": "jpg;png", "val_split": "val/shard-*.tar"}, str, ["0", "1", "2"]),
    ],
)
def test_webdataset_source_equals_the_folder_source(images, tmp_path, keys, label, classes):
    write_shards(images, tmp_path, "val", label)
    (tmp_path / "names.txt").write_text("class_0\nclass_1\nclass_2\n\n")
    dataset = trainer.open_source("wds", "val", root=str(tmp_path), **keys)
    assert dataset.classes == classes
    assert_same_samples(dataset, trainer.open_source("folder", "val", root=str(images)))


def test_shards_written_by_the_webdataset_package_are_read(images, tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(str(tmp_path / "x-train-%06d.tar"), maxcount=10, verbose=0) as sink:
        for number, (label, path) in enumerate(files(images, "train")):
            sink.write({"__key__": f"a/b{number:03d}", "png": path.read_bytes(), "cls": int(label[-1])})
    dataset = trainer.open_source("wds", "train", root=str(tmp_path), train_split="x-train-*.tar")
    assert_same_samples(dataset, trainer.open_source("folder", "train", root=str(images)))


def test_training_from_shards_equals_training_from_folders(images, tmp_path, capsys):
    """The run on shards has two loader workers, is interrupted after five of nine updates and resumes."""
    for split in ("train", "val"):
        write_shards(images, tmp_path, split)
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", data={"root": str(images)})
    assert trainer.train(recipe) == 0
    changes = ["data.source=wds", f"data.root={tmp_path}", "run.name=wds", "data.workers=2"]
    with trainer.before_step(5):
        assert trainer.train(recipe, *changes) == 0
    assert trainer.train(recipe, *changes) == 0
    assert "at step 5 (exact)" in capsys.readouterr().out
    runs = tmp_path / "runs"
    trainer.assert_same_checkpoint(*(runs / name / "checkpoints/step-00000009" for name in ("tiny", "wds")))
    assert trainer.stable_metrics(runs / "wds") == trainer.stable_metrics(runs / "tiny")


def sample_without_image(root):
    pack(root / "train.tar", [("x.cls", b"1"), ("x.txt", b"a cat")])


def compressed_archive(root):
    (root / "train.tar").write_bytes(gzip.compress(b"0" * 9999))


def truncated_archive(root):
    content = (root / "train/shard-1.tar").read_bytes()
    (root / "train/shard-1.tar").write_bytes(content[:700])


def json_without_the_key(root):
    pack(root / "train.tar", [("x.png", b""), ("x.json", b"{}")])


def incomplete_class_map(root):
    (root / "names.txt").write_text("one\n")


@pytest.mark.parametrize(
    ("keys", "damage", "fragments"),
    [
        ({"root": "/nowhere"}, None, ["/nowhere/train.tar", "data.root"]),
        ({"train_split": "/a/*.tar"}, None, ["/a/*.tar", "cannot be listed"]),
        ({}, sample_without_image, ["train.tar: sample x has .cls, .txt", ".png", "beside .cls"]),
        ({}, compressed_archive, ["train.tar cannot be read", "without compression"]),
        ({}, truncated_archive, ["shard-1.tar cannot be read", "complete"]),
        ({"target_key": "label"}, json_without_the_key, ["train.tar:x.json", "'label'", "data.target_key"]),
        ({"class_map": "names.txt"}, incomplete_class_map, ["'1'", "data.class_map=names.txt", "every class"]),
        ({"class_map": "none.txt"}, None, ["data.class_map=none.txt cannot be read"]),
        ({"source": "tar", "train_split": "flat"}, lambda root: pack(root / "flat.tar", [("a.png", b"")]), ["folder"]),
        ({"source": "tar", "train_split": "flat"}, lambda root: pack(root / "flat.tar", [("a", b"")]), ["no images"]),
        ({"source": "hfds", "name": "x"}, None, ["needs the package datasets", "pip install datasets"]),
        ({"source": "tfds", "name": "x"}, None, ["tensorflow_datasets", "pip install tensorflow-datasets"]),
    ],
)
def test_errors_name_what_cannot_be_read(images, tmp_path, monkeypatch, keys, damage, fragments):
    write_shards(images, tmp_path, "train")
    monkeypatch.setattr("tessel.train.data.external.find_spec", lambda name: None)
    if damage:
        damage(tmp_path)
    with pytest.raises(UserError) as caught:
        trainer.open_source(**{"source": "wds", "split": "train", "root": str(tmp_path), **keys})
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments) and "\n" not in message, message


def test_damaged_image_in_a_shard_is_named_and_counted(images, tmp_path):
    write_shards(images, tmp_path, "val")
    archive = tmp_path / "val/shard-1.tar"
    content = bytearray(archive.read_bytes())
    with tarfile.open(archive) as tar:
        damaged = tar.getmembers()[2]
    content[damaged.offset_data : damaged.offset_data + 40] = bytes(40)
    archive.write_bytes(content)
    dataset = trainer.open_source("wds", "val", root=str(tmp_path))
    loader = Loader(SeededDataset(dataset, lambda *pair: pair, 0), [[(0, 5)]], workers=0, prefetch=2, pin=False)
    with pytest.raises(UserError, match=f"image {archive}:{damaged.name.removeprefix('./')} cannot be decoded"):
        next(loader)
    assert list(loader.failures) == [5]


class StandIn:
    """The part of a Hugging Face dataset that timm's reader uses. Tests use the package too where it is installed."""

    def __init__(self, rows):
        names = sorted({name for name, _ in rows})
        self.rows = [{"image": {"bytes": path.read_bytes()}, "label": names.index(name)} for name, path in rows]
        self.info = types.SimpleNamespace(features={"label": types.SimpleNamespace(names=names)}, splits=None)

    def cast_column(self, column, feature):
        assert column == "image"
        return self

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.fixture(params=["stand-in", "package"])
def hugging_face(request, images, monkeypatch):
    """The name under which `data.source=hfds` finds the images: with a stub of the package, and with the package."""
    if request.param == "package":
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        yield str(images)
        return

    def load_dataset(name, *, split, cache_dir):
        if name != "cats":
            raise FileNotFoundError(f"Couldn't find {name} on the hub\nor here")
        return StandIn(files(images, {"train": "train", "validation": "val"}[split]))

    module = types.ModuleType("datasets")
    module.load_dataset, module.Image = load_dataset, lambda decode: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    sys.modules.pop("timm.data.readers.reader_hfds", None)
    monkeypatch.setattr("tessel.train.data.external.find_spec", lambda name: True)
    yield "cats"
    sys.modules.pop("timm.data.readers.reader_hfds", None)  # it keeps a reference to the stub


@pytest.mark.filterwarnings("default")
def test_hugging_face_source_equals_the_folder_source(hugging_face, images, tmp_path):
    for split in ("train", "val"):
        dataset = trainer.open_source("hfds", split, name=hugging_face, root=str(tmp_path / "store"))
        reference = trainer.open_source("folder", split, root=str(images))
        assert dataset.classes == reference.classes
        assert_same_samples(dataset, reference)
    (tmp_path / "names.txt").write_text("class_2\nclass_1\nclass_0\n")
    options = {"name": hugging_face, "root": str(tmp_path / "store"), "class_map": str(tmp_path / "names.txt")}
    remapped = trainer.open_source("hfds", "val", **options)
    assert remapped.classes == ["class_2", "class_1", "class_0"] and [remapped[i][1] for i in (0, 14)] == [2, 0]
    with pytest.raises(UserError, match="data.source=hfds: split train of /no/such cannot be read: "):
        trainer.open_source("hfds", "train", name="/no/such")


def prepared_by_package(images, store):
    import tensorflow_datasets as tfds  # type: ignore[import-not-found]

    class Stripes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            names = ["class_0", "class_1", "class_2"]
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=names)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._rows("train"), "validation": self._rows("val")}

        def _rows(self, split):
            for number, (label, path) in enumerate(files(images, split)):
                yield number, {"image": str(path), "label": label}

        def _generate_examples(self):
            raise AssertionError

    Stripes(data_dir=str(store), file_format="array_record").download_and_prepare()


def prepared_stand_in(images, monkeypatch):
    """Replace tensorflow_datasets by a stub of the calls that are used."""

    def builder(name, data_dir):
        def as_data_source(split, decoders):
            assert decoders == {"image": "raw"}
            rows = StandIn(files(images, {"train": "train", "validation": "val"}[split])).rows
            return [{"image": row["image"]["bytes"], "label": np.int64(row["label"])} for row in rows]

        label = types.SimpleNamespace(names=["class_0", "class_1", "class_2"])
        info = types.SimpleNamespace(features={"label": label})
        if name != "stripes":
            raise ValueError(f"Dataset {name} not found")
        return types.SimpleNamespace(info=info, as_data_source=as_data_source)

    module = types.ModuleType("tensorflow_datasets")
    module.builder, module.decode = builder, types.SimpleNamespace(SkipDecoding=lambda: "raw")  # type: ignore
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    monkeypatch.setattr("tessel.train.data.external.find_spec", lambda name: True)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("how", ["stand-in", "package"])
def test_tensorflow_datasets_source_equals_the_folder_source(images, tmp_path, monkeypatch, how):
    if how == "package":
        pytest.importorskip("tensorflow_datasets")
        # in another process, because open files of array_record do not survive a fork
        call = f"from test_train_readers import *; prepared_by_package(Path({str(images)!r}), Path({str(tmp_path)!r}))"
        subprocess.run([sys.executable, "-c", call], check=True, cwd=Path(__file__).parent, capture_output=True)
    else:
        prepared_stand_in(images, monkeypatch)
    options = {"name": "stripes", "root": str(tmp_path)}
    # first in loader workers, because open files of array_record do not survive a fork
    dataset = trainer.open_source("tfds", "train", **options)
    loader = Loader(SeededDataset(dataset, pixels, 0), [[(0, 4), (0, 0)], [(0, 9)]], workers=2, prefetch=2, pin=False)
    batches = list(loader)
    loader.close()
    assert np.array_equal(batches[0][0][0].numpy(), np.asarray(dataset[4][0]))
    assert batches[1][1].tolist() == [dataset[9][1]]
    for split in ("train", "val"):
        dataset = trainer.open_source("tfds", split, **options)
        reference = trainer.open_source("folder", split, root=str(images))
        assert dataset.classes == reference.classes
        found = [
            (target, np.asarray(image).tobytes()) for image, target in map(dataset.__getitem__, range(len(dataset)))
        ]
        wanted = [
            (target, np.asarray(image).tobytes()) for image, target in map(reference.__getitem__, range(len(reference)))
        ]
        assert sorted(found) == sorted(wanted)  # tensorflow_datasets shuffles the samples
    assert len(dataset) == 15 and dataset[3][1] == dataset[3][1]
    with pytest.raises(UserError, match=r"split train of nothing cannot be read at random.*array_record"):
        trainer.open_source("tfds", "train", name="nothing", root=str(tmp_path))


def pixels(image: Image.Image, target: int):
    return np.asarray(image), target


@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ("source=tar", "data.root is missing: folder with"),
        ("source=hfds", "data.name is missing"),
        ("source=wds root=x name=y", "data.name has no effect here: it is a key of data.source=hfds, tfds"),
        (
            "source=tar root=x target_key=y",
            "data.target_key has no effect here: it is a key of data.source=wds, hfds, tfds",
        ),
        ("source=folder root=x class_map=y", "data.class_map has no effect here"),
        ("source=digits val_split=x", "data.val_split has no effect here: it is a key of data.source=folder, tar"),
    ],
)
def test_missing_and_unused_keys_of_a_source_are_errors(tmp_path, keys, fragment):
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: test_resnet}\ndata: {source: digits}\nsched: {epochs: 1}\n")
    with pytest.raises(UserError, match=fragment):
        load_recipe(path, [f"data.{key}" for key in keys.split()])


def test_folder_source_reads_the_named_splits(images):
    options = {"root": str(images), "train_split": "val", "val_split": "train"}
    assert [len(trainer.open_source("folder", split, **options)) for split in ("train", "val")] == [15, 36]
