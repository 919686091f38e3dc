"""Data cleaning for data.py: length and symbol filters, near-duplicate removal, splitting of long documents.

    python data.py articles.jsonl --near_duplicates 0.8 --min_characters 40 --split_documents 2000

Models memorise text that is repeated in training; Lee et al. 2021 (arXiv:2107.06499) show what deduplication gains.
Exact duplicates are always removed, by data.py itself.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from base.configuration import Config, UserError, option

SENTENCE_ENDS = ".!?。！？；…\n"
CLOSING = "\"'”’」』）)】》"  # quotes and brackets after a full stop still belong to the sentence
N_SHINGLE = 5  # characters per n-gram
N_PERMUTATIONS = 64  # hash functions per MinHash signature; more are slower and more accurate

sentence_end = re.compile(f"[{re.escape(SENTENCE_ENDS)}]+[{re.escape(CLOSING)}]*\\s*")
symbol = re.compile(r"[^\w\s.,;:!?'\"()\-。，、；：！？“”‘’（）《》「」『』【】…—]")


@dataclass
class CleaningConfig(Config):
    """Filters for documents and fine-tuning samples (running text is not filtered)."""

    near_duplicates: float | None = option(
        None,
        "drop texts with about this Jaccard similarity or more to an earlier one (needs datasketch)",
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
        None, "split documents longer than this many characters at sentence ends", minimum=16
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
            self.datasketch = datasketch
            self.index = datasketch.MinHashLSH(threshold=config.near_duplicates, num_perm=N_PERMUTATIONS)

    def accept(self, text: str) -> bool:
        """Whether a text passes every filter; near-duplicates are relative to the texts accepted before it."""
        reason = self.rejection_reason(text)
        if reason:
            self.dropped[reason] += 1
            self.examples.setdefault(reason, text)
        return not reason

    def rejection_reason(self, text: str) -> str:
        """Why a text is dropped; empty if it is not."""
        config = self.config
        if config.min_characters and len(text) < config.min_characters:
            return "shorter than min_characters"
        if config.max_characters and len(text) > config.max_characters:
            return "longer than max_characters"
        if config.max_symbols is not None and len(symbol.findall(text)) > config.max_symbols * len(text):
            return "more symbols than max_symbols"
        if config.near_duplicates is not None and self.is_near_duplicate(text):
            return "near-duplicates"
        return ""

    def is_near_duplicate(self, text: str) -> bool:
        """Whether the index holds a similar text; if not, add this one.

        Similarity is the Jaccard index |A & B| / |A | B| of the texts' sets of 5-character n-grams. MinHash (Broder
        1997) makes a short signature of each set; each entry of two signatures agrees with that probability. Locality-
        sensitive hashing looks up signatures that agree in part, instead of comparing all pairs.
        """
        text = " ".join(text.lower().split())  # ignore case and white space
        shingles = {text[i : i + N_SHINGLE].encode() for i in range(max(1, len(text) - N_SHINGLE + 1))}
        signature = self.datasketch.MinHash(num_perm=N_PERMUTATIONS)
        signature.update_batch(sorted(shingles))
        if self.index.query(signature):
            return True
        self.index.insert(str(len(self.index.keys)), signature)
        return False

    def report(self) -> list[str]:
        """One line per reason: the number of dropped texts, and the beginning of the first."""
        return [f"dropped: {n:,} {reason}, as {self.examples[reason][:60]!r}" for reason, n in self.dropped.items()]


def split_at_sentences(text: str, max_characters: int) -> Iterator[str]:
    """Split a text at sentence ends into pieces of at most max_characters; a longer sentence is cut anywhere."""
    start = 0
    while len(text) - start > max_characters:
        ends = [match.end() for match in sentence_end.finditer(text, start, start + max_characters)]
        cut = ends[-1] if ends and ends[-1] > start else start + max_characters
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
