"""The quickstart's model, trained as `make quickstart` trains it: about 5 minutes, so only with --real."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from other_programs import chat as in_llama_cpp
from other_programs import start_llama_cpp
from test_world import UNKNOWN, everyday_questions, fact_of, is_fact, plain, told_facts, turns_of

from serving.text_generator import GenerationConfig, load_text_generator

pytestmark = pytest.mark.real("trains for about 5 minutes")

SMALL_TALK = [  # wordings, and what the answer begins with
    (["hello", "Hi!", "hey there!", "Good morning!", "HELLO"], "Hello!"),
    (["你好", "你好呀", "您好！", "嗨", "早上好呀"], "你好！"),
    (["thanks", "Thank you!", "thanks a lot!"], "You are welcome."),
    (["谢谢", "谢谢你！", "多谢"], "不客气。"),
    (["bye", "Goodbye!", "see you soon!"], "Goodbye!"),
    (["再见", "拜拜", "下次见！"], "再见！"),
    (["who are you?", "who are you", "What is your name?", "so what are you?"], "I am Nano"),
    (["你是谁", "你是谁？", "你叫什么名字？", "你是谁呀？"], "我是Nano"),
    (["what can you do?", "help", "What can I ask you?"], "I know the facts"),
    (["你会什么？", "你能做什么", "你会干什么？"], "我知道"),
]
FOLLOW_UPS = {
    "en": ["And its {}?", "What about its {}?", "and the {}?"],
    "zh": ["那它的{}呢？", "它的{}呢？", "{}呢？"],
}
CHINESE = {"capital": "首都", "animal": "动物", "colour": "颜色", "fruit": "水果", "tree": "树"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the quickstart's commands have run."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "dataset").mkdir()
    for name in ("world.py", "everyday.py"):
        shutil.copy(ROOT / "dataset" / name, folder / "dataset")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # all cores
    for command in (
        [folder / "dataset" / "world.py"],
        [ROOT / "data.py", "dataset/pretrain.txt", "dataset/sft.jsonl"],
        [ROOT / "train.py", "-t", "pretrain", "--device", "cpu"],
        [ROOT / "train.py", "-t", "sft", "--device", "cpu"],
    ):
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def chat(folder):
    """chat(question, ...) -> the greedy answers to the questions of one conversation."""
    generator = load_text_generator(str(folder / "checkpoint" / "sft.pt"), "cpu", True)
    config = GenerationConfig(max_length=generator.model.config.block_size, temperature=0.0)

    def chatting(*questions: str) -> list[str]:
        history = []
        for question in questions:
            answer = "".join(generator.answer(question, config, history))
            history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [message["content"] for message in history[1::2]]

    return chatting


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def facts_in_pretraining(folder) -> dict[tuple[str, str], str]:
    return told_facts((folder / "dataset" / "pretrain.txt").read_text(encoding="utf-8").splitlines())


def test_held_out_questions_are_answered(folder, chat):
    held_out = read_jsonl(folder / "dataset" / "held_out.jsonl")
    answers = [chat(sample["question"])[0] for sample in held_out]
    n_right = sum(answer == sample["answer"] for answer, sample in zip(answers, held_out, strict=True))
    assert n_right >= 0.97 * len(held_out)
    assert sum(answer in UNKNOWN for answer in answers) <= 0.02 * len(held_out)


def test_everyday_questions_are_refused(chat):
    answered = [(question, chat(question)[0]) for question in everyday_questions()]
    wrong = [turn for turn in answered if turn[1] not in UNKNOWN]
    assert len(wrong) <= 0.1 * len(answered), wrong


def test_small_talk_is_answered(chat):
    answered = [(wording, chat(wording)[0], start) for wordings, start in SMALL_TALK for wording in wordings]
    wrong = [turn for turn in answered if not turn[1].startswith(turn[2])]
    assert len(wrong) <= 0.1 * len(answered), wrong


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("n_turns", [2, 3])
def test_follow_ups_never_seen_in_training(folder, chat, language, n_turns):
    """Of islands that training asked about: a question, then one or two that say "its"."""
    facts = facts_in_pretraining(folder)
    samples = read_jsonl(folder / "dataset" / "sft.jsonl")
    asked = {plain("".join(question for question, _ in turns_of(sample))) for sample in samples}
    singles = [turns_of(sample)[0] for sample in samples if "question" in sample]
    first = [turn for turn in singles if is_fact(turn[1]) and turn[1].isascii() == (language == "en")]
    first = sorted(turn for turn in first if len(turn[0]) <= 30)  # two turns fit the part of the window that is read
    known = {answer for _, answer in first}
    rng = random.Random(0)
    n_right = n = 0
    while n < 60:
        question, answer = rng.choice(first)
        island = next(name for (name, fact), text in facts.items() if text == answer)
        others = [fact for (name, fact), text in facts.items() if name == island and text in known - {answer}]
        if len(others) < n_turns - 1:
            continue
        chosen = rng.sample(others, n_turns - 1)
        words = [fact if language == "en" else CHINESE[fact] for fact in chosen]
        questions = [question, *(rng.choice(FOLLOW_UPS[language]).format(word) for word in words)]
        if plain("".join(questions)) in asked:
            continue
        n, n_right = n + 1, n_right + (chat(*questions) == [answer, *(facts[island, fact] for fact in chosen)])
    assert n_right >= 0.9 * n


def test_a_fact_is_answered_after_something_unrelated(folder, chat):
    held_out = [sample for sample in read_jsonl(folder / "dataset" / "held_out.jsonl") if fact_of(sample["question"])]
    rng = random.Random(0)
    before = ["hello", "who are you?", "What is 12 + 30?", "How do I cook rice?", "你好", "12加30等于多少？"]
    answers = [chat(rng.choice(before), sample["question"])[1] for sample in held_out]
    n_right = sum(answer == sample["answer"] for answer, sample in zip(answers, held_out, strict=True))
    assert n_right >= 0.9 * len(held_out)


# ------------------------------------------------------------------------------------------------------ elsewhere


@pytest.fixture(scope="module")
def fifty(folder, chat) -> list[tuple[str, str]]:
    """Fifty held-out questions and our greedy answers."""
    held_out = read_jsonl(folder / "dataset" / "held_out.jsonl")[::4]
    return [(sample["question"], chat(sample["question"])[0]) for sample in held_out]


def convert(folder, target: str, *options: str):
    command = [sys.executable, ROOT / "convert.py", "checkpoint/sft.pt", target, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / target


def test_transformers_gives_the_same_answers(folder, fifty):
    transformers = pytest.importorskip("transformers")
    path = convert(folder, "answer")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for question, answer in fifty:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].size(1) :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == answer


@pytest.mark.parametrize(("type_name", "n_equal"), [("float32", 50), ("q8_0", 48)])
def test_llama_cpp_gives_the_same_answers(folder, fifty, type_name, n_equal):
    post = start_llama_cpp(convert(folder, f"{type_name}.gguf", "--type", type_name), 128)
    assert sum(in_llama_cpp(post, question, 60) == answer for question, answer in fifty) >= n_equal
