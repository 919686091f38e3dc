"""A checkpoint ready to generate text: what inference.py, evaluate.py and whoever else wants answers share.

generator = load_text_generator("checkpoint/sft.pt", "auto", instruct=True)
for piece in generator.answer("你好", GenerationConfig(temperature=0.0)):
    print(piece, end="")
"""

import bisect
import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base.configuration import Config, UserError, option
from base.devices import find_device
from layers.cache import KVCache
from layers.compiled_step import CompiledStep
from layers.denoising import BLOCK
from layers.one_row import read_one_row_faster
from layers.speculative import Drafter, DraftModel, FutureDrafter, PromptLookup
from model import GPT
from text.tokenizer import SPECIAL_TOKENS, UNKNOWN, Messages, Tokenizer, normalise
from vision.images import read_image
from weights import lora, quantise
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model

N_UNKNOWN_SHOWN = 40  # unknown characters that a note names


@dataclass
class GenerationConfig(Config):
    """How tokens are sampled."""

    max_length: int | None = option(
        None, "maximum number of tokens, prompt and answer together; none: the model's window", minimum=1
    )
    temperature: float = option(0.8, "sampling temperature; 0: greedy decoding", minimum=0.0)
    top_k: int | None = option(None, "sample from the k most likely tokens only", minimum=1)
    top_p: float | None = option(
        None, "nucleus sampling: from the most likely tokens whose probabilities sum to p", above=0.0, maximum=1
    )
    min_p: float | None = option(
        None, "sample from tokens at least this share as likely as the most likely one", minimum=0, maximum=1
    )
    repetition_penalty: float = option(1.0, "above 1: tokens already in the context become less likely", above=0.0)
    seed: int | None = option(None, "random seed", minimum=0)
    steps: int | None = option(
        None, "masked diffusion: passes of the model for a block of tokens; none: one for every token", minimum=1
    )
    block: int | None = option(
        None, "masked diffusion: tokens of a block; none: as the model was trained", minimum=1, maximum=1 << 20
    )


@dataclass
class TextGenerator:
    """A model with its tokenizer, on a device."""

    model: GPT
    tokenizer: Tokenizer
    device: torch.device
    instruct: bool  # prompts are questions, put into the instruct template; else texts to continue
    stop: list[str] = field(default_factory=list)  # texts that end an answer
    adapter: tuple[dict[str, Any], str] | None = None  # the LoRA checkpoint in use, and its path
    weights: str = "float32"  # what the model's matrices are: a key of quantise.KINDS
    step: CompiledStep | None = None  # a compiled step of one token
    drafter: Drafter | None = None  # guesses tokens: the same answers from fewer passes
    block: int = BLOCK  # tokens that a model of masked diffusion fills in together

    def open_image(self, path: str | Path) -> np.ndarray:
        """The pixels (3, S, S) of an image file in the size that the model reads; raises UserError if it reads none."""
        if self.model.vision is None:
            raise UserError(f"{path}: this model reads text alone; one that sees is trained with train.py -t vision")
        try:
            return read_image(Path(path), self.model.config.image_size)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def prompt_ids(
        self,
        prompt: str,
        history: Messages = (),
        max_length: int | None = None,
        image: np.ndarray | None = None,
        room: int | None = None,
    ) -> list[int]:
        """Token ids (T,) to continue, fewer than max_length (None: the model's window); raises UserError.

        A question must fit into the window. A text to continue may be longer: without a max_length it is cut here, with
        one by generate(); either warns. image: what the question is about, as of open_image(). room: tokens left for
        the answer, for which the oldest turns of the history make way; None: a quarter of the window.
        """
        if image is not None and not self.instruct:
            raise UserError("an image is part of a question: start with -i")
        window = self.model.config.block_size
        limit = max_length or window
        if self.instruct:
            question = {"role": "user", "content": prompt, "image": image}
            most = min(limit, window)
            ids = self.chat_ids([*history, question], most * 3 // 4 if room is None else most - room)
        else:
            ids = self.tokenizer.encode(normalise(prompt)).tolist()
        n_tokens = len(ids)
        if not ids or (self.instruct and not prompt.strip()):
            raise UserError("the prompt is empty")
        if self.instruct and n_tokens >= window:
            has_system = any(message["role"] == "system" for message in history)
            what = "the question with its system message" if has_system else "the question"
            raise UserError(f"{what} has {n_tokens} tokens, the model's window {window}: shorten it")
        if self.tokenizer.adds_bos and not self.instruct:
            n_tokens += 1
            ids = [self.tokenizer.bos, *ids]
        if n_tokens >= window and max_length is None:
            n_kept = window - window // 4  # what generation keeps of a full window
            ids = [*ids[: self.tokenizer.adds_bos], *ids[-n_kept + self.tokenizer.adds_bos :]]
            warnings.warn(f"the prompt has {n_tokens} tokens; the model reads the newest {len(ids)}", stacklevel=2)
        if len(ids) >= limit:
            raise UserError(
                f"the prompt has {n_tokens} tokens, which max_length (-l) {limit} counts too: set it above {n_tokens}"
            )
        return ids

    def chat_ids(self, messages: Messages, limit: int) -> list[int]:
        """Token ids (T,) of a conversation; above the limit without its oldest turns, but never without the last.

        A turn is a user message and what answers it; system messages stay.
        """
        messages = [{**message, "content": normalise(message["content"])} for message in messages]
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]

        def ids_without(n_turns: int) -> list[int]:
            start = asked[n_turns] if n_turns else 0
            kept = [message for message in messages[:start] if message["role"] == "system"] + messages[start:]
            config = self.model.config
            return self.tokenizer.encode_chat(kept, config.n_patches, config.image_last)[0].tolist()

        ids = ids_without(0)
        if len(ids) <= limit or len(asked) < 2:
            return ids
        # by bisection: one turn at a time would take long for thousands of them
        return ids_without(bisect.bisect_left(range(len(asked) - 1), True, key=lambda n: len(ids_without(n)) <= limit))

    def answer(
        self,
        prompt: str,
        config: GenerationConfig,
        history: Messages = (),
        drawn: list[int] | None = None,
        image: np.ndarray | None = None,
        room: int | None = None,
    ) -> Iterator[str]:
        """Pieces of the answer (or continuation) as they are generated; raises UserError for a prompt too long.

        drawn: a list to add every token to that is drawn, the one that ends the answer included. image: as of
        open_image(); questions in the history may have some, too. room: as in prompt_ids().
        """
        if not self.model.config.mask_token and (config.steps or config.block):
            raise UserError("steps and block are for models of masked diffusion (train.py --loss diffusion)")
        ids = self.prompt_ids(prompt, history, config.max_length, image, room)
        images = [message["image"] for message in history if message.get("image") is not None]
        images += [] if image is None else [image]
        n_kept = ids.count(self.tokenizer.vocab_size) // max(1, self.model.config.n_patches)  # without the oldest turns
        if n_kept < len(images):
            warnings.warn("the window is full: the image was left out with the oldest turns", stacklevel=2)
        images = images[len(images) - n_kept :]
        steps = self.model.generate(
            torch.tensor([ids], device=self.device),
            (config.max_length or self.model.config.block_size) - len(ids),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop_tokens=self.tokenizer.stop_tokens,
            seed=config.seed,
            step=self.step,
            drafter=self.drafter,
            denoising_steps=config.steps,
            block=config.block or self.answer_block,
            fills_window=not self.instruct,
            images=torch.from_numpy(np.stack(images)).to(self.device) if images else None,
        )

        drawn = [] if drawn is None else drawn

        def drawn_token(step: torch.Tensor) -> int:
            drawn.append(step.item())
            return drawn[-1]

        tokens = itertools.takewhile(lambda token: token not in self.tokenizer.stop_tokens, map(drawn_token, steps))
        yield from until_stop(self.tokenizer.stream(tokens), self.stop)

    @property
    def answer_block(self) -> int:
        """Tokens that a model of masked diffusion fills in together: as it, or its adapter, was trained."""
        return self.adapter[0]["train_config"].get("answer_block", self.block) if self.adapter else self.block

    def use_adapter(self, path: str) -> None:
        """Answer with the LoRA adapter of a checkpoint instead of the one there is; empty: with none.

        Raises UserError for one that does not fit, and then keeps the one there is.
        """
        if self.weights != "float32":
            raise UserError(f"an adapter is of the exact weights: start with --weights float32 (not {self.weights})")
        adapter = (load_checkpoint(path), path) if path else None
        lora.detach(self.model)
        try:
            if adapter:
                lora.load_adapter(adapter[0], self.model, path)
            self.adapter = adapter
        except UserError:
            if self.adapter:
                lora.load_adapter(self.adapter[0], self.model, self.adapter[1])
            raise
        finally:
            self.model.eval()
            if self.step:
                self.step = CompiledStep(self.model)


def unknown_note(tokenizer: Tokenizer, text: str) -> str:
    """A line that names the characters of a text that are not in the vocabulary; "" if there are none."""
    unknown = tokenizer.unknown_characters(normalise(text))
    shown = repr(unknown[:N_UNKNOWN_SHOWN])[1:-1]  # invisible ones by their escapes
    more = f" and {len(unknown) - N_UNKNOWN_SHOWN} more" if len(unknown) > N_UNKNOWN_SHOWN else ""
    return f"not in the vocabulary, read as {SPECIAL_TOKENS[UNKNOWN]}: {shown}{more}" if unknown else ""


class UntilStop:
    """The text up to the earliest beginning of a stop text, as its pieces come.

    What may be the beginning of a stop text is held back until that is known: how the text is cut into pieces makes no
    difference.
    """

    def __init__(self, stop: list[str]) -> None:
        self.stop, self.held, self.is_done = stop, "", False

    def push(self, piece: str) -> str:
        """What is certain now; is_done: a stop text has come."""
        self.held += piece
        end = first_stop(self.held, self.stop)
        held = self.held
        partial = (len(held) - n for text in self.stop for n in range(1, len(text)) if held.endswith(text[:n]))
        ready = min([end, *partial])
        self.is_done = ready == end < len(self.held)
        text, self.held = self.held[:ready], "" if self.is_done else self.held[ready:]
        return text

    def rest(self) -> str:
        """What was held back, when no further piece comes."""
        return self.held[: first_stop(self.held, self.stop)]


def until_stop(pieces: Iterator[str], stop: list[str]) -> Iterator[str]:
    """The text of the pieces up to the earliest beginning of a stop text, in pieces."""
    until = UntilStop(stop)
    for piece in pieces:
        if text := until.push(piece):
            yield text
        if until.is_done:
            return
    if rest := until.rest():
        yield rest


def first_stop(text: str, stop: list[str]) -> int:
    """The earliest position at which a stop text begins, else the length of the text."""
    return min((text.index(word) for word in stop if word in text), default=len(text))


def load_full_checkpoint(path: str) -> dict[str, Any]:
    """The checkpoint of a model; raises UserError for that of an adapter."""
    checkpoint = load_checkpoint(path)
    if "lora" in checkpoint:
        raise UserError(f"{path}: an adapter; -m names its model ({checkpoint['lora'].get('base')}), --lora this file")
    return checkpoint


def load_text_generator(
    path: str,
    device: str,
    instruct: bool | None,
    stop: list[str] = (),
    adapter: str = "",
    weights: str = "float32",
    compile: bool = False,
    draft: str = "",
) -> TextGenerator:
    """Model and tokenizer of a checkpoint on a device, with a LoRA adapter if one is named; raises UserError.

    instruct: whether prompts are questions; None: if the model or its adapter was taught to answer.
    weights: what the matrices are rounded to, one of quantise.KINDS, or "auto" for the fastest; an adapter is merged
    into them before. compile: begin to compile the step of a token. draft: what guesses tokens, as for load_drafter.
    """
    checkpoint = load_full_checkpoint(path)
    tokenizer = load_checkpoint_tokenizer(checkpoint, path)
    place = find_device(device)
    model = load_model(checkpoint, path).to(place).eval()
    if place.type == "cpu":
        read_one_row_faster(model)
    if model.config.mask_token:
        check_options_of_diffusion(path, {"--weights auto": weights == "auto", "--compile": compile, "--draft": draft})
    elif not model.config.is_causal:
        raise UserError(f"{path}: a model with full attention answers in one pass; python problem.py talks to it")
    trained = checkpoint["train_config"]
    if instruct is None:
        knows_questions = checkpoint["data"].get("has_questions", trained.get("stage") != "pretrain")
        instruct = (knows_questions and tokenizer.template.name != "plain") or bool(adapter)
    generator = TextGenerator(model, tokenizer, place, instruct, list(stop), block=trained.get("answer_block", BLOCK))
    if adapter:
        generator.use_adapter(adapter)
    if weights != "float32":
        merged = model
        if adapter:  # in a copy: should float32 be the fastest, the adapter can still be changed
            merged = copy.deepcopy(model)
            lora.merge(merged)
        rounded, kind = quantise.with_weights(merged.eval(), weights)
        if kind != "float32":
            generator.model, generator.weights = rounded, kind
    if compile:
        generator.step = CompiledStep(generator.model)
    if draft:
        generator.drafter = load_drafter(draft, generator)
    return generator


def check_options_of_diffusion(path: str, asked: dict[str, Any]) -> None:
    """Raises UserError for options that speed up the next token: masked diffusion has none."""
    for name, is_asked in asked.items():
        if is_asked:
            raise UserError(
                f"{path}: {name} is for models that generate token by token; this one fills in masked tokens (loss "
                "diffusion): --steps N, fewer than a block has tokens, makes it faster"
            )


def load_drafter(name: str, generator: TextGenerator) -> Drafter:
    """What guesses tokens for a generator's model: "lookup", "future", or the checkpoint of a draft model.

    Raises UserError.
    """
    KVCache(generator.model.config, 0, generator.device, torch.float32, spare=1)  # raises UserError if it can take none
    if name == "lookup":
        return PromptLookup()
    if name == "future":
        return FutureDrafter(generator.model)
    checkpoint = load_full_checkpoint(name)
    if load_checkpoint_tokenizer(checkpoint, name).fingerprint() != generator.tokenizer.fingerprint():
        raise UserError(f"{name}: made with another tokenizer than the model, whose tokens it cannot guess")
    draft = load_model(checkpoint, name).to(generator.device).eval()
    try:
        return DraftModel(draft, generator.model)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
