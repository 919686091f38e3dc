"""Chat templates: how a conversation becomes one text, as data.

    CHATML.text([{"role": "user", "content": "Hi"}])    # <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n

Every model is trained with one template and answers well with that one alone: so it is a part of its tokenizer. What
stands around the messages may name special tokens; the messages themselves are plain text, whatever they contain.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from base.configuration import UserError

# {"role": "system", "user" or "assistant", "content": text}, perhaps "weight": 0, perhaps "image" of a user's message
Messages = list[dict[str, Any]]


class Run(NamedTuple):
    """A part of a conversation that is tokenised as one text."""

    pieces: list[tuple[str, bool]]  # (text, whether it belongs to the template and may name special tokens)
    in_loss: int = 0  # 1: a model learns to write it
    is_image: bool = False  # the places of an image's patches, and no text


@dataclass(frozen=True)
class ChatTemplate:
    """What stands before and after the messages of each role."""

    name: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]  # what follows an answer begins with the token that ends it
    begin: str = ""  # once, before everything
    default_system: str = ""  # for conversations without a system message
    system_in_question: bool = False  # a system message stands inside the turn of the next question
    strips: bool = False  # white space around messages is removed

    def runs(self, messages: Messages, image_last: bool = True) -> Iterator[Run]:
        """The parts of a conversation in order; one that ends with a question ends where the answer begins.

        image_last: an image stands after its question, not before it.
        """
        if self.begin:
            yield Run([(self.begin, True)])
        if self.default_system and messages and messages[0]["role"] != "system":
            yield Run([(self.system[0], True), (self.default_system, False), (self.system[1], True)])
        system = []  # waiting for the next question
        for message in messages:
            content = message["content"].strip() if self.strips else message["content"]
            before, after = getattr(self, message["role"])
            pieces = [(before, True), (content, False), (after, True)]
            if message["role"] == "assistant":
                end, rest = first_special_token(after)
                if before:
                    yield Run(pieces[:1])
                yield Run([(content, False), (end, True)], message.get("weight", 1))  # to answer, and to stop
                if rest:
                    yield Run([(rest, True)])
            elif message["role"] == "system" and self.system_in_question:
                system += pieces
            elif message["role"] == "user":
                pieces[1:1] = system
                if message.get("image") is not None:
                    place = len(pieces) - 1 if image_last else 1
                    yield Run(pieces[:place])
                    yield Run([], is_image=True)
                    pieces = pieces[place:]
                yield Run(pieces)
                system = []
            else:
                yield Run(pieces)
        if messages and messages[-1]["role"] == "user" and self.assistant[0]:
            yield Run([(self.assistant[0], True)])

    def text(self, messages: Messages) -> str:
        """A conversation as one text."""
        return "".join(text for run in self.runs(messages) for text, _ in run.pieces)

    def end_of_answer(self) -> str:
        """The special token that ends an answer."""
        return first_special_token(self.assistant[1])[0]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_jinja(self) -> str:
        """The same in Jinja, as other programs take it from tokenizer_config.json or a GGUF file."""
        quote = lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"  # noqa: E731
        content = "message['content'] | trim" if self.strips else "message['content']"
        system = f"{quote(self.system[0])} + {{}} + {quote(self.system[1])}"
        first, second = (quote(text) for text in self.user)
        parts = ["{% set turn = namespace(system='') %}"]
        if self.begin:
            parts.append(f"{{{{ {quote(self.begin)} }}}}")
        if self.default_system:
            default = system.format(quote(self.default_system))
            parts.append(f"{{% if messages[0]['role'] != 'system' %}}{{{{ {default} }}}}{{% endif %}}")
        message = system.format(f"({content})")
        parts.append("{% for message in messages %}{% if message['role'] == 'system' %}")
        parts.append(
            f"{{% set turn.system = turn.system + {message} %}}" if self.system_in_question else f"{{{{ {message} }}}}"
        )
        parts.append(f"{{% elif message['role'] == 'user' %}}{{{{ {first} + turn.system + ({content}) + {second} }}}}")
        parts.append("{% set turn.system = '' %}{% else %}")
        parts.append(f"{{{{ {quote(self.assistant[0])} + ({content}) + {quote(self.assistant[1])} }}}}")
        parts.append("{% endif %}{% endfor %}")
        if self.assistant[0]:
            parts.append(f"{{% if add_generation_prompt %}}{{{{ {quote(self.assistant[0])} }}}}{{% endif %}}")
        return "".join(parts)


def first_special_token(text: str) -> tuple[str, str]:
    """The special token <...> that a text begins with, and the rest."""
    end = text.find(">") + 1
    return text[:end], text[end:]


def chatml(**changes: Any) -> ChatTemplate:
    """OpenAI's ChatML, which Qwen and SmolLM use too."""
    turns = {r: (f"<|im_start|>{r}\n", "<|im_end|>\n") for r in ("system", "user", "assistant")}
    return ChatTemplate(**{"name": "chatml", **turns, **changes})


NANO = ChatTemplate(
    name="nano",
    system=("", "\n"),
    user=("<|InstructMark|>", "<|ResponseMark|>"),
    assistant=("", "<|eos|>"),
    system_in_question=True,
)
TEMPLATES = {
    "nano": NANO,
    "chatml": chatml(),
    "llama3": ChatTemplate(
        name="llama3",
        begin="<|begin_of_text|>",
        **{
            role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>")
            for role in ("system", "user", "assistant")
        },
        strips=True,
    ),
    "phi4": chatml(
        name="phi4", **{r: (f"<|im_start|>{r}<|im_sep|>", "<|im_end|>") for r in ("system", "user", "assistant")}
    ),
    "plain": ChatTemplate(  # for models that were never taught to converse, with GPT-2's one special token
        name="plain",
        system=("", "\n\n"),
        user=("### Question\n", "\n\n"),
        assistant=("### Answer\n", "<|endoftext|>"),
    ),
}
SECONDS = 20  # that the rendering of a template may take
# conversations that tell the templates apart
TRIALS = (
    [{"role": "user", "content": "Q1"}],
    [{"role": "system", "content": " S\n"}, {"role": "user", "content": " Q1\n"}],
    [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": " A1\n"},
        {"role": "user", "content": "Q2"},
    ],
    [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "<think>T</think>A2"},
    ],
)


def recognise(jinja: str, special_names: dict[str, str]) -> ChatTemplate | None:
    """Which of TEMPLATES says the same as a chat template in Jinja; None if none does.

    special_names: {"bos_token": ..., "eos_token": ...}, which the Jinja may refer to. It is rendered in a process of
    its own: one from a stranger can loop for ever or fill the memory, though Jinja's sandbox keeps it from all else.
    """
    request = json.dumps({"template": jinja, "trials": TRIALS, "names": special_names})
    command = [sys.executable, "-I", str(Path(__file__).with_name("jinja_rendering.py"))]
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=SECONDS, encoding="utf-8")
        rendered = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    for template, strips in itertools.product(TEMPLATES.values(), (False, True)):
        before, after = template.begin + template.system[0], template.system[1] + template.user[0]
        default = ""
        if not template.system_in_question and rendered[0].startswith(before) and after in rendered[0]:
            default = rendered[0][len(before) : rendered[0].index(after)]
        template = dataclasses.replace(template, default_system=default, strips=strips)
        if [template.text(trial) for trial in TRIALS] == rendered:
            return template
    return None


def template_from_dict(values: Any) -> ChatTemplate:
    """The inverse of to_dict(); raises UserError."""
    try:
        pairs = {role: tuple(values[role]) for role in ("system", "user", "assistant")}
        template = ChatTemplate(**{**values, **pairs})
        texts = [template.name, template.begin, template.default_system, *itertools.chain(*pairs.values())]
        flags = [template.system_in_question, template.strips]
        if any(len(pair) != 2 for pair in pairs.values()) or not template.end_of_answer():
            raise ValueError
        if not (all(isinstance(text, str) for text in texts) and all(isinstance(flag, bool) for flag in flags)):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError("its chat template is damaged") from None
    return template
