"""One token through the network as one compiled function.

One by one, a token takes some 20 operations a layer, and each costs microseconds before it computes anything: on a
small model that is most of the time. Compiled, they are a few loops over memory. A matrix times one vector becomes such
a loop as well, which reads the weights faster than a library's matrix product, made for many rows.

Compiling takes seconds, so it happens in a thread: generation begins without, and goes over when the step is ready.
What was compiled is kept by PyTorch in its cache on disk, and is there sooner the next time.
"""

import contextlib
import threading
import warnings

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layers.cache import KVCache, StaticCache
from layers.one_row import read_one_row_faster

PLACES = 64  # on a CPU a step reads the cache up to the next multiple of so many tokens


class CompiledStep:
    """logits = step(tokens, cache), for n_rows sequences; compiled where no text is longer than n_ready tokens yet."""

    def __init__(self, model: nn.Module, n_rows: int = 1) -> None:
        """model: a GPT in eval mode, for inference from now on. Begins to compile in the background."""
        self.model, self.n_rows, self.n_ready = model, n_rows, 0
        self.recorded: KVCache | None = None  # what the CUDA graph reads and writes
        torch.compiler.reset()  # forget what was compiled before: a function is compiled so often, then no more
        read_one_row_faster(model)
        self.device = model.token_embedding.weight.device
        # for products with few rows, loops of its own instead of a library's (as gpt-fast does)
        options = {"options": {"coordinate_descent_tuning": True}} if self.device.type == "cuda" else {}
        self.compiled = torch.compile(self.forward, fullgraph=True, **options)
        self.thread = threading.Thread(target=self.compile, args=(torch.get_num_threads(),), daemon=True)
        self.thread.start()

    def compile(self, n_threads: int) -> None:
        """Compile, by steps that nobody sees, of every size: most share what is compiled for the first."""
        torch.set_num_threads(n_threads)  # the number is a thread's own, and the compiled function depends on it
        try:
            with torch.inference_mode():
                cache = KVCache(self.model.config, self.n_rows, self.device, self.model.token_embedding.weight.dtype)
                tokens = torch.zeros(self.n_rows, 1, dtype=torch.long, device=self.device)
                while self.n_ready < cache.block_size:
                    cache.lengths[:] = self.n_ready
                    places = self.places(cache)
                    self.compiled(tokens, cache.next_positions(), places, cache)
                    self.n_ready = len(places)
        except Exception as error:  # no C++ compiler, most often; or experts, whose shapes depend on the router
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"generation goes on uncompiled: {reason}", stacklevel=1)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, places: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        static = StaticCache(cache, positions, n_places=len(places))
        # attention as plain products, which are compiled too: kernels for long texts have little to share out here
        with sdpa_kernel(SDPBackend.MATH) if tokens.is_cuda else contextlib.nullcontext():
            return self.model.lm_head(self.model.hidden(tokens, static)[:, -1])

    def places(self, cache: KVCache) -> torch.Tensor:
        """A tensor as long as the part of the cache that a step reads: compiled for one length, it is for all.

        On a GPU that is the whole cache: kernels for a fixed length are faster than the keys are many.
        """
        if self.device.type != "cpu":
            return torch.empty(cache.block_size, 0)
        places = torch.empty(min(PLACES * (int(cache.lengths.max()) // PLACES + 1), cache.block_size), 0)
        torch._dynamo.maybe_mark_dynamic(places, 0)
        return places

    def __call__(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (n_rows, vocab_size) after tokens (n_rows, 1), which follow those in the cache.

        On a GPU the next call overwrites them.
        """
        if cache.lengths.max() >= self.n_ready or len(tokens) != self.n_rows:
            return self.model.lm_head(self.model.hidden(tokens, cache)[:, -1])
        inputs = tokens.clone(memory_format=torch.contiguous_format), cache.next_positions()  # of equal strides
        places = self.places(cache)
        logits = self.replay(inputs, places, cache) if tokens.is_cuda else self.compiled(*inputs, places, cache)
        cache.lengths += 1
        return logits

    def replay(self, inputs: tuple[torch.Tensor, ...], places: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """A CUDA graph launches all kernels of a step at once: one by one, launching takes longer than computing.

        It reads and writes where it did when it was recorded, so it is recorded anew for every cache.
        """
        if self.recorded is not cache:
            self.recorded, self.graph = cache, None
            return self.compiled(*inputs, places, cache)  # also loads what must not be loaded while recording
        if self.graph is None:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), inputs
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = self.compiled(*inputs, places, cache)
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.logits
