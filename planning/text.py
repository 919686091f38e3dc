"""The text that is planned for: what data.py wrote of it, where, and what counting its n-grams says of it."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from base.configuration import UserError, command_line
from planning.law import SHARES
from text.token_files import TokenFile

COUNTED, JUDGED, PIECE = 350_000, 40_000, 1000  # tokens of both splits that n-grams are counted in, and of a piece
LONGEST_NGRAM = 10


@dataclass
class Text:
    """A text that data.py has prepared."""

    train: Path
    val: Path
    tokenizer: Path
    header: dict[str, Any]  # of the training file
    baselines: dict[str, float]  # of the validation file
    tokens_per_character: float

    @property
    def unique(self) -> int:
        """Tokens to train on."""
        return self.header["n_tokens"]

    @property
    def vocab_size(self) -> int:
        return self.header["vocab_size"]

    @functools.cached_property
    def ngram_share(self) -> float:
        """What n-grams leave of the unigram entropy, by a sample of the text: takes about a second."""
        train, val = (TokenFile(file, is_verified=False).tokens for file in (self.train, self.val))
        return ngram_loss(pieces(train, COUNTED), pieces(val, JUDGED), self.vocab_size) / self.baselines["unigram"]

    @property
    def lzma_share(self) -> float:
        """What lzma leaves of it, by the beginning of the text.

        nan for a text whose preparation did not say, and for a short one, which lzma shrinks less than a longer one.
        """
        if self.unique < COUNTED:
            return math.nan
        nats = self.baselines.get("lzma_bits_per_character", math.nan) * math.log(2) / self.tokens_per_character
        return nats / self.baselines["unigram"]

    @property
    def shares(self) -> np.ndarray:
        """Both (2,), for law.py."""
        return np.array([self.ngram_share, self.lzma_share])

    @property
    def record(self) -> dict[str, float]:
        """What a line of runs.jsonl or bench/plans.jsonl says of it."""
        known = {name: round(share, 6) for name, share in zip(SHARES, self.shares.tolist(), strict=True)}
        known = {name: share for name, share in known.items() if not math.isnan(share)}
        return {"unique": self.unique, "vocab": self.vocab_size, "unigram": self.baselines["unigram"], **known}

    @property
    def fields(self) -> dict[str, Any]:
        """Where a config says that it lies."""
        return {"dataset_path": [[str(self.train), str(self.val)]], "tokenizer_path": str(self.tokenizer)}


def open_text(path: Path) -> Text:
    """The text of a training file NAME_train.bin; raises UserError where it is none, or its other files are missing."""
    if not path.name.endswith("_train.bin"):
        raise UserError(f"{path}: plan.py takes a text, or the training file that data.py made of one: NAME_train.bin")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    val, tokenizer = path.with_name(path.name.removesuffix("_train.bin") + "_val.bin"), path.with_name("tokenizer.json")
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer}: no such file; `{command_line('data.py')}` writes it beside the token files")
    header, val_header = (TokenFile(file, is_verified=False).header for file in (path, val))
    if header["n_samples"] is not None:
        raise UserError(f"{path}: questions and answers; plans are for pretraining, on running text")
    if val_header["baselines"]["unigram"] < 0.01:
        raise UserError(f"{val}: always the same character: there is nothing to learn")
    ratio = val_header["n_loss_tokens"] / max(1, val_header["n_characters"])
    return Text(path, val, tokenizer, header, val_header["baselines"], ratio)


def pieces(tokens: np.ndarray, n: int) -> np.ndarray:
    """At most n tokens of a text, in pieces that lie at even distances."""
    if len(tokens) <= n:
        return tokens
    starts = np.linspace(0, len(tokens) - PIECE, n // PIECE).astype(np.int64)
    return tokens[(starts[:, None] + np.arange(PIECE)).ravel()]


def ngram_loss(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Validation loss in nats per token of the n-gram model, of all lengths up to LONGEST_NGRAM, whose loss is lowest.

    After a context that was seen C times, with T kinds of followers, the follower that was seen c times has the
    probability (c + T p) / (C + T), where p is its probability after the context without its first token: Witten and
    Bell 1991 (doi:10.1109/18.87000), method C, interpolated.
    """
    tokens, n = np.concatenate([train, val]).astype(np.int64), len(train)
    context = np.zeros_like(tokens)  # (n_tokens,) a number for what stands before every token: at first, for nothing
    p, best = np.full(len(val), 1 / vocab_size), math.inf
    for _ in range(LONGEST_NGRAM):
        # a number for the n-gram that ends here (context and token together), where it is first, how often it is seen
        _, first, ngram = np.unique(context * vocab_size + tokens, return_index=True, return_inverse=True)
        c = np.bincount(ngram[:n], minlength=len(first))
        C = np.bincount(context[:n], minlength=context.max() + 1)
        T = np.bincount(context[first[c > 0]], minlength=len(C))
        here = context[n:]
        p = np.where(C[here] > 0, (c[ngram[n:]] + T[here] * p) / np.maximum(1, C[here] + T[here]), p)
        loss = float(-np.log(p).mean())
        if loss >= best:
            break
        best = loss
        context = np.concatenate([[0], ngram[:-1] + 1])  # what stands before the next token; 0: the beginning
    return best
