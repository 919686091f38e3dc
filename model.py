"""The network: a compact GPT in the form of today's open models (Llama, Qwen), with a KV cache for generation.

    model = GPT(ModelConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)                  # idx, targets: (B, T) token ids
    for tokens in model.generate(idx, max_new_tokens=100, temperature=0.8):
        ...                                             # (B,) token ids, one step at a time

With use_rope, qk_norm and the swiglu MLP it computes exactly what Qwen3 computes; without qk_norm, what Llama computes.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from base.configuration import Config, UserError, option
from layers.experts import MixtureOfExperts, mixtures
from layers.head import Head
from layers.masks import attention_mask, block_masks, positions_inside
from layers.norm import RMSNorm, rms_norm
from layers.sampling import check_sampling, filter_logits, penalise_repetition

SDP_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
ROPE_SCALING = ("none", "linear", "ntk", "yarn")
MLP_HIDDEN = {"swiglu": 8 / 3, "gelu": 4, "relu2": 4}  # width over n_embd: equal parameter counts


@dataclass
class ModelConfig(Config):
    """The shape of the network."""

    block_size: int = option(256, "context window in tokens", minimum=1, maximum=1 << 20)
    vocab_size: int | None = option(None, "number of tokens; null takes the tokenizer's", minimum=1, maximum=1 << 24)
    n_layer: int = option(4, "depth", minimum=1, maximum=10_000)
    n_head: int = option(4, "attention heads", minimum=1)
    n_embd: int = option(256, "width", minimum=1, maximum=1 << 20)
    n_kv_head: int | None = option(None, "key/value heads (grouped-query attention); null: n_head", minimum=1)
    n_hidden: int | None = option(
        None, "width of the MLP; null: 8/3 n_embd for swiglu, else 4 n_embd", minimum=1, maximum=1 << 22
    )
    mlp: str = option("swiglu", "kind of MLP", choices=MLP_HIDDEN)
    dropout: float = option(0.0, "dropout rate", minimum=0.0, maximum=0.99)
    bias: bool = option(False, "biases in the linear layers")
    use_rope: bool = option(True, "rotary positions (RoPE); false: learned positions")
    rope_theta: float = option(10000.0, "base of the RoPE wavelengths", above=0.0)
    rope_scaling: str = option("none", "reading further than trained: rope_factor x as far", choices=ROPE_SCALING)
    rope_factor: float = option(
        1.0, "block_size over that of the training, for rope_scaling", minimum=1.0, maximum=1024
    )
    attention_window: list[int] = option(
        [], "newest tokens that a token looks at, itself included, layer by layer, again from the start; 0: all"
    )
    n_expert: int = option(0, "experts in each MLP (mixture of experts); 0: a dense MLP", minimum=0, maximum=1024)
    n_expert_per_token: int = option(2, "experts that work on a token", minimum=1)
    n_shared_expert: int = option(0, "experts that work on all tokens, beside those", minimum=0, maximum=64)
    expert_balance: str = option("loss", "what keeps experts equally busy", choices=("loss", "bias", "none"))
    router_loss_weight: float = option(0.01, "weight of the balancing loss", minimum=0.0)
    expert_bias_rate: float = option(0.001, "step of the balancing biases", above=0.0)
    norm_eps: float = option(1e-5, "epsilon of RMSNorm", above=0.0)
    qk_norm: bool = option(True, "RMSNorm on queries and keys, per head")
    is_causal: bool = option(True, "causal attention; false: full attention")
    tie_embeddings: bool = option(True, "token embedding and output layer share weights")

    def check(self) -> None:
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_hidden is None:
            self.n_hidden = 32 * math.ceil(MLP_HIDDEN[self.mlp] * self.n_embd / 32)
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head ({self.n_head}) must be divisible by n_kv_head ({self.n_kv_head})")
        if self.use_rope and self.head_dim % 2:
            raise UserError(
                f"RoPE needs an even head size: n_embd / n_head is {self.head_dim}; or set use_rope to false"
            )

        if self.rope_scaling != "none" and not self.use_rope:
            raise UserError(f"rope_scaling {self.rope_scaling} needs use_rope: learned positions end where they end")
        if self.rope_scaling == "yarn" and self.rope_theta <= 1:
            raise UserError(f"rope_scaling yarn needs a rope_theta above 1, got {self.rope_theta:g}")
        if self.n_expert and self.n_expert_per_token > self.n_expert:
            raise UserError(
                f"n_expert_per_token ({self.n_expert_per_token}) must not be above n_expert ({self.n_expert})"
            )
        if self.n_expert and (self.mlp != "swiglu" or self.bias):
            raise UserError("experts are swiglu MLPs without biases: mlp must be swiglu, bias false")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def windows(self) -> list[int]:
        """Every layer's attention window; 0: none."""
        pattern = self.attention_window or [0]
        return [pattern[layer % len(pattern)] for layer in range(self.n_layer)]


class KVCache:
    """Keys and values of the tokens seen so far, for every layer; of one with an attention window, the newest only."""

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.windows = config.windows
        heads, room, size = config.n_kv_head, config.block_size, config.head_dim
        new = lambda length: torch.empty(batch_size, heads, length, size, device=device, dtype=dtype)  # noqa: E731
        self.keys = [new(0 if window else room) for window in self.windows]
        self.values = [new(0 if window else room) for window in self.windows]
        self.length = 0  # tokens seen; the model advances it after its last layer

    def held(self, window: int) -> int:
        """Tokens seen that a layer with this window still holds."""
        return min(self.length, window - 1) if window else self.length

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k, v of shape (B, n_kv_head, T, head_dim) to a layer; returns all that it holds, and them."""
        window = self.windows[layer]
        if window:
            held = self.held(window)
            k = torch.cat((self.keys[layer][:, :, :held], k), dim=2)
            v = torch.cat((self.values[layer][:, :, :held], v), dim=2)
            first = max(0, k.size(2) - (window - 1))
            self.keys[layer], self.values[layer] = k[:, :, first:], v[:, :, first:]
            return k, v
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def rope_table(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines (block_size, 1, head_dim) of rotary positions (Su et al. 2021, arXiv:2104.09864).

    The half-rotation convention of Llama and Qwen: dimension i turns together with dimension i + head_dim / 2.
    """
    frequency, scale = rope_frequencies(config)
    angle = torch.outer(torch.arange(config.block_size).float(), frequency)[:, None, :]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Angles per position (head_dim / 2,), and the factor on queries and keys, by rope_scaling.

    linear: positions in between (Chen et al. 2023, arXiv:2306.15595). ntk: a larger base, which stretches the slow
    dimensions and spares the fast ones. yarn: those that turn often in the trained window stay, those that never turn
    once are interpolated, with a ramp between (Peng et al. 2023, arXiv:2309.00071, which describes all three).
    """
    D, factor, theta = config.head_dim, config.rope_factor, config.rope_theta
    if config.rope_scaling == "ntk" and D > 2:
        theta = theta * factor ** (D / (D - 2))
    frequency = 1.0 / theta ** (torch.arange(0, D, 2).float() / D)
    if config.rope_scaling == "linear":
        return frequency / factor, 1.0
    if config.rope_scaling != "yarn":
        return frequency, 1.0
    trained = config.block_size / factor
    dimension = lambda turns: D * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
    low, high = max(0, math.floor(dimension(32))), min(D - 1, math.ceil(dimension(1)))
    ramp = ((torch.arange(D // 2) - low) / max(0.001, high - low)).clamp(0, 1)  # 0: stays, 1: is interpolated
    return frequency * (1 - ramp) + frequency / factor * ramp, 0.1 * math.log(factor) + 1


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, T, n_head, head_dim) by its positions' angles, cos and signed sin ([B,] T, 1, head_dim)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head or grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        n_heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, n_heads * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.residual_dropout = nn.Dropout(config.dropout)

    def project(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, n_head, T, head_dim), keys and values (B, n_kv_head, T, head_dim) of x (B, T, n_embd)."""
        config = self.config
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, config.head_dim)
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
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        config = self.config
        B, T, C = x.shape
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        is_causal = config.is_causal and mask is None and T > 1
        dropout = config.dropout if self.training else 0.0
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=config.n_kv_head < config.n_head)
        else:
            if config.n_kv_head < config.n_head:
                k, v = (t.repeat_interleave(config.n_head // config.n_kv_head, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.residual_dropout(self.out(y))

    def weights(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The attention weights (B, n_head, T, T) that forward() applies without ever forming them; row: query."""
        q, k, _ = self.project(x, rope)
        k = k.repeat_interleave(self.config.n_head // self.config.n_kv_head, dim=1)
        scores = q @ k.mT / math.sqrt(self.config.head_dim)
        if mask is None and self.config.is_causal:
            mask = torch.ones_like(scores, dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(-1)


class MLP(nn.Module):
    """swiglu (Shazeer 2020, arXiv:2002.05202), gelu, or relu2 (So et al. 2021, arXiv:2109.08668)."""

    def __init__(self, config: ModelConfig, n_hidden: int) -> None:
        super().__init__()
        self.kind = config.mlp
        # swiglu: gate and up projections in one matrix, gate first
        self.up = nn.Linear(config.n_embd, n_hidden * (2 if self.kind == "swiglu" else 1), bias=config.bias)
        self.down = nn.Linear(n_hidden, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        if self.kind == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        elif self.kind == "gelu":
            x = F.gelu(x)
        else:
            x = F.relu(x).square()
        return self.residual_dropout(self.down(x))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        if config.n_expert:
            n_shared = config.n_shared_expert
            self.mlp = MixtureOfExperts(config, MLP(config, n_shared * config.n_hidden) if n_shared else None)
        else:
            self.mlp = MLP(config, config.n_hidden)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Token ids in, logits over the next token out (or, with full attention, over the token at each position)."""

    def __init__(self, config: ModelConfig, sdp_kernel: str = "auto") -> None:
        """sdp_kernel: auto, or the one SDPA backend to allow (a key of SDP_KERNELS); math runs everywhere."""
        super().__init__()
        if config.vocab_size is None:
            raise UserError("vocab_size is not set: it comes from the tokenizer")
        self.config, self.sdp_kernel, self.windows = config, sdp_kernel, config.windows
        self.restart_positions = True  # in every document
        self.use_flex = False  # flex attention where there are masks, once compiled
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.use_rope:
            cos, sin = rope_table(config)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        else:
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = Head(config.n_embd, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        self._initialise()
        # counted here, because sharding (DeepSpeed's ZeRO-3) empties parameters later
        self._n_weights = sum(p.numel() for p in self.parameters())
        matrices = {name: p.numel() for name, p in self.blocks.named_parameters() if p.dim() >= 2}
        for name in matrices if config.n_expert else ():
            if name.endswith(("mlp.up", "mlp.down")):  # of a token's experts
                matrices[name] = matrices[name] * config.n_expert_per_token // config.n_expert
        self._n_matrix_weights = sum(matrices.values()) + self.lm_head.weight.numel()

    def _initialise(self) -> None:
        """Normal weights of std 0.02; projections onto the residual stream scaled by 1/sqrt(2 n_layer) (GPT-2)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() >= 2:
                onto_residual = name.endswith(("attention.out.weight", "down.weight", "mlp.down"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if onto_residual else 0.02)

    def hidden(
        self, idx: torch.Tensor, cache: KVCache | None = None, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Final hidden states (B, T, n_embd) of token ids (B, T); with a cache, idx follows the tokens in it.

        documents (B, T): a number for every token's document; attention stays inside. With restart_positions each of
        them begins at position 0.
        """
        start = cache.length if cache is not None else 0
        T = idx.size(1)
        end = start + T
        if end > self.config.block_size:
            raise UserError(f"{end} tokens do not fit the context window of {self.config.block_size} (block_size)")
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():
            check_token_ids(idx, self.config.vocab_size)  # on a GPU this would be an assert that ends the process
        x = self.token_embedding(idx)  # (B, T, n_embd)
        rope, positions = None, slice(start, end)
        if documents is not None and self.restart_positions:
            positions = positions_inside(documents)
        if self.config.use_rope:
            rope = (self.rope_cos[positions], self.rope_sin[positions])
        else:
            x = x + self.position_embedding.weight[positions]
        x = self.embedding_dropout(x)
        masks = self.masks(T, cache, documents, idx.device)
        with sdpa_kernel(SDP_KERNELS[self.sdp_kernel]) if self.sdp_kernel != "auto" else contextlib.nullcontext():
            for block, window in zip(self.blocks, self.windows, strict=True):
                x = block(x, rope, masks[window], cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def masks(
        self, T: int, cache: KVCache | None, documents: torch.Tensor | None, device: torch.device
    ) -> dict[int, torch.Tensor | BlockMask | None]:
        """What T tokens after those of the cache may look at, by the layer's attention window."""
        windows, is_causal = set(self.windows), self.config.is_causal
        drops = self.training and self.config.dropout > 0  # attention weights, which flex attention does not offer
        if self.use_flex and torch.compiler.is_compiling() and cache is None and not drops:
            return block_masks(T, windows, is_causal, documents, device)
        held = {window: cache.held(window) if cache else 0 for window in windows}
        return {w: attention_mask(T, held[w], w, is_causal, documents, device) for w in windows}

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        reduction: str = "mean",
        documents: torch.Tensor | None = None,
        with_logits: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits (B, T, vocab_size) and, given targets (B, T), the cross-entropy loss in nats.

        loss_mask (B, T): 1 where a target counts, 0 where not; the mean is taken over those that count.
        reduction: "mean" or "sum" (scalars), or "none": (B, T), 0 where the mask is 0. documents: as in hidden().
        In training, "mean" and "sum" hold the routers' balancing loss too, as often as targets count.
        with_logits: false where only the loss ("mean" or "sum") is wanted: None instead, and much less memory.
        """
        hidden = self.hidden(idx, documents=documents)
        if targets is None:
            return self.lm_head(hidden), None
        if not with_logits:
            count = targets.numel() if loss_mask is None else loss_mask.sum().clamp(min=1)
            total = self.lm_head(hidden, targets, loss_mask) + self.router_loss() * count
            return None, total if reduction == "sum" else total / count
        logits = self.lm_head(hidden)
        if loss_mask is None and reduction != "none":
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
            return logits, loss + self.router_loss() * (targets.numel() if reduction == "sum" else 1)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
        if loss_mask is not None:
            losses = losses * loss_mask
        if reduction == "none":
            return logits, losses
        count = loss_mask.sum().clamp(min=1)
        total = losses.sum() + self.router_loss() * count
        return logits, total if reduction == "sum" else total / count

    def router_loss(self) -> torch.Tensor | float:
        """The weighted balancing loss of the last forward pass, the mean over layers; 0 where there is none."""
        if not (self.training and self.config.n_expert and self.config.expert_balance == "loss"):
            return 0.0
        losses = [mixture.router_loss for mixture in mixtures(self)]
        return self.config.router_loss_weight * sum(losses) / len(losses)

    def joined_rows(self, name: str, n_rows: int) -> list[int]:
        """Rows of each of the matrices that the weight of this name joins, n_rows in all."""
        if name.endswith("qkv.weight"):
            kv = self.config.n_kv_head * self.config.head_dim
            return [n_rows - 2 * kv, kv, kv]
        is_gated = self.config.mlp == "swiglu" and name.endswith((".up", ".up.weight"))
        return [n_rows // 2] * 2 if is_gated else [n_rows]

    def parameter_count(self) -> int:
        """Number of weights; tied ones count once."""
        return self._n_weights

    def flops_per_token(self, sequence_length: int | None = None) -> int:
        """Floating-point operations to train on one token, forward and backward.

        6 per weight of a matrix product (the embedding look-up is none; of experts, those at work), and 12 per layer,
        width and key attended to: Chowdhery et al. 2022, arXiv:2204.02311, appendix B; with causal attention only half
        of the keys count.
        """
        config, T = self.config, sequence_length or self.config.block_size
        keys = 0.0  # that a token looks at in the mean, over all layers
        for window in config.windows:
            w = min(window, T) if window else T
            keys += w - w * w / (2 * T) if config.is_causal else min(T, 2 * w - 1 if window else T)
        return int(6 * self._n_matrix_weights + 12 * config.n_embd * keys)

    @torch.inference_mode()
    def predict(self, idx: torch.Tensor) -> torch.Tensor:
        """For full attention: the likeliest token (B, T) at every position, in one pass."""
        if self.config.is_causal:
            raise UserError("predict() is for models with full attention (is_causal: false); use generate()")
        return self.lm_head(self.hidden(idx)).argmax(-1)

    @torch.no_grad()
    def attention_maps(self, idx: torch.Tensor) -> torch.Tensor:
        """Attention weights (n_layer, B, n_head, T, T) over token ids (B, T); each row, a query's, sums to 1."""
        inputs: list[tuple] = []
        hooks = [b.attention.register_forward_pre_hook(lambda _, args: inputs.append(args)) for b in self.blocks]
        try:
            self.hidden(idx)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([b.attention.weights(*args[:3]) for b, args in zip(self.blocks, inputs, strict=True)])

    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_tokens: tuple[int, ...] = (),
        seed: int | None = None,
        use_cache: bool = True,
    ) -> Iterator[torch.Tensor]:
        """Continue token ids (B, T >= 1): yields one (B,) tensor of tokens a step.

        temperature 0 is greedy. A row that drew one of stop_tokens repeats it; generation ends when all rows have.
        Past the context window: when it is full, the newest three quarters of its tokens are kept, read again from
        position 0, and generation goes on; of a longer prompt the newest block_size tokens are read, with a warning.
        """
        if not self.config.is_causal:
            raise UserError("generate() needs causal attention; a model with is_causal: false answers by predict()")
        if idx.dim() != 2 or idx.size(1) == 0:
            raise UserError("generate() needs a prompt of at least one token, shape (B, T)")
        check_token_ids(idx.cpu(), self.config.vocab_size)
        check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if idx.size(1) > self.config.block_size:
            warnings.warn(
                f"the prompt has {idx.size(1)} tokens; the model reads the newest {self.config.block_size}",
                stacklevel=2,
            )
        generator = torch.Generator(device=idx.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()

        def draw(logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
            logits = penalise_repetition(logits.float(), window, repetition_penalty)
            if temperature == 0:
                return logits.argmax(-1)
            probabilities = filter_logits(logits / temperature, top_k, top_p, min_p).softmax(-1)
            return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

        return self._generate(idx, max_new_tokens, draw, stop_tokens, use_cache)

    @torch.inference_mode()
    def _generate(self, idx, max_new_tokens, draw, stop_tokens, use_cache) -> Iterator[torch.Tensor]:
        block_size = self.config.block_size
        window = idx[:, -block_size:]
        dtype = self.lm_head.weight.dtype
        cache = KVCache(self.config, idx.size(0), idx.device, dtype) if use_cache else None
        unread = window  # what the cache has not seen
        stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        stop = torch.tensor(stop_tokens, device=idx.device, dtype=torch.long)
        tokens = window[:, -1]
        for _ in range(max_new_tokens):
            hidden = self.hidden(unread if use_cache else window, cache)
            drawn = draw(self.lm_head(hidden[:, -1]), window)
            tokens = torch.where(stopped, tokens, drawn)
            yield tokens
            stopped |= torch.isin(tokens, stop)
            if len(stop_tokens) and stopped.all():
                return
            window = torch.cat((window, tokens[:, None]), dim=1)
            unread = window[:, -1:]
            if window.size(1) > block_size:
                window = unread = window[:, -max(1, block_size - block_size // 4) :]
                if use_cache:
                    cache.length = 0


def check_token_ids(idx: torch.Tensor, vocab_size: int) -> None:
    """Raises UserError unless all token ids are in 0..vocab_size-1."""
    if idx.numel() and not (idx.min() >= 0 and idx.max() < vocab_size):
        low, high = idx.min().item(), idx.max().item()
        raise UserError(f"token ids {low}..{high} are outside the vocabulary 0..{vocab_size - 1}: another tokenizer?")
