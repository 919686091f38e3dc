"""Speculative decoding: several tokens from one pass of the model, and they are the tokens of the model alone.

A pass over a few tokens takes little longer than over one, as the weights are read from memory once for all of them.
But the tokens have to be known. So something cheap guesses the next few, and one pass of the model says what it draws
after each of them (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318):

    text so far     The capital of Zu
    guesses                          pin is M
    the model draws                  pin is T      one pass, 8 tokens: 7 guesses are right, the eighth is replaced

What comes after a wrong guess followed another text, and is thrown away; its keys and values are forgotten by the
lengths of the cache. A pass gives at least the one token that it gives without guesses.

Three drafters guess. Prompt look-up (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) finds where the newest
tokens occurred before, and guesses what followed there: answers repeat words of their questions. A draft model, smaller
than the model, of the same vocabulary, generates its guesses: that works for any text, but costs a pass of its own for
every guess. Modules trained with the model for multi-token prediction (layers/multi_token.py) guess from its hidden
states, a block for each guess.

Why it is exact. Every token is drawn from the model's own logits, by the function that draws without guesses, with the
random numbers that it would get without them; a guess only decides which logits are there already. So a seed gives the
same tokens whatever the drafter, with every setting of sampling. To be right often, the draft model draws a guess with
the random numbers that the model is about to draw with. Both take argmax p_i / e_i, which is how torch.multinomial
draws (e: exponentially distributed noise; the Gumbel-max trick), so with probabilities p and q that differ by
d = sum |p - q| / 2 they agree with a probability of at least (1 - d) / (1 + d) (Daliri et al. 2024, arXiv:2408.07978).

The papers above draw with other random numbers, and so need a rule: accept a guess x with probability
min(1, p(x) / q(x)), else draw from max(0, p - q) / d. That makes the distribution p as well, accepts 1 - d of the
guesses, the most that is possible, and the tokens depend on the draft.

Exact but for rounding: a pass over several tokens adds up its products in another order than one over a single token,
and logits differ in their last digits. Where two tokens are as close as that, another may be drawn.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from base.configuration import UserError
from layers.cache import KVCache, keep_newest
from layers.multi_token import future_config

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits (1, vocab_size), context (1, T) -> token (1,)


class Drafter:
    """Guesses the next tokens; counts what became of the guesses in the latest answer."""

    n_tokens: int  # guesses at most for one pass of the model
    n_passes = n_guesses = n_right = 0

    def propose(self, context: torch.Tensor, n: int, draw: Draw) -> torch.Tensor:
        """At most n tokens (1, up to n) that may follow the context (1, T)."""
        raise NotImplementedError

    def observe(self, hidden: torch.Tensor, start: int) -> None:
        """The model's hidden states (1, n, n_embd) at positions from start on: of tokens, then of guesses."""


class PromptLookup(Drafter):
    """What followed when the newest tokens occurred before: of the longest match, the latest."""

    n_tokens = 8
    shortest, longest = 2, 12  # tokens of a match; a single one says little

    def propose(self, context: torch.Tensor, n: int, draw: Draw) -> torch.Tensor:
        ids = context[0].cpu().numpy()
        ends = np.arange(len(ids) - 1)  # where a match may end: at any token before the newest
        for n_matched in range(self.longest):  # of these, where one token more is the same
            longer = ends[ends >= n_matched]
            longer = longer[ids[longer - n_matched] == ids[-1 - n_matched]]
            if not len(longer):
                break
            ends = longer
        if n_matched < self.shortest:
            return context[:, :0]
        return context[:, ends[-1] + 1 :][:, :n]


class DraftModel(Drafter):
    """A smaller model of the same vocabulary."""

    n_tokens = 4

    def __init__(self, draft: torch.nn.Module, model: torch.nn.Module) -> None:
        """draft, model: GPTs in eval mode on one device; raises UserError if the draft cannot guess for the model."""
        if draft.config.vocab_size != model.config.vocab_size:
            sizes = f"{draft.config.vocab_size} tokens, the model's {model.config.vocab_size}"
            raise UserError(f"the draft's vocabulary has {sizes}: they must be the same")
        if not draft.config.is_causal:
            raise UserError("a draft needs causal attention (is_causal: true)")
        if draft.config.mask_token:
            raise UserError("a draft guesses the next token: a model of masked diffusion is none")
        if draft.config.block_size < model.config.block_size:
            sizes = f"{draft.config.block_size} tokens, the model's {model.config.block_size}"
            raise UserError(f"the draft's window has {sizes}: train it with --block_size {model.config.block_size}")
        weight = draft.token_embedding.weight
        self.draft, self.read = draft, torch.empty(0, dtype=torch.long, device=weight.device)
        self.cache = KVCache(draft.config, 1, weight.device, weight.dtype, spare=self.n_tokens)

    def propose(self, context: torch.Tensor, n: int, draw: Draw) -> torch.Tensor:
        # the cache keeps what it has read of this context: all up to the first wrong guess, nothing of another text
        known = min(len(self.read), int(self.cache.lengths[0]), context.size(1) - 1)
        common = int((self.read[:known] == context[0, :known]).cumprod(0).sum())
        if any(self.draft.config.windows) and self.cache.lengths[0] - common > self.cache.spare:
            common = 0  # a ring has lost what stood there
        self.cache.lengths[:] = common
        for _ in range(n):
            hidden = self.draft.hidden(context[:, self.cache.lengths[0] :], self.cache)
            token = draw(self.draft.lm_head(hidden[:, -1]), context)
            context = torch.cat((context, token[:, None]), dim=1)
        self.read = context[0]
        return context[:, context.size(1) - n :]


class FutureDrafter(Drafter):
    """The model's own modules for multi-token prediction, a guess each.

    The newest of T tokens has not been read yet. Module 1 guesses what follows it, from the hidden state at position
    T - 2 and that token; module 2 what comes then, from module 1's hidden state and its guess; and so on. Of the newest
    positions all but the first module read guesses: those they read again, with the tokens that came in their place.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """model: a GPT in eval mode; raises UserError if it has no modules."""
        if not model.future:
            raise UserError("the model has no modules to draft with: train one with --n_future 2, 3 or 4")
        self.model, self.n_tokens, weight = model, len(model.future), model.token_embedding.weight
        shape = future_config(model.config)
        self.cache = KVCache(shape, 1, weight.device, weight.dtype, spare=self.n_tokens)
        self.hidden, self.start = weight.new_empty(1, 0, shape.n_embd), 0  # the model's, of positions from start on

    def observe(self, hidden: torch.Tensor, start: int) -> None:
        if start == 0:  # another text, or what is kept of this one
            self.start, self.cache.lengths[:] = 0, 0
        self.hidden = torch.cat((self.hidden[:, : start - self.start], hidden), dim=1)

    def propose(self, context: torch.Tensor, n: int, draw: Draw) -> torch.Tensor:
        if not n:
            return context[:, :0]
        model, T, start = self.model, context.size(1), self.start
        hidden = self.hidden[:, : T - 1 - start]
        rope = model.rope(self.cache.begin(T - 1 - start))[-1]
        mask = model.masks(T - 1 - start, self.cache, None, context.device)[model.windows[-1]]
        with model.attention_kernel():
            for k, module in enumerate(model.future[:n], 1):
                hidden = module(hidden, model.token_embedding(context[:, start + k :]), rope, mask, self.cache)
                token = draw(model.lm_head(hidden[:, -1]), context)
                context = torch.cat((context, token[:, None]), dim=1)
        self.start = max(0, T - self.n_tokens)  # from here on, a module has read a guess
        self.hidden, self.cache.lengths[:] = self.hidden[:, self.start - start :], self.start
        return context[:, T:]


@torch.inference_mode()
def generate_speculatively(
    model: torch.nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    draw: Draw,
    generator: torch.Generator,
    drafter: Drafter,
    stop_tokens: tuple[int, ...] = (),
) -> Iterator[torch.Tensor]:
    """Continue token ids (1, T): yields the tokens (1,) that generate_tokens() does; generator: draw's."""
    block_size = model.config.block_size
    context = idx[:, -block_size:]  # (1, up to block_size)
    dtype = model.token_embedding.weight.dtype
    cache = KVCache(model.config, 1, idx.device, dtype, spare=drafter.n_tokens)
    drafter.n_passes = drafter.n_guesses = drafter.n_right = 0
    while max_new_tokens > 0:
        # none while the prompt is read: int8 weights have another kernel for few tokens, which is to stay the same
        n = min(drafter.n_tokens, max_new_tokens - 1, block_size - context.size(1)) if cache.lengths[0] else 0
        random_state = generator.get_state()
        guesses = drafter.propose(context, n, draw)  # (1, up to n)
        generator.set_state(random_state)  # the model draws with the random numbers that the draft had
        unread = torch.cat((context[:, cache.lengths[0] :], guesses), dim=1)
        start = int(cache.lengths[0])
        hidden = model.hidden(unread, cache)
        drafter.observe(hidden, start)
        logits = model.lm_head(hidden[:, -1 - guesses.size(1) :])  # (1, guesses + 1, vocab_size)
        drafter.n_passes += 1
        drafter.n_guesses += guesses.size(1)
        for i, guess in enumerate([*guesses[0].tolist(), None]):  # after the last guess the model draws one more
            token = draw(logits[:, i], context)
            is_right = token.item() == guess
            drafter.n_right += is_right
            yield token
            max_new_tokens -= 1
            if token.item() in stop_tokens:
                return
            context = torch.cat((context, token[:, None]), dim=1)
            if not is_right:
                break
        cache.lengths[:] = context.size(1) - 1  # without the wrong guesses; the newest token has not been read
        if context.size(1) > block_size:
            context = keep_newest(context, block_size)
            cache.lengths[:] = 0
