"""Tokenise raw text: train a tokenizer, filter and deduplicate, split into training and validation, write token files.

    python data.py                              dataset/pretrain.txt and dataset/sft.jsonl, if they exist
    python data.py book.txt more/ old.txt.gz    text or jsonl, folders, gzip; the stage is inferred from the contents
    python data.py --tokenizer bpe --vocab_size 4096
    python data.py --inspect dataset/sft_train.bin

Writes dataset/tokenizer.json and, per stage, dataset/STAGE_train.bin and dataset/STAGE_val.bin.
Every file is read twice, so that memory does not grow with the corpus: scan_corpus() collects what must be known first
(the characters, a hash of every record), write_token_files() encodes.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import lzma
import math
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from base.configuration import Parser, UserError, find_config, read_json, run_main
from base.files import atomic_write
from text import corpus
from text.batches import TrainBatches
from text.cleaning import Cleaner, CleaningConfig, split_at_sentences
from text.corpus import BadLines, Source
from text.token_files import TokenFile, TokenFileWriter
from text.tokenizer import (
    SPECIAL_TOKENS,
    UNICODE_SIZE,
    BPETokenizer,
    CharTokenizer,
    Messages,
    Tokenizer,
    load_tokenizer,
    mark_characters,
    remove_special_tokens,
)

COMPRESSION_SAMPLE = 1_000_000  # characters of the corpus that zlib and lzma compress, as baselines
BPE_SAMPLE = 50_000_000  # characters that BPE merges are learned from
DEFAULT_FILES = (
    "pretrain.txt",
    "pretrain.txt.gz",
    "pretrain.jsonl",
    "pretrain.jsonl.gz",
    "sft.jsonl",
    "sft.jsonl.gz",
    "dpo.jsonl",
)


class CorpusScan:
    """What the first pass over one stage's files finds out.

    A record is a document, a conversation or a preference pair: the unit of filtering, deduplication and splitting.
    Running text, which has no document delimiters, is neither filtered nor deduplicated, and is split by position.
    """

    def __init__(self, stage: str, sources: list[Source], cleaner: Cleaner) -> None:
        self.stage, self.sources, self.cleaner = stage, sources, cleaner
        self.record_hashes = array("Q")  # 64 bits per record, in order: duplicates are found without storing texts
        self.record_accepted = array("b")  # per record: whether it passes the cleaner's filters
        self.n_running_characters = 0
        self.n_characters = 0
        self.codepoint_mask = np.zeros(UNICODE_SIZE, dtype=bool)  # the characters of the accepted text
        self.compression_sample = ""

    def add_record(self, content: str, plain_text: str) -> bool:
        """Hash a record's content and filter its text; returns whether it is accepted."""
        self.record_hashes.append(hash64(content))
        self.record_accepted.append(self.cleaner.accept(plain_text))
        return bool(self.record_accepted[-1])

    def add_text(self, text: str) -> None:
        """Collect the characters of accepted text, and its beginning for compression_baselines()."""
        text = remove_special_tokens(text) if self.stage == "pretrain" else text
        mark_characters(self.codepoint_mask, text)
        self.n_characters += len(text)
        if len(self.compression_sample) < COMPRESSION_SAMPLE:
            self.compression_sample += text[: COMPRESSION_SAMPLE - len(self.compression_sample)]

    def documents(
        self, source: Source, bad_lines: BadLines, progress: Callable[[int], None]
    ) -> Iterator[tuple[str, bool]]:
        """corpus.documents(), with documents longer than split_documents split at sentence ends."""
        max_characters = self.cleaner.config.split_documents
        for text, is_document in corpus.documents(source, bad_lines, progress):
            if is_document and max_characters and len(text) > max_characters:
                for piece in split_at_sentences(remove_special_tokens(text), max_characters):
                    if piece.strip():
                        yield f"<|bos|>{piece.strip()}<|eos|>", True
            else:
                yield text, is_document


def hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def conversation_text(messages: Messages) -> str:
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


@contextlib.contextmanager
def progress_bar(sources: list[Source], title: str) -> Iterator[Callable[[int], None]]:
    """A progress bar over the bytes of the files, with the time left; appears after one second."""
    total = None if any(s.path.suffix == ".gz" for s in sources) else sum(s.path.stat().st_size for s in sources)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=1, leave=False, dynamic_ncols=True) as bar:
        yield bar.update


def scan_corpus(stage: str, sources: list[Source], bad_lines: BadLines, cleaner: Cleaner) -> CorpusScan:
    """The first pass over one stage's files."""
    scan = CorpusScan(stage, sources, cleaner)
    with progress_bar(sources, f"reading {stage}") as progress:
        for source in sources:
            if stage != "pretrain":
                for record in corpus.chat_records(source, stage, bad_lines, progress):
                    texts = "\n".join(message["content"] for messages in record for message in messages)
                    if not scan.add_record("".join(map(conversation_text, record)), texts):
                        continue
                    for message in itertools.chain.from_iterable(record):
                        scan.add_text(message["content"])
                        scan.codepoint_mask[ord("\n")] |= message["role"] == "system"  # the chat template adds one
            else:
                for text, is_document in scan.documents(source, bad_lines, progress):
                    if is_document:
                        if not scan.add_record(text, remove_special_tokens(text)):
                            continue
                    else:
                        scan.n_running_characters += len(text)
                    scan.add_text(text)
    if not scan.n_characters:
        reasons = "; ".join(["no training text", *cleaner.report()])
        raise UserError(f"{', '.join(str(source.path) for source in sources)}: {reasons}")
    return scan


def deduplicate_and_split(hashes: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(is_first, is_val), boolean (n_records,): the first of equal records, and the records of the validation split.

    Records with the smallest hashes are for validation. A hash is a pseudo-random number that depends on the content
    alone, so the split is random, the same every time, and equal records can never end up on both sides.
    """
    is_first = np.zeros(len(hashes), dtype=bool)
    unique, first = np.unique(hashes, return_index=True)  # sorted
    is_first[first] = True
    n_val = min(len(unique) - 1, max(1, round(len(unique) * val_fraction)))
    return is_first, hashes <= unique[n_val - 1] if n_val > 0 else np.zeros(len(hashes), dtype=bool)


def write_token_files(
    scan: CorpusScan, tokenizer: Tokenizer, output: Path, val_fraction: float, block_size: int, bad_lines: BadLines
) -> list[str]:
    """The second pass over one stage's files: encode every record into its split's file; returns lines to report."""
    stage, has_samples = scan.stage, scan.stage != "pretrain"
    hashes = np.array(scan.record_hashes, dtype=np.uint64)
    is_kept, is_val = (np.zeros(len(hashes), dtype=bool) for _ in range(2))
    accepted = np.flatnonzero(np.array(scan.record_accepted, dtype=bool))
    is_kept[accepted], is_val[accepted] = deduplicate_and_split(hashes[accepted], val_fraction)
    if has_samples and not is_val.any():
        raise UserError(
            f"{scan.sources[0].path}: {is_kept.sum()} distinct sample(s); at least 2 are needed, one for validation"
        )
    val_start = int(scan.n_running_characters * (1 - val_fraction))  # running text: its last part is for validation
    paths = {split: output / f"{stage}_{split}.bin" for split in ("train", "val")}
    with contextlib.ExitStack() as stack:
        writers = {
            split: TokenFileWriter(stack.enter_context(atomic_write(path)), tokenizer.vocab_size, has_samples)
            for split, path in paths.items()
        }
        progress = stack.enter_context(progress_bar(scan.sources, f"encoding {stage}"))
        compression = None
        if not has_samples:  # in the background: it takes half a second
            executor = stack.enter_context(ThreadPoolExecutor(1))
            compression = executor.submit(compression_baselines, scan.compression_sample)
        record_index = position = 0  # position: in the running text, in characters
        for source in scan.sources:
            if has_samples:
                for record in corpus.chat_records(source, stage, bad_lines, progress):
                    for messages in record if is_kept[record_index] else ():
                        ids, mask = tokenizer.encode_chat(messages)
                        n_characters = sum(len(m["content"]) for m in messages if m["role"] == "assistant")
                        writers["val" if is_val[record_index] else "train"].add(ids, n_characters, mask)
                    record_index += 1
                continue
            for text, is_document in scan.documents(source, bad_lines, progress):
                if is_document:
                    if is_kept[record_index]:
                        ids = tokenizer.encode(text, special=True)
                        writers["val" if is_val[record_index] else "train"].add(ids, len(text))
                    record_index += 1
                    continue
                cut = max(0, val_start - position)
                for split, part in (("train", text[:cut]), ("val", text[cut:])):
                    if part:
                        writers[split].add(tokenizer.encode(part, special=True), len(part))
                position += len(text)
        if record_index != len(hashes) or position != scan.n_running_characters:
            raise UserError(f"{scan.sources[0].path}: the files changed while they were read; run data.py again")
        check_lengths(writers, scan, block_size)
        shared = {
            "stage": stage,
            "has_pairs": stage == "dpo",
            "tokenizer": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "val_fraction": val_fraction,
            "duplicates_removed": int(len(accepted) - is_kept.sum()),
            "dropped": dict(scan.cleaner.dropped),
            "sources": [source.describe() for source in scan.sources],
            "baselines": {**token_baselines(writers), **(compression.result() if compression else {})},
        }
        for split, writer in writers.items():
            writer.finish({**shared, "split": split})
    return report(writers, paths, shared, block_size)


def check_lengths(writers: dict[str, TokenFileWriter], scan: CorpusScan, block_size: int) -> None:
    train, val = writers["train"], writers["val"]
    if scan.stage == "pretrain" and train.n_tokens < block_size + 1:
        raise UserError(
            f"{scan.sources[0].path}: {train.n_tokens} training tokens are fewer than one window of "
            f"{block_size} + 1; add more text, or use a smaller --block_size here and in training"
        )
    if val.n_tokens < 2:
        raise UserError(f"{scan.sources[0].path}: the validation split is empty; add more text or raise --val_fraction")


def compression_baselines(sample: str) -> dict[str, float]:
    """What general-purpose compressors make of a text, in bits per character.

    A language model's loss in bits per character is the size it could compress the text to with arithmetic coding
    (Delétang et al. 2023, arXiv:2309.10668), so a trained model should get below these.
    """
    data = sample.encode("utf-8")
    lzma_filter = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 22}  # covers the sample in half the memory
    return {
        "zlib_bits_per_character": 8 * len(zlib.compress(data, 9)) / len(sample),
        "lzma_bits_per_character": 8 * len(lzma.compress(data, filters=[lzma_filter])) / len(sample),
    }


def token_baselines(writers: dict[str, TokenFileWriter]) -> dict[str, float]:
    """Validation losses, in nats per token, of two models that ignore the context.

    uniform: every token is equally likely, log(vocab_size); an untrained model is close to it.
    unigram: the probability of a token is its frequency in the training split.
    """
    train, val = writers["train"].counts, writers["val"].counts  # (vocab_size,)
    probability = (train + 1) / (train.sum() + len(train))  # add-one smoothing: log(0) cannot occur
    return {"uniform": math.log(len(train)), "unigram": float(-(val * np.log(probability)).sum() / max(1, val.sum()))}


def report(
    writers: dict[str, TokenFileWriter], paths: dict[str, Path], shared: dict[str, Any], block_size: int
) -> list[str]:
    lines = []
    for split, writer in writers.items():
        line = f"{paths[split]}: {writer.n_tokens:,} tokens"
        if writer.mask_file is not None:
            lengths = np.diff(writer.starts)
            line += f" in {len(lengths):,} samples, {writer.n_loss_tokens:,} of them in the loss (answers)"
            overlong = int((lengths > block_size + 1).sum())
            if overlong:
                line += f"; {overlong} samples are longer than block_size {block_size} (see the config field overlong)"
        elif writer.n_tokens < block_size + 1:
            line += f"; shorter than one window of {block_size} + 1: the validation loss will be unreliable"
        lines.append(line)
    if shared["duplicates_removed"]:
        lines.append(f"{shared['duplicates_removed']:,} exact duplicates removed")
    unknown = sum(writer.n_unknown for writer in writers.values())
    if unknown:
        total = sum(writer.n_tokens for writer in writers.values())
        lines.append(f"{unknown:,} of {total:,} tokens are <|unknown|>: characters not in the tokenizer's vocabulary")
    return lines


def make_tokenizer(kind: str, vocab_size: int, scans: list[CorpusScan]) -> Tokenizer:
    """Train a tokenizer ("char" or "bpe") on all stages' text, or load the one in the file that `kind` names."""
    codepoint_mask = np.logical_or.reduce([scan.codepoint_mask for scan in scans])
    if kind == "char":
        return CharTokenizer.from_codepoint_mask(codepoint_mask)
    if kind == "bpe":
        total = min(BPE_SAMPLE, sum(scan.n_characters for scan in scans))
        with tqdm(total=total, desc="learning BPE", unit="character", unit_scale=True, delay=1, leave=False) as bar:
            return BPETokenizer.train(bpe_training_texts(scans, bar), vocab_size)
    tokenizer = load_tokenizer(kind)
    characters = np.flatnonzero(codepoint_mask).astype("<u4").tobytes().decode("utf-32-le", "replace")
    unknown = tokenizer.unknown_characters(characters)
    if unknown:
        print(f"{kind}: {len(unknown):,} characters of the text are not in it: {unknown[:40]}", file=sys.stderr)
    return tokenizer


def bpe_training_texts(scans: list[CorpusScan], bar: tqdm) -> Iterator[str]:
    """Up to BPE_SAMPLE characters, the same share from the start of every stage's files, in short pieces."""
    ignored = BadLines(sys.maxsize)
    ignored.report = lambda *_: None  # they were reported in the first pass
    for scan in scans:
        budget = BPE_SAMPLE // len(scans)
        for source in scan.sources:
            if scan.stage != "pretrain":
                records = corpus.chat_records(source, scan.stage, ignored)
                texts = (message["content"] for record in records for messages in record for message in messages)
            else:
                texts = (text for text, _ in corpus.documents(source, ignored))
            for text in texts:
                for start in range(0, min(len(text), budget), 1 << 16):
                    piece = text[start : start + (1 << 16)]
                    budget -= len(piece)
                    bar.update(len(piece))
                    yield piece
                if budget <= 0:
                    break


# ---------------------------------------------------------------------------------------------------- inspection


def inspect(path: str, tokenizer_path: str, block_size: int, n_samples: int = 3) -> None:
    """Print the header, token statistics and a few samples of a token file."""
    file = TokenFile(path)
    header, tokens = file.header, file.tokens
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.fingerprint() != header["tokenizer"]:
        raise UserError(
            f"{path} was encoded with another tokenizer than {tokenizer_path}; pass the right one with --tokenizer FILE"
        )
    print(f"{path}: stage {header['stage']}, split {header['split']}, format {header['format']}")
    for source in header["sources"]:
        print(f"  from {source['path']}: {source['bytes']:,} bytes, sha256 {source['sha256'][:16]}")
    print(
        f"  {header['n_tokens']:,} tokens ({tokens.dtype}), vocabulary size {header['vocab_size']:,}, "
        f"{header['n_characters']:,} characters"
    )
    print(f"  {header['duplicates_removed']:,} duplicates removed, {header['n_unknown']:,} unknown tokens")
    print("  baselines: " + ", ".join(f"{name} {value:.3f}" for name, value in header["baselines"].items()))

    counts = np.zeros(header["vocab_size"], dtype=np.int64)
    for start in range(0, len(tokens), 1 << 22):
        counts += np.bincount(tokens[start : start + (1 << 22)], minlength=len(counts))
    order = np.argsort(-counts, kind="stable")[:20]
    print("most frequent: " + "  ".join(f"{tokenizer.decode([i])!r} {counts[i] / len(tokens):.2%}" for i in order))
    print("special tokens: " + "  ".join(f"{token} {counts[i]:,}" for i, token in enumerate(SPECIAL_TOKENS)))
    print(f"used: {np.count_nonzero(counts):,} of {len(counts):,} tokens of the vocabulary")

    if file.starts is not None:
        lengths = np.diff(file.starts)
        print(f"samples: {len(lengths):,}; share of tokens masked out of the loss: {1 - file.loss_mask.mean():.1%}")
        print(f"longer than block_size {block_size}: {(lengths > block_size + 1).sum():,}")
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 11)).astype(int))
        heights, edges = np.histogram(lengths, bins=edges if len(edges) > 1 else 1)
        for height, low, high in zip(heights, edges, edges[1:], strict=False):
            print(f"  {int(low):6}..{int(high):<6} {'#' * round(50 * height / heights.max())} {height:,}")
    batch_size = 32
    if file.starts is not None or len(tokens) > block_size:
        batches = TrainBatches(
            [file],
            block_size=block_size,
            vocab_size=header["vocab_size"],
            batch_size=batch_size,
            accumulation_steps=1,
            seed=1337,
        )
        rows = [batches.sample(i)[0] for i in range(min(batch_size, batches.samples_per_epoch))]
        ngrams = Counter(tuple(row[i : i + 8]) for row in rows for i in range(len(row) - 7))
        print(
            f"a batch of {len(rows)}: {len({row.tobytes() for row in rows})} distinct samples, "
            f"{len(set(np.concatenate(rows).tolist()))} distinct tokens, "
            f"{len(ngrams) / max(1, ngrams.total()):.0%} of its 8-grams distinct"
        )
        for row in rows[:n_samples]:
            print(f"sample: {tokenizer.decode(row[:200])!r}")


# ---------------------------------------------------------------------------------------------------- command line


def make_parser() -> Parser:
    parser = Parser(__doc__, CleaningConfig)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="*", help="raw text files or folders [default: those in the output folder]")
    parser.add_argument(
        "--tokenizer", metavar="KIND", default=None, help="char, bpe, or a tokenizer file to reuse [default: char]"
    )
    parser.add_argument("--vocab_size", metavar="N", type=int, default=4096, help="vocabulary size for BPE [4096]")
    parser.add_argument(
        "--val_fraction", metavar="X", type=float, default=0.1, help="share of the data for validation [0.1]"
    )
    parser.add_argument("--output", metavar="FOLDER", default="dataset", help="folder for the token files [dataset]")
    parser.add_argument(
        "--block_size",
        metavar="N",
        type=int,
        default=None,
        help="context window to check sample lengths against [config/model.json]",
    )
    parser.add_argument(
        "--max_bad_lines", metavar="N", type=int, default=10, help="malformed jsonl lines to skip before giving up [10]"
    )
    parser.add_argument("--inspect", metavar="FILE", help="print statistics and samples of a token file")
    return parser


def main() -> None:
    args, overrides = make_parser().parse()
    try:
        cleaning = CleaningConfig(**overrides)
    except UserError as error:
        raise UserError(f"command line: {error}") from None
    output = Path(args.output)
    if args.block_size is None:
        args.block_size = read_json(find_config("model")).get("block_size", 256)
    if not 0 < args.val_fraction < 1:
        raise UserError(f"command line: --val_fraction must be between 0 and 1, got {args.val_fraction}")
    if args.block_size < 1:
        raise UserError(f"command line: --block_size must be at least 1, got {args.block_size}")
    if args.inspect:
        inspect(args.inspect, args.tokenizer or str(Path(args.inspect).parent / "tokenizer.json"), args.block_size)
        return

    paths = args.files or [str(output / name) for name in DEFAULT_FILES if (output / name).exists()]
    if not paths:
        raise UserError(
            f"nothing to prepare: put text into {output}/pretrain.txt or conversations into {output}/sft.jsonl"
        )
    start = time.perf_counter()
    sources = corpus.find_sources(paths)
    by_stage: dict[str, list[Source]] = {}
    for source in sources:
        by_stage.setdefault(corpus.stage_of(source), []).append(source)
    bad_lines = BadLines(args.max_bad_lines)
    scans = [scan_corpus(stage, group, bad_lines, Cleaner(cleaning)) for stage, group in by_stage.items()]
    tokenizer = make_tokenizer(args.tokenizer or "char", args.vocab_size, scans)
    lines = []
    for scan in scans:
        lines += write_token_files(scan, tokenizer, output, args.val_fraction, args.block_size, bad_lines)
        lines += scan.cleaner.report()
    tokenizer.save(output / "tokenizer.json")
    print("\n".join(lines))
    size, seconds = sum(source.bytes for source in sources) / 1e6, time.perf_counter() - start
    print(f"{output / 'tokenizer.json'}: {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}")
    print(f"{size:.1f} MB prepared in {seconds:.1f} s")


if __name__ == "__main__":
    run_main(main)
