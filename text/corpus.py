"""Reading raw text: files, folders and .gz, plain text and jsonl, in bounded memory, with errors that name the line.

A raw file is a sequence of units. For pretraining a unit is a document (a jsonl line's text, or a stretch delimited by
<|bos|> / <|eos|>) or a piece of running text without delimiters; for fine-tuning it is a conversation.
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

CHUNK = 1 << 20  # bytes of a file held at a time
LONGEST_DOCUMENT = 1 << 24  # characters; a longer one is treated as running text
TEXT_SUFFIXES = (".txt", ".md", ".text", ".jsonl")
ROLES = ("system", "user", "assistant")

document_edge = re.compile(r"(?<=<\|eos\|>)|(?=<\|bos\|>)")


@dataclass
class Source:
    """One raw file; reading it from end to end fills in its size and hash."""

    path: Path
    is_jsonl: bool
    bytes: int = 0
    sha256: str = ""

    def describe(self) -> dict[str, Any]:
        return {"path": self.path.as_posix(), "bytes": self.bytes, "sha256": self.sha256}


@dataclass
class BadLines:
    """Reports bad lines once each, and gives up after a limit."""

    limit: int
    seen: set[tuple[str, int]] = field(default_factory=set)

    def report(self, path: Path, number: int, problem: str) -> None:
        if (str(path), number) in self.seen:
            return
        self.seen.add((str(path), number))
        if len(self.seen) > self.limit:
            raise UserError(
                f"{path}: line {number}: {problem}; that makes more than {self.limit} bad lines (--max_bad_lines)"
            )
        print(f"skipped {path}: line {number}: {problem}", file=sys.stderr)


def find_sources(paths: list[str]) -> list[Source]:
    """The raw files that the paths name; a folder stands for the text files in it, in order of their names."""
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
    """The stage that a raw file is for, by its contents.

    jsonl with "chosen": "dpo"; with "question" or "messages": "sft"; with "text", and everything else: "pretrain".
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
        raise UserError(f'{source.path}: no line with "text", "question", "messages" or "chosen": what is it for?')
    return "pretrain"


def text_chunks(source: Source, progress: Callable[[int], None] = lambda n: None) -> Iterator[str]:
    """The text of a file in chunks, read ahead; line ends become \\n. Raises UserError where it is not UTF-8 text."""
    return prefetch(read_chunks(source, progress), depth=1)


def read_chunks(source: Source, progress: Callable[[int], None]) -> Iterator[str]:
    path = source.path
    decoder = codecs.getincrementaldecoder("utf-8")()
    digest, offset, held = hashlib.sha256(), 0, ""
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
            pending = len(decoder.getstate()[0])
            try:
                text = held + decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise UserError(f"{path}: not UTF-8 text: byte 0x{error.object[error.start]:02x} at {at}") from None
            if offset == 0:
                text = text.removeprefix("\ufeff")
            if "\0" in text:
                raise UserError(f"{path}: a binary file, not text: it has NUL bytes")
            digest.update(block)
            offset += len(block)
            progress(len(block))
            held = "\r" if text.endswith("\r") and block else ""
            if "\r" in text:
                text = text.removesuffix(held).replace("\r\n", "\n").replace("\r", "\n")
            if text:
                yield text
            if not block:
                break
    source.bytes, source.sha256 = offset, digest.hexdigest()


def open_raw(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def lines(source: Source, progress: Callable[[int], None] = lambda n: None) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a file with their numbers, from 1."""
    number, held = 0, []
    for chunk in text_chunks(source, progress):
        *whole, rest = chunk.split("\n")
        for line in whole:
            number += 1
            line = "".join([*held, line])
            held = []
            if line.strip():
                yield number, line
        held.append(rest)
    if "".join(held).strip():
        yield number + 1, "".join(held)


def documents(
    source: Source, bad_lines: BadLines, progress: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[str, bool]]:
    """Pretraining units of a file: (text, True) for a document, (text, False) for a piece of running text."""
    if source.is_jsonl:
        for number, line in lines(source, progress):
            try:
                yield "<|bos|>" + parse_text_line(line) + "<|eos|>", True
            except UserError as error:
                bad_lines.report(source.path, number, str(error))
        return
    held = ""
    for chunk in text_chunks(source, progress):
        held += chunk
        if may_contain_special(held):
            *units, held = document_edge.split(held)
            yield from delimited(units)
        too_long = LONGEST_DOCUMENT if held.startswith("<|bos|>") else CHUNK // 2
        if len(held) > too_long:
            cut = held.rfind("\n", len(held) - 4096) + 1 or len(held) - 32  # never inside a special token
            yield held[:cut], False
            held = held[cut:]
    yield from delimited([held])


def delimited(units: list[str]) -> Iterator[tuple[str, bool]]:
    for unit in units:
        is_document = unit.startswith("<|bos|>") or unit.endswith("<|eos|>")
        if is_document or unit.strip():  # white space between documents belongs to none
            yield unit, is_document


def conversations(
    source: Source, bad_lines: BadLines, progress: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[int, Messages]]:
    """Fine-tuning units of a jsonl file: the line's number and its conversation."""
    for number, line in lines(source, progress):
        try:
            yield number, parse_conversation(line)
        except UserError as error:
            bad_lines.report(source.path, number, str(error))


def samples(
    source: Source, stage: str, bad_lines: BadLines, progress: Callable[[int], None] = lambda n: None
) -> Iterator[list[Messages]]:
    """Units of a jsonl file for sft: [conversation]; for dpo: [with the chosen answer, with the rejected one]."""
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
        found = "is missing" if name not in values else "is empty" if isinstance(value, str) else "is not a text"
        raise UserError(f'"{name}" {found}')
    return value.encode("utf-8", "replace").decode("utf-8")  # JSON can spell lone surrogates


def parse_text_line(line: str) -> str:
    """The text of a pretraining jsonl line; raises UserError."""
    return text_field(parse_object(line), "text")


def parse_conversation(line: str) -> Messages:
    """The conversation in a fine-tuning jsonl line; raises UserError.

    {"question": ..., "answer": ...} or {"messages": [{"role": "user", "content": ...}, ...]}: questions and answers
    take turns, system messages stand before a question, and the last word is an answer.
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
            raise UserError(f"message {i}: {role} where {' or '.join(expected)} is due")
        try:
            conversation.append({"role": role, "content": text_field(message, "content")})
        except UserError as error:
            raise UserError(f"message {i}: {error}") from None
        expected = ("assistant",) if role == "user" else ("system", "user")
    if conversation[-1]["role"] != "assistant":
        raise UserError("the last message must be an answer (role assistant)")
    return conversation


def parse_preference(line: str) -> list[Messages]:
    """The two conversations of a preference line; raises UserError.

    {"prompt": ..., "chosen": ..., "rejected": ...}, or "messages" that end with a question instead of "prompt".
    """
    values = parse_object(line)
    answers = [{"role": "assistant", "content": text_field(values, name)} for name in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        raise UserError('"chosen" and "rejected" are the same')
    if "messages" not in values:
        prompt = [{"role": "user", "content": text_field(values, "prompt")}]
        return [[*prompt, answer] for answer in answers]
    if not isinstance(values["messages"], list):
        raise UserError('"messages" must be a list that ends with a question')
    return [parse_conversation(json.dumps({"messages": [*values["messages"], answer]})) for answer in answers]
