"""Configs: dataclasses whose fields document and check themselves, read from JSON, overridden on the command line.

A config class derives from Config and declares its fields with option(). From that one declaration come the checks,
the `--field value` flags and the text of `--help`. A mistake of the user is a UserError: one line that says what is
wrong, where, and what to do; main() functions run under run(), which prints it without a traceback.
"""

import argparse
import dataclasses
import difflib
import functools
import io
import json
import os
import sys
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LARGEST = 1e300  # of numbers in configs; JSON knows integers that no float can hold


class UserError(ValueError):
    """A mistake in what the user gave us; its text is meant for people and names the culprit."""


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
    """A config field: its default, its meaning in one line, the values it allows (minimum <= value, above < value).

    section: heading in --help of this field and the ones after it, until another begins.
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
    """Base of all configs: checks every field when an instance is made, then the rules between fields (check())."""

    def __post_init__(self) -> None:
        for name, field in fields_of(type(self)).items():
            setattr(self, name, field.check(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Rules between fields; raises UserError."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config class: its type, and the rules its values obey."""

    name: str
    type: Any
    default: Any
    metadata: Any

    @property
    def type_name(self) -> str:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
        parts = [t for t in typing.get_args(self.type) or (self.type,) if t is not type(None)]
        if self.is_list:
            return "a list"
        return " or ".join(names.get(t, str(t)) for t in parts) + (" or null" if self.optional else "")

    @property
    def metavar(self) -> str:
        """How --help writes the value: true|false, N, X, LIST or TEXT."""
        return {bool: "true|false", int: "N", float: "X", list: "LIST"}.get(self.plain_type, "TEXT")

    @property
    def help_text(self) -> str:
        """Meaning, allowed values and default, for argparse."""
        text = self.metadata["help"]
        if self.metadata["choices"]:
            text += f" ({', '.join(self.metadata['choices'])})"
        if self.default not in (None, "", []):
            text += f" [{self.default if isinstance(self.default, str) else json.dumps(self.default)}]"
        return text.replace("%", "%%")

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.type) is list

    @property
    def optional(self) -> bool:
        return isinstance(self.type, types.UnionType) and type(None) in typing.get_args(self.type)

    @property
    def plain_type(self) -> type:
        if self.is_list:
            return list
        return next(t for t in typing.get_args(self.type) or (self.type,) if t is not type(None))

    def fail(self, rule: str, value: Any) -> typing.NoReturn:
        raise UserError(f"{self.name} must be {rule}, got {json.dumps(value, ensure_ascii=False, default=str)}")

    def check(self, value: Any) -> Any:
        """The value, converted where nothing is lost (1e5 -> 100000 for an integer); raises UserError."""
        if value is None and self.optional:
            return None
        kind = self.plain_type
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind in (int, float) and is_number and not abs(value) < LARGEST:
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
            self.fail("a list of texts", value)
        if item_type is int and not all(type(item) is int and 0 <= item < 1 << 31 for item in value):
            self.fail("a list of integers of at least 0", value)
        if item_type == list[str]:
            for item in value:
                if not isinstance(item, list) or len(item) != 2 or not all(isinstance(path, str) for path in item):
                    self.fail("a list of [train file, validation file] pairs", value)

    def parse(self, text: str) -> Any:
        """The value that a command-line text stands for, in JSON's spelling; bare words are texts."""
        kind = self.plain_type
        if self.optional and text.lower() in ("none", "null"):
            return None
        if kind is str:
            return text
        if kind is list and not text.lstrip().startswith("["):
            if self.type == list[int]:
                text = f"[{text}]"
            else:
                return [item for item in text.split(",") if item]
        try:
            return json.loads(text.lower() if kind is bool else text)
        except json.JSONDecodeError:
            return text  # check() refuses it with the field's own message


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
    """The most similar of the names, or an empty text when none is near."""
    return next(iter(difflib.get_close_matches(str(name), list(names), n=1)), "")


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """'; did you mean "x"?' or nothing."""
    hint = nearest(name, names)
    return f'; did you mean "{hint}"?' if hint else ""


def read_json(path: str | Path) -> Any:
    """The contents of a JSON file; raises UserError with line and column where it is not valid."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise UserError(f"{path}: {json.dumps(next(n for n in names if names.count(n) > 1))} is given twice")
        return values

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=refuse_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: not usable JSON: nested too deeply") from None


def read_text(path: str | Path) -> str:
    """A small text file, always read as UTF-8 (a byte-order mark is dropped); raises UserError."""
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
    """`-t NAME`: a path to a JSON file, or the NAME of one in config/ (here, or beside the scripts)."""
    candidates = [Path(name), Path("config", f"{name}.json"), Path(__file__).parent.parent / "config" / f"{name}.json"]
    for path in candidates:
        if path.is_file():
            return path
    names = [path.stem for folder in {c.parent for c in candidates[1:]} for path in folder.glob("*.json")]
    raise UserError(f"config {name!r}: neither a file nor a name in config/{did_you_mean(name, names)}")


def check_fields(values: Any, known: dict[str, Field], where: str) -> dict[str, Any]:
    """Values from one source (a file, the command line), each checked alone; raises UserError that names the source."""
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
    """argparse with one-line errors, and a `--field value` flag for every field of the given config classes."""

    def __init__(self, doc: str, *classes: type) -> None:
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=36)
        super().__init__(description=doc, formatter_class=layout, allow_abbrev=False)
        self.known: dict[str, Field] = {}
        for cls in classes:
            group = None
            for name, field in fields_of(cls).items():
                section = field.metadata["section"]
                if section or group is None:
                    group = self.add_argument_group(section or (cls.__doc__ or cls.__name__).split("\n")[0])
                if name not in self.known:  # `dropout` is a field of both: the training config's overrides the model's
                    self.known[name] = field
                    group.add_argument(
                        f"--{name}", metavar=field.metavar, help=field.help_text, default=argparse.SUPPRESS
                    )

    def format_usage(self) -> str:
        """One line: the script's own options, and that every field is one too."""
        parts = []
        for action in (*self._positionals._group_actions, *self._optionals._group_actions):
            name = action.option_strings[0] if action.option_strings else ""
            value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
            if action.help != argparse.SUPPRESS and action.dest != "help":
                text = " ".join(filter(None, (name, value)))
                parts.append(text if action.required and name else f"[{text}]")
        return " ".join(["usage:", self.prog, *parts, *(["[--FIELD VALUE ...]"] if self.known else [])]) + "\n"

    def format_help(self) -> str:
        """The usage line, what the script does, its own options, and the fields by section."""
        self.usage = self.format_usage().removeprefix("usage: ").strip().replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"command line: {message} (--help lists the options)")

    def parse(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """The script's own arguments, and the checked config overrides by field name."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].split("=")[0]
            raise UserError(f"command line: unknown argument {unknown[0]!r}{did_you_mean(name, flags)}")
        given = {name: field.parse(getattr(args, name)) for name, field in self.known.items() if hasattr(args, name)}
        return args, check_fields(given, self.known, "command line")


def escape_control_characters(text: str) -> str:
    """The text with control characters spelled out, so that no output can take over the terminal."""
    if text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else repr(c)[1:-1] for c in text
    )


def silence(stream: typing.TextIO) -> None:
    """Send what a stream holds, and all that comes after, nowhere: whoever read it has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_main(main: Callable[[], None]) -> None:
    """Run a script: a user's mistake ends in one line on standard error and status 1, never in a traceback."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # UTF-8 whatever the platform's default
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
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")
