"""Continuous batching: answers join and leave the batch of a model between two of its steps (Yu et al. 2022, Orca).

    scheduler = Scheduler([Batch("sft", load_text_generator(...))])
    scheduler.submit(batch, [Generation(ids, 100, Sampling(), deliver=print)])  # pieces of the answer come by deliver()

Reading all weights costs a step more than computing with them: so 16 answers that take a step together cost little more
than one. One thread does all the computing. In each of its turns every model reads some tokens of the next prompt, then
continues all answers by one token: a long prompt does not stall the others.

What an answer is does not depend on what else runs. It has its own row of the cache, its own random numbers, and a
prompt is cut into pieces at the same places whatever is going on: a piece that another prompt shares is copied.
"""

import hashlib
import itertools
import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from base.configuration import UserError
from layers.sampling import sample
from serving.rows import PIECE, Rows
from serving.text_generator import TextGenerator, UntilStop
from text.tokenizer import TextStream

PROMPT_TOKENS_PER_TURN = 128  # read before the answers that run get their next token


class Refused(UserError):
    """A request that is not taken now."""

    def __init__(self, message: str, status: int, retry_after: int = 1) -> None:
        """status: of HTTP; retry_after: in seconds."""
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass
class Sampling:
    """How the tokens of an answer are drawn; the fields of layers.sampling.sample(), and three more."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> what is added to its logit
    seed: int | None = None
    steps: int | None = None  # masked diffusion: passes for a block of tokens


@dataclass
class TokenInfo:
    """A token with its log-probability in nats, before temperature and filters; top: the likeliest ones with theirs."""

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Piece:
    """What a step adds to an answer."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    prompt: list[TokenInfo] = field(default_factory=list)  # with the first piece, where asked for
    stop_token: TokenInfo | None = None  # that ended the answer, with log-probabilities where asked for
    finish_reason: str | None = None  # stop, length; error: with `error`
    error: Refused | None = None


@dataclass(eq=False)
class Generation:
    """An answer: what is asked for, and how far it is."""

    ids: list[int]  # of the prompt
    max_new_tokens: int
    sampling: Sampling
    deliver: Callable[[Piece], None]  # is called by the scheduler's thread
    stop: list[str] = field(default_factory=list)
    n_logprobs: int | None = None  # how many of the likeliest tokens to report; None: no log-probabilities
    begun: list[int] = field(default_factory=list)  # the end of ids that belongs to the answer
    with_prompt: bool = False  # log-probabilities of the prompt's tokens, too
    image: np.ndarray | None = None  # (3, S, S) uint8, in the places among ids that are no tokens'

    row: int | None = None
    n_read: int = 0  # tokens of the prompt
    n_reused: int = 0
    drawn: list[int] = field(default_factory=list)
    prompt_infos: list[TokenInfo] = field(default_factory=list)
    is_cancelled: bool = False
    submitted_at: float = 0.0
    overdue_at: float = math.inf
    first_token_after: float | None = None  # seconds

    def prepare(self, generator: TextGenerator, device: torch.device) -> None:
        self.random = torch.Generator(device=device)
        seed = self.sampling.seed
        self.random.manual_seed(seed) if seed is not None else self.random.seed()
        self.stream, self.until = TextStream(generator.tokenizer), UntilStop(self.stop)
        for token in self.begun:  # the last one may have begun a character
            self.stream.push(token)
        # what this prompt and another begin with alike: the places of all images have one id, whatever they show
        shown = None if self.image is None else hashlib.sha256(self.image.tobytes()).digest()
        self.read_as = [token if token < generator.model.config.vocab_size else shown for token in self.ids]
        self.bias = torch.tensor(list(self.sampling.logit_bias.values()), device=device)
        self.biased = torch.tensor(list(self.sampling.logit_bias), device=device, dtype=torch.long)

    def draw(self, logits: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Tokens (k,) from logits (k, vocab_size); context (k, T): what a repetition penalty counts."""
        sampling, adjusted = self.sampling, logits.float()
        if len(self.biased):
            adjusted = adjusted.index_add(1, self.biased, self.bias.expand(len(logits), -1))
        filters = sampling.top_k, sampling.top_p, sampling.min_p
        return sample(adjusted, context, self.random, sampling.temperature, *filters, sampling.repetition_penalty)


class Batch:
    """The answers that one model generates together, each in a row of its cache."""

    make_rows = Rows

    def __init__(
        self,
        name: str,
        generator: TextGenerator,
        n_rows: int = 16,
        max_waiting: int = 64,
        seconds: float = 300,
        adapter: str | None = None,
    ) -> None:
        """seconds: that an answer may take, waiting included; adapter: the name of the one in use."""
        self.adapter = adapter
        self.name, self.generator, self.max_waiting, self.seconds = name, generator, max_waiting, seconds
        self.model = generator.model
        self.rows = self.make_rows(self.model, n_rows)
        self.arrived: deque[Generation] = deque()  # from other threads; the rest belongs to the scheduler's
        self.waiting: deque[Generation] = deque()
        self.reading: Generation | None = None  # whose prompt is being read
        self.running: dict[int, Generation] = {}  # by row
        self.free = list(range(n_rows))  # the longest unused first
        # whole pieces of a prompt that a row holds: token ids, and for a patch what tells its image from others
        self.read_in_pieces: list[list[int | bytes]] = [[] for _ in range(n_rows)]
        self.counts = dict.fromkeys(("prompt_tokens", "reused_tokens", "generated_tokens", "ended", "cancelled"), 0)
        self.n_first, self.sum_first = 0, 0.0  # answers that have begun, and their seconds to the first token

    @property
    def is_idle(self) -> bool:
        return not (self.arrived or self.waiting or self.reading or self.running)

    @property
    def n_waiting(self) -> int:
        return len(self.arrived) + len(self.waiting)

    def everything(self) -> list[Generation]:
        while self.arrived:
            self.waiting.append(self.arrived[0])
            self.arrived.popleft()
        return [*self.waiting, *([self.reading] if self.reading else []), *self.running.values()]

    @torch.inference_mode()
    def turn(self) -> None:
        """Read some of the next prompts, then continue every answer by a token."""
        self.drop()
        budget = PROMPT_TOKENS_PER_TURN
        while budget > 0 and (self.reading or (self.waiting and self.free)):
            if self.reading is None:
                self.begin()
            budget -= max(self.read_piece(self.reading), PIECE // 2)  # shorter pieces take as long
        if self.running:
            tokens = {row: generation.drawn[-1] for row, generation in self.running.items()}
            logits = self.rows.step(tokens)
            for generation, row_logits in zip(list(self.running.values()), logits.split(1), strict=True):
                self.draw(generation, row_logits)

    def drop(self) -> None:
        """Give up what nobody waits for any more, and what has taken too long."""
        now = time.monotonic()
        for generation in self.everything():
            if generation.is_cancelled:
                self.counts["cancelled"] += 1
                self.end(generation, None)
            elif now > generation.overdue_at:
                message = f"the answer has taken more than {self.seconds:g} seconds"
                self.end(generation, Piece(finish_reason="error", error=Refused(message, 504)))

    def begin(self) -> None:
        """Give the next prompt a row, which begins with what another row has read of it already."""
        self.reading = generation = self.waiting[0]  # before it leaves: is_idle is asked for by other threads
        self.waiting.popleft()
        generation.prepare(self.generator, self.rows.device)
        shared = [(self.n_shared(row, generation), row) for row in range(self.rows.n_rows)]
        n_shared, source = max(shared, key=lambda pair: pair[0])
        lowest = min(self.free, key=self.rows.size_with)  # the longest unused of those that make the smallest step
        row = source if n_shared and source in self.free else lowest
        self.free.remove(row)
        generation.row = row
        self.rows.copy(source, row, n_shared)
        self.read_in_pieces[row] = generation.read_as[:n_shared]
        generation.n_read = generation.n_reused = n_shared
        self.counts["reused_tokens"] += n_shared

    def n_shared(self, row: int, generation: Generation) -> int:
        """Tokens of a prompt that a row has read already: whole pieces, without the prompt's last token."""
        pairs = zip(self.read_in_pieces[row], generation.read_as[:-1], strict=False)
        n = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) // PIECE * PIECE
        while self.cuts_image(generation.ids, n):
            n -= PIECE
        return n if self.rows.has(row, n) and not generation.with_prompt else 0

    def cuts_image(self, ids: list[int], end: int) -> bool:
        """Whether a piece that ends there would have only a part of an image, whose patches are read together."""
        return 0 < end < len(ids) and min(ids[end - 1 : end + 1]) == self.model.config.vocab_size

    def read_piece(self, generation: Generation) -> int:
        """Read the next piece of a prompt, after the last one draw the first token; returns its number of tokens."""
        ids, start = generation.ids, generation.n_read
        end = start + PIECE
        while self.cuts_image(ids, end):
            end += PIECE
        piece = ids[start:end]
        image = generation.image if self.model.config.vocab_size in piece else None
        hidden = self.rows.read(generation.row, piece, image)
        generation.n_read += len(piece)
        self.counts["prompt_tokens"] += len(piece)
        if len(piece) % PIECE == 0:
            self.read_in_pieces[generation.row] = generation.read_as[: generation.n_read]
        if generation.with_prompt:
            following = ids[start + 1 : generation.n_read + 1]
            if start == 0:
                generation.prompt_infos.append(TokenInfo(ids[0]))
            logits = self.model.lm_head(hidden[: len(following)])
            generation.prompt_infos += token_infos(logits, following, generation.n_logprobs or 0)
        if generation.n_read == len(ids):
            self.running[generation.row] = generation
            self.reading = None
            if generation.max_new_tokens == 0:
                self.end(generation, Piece(prompt=generation.prompt_infos, finish_reason="length"))
            else:
                self.draw(generation, self.model.lm_head(hidden[-1:]))
        return len(piece)

    def draw(self, generation: Generation, logits: torch.Tensor) -> None:
        """Draw the next token of an answer from logits (1, vocab_size), and deliver what it adds to the text."""
        if not torch.isfinite(logits).all():
            self.end(generation, Piece(finish_reason="error", error=not_finite()))
            return
        context = None
        if generation.sampling.repetition_penalty != 1.0:
            read = [token for token in generation.ids if token < logits.size(1)]  # patches cannot be repeated
            context = torch.tensor([[*read, *generation.drawn]], device=logits.device)
        token = generation.draw(logits, context).item()
        if generation.n_logprobs is None:
            info = TokenInfo(token)
        else:
            (info,) = token_infos(logits, [token], generation.n_logprobs)
        self.add(generation, info)

    def add(self, generation: Generation, info: TokenInfo) -> None:
        """Add a token to an answer, and deliver what it adds to the text."""
        token, tokenizer = info.id, self.generator.tokenizer
        if generation.first_token_after is None:
            generation.first_token_after = time.monotonic() - generation.submitted_at
            self.n_first, self.sum_first = self.n_first + 1, self.sum_first + generation.first_token_after
        self.counts["generated_tokens"] += 1

        piece = Piece()
        if not generation.drawn:
            piece.prompt = generation.prompt_infos
        generation.drawn.append(token)
        if token in tokenizer.stop_tokens:
            piece.finish_reason, piece.stop_token = "stop", info
            piece.text = generation.until.push(generation.stream.rest())
        else:
            piece.tokens.append(info)
            piece.text = generation.until.push(generation.stream.push(token))
            if generation.until.is_done:
                piece.finish_reason = "stop"
            elif len(generation.drawn) == generation.max_new_tokens:
                piece.finish_reason = "length"
                piece.text += generation.until.push(generation.stream.rest())
        if piece.finish_reason:
            if not generation.until.is_done:
                piece.text += generation.until.rest()
            self.end(generation, piece)
        else:
            generation.deliver(piece)

    def end(self, generation: Generation, piece: Piece | None) -> None:
        """Take an answer out, with its last piece."""
        if generation in self.waiting:
            self.waiting.remove(generation)
        if self.reading is generation:
            self.reading = None
        if generation.row is not None:
            row, generation.row = generation.row, None
            self.running.pop(row, None)
            self.free.append(row)
            most = (self.rows.block_size - 1) // PIECE * PIECE  # an idle row is computed along: it needs a place more
            kept = self.rows.keep(row, min(len(self.read_in_pieces[row]), most))
            self.read_in_pieces[row] = self.read_in_pieces[row][:kept]
        self.counts["ended"] += 1
        if piece:
            generation.deliver(piece)

    def fail(self, error: Refused) -> None:
        """End everything with an error."""
        for generation in self.everything():
            self.end(generation, Piece(finish_reason="error", error=error))


def not_finite() -> Refused:
    return Refused("the model's logits are not finite: its training has diverged?", 500)


def token_infos(logits: torch.Tensor, ids: list[int], n_top: int) -> list[TokenInfo]:
    """Tokens with the log-probabilities that logits (len(ids), vocab_size) give them."""
    if not ids:
        return []
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(n_top, logprobs.size(1)))
    pairs = [list(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return [TokenInfo(*info) for info in zip(ids, chosen, pairs, strict=True)]


class Scheduler:
    """The thread that computes: a turn of every model that has something to do, again and again."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.is_draining = False  # what runs is ended, nothing new is taken
        self.jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self.wake = threading.Event()
        self.is_stopped = False
        self.thread = threading.Thread(target=self.run, name="scheduler", daemon=True)
        self.thread.start()

    @property
    def is_idle(self) -> bool:
        return not self.jobs and all(batch.is_idle for batch in self.batches)

    def submit(self, batch: Batch, generations: list[Generation]) -> None:
        """Have answers generated; raises Refused where too many wait, or the server is about to end."""
        if self.is_draining:
            raise Refused("the server is shutting down", 503)
        most = batch.max_waiting + batch.rows.n_rows
        if len(generations) > most:
            message = f"{len(generations)} answers at a time: this server generates and keeps waiting {most} at most"
            raise Refused(message, 400)
        if batch.n_waiting + len(generations) > batch.max_waiting + len(batch.free):
            message = f"{batch.n_waiting} answers are waiting for {batch.name} already: try again later"
            raise Refused(message, 429, retry_after=5)
        now = time.monotonic()
        for generation in generations:
            generation.submitted_at, generation.overdue_at = now, now + batch.seconds
        batch.arrived.extend(generations)
        self.wake.set()

    def cancel(self, generations: list[Generation]) -> None:
        """Nobody waits for these any more: their rows are free within a turn."""
        for generation in generations:
            generation.is_cancelled = True
        self.wake.set()

    def between_turns(self, job: Callable[[], Any]) -> Future:
        """Run a function in the thread that computes."""
        future = Future()
        self.jobs.append((job, future))
        self.wake.set()
        return future

    def stop(self) -> None:
        """End the thread, whatever it has to do."""
        self.is_stopped = True
        self.wake.set()
        self.thread.join()

    def run(self) -> None:
        while not self.is_stopped:
            self.wake.clear()
            if self.jobs:  # one in a turn: many would stall the answers
                job, future = self.jobs.popleft()
                if future.set_running_or_notify_cancel():  # else nobody waits for it any more
                    try:
                        future.set_result(job())
                    except Exception as error:
                        future.set_exception(error)
            busy = [batch for batch in self.batches if not batch.is_idle]
            for batch in busy:
                try:
                    batch.turn()
                except Exception:  # the others go on
                    traceback.print_exc(file=sys.stderr)
                    batch.fail(Refused("internal error", 500))
            if not busy and not self.jobs:
                self.wake.wait()
