"""Tokenizers: text to token ids and back. One token per character, or byte-level BPE; text/foreign.py has a third kind.

    tokenizer = CharTokenizer.train(["any text", "更多文字"])
    ids = tokenizer.encode("any text")          # numpy array of uint16, for large vocabularies uint32
    text = tokenizer.decode(ids)
    tokenizer.save("dataset/tokenizer.json")    # and back: load_tokenizer() in tokenizer_files.py

These two give the special tokens the ids 0 to 5. Special tokens are recognised in training text (`special=True`) only:
in a user's prompt, "<|eos|>" is seven ordinary characters, so that nobody can inject control tokens.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from base.configuration import UserError
from base.files import atomic_write
from text.template import NANO, ChatTemplate, Messages

SPECIAL_TOKENS = ("<|Padding|>", "<|unknown|>", "<|bos|>", "<|eos|>", "<|InstructMark|>", "<|ResponseMark|>")
SMALLEST_BPE = 256 + len(SPECIAL_TOKENS)  # every byte is a token
PADDING, UNKNOWN, BOS, EOS, INSTRUCT, RESPONSE = range(len(SPECIAL_TOKENS))
FORMAT = 1
UNICODE_SIZE = 0x110000  # code points are below this

line_boundary = re.compile(r"(?<=\S\n)(?=\S)")
special_pattern = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")


def normalise(text: str) -> str:
    """Line ends as \\n and no byte-order mark in front: what data.py does to all text, and so to do to prompts too."""
    text = text.removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def may_contain_special(text: str) -> bool:
    """A cheap pre-check: False only if the text has no special token of ours. One character is found much faster."""
    return "|" in text and "<|" in text


def remove_special_tokens(text: str, replacement: str = "") -> str:
    return special_pattern.sub(replacement, text) if may_contain_special(text) else text


class Tokenizer(ABC):
    """The interface of all tokenizers, with what they share: special tokens, chat template, fingerprint, saving."""

    kind: str
    vocab_size: int
    special_tokens: Mapping[str, int] = dict(zip(SPECIAL_TOKENS, range(len(SPECIAL_TOKENS)), strict=True))
    special_pattern: re.Pattern = special_pattern  # any of their names, as a group
    special_mark: str = "<|"  # what all names begin with
    template: ChatTemplate = NANO
    bos: int | None = BOS  # begins a document
    eos: int = EOS  # ends a document
    unknown: int | None = UNKNOWN  # stands for what has no token
    adds_bos: bool = False  # a text to continue begins with bos

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest integer type that holds every id; token files use the same one."""
        return np.uint16 if self.vocab_size < 1 << 16 else np.uint32  # vocab_size itself: a patch of an image

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple({self.special_tokens[self.template.end_of_answer()], self.eos})

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids (T,) of a text. special: convert special tokens in the text to their ids."""
        parts = list(self._encode_pieces([(text, special)]))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def delimit(self, parts: list[np.ndarray], begins: bool, ends: bool) -> np.ndarray:
        """Token ids (T,) of a document, or of a part of one, with bos and eos where it begins and ends."""
        first = np.array([self.bos] if begins and self.bos is not None else [], self.dtype)
        return np.concatenate([first, *parts, np.array([self.eos] * ends, self.dtype)])

    def encode_chat(
        self, messages: Messages, n_patches: int = 0, image_last: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Apply the chat template to a conversation; returns token ids (T,) and loss mask (T,).

        With our own template each turn is <|InstructMark|>question<|ResponseMark|>answer<|eos|>; a system message is
        prepended to the next question. The loss mask is 1 on answers and the token that ends them (but for those with
        "weight": 0): the model learns to answer and to stop, not to ask.
        A conversation whose last message is from the user ends where the answer begins: a prompt to complete.
        n_patches: of an image; as many places with the id vocab_size, which is no token's, stand for each, behind its
        question, or with image_last False before it.
        """
        ids, mask = [], []
        for run in self.template.runs(messages, image_last):
            ids += [self.vocab_size] * (n_patches * run.is_image)
            for part in self._encode_pieces(run.pieces):
                ids += part.tolist()
            mask += [run.in_loss] * (len(ids) - len(mask))
        return np.array(ids, dtype=self.dtype), np.array(mask, dtype=np.uint8)

    def _encode_pieces(self, pieces: list[tuple[str, bool]]) -> Iterator[np.ndarray]:
        """Token ids, part by part, of the joint text of pieces (text, whether special tokens in it become ids)."""
        plain = ""
        for text, special in pieces:
            if special and text in self.special_tokens:  # the usual case, and a fast one
                parts = ["", text, ""]
            else:
                parts = self.special_pattern.split(text) if special and self.special_mark in text else [text]
            for i, part in enumerate(parts):  # alternates: plain text, special token, plain text, ...
                if i % 2:
                    if plain:
                        yield self._encode_plain(plain)
                    yield np.array([self.special_tokens[part]], dtype=self.dtype)
                    plain = ""
                else:
                    plain += part
        if plain:
            yield self._encode_plain(plain)

    def unknown_characters(self, text: str) -> str:
        """The distinct out-of-vocabulary characters of a text, in order of first appearance."""
        return ""

    def fingerprint(self) -> str:
        """A hash of the vocabulary, stored in token files: it tells whether data and model use the same tokenizer."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]

    def to_bytes(self) -> bytes:
        """The contents of a tokenizer file."""
        return (json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n").encode("utf-8")

    def save(self, path: str | Path) -> None:
        with atomic_write(path) as file:
            file.write(self.to_bytes())

    @abstractmethod
    def _encode_plain(self, text: str) -> np.ndarray:
        """Token ids of a text, treating special tokens in it as ordinary characters."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens appear by name."""

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids one by one, as a model generates them; yields text as soon as its characters are complete."""
        stream = TextStream(self)
        yield from filter(None, map(stream.push, ids))
        yield from filter(None, [stream.rest()])

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The tokenizer as JSON-compatible values, for its file and for checkpoints."""

    def _check_ids(self, ids: Iterable[int]) -> np.ndarray:
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise UserError(f"token ids must be in 0..{self.vocab_size - 1}, got {ids.min()}..{ids.max()}")
        return ids


class TextStream:
    """The text of tokens that come one by one, as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.pending = tokenizer, []

    def push(self, token: int) -> str:
        """What the token completes; "" inside of a character that is spread over several tokens."""
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        if text.endswith("\ufffd") and len(self.pending) <= 8:  # incomplete UTF-8; it has at most 4 bytes, so that
            return ""  # what 8 tokens have not completed will not be
        self.pending = []
        return text

    def rest(self) -> str:
        """The text of what is pending, when no further token comes."""
        return self.tokenizer.decode(self.pending)


def codepoints(text: str) -> np.ndarray:
    """The Unicode code points of a text, lone surrogates included: uint32, or uint8 if all are ASCII (faster)."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def mark_characters(codepoint_mask: np.ndarray, text: str) -> None:
    """Set the entries of a text's code points in a boolean array (UNICODE_SIZE,)."""
    if text.isascii():  # deleting the characters marked before leaves next to nothing to index with
        marked = np.flatnonzero(codepoint_mask[:128]).astype(np.uint8).tobytes()
        codepoint_mask[np.frombuffer(text.encode("ascii").translate(None, marked), dtype=np.uint8)] = True
    else:  # looking up is faster than marking again what is marked
        codes = codepoints(text)
        codepoint_mask[codes[~codepoint_mask.take(codes)]] = True


class CharTokenizer(Tokenizer):
    """One token per character. Encoding and decoding are numpy table look-ups over UTF-32, not Python loops."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        """characters: the vocabulary, all distinct; their ids follow those of the special tokens."""
        codes = codepoints(characters)
        if len(np.unique(codes)) != len(codes):
            raise UserError("tokenizer: the characters of a vocabulary must be distinct")
        self.characters = characters
        self.vocab_size = len(SPECIAL_TOKENS) + len(codes)
        self._id_of = np.full(UNICODE_SIZE, UNKNOWN, dtype=self.dtype)  # code point -> id
        self._id_of[codes] = np.arange(len(SPECIAL_TOKENS), self.vocab_size)
        ascii_ids = self._id_of[:256]  # bytes.translate() needs 256 entries; ASCII text uses the first 128
        self._ascii_ids = ascii_ids.astype(np.uint8).tobytes() if ascii_ids[:128].max() < 256 else None
        self._code_of = np.concatenate([np.full(len(SPECIAL_TOKENS), 0xFFFD, dtype="<u4"), codes])  # id -> code point

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        """The vocabulary is every distinct character of the texts, in code point order, without special tokens."""
        codepoint_mask = np.zeros(UNICODE_SIZE, dtype=bool)
        for text in texts:
            mark_characters(codepoint_mask, remove_special_tokens(text))
        return cls.from_codepoint_mask(codepoint_mask)

    @classmethod
    def from_codepoint_mask(cls, codepoint_mask: np.ndarray) -> "CharTokenizer":
        """The vocabulary is the code points that are True in a boolean array (UNICODE_SIZE,)."""
        return cls(np.flatnonzero(codepoint_mask).astype("<u4").tobytes().decode("utf-32-le"))

    def _encode_plain(self, text: str) -> np.ndarray:
        if self._ascii_ids and text.isascii():  # four times as fast
            return np.frombuffer(text.encode("ascii").translate(self._ascii_ids), np.uint8).astype(self.dtype)
        return self._id_of.take(codepoints(text))

    def decode(self, ids: Iterable[int]) -> str:
        ids = self._check_ids(ids)
        codes = self._code_of.take(ids)
        parts, start = [], 0
        for i in np.flatnonzero(ids < len(SPECIAL_TOKENS)):
            parts += [codes[start:i].tobytes().decode("utf-32-le"), SPECIAL_TOKENS[ids[i]]]
            start = i + 1
        return "".join(parts) + codes[start:].tobytes().decode("utf-32-le")

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


def split_at_lines(text: str, size: int = 1 << 14) -> Iterator[str]:
    """Cut a text into pieces of about `size` characters that BPE encodes exactly as it encodes the whole.

    BPE merges only inside the words that its pre-tokenizer splits off first, so a cut between two words is safe. A line
    break with non-space characters on both sides is such a place. The library encodes the pieces in parallel.
    """
    start = 0
    while len(text) - start > size and (boundary := line_boundary.search(text, start + size)):
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]


def byte_level(model: Any) -> Any:
    """A tokenizer of the `tokenizers` library that treats text as GPT-2 does: as bytes, words with their space."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding, trained and run by the `tokenizers` library.

    BPE (Sennrich et al. 2016, arXiv:1508.07909) starts from single symbols and repeatedly merges the most frequent
    adjacent pair into a new token. Starting from the 256 bytes, as GPT-2 does, leaves no text out of vocabulary.
    """

    kind = "bpe"

    def __init__(self, tokenizer_json: str) -> None:
        """tokenizer_json: the contents of a tokenizer.json of the `tokenizers` library."""
        self._load(tokenizer_json)
        self.vocab_size = self._tokenizer.get_vocab_size()
        for token_id, token in enumerate(SPECIAL_TOKENS):
            if self._tokenizer.token_to_id(token) != token_id:
                raise UserError(f"tokenizer: {token} must have the id {token_id}")

    def _load(self, tokenizer_json: str) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exceptions, and panics, which are not even those
            raise UserError(f"tokenizer: the `tokenizers` library cannot read it: {error}") from None
        self._tokenizer.no_truncation()  # which files of fine-tuned models may ask for
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as ordinary text: Tokenizer.encode() handles special tokens
        self._json = tokenizer_json

    @classmethod
    def from_merges(cls, tokens: list[str], merges: list[str]) -> "BPETokenizer":
        """The tokenizer of a vocabulary in the order of its ids and of merges ("left right"), in GPT-2's alphabet."""
        from tokenizers import models

        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = byte_level(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        return cls(tokenizer.to_str())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges from the texts, for at most vocab_size tokens including the 256 bytes and the special tokens."""
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < SMALLEST_BPE:
            raise UserError(
                f"vocab_size must be at least {SMALLEST_BPE} for BPE (256 bytes and {len(SPECIAL_TOKENS)} special)"
            )
        tokenizer = byte_level(models.BPE())
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
        valid = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be encoded as UTF-8
        encodings = self._tokenizer.encode_batch_fast(list(split_at_lines(valid)), add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=self.dtype) for encoding in encodings])

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(self._check_ids(ids).tolist(), skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "special_tokens": list(SPECIAL_TOKENS),
            "tokenizer": self._json,
        }
