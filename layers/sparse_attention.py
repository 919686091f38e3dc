"""Sparse attention: each query reads a few blocks of keys, which it chooses by what they hold (MoBA, Mixture of Block
Attention, Lu et al. 2025, arXiv:2502.13189).

The softmax over thousands of keys gives nearly all of its weight to a few. Which ones depends on the query, so that no
window can know. Here the keys are cut into blocks of b, and the mean of a block's keys stands for it. A query is
compared with these means, and attends to the k blocks of the highest scores alone:

    score_i = q . mean of the keys in block i               of every block that begins before the query
    y = softmax(q K^T / sqrt(head_dim)) V                   K, V: of those k blocks, up to the query itself

The block that the query stands in is always one of them. Of n tokens a query reads n / b means and k b keys. It is what
a router does with experts, but nothing is learned for it: queries and keys are those of attention. The choice has no
gradient, what was chosen has: a query that finds something useful in a block moves towards its keys, and their mean.

DeepSeek's sparse attention (arXiv:2512.02556) chooses single tokens, by an indexer with heads of its own. Those learn
to predict the weights of full attention: of a model that was trained with it, by a loss of their own, in a stage
before the model sees the choice. MoBA has no weights, no loss and no stage of its own: a small model trains with it
from its first step, and with all blocks chosen it is full attention. So it is MoBA that is shown here.

In training all scores are computed, and those of other blocks hidden behind a mask: simple, but no faster than full
attention (a kernel would leave them out). To decode, the chosen blocks alone are read.
"""

import math
from typing import Any

import torch

from base.configuration import UserError
from layers.attention import FullAttention, RopeAngles, attend
from layers.cache import KVCache
from layers.masks import is_visible

QUERIES = 1024  # of a text that are masked at a time: a mask takes queries x keys numbers for every head


class SparseAttention(FullAttention):
    """Full attention to sparse_top_k blocks of sparse_block_size keys; a document begins with a new block.

    Grouped queries: the heads of a group read the same blocks, those of the highest sums of their scores, so that
    decoding reads no key twice (as in arXiv:2502.11089).
    """

    FIELDS = ("sparse_block_size", "sparse_top_k")
    HAS_WINDOW = False

    def forward(
        self,
        x: torch.Tensor,
        rope: RopeAngles | None,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """mask (B, T): positions inside the documents; None: a row is one text."""
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if cache is not None and x.size(1) == 1:
            return self.residual_dropout(self.out(self.read(q, cache)))
        if cache is not None:  # means of whole blocks, for the tokens to come
            n, b = k.size(2) // self.config.sparse_block_size, self.config.sparse_block_size
            cache.layers[self.layer][2][:, :, :n] = k[:, :, : n * b].unflatten(2, (n, b)).mean(3)
        dropout = self.config.dropout if self.training else 0.0
        place = torch.arange(x.size(1), device=x.device)[None] if cache is None else cache.positions
        parts = zip(q.split(QUERIES, dim=2), place.split(QUERIES, dim=1), strict=True)
        y = [attend(part, k, v, self.visible(part, k, mask, at), False, dropout) for part, at in parts]
        return self.residual_dropout(self.out(torch.cat(y, dim=1) if len(y) > 1 else y[0]))

    def choose(
        self, q: torch.Tensor, means: torch.Tensor, is_own: torch.Tensor, is_before: torch.Tensor
    ) -> torch.Tensor:
        """Numbers of the chosen blocks (B, n_kv_head, T, k), the query's own first; where there are fewer, any others.

        q (B, n_head, T, head_dim), means (B, n_kv_head, blocks, head_dim); is_own, is_before (B or 1, T, blocks): which
        block each query stands in, and which others it may read.
        """
        scores = q.unflatten(1, (means.size(1), -1)).sum(2) @ means.mT  # (B, n_kv_head, T, blocks)
        scores = scores.masked_fill(~is_before[:, None], -math.inf).masked_fill(is_own[:, None], math.inf)
        return scores.topk(min(self.config.sparse_top_k, scores.size(-1))).indices

    @torch.no_grad()
    def visible(
        self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Which keys each query attends to: (B, n_head, T, keys). mask: as in forward().

        place (B or 1, T): the keys that the queries stand at; None: they are of the same tokens.
        """
        b, key = self.config.sparse_block_size, torch.arange(k.size(2), device=k.device)
        place = key[None] if place is None else place
        inside = key[None] if mask is None else mask  # (B or 1, keys): position of every key in its document
        document, start = key - inside, key - inside % b  # the first key of its document, and of its block
        # first keys that a block may have: each b-th; where documents begin anywhere, all, and some begin no block
        step = b if mask is None else 1
        first = key[::step]  # (blocks,)
        is_in = start[:, None] == first[:, None]  # (B or 1, blocks, keys)
        means = (is_in.to(k.dtype) / is_in.sum(-1, keepdim=True).clamp(min=1))[:, None] @ k
        rows = max(len(place), len(inside))
        own_document, own = (t.expand(rows, -1).gather(1, place.expand(rows, -1)) for t in (document, start))  # (., T)
        is_seen = is_visible(place[..., None], key, 0, self.config.is_causal)  # (B or 1, T, keys)
        is_seen = is_seen & (own_document[..., None] == document[:, None])
        is_before = is_seen[..., ::step] & is_in.any(-1)[:, None]
        blocks = self.choose(q, means, own[..., None] == first, is_before)
        is_chosen = torch.zeros(*blocks.shape[:3], len(first), dtype=torch.bool, device=k.device)
        is_chosen = is_chosen.scatter(-1, blocks, True)  # (B, n_kv_head, T, blocks); of a key: as of its block
        is_chosen = is_chosen.gather(-1, (start // step)[:, None, None].expand(*blocks.shape[:3], -1))
        return (is_chosen & is_seen[:, None]).repeat_interleave(q.size(1) // k.size(1), dim=1)

    def read(self, q: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """attend() of one query of every row to what is in the cache, of which only the chosen blocks are read."""
        (keys, values, means), b = cache.layers[self.layer], self.config.sparse_block_size
        position = cache.positions[..., None]  # (B or 1, 1, 1)
        block = torch.arange(cache.longest // b + 1, device=q.device)
        is_own, is_before = block == position // b, block < position // b
        blocks = self.choose(q, means[:, :, : len(block)], is_own, is_before)[:, :, 0]  # (B, n_kv_head, k)
        place = (blocks[..., None] * b + torch.arange(b, device=q.device)).flatten(2)  # (B, n_kv_head, k b)
        # all rows and heads as one list of keys: index_select copies whole ones, several times faster than an index
        B, n_kv_head, n_places, D = keys.shape
        row, head = torch.arange(B, device=q.device)[:, None], torch.arange(n_kv_head, device=q.device)
        at = (row * n_kv_head + head)[..., None] * n_places + place.clamp(max=n_places - 1)
        k, v = (t.reshape(-1, D).index_select(0, at.flatten()).view(B, n_kv_head, -1, D) for t in (keys, values))
        means[row, head, blocks[..., 0]] = k[:, :, :b].mean(2)  # of the own block, right when its last token is there
        return attend(q, k, v, (place <= position)[:, :, None], is_causal=False)

    @staticmethod
    def check(config: Any) -> None:
        FullAttention.check(config)
        if config.sparse_block_size is None:
            config.sparse_block_size = min(16, config.block_size)
        if config.sparse_block_size > config.block_size:
            raise UserError(
                f"sparse_block_size ({config.sparse_block_size}) is longer than the context window: give at most "
                f"block_size ({config.block_size})"
            )
        if config.sparse_top_k is None:
            config.sparse_top_k = math.ceil(config.block_size / config.sparse_block_size / 4)

    @staticmethod
    def cache_shapes(config: Any, n_places: int) -> list[tuple[int, ...]]:
        n_blocks = math.ceil(n_places / config.sparse_block_size)
        return [*FullAttention.cache_shapes(config, n_places), (config.n_kv_head, n_blocks, config.head_dim)]

    @staticmethod
    def flops_per_token(config: Any, keys: float) -> float:
        """Those of the keys in the chosen blocks, and the scores, which are computed forward alone."""
        T = 2 * keys if config.is_causal else keys
        read = min(config.sparse_top_k * config.sparse_block_size, T)
        read = read - read * read / (2 * T) if config.is_causal else read  # on average, as a window
        scores = 2 * config.n_kv_head * config.head_dim * keys / config.sparse_block_size
        return FullAttention.flops_per_token(config, read) + scores
