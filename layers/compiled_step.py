"""One token through the network as one compiled function.

One by one, a token takes some 20 operations a layer, and each costs microseconds before it computes anything: on a
small model that is most of the time. Compiled, they are a few loops over memory. A matrix times one vector becomes such
a loop as well, which reads the weights faster than a library's matrix product, made for many rows.

Compiling takes seconds, so it happens in a thread: generation begins without, and goes over when the step is ready.
What was compiled is kept by PyTorch in its cache on disk, and is there sooner the next time.
"""

import threading
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from layers.cache import KVCache, StaticCache
from layers.head import Head

MOST_TOKENS = 1024  # on a CPU a longer text goes on uncompiled: all places are read for every token, used or not


class OneRowLinear(nn.Linear):
    """A linear layer that is compiled to a loop of its own where it has one row; the same weights, the same layer."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() or x.numel() != self.in_features or x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        y = (self.weight.float() * x.flatten().float()).sum(-1)  # (out,)
        return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


class CompiledStep:
    """logits = step(tokens, cache), for one sequence; compiled as soon as is_ready."""

    def __init__(self, model: nn.Module) -> None:
        """model: a GPT in eval mode, for inference from now on. Begins to compile in the background."""
        self.model, self.is_ready, self.n_tokens = model, False, model.config.block_size
        torch.compiler.reset()  # forget what was compiled before: a function is compiled so often, then no more
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) in (nn.Linear, Head):
                    setattr(parent, name, OneRowLinear(layer))
        weight = model.token_embedding.weight
        if weight.device.type == "cpu":
            self.n_tokens = min(self.n_tokens, MOST_TOKENS)
        # CUDA graphs replay a whole step at once, where it is the launching of kernels that takes the time
        options = {"mode": "reduce-overhead"} if weight.device.type == "cuda" else {}
        self.compiled = torch.compile(self.forward, fullgraph=True, dynamic=False, **options)
        self.thread = threading.Thread(target=self.compile, args=(torch.get_num_threads(),), daemon=True)
        self.thread.start()

    def compile(self, n_threads: int) -> None:
        """Compile, by taking two steps that nobody sees."""
        torch.set_num_threads(n_threads)  # the number is a thread's own, and the compiled function depends on it
        weight = self.model.token_embedding.weight
        try:
            with torch.inference_mode():
                cache = KVCache(self.model.config, 1, weight.device, weight.dtype)
                for _ in range(2):
                    self.run(torch.zeros(1, 1, dtype=torch.long, device=weight.device), cache)
            self.is_ready = True
        except Exception as error:  # no C++ compiler, most often; or experts, whose shapes depend on the router
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"generation goes on uncompiled: {reason}", stacklevel=1)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self.model.lm_head(self.model.hidden(tokens, StaticCache(cache, positions))[:, -1])

    def __call__(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (1, vocab_size) after tokens (1, 1), which follow those in the cache."""
        if self.is_ready and cache.lengths[0] < self.n_tokens:
            return self.run(tokens, cache)
        return self.model.lm_head(self.model.hidden(tokens, cache)[:, -1])

    def run(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        cache = cache.first(self.n_tokens)
        for tensor in cache.tensors():  # else no CUDA graph is recorded, as the step writes there
            torch._dynamo.mark_static_address(tensor)
        positions = torch.tensor(cache.lengths, device=tokens.device)[:, None]
        logits = self.compiled(tokens.clone(memory_format=torch.contiguous_format), positions, cache)  # equal strides
        cache.lengths += 1
        return logits
