"""From files as people have them to text and records: compressed or not, in any encoding, JSON, CSV or Parquet.

    source = Source(Path("questions.csv.gz"), form="csv")
    for where, values in records(source): ...      # ("line 2", {"question": "...", "answer": "..."})

Everything is read as a stream, in memory that does not grow with the file.
"""

import bz2
import codecs
import contextlib
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from base.configuration import UserError
from base.prefetching import prefetch
from text.encodings import is_text, not_text, without_byte_order, wrong_encoding
from text.records import FIELDS, FIELDS_OF_MESSAGES, rename_fields

CHUNK = 1 << 20  # bytes read at a time
LONGEST_RECORD = 1 << 26  # characters of a line or an object; a longer one is refused, as it is held whole
OFFICE = ("[Content_Types].xml", "mimetype")  # members of .docx, .xlsx, .epub, .odt: zip archives, too

Progress = Callable[[int], None]
Record = tuple[str, dict[str, Any] | UserError]  # where it is in its file, and its values or what is wrong with it
csv.field_size_limit(LONGEST_RECORD)  # the module's own limit is 131,072 characters
white_space = re.compile(r"\s*")


def printable_name(path: Path) -> str:
    """A path as text; file names may hold bytes that are none."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


@dataclass
class Source:
    """A raw file, or a member of a zip archive. Reading it to the end fills in its size and hash."""

    path: Path
    member: str = ""
    given: str = ""  # the argument of data.py that it comes from: itself, or its folder
    encoding: str = "utf-8"
    rename: dict[str, str] = field(default_factory=dict)  # --fields: {name in the file: ours}
    form: str = "text"  # one of FORMS
    delimiter: str = ","
    stage: str = ""
    fields_seen: set[str] = field(default_factory=set)  # names in the records that were looked at
    bytes: int = 0
    sha256: str = ""

    @property
    def name(self) -> str:
        """What to call it in messages and headers."""
        return printable_name(self.path / self.member if self.member else self.path)

    def describe(self) -> dict[str, Any]:
        return {"path": self.name, "bytes": self.bytes, "sha256": self.sha256}

    def finish(self, size: int, sha256: str) -> None:
        """Note size and hash; raises UserError if an earlier reading found others."""
        if self.sha256 and self.sha256 != sha256:
            raise UserError(f"{self.name}: the file changed while it was read; run data.py again")
        self.bytes, self.sha256 = size, sha256


# ------------------------------------------------------------------------------------------------------ bytes


def open_zstandard(file: BinaryIO) -> BinaryIO:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError("compressed with Zstandard, which needs: pip install backports.zstd") from None
    return zstd.open(file)


COMPRESSIONS = {  # what a file begins with -> what opens it
    rb"\x1f\x8b": gzip.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open,
    rb"\xfd7zXZ": lzma.open,
    rb"\x28\xb5\x2f\xfd": open_zstandard,
}


@functools.lru_cache(maxsize=1)
def open_archive(path: Path) -> zipfile.ZipFile:
    """An open zip archive: reading its table of contents anew for each of thousands of members would be slow."""
    return zipfile.ZipFile(path)


@contextlib.contextmanager
def open_raw(source: Source) -> Iterator[BinaryIO]:
    """The bytes of a source, decompressed; raises UserError if they are damaged."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_member(source) if source.member else open(source.path, "rb"))  # noqa: SIM115
            for _ in range(2):  # an archive's member may be compressed once more
                start = file.peek(10)
                opener = next((opener for magic, opener in COMPRESSIONS.items() if re.match(magic, start)), None)
                if opener:
                    file = io.BufferedReader(stack.enter_context(opener(file)), CHUNK)
            yield file
        except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
            raise UserError(f"{source.name}: damaged: {error}") from None
        except OSError as error:
            if error.errno is not None:  # gzip and bz2 raise their own without a number
                raise
            raise UserError(f"{source.name}: damaged: {error}") from None
        except UserError as error:
            named = str(error).startswith(source.name)
            raise error if named else UserError(f"{source.name}: {error}") from None
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise UserError(f"{source.name}: damaged: {error}") from None


def open_member(source: Source) -> BinaryIO:
    try:
        return io.BufferedReader(open_archive(source.path).open(source.member), CHUNK)
    except (NotImplementedError, RuntimeError) as error:  # encrypted, or compressed in a way that Python does not know
        raise UserError(f"{source.name}: {error}; unpack the archive first") from None


def members_of(path: Path) -> list[str]:
    """The files inside a zip archive; raises UserError for an office document, which is one too."""
    try:
        names = [info.filename for info in open_archive(path).infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: damaged zip archive: {error}") from None
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"{path}: two of its files have the same name, {twice[0]}; unpack it first")
    if set(OFFICE) & set(names):
        raise UserError(f"{path}: an office document or e-book, not text; save it as plain text first")
    return sorted(names)


# ------------------------------------------------------------------------------------------------------ text


def text_chunks(source: Source, progress: Progress = lambda n: None) -> Iterator[str]:
    """The text of a file in chunks, with line ends as \\n; raises UserError. Large files are read ahead in a thread."""
    chunks = read_chunks(source, progress)
    return chunks if source.path.stat().st_size < CHUNK else prefetch(chunks, depth=1)


def read_chunks(source: Source, progress: Progress = lambda n: None) -> Iterator[str]:
    """text_chunks() without reading ahead; fills in the source's size and hash at the end."""
    digest, size = hashlib.sha256(), 0

    def blocks(file: BinaryIO) -> Iterator[bytes]:
        nonlocal size
        while block := file.read(CHUNK):
            digest.update(block)
            size += len(block)
            progress(len(block))
            yield block

    with open_raw(source) as file:
        yield from decode_blocks(source, blocks(file), is_certain=source.encoding == "utf-8")
    if not size:
        raise UserError(f"{source.name}: the file is empty")
    source.finish(size, digest.hexdigest())


def decode_blocks(source: Source, blocks: Iterable[bytes], is_certain: bool) -> Iterator[str]:
    """The text of bytes, with line ends as \\n and no byte-order mark; a block may end inside of a character.

    is_certain: it has the encoding of the source; else UTF-8, which does not come about by chance, is recognised.
    """
    bare, decoder = newline_decoder(source.encoding)
    is_utf8_now = source.encoding == "utf-8"
    offset, is_first = 0, True
    for block in itertools.chain(blocks, [b""]):
        if not (is_certain or block.isascii()):
            is_certain = True
            if is_text(block, "utf-8"):
                state, (bare, decoder), is_utf8_now = decoder.getstate(), newline_decoder("utf-8"), True
                decoder.setstate(state)
        undecoded, came_after_r = decoder.getstate()  # the second: 1 if \r came last
        n_undecoded = len(undecoded)
        try:
            # without any \r there is nothing to translate, and to look for one in decoded Chinese takes as long as to
            # decode it; in UTF-8 no other character contains its byte
            is_bare = is_utf8_now and not came_after_r and b"\r" not in block
            text = (bare if is_bare else decoder).decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise wrong_encoding(source.name, source.encoding, error, offset - n_undecoded) from None
        except UnicodeError:  # UTF-16 or UTF-32 that does not say which of both its bytes comes first
            raise without_byte_order(source.name, source.encoding, block) from None
        if (b"\0" in block) if is_utf8_now else ("\0" in text):
            raise not_text(source.name, block)
        offset += len(block)
        if text and is_first:
            is_first, text = False, text.removeprefix("\ufeff")
            if text.startswith("{\\rtf"):
                raise UserError(f"{source.name}: an RTF document, not text; save it as plain text first")
        if text:
            yield text


def newline_decoder(encoding: str) -> tuple[codecs.IncrementalDecoder, io.IncrementalNewlineDecoder]:
    """Decoders of bytes to text, piece by piece: as it is, and around that one another that makes line ends \\n."""
    bare = codecs.getincrementaldecoder(encoding)()
    return bare, io.IncrementalNewlineDecoder(bare, translate=True)


def lines(source: Source, progress: Progress = lambda n: None) -> Iterator[str]:
    """The lines of a file, with their ends; raises UserError for one that is too long to hold."""
    unfinished, length = [], 0  # parts of a line that spans several chunks
    number = 1
    for chunk in text_chunks(source, progress):
        for part in split_lines(chunk):
            unfinished.append(part)
            length += len(part)
            if length > LONGEST_RECORD:
                raise too_long(source, number)
            if part.endswith("\n"):
                yield "".join(unfinished)
                unfinished, length = [], 0
                number += 1
    if unfinished:
        yield "".join(unfinished)


def split_lines(text: str) -> list[str]:
    """Split at \\n alone: str.splitlines() also splits at other separators, which JSON allows inside strings."""
    parts = text.split("\n")
    return [*(part + "\n" for part in parts[:-1]), *filter(None, parts[-1:])]


def too_long(source: Source, line: int) -> UserError:
    return UserError(
        f"{source.name}: line {line}: more than {LONGEST_RECORD:,} characters in one record; "
        "for one long document use a text file, which is read in pieces"
    )


# ------------------------------------------------------------------------------------------------------ records


def json_lines(source: Source, progress: Progress) -> Iterator[Record]:
    """One object a line."""
    for number, line in enumerate(lines(source, progress), 1):
        if line.strip():
            yield f"line {number}", parse_object(line.rstrip("\n"))


def parse_object(line: str) -> dict[str, Any] | UserError:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return UserError(f"column {error.colno}: not valid JSON: {error.msg.removesuffix(' at')}")
    except (RecursionError, ValueError):
        return UserError("not usable JSON: nested too deeply, or a number too long")
    return value if isinstance(value, dict) else not_an_object(value)


def not_an_object(value: Any) -> UserError:
    return UserError(f"must be a JSON object of fields, got {json.dumps(value)[:40]}")


def json_values(source: Source, progress: Progress) -> Iterator[Record]:
    """The objects of an array, or objects one after another that span lines; raises UserError where one is malformed.

    raw_decode() reads one value and tells where it ends. Where it fails, the value may go on in text not yet read: the
    text held is doubled until it succeeds, which reads no character more than twice on average.
    """
    decoder, chunks = json.JSONDecoder(), text_chunks(source, progress)
    text, at, line = "", 0, 1
    is_array = is_closed = False
    n_values = 0

    def read_on() -> bool:
        nonlocal text, at
        held = len(text) - at
        if held > LONGEST_RECORD:
            raise too_long(source, line)
        parts, wanted = [text[at:]], max(1, min(held, LONGEST_RECORD - held + 1))
        while wanted > 0 and (chunk := next(chunks, "")):
            parts.append(chunk)
            wanted -= len(chunk)
        is_longer, text, at = len(parts) > 1, "".join(parts), 0
        return is_longer

    while True:
        end = white_space.match(text, at).end()
        line, at = line + text.count("\n", at, end), end
        if at == len(text):
            if read_on():
                continue
            if is_array and not is_closed:
                raise UserError(f"{source.name}: line {line}: the file ends inside its JSON array")
            return
        if text[at] == "[" and not n_values and not is_array:
            is_array, at = True, at + 1
            continue
        if is_array and text[at] in ",]":
            is_closed, at = is_closed or text[at] == "]", at + 1
            continue
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated") or error.pos > len(text) - 100
            if is_cut and read_on():
                continue
            where = f"line {line + text.count(chr(10), at, error.pos)}"
            raise UserError(f"{source.name}: {where}: not valid JSON: {error.msg}") from None
        except (RecursionError, ValueError):
            raise UserError(f"{source.name}: line {line}: not usable JSON: nested too deeply") from None
        n_values += 1
        yield f"line {line}", value if isinstance(value, dict) else not_an_object(value)
        line, at = line + text.count("\n", at, end), end


def table_rows(source: Source, progress: Progress = lambda n: None) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table, with their places; raises UserError where it is malformed. Empty lines are none."""
    rows = csv.reader(lines(source, progress), delimiter=source.delimiter, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(f"{source.name}: line {rows.line_num}: not valid CSV: {error}") from None
        if row is None:
            return
        if row:
            yield f"line {rows.line_num}", row


def csv_rows(source: Source, progress: Progress) -> Iterator[Record]:
    """The rows of a table whose first row names the columns."""
    header = None
    for where, row in table_rows(source, progress):
        if header is None:
            header = [name.strip() for name in row]
            twice = [name for name in header if name and header.count(name) > 1]
            if twice:
                raise UserError(f"{source.name}: {where}: two columns are named {twice[0][:40]!r}")
        elif len(row) == len(header):
            yield where, {name: value for name, value in zip(header, row, strict=True) if name}
        else:
            yield where, UserError(f"{len(row)} columns, the first row has {len(header)}")


def parquet_rows(source: Source, progress: Progress) -> Iterator[Record]:
    """The rows of a Parquet file, as Hugging Face's datasets are stored."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{source.name}: a Parquet file, which needs: pip install pyarrow") from None
    size, digest = 0, hashlib.sha256()
    with open_raw(source) as file:
        for block in iter(lambda: file.read(CHUNK), b""):
            digest.update(block)
            size += len(block)
        file.seek(0)
        try:
            table = pyarrow.parquet.ParquetFile(file)
            number = itertools.count(1)
            for batch in table.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    yield f"row {next(number)}", values
                progress(size * batch.num_rows // max(1, table.metadata.num_rows))
        except pyarrow.ArrowException as error:
            raise UserError(f"{source.name}: damaged Parquet file: {error}") from None
    source.finish(size, digest.hexdigest())


RECORDS = {"json lines": json_lines, "json": json_values, "csv": csv_rows, "parquet": parquet_rows}


def raw_records(source: Source, progress: Progress = lambda n: None) -> Iterator[Record]:
    """records() with the names of the file."""
    return RECORDS[source.form](source, progress)


def records(source: Source, progress: Progress = lambda n: None) -> Iterator[Record]:
    """The records of a file that is not plain text: ("line 3", values), or ("line 3", UserError) for a bad one."""
    for where, values in raw_records(source, progress):
        yield where, rename_fields(values, source.rename) if source.rename and isinstance(values, dict) else values


# ------------------------------------------------------------------------------------------------------ options


def parse_fields(pairs: list[str]) -> dict[str, str]:
    """The --fields OURS=THEIRS of the command line as {theirs: ours}; raises UserError."""
    rename = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or ours not in (*FIELDS, *FIELDS_OF_MESSAGES):
            raise UserError(
                f"--fields {pair}: write OURS=NAME, where NAME is a field of the file and OURS one of "
                f"{', '.join((*FIELDS, *FIELDS_OF_MESSAGES))}"
            )
        rename[theirs] = ours
    return rename
