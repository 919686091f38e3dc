"""What is inside a token file: its header, the most frequent tokens, the lengths of samples, a batch."""

from collections import Counter

import numpy as np

from base.configuration import UserError, escape_control_characters
from text.batches import Pair, TrainBatches
from text.token_files import TokenFile
from text.tokenizer import Tokenizer

N_SOURCES = 5  # source files to name


def inspect(file: TokenFile, tokenizer: Tokenizer, tokenizer_path: str, block_size: int, n_samples: int = 3) -> None:
    """Print the header, token statistics and a few samples of a token file."""
    header, tokens, path = file.header, file.tokens, file.path
    if tokenizer.fingerprint() != header["tokenizer"]:
        raise UserError(
            f"{path} was encoded with another tokenizer than {tokenizer_path}; pass the right one with --tokenizer FILE"
        )
    print(f"{path}: stage {header['stage']}, split {header['split']}, format {header['format']}")
    sources = header["sources"]
    for source in sources[:N_SOURCES]:
        name = escape_control_characters(source["path"])
        print(f"  from {name}: {source['bytes']:,} bytes, sha256 {source['sha256'][:16]}")
    if len(sources) > N_SOURCES:
        print(f"  and {len(sources) - N_SOURCES:,} more files")
    print(
        f"  {header['n_tokens']:,} tokens ({tokens.dtype}), vocabulary size {header['vocab_size']:,}, "
        f"{header['n_characters']:,} characters"
    )
    print(f"  {header['duplicates_removed']:,} duplicates removed, {header['n_unknown']:,} unknown tokens")
    print("  baselines: " + ", ".join(f"{name} {value:.3f}" for name, value in header["baselines"].items()))

    counts = np.zeros(header["vocab_size"], dtype=np.int64)
    for start in range(0, len(tokens), 1 << 22):
        part = tokens[start : start + (1 << 22)]
        counts += np.bincount(part[part < len(counts)], minlength=len(counts))  # the others: patches of images
    order = np.argsort(-counts, kind="stable")[:20]
    print("most frequent: " + "  ".join(f"{tokenizer.decode([i])!r} {counts[i] / len(tokens):.2%}" for i in order))
    special = tokenizer.special_tokens.items()
    print(
        "special tokens: " + "  ".join(f"{name} {counts[i]:,}" for name, i in special if counts[i] or len(special) < 10)
    )
    print(f"used: {np.count_nonzero(counts):,} of {len(counts):,} tokens of the vocabulary")

    if file.starts is not None:
        lengths = np.diff(file.starts)
        print(f"samples: {len(lengths):,}; share of tokens masked out of the loss: {1 - file.loss_mask.mean():.1%}")
        if file.images is not None:
            print(f"images: {len(file.images):,} of {header['image_size']} x {header['image_size']} pixels")
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
        samples = [batches.sample(i) for i in range(min(batch_size, batches.samples_per_epoch))]
        pairs = [(sample.chosen, sample.rejected) if isinstance(sample, Pair) else (sample,) for sample in samples]
        rows = [tokens for parts in pairs for tokens, *_ in parts]
        distinct = {
            (tokens.tobytes(), *(image.tobytes() for image in images))
            for parts in pairs
            for tokens, _, *images in parts
        }
        ngrams = Counter(tuple(row[i : i + 8]) for row in rows for i in range(len(row) - 7))
        print(
            f"a batch of {len(rows)}: {len(distinct)} distinct samples, "
            f"{len(set(np.concatenate(rows).tolist()))} distinct tokens, "
            f"{len(ngrams) / max(1, ngrams.total()):.0%} of its 8-grams distinct"
        )
        for row in rows[:n_samples]:
            print(f"sample: {tokenizer.decode(row[row < len(counts)][:200])!r}")
