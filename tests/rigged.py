"""Models whose every probability is known: what they should be judged to be can be computed by hand."""

from pathlib import Path

import numpy as np
import torch

from model import GPT, ModelConfig
from text.tokenizer import Tokenizer
from weights.checkpointing import save_checkpoint


def bigram_model(log_p: np.ndarray, block_size: int = 64) -> GPT:
    """A GPT that computes these log-probabilities (V, V): the next token (column) by the last one (row) alone.

    Attention and MLP add nothing; a token's embedding is an axis, its norm sqrt(n_embd) after RMSNorm.
    """
    V = len(log_p)
    width = V + V % 2
    shape = {"n_layer": 1, "n_head": 1, "n_embd": width, "n_hidden": 2, "tie_embeddings": False, "norm_eps": 1e-12}
    model = GPT(ModelConfig(vocab_size=V, block_size=block_size, **shape)).eval()
    with torch.no_grad():
        model.blocks[0].attention.out.weight.zero_()
        model.blocks[0].mlp.down.weight.zero_()
        model.token_embedding.weight.copy_(torch.eye(V, width))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :V] = torch.tensor(np.asarray(log_p).T / width**0.5)
    return model


def unigram_model(p: np.ndarray, block_size: int = 64) -> GPT:
    """A GPT for which every token has the same probability (V,) everywhere."""
    return bigram_model(np.tile(np.log(p), (len(p), 1)), block_size)


def chain_model(tokenizer: Tokenizer, text: str, block_size: int = 64) -> GPT:
    """A GPT that answers every question with this text of distinct characters."""
    ids = [tokenizer.special_tokens["<|ResponseMark|>"], *tokenizer.encode(text).tolist(), tokenizer.eos]
    p = np.full((tokenizer.vocab_size, tokenizer.vocab_size), 1e-6)
    p[ids[:-1], ids[1:]] = 1
    return bigram_model(np.log(p / p.sum(1, keepdims=True)), block_size)


def save_rigged(path: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    """A checkpoint of it, as train.py would write it."""
    values = {"model": model.state_dict(), "optimizer": {}, "step": 1, "model_config": model.config.to_dict()}
    values |= {"train_config": {"stage": "sft"}, "tokenizer": tokenizer.to_dict(), "rng": {}, "data": {}}
    save_checkpoint(path, values | {"best_val_loss": 1.0})
    return path
