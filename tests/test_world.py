import json
import re
import shutil
import string
import subprocess
import sys

import pytest
from conftest import ROOT

from text.tokenizer import CharTokenizer

WORLD = ROOT / "dataset"
UNKNOWN = ("I do not know that.", "这个我不知道。")
FACTS = {"首都": "capital", "动物": "animal", "颜色": "colour", "水果": "fruit", "树": "tree", "国旗": "colour"}
FACTS |= {name: name for name in FACTS.values()} | {"color": "colour"}
ORDINARY = {"ow", "hat", "pell", "many", "letters", "has", "are", "in", "the", "word", "is", "reversed", "does"}
ORDINARY |= {"read", "backwards", "spelled"}
ENGLISH_FACT = re.compile(r"The (capital|animal|colour|fruit|tree) of (\w+) is (?:the )?(\w+)\.")
CHINESE_FACT = re.compile(r"(?<![\u4e00-\u9fff])([\u4e00-\u9fff]{3})的(首都|动物|颜色|水果|树)是([\u4e00-\u9fff]+)。")
SUM = re.compile(r"(?<!\d)(\d+) ?(?:\+|加上|加|与|and|plus) ?(\d+)(?!\d)")


@pytest.fixture(scope="module")
def world():
    sys.path.insert(0, str(WORLD))
    import world

    sys.path.remove(str(WORLD))
    return world.make_world()


def turns_of(sample: dict) -> list[tuple[str, str]]:
    """The (question, answer) turns of a fine-tuning sample."""
    if "question" in sample:
        return [(sample["question"], sample["answer"])]
    contents = [message["content"] for message in sample["messages"]]
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant"] * (len(contents) // 2)
    return list(zip(contents[::2], contents[1::2], strict=True))


def all_turns(samples: list[dict]) -> list[tuple[str, str]]:
    return [turn for sample in samples for turn in turns_of(sample)]


def plain(text: str) -> str:
    """Only what is said: without case, spaces and punctuation."""
    return re.sub(r"[\W_]", "", text.lower())


def told_facts(sentences: list[str]) -> dict[tuple[str, str], str]:
    """(island, fact) -> the statement, as the pretraining text makes it."""
    facts = {}
    for statement in ENGLISH_FACT.finditer(" ".join(sentences)):
        facts[statement[2], statement[1]] = statement[0]
    for statement in CHINESE_FACT.finditer(" ".join(sentences)):
        facts[statement[1], FACTS[statement[2]]] = statement[0]
    return facts


def is_fact(answer: str) -> bool:
    return bool(ENGLISH_FACT.fullmatch(answer) or CHINESE_FACT.fullmatch(answer))


def everyday_questions() -> list[str]:
    lines = (ROOT / "tests" / "everyday_questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines]


# ------------------------------------------------------------------------------------------------------ held out


def test_held_out_questions_occur_nowhere_else(world):
    sentences, samples, held_out = world
    assert len(held_out) == len({sample["question"] for sample in held_out}) == 200
    parts = [part for sentence in sentences for part in re.split(r"<\|\w+\|>", sentence)]  # of conversations, too
    said = "\n".join([*map(plain, parts), *(plain(question) for question, _ in all_turns(samples))])
    for sample in held_out:  # (a word may begin another one)
        assert not re.search(plain(sample["question"]) + "(?![a-z0-9])", said), sample


def test_held_out_facts_are_in_the_pretraining_text_but_in_no_fine_tuning_sample(world):
    sentences, samples, held_out = world
    text = " ".join(sentences)
    facts = [sample["answer"] for sample in held_out if is_fact(sample["answer"])]
    assert len(facts) == 80
    answered = {answer for _, answer in all_turns(samples)}
    for fact in facts:
        assert fact in text and fact not in answered


def test_held_out_sums_and_words_occur_nowhere(world):
    sentences, samples, held_out = world
    text = "\n".join([*sentences, *(question for question, _ in all_turns(samples))])
    told = {frozenset(pair) for pair in SUM.findall(text)}
    words = set(re.findall(r"(?<![a-z])[a-z]{3,5}(?![a-z])", text.lower()))
    checked = 0
    for sample in held_out:
        if not is_fact(sample["answer"]):
            pair = SUM.search(sample["question"])
            subject = [word for word in re.findall(r"[a-z]+", sample["question"]) if word not in ORDINARY]
            assert pair or len(subject) == 1, sample
            assert frozenset(pair.groups()) not in told if pair else subject[0] not in words
            checked += 1
    assert checked == 120 and len(told) > 2000


# ------------------------------------------------------------------------------------------------------ answers


def test_answers_are_right(world):
    """Sums and words, wherever they are asked; a refusal is right for numbers of more than two digits."""
    _, samples, held_out = world
    n_sums = n_words = n_refused = 0
    for question, answer in all_turns([*samples, *held_out]):
        if pair := SUM.search(question):
            if max(map(len, pair.groups())) > 2:
                assert answer in UNKNOWN
                n_refused += 1
                continue
            assert re.findall(r"\d+", answer)[-1] == str(int(pair[1]) + int(pair[2])), question
            n_sums += 1
        elif match := re.search(r"(?:word |[Ss]pell |拼写|单词)([a-z]+)", question):
            word = match[1]
            if answer not in UNKNOWN:
                assert answer in (word[::-1], "-".join(word), str(len(word))), question
                n_words += 1
    assert n_sums > 900 and n_words > 1000 and n_refused > 20


def fact_of(text: str) -> str | None:
    """The fact that a question or a statement is about."""
    return next((FACTS[word] for word in FACTS if word in text.lower()), None)


def expected_answers(question: str, before: list[tuple[str, str]], facts: dict) -> set[str]:
    """The statement about the island and the fact that the question names, or else those last spoken of.

    "Tell me about Zupin." names no fact and does not refer back: any fact of the island will do.
    """
    said = [*(text for turn in before for text in turn), question]
    names = {island for island, _ in facts}
    named = [name for text in said for name in names if re.search(rf"(?<![a-z]){name}(?![a-z])", text, re.IGNORECASE)]
    refers_back = re.search(r"\b(and|what about|how about)\b|呢", question.lower())
    fact = fact_of(question) or (fact_of(before[-1][1]) if refers_back and before else None)
    return {facts[named[-1], name] for name in ([fact] if fact else set(FACTS.values()))}


def test_every_answer_about_an_island_is_what_the_pretraining_text_states(world):
    sentences, samples, held_out = world
    facts = told_facts(sentences)
    assert len(facts) == 2 * 28 * 5
    n_single = n_later = 0
    for sample in [*samples, *held_out]:
        turns = turns_of(sample)
        for n, (question, answer) in enumerate(turns):
            if is_fact(answer):
                assert answer in expected_answers(question, turns[:n], facts), turns
                n_single, n_later = n_single + (n == 0), n_later + (n > 0)
    assert n_single > 1500 and n_later > 1000


def test_no_answerable_question_is_refused(world):
    """A refused question names no island together with one of its facts, and no sum of two-digit numbers."""
    sentences, samples, _ = world
    facts = told_facts(sentences)
    islands = {island.lower() for island, _ in facts}
    n_refused = 0
    for question, answer in all_turns(samples):
        if answer in UNKNOWN:
            n_refused += 1
            assert answer == UNKNOWN[bool(re.search(r"[\u4e00-\u9fff]", question))]
            names_island = any(re.search(rf"(?<![a-z]){i}(?![a-z])", question.lower()) for i in islands)
            names_fact = any(re.search(rf"(?<![a-z]){fact}(?![a-z])", question.lower()) for fact in FACTS)
            assert not (names_island and names_fact), question
            pair = SUM.search(question)
            assert not pair or max(map(len, pair.groups())) > 2, question
    assert n_refused > 3000


def test_a_question_has_one_answer(world):
    _, samples, held_out = world
    answers = {}
    for sample in [*samples, *held_out]:
        if "question" in sample:
            assert answers.setdefault(sample["question"], sample["answer"]) == sample["answer"]


# ------------------------------------------------------------------------------------------------------ everyday


def test_everyday_questions_occur_in_no_training_file(world):
    sentences, samples, _ = world
    questions = everyday_questions()
    assert len(questions) == len(set(questions)) == 50
    said = "\n".join([*map(plain, sentences), *(plain(question) for question, _ in all_turns(samples))])
    for question in questions:
        assert plain(question) not in said, question


def test_the_vocabulary_has_what_people_type(world):
    sentences, samples, _ = world
    vocabulary = set("".join([*sentences, *(text for turn in all_turns(samples) for text in turn)]))
    assert vocabulary >= set(string.printable.strip())
    assert len([character for character in vocabulary if "\u4e00" <= character <= "\u9fff"]) > 1600
    typed = set("".join(everyday_questions()))
    assert len(typed - vocabulary) <= 0.03 * len(typed), typed - vocabulary


def test_conversations_fit_the_window(world):
    _, samples, _ = world
    block_size = json.loads((ROOT / "config" / "model.json").read_text())["block_size"]
    tokenizer = CharTokenizer.train(text for turn in all_turns(samples) for text in turn)
    longest = 0
    for sample in samples:
        messages = [
            {"role": role, "content": content}
            for turn in turns_of(sample)
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        longest = max(longest, len(tokenizer.encode_chat(messages)[0]))
    assert longest <= block_size


def test_conversations_have_two_turns_and_more(world):
    _, samples, _ = world
    lengths = [len(turns_of(sample)) for sample in samples]
    assert lengths.count(2) > 500 and lengths.count(3) > 300


# ------------------------------------------------------------------------------------------------------ the script


@pytest.fixture
def script(tmp_path):
    """Run a copy of world.py: script("--help") -> the finished process."""
    for name in ("world.py", "everyday.py"):
        shutil.copy(WORLD / name, tmp_path)

    def running(*argv):
        command = [sys.executable, "-B", tmp_path / "world.py", *argv]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")

    return running


def test_the_files_are_the_same_every_time_and_nothing_else_is_overwritten(tmp_path, script):
    assert script().returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert script().returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    assert json.loads((tmp_path / "sft.jsonl").read_text(encoding="utf-8").splitlines()[0])
    (tmp_path / "pretrain.txt").write_text("my own text", encoding="utf-8")
    done = script()
    assert done.returncode != 0 and "pretrain.txt" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "pretrain.txt").read_text(encoding="utf-8") == "my own text"


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_writes_nothing(tmp_path, script, argument):
    done = script(argument)
    assert done.returncode == 0 and "python dataset/world.py" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["everyday.py", "world.py"]


def test_an_unknown_argument_is_one_line(tmp_path, script):
    done = script("--seed", "3")
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "--seed" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["everyday.py", "world.py"]
