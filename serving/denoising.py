"""Answers of a model of masked diffusion, for the scheduler: in a turn each of them gets one pass of the model.

They take no step together: their texts have different lengths, and what a pass reads of a block is not kept. (A causal
model keeps the text before the block in a cache, one for every answer.) What is drawn is streamed as soon as everything
on its left is drawn, too.
"""

from collections.abc import Iterator
from typing import Any

import torch

from layers.cache import KVCache
from layers.denoising import denoise
from model import GPT
from serving.scheduler import Batch, Generation, Piece, Refused, TokenInfo, not_finite, token_infos


class Places:
    """Where serving/rows.py has rows of a cache: a number of answers at a time, and nothing that is kept of them."""

    def __init__(self, model: GPT, n_rows: int, block: int) -> None:
        """block: tokens of one, which a cache keeps beside those in its window until they are taken back."""
        self.n_rows, self.block_size, self.block = n_rows, model.config.block_size, block
        self.device, self.model = model.token_embedding.weight.device, model

    def memory(self) -> int:
        """Bytes of the caches of all answers, at most; with full attention there are none."""
        if not self.model.config.is_causal:
            return 0
        dtype = self.model.token_embedding.weight.dtype
        cache = KVCache(self.model.config, self.n_rows, torch.device("meta"), dtype, spare=self.block)
        return cache.memory()

    def keep(self, row: int, length: int) -> int:
        return 0


class DenoisingBatch(Batch):
    """The answers that one model fills in side by side."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.states: dict[int, Iterator[torch.Tensor]] = {}  # by row: an answer after each pass, from denoise()
        self.infos: dict[int, dict[int, TokenInfo]] = {}  # by row and place in the answer: what was drawn there

    def make_rows(self, model: GPT, n_rows: int) -> Places:
        return Places(model, n_rows, self.generator.answer_block)

    @torch.inference_mode()
    def turn(self) -> None:
        """Begin the answers that there is room for, then continue every answer by a pass."""
        self.drop()
        while self.waiting and self.free:
            self.begin()
        for generation in list(self.running.values()):
            self.step(generation)

    def begin(self) -> None:
        generation, model = self.waiting[0], self.model
        generation.prepare(self.generator, self.rows.device)
        generation.row = row = self.free.pop(0)
        self.infos[row] = {}
        self.states[row] = denoise(
            *(model, torch.tensor([generation.ids], device=self.rows.device), generation.max_new_tokens),
            lambda *drawn_from: self.draw_places(generation, *drawn_from),
            self.generator.tokenizer.stop_tokens,
            steps=generation.sampling.steps,
            block=self.generator.answer_block,
            fills_window=not self.generator.instruct,
        )
        self.running[row] = generation  # before it leaves: is_idle is asked for by other threads
        self.waiting.popleft()
        self.counts["prompt_tokens"] += len(generation.ids)
        if generation.max_new_tokens == 0:
            self.end(generation, Piece(finish_reason="length"))

    def draw_places(
        self, generation: Generation, logits: torch.Tensor, known: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Tokens (k,) for places (k,) of an answer; their log-probabilities are those of the pass that drew them."""
        if not torch.isfinite(logits).all():
            raise not_finite()
        tokens = generation.draw(logits, known)
        if generation.n_logprobs is None:
            infos = map(TokenInfo, tokens.tolist())
        else:
            infos = token_infos(logits, tokens.tolist(), generation.n_logprobs)
        self.infos[generation.row].update(zip(places.tolist(), infos, strict=True))
        return tokens

    def step(self, generation: Generation) -> None:
        """One pass over an answer; delivers the tokens that have nothing masked on their left."""
        row = generation.row
        try:
            state = next(self.states[row]).tolist()
        except Refused as error:
            self.end(generation, Piece(finish_reason="error", error=error))
            return
        while generation.row is not None and len(generation.drawn) < len(state):
            place = len(generation.drawn)
            if state[place] == self.model.config.vocab_size:  # masked
                return
            self.add(generation, self.infos[row][place])

    def end(self, generation: Generation, piece: Piece | None) -> None:
        if generation.row is not None:
            del self.states[generation.row], self.infos[generation.row]
        super().end(generation, piece)
