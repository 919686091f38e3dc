"""Questions, asked of a model with greedy decoding, and its answers compared with those expected.

    turns = turns_of(read_conversations("held_out.jsonl"))
    answers = [ask(generator, turn) for turn in turns]
    share = sum(answer.is_exact for answer in answers) / len(answers)

A conversation is asked turn by turn, each with the true history before it: what the model said to an earlier question
does not make it fail at a later one.
"""

import math
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.configuration import UserError
from serving.text_generator import GenerationConfig, TextGenerator
from text.tokenizer import Messages, normalise

# full stops, commas and signs that are part of a number stay: -1.5 is neither 1.5 nor 15
part_of_number = re.compile(r"(?<=\d)[.](?=\d)|(?<![a-z0-9)])-(?=\d)")
thousands = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # 1,000 is 1000
between_other_letters = re.compile("(?<![a-z0-9]) | (?![a-z0-9])")  # spaces beside Chinese characters say nothing


@dataclass
class Turn:
    """An answer that is expected, and what comes before it."""

    where: str  # the place in the file, "line 3"
    conversation: int  # the number of its conversation
    history: Messages
    question: str
    expected: str
    image: Path | None = None  # what the question is about


@dataclass
class Answer:
    """What a model said; None if the question does not fit into its window, and why."""

    turn: Turn
    text: str | None
    error: str = ""
    is_cut: bool = False  # whether the oldest turns before it were left out, to fit into the window

    @property
    def is_exact(self) -> bool:
        """Whether it is the expected answer, but for white space around it."""
        return self.text is not None and self.text.strip() == normalise(self.turn.expected).strip()

    @property
    def is_alike(self) -> bool:
        """Whether it is the expected answer, but for case, spaces, punctuation and full width."""
        return self.text is not None and simplify(self.text) == simplify(self.turn.expected)

    def describe(self, model: str) -> dict[str, Any]:
        """The record of --out."""
        history = [{**m, "image": str(m["image"])} if "image" in m else m for m in self.turn.history]
        record = {"model": model, "where": self.turn.where, "history": history}
        record |= {"image": str(self.turn.image)} if self.turn.image else {}
        record |= {"question": self.turn.question, "expected": self.turn.expected, "answer": self.text}
        record |= {"exact": self.is_exact, "normalised": self.is_alike}
        record |= {"without_oldest_turns": True} if self.is_cut else {}
        return record | ({"error": self.error} if self.error else {})


def check_sight(generators: dict[str, TextGenerator], turns: list[Turn]) -> None:
    """Raises UserError where there are images in the questions that do not exist, or a model that reads text alone."""
    about = next((turn for turn in turns if turn.image), None)
    for turn in turns:
        if turn.image and not turn.image.is_file():
            raise UserError(f"{turn.where}: {turn.image}: no such file")
    for path, generator in generators.items():
        if about and generator.model.vision is None:
            raise UserError(f"{about.where}: a question about an image, and {path} reads text alone")


def turns_of(conversations: list[tuple[str, Messages]]) -> list[Turn]:
    """Every answer of the conversations that is to be learnt: not those with "weight": 0, which only set the scene."""
    turns = []
    for number, (where, messages) in enumerate(conversations):
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("weight", 1):
                place = f"{where}, message {i + 1}" if len(messages) > 2 else where
                asked = messages[i - 1]
                texts = asked["content"], message["content"]
                turns.append(Turn(place, number, messages[: i - 1], *texts, asked.get("image")))
    return turns


def ask(generator: TextGenerator, turn: Turn) -> Answer:
    """The greedy answer to a question, after the turns before it: all that fit with the answer, as in training."""
    try:
        history = [{**m, "image": generator.open_image(m["image"])} if "image" in m else m for m in turn.history]
        image = generator.open_image(turn.image) if turn.image else None
        room = len(generator.tokenizer.encode(normalise(turn.expected))) + 1  # and for its end
        if generator.model.config.mask_token:  # which fills in whole blocks
            room = math.ceil(room / generator.answer_block) * generator.answer_block
        whole = [*history, {"role": "user", "content": turn.question, "image": image}]
        sizes = [len(generator.chat_ids(whole, n)) for n in (sys.maxsize, generator.model.config.block_size - room)]
        is_cut = sizes[1] < sizes[0]
        pieces = generator.answer(turn.question, GenerationConfig(temperature=0.0), history, image=image, room=room)
        return Answer(turn, "".join(pieces), is_cut=is_cut)
    except UserError as error:
        return Answer(turn, None, str(error))


def simplify(original: str) -> str:
    """A text without what may differ between answers that say the same: "Ｏｋ， 好 的！" -> "ok好的".

    Unicode's NFKC makes full-width and other compatibility characters plain, casefold() takes case away; punctuation
    is read as a space, runs of spaces as one, and spaces stay between Latin words and numbers only.
    """
    text = unicodedata.normalize("NFKC", original).casefold().replace("\u2212", "-")  # the minus sign
    text = thousands.sub("", text)
    kept = {match.start() for match in part_of_number.finditer(text)}
    is_mark = [unicodedata.category(c).startswith("P") and i not in kept for i, c in enumerate(text)]
    text = "".join(" " if mark else c for c, mark in zip(text, is_mark, strict=True))
    simple = between_other_letters.sub("", " ".join(text.split()))
    return simple or original.strip()  # an answer of nothing but punctuation is that punctuation
