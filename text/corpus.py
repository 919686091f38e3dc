"""Reading raw text: files, folders and .gz, plain text and jsonl, in bounded memory, with errors that name the line.

Files are streamed as records. For pretraining a record is a document: the text of a jsonl line, or text delimited by
<|bos|> or <|eos|>; text without delimiters is running text, read in pieces of arbitrary size. For fine-tuning (sft) a
record is a conversation, for preference tuning (dpo) two: the same prompt with a chosen and with a rejected answer.
"""

import codecs
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from base.configuration import UserError
from base.prefetching import prefetch
from text.tokenizer import Messages, may_contain_special

CHUNK = 1 << 20  # bytes read at a time
LONGEST_DOCUMENT = 1 << 24  # characters; a longer one is treated as running text
TEXT_SUFFIXES = (".txt", ".md", ".text", ".jsonl")
ROLES = ("system", "user", "assistant")

document_boundary = re.compile(r"(?<=<\|eos\|>)|(?=<\|bos\|>)")


@dataclass
class Source:
    """One raw file. Reading it to the end fills in its size and hash."""

    path: Path
    is_jsonl: bool
    bytes: int = 0
    sha256: str = ""

    def describe(self) -> dict[str, Any]:
        return {"path": self.path.as_posix(), "bytes": self.bytes, "sha256": self.sha256}


@dataclass
class BadLines:
    """Prints each malformed jsonl line once, and raises UserError when there are more than `limit`."""

    limit: int
    reported: set[tuple[str, int]] = field(default_factory=set)

    def report(self, path: Path, number: int, problem: str) -> None:
        if (str(path), number) in self.reported:  # files are read twice
            return
        self.reported.add((str(path), number))
        if len(self.reported) > self.limit:
            limit = f"; there are more than {self.limit} bad lines (--max_bad_lines)" if self.limit else ""
            raise UserError(f"{path}: line {number}: {problem}{limit}")
        print(f"skipped {path}: line {number}: {problem}", file=sys.stderr)


def find_sources(paths: list[str]) -> list[Source]:
    """The raw files at the given paths; of a folder, all text files in it and its subfolders, sorted by name."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and raw_suffix(p) in TEXT_SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no {', '.join(TEXT_SUFFIXES)} files (or .gz of them) in this folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    return [Source(path, raw_suffix(path) == ".jsonl") for path in found]


def raw_suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def stage_of(source: Source) -> str:
    """The training stage of a raw file, inferred from its contents.

    jsonl with "chosen" is for dpo, with "question" or "messages" for sft; "text" and every other file for pretrain.
    """
    if source.is_jsonl:
        for number, line in lines(Source(source.path, True)):
            try:
                first = json.loads(line)
            except ValueError:
                continue
            if isinstance(first, dict) and "chosen" in first:
                return "dpo"
            if isinstance(first, dict) and ("messages" in first or "question" in first):
                return "sft"
            if isinstance(first, dict) and "text" in first:
                return "pretrain"
            if number > 100:
                break
        raise UserError(f'{source.path}: cannot infer the stage: no "text", "question", "messages" or "chosen" in it')
    return "pretrain"


def text_chunks(source: Source, progress: Callable[[int], None] = lambda n: None) -> Iterator[str]:
    """The text of a file in chunks, read ahead in a background thread, with line ends as \\n; raises UserError."""
    return prefetch(read_chunks(source, progress), depth=1)


def read_chunks(source: Source, progress: Callable[[int], None]) -> Iterator[str]:
    """Decode UTF-8 incrementally: a chunk may end in the middle of a character, or between \\r and \\n."""
    path = source.path
    decoder = codecs.getincrementaldecoder("utf-8")()
    digest, offset, pending_cr = hashlib.sha256(), 0, ""
    with open_raw(path) as file:
        while True:
            try:
                block = file.read(CHUNK)
            except (gzip.BadGzipFile, EOFError) as error:
                raise UserError(f"{path}: damaged gzip file: {error}") from None
            if offset == 0:
                if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UserError(f"{path}: UTF-16 text; save it as UTF-8 first")
                if not block:
                    raise UserError(f"{path}: the file is empty")
            n_undecoded = len(decoder.getstate()[0])
            try:
                text = pending_cr + decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - n_undecoded + error.start
                raise UserError(f"{path}: not UTF-8 text: byte 0x{error.object[error.start]:02x} at {at}") from None
            if offset == 0:
                text = text.removeprefix("\ufeff")
            if "\0" in text:
                raise UserError(f"{path}: a binary file, not text: it contains NUL bytes")
            digest.update(block)
            offset += len(block)
            progress(len(block))
            pending_cr = "\r" if text.endswith("\r") and block else ""
            if "\r" in text:
                text = text.removesuffix(pending_cr).replace("\r\n", "\n").replace("\r", "\n")
            if text:
                yield text
            if not block:
                break
    source.bytes, source.sha256 = offset, digest.hexdigest()


def open_raw(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def lines(source: Source, progress: Callable[[int], None] = lambda n: None) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a file with their numbers, from 1."""
    number, unfinished = 0, []  # parts of a line that spans several chunks
    for chunk in text_chunks(source, progress):
        *complete, rest = chunk.split("\n")
        for line in complete:
            number += 1
            line = "".join([*unfinished, line])
            unfinished = []
            if line.strip():
                yield number, line
        unfinished.append(rest)
    if "".join(unfinished).strip():
        yield number + 1, "".join(unfinished)


def documents(
    source: Source, bad_lines: BadLines, progress: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[str, bool]]:
    """The text of a pretraining file: (text, True) for a document, (text, False) for a piece of running text."""
    if source.is_jsonl:
        for number, line in lines(source, progress):
            try:
                yield "<|bos|>" + parse_text_line(line) + "<|eos|>", True
            except UserError as error:
                bad_lines.report(source.path, number, str(error))
        return
    rest = ""  # text after the last document boundary
    for chunk in text_chunks(source, progress):
        rest += chunk
        if may_contain_special(rest):
            *parts, rest = document_boundary.split(rest)
            yield from classify_parts(parts)
        max_length = LONGEST_DOCUMENT if rest.startswith("<|bos|>") else CHUNK // 2
        if len(rest) > max_length:
            # cut at a line end, else far enough from the end not to cut a special token of which half is read
            cut = rest.rfind("\n", len(rest) - 4096) + 1 or len(rest) - 32
            yield rest[:cut], False
            rest = rest[cut:]
    yield from classify_parts([rest])


def classify_parts(parts: list[str]) -> Iterator[tuple[str, bool]]:
    """Parts between document boundaries as (text, is_document); white space between documents is dropped."""
    for part in parts:
        is_document = part.startswith("<|bos|>") or part.endswith("<|eos|>")
        if is_document or part.strip():
            yield part, is_document


def conversations(
    source: Source, bad_lines: BadLines, progress: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[int, Messages]]:
    """The conversations of a fine-tuning jsonl file, each with its line number."""
    for number, line in lines(source, progress):
        try:
            yield number, parse_conversation(line)
        except UserError as error:
            bad_lines.report(source.path, number, str(error))


def chat_records(
    source: Source, stage: str, bad_lines: BadLines, progress: Callable[[int], None] = lambda n: None
) -> Iterator[list[Messages]]:
    """The records of a jsonl file. sft: [conversation]; dpo: [chosen conversation, rejected conversation]."""
    if stage == "sft":
        for _, messages in conversations(source, bad_lines, progress):
            yield [messages]
        return
    for number, line in lines(source, progress):
        try:
            yield parse_preference(line)
        except UserError as error:
            bad_lines.report(source.path, number, str(error))


def parse_object(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"column {error.colno}: not valid JSON: {error.msg}") from None
    except (RecursionError, ValueError):
        raise UserError("not usable JSON") from None
    if not isinstance(values, dict):
        raise UserError(f"must be a JSON object, got {type(values).__name__}")
    return values


def text_field(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if name not in values else "is empty" if isinstance(value, str) else "is not a string"
        raise UserError(f'"{name}" {found}')
    return value.encode("utf-8", "replace").decode("utf-8")  # JSON can contain lone surrogates, "\ud800"


def parse_text_line(line: str) -> str:
    """The text of a line {"text": ...}; raises UserError."""
    return text_field(parse_object(line), "text")


def parse_conversation(line: str) -> Messages:
    """The conversation of a fine-tuning line; raises UserError.

    {"question": ..., "answer": ...} or {"messages": [{"role": "user", "content": ...}, ...]}: user and assistant
    alternate, system messages are allowed before user messages, and the last message is the assistant's.
    """
    values = parse_object(line)
    if "messages" not in values:
        return [
            {"role": "user", "content": text_field(values, "question")},
            {"role": "assistant", "content": text_field(values, "answer")},
        ]
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError('"messages" must be a list of at least one question and answer')
    conversation, expected = [], ("system", "user")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f'message {i}: "role" must be one of {", ".join(ROLES)}')
        role = message["role"]
        if role not in expected:
            raise UserError(f"message {i}: role is {role}, expected {' or '.join(expected)}")
        try:
            conversation.append({"role": role, "content": text_field(message, "content")})
        except UserError as error:
            raise UserError(f"message {i}: {error}") from None
        expected = ("assistant",) if role == "user" else ("system", "user")
    if conversation[-1]["role"] != "assistant":
        raise UserError("the last message must be an answer (role assistant)")
    return conversation


def parse_preference(line: str) -> list[Messages]:
    """The two conversations of a preference line, [chosen, rejected]; raises UserError.

    {"prompt": ..., "chosen": ..., "rejected": ...}; instead of "prompt" also "messages", the last one from the user.
    """
    values = parse_object(line)
    answers = [{"role": "assistant", "content": text_field(values, name)} for name in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        raise UserError('"chosen" and "rejected" are the same')
    if "messages" not in values:
        prompt = [{"role": "user", "content": text_field(values, "prompt")}]
        return [[*prompt, answer] for answer in answers]
    if not isinstance(values["messages"], list):
        raise UserError('"messages" must be a list that ends with a user message')
    return [parse_conversation(json.dumps({"messages": [*values["messages"], answer]})) for answer in answers]
