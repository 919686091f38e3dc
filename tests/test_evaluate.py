"""Exact match of answers; perplexity by position: against slow versions, and their refusals."""

import gzip
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, FAST, TINY, is_harmless, make_text, write_jsonl
from test_inference import CHARACTERS, answer, save_model

import evaluate
from model import GPT, ModelConfig
from serving.text_generator import TextGenerator, load_text_generator
from text.tokenizer import SPECIAL_TOKENS, CharTokenizer
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
    expected = "".join(chat.answer("cc", evaluate.GenerationConfig(temperature=0.0), history[:-1]))
    rows.append({"messages": [*history, {"role": "assistant", "content": expected}]})
    result = ask(call, rows)
    assert all(row.get("answer", "x").strip() and expected.strip() for row in rows)
    assert result.out.splitlines()[-1] == "held-out exact match: 75.0% (3/4)" and result.err == ""
    wrong = [line for line in result.out.splitlines() if line.startswith("wrong: ")]
    said = json.dumps(answer(chat, "cc"), ensure_ascii=False)
    assert wrong == [f'wrong: "cc" -> {said}, expected "something else"']
    assert "wrong" not in ask(call, rows, "--show", "0").out


def test_a_question_that_is_too_long_is_named_and_wrong(call, chat):
    rows = [pair("aa", answer(chat, "aa")), pair("c" * 40, "d"), pair("bb", answer(chat, "bb"))]
    result = ask(call, rows)
    assert result.status == 0 and result.out == "held-out exact match: 66.7% (2/3)\n"
    assert "line 2: wrong, not answered: the question has 42 tokens" in result.err


def test_unknown_characters_are_named(call, chat):
    result = ask(call, [pair("aΩ", "b"), pair("bЖ", "cΩ"), pair("c\r\n", "d")])
    notes = result.err.splitlines()
    assert len(notes) == 2 and notes[0] == "in the questions: not in the vocabulary, read as <|unknown|>: ΩЖ"
    assert "not in the vocabulary" in notes[1] and notes[1].endswith(": 1")


def test_ctrl_c_says_what_was_right_so_far(call, chat, monkeypatch):
    rows = [pair("aa", answer(chat, "aa")), pair("bb", "x"), pair("cc", "x"), pair("dd", "x")]
    answers = TextGenerator.answer

    def interrupted(self, prompt, *args):
        if prompt == "dd":
            raise KeyboardInterrupt
        return answers(self, prompt, *args)

    monkeypatch.setattr(TextGenerator, "answer", interrupted)
    result = ask(call, rows)
    assert result.status == 130
    assert result.out.splitlines()[-1] == "stopped after 3 of 4 questions: 33.3% right (1/3)"


def test_wrong_answers_are_exact_in_a_pipe_and_harmless_in_a_terminal(call, chat, monkeypatch):
    strange = "a\x9b\u202e\u200d"
    monkeypatch.setattr(TextGenerator, "answer", lambda *_: iter(strange))
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
    assert ask(call, rows, "--limit", "2").out == "held-out exact match: 100.0% (2/2)\n"
    assert ask(call, rows, "--limit", "9").out.endswith(" 66.7% (2/3)\n")


def test_questions_are_read_as_data_py_reads_them(call, chat, work):
    question = "今天天气怎么样？你叫什么名字"
    said = answer(chat, question)
    for encoding in ("gb18030", "utf-16"):
        text = json.dumps({"Q": question, "A": said}, ensure_ascii=False) + "\n"
        (work / "q.jsonl.gz").write_bytes(gzip.compress((text * 9).encode(encoding)))
        command = ("evaluate.py", "-m", "m.pt", "--questions", "q.jsonl.gz", "--fields", "question=Q", "answer=A")
        refused = call(*command)
        assert refused.status == 1 and f"--encoding {encoding}\n" in refused.err
        assert call(*command, "--encoding", encoding).out == "held-out exact match: 100.0% (9/9)\n"
    unnamed = call(*command[:-3], "--encoding", "utf-16")
    assert unnamed.status == 1 and "--fields question=NAME answer=NAME" in unnamed.err
    assert "--plain_text" not in unnamed.err
    unknown = call(*command, "--encoding", "utf-16", "--fields", "question=Q", "answer=A", "system=S")
    assert unknown.status == 1 and "no record of the first ones has a field 'S'" in unknown.err


# ------------------------------------------------------------------------------------------------------ perplexity


def test_it_is_the_loss_of_every_position():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=20, block_size=6, n_layer=1, n_head=2, n_embd=16)).eval()
    ids = np.random.default_rng(0).integers(0, 20, 29)
    found = evaluate.loss_by_position(model, ids, 4, batch_size=3)
    starts = [0, 7, 14, 22]
    for position in range(6):
        losses = []
        for start in starts:
            seen = torch.tensor(ids[start : start + position + 1])[None]
            losses.append(-model(seen)[0][0, -1].log_softmax(-1)[ids[start + position + 1]].item())
        assert found[position] == pytest.approx(np.mean(losses), rel=1e-4)
    more = evaluate.loss_by_position(model, ids, 9)  # than the text holds
    assert more.tolist() == pytest.approx(found.tolist(), rel=1e-4)


def test_the_table_says_perplexity_and_ends_with_the_whole(call, work):
    """One window of the whole text: its loss by the model itself."""
    model = load_model(load_checkpoint(save_model(work / "m.pt")), "m.pt").eval()
    (work / "t.txt").write_text("abc 你\n" * 6, encoding="utf-8")
    ids = torch.from_numpy(CharTokenizer(CHARACTERS).encode("abc 你\n" * 6)[:33].astype(np.int64))[None]
    loss = model(ids[:, :-1], ids[:, 1:])[1].item()
    result = call("evaluate.py", "t.txt", "-m", "m.pt", "--windows", "1", "--scaling", "yarn")
    lines = result.out.splitlines()
    assert result.err == "" and [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "positions",
        "perplexity",
        "perplexity, yarn",
    ]
    assert lines[-3] == "perplexity.png"
    assert lines[-2] == f"overall: loss {loss:.4f}, perplexity {math.exp(loss):.2f}"
    assert lines[-1].startswith("overall, yarn: loss ")


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
    assert refused.status == 1 and "gbk.txt: not UTF-8 text: byte 0xc4 at 4; it looks like gb18030" in refused.err
    assert overall(call, "gbk.txt", "--encoding", refused.err.split("--encoding ")[1].strip()) == expected
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
    ids, characters = evaluate.read_ids(evaluate.find_sources(["joined.txt"])[0], CharTokenizer(CHARACTERS))
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
    }
    for argv, words in refusals.items():
        result = call("evaluate.py", *argv)
        assert result.status == 1 and words in result.err and "Traceback" not in result.err, result.err
