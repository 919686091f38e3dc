"""Data cleaning for data.py: length and symbol filters, near-duplicate removal, splitting of long documents.

    python data.py articles.jsonl --near_duplicates 0.8 --min_characters 40 --split_documents 2000

Models memorise text that is repeated in training; Lee et al. 2021 (arXiv:2107.06499) show what deduplication gains.
Exact duplicates are always removed, by data.py itself.
"""

import re
import tempfile
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from base.configuration import Config, UserError, option
from text.tokenizer import codepoints, special_pattern

SENTENCE_ENDS = "。！？；…\n"
SENTENCE_ENDS_BEFORE_SPACE = ".!?"  # not inside of 3.14 and example.com
CLOSING = "\"'”’」』）)】》"  # quotes and brackets after a full stop still belong to the sentence
N_SHINGLE = 5  # characters per n-gram
N_PERMUTATIONS = 128  # hash functions per MinHash signature
RECALL = 0.99  # of pairs exactly as similar as the threshold, the share that is found

sentence_end = re.compile(  # a run of points is looked at once, from its beginning
    f"(?:[{SENTENCE_ENDS}]|(?<![{SENTENCE_ENDS_BEFORE_SPACE}])[{SENTENCE_ENDS_BEFORE_SPACE}]++"
    f"(?=[{re.escape(CLOSING)}]*(?:\\s|$)))+[{re.escape(CLOSING)}]*\\s*"
)
PUNCTUATION = set(".,;:!?'\"()[]-–—…/&%«»¿¡·。，、；：！？“”‘’（）《》〈〉「」『』【】")  # of prose


@dataclass
class CleaningConfig(Config):
    """Filters for documents and fine-tuning samples."""

    near_duplicates: float | None = option(
        None,
        "drop texts with this Jaccard similarity or more to an earlier one (needs datasketch)",
        above=0.0,
        maximum=1.0,
    )
    min_characters: int | None = option(None, "drop shorter texts", minimum=1)
    max_characters: int | None = option(None, "drop longer texts", minimum=1)
    max_symbols: float | None = option(
        None,
        "drop texts with a larger share of characters other than letters, digits, spaces and punctuation",
        minimum=0.0,
        maximum=1.0,
    )
    split_documents: int | None = option(
        None, "split documents longer than this many characters at sentence ends", minimum=16, maximum=1 << 22
    )

    def check(self) -> None:
        if self.min_characters and self.max_characters and self.min_characters > self.max_characters:
            raise UserError(
                f"min_characters ({self.min_characters}) must not be above max_characters ({self.max_characters})"
            )


class Cleaner:
    """Filters texts one by one; counts the dropped ones by reason and keeps the first of each reason as an example."""

    def __init__(self, config: CleaningConfig) -> None:
        self.config = config
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        if config.near_duplicates is not None:
            try:
                import datasketch
            except ImportError:
                raise UserError("near_duplicates: datasketch is not installed: pip install datasketch") from None
            self.near_duplicates = NearDuplicates(config.near_duplicates, datasketch)

    def accept(self, text: str) -> bool:
        """Whether a text passes every filter; near-duplicates are relative to the texts accepted before it."""
        reason = self.rejection_reason(text)
        if reason:
            self.dropped[reason] += 1
            self.examples.setdefault(reason, text)
        return not reason

    def accept_length(self, text: str, n_characters: int) -> bool:
        """accept() of a document too long to be held whole, of which `text` is a part: by its length alone."""
        too_long = self.config.max_characters is not None and n_characters > self.config.max_characters
        if too_long:
            self.dropped["longer than max_characters"] += 1
            self.examples.setdefault("longer than max_characters", text)
        return not too_long

    def rejection_reason(self, text: str) -> str:
        """Why a text is dropped; empty if it is not."""
        config = self.config
        if config.min_characters and len(text) < config.min_characters:
            return "shorter than min_characters"
        if config.max_characters and len(text) > config.max_characters:
            return "longer than max_characters"
        if config.max_symbols is not None and count_symbols(text) > config.max_symbols * len(text):
            return "more symbols than max_symbols"
        if config.near_duplicates is not None and self.near_duplicates.has_similar(text):
            return "near-duplicates"
        return ""

    def report(self) -> list[str]:
        """One line per reason: the number of dropped texts, and the beginning of the first."""
        return [f"dropped: {n:,} {reason}, as {self.examples[reason][:60]!r}" for reason, n in self.dropped.items()]


def count_symbols(text: str) -> int:
    """Characters other than letters with their marks, digits, white space and the punctuation of prose."""
    counts = Counter(text)
    return sum(
        n
        for character, n in counts.items()
        if not (character in PUNCTUATION or character.isspace() or unicodedata.category(character)[0] in "LMNZ")
    )


class NearDuplicates:
    """The texts accepted so far, to find those similar to a new one.

    Similarity is the Jaccard index |A & B| / |A | B| of the texts' sets of 5-character n-grams, without case and white
    space. Each entry of two MinHash signatures (Broder 1997) agrees with just that probability s. Locality-sensitive
    hashing finds candidates without comparing all pairs: those that agree in all r entries of any of b bands, which has
    the probability 1 - (1 - s^r)^b (Leskovec et al., Mining of Massive Datasets, chapter 3). r is as large as RECALL
    allows at the threshold, and the similarity of candidates is then computed exactly.
    """

    def __init__(self, threshold: float, datasketch: ModuleType) -> None:
        self.threshold, self.datasketch = threshold, datasketch
        rows = max(
            (r for r in range(1, 33) if 1 - (1 - threshold**r) ** (N_PERMUTATIONS // r) >= RECALL),
            default=1,
        )
        self.index = datasketch.MinHashLSH(num_perm=N_PERMUTATIONS, params=(N_PERMUTATIONS // rows, rows))
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  the n-grams of all texts, one after another
        self.ends = array("Q", [0])

    def has_similar(self, text: str) -> bool:
        """Whether a similar text was seen before; if not, this one is remembered."""
        ngrams = hashed_ngrams(" ".join(text.lower().split()))
        signature = self.datasketch.MinHash(num_perm=N_PERMUTATIONS, hashfunc=int)
        signature.update_batch(ngrams & 0xFFFFFFFF)  # 32 bits, as datasketch wants them
        if any(jaccard(ngrams, self.ngrams_of(i)) >= self.threshold for i in self.index.query(signature)):
            return True
        self.index.insert(len(self.ends) - 1, signature)
        self.file.seek(8 * self.ends[-1])
        self.file.write(ngrams.tobytes())
        self.ends.append(self.ends[-1] + len(ngrams))
        return False

    def ngrams_of(self, i: int) -> np.ndarray:
        self.file.seek(8 * self.ends[i])
        return np.frombuffer(self.file.read(8 * (self.ends[i + 1] - self.ends[i])), dtype=np.uint64)


def hashed_ngrams(text: str) -> np.ndarray:
    """The distinct n-grams of a text as sorted 64-bit hashes (n,): polynomials of their code points, modulo 2^64."""
    codes = codepoints(text).astype(np.uint64) + 1
    n = max(1, len(codes) - N_SHINGLE + 1)
    hashes = np.zeros(n, dtype=np.uint64)
    for i in range(min(N_SHINGLE, len(codes))):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + n]
    return np.unique(hashes ^ (hashes >> np.uint64(32)))  # its low bits alone depend on the last code points most


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A & B| / |A | B| of two sorted arrays without repetitions."""
    n_common = len(np.intersect1d(a, b, assume_unique=True))
    return n_common / (len(a) + len(b) - n_common)


def split_at_sentences(text: str, max_characters: int) -> Iterator[str]:
    """Split a text at sentence ends into pieces of at most max_characters; a longer sentence is cut anywhere."""
    start = 0
    while len(text) - start > max_characters:
        cut = limit = start + max_characters
        for match in sentence_end.finditer(
            text, start, limit + 8
        ):  # not up to the limit: a "." there may be inside a number
            if match.end() > limit:
                break
            cut = match.end()
        special = special_pattern.match(text, max(start, text.rfind("<|", start, cut + 1)))
        if special and start < special.start() < cut < special.end():  # a special token is not cut in two
            cut = special.start()
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
