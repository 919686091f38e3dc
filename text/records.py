"""What the fields of a record mean: a text, a conversation, or two conversations to prefer one of.

    stage_of_fields({"question", "answer"})                    # "sft"
    parse_conversation({"question": "1+1?", "answer": 2})      # [{"role": "user", ...}, {"role": "assistant", ...}]

A record is a JSON object, or a row of a table. It becomes messages {"role", "content"} with the roles system, user and
assistant; "weight": 0 in an assistant's message takes it out of the loss. Functions raise UserError for a record that
cannot be used, and EmptyRecord for one that says nothing.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from base.configuration import UserError
from text.tokenizer import Messages, normalise

PROMPTS = ("question", "prompt", "instruction")
ANSWERS = ("answer", "completion", "output")
CONVERSATIONS = ("messages", "conversations")  # lists of messages; conversations is ShareGPT's name
FIELDS = (*PROMPTS, *ANSWERS, *CONVERSATIONS, "text", "input", "system", "history", "image", "chosen", "rejected")
FIELDS_OF_MESSAGES = ("role", "content")
# role names of OpenAI, ShareGPT, Gemini and LLaMA-Factory; what a tool returns is read to the model as a user's message
ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("user", "human"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "function_call"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation"), "tool")

WHAT_IS_TAKEN = (
    '"text" for pretraining; "question" and "answer", "prompt" and "completion", "instruction" and "output", '
    '"messages" or "conversations" for fine-tuning, with "image" beside them if it is about one; '
    'a prompt with "chosen" and "rejected" for preferences'
)


class EmptyRecord(UserError):
    """A record without text, question or answer: it is counted and left out."""


def stage_of_fields(names: Iterable[str]) -> str:
    """The training stage that a record with these fields is for; empty if that cannot be told."""
    names = set(names)
    if {"chosen", "rejected"} <= names:
        return "dpo"
    if names & set(CONVERSATIONS) or (names & set(PROMPTS) and names & set(ANSWERS)):
        return "vision" if "image" in names else "sft"
    return "pretrain" if "text" in names else ""


def rename_fields(values: dict[str, Any], rename: dict[str, str]) -> dict[str, Any]:
    """A record with its fields, and those of its messages, under our names. rename: {their name: ours}."""
    inside = {theirs: ours for theirs, ours in rename.items() if ours in FIELDS_OF_MESSAGES}

    def rename_messages(value: Any) -> Any:
        if not (inside and isinstance(value, list)):
            return value
        return [{inside.get(k, k): v for k, v in m.items()} if isinstance(m, dict) else m for m in value]

    ours = {name for theirs, name in rename.items() if theirs in values}
    unused = {name for group in ((*PROMPTS, *CONVERSATIONS), ANSWERS) if ours & set(group) for name in group} - ours
    renamed = {name: value for name, value in values.items() if name not in rename and name not in unused}
    renamed |= {ours: values[theirs] for theirs, ours in rename.items() if theirs in values}
    return {name: rename_messages(value) for name, value in renamed.items()}


# ------------------------------------------------------------------------------------------------------ values


def to_text(value: Any, name: str) -> str:
    """A field's value as text: numbers as JSON writes them, a list of text parts joined, null as nothing."""
    if isinstance(value, str):
        text = normalise(value)
        return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")  # "\ud800" is valid JSON
    if value is None:
        return ""
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if isinstance(value, list) and (len(value) < 2 or not any(isinstance(part, str) for part in value)):
        return "".join(text_of_part(part, name) for part in value)
    if isinstance(value, list):
        raise UserError(f'"{name}" is a list of {len(value)} texts, not one')
    raise UserError(f'"{name}" is not text, but {kind_of(value)}')


def text_of_part(part: Any, name: str) -> str:
    """The text of a content part, {"type": "text", "text": ...} in OpenAI's format."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        part = part["text"]
    if not isinstance(part, str):
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        raise UserError(f'"{name}" has a part that is not text ({str(kind)[:40]})')
    return to_text(part, name)


def kind_of(value: Any) -> str:
    """A value's kind in JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def required_text(values: dict[str, Any], name: str) -> str:
    if name not in values:
        raise UserError(f'"{name}" is missing')
    text = to_text(values[name], name)
    if not text.strip():
        raise EmptyRecord(f'"{name}" is empty')
    return text


def parse_text(values: dict[str, Any]) -> str:
    """The document of a record with "text"."""
    return required_text(values, "text")


# ------------------------------------------------------------------------------------------------------ messages


def parse_message(message: Any, number: int) -> dict[str, Any]:
    """One message with our roles: {"role": system, user or assistant, "content": text, "weight": 0 or 1}."""
    where = f"message {number}"
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be an object with role and content, got {kind_of(message)}")
    name = message.get("role", message.get("from"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where}: role must be one of {', '.join(ROLES)}, got {json.dumps(name, default=str)[:40]}")
    key = "value" if "value" in message and "content" not in message else "content"
    try:
        content = to_text(message.get(key), key)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    calls = message.get("tool_calls") or [call for call in [message.get("function_call")] if call]
    if not isinstance(calls, list):
        raise UserError(f'{where}: "tool_calls" must be a list')
    content = "\n".join(filter(None, [content, *(text_of_call(call, where) for call in calls)]))
    if role == "tool":
        role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
    weight = message.get("weight") if role == "assistant" else 1
    weight = 1 if weight is None else weight
    if weight not in (0, 1):
        raise UserError(f"{where}: weight must be 0 (not in the loss) or 1, got {json.dumps(weight, default=str)}")
    return {"role": role, "content": content, "weight": int(weight)}


def text_of_call(call: Any, where: str) -> str:
    """An assistant's call of a tool as text, in the form of Qwen and Hermes."""
    call = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f'{where}: "tool_calls" must be a list of objects with a function\'s name and arguments')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's format has them as JSON inside a string
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise UserError(f'{where}: "arguments" of {call["name"][:40]} are not valid JSON') from None
    text = json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False, default=str)
    return f"<tool_call>\n{to_text(text, 'arguments')}\n</tool_call>"


def arrange_turns(messages: list[Any]) -> Messages:
    """The messages of a conversation in the order of the chat template: (system ...) user, assistant, user, ...

    Neighbours of one role are joined by a line break. An assistant that begins answers an empty question. What follows
    the last answer is left out, as there is no answer to learn from.
    """
    parsed = [parse_message(message, number) for number, message in enumerate(messages, 1)]
    while parsed and parsed[-1]["role"] != "assistant":
        parsed.pop()
    turns: list[dict[str, Any]] = []
    for number, turn in enumerate(parsed, 1):
        before = turns[-1] if turns else {"role": "system"}
        if not turn["content"].strip():
            if turn["role"] == "system":
                continue
            raise EmptyRecord(f"message {number} is empty")
        if turn["role"] == "assistant" and before["role"] == "system":
            turns.append({"role": "user", "content": "", "weight": 1})
        if turn["role"] == "system" and before["role"] == "user":
            turns.insert(-1, turn)  # before the question that it is about
        elif turn["role"] == before["role"] != "system":
            if turn["weight"] != before["weight"]:
                raise UserError(f"message {number}: another weight than that of the answer which it goes on from")
            before["content"] += "\n" + turn["content"]
        else:
            turns.append(turn)
    if not turns:
        raise UserError("no answer in it (role assistant)")
    return [with_weight(turn, turn["weight"]) for turn in turns]


def with_weight(turn: dict[str, Any], weight: int) -> dict[str, Any]:
    """A message; the weight is named where it is not the usual 1."""
    plain = {"role": turn["role"], "content": turn["content"]}
    return plain if weight or turn["role"] != "assistant" else plain | {"weight": 0}


def as_messages(values: dict[str, Any], name: str, role: str) -> list[Any]:
    """A field as a list of messages: a text is one message of the given role."""
    value = values.get(name)
    if isinstance(value, list) and any(isinstance(m, dict) and ("role" in m or "from" in m) for m in value):
        return value
    return [{"role": role, "content": required_text(values, name)}]


def the_field(values: dict[str, Any], names: tuple[str, ...], what: str) -> str:
    """Which of several names for the same thing a record uses; raises UserError for none, or more than one."""
    present = [name for name in names if values.get(name) is not None]
    if len(present) > 1:
        one, two = present[:2]
        raise UserError(f'"{one}" and "{two}": which is the {what}? --fields {one}={one}, or --fields {two}={two}')
    if not present and set(names) & set(values):
        raise EmptyRecord(f"the {what} is empty")
    if not present:
        raise UserError(f'"{names[0]}" is missing')
    return present[0]


def parse_prompt(values: dict[str, Any], usual: str) -> tuple[list[Any], str]:
    """The messages before the answer, and the name of the field that holds them; usual: its name in most data."""
    name = the_field(values, tuple(dict.fromkeys((usual, *PROMPTS, *CONVERSATIONS))), "prompt")
    if name in CONVERSATIONS:
        if not isinstance(values[name], list) or not values[name]:
            raise UserError(f'"{name}" must be a list of messages')
        messages = values[name]
    else:
        messages = as_messages(values, name, "user")
        more = to_text(values.get("input"), "input")  # Alpaca: what the instruction is applied to
        if more.strip() and isinstance(values[name], str):
            messages = [{"role": "user", "content": f"{messages[0]['content']}\n{more}"}]
    return [*earlier_messages(values), *messages], name


def earlier_messages(values: dict[str, Any]) -> list[Any]:
    """The messages of the fields system and history, [[question, answer], ...] as LLaMA-Factory has them."""
    system, history = to_text(values.get("system"), "system"), values.get("history") or []
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError('"history" must be a list of [question, answer] pairs')
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def parse_conversation(values: dict[str, Any]) -> Messages:
    """The conversation of a record for fine-tuning.

    All its answers are in the loss, but for those with weight 0 and those inside of a "prompt" that is a message list.
    """
    talks = [name for name in CONVERSATIONS if values.get(name) is not None]
    if talks and not any(values.get(name) is not None for name in ANSWERS):  # what else there is only repeats a part
        values = {name: value for name, value in values.items() if name not in PROMPTS}
    messages, name = parse_prompt(values, "question")
    if name in CONVERSATIONS:
        conversation = arrange_turns(messages)
    else:
        answer = the_field(values, ANSWERS, "answer")
        if len(messages) == 1 and isinstance(values[name], str) and isinstance(values[answer], str):
            return [*messages, {"role": "assistant", "content": required_text(values, answer)}]
        if isinstance(values[name], list):
            messages = [message | {"weight": 0} if isinstance(message, dict) else message for message in messages]
        conversation = arrange_turns([*messages, *as_messages(values, answer, "assistant")])
    if not any(turn["role"] == "assistant" and turn.get("weight", 1) for turn in conversation):
        raise UserError('every answer has "weight": 0: nothing to learn')
    return conversation


def check_images(values: dict[str, Any], stage: str) -> None:
    """Raises UserError for images that a record for this stage would lose."""
    if values.get("images"):
        raise UserError('"images" of a record are not read: name one in "image", beside a question and its answer')
    if stage == "vision" or values.get("image") in (None, ""):
        return
    if stage == "sft":
        raise UserError('"image", where the first records have none: begin with one that has, or name another file')
    raise UserError(f'"image" in a record for {stage}: images belong to questions with an answer; take the field out')


def image_file(values: dict[str, Any], folder: Path) -> Path | None:
    """The file that a record's "image" names, relative to the folder that the record is in; None if it has none."""
    name = values.get("image")
    if name in (None, ""):  # tables have an empty field where there is none
        return None
    if not isinstance(name, str) or not name.strip():
        raise UserError('"image" must be the name of a png or jpeg file')
    if "://" in name or name.startswith("data:"):
        raise UserError(f'"image" is {name[:40]!r}: images are read from files alone, nothing is fetched')
    return folder / name


def parse_preference(values: dict[str, Any]) -> list[Messages]:
    """The conversations of a preference record, [chosen, rejected]: equal but for their last answers.

    chosen and rejected are answers to a prompt, or whole conversations. The last answers alone are in the loss.
    """
    sides = [as_messages(values, name, "assistant") for name in ("chosen", "rejected")]
    first = sides[0][0] if isinstance(sides[0][0], dict) else {}
    if ROLES.get(str(first.get("role", first.get("from"))).lower()) == "assistant":
        prompt, name = parse_prompt(values, "prompt")
        if [parse_message(message, number)["role"] for number, message in enumerate(prompt, 1)][-1] != "user":
            raise UserError(f'"{name}" must end with a question (role user)')
        sides = [[*prompt, *side] for side in sides]
    chosen, rejected = (arrange_turns(side) for side in sides)
    if [turn["content"] for turn in chosen[:-1]] != [turn["content"] for turn in rejected[:-1]]:
        raise UserError('"chosen" and "rejected" differ before their last answers')
    if chosen[-1]["content"] == rejected[-1]["content"]:
        raise UserError('"chosen" and "rejected" are the same')
    return [[*(with_weight(turn, 0) for turn in side[:-1]), with_weight(side[-1], 1)] for side in (chosen, rejected)]
