"""`data.decoder=torchcodec`: the pixels of Pillow, crops close to Pillow's, samples that depend only on their key."""

import io
import random
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
import trainer
from PIL import ExifTags, Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from tessel.train.data.image_io import read_image
from tessel.train.data.native_decoder import read_pixels, require_decoder
from tessel.train.data.sampler import seed_all
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.plan import plan
from tessel.train.recipe.registry import open_dataset, task_spec
from tessel.train.tasks.classify.tensor_crop import TensorCrop

pytest.importorskip("torchcodec")


def picture(width=60, height=45, seed=0):
    """Smooth colors with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.normal(0, 4, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", orientation=None, **options):
    file = io.BytesIO()
    if orientation:
        options["exif"] = image.getexif()
        options["exif"][ExifTags.Base.Orientation] = orientation
    image.save(file, kind, **options)
    return file.getvalue()


FILES = {
    "rgb": encoded(picture()),
    "gray": encoded(picture().convert("L")),
    "cmyk": encoded(picture().convert("CMYK")),
    "progressive": encoded(picture(), progressive=True, subsampling=0),
    "upright": encoded(picture(), orientation=1),
    "turned": encoded(picture(), orientation=6),
    "png": encoded(picture(), "PNG"),
    "webp": encoded(picture(), "WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow(name):
    """Also of a JPEG with an EXIF orientation, which torchcodec would apply by itself, and of other formats."""
    pixels = read_pixels(partial(io.BytesIO, FILES[name]), name)
    expected = np.asarray(read_image(partial(io.BytesIO, FILES[name]), name))
    assert pixels.dtype == torch.uint8 and np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_only_plain_jpegs_go_to_torchcodec(monkeypatch):
    seen = []

    def decode(content):
        seen.append(content)
        return torch.zeros(3, 45, 60, dtype=torch.uint8)

    monkeypatch.setattr("torchcodec.decoders.decode_jpeg", decode)
    for name, content in FILES.items():
        read_pixels(partial(io.BytesIO, content), name)
    assert seen == [FILES[name] for name in ("rgb", "gray", "progressive", "upright")]


@pytest.mark.parametrize("content", [FILES["rgb"][:700], FILES["png"][:700], b"", b"\xff\xd8\xff\xe0 no picture"])
def test_damaged_file_is_an_error_that_names_it(content):
    with pytest.raises(UserError, match="image broken.jpg cannot be decoded"):
        read_pixels(partial(io.BytesIO, content), "broken.jpg")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_crops_are_close_to_those_of_pillow(interpolation):
    crop = RandomResizedCropAndInterpolation(32, scale=(0.08, 1.0), interpolation=interpolation)
    equal = []
    for seed in range(20):
        image = picture(100, 75, seed)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        random.seed(seed)
        expected = np.asarray(crop(image)).astype(int)
        after = random.random()
        random.seed(seed)
        found = np.asarray(TensorCrop(crop)(pixels)).astype(int)
        assert found.shape == (32, 32, 3) and random.random() == after  # the same random numbers, hence the same box
        assert abs(found - expected).max() <= 2
        equal.append((found == expected).mean())
        random.seed(seed)
        assert np.array_equal(np.asarray(TensorCrop(crop)(pixels.contiguous())), found)  # of any memory layout
    assert np.mean(equal) > 0.95


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with 18 training pictures of three classes, most of them plain JPEG files."""
    root = tmp_path_factory.mktemp("jpegs")
    for number in range(18):
        for split in ("train", "val"):
            folder = root / split / f"class_{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            kind = {4: "turned", 9: "png"}.get(number)
            ending = "png" if kind == "png" else "jpg"
            content = FILES[kind] if kind else encoded(picture(seed=number))
            (folder / f"{number}.{ending}").write_bytes(content)
    return root


def recipe_at(path, root, decoder, **data):
    aug = {"scale": [0.3, 1.0], "mixup": 0.0, "cutmix": 0.0}
    keys = {"root": str(root), "decoder": decoder, "interpolation": "random"}
    return trainer.write_recipe(path, data=keys | {"aug": aug | {"auto_augment": "rand-m5-n1", "rotate": 10}} | data)


@pytest.mark.parametrize("decoder", ["pil", "torchcodec"])
def test_batches_depend_on_nothing_but_seed_epoch_and_index(tmp_path, root, decoder):
    def batches(workers, start=0):
        recipe = load_recipe(recipe_at(tmp_path / "stream.yaml", root, decoder, workers=workers))
        seed_all(1000 + workers + start)  # what the process did before
        task = task_spec(recipe).build(recipe, World())
        task.build_model()
        loader = task.train_batches(plan(recipe, samples=task.samples, world_size=1), start)
        try:
            return [[*task.to_device(batch), batch[2]] for batch in loader]
        finally:
            loader.close()

    whole = batches(0)
    assert len(whole) == 18 and all(batch[0].dtype == torch.float32 for batch in whole)
    for workers, start in ((2, 0), (1, 4)):
        found = batches(workers, start)
        assert len(found) == 18 - 2 * start
        for left, right in zip(whole[2 * start :], found, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_run_resumes_exactly_and_only_with_its_decoder(tmp_path, root, capsys):
    recipe = recipe_at(tmp_path / "tiny.yaml", root, "torchcodec")
    assert trainer.train(recipe, "run.name=whole") == 0
    with trainer.before_step(6):
        assert trainer.train(recipe) == 0
    shutil.copytree(tmp_path / "runs" / "tiny", tmp_path / "runs" / "other")
    assert trainer.train(recipe) == 0
    last = "checkpoints/step-00000009"
    trainer.assert_same_checkpoint(tmp_path / "runs/whole" / last, tmp_path / "runs/tiny" / last)
    capsys.readouterr()
    assert trainer.train(recipe, "run.name=other", "data.decoder=pil") == 1
    assert "data.decoder (there 'torchcodec', now 'pil')" in capsys.readouterr().err


def test_evaluation_and_check_read_by_pillow(root, tmp_path):
    recipe = load_recipe(recipe_at(tmp_path / "tiny.yaml", root, "torchcodec"))
    task = task_spec(recipe).build(recipe, World())
    assert isinstance(task.val[0][0], Image.Image) and isinstance(open_dataset(recipe, "train")[0][0], Image.Image)
    assert isinstance(task.train[0][0], torch.Tensor)


def test_missing_decoder_is_an_error(monkeypatch, tmp_path, root, capsys):
    monkeypatch.setattr("tessel.train.data.external.find_spec", lambda name: None)
    assert trainer.train(recipe_at(tmp_path / "tiny.yaml", root, "torchcodec")) == 1
    assert "data.decoder=torchcodec needs the package torchcodec: pip install torchcodec" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match=r"cannot be loaded .* a version made for\s+torch"):
        require_decoder()


def test_decoder_needs_image_files(tmp_path, capsys):
    recipe = trainer.write_recipe(tmp_path / "digits.yaml", data={"source": "digits", "decoder": "torchcodec"})
    assert trainer.train(recipe) == 1
    assert "data.source=digits decodes no image files; use data.decoder=pil" in capsys.readouterr().err
