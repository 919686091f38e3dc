"""The first pass over a corpus: what must be known before it can be encoded.

scan = scan_corpus("pretrain", sources, bad_lines, Cleaner(CleaningConfig()))
scan.hashes, scan.lengths     # one entry per record, in order
scan.codepoint_mask           # the characters of the text
"""

import contextlib
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

from base.configuration import UserError, escape_control_characters
from text import corpus
from text.baselines import COMPRESSION_SAMPLE
from text.cleaning import Cleaner, split_at_sentences
from text.corpus import BadLines
from text.formats import Source
from text.tokenizer import UNICODE_SIZE, Messages, mark_characters, remove_special_tokens

SPLIT_BY = ("sample", "question", "answer")  # of a conversation: what decides on which side of the split it lies
N_NAMED = 5  # files that are named where there are many


def some_names(names: list[str]) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - N_NAMED:,} more" if len(names) > N_NAMED else ""
    return escape_control_characters(", ".join(names[:N_NAMED]) + more)


class CorpusScan:
    """What the first pass over one stage's files finds out.

    A record is a document, a conversation or a preference pair: the unit of filtering and deduplication. Records of one
    group (the pieces of a document, the pairs of a prompt) stay on one side of the split.
    """

    def __init__(self, stage: str, sources: list[Source], cleaner: Cleaner, split_by: str, image_size: int = 0) -> None:
        self.stage, self.sources, self.cleaner, self.split_by = stage, sources, cleaner, split_by
        self.image_size = image_size  # for the stage vision: what images are resized to
        self.hashes = array("Q")  # 64 bits per record, in order: duplicates are found without storing texts
        self.groups = array("Q")  # the hash of each record's group
        self.answers = array("Q")  # fine-tuning: the hash of each record's last answer
        self.lengths = array("Q")  # characters per record
        self.is_accepted = array("b")  # per record: whether it passes the cleaner's filters
        self.n_empty = 0
        self.codepoint_mask = np.zeros(UNICODE_SIZE, dtype=bool)  # the characters of the accepted text
        self._sample: list[str] = []  # of accepted text, to compress
        self._n_sample = 0

    def add(self, content_hash: int, group: int, length: int, is_accepted: bool) -> None:
        self.hashes.append(content_hash)
        self.groups.append(group)
        self.lengths.append(length)
        self.is_accepted.append(is_accepted)

    def add_text(self, text: str) -> None:
        """Collect the characters of accepted text, and enough of its beginning for compression_baselines()."""
        mark_characters(self.codepoint_mask, text)
        if self._n_sample < COMPRESSION_SAMPLE:
            self._sample.append(text[: COMPRESSION_SAMPLE - self._n_sample])
            self._n_sample += len(self._sample[-1])

    @property
    def compression_sample(self) -> str:
        return "".join(self._sample)

    @compression_sample.setter
    def compression_sample(self, text: str) -> None:
        self._sample, self._n_sample = [text], len(text)

    @property
    def n_characters(self) -> int:
        return sum(itertools.compress(self.lengths, self.is_accepted))

    def documents(
        self, source: Source, bad_lines: BadLines, progress: Callable[[int], None]
    ) -> Iterator[tuple[str, bool, bool, str]]:
        """corpus.documents(), those longer than split_documents split at sentence ends; and what each is a part of."""
        limit, whole = self.cleaner.config.split_documents, ""
        for text, begins, ends in corpus.documents(source, bad_lines, progress):
            whole = text if begins else whole  # or the first piece, where it is too long to be held whole
            if limit and not (begins and ends and len(text) <= limit):
                for piece in split_at_sentences(text, limit):
                    if piece.strip():
                        yield piece.strip(), True, True, whole
            else:
                yield text, begins, ends, whole

    def group_of(self, messages: Messages, content_hash: int, answer_hash: int) -> int:
        """The hash of what decides on which side of the split a conversation or a preference pair lies."""
        if self.stage == "dpo":  # a prompt's pairs have the same question
            return hash64(conversation_text(messages[:-1]))
        images = [message["image"] for message in messages if "image" in message]
        if images:  # all questions about an image lie on the side where it is
            return hash_bytes(images[0].tobytes())
        if self.split_by == "question":
            questions = (message["content"] for message in messages if message["role"] == "user")
            return hash64(next(filter(None, questions), ""))
        return answer_hash if self.split_by == "answer" else content_hash


def hash_bytes(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hash64(text: str) -> int:
    return hash_bytes(text.encode("utf-8"))


def conversation_text(messages: Messages) -> str:
    images = [hash_bytes(message["image"].tobytes()) for message in messages if "image" in message]
    texts = [[message["role"], message["content"]] for message in messages]
    return json.dumps([*texts, *images], ensure_ascii=False)


@contextlib.contextmanager
def progress_bar(sources: list[Source], title: str) -> Iterator[Callable[[int], None]]:
    """A progress bar over the bytes of the files, with the time left; appears after one second."""
    is_plain = all(s.form == "text" and not s.member and s.path.suffix.lower() in (".txt", ".md") for s in sources)
    total = sum(s.path.stat().st_size for s in sources) if is_plain else None  # of compressed files it is not known
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=1, leave=False, dynamic_ncols=True) as bar:
        yield bar.update


def scan_corpus(
    stage: str,
    sources: list[Source],
    bad_lines: BadLines,
    cleaner: Cleaner,
    split_by: str = "sample",
    image_size: int = 0,
) -> CorpusScan:
    """The first pass over one stage's files."""
    scan = CorpusScan(stage, sources, cleaner, split_by, image_size)
    with progress_bar(sources, f"reading {stage}") as progress:
        for source in sources:
            if stage == "pretrain":
                scan_documents(scan, scan.documents(source, bad_lines, progress))
            else:
                scan_chats(scan, corpus.chat_records(source, bad_lines, progress, image_size))
    scan.n_empty = sum(bad_lines.n_empty.get(source.name, 0) for source in sources)
    if not any(scan.is_accepted):
        empty = [f"{scan.n_empty} empty"] if scan.n_empty else []
        reasons = "; ".join(["no training text", *empty, *cleaner.report()])
        raise UserError(f"{some_names([source.name for source in sources])}: {reasons}")
    return scan


def scan_documents(scan: CorpusScan, documents: Iterator[tuple[str, bool, bool, str]]) -> None:
    digest, length = None, 0  # of the document so far, where it comes in pieces
    group, hashed = 0, None  # the hash of what the document is a part of, and that text
    for text, begins, ends, whole in documents:
        plain = remove_special_tokens(text)
        if begins and ends:
            is_accepted = scan.cleaner.accept(plain)
            if whole is not hashed:
                group, hashed = hash64(whole), whole
            scan.add(group if text is whole else hash64(text), group, len(text), is_accepted)
        else:  # too long to be held whole: of the filters, only that of its length is applied
            if begins:
                digest, length = hashlib.blake2b(digest_size=8), 0
                before = scan.codepoint_mask.copy(), scan.compression_sample
            digest.update(text.encode("utf-8"))
            length += len(text)
            is_accepted = not ends or scan.cleaner.accept_length(plain, length)
            if ends:
                content_hash = int.from_bytes(digest.digest(), "little")
                scan.add(content_hash, content_hash, length, is_accepted)
                if not is_accepted:
                    scan.codepoint_mask, scan.compression_sample = before
        if is_accepted:
            scan.add_text(plain)


def scan_chats(scan: CorpusScan, records: Iterator[list[Messages]]) -> None:
    for record in records:
        first, *others = record
        messages = [*first, *(m for other in others for i, m in enumerate(other) if first[i : i + 1] != [m])]
        texts = "\n".join(message["content"] for message in messages)  # of a preference pair, the prompt once
        is_accepted = scan.cleaner.accept(texts)
        content_hash = hash64("".join(map(conversation_text, record)))
        answer_hash = hash64(record[0][-1]["content"])
        scan.add(content_hash, scan.group_of(record[0], content_hash, answer_hash), len(texts), is_accepted)
        scan.answers.append(answer_hash)
        if is_accepted:
            for message in itertools.chain.from_iterable(record):
                scan.add_text(message["content"])
                scan.codepoint_mask[ord("\n")] |= message["role"] == "system"  # the chat template adds one
