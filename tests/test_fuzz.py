"""Fuzzing: strange values for every config field, random JSON, randomly mutated files."""

import dataclasses
import json
import random
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import asked_by, make_samples, make_text, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from base.configuration import Config, UserError, fields_of
from model import ModelConfig
from problems.config import ProblemConfig
from text import corpus, formats
from text.formats import Source
from text.token_files import TokenFile
from training.config import TrainConfig
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model

CLASSES = (TrainConfig, ModelConfig, ProblemConfig)
FIELDS = [(cls, name) for cls in CLASSES for name in fields_of(cls)]
STRANGE = [None, {}, [], [1], [["a"]], "", "x", "1", True, -1, 0, 0.5, 1e30, 10**400, float("nan"), float("inf")]


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{cls.__name__}-{name}" for cls, name in FIELDS])
def test_a_field_accepts_a_value_or_its_error_names_the_field(cls: type[Config], name: str):
    field, refused = fields_of(cls)[name], 0
    for value in STRANGE:
        try:
            taken = field.check(value)
        except UserError as error:
            assert str(error).startswith(f"{name} must be ") and "\n" not in str(error)
            refused += 1
            continue
        as_text = field.has_auto and taken == str(value).lower()  # true for "true"
        assert (taken == value or as_text) and isinstance(taken, field.plain_type | None)
        assert not isinstance(taken, float) or abs(taken) < float("inf")
        try:
            config = cls(**{name: value})
        except UserError as error:  # a rule between fields
            assert "\n" not in str(error)
        else:
            assert dataclasses.is_dataclass(config)
    assert refused >= len(STRANGE) / 2  # a field that accepts everything validates nothing


def test_bounds_are_as_they_are_documented():
    """minimum <= value <= maximum, above < value; neither true nor half of an integer is a number."""
    for cls, name in FIELDS:
        field = fields_of(cls)[name]
        if field.plain_type not in (int, float):
            continue
        for rule in ("minimum", "maximum"):
            if (bound := field.metadata[rule]) is not None:
                assert field.check(bound) == bound
        if (above := field.metadata["above"]) is not None:
            with pytest.raises(UserError, match=f"{name} must be above"):
                field.check(above)
        for value in (True, False, *([1.5] if field.plain_type is int else [])):
            with pytest.raises(UserError, match=f"{name} must be "):
                field.check(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from([name for cls in CLASSES[:2] for name in fields_of(cls)]) | st.text()


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(field_names, json_values, max_size=4) | json_values, st.integers(0, 200))
def test_any_config_file_is_read_or_its_error_names_the_file(values, cut):
    """Random JSON, some of it truncated."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.json")
        path.write_text(json.dumps(values)[: cut or None], encoding="utf-8")
        try:
            asked = asked_by("-t", str(path))
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith(str(path))
        else:
            assert isinstance(asked.training, TrainConfig) and asked.model.keys() <= fields_of(ModelConfig).keys()


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "x"]), "content": json_values}),
    max_size=4,
)
rows = st.fixed_dictionaries({"question": json_values, "answer": json_values})
json_lines = (json_values | messages.map(lambda m: {"messages": m}) | rows).map(json.dumps)


@settings(max_examples=300, deadline=None)
@given(st.lists(json_lines | st.text(), max_size=6), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_any_jsonl_gives_whole_conversations_or_bad_lines(lines, end):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        path.write_text(end.join(lines), encoding="utf-8", errors="replace", newline="")
        bad, source = corpus.BadLines(1000), Source(path, form="json lines", stage="sft")
        try:
            found = list(corpus.chat_records(source, bad))
        except UserError as error:  # nothing in it, or NUL bytes
            assert "x.jsonl" in str(error)
            return
    for (conversation,) in found:
        roles = [message["role"] for message in conversation if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        question = next(message for message in conversation if message["role"] == "user")  # the first one may be empty
        assert all(message["content"].strip() for message in conversation if message is not question)


JSON_OR_NOT = st.one_of(
    st.recursive(rows | json_values, lambda inside: st.lists(inside, max_size=4), max_leaves=8).map(json.dumps),
    st.text(alphabet='{}[]",:\\n abq', max_size=60),
)


@settings(max_examples=300, deadline=None)
@given(JSON_OR_NOT, st.integers(1, 40), st.sampled_from(["json", "json lines"]))
def test_any_json_is_read_like_the_whole_or_refused(text, chunk, form):
    """An independent reading: json.loads() of the whole, where the stream is cut at any place."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK", chunk)
        path = Path(folder, "x.json")
        path.write_text(text, encoding="utf-8", newline="")
        try:
            found = [values for _, values in formats.records(Source(path, form=form))]
        except UserError as error:
            assert "x.json" in str(error)
            return
    try:
        whole = json.loads(text)
    except ValueError:
        return
    if form == "json" and isinstance(whole, list) and whole and all(isinstance(value, dict) for value in whole):
        assert found == whole
    elif isinstance(whole, dict):
        assert found == [whole]


def mutate(contents: bytes, rng: random.Random) -> bytes:
    """A copy with random bits flipped, or bytes replaced, deleted, duplicated, zeroed or truncated."""
    changed = bytearray(contents)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed))
        length = min(len(changed) - at, rng.choice([1, 4, 64, 4096]))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[at : at + length] = bytes(length)
        else:
            del changed[at:]
        if not changed:
            return b""
    return bytes(changed)


def test_mutated_files_are_refused_or_read_correctly(prepared, call, long):
    """A checkpoint and two token files. Thanks to checksums, whatever is read is what was written."""
    tiny = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "16", "--batch_size", "2"]
    assert call("train.py", "-t", "pretrain", *tiny, "--max_steps", "1", "--warmup_iters", "1").status == 0
    checkpoint = Path("checkpoint/pretrain_last.pt")
    sound = load_model(load_checkpoint(checkpoint), checkpoint).state_dict()
    token_files = [Path("dataset/pretrain_val.bin"), Path("dataset/sft_val.bin")]
    originals = {path: path.read_bytes() for path in [checkpoint, *token_files]}
    tokens = {path: TokenFile(path).tokens.copy() for path in token_files}
    rng, mutant, refused = random.Random(0), Path("mutant"), 0
    n = 10_000 if long else 300
    for _ in range(n):
        path = rng.choice(list(originals))
        contents = mutate(originals[path], rng)
        mutant.write_bytes(contents)
        try:
            if path == checkpoint:
                read = load_checkpoint(mutant)
                load_checkpoint_tokenizer(read, mutant)
                state = load_model(read, mutant).state_dict()
                assert all(torch.equal(state[name], sound[name]) for name in sound)
            else:
                assert (TokenFile(mutant).tokens == tokens[path]).all()
        except UserError as error:
            assert "mutant" in str(error)
            refused += 1
    assert n * 0.5 < refused < n  # some mutations are harmless: a date in an archive, a blank in a header


def test_every_byte_of_a_token_file_but_the_padding_is_checked(prepared):
    """Change single bytes of a small file: only the blanks that pad the header may change unnoticed."""
    path = Path("dataset/sft_val.bin")
    contents = path.read_bytes()
    sound = TokenFile(path)
    blank = contents.rindex(b"}", 0, 1 << 16) + 1
    for at in [*range(0, blank, 7), *range(1 << 16, len(contents))]:
        path.write_bytes(contents[:at] + bytes([contents[at] ^ 2]) + contents[at + 1 :])
        with pytest.raises(UserError, match=r"sft_val\.bin"):
            TokenFile(path)
    path.write_bytes(contents)
    assert (TokenFile(path).tokens == sound.tokens).all()


def test_a_corpus_of_one_enormous_line(work, call):
    """Running text without line ends is read in pieces; a sample longer than the context window is reported."""
    (work / "line.txt").write_bytes(b"abcdefghi " * 1_000_000)
    assert call("data.py", "line.txt").status == 0
    write_jsonl(work / "s.jsonl", [*make_samples(5), {"question": "q" * 2_000_000, "answer": "a"}])
    result = call("data.py", "s.jsonl", "--block_size", "64")
    assert result.status == 0 and "longer than" in result.out + result.err


def test_line_ends_and_byte_order_marks_are_normalised(work, call):
    """A byte-order mark and CRLF line ends do not change the tokens."""
    text = make_text()
    for name, contents in {"a": text.encode(), "b": b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()}.items():
        (work / f"{name}.txt").write_bytes(contents)
        assert call("data.py", f"{name}.txt", "--output", name).status == 0
    ours, theirs = (TokenFile(work / name / "pretrain_train.bin").tokens for name in "ab")
    assert (ours == theirs).all()
