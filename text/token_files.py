"""Token files: tokenised text in the safetensors format, written by data.py, memory-mapped by batches.py.

    file = TokenFile("dataset/sft_train.bin")   # verifies the checksum; of several processes, on the first of each host
    file.tokens                                 # (n_tokens,) uint16 or uint32
    file.loss_mask, file.starts                 # (n_tokens,), (n_samples + 1,) for fine-tuning; None for pretraining
    file.images, file.image_of                  # (n_images, 3, S, S) uint8, (n_samples,); None without images
    file.header                                 # dict: counts, tokenizer fingerprint, source files, baseline losses

Layout (github.com/huggingface/safetensors): 8 bytes with the length of the JSON header, the header, then the arrays.
"""

import functools
import hashlib
import itertools
import json
import math
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from base.configuration import UserError
from text.tokenizer import BOS, EOS, Tokenizer

FORMAT = 2
HEADER_SIZE = 1 << 16  # bytes at least, reserved in front of the data and filled in at the end
COUNT_CHUNK = 1 << 16  # tokens per call of bincount; fits the CPU cache
DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}


def how_images_are_read(values: dict[str, Any]) -> dict[str, Any]:
    """The sizes of images and where they stand, by a token file's header, or by the fields of a model.

    Files of an earlier version do not say where: before their questions.
    """
    return {name: values.get(name, False) for name in ("image_size", "patch_size", "image_last")}


def describe_images(values: dict[str, Any]) -> str:
    place = "after" if values["image_last"] else "before"
    return f"images of {values['image_size']} pixels in patches of {values['patch_size']}, {place} their questions"


class TokenFileWriter:
    """Writes one split in a single pass and bounded memory: tokens directly, the loss mask via a temporary file."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, has_samples: bool, header_size: int = HEADER_SIZE) -> None:
        """header_size: bytes to reserve; the names of thousands of source files need more than the usual."""
        self.file, self.header_size, self.unknown = file, header_size, tokenizer.unknown
        self.dtype = "U16" if tokenizer.dtype is np.uint16 else "U32"
        self._counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._uncounted: list[np.ndarray] = []
        self._n_uncounted = 0
        self.n_tokens = self.n_loss_tokens = self.n_unknown = self.n_characters = 0
        self.mask_file = tempfile.TemporaryFile() if has_samples else None  # noqa: SIM115
        self.starts = array("q", [0])
        self.image_file = tempfile.TemporaryFile()  # noqa: SIM115
        self.image_of = array("q")  # by sample: the number of its image; -1: none
        self.image_numbers: dict[bytes, int] = {}  # by hash: each is stored once, however many questions there are
        self.image_shape: tuple[int, ...] = ()
        self.checksum = 0
        file.write(b" " * header_size)

    def _write(self, data: bytes | np.ndarray) -> None:
        self.file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)

    def _append(self, file: BinaryIO) -> None:
        """Write what is in a temporary file, and close that one."""
        file.seek(0)
        for chunk in chunks_of(file):
            self._write(chunk)
        file.close()

    @property
    def counts(self) -> np.ndarray:
        """How often each token is a target in the loss, (vocab_size,)."""
        self._count()
        return self._counts

    def _count(self) -> None:
        ids = np.concatenate([*self._uncounted, np.empty(0, DTYPES[self.dtype])])
        for start in range(0, len(ids), COUNT_CHUNK):
            self._counts += np.bincount(ids[start : start + COUNT_CHUNK], minlength=len(self._counts))
        self._uncounted, self._n_uncounted = [], 0

    def add(
        self, ids: np.ndarray, n_characters: int, mask: np.ndarray | None = None, image: np.ndarray | None = None
    ) -> None:
        """Append token ids (T,). With a loss mask (T,), 1 on the targets in the loss, they are one sample.

        image (3, S, S) uint8: the sample's, whose places are among the ids.
        """
        ids = np.ascontiguousarray(ids, DTYPES[self.dtype])
        self._write(ids)
        self.n_tokens += len(ids)
        self.n_characters += n_characters
        targets = ids if mask is None else ids[mask == 1]
        self._uncounted.append(targets)  # counted in bulk: a bincount call per short sample is slow
        self._n_uncounted += len(targets)
        if self._n_uncounted > 16 * COUNT_CHUNK:
            self._count()
        self.n_loss_tokens += len(targets)
        self.n_unknown += 0 if self.unknown is None else int(np.count_nonzero(ids == self.unknown))
        if mask is not None:
            self.mask_file.write(mask.astype(np.uint8).tobytes())
            self.starts.append(self.n_tokens)
            self.image_of.append(-1 if image is None else self._number_of(image))

    def _number_of(self, image: np.ndarray) -> int:
        """The number of an image, which is stored if it is a new one."""
        data = image.tobytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in self.image_numbers:
            self.image_file.write(data)
            self.image_numbers[digest], self.image_shape = len(self.image_numbers), image.shape
        return self.image_numbers[digest]

    def finish(self, metadata: dict[str, Any]) -> None:
        """Append loss mask, sample starts and images, and write the header."""
        size = np.dtype(DTYPES[self.dtype]).itemsize * self.n_tokens
        header = {"tokens": {"dtype": self.dtype, "shape": [self.n_tokens], "data_offsets": [0, size]}}
        if self.mask_file is not None:
            self._append(self.mask_file)
            end = size + self.n_tokens
            header["loss_mask"] = {"dtype": "U8", "shape": [self.n_tokens], "data_offsets": [size, end]}
            starts = np.array(self.starts, dtype=np.int64)
            self._write(starts.tobytes())
            header["starts"] = {"dtype": "I64", "shape": [len(starts)], "data_offsets": [end, end + starts.nbytes]}
            end += starts.nbytes
        if self.image_numbers:
            image_of, shape = np.array(self.image_of, dtype=np.int64), [len(self.image_numbers), *self.image_shape]
            self._write(image_of.tobytes())
            header["image_of"] = {
                "dtype": "I64",
                "shape": [len(image_of)],
                "data_offsets": [end, end + image_of.nbytes],
            }
            end += image_of.nbytes
            header["images"] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + math.prod(shape)]}
            self._append(self.image_file)
        self.image_file.close()
        counts = {
            "n_tokens": self.n_tokens,
            "n_loss_tokens": self.n_loss_tokens,
            "n_characters": self.n_characters,
            "n_unknown": self.n_unknown,
            "n_samples": len(self.starts) - 1 if self.mask_file is not None else None,
        }
        header["__metadata__"] = {"header": json.dumps({"format": FORMAT, **counts, **metadata}, ensure_ascii=False)}
        header["__metadata__"]["crc32"] = str(add_header_to_checksum(header, self.checksum))
        text = json.dumps(header, ensure_ascii=False).encode("utf-8")
        if len(text) > self.header_size - 8:
            raise ValueError(f"a header of {len(text)} bytes, {self.header_size} are reserved")
        self.file.seek(0)
        self.file.write((self.header_size - 8).to_bytes(8, "little") + text)


def chunks_of(file: BinaryIO, size: int = 1 << 22) -> Iterator[bytes]:
    """The rest of a file in chunks of `size` bytes."""
    return iter(lambda: file.read(size), b"")


def add_header_to_checksum(layout: dict[str, Any], checksum: int) -> int:
    """Continue the CRC-32 of a file's data over its header (which does not contain "crc32" yet)."""
    return zlib.crc32(json.dumps(layout, ensure_ascii=False).encode("utf-8", "surrogatepass"), checksum)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a token file, unchecked; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            layout = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header = json.loads(layout["__metadata__"]["header"])
        return header if isinstance(header, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError, MemoryError):
        return {}


def arguments_for_all(folder: Path) -> list[str]:
    """The files and options with which data.py prepares all token files of a folder anew, each once, in order."""
    files, options = {}, {}
    for path in sorted(folder.glob("*_train.bin")):
        arguments = read_header(path).get("arguments") or ["FILES"]
        texts = files_in(arguments)
        files |= dict.fromkeys(texts)
        options |= dict.fromkeys(option_groups(arguments[len(texts) :]))
    return [*files, *itertools.chain(*options)]


def files_in(arguments: list[str]) -> list[str]:
    """The files of a command line of data.py, which stand before its options."""
    return list(itertools.takewhile(lambda text: not text.startswith("--"), arguments))


def option_groups(arguments: list[str]) -> list[tuple[str, ...]]:
    """Options with their values: ["--a", "1", "--b"] -> [("--a", "1"), ("--b",)]."""
    groups: list[tuple[str, ...]] = []
    for text in arguments:
        groups = [*groups, (text,)] if text.startswith("--") else [*groups[:-1], (*groups[-1], text)]
    return groups


class TokenFile:
    """A token file opened for reading. Arrays are memory-mapped: the OS loads the pages that are used."""

    def __init__(self, path: str | Path, is_verified: bool = True) -> None:
        """is_verified: read all of it once, for the checksum; of several processes one is enough."""
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"{path}: {'not a file' if self.path.exists() else 'no such file'}; create it with python data.py"
            )
        size = self.path.stat().st_size
        try:
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= size - 8:
                    raise ValueError("header length")
                layout = json.loads(file.read(length))
                file.seek(8 + length)
                chunks = chunks_of(file) if is_verified else ()
                checksum = functools.reduce(lambda crc, chunk: zlib.crc32(chunk, crc), chunks, 0)
            self.header = json.loads(layout["__metadata__"]["header"])
            if self.header["format"] != FORMAT:
                raise UserError(
                    f"{path}: format {self.header['format']} is not supported (expected {FORMAT}); run data.py again"
                )
            end = 8 + length + max(entry["data_offsets"][1] for name, entry in layout.items() if name != "__metadata__")
            if end != size:
                raise UserError(f"{path}: damaged: {size} bytes, but its header says {end}; run data.py again")
            stored = int(layout["__metadata__"].pop("crc32"))
            if is_verified and stored != add_header_to_checksum(layout, checksum):
                raise UserError(f"{path}: damaged: wrong checksum; run data.py again")
            self.delimiters = self.header.get("bos", BOS), self.header.get("eos", EOS)  # of documents
            self.tokens = self._map(layout["tokens"], 8 + length)
            has_samples = "starts" in layout
            self.loss_mask = self._map(layout["loss_mask"], 8 + length) if has_samples else None
            self.starts = np.array(self._map(layout["starts"], 8 + length)) if has_samples else None
            if has_samples and not (  # sample i is tokens[starts[i] : starts[i + 1]]
                len(self.loss_mask) == len(self.tokens)
                and self.starts[0] == 0
                and self.starts[-1] == len(self.tokens)
                and (np.diff(self.starts) > 0).all()
            ):
                raise ValueError("sample boundaries")
            self.images = self._map(layout["images"], 8 + length) if "images" in layout else None
            self.image_of = np.array(self._map(layout["image_of"], 8 + length)) if "images" in layout else None
            if (
                self.images is not None
                and not (  # that of sample i is images[image_of[i]]
                    self.images.ndim == 4
                    and self.images.shape[1:] == (3, self.header["image_size"], self.header["image_size"])
                    and len(self.image_of) == len(self.starts) - 1
                    and self.image_of.min() >= -1
                    and self.image_of.max() < len(self.images)
                )
            ):
                raise ValueError("images")
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
            raise UserError(
                f"{path}: not a token file of this toolkit, or damaged ({error}); create one with python data.py"
            ) from None

    def _map(self, entry: dict[str, Any], data_start: int) -> np.ndarray:
        dtype, shape, (start, end) = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if not 0 <= start <= end or end - start != math.prod(shape) * dtype.itemsize or min(shape) < 0:
            raise ValueError("array sizes")
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        return np.memmap(self.path, dtype=dtype, mode="r", offset=data_start + start, shape=shape)
