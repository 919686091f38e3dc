"""What of a model's answers stands word for word in its training text.

    counts = copied(["The capital of Zupin is Tukend.", ...], find_sources(["dataset/pretrain.txt"])[0])
    print(counts.sum(0))            # pieces of 20 characters that occur in it, of how many

The pieces of the answers are few and are held; the training text may be larger than memory and is read once, as a
stream. A hash of its every 20 characters, computed for a million of them at a time, says of nearly all that they are
none of the pieces; the others are compared as text, so that two texts with one hash are not taken for each other.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from text.corpus import BadLines, chat_records, documents
from text.formats import CHUNK, Source
from text.tokenizer import codepoints, normalise

LENGTH = 20  # characters of a piece: long enough that two texts seldom share one by chance
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit is lost in the products modulo 2**64
TABLE_BITS = np.uint64(22)  # of a hash, for the table that says of most pieces at once that they are not sought


def pieces_of(text: str) -> list[str]:
    """The pieces of LENGTH characters of a text, one from each character on; none of a shorter text."""
    return [text[i : i + LENGTH] for i in range(len(text) - LENGTH + 1)]


def hashes_of(text: str) -> np.ndarray:
    """A hash of each of pieces_of(text): its code points as the coefficients of a polynomial, modulo 2**64."""
    codes = codepoints(text).astype(np.uint64)
    n = max(0, len(codes) - LENGTH + 1)
    total = np.zeros(n, np.uint64)
    for i in range(LENGTH):  # Horner's rule, for all pieces at once
        total = total * MULTIPLIER + codes[i : i + n]
    return total * MULTIPLIER  # mixed into the high bits, which the table takes


def copied(answers: list[str], sources: list[Source]) -> np.ndarray:
    """For each answer, the pieces of it that occur in the training files, and all its pieces: (answers, 2)."""
    answers = [normalise(answer) for answer in answers]
    sought = {piece for answer in answers for piece in pieces_of(answer)}
    found = set()
    table, shift = np.zeros(1 << int(TABLE_BITS), bool), np.uint64(64) - TABLE_BITS
    if sought:
        table[hashes_of("\0".join(sought))[:: LENGTH + 1] >> shift] = True
    for text in long_texts(text for source in sources for text in texts_of(source)):
        hashes = hashes_of(text)
        places = np.flatnonzero(table[hashes >> shift])
        _, first = np.unique(hashes[places], return_index=True)  # what is frequent in a text is compared once
        found |= sought & {text[i : i + LENGTH] for i in places[first].tolist()}
    counts = [(sum(piece in found for piece in pieces_of(answer)), len(pieces_of(answer))) for answer in answers]
    return np.array(counts).reshape(-1, 2)


def describe_copied(answers: list[str], expected: list[str], sources: list[Source]) -> str:
    """The share of the answers' pieces that occur in the training files, beside that of the answers expected."""
    counts = copied(answers + expected, sources)
    (said, n_said), (right, n_right) = counts[: len(answers)].sum(0), counts[len(answers) :].sum(0)
    if not n_said:
        return f"no answer has {LENGTH} characters"
    line = f"{100 * said / n_said:.1f}% of the answers' {LENGTH}-character pieces ({said}/{n_said})"
    return line + (f", {100 * right / n_right:.1f}% of the expected answers' ({right}/{n_right})" if n_right else "")


def texts_of(source: Source) -> Iterator[str]:
    """The texts of a training file; a long document comes in parts, each with the last characters of that before."""
    if source.stage != "pretrain":
        for record in chat_records(source, BadLines(0)):
            yield from (message["content"] for messages in record for message in messages)
        return
    before = ""
    for text, begins, _ in documents(source, BadLines(0)):
        yield text if begins else before + text
        before = text[-(LENGTH - 1) :]


def long_texts(texts: Iterable[str]) -> Iterator[str]:
    """Short texts joined to such of about CHUNK characters, long ones cut: what numpy takes in one go."""
    held, length = [], 0
    for text in texts:
        for start in range(0, len(text), CHUNK):
            held.append(text[max(0, start - LENGTH + 1) : start + CHUNK])
            length += len(held[-1])
            if length >= CHUNK:
                yield "\0".join(held)  # which stands in no text: no piece spans two of them
                held, length = [], 0
    yield "\0".join(held)
