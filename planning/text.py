"""The text that is planned for: what data.py wrote of it, and where."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.configuration import UserError, command_line
from text.token_files import TokenFile


@dataclass
class Text:
    """A text that data.py has prepared."""

    train: Path
    val: Path
    tokenizer: Path
    header: dict[str, Any]  # of the training file
    baselines: dict[str, float]  # of the validation file
    tokens_per_character: float

    @property
    def unique(self) -> int:
        """Tokens to train on."""
        return self.header["n_tokens"]

    @property
    def vocab_size(self) -> int:
        return self.header["vocab_size"]

    @property
    def fields(self) -> dict[str, Any]:
        """Where a config says that it lies."""
        return {"dataset_path": [[str(self.train), str(self.val)]], "tokenizer_path": str(self.tokenizer)}


def open_text(path: Path) -> Text:
    """The text of a training file NAME_train.bin; raises UserError where it is none, or its other files are missing."""
    if not path.name.endswith("_train.bin"):
        raise UserError(f"{path}: plan.py takes a text, or the training file that data.py made of one: NAME_train.bin")
    val, tokenizer = path.with_name(path.name.removesuffix("_train.bin") + "_val.bin"), path.with_name("tokenizer.json")
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer}: no such file; `{command_line('data.py')}` writes it beside the token files")
    header, val_header = (TokenFile(file, is_verified=False).header for file in (path, val))
    if header["n_samples"] is not None:
        raise UserError(f"{path}: questions and answers; plans are for pretraining, on running text")
    if val_header["baselines"]["unigram"] < 0.01:
        raise UserError(f"{val}: always the same character: there is nothing to learn")
    ratio = val_header["n_loss_tokens"] / max(1, val_header["n_characters"])
    return Text(path, val, tokenizer, header, val_header["baselines"], ratio)
