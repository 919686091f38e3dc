"""The key/value cache of generation: what attention keeps of the tokens seen so far.

Keys and values of a token depend on the tokens before it alone, so a new token leaves those of the old ones as they
are. Kept, one forward pass over T tokens becomes one over a single token: T times less work for each new token.

Every sequence has a row, and every row a length of its own: sequences may begin and end at different times. A layer
with a sliding window keeps a ring of `window` places. The token at position p lies at place p mod window, where it
takes the place of the one at p - window, which nobody sees any more:

    window 4, after position 5:    place 0 1 2 3    holds position 4 5 2 3

Without a window it is a ring of block_size places, and never comes round.

What a layer keeps is its kind of attention's affair (Attention.cache_shapes): keys and values, or less. Rings are
filled by extend(); what a kind keeps beside them, or in place of them, it updates in layers[i] itself.
"""

import numpy as np
import torch

from base.configuration import UserError
from layers.masks import is_visible


def keep_newest(context: torch.Tensor, block_size: int) -> torch.Tensor:
    """The newest three quarters of a full window, of a context (B, T): what generation goes on with.

    Cached keys carry their old positions, so these tokens are read again, from position 0.
    """
    return context[:, -max(1, block_size - block_size // 4) :]


class KVCache:
    """Every layer's tensors, with a row per sequence: layers[i] is a tuple of them, (n_rows, ...) each.

    A forward pass calls begin(), then mask() for every kind of window and extend() for every layer, then advance().
    Rows are freed by lengths[row] = 0; cache[i:j] is a cache of these rows that shares their memory.
    """

    block = 1  # of the new tokens, so many at the end see one another (layers/denoising.py); of 1: all are causal

    def __init__(self, config, n_rows: int, device: torch.device, dtype: torch.dtype, spare: int = 0) -> None:
        """config: a ModelConfig (block_size, windows, attention_classes).

        spare: the newest tokens that may be taken back, by lengths -= n. What they overwrite in a ring is lost, so the
        ring has as many places more, and loses only what nobody sees any more. Raises UserError for a state.
        """
        self.block_size, self.spare = config.block_size, spare
        self.are_states = [attention.IS_RECURRENT for attention in config.attention_classes]
        if spare and any(self.are_states):
            kinds = ",".join(config.attention)
            raise UserError(f"attention {kinds}: no token can be taken back from a state: generate without a draft")
        layers = zip(config.attention_classes, config.windows, strict=True)
        shapes = [attention.cache_shapes(config, self.n_places(window)) for attention, window in layers]
        wide = torch.promote_types(dtype, torch.float32)  # for a state, in which roundings would add up
        self.layers = [
            tuple(torch.zeros(n_rows, *shape, device=device, dtype=wide if is_state else dtype) for shape in layer)
            for layer, is_state in zip(shapes, self.are_states, strict=True)
        ]
        self.lengths = np.zeros(n_rows, dtype=np.int64)  # tokens seen, by row

    def n_places(self, window: int) -> int:
        """Tokens of a row that a layer with this window has room for; window 0: none."""
        return min(window + self.spare if window else self.block_size, self.block_size)

    def __getitem__(self, rows: slice) -> "KVCache":
        part = object.__new__(KVCache)
        part.block_size, part.spare, part.lengths = self.block_size, self.spare, self.lengths[rows]
        part.are_states = self.are_states
        part.layers = [tuple(tensor[rows] for tensor in layer) for layer in self.layers]
        return part

    def tensors(self) -> list[torch.Tensor]:
        """Those of all layers."""
        return [tensor for layer in self.layers for tensor in layer]

    def memory(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def begin(self, T: int) -> torch.Tensor | slice:
        """Positions of T new tokens of every row: (B, T); a slice if they are the same in all rows."""
        self.T, self.longest = T, int(self.lengths.max())
        self.is_even = self.longest == self.lengths.min()
        self.positions = self.next_positions() + torch.arange(T, device=self.layers[0][0].device)
        return slice(self.longest, self.longest + T) if self.is_even else self.positions

    def next_positions(self) -> torch.Tensor:
        """Every row's next position, (B, 1); (1, 1) if they are the same in all rows."""
        device = self.layers[0][0].device
        if self.lengths.min() == self.lengths.max():  # as a constant: to copy numbers to a GPU is to wait for it
            return torch.full((1, 1), int(self.lengths[0]), device=device)
        return torch.tensor(self.lengths, device=device)[:, None]

    def mask(self, window: int) -> torch.Tensor | None:
        """Which keys, of those that extend() returns, the new tokens see: (1 or B, 1, T, keys).

        None where they are all, or all up to the new token itself.
        """
        T, n_places = self.T, self.n_places(window)
        n_seen = min(window or self.block_size, self.block_size)  # by a token, itself included
        sees_all = T == 1 and min(self.longest + 1, n_places) <= n_seen
        if self.is_even and (sees_all or (self.longest == 0 and n_seen >= T and self.block == 1)):
            return None
        place = torch.arange(min(self.longest + T, n_places), device=self.positions.device)
        if self.are_joined(T, n_places):  # what lay in the ring before, then the new tokens
            newest = self.positions[:, :1] - 1
            held = newest - (newest - place[: self.longest]) % n_places
            keys = torch.cat((held, self.positions), dim=1)
        else:
            newest = self.positions[:, -1:]
            keys = newest - (newest - place) % n_places  # the position at each place; negative: nothing yet
        keys, queries = keys[:, None, None, :], self.positions[:, None, :, None]
        mask = is_visible(queries, keys, window, is_causal=True)
        if self.block > 1:
            in_block = torch.minimum(queries, keys) >= queries[:, :, -self.block :][:, :, :1]
            mask = mask | (in_block & is_visible(queries, keys, window, is_causal=False))
        return (keys >= 0) & mask

    def extend(self, layer: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Add to the rings of a layer, as keys and values, those of the new tokens (B, heads, T, width).

        Returns what each ring holds then, of old and new tokens: (B, heads, keys, width). Tensors of the layer that
        have no new ones are the kind's own.
        """
        seen = []
        for ring, new in zip(self.layers[layer], tensors, strict=False):
            T, n_places = new.size(2), ring.size(2)
            if self.are_joined(T, n_places):
                seen.append(torch.cat((ring[:, :, : self.longest], new), dim=2))
            first = self.longest % n_places
            if self.is_even and first + T <= n_places:  # side by side, as nearly always
                ring[:, :, first : first + T] = new
            else:
                place = self.positions[:, -n_places:] % n_places
                row = torch.arange(len(ring), device=place.device)[:, None]
                ring[row, :, place] = new[:, :, -n_places:].transpose(1, 2).to(ring.dtype)
            if not self.are_joined(T, n_places):
                seen.append(ring[:, :, : self.longest + T])
        return seen

    def are_joined(self, T: int, n_places: int) -> bool:
        """Whether the last of T new tokens overwrite what the first of them still see."""
        return T > 1 and self.longest + T > n_places

    def advance(self) -> None:
        """The new tokens have passed all layers."""
        self.lengths += self.T


class StaticCache(KVCache):
    """The rows of a cache, for a compiled step of one token: positions are a tensor, no shape ever changes.

    The first n_places take part in every step, those that are empty behind a mask.
    """

    def __init__(self, cache: KVCache, positions: torch.Tensor, n_places: int) -> None:
        """positions (B, 1): those of the new tokens, below n_places; cache.lengths is neither read nor advanced."""
        self.block_size, self.spare, self.layers = cache.block_size, cache.spare, cache.layers
        self.T, self.positions, self.longest, self.is_even = 1, positions, n_places - 1, False

    def begin(self, T: int) -> torch.Tensor:
        return self.positions

    def advance(self) -> None:
        """The caller does, in the cache itself."""
