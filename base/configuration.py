"""Configs: dataclasses with validated fields, read from JSON files and overridden on the command line.

    @dataclass
    class TrainConfig(Config):
        batch_size: int = option(100, "samples per micro-batch", minimum=1)

    args, overrides = Parser(__doc__, TrainConfig).parse()     # python train.py --batch_size 32
    config = TrainConfig(**overrides)

option() defines a field's default, its validation, its command-line flag and its line in --help. Invalid input raises
UserError: one line that says what is wrong, where, and how to fix it; run_main() prints it without a traceback.
"""

import argparse
import dataclasses
import difflib
import errno
import functools
import io
import json
import os
import re
import shlex
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CONFIG_FOLDERS = (Path("config"), Path(__file__).parent.parent / "config")  # here, and next to the scripts
MAX_NUMBER = 1e300  # JSON allows integers too large for a float
BOOLEANS = {  # how they may be spelled on the command line, in any case
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


CUSTOMARY_NAMES = {  # what a field or a command is called elsewhere -> here
    **dict.fromkeys(("lr", "max_lr", "alpha"), "learning_rate"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("epochs", "n_epochs", "num_epochs", "num_train_epochs"), "max_steps"),
    **dict.fromkeys(("steps", "num_steps", "iters", "max_iters", "iterations"), "max_steps"),
    **dict.fromkeys(("bs", "batch", "micro_batch_size", "device_batch_size"), "batch_size"),
    **dict.fromkeys(("accumulate_grad_batches", "grad_accum", "grad_accum_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(("warmup", "warmup_steps", "num_warmup_steps"), "warmup_iters"),
    **dict.fromkeys(("clip", "max_grad_norm", "clip_grad_norm"), "grad_clip"),
    **dict.fromkeys(("eval_every", "eval_steps"), "eval_interval"),
    **dict.fromkeys(("resume", "init_from", "load"), "from_checkpoint"),
    **dict.fromkeys(("out_dir", "output_dir", "save_dir"), "save_checkpoint_to"),
    **dict.fromkeys(("data", "dataset", "train_data"), "dataset_path"),
    **dict.fromkeys(("context", "context_length", "ctx", "seq_len", "max_seq_len"), "block_size"),
    **dict.fromkeys(("dim", "d_model", "hidden_size", "width"), "n_embd"),
    **dict.fromkeys(("layers", "n_layers", "num_layers", "num_hidden_layers", "depth"), "n_layer"),
    **dict.fromkeys(("heads", "n_heads", "num_heads", "num_attention_heads"), "n_head"),
    **dict.fromkeys(("temp",), "temperature"),
    **dict.fromkeys(("max_tokens", "max_new_tokens", "length"), "max_length"),
    **dict.fromkeys(("seed",), "random_seed"),
    **dict.fromkeys(("precision", "amp", "fp16", "bf16"), "dtype"),
    **dict.fromkeys(("gpu", "cuda"), "device"),
    **dict.fromkeys(("wandb", "tensorboard"), "log_to"),
    **dict.fromkeys(("exit", "bye", "q"), "quit"),
    **dict.fromkeys(("clear", "new"), "reset"),
}


class UserError(ValueError):
    """Invalid input from the user. The message is one line that names the file, field or argument at fault."""


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    section: str = "",
) -> Any:
    """Declare a config field: its default, one line of help, and its allowed values.

    above, minimum, maximum: above < value, minimum <= value <= maximum.
    section: the --help heading for this field and the following ones, up to the next section.
    """
    metadata = {
        "help": help,
        "section": section,
        "choices": tuple(choices) if choices else None,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """Base class of all configs: creating an instance validates every field, then their combination (check())."""

    def __post_init__(self) -> None:
        for name, field in fields_of(type(self)).items():
            setattr(self, name, field.check(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Validate combinations of fields; raises UserError."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config class: its type and the constraints on its value."""

    name: str
    type: Any
    default: Any
    metadata: Any

    @property
    def type_name(self) -> str:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
        parts = [t for t in typing.get_args(self.type) or (self.type,) if t is not type(None)]
        if self.is_list:
            return "a list"
        return " or ".join(names.get(t, str(t)) for t in parts) + (" or null" if self.optional else "")

    @property
    def metavar(self) -> str:
        """Placeholder for the value in --help: true|false, N, X, LIST or TEXT."""
        return {bool: "true|false", int: "N", float: "X", list: "A,B,..."}.get(self.plain_type, "TEXT")

    @property
    def help_text(self) -> str:
        """Description, allowed values and default, for argparse."""
        text = self.metadata["help"]
        if self.metadata["choices"]:
            text += f" ({', '.join(self.metadata['choices'])})"
        if self.default not in (None, "", []):
            shown = ",".join(self.default) if self.is_list else self.default
            text += f" [{shown if isinstance(shown, str) else json.dumps(shown)}]".replace("\n", "\\n")
        return text.replace("%", "%%")  # argparse interpolates help texts

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.type) is list

    @property
    def optional(self) -> bool:
        return isinstance(self.type, types.UnionType) and type(None) in typing.get_args(self.type)

    @property
    def has_auto(self) -> bool:
        """Whether it is one of auto, true and false."""
        return self.plain_type is str and "true" in (self.metadata["choices"] or ())

    @property
    def plain_type(self) -> type:
        """The type without `| None` and list items: bool, int, float, str or list."""
        if self.is_list:
            return list
        return next(t for t in typing.get_args(self.type) or (self.type,) if t is not type(None))

    def fail(self, rule: str, value: Any) -> typing.NoReturn:
        shown = json.dumps(value, ensure_ascii=False, default=str)
        raise UserError(f"{self.name} must be {rule}, got {shown if len(shown) < 100 else shown[:100] + '...'}")

    def check(self, value: Any) -> Any:
        """The valid value, with lossless conversions (1e5 -> 100000 for an integer); raises UserError."""
        if value is None and self.optional:
            return None
        kind = self.plain_type
        if self.has_auto and isinstance(value, bool):
            value = str(value).lower()
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind in (int, float) and is_number and not abs(value) < MAX_NUMBER:
            self.fail("finite", str(value)[:20])
        if kind is int and is_number and value == int(value):
            value = int(value)
        elif kind is float and is_number:
            value = float(value)
        elif not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            self.fail(self.type_name, value)
        if kind is list:
            self._check_list(value)
        rules = self.metadata
        if rules["choices"]:
            for item in value if kind is list else [value]:
                if item not in rules["choices"]:
                    hint = nearest(item, rules["choices"])
                    allowed = "one of " + ", ".join(rules["choices"])
                    self.fail(f"{allowed} (did you mean {hint}?)" if hint else allowed, value)
        if rules["minimum"] is not None and value < rules["minimum"]:
            self.fail(f"at least {rules['minimum']}", value)
        if rules["above"] is not None and value <= rules["above"]:
            self.fail(f"above {rules['above']}", value)
        if rules["maximum"] is not None and value > rules["maximum"]:
            self.fail(f"at most {rules['maximum']}", value)
        return value

    def _check_list(self, value: list) -> None:
        (item_type,) = typing.get_args(self.type)
        if item_type is str and not all(isinstance(item, str) for item in value):
            self.fail("a list of strings", value)
        if item_type is int and not all(type(item) is int and 0 <= item < 1 << 31 for item in value):
            self.fail("a list of integers of at least 0", value)
        if item_type == list[str]:
            for item in value:
                if not isinstance(item, list) or len(item) != 2 or not all(isinstance(path, str) for path in item):
                    self.fail("a list of [train file, validation file] pairs", value)

    def parse(self, text: str) -> Any:
        """The value that a text on the command line stands for; a text of another type is left for check() to refuse.

        Numbers are written as in Python (.8, 1e5, 1_000), booleans as in BOOLEANS, lists as JSON or with commas between
        the items; strings need no quotes.
        """
        kind = self.plain_type
        if self.optional and text.lower() in ("none", "null"):
            return None
        try:
            if kind is list and text.lstrip().startswith("["):
                return json.loads(text)
            if kind is list:
                items = [item.strip() for item in text.split(",") if item.strip()]
                return [parse_integer(item) for item in items] if self.type == list[int] else items
            if self.has_auto:
                return BOOLEANS.get(text.lower(), text.lower())
            return {bool: parse_boolean, int: parse_integer, float: float, str: str}[kind](text)
        except (ValueError, RecursionError):
            return text


def parse_boolean(text: str) -> bool:
    """true or false, in one of the spellings of BOOLEANS; raises ValueError."""
    if text.lower() not in BOOLEANS:
        raise ValueError(text)
    return BOOLEANS[text.lower()]


def parse_integer(text: str) -> int:
    """An integer as int() reads it, or one with an exponent or a fraction of zero (1e5, 8.); raises ValueError."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))


def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a config class by name."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: Field(
            field.name,
            hints[field.name],
            field.default if field.default is not dataclasses.MISSING else field.default_factory(),
            field.metadata,
        )
        for field in dataclasses.fields(cls)
    }


def nearest(name: Any, names: Iterable[str]) -> str:
    """What the name means elsewhere, the shortest one that begins with it, or the most similar; "" if none is close."""
    name, names = str(name), list(names)
    word = name.lstrip("-/")
    meant = name.removesuffix(word) + CUSTOMARY_NAMES.get(word.lower().replace("-", "_"), "")
    if meant in names:
        return meant
    longer = [known for known in names if len(name) > 1 and known.startswith(name)]
    return min(longer, key=len, default="") or next(iter(difflib.get_close_matches(name, names, n=1)), "")


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """The suffix '; did you mean "x"?' of an error message, or ""."""
    hint = nearest(name, names)
    return f'; did you mean "{hint}"?' if hint else ""


def command_line(script: str, *arguments: str) -> str:
    """A command to type, quoted for a shell: a script that lies beside the one that runs."""
    return shlex.join(["python", str(Path(sys.argv[0] or script).with_name(script)), *arguments])


def read_json(path: str | Path) -> Any:
    """The contents of a JSON file; raises UserError with line and column of a syntax error."""

    def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise UserError(f"{path}: {json.dumps(next(n for n in names if names.count(n) > 1))} is given twice")
        return values

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=reject_duplicate_keys)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply") from None


def read_text(path: str | Path) -> str:
    """The contents of a small UTF-8 file, without a byte-order mark; raises UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def find_config(name: str) -> Path:
    """Resolve `-t NAME`: the path of a JSON file, or config/NAME.json here or next to the scripts."""
    candidates = [Path(name), *(folder / f"{name}.json" for folder in CONFIG_FOLDERS)]
    for path in candidates:
        if path.is_file():
            return path
    names = [path.stem for folder in CONFIG_FOLDERS for path in folder.glob("*.json")]
    hint = "; `python plan.py TEXT --minutes 30` writes it" if name == "plan" else did_you_mean(name, names)
    raise UserError(f"config {name!r}: neither a file nor a name in config/{hint}")


def check_fields(values: Any, known: dict[str, Field], where: str) -> dict[str, Any]:
    """Validate the field values of one source, `where` (a file, the command line); raises UserError that names it."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a JSON object of fields, got {type(values).__name__}")
    checked = {}
    for name, value in values.items():
        if name not in known:
            shown = json.dumps(value, ensure_ascii=False, default=str)
            raise UserError(f"{where}: unknown field {json.dumps(name)} (value {shown}){did_you_mean(name, known)}")
        try:
            checked[name] = known[name].check(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return checked


class Parser(argparse.ArgumentParser):
    """argparse with a `--field value` flag for every field of the given config classes, and one-line errors."""

    def __init__(self, doc: str, *classes: type, hidden: Iterable[str] = (), bare: str = "") -> None:
        """hidden: fields that --help leaves out, as the script will refuse them with a reason.

        bare: the flag that is meant where a value stands alone.
        """
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=36)
        super().__init__(description=doc, formatter_class=layout, allow_abbrev=False)
        self.register("type", int, parse_integer)  # the scripts' own options take numbers as the fields do
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")  # values, as no option begins so: -1e-4, -1,0
        self.bare = bare
        self.fields: dict[str, Field] = {}
        for cls in classes:
            group = None
            for name, field in fields_of(cls).items():
                section = field.metadata["section"]
                if section or group is None:
                    group = self.add_argument_group(section or (cls.__doc__ or cls.__name__).split("\n")[0].rstrip("."))
                if name not in self.fields:  # a name in two classes (dropout) is one flag
                    self.fields[name] = field
                    text = argparse.SUPPRESS if name in hidden else field.help_text
                    group.add_argument(f"--{name}", metavar=field.metavar, help=text, default=argparse.SUPPRESS)

    def format_usage(self) -> str:
        """The script's own options, wrapped, and [OPTION ...] or [--FIELD VALUE ...] for those in further sections."""
        parts = []
        for action in (*self._positionals._group_actions, *self._optionals._group_actions):
            name = action.option_strings[0] if action.option_strings else ""
            value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
            if action.help != argparse.SUPPRESS and action.dest != "help":
                text = " ".join(filter(None, (name, value)))
                parts.append(text if action.required and name else f"[{text}]")
        if len(self._action_groups) > 2:  # beside argparse's own for positional arguments and options
            parts.append("[--FIELD VALUE ...]" if self.fields else "[OPTION ...]")
        start = f"usage: {self.prog} "
        glued = [part.replace(" ", "\0") for part in parts]  # an option and its value stay on one line
        lines = textwrap.wrap(" ".join(glued), 110 - len(start), break_on_hyphens=False)
        return start + ("\n" + " " * len(start)).join(lines).replace("\0", " ") + "\n"

    def format_help(self) -> str:
        """The usage line, the description, the script's own options, and the config fields by section."""
        self.usage = self.format_usage().removeprefix("usage: ").strip().replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"command line: {message} (--help lists the options)")

    def parse(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """(the script's own arguments, the validated config overrides by field name)"""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].split("=")[0]
            is_flag = name.startswith("-") or not self.bare
            hint = did_you_mean(name, flags) if is_flag else f'; did you mean "{self.bare} {unknown[0]}"?'
            raise UserError(f"command line: unknown argument {unknown[0]!r}{hint}")
        given = {name: field.parse(getattr(args, name)) for name, field in self.fields.items() if hasattr(args, name)}
        return args, check_fields(given, self.fields, "command line")


# What takes over or misleads a terminal: control characters (C0 but for \n and \t; C1); line and paragraph separators;
# bidirectional embeddings, overrides and isolates, which reorder the text around them (trojansource.codes), and the
# deprecated controls beside them; lone surrogates; tag characters, which hide text. Not joiners, direction marks and
# variation selectors: Persian, Indic scripts, Hebrew and emoji are written with them.
control_characters = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ud800-\udfff\U000e0000-\U000e007f]"
)


def escape_control_characters(text: str) -> str:
    """Escape control characters: printing a model's or a stranger's text must not send commands to the terminal."""
    return control_characters.sub(lambda found: repr(found[0])[1:-1], text)


def escape_for(stream: typing.TextIO, text: str) -> str:
    """The text as it goes to a stream: a terminal gets it without control characters, a file or a pipe exactly."""
    return escape_control_characters(text) if stream.isatty() else text


def silence(stream: typing.TextIO) -> None:
    """Redirect a stream to the null device once the reader of its pipe is gone, so that flushing it cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(): a UserError is printed to standard error in one line, with exit status 1."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # UTF-8 regardless of the platform's default encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape" if stream is sys.stdin else "replace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {escape_control_characters(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        silence(sys.stdout)
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit("error: " + ": ".join(filter(None, (error.filename, error.strerror))))  # a full disk has no name
