"""What a trained model must beat: losses of guessing without context, and what general-purpose compressors achieve."""

import lzma
import math
import zlib

import numpy as np

COMPRESSION_SAMPLE = 1_000_000  # bytes of the corpus that are compressed: in Chinese, a third as many characters


def compression_baselines(sample: str) -> dict[str, float]:
    """What general-purpose compressors make of the beginning of a text, in bits per character.

    A language model's loss in bits per character is the size it could compress the text to with arithmetic coding
    (Delétang et al. 2023, arXiv:2309.10668), so a trained model should get below these.
    """
    if not sample:
        return {}
    sample = sample.encode("utf-8")[:COMPRESSION_SAMPLE].decode("utf-8", "ignore")  # whole characters
    data = sample.encode("utf-8")
    lzma_filter = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 22}  # covers the sample in half the memory
    return {
        "zlib_bits_per_character": 8 * len(zlib.compress(data, 9)) / len(sample),
        "lzma_bits_per_character": 8 * len(lzma.compress(data, filters=[lzma_filter])) / len(sample),
    }


def token_baselines(train: np.ndarray, val: np.ndarray) -> dict[str, float]:
    """Validation losses, in nats per token, of two models that ignore the context.

    uniform: every token is equally likely, log(vocab_size); an untrained model is close to it.
    unigram: the probability of a token is its frequency in the training split.
    """
    probability = (train + 1) / (train.sum() + len(train))  # add-one smoothing: log(0) cannot occur
    return {"uniform": math.log(len(train)), "unigram": float(-(val * np.log(probability)).sum() / max(1, val.sum()))}
