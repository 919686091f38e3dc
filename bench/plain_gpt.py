"""GPT-2 and a training step in the plainest PyTorch: what bench/gpu.py measures beside this project's.

As nanoGPT trains it (github.com/karpathy/nanoGPT): autocast, torch.compile, fused AdamW, the loss read each tenth step.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F


class PlainBlock(nn.Module):
    """A block of GPT-2 in the plainest PyTorch."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """GPT-2: learned positions, LayerNorm, GELU, tied embeddings, the loss of all logits at once."""

    def __init__(self, n_layer: int, n_head: int, width: int, block_size: int, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(PlainBlock(width, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(width, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(idx) + self.positions.weight[: idx.size(1)]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_step(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int, int], batch_size: int
) -> Callable[[], None]:
    """A function that takes one training step on random tokens. sizes: the arguments of PlainGPT."""
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model = PlainGPT(*sizes).to(device)
    network = torch.compile(model) if device.type == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    *_, block_size, vocab_size = sizes
    tokens = torch.randint(vocab_size, (64, batch_size, block_size + 1))
    tokens = tokens.pin_memory() if device.type == "cuda" else tokens
    batches, numbers = itertools.cycle(tokens.unbind()), itertools.count(1)

    def step() -> None:
        batch = next(batches).to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = network(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if next(numbers) % 10 == 0:
            loss.item()

    return step
