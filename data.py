"""Raw text to token files.

    python data.py                              dataset/pretrain.txt and dataset/sft.jsonl, where they exist
    python data.py book.txt more/ old.txt.gz    any text, jsonl, folders, gzip; what a file is for shows in its lines
    python data.py --tokenizer bpe --vocab_size 4096
    python data.py --inspect dataset/sft_train.bin

Writes dataset/tokenizer.json and, per stage, dataset/STAGE_train.bin and dataset/STAGE_val.bin (batches.py reads them).
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

COMPRESSED_SAMPLE = 1_000_000  # characters of the corpus that zlib and lzma are tried on
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


class Scan:
    """The first pass over one stage's files: what must be known before anything can be written."""

    def __init__(self, stage: str, sources: list[Source], cleaner: Cleaner) -> None:
        self.stage, self.sources, self.cleaner = stage, sources, cleaner
        self.hashes = array("Q")  # of documents or conversations, in order
        self.is_clean = array("b")  # of each: whether the cleaner keeps it
        self.running_characters = 0  # outside documents
        self.n_characters = 0
        self.seen = np.zeros(UNICODE_SIZE, dtype=bool)
        self.sample = ""

    def judge(self, unit: str, text: str) -> bool:
        """Take note of a unit; returns whether it is kept. Exact duplicates are left to split_units()."""
        self.hashes.append(unit_hash(unit))
        self.is_clean.append(self.cleaner.keeps(text))
        return bool(self.is_clean[-1])

    def documents(
        self, source: Source, bad_lines: BadLines, progress: Callable[[int], None]
    ) -> Iterator[tuple[str, bool]]:
        """corpus.documents, those split that are too long."""
        longest = self.cleaner.config.split_documents
        for text, is_document in corpus.documents(source, bad_lines, progress):
            if is_document and longest and len(text) > longest:
                for piece in split_at_sentences(remove_special_tokens(text), longest):
                    if piece.strip():
                        yield f"<|bos|>{piece.strip()}<|eos|>", True
            else:
                yield text, is_document

    def see(self, text: str) -> None:
        text = remove_special_tokens(text) if self.stage == "pretrain" else text
        mark_characters(self.seen, text)
        self.n_characters += len(text)
        if len(self.sample) < COMPRESSED_SAMPLE:
            self.sample += text[: COMPRESSED_SAMPLE - len(self.sample)]


def unit_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def conversation_text(messages: Messages) -> str:
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


@contextlib.contextmanager
def progress_bar(sources: list[Source], what: str) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of the files, with the time left; shown where it takes more than a moment."""
    total = None if any(s.path.suffix == ".gz" for s in sources) else sum(s.path.stat().st_size for s in sources)
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=1, leave=False, dynamic_ncols=True) as bar:
        yield bar.update


def scan(stage: str, sources: list[Source], bad_lines: BadLines, cleaner: Cleaner) -> Scan:
    """Read a stage's files once: characters, hashes of the units, sizes."""
    result = Scan(stage, sources, cleaner)
    with progress_bar(sources, f"reading {stage}") as progress:
        for source in sources:
            if stage != "pretrain":
                for unit in corpus.samples(source, stage, bad_lines, progress):
                    texts = "\n".join(message["content"] for messages in unit for message in messages)
                    if not result.judge("".join(map(conversation_text, unit)), texts):
                        continue
                    for message in itertools.chain.from_iterable(unit):
                        result.see(message["content"])
                        result.seen[ord("\n")] |= message["role"] == "system"  # the template puts one after it
            else:
                for text, is_document in result.documents(source, bad_lines, progress):
                    if is_document:
                        if not result.judge(text, remove_special_tokens(text)):
                            continue
                    else:
                        result.running_characters += len(text)
                    result.see(text)
    if not result.n_characters:
        why = "; ".join(["no text", *cleaner.report()])
        raise UserError(f"{', '.join(str(source.path) for source in sources)}: nothing to learn from: {why}")
    return result


def split_units(hashes: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Which units to keep (each distinct one once), and which belong to validation: two boolean arrays.

    The hash of its contents decides a unit's side, so that equal units can never be on both.
    """
    keep = np.zeros(len(hashes), dtype=bool)
    unique, first = np.unique(hashes, return_index=True)
    keep[first] = True
    n_val = min(len(unique) - 1, max(1, round(len(unique) * val_fraction)))
    return keep, hashes <= unique[n_val - 1] if n_val > 0 else np.zeros(len(hashes), dtype=bool)


def write_split_files(
    scanned: Scan, tokenizer: Tokenizer, output: Path, val_fraction: float, block_size: int, bad_lines: BadLines
) -> list[str]:
    """The second pass over one stage's files: encode every unit into its split's file; returns lines to report."""
    stage, has_samples = scanned.stage, scanned.stage != "pretrain"
    hashes = np.array(scanned.hashes, dtype=np.uint64)
    keep, is_val = (np.zeros(len(hashes), dtype=bool) for _ in range(2))
    clean = np.flatnonzero(np.array(scanned.is_clean, dtype=bool))
    keep[clean], is_val[clean] = split_units(hashes[clean], val_fraction)
    if has_samples and not is_val.any():
        raise UserError(
            f"{scanned.sources[0].path}: {keep.sum()} distinct sample(s); at least 2 are needed, one to validate on"
        )
    cut = int(scanned.running_characters * (1 - val_fraction))  # running text: the last part validates
    paths = {split: output / f"{stage}_{split}.bin" for split in ("train", "val")}
    with contextlib.ExitStack() as stack:
        writers = {
            split: TokenFileWriter(stack.enter_context(atomic_write(path)), tokenizer.vocab_size, has_samples)
            for split, path in paths.items()
        }
        progress = stack.enter_context(progress_bar(scanned.sources, f"encoding {stage}"))
        compression = None
        if not has_samples:  # meanwhile: it takes half a second
            compression = stack.enter_context(ThreadPoolExecutor(1)).submit(compressed, scanned.sample)
        number = position = 0
        for source in scanned.sources:
            if has_samples:
                for unit in corpus.samples(source, stage, bad_lines, progress):
                    for messages in unit if keep[number] else ():
                        ids, mask = tokenizer.encode_chat(messages)
                        answers = sum(len(m["content"]) for m in messages if m["role"] == "assistant")
                        writers["val" if is_val[number] else "train"].add(ids, answers, mask)
                    number += 1
                continue
            for text, is_document in scanned.documents(source, bad_lines, progress):
                if is_document:
                    if keep[number]:
                        writers["val" if is_val[number] else "train"].add(
                            tokenizer.encode(text, special=True), len(text)
                        )
                    number += 1
                    continue
                at = max(0, cut - position)
                for split, part in (("train", text[:at]), ("val", text[at:])):
                    if part:
                        writers[split].add(tokenizer.encode(part, special=True), len(part))
                position += len(text)
        if number != len(hashes) or position != scanned.running_characters:
            raise UserError(f"{scanned.sources[0].path}: the files changed while they were read; run data.py again")
        check_lengths(writers, scanned, block_size)
        shared = {
            "stage": stage,
            "has_pairs": stage == "dpo",
            "tokenizer": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "val_fraction": val_fraction,
            "duplicates_removed": int(len(clean) - keep.sum()),
            "dropped": dict(scanned.cleaner.dropped),
            "sources": [source.describe() for source in scanned.sources],
            "baselines": {**baselines(writers), **(compression.result() if compression else {})},
        }
        for split, writer in writers.items():
            writer.finish({**shared, "split": split})
    return report(writers, paths, shared, block_size)


def check_lengths(writers: dict[str, TokenFileWriter], scanned: Scan, block_size: int) -> None:
    train, val = writers["train"], writers["val"]
    if scanned.stage == "pretrain" and train.n_tokens < block_size + 1:
        raise UserError(
            f"{scanned.sources[0].path}: {train.n_tokens} tokens for training are fewer than one window of "
            f"{block_size} + 1; bring more text, or a smaller --block_size here and in training"
        )
    if val.n_tokens < 2:
        raise UserError(
            f"{scanned.sources[0].path}: nothing is left to validate on; bring more text or raise --val_fraction"
        )


def compressed(sample: str) -> dict[str, float]:
    """A text as general-purpose compressors leave it, in bits per character."""
    data = sample.encode("utf-8")
    lzma_filter = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 22}  # as long as a sample: half the memory
    return {
        "zlib_bits_per_character": 8 * len(zlib.compress(data, 9)) / len(sample),
        "lzma_bits_per_character": 8 * len(lzma.compress(data, filters=[lzma_filter])) / len(sample),
    }


def baselines(writers: dict[str, TokenFileWriter]) -> dict[str, float]:
    """The losses that a model must beat, in nats per token."""
    train, val = writers["train"].counts, writers["val"].counts
    probability = (train + 1) / (train.sum() + len(train))  # add-one smoothing: no token is impossible
    return {"uniform": math.log(len(train)), "unigram": float(-(val * np.log(probability)).sum() / max(1, val.sum()))}


def report(
    writers: dict[str, TokenFileWriter], paths: dict[str, Path], shared: dict[str, Any], block_size: int
) -> list[str]:
    lines = []
    for split, writer in writers.items():
        line = f"{paths[split]}: {writer.n_tokens:,} tokens"
        if writer.mask_file is not None:
            lengths = np.diff(writer.starts)
            line += f" in {len(lengths):,} samples, {writer.n_loss_tokens:,} of them answers"
            overlong = int((lengths > block_size + 1).sum())
            if overlong:
                line += (
                    f"; {overlong} are longer than block_size {block_size} (the training field overlong: drop or cut)"
                )
        elif writer.n_tokens < block_size + 1:
            line += f"; shorter than one window of {block_size} + 1: a poor measure"
        lines.append(line)
    if shared["duplicates_removed"]:
        lines.append(f"{shared['duplicates_removed']:,} exact duplicates removed")
    unknown = sum(writer.n_unknown for writer in writers.values())
    if unknown:
        total = sum(writer.n_tokens for writer in writers.values())
        lines.append(f"{unknown:,} of {total:,} tokens are <|unknown|>: characters that the tokenizer does not have")
    return lines


def make_tokenizer(kind: str, vocab_size: int, scans: list[Scan]) -> Tokenizer:
    """A tokenizer for all the text that was scanned, or the one in the file that `kind` names."""
    seen = np.logical_or.reduce([result.seen for result in scans])
    if kind == "char":
        return CharTokenizer.from_seen(seen)
    if kind == "bpe":
        total = min(BPE_SAMPLE, sum(result.n_characters for result in scans))
        with tqdm(total=total, desc="learning BPE", unit="character", unit_scale=True, delay=1, leave=False) as bar:
            return BPETokenizer.train(sample_texts(scans, bar), vocab_size)
    tokenizer = load_tokenizer(kind)
    characters = np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le", "replace")
    unknown = tokenizer.unknown_characters(characters)
    if unknown:
        print(f"{kind}: {len(unknown):,} characters of the text are not in it: {unknown[:40]}", file=sys.stderr)
    return tokenizer


def sample_texts(scans: list[Scan], bar: tqdm) -> Iterator[str]:
    """The texts that BPE learns from: from the start of every stage, in short pieces, up to BPE_SAMPLE characters."""
    ignored = BadLines(sys.maxsize)
    ignored.report = lambda *_: None  # they were reported in the first pass
    for result in scans:
        budget = BPE_SAMPLE // len(scans)
        for source in result.sources:
            if result.stage != "pretrain":
                units = corpus.samples(source, result.stage, ignored)
                texts = (message["content"] for unit in units for messages in unit for message in messages)
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
    """Print what is inside a prepared file."""
    file = TokenFile(path)
    header, tokens = file.header, file.tokens
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.fingerprint() != header["tokenizer"]:
        raise UserError(
            f"{path} was prepared with another tokenizer than {tokenizer_path} (--tokenizer FILE names the right one)"
        )
    print(f"{path}: stage {header['stage']}, split {header['split']}, format {header['format']}")
    for source in header["sources"]:
        print(f"  from {source['path']}: {source['bytes']:,} bytes, sha256 {source['sha256'][:16]}")
    print(
        f"  {header['n_tokens']:,} tokens ({tokens.dtype}) of a vocabulary of {header['vocab_size']:,}, "
        f"{header['n_characters']:,} characters"
    )
    print(f"  {header['duplicates_removed']:,} duplicates removed, {header['n_unknown']:,} unknown")
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
        reader = TrainBatches(
            [file],
            block_size=block_size,
            vocab_size=header["vocab_size"],
            batch_size=batch_size,
            accumulation_steps=1,
            seed=1337,
        )
        rows = [reader.sample(i)[0] for i in range(min(batch_size, reader.samples_per_epoch))]
        grams = Counter(tuple(row[i : i + 8]) for row in rows for i in range(len(row) - 7))
        print(
            f"a batch of {len(rows)}: {len({row.tobytes() for row in rows})} distinct samples, "
            f"{len(set(np.concatenate(rows).tolist()))} distinct tokens, "
            f"{len(grams) / max(1, grams.total()):.0%} of its 8-token sequences distinct"
        )
        for row in rows[:n_samples]:
            print(f"sample: {tokenizer.decode(row[:200])!r}")


# ---------------------------------------------------------------------------------------------------- command line


def make_parser() -> Parser:
    parser = Parser(__doc__, CleaningConfig)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="*", help="raw text files or folders [default: the ones in the output folder]")
    parser.add_argument("--tokenizer", default=None, help="char, bpe, or a tokenizer file to reuse [default: char]")
    parser.add_argument("--vocab_size", type=int, default=4096, help="size of the vocabulary that BPE learns [4096]")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="share of the data to validate on [0.1]")
    parser.add_argument("--output", default="dataset", help="folder of the prepared files [dataset]")
    parser.add_argument(
        "--block_size", type=int, default=None, help="context window to check lengths against [config/model.json's]"
    )
    parser.add_argument("--max_bad_lines", type=int, default=10, help="jsonl lines that may be skipped [10]")
    parser.add_argument("--inspect", metavar="FILE", help="print what is inside a prepared file")
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
            f"nothing to prepare: put text into {output}/pretrain.txt and questions into {output}/sft.jsonl"
        )
    began = time.perf_counter()
    sources = corpus.find_sources(paths)
    by_stage: dict[str, list[Source]] = {}
    for source in sources:
        by_stage.setdefault(corpus.stage_of(source), []).append(source)
    bad_lines = BadLines(args.max_bad_lines)
    scans = [scan(stage, group, bad_lines, Cleaner(cleaning)) for stage, group in by_stage.items()]
    tokenizer = make_tokenizer(args.tokenizer or "char", args.vocab_size, scans)
    lines = []
    for result in scans:
        lines += write_split_files(result, tokenizer, output, args.val_fraction, args.block_size, bad_lines)
        lines += result.cleaner.report()
    tokenizer.save(output / "tokenizer.json")
    print("\n".join(lines))
    size, seconds = sum(source.bytes for source in sources) / 1e6, time.perf_counter() - began
    print(f"{output / 'tokenizer.json'}: {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}")
    print(f"{size:.1f} MB prepared in {seconds:.1f} s")


if __name__ == "__main__":
    run_main(main)
