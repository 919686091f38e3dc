"""Hugging Face's tokenizer.json and what stands beside it, to and from our tokenizers."""

import json
from pathlib import Path
from typing import Any

from base.configuration import UserError, read_json
from text.foreign import ForeignTokenizer
from text.tokenizer import BOS, EOS, PADDING, SPECIAL_TOKENS, UNKNOWN, BPETokenizer, CharTokenizer, Tokenizer


def to_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of tokenizer.json. Characters are a BPE without merges: every character is a token of its own."""
    if isinstance(tokenizer, ForeignTokenizer):
        return json.loads(tokenizer.to_dict()["tokenizer"])
    if isinstance(tokenizer, BPETokenizer):
        values = json.loads(tokenizer.to_dict()["tokenizer"])
    else:
        names = [*SPECIAL_TOKENS, *tokenizer.characters]
        values = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": SPECIAL_TOKENS[UNKNOWN],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {name: i for i, name in enumerate(names)},
                "merges": [],
            },
        }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values["added_tokens"] = [{"id": i, "content": name, **flags} for i, name in enumerate(SPECIAL_TOKENS)]
    return values


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """The names of special tokens by what they are for: bos_token, eos_token (it ends an answer), pad_token, ..."""
    if isinstance(tokenizer, ForeignTokenizer):
        return {**tokenizer.names, "eos_token": tokenizer.template.end_of_answer()}
    names = {"eos_token": EOS, "bos_token": BOS, "pad_token": PADDING, "unk_token": UNKNOWN}
    return {name: SPECIAL_TOKENS[i] for name, i in names.items()}


def read_tokenizer(folder: Path, config: dict[str, Any], template: str) -> Tokenizer:
    """The tokenizer of a folder: one of ours, or that of another model. config: the contents of config.json."""
    path, settings = folder / "tokenizer.json", {}
    if not path.is_file():
        raise UserError(f"{path}: no such file: AutoTokenizer's save_pretrained() of transformers writes it")
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
    if not isinstance(settings, dict):
        raise UserError(f"{folder / 'tokenizer_config.json'}: must be a JSON object")
    tokenizer = our_tokenizer(path)
    if tokenizer is not None and not template:
        return tokenizer
    jinja = settings.get("chat_template") or ""
    if (folder / "chat_template.jinja").is_file():  # where version 5 of transformers keeps it
        jinja = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if isinstance(jinja, list):  # several, by name
        jinja = next((t.get("template") for t in jinja if isinstance(t, dict) and t.get("name") == "default"), "")
    names = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        names |= {name: token} if isinstance(token, str) else {}
    rows = config.get("vocab_size") or 0
    return ForeignTokenizer.from_tokenizer_json(read_json(path), names, rows, str(path), str(jinja), template)


def our_tokenizer(path: Path) -> Tokenizer | None:
    """Our tokenizer, if that is what a tokenizer.json holds; None for one of another model."""
    values = read_json(path)
    try:
        added = {token["id"]: token["content"] for token in values["added_tokens"]}
        model = values["model"]
        if model["type"] != "BPE":
            return None
        vocabulary = sorted(model["vocab"], key=model["vocab"].get)
        is_ours = [added.get(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS) and model["type"] == "BPE"
        is_complete = [model["vocab"][name] for name in vocabulary] == list(range(len(vocabulary)))
        if is_ours and is_complete and not model["merges"] and values["pre_tokenizer"] is None:
            characters = vocabulary[len(SPECIAL_TOKENS) :]
            if all(len(character) == 1 for character in characters):
                return CharTokenizer("".join(characters))
        if is_ours and (values["pre_tokenizer"] or {}).get("type") == "ByteLevel":
            import tokenizers

            if (values["post_processor"] or {}).get("special_tokens"):
                raise UserError(f"{path}: it puts special tokens around every text, which ours does not")
            text = json.dumps({**values, "post_processor": None})  # transformers adds one that does nothing
            return BPETokenizer(tokenizers.Tokenizer.from_str(text).to_str())  # written as the library writes it
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a tokenizer.json") from None
    return None
