"""Exact match of answers; perplexity by position: against slow versions, and their refusals."""

import copy
import errno
import gzip
import itertools
import json
import math
import re
import sys
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, FAST, TINY, is_harmless, make_text, write_jsonl
from rigged import bigram_model, chain_model, save_rigged, unigram_model
from test_inference import CHARACTERS, answer, save_model

import evaluate
from evaluation.copied import copied
from evaluation.questions import simplify
from evaluation.statistics import ratio
from evaluation.text import judge_pieces, judge_windows, read_ids, strided_losses, text_lengths
from model import GPT, ModelConfig
from serving.text_generator import GenerationConfig, TextGenerator, load_text_generator
from text.corpus import find_sources
from text.tokenizer import SPECIAL_TOKENS, BPETokenizer, CharTokenizer
from weights.checkpointing import load_checkpoint, load_model

EVERY_CHARACTER = "".join(sorted({*CHARACTERS, *"".join(SPECIAL_TOKENS)}))  # of the answers, too

# ------------------------------------------------------------------------------------------------------ questions


@pytest.fixture
def chat(work):
    """An untrained model in m.pt, which answers something or other."""
    return load_text_generator(str(save_model(work / "m.pt", EVERY_CHARACTER)), "cpu", True)


def pair(question, expected):
    return {"question": question, "answer": expected}


def ask(call, rows, *argv):
    write_jsonl(Path("q.jsonl"), rows)
    return call("evaluate.py", "-m", "m.pt", "--questions", "q.jsonl", *argv)


def test_exact_match_is_counted(call, chat):
    rows = [pair(q, "\r\n" + answer(chat, q) + " ") for q in ("aa", "bb")]
    rows.append(pair("cc", "something else"))
    messages = [("system", "dd"), ("user", "aa"), ("assistant", "b"), ("user", "cc")]
    history = [{"role": role, "content": content} for role, content in messages]
    # it fills the window whatever it is asked: so that this answer has room, the turn before the question is left out
    expected = "".join(chat.answer("cc", GenerationConfig(temperature=0.0), history[:1]))
    rows.append({"messages": [*history, {"role": "assistant", "content": expected}]})
    result = ask(call, rows)
    assert all(row.get("answer", "x").strip() and expected.strip() for row in rows)
    assert result.out.splitlines()[-1] == "exact match: 60.0% (3/5)"
    assert result.err == "1 of 5 questions without their oldest turns, which do not fit into 32 tokens\n"
    wrong = [line for line in result.out.splitlines() if line.startswith("wrong: ")]
    said = json.dumps(answer(chat, "cc"), ensure_ascii=False)
    after_system = "".join(chat.answer("aa", GenerationConfig(temperature=0.0), history[:1]))
    assert wrong == [
        f'wrong: "cc" -> {said}, expected "something else"',
        f'wrong: "aa" -> {json.dumps(after_system, ensure_ascii=False)}, expected "b"',
    ]
    assert "wrong" not in ask(call, rows, "--show", "0").out


def test_every_turn_is_asked_with_the_true_turns_before_it(call, chat, monkeypatch):
    asked = []

    def answering(self, prompt, config, history, **options):
        asked.append((prompt, [message["content"] for message in history]))
        return iter("no")

    monkeypatch.setattr(TextGenerator, "answer", answering)
    roles = ("system", "user", "assistant", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": content} for role, content in zip(roles, "sabcdef", strict=True)]
    messages[4]["weight"] = 0  # an answer that is not to be learnt is not asked for
    result = ask(call, [{"messages": messages}, pair("x", "no")], "--out", "said.jsonl")
    assert asked == [("a", ["s"]), ("e", ["s", "a", "b", "c", "d"]), ("x", [])]
    assert result.out.splitlines()[-1] == "exact match: 33.3% (1/3)"
    said = [json.loads(line) for line in Path("said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["where"] for row in said] == ["line 1, message 3", "line 1, message 7", "line 2"]
    assert [(row["model"], row["answer"], row["exact"]) for row in said] == [
        ("m.pt", "no", False),
        ("m.pt", "no", False),
        ("m.pt", "no", True),
    ]
    assert [(row["question"], row["expected"]) for row in said] == [("a", "b"), ("e", "f"), ("x", "no")]


@pytest.mark.parametrize(
    ("one", "other", "is_alike"),
    [
        ("The Sky is Blue.", "the sky   is blue", True),
        ("ＡＢＣ１２３", "abc123", True),
        ("今天 天气，很好！", "今天天气很好", True),
        ("红色；蓝色", "红色, 蓝色。", True),
        ("5 kg", "5kg", False),
        ("the rapist", "therapist", False),
        ("-5", "5", False),
        ("等于-5", "等于5", False),
        ("1.5", "15", False),
        ("1,000 km", "1000 km", True),
        ("1, 2", "12", False),
        ("straße", "STRASSE", True),
        ("!", "?", False),
        ("", "", True),
    ],
)
def test_answers_are_alike_but_for_how_they_are_written(one, other, is_alike):
    assert (simplify(one) == simplify(other)) is is_alike


def test_the_normalised_share_is_printed_before_the_exact_one(call, chat, monkeypatch):
    monkeypatch.setattr(TextGenerator, "answer", lambda *_, **__: iter("Ｙes!"))
    result = ask(call, [pair("a", "yes"), pair("b", "Ｙes!"), pair("c", "no")])
    assert result.out.splitlines()[-2:] == [
        "normalised match (case, spaces, punctuation, full width): 66.7% (2/3)",
        "exact match: 33.3% (1/3)",
    ]


def test_two_models_are_compared_question_by_question(call, work, monkeypatch):
    """One is right on 4 of 40 questions, the other on the 36 that are left."""
    tokenizer = CharTokenizer(EVERY_CHARACTER)
    for name, text in (("a.pt", "abc"), ("b.pt", "xyz")):
        save_rigged(work / name, chain_model(tokenizer, text), tokenizer)
    write_jsonl(work / "q.jsonl", [pair("qq", "abc")] * 4 + [pair("qq", "xyz")] * 36)
    result = call("evaluate.py", "--questions", "q.jsonl", "-m", "a.pt", "b.pt", "--show", "0", "--out", "said.jsonl")
    assert "a.pt:\n" in result.out and "exact match: 10.0% (4/40)" in result.out
    last = result.out.splitlines()[-1]
    low, high = map(float, re.search("95% ([0-9.]+) to ([0-9.]+)$", last).groups())
    assert last.startswith("b.pt is better than a.pt by 80 percentage points, 95% ")
    # the differences are +1 (36 times) and -1 (4 times): standard deviation 0.6, over sqrt(40), times 1.96
    assert low == pytest.approx(80 - 100 * 1.96 * 0.6 / 40**0.5, abs=4) and low < 80 < high <= 100
    said = [json.loads(line) for line in (work / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["exact"] for row in said] == [True] * 4 + [False] * 40 + [True] * 36
    assert {row["answer"] for row in said[:40]} == {"abc"} and {row["answer"] for row in said[40:]} == {"xyz"}


def test_questions_are_resampled_by_conversation(call, work):
    """Ten conversations of ten turns, all right or all wrong: no more is known of them than of ten questions."""
    tokenizer = CharTokenizer(EVERY_CHARACTER)
    for name, text in (("a.pt", "abc"), ("b.pt", "xyz")):
        save_rigged(work / name, chain_model(tokenizer, text), tokenizer)
    talks = [[("user", "q"), ("assistant", said)] * 10 for said in ["abc"] * 4 + ["xyz"] * 6]
    write_jsonl(work / "q.jsonl", [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks])
    result = call("evaluate.py", "--questions", "q.jsonl", "-m", "a.pt", "b.pt", "--show", "0")
    assert "exact match: 60.0% (60/100)" in result.out
    last = result.out.splitlines()[-1]
    low, high = map(float, re.search("by 20 percentage points, 95% (-?[0-9]+) to ([0-9]+)", last).groups())
    # differences of +1 and -1: standard deviation 0.98 over sqrt(10), times t = 2.26
    assert high - low == pytest.approx(2 * 100 * 2.26 * 0.98 * (10 / 9) ** 0.5 / 10**0.5, rel=0.2)
    assert last.startswith("no difference that these questions can show: ")


# ------------------------------------------------------------------------------------------------------ copied


def test_a_model_that_recites_is_told_from_one_that_does_not(call, work):
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    tokenizer = CharTokenizer(EVERY_CHARACTER)
    save_rigged(work / "recites.pt", chain_model(tokenizer, alphabet), tokenizer)
    save_rigged(work / "other.pt", chain_model(tokenizer, alphabet[::-1]), tokenizer)
    save_rigged(work / "short.pt", chain_model(tokenizer, "abc"), tokenizer)
    (work / "train.txt").write_text(f"once {alphabet[:23]} more\n" * 9, encoding="utf-8")
    write_jsonl(work / "q.jsonl", [pair("qq", alphabet[:21] + "!"), pair("q", "short")])
    said = {}
    for name in ("recites", "other", "short"):
        result = call("evaluate.py", "--questions", "q.jsonl", "-m", f"{name}.pt", "--copied", "train.txt")
        said[name] = next(line for line in result.out.splitlines() if line.startswith("copied from train.txt: "))
    expected = ", 66.7% of the expected answers' (2/3)"  # of its 22 characters the last one is another
    # of 26 letters, of which 23 were in the text: 4 pieces of 7, in both answers
    assert said["recites"].endswith(f": 57.1% of the answers' 20-character pieces (8/14){expected}")
    assert said["other"].endswith(f": 0.0% of the answers' 20-character pieces (0/14){expected}")
    assert said["short"].endswith(": no answer has 20 characters")


def test_pieces_are_found_wherever_the_training_text_is_cut(work, monkeypatch):
    """Against Python's `in`, over parts of 64 characters, and documents that come in pieces."""
    monkeypatch.setattr("evaluation.copied.CHUNK", 64)
    text = make_text(3000, seed=1)
    (work / "t.txt").write_text(text + "<|eos|>" + text[::-1], encoding="utf-8")
    write_jsonl(work / "t.jsonl", [{"question": "q", "answer": text[i : i + 37]} for i in range(0, 3000, 37)])
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 2900, 40).tolist()
    answers = [text[i : i + 50] for i in starts] + [text[i : i + 30] + "#" + text[i : i + 30] for i in starts]
    answers += [make_text(80, seed=7), "short", "", text[-10:] + text[::-1][:30]]
    cut = [text[i : i + 37] for i in range(0, 3000, 37)]
    write_jsonl(work / "cut.jsonl", [{"text": part} for part in cut])  # neighbours, of which none goes on
    for name, parts in (("t.txt", [text, text[::-1]]), ("t.jsonl", cut), ("cut.jsonl", cut)):
        found = copied(answers, find_sources([name])[0])
        for said, (n_found, n) in zip(answers, found.tolist(), strict=True):
            pieces = [said[i : i + 20] for i in range(len(said) - 19)]
            assert (n_found, n) == (sum(any(piece in part for part in parts) for piece in pieces), len(pieces))


def test_a_training_text_is_searched_in_bounded_memory(work):
    """Twice the text, the same memory."""
    line = "".join(map(chr, range(97, 123))) * 38 + "\n"
    peaks = []
    for millions in (5, 10):
        (work / "t.txt").write_text(line * (1_000_000 * millions // len(line)), encoding="utf-8")
        sources = find_sources(["t.txt"])[0]
        tracemalloc.start()
        assert copied([line[:30], "#" * 30], sources).tolist() == [[11, 11], [0, 11]]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("n_answer", [1, 5])
def test_turns_are_left_out_only_where_they_do_not_fit_with_the_answer(call, chat, monkeypatch, n_answer):
    """A window of 32, as in training: what of a conversation fits into it, its end included, is asked whole."""
    seen = []
    monkeypatch.setattr(GPT, "generate", lambda self, idx, *_, **__: iter(seen.append(idx[0].tolist()) or ()))
    for n in range(1, 30):
        turns = [("user", "a" * n), ("assistant", "b"), ("user", "c"), ("assistant", "d" * n_answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        whole, last = (chat.tokenizer.encode_chat(part)[0].tolist() for part in (messages[:3], messages[2:3]))
        fits = len(whole) + n_answer + 1 <= 32
        messages[1]["weight"] = 0
        result = ask(call, [{"messages": messages}], "--out", "said.jsonl")
        said = json.loads(Path("said.jsonl").read_text(encoding="utf-8"))
        assert seen.pop() == (whole if fits else last) and said.get("without_oldest_turns", False) is not fits
        assert ("1 of 1 questions without their oldest turns" in result.err) is not fits
    messages = [("system", "a"), ("user", "b"), ("assistant", "c" * 29)]  # too long: but there is no turn to leave out
    result = ask(call, [{"messages": [{"role": role, "content": content} for role, content in messages]}])
    assert "oldest turns" not in result.err and chat.tokenizer.decode(seen.pop()).startswith("<|InstructMark|>a\nb")


def test_answers_replace_nothing_but_earlier_answers(call, chat):
    rows = [pair("aa", "b")]
    assert ask(call, rows, "--out", "said.jsonl").status == ask(call, rows, "--out", "said.jsonl").status == 0
    Path("empty.jsonl").touch()
    assert ask(call, rows, "--out", "empty.jsonl").status == 0
    Path("other.jsonl.bak").write_text("something else")
    for file in ("q.jsonl", "m.pt", "other.jsonl.bak"):
        before = Path(file).read_bytes()
        result = ask(call, rows, "--out", file.removesuffix(".bak"))
        assert result.status == 1 and f"{file}: exists, and is no earlier --out" in result.err
        assert Path(file).read_bytes() == before


def test_a_question_that_is_too_long_is_named_and_wrong(call, chat):
    rows = [pair("aa", answer(chat, "aa")), pair("c" * 40, "d"), pair("bb", answer(chat, "bb"))]
    result = ask(call, rows)
    assert result.status == 0 and result.out.endswith("\nexact match: 66.7% (2/3)\n")
    assert "line 2: wrong, not answered: the question has 42 tokens" in result.err


def test_unknown_characters_are_named(call, chat):
    result = ask(call, [pair("aΩ", "b"), pair("bЖ", "cΩ"), pair("c\r\n", "d")])
    notes = result.err.splitlines()
    assert len(notes) == 2 and notes[0] == "in the questions: not in the vocabulary, read as <|unknown|>: ΩЖ"
    assert "not in the vocabulary" in notes[1] and notes[1].endswith(": 1")


def interrupt_at(question, monkeypatch):
    """Ctrl-C where this is asked."""
    answers = TextGenerator.answer

    def interrupted(self, prompt, *args, **options):
        if prompt == question:
            raise KeyboardInterrupt
        return answers(self, prompt, *args, **options)

    monkeypatch.setattr(TextGenerator, "answer", interrupted)


def test_ctrl_c_says_what_was_right_so_far(call, chat, monkeypatch):
    rows = [pair("aa", answer(chat, "aa")), pair("bb", "x"), pair("cc", "x"), pair("dd", "x")]
    interrupt_at("dd", monkeypatch)
    result = ask(call, rows)
    assert result.status == 130
    assert result.out.splitlines()[-1] == "stopped after 3 of 4 questions: 33.3% right (1/3)"


def test_an_earlier_answers_file_is_kept_beside_one_that_is_cut_off(call, chat, monkeypatch):
    rows = [pair("aa", "x"), pair("bb", "x"), pair("cc", "x")]
    assert ask(call, rows, "--out", "said.jsonl").status == 0
    interrupt_at("bb", monkeypatch)
    result = ask(call, rows, "--out", "said.jsonl")
    assert result.status == 130 and "kept as said.jsonl.bak" in result.err
    assert len(Path("said.jsonl").read_text().splitlines()) == 1
    assert len(Path("said.jsonl.bak").read_text().splitlines()) == 3


def test_a_full_disk_keeps_the_answers_file_back_but_not_the_result(call, chat, monkeypatch):
    def full(path, records):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate, "write_records", full)
    result = ask(call, [pair("aa", answer(chat, "aa"))], "--out", "said.jsonl")
    assert result.status == 1 and "No space left" in result.err
    assert result.out.endswith("exact match: 100.0% (1/1)\n")


def test_wrong_answers_are_exact_in_a_pipe_and_harmless_in_a_terminal(call, chat, monkeypatch):
    strange = "a\x9b\u202e\u200d"
    monkeypatch.setattr(TextGenerator, "answer", lambda *_, **__: iter(strange))
    assert f'wrong: "a" -> "{strange}", expected "b"' in ask(call, [pair("a", "b")]).out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = ask(call, [pair("a", "b")]).out
    assert all(map(is_harmless, shown)) and "a\\x9b\\u202e\u200d" in shown


def test_wrong_answers_are_shown_as_often_as_asked_for(call, chat):
    """Those that are too long to be asked are named on standard error, and are none of them."""
    rows = [pair("c" * 40, "d"), *(pair(text, "x y z") for text in ("aa", "bb", "cc"))]
    for n in (0, 1, 2, 5):
        assert ask(call, rows, "--show", n).out.count("wrong: ") == min(n, 3)


def test_only_the_first_questions_are_asked(call, chat):
    rows = [pair("aa", answer(chat, "aa")), pair("bb", answer(chat, "bb")), pair("cc", "x")]
    assert ask(call, rows, "--limit", "2").out.endswith("\nexact match: 100.0% (2/2)\n")
    assert ask(call, rows, "--limit", "9").out.endswith(" 66.7% (2/3)\n")


def test_questions_are_read_as_data_py_reads_them(call, chat, work):
    question = "今天天气怎么样？你叫什么名字"
    said = answer(chat, question)
    for encoding in ("gb18030", "utf-16"):
        text = json.dumps({"Q": question, "A": said}, ensure_ascii=False) + "\n"
        (work / "q.jsonl.gz").write_bytes(gzip.compress((text * 9).encode(encoding)))
        command = ("evaluate.py", "-m", "m.pt", "--questions", "q.jsonl.gz", "--fields", "question=Q", "answer=A")
        refused = call(*command)
        assert refused.status == 1 and encoding in refused.err.split("--encoding ")[1]
        assert call(*command, "--encoding", encoding).out.endswith("\nexact match: 100.0% (9/9)\n")
    unnamed = call(*command[:-3], "--encoding", "utf-16")
    assert unnamed.status == 1 and "--fields question=NAME answer=NAME" in unnamed.err
    assert "--plain_text" not in unnamed.err
    unknown = call(*command, "--encoding", "utf-16", "--fields", "question=Q", "answer=A", "system=S")
    assert unknown.status == 1 and "no record of the first ones has a field 'S'" in unknown.err


# ------------------------------------------------------------------------------------------------------ perplexity


def tiny_model(vocab_size=20, block_size=6):
    torch.manual_seed(0)
    return GPT(ModelConfig(vocab_size=vocab_size, block_size=block_size, n_layer=1, n_head=2, n_embd=16)).eval()


def naive_loss(model, ids, start, position):
    """Of one token by a forward pass over what stands before it from `start` on, in double precision."""
    seen = torch.tensor(ids[start:position].astype(np.int64))[None]
    return -copy.deepcopy(model).double()(seen)[0][0, -1].log_softmax(-1)[ids[position]].item()


CHARS = CharTokenizer("abcdefghijklmn")  # with the special tokens a vocabulary of 20


def test_it_is_the_loss_of_every_position():
    model, ids = tiny_model(), np.random.default_rng(0).integers(0, 20, 29)
    losses, units = judge_windows(model, CHARS, ids, 4, batch_size=3)
    starts = [0, 7, 14, 22]
    assert losses.shape == (4, 6)
    for row, start in zip(losses, starts, strict=True):
        expected = [naive_loss(model, ids, start, start + 1 + i) for i in range(6)]
        assert row.tolist() == pytest.approx(expected, rel=1e-4)
    assert units.nats.tolist() == pytest.approx(losses.sum(1).tolist()) and units.tokens.tolist() == [6] * 4
    more, _ = judge_windows(model, CHARS, ids, 9)  # than the text holds
    assert more.ravel().tolist() == pytest.approx(losses.ravel().tolist(), rel=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 5, 6, 9])
def test_every_token_is_judged_once_with_the_context_promised(stride):
    """Each loss is that of the one context which the rule allows, found token by token."""
    model, ids = tiny_model(), np.random.default_rng(1).integers(0, 20, 30)
    stride = min(stride, 6)
    found = strided_losses(model, ids, stride, batch_size=4)
    assert found.shape == (29,)
    for position in range(1, 30):
        end = 6 if position <= 6 else min(29, 6 + stride * math.ceil((position - 6) / stride))
        start = end - 6
        assert position <= 6 or position - start >= 6 - stride + 1  # tokens before it, at least 6 - stride
        assert found[position - 1] == pytest.approx(naive_loss(model, ids, start, position), rel=1e-4)
    for batch_size in (1, 100):
        assert strided_losses(model, ids, stride, batch_size) == pytest.approx(found, rel=1e-5)


def test_with_stride_1_it_does_not_matter_where_windows_begin():
    model, ids = tiny_model(), np.random.default_rng(2).integers(0, 20, 40)
    whole = strided_losses(model, ids, 1)
    for dropped in (1, 3, 7):
        assert strided_losses(model, ids[dropped:], 1)[6:] == pytest.approx(whole[dropped + 6 :], rel=1e-5)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_tokens_have_the_characters_and_bytes_of_their_text(kind):
    """Of every beginning of the tokens: as many characters as are complete, by decoding it anew."""
    text = make_text(700) + "𝔘 ﷽ 👩‍🚀"
    tokenizer = CharTokenizer.train([text]) if kind == "char" else BPETokenizer.train(["the cat sat on a mat"], 270)
    ids = tokenizer.delimit([tokenizer.encode(text)], True, True)
    lengths = text_lengths(tokenizer, ids)
    assert lengths.sum(0).tolist() == [len(text), len(text.encode())]
    for n in range(1, len(ids), 13):
        decoded = tokenizer.decode(ids[1:n]).rstrip("\ufffd")
        assert lengths[:n].sum(0).tolist() == [len(decoded), len(decoded.encode())]
    unknown = text_lengths(CHARS, CHARS.encode("aΩb"))
    assert unknown.tolist() == [[1, 1], [1, 3], [1, 1]]


def test_bits_are_those_that_can_be_computed_by_hand(call, work):
    """Every token as likely as any other: log2 of the vocabulary per character; 你 has three bytes."""
    tokenizer = CharTokenizer("a你\n")
    save_rigged(work / "m.pt", unigram_model(np.full(9, 1 / 9)), tokenizer)
    (work / "t.txt").write_text("你a你\n" * 200, encoding="utf-8")
    for flags in ([], ["--stride", "10"]):
        line = call("evaluate.py", "t.txt", "-m", "m.pt", *flags).out.splitlines()[-1]
        figures = re.search(
            r"loss ([\d.]+) ± [\d.]+, perplexity ([\d.]+) ± [\d.]+, ([\d.]+) ± [\d.]+ bits/character, ([\d.]+) ±", line
        )
        found = [float(figure) for figure in figures.groups()]
        assert found == pytest.approx([math.log(9), 9, math.log2(9), math.log2(9) / 2], abs=0.006)


def test_the_table_has_what_was_computed_by_hand_in_ranges(call, work):
    """After an a an a costs ln 2, after a b a b ln 8: perplexity is 4 over both, not the mean of 2 and 8."""
    p = np.full((8, 8), 1e-9)
    p[6], p[7] = np.where(np.arange(8) == 6, 1 / 2, 1 / 14), np.where(np.arange(8) == 7, 1 / 8, 1 / 8)
    save_rigged(work / "m.pt", bigram_model(np.log(p), block_size=32), CharTokenizer("ab"))
    text = "aaabbb" + "aabb" * 7  # and a character more than the window, so that all of it is judged
    (work / "t.txt").write_text(text[:33], encoding="utf-8")
    nats = {"aa": math.log(2), "ab": math.log(14), "ba": math.log(8), "bb": math.log(8)}
    losses = [nats[text[i : i + 2]] for i in range(32)]
    rows = call("evaluate.py", "t.txt", "-m", "m.pt", "--windows", "1").out.splitlines()[2:10]
    found = [float(row.split("|")[2]) for row in rows]
    assert found == pytest.approx(np.exp(np.reshape(losses, (8, 4)).mean(1)).tolist(), abs=0.006)


def test_rounded_weights_are_what_is_judged(call, work):
    """A row with one large entry, of a token that does not occur, so that what is left of the others shows."""
    log_p = np.full((8, 8), -20.0)
    log_p[6:, 6:] = np.log([[0.6, 0.4], [0.3, 0.7]])
    log_p[0, 6:] = -200
    save_rigged(work / "m.pt", bigram_model(log_p, block_size=32), CharTokenizer("ab"))
    text = ("aaabbb" + "aabb" * 7)[:33]
    (work / "t.txt").write_text(text, encoding="utf-8")
    scale = np.abs(log_p).max(0) / 127  # of an output, over its inputs
    for flags, table in (([], log_p), (["--weights", "int8"], np.round(log_p / scale) * scale)):
        p = np.exp(table[6:, 6:]) / np.exp(table[6:]).sum(1, keepdims=True)
        losses = [-np.log(p["ab".index(text[i]), "ab".index(text[i + 1])]) for i in range(32)]
        line = call("evaluate.py", "t.txt", "-m", "m.pt", "--windows", "1", *flags).out.splitlines()[-1]
        assert float(re.search(r"loss ([\d.]+)", line)[1]) == pytest.approx(np.mean(losses), abs=0.006)
    assert np.mean(losses) > 0.8  # exact: 0.63


def test_models_with_other_windows_are_judged_on_every_token(call, work):
    tokenizer, rng = CharTokenizer("abc"), np.random.default_rng(5)
    p, q = (np.array([1e-9] * 6 + three) / sum(three) for three in ([0.6, 0.3, 0.1], [0.3, 0.4, 0.3]))
    text = "".join(rng.choice(list("abc"), 1000, p=p[6:]))
    save_rigged(work / "q.pt", unigram_model(q, 32), tokenizer)
    save_rigged(work / "p.pt", unigram_model(p, 64), tokenizer)
    (work / "t.txt").write_text(text, encoding="utf-8")
    result = call("evaluate.py", "t.txt", "-m", "q.pt", "p.pt")
    assert "the models have different windows: every token is judged, in strides of half a window" in result.err
    of = tokenizer.encode(text)[1:]
    for line, name, weights in zip(result.out.splitlines(), "qp", (q, p), strict=False):
        assert line.startswith(f"overall, {name}.pt: loss {-np.log(weights[of]).mean():.4f} ± ")
        assert line.endswith("(15 pieces of about 67 characters)")
    last = result.out.splitlines()[-1]
    assert last.startswith(f"p.pt is better than q.pt by {np.log(p / q)[of].mean():.3f} nats per token")
    for option in (("--windows", "5"), ("-o", "x.png")):  # which would have no effect
        result = call("evaluate.py", "t.txt", *option, "-m", "q.pt", "p.pt")
        assert result.status == 1 and "no --windows, no -o" in result.err


@pytest.mark.parametrize("n", [9, 40, 200])
def test_the_curve_of_a_short_text_is_that_of_its_losses(work, monkeypatch, n):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axis, x, y, **_: drawn.append((x, y)))
    evaluate.draw(str(work / "p.png"), {"": np.full(n, 1.5)}, 1024)
    ((x, y),) = drawn
    assert y == pytest.approx(math.exp(1.5)) and 1 <= x.min() <= x.max() <= n and len(x) == len(y)


class Composing(CharTokenizer):
    """Reads accents and their letter as one character, as Qwen's tokenizer does (NFC)."""

    def encode(self, text, special=False):
        return super().encode(unicodedata.normalize("NFC", text), special)


def test_pieces_are_the_same_text_where_a_tokenizer_composes_accents(work):
    text = "e\u0301a\u0323\u0302" * 500 + "abc" * 500 + "\u1112\u1161\u11ab" * 300  # two letters, Hangul
    composed = unicodedata.normalize("NFC", text)
    plain, composing = CharTokenizer.train([text]), Composing.train([composed])
    models = [(tiny_model(t.vocab_size, 50), t, t.encode(text)) for t in (plain, composing)]
    ends = np.cumsum([2, 3] * 500 + [1] * 1500 + [3] * 300)  # characters of the text that each composed one completes
    assert len(models[1][2]) == len(composed) == len(ends) and ends[-1] == len(text)
    _, found = judge_pieces(models, text, [25, 25])
    edges = np.cumsum([2, *found.characters])  # what both judge begins behind the first token of both
    assert edges[-1] == len(text)
    assert found.tokens.tolist() == [((a < ends) & (ends <= b)).sum() for a, b in itertools.pairwise(edges)]


def test_a_standard_error_is_how_far_other_texts_of_the_kind_are_off(call, work):
    """Texts drawn from the model itself, whose entropy is the loss to be expected: 200 of them, in double precision."""
    p = np.array([0, 0, 0, 0, 0, 0, 0.7, 0.2, 0.1]) + 1e-9
    p /= p.sum()
    tokenizer, model, rng = CharTokenizer("abc"), unigram_model(p, block_size=16), np.random.default_rng(0)
    losses, errors = [], []
    for _ in range(100):
        _, units = judge_windows(model, tokenizer, rng.choice(9, 1000, p=p), 40, batch_size=40)
        loss, error = ratio(units.nats, units.tokens)
        losses.append(loss)
        errors.append(error)
    assert np.mean(losses) == pytest.approx(-(p * np.log(p)).sum(), abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.2)


def test_models_with_different_tokenizers_are_compared_by_bits_per_byte(call, work):
    """A text of which each knows the probabilities: 1 of 9 characters; 1 of 270 tokens, of which it needs fewer."""
    text = "the cat sat on a mat\n" * 150
    characters, bpe = CharTokenizer.train([text]), BPETokenizer.train([text], 290)
    for name, tokenizer, window in (("a.pt", characters, 32), ("b.pt", bpe, 16)):
        V = tokenizer.vocab_size
        save_rigged(work / name, unigram_model(np.full(V, 1 / V), window), tokenizer)
    (work / "t.txt").write_text(text, encoding="utf-8")
    result = call("evaluate.py", "t.txt", "-m", "a.pt", "b.pt")
    assert result.status == 0 and "the models have different tokenizers: every token is judged" in result.err
    lines = result.out.splitlines()
    bits_a = math.log2(characters.vocab_size)
    bits_b = math.log2(bpe.vocab_size) * len(bpe.encode(text)) / len(text)
    assert f", {bits_a:.3f} ± 0.000 bits/byte" in lines[0] and lines[0].startswith("overall, a.pt: loss ")
    found = re.fullmatch("b.pt is better than a.pt by ([0-9.]+) bits per byte, 95% ([0-9.]+) to ([0-9.]+)", lines[-1])
    difference, low, high = map(float, found.groups())
    assert difference == pytest.approx(bits_a - bits_b, abs=0.02) and low < difference < high


def test_pieces_are_the_same_text_for_every_model_and_lose_nothing(work):
    text = make_text(4000)
    characters, bpe = CharTokenizer.train([text]), BPETokenizer.train([text], 290)
    models = [(tiny_model(t.vocab_size, size), t, t.encode(text)) for t, size in ((characters, 32), (bpe, 16))]
    found = judge_pieces(models, text, [16, 8])
    first = len(bpe.decode(models[1][2][:1]))  # characters that not every model predicts
    for (model, tokenizer, ids), stride, units in zip(models, [16, 8], found, strict=True):
        n_left_out = max(1, first) if tokenizer is characters else 1
        losses = strided_losses(model, ids, stride)
        assert units.nats.sum() == pytest.approx(losses[n_left_out - 1 :].sum())
        assert units.tokens.sum() == len(ids) - n_left_out
        assert units.characters.sum() == len(text) - max(1, first)
        assert units.bytes.sum() == len(text[max(1, first) :].encode())
        assert units.bytes.tolist() == found[0].bytes.tolist()


def test_two_models_are_compared_window_by_window(call, work):
    """Of a text drawn from one of them: the other loses what can be counted, and the interval has it."""
    tokenizer, rng = CharTokenizer("abc"), np.random.default_rng(3)
    p, q = (np.array([1e-9] * 6 + three) / sum(three) for three in ([0.6, 0.3, 0.1], [0.3, 0.4, 0.3]))
    save_rigged(work / "q.pt", unigram_model(q), tokenizer)
    save_rigged(work / "p.pt", unigram_model(p), tokenizer)
    (work / "t.txt").write_text("".join(rng.choice(list("abc"), 4000, p=p[6:])), encoding="utf-8")
    result = call("evaluate.py", "t.txt", "-m", "q.pt", "p.pt")
    lines = result.out.splitlines()
    assert "perplexity, q.pt" in lines[0] and "perplexity, p.pt" in lines[0] and (work / "perplexity.png").exists()
    found = re.fullmatch("p.pt is better than q.pt by ([0-9.]+) nats per token, 95% ([0-9.]+) to ([0-9.]+)", lines[-1])
    difference, low, high = map(float, found.groups())
    expected = (p[6:] * np.log(p[6:] / q[6:])).sum()  # the Kullback-Leibler divergence
    assert low < expected < high and difference == pytest.approx(expected, abs=0.05)
    swapped = call("evaluate.py", "t.txt", "-m", "p.pt", "q.pt").out.splitlines()[-1]
    assert swapped.startswith("p.pt is better than q.pt by ") and swapped.split(" by ")[1] == lines[-1].split(" by ")[1]


def test_a_difference_too_small_for_the_text_is_not_claimed(call, work):
    """Almost the same model: about how much more text would tell, and how to read what of it is there."""
    tokenizer, rng = CharTokenizer("abc"), np.random.default_rng(4)
    p, q = (np.array([1e-9] * 6 + three) / sum(three) for three in ([0.6, 0.3, 0.1], [0.5, 0.36, 0.14]))
    save_rigged(work / "q.pt", unigram_model(q), tokenizer)
    save_rigged(work / "p.pt", unigram_model(p), tokenizer)
    (work / "t.txt").write_text("".join(rng.choice(list("abc"), 40_000, p=p[6:])), encoding="utf-8")
    command = ("evaluate.py", "t.txt", "-m", "q.pt", "p.pt", "--windows")
    too_few = "nothing can be said of p.pt against q.pt from 4 units: at least 6 are needed (this text has them: "
    assert call(*command, "4").out.splitlines()[-1] == too_few + "--windows 6)"
    last = call(*command, "6").out.splitlines()[-1]
    found = re.search(
        "^no difference that this text can show: .*; about ([0-9,]+) more characters would "
        r"\(this text has them: --windows ([0-9]+)\)$",
        last,
    )
    assert int(found[1].replace(",", "")) == pytest.approx(64 * (int(found[2]) - 6), rel=0.1)
    assert call(*command, found[2]).out.splitlines()[-1].startswith("p.pt is better than q.pt by ")
    (work / "short.txt").write_text((work / "t.txt").read_text()[:65], encoding="utf-8")
    single = call("evaluate.py", "short.txt", "-m", "q.pt", "p.pt").out.splitlines()[-1]
    assert "nothing can be said" in single


def test_the_table_says_perplexity_and_ends_with_the_whole(call, work):
    """One window of the whole text: its loss by the model itself."""
    model = load_model(load_checkpoint(save_model(work / "m.pt")), "m.pt").eval()
    (work / "t.txt").write_text("abc 你\n" * 6, encoding="utf-8")
    ids = torch.from_numpy(CharTokenizer(CHARACTERS).encode("abc 你\n" * 6)[:33].astype(np.int64))[None]
    loss = model(ids[:, :-1], ids[:, 1:])[1].item()
    result = call("evaluate.py", "t.txt", "-m", "m.pt", "--windows", "1")
    lines = result.out.splitlines()
    assert result.err == "" and [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["positions", "perplexity"]
    assert lines[-2] == "perplexity.png"
    assert lines[-1].startswith(f"overall: loss {loss:.4f}, perplexity {math.exp(loss):.2f}, ")
    assert lines[-1].endswith(" bits/byte (1 window of about 32 characters)")
    result = call("evaluate.py", "t.txt", "-m", "m.pt", "--windows", "1", "--scaling", "yarn")
    assert result.status == 1 and "--scaling changes nothing within the trained window" in result.err
    (work / "perplexity.png").unlink()
    (work / "perplexity.png").mkdir()
    result = call("evaluate.py", "t.txt", "-m", "m.pt", "--windows", "1")
    assert result.status == 1 and result.err.startswith("error: perplexity.png: must be a picture's name")


def test_a_text_of_unknown_characters_gets_a_note(call, work):
    save_model(work / "m.pt")
    (work / "t.txt").write_text("abЖΩ" * 20, encoding="utf-8")
    result = call("evaluate.py", "t.txt", "-m", "m.pt")
    assert result.status == 0 and result.err.startswith("warning: 50.0% of t.txt: not in the vocabulary")
    assert ": ЖΩ; the perplexity counts all of these as one token" in result.err


def overall(call, *argv):
    result = call("evaluate.py", "-m", "m.pt", "--windows", "2", *argv)
    assert result.status == 0, result.err
    return result.out.splitlines()[-1]


def test_a_text_is_read_as_data_py_reads_it(call, work):
    save_model(work / "m.pt")
    text = "abc 你好 def\n" * 60
    (work / "t.txt").write_text(text, encoding="utf-8")
    expected = overall(call, "t.txt")
    (work / "gbk.txt").write_bytes(text.replace("\n", "\r\n").encode("gbk"))
    refused = call("evaluate.py", "gbk.txt", "-m", "m.pt")
    assert refused.status == 1 and "gbk.txt: not UTF-8 text: byte 0xc4 at 4; " in refused.err
    assert "gb18030 (abc 你好 def" in refused.err
    assert overall(call, "gbk.txt", "--encoding", "gb18030") == expected
    (work / "t.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert overall(call, "t.txt.gz") == expected
    write_jsonl(work / "t.jsonl", [{"body": text}])
    assert overall(call, "t.jsonl", "--fields", "text=body") == expected
    (work / "binary.txt").write_bytes(b"\0\1\2" * 99)
    assert "not text" in call("evaluate.py", "binary.txt", "-m", "m.pt").err


def test_several_documents_are_delimited_as_in_training(call, work):
    save_model(work / "m.pt")
    (work / "joined.txt").write_text("<|bos|>abc<|eos|><|bos|>def<|eos|>" * 30, encoding="utf-8")
    write_jsonl(work / "apart.jsonl", [{"text": "abc"}, {"text": "def"}] * 30)
    assert overall(call, "joined.txt") == overall(call, "apart.jsonl")
    ids, characters = read_ids(find_sources(["joined.txt"])[0], CharTokenizer(CHARACTERS))
    assert characters == "abcdef" * 30 and len(ids) == 5 * 60 and (ids[0], ids[4]) == (2, 3)


def test_a_table_of_questions_is_no_text(call, work):
    save_model(work / "m.pt")
    (work / "q.csv").write_text("question,answer\n" + "ab,cd\n" * 20, encoding="utf-8")
    refused = call("evaluate.py", "q.csv", "-m", "m.pt")
    assert refused.status == 1 and "q.csv: questions and answers" in refused.err
    assert "--questions q.csv" in refused.err and "--plain_text" in refused.err
    assert call("evaluate.py", "--questions", "q.csv", "-m", "m.pt").status == 0
    assert overall(call, "q.csv", "--plain_text").startswith("overall: loss ")
    (work / "a folder").mkdir()
    (work / "q.csv").rename("a folder/q.csv")
    (work / "a folder/t.txt").write_text("abc " * 99, encoding="utf-8")
    assert "--questions 'a folder/q.csv' asks" in call("evaluate.py", "a folder", "-m", "m.pt").err
    write_jsonl(work / "p.jsonl", [{"prompt": "ab", "chosen": "cd", "rejected": "ef"}] * 9)
    assert "p.jsonl: preferences, not a text" in call("evaluate.py", "p.jsonl", "-m", "m.pt").err
    assert overall(call, "p.jsonl", "--plain_text").startswith("overall: loss ")


def test_a_model_reads_beyond_its_window(prepared, call):
    (prepared / "new.txt").write_text(make_text(3000, seed=5), encoding="utf-8")
    assert call("train.py", "-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "3").status == 0
    result = call("evaluate.py", "new.txt", "--factor", "2.5", "--scaling", "yarn", "linear", "--windows", "5")
    assert result.status == 0, result.err
    assert "yarn" in result.out and "| 36-40 (beyond) |" in result.out
    assert "| 21-25 (beyond) |" in result.out and re.search(r"\| 16-20 +\|", result.out)  # 16 is in the window
    assert (prepared / "perplexity.png").stat().st_size > 10_000
    assert call("train.py", "-t", "sft_lora", *FAST, "--max_steps", "2", "--learning_rate", "0.1").status == 0
    adapted = call("evaluate.py", "new.txt", "--lora", "checkpoint/sft_lora_last.pt")
    plain = call("evaluate.py", "new.txt")
    assert adapted.status == 0 and adapted.out.splitlines()[0] == plain.out.splitlines()[0]
    assert adapted.out.splitlines()[-1] != plain.out.splitlines()[-1]
    rounded = call("evaluate.py", "new.txt", "--lora", "checkpoint/sft_lora_last.pt", "--weights", "int8")
    losses = [float(re.search(r"loss ([\d.]+)", result.out)[1]) for result in (plain, adapted, rounded)]
    assert abs(losses[2] - losses[1]) < 0.2 * abs(losses[1] - losses[0])  # the adapter is merged before it is rounded
    refusals = {
        ("new.txt", "--factor", "1000"): "do not fill a window",
        ("none.txt",): "no such file",
        ("new.txt", "--factor", "0.5"): "--factor must be",
        ("new.txt", "-o", "x.jpg"): "must be a picture's name",
        ("new.txt", "--scaling", "yam"): "invalid choice",
        ("new.txt", "--show", "3"): "--show is for --questions FILE",
        ("new.txt", "-m", "checkpoint/sft_lora.pt"): "an adapter; -m names its model (checkpoint/pretrain.pt)",
        ("--questions", "new.txt", "--factor", "2"): "--factor is for a text",
        ("--questions", "new.txt", "--windows", "64"): "--windows is for a text",
        ("--questions", "new.txt", "-o", "x.png"): "--output is for a text",
        ("--questions", "new.txt", "--scaling", "yarn"): "--scaling is for a text",
        ("--questions", "new.txt", "--show", "-1"): "--show must be at least 0",
        ("--questions", "new.txt", "--plain_text"): "--plain_text is for a text",
        ("--questions", "new.txt", "--limit", "0"): "--limit must be at least 1",
        ("new.txt", "--limit", "3"): "--limit is for --questions FILE",
        ("new.txt", "--fields", "text=body"): "plain text, which has no fields",
        ("new.txt", "--encoding", "gbq"): "no such encoding",
        ("--questions", "new.txt", "new.txt"): "one of them at a time",
        (): "a text, or --questions FILE",
        ("new.txt", "--stride", "0"): "--stride must be at least 1",
        ("new.txt", "--stride", "8", "--windows", "3"): "--stride reads the whole text",
        ("new.txt", "--out", "x.jsonl"): "--out is for --questions FILE or --choices FILE",
        ("--questions", "new.txt", "--stride", "8"): "--stride is for a text",
        ("--questions", "new.txt", "--out", "none/x.jsonl"): "none/x.jsonl: no such folder",
        ("--questions", "new.txt", "--out", "."): ".: no file can be written there",
        ("--choices", "new.txt", "--out", "/dev/null"): "/dev/null: no file can be written there",
        ("--questions", "new.txt", "--shots", "2"): "--shots is for --choices FILE",
        ("--choices", "new.txt", "--shots", "2"): "--shots N (at least 1) and --dev FOLDER go together",
        ("--choices", "new.txt", "--copied", "x"): "--copied is for --questions FILE",
        ("--choices", "new.txt"): "multiple choice is read from .csv and .jsonl files",
        ("--runs", "a.log", "-m", "a.pt"): "--model is for a text",
        ("--runs", "a.log"): "a.log: no such log",
        ("-m", "a.pt", "new.txt"): "texts stand before -m",
        ("new.txt", "-m", "a.pt", "a.pt"): "against itself",
        ("new.txt", "-m", "a.pt", "b.pt", "--factor", "2"): "are for a single model",
        ("new.txt", "-m", "a.pt", "b.pt", "--lora", "c.pt"): "--lora is for a single model",
        ("--choices", "new.txt", "--fields", "question=Q"): "--fields is for a text or --questions FILE",
    }
    for argv, words in refusals.items():
        result = call("evaluate.py", *argv)
        assert result.status == 1 and words in result.err and "Traceback" not in result.err, result.err


# ------------------------------------------------------------------------------------------------------ runs


def write_run(name, seed, losses, lr=1e-3, n_steps=30):
    header = {"type": "header", "stage": f"seed{seed}", "resumed_from_step": 0, "model_config": {"n_layer": 2}}
    header["train_config"] = {"random_seed": seed, "learning_rate": lr, "stage": f"seed{seed}"}
    header["train_config"]["save_checkpoint_to"] = f"checkpoint{seed}"
    records = [header, *({"type": "train", "step": step, "loss": 3 / step} for step in range(1, n_steps + 1))]
    losses = [None if math.isnan(loss) else loss for loss in losses]
    records += [{"type": "val", "step": 10 * i, "val_loss": loss} for i, loss in enumerate(losses, 1)]
    write_jsonl(Path(name), records)


def test_runs_of_one_config_are_put_together_and_those_of_others_apart(call, work):
    """By last loss 2.0, 2.1, 2.3, by best 1.9, 2.1, 2.2; t of two degrees of freedom is 4.303."""
    write_run("a.log", 1, [3, 1.9, 2.0])
    write_run("b.log", 2, [3, 2.2, 2.1])
    write_run("other.log", 1, [3, 2.0, 1.5], lr=1e-2)
    write_run("c.log", 3, [3, 2.2, 2.3])
    result = call("evaluate.py", "--runs", "a.log", "b.log", "other.log", "c.log")
    assert result.status == 0 and result.err == ""
    first, second = result.out.split("\n\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()]
    half = 4.303 * np.std([2.0, 2.1, 2.3], ddof=1) / 3**0.5
    assert cells[0] == ["run", "seed", "steps", "last val loss", "best val loss"]
    assert cells[2:5] == [
        ["a", "1", "30", "2.0000", "1.9000"],
        ["b", "2", "30", "2.1000", "2.1000"],
        ["c", "3", "30", "2.3000", "2.2000"],
    ]
    assert cells[5] == ["mean", "", "", f"{6.4 / 3:.4f}", f"{6.2 / 3:.4f}"]
    assert cells[6][0] == "standard deviation" and cells[6][3] == f"{np.std([2.0, 2.1, 2.3], ddof=1):.4f}"
    low, high = map(float, cells[7][3].split(" to "))
    assert cells[7][0] == "95% interval of the mean"
    assert (low, high) == pytest.approx((6.4 / 3 - half, 6.4 / 3 + half), abs=2e-4)
    assert "| other | 1    | 30    | 1.5000" in second and "mean" not in second
    write_run("b.log", 1, [3, 2.2, 2.1])
    assert "several runs have the seed 1" in call("evaluate.py", "--runs", "a.log", "b.log").err
    write_run("b.log", 2, [3, 2.2, math.nan])  # null in the file
    result = call("evaluate.py", "--runs", "a.log", "b.log", "c.log")
    assert "| b   | 2    | 30    | not finite    | 2.2000" in result.out and "mean" not in result.out
    assert result.err.startswith("warning: a run has diverged: no mean")
    write_run("b.log", 2, [math.nan] * 3)
    result = call("evaluate.py", "--runs", "a.log", "b.log", "c.log")
    assert "| b   | 2    | 30    | not finite    | not finite" in result.out and "mean" not in result.out
    write_run("b.log", 2, [])
    result = call("evaluate.py", "--runs", "b.log", "a.log", "c.log")
    assert result.err == "warning: b: no validation loss in it yet: left out\n" and "mean" in result.out
    write_run("b.log", 2, [3, 2.2, 2.1], n_steps=60)
    result = call("evaluate.py", "--runs", "a.log", "b.log", "c.log")
    assert "mean" in result.out and "warning: runs of different length, 30 to 60 steps" in result.err
    write_run("none.log", 1, [])
    assert "none.log: no validation loss in it yet" in call("evaluate.py", "--runs", "none.log").err
