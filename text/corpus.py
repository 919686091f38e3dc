"""The corpus: raw files and folders as documents, conversations and preference pairs, in bounded memory.

    sources, left_out = find_sources(["notes/", "questions.csv"])
    for text, begins, ends in documents(source, bad_lines): ...      # pretraining
    for conversations in chat_records(source, bad_lines): ...        # fine-tuning: one; preferences: chosen, rejected

A text file is a document, or several where <|bos|>, <|eos|> or GPT-2's <|endoftext|> stand between them. Long documents
come in pieces, so that a file may be larger than memory.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base.configuration import UserError, escape_control_characters
from text.formats import CHUNK, Progress, Source, members_of, printable_name, records, text_chunks
from text.recognition import recognise
from text.records import EmptyRecord, check_images, image_file, parse_conversation, parse_preference, parse_text
from text.tokenizer import Messages, may_contain_special, remove_special_tokens
from vision.images import read_image

LONGEST_DOCUMENT = 1 << 22  # characters; a longer document comes in pieces
LONGEST_SPECIAL_TOKEN = 16  # characters
# in folders left out: what this toolkit makes from texts, and keeps for tests
OWN_FILES = ("held_out.jsonl", "vision_held_out.jsonl", "tokenizer.json", "world.py", "everyday.py", "pictures.py")

delimiter = re.compile(r"(<\|bos\|>|<\|eos\|>|<\|endoftext\|>)")


@dataclass
class BadLines:
    """Prints each record that cannot be used once; raises UserError when there are more than `limit`."""

    limit: int
    reported: set[tuple[str, str]] = field(default_factory=set)
    n_empty: dict[str, int] = field(default_factory=dict)  # by file: records that say nothing, and are left out

    def report(self, source: Source, where: str, problem: str) -> None:
        if (source.name, where) in self.reported:  # files are read twice
            return
        self.reported.add((source.name, where))
        text = f"{source.name}: {where}: {problem}"
        if len(self.reported) > self.limit:
            limit = f"; there are more than {self.limit} bad lines (--max_bad_lines)" if self.limit else ""
            raise UserError(text + limit)
        print(f"skipped {escape_control_characters(text)}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------ files


def find_sources(
    paths: list[str], encoding: str = "utf-8", rename: dict[str, str] | None = None, plain_text: bool = False
) -> tuple[list[Source], list[str]]:
    """The raw files at the given paths, recognised; and why files of folders and archives were left out.

    plain_text: read every file as text, whatever its contents look like. Raises UserError for a named file that cannot
    be used, and for a folder without any that can.
    """
    found, left_out = [], []
    for path in paths:
        if not path or not Path(path).exists():
            raise UserError(f"{path or repr(path)}: no such file")
        n_before, n_left_out = len(found), len(left_out)
        for source in files_in(Path(path)):
            source.given, source.encoding, source.rename = printable_name(Path(path)), encoding, rename or {}
            try:
                if reason := reason_to_leave_out(source, Path(path)):
                    raise UserError(f"{source.name}: {reason}")
                recognise(source, plain_text)
            except (UserError, OSError) as error:
                if source.path == Path(path) and not source.member:  # the file that was named
                    raise
                left_out.append(str(error) if isinstance(error, UserError) else f"{source.name}: {error.strerror}")
            else:
                found.append(source)
        if len(found) == n_before:
            reasons = "; ".join(left_out[n_left_out:][:3])
            raise UserError(f"{path}: no text files in it" + (f": {reasons}" if reasons else ""))
    return found, left_out


def files_in(path: Path) -> Iterator[Source]:
    """The file itself, the files of a folder and its subfolders, or the members of zip archives; sorted by name.

    Raises UserError for an archive that was named and cannot be read; one inside of a folder stands for itself then.
    """
    files = sorted(p for p in path.rglob("*") if p.is_symlink() or not p.is_dir()) if path.is_dir() else [path]
    for file in files:
        try:
            members = members_of(file) if is_zip(file) else [""]
        except (UserError, OSError):
            if file == path:
                raise
            members = [""]
        for member in members:
            yield Source(file, member)


def is_zip(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def reason_to_leave_out(source: Source, root: Path) -> str:
    """Why a file is not read; empty if it may be. Some files of folders and archives are not meant to be trained on."""
    parts = [*source.path.relative_to(root).parts, *Path(source.member).parts]
    if any(part.startswith(".") for part in parts) or "__MACOSX" in parts:
        return "hidden"
    if parts and parts[-1] in OWN_FILES:
        return "not for training"
    if not source.path.is_file():
        return "not a regular file"
    if is_zip(source.path) and not source.member:
        return "an office document, an e-book or a damaged zip archive"
    return ""


# ------------------------------------------------------------------------------------------------------ documents


def documents(
    source: Source, bad_lines: BadLines, progress: Progress = lambda n: None
) -> Iterator[tuple[str, bool, bool]]:
    """The documents of a pretraining file, in pieces (text, begins, ends), without the delimiters between them.

    Most are one piece, (text, True, True); one of more than LONGEST_DOCUMENT characters comes in several, of which only
    the first begins and only the last ends it.
    """
    if source.form != "text":
        for _, text in parsed(source, parse_text, bad_lines, progress):
            yield from split_documents([text])
        return
    n_pieces = 0
    for n_pieces, piece in enumerate(split_documents(text_chunks(source, progress)), 1):  # noqa: B007
        yield piece
    bad_lines.n_empty[source.name] = int(not n_pieces)


def split_documents(chunks: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """Cut a text at its delimiters into documents, and long documents into pieces (text, begins, ends)."""
    held: list[str] = []  # the parts of the current document that are not yielded yet
    length, has_begun = 0, False
    after_end = False  # line breaks after <|eos|> belong to no document
    for part in split_at_delimiters(chunks):
        if delimiter.fullmatch(part):
            if has_begun or says_something("".join(held)):
                yield "".join(held), not has_begun, True
            held, length, has_begun, after_end = [], 0, False, part != "<|bos|>"
            continue
        part = part.lstrip("\n") if after_end else part
        after_end = after_end and not part
        held.append(part)
        length += len(part)
        while length > (CHUNK if has_begun else LONGEST_DOCUMENT):
            text = "".join(held)
            end = min(len(text) - 1, LONGEST_DOCUMENT)  # something is left for the last piece
            special = text.rfind("<|", max(0, end - LONGEST_SPECIAL_TOKEN), end)  # may not be cut
            end = special if special > 0 and "|>" not in text[special:end] else end
            cut = text.rfind("\n", max(0, end - 4096), end) + 1 or end
            if has_begun or says_something(text[:cut]):
                yield text[:cut], not has_begun, False
                has_begun = True
            held, length = [text[cut:]], len(text) - cut
    if has_begun or says_something("".join(held)):
        yield "".join(held), not has_begun, True


def says_something(text: str) -> bool:
    return bool(remove_special_tokens(text).strip())


def split_at_delimiters(chunks: Iterable[str]) -> Iterator[str]:
    """Text and the delimiters in it, one by one; no special token is cut in two."""
    rest = ""
    for chunk in chunks:
        text = rest + chunk
        start = text.rfind("<", max(0, len(text) - LONGEST_SPECIAL_TOKEN + 1))
        is_cut = start >= 0 and "|>" not in text[start:] and text[start : start + 2] in ("<", "<|")
        text, rest = (text[:start], text[start:]) if is_cut else (text, "")
        yield from filter(None, delimiter.split(text) if may_contain_special(text) else [text])
    if rest:
        yield rest


# ------------------------------------------------------------------------------------------------------ chats


def parsed(
    source: Source, parse: Callable[[Any], Any], bad_lines: BadLines, progress: Progress
) -> Iterator[tuple[str, Any]]:
    """What `parse` makes of the records of a file, with their places; bad ones are reported, empty ones counted."""
    n_empty = 0
    for where, values in records(source, progress):
        try:
            if isinstance(values, UserError):
                raise values
            check_images(values, source.stage)
            yield where, parse(values)
        except EmptyRecord:
            n_empty += 1
        except UserError as error:
            bad_lines.report(source, where, str(error))
    bad_lines.n_empty[source.name] = n_empty


def chat_records(
    source: Source, bad_lines: BadLines, progress: Progress = lambda n: None, image_size: int = 0
) -> Iterator[list[Messages]]:
    """The records of a fine-tuning file, [conversation], or of a preference file, [chosen, rejected].

    A conversation about an image has it in the first question: "image" (3, image_size, image_size) uint8.
    """
    # lines about the same image often follow each other
    read = functools.lru_cache(1)(lambda path: read_image(path, image_size) if image_size else path)

    def parse(values: Any) -> list[Messages]:
        return [with_image(parse_conversation(values), values, source, read)]

    records = parsed(source, parse_preference if source.stage == "dpo" else parse, bad_lines, progress)
    return (record for _, record in records)


def with_image(
    messages: Messages, values: dict[str, Any], source: Source, read: Callable[[Path], Any] = lambda path: path
) -> Messages:
    """A conversation with its record's image, if there is one, in the first question: what `read` makes of the file.

    There LLaVA's data have "<image>" in front or behind; where the model reads the image is the template's matter.
    """
    path = image_file(values, source.path.parent)
    if path is None:
        return messages
    if source.member:
        raise UserError('"image" in a zip archive: unpack it, images are read from files')
    asked = next(i for i, message in enumerate(messages) if message["role"] == "user")
    try:
        image = read(path)
    except UserError as error:
        raise UserError(f"{printable_name(path)[-100:]}: {error}") from None
    text = re.sub(r"\A<image>\n?|\n?<image>\Z", "", messages[asked]["content"])
    return [*messages[:asked], messages[asked] | {"content": text, "image": image}, *messages[asked + 1 :]]


def read_conversations(
    path: str, encoding: str = "utf-8", rename: dict[str, str] | None = None
) -> list[tuple[str, Messages]]:
    """All conversations of a fine-tuning file with their places in it ("line 3"); raises UserError.

    An "image" in a question is the Path of its file.
    """
    found = []
    for source in find_sources([path], encoding, rename)[0]:
        if source.stage not in ("sft", "vision"):
            raise UserError(f"{source.name}: no questions and answers, but what is for {source.stage}")
        parse = lambda values, source=source: with_image(parse_conversation(values), values, source)  # noqa: E731
        found += parsed(source, parse, BadLines(0), lambda n: None)
    return found
