"""A checkpoint ready to generate text: what inference.py, evaluate.py and whoever else wants answers share.

generator = load_text_generator("checkpoint/sft.pt", "auto", instruct=True)
for piece in generator.answer("你好", GenerationConfig(temperature=0.0)):
    print(piece, end="")
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from base.configuration import Config, UserError, option
from base.devices import find_device
from model import GPT
from text.tokenizer import EOS, Messages, Tokenizer
from weights import lora
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model


@dataclass
class GenerationConfig(Config):
    """How tokens are sampled."""

    max_length: int = option(256, "maximum number of tokens, prompt and answer together", minimum=1)
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


@dataclass
class TextGenerator:
    """A model with its tokenizer, on a device."""

    model: GPT
    tokenizer: Tokenizer
    device: torch.device
    instruct: bool  # prompts are questions, put into the instruct template; else texts to continue
    stop: list[str] = field(default_factory=list)  # texts that end an answer

    def prompt_ids(self, prompt: str, history: Messages) -> list[int]:
        """Token ids to continue; of a conversation, as many of the newest turns as leave room for an answer."""
        if not self.instruct:
            return self.tokenizer.encode(prompt).tolist()
        messages = [*history, {"role": "user", "content": prompt}]
        while True:
            ids, _ = self.tokenizer.encode_chat(messages)
            if len(ids) <= self.model.config.block_size * 3 // 4 or len(messages) < 3:
                return ids.tolist()
            messages = messages[2:]  # the oldest question and its answer

    def answer(self, prompt: str, config: GenerationConfig, history: Messages = ()) -> Iterator[str]:
        """Pieces of the answer (or continuation) as they are generated; raises UserError for a prompt too long."""
        ids = self.prompt_ids(prompt, list(history))
        room = config.max_length - len(ids)
        if not ids:
            raise UserError("the prompt is empty")
        if room <= 0:
            raise UserError(
                f"the prompt has {len(ids)} tokens, which leaves no room in max_length {config.max_length} (-l)"
            )
        steps = self.model.generate(
            torch.tensor([ids], device=self.device),
            room,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop_tokens=(EOS,),
            seed=config.seed,
        )
        tokens = itertools.takewhile(lambda token: token != EOS, (step.item() for step in steps))
        yield from until_stop(self.tokenizer.stream(tokens), self.stop)

    def use_adapter(self, path: str) -> None:
        """Answer with the LoRA adapter of a checkpoint instead of the one there is; empty: with none."""
        lora.detach(self.model)
        if path:
            lora.load_adapter(load_checkpoint(path), self.model, path)
        self.model.eval()


def until_stop(pieces: Iterator[str], stop: list[str]) -> Iterator[str]:
    """The pieces up to the first stop text; what may be the beginning of one is held back until that is known."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[: min(found)]
            return
        keep = max((n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def load_text_generator(path: str, device: str, instruct: bool, stop: list[str] = (), lora: str = "") -> TextGenerator:
    """Model and tokenizer of a checkpoint on a device, with a LoRA adapter if one is named; raises UserError."""
    checkpoint = load_checkpoint(path)
    if "lora" in checkpoint:
        raise UserError(f"{path}: an adapter; -m names its model ({checkpoint['lora'].get('base')}), --lora this file")
    tokenizer = load_checkpoint_tokenizer(checkpoint, path)
    place = find_device(device)
    model = load_model(checkpoint, path).to(place).eval()
    if not model.config.is_causal:
        raise UserError(f"{path}: a model with full attention answers in one pass; python problem.py talks to it")
    generator = TextGenerator(model, tokenizer, place, instruct, list(stop))
    if lora:
        generator.use_adapter(lora)
    return generator
