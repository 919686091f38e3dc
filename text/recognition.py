"""What a raw file is: its form, encoding and training stage, told by its contents.

    source = Source(Path("questions.csv.gz"))
    recognise(source)      # source.form == "csv", source.stage == "sft"

The name of a file decides nothing; where the two do not agree, the file is refused rather than guessed at.
"""

import csv
import io
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

from base.configuration import UserError
from text.formats import CHUNK, Source, json_values, open_raw, parse_object, raw_records, read_chunks
from text.records import FIELDS, WHAT_IS_TAKEN, rename_fields, stage_of_fields

N_LOOKED_AT = 100  # records, or lines, that are looked at
DELIMITERS = (",", "\t", ";")
OTHER_NAMES = {"问题": "question", "问": "question", "提问": "question", "指令": "instruction", "输入": "input"}
OTHER_NAMES |= {"答案": "answer", "回答": "answer", "答": "answer", "输出": "output", "文本": "text", "内容": "text"}
ADVICE = (
    f"taken are {WHAT_IS_TAKEN}; --fields question=NAME answer=NAME renames others, "
    "--plain_text reads it as text to pretrain on"
)


def recognise(source: Source, plain_text: bool = False) -> None:
    """Fill in a source's form, delimiter, stage and encoding by its contents; raises UserError if they do not tell.

    plain_text: it is text to train on, even if it looks like JSON or a table.
    """
    with open_raw(source) as file:
        start = file.read(CHUNK)
    if start.startswith(b"PAR1") and not plain_text:
        source.form = "parquet"
    else:
        head = next(read_chunks(source), "")
        if not plain_text:
            source.form, source.delimiter = form_of_text(source, head)
    if source.form == "text":
        source.stage = "pretrain"
        return
    seen, first = "", None
    for where, values in itertools.islice(raw_records(source), N_LOOKED_AT):
        if not isinstance(values, dict):
            seen = seen or f"{where}: {values}"
            continue
        first = first or values
        source.fields_seen |= names_in(values)
        named = rename_fields(values, source.rename)
        source.stage = source.stage or stage_of_fields(name for name, value in named.items() if value is not None)
        if source.stage and not source.rename:  # else look at more, for fields that the first ones lack
            return
    if source.stage:
        return
    if first is None:
        advice = "; a text that contains the separator needs quotes" if source.form == "csv" else ""
        raise UserError(f"{source.name}: {seen or 'no records in it'}{advice}")
    wrapped = next((name for name, value in first.items() if is_list_of_records(value)), "")
    advice = f'its field "{wrapped}" holds such records: write that list to a file' if wrapped else ADVICE
    raise UserError(
        f"{source.name}: cannot tell what its records are for: fields {', '.join(map(str, first))[:200]}; "
        + (suggested_fields(set(first)) or advice)
    )


def names_in(values: dict[str, Any]) -> set[str]:
    """The fields of a record and of its messages."""
    messages = (item for value in values.values() if isinstance(value, list) for item in value)
    return set(values).union(*(message for message in messages if isinstance(message, dict)))


def is_list_of_records(value: Any) -> bool:
    """Whether a field holds a list of records that could be trained on."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool(stage_of_fields(first))


def suggested_fields(names: set[str]) -> str:
    """The --fields for names that differ from ours by capitals or language alone; empty if they are not enough."""
    rename = {name: OTHER_NAMES.get(name.lower(), name.lower()) for name in sorted(names)}
    if not stage_of_fields(rename.values()):
        return ""
    pairs = (f"{ours}={theirs}" for theirs, ours in rename.items() if ours in FIELDS and ours != theirs)
    return f"add --fields {shlex.join(pairs)}"


def form_of_text(source: Source, head: str) -> tuple[str, str]:
    """(form, delimiter) of a text file that begins with `head`."""
    suffix = suffix_of(source)
    lines = [line for line in head.split("\n", N_LOOKED_AT)[:N_LOOKED_AT] if line.strip()]
    n_objects = sum(line.lstrip().startswith("{") and isinstance(parse_object(line), dict) for line in lines)
    is_named_lines = suffix in (".jsonl", ".ndjson")
    if n_objects and (2 * n_objects >= len(lines) or is_named_lines):
        return "json lines", ","
    if is_named_lines and len(lines) == 1 and re.match(r'\s*\{\s*"', head):  # a first line longer than the head
        return "json lines", ","
    problem = "no JSON object in its first lines"
    if is_named_lines and lines and lines[0].lstrip().startswith("{"):
        problem = f"line 1: {parse_object(lines[0])}"
    elif re.match(r'\s*(\[\s*[{\]]|\{\s*["}])', head):
        try:
            _, first = next(json_values(source, lambda n: None), ("", None))
            if isinstance(first, dict):
                return "json", ","
        except UserError as error:
            problem = str(error).removeprefix(f"{source.name}: ")
    if is_named_lines or suffix == ".json":
        raise UserError(
            f"{source.name}: named {suffix}, but {problem} (it begins {head[:40]!r}); "
            "--plain_text reads it as text to pretrain on"
        )
    delimiter = delimiter_of(source, head, suffix)
    return ("csv", delimiter) if delimiter else ("text", ",")


def delimiter_of(source: Source, head: str, suffix: str) -> str:
    """What separates the columns of a table, told by the fields that its first row names; empty for other text."""
    is_named = suffix in (".csv", ".tsv")
    found = {}
    for delimiter in DELIMITERS:
        header, *rows = first_rows(head, delimiter) or [[]]
        header = [name.strip() for name in header]
        named = rename_fields(dict.fromkeys(header, ""), source.rename)
        n_regular = sum(len(row) == len(header) for row in rows)
        is_table = is_named or (len(header) > 1 and n_regular > 0 and 2 * n_regular >= len(rows))
        if is_table and stage_of_fields(named):
            return delimiter
        found[delimiter] = header
    if is_named:
        header = max(found.values(), key=len)
        columns = ", ".join(filter(None, header))[:200]
        advice = next(filter(None, (suggested_fields(set(names)) for names in found.values())), ADVICE)
        raise UserError(f"{source.name}: cannot tell what its columns are for: {columns}; {advice}")
    return ""


def first_rows(head: str, delimiter: str) -> list[list[str]]:
    """The first rows of a table, until one that cannot be read."""
    rows = []
    try:
        for row in itertools.islice(csv.reader(io.StringIO(head), delimiter=delimiter), 20):
            rows.append(row)
    except csv.Error:
        pass
    return [row for row in rows if row]


def suffix_of(source: Source) -> str:
    """The suffix of a source's name in lower case, without that of a compression."""
    name = Path(source.member or source.path.name).name.lower()
    for compression in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(compression)
    return Path(name).suffix
