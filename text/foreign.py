"""The tokenizer of a model that came from elsewhere: byte-level BPE with its own special tokens and chat template.

    tokenizer = ForeignTokenizer.from_tokenizer_json(values, names, vocab_size, "tokenizer.json")

GPT-2, Llama 3, Qwen and SmolLM all tokenise like this; they differ in how text is cut into words before (the
pre-tokenizer), in their vocabulary, and in their special tokens. The `tokenizers` library runs them all.
"""

import json
import os
import re
from typing import Any

import numpy as np

from base.configuration import UserError
from text.template import TEMPLATES, ChatTemplate, recognise, template_from_dict
from text.tokenizer import FORMAT, BPETokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# the words of GPT-4, which Llama 3 and Qwen took over; {} is how many digits make a word
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_into(pattern: str) -> list[dict[str, Any]]:
    """Pre-tokenisation by a regular expression, whose matches are the words."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, {**BYTE_LEVEL, "use_regex": False}]


PRE_TOKENIZERS = {  # llama.cpp's name -> the steps of a tokenizer.json
    "gpt-2": [{**BYTE_LEVEL, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}],
    "llama-bpe": split_into(WORDS % r"\p{N}{1,3}"),
    "qwen2": split_into(WORDS % r"\p{N}"),
}
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>")  # where a model has one beside the end of an answer


class ForeignTokenizer(BPETokenizer):
    """A tokenizer.json of another model, with what its model's config says of special tokens and conversations."""

    kind = "foreign"
    unknown = None  # bytes leave no text out

    def __init__(
        self, tokenizer_json: str, names: dict[str, str], vocab_size: int, template: ChatTemplate, jinja: str = ""
    ) -> None:
        """names: bos_token, eos_token, pad_token; vocab_size: rows of the model, which may be more than the tokens.

        jinja: the template as the model's files have it, written back unchanged.
        """
        self._load(tokenizer_json)
        self.names, self.template, self.jinja = names, template, jinja
        last = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if last >= vocab_size:
            raise UserError(f"the tokenizer has tokens up to {last:,}, the model {vocab_size:,} rows for them")
        self.vocab_size = vocab_size
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(added.items()) if token.special}
        names_of_special = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, names_of_special)) + ")")
        self.special_mark = os.path.commonprefix(names_of_special)
        markers = template.begin, *template.system, *template.user, *template.assistant
        named = {template.end_of_answer(), *re.findall(r"<\|\w+\|>", "".join(markers))}
        if missing := named - set(self.special_tokens):
            raise UserError(f"chat template {template.name}: the tokenizer has no {', '.join(sorted(missing))}")
        eager = [token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word]
        if eager := sorted(named & set(eager)):
            raise UserError(f"special tokens that take the white space beside them are not read: {', '.join(eager)}")
        ends = [name for name in (*END_OF_DOCUMENT, names.get("eos_token")) if name in self.special_tokens]
        if not ends:
            raise UserError("the tokenizer has no special token that ends a text (eos_token)")
        self.eos = self.special_tokens[ends[0]]
        first = self._tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self.adds_bos = bool(first) and first[0] in self.special_tokens.values()
        self.bos = first[0] if self.adds_bos else None

    @classmethod
    def from_tokenizer_json(
        cls,
        values: dict[str, Any],
        names: dict[str, str],
        vocab_size: int,
        where: str,
        jinja: str = "",
        template: str = "",
    ) -> "ForeignTokenizer":
        """The tokenizer of a tokenizer.json's contents. template: the name of one of TEMPLATES; else jinja says it.

        Raises UserError for another kind of tokenizer, and for a template that is none of TEMPLATES.
        """
        try:
            steps, is_bpe = steps_of(values.get("pre_tokenizer")), values["model"]["type"] == "BPE"
            has_special = any(token["special"] for token in values["added_tokens"])
            values = {**values, "model": {**values["model"], "dropout": None}}  # BPE dropout would make ids random
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{where}: not a tokenizer.json") from None
        if not is_bpe or not any(step.get("type") == "ByteLevel" for step in steps) or not has_special:
            raise UserError(
                f"{where}: its tokenizer is not byte-level BPE with special tokens (as GPT-2, Llama 3, Qwen and SmolLM "
                "have); others are not read"
            )
        if template and template not in TEMPLATES:
            raise UserError(f"--template {template}: it is one of {', '.join(TEMPLATES)}")
        found = TEMPLATES[template] if template else recognise(jinja, names) if jinja else TEMPLATES["plain"]
        if found is None:
            raise UserError(
                f"{where}: its chat template is none of {', '.join(TEMPLATES)}; --template NAME takes one of them"
            )
        try:
            return cls(json.dumps(values, ensure_ascii=False), names, vocab_size, found, "" if template else jinja)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "ForeignTokenizer":
        """The inverse of to_dict(). where: the file to name in errors."""
        try:
            template = template_from_dict(values["template"])
            names = {str(name): str(token) for name, token in values["names"].items()}
            return cls(values["tokenizer"], names, int(values["vocab_size"]), template, str(values["jinja"]))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
            raise UserError(f"{where}: its tokenizer is damaged") from None

    def _encode_plain(self, text: str) -> np.ndarray:
        valid = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be encoded as UTF-8
        (encoding,) = self._tokenizer.encode_batch_fast([valid], add_special_tokens=False)  # it leaves out the offsets
        return np.array(encoding.ids, dtype=self.dtype)

    def added_tokens(self) -> list[int]:
        """Ids of the tokens that are found in text before it is cut into words, special or not."""
        return sorted(self._tokenizer.get_added_tokens_decoder())

    def pre_tokenizer(self) -> str | None:
        """llama.cpp's name of how text is cut into words; None where it has none that is known here."""
        values = json.loads(self._json)
        steps, model = steps_of(values["pre_tokenizer"]), values["model"]
        name = next((name for name, known in PRE_TOKENIZERS.items() if steps == known), None)
        takes_words = bool(model.get("ignore_merges")) == (name == "llama-bpe")  # a word that is a token is taken whole
        is_plain = (values.get("normalizer") or {"type": "NFC"}) == {"type": "NFC"} and not model.get("dropout")
        return name if is_plain and takes_words else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "tokenizer": self._json,
            "names": self.names,
            "vocab_size": self.vocab_size,
            "template": self.template.to_dict(),
            "jinja": self.jinja,
        }


def steps_of(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what makes no difference to the ids."""
    is_sequence = (pre_tokenizer or {}).get("type") == "Sequence"
    steps = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer or {}]
    plain = []
    for step in steps:
        if step.get("type") == "ByteLevel":
            step = {"use_regex": True, **step, "trim_offsets": True}
        plain.append(step)
    return plain


def byte_level_json(tokens: list[str], types: list[int], merges: list[str], pre: str) -> dict[str, Any]:
    """A tokenizer.json for what a GGUF file says: tokens in the order of their ids, and their types.

    types: 3 for special tokens, 4 for others that are found before text is cut into words, 5 for ids without use.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind == 3}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (3, 4)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": {**BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",  # a word that is a token is taken whole
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] != 5},
            "merges": [tuple(merge.split(" ")) for merge in merges],
        },
    }


def begin_with(token: str, token_id: int) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that puts a token in front of every text."""
    special, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    tokens = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"SpecialToken": {"id": token, "type_id": 1}}, second],
        "special_tokens": tokens,
    }
