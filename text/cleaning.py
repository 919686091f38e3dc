"""Cleaning text before training: what is too short, too long, too odd, or was said already in nearly the same words.

python data.py articles.jsonl --near_duplicates 0.8 --min_characters 40 --split_documents 2000
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from base.configuration import Config, UserError, option

SENTENCE_ENDS = ".!?。！？；…\n"
CLOSING = "\"'”’」』）)】》"  # belongs to the sentence before it
N_SHINGLE = 5  # characters
N_PERMUTATIONS = 64

sentence_end = re.compile(f"[{re.escape(SENTENCE_ENDS)}]+[{re.escape(CLOSING)}]*\\s*")
symbol = re.compile(r"[^\w\s.,;:!?'\"()\-。，、；：！？“”‘’（）《》「」『』【】…—]")


@dataclass
class CleaningConfig(Config):
    """What data.py leaves out of documents and samples (running text is taken as it is)."""

    near_duplicates: float | None = option(
        None, "leave out what shares this much with an earlier one (needs datasketch)", above=0.0, maximum=1.0
    )
    min_characters: int | None = option(None, "leave out what is shorter", minimum=1)
    max_characters: int | None = option(None, "leave out what is longer", minimum=1)
    max_symbols: float | None = option(
        None, "leave out what has a larger share of signs that are no letters or punctuation", minimum=0.0, maximum=1.0
    )
    split_documents: int | None = option(
        None, "split longer documents at the ends of sentences, into at most so many characters", minimum=16
    )

    def check(self) -> None:
        if self.min_characters and self.max_characters and self.min_characters > self.max_characters:
            raise UserError(
                f"min_characters ({self.min_characters}) must not be above max_characters ({self.max_characters})"
            )


class Cleaner:
    """Judges units one after the other; dropped counts the reasons, examples has the first text of each."""

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
            self.seen = datasketch.MinHashLSH(threshold=config.near_duplicates, num_perm=N_PERMUTATIONS)

    def keeps(self, text: str) -> bool:
        """Whether a document or sample is to be learnt from."""
        reason = self.reason_against(text)
        if reason:
            self.dropped[reason] += 1
            self.examples.setdefault(reason, text)
        return not reason

    def reason_against(self, text: str) -> str:
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
        """Whether an earlier text shares enough of its 5-character pieces (MinHash, Broder 1997); else remember it."""
        text = " ".join(text.lower().split())
        pieces = {text[i : i + N_SHINGLE].encode() for i in range(max(1, len(text) - N_SHINGLE + 1))}
        sketch = self.datasketch.MinHash(num_perm=N_PERMUTATIONS)
        sketch.update_batch(sorted(pieces))
        if self.seen.query(sketch):
            return True
        self.seen.insert(str(len(self.seen.keys)), sketch)
        return False

    def report(self) -> list[str]:
        """A line for every reason: how often, and the beginning of the first text."""
        return [f"dropped: {n:,} {reason}, as {self.examples[reason][:60]!r}" for reason, n in self.dropped.items()]


def split_at_sentences(text: str, longest: int) -> Iterator[str]:
    """A text in pieces of at most so many characters, each as long as sentences allow; a longer sentence is cut."""
    start = 0
    while len(text) - start > longest:
        ends = [match.end() for match in sentence_end.finditer(text, start, start + longest)]
        cut = ends[-1] if ends and ends[-1] > start else start + longest
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
