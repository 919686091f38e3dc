"""Images: png and jpeg files to pixels, of one size for all.

    pixels = read_image(Path("cat.png"), size=32)       # (3, 32, 32) uint8: red, green, blue
    pixels = read_image(contents, size=32)              # likewise, of a file's bytes
    contents = to_png(pixels)                           # the other way round

A picture may come from a stranger: its size is looked at before anything is decoded, as a few kilobytes can claim to
be terabytes of pixels, and nothing but these two formats is even tried.
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from base.configuration import UserError

FORMATS = ("PNG", "JPEG")
MAX_PIXELS = 1 << 25  # 33 megapixels, those of most cameras
MAX_BYTES = 1 << 28  # of a file: as many pixels of 16 bits, not compressed at all
# Chunks of a png, segments of a jpeg, beside one for each kilobyte of the file: Pillow reads them in Python, and
# hundreds of thousands would take seconds. Most are of 8 KB or more; a photo has some dozens of small ones.
MAX_PARTS = 1000
MAX_SCANS = 64  # of a progressive jpeg: 10 are usual, and 50 bytes make one more, which takes 0.1 s to decode
PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
START_OF_SCAN = b"\xda"
MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")  # of a jpeg's segments; others have no length, or are errors
BACKGROUND = (255, 255, 255)  # beside a picture that is not square, and behind transparent parts


def read_image(source: Path | bytes, size: int) -> np.ndarray:
    """The pixels (3, size, size) uint8 of an image; raises UserError for what is none, or too large.

    The whole picture fits in, its proportions kept; it is centred, with white beside it. Transparent parts become
    white, greys, palettes and CMYK become RGB, 16 bits become 8, and photos are turned upright (EXIF).
    """
    from PIL import Image

    try:
        contents = source if isinstance(source, bytes) else read_file(source)
        check_parts(contents)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about sizes, which have a limit here
            with Image.open(io.BytesIO(contents), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UserError(f"{width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are read: make it smaller")
                if image.format == "PNG" and getattr(image, "is_animated", False):
                    raise UserError(f"animated, {image.n_frames} pictures: save one of them")
                if image.format == "PNG":  # decoding looks at no checksums: half of a damaged picture would be black
                    Image.open(io.BytesIO(contents), formats=("PNG",)).verify()
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


def check_parts(contents: bytes) -> None:
    """Raises UserError for a png or jpeg file in so many parts that it would take long to read."""
    names = chunks_of_png(contents) if contents.startswith(PNG_BEGINS) else segments_of_jpeg(contents)
    n_scans = 0
    for n_parts, name in enumerate(names, 1):
        n_scans += name == START_OF_SCAN
        if n_scans > MAX_SCANS:
            raise UserError(f"more than {MAX_SCANS} scans, which take long to decode: save it anew")
        if n_parts > MAX_PARTS + len(contents) // 1024:
            raise UserError(f"in {n_parts:,} parts and more, which take long to read: save it anew")


def chunks_of_png(contents: bytes) -> Iterator[bytes]:
    """The names of a png's chunks: after 8 bytes, each is length (4 bytes), name (4), data, checksum (4)."""
    place, name = len(PNG_BEGINS), b""
    while place + 8 <= len(contents) and name != b"IEND":
        length, name = struct.unpack_from(">I4s", contents, place)
        yield name
        place += length + 12


def segments_of_jpeg(contents: bytes) -> Iterator[bytes]:
    """The markers of a jpeg's segments: FF, marker, length (2 bytes, counted in it), data; after a scan's its pixels.

    Only the first picture's, as no more is decoded: telephones append smaller ones, and videos. What stands inside of a
    segment (a thumbnail, a comment) is none. Among pixels, FF 00 stands for FF and D0 to D7 are marks to resume at.
    """
    place = 2
    while (found := MARKER.search(contents, place)) and found[1] not in (b"\xd8", b"\xd9"):  # another start; the end
        yield found[1]
        place = found.end() + max(2, int.from_bytes(contents[found.end() : found.end() + 2], "big"))


def to_rgb(image: Any) -> Any:
    """A decoded PIL image in RGB, 8 bits a colour, upright, without transparency."""
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off above 255
        grey = np.asarray(image).astype(np.uint32)
        grey[grey == image.info.get("transparency", -1)] = 0xFFFF  # the one grey that is transparent: white
        image = Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8))
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
