"""The rows of a model's key/value cache: a sequence each, of its own length, read and continued beside the others.

What a row gives does not depend on the others, to the last bit. Rounding depends on the order in which a matrix product
adds, and that on the sizes of the matrices. So a prompt is read by itself, in pieces that end at multiples of PIECE;
and a step has fixed sizes: all rows, idle ones too, and room for all keys. Where this machine gives the same bits with
fewer, which is tried when the model is loaded, a step takes only as many as it needs.
"""

import numpy as np
import torch

from layers.cache import KVCache, StaticCache
from model import GPT

PIECE = 64  # tokens of a prompt that are read at a time


class Rows:
    """A fixed number of sequences."""

    def __init__(self, model: GPT, n_rows: int) -> None:
        config, weight = model.config, model.token_embedding.weight
        self.model, self.n_rows, self.device, self.block_size = model, n_rows, weight.device, config.block_size
        self.cache = KVCache(config, n_rows, weight.device, weight.dtype)
        layers = zip(self.cache.layers, self.cache.are_states, strict=True)
        self.states = [state for layer, are_states in layers if are_states for state in layer]
        # what a row still has of its beginning, however long it has become: all, but for sliding windows and states
        self.n_kept = 0 if self.states else min(self.cache.n_places(window) for window in config.windows)
        self.row_sizes, self.key_sizes = [n_rows], [config.block_size]  # that a step may have
        if not config.n_expert:
            self.add_sizes()

    def read(self, row: int, ids: list[int], image: np.ndarray | None = None) -> torch.Tensor:
        """Read tokens into a row, after those that it has; final hidden states (T, n_embd).

        image (3, S, S): what stands in the places among ids that are no tokens'.
        """
        images = None if image is None else torch.from_numpy(image)[None].to(self.device)
        return self.model.hidden(torch.tensor([ids], device=self.device), self.cache[row : row + 1], images=images)[0]

    def step(self, tokens: dict[int, int]) -> torch.Tensor:
        """Read the next token of each of some rows; logits (len(tokens), vocab_size)."""
        if self.model.config.n_expert:  # how many tokens an expert has depends on all rows: so these one by one
            return torch.cat([self.model.lm_head(self.read(row, [token])) for row, token in tokens.items()])
        longest = max(self.length(row) for row in tokens)
        n_rows = self.size_with(max(tokens))
        n_keys = next(size for size in self.key_sizes if size > longest)
        return self.step_of_size(tokens, n_rows, n_keys)

    def size_with(self, row: int) -> int:
        """How many rows a step has that reaches this one."""
        return next(size for size in self.row_sizes if size > row)

    def step_of_size(self, tokens: dict[int, int], n_rows: int, n_keys: int) -> torch.Tensor:
        """step() with the first n_rows rows, of n_keys tokens each.

        What is read into idle rows lies behind their length, where nobody sees it and the next token takes its place;
        their states, which it would change, are put back.
        """
        rows = list(tokens)
        idx = torch.zeros(n_rows, 1, dtype=torch.long)
        idx[rows, 0] = torch.tensor(list(tokens.values()))
        positions = torch.tensor(self.cache.lengths[:n_rows], device=self.device)[:, None]
        part = StaticCache(self.cache[:n_rows], positions, n_keys)
        idle = [row for row in range(n_rows) if row not in tokens]
        states = [state[idle] for state in self.states]
        logits = self.model.lm_head(self.model.hidden(idx.to(self.device), part)[:, -1])  # (n_rows, vocab_size)
        for state, before in zip(self.states, states, strict=True):
            state[idle] = before
        self.cache.lengths[rows] += 1
        return logits[rows]

    @torch.inference_mode()
    def add_sizes(self) -> None:
        """Find the smaller sizes of a step that give the same bits as the largest, on random keys and values."""
        (n_rows,), (block_size,) = self.row_sizes, self.key_sizes
        generator = torch.Generator().manual_seed(0)
        tensors = self.cache.tensors()
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape[2:], generator=generator))  # the same for all rows and heads
        states = [state.clone() for state in self.states]

        def are_equal(rows: int, keys: int) -> bool:
            lengths = torch.randint(keys, (n_rows,), generator=generator).numpy()

            def step(rows: int, keys: int) -> torch.Tensor:
                self.cache.lengths[:] = lengths
                for state, before in zip(self.states, states, strict=True):
                    state.copy_(before)
                return self.step_of_size({row: row % self.model.config.vocab_size for row in range(rows)}, rows, keys)

            return torch.equal(step(rows, keys), step(n_rows, block_size)[:rows])

        sizes = lambda first, last: [first << i for i in range(20) if first << i < last]  # noqa: E731
        self.row_sizes[:0] = [n for n in sizes(1, n_rows) if are_equal(n, block_size)]
        self.key_sizes[:0] = [n for n in sizes(PIECE, block_size) if are_equal(n_rows, n)]
        self.cache.lengths[:] = 0
        for tensor in tensors:
            tensor.zero_()

    def memory(self) -> int:
        """Bytes of the cache."""
        return self.cache.memory()

    def length(self, row: int) -> int:
        return int(self.cache.lengths[row])

    def keep(self, row: int, length: int) -> int:
        """Forget all but the first tokens of a row; returns how many it has then: 0 if they were lost."""
        self.cache.lengths[row] = length if self.has(row, length) else 0
        return self.length(row)

    def has(self, row: int, length: int) -> bool:
        """Whether the first tokens of a row are all there still: a sliding window that came round has lost them.

        In a full one the first has made place for what was read into the row while it was idle.
        """
        return length == self.length(row) or length < self.length(row) < self.n_kept

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a row begin with the first tokens of another one, which has() them."""
        if source != target:
            for state in self.states:
                state[target] = state[source]
            for tensor in self.cache.tensors():
                tensor[target, :, :length] = tensor[source, :, :length]
        self.cache.lengths[target] = length
