"""Text to token ids and back: one interface, two tokenizers (characters, and BPE by the `tokenizers` library).

    tokenizer = CharTokenizer.train(["any text", "更多文字"])
    ids = tokenizer.encode("any text")          # numpy array of uint16, for large vocabularies uint32
    text = tokenizer.decode(ids)
    tokenizer.save("dataset/tokenizer.json");   tokenizer = load_tokenizer("dataset/tokenizer.json")

The special tokens have the ids 0 to 5 in both. They are recognised in training text (`special=True`); in what a user
types they are plain characters.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from base.configuration import UserError, read_json
from base.files import atomic_write

SPECIAL_TOKENS = ("<|Padding|>", "<|unknown|>", "<|bos|>", "<|eos|>", "<|InstructMark|>", "<|ResponseMark|>")
PADDING, UNKNOWN, BOS, EOS, INSTRUCT, RESPONSE = range(len(SPECIAL_TOKENS))
FORMAT = 1
UNICODE_SIZE = 0x110000

piece_edge = re.compile(r"(?<=\S\n)(?=\S)")
special_pattern = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")

Messages = list[dict[str, str]]


def may_contain_special(text: str) -> bool:
    """False where a text cannot hold a special token: one character is looked for much faster than two."""
    return "|" in text and "<|" in text


def remove_special_tokens(text: str, instead: str = "") -> str:
    """A text with something else in place of its special tokens."""
    return special_pattern.sub(instead, text) if may_contain_special(text) else text


class Tokenizer(ABC):
    """What both tokenizers share."""

    kind: str
    vocab_size: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest type that holds all ids, the one of the token files."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids of a text; with special=True, special tokens in it become their ids."""
        if not (special and may_contain_special(text)):
            return self._encode_plain(text)
        pieces = special_pattern.split(text)  # plain, special, plain, special, ..., plain
        parts = []
        for i, piece in enumerate(pieces):
            if i % 2:
                parts.append(np.array([SPECIAL_TOKENS.index(piece)], dtype=self.dtype))
            elif piece:
                parts.append(self._encode_plain(piece))
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def encode_chat(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and loss mask (1 on the answers and their <|eos|>) of a conversation, by the instruct template.

        Each turn is <|InstructMark|>question<|ResponseMark|>answer<|eos|>; a system message stands before the next
        question. A conversation that ends with a question ends in <|ResponseMark|>: the prompt for its answer.
        """
        ids, mask = [], []

        def add(tokens: Iterable[int], loss: int) -> None:
            start = len(ids)
            ids.extend(tokens)
            mask.extend([loss] * (len(ids) - start))

        system = ""
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                system += content + "\n"
            elif message["role"] == "user":
                add([INSTRUCT, *self._encode_plain(system + content).tolist(), RESPONSE], 0)
                system = ""
            else:
                add([*self._encode_plain(content).tolist(), EOS], 1)
        return np.array(ids, dtype=self.dtype), np.array(mask, dtype=np.uint8)

    def unknown_characters(self, text: str) -> str:
        """The distinct characters of the text that the vocabulary lacks, in order of appearance."""
        return ""

    def fingerprint(self) -> str:
        """A hash of the vocabulary: data and checkpoints made with the same tokenizer carry the same one."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        with atomic_write(path) as file:
            file.write((json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n").encode("utf-8"))

    @abstractmethod
    def _encode_plain(self, text: str) -> np.ndarray:
        """Token ids of a text in which nothing is special."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens are spelled out."""

    @abstractmethod
    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids one by one as they come; text is held back until its characters are complete."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The tokenizer as plain values, for its JSON file and for checkpoints."""

    def _checked(self, ids: Iterable[int]) -> np.ndarray:
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise UserError(f"token ids must be in 0..{self.vocab_size - 1}, got {ids.min()}..{ids.max()}")
        return ids


def codepoints(text: str) -> np.ndarray:
    """The Unicode code points of a text, lone surrogates included: uint32, or uint8 where all are ASCII (faster)."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def mark_characters(seen: np.ndarray, text: str) -> None:
    """Mark the code points of a text in `seen`, a boolean array over all of Unicode."""
    if text.isascii():  # what is marked already need not be looked at
        known = np.flatnonzero(seen[:128]).astype(np.uint8).tobytes()
        seen[np.frombuffer(text.encode("ascii").translate(None, known), dtype=np.uint8)] = True
    else:
        seen[codepoints(text)] = True


class CharTokenizer(Tokenizer):
    """Every character of the vocabulary is one token: a table look-up over UTF-32, both ways."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        """characters: the vocabulary, without repeats; the first one gets the id after the special tokens."""
        codes = codepoints(characters)
        if len(np.unique(codes)) != len(codes):
            raise UserError("tokenizer: the characters of a vocabulary must be distinct")
        self.characters = characters
        self.vocab_size = len(SPECIAL_TOKENS) + len(codes)
        self._id_of = np.full(UNICODE_SIZE, UNKNOWN, dtype=self.dtype)
        self._id_of[codes] = np.arange(len(SPECIAL_TOKENS), self.vocab_size)
        ascii_ids = self._id_of[:256]
        self._ascii_ids = ascii_ids.astype(np.uint8).tobytes() if ascii_ids[:128].max() < 256 else None
        self._code_of = np.concatenate([np.full(len(SPECIAL_TOKENS), 0xFFFD, dtype="<u4"), codes])

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        """A vocabulary of every distinct character of the texts, special tokens aside, in code point order."""
        seen = np.zeros(UNICODE_SIZE, dtype=bool)
        for text in texts:
            mark_characters(seen, remove_special_tokens(text))
        return cls.from_seen(seen)

    @classmethod
    def from_seen(cls, seen: np.ndarray) -> "CharTokenizer":
        """A vocabulary of the code points marked in `seen`, a boolean array over all of Unicode."""
        return cls(np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le"))

    def _encode_plain(self, text: str) -> np.ndarray:
        if self._ascii_ids and text.isascii():  # four times as fast
            return np.frombuffer(text.encode("ascii").translate(self._ascii_ids), np.uint8).astype(self.dtype)
        return self._id_of.take(codepoints(text))

    def decode(self, ids: Iterable[int]) -> str:
        ids = self._checked(ids)
        codes = self._code_of.take(ids)
        parts, start = [], 0
        for i in np.flatnonzero(ids < len(SPECIAL_TOKENS)):
            parts += [codes[start:i].tobytes().decode("utf-32-le"), SPECIAL_TOKENS[ids[i]]]
            start = i + 1
        return "".join(parts) + codes[start:].tobytes().decode("utf-32-le")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        for token in ids:
            yield self.decode([token])

    def unknown_characters(self, text: str) -> str:
        codes = codepoints(text)
        unknown = codes[self._id_of.take(codes) == UNKNOWN].tolist()
        return "".join(chr(code) for code in dict.fromkeys(unknown))

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "special_tokens": list(SPECIAL_TOKENS),
            "characters": self.characters,
        }


def independent_pieces(text: str, size: int = 1 << 14) -> Iterator[str]:
    """A text cut where no byte-level BPE token can reach across: after a line's end between words."""
    start = 0
    while len(text) - start > size and (edge := piece_edge.search(text, start + size)):
        yield text[start : edge.start()]
        start = edge.start()
    yield text[start:]


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding, trained and run by the `tokenizers` library; no text is ever unknown to it."""

    kind = "bpe"

    def __init__(self, tokenizer_json: str) -> None:
        """tokenizer_json: the `tokenizers` library's own JSON text."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"tokenizer: the `tokenizers` library cannot read it: {error}") from None
        self._tokenizer.encode_special_tokens = True  # special tokens are our encode()'s business
        self._json = tokenizer_json
        self.vocab_size = self._tokenizer.get_vocab_size()
        for token_id, token in enumerate(SPECIAL_TOKENS):
            if self._tokenizer.token_to_id(token) != token_id:
                raise UserError(f"tokenizer: {token} must have the id {token_id}")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn at most vocab_size tokens (256 bytes and the special tokens among them) from the texts."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        smallest = len(SPECIAL_TOKENS) + 256
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size must be at least {smallest} for BPE (256 bytes and {len(SPECIAL_TOKENS)} special)"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        plain = (remove_special_tokens(text, "\n") for text in texts)
        tokenizer.train_from_iterator(plain, trainer)
        return cls(tokenizer.to_str())

    def _encode_plain(self, text: str) -> np.ndarray:
        valid = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8
        encodings = self._tokenizer.encode_batch_fast(list(independent_pieces(valid)), add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=self.dtype) for encoding in encodings])

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(self._checked(ids).tolist(), skip_special_tokens=False)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        held = []
        for token in ids:
            held.append(token)
            text = self.decode(held)
            if not text.endswith("\ufffd") or len(held) > 8:  # a character is at most 4 bytes
                yield text
                held = []
        if held:
            yield self.decode(held)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "special_tokens": list(SPECIAL_TOKENS),
            "tokenizer": self._json,
        }


def tokenizer_from_dict(values: Any, where: str) -> Tokenizer:
    """The tokenizer that to_dict() described; where: the file to name in errors."""
    if not isinstance(values, dict) or values.get("special_tokens") != list(SPECIAL_TOKENS):
        raise UserError(f"{where}: not a tokenizer file of this toolkit; make one with python data.py")
    if values.get("format") != FORMAT:
        raise UserError(f"{where}: tokenizer format {values.get('format')!r} is not the known format {FORMAT}")
    try:
        if values.get("kind") == "char" and isinstance(values.get("characters"), str):
            return CharTokenizer(values["characters"])
        if values.get("kind") == "bpe" and isinstance(values.get("tokenizer"), str):
            return BPETokenizer(values["tokenizer"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    raise UserError(f"{where}: tokenizer kind {values.get('kind')!r} is unknown or its vocabulary is missing")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer file; raises UserError that names it."""
    return tokenizer_from_dict(read_json(path), str(path))
