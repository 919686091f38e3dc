"""One web page that runs a model: a file to mail to a friend, opened from disk in any browser, on a phone too.

    write_page("answer.html", model, tokenizer, "q8_0")

The file holds the weights, the tokenizer and the code: what the page of serve.py shows and does, too (page/), and the
model in plain JavaScript (tokenizer.js, model.js). It loads nothing; its Content-Security-Policy allows nothing.
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from base.configuration import UserError
from base.files import atomic_write
from layers.rope import rope_frequencies
from model import GPT, ModelConfig
from text.foreign import PRE_TOKENIZERS, ForeignTokenizer
from text.tokenizer import SPECIAL_TOKENS, UNKNOWN, BPETokenizer, CharTokenizer, Tokenizer
from weights.gguf import tokens_and_merges

FOLDER = Path(__file__).parent
SHARED = FOLDER.parent / "page"
MODULES = (
    "words",
    "elements",
    "settings",
    "composer",
    "conversation",
    "tokens",
    "chat",
)  # of page/, each before its users
TYPES = ("q8_0", "float32")
BLOCK = 32  # numbers that share a scale in q8_0
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65504  # scales are float16: below, they lose digits, above, they are infinite
MAX_BASE64 = (1 << 29) - 25  # characters: no text in Chromium is longer, and what would be is read as empty
# how GPT-2 cuts a text into words, which the `tokenizers` library has built in
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


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
        is_exact |= not SMALLEST_SCALE <= np.abs(array).max() / 127 <= LARGEST_SCALE
        kind = "float32" if is_exact else type_name
        descriptions.append({"name": name, "shape": list(array.shape), "type": kind})
        parts.append(array.tobytes() if kind == "float32" else to_q8_0(array))
    return descriptions, b"".join(parts)


# ----------------------------------------------------------------------------------------------------- what it is


def network_of(config: ModelConfig) -> dict[str, Any]:
    """What model.js needs to know of a config; raises UserError for what it does not compute."""
    if config.mask_token or not config.is_causal:
        what = "masked diffusion" if config.mask_token else "is_causal false"
        raise UserError(f"a web page answers token by token, from left to right: {what} has no place in it")
    if set(config.attention) != {"full"}:
        raise UserError(f"a web page: attention {','.join(config.attention)}: it computes full attention alone")
    if config.shortcut_experts:
        raise UserError("a web page: shortcut_experts true: its experts read a layer's own tokens")
    names = "block_size vocab_size n_head n_kv_head n_embd n_hidden head_dim windows mlp norm norm_eps qk_norm"
    names += " tie_embeddings n_expert n_expert_per_token n_shared_expert"
    rope = None
    if config.use_rope:
        scaling = config.rope_scaling, config.rope_factor, config.rope_trained_length
        frequencies, scale = rope_frequencies(config.head_dim, config.rope_theta, *scaling)
        rope = {"frequencies": frequencies.tolist(), "scale": scale}
    return {name: getattr(config, name) for name in names.split()} | {"rope": rope}


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.js needs: the characters; or the tokens, the merges and how text is cut into words."""
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
    normalizer = (values["normalizer"] or {"type": ""})["type"]
    if normalizer not in ("", "NFC"):
        raise UserError(f"a web page: it does not normalise text as this tokenizer does ({normalizer})")
    added = [token for token in values["added_tokens"] if not token["special"]]
    for token in added:
        takes_more = any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
        if takes_more or (token.get("normalized") and normalizer and not token["content"].isascii()):
            raise UserError(f"a web page: it does not find the token {token['content']!r} as this tokenizer does")
    tokens, merges = tokens_and_merges(tokenizer)
    used = {*values["model"]["vocab"], *(token["content"] for token in values["added_tokens"])}
    return {
        "kind": "bpe",
        "tokens": [token if token in used else "" for token in tokens],  # a model may have more rows than tokens
        "merges": merges,
        "splits": splits_of(tokenizer),
        "is_nfc": normalizer == "NFC",
        "takes_whole_words": bool(values["model"].get("ignore_merges")),
        # tokens that are found in what people type, too, before it is cut into words
        "added": [token["content"] for token in added],
    }


def splits_of(tokenizer: BPETokenizer) -> list[str]:
    """The patterns that cut a text into words, one after the other, as JavaScript writes them; raises UserError."""
    name = tokenizer.pre_tokenizer() if isinstance(tokenizer, ForeignTokenizer) else "gpt-2"
    if name is None:
        raise UserError("a web page: it does not cut text into words as this tokenizer does")
    patterns = []
    for step in PRE_TOKENIZERS[name]:
        if step["type"] == "Digits":
            patterns.append(r"\p{N}")
        elif step["type"] == "Split":
            patterns.append(step["pattern"]["Regex"])
        elif step["use_regex"]:
            patterns.append(GPT2_WORDS)
    return [to_javascript(pattern) for pattern in patterns]


def to_javascript(pattern: str) -> str:
    """A regular expression of the `tokenizers` library for JavaScript, whose \\s is another set of white space.

    (?i:...), which older browsers lack, becomes classes: of its letters s alone has a third form, the long one.
    """
    classes = lambda letter: f"[{letter[0]}{letter[0].upper()}{'ſ' * (letter[0] == 's')}]"  # noqa: E731
    pattern = re.sub(r"\(\?i:([^)]*)\)", lambda group: f"(?:{re.sub('[a-z]', classes, group[1])})", pattern)
    return pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")


def describe_template(tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat template with ids in place of the special tokens' names: lists of texts and ids."""
    template = tokenizer.template

    def pieces(text: str) -> list[str | int]:
        parts = tokenizer.special_pattern.split(text)  # alternates: plain, special, plain, ...
        return [tokenizer.special_tokens[part] if i % 2 else part for i, part in enumerate(parts) if part]

    roles = {role: getattr(template, role) for role in ("system", "user", "assistant")}
    return {
        **{role: {"before": pieces(before), "after": pieces(after)} for role, (before, after) in roles.items()},
        "begin": pieces(template.begin),
        "default_system": template.default_system,
        "system_in_question": template.system_in_question,
        "strips": template.strips,
        "stop_tokens": tokenizer.stop_tokens,
        "begin_text": [tokenizer.bos] if tokenizer.adds_bos else [],
    }


# ------------------------------------------------------------------------------------------------------ the file


def as_json(value: Any) -> str:
    """JSON that may stand inside a <script>: there "</script>" and "<!--" would be markup, "\\u003c" never is."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def source_hash(source: str) -> str:
    """How a Content-Security-Policy names the one text of a <script> or <style> that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def read_source(name: str, folder: Path = FOLDER) -> str:
    return (folder / name).read_text(encoding="utf-8")


def join_modules() -> str:
    """The JavaScript of the page as one script: a file that was opened from disk may import no other.

    Without their imports and exports, modules one after the other are one: no two declare the same name.
    """
    sources = [read_source(f"{name}.js", SHARED) for name in MODULES] + [read_source("webpage.js")]
    code = re.sub(r"^import [^;]*;\n|^export ", "", "".join(sources), flags=re.MULTILINE)
    return f'"use strict";\n{code}'


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
        "template": describe_template(tokenizer),
    }
    encoded = base64.b64encode(weights).decode("ascii")
    if len(encoded) > MAX_BASE64:
        size = f"{len(weights) / 1e6:,.0f} MB as {type_name}"
        raise UserError(f"a web page: the weights, {size}, are more than a browser reads in one page")
    style, script = read_source("page.css", SHARED), join_modules()
    policy = (
        f"default-src 'none'; script-src {source_hash(script)}; style-src {source_hash(style)}; "
        "worker-src blob:; base-uri 'none'; form-action 'none'"
    )
    scripts = (
        f"<script>{script}</script>\n"
        f'<script type="application/json" id="about">{as_json(about)}</script>\n'
        f'<script type="text/plain" id="weights">{encoded}</script>\n'
        f'<script type="text/plain" id="model">{read_source("tokenizer.js")}{read_source("model.js")}</script>'
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{html.escape(name)}</title>'
    page = re.sub("<!-- served -->.*?<!-- end -->\n", "", read_source("index.html", SHARED), flags=re.DOTALL)
    for served, here in {
        "<title>Nano</title>": head,
        '<link rel="stylesheet" href="page.css">': f"<style>{style}</style>",
        '<script type="module" src="served.js"></script>': scripts,
    }.items():
        before, after = page.split(served)
        page = before + here + after
    return page


def write_page(path: str | Path, model: GPT, tokenizer: Tokenizer, type_name: str) -> None:
    """Write a model and its tokenizer as one web page; type_name: one of TYPES. Raises UserError."""
    if type_name not in TYPES:
        raise UserError(f"--type {type_name}: the weights of a web page are {' or '.join(TYPES)}")
    page = make_page(Path(path).stem, model, tokenizer, type_name)
    try:
        with atomic_write(path) as file:
            file.write(page.encode("utf-8", "replace"))  # a name on disk may be no text
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror or error})") from None
