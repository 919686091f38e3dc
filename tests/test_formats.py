"""Data in the forms that people have it: what becomes what, what is refused, and what is said."""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import random
import re
import shlex
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_text, write_jsonl

from base.configuration import UserError
from text.corpus import split_documents
from text.formats import Source, decode_blocks, split_lines
from text.records import EmptyRecord, parse_conversation, parse_preference, rename_fields
from text.splitting import choose_validation
from text.token_files import TokenFile
from text.tokenizer_files import load_tokenizer

QUESTIONS = [
    {"question": f'What is "{i}", squared?\n(a number)', "answer": f"{i * i}; 平方, it's so"} for i in range(40)
]
TEXTS = [f"Document {i}, 第{i}篇.\n" + "one, two; three\tfour\n" * (i % 4 + 1) for i in range(40)]
PAIRS = [{"prompt": f"Is {i} even?", "chosen": "yes" if i % 2 == 0 else "no", "rejected": "maybe"} for i in range(40)]


def as_csv(rows: list[dict], separator: str = ",") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_jsonl(rows: list[dict], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def as_parquet(rows: list[dict]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def as_zip(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return file.getvalue()


def as_zstandard(contents: bytes) -> bytes:
    zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(contents[:100]) + zstd.compress(contents[100:])  # two frames, as pzstd writes them


def renamed(rows: list[dict], *names: str) -> list[dict]:
    return [dict(zip(names, row.values(), strict=True)) for row in rows]


def messages(row: dict, role: str = "role", content: str = "content", names: tuple = ("user", "assistant")) -> list:
    return [{role: name, content: text} for name, text in zip(names, row.values(), strict=True)]


def parts(text: str) -> list[dict]:
    return [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]


SHAREGPT = [{"conversations": messages(row, "from", "value", ("human", "gpt"))} for row in QUESTIONS]
ALPACA = [
    {"instruction": row["question"].split("\n")[0], "input": row["question"].split("\n")[1], "output": row["answer"]}
    for row in QUESTIONS
]
CHATS = [{"messages": messages(row)} for row in QUESTIONS]
IN_PARTS = [{"messages": [{**m, "content": parts(m["content"])} for m in chat["messages"]]} for chat in CHATS]
# file name: (contents, further arguments), each of which must give the tokens of QUESTIONS
QUESTION_FORMS = {
    "sft.jsonl": (lambda: as_jsonl(QUESTIONS), []),
    "windows.jsonl": (lambda: b"\xef\xbb\xbf" + as_jsonl(QUESTIONS, "\r\n"), []),
    "sft.json": (lambda: json.dumps(QUESTIONS).encode(), []),
    "pretty.JSON": (lambda: json.dumps(QUESTIONS, indent=2, ensure_ascii=False).encode(), []),
    "objects.json": (lambda: "\n".join(json.dumps(row, indent=4) for row in QUESTIONS).encode(), []),
    "QA.JSONL": (lambda: as_jsonl(QUESTIONS), []),
    "sft.txt": (lambda: as_jsonl(QUESTIONS), []),
    "noname": (lambda: as_csv(QUESTIONS), []),
    "qa.csv": (lambda: as_csv(QUESTIONS), []),
    "qa.CSV": (lambda: as_csv(QUESTIONS, ";"), []),
    "qa.tsv": (lambda: as_csv(QUESTIONS, "\t"), []),
    "qa.parquet": (lambda: as_parquet(QUESTIONS), []),
    "messages.parquet": (lambda: as_parquet(CHATS), []),
    "completion.jsonl": (lambda: as_jsonl(renamed(QUESTIONS, "prompt", "completion")), []),
    "alpaca.json": (lambda: json.dumps(ALPACA).encode(), []),
    "messages.jsonl": (lambda: as_jsonl(CHATS), []),
    "parts.jsonl": (lambda: as_jsonl(IN_PARTS), []),
    "sharegpt.json": (lambda: json.dumps(SHAREGPT, indent=1).encode(), []),
    "trl.jsonl": (
        lambda: as_jsonl([{"prompt": c["messages"][:1], "completion": c["messages"][1:]} for c in CHATS]),
        [],
    ),
    "other.csv": (
        lambda: as_csv(renamed(QUESTIONS, "Q", "The answer")),
        ["--fields", "question=Q", "answer=The answer"],
    ),
    "speakers.jsonl": (
        lambda: as_jsonl([{"dialog": messages(row, "who", "says")} for row in QUESTIONS]),
        ["--fields", "messages=dialog", "role=who", "content=says"],
    ),
    "nulls.jsonl": (lambda: as_jsonl([{**row, "chosen": None, "rejected": None} for row in QUESTIONS]), []),
    "gbk.jsonl": (lambda: as_jsonl(QUESTIONS).decode().encode("gbk"), ["--encoding", "gbk"]),
    "gbk.csv": (lambda: as_csv(QUESTIONS).decode().encode("gbk"), ["--encoding", "GBK"]),
    "utf16.json": (lambda: json.dumps(QUESTIONS, ensure_ascii=False).encode("utf-16"), ["--encoding", "utf-16"]),
    "utf8_all_the_same.jsonl": (lambda: as_jsonl(QUESTIONS), ["--encoding", "gbk"]),
    "sft.jsonl.gz": (lambda: gzip.compress(as_jsonl(QUESTIONS)), []),
    "SFT.CSV.GZ": (lambda: gzip.compress(as_csv(QUESTIONS)), []),
    "sft.json.bz2": (lambda: bz2.compress(json.dumps(QUESTIONS).encode()), []),
    "sft.tsv.xz": (lambda: lzma.compress(as_csv(QUESTIONS, "\t")), []),
    "twice.gz": (lambda: gzip.compress(gzip.compress(as_jsonl(QUESTIONS))), []),
    "sft.jsonl.zst": (lambda: as_zstandard(as_jsonl(QUESTIONS)), []),
    "sft.zip": (lambda: as_zip({"a/b.jsonl": as_jsonl(QUESTIONS)}), []),
    "parquet.zip": (lambda: as_zip({"b.parquet": as_parquet(QUESTIONS)}), []),
    "gz.zip": (lambda: as_zip({"b.jsonl.gz": gzip.compress(as_jsonl(QUESTIONS))}), []),
    "halves.zip": (lambda: as_zip({"1.jsonl": as_jsonl(QUESTIONS[:9]), "2.csv": as_csv(QUESTIONS[9:])}), []),
}
DELIMITED = "".join(f"<|bos|>{text}<|eos|>\n" for text in TEXTS)
TEXT_FORMS = {
    "pretrain.jsonl": (lambda: as_jsonl([{"text": text} for text in TEXTS]), []),
    "pretrain.json": (lambda: json.dumps([{"text": text} for text in TEXTS], indent=2).encode(), []),
    "pretrain.csv": (lambda: as_csv([{"text": text, "id": i} for i, text in enumerate(TEXTS)]), []),
    "pretrain.parquet": (lambda: as_parquet([{"text": text} for text in TEXTS]), []),
    "other.csv": (lambda: as_csv([{"body": text} for text in TEXTS]), ["--fields", "text=body"]),
    "delimited.txt": (lambda: DELIMITED.encode(), []),
    "ends.md": (lambda: "".join(f"{text}<|eos|>\n" for text in TEXTS).encode(), []),
    "stories.txt": (lambda: "".join(f"{text}<|endoftext|>\n" for text in TEXTS).encode(), []),
    "files.zip": (lambda: as_zip({f"{i:03}.TXT": text.encode() for i, text in enumerate(TEXTS)}), []),
    "files.zip ": (lambda: as_zip({f"{i:03}.xz": lzma.compress(t.encode()) for i, t in enumerate(TEXTS)}), []),
    "delimited.txt.gz": (lambda: gzip.compress(DELIMITED.encode()), []),
    "latin.zip": (
        lambda: as_zip({f"{i:03}.txt": text.encode("gb18030") for i, text in enumerate(TEXTS)}),
        ["--encoding", "gb18030"],
    ),
}


def tokens_of(folder: Path, stage: str) -> list[np.ndarray]:
    arrays = []
    for split in ("train", "val"):
        file = TokenFile(folder / f"{stage}_{split}.bin")
        arrays += [file.tokens, *([file.loss_mask, file.starts] if file.starts is not None else [])]
    return arrays


def same_as_reference(call, stage: str, name: str, contents: bytes, options: list[str], reference: bytes) -> None:
    Path("reference.jsonl").write_bytes(reference)
    Path(name).write_bytes(contents)
    assert call("data.py", "reference.jsonl", "--output", "theirs", "--block_size", "32").status == 0
    result = call("data.py", name, "--output", "ours", "--block_size", "32", *options)
    assert result.status == 0, result.err
    assert "skipped" not in result.err and "left out:" not in result.err
    for ours, theirs in zip(tokens_of(Path("ours"), stage), tokens_of(Path("theirs"), stage), strict=True):
        assert np.array_equal(ours, theirs)
    assert Path("ours/tokenizer.json").read_bytes() == Path("theirs/tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", QUESTION_FORMS)
def test_questions_in_any_form_give_the_same_tokens(call, work, name):
    contents, options = QUESTION_FORMS[name]
    same_as_reference(call, "sft", name, contents(), options, as_jsonl(QUESTIONS))
    file = TokenFile("ours/sft_train.bin")
    text = load_tokenizer("ours/tokenizer.json").decode(file.tokens[: file.starts[1]])
    question = text.removeprefix("<|InstructMark|>").split("<|ResponseMark|>")[0]
    assert question in [row["question"] for row in QUESTIONS]  # the tables' line breaks, too


@pytest.mark.parametrize("name", TEXT_FORMS)
def test_documents_in_any_form_give_the_same_tokens(call, work, name):
    contents, options = TEXT_FORMS[name]
    same_as_reference(call, "pretrain", name, contents(), options, as_jsonl([{"text": text} for text in TEXTS]))


@pytest.mark.parametrize("form", ["texts", "lists", "whole", "messages", "instruction", "csv"])
def test_preferences_in_any_form_give_the_same_tokens(call, work, form):
    def turn(role, text):
        return [{"role": role, "content": text}]

    rows = {
        "texts": PAIRS,
        "lists": [{n: turn("user" if n == "prompt" else "assistant", t) for n, t in row.items()} for row in PAIRS],
        "whole": [
            {n: turn("user", row["prompt"]) + turn("assistant", row[n]) for n in ("chosen", "rejected")}
            for row in PAIRS
        ],
        "messages": [
            {"messages": turn("user", row["prompt"]), "chosen": row["chosen"], "rejected": row["rejected"]}
            for row in PAIRS
        ],
        "instruction": renamed(PAIRS, "instruction", "chosen", "rejected"),
    }
    contents = as_csv(PAIRS) if form == "csv" else as_jsonl(rows[form])
    same_as_reference(call, "dpo", f"p.{'csv' if form == 'csv' else 'jsonl'}", contents, [], as_jsonl(PAIRS))


def test_one_text_gives_the_same_tokens_in_any_form(call, work):
    text = make_text(5000)
    same_as_reference(call, "pretrain", "a.txt", text.encode(), [], as_jsonl([{"text": text}]))
    result = call("data.py", "a.txt", "--block_size", "32")
    assert "for validation: the last 10% of the text" in result.out
    ids = [TokenFile(f"dataset/pretrain_{split}.bin").tokens for split in ("train", "val")]
    decoded = load_tokenizer("dataset/tokenizer.json").decode(np.concatenate(ids))
    assert decoded == text and len(ids[0]) == int(5000 * 0.9)


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = {"function": {"name": "add", "arguments": '{"a": 1}'}}
CONVERSATIONS = {
    "numbers are text": ({"question": 7, "answer": 2.5}, [user("7"), answer("2.5")]),
    "true is text": ({"question": "a", "answer": True}, [user("a"), answer("true")]),
    "line ends": ({"question": "a\r\nb", "answer": "\ufeffc\rd"}, [user("a\nb"), answer("c\nd")]),
    "system beside a question": (
        {"system": "s", "question": "a", "answer": "b"},
        [system("s"), user("a"), answer("b")],
    ),
    "history": (
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
        [user("a"), answer("b"), user("c"), answer("d")],
    ),
    "developer is system": (
        {"messages": [{"role": "developer", "content": "s"}, user("a"), answer("b")]},
        [system("s"), user("a"), answer("b")],
    ),
    "tool is user": (
        {
            "messages": [
                user("a"),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                answer("b"),
            ]
        },
        [
            user("a"),
            answer('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'),
            user("<tool_response>\n1\n</tool_response>"),
            answer("b"),
        ],
    ),
    "an assistant that begins": (
        {"messages": [answer("hello"), user("a"), answer("b")]},
        [user(""), answer("hello"), user("a"), answer("b")],
    ),
    "two users in a row": ({"messages": [user("a"), user("b"), answer("c")]}, [user("a\nb"), answer("c")]),
    "two answers in a row": ({"messages": [user("a"), answer("b"), answer("c")]}, [user("a"), answer("b\nc")]),
    "an empty system": ({"messages": [system(""), user("a"), answer("b")]}, [user("a"), answer("b")]),
    "system after its question": (
        {"messages": [user("a"), system("s"), answer("b")]},
        [system("s"), user("a"), answer("b")],
    ),
    "a question without an answer": (
        {"messages": [user("a"), answer("b"), user("c")]},
        [user("a"), answer("b")],
    ),
    "weight": (
        {"messages": [user("a"), answer("b", weight=0), user("c"), answer("d", weight=1)]},
        [user("a"), answer("b", weight=0), user("c"), answer("d")],
    ),
    "answers in a prompt are not in the loss": (
        {"prompt": [user("a"), answer("b"), user("c")], "completion": [answer("d")]},
        [user("a"), answer("b", weight=0), user("c"), answer("d")],
    ),
    "roles in capitals": (
        {"messages": [{"role": "User", "content": "a"}, {"role": "ASSISTANT", "content": "b"}]},
        [user("a"), answer("b")],
    ),
    "lone surrogates": ({"question": "a\ud800", "answer": "b"}, [user("a?"), answer("b")]),
    "no question: empty": ({"question": " ", "answer": "b"}, EmptyRecord),
    "null answer: empty": ({"question": "a", "answer": None}, EmptyRecord),
    "empty message": ({"messages": [user("a"), answer("")]}, EmptyRecord),
    "no answer": ({"messages": [user("a")]}, "no answer"),
    "no answer at all": ({"question": "a"}, '"answer" is missing'),
    "picture": (
        {"messages": [user([{"type": "image_url", "image_url": {}}]), answer("b")]},
        "a part that is not text (image_url)",
    ),
    "unknown role": ({"messages": [{"role": "narrator", "content": "a"}]}, "role must be one of"),
    "all weights 0": ({"messages": [user("a"), answer("b", weight=0)]}, "nothing to learn"),
    "half a weight": ({"messages": [user("a"), answer("b", weight=0.5)]}, "weight must be 0"),
    "an object": ({"question": {"a": 1}, "answer": "b"}, '"question" is not text, but an object'),
    "two prompts": ({"question": "a", "prompt": "b", "answer": "c"}, "question=question, or --fields prompt=prompt"),
    "a prompt that repeats the messages": (
        {"prompt": "a", "messages": [user("a"), answer("b")]},
        [user("a"), answer("b")],
    ),
    "input of another prompt": (
        {"question": "a", "input": "more", "answer": "b"},
        [user("a\nmore"), answer("b")],
    ),
    "an empty question at the end": ({"messages": [user("a"), answer("b"), user("")]}, [user("a"), answer("b")]),
    "a call in OpenAI's first form": (
        {"messages": [user("a"), {"role": "assistant", "content": None, "function_call": CALL["function"]}]},
        [user("a"), answer('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')],
    ),
    "several answers": ({"question": "when", "answer": ["14 May", "May"]}, '"answer" is a list of 2 texts'),
    "one of a list": ({"question": "when", "answer": ["14 May"]}, [user("when"), answer("14 May")]),
    "calls that are none": ({"messages": [user("a"), answer("b", tool_calls=1)]}, "must be a list"),
    "not finite": ({"question": "a", "answer": math.nan}, "not text"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_becomes_of_a_conversation(name):
    record, expected = CONVERSATIONS[name]
    if isinstance(expected, list):
        assert parse_conversation(record) == expected
        return
    error = expected if isinstance(expected, type) else UserError
    with pytest.raises(error) as caught:
        parse_conversation(record)
    assert isinstance(expected, type) or (expected in str(caught.value) and type(caught.value) is UserError)


def test_the_advice_on_two_prompts_works():
    record = {"question": "a", "prompt": "b", "answer": "c"}
    assert parse_conversation(rename_fields(record, {"question": "question"})) == [user("a"), answer("c")]
    assert parse_conversation(rename_fields(record, {"prompt": "prompt"})) == [user("b"), answer("c")]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        ({"prompt": "a", "chosen": "b"}, '"rejected" is missing'),
        ({"chosen": "b", "rejected": "c"}, "is missing"),
        ({"messages": [user("a"), answer("b")], "chosen": "c", "rejected": "d"}, "must end with a question"),
        ({"chosen": [user("a"), answer("b")], "rejected": [user("z"), answer("c")]}, "differ before"),
    ],
)
def test_preferences_that_are_refused(record, words):
    with pytest.raises(UserError, match=words):
        parse_preference(record)


def test_only_the_last_answers_of_preferences_are_in_the_loss(call, work):
    history = [user("one"), answer("two"), user("three")]
    rows = [{"prompt": [*history[:2], user(f"q{i}")], "chosen": "yes", "rejected": "no"} for i in range(20)]
    write_jsonl(work / "p.jsonl", rows)
    assert call("data.py", "p.jsonl", "--block_size", "64").status == 0
    tokenizer, file = load_tokenizer("dataset/tokenizer.json"), TokenFile("dataset/dpo_train.bin")
    for start, end in zip(file.starts, file.starts[1:], strict=False):
        targets = file.tokens[start:end][file.loss_mask[start:end] == 1]
        assert tokenizer.decode(targets) in ("yes<|eos|>", "no<|eos|>")


def test_an_answer_of_weight_0_is_not_in_the_loss(call, work):
    rows = [{"messages": [user(f"q{i}"), answer("no", weight=0), user("again"), answer("yes")]} for i in range(20)]
    write_jsonl(work / "s.jsonl", rows)
    assert call("data.py", "s.jsonl", "--block_size", "64").status == 0
    tokenizer, file = load_tokenizer("dataset/tokenizer.json"), TokenFile("dataset/sft_train.bin")
    start, end = file.starts[:2]
    assert tokenizer.decode(file.tokens[start:end][file.loss_mask[start:end] == 1]) == "yes<|eos|>"
    assert file.header["n_characters"] == 3 * (len(file.starts) - 1)


def two_of_one_name() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, pytest.warns(UserWarning):
        archive.writestr("a.txt", "one " * 100)
        archive.writestr("a.txt", "two " * 100)
    return file.getvalue()


TWO_OF_ONE_NAME = two_of_one_name()
REFUSED = {
    "sft.json": (b"question: what is it?\nanswer: this\n", ["named .json", "no JSON object"]),
    "QA.JSONL": (b"not json\n" * 5, ["named .jsonl", "not json"]),
    "strings.json": (b'["a", "b"]', ["named .json"]),
    "cut.json": (json.dumps(QUESTIONS).encode()[:-700], ["cut.json: line 1: ", "not valid JSON"]),
    "open.json": (json.dumps(QUESTIONS).encode()[:-1], ["the file ends inside its JSON array"]),
    "QA.JSONL.GZ": (gzip.compress(b"not json\n" * 5), ["named .jsonl", "not json"]),
    "later.json": (b'[{"question": "a",\n "answer": "b"},\n {"question":\n oops}]', ["line 4: not valid JSON"]),
    "bad.json": (b'[{"question": "a", "answer": "b"},\n {"question": oops}]', ["line 2: not valid JSON"]),
    "logs.jsonl": (b'{"level": 1, "time": 2}\n' * 9, ["fields level, time", '"question" and "answer"', "--fields"]),
    "nested.json": (b'{"data": [{"question": "a", "answer": "b"}]}', ["fields data", '"data" holds such records']),
    "unclosed.jsonl": (b'{"question": "a", "answer": "b"\n' * 3, ["line 1: column 32: not valid JSON"]),
    "qa.csv": (b"name,age\nA,3\nB,4\n", ["columns", "name, age", "--fields question=NAME"]),
    "capitals.csv": (b"Question,Answer,Notes\na,b,c\n", ["add --fields answer=Answer question=Question"]),
    "commas.csv": (b"question,answer\na, b,c\nd, e,f\n", ["line 2: 3 columns, the first row has 2", "needs quotes"]),
    "中文.json": ('[{"问题": "a", "答案": "b"}]'.encode(), ["question=问题", "answer=答案"]),
    "quote.csv": (b'question,answer\na,"b\n', ["not valid CSV", "line"]),
    "twice.csv": (b"question,answer,answer\na,b,c\n", ["two columns are named 'answer'"]),
    "deep.jsonl": (b"[" * 100_000, ["deep.jsonl"]),
    "deeper.json": (b'{"a":' * 100_000, ["deeper.json", "JSON"]),
    "a.txt": ("今天天气很好，我们一起去公园散步吧。".encode("gbk") * 9, ["not UTF-8", "--encoding gb18030"]),
    "b.txt": ("Привет, как дела? Сегодня хорошая погода.".encode("cp1251"), ["--encoding cp1251"]),
    "c.txt": ("今日はとても良い天気ですね。公園に行きましょう。".encode("cp932"), ["--encoding cp932"]),
    "d.txt": ("caf\xe9 au lait, s'il vous pla\xeet, d\xe9j\xe0".encode("latin-1"), ["--encoding cp1252"]),
    "e.txt": ("hello there".encode("utf-16"), ["--encoding utf-16"]),
    "f.txt": ("hello there, my friends".encode("utf-16-le"), ["--encoding utf-16-le"]),
    "g.txt": ("你好".encode() * 50 + b"\xff" + "你好".encode(), ["byte 0xff at 300", "damaged there"]),
    "utf32.txt": ("hello there".encode("utf-32"), ["--encoding utf-32"]),
    "xiao.txt": ("小明说：今天天气很好，我们一起去公园散步。他说：好啊！".encode("gbk") * 3, ["--encoding gb18030"]),
    "q.rtf": (b"{\\rtf1\\ansi hello}", ["an RTF document"]),
    "twice.zip": (TWO_OF_ONE_NAME, ["the same name, a.txt"]),
    "h.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ["a PDF"]),
    "i.docx": (as_zip({"[Content_Types].xml": b"<x/>", "word/document.xml": b"<x/>"}), ["office document"]),
    "j.gz": (gzip.compress(b"a" * 1000)[:-9], ["damaged"]),
    "k.xz": (lzma.compress(b"ab" * 1000)[:-9], ["damaged"]),
    "l.bz2": (b"BZh91AY&SYnonsense", ["damaged"]),
    "m.zip": (b"PK\x03\x04nonsense", ["zip"]),
    "n.parquet": (b"PAR1nonsensePAR1", ["Parquet"]),
    "o.zip": (as_zip({}), ["o.zip"]),
    "p.jsonl": (b'{"text": ""}\n{"text": null}\n', ["no training text", "2 empty"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_with_what_was_seen(call, work, name):
    contents, words = REFUSED[name]
    Path(name).write_bytes(contents)
    result = call("data.py", name)
    assert result.status == 1 and "Traceback" not in result.err
    for word in words:
        assert word in result.err.strip().splitlines()[-1], result.err
    assert not Path("dataset").exists()


@pytest.mark.parametrize(("name", "encoding"), [("a.txt", "gb18030"), ("b.txt", "cp1251"), ("d.txt", "cp1252")])
def test_the_encoding_that_is_named_works(call, work, name, encoding):
    contents = REFUSED[name][0] * 20
    Path(name).write_bytes(contents)
    assert call("data.py", name, "--encoding", encoding, "--block_size", "16").status == 0
    ids = np.concatenate([TokenFile(f"dataset/pretrain_{split}.bin").tokens for split in ("train", "val")])
    assert load_tokenizer("dataset/tokenizer.json").decode(ids) == contents.decode(encoding)


def test_a_folder_of_many_files_is_taken_whole_or_its_files_are_named(call, work):
    folder = work / "many"
    (folder / "sub" / ".git").mkdir(parents=True)
    texts = [f"file {i} says {'ab' * (i % 5)}\n" for i in range(1200)]
    for i, text in enumerate(texts):
        (folder / ("sub" if i % 3 == 0 else "") / f"{i}.{('txt', 'TXT', 'md', 'log')[i % 4]}").write_text(text)
    (folder / ".DS_Store").write_bytes(b"\0\1")
    (folder / "sub" / ".git" / "config").write_text("hidden text")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\0\0")
    (folder / "empty.txt").write_text("")
    (folder / "held_out.jsonl").write_bytes(as_jsonl(QUESTIONS))
    (folder / "info.json").write_text('{"name": "a data set"}')
    (folder / "letter.docx").write_bytes(REFUSED["i.docx"][0])
    (folder / "broken.zip").write_bytes(b"PK\x03\x04nonsense")
    (folder / "sub" / ".git" / "old.zip").write_bytes(as_zip({"old.txt": b"old text"}))
    (folder / "link").symlink_to("sub", target_is_directory=True)
    result = call("data.py", "many", "--block_size", "16")
    assert result.status == 0, result.err
    found = []
    for split in ("train", "val"):
        file = TokenFile(f"dataset/pretrain_{split}.bin")
        assert len(file.header["sources"]) == 1200
        found += load_tokenizer("dataset/tokenizer.json").decode(file.tokens).split("<|bos|>")[1:]
    assert sorted(found) == sorted(f"{text}<|eos|>" for text in texts)
    assert ".DS_Store: hidden" in result.err and "empty.txt: the file is empty" in result.err
    (folder / "empty.txt").unlink()
    (folder / ".DS_Store").unlink()
    result = call("data.py", "many", "--block_size", "16", "--tokenizer", "char")
    for name in ("held_out.jsonl: not for training", "info.json: cannot tell", "letter.docx: an office document"):
        assert name in result.err
    for name in (
        "broken.zip: an office document, an e-book or a damaged",
        "old.txt: hidden",
        "link: not a regular file",
    ):
        assert name in result.err
    assert call("data.py", "--inspect", "dataset/pretrain_train.bin").out.count("\n") < 60


def test_a_folder_that_is_hidden_itself_is_read(call, work):
    (work / ".corpus").mkdir()
    (work / ".corpus" / "a.txt").write_text(make_text(2000), encoding="utf-8")
    assert call("data.py", ".corpus", "--block_size", "16").status == 0


def test_plain_text_reads_json_as_text(call, work):
    contents = json.dumps([{"name": f"package {i}"} for i in range(50)], indent=1)
    (work / "a.json").write_text(contents)
    assert call("data.py", "a.json", "--block_size", "16").status == 1
    assert call("data.py", "a.json", "--block_size", "16", "--plain_text").status == 0
    ids = np.concatenate([TokenFile(f"dataset/pretrain_{split}.bin").tokens for split in ("train", "val")])
    assert load_tokenizer("dataset/tokenizer.json").decode(ids) == contents


@pytest.mark.parametrize("name", ["s.jsonl", "s.csv"])
def test_empty_rows_are_counted_and_left_out(call, work, name):
    rows = [*QUESTIONS, {"question": "", "answer": "a"}, {"question": "b", "answer": " "}]
    (work / name).write_bytes(as_csv(rows) if name == "s.csv" else as_jsonl(rows))
    result = call("data.py", name, "--block_size", "64", "--max_bad_lines", "0")
    assert result.status == 0 and "2 empty left out" in result.out
    n = sum(len(TokenFile(f"dataset/sft_{split}.bin").starts) - 1 for split in ("train", "val"))
    assert n == len(QUESTIONS)


def test_what_a_window_would_hold_is_said(call, work):
    rng = random.Random(0)
    rows = [{"question": f"{i}", "answer": "x" * rng.choice([5, 20, 70, 150, 400])} for i in range(300)]
    write_jsonl(work / "s.jsonl", rows)
    lengths = [len(row["question"]) + len(row["answer"]) + 3 for row in rows]  # with three special tokens
    longer = sum(length > 129 for length in lengths)
    window = next(2**k for k in range(8, 20) if sum(length <= 2**k + 1 for length in lengths) >= 0.98 * 300)
    share = math.floor(100 * sum(length <= window + 1 for length in lengths) / 300)
    result = call("data.py", "s.jsonl", "--block_size", "128")
    assert f"{longer} of 300 samples are longer than block_size 128" in result.out
    assert f"; {window} holds {share}%" in result.out
    result = call("data.py", "s.jsonl", "--block_size", str(window))
    assert result.status == 0 and ("longer than" not in result.out) == (share == 100)


@pytest.mark.parametrize(
    ("n", "block_size", "says"), [(17, 16, None), (18, 16, "; 32 holds 100%"), (33, 16, "; 32 holds 100%")]
)
def test_a_sample_fits_up_to_block_size_plus_1(call, work, n, block_size, says):
    """The last token is a target only."""
    rows = [{"question": f"{i:02}", "answer": "x" * (n - 5)} for i in range(20)]  # with three special tokens
    write_jsonl(work / "s.jsonl", rows)
    out = call("data.py", "s.jsonl", "--block_size", str(block_size)).out
    assert (says or "in the loss") in out and ("longer than" in out) == (says is not None)


# ------------------------------------------------------------------------------------------------------ tokenizers


def test_the_tokenizer_before_is_kept_each_time(call, work):
    before = None
    for letters in ("abc", "abd", "abe"):
        (work / "x.txt").write_text(f"{letters} " * 50)
        assert call("data.py", "x.txt", "--block_size", "8").status == 0
        if before is not None:
            assert Path("dataset/tokenizer.json.bak").read_bytes() == before
        before = Path("dataset/tokenizer.json").read_bytes()


def test_later_stages_keep_the_tokenizer_that_there_is(call, prepared):
    before = Path("dataset/tokenizer.json").read_bytes()
    write_jsonl(prepared / "new.jsonl", [{"question": f"Ω {i}?", "answer": "a"} for i in range(20)])
    result = call("data.py", "new.jsonl", "--block_size", "16")
    assert result.status == 0 and "Ω" in result.err and "<|unknown|>" in result.out
    assert Path("dataset/tokenizer.json").read_bytes() == before
    assert "it is kept" in result.out and "warning: " in result.out
    result = call("data.py", "new.jsonl", "--tokenizer", "char", "--block_size", "16")
    assert result.status == 0 and "tokenizer.json.bak" in result.out
    assert Path("dataset/tokenizer.json.bak").read_bytes() == before
    assert load_tokenizer("dataset/tokenizer.json").unknown_characters("Ω") == ""
    assert "dataset/pretrain_train.bin is of another vocabulary" in result.out
    command = shlex.split(result.out.split("python ")[1].splitlines()[0])
    assert call(*command).status == 0
    tokenizer = load_tokenizer("dataset/tokenizer.json")
    assert tokenizer.unknown_characters("Ω") == tokenizer.unknown_characters(make_text()) == ""
    assert not any(TokenFile(path).header["n_unknown"] for path in Path("dataset").glob("*.bin"))
    assert len({TokenFile(path).header["tokenizer"] for path in Path("dataset").glob("*.bin")}) == 1


def test_a_tokenizer_is_taken_out_of_a_checkpoint(call, prepared):
    tiny = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "16", "--batch_size", "2"]
    assert call("train.py", "-t", "pretrain", *tiny, "--max_steps", "1", "--warmup_iters", "1").status == 0
    stored = Path("dataset/tokenizer.json").read_bytes()
    Path("dataset/tokenizer.json").unlink()
    command = ["data.py", "dataset/sft.jsonl", "--tokenizer", "checkpoint/pretrain.pt", "--block_size", "16"]
    assert call(*command).status == 0
    assert Path("dataset/tokenizer.json").read_bytes() == stored
    tune = ["--from_checkpoint", "checkpoint/pretrain.pt", "--max_steps", "1", "--batch_size", "2"]
    assert call("train.py", "-t", "sft", *tune).status == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokenizer", "BPE"], ["char, bpe", 'did you mean "bpe"']),
        (["--tokenizer", "bep"], ['did you mean "bpe"']),
        (["--tokenizer", "gpt2"], ["no such file", "char, bpe, a tokenizer file or a checkpoint"]),
        (["--vocab_size", "300"], ["--vocab_size is for --tokenizer bpe"]),
        (["--tokenizer", "char", "--vocab_size", "300"], ["--vocab_size is for --tokenizer bpe"]),
        (["--encoding", "gbkk"], ["no such encoding"]),
        (["--encoding", "rot13"], ["no such encoding"]),
        (["--fields", "question"], ["OURS=NAME"]),
        (["--fields", "query=Q"], ["OURS=NAME", "question"]),
        (["--fields", "question=Q"], ["plain text, which has no fields"]),
        (["--split_by", "answer"], ["for fine-tuning data"]),
        (["--encoding", "punycode"], ["no such encoding"]),
        (["--split_documents", "5000000"], ["at most 4194304"]),
        (["--split_by", "line"], ["split_by"]),
    ],
)
def test_options_that_mean_nothing_are_refused(call, work, options, words):
    (work / "x.txt").write_text(make_text(), encoding="utf-8")
    result = call("data.py", "x.txt", *options)
    assert result.status == 1 and "Traceback" not in result.err
    for word in words:
        assert word in result.err
    assert not Path("dataset").exists()


# ------------------------------------------------------------------------------------------------------ the split


def sides(stage: str) -> list[list[str]]:
    """The samples of both sides as text."""
    tokenizer, result = load_tokenizer("dataset/tokenizer.json"), []
    for split in ("train", "val"):
        file = TokenFile(f"dataset/{stage}_{split}.bin")
        ranges = zip(file.starts, file.starts[1:], strict=False)
        result.append([tokenizer.decode(file.tokens[a:b]) for a, b in ranges])
    return result


def test_the_pairs_of_a_prompt_stay_on_one_side(call, work):
    rows = [{"prompt": f"q{i // 5}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(100)]
    write_jsonl(work / "p.jsonl", rows)
    assert call("data.py", "p.jsonl", "--block_size", "64").status == 0
    train, val = ({text.split("<|ResponseMark|>")[0] for text in side} for side in sides("dpo"))
    assert train and val and not train & val


@pytest.mark.parametrize("by", ["question", "answer"])
def test_questions_or_answers_can_be_kept_apart(call, work, by):
    rows = [{"question": f"q{i % 20} ?", "answer": f"answer {i % 13}"} for i in range(200)]
    write_jsonl(work / "s.jsonl", rows)
    result = call("data.py", "s.jsonl", "--block_size", "64")
    train, val = ([text.removesuffix("<|eos|>").split("<|ResponseMark|>")[1] for text in side] for side in sides("sft"))
    n_known = sum(text in set(train) for text in val)
    assert f"{n_known} of {len(val)} validation answers are also answers in training" in result.out
    assert call("data.py", "s.jsonl", "--block_size", "64", "--split_by", by).status == 0
    part = 1 if by == "answer" else 0
    train, val = ({text.removesuffix("<|eos|>").split("<|ResponseMark|>")[part] for text in s} for s in sides("sft"))
    assert train and val and not train & val


def test_pieces_of_a_document_stay_on_one_side(call, work):
    texts = ["".join(f"Document {i} sentence {j}. " for j in range(20)) for i in range(30)]
    write_jsonl(work / "d.jsonl", [{"text": text} for text in texts])
    assert call("data.py", "d.jsonl", "--split_documents", "100", "--block_size", "32").status == 0
    tokenizer = load_tokenizer("dataset/tokenizer.json")
    found = [tokenizer.decode(TokenFile(f"dataset/pretrain_{split}.bin").tokens) for split in ("train", "val")]
    train, val = ({i for i in range(30) if f"Document {i} " in text} for text in found)
    assert train | val == set(range(30)) and val and not train & val


def test_equal_texts_in_two_files_are_taken_once(call, work):
    text = make_text(4000)
    (work / "a.txt").write_text(text, encoding="utf-8")
    (work / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    result = call("data.py", "a.txt", "b.txt.gz", "a.txt", "--block_size", "16")
    assert "2 exact duplicates removed" in result.out
    ids = np.concatenate([TokenFile(f"dataset/pretrain_{split}.bin").tokens for split in ("train", "val")])
    assert load_tokenizer("dataset/tokenizer.json").decode(ids) == text


def test_special_tokens_are_not_characters(call, work):
    write_jsonl(work / "d.jsonl", [{"text": f"ab{i:02}"} for i in range(50)])
    assert call("data.py", "d.jsonl", "--block_size", "16").status == 0
    assert sum(TokenFile(f"dataset/pretrain_{s}.bin").header["n_characters"] for s in ("train", "val")) == 4 * 50


def test_a_stage_that_fails_leaves_nothing_of_the_others(call, work):
    (work / "a.txt").write_text(make_text(), encoding="utf-8")
    write_jsonl(work / "s.jsonl", QUESTIONS[:1])
    assert call("data.py", "a.txt", "s.jsonl", "--block_size", "16").status == 1
    assert not list(work.glob("dataset/*"))


def test_a_file_that_changes_between_the_passes_is_noticed(call, work, monkeypatch):
    import data

    write_jsonl(work / "s.jsonl", QUESTIONS)
    choose = data.choose_tokenizer

    def change_and_choose(*args):
        write_jsonl(work / "s.jsonl", QUESTIONS[::-1])
        return choose(*args)

    monkeypatch.setattr(data, "choose_tokenizer", change_and_choose)
    result = call("data.py", "s.jsonl", "--block_size", "64")
    assert result.status == 1 and "s.jsonl: the file changed while it was read" in result.err
    assert not list(work.glob("dataset/*"))


def test_documents_are_cut_at_delimiters_however_they_are_read(monkeypatch):
    from text import corpus

    monkeypatch.setattr(corpus, "CHUNK", 40)
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 60)
    rng = random.Random(3)
    words = ["word ", "<|unknown|>", "<|InstructMark|>", "<", "<|", "|>", "\n", "x" * 30, "业"]
    for _ in range(300):
        made = ["".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 5))]
        made = ["d" + text.replace("<|<|", "").strip("<|>\n") + "e" for text in made]
        text = "".join(f"<|bos|>{part}<|eos|>\n" for part in made)
        cuts = sorted(rng.randrange(len(text)) for _ in range(rng.randint(0, 20)))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found, current = [], ""
        for piece, begins, ends in split_documents(chunks):
            assert begins == (current == "")
            assert corpus.may_contain_special(piece) or not piece.endswith(("<|Instruct", "<|unk"))
            current += piece
            if ends:
                found.append(current)
                current = ""
        assert found == made


def test_files_of_two_preparations_are_not_mixed(call, prepared):
    """As when data.py is killed between the renames of its two files."""
    train = Path("dataset/pretrain_train.bin").read_bytes()
    Path("dataset/pretrain.txt").write_text(make_text(seed=2), encoding="utf-8")
    assert call("data.py", "--block_size", "16").status == 0
    Path("dataset/pretrain_train.bin").write_bytes(train)
    tiny = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "16", "--batch_size", "2"]
    command = ["train.py", "-t", "pretrain", *tiny, "--max_steps", "1", "--warmup_iters", "1"]
    result = call(*command)
    assert result.status == 1 and "another run of data.py" in result.err
    advice = result.err.split("`")[1].split()[1:]
    assert call(Path(advice[0]).name, *advice[1:]).status == 0
    assert call(*command).status == 0


def test_any_corpus_comes_back_whole(call, work, monkeypatch):
    """Documents of any length, cut anywhere, from text or records: decoded, both sides are all there is."""
    from text import corpus, formats

    rng = random.Random(5)
    words = ["word ", "<|unknown|>", "<|InstructMark|>", "<", "\n", "x" * 30, "业\r\n", "\ufeff", "|>"]
    for round_ in range(40):
        made = ["d" + "".join(rng.choices(words, k=rng.randint(1, 60))) + "e" for _ in range(rng.randint(1, 9))]
        monkeypatch.setattr(formats, "CHUNK", rng.choice([7, 50, 400]))
        monkeypatch.setattr(corpus, "CHUNK", rng.choice([7, 50, 400]))
        monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", rng.choice([40, 200, 5000]))
        if round_ % 2:
            (work / "c.x").write_bytes(as_jsonl([{"text": text} for text in made]))
        else:
            (work / "c.x").write_bytes("".join(f"<|bos|>{text}<|eos|>\n" for text in made).encode())
        result = call("data.py", "c.x", "--block_size", "1")
        assert result.status == 0, result.err
        tokenizer = load_tokenizer("dataset/tokenizer.json")
        train, val = (tokenizer.decode(TokenFile(f"dataset/pretrain_{split}.bin").tokens) for split in ("train", "val"))
        expected = sorted({text.replace("\r\n", "\n") for text in made})
        if len(expected) == 1:
            assert train + val == expected[0]
            continue
        # a document that is cut begins in training and ends in validation
        begun, ended = train.count("<|bos|>") - train.count("<|eos|>"), val.count("<|eos|>") - val.count("<|bos|>")
        assert begun == ended and (train + val).count("<|bos|>") == len(expected)
        plain = (train + val).replace("<|bos|>", "").replace("<|eos|>", "")
        assert sorted(plain) == sorted("".join(expected))
        whole = [part[: part.index("<|eos|>")] for part in train.split("<|bos|>") if "<|eos|>" in part]
        assert set(whole) <= set(expected)


def test_a_name_that_no_record_has_is_refused(call, work):
    write_jsonl(work / "s.jsonl", [{**row, "best_answer": "x"} for row in QUESTIONS])
    result = call("data.py", "s.jsonl", "--fields", "answer=bestanswer")
    assert result.status == 1 and "'bestanswer'" in result.err and 'did you mean "best_answer"' in result.err
    assert call("data.py", "s.jsonl", "--fields", "answer=best_answer", "--block_size", "64").status == 0


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_a_table_with_a_long_first_field_is_one(call, work, name):
    rows = [{"text": f"{i} " * (100_000 if i == 0 else 3), "id": i} for i in range(30)]
    (work / name).write_bytes(as_csv(rows))
    result = call("data.py", name, "--block_size", "16")
    assert result.status == 0 and "pretrain: csv" in result.out


def test_utf8_is_noticed_late(call, work):
    text = "plain ascii " * 100_000 + "naïve café 中文 " * 10
    (work / "a.txt").write_text(text, encoding="utf-8")
    assert call("data.py", "a.txt", "--encoding", "latin-1").status == 0
    ids = np.concatenate([TokenFile(f"dataset/pretrain_{split}.bin").tokens for split in ("train", "val")])
    assert load_tokenizer("dataset/tokenizer.json").decode(ids) == text


def test_line_ends_are_read_across_a_change_of_encoding():
    """The file is taken for ASCII until its first other character; a carriage return may have come just before."""
    for blocks, text in (([b"a\r", "\né".encode()], "a\né"), ([b"a\r", "é".encode()], "a\né")):
        assert "".join(decode_blocks(Source(Path("x"), encoding="latin-1"), blocks, is_certain=False)) == text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030"])
def test_line_ends_are_read_however_the_file_is_cut(encoding):
    """Also where a cut is in a character, or between \\r and \\n; \u4e0d has the byte of a \\r in UTF-16."""
    text = "不一\r不\r\n\r\r\n二🙂\n\n\r三不\r\n"
    data, expected = text.encode(encoding), text.replace("\r\n", "\n").replace("\r", "\n")
    source = Source(Path("x"), encoding=encoding)
    for i in range(1, len(data)):
        for j in range(i + 1, len(data)):
            assert "".join(decode_blocks(source, [data[:i], data[i:j], data[j:]], is_certain=True)) == expected


def test_lines_end_at_line_breaks_and_at_no_other_separator():
    text = "a\u2028b\x85c\x0cd\ne\n\nf"
    assert split_lines(text) == ["a\u2028b\x85c\x0cd\n", "e\n", "\n", "f"] and split_lines("a\n") == ["a\n"]


def test_a_line_that_is_too_long_is_named(call, work, monkeypatch):
    from text import formats

    monkeypatch.setattr(formats, "LONGEST_RECORD", 1000)
    (work / "a.jsonl").write_bytes(as_jsonl([*QUESTIONS[:3], {"question": "a", "answer": "b" * 1000}, QUESTIONS[4]]))
    result = call("data.py", "a.jsonl", "--block_size", "16")
    assert result.status == 1 and "a.jsonl: line 4: more than 1,000 characters in one record" in result.err


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_one_bad_line_behind_a_long_first_one_is_skipped(call, work, name):
    rows = [{"text": "long " * 300_000}, *({"text": text} for text in TEXTS)]
    (work / name).write_bytes(as_jsonl(rows) + b"{broken\n")
    result = call("data.py", name, "--block_size", "16")
    assert result.status == 0 and "line 42: column 2: not valid JSON" in result.err


def test_characters_of_dropped_documents_are_not_in_the_vocabulary(call, work, monkeypatch):
    from text import corpus

    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 500)
    write_jsonl(work / "d.jsonl", [*({"text": text} for text in TEXTS), {"text": "long Ω\n" * 300}])
    result = call("data.py", "d.jsonl", "--max_characters", "1000", "--block_size", "16")
    assert result.status == 0 and "dropped: 1 longer than max_characters, as 'long" in result.out
    assert load_tokenizer("dataset/tokenizer.json").unknown_characters("Ω") == "Ω"


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (QUESTIONS[:2], ["--val_fraction", "0.9"], None),
        ([{"question": "a", "answer": "b"}] * 9, [], "1 distinct sample(s);"),
        ([{"question": f"{i}", "answer": "b"} for i in range(9)], ["--split_by", "answer"], "all with the same answer"),
        ([{"messages": [answer(f"{i}")]} for i in range(9)], ["--split_by", "question"], "all with the same question"),
        ([{"text": "<|unknown|>" * 1000}], [], "no training text"),
    ],
)
def test_both_sides_get_something_or_a_message(call, work, rows, options, words):
    write_jsonl(work / "x.jsonl", rows)
    result = call("data.py", "x.jsonl", "--block_size", "64", *options)
    assert result.status == (1 if words else 0) and (words or "") in result.err and "Traceback" not in result.err
    if not words:
        assert all(len(side) == 1 for side in sides("sft"))


def test_the_validation_part_is_as_near_to_its_share_as_whole_groups_come():
    for fraction in np.linspace(0.05, 0.5, 46):
        taken = choose_validation(np.full(40, 10.0), fraction, must=False).sum()
        assert abs(taken - 40 * fraction) <= 0.5 + 1e-9


def test_of_few_samples_one_is_for_validation(call, work):
    write_jsonl(work / "x.jsonl", QUESTIONS[:3])
    assert call("data.py", "x.jsonl", "--block_size", "64").status == 0
    assert [len(side) for side in sides("sft")] == [2, 1]


@pytest.mark.parametrize(("text", "encoding", "candidates"), [
    ("User: hello\nBot: 你好\n" * 100, "gbk", {"gb18030": "Bot: 你好", "cp949": "Bot: 콱봤"}),
    ("I have 一只猫 and it 喜欢 eating 鱼\n" * 100, "gbk", {"gb18030": "and it 喜欢 eating 鱼"}),
    ("Le garçon a mangé des pâtes à la crème.\n" * 20, "cp1252", {}),  # no other reads it
    ("Die Bücher liegen über dem Stuhl\n" * 20, "cp1252", {"cp1252": "Die Bücher liegen üb"}),
    ("你好，世界。今天天气很好，我们去公园散步。\n" * 30, "gbk", {}),
    ("Привет, как дела? Сегодня хорошая погода.\n" * 20, "cp1251", {}),
])  # fmt: skip
def test_an_encoding_that_cannot_be_told_is_left_to_who_can_read(call, work, text, encoding, candidates):
    """What each would read is shown where most of a text is ASCII, and none is recommended."""
    (work / "a.txt").write_bytes(text.encode(encoding))
    result = call("data.py", "a.txt", "--block_size", "16")
    assert result.status == 1 and all(f"{name} ({shown})" in result.err for name, shown in candidates.items())
    named = re.search(r"--encoding (\w+)", result.err)[1]
    assert named == ("NAME" if candidates else "gb18030" if encoding == "gbk" else encoding)
    named = next(iter(candidates), named)
    assert call("data.py", "a.txt", "--block_size", "16", "--encoding", named).status == 0


def test_a_full_disk_is_one_line_and_leaves_nothing(call, work, monkeypatch):
    import errno

    from text.token_files import TokenFileWriter

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (work / "a.txt").write_text(make_text(), encoding="utf-8")
    monkeypatch.setattr(TokenFileWriter, "_write", fail)
    result = call("data.py", "a.txt", "--block_size", "16")
    assert result.status == 1 and result.err == "error: dataset/pretrain_val.bin: No space left on device\n"
    assert not list(work.glob("dataset/*"))


def test_runs_of_points_take_linear_time():
    from text.cleaning import split_at_sentences

    began = time.perf_counter()
    text = "." * 200_000 + "a"
    assert "".join(split_at_sentences(text, 1000)) == text
    assert time.perf_counter() - began < 5  # it took minutes
