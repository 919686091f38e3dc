"""Tokenise raw text: train a tokenizer, filter and deduplicate, split into training and validation, write token files.

    python data.py                                   the files pretrain.*, sft.*, vision.* and dpo.* in dataset/
    python data.py book.txt notes/ questions.csv     text, JSON, CSV, Parquet; folders, archives, compressed or not
    python data.py qa.json --fields question=Q answer=A      other names of fields
    python data.py dataset/vision.jsonl              questions about images: lines with "image": "file.png"
    python data.py --tokenizer bpe --vocab_size 4096
    python data.py --inspect dataset/sft_train.bin

Writes dataset/tokenizer.json and, per stage, dataset/STAGE_train.bin and dataset/STAGE_val.bin. What a file is for (the
stage) shows in its contents. Every file is read twice, so that memory does not grow with the corpus: scan_corpus()
collects what must be known first (the characters, a hash of every record), write_token_files() encodes.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from base.configuration import (
    BOOLEANS,
    Parser,
    UserError,
    command_line,
    did_you_mean,
    escape_control_characters,
    find_config,
    read_json,
    run_main,
)
from base.files import atomic_write
from text import corpus
from text.baselines import compression_baselines, token_baselines
from text.cleaning import Cleaner, CleaningConfig
from text.corpus import BadLines
from text.encodings import check_encoding
from text.formats import Source, parse_fields
from text.inspection import inspect
from text.scan import SPLIT_BY, CorpusScan, progress_bar, scan_corpus, some_names
from text.splitting import Split
from text.token_files import (
    HEADER_SIZE,
    TokenFile,
    TokenFileWriter,
    arguments_for_all,
    how_images_are_read,
    read_header,
)
from text.tokenizer import BPETokenizer, CharTokenizer, Messages, Tokenizer, remove_special_tokens
from text.tokenizer_files import load_tokenizer

BPE_SAMPLE = 50_000_000  # characters that BPE merges are learned from
N_LEFT_OUT = 10  # files left out that are named
STAGES = ("pretrain", "sft", "vision", "dpo")


# ------------------------------------------------------------------------------------------------------ second pass


def write_token_files(
    scan: CorpusScan,
    tokenizer: Tokenizer,
    bad_lines: BadLines,
    files: contextlib.ExitStack,
    args: argparse.Namespace,
    shared: dict[str, Any],
) -> list[str]:
    """The second pass over one stage's files: encode every record into its split's file; returns lines to report.

    files: the token files appear when it is closed.
    """
    split = Split(scan, args.val_fraction)
    stage, has_samples = scan.stage, scan.stage != "pretrain"
    paths = {name: Path(args.output) / f"{stage}_{name}.bin" for name in ("train", "val")}
    sources = [source.describe() for source in scan.sources]
    header_size = HEADER_SIZE + 2 * len(json.dumps(sources)) // 4096 * 4096
    writers = {
        name: TokenFileWriter(files.enter_context(atomic_write(path)), tokenizer, has_samples, header_size)
        for name, path in paths.items()
    }
    with progress_bar(scan.sources, f"encoding {stage}") as progress, ThreadPoolExecutor(1) as executor:
        compression = executor.submit(compression_baselines, scan.compression_sample) if not has_samples else None
        if has_samples:
            records = (r for s in scan.sources for r in corpus.chat_records(s, bad_lines, progress, scan.image_size))
            n_patches = (args.image_size // args.patch_size) ** 2
            n_records = write_chats(records, split, tokenizer, writers, n_patches, args.image_last)
        else:
            documents = (d for s in scan.sources for d in scan.documents(s, bad_lines, progress))
            n_records = write_documents(documents, split, tokenizer, writers)
        if n_records != len(scan.hashes):
            raise UserError(f"{scan.sources[0].name}: the files changed while they were read; run data.py again")
        check_lengths(writers, scan, args.block_size)
        baselines = token_baselines(writers["train"].counts, writers["val"].counts)
        shared = {
            "stage": stage,
            "has_pairs": stage == "dpo",
            "tokenizer": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "bos": tokenizer.bos,
            "eos": tokenizer.eos,
            "val_fraction": args.val_fraction,
            "duplicates_removed": split.n_duplicates,
            "empty_removed": scan.n_empty,
            "dropped": dict(scan.cleaner.dropped),
            "sources": sources,
            "baselines": {**baselines, **(compression.result() if compression else {})},
            **(how_images_are_read(vars(args)) if stage == "vision" else {}),
            **shared,
        }
        for name, writer in writers.items():
            writer.finish({**shared, "split": name})
    return report(writers, paths, scan, split, args)


def write_documents(
    documents: Iterator[tuple[str, bool, bool, str]],
    split: Split,
    tokenizer: Tokenizer,
    writers: dict[str, TokenFileWriter],
) -> int:
    """Encode documents, each as <|bos|>text<|eos|> (or what the tokenizer has for that); returns their number."""
    record = start = 0  # start: characters of the document before this piece
    delimit = split.n_kept > 1  # a text alone has no neighbours to be delimited from
    for text, begins, ends, _ in documents:
        if split.is_kept[record]:
            parts = split.parts(record, text, start)
            for i, (name, part) in enumerate(parts):
                is_first, is_last = delimit and begins and i == 0, delimit and ends and i == len(parts) - 1
                ids = tokenizer.delimit([tokenizer.encode(part, special=True)], is_first, is_last)
                writers[name].add(ids, len(remove_special_tokens(part)))
        start = 0 if ends else start + len(text)
        record += ends
    return record


def write_chats(
    records: Iterator[list[Messages]],
    split: Split,
    tokenizer: Tokenizer,
    writers: dict[str, TokenFileWriter],
    n_patches: int = 0,
    image_last: bool = True,
) -> int:
    """Encode conversations, or the two of a preference pair; returns their number.

    n_patches: of an image; image_last: where it stands.
    """
    record = -1
    for record, conversations in enumerate(records):
        for messages in conversations if split.is_kept[record] else ():
            ids, mask = tokenizer.encode_chat(messages, n_patches, image_last)
            image = next((message["image"] for message in messages if "image" in message), None)
            answers = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
            n_characters = sum(len(message["content"]) for message in answers)
            writers["val" if split.is_val[record] else "train"].add(ids, n_characters, mask, image)
    return record + 1


def check_lengths(writers: dict[str, TokenFileWriter], scan: CorpusScan, block_size: int) -> None:
    train, val = writers["train"], writers["val"]
    if not train.n_tokens:
        raise UserError("the training split is empty; add more data or lower --val_fraction")
    names = some_names([source.name for source in scan.sources])
    if scan.stage == "pretrain" and train.n_tokens < block_size + 1:
        raise UserError(
            f"{names}: {train.n_tokens} training tokens are fewer than one window of "
            f"{block_size} + 1; add more text, or use a smaller --block_size here and in training"
        )
    if val.n_tokens < 2:
        raise UserError(f"{names}: the validation split is empty; add more text or raise --val_fraction")


# ------------------------------------------------------------------------------------------------------ the report


def report(
    writers: dict[str, TokenFileWriter], paths: dict[str, Path], scan: CorpusScan, split: Split, args: Any
) -> list[str]:
    forms = sorted({source.form for source in scan.sources})
    result = [f"{scan.stage}: {', '.join(forms)} from {some_names([source.name for source in scan.sources])}"]
    noun = "pairs" if scan.stage == "dpo" else "samples"
    for name, writer in writers.items():
        line = f"{paths[name]}: {writer.n_tokens:,} tokens"
        if writer.mask_file is not None:
            n_samples = (len(writer.starts) - 1) // (1 + (scan.stage == "dpo"))
            about = f" about {len(writer.image_numbers):,} images" if writer.image_numbers else ""
            line += f" in {n_samples:,} {noun}{about}, {writer.n_loss_tokens:,} of them in the loss (answers)"
        elif writer.n_tokens < args.block_size + 1:
            line += f"; shorter than one window of {args.block_size} + 1: the validation loss will be unreliable"
        result.append(line)
    if split.n_cut:
        which = "the text" if split.n_kept == 1 else f"each of {split.n_cut:,} large documents"
        result.append(f"for validation: the last {100 * args.val_fraction:g}% of {which}")
    if split.n_duplicates:
        result.append(f"{split.n_duplicates:,} exact duplicates removed")
    if scan.n_empty:
        result.append(f"{scan.n_empty:,} empty left out")
    if scan.stage == "sft":
        answers = np.array(scan.answers, dtype=np.uint64)
        val, train = (answers[split.is_kept & side] for side in (split.is_val, ~split.is_val))
        if n_known := int(np.isin(val, train).sum()):
            advice = "" if scan.split_by == "answer" else "; --split_by answer keeps them apart"
            result.append(f"{n_known:,} of {len(val):,} validation answers are also answers in training{advice}")
    if scan.stage != "pretrain":
        result += window_advice(writers, args.block_size, noun)
    unknown = sum(writer.n_unknown for writer in writers.values())
    if unknown:
        total = sum(writer.n_tokens for writer in writers.values())
        result.append(f"{unknown:,} of {total:,} tokens are <|unknown|>: characters not in the tokenizer's vocabulary")
    return result + scan.cleaner.report()


def window_advice(writers: dict[str, TokenFileWriter], block_size: int, noun: str) -> list[str]:
    """What a context window of block_size holds of the samples, and which one would hold more."""
    lengths = np.concatenate([np.diff(writer.starts) for writer in writers.values()])
    if noun == "pairs":
        lengths = lengths.reshape(-1, 2).max(1)
    n_long = int((lengths > block_size + 1).sum())
    if not n_long:
        return []
    window = 16
    while window <= block_size or (lengths <= window + 1).mean() < 0.98:  # it holds block_size + 1 tokens of a sample
        window *= 2
    share = math.floor(100 * (lengths <= window + 1).mean())
    return [
        f"{n_long:,} of {len(lengths):,} {noun} are longer than block_size {block_size} and would be left out "
        f"(overlong); {window} holds {share}%"
    ]


# ------------------------------------------------------------------------------------------------------ tokenizers


def choose_tokenizer(kind: str | None, vocab_size: int | None, scans: list[CorpusScan], output: Path) -> Tokenizer:
    """A new tokenizer for all stages' text ("char" or "bpe"), or the one in the file that `kind` names.

    Without a kind, one that exists stays where only later stages are prepared: a model was trained with it, or will be.
    """
    existing = output / "tokenizer.json"
    if kind is None:
        is_later = not any(scan.stage == "pretrain" for scan in scans)
        kind = str(existing) if is_later and existing.exists() else "char"
    if vocab_size is not None and kind != "bpe":
        raise UserError("--vocab_size is for --tokenizer bpe: other vocabularies are as large as they are")
    codepoint_mask = np.logical_or.reduce([scan.codepoint_mask for scan in scans])
    if kind == "char":
        return CharTokenizer.from_codepoint_mask(codepoint_mask)
    if kind == "bpe":
        total = min(BPE_SAMPLE, sum(scan.n_characters for scan in scans))
        with tqdm(total=total, desc="learning BPE", unit="character", unit_scale=True, delay=1, leave=False) as bar:
            return BPETokenizer.train(bpe_training_texts(scans, bar), vocab_size or 4096)
    tokenizer = open_tokenizer(kind)
    characters = np.flatnonzero(codepoint_mask).astype("<u4").tobytes().decode("utf-32-le", "replace")
    unknown = tokenizer.unknown_characters(characters)
    if unknown:
        shown = escape_control_characters(unknown[:40])
        print(f"{kind}: {len(unknown):,} characters of the text are not in it: {shown}", file=sys.stderr)
    return tokenizer


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer in a file of its own or in a checkpoint."""
    path = Path(name)
    if not path.exists():
        guess = did_you_mean(name.lower(), ("char", "bpe"))
        raise UserError(f"--tokenizer {name}: no such file; it is char, bpe, a tokenizer file or a checkpoint{guess}")
    is_checkpoint = path.is_dir()
    if path.is_file():
        with open(path, "rb") as file:
            # torch.save() writes a zip archive; of a model of llama.cpp's, load_checkpoint() says what to do with it
            is_checkpoint = file.read(4) in (b"PK\3\4", b"GGUF")
    if not is_checkpoint:
        return load_tokenizer(name)
    from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer

    return load_checkpoint_tokenizer(load_checkpoint(name), name)


def bpe_training_texts(scans: list[CorpusScan], bar: tqdm) -> Iterator[str]:
    """Up to BPE_SAMPLE characters, the same share from the start of every stage's files, in short pieces."""
    ignored = BadLines(sys.maxsize)
    ignored.report = lambda *_: None  # they were reported in the first pass
    for scan in scans:
        budget = BPE_SAMPLE // len(scans)
        for source in scan.sources:
            if scan.stage == "pretrain":
                texts = (text for text, _, _ in corpus.documents(source, ignored))
            else:
                records = corpus.chat_records(source, ignored)
                texts = (message["content"] for record in records for messages in record for message in messages)
            for text in texts:
                for start in range(0, min(len(text), budget), 1 << 16):
                    piece = text[start : start + (1 << 16)]
                    budget -= len(piece)
                    bar.update(len(piece))
                    yield piece
                if budget <= 0:
                    break
            if budget <= 0:
                break


def save_tokenizer(tokenizer: Tokenizer, path: Path, files: contextlib.ExitStack, is_asked_for: bool) -> str:
    """Write the tokenizer file, the one before kept as NAME.bak; returns a line to report."""
    kind = "that of another model" if tokenizer.kind == "foreign" else tokenizer.kind
    line = f"{path}: {kind}, vocabulary {tokenizer.vocab_size:,}"
    contents = tokenizer.to_bytes()
    before = path.read_bytes() if path.is_file() else None
    if before == contents and not is_asked_for:
        line += "; it was there and fits, so it is kept"
    elif before not in (None, contents):
        line += f"; the one before is kept as {path.name}.bak"
    files.enter_context(atomic_write(path)).write(contents)
    if before not in (None, contents):  # what is entered last appears first: at no time is there neither
        files.enter_context(atomic_write(path.with_name(path.name + ".bak"))).write(before)
    return line


# ------------------------------------------------------------------------------------------------------ command line


def make_parser() -> Parser:
    parser = Parser(__doc__, CleaningConfig)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("files", nargs="*", help="raw files, folders or archives [those named after a stage in the output folder]")
    add(
        "--fields",
        metavar="OURS=NAME",
        nargs="+",
        action="extend",
        default=[],
        help="other names of fields: question=Q answer=A",
    )
    add("--encoding", metavar="NAME", default="utf-8", help="of files that are not UTF-8: gbk, latin-1, utf-16 [utf-8]")
    add("--plain_text", action="store_true", help="read everything as text, also what looks like JSON or CSV")
    add("--tokenizer", metavar="KIND", help="char, bpe, a tokenizer file or a checkpoint [char, or the one there is]")
    add("--vocab_size", metavar="N", type=int, help="vocabulary size for BPE [4096]")
    add("--val_fraction", metavar="X", type=float, default=0.1, help="share of the data for validation [0.1]")
    add("--split_by", choices=SPLIT_BY, default="sample", help="fine-tuning: what may not be on both sides [sample]")
    add("--output", metavar="FOLDER", default="dataset", help="folder for the token files [dataset]")
    add("--block_size", metavar="N", type=int, help="context window to check lengths against [config/model.json]")
    add("--image_size", metavar="N", type=int, help="width and height that images get [config/vision.json]")
    add("--patch_size", metavar="N", type=int, help="those of the patches they are read in [config/vision.json]")
    switch = {"metavar": "true|false", "choices": BOOLEANS}
    add("--image_last", **switch, help="images stand after their questions, not before [config/vision.json]")
    add("--max_bad_lines", metavar="N", type=int, default=10, help="bad records to skip before giving up [10]")
    add("--inspect", metavar="FILE", help="print statistics and samples of a token file")
    return parser


def check_fields_seen(pairs: list[str], sources: list[Source]) -> None:
    """Raises UserError for a --fields that no file has, which would have no effect."""
    names = set().union(*(source.fields_seen for source in sources))
    if pairs and not names:
        raise UserError(f"--fields: {some_names([source.name for source in sources])}: plain text, which has no fields")
    for name in parse_fields(pairs):
        if name not in names:
            hint = did_you_mean(name, names) or f"; there are {', '.join(sorted(names))[:200]}"
            raise UserError(f"--fields: no record of the first ones has a field {name!r}{hint}")


def default_files(output: Path) -> list[str]:
    """The files named after a stage in the output folder; raises UserError if there are none."""
    found = [p for p in sorted(output.glob("*")) if p.is_file() and p.name.split(".")[0] in STAGES]
    found = [str(path) for path in found if path.suffix not in (".bin", ".bak", ".tmp")]
    if not found:
        raise UserError(
            f"nothing to prepare: put text into {output}/pretrain.txt or conversations into {output}/sft.jsonl"
        )
    return found


def options_given(parser: Parser, args: argparse.Namespace, overrides: dict[str, Any]) -> list[str]:
    """The options of a command that prepares the same data again with another tokenizer."""
    options = []
    names = ("encoding", "plain_text", "val_fraction", "split_by", "output", "block_size", "max_bad_lines")
    for name in (*names, "image_size", "patch_size", "image_last"):
        value = getattr(args, name)
        if value != parser.get_default(name):
            options += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    options += [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    options += ["--fields", *args.fields] if args.fields else []
    return [os.fsencode(option).decode("utf-8", "replace") for option in options]


def choose_image_size(args: argparse.Namespace, has_images: bool) -> None:
    """Put what config/vision.json says where nothing is given, size 0 where there are no images; raises UserError."""
    if not has_images and (args.image_size, args.patch_size, args.image_last) != (None, None, None):
        names = "--image_size, --patch_size and --image_last"
        raise UserError(f"{names} are for questions about images, which are not among the files")
    values = read_json(find_config("vision")) if has_images else {"image_size": 0, "patch_size": 1}
    for name in ("image_size", "patch_size"):
        setattr(args, name, values[name] if getattr(args, name) is None else getattr(args, name))
    args.image_last = BOOLEANS[args.image_last] if args.image_last else values.get("image_last", True)
    if has_images and (not 1 <= args.patch_size <= args.image_size <= 4096 or args.image_size % args.patch_size):
        sizes = f"{args.image_size} and {args.patch_size}"
        raise UserError(f"--image_size must be a multiple of --patch_size, both from 1 to at most 4096; got {sizes}")


def prepare(parser: Parser, args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Both passes over all files; the token files and the tokenizer appear together at the end, or not at all."""
    start, output = time.perf_counter(), Path(args.output)
    try:
        cleaning = CleaningConfig(**overrides)
    except UserError as error:
        raise UserError(f"command line: {error}") from None
    paths = args.files or default_files(output)
    sources, left_out = corpus.find_sources(paths, args.encoding, parse_fields(args.fields), args.plain_text)
    for line in left_out[:N_LEFT_OUT]:
        print(f"left out: {escape_control_characters(line)[:160]}", file=sys.stderr)
    if len(left_out) > N_LEFT_OUT:
        print(f"left out: {len(left_out) - N_LEFT_OUT:,} more", file=sys.stderr)
    check_fields_seen(args.fields, sources)
    for source in sources:
        if not args.files and source.form == "text" and not source.path.name.startswith("pretrain"):
            raise UserError(
                f"{source.name}: plain text, no questions and answers (docs/data.md shows their forms); "
                "if it is text to pretrain on, name it pretrain.txt"
            )
    bad_lines = BadLines(args.max_bad_lines)
    by_stage = {stage: [source for source in sources if source.stage == stage] for stage in STAGES}
    if args.split_by != "sample" and not by_stage["sft"]:
        raise UserError(f"--split_by {args.split_by} is for fine-tuning data, which is not among the files")
    options = options_given(parser, args, overrides)
    choose_image_size(args, has_images=bool(by_stage["vision"]))
    scans = [
        scan_corpus(stage, group, bad_lines, Cleaner(cleaning), args.split_by, args.image_size)
        for stage, group in by_stage.items()
        if group
    ]
    tokenizer = choose_tokenizer(args.tokenizer, args.vocab_size, scans, output)
    contents = [tokenizer.fingerprint(), options, [[s.name, s.sha256] for s in sources]]
    preparation = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
    lines = []
    with contextlib.ExitStack() as files:
        for scan in scans:
            given = list(dict.fromkeys(source.given for source in scan.sources))
            shared = {"arguments": [*given, *options], "preparation": preparation}
            lines += write_token_files(scan, tokenizer, bad_lines, files, args, shared)
        lines.append(save_tokenizer(tokenizer, output / "tokenizer.json", files, bool(args.tokenizer)))
    print("\n".join(lines))
    unknown = max(share_of_unknown(output, scan.stage) for scan in scans)
    print("".join(advice_on_vocabulary(output, tokenizer, unknown)), end="")
    size, seconds = sum(source.bytes for source in sources) / 1e6, time.perf_counter() - start
    print(f"{size:.1f} MB prepared in {seconds:.1f} s")


def share_of_unknown(output: Path, stage: str) -> float:
    """The share of a stage's training tokens that are <|unknown|>."""
    header = read_header(output / f"{stage}_train.bin")
    return header["n_unknown"] / header["n_tokens"]


def advice_on_vocabulary(output: Path, tokenizer: Tokenizer, unknown: float) -> list[str]:
    """What to do where stages were prepared with different tokenizers, or with one that lacks many characters."""
    headers = {path: read_header(path) for path in sorted(output.glob("*_train.bin"))}
    foreign = [path for path, header in headers.items() if header.get("tokenizer") != tokenizer.fingerprint()]
    if not foreign and unknown < 0.01:
        return []
    again = command_line("data.py", *arguments_for_all(output), "--tokenizer", "char")
    lines = [f"{path} is of another vocabulary, which no model can be trained with beside this one" for path in foreign]
    if unknown >= 0.01:
        lines.append(f"warning: {unknown:.0%} of the tokens are <|unknown|>, which a model can only learn to repeat")
    if tokenizer.kind != "foreign":  # (else it is that of a model of others, and to stay)
        lines.append(f"one vocabulary for all stages, to pretrain with anew: {again}")
    return [escape_control_characters(line) + "\n" for line in lines]


def main() -> None:
    parser = make_parser()
    args, overrides = parser.parse()
    if args.block_size is None:
        args.block_size = read_json(find_config("model")).get("block_size", 256)
    if not 0 < args.val_fraction < 1:
        raise UserError(f"command line: --val_fraction must be between 0 and 1, got {args.val_fraction}")
    if args.block_size < 1:
        raise UserError(f"command line: --block_size must be at least 1, got {args.block_size}")
    check_encoding(args.encoding)
    if args.inspect:
        file = TokenFile(args.inspect)
        name = args.tokenizer or str(file.path.parent / "tokenizer.json")
        inspect(file, open_tokenizer(name), name, args.block_size)
        return
    prepare(parser, args, overrides)


if __name__ == "__main__":
    run_main(main)
