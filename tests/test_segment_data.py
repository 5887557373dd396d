"""Segmentation data: the published layouts, errors that name faulty files, and joint augmentation."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import scenery
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F

from tessel.train.data.loader import FallbackSample, SeededDataset
from tessel.train.data.photometric import photometric, scale_saturation
from tessel.train.data.sources.digit_scenes import open_masks
from tessel.train.errors import UserError
from tessel.train.recipe.registry import SOURCES
from tessel.train.tasks.segment.augment import (
    Normalizer,
    eval_transform,
    random_crop,
    rescaled_size,
    train_transform,
)
from tessel.train.tasks.segment.options import SegmentAug, SegmentData, SegmentTest

CFG = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "input_size": (3, 224, 224)}


def dataset(source, root, split="train"):
    spec = SOURCES[source]
    return spec.datasets["semantic masks"](spec.options(root=str(root)), split)  # type: ignore[call-arg]


def scenes(split, *, count, size):
    return open_masks(SimpleNamespace(scenes=count, size=size), split)


@pytest.mark.parametrize("inner", [False, True])
def test_ade20k(tmp_path, inner):
    root = scenery.ade20k(tmp_path)
    train, val = (dataset("ade20k", tmp_path if inner else root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 2)
    assert len(train.classes) == len(train.palette) == 150 and train.classes[:2] == ["wall", "building"]
    assert train.palette[0] == [120, 120, 120]
    image, mask = train[3]
    assert image.mode == "RGB" and image.size == (51, 40) and mask.dtype == np.uint8
    assert (mask[0] == 255).all() and (mask[1:, :24] == 0).all() and (mask[1:, 24:] == 1).all()


def test_cityscapes(tmp_path):
    train = dataset("cityscapes", scenery.cityscapes(tmp_path))
    assert len(train) == 2 and len(train.classes) == 19
    mask = train[1][1][:, 0]
    names = [train.classes[label] if label != 255 else "" for label in mask]
    assert names == ["sky"] * 5 + ["bicycle"] * 3 + ["", ""] + ["road"] * 10


def test_voc2012(tmp_path):
    root = scenery.voc2012(tmp_path)
    for place in (root, root / "VOCdevkit", root / "VOCdevkit/VOC2012"):
        train, val = (dataset("voc2012", place, split) for split in ("train", "val"))
        assert (len(train), len(val)) == (1, 2) and len(train.classes) == 21
    assert [len(dataset("voc2012_aug", root, split)) for split in ("train", "val")] == [2, 2]
    mask = train[0][1]
    assert train.classes[15] == "person" and train.classes[0] == "background"
    assert np.unique(mask).tolist() == [0, 15, 255] and (mask[4:20, 4] == 255).all()
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt").write_text(
        "/JPEGImages/2008_000008.jpg /SegmentationClassAug/2008_000008.png\n"
    )
    assert len(dataset("voc2012_aug", root)) == 1


def test_at_most_20_missing_masks_are_listed(tmp_path):
    root = scenery.ade20k(tmp_path, train=25)
    for mask in (root / "annotations/training").iterdir():
        mask.unlink()
    with pytest.raises(UserError, match="25 of 25 masks are missing: .*_00000019.png, ") as caught:
        dataset("ade20k", root)
    assert str(caught.value).count(".png") == 20


def test_digit_scenes():
    train, val = (scenes(split, count=10, size=48) for split in ("train", "val"))
    assert (len(train), len(val)) == (10, 2) and train.classes == ["background", *"0123456789"]
    assert len(train.palette) == 11
    for index in range(10):
        image, mask = train[index]
        scene = train.scenes[index]
        assert image.size == (48, 48) and mask.shape == (48, 48) and mask.dtype == np.uint8
        for number, label in enumerate(scene.labels, start=1):
            assert (mask[scene.instances == number] == label + 1).all()
        assert (mask[scene.instances == 0] == 0).all()
    assert np.array_equal(train[3][1], scenes("train", count=10, size=48)[3][1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_of_8_and_16_bits_with_and_without_palette(tmp_path, dtype):
    root = scenery.ade20k(tmp_path)
    values = np.arange(40 * 48).reshape(40, 48).astype(dtype) % 151
    paths = sorted((root / "annotations/training").glob("*.png"))
    scenery.mask(paths[0], values)
    if dtype == np.uint8:
        scenery.mask(paths[1], np.pad(values, ((0, 0), (0, 1))), palette=True)
    train = dataset("ade20k", root)
    expected = (values.astype(int) - 1) % 256
    assert np.array_equal(train[0][1], expected)
    assert dtype == np.uint16 or np.array_equal(train[1][1][:, :48], expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((40, 48), 151, np.uint8), "values 151, .* none of the 150 classes"),
        (np.full((40, 48), 65535, np.uint16), "values 65535"),
        (np.ones((40, 40), np.uint8), "48 x 40 pixels, .* 40 x 40"),
        (np.zeros((40, 48, 3), np.uint8), "mode RGB"),
    ],
)
def test_wrong_masks_are_named(tmp_path, values, message):
    root = scenery.ade20k(tmp_path)
    path = min((root / "annotations/training").glob("*.png"))
    scenery.mask(path, values)
    with pytest.raises(UserError, match=message) as caught:
        dataset("ade20k", root)[0]
    assert path.stem in str(caught.value)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_damaged_files_are_named_from_the_loader(tmp_path, kind):
    root = scenery.ade20k(tmp_path)
    path = min((root / kind / "training").iterdir())
    path.write_bytes(path.read_bytes()[:-60])
    found = SeededDataset(dataset("ade20k", root), train_transform(SegmentData(source="ade20k", size=16)), 0)[(0, 0)]
    assert isinstance(found, FallbackSample) and str(path) in found.failures[0] and "decoded" in found.failures[0]


def test_missing_parts_are_named(tmp_path):
    root = scenery.ade20k(tmp_path / "ade")
    one, other = sorted((root / "annotations/validation").glob("*.png"))
    one.unlink()
    with pytest.raises(UserError, match=f"1 of 2 masks are missing: {re.escape(str(one))}"):
        dataset("ade20k", root, "val")
    other.unlink()
    with pytest.raises(UserError, match=re.escape(f"2 of 2 masks are missing: {one}, {other}")):
        dataset("ade20k", root, "val")
    with pytest.raises(UserError, match="no folder images/training"):
        dataset("ade20k", tmp_path)
    with pytest.raises(UserError, match="no folder leftImg8bit/val"):
        dataset("cityscapes", tmp_path, "val")
    with pytest.raises(UserError, match=r"ImageSets/Segmentation/train.txt cannot be read"):
        dataset("voc2012", tmp_path)
    voc = scenery.voc2012(tmp_path / "voc") / "VOCdevkit/VOC2012"
    (voc / "JPEGImages/2007_000042.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images of .*val.txt are missing: .*2007_000042.jpg"):
        dataset("voc2012", voc, "val")
    (voc / "ImageSets/Segmentation/train.txt").write_text("\n")
    with pytest.raises(UserError, match="names no images"):
        dataset("voc2012", voc)
    for image in (root / "images/training").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"has no files \*.jpg"):
        dataset("ade20k", root)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("upright", [True, False])
def test_exif_orientation(tmp_path, turn, upright):
    """The image is rotated, unless only the image as stored has the size of the mask."""
    root = scenery.ade20k(tmp_path, train=1)
    stored = scenery.picture(root / "images/training/ADE_train_00000000.jpg", 24, 36, turn=turn)
    flips = {2: np.s_[:, ::-1], 3: np.s_[::-1, ::-1], 4: np.s_[::-1]}
    turned = stored.transpose(1, 0, 2) if turn > 4 else stored[flips.get(turn, np.s_[:])]
    turned = turned[{6: np.s_[:, ::-1], 7: np.s_[::-1, ::-1], 8: np.s_[::-1]}.get(turn, np.s_[:])]
    height, width = turned.shape[:2] if upright else stored.shape[:2]
    scenery.mask(root / "annotations/training/ADE_train_00000000.png", np.ones((height, width), np.uint8))
    image, mask = dataset("ade20k", root)[0]
    assert image.size == (mask.shape[1], mask.shape[0])
    fits = upright or turn <= 4
    assert np.array_equal(np.asarray(image), turned if fits else stored)


def pair(height, width, seed=0):
    """An image whose gray level is 40 times the class, and its mask; ignored pixels have the gray level 220."""
    mask = np.random.default_rng(seed).integers(0, 5, (-(-height // 8), -(-width // 8)), dtype=np.uint8)
    mask = mask.repeat(8, 0).repeat(8, 1)[:height, :width].copy()
    mask[:8, :8] = 255
    grey = np.where(mask == 255, 220, 40 * mask.astype(int)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB"), mask


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    hflip=st.sampled_from([0.0, 0.5, 1.0]),
    vflip=st.sampled_from([0.0, 1.0]),
    share=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 9),
)
def test_image_and_mask_stay_together(height, width, hflip, vflip, share, seed):
    """Both are cropped, flipped and padded alike: the gray level of the image gives the class of each pixel."""
    data = SegmentData(source="digit_scenes", size=32, aug=SegmentAug(hflip=hflip, vflip=vflip, cat_max_ratio=share))
    torch.manual_seed(seed)
    (image, size), mask = train_transform(data)(*pair(height, width, seed))
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and type(image) is torch.Tensor
    assert size.tolist() == [min(height, 32), min(width, 32)]
    assert mask.shape == (32, 32) and mask.dtype == torch.int64 and type(mask) is torch.Tensor
    assert (mask[height:] == 255).all() and (mask[:, width:] == 255).all()
    assert (image[:, height:] == 0).all() and (image[:, :, width:] == 0).all()
    batch = Normalizer(CFG, torch.device("cpu"))(torch.stack([image, image]), torch.stack([size, size]))
    normalized = F.normalize(F.to_dtype(image, torch.float32, scale=True), CFG["mean"], CFG["std"])
    assert torch.equal(batch[1][:, :height, :width], normalized[:, :height, :width])  # bit for bit
    assert (batch[1][:, height:] == 0).all() and (batch[1][:, :, width:] == 0).all()
    grey = image[0, :height, :width].long()
    known = mask[:height, :width]
    assert torch.equal(torch.where(known == 255, 220, 40 * known), grey)


def test_random_resize_covers_its_range_and_keeps_the_ratio():
    data = SegmentData(source="digit_scenes", size=400, img_scale=(120, 40), aug=SegmentAug(resize=(0.5, 2.0)))
    transform, heights = train_transform(data), []
    for seed in range(60):
        torch.manual_seed(seed)
        _, mask = transform(Image.new("RGB", (80, 60)), np.zeros((60, 80), np.uint8))
        rows, columns = (int((mask == 0).any(axis).sum()) for axis in (1, 0))
        assert columns == pytest.approx(rows * 4 / 3, abs=1.1)
        heights.append(rows)
    assert min(heights) < 26 and max(heights) > 74 and min(heights) >= 20 and max(heights) <= 80


@pytest.mark.parametrize(
    ("shape", "img_scale", "factor", "size"),
    [
        ((300, 400), (2048, 512), 1, (512, 683)),
        ((300, 1500), (2048, 512), 1, (410, 2048)),
        ((300, 400), (512, 2048), 0.5, (256, 341)),
        ((300, 401), None, 1, (300, 401)),
        ((1, 900), (90, 90), 1, (1, 90)),
    ],
)
def test_size_fits_into_img_scale(shape, img_scale, factor, size):
    assert rescaled_size(shape, img_scale, factor) == size


def test_crop_is_drawn_again_while_one_class_exceeds_cat_max_ratio():
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:16, :16] = 1
    image = torch.zeros(3, 64, 64)
    shares = {}
    for share in (1.0, 0.75):
        torch.manual_seed(0)
        windows = [random_crop(image, mask, 16, share)[1] for _ in range(200)]
        shares[share] = np.mean([0.25 < float(w.float().mean()) < 0.75 for w in windows])
    assert shares[0.75] > 5 * shares[1.0] > 0
    mask[:] = 255  # all pixels are ignored: the crop is taken after ten further draws
    assert random_crop(image, mask, 16, 0.75)[1].shape == (16, 16)


def test_photometric_changes_colors_only():
    image = (torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    seen = []
    for seed in range(30):
        torch.manual_seed(seed)
        seen.append(photometric(image))
    assert all(found.shape == image.shape and found.dtype == torch.uint8 for found in seen)
    assert sum(torch.equal(found, image) for found in seen) < 10
    assert len({found.numpy().tobytes() for found in seen}) > 20
    red = torch.tensor([200, 40, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    torch.manual_seed(1)
    assert all(photometric(red)[:, 0, 0].argmax() == 0 for _ in range(30)), "the order of the channels stays"


@pytest.mark.parametrize(("grey", "low", "high"), [(20, 0, 78), (100, 34, 198), (240, 104, 255)])
def test_photometric_has_the_ranges_of_mmsegmentation(grey, low, high):
    """A gray image has no hue: it becomes (gray + U(-32, 32)) * U(0.5, 1.5), each with probability 1/2."""
    torch.manual_seed(0)
    image = torch.full((3, 1, 1), grey, dtype=torch.uint8)
    seen = torch.stack([photometric(image) for _ in range(500)]).squeeze().long()
    assert (seen == seen[:, :1]).all()
    assert low <= seen.min() <= low + 15 and high - 15 <= seen.max() <= high
    assert 0.2 < (seen[:, 0] == grey).float().mean() < 0.33


def test_photometric_changes_hue_and_saturation():
    torch.manual_seed(0)
    image = torch.tensor([120, 60, 60], dtype=torch.uint8).view(3, 1, 1)  # hue 0, saturation 1/2
    hues, saturations = [], []
    for _ in range(500):
        red, green, blue = (float(value) for value in photometric(image).flatten())
        hues.append(60 * (green - blue) / (red - min(green, blue)))
        saturations.append(1 - min(green, blue) / red)
    assert -38 < min(hues) < -30 and 30 < max(hues) < 38
    assert 0.43 < np.mean(np.abs(hues) < 0.1) < 0.6
    assert 0.2 < min(saturations) < 0.3 and 0.7 < max(saturations) < 1


def test_saturation_is_clipped_at_one():
    pixels = torch.tensor([[200.0, 0, 90], [150, 0, 90], [100, 0, 90]])[..., None]
    once, much = scale_saturation(pixels, 1.5)[..., 0], scale_saturation(pixels, 9)[..., 0]
    torch.testing.assert_close(once, torch.tensor([[200.0, 0, 90], [125, 0, 90], [50, 0, 90]]))
    torch.testing.assert_close(much, torch.tensor([[200.0, 0, 90], [100, 0, 90], [0, 0, 90]]))


def test_evaluation_keeps_the_mask_and_scales_the_image():
    test = SegmentTest(scales=(1.0, 0.5), divisor=32)
    transform = eval_transform(SegmentData(source="digit_scenes", size=32, img_scale=(200, 100)), test)
    image, mask = pair(50, 75)
    views, kept = transform(image, mask)
    assert [tuple(view.shape) for view in views] == [(3, 128, 160), (3, 64, 96)]
    assert torch.equal(kept, torch.from_numpy(mask).long())
    plain, _ = eval_transform(SegmentData(source="digit_scenes", size=32), SegmentTest())(image, mask)
    assert plain[0].dtype == torch.uint8 and np.array_equal(plain[0].permute(1, 2, 0).numpy(), np.asarray(image))


def test_augmentation_depends_on_the_key_alone():
    data = SegmentData(
        source="digit_scenes",
        size=32,
        aug=SegmentAug(resize=(0.5, 2.0), cat_max_ratio=0.75, hflip=0.5, vflip=0.5, photometric=True),
    )
    seeded = SeededDataset(scenes("train", count=4, size=32), train_transform(data), 3)
    one, again, other = seeded[(1, 2)], seeded[(1, 2)], seeded[(2, 2)]
    assert torch.equal(one[0][0], again[0][0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0][0], other[0][0])
