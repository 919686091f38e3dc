"""Linear attention: a memory of fixed size in place of a cache that grows, by the gated delta rule (Gated DeltaNet,
Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464), in the form that Qwen3-Next has.

A head keeps a matrix, the state S (D, D). It maps keys to values: asked with a key k, it answers S^T k. The first
linear attention only added k v^T for every token (Katharopoulos et al. 2020, arXiv:2006.16236), so that a key written
twice answers with the sum of both values. The delta rule (Schlag et al. 2021, arXiv:2102.11174) writes the difference
from what S answers already, and the gate lets old content fade. For each token, with query q, key k and value v (D),
q and k of length 1, and two learned numbers in 0..1, alpha (what is kept) and beta (how far it is corrected):

    S <- alpha S
    S <- S + k u^T      with u = beta (v - S^T k)
    y  = S^T q                                                          (D)

Time and memory per token are the same however long the text is. The price: about D keys can be told apart, where full
attention keeps all. To decode, this is what is computed. In training, a loop over all tokens would be slow; but in a
chunk of C tokens all u follow from one linear system. With g_i = alpha_1 ... alpha_i, what is left at token i of the
state S before the chunk, and g_ij = alpha_(j+1) ... alpha_i of what token j wrote, unrolling the rule gives

    u_i = beta_i (v_i - g_i S^T k_i - sum over j < i of g_ij (k_i . k_j) u_j)

or (I + A) U = beta (V - g K S), A_ij = beta_i g_ij (k_i . k_j) below the diagonal, a triangular system (the WY form:
Yang et al. 2024, arXiv:2406.06484). The rest of the chunk are matrix products; only S passes from chunk to chunk:

    Y = g Q S + M U     M_ij = g_ij (q_i . k_j), j <= i                 (C, D)
    S <- g_C S + sum over j of g_Cj k_j u_j^T                           (D, D)

S knows no positions. Order comes from the fading, and from a short causal convolution: each number of a query, key or
value is mixed with those of the three tokens before, so a key can say what stood before its token.
"""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.configuration import UserError
from layers.attention import Attention, RopeAngles
from layers.cache import KVCache
from layers.norm import RMSNorm, rms_norm

CHUNK = 64  # tokens: longer chunks are fewer steps, one after the other, but more operations for every token
KERNEL_SIZE = 4  # of the convolution, the token itself included


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
    S: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs y (B, H, T, D) of q, k, v (B, H, T, D), log_alpha, beta (B, H, T, 1), and the state S (B, H, D, D) after.

    positions (B, T): of the tokens inside their documents, whose first tokens find S empty; None: S goes on.
    """
    T = q.size(2)
    if T == 1:
        S = log_alpha.exp() * S
        S = S + k.mT @ (beta * (v - k @ S))
        return q @ S, S
    C = min(CHUNK, T)
    # tokens that fill the last chunk change nothing: beta 0 writes nothing, log_alpha 0 lets nothing fade
    q, k, v, log_alpha, beta = (
        F.pad(t, (0, 0, 0, -T % C)).unflatten(2, (-1, C)).movedim(2, 0) for t in (q, k, v, log_alpha, beta)
    )  # (chunks, B, H, C, D or 1)
    # g of all pairs, the state as what place 0 wrote: (C + 1, C + 1). By sums of logarithms: products would underflow
    place = torch.arange(C + 1, device=q.device)
    distance = place[:, None] - place
    is_past = distance >= 0
    if positions is not None:  # of what is before it in its document alone; the last place: of its document, too
        positions = F.pad(positions, (0, -T % C)).unflatten(1, (-1, C)).movedim(1, 0)
        is_past = is_past & (distance <= F.pad(positions, (1, 0))[:, :, None, :, None])
    total = F.pad(log_alpha.squeeze(-1).cumsum(-1), (1, 0))
    g = (total[..., None] - total[..., None, :]).masked_fill(~is_past, -math.inf).exp()
    g, g_state, g_end = g[..., 1:, 1:], g[..., 1:, :1], g[..., -1:, :]  # (C, C), (C, 1), (1, C + 1)
    A = (beta * k) @ k.mT * g
    right = torch.cat((beta * v, beta * g_state * k), dim=-1)  # U = U_0 - U_S S is solved for before S is known
    solved = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)  # reads below the diagonal only
    U_0, U_S = solved.chunk(2, dim=-1)
    M, g_q, g_k, g_end = q @ k.mT * g, g_state * q, g_end[..., 1:].mT * k, g_end[..., :1]
    y = []
    for n in range(len(q)):
        U = U_0[n] - U_S[n] @ S  # (B, H, C, D)
        y.append(g_q[n] @ S + M[n] @ U)
        S = g_end[n] * S + g_k[n].mT @ U
    return torch.cat(y, dim=2)[:, :, :T], S


class LinearAttention(Attention):
    """n_head states of head_dim x head_dim; the cache keeps them, and the last inputs of the convolution.

    Outputs are normalised per head, and gated, before they return to the residual stream. No RoPE; qk_norm does not
    count, as keys must have length 1: with longer ones a write would overshoot.
    """

    PROJECTIONS = ("qkv", "gate", "alpha", "beta")
    IS_RECURRENT = True
    HAS_WINDOW = False

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        width = config.n_head * config.head_dim
        self.qkv = nn.Linear(config.n_embd, 3 * width, bias=config.bias or config.qkv_bias)
        self.gate = nn.Linear(config.n_embd, width, bias=config.bias)
        self.alpha = nn.Linear(config.n_embd, config.n_head, bias=False)
        self.beta = nn.Linear(config.n_embd, config.n_head, bias=False)
        # log alpha = -exp(log_rate) softplus(alpha(x) + offset), as Mamba's (Gu & Dao 2023, arXiv:2312.00752)
        self.log_rate = nn.Parameter(torch.empty(config.n_head))
        self.offset = nn.Parameter(torch.empty(config.n_head))
        self.convolution = nn.Parameter(torch.empty(KERNEL_SIZE, 3 * width))  # the last row is for the token itself
        self.norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.out = nn.Linear(width, config.n_embd, bias=config.bias)

    @torch.no_grad()
    def initialise(self) -> None:
        """Heads begin with memories of 10 to 1,000 tokens (after so many, 1/e is left); all learn their own."""
        self.log_rate.zero_()
        self.offset.copy_(torch.logspace(-1, -3, self.config.n_head).expm1().log())  # softplus(offset) is the rate
        self.convolution.uniform_(-1, 1).mul_(1 / math.sqrt(KERNEL_SIZE))

    def forward(
        self,
        x: torch.Tensor,
        rope: RopeAngles | None,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """mask (B, T): positions inside the documents; None: a row is one text."""
        n_head, D = self.config.n_head, self.config.head_dim
        full = torch.promote_types(x.dtype, torch.float32)  # S adds up a whole text
        new = self.qkv(x)  # (B, T, 3 n_head D)
        if cache is None:
            S = new.new_zeros(len(x), n_head, D, D, dtype=full)
            inputs = F.pad(new, (0, 0, KERNEL_SIZE - 1, 0))
        else:
            S, before = self.recall(cache)
            inputs = torch.cat((before.to(new.dtype), new), dim=1)
        qkv = F.silu(self.convolve(inputs, mask)).unflatten(-1, (3, n_head, D))
        q, k, v = qkv.to(full).permute(2, 0, 3, 1, 4)  # (B, n_head, T, D) each
        # a vector of length 1 has a root mean square of 1 / sqrt(D); queries are divided by sqrt(D) besides
        q, k = (rms_norm(t, t.new_full((D,), w), 1e-6 / D) for t, w in ((q, 1 / D), (k, 1 / math.sqrt(D))))
        alpha, beta = (rate(x).to(full).mT.contiguous()[..., None] for rate in (self.alpha, self.beta))
        log_alpha = -self.log_rate.exp()[:, None, None] * F.softplus(
            alpha + self.offset[:, None, None]
        )  # (B, n_head, T, 1)
        with torch.autocast(x.device.type, enabled=False):
            y, S = gated_delta_rule(q, k, v, log_alpha, beta.sigmoid(), S, mask)
        if cache is not None:
            for kept, now in zip(cache.layers[self.layer], (S, inputs[:, 1 - KERNEL_SIZE :]), strict=True):
                kept.copy_(now)
        y = self.norm(y.transpose(1, 2)).flatten(2).to(x.dtype) * F.silu(self.gate(x))
        return self.residual_dropout(self.out(y))

    def recall(self, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """State and last inputs of every row; zeros in rows that begin, which may hold what an earlier text left."""
        S, before = cache.layers[self.layer]
        if cache.is_even and cache.longest:
            return S, before
        begins = (cache.positions[:, 0] == 0)[:, None, None]
        return S.masked_fill(begins[..., None], 0), before.masked_fill(begins, 0)

    def convolve(self, inputs: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """The convolution of inputs (B, KERNEL_SIZE - 1 + T, width): (B, T, width), a sum over its places."""
        T = inputs.size(1) - KERNEL_SIZE + 1
        total = 0
        for i, weight in enumerate(self.convolution.to(inputs.dtype)):
            distance = KERNEL_SIZE - 1 - i
            term = weight * inputs[:, i : i + T]
            if positions is not None and distance:  # nothing of the document before
                term = term.masked_fill((positions < distance)[..., None], 0)
            total = total + term
        return total

    @staticmethod
    def check(config: Any) -> None:
        if not config.is_causal:
            raise UserError("attention linear reads from left to right: is_causal must be true")
        if set(config.attention) == {"linear"} and config.n_kv_head != config.n_head:
            raise UserError(f"n_kv_head ({config.n_kv_head}) is for full attention: attention linear has n_head of all")

    @staticmethod
    def rope_width(config: Any) -> int:
        return 0

    @staticmethod
    def cache_shapes(config: Any, n_places: int) -> list[tuple[int, ...]]:
        D = config.head_dim
        return [(config.n_head, D, D), (KERNEL_SIZE - 1, 3 * config.n_head * D)]

    @staticmethod
    def fused_rows(config: Any) -> dict[str, list[int]]:
        return {"qkv": [config.n_head * config.head_dim] * 3}

    @staticmethod
    def flops_per_token(config: Any, keys: float) -> float:
        """Forward: k k^T, q k^T, M U (2 C D each) and three products with S (2 D^2); two times as much backward.

        And the triangular system, C 2 D forward, as much backward, and the gradient of A, 4 C D.
        """
        C, D = min(CHUNK, 2 * keys), config.head_dim  # half of a text's tokens are before a token: it has 2 keys
        return config.n_head * (26 * C * D + 18 * D * D)

    @staticmethod
    def activations(config: Any, size: int) -> int:
        C, w, D = min(CHUNK, config.block_size), config.n_head * config.head_dim, config.head_dim
        kept = (4 + size) * config.n_embd + size * 9 * w  # qkv before and after the convolution; the gate, the result
        # in chunks: q, k, v, scaled, times beta and g, both sides of the system, U, y; A, M, g and their factors
        return kept + 4 * (17 * w + config.n_head * (5 * (C + 2) + 2 * D * D // C))

    @staticmethod
    def freed_activations(config: Any, size: int) -> int:
        C, w = min(CHUNK, config.block_size), config.n_head * config.head_dim
        return size * 19 * w + 4 * (18 * w + config.n_head * (C + 50))  # terms and sums of the convolution; in chunks
