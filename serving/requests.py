"""What a request to the server may hold: a table of fields with their ranges, and what needs more than a range.

    fields = read_fields(CHAT_FIELDS, {"messages": [...], "temperature": 0})

The fields are those of OpenAI's API, and those that vLLM and llama.cpp add to it. null stands for the default; a field
that is not in the table is ignored, as OpenAI's clients send more of them every year. What cannot be answered raises
BadRequest, which names the field.
"""

import base64
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from base.configuration import Config, Field, UserError, fields_of, option
from serving.scheduler import Generation, Piece, Refused, Sampling
from serving.text_generator import TextGenerator
from text.tokenizer import Messages, TextStream, Tokenizer, normalise
from vision.images import read_image

MAX_ANSWERS = 64  # of one request, over its prompts and n
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
DATA_URL = re.compile("data:image/(png|jpe?g);base64,", re.IGNORECASE)


class BadRequest(Refused):
    """A request that cannot be answered as it stands. param: the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message, status)
        self.param, self.code = param, code


@dataclass
class AnswerFields(Config):
    """Fields of both kinds of completions."""

    model: str | None = option(None, "one of /v1/models; default: the first")
    temperature: float = option(1.0, "0: greedy decoding", minimum=0.0, maximum=100.0)
    top_p: float = option(1.0, "nucleus sampling", above=0.0, maximum=1.0)
    top_k: int = option(0, "from the k likeliest tokens alone; 0 or -1: from all", minimum=-1)
    min_p: float = option(0.0, "from tokens at least this share as likely as the likeliest", minimum=0.0, maximum=1.0)
    repetition_penalty: float = option(1.0, "above 1: tokens of the context become less likely", above=0, maximum=100)
    max_tokens: int | None = option(None, "of the answer", minimum=0)
    seed: int | None = option(None, "of the random numbers", minimum=-(1 << 63), maximum=(1 << 63) - 1)
    steps: int | None = option(None, "masked diffusion: passes for a block of tokens", minimum=1)
    n: int = option(1, "answers to each prompt", minimum=1, maximum=MAX_ANSWERS)
    stream: bool = option(False, "server-sent events")


@dataclass
class ChatFields(AnswerFields):
    """Fields of /v1/chat/completions."""

    max_completion_tokens: int | None = option(None, "of the answer", minimum=0)
    logprobs: bool = option(False, "report log-probabilities")
    top_logprobs: int = option(0, "also of the likeliest tokens", minimum=0, maximum=20)
    continue_final_message: bool = option(False, "go on from the last message, an assistant's")


@dataclass
class CompletionFields(AnswerFields):
    """Fields of /v1/completions."""

    max_tokens: int | None = option(16, "of the answer", minimum=0)
    logprobs: int | None = option(None, "report log-probabilities, and so many likeliest tokens", minimum=0, maximum=20)
    echo: bool = option(False, "repeat the prompt before the answer")


@dataclass
class TokenizeFields(Config):
    """Fields of /tokenize."""

    is_chat: bool = option(False, "the prompt is a question")
    add_generation_prompt: bool = option(False, "the messages are ready for the answer")


CHAT_FIELDS, COMPLETION_FIELDS, TOKENIZE_FIELDS = map(fields_of, (ChatFields, CompletionFields, TokenizeFields))


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body; raises BadRequest."""

    def refuse_constant(name: str) -> None:
        raise BadRequest(f"{name} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except BadRequest:
        raise
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError):
        raise BadRequest("the body's JSON is nested too deeply, or has a number of too many digits") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def read_fields(known: dict[str, Field], body: dict[str, Any]) -> SimpleNamespace:
    """The values of the known fields, defaults where they are missing or null; raises BadRequest."""
    values = {}
    for name, field in known.items():
        value = body.get(name)
        try:
            values[name] = field.default if value is None else field.check(value)
        except UserError as error:
            raise BadRequest(str(error), name) from None
    return SimpleNamespace(**values)


def read_text(value: Any, name: str) -> str:
    """A text of a request, lone surrogates replaced, which no encoding has; raises BadRequest."""
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a text", name)
    return normalise(value.encode("utf-8", "replace").decode("utf-8"))


def read_sampling(fields: SimpleNamespace, body: dict[str, Any], vocab_size: int) -> Sampling:
    """How the request's answers are sampled; raises BadRequest."""
    bias = {} if body.get("logit_bias") is None else body["logit_bias"]
    wrong = BadRequest(
        f"logit_bias must be an object of token ids (0..{vocab_size - 1}) with numbers from -100 to 100", "logit_bias"
    )
    if not isinstance(bias, dict):
        raise wrong
    added = {}
    for token, value in bias.items():
        is_id = token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size
        if not is_id or isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise wrong
        added[int(token)] = float(value)
    return Sampling(
        temperature=fields.temperature,
        top_k=fields.top_k if fields.top_k > 0 else None,
        top_p=fields.top_p,
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=added,
        seed=None if fields.seed is None else fields.seed % (1 << 63),
        steps=fields.steps,
    )


def read_stop(body: dict[str, Any]) -> list[str]:
    """The texts that end an answer; raises BadRequest."""
    stop = body.get("stop")
    texts = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if len(texts) <= MAX_STOPS and all(isinstance(text, str) and len(text) <= MAX_STOP_LENGTH for text in texts):
        texts = [read_text(text, "stop") for text in texts]
        if all(texts):  # an empty one would end every answer before it begins
            return texts
    rule = f"a text of 1 to {MAX_STOP_LENGTH:,} characters, or a list of up to {MAX_STOPS} of them"
    raise BadRequest(f"stop must be {rule}", "stop")


def read_usage_option(body: dict[str, Any]) -> bool:
    """Whether a stream ends with the usage; raises BadRequest."""
    options = {} if body.get("stream_options") is None else body["stream_options"]
    wanted = options.get("include_usage") if isinstance(options, dict) else options
    if not isinstance(options, dict) or not (wanted is None or isinstance(wanted, bool)):
        raise BadRequest('stream_options must be {"include_usage": true or false}', "stream_options")
    return bool(wanted)


def read_messages(body: dict[str, Any]) -> Messages:
    """The conversation of a request, as chat templates take it; raises BadRequest.

    The first question may have an "image": the contents of a file (bytes), which read_pixels() reads.
    """
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise BadRequest("messages must be a list of at least one message", "messages")
    messages = []
    for i, message in enumerate(given):
        name = f"messages[{i}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{name} must be an object with role and content", name)
        role, content, images = message.get("role"), message.get("content"), []
        if not isinstance(role, str) or role not in ROLES:
            raise BadRequest(f"{name}.role must be one of {', '.join(ROLES)}", f"{name}.role")
        if isinstance(content, list):
            content, images = read_parts(content, f"{name}.content")
        is_first = role == "user" and not any(earlier["role"] == "user" for earlier in messages)
        if len(images) > is_first:
            rule = "a conversation has one image at most, in its first question"
            raise BadRequest(f"{name}.content: {rule}", f"{name}.content")
        image = {"image": images[0]} if images else {}
        messages.append({"role": ROLES[role], "content": read_text(content, f"{name}.content"), **image})
    return messages


def read_parts(parts: list[Any], name: str) -> tuple[str, list[bytes]]:
    """The text of a message's parts, joined, and the files of its images; raises BadRequest."""
    texts, images = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            images.append(read_data_url(part.get("image_url"), name))
        else:
            raise BadRequest(f"{name}: only parts of type text and image_url are read", name)
    return "".join(texts), images


def read_data_url(value: Any, name: str) -> bytes:
    """The file in {"url": "data:image/png;base64,..."}; raises BadRequest.

    An address on the web is not followed: whoever asks could look around by it in networks that only the server
    reaches (server-side request forgery).
    """
    url = value.get("url") if isinstance(value, dict) else None
    head = DATA_URL.match(url) if isinstance(url, str) else None
    if not head:
        rule = 'image_url must be {"url": "data:image/png;base64,..."}, or jpeg: the image itself, nothing is fetched'
        raise BadRequest(f"{name}: {rule}", name)
    try:
        return base64.b64decode("".join(url[head.end() :].split()), validate=True)  # in one line or several
    except ValueError:
        raise BadRequest(f"{name}: the image's base64 is damaged", name) from None


def read_pixels(generator: TextGenerator, model: str, contents: bytes, name: str) -> np.ndarray:
    """The pixels (3, S, S) that a model reads of an image file; raises BadRequest. model, name: to be named by it."""
    if generator.model.vision is None:
        rule = "has an image; a model that sees is trained with train.py -t vision"
        raise BadRequest(f"the model {model} reads text alone, and {name} {rule}", name)
    try:
        return read_image(contents, generator.model.config.image_size)
    except UserError as error:
        raise BadRequest(f"the image: {error}", name) from None


def read_begun(generator: TextGenerator, body: dict[str, Any]) -> list[int]:
    """Token ids that the answer begins with: the text of these might be cut into others. Raises BadRequest."""
    name = "continue_token_ids"
    if body.get(name) in (None, []):
        return []
    if body.get("continue_final_message"):
        raise BadRequest(f"{name} stands for continue_final_message: leave one of them out", name)
    return read_ids(generator, body[name], name)


def chat_prompt(
    generator: TextGenerator, messages: Messages, goes_on: bool = False, begun: Sequence[int] = ()
) -> list[int]:
    """Token ids (T,) of a conversation, ready for the answer; raises BadRequest.

    goes_on: the last message is the beginning of the answer; begun: token ids that are. Of a conversation of more than
    three quarters of the window the oldest turns are left out, as inference.py does.
    """
    last = messages[-1]
    if goes_on and last["role"] != "assistant":
        raise BadRequest("continue_final_message: the last message must be the assistant's", "continue_final_message")
    asked = messages[:-1] if goes_on else messages
    if not asked or asked[-1]["role"] != "user":
        rule = "before the assistant's that goes on" if goes_on else "(or set continue_final_message)"
        raise BadRequest(f"messages must end with a user's {rule}", "messages")
    window = generator.model.config.block_size
    if goes_on:
        begun = generator.tokenizer.encode(last["content"]).tolist()
    return [*generator.chat_ids(asked, max(0, window * 3 // 4 - len(begun))), *begun]


def conversation_ids(generator: TextGenerator, messages: Messages, for_answer: bool) -> list[int]:
    """Token ids (T,) of a conversation as it stands; for_answer: ready for the answer. Raises BadRequest."""
    if for_answer:
        return chat_prompt(generator, messages)
    config = generator.model.config
    return generator.tokenizer.encode_chat(messages, config.n_patches, config.image_last)[0].tolist()


def image_among(messages: Messages, ids: list[int], generator: TextGenerator) -> np.ndarray | None:
    """The image (3, S, S) of a conversation whose places are among its token ids: not if its question was left out."""
    if generator.model.config.vocab_size not in ids:
        return None
    return next((message["image"] for message in messages if "image" in message), None)


def token_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text; a character that is spread over several tokens comes with the last of them."""
    stream, pieces = TextStream(tokenizer), []
    whole: dict[int, str] = {}  # of tokens that are whole characters: a text of a million has few different ones
    whole[tokenizer.vocab_size] = ""  # a patch of an image
    for token in ids:
        begins = not stream.pending
        if not begins or token not in whole:
            pieces.append(stream.push(token))
            if begins and not stream.pending:
                whole[token] = pieces[-1]
        else:
            pieces.append(whole[token])
    return [*pieces[:-1], pieces[-1] + stream.rest()] if pieces else []


def read_ids(generator: TextGenerator, ids: Any, name: str) -> list[int]:
    """Token ids (T,) of a request; raises BadRequest."""
    vocab_size = generator.model.config.vocab_size
    if not isinstance(ids, list) or not ids or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise BadRequest(f"{name} must be a list of token ids in 0..{vocab_size - 1}", name)
    return ids


def read_prompts(generator: TextGenerator, body: dict[str, Any]) -> list[list[int]]:
    """The prompts of a request, texts or token ids, as token ids; raises BadRequest."""
    prompt = body.get("prompt")
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int)
    prompts = [prompt] if is_one else prompt
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_ANSWERS:
        rule = f"a text, a list of token ids, or a list of up to {MAX_ANSWERS} of these"
        raise BadRequest(f"prompt must be {rule}", "prompt")
    found = []
    for item in prompts:
        is_text = isinstance(item, str)
        ids = text_ids(generator, read_text(item, "prompt")) if is_text else read_ids(generator, item, "prompt")
        if not ids:
            raise BadRequest("prompt is empty", "prompt")
        found.append(ids)
    return found


def text_ids(generator: TextGenerator, text: str) -> list[int]:
    """Token ids (T,) of a text to continue."""
    tokenizer = generator.tokenizer
    return [*([tokenizer.bos] if tokenizer.adds_bos else []), *tokenizer.encode(text).tolist()]


def room_for_answer(ids: list[int], max_tokens: int | None, block_size: int, param: str) -> int:
    """How many tokens an answer may have: what was asked for, at most what the window holds; raises BadRequest."""
    room = block_size - len(ids)
    if room < 0 or (room == 0 and max_tokens != 0):
        message = f"the prompt has {len(ids):,} tokens, the model's context window {block_size:,}: shorten it"
        raise BadRequest(message, param, code="context_length_exceeded")
    return room if max_tokens is None else min(max_tokens, room)


def generations(
    prompts: list[list[int]],
    fields: SimpleNamespace,
    body: dict[str, Any],
    generator: TextGenerator,
    param: str,
    deliver: Callable[[int, Piece], None],
) -> list[Generation]:
    """The answers that a request asks for: n to each of its prompts, in their order; raises BadRequest.

    deliver(i, piece) is called with each piece of the i-th. param: the field of the prompts.
    """
    if len(prompts) * fields.n > MAX_ANSWERS:
        raise BadRequest(f"n: a request may ask for {MAX_ANSWERS} answers, over all its prompts", "n")
    config = generator.model.config
    if fields.steps and not config.mask_token:
        raise BadRequest("steps is for models of masked diffusion: this one generates token by token", "steps")
    sampling, stop = read_sampling(fields, body, config.vocab_size), read_stop(body)
    found = []
    for ids in prompts:
        room = room_for_answer(ids, fields.max_tokens, config.block_size, param)
        for k in range(fields.n):
            seed = None if sampling.seed is None else (sampling.seed + k) % (1 << 63)
            one = dataclasses.replace(sampling, seed=seed)
            found.append(Generation(ids, room, one, functools.partial(deliver, len(found)), stop))
    return found
