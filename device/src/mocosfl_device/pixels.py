"""From one encoded image to pixels, with Pillow."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Encoded = Path | bytes | NDArray[np.uint8] | None
"""A file, the bytes of one, or grey pixels (H, W). None, for an empty cell, counts as corrupt."""

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""What is decoded, with its file names. Of what Pillow knows beyond these, EPS would start Ghostscript."""

EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)


REDUCED = 4
"""A JPEG is decoded at a half, quarter or eighth of its size where that is still so many times the size asked for."""


def opened(encoded: Encoded, size: int | None = None) -> Image.Image:
    """An image, the right way up.

    Args:
        encoded: the image.
        size: height and width in pixels that it will be brought to. Large photographs are then decoded at a fraction of
            their own size: that of a 12-megapixel camera takes half a megabyte instead of 36.

    Raises:
        Exception: of nearly any kind, SyntaxError included, for a damaged one: Pillow's.
    """
    if encoded is None:
        raise ValueError("there is no image")
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded)
    with Image.open(BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=[*FORMATS]) as image:
        if size is not None:
            image.draft(None, (REDUCED * size, REDUCED * size))  # does nothing but to JPEGs
        return ImageOps.exif_transpose(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey pixels of 16 bits to 8; Pillow's own conversion would clip them."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} beyond 16 bits have no agreed range")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def converted(image: Image.Image, size: int, channels: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Pixels (C, size, size) uint8, C = ``channels`` = 1 or 3, and what had to be done to the image.

    Raises:
        ValueError: its pixels have no agreed range.
    """
    notes = []
    mode = image.mode
    grey = mode in ("1", "L", "LA") or mode[0] in "IF"
    if mode[0] in "IF":
        image = _eight_bits(image)
        notes.append("had 16 bits a pixel, scaled to 8")
    if image.has_transparency_data:
        # Dropping the alpha channel would show whatever colour an editor left under it.
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        notes.append("had transparency, laid on white")
    if grey and channels == 3:
        notes.append("were grey, converted to colour")
    elif not grey and channels == 1:
        notes.append("were colour, converted to grey")
    elif not grey and not mode.startswith(("RGB", "P")):
        notes.append(f"were {mode}, converted to RGB")
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        notes.append(f"were not {size}x{size}, resized and cropped")
    pixels = np.asarray(image)  # (size, size, 3) or (size, size)
    return np.ascontiguousarray(np.moveaxis(np.atleast_3d(pixels), 2, 0)), notes
