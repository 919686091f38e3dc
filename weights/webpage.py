"""One web page that runs a model: a file to mail to a friend, opened from disk in any browser, on a phone too.

    write_page("answer.html", model, tokenizer, "q8_0")

The file holds the weights, the tokenizer and the code: page.html and page.css (what is seen), page.js (what it does),
tokenizer.js and model.js (the model in plain JavaScript). It loads nothing; its Content-Security-Policy allows nothing.
"""

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from base.configuration import UserError
from base.files import atomic_write
from layers.rope import rope_frequencies
from model import GPT, ModelConfig
from text.tokenizer import EOS, INSTRUCT, RESPONSE, SPECIAL_TOKENS, UNKNOWN, BPETokenizer, CharTokenizer, Tokenizer

FOLDER = Path(__file__).parent
TYPES = ("q8_0", "float32")
BLOCK = 32  # numbers that share a scale in q8_0
# how GPT-2 splits a text into words, before BPE; \s in the `tokenizers` library is \p{White_Space} in JavaScript
GPT2_SPLIT = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+"
    r"|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+"
)
# Tokenizer.encode_chat() as data: what stands before and after a message, as texts and ids of special tokens
TEMPLATE = {
    "system": {"before": [], "after": ["\n"]},
    "user": {"before": [INSTRUCT], "after": [RESPONSE]},
    "assistant": {"before": [], "after": [EOS]},
    "system_in_question": True,  # a system message stands at the beginning of the next question
    "prompt": [],  # what comes last and asks for an answer
    "end": EOS,
}


# ------------------------------------------------------------------------------------------------------ weights


def to_q8_0(matrix: np.ndarray) -> bytes:
    """Rows (..., columns) in llama.cpp's 8-bit type: blocks of a float16 scale and 32 int8 each.

    integer = round(number / scale) with scale = largest / 127; a row's last block may be shorter here.
    """
    rows = matrix.reshape(-1, matrix.shape[-1])
    blocks = []
    for start in range(0, rows.shape[1], BLOCK):
        block = rows[:, start : start + BLOCK]
        scale = np.abs(block).max(axis=1, keepdims=True) / np.float32(127)
        quotient = block * np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        integers = np.trunc(quotient + np.copysign(np.float32(0.5), quotient)).astype(np.int8)  # halves away from zero
        blocks += [scale.astype("<f2").view(np.uint8), integers.view(np.uint8)]
    return np.concatenate(blocks, axis=1).tobytes()


def pack_weights(model: GPT, type_name: str) -> tuple[list[dict[str, Any]], bytes]:
    """The tensors' names, shapes and types, and their numbers one after the other."""
    descriptions, parts = [], []
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        array = np.ascontiguousarray(weight.detach().float().cpu().numpy(), dtype="<f4")
        is_exact = array.ndim == 1 or name.endswith("router.weight")  # small, and a rounded router chooses otherwise
        kind = "float32" if is_exact else type_name
        descriptions.append({"name": name, "shape": list(array.shape), "type": kind})
        parts.append(array.tobytes() if kind == "float32" else to_q8_0(array))
    return descriptions, b"".join(parts)


# ----------------------------------------------------------------------------------------------------- what it is


def network_of(config: ModelConfig) -> dict[str, Any]:
    """What model.js needs to know of a config; raises UserError for what it does not compute."""
    if not config.is_causal:
        raise UserError("a web page: is_causal false: full attention predicts no next token, so it has no answers")
    names = "block_size vocab_size n_head n_kv_head n_embd n_hidden head_dim windows mlp norm_eps qk_norm"
    names += " tie_embeddings n_expert n_expert_per_token n_shared_expert"
    rope = None
    if config.use_rope:
        scaling = config.rope_scaling, config.rope_factor, config.rope_trained_length
        frequencies, scale = rope_frequencies(config.head_dim, config.rope_theta, *scaling)
        rope = {"frequencies": frequencies.tolist(), "scale": scale}
    return {name: getattr(config, name) for name in names.split()} | {"rope": rope}


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.js needs: the characters; or the tokens, the merges and how text is split into words."""
    if isinstance(tokenizer, CharTokenizer):
        return {
            "kind": "char",
            "special_tokens": SPECIAL_TOKENS,
            "characters": tokenizer.characters,
            "unknown": UNKNOWN,
        }
    if not isinstance(tokenizer, BPETokenizer):
        raise UserError(f"a web page: it has no tokenizer of the kind {tokenizer.kind}")
    values = json.loads(tokenizer.to_dict()["tokenizer"])
    vocabulary = values["model"]["vocab"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    tokens = sorted(vocabulary, key=vocabulary.get)
    return {"kind": "bpe", "tokens": tokens, "merges": merges, "splits": splits_of(values["pre_tokenizer"])}


def splits_of(pre_tokenizer: dict[str, Any]) -> list[str]:
    """The patterns of a tokenizer.json that cut a text into words, one after the other, as JavaScript writes them."""
    if pre_tokenizer.get("type") != "ByteLevel" or pre_tokenizer.get("add_prefix_space"):
        raise UserError(f"a web page: it does not split text as this tokenizer does ({pre_tokenizer.get('type')})")
    return [GPT2_SPLIT] if pre_tokenizer.get("use_regex", True) else []


# ------------------------------------------------------------------------------------------------------ the file


def as_json(value: Any) -> str:
    """JSON that may stand inside a <script>: there "</script>" and "<!--" would be markup, "\\u003c" never is."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def source_hash(source: str) -> str:
    """How a Content-Security-Policy names the one text of a <script> or <style> that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def read_source(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def make_page(name: str, model: GPT, tokenizer: Tokenizer, type_name: str) -> str:
    """The text of a page; name: what it calls the model."""
    tensors, weights = pack_weights(model, type_name)
    about = {
        "name": name,
        "n_weights": model.parameter_count(),
        "type": type_name,
        "config": network_of(model.config),
        "tensors": tensors,
        "tokenizer": describe_tokenizer(tokenizer),
        "template": TEMPLATE,
    }
    style, script = read_source("page.css"), read_source("page.js")
    policy = (
        f"default-src 'none'; script-src {source_hash(script)}; style-src {source_hash(style)}; "
        "worker-src blob:; base-uri 'none'; form-action 'none'"
    )
    return Template(read_source("page.html")).substitute(
        title=html.escape(name),
        policy=policy,
        style=style,
        about=as_json(about),
        weights=base64.b64encode(weights).decode("ascii"),
        model=read_source("tokenizer.js") + read_source("model.js"),
        script=script,
    )


def write_page(path: str | Path, model: GPT, tokenizer: Tokenizer, type_name: str) -> None:
    """Write a model and its tokenizer as one web page; type_name: one of TYPES. Raises UserError."""
    if type_name not in TYPES:
        raise UserError(f"--type {type_name}: the weights of a web page are {' or '.join(TYPES)}")
    page = make_page(Path(path).stem, model, tokenizer, type_name)
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))  # a name on disk may be no text
