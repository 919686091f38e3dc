import importlib.util
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

ORDINARY = {"ow", "hat", "pell", "many", "letters", "has", "are", "in", "the", "word", "is", "reversed", "does"}
ORDINARY |= {"read", "backwards", "spelled"}


@pytest.fixture(scope="module")
def world():
    spec = importlib.util.spec_from_file_location("world", ROOT / "dataset" / "world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_world()


def test_held_out_questions_occur_nowhere_else(world):
    sentences, asked, held_out = world
    assert len(held_out) == len({sample["question"] for sample in held_out}) == 200
    assert not {sample["question"] for sample in held_out} & {sample["question"] for sample in asked}
    assert not any("?" in sentence or "？" in sentence for sentence in sentences)


def test_held_out_facts_are_in_the_pretraining_text_but_in_no_fine_tuning_sample(world):
    sentences, asked, held_out = world
    text = " ".join(sentences)
    facts = [s["answer"] for s in held_out if re.match(r"The |.*(首都|动物|颜色|水果|乐器)是", s["answer"])]
    assert len(facts) == 80
    answered = {sample["answer"] for sample in asked}
    for fact in facts:
        assert fact in text and fact not in answered


def test_held_out_sums_and_words_occur_nowhere(world):
    sentences, asked, held_out = world
    text = "\n".join([*sentences, *(sample["question"] for sample in asked)])
    told = {frozenset(pair) for pair in re.findall(r"(\d\d)(?: \+ |加|与| and )(\d\d)(?!\d)", text)}
    words = set(re.findall(r"(?<![a-z])[a-z]{3,5}(?![a-z])", text.lower()))
    checked = 0
    for sample in held_out:
        if not re.match(r"The |.*(首都|动物|颜色|水果|乐器)是", sample["answer"]):
            pair = re.search(r"(\d\d)(?: \+ |加|与| and )(\d\d)", sample["question"])
            subject = [word for word in re.findall(r"[a-z]+", sample["question"]) if word not in ORDINARY]
            assert pair or len(subject) == 1, sample
            assert frozenset(pair.groups()) not in told if pair else subject[0] not in words
            checked += 1
    assert checked == 120 and len(told) > 2000


def test_answers_are_right(world):
    _, asked, held_out = world
    for sample in [*asked, *held_out]:
        question, answer = sample["question"], sample["answer"]
        if pair := re.search(r"(\d\d)(?: \+ |加|与| and )(\d\d)", question):
            assert re.findall(r"\d+", answer)[-1] == str(int(pair[1]) + int(pair[2]))
        elif match := re.search(r"(?:word |Spell |拼写|单词)([a-z]+)", question):
            word = match[1]
            assert answer in (word[::-1], "-".join(word), str(len(word)))


def test_the_files_are_the_same_every_time_and_nothing_else_is_overwritten(tmp_path):
    (tmp_path / "world.py").write_text((ROOT / "dataset" / "world.py").read_text(encoding="utf-8"), encoding="utf-8")

    def write():
        return subprocess.run([sys.executable, tmp_path / "world.py"], capture_output=True, text=True)

    assert write().returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert write().returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    assert json.loads((tmp_path / "sft.jsonl").read_text(encoding="utf-8").splitlines()[0])
    (tmp_path / "pretrain.txt").write_text("my own text", encoding="utf-8")
    done = write()
    assert done.returncode != 0 and "pretrain.txt" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "pretrain.txt").read_text(encoding="utf-8") == "my own text"
