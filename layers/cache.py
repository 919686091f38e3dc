"""The key/value cache of generation.

Keys and values of a token depend on the tokens before it alone, so a new token leaves those of the old ones as they
are. Kept, one forward pass over T tokens becomes one over a single token: T times less work for each new token.
"""

import torch


class KVCache:
    """Keys and values of the tokens seen so far, for every layer; with a sliding window, of the newest ones only."""

    def __init__(self, config, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        """config: a ModelConfig (windows, n_kv_head, block_size, head_dim)."""
        self.windows = config.windows
        room = [0 if window else config.block_size for window in self.windows]  # a full layer's is allocated once
        shapes = [(batch_size, config.n_kv_head, length, config.head_dim) for length in room]
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.length = 0  # tokens seen; the model advances it after its last layer

    def n_cached(self, window: int) -> int:
        """Number of tokens that a layer with this window still holds; 0: no window."""
        return min(self.length, window - 1) if window else self.length

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k, v (B, n_kv_head, T, head_dim) to a layer; returns its keys and values, old and new."""
        window = self.windows[layer]
        if window:  # drop what no later token can see
            n_cached = self.n_cached(window)
            k = torch.cat((self.keys[layer][:, :, :n_cached], k), dim=2)
            v = torch.cat((self.values[layer][:, :, :n_cached], v), dim=2)
            first = max(0, k.size(2) - (window - 1))
            self.keys[layer], self.values[layer] = k[:, :, first:], v[:, :, first:]
            return k, v
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
