"""Images: png and jpeg files to pixels, of one size for all.

    pixels = read_image(Path("cat.png"), size=32)       # (3, 32, 32) uint8: red, green, blue
    pixels = read_image(contents, size=32)              # likewise, of a file's bytes
    contents = to_png(pixels)                           # the other way round

A picture may come from a stranger: its size is looked at before anything is decoded, as a few kilobytes can claim to
be terabytes of pixels, and nothing but these two formats is even tried.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from base.configuration import UserError

FORMATS = ("PNG", "JPEG")
MAX_PIXELS = 1 << 25  # 33 megapixels, those of most cameras
MAX_BYTES = 1 << 28  # of a file: as many pixels of 16 bits, not compressed at all
MAX_SCANS = 64  # of a progressive jpeg: 10 are usual, and 50 bytes make one more, which takes 0.1 s to decode
BACKGROUND = (255, 255, 255)  # beside a picture that is not square, and behind transparent parts


def read_image(source: Path | bytes, size: int) -> np.ndarray:
    """The pixels (3, size, size) uint8 of an image; raises UserError for what is none, or too large.

    The whole picture fits in, its proportions kept; it is centred, with white beside it. Transparent parts become
    white, greys, palettes and CMYK become RGB, 16 bits become 8, and photos are turned upright (EXIF).
    """
    from PIL import Image

    try:
        contents = source if isinstance(source, bytes) else read_file(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about sizes, which have a limit here
            with Image.open(io.BytesIO(contents), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UserError(f"{width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are read: make it smaller")
                # a scan begins with these two bytes, which are never together inside of one
                if image.format != "PNG" and contents.count(b"\xff\xda") > MAX_SCANS:
                    raise UserError(f"more than {MAX_SCANS} scans, which take long to decode: save it anew")
                if image.format == "PNG" and getattr(image, "is_animated", False):
                    raise UserError(f"animated, {image.n_frames} pictures: save one of them")
                return fit(to_rgb(image), size)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"too many pixels; at most {MAX_PIXELS:,} are read: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise UserError("not a png or jpeg image, or a damaged one") from None
    except Exception as error:  # a damaged or hostile file can raise any exception
        if isinstance(error, OSError) and error.strerror:  # it cannot even be opened
            raise UserError(f"cannot be read ({error.strerror})") from None
        raise UserError(f"a damaged image ({str(error)[:80] or type(error).__name__})") from None


def read_file(path: Path) -> bytes:
    """The contents of an image file; raises UserError."""
    if not path.is_file():  # no device, nor a pipe that never ends
        raise UserError("not a file" if path.exists() else "no such file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read: make it smaller")
    return path.read_bytes()


def to_rgb(image: Any) -> Any:
    """A decoded PIL image in RGB, 8 bits a colour, upright, without transparency."""
    from PIL import Image, ImageOps

    image.load()
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off above 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")


def fit(image: Any, size: int) -> np.ndarray:
    """Pixels (3, size, size) of an RGB image: as large as fits, centred."""
    from PIL import Image

    scale = size / max(image.size)
    width, height = (max(1, round(scale * length)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)  # which averages where it makes smaller
    square = Image.new("RGB", (size, size), BACKGROUND)
    square.paste(image, ((size - width) // 2, (size - height) // 2))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def to_png(pixels: np.ndarray) -> bytes:
    """A png file of pixels (3, size, size) uint8, of which read_image() with the same size makes the same again."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG")
    return file.getvalue()
