"""The rows of a model's key/value cache: a sequence each, of its own length, read and continued beside the others."""

import torch

from layers.cache import KVCache
from model import GPT

PIECE = 64  # tokens of a prompt that are read at a time


class Rows:
    """A fixed number of sequences."""

    def __init__(self, model: GPT, n_rows: int) -> None:
        self.model, self.n_rows = model, n_rows
        weight = model.token_embedding.weight
        self.device = weight.device
        self.caches = [KVCache(model.config, 1, weight.device, weight.dtype) for _ in range(n_rows)]

    def read(self, row: int, ids: list[int]) -> torch.Tensor:
        """Read tokens into a row, after those that it has; final hidden states (T, n_embd)."""
        return self.model.hidden(torch.tensor([ids], device=self.device), self.caches[row])[0]

    def step(self, tokens: dict[int, int]) -> torch.Tensor:
        """Read the next token of each of some rows; logits (len(tokens), vocab_size)."""
        hidden = [self.read(row, [token])[-1:] for row, token in tokens.items()]
        return self.model.lm_head(torch.cat(hidden))

    def cut(self, row: int, length: int) -> None:
        """Forget all but the first tokens of a row."""
        self.caches[row].length = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a row begin with the first tokens of another one."""
        if source != target:
            for old, new in zip(self.caches[source].keys, self.caches[target].keys, strict=True):
                new[:, :, :length] = old[:, :, :length]
            for old, new in zip(self.caches[source].values, self.caches[target].values, strict=True):
                new[:, :, :length] = old[:, :, :length]
        self.cut(target, length)
