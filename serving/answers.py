"""Answers in the forms of OpenAI's API: whole, or as the chunks of a stream; for chats and for plain completions.

https://platform.openai.com/docs/api-reference; beside what is there, tokens come with their ids.
"""

import json
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from serving.scheduler import Generation, Piece, TokenInfo
from text.tokenizer import TextStream, Tokenizer


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def usage(generations: list[Generation], n: int) -> dict[str, Any]:
    """The tokens of a request with n answers to each prompt, whose prompts count once."""
    n_prompt = sum(len(generation.ids) for generation in generations[::n])
    n_drawn = sum(len(generation.drawn) for generation in generations)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_drawn,
        "total_tokens": n_prompt + n_drawn,
        "prompt_tokens_details": {"cached_tokens": sum(generation.n_reused for generation in generations[::n])},
    }


@dataclass
class Chat:
    """Answers to a conversation."""

    tokenizer: Tokenizer
    model: str
    with_logprobs: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    whole, chunk = "chat.completion", "chat.completion.chunk"

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def first(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, piece: Piece, in_stream: bool) -> dict[str, Any]:
        """A piece of the answer with this index, or all of it."""
        logprobs = {"content": self.logprobs(piece.tokens), "refusal": None} if self.with_logprobs else None
        if in_stream:
            said = {"delta": {"content": piece.text} if piece.text or not piece.finish_reason else {}}
        else:
            said = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def logprobs(self, tokens: list[TokenInfo]) -> list[dict[str, Any]]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            is_part = "\ufffd" in text  # of a character that is spread over several tokens
            encoded = None if is_part else list(text.encode("utf-8"))
            return {"id": token, "token": text, "logprob": logprob, "bytes": encoded}

        return [
            {**entry(info.id, info.logprob), "top_logprobs": [entry(*candidate) for candidate in info.top]}
            for info in tokens
        ]


@dataclass
class Completion:
    """Continuations of texts."""

    tokenizer: Tokenizer
    model: str
    with_logprobs: bool
    echoed: list[list[int]] = field(default_factory=list)  # the prompts of all answers, where they are to be repeated
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    read: dict[int, TextStream] = field(default_factory=dict)  # the tokens of each answer so far
    offsets: Counter = field(default_factory=Counter)  # characters that these have completed
    whole = chunk = "text_completion"

    head = Chat.head

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def choice(self, index: int, piece: Piece, in_stream: bool) -> dict[str, Any]:
        """A piece of the answer with this index, or all of it."""
        text, tokens = piece.text, piece.tokens
        if index not in self.read:  # the first piece
            self.read[index] = TextStream(self.tokenizer)
            if self.echoed:
                text, tokens = self.tokenizer.decode(self.echoed[index]) + text, [*piece.prompt, *tokens]
        if piece.stop_token:  # clients of the harness's kind count on a token more than the prompt has
            tokens = [*tokens, piece.stop_token]
        return {
            "index": index,
            "text": text,
            "logprobs": self.logprobs(index, tokens) if self.with_logprobs else None,
            "finish_reason": piece.finish_reason,
            "token_ids": [info.id for info in piece.tokens],
        }

    def logprobs(self, index: int, tokens: list[TokenInfo]) -> dict[str, Any]:
        offsets = []
        for info in tokens:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(self.read[index].push(info.id))
        top = [
            None if info.logprob is None else {self.name(token): logprob for token, logprob in info.top}
            for info in tokens
        ]
        return {
            "tokens": [self.name(info.id) for info in tokens],
            "token_logprobs": [info.logprob for info in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def name(self, token: int) -> str:
        """The text of a token; of a part of a character, where many have the same, its id, in vLLM's form."""
        text = self.tokenizer.decode([token])
        return f"token_id:{token}" if not text or "\ufffd" in text else text
