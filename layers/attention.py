"""Attention: each token looks at others and takes something of them.

Attention is what every kind of it offers to the model; FullAttention is the one that all GPTs began with. Further kinds
are files beside this one, each with its entry in ATTENTION of model.py; `attention` in a ModelConfig names the kind of
each layer.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from base.configuration import UserError
from layers.cache import KVCache
from layers.masks import takes_groups
from layers.norm import RMSNorm, rms_norm
from layers.rope import apply_rope

RopeAngles = tuple[torch.Tensor, torch.Tensor]  # cosines and signed sines of the positions, as apply_rope takes them


class Attention(nn.Module):
    """A kind of attention: what it is made of, and what the rest of the toolkit asks about it.

    The questions are put to the class, with a ModelConfig: most of them are asked before there is a model.
    """

    FIELDS: tuple[str, ...] = ()  # fields of ModelConfig that are for this kind alone; null where no layer is of it
    PROJECTIONS: tuple[str, ...]  # linear layers that make queries, keys and values: what LoRA's target `qkv` means
    IS_RECURRENT = False  # whether it keeps a state that all tokens change: it has no mask, and none is taken back
    HAS_WINDOW = True  # whether a window may hide keys; else its mask are positions in the documents (B, T), or None

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        rope: RopeAngles | None,
        mask: torch.Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """x (B, T, n_embd) to the same shape; with a cache, its T tokens follow those of it.

        rope: the angles of the positions, for rope_width() numbers; mask: of GPT.masks().
        """
        raise NotImplementedError

    def visible(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Which keys the queries of project() see: all heads what the mask shows, if the kind itself hides none."""
        return mask

    def initialise(self) -> None:
        """Set the weights that do not begin as GPT sets all: normal those of matrices, zero biases."""

    @staticmethod
    def check(config: Any) -> None:
        """Fill in the kind's fields that are null, and raise UserError for what it cannot compute."""

    @staticmethod
    def rope_width(config: Any) -> int:
        """How many numbers of a query or key RoPE rotates."""
        return config.head_dim

    @staticmethod
    def cache_shapes(config: Any, n_places: int) -> list[tuple[int, ...]]:
        """Shapes of what the cache keeps of one row, n_places: of how many tokens.

        Tensors that KVCache.extend() fills have a place per token: (heads, n_places, width). Others are the kind's own.
        """
        raise NotImplementedError

    @staticmethod
    def fused_rows(config: Any) -> dict[str, list[int]]:
        """Linear layers whose weight is several matrices, one below the other, and the rows of each: Muon's units."""
        return {}

    @staticmethod
    def flops_per_token(config: Any, keys: float) -> float:
        """Operations forward and backward beside the weights', where a token attends to so many keys on average.

        Per key, head and number: a multiplication and an addition for the score and for the weighted value, three
        times: forward, and for the gradient of either factor.
        """
        return 12 * config.n_head * config.head_dim * keys

    @staticmethod
    def activations(config: Any, size: int) -> int:
        """Bytes per token that one layer keeps for the backward pass; size: of a number that a product returns.

        Its norm included (the residual stream is float32), masks and stored attention weights not.
        """
        raise NotImplementedError

    @staticmethod
    def freed_activations(config: Any, size: int) -> int:
        """Likewise, bytes that the forward pass makes and frees: from q, k and v on to the attention itself."""
        raise NotImplementedError


class FullAttention(Attention):
    """Multi-head attention; with fewer key/value heads grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    Each token asks (query) and is asked (key); softmax(q k^T / sqrt(head_dim)) weighs the values of the tokens it sees.
    """

    PROJECTIONS = ("qkv",)

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        # one matrix for queries, keys and values of all heads: one large product is faster than many small ones
        n_heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, n_heads * config.head_dim, bias=config.bias or config.qkv_bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        if config.qk_norm:  # bounds the attention logits, so that larger learning rates are stable (arXiv:2302.05442)
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def project(self, x: torch.Tensor, rope: RopeAngles | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, n_head, T, head_dim), keys and values (B, n_kv_head, T, head_dim) of x (B, T, n_embd)."""
        config = self.config
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, config.head_dim)  # (B, T, n_head + 2 n_kv_head, head_dim)
        qk, v = heads.split((config.n_head + config.n_kv_head, config.n_kv_head), dim=2)
        if config.qk_norm:  # queries and keys together: half the operations, which is what counts at T = 1
            weights = self.q_norm.weight.expand(config.n_head, -1), self.k_norm.weight.expand(config.n_kv_head, -1)
            qk = rms_norm(qk, torch.cat(weights), config.norm_eps)
        if rope is not None:
            qk = apply_rope(qk, *rope)
        q, k = qk.split((config.n_head, config.n_kv_head), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,
        rope: RopeAngles | None,
        mask: torch.Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        config = self.config
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # T new tokens see the cached ones too
        dropout = config.dropout if self.training else 0.0
        y = attend(q, k, v, mask, config.is_causal, dropout)
        return self.residual_dropout(self.out(y))

    @staticmethod
    def check(config: Any) -> None:
        if config.use_rope and config.head_dim % 2:
            raise UserError(
                f"RoPE needs an even head_dim (n_embd / n_head), got {config.head_dim}; or set use_rope to false"
            )

    @staticmethod
    def cache_shapes(config: Any, n_places: int) -> list[tuple[int, ...]]:
        return 2 * [(config.n_kv_head, n_places, config.head_dim)]  # keys and values

    @staticmethod
    def fused_rows(config: Any) -> dict[str, list[int]]:
        q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        return {"qkv": [q, kv, kv]}

    @staticmethod
    def activations(config: Any, size: int) -> int:
        C, q, kv = config.n_embd, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        kept = 4 * C + size * (C + (q + 2 * kv) + q)  # the norm's input and output; queries, keys, values; the result
        if config.use_rope or config.qk_norm:  # new queries and keys, normalised and rotated
            kept += size * (q + kv)
        return kept + 4 * 3 * config.n_head  # root mean squares of queries and keys, and the softmax's denominator

    @staticmethod
    def freed_activations(config: Any, size: int) -> int:
        qk = (config.n_head + config.n_kv_head) * config.head_dim
        freed = size * qk * (config.qk_norm and config.use_rope)  # normalised, but not rotated yet
        if size < 4:  # before they are rounded: normalised, and rotated
            freed += 4 * qk * (config.qk_norm + config.use_rope) + size * qk * config.use_rope
        return freed


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | BlockMask | None,
    is_causal: bool,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v, heads side by side: (B, T, n_head * width of v), of q (B, n_head, T, width).

    k, v (B, n_kv_head, keys, width): every head of theirs serves a group of query heads. mask None: all keys, or with
    is_causal those up to the query itself. scale: None for 1 / sqrt(width).
    """
    is_causal = is_causal and mask is None
    if q.size(2) == 1:  # a single token comes last and sees every key
        is_causal = False
    n_groups = q.size(1) // k.size(1)
    if isinstance(mask, BlockMask):
        y = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=n_groups > 1)
    else:
        B, n_head, T, _ = q.shape
        is_grouped = n_groups > 1
        if is_grouped and T == 1:  # a group's queries as rows: they see the same keys
            q, is_grouped = q.reshape(B, k.size(1), n_groups, -1), False
        if is_grouped and not takes_groups(q, mask):
            k, v = (t.repeat_interleave(n_groups, dim=1) for t in (k, v))
            is_grouped = False
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=is_grouped)
        y = y.reshape(B, n_head, T, -1)
    return y.transpose(1, 2).flatten(2)  # (B, n_head, T, width) -> heads side by side again


def check_kinds(config: Any, kinds: dict[str, type[Attention]]) -> None:
    """Fill in what a ModelConfig leaves to its kinds of attention, and raise UserError for what they cannot compute."""
    if not config.attention:
        raise UserError(f"attention must name a kind or more ({', '.join(kinds)}), got an empty list")
    for kind, attention in kinds.items():
        if attention in config.attention_classes:
            attention.check(config)
        elif kind not in config.attention and (
            given := [f for f in attention.FIELDS if getattr(config, f) is not None]
        ):
            raise UserError(f"{given[0]} is for attention {kind}: leave it out (null), or name {kind} in attention")
    in_blocks = config.mask_token and config.is_causal
    for i, (attention, window) in enumerate(zip(config.attention_classes, config.windows, strict=True)):
        kind = config.attention[i % len(config.attention)]
        if window and not attention.HAS_WINDOW:
            raise UserError(f"attention_window {window} of layer {i + 1}: attention {kind} has no window; give 0 there")
        if in_blocks and not attention.HAS_WINDOW:  # its mask is not ours to give
            also = " (is_causal false takes it)" if kind == "sparse" else ""
            raise UserError(
                f"masked diffusion in blocks takes attention full and latent, layer {i + 1} has {kind}{also}"
            )
