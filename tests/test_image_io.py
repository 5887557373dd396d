"""Pictures as they are meant to be seen: orientation, transparency, 16 bits, CMYK, palettes, and arrays of bands."""

import io
from functools import partial

import numpy as np
import pytest
import trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tessel.train.data.image_io import read_file, read_image
from tessel.train.errors import UserError
from tessel.train.recipe.schema import PixelFormat

ORIENTATION = 0x0112
# EXIF orientation -> the picture as it is meant to be seen, from the stored array [H, W, ...]
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
SIDE = st.integers(1, 9)
BYTES = hnp.arrays(np.uint8, st.tuples(SIDE, SIDE, st.just(4)))
COLOR = st.tuples(*[st.integers(0, 255)] * 3)


def read(image: Image.Image, kind: str = "PNG", pixel_format: PixelFormat = PixelFormat(), **options) -> np.ndarray:  # noqa: B008
    """What the reader makes of `image`, saved in a format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.asarray(read_image(lambda: io.BytesIO(file.getvalue()), f"x.{kind.lower()}", pixel_format=pixel_format))


@given(BYTES, st.sampled_from(sorted(UPRIGHT)), st.sampled_from(["PNG", "TIFF", "WEBP"]))
@settings(deadline=None, max_examples=60)
def test_pictures_are_upright(stored, orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    rgb = np.ascontiguousarray(stored[..., :3])
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (read(Image.fromarray(rgb), kind, exif=exif, **options) == UPRIGHT[orientation](rgb)).all()


def test_annotations_say_whether_a_tool_applied_the_orientation(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "a.jpg"
    Image.new("RGB", (20, 10)).save(path, exif=exif)
    assert read_file(str(path)).size == (10, 20)
    assert read_file(str(path), size=(10, 20)).size == (10, 20)
    assert read_file(str(path), size=(20, 10)).size == (20, 10)
    with pytest.raises(UserError, match="a.jpg is 10 x 20 pixels, but its annotation is for 20 x 20"):
        read_file(str(path), size=(20, 20))


@given(BYTES, COLOR, st.sampled_from(["RGBA", "LA", "PNG palette"]))
@settings(deadline=None, max_examples=60)
def test_transparent_pixels_are_composed_over_the_background(stored, color, kind):
    image = Image.fromarray(stored)
    if kind == "LA":
        image = image.convert("LA")
    elif kind == "PNG palette":
        image = image.quantize(16, method=Image.Quantize.FASTOCTREE)  # with an alpha value for each color
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + np.array(color) * (1 - alpha)
    seen = read(image, pixel_format=PixelFormat(background=color))
    assert np.abs(seen - expected).max() <= 1
    assert (seen[rgba[..., 3] == 255] == rgba[rgba[..., 3] == 255][:, :3]).all()
    assert (seen[rgba[..., 3] == 0] == color).all()


def test_a_transparent_color_is_the_background():
    """PNG files may name one color of a gray or RGB image as transparent."""
    gray = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert read(gray, transparency=7).tolist() == [[[255] * 3, [8] * 3]]
    color = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert read(color, transparency=(1, 2, 3), pixel_format=PixelFormat(background=(9, 9, 9))).tolist() == [
        [[9] * 3, [4, 5, 6]]
    ]


@given(hnp.arrays(np.uint16, st.tuples(SIDE, SIDE)), st.sampled_from(["PNG", "TIFF", "npy"]))
@settings(deadline=None, max_examples=40)
def test_16_bits_are_scaled(stored, kind):
    """PIL's own conversion would make everything above 255 white."""
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, stored)
        seen = np.asarray(read_image(lambda: io.BytesIO(file.getvalue()), "x.npy"))
    else:
        seen = read(Image.fromarray(stored), kind)
    assert (seen == (stored // 256)[..., None]).all() and seen.shape[2] == 3


def test_other_modes_are_converted():
    cmyk = Image.new("CMYK", (1, 1), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    assert read(cmyk, "TIFF").tolist() == [[[255, 0, 0]]]
    assert np.abs(read(cmyk.resize((8, 8)), "JPEG", quality=100).astype(int) - (255, 0, 0)).max() <= 3
    assert read(Image.fromarray(np.array([[True, False]]))).tolist() == [[[255] * 3, [0] * 3]]
    assert read(Image.fromarray(np.array([[7]], np.uint8))).tolist() == [[[7] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert read(palette).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    with pytest.raises(UserError, match="x.tiff cannot be decoded .*floating-point"):
        read(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int32, np.float32]),
        st.tuples(st.integers(5, 9), st.integers(5, 9), st.just(4)),
        elements=st.integers(0, 200),
    ),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_arrays_keep_their_values(stored, first, zipped):
    """Channels may come last or first; .npz files hold one array."""
    file = io.BytesIO()
    save = np.savez_compressed if zipped else np.save
    save(file, np.moveaxis(stored, 2, 0) if first else stored)
    name = "x.npz" if zipped else "x.npy"
    seen = read_image(lambda: io.BytesIO(file.getvalue()), name, pixel_format=PixelFormat(channels=4))
    assert seen.dtype == stored.dtype and (seen == stored).all()


def test_transparency_is_a_channel_for_a_model_of_four():
    stored = np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    assert (read(Image.fromarray(stored), pixel_format=PixelFormat(channels=4)) == stored).all()


@pytest.mark.parametrize("bands", [2, 4, 7])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_bands_are_read(tmp_path, bands, planar):
    tifffile = pytest.importorskip("tifffile")
    stored = np.random.default_rng(0).integers(0, 4000, (9, 11, bands), dtype=np.uint16)
    ordered = stored if planar == "contig" else np.moveaxis(stored, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", ordered, photometric="minisblack", planarconfig=planar)
    seen = read_file(str(tmp_path / "a.tif"), pixel_format=PixelFormat(channels=bands))
    assert seen.dtype == np.uint16 and (seen == stored).all()


@pytest.mark.parametrize(
    ("array", "channels", "fragment"),
    [
        (np.zeros((5, 6, 4), np.uint8), 6, r"shape \[5, 6, 4\], but model.in_chans=6"),
        (np.zeros((5, 6, 4), np.uint8), 3, "has 4 channels; set model.in_chans=4"),
        (np.zeros((5, 6), np.float32), 3, "type float32; a model of 1 or 3 channels takes uint8 and uint16"),
        (np.full((5, 6, 4), np.nan), 4, "values that are not finite"),
        (np.zeros((5, 6, 4), bool), 4, "values of type bool"),
        (np.zeros((2, 5, 6, 4), np.uint8), 4, r"shape \[2, 5, 6, 4\]; it must be"),
        (np.zeros((0, 6, 4), np.uint8), 4, r"shape \[0, 6, 4\]; it must be"),
        (np.array([{}]), 4, "allow_pickle"),
    ],
)
def test_unfit_arrays_are_errors(tmp_path, array, channels, fragment):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=f"a.npy cannot be decoded .*{fragment}"):
        read_file(str(tmp_path / "a.npy"), pixel_format=PixelFormat(channels=channels))


def test_a_file_of_several_arrays_is_an_error(tmp_path):
    np.savez(tmp_path / "a.npz", one=np.zeros((5, 6)), two=np.zeros((5, 6)))
    with pytest.raises(UserError, match=r"it holds 2 arrays \(one, two\)"):
        read_file(str(tmp_path / "a.npz"), pixel_format=PixelFormat(channels=4))


def test_every_source_reads_pictures_the_same_way(tmp_path):
    """A recipe's background reaches the reader of a folder."""
    for split in ("train", "val"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            exif = Image.Exif()
            exif[ORIENTATION] = 6
            Image.new("RGBA", (3, 2)).save(tmp_path / split / label / "1.png", exif=exif)
    opened = partial(trainer.open_source, "folder", "train", root=str(tmp_path))
    assert np.asarray(opened()[0][0]).tolist() == np.full((3, 2, 3), 255).tolist()
    assert np.asarray(opened(background=[1, 2, 3])[0][0]).tolist() == np.full((3, 2, 3), [1, 2, 3]).tolist()
