"""Decoding of real image files, against Pillow used by hand."""

from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from mocosfl.data.decode import decode, first_size
from mocosfl.errors import DataError
from mocosfl_device.pixels import EXTENSIONS

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (16, 16), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (16, 16), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def run(*images, size=16, channels=3, skip_corrupt=False):
    """Pixels, positions and notes."""
    notes = Counter()
    items = [(f"image {i}", image) for i, image in enumerate(images)]
    chunks = list(decode(items, size, channels, skip_corrupt, notes))
    pixels = np.concatenate([chunk for chunk, _ in chunks])
    return pixels, np.concatenate([kept for _, kept in chunks]).tolist(), dict(notes)


@pytest.mark.parametrize(
    ("kind", "options", "exact"),
    [
        ("PNG", {}, True),
        ("WEBP", {"lossless": True}, True),
        ("BMP", {}, True),
        ("TIFF", {}, True),
        ("PPM", {}, True),
        ("JPEG", {"quality": 90}, False),
        ("WEBP", {"quality": 90}, False),
    ],
)
def test_formats(kind, options, exact):
    data = encoded(Image.fromarray(COLOUR), kind, **options)
    pixels, kept, notes = run(data)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.flags.c_contiguous
    expected = COLOUR if exact else np.asarray(Image.open(BytesIO(data)))
    assert np.array_equal(pixels[0].transpose(1, 2, 0), expected)
    assert kept == [0]
    assert notes == {}


def test_files_bytes_and_arrays(tmp_path):
    data = encoded(Image.fromarray(GREY))
    (tmp_path / "grey.png").write_bytes(data)
    pixels, _, _ = run(data, tmp_path / "grey.png", GREY, channels=1)
    assert pixels.shape == (3, 1, 16, 16)
    assert all(np.array_equal(image[0], GREY) for image in pixels)


def test_many_images_keep_their_order():
    shades = [np.full((4, 4), shade % 256, dtype=np.uint8) for shade in range(600)]  # more than two chunks
    pixels, kept, _ = run(*shades, size=4, channels=1)
    assert kept == list(range(600))
    assert np.array_equal(pixels[:, 0, 0, 0], np.arange(600) % 256)


def test_grey_to_colour_and_back():
    pixels, _, notes = run(encoded(Image.fromarray(GREY)), encoded(Image.fromarray(COLOUR)))
    assert np.array_equal(pixels[0], np.stack([GREY] * 3))
    assert notes == {"were grey, converted to colour": 1}
    pixels, _, notes = run(encoded(Image.fromarray(COLOUR)), channels=1)
    assert np.array_equal(pixels[0, 0], np.asarray(Image.fromarray(COLOUR).convert("L")))
    assert notes == {"were colour, converted to grey": 1}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    opaque = COLOUR if mode == "RGBA" else GREY[..., None]
    image = Image.fromarray(np.dstack([opaque, ALPHA]))
    assert image.mode == mode
    pixels, _, notes = run(encoded(image))
    share = ALPHA[..., None] / 255
    expected = opaque * share + 255 * (1 - share)
    assert np.abs(pixels[0].transpose(1, 2, 0) - expected).max() <= 1
    assert notes.pop("had transparency, laid on white") == 1
    assert notes == ({} if mode == "RGBA" else {"were grey, converted to colour": 1})


def test_transparent_palette():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((3, 5), 0)
    pixels, _, notes = run(encoded(image, transparency=0))
    assert pixels[0, :, 0, 0].tolist() == [200, 100, 50]
    assert pixels[0, :, 5, 3].tolist() == [255, 255, 255]
    assert notes == {"had transparency, laid on white": 1}


def test_black_and_white():
    pixels, _, notes = run(encoded(Image.fromarray(GREY > 127)), channels=1)
    assert np.array_equal(pixels[0, 0], (GREY > 127) * 255)
    assert notes == {}


def test_cmyk():
    image = Image.fromarray(COLOUR).convert("CMYK")
    pixels, _, notes = run(encoded(image, "TIFF"))
    assert np.array_equal(pixels[0].transpose(1, 2, 0), np.asarray(image.convert("RGB")))
    assert notes == {"were CMYK, converted to RGB": 1}


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_is_scaled(channels):
    wide = RNG.integers(0, 65536, (16, 16)).astype(np.uint16)
    wide[0, :3] = 0, 65535, 32896
    pixels, _, notes = run(encoded(Image.fromarray(wide)), channels=channels)
    assert np.array_equal(pixels[0], np.stack([np.rint(wide / 257).astype(np.uint8)] * channels))
    assert notes.pop("had 16 bits a pixel, scaled to 8") == 1
    assert notes == ({} if channels == 1 else {"were grey, converted to colour": 1})


@pytest.mark.parametrize("values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)])
def test_pixels_without_an_agreed_range(values):
    with pytest.raises(DataError, match=r"image 0: cannot be decoded .pixels of mode [FI] beyond 16 bits"):
        run(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    image = Image.fromarray(COLOUR)
    exif = image.getexif()
    exif[0x0112] = orientation
    pixels, _, _ = run(encoded(image, exif=exif))
    turned = {1: COLOUR, 3: COLOUR[::-1, ::-1], 6: np.rot90(COLOUR, -1), 8: np.rot90(COLOUR)}
    expected = turned.get(orientation)
    if expected is None:  # the four mirrored ones
        image.getexif()[0x0112] = orientation
        expected = np.asarray(ImageOps.exif_transpose(image))
        assert not np.array_equal(expected, COLOUR)
    assert np.array_equal(pixels[0].transpose(1, 2, 0), expected)


def test_other_sizes_are_resized_and_cropped():
    row = np.linspace(0, 255, 40).astype(np.uint8)
    wide = Image.fromarray(np.repeat(row[None], 20, axis=0))  # 40 wide, 20 high
    pixels, _, notes = run(encoded(wide), size=10, channels=1)
    by_hand = np.asarray(wide.resize((20, 10), Image.Resampling.BICUBIC))[:, 5:15]
    assert np.abs(pixels[0, 0].astype(int) - by_hand)[:, 1:-1].max() <= 1
    assert notes == {"were not 10x10, resized and cropped": 1}


def test_extreme_shape_needs_no_large_image():
    pixels, _, _ = run(encoded(Image.new("L", (20000, 2), 7)), size=224, channels=1)
    assert (pixels == 7).all()


def test_resizing_is_antialiased():
    checkers = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels, _, _ = run(encoded(Image.fromarray(checkers)), size=16, channels=1)
    assert abs(pixels.astype(float).mean() - 127.5) < 2
    assert pixels.std() < 10


def test_first_size():
    def items(*sizes):
        return [("here", encoded(Image.new("L", size)) if size else b"junk") for size in sizes]

    assert first_size(items((30, 20), (8, 8)), False) == 20
    assert first_size(items((300, 400)), False) == 224
    assert first_size(items(None, (9, 12)), True) == 9
    with pytest.raises(DataError, match="here: cannot be decoded"):
        first_size(items(None, (9, 12)), False)
    with pytest.raises(DataError, match="not one image can be decoded; the last: here"):
        first_size(items(None, None), True)


BROKEN = {
    "truncated png": encoded(Image.fromarray(COLOUR))[:200],
    "truncated jpeg": encoded(Image.fromarray(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8))), "JPEG")[:2000],
    "not an image": b"<html>not found</html>",
    "empty file": b"",
    "empty cell": None,
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_corrupt_images(broken):
    good = encoded(Image.fromarray(COLOUR))
    with pytest.raises(DataError, match=r"image 1: cannot be decoded .*data.skip_corrupt=true") as error:
        run(good, broken, good)
    assert error.value.__cause__ is not None
    pixels, kept, notes = run(good, broken, good, skip_corrupt=True)
    assert len(pixels) == 2
    assert kept == [0, 2]
    assert notes == {"could not be decoded, left out": 1}


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"image 0: cannot be decoded .*No such file.*gone.png"):
        run(tmp_path / "gone.png")


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"image 0: cannot be decoded .*exceeds limit"):
        run(encoded(Image.fromarray(COLOUR)))


def test_extensions_are_pillow_formats():
    assert {*EXTENSIONS} <= {*Image.registered_extensions()}
