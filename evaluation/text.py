"""The loss on a text: in windows spread over it, by position; or of every token, with context before it.

    ids, characters = read_ids(sources, tokenizer)
    losses, units = judge_windows(model, tokenizer, ids, n_windows=64)      # (windows, block_size)
    units = judge_pieces([(model, tokenizer, ids)], characters, strides)    # the same pieces of text, for each model

Nats per token depend on the tokenizer: a model whose tokens are longer has fewer to predict, each of them harder. Bits
per character or byte of the text, nats / ln 2 over the characters or bytes that were judged, do not.
"""

import itertools
import math
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from base.configuration import UserError
from evaluation.statistics import ratio
from layers.denoising import BLOCK
from layers.head import Head
from model import GPT, ModelConfig
from text.corpus import BadLines, documents
from text.formats import Source
from text.tokenizer import CharTokenizer, Tokenizer, codepoints, remove_special_tokens
from training.diffusion import bound_of_windows

BOUND = "an upper bound on the loss,"  # what masked diffusion has instead
Judged = tuple[GPT, Tokenizer, np.ndarray]  # a model, and a text as its tokenizer's ids (T,)


class Units(NamedTuple):
    """What was judged, unit by unit, as arrays (n,): windows, or pieces of a text."""

    nats: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    bytes: np.ndarray

    def describe(self, what: str = "loss") -> str:
        """Loss, perplexity, bits per character and per byte, with their standard errors over the units."""
        loss, error = ratio(self.nats, self.tokens)
        perplexity = math.exp(min(700.0, loss))  # no overflow
        parts = [f"{what} {loss:.4f}{plus_minus(error, 4)}", f"perplexity {perplexity:.2f}"]
        parts[-1] += plus_minus(perplexity * error, 2)  # the derivative of exp() is exp()
        for name, counts in (("character", self.characters), ("byte", self.bytes)):
            if counts.sum():
                bits, error = ratio(self.nats / math.log(2), counts)
                parts.append(f"{bits:.3f}{plus_minus(error, 3)} bits/{name}")
        return ", ".join(parts)


def check_attention(config: ModelConfig, path: str, has_strides: bool) -> None:
    """Raises UserError where a model has no loss of every token, after those before it; has_strides: it is needed."""
    if config.mask_token and has_strides:
        raise UserError(
            f"{path}: masked diffusion has a bound on the loss of a whole window, not of a token after others: "
            "so no --stride, --factor or --scaling, and beside it only models of the same window and tokenizer"
        )
    if not config.is_causal and not config.mask_token:
        raise UserError(f"{path}: with full attention there is no next token to predict")


def plus_minus(error: float, digits: int) -> str:
    """A standard error beside a figure; nothing where a single unit has none."""
    return f" ± {error:.{digits}f}" if math.isfinite(error) else ""


def read_ids(sources: list[Source], tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Token ids (T,) of texts, as data.py encodes them, and their characters."""
    pieces = [piece for source in sources for piece in documents(source, BadLines(0))]
    delimit = sum(ends for _, _, ends in pieces) > 1  # a text alone has no neighbours to be delimited from
    parts = [np.empty(0, tokenizer.dtype)]
    for text, begins, ends in pieces:
        parts.append(tokenizer.delimit([tokenizer.encode(text, special=True)], delimit and begins, delimit and ends))
    ids = np.concatenate(parts)
    return ids, remove_special_tokens("".join(text for text, _, _ in pieces))


# ------------------------------------------------------------------------------------------------------ losses


@torch.inference_mode()
def losses_of(
    model: GPT, ids: np.ndarray, starts: np.ndarray, length: int, batch_size: int, block: int = BLOCK
) -> Iterator[np.ndarray]:
    """Cross-entropies in nats (length,), window by window: of the tokens that follow ids[start : start + length].

    Of masked diffusion, parts of a bound on what they add up to; block: tokens that it fills in together.
    """
    device = next(model.parameters()).device
    batches = range(0, len(starts), batch_size)
    for first in tqdm(batches, desc="reading", delay=1, leave=False, dynamic_ncols=True, disable=None):
        rows = np.stack([ids[start : start + length + 1] for start in starts[first : first + batch_size]])
        windows = torch.from_numpy(rows.astype(np.int64)).to(device)  # (B, length + 1)
        idx, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        if model.config.mask_token:
            yield from bound_of_windows(model, idx, targets, first, block).cpu().double().numpy()
            continue
        is_rounded = not isinstance(model.lm_head, Head)  # to integers: it computes logits alone
        _, losses = model(idx, targets, reduction="none", with_logits=is_rounded)  # (B, length)
        yield from losses.cpu().double().numpy()


def judge_windows(
    model: GPT, tokenizer: Tokenizer, ids: np.ndarray, n_windows: int, batch_size: int = 8, block: int = BLOCK
) -> tuple[np.ndarray, Units]:
    """Losses (N, block_size) of at most n_windows windows spread over a text (T,) that do not overlap; the windows.

    The first token of a window is predicted from one token, the last from block_size: the mean over the windows shows
    position by position what context is worth. A text that is shorter is one window. block: see losses_of().
    """
    length = min(model.config.block_size, len(ids) - 1)
    n = min(n_windows, len(ids) // (length + 1))
    starts = np.linspace(0, len(ids) - length - 1, n).astype(int)
    losses = np.stack(list(losses_of(model, ids, starts, length, batch_size, block)))
    sizes = np.array([text_lengths(tokenizer, ids[start + 1 : start + length + 1]).sum(0) for start in starts])
    return losses, Units(losses.sum(1), np.full(n, length), sizes[:, 0], sizes[:, 1])


def strided_losses(model: GPT, ids: np.ndarray, stride: int, batch_size: int = 8) -> np.ndarray:
    """Cross-entropy in nats of every token of a text (T,) but the first: (T - 1,), each judged exactly once.

    The first window judges all its tokens. Every further one begins `stride` tokens later, and judges its last `stride`
    tokens only: each has at least block_size - stride tokens before it.
    """
    length = min(model.config.block_size, len(ids) - 1)
    ends = np.append(np.arange(length, len(ids) - 1, stride), len(ids) - 1)  # tokens judged after each window
    found = np.empty(len(ids) - 1)
    judged = 0
    for end, losses in zip(ends, losses_of(model, ids, ends - length, length, batch_size), strict=True):
        found[judged:end] = losses[length - (end - judged) :]
        judged = end
    return found


# ------------------------------------------------------------------------------------------------------ pieces of text


def text_lengths(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Characters and bytes (UTF-8) of text that each token completes: (T, 2). Special tokens have none.

    A character that is spread over several tokens counts with the last one; one that is not in the vocabulary has the
    three bytes of U+FFFD.
    """
    if isinstance(tokenizer, CharTokenizer):
        unknown = ids == tokenizer.unknown
        is_text = (ids >= len(tokenizer.special_tokens)) | unknown
        lengths = np.stack([is_text, 3 * unknown], axis=1).astype(np.int64)
        lengths[is_text & ~unknown, 1] = utf8_lengths(tokenizer.decode(ids[is_text & ~unknown]))
        return lengths
    special = set(tokenizer.special_tokens.values())
    lengths = np.zeros((len(ids), 2), np.int64)
    at = -1

    def tokens_of_text() -> Iterator[int]:
        nonlocal at
        for i, token in enumerate(ids.tolist()):
            if token not in special:
                at = i
                yield token

    for text in tokenizer.stream(tokens_of_text()):  # comes as soon as its last token was drawn
        lengths[at] += len(text), len(text.encode("utf-8", "replace"))
    return lengths


def utf8_lengths(text: str) -> np.ndarray:
    """Bytes in UTF-8 of each character (n,)."""
    codes = codepoints(text).astype(np.int64)
    return 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)


def in_text(ends: np.ndarray, characters: str) -> np.ndarray:
    """Numbers of characters of a text for those that a tokenizer has read, which composes them first (NFC).

    A letter and its accents become fewer characters, and so do the parts of a Hangul syllable.
    """
    is_first = [not (unicodedata.category(c).startswith("M") or "\u1160" <= c <= "\u11ff") for c in characters]
    edges = np.unique([0, *np.flatnonzero(is_first), len(characters)])
    parts = [characters[start:end] for start, end in itertools.pairwise(edges)]
    composed = np.cumsum([0, *(len(unicodedata.normalize("NFC", part)) for part in parts)])
    return np.interp(ends, composed, edges).round().astype(int)


def judge_pieces(models: list[Judged], characters: str, strides: list[int], batch_size: int = 8) -> list[Units]:
    """Every token of a text judged by each model, as pieces of the text that are the same for all of them.

    A piece has about as many characters as fill the largest window. A token belongs to the piece in which its last
    character lies: so models with different tokenizers are compared by nats per piece, and by bits per byte.
    """
    ends = [np.cumsum(text_lengths(tokenizer, ids)[:, 0]) for _, tokenizer, ids in models]  # characters, inclusive
    ends = [end if end[-1] == len(characters) else in_text(end, characters) for end in ends]
    first = max(end[0] for end in ends)  # what every model judges begins behind the longest first token
    size = max(model.config.block_size * end[-1] / len(end) for (model, _, _), end in zip(models, ends, strict=True))
    n_pieces = max(1, int((len(characters) - first) / max(1, size)))
    edges = np.linspace(first, len(characters), n_pieces + 1).astype(int)
    n_bytes = np.diff(np.append(0, np.cumsum(utf8_lengths(characters)))[edges])
    found = []
    for (model, _, ids), end, stride in zip(models, ends, strides, strict=True):
        losses = strided_losses(model, ids, stride, batch_size)
        piece = np.minimum(np.searchsorted(edges, end[1:], side="left") - 1, n_pieces - 1)  # -1: not judged by all
        counted = piece >= 0
        nats = np.bincount(piece[counted], losses[counted], n_pieces)
        found.append(Units(nats, np.bincount(piece[counted], minlength=n_pieces), np.diff(edges), n_bytes))
    return found
