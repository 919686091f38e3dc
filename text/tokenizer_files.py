"""Tokenizer files, and the tokenizers in checkpoints: read whatever kind they hold."""

from pathlib import Path
from typing import Any

from base.configuration import UserError, read_json
from text.foreign import ForeignTokenizer
from text.tokenizer import FORMAT, SPECIAL_TOKENS, BPETokenizer, CharTokenizer, Tokenizer


def tokenizer_from_dict(values: Any, where: str) -> Tokenizer:
    """The inverse of to_dict(). where: the file to name in errors."""
    if isinstance(values, dict) and values.get("kind") == "foreign":
        return ForeignTokenizer.from_dict(values, where)
    if not isinstance(values, dict) or values.get("special_tokens") != list(SPECIAL_TOKENS):
        raise UserError(f"{where}: not a tokenizer file of this toolkit; make one with python data.py")
    if values.get("format") != FORMAT:
        raise UserError(f"{where}: tokenizer format {values.get('format')!r} is not supported (expected {FORMAT})")
    try:
        if values.get("kind") == "char" and isinstance(values.get("characters"), str):
            return CharTokenizer(values["characters"])
        if values.get("kind") == "bpe" and isinstance(values.get("tokenizer"), str):
            return BPETokenizer(values["tokenizer"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    raise UserError(f"{where}: tokenizer kind {values.get('kind')!r} is unknown or its vocabulary is missing")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer file; raises UserError."""
    return tokenizer_from_dict(read_json(path), str(path))
