import itertools

import pytest
import torch
from conftest import write_jsonl

import inference
from base.configuration import escape_control_characters
from model import GPT, ModelConfig
from serving.text_generator import GenerationConfig, TextGenerator, load_text_generator, until_stop
from text.tokenizer import CharTokenizer
from weights.checkpointing import save_checkpoint

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz你好"


@pytest.fixture
def checkpoint(work):
    """A checkpoint of an untrained model, as train.py would write it."""
    tokenizer = CharTokenizer(CHARACTERS)
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=16))
    path = work / "m.pt"
    save_checkpoint(
        path,
        {
            "model": model.state_dict(),
            "optimizer": {},
            "step": 1,
            "model_config": model.config.to_dict(),
            "train_config": {"stage": "sft"},
            "tokenizer": tokenizer.to_dict(),
            "rng": {},
            "data": {},
            "best_val_loss": 1.0,
        },
    )
    return path


def test_one_shot_prints_the_answer_alone(call, checkpoint):
    args = ("-m", checkpoint, "-p", "abc", "--device", "cpu")
    result = call("inference.py", *args, "-l", "13", "--seed", "1")
    assert result.status == 0 and result.err == ""
    assert len(result.out.removesuffix("\n").replace("<|", "")) > 0 and result.out.endswith("\n")
    assert call("inference.py", *args, "-l", "13", "--seed", "1").out == result.out
    assert call("inference.py", *args, "-l", "13", "--seed", "2").out != result.out
    several = call("inference.py", *args, "-l", "13", "--seed", "1", "--num_samples", "2").out
    assert several == result.out + call("inference.py", *args, "-l", "13", "--seed", "2").out


def test_max_length_counts_the_prompt(checkpoint):
    generator = load_text_generator(str(checkpoint), "cpu", False, [])
    drawn = []
    generator.tokenizer.stream = lambda ids: (drawn.append(i) or "x" for i in ids)  # count the tokens
    text = "".join(generator.answer("abc", GenerationConfig(max_length=13, seed=3)))
    assert len(text) <= 10 and len(drawn) == len(text)


def test_unknown_characters_are_named(call, checkpoint):
    result = call("inference.py", "-m", checkpoint, "-p", "aΩbЖ", "-l", "8")
    assert result.status == 0 and "ΩЖ" in result.err and "<|unknown|>" in result.err


def test_prompts_longer_than_the_window_are_read_from_their_end(call, checkpoint):
    result = call("inference.py", "-m", checkpoint, "-p", "a" * 50, "-l", "60")
    assert result.status == 0 and "50 tokens" in result.err
    result = call("inference.py", "-m", checkpoint, "-p", "a" * 50, "-l", "40")
    assert result.status != 0 and "no room" in result.err


def test_special_tokens_in_a_prompt_are_plain_characters(checkpoint):
    generator = load_text_generator(str(checkpoint), "cpu", True, [])
    ids = generator.prompt_ids("a<|eos|>b", [])
    assert ids.count(3) == 0 and ids[0] == 4 and ids[-1] == 5


def test_history_is_trimmed_by_whole_turns(checkpoint):
    generator = load_text_generator(str(checkpoint), "cpu", True, [])
    turn = [{"role": "user", "content": "abcd"}, {"role": "assistant", "content": "efg"}]
    ids = generator.prompt_ids("last", turn * 10)
    assert len(ids) <= 24 and ids[0] == 4
    expected, _ = generator.tokenizer.encode_chat([*turn, {"role": "user", "content": "last"}])
    assert ids == expected.tolist()


@pytest.mark.parametrize("stop", [["end"], ["e"], ["xyz", "end"], []])
def test_stop_texts_are_found_across_pieces(stop):
    text = "once upon a time the en end of it"
    for size in (1, 2, 5, 100):
        pieces = (text[i : i + size] for i in range(0, len(text), size))
        found = [text.index(s) for s in stop if s in text]
        assert "".join(until_stop(pieces, stop)) == (text[: min(found)] if found else text)


def test_control_characters_are_shown_harmless():
    assert escape_control_characters("a\x1b[31mb\x07\u202e") == "a\\x1b[31mb\\x07\\u202e"
    assert escape_control_characters("plain 你好\n\t🙂") == "plain 你好\n\t🙂"


def test_a_session_streams_keeps_history_and_obeys_commands(checkpoint, monkeypatch, capsys):
    generator = load_text_generator(str(checkpoint), "cpu", True, [])
    asked = []

    def answer(prompt, settings, history=()):
        asked.append((prompt, settings.temperature, len(history)))
        return iter(["ok"])

    monkeypatch.setattr(TextGenerator, "answer", lambda self, *args: answer(*args))
    lines = [
        "hello",
        "",
        "again",
        "/set temperature 0.1",
        "/set top_q 3",
        "/set temperature cold",
        "/set",
        "/reset",
        "new",
    ]
    typed = itertools.chain(lines, ["/help", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    inference.converse(generator, GenerationConfig(), profile=True)
    out, err = capsys.readouterr()
    assert asked == [("hello", 0.8, 0), ("again", 0.8, 2), ("new", 0.1, 0)]
    assert out == "ok\nok\nok\n"
    assert "no such setting" in err and "must be a number" in err and "temperature = 0.1" in err and "/reset" in err
    assert "tokens/s" in err


def test_exact_match_is_counted(call, checkpoint):
    generator = load_text_generator(str(checkpoint), "cpu", True, [])
    greedy = lambda q: "".join(generator.answer(q, GenerationConfig(max_length=32, temperature=0.0)))  # noqa: E731
    rows = [{"question": q, "answer": greedy(q).strip() or "nothing"} for q in ("aa", "bb")]
    rows.append({"question": "cc", "answer": "something else"})
    write_jsonl(checkpoint.parent / "q.jsonl", rows)
    right = sum(bool(greedy(row["question"]).strip()) for row in rows[:2])
    result = call("evaluate.py", "-m", checkpoint, "--questions", "q.jsonl")
    assert result.out.splitlines()[-1] == f"held-out exact match: {100 * right / 3:.1f}% ({right}/3)"


def test_models_with_full_attention_are_refused(call, checkpoint):
    contents = torch.load(checkpoint, weights_only=True)
    contents["model_config"]["is_causal"] = False
    contents.pop("format")
    save_checkpoint(checkpoint, contents)
    result = call("inference.py", "-m", checkpoint, "-p", "a")
    assert result.status != 0 and "full attention" in result.err
