"""The network: a compact GPT in the form of today's open models (Llama, Qwen), with a KV cache for generation.

    model = GPT(ModelConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)                  # idx, targets: (B, T) token ids
    for tokens in model.generate(idx, max_new_tokens=100, temperature=0.8):
        ...                                             # (B,) token ids, one step at a time

With use_rope, qk_norm and the swiglu MLP it computes exactly what Qwen3 computes; without qk_norm, what Llama computes.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from base.configuration import Config, UserError, option
from layers.attention import Attention, FullAttention, RopeAngles, check_kinds
from layers.cache import KVCache
from layers.experts import MixtureOfExperts, Routing, check_experts
from layers.generation import generate
from layers.head import Head
from layers.latent_attention import LatentAttention
from layers.linear_attention import LinearAttention
from layers.masks import attention_mask, block_masks, copies_mask, positions_inside
from layers.mlp import MLP, MLP_HIDDEN
from layers.multi_token import FutureModule, future_config, future_loss
from layers.norm import NORMS, make_norm
from layers.rope import ROPE_SCALING, check_rope, rope_table
from layers.sampling import check_token_ids
from layers.sparse_attention import SparseAttention
from vision.encoder import VisionEncoder, check_vision, encoder_shape, put_patches

SDP_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
ATTENTION: dict[str, type[Attention]] = {
    "full": FullAttention,
    "latent": LatentAttention,
    "linear": LinearAttention,
    "sparse": SparseAttention,
}


@dataclass
class ModelConfig(Config):
    """The shape of the network."""

    block_size: int = option(256, "context window in tokens", minimum=1, maximum=1 << 20, section="Model")
    vocab_size: int | None = option(None, "number of tokens; null: the tokenizer's", minimum=1, maximum=1 << 24)
    n_layer: int = option(4, "number of transformer blocks (depth)", minimum=1, maximum=10_000)
    n_head: int = option(4, "attention heads", minimum=1)
    n_embd: int = option(256, "embedding dimension (width)", minimum=1, maximum=1 << 20)
    n_kv_head: int | None = option(None, "key/value heads (grouped-query attention); null: n_head", minimum=1)
    head_dim: int | None = option(None, "dimension of a head; null: n_embd / n_head", minimum=1, maximum=1 << 20)
    n_hidden: int | None = option(
        None, "hidden dimension of the MLP; null: 8/3 n_embd for swiglu, else 4 n_embd", minimum=1, maximum=1 << 22
    )
    mlp: str = option("swiglu", "kind of MLP", choices=MLP_HIDDEN)
    dropout: float = option(0.0, "dropout rate", minimum=0.0, maximum=0.99)
    bias: bool = option(False, "biases in the linear layers, and in layernorm")
    qkv_bias: bool = option(False, "biases on queries, keys and values alone, as in Qwen2")
    norm: str = option("rmsnorm", "normalisation; layernorm: as in GPT-2", choices=NORMS)
    norm_eps: float = option(1e-5, "epsilon of the normalisation", above=0.0)
    qk_norm: bool = option(True, "RMSNorm on queries and keys, per head")
    is_causal: bool = option(True, "causal attention; false: full attention")
    mask_token: bool = option(False, "an embedding for masked tokens, the id vocab_size; loss diffusion sets it")
    attention: list[str] = option(
        ["full"], "kind of attention of each layer, repeated over the layers", choices=ATTENTION
    )
    attention_window: list[int] = option([], "sliding-window size of each layer, repeated over the layers; 0: none")
    kv_rank: int | None = option(
        None,
        "attention latent: numbers that keys and values of a token are made from; null: 2 head_dim",
        minimum=1,
        maximum=1 << 20,
    )
    q_rank: int | None = option(
        None, "attention latent: likewise of its queries; 0, null: from the token itself", minimum=0, maximum=1 << 20
    )
    rope_dim: int | None = option(
        None, "attention latent: rotary part of a head's width; null: half of head_dim", minimum=0, maximum=1 << 20
    )
    sparse_block_size: int | None = option(None, "attention sparse: keys of a block; null: 16", minimum=1)
    sparse_top_k: int | None = option(
        None, "attention sparse: blocks that a query reads; null: a quarter of the window", minimum=1
    )
    tie_embeddings: bool = option(True, "token embedding and output layer share weights")

    use_rope: bool = option(
        True, "rotary position embeddings (RoPE); false: learned position embeddings", section="Positions"
    )
    rope_theta: float = option(10000.0, "base of the RoPE frequencies", above=0.0)
    rope_scaling: str = option("none", "context extension beyond the trained window", choices=ROPE_SCALING)
    rope_factor: float = option(
        1.0, "for rope_scaling: how many times the trained context window", minimum=1.0, maximum=1024
    )
    rope_trained_length: int | None = option(
        None, "for rope_scaling yarn, llama3: the trained context window; null: block_size / rope_factor", minimum=1
    )

    n_expert: int = option(
        0, "experts in every MLP; 0: a dense MLP", minimum=0, maximum=1024, section="Mixture of experts"
    )
    n_expert_per_token: int = option(2, "experts that a token is routed to (top-k)", minimum=1)
    n_shared_expert: int = option(0, "shared experts, which process every token", minimum=0, maximum=64)
    shortcut_experts: bool = option(False, "experts read what the layer before gave its MLP; needs n_shared_expert")
    expert_balance: str = option(
        "loss",
        "load balancing: auxiliary loss, bias on the router's choice (auxiliary-loss-free), or none",
        choices=("loss", "bias", "none"),
    )
    router_loss_weight: float = option(0.01, "weight of the auxiliary loss", minimum=0.0)
    expert_bias_rate: float = option(0.001, "update rate of the biases", above=0.0)

    n_future: int = option(
        1, "tokens that each position learns to predict", minimum=1, maximum=4, section="Multi-token prediction"
    )
    future_loss_weight: float = option(0.3, "weight of the modules' mean loss in training", minimum=0.0)
    image_size: int = option(
        0, "width and height that images get, in pixels; 0: text alone", minimum=0, maximum=4096, section="Vision"
    )
    patch_size: int = option(8, "width and height of a patch of an image, in pixels", minimum=1, maximum=4096)
    image_last: bool = option(True, "an image stands after its question, so that its patches see what is asked")
    n_vision_layer: int = option(
        0, "blocks of full attention over the patches, before the text; 0: a projection alone", minimum=0, maximum=1000
    )

    def check(self) -> None:
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_hidden is None:
            self.n_hidden = 32 * math.ceil(MLP_HIDDEN[self.mlp] * self.n_embd / 32)
        if self.rope_trained_length is None:  # kept from now on, however far the window is widened
            self.rope_trained_length = max(1, round(self.block_size / self.rope_factor))
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise UserError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head ({self.n_head}) must be divisible by n_kv_head ({self.n_kv_head})")
        check_kinds(self, ATTENTION)
        check_rope(self)
        check_experts(self)
        if self.n_future > 1 and not self.is_causal:
            raise UserError(f"n_future {self.n_future} needs is_causal: full attention has seen them all")
        if self.mask_token and (self.n_future > 1 or self.image_size):
            raise UserError("a model of masked diffusion has no n_future and no image_size: leave them out")
        check_vision(self)

    @property
    def n_patches(self) -> int:
        """Patches of an image: as many places it takes among the tokens."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def windows(self) -> list[int]:
        """Every layer's sliding window; 0: none."""
        return over_layers(self.attention_window or [0], self.n_layer)

    @property
    def attention_classes(self) -> list[type[Attention]]:
        """Every layer's kind of attention."""
        return over_layers([ATTENTION[kind] for kind in self.attention], self.n_layer)


def over_layers(pattern: list, n_layer: int) -> list:
    """A pattern, repeated over the layers."""
    return [pattern[layer % len(pattern)] for layer in range(n_layer)]


class Block(nn.Module):
    """Pre-norm transformer block: attention moves information between tokens, the MLP works on each by itself.

    Both are added to the residual stream, whose gradient so reaches every layer undiminished.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.attention_norm = make_norm(config)
        self.attention = config.attention_classes[layer](config, layer)
        self.mlp_norm = make_norm(config)
        if config.n_expert:
            n_shared = config.n_shared_expert
            self.mlp = MixtureOfExperts(config, MLP(config, n_shared * config.n_hidden) if n_shared else None)
        else:
            self.mlp = MLP(config, config.n_hidden)

    def forward(
        self,
        x: torch.Tensor,
        rope: RopeAngles | None,
        mask: torch.Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
        routing: Routing | None = None,
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        h = self.mlp_norm(x)
        return x + (self.mlp(h, routing) if self.config.n_expert else self.mlp(h))


class GPT(nn.Module):
    """Token ids in, logits over the next token out (or, with full attention, over the token at each position)."""

    def __init__(self, config: ModelConfig, sdp_kernel: str = "auto") -> None:
        """sdp_kernel: auto, or the one SDPA backend to allow (a key of SDP_KERNELS); math runs everywhere."""
        super().__init__()
        if config.vocab_size is None:
            raise UserError("vocab_size is not set: it comes from the tokenizer")
        self.config, self.sdp_kernel = config, sdp_kernel
        layers = zip(config.attention_classes, config.windows, strict=True)
        self.windows = [window if attention.HAS_WINDOW else None for attention, window in layers]
        self.restart_positions = True  # in every document
        self.router_loss: torch.Tensor | float = 0.0  # of the last pass with targets, weighted, mean over layers
        self.use_flex = False  # flex attention where there are masks, once compiled
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.mask_token:  # a table of its own: the output layer has no logit for it, so it is never drawn
            self.mask_embedding = nn.Embedding(1, config.n_embd)
        self.rope_widths = [attention.rope_width(config) * config.use_rope for attention in config.attention_classes]
        for width in set(self.rope_widths) - {0}:
            cos, sin = rope_table(
                *(config.block_size, width, config.rope_theta),
                *(config.rope_scaling, config.rope_factor, config.rope_trained_length),
            )
            self.register_buffer(self.rope_name("cos", width), cos, persistent=False)  # computed anew, so not saved
            self.register_buffer(self.rope_name("sin", width), sin, persistent=False)
        if not config.use_rope:
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.vision = None
        if config.image_size:
            shape = encoder_shape(config)
            self.vision = VisionEncoder(config, [Block(shape, layer) for layer in range(config.n_vision_layer)])
        self.lm_head = Head(config.n_embd, config.vocab_size)
        modules = future_config(config)
        self.future = nn.ModuleList(FutureModule(config, Block(modules, i)) for i in range(modules.n_layer))
        if config.tie_embeddings:  # a token's embedding is also the direction that predicts it (arXiv:1608.05859)
            self.lm_head.weight = self.token_embedding.weight
        self._initialise()
        # counted here, because sharding (DeepSpeed's ZeRO-3) empties parameters later
        self._n_weights = sum(p.numel() for p in self.parameters())
        layers = [(name, p) for name, p in self.named_parameters() if name.startswith(("blocks.", "future."))]
        matrices = {name: p.numel() for name, p in layers if p.dim() >= 2}
        for name in matrices if config.n_expert else ():
            if name.endswith(("mlp.up", "mlp.down")):  # a token passes through n_expert_per_token experts only
                matrices[name] = matrices[name] * config.n_expert_per_token // config.n_expert
        self._n_matrix_weights = sum(matrices.values()) + config.n_future * self.lm_head.weight.numel()

    def _initialise(self) -> None:
        """Normal weights of std 0.02; projections onto the residual stream scaled by 1/sqrt(2 n_layer) (GPT-2).

        2 n_layer terms are added up in the residual stream: so scaled, its variance does not grow with depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() >= 2:
                onto_residual = name.endswith(("attention.out.weight", ".down.weight", "mlp.down"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if onto_residual else 0.02)
        for block in [*self.blocks, *(module.block for module in self.future)]:
            block.attention.initialise()
        if self.vision is not None:
            self.vision.initialise()

    def hidden(
        self,
        idx: torch.Tensor,
        cache: KVCache | None = None,
        documents: torch.Tensor | None = None,
        routing: Routing | None = None,
        images: torch.Tensor | None = None,
        blocks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final hidden states (B, T, n_embd) of token ids (B, T); with a cache, each row follows the tokens in its own.

        documents (B, T): a number for every token's document; attention stays inside. With restart_positions each of
        them begins at position 0. routing: for a mixture of experts, which tokens are padding; collects losses.
        images (N, 3, image_size, image_size): see embed(). blocks (B, T), for idx (B, 2 T): see copies_mask().
        """
        T, routing = idx.size(1) if blocks is None else blocks.size(1), routing or Routing()
        positions = cache.begin(T) if cache is not None else self.positions(T, documents, blocks)
        end = T + (cache.longest if cache is not None else 0)
        if end > self.config.block_size:
            raise UserError(f"{end} tokens do not fit the context window of {self.config.block_size} (block_size)")
        x = self.embed(idx, images)  # (B, T, n_embd)
        if not self.config.use_rope:  # once, on the input; RoPE: inside of attention, on queries and keys
            x = x + self.position_embedding.weight[positions]
        x = self.embedding_dropout(x)
        ropes, masks = self.rope(positions), self.masks(T, cache, documents, idx.device, blocks)
        with self.attention_kernel():
            for block, rope, window in zip(self.blocks, ropes, self.windows, strict=True):
                x = block(x, rope, masks[window], cache, routing)
        if cache is not None:
            cache.advance()
        return self.norm(x)

    def positions(
        self, T: int, documents: torch.Tensor | None, blocks: torch.Tensor | None = None
    ) -> torch.Tensor | slice:
        """Positions of T tokens without a cache: (B, T) where each document (B, T) begins at 0; else the same slice."""
        if documents is None or not self.restart_positions:
            return slice(T) if blocks is None else torch.arange(T, device=blocks.device).repeat(2)
        return positions_inside(documents).repeat(1, 1 if blocks is None else 2)

    def attention_kernel(self) -> contextlib.AbstractContextManager:
        """Where attention is computed: allows the kernel of sdp_kernel alone."""
        return sdpa_kernel(SDP_KERNELS[self.sdp_kernel]) if self.sdp_kernel != "auto" else contextlib.nullcontext()

    def embed(self, idx: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings (B, T, n_embd) of token ids (B, T). The id vocab_size is of no token: of patches, or of the mask.

        The patches of images (N, 3, image_size, image_size) take these places in order, through all rows.
        """
        has_others = images is not None or self.config.mask_token
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU an assert would end the process
            check_token_ids(idx, self.config.vocab_size + has_others)
        if not has_others:
            return self.token_embedding(idx)
        is_other = idx == self.config.vocab_size
        x = self.token_embedding(idx.masked_fill(is_other, 0))
        if images is not None:
            return put_patches(self.vision, images, x, is_other)
        return torch.where(is_other[..., None], self.mask_embedding(idx.new_zeros(1, 1)), x)

    def rope_name(self, part: str, width: int) -> str:
        """The buffer of the cosines or sines for so many numbers of a head: rope_cos, rope_sin where they are all."""
        return f"rope_{part}" if width == self.config.head_dim else f"rope_{part}_{width}"

    def rope(self, positions: torch.Tensor | slice) -> list[RopeAngles | None]:
        """Every layer's angles of RoPE at these positions; None where it rotates nothing."""
        tables: dict[int, RopeAngles | None] = {0: None}
        for width in set(self.rope_widths) - {0}:
            cos, sin = (getattr(self, self.rope_name(part, width)) for part in ("cos", "sin"))
            tables[width] = (cos[positions], sin[positions])
        return [tables[width] for width in self.rope_widths]

    def masks(
        self,
        T: int,
        cache: KVCache | None,
        documents: torch.Tensor | None,
        device: torch.device,
        blocks: torch.Tensor | None = None,
    ) -> dict[int | None, torch.Tensor | BlockMask | None]:
        """By sliding window: which keys T tokens see, after those of the cache. None: SDPA's own causal mask does.

        Of layers that have no window, under None: positions in the documents (B, T), if there are any.
        """
        windows, is_causal = set(self.windows) - {None}, self.config.is_causal
        if blocks is not None:
            return {window: copies_mask(blocks, window, documents) for window in windows}
        starts = {None: None if documents is None else positions_inside(documents)}
        drops = self.training and self.config.dropout > 0  # attention weights, which flex attention does not offer
        if self.use_flex and torch.compiler.is_compiling() and cache is None and not drops:
            return starts | block_masks(T, windows, is_causal, documents, device)
        if cache is not None:
            return starts | {window: cache.mask(window) for window in windows}
        return starts | {window: attention_mask(T, window, is_causal, documents, device) for window in windows}

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        reduction: str = "mean",
        documents: torch.Tensor | None = None,
        with_logits: bool = True,
        images: torch.Tensor | None = None,
        blocks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits (B, T, vocab_size) and, given targets (B, T), the cross-entropy loss in nats.

        loss_mask (B, T): 1 where a target counts, 0 where not; the mean is taken over those that count.
        reduction: "mean" or "sum" (scalars), or "none": (B, T), 0 where the mask is 0. documents: as in hidden().
        In training, "mean" and "sum" include the modules' loss (n_future), and the experts' load-balancing loss, times
        the sum of loss_mask in a sum.
        with_logits: false where only the loss is wanted: None instead, and much less memory. images: as in embed().
        blocks: as in hidden(), with targets and loss_mask (B, 2 T).
        """
        routing = Routing()
        if self.config.mask_token:  # any token may be masked, or not: what belongs to no document is padding
            routing.is_token = None if documents is None else documents.repeat(1, idx.size(1) // documents.size(1)) > 0
        elif self.config.n_expert and loss_mask is not None:  # what follows a row's last target is padding
            routing.is_token = loss_mask.flip(1).cummax(1).values.flip(1) > 0
        hidden = self.hidden(idx, None, documents, routing, images, blocks)
        if targets is None:
            return self.lm_head(hidden), None
        router_loss = extra = 0.0
        if self.future and self.training and reduction != "none":
            extra = future_loss(self, hidden, targets, loss_mask, documents, routing)
        if routing.losses and self.config.expert_balance == "loss":
            router_loss = self.config.router_loss_weight * sum(routing.losses) / len(routing.losses)
        self.router_loss = router_loss  # for losses that are made of log-probabilities, which do not include it
        count = targets.numel() if loss_mask is None else loss_mask.sum().clamp(min=1)
        extra = extra + router_loss * count
        if not with_logits and reduction == "none":
            return None, self.lm_head(hidden, targets, loss_mask, "none")
        if not with_logits:
            total = self.lm_head(hidden, targets, loss_mask) + extra
            return None, total if reduction == "sum" else total / count
        logits = self.lm_head(hidden)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
        if loss_mask is not None:
            losses = losses * loss_mask
        if reduction == "none":
            return logits, losses
        total = losses.sum() + extra
        return logits, total if reduction == "sum" else total / count

    def parameter_count(self) -> int:
        """Number of weights; tied ones count once."""
        return self._n_weights

    def flops_per_token(self, sequence_length: int | None = None) -> int:
        """Floating-point operations to train on one token, forward and backward.

        6 per weight of a matrix product (the embedding look-up is none; of experts, the active ones), and those of
        attention (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); if causal, only half of the keys count.
        A model that sees has an image in every sequence.
        """
        config, T = self.config, sequence_length or self.config.block_size
        total = 6.0 * self._n_matrix_weights
        layers = list(zip(config.attention_classes, config.windows, strict=True))
        for attention, window in layers + layers[-1:] * (config.n_future - 1):
            w = min(window, T) if window else T
            keys = w - w * w / (2 * T) if config.is_causal else min(T, 2 * w - 1 if window else T)  # on average
            total += attention.flops_per_token(config, keys)
        if self.vision is not None:
            total += self.vision.flops_per_image() / T
        return int(total) * (1 + (config.mask_token and config.is_causal))  # then of a text and its copy

    generate = generate  # token by token: layers/generation.py

    @torch.inference_mode()
    def predict(self, idx: torch.Tensor) -> torch.Tensor:
        """For full attention: the likeliest token (B, T) at every position, in one pass."""
        if self.config.is_causal:
            raise UserError("predict() is for models with full attention (is_causal: false); use generate()")
        return self.lm_head(self.hidden(idx)).argmax(-1)
