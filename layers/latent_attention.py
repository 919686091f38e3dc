"""Multi-head latent attention: a cache of a few numbers per token (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

The key/value cache limits how many texts fit into memory, and how fast they grow: all of it is read for every token.
Grouped queries make it smaller by fewer keys and values. Here every head has its own, but those of a token are all made
from one short vector, the latent c, and only that is kept:

    c = norm(W_down x)                      kv_rank numbers
    k_h = W_k,h c    v_h = W_v,h c          for every head h

Nor need keys be made to decode. A score is q . (W_k c) = (W_k^T q) . c: with W_k absorbed into the query, latents are
what it is compared with, and also what is averaged; W_v is applied once, to the average. So to decode is to attend with
n_head queries to one head of keys, which are the values, too.

RoPE would stand between q and W_k, and turns with the position: W_k could not be absorbed. So it has numbers of its
own: the last rope_dim of a query, and of a rotary key, one for all heads, which is kept beside the latent.
"""

import math
from typing import Any

import torch
import torch.nn as nn
from torch.nn.attention.flex_attention import BlockMask

from base.configuration import UserError
from layers.attention import Attention, RopeAngles, attend
from layers.cache import KVCache
from layers.norm import RMSNorm
from layers.rope import apply_rope


class LatentAttention(Attention):
    """What DeepSeek-V2 and V3 compute, with values as wide as keys (head_dim).

    qk_norm: RMSNorm on queries and rotary keys, which theirs lack; on all of a key it would be in the way of absorbing
    W_k, but its latent is normalised in any case. bias: on what reads and writes the residual stream.
    """

    FIELDS = ("kv_rank", "q_rank", "rope_dim")
    PROJECTIONS = ("q", "q_down", "q_up", "kv_down", "kv_up")

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        width = config.n_head * config.head_dim
        self.n_plain = config.head_dim - config.rope_dim  # of a query or key, what RoPE leaves as it is
        if config.q_rank:  # queries from a latent as well: fewer weights, and less to keep for the backward pass
            self.q_down = nn.Linear(config.n_embd, config.q_rank, bias=config.bias)
            self.q_latent_norm = RMSNorm(config.q_rank, config.norm_eps)
            self.q_up = nn.Linear(config.q_rank, width, bias=False)
        else:
            self.q = nn.Linear(config.n_embd, width, bias=config.bias)
        self.kv_down = nn.Linear(config.n_embd, config.kv_rank + config.rope_dim, bias=config.bias)  # c, rotary key
        self.kv_up = nn.Linear(config.kv_rank, config.n_head * self.n_plain + width, bias=False)  # W_k, W_v, all heads
        self.out = nn.Linear(width, config.n_embd, bias=config.bias)
        self.kv_latent_norm = RMSNorm(config.kv_rank, config.norm_eps)
        has_k_norm = config.qk_norm and config.rope_dim > 0
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.rope_dim, config.norm_eps) if has_k_norm else nn.Identity()

    def queries(self, x: torch.Tensor, rope: RopeAngles | None) -> torch.Tensor:
        """(B, n_head, T, head_dim) of x (B, T, n_embd); the last rope_dim numbers of a head are rotated."""
        config = self.config
        q = self.q_up(self.q_latent_norm(self.q_down(x))) if config.q_rank else self.q(x)
        q = self.q_norm(q.unflatten(-1, (config.n_head, config.head_dim)))
        if rope is not None:
            plain, rotary = q.split((self.n_plain, config.rope_dim), dim=-1)
            q = torch.cat((plain, apply_rope(rotary, *rope)), dim=-1)
        return q.transpose(1, 2)

    def latents(self, x: torch.Tensor, rope: RopeAngles | None) -> torch.Tensor:
        """What the cache keeps of x (B, T, n_embd): (B, 1, T, kv_rank + rope_dim), the latent, then the rotary key."""
        c, rotary = self.kv_down(x).split((self.config.kv_rank, self.config.rope_dim), dim=-1)
        rotary = self.k_norm(rotary)
        if rope is not None:
            rotary = apply_rope(rotary[:, :, None], *rope)[:, :, 0]  # of one head
        return torch.cat((self.kv_latent_norm(c), rotary), dim=-1)[:, None]

    def expand(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every head's keys and values (B, n_head, keys, head_dim) of latents (B, 1, keys, kv_rank + rope_dim)."""
        c, rotary = latents.split((self.config.kv_rank, self.config.rope_dim), dim=-1)
        n_head, D = self.config.n_head, self.config.head_dim
        k, v = self.kv_up(c[:, 0]).split((n_head * self.n_plain, n_head * D), dim=-1)
        k = k.unflatten(-1, (n_head, self.n_plain)).transpose(1, 2)
        v = v.unflatten(-1, (n_head, D)).transpose(1, 2)
        return torch.cat((k, rotary.expand(-1, n_head, -1, -1)), dim=-1), v

    def project(self, x: torch.Tensor, rope: RopeAngles | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (B, n_head, T, head_dim) of x (B, T, n_embd), as in full attention."""
        return self.queries(x, rope), *self.expand(self.latents(x, rope))

    def absorbs(self, T: int) -> bool:
        """Whether T queries take fewer operations with W_k and W_v absorbed than with keys and values.

        Multiplications per head and cached token: for its score and its share in the average, of T queries each; and
        where keys and values are made, for these. One query absorbs, nearly always; those of a long prompt do not.
        """
        config = self.config
        latent, D = config.kv_rank + config.rope_dim, config.head_dim
        return 2 * T * latent < 2 * T * D + config.kv_rank * (self.n_plain + D)

    def attend_absorbed(self, q: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """attend() to the keys and values of these latents, without them: (B, T, n_head head_dim)."""
        config, n_head = self.config, self.config.n_head
        W_k, W_v = self.kv_up.weight.split((n_head * self.n_plain, n_head * config.head_dim))
        W_k, W_v = (W.view(n_head, -1, config.kv_rank) for W in (W_k, W_v))
        plain, rotary = q.transpose(1, 2).split((self.n_plain, config.rope_dim), dim=-1)  # (B, T, n_head, ...)
        q = torch.cat((torch.einsum("bthd,hdr->bthr", plain, W_k), rotary), dim=-1)
        # all heads ask the same keys: as so many queries of one head, they are one product, which reads each key once
        q = q.flatten(1, 2)[:, None]  # (B, 1, T n_head, kv_rank + rope_dim)
        mask = None if mask is None else mask.repeat_interleave(n_head, dim=-2)
        # values without the rotary key would be enough, but kernels want keys and values of one width
        y = attend(q, latents, latents, mask, is_causal=False, scale=1 / math.sqrt(config.head_dim))
        y = y.unflatten(1, (-1, n_head))[..., : config.kv_rank]  # (B, T, n_head, kv_rank): averages of latents
        return torch.einsum("bthr,hdr->bthd", y, W_v).flatten(2)

    def forward(
        self,
        x: torch.Tensor,
        rope: RopeAngles | None,
        mask: torch.Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        config = self.config
        q, latents = self.queries(x, rope), self.latents(x, rope)
        if cache is not None:
            (latents,) = cache.extend(self.layer, latents)
        T = x.size(1)
        is_first = T > 1 and mask is None  # the beginning of a text: nothing in the cache that latents could save
        if cache is not None and not is_first and self.absorbs(T):
            y = self.attend_absorbed(q, latents, mask)
        else:
            k, v = self.expand(latents)
            y = attend(q, k, v, mask, config.is_causal, config.dropout if self.training else 0.0)
        return self.residual_dropout(self.out(y))

    @staticmethod
    def check(config: Any) -> None:
        if config.n_kv_head != config.n_head:
            raise UserError(
                f"n_kv_head ({config.n_kv_head}) is for full attention: attention latent makes the keys and values of "
                "all heads from one latent; leave n_kv_head out, and lower kv_rank for a smaller cache"
            )
        if config.qkv_bias:
            raise UserError("qkv_bias is for full attention: attention latent has bias alone")
        if config.kv_rank is None:
            config.kv_rank = 2 * config.head_dim
        config.q_rank = config.q_rank or 0
        if config.rope_dim is None:
            config.rope_dim = config.head_dim // 4 * 2 if config.use_rope else 0
            if config.use_rope and not config.rope_dim:
                raise UserError(f"head_dim {config.head_dim} is too small to rotate half of it: 4 is the least")
        if config.rope_dim % 2 or config.rope_dim >= config.head_dim:
            raise UserError(f"rope_dim must be even and below head_dim ({config.head_dim}), got {config.rope_dim}")
        if config.rope_dim and not config.use_rope:
            raise UserError(f"rope_dim is {config.rope_dim}, but use_rope is false: leave rope_dim out")

    @staticmethod
    def rope_width(config: Any) -> int:
        return config.rope_dim

    @staticmethod
    def cache_shapes(config: Any, n_places: int) -> list[tuple[int, ...]]:
        return [(1, n_places, config.kv_rank + config.rope_dim)]

    @staticmethod
    def fused_rows(config: Any) -> dict[str, list[int]]:
        width = config.n_head * config.head_dim
        kv_down = [config.kv_rank] + [config.rope_dim] * (config.rope_dim > 0)
        return {"kv_down": kv_down, "kv_up": [width - config.n_head * config.rope_dim, width]}

    @staticmethod
    def activations(config: Any, size: int) -> int:
        C, width, latent = config.n_embd, config.n_head * config.head_dim, config.kv_rank + config.rope_dim
        kept = 4 * C + size * (C + 5 * width - config.n_head * config.rope_dim)  # q; W_k c and values; keys; the result
        kept += size * 2 * (latent + config.q_rank)  # before and after their norms
        kept += size * width if config.qk_norm else 0  # queries before their norm
        return kept + 4 * (2 * config.n_head + 3)  # the softmax's denominator, root mean squares

    @staticmethod
    def freed_activations(config: Any, size: int) -> int:
        P, width = config.rope_dim, config.n_head * config.head_dim
        rotary = (config.n_head + 1) * P  # of all queries and the key
        freed = size * (config.kv_rank + rotary)  # the latent and the rotary parts, before they are joined to others
        freed += size * (width + P * config.qk_norm) if P else 0  # queries and the rotary key, not rotated yet
        if size < 4:  # before they are rounded: normalised, and rotated
            freed += 4 * ((width + P) * config.qk_norm + config.kv_rank + config.q_rank + rotary) + size * rotary
        return freed
