import io
import itertools
import os
import pty
import subprocess
import sys

import pytest
import torch
from conftest import is_harmless, start_script

import inference
from base.configuration import UserError, escape_control_characters
from model import GPT, ModelConfig
from serving.text_generator import GenerationConfig, TextGenerator, load_text_generator, until_stop
from text.tokenizer import CharTokenizer
from weights import lora
from weights.checkpointing import load_checkpoint, save_checkpoint

CHARACTERS = "\n ./abcdefghijklmnopqrstuvwxyz你好"


def save_model(path, characters=CHARACTERS, **extra):
    """A checkpoint of an untrained model, as train.py would write it."""
    tokenizer = CharTokenizer(characters)
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=16))
    values = {
        "model": model.state_dict(),
        "optimizer": {},
        "step": 1,
        "model_config": model.config.to_dict(),
        "train_config": {"stage": "sft"},
        "tokenizer": tokenizer.to_dict(),
        "rng": {},
        "data": {},
        "best_val_loss": 1.0,
    }
    save_checkpoint(path, values)
    return path


@pytest.fixture
def checkpoint(work):
    return save_model(work / "m.pt")


@pytest.fixture
def chat(checkpoint):
    return load_text_generator(str(checkpoint), "cpu", True)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def answer(generator, prompt, **settings):
    """The whole greedy answer."""
    return "".join(generator.answer(prompt, GenerationConfig(temperature=0.0, **settings)))


def test_one_shot_prints_the_answer_alone(call, checkpoint):
    args = ("-m", checkpoint, "-p", "abc", "--device", "cpu")
    result = call("inference.py", *args, "-l", "13", "--seed", "1")
    assert result.status == 0 and result.err == ""
    assert len(result.out.removesuffix("\n").replace("<|", "")) > 0 and result.out.endswith("\n")
    assert call("inference.py", *args, "-l", "13", "--seed", "1").out == result.out
    assert call("inference.py", *args, "-l", "13", "--seed", "2").out != result.out
    several = call("inference.py", *args, "-l", "13", "--seed", "1", "--num_samples", "2")
    assert several.out == result.out + call("inference.py", *args, "-l", "13", "--seed", "2").out
    assert several.err == "answer 1 of 2:\nanswer 2 of 2:\n"


def test_max_length_counts_the_prompt(checkpoint):
    generator = load_text_generator(str(checkpoint), "cpu", False)
    for length in (4, 13):
        drawn = []
        text = "".join(generator.answer("abc", GenerationConfig(max_length=length, seed=3), drawn=drawn))
        assert len(drawn) == length - 3 and text == generator.tokenizer.decode(drawn)


def test_an_answer_ends_before_its_eos(chat, monkeypatch):
    drawn = iter([8, 3, 9])  # a character, <|eos|>, and what must not be read
    monkeypatch.setattr(GPT, "generate", lambda *_, **__: (torch.tensor([token]) for token in drawn))
    counted = []
    assert "".join(chat.answer("a", GenerationConfig(), drawn=counted)) == chat.tokenizer.decode([8])
    assert counted == [8, 3] and next(drawn) == 9


def test_every_sampling_setting_reaches_the_model(chat, monkeypatch):
    asked = {}
    monkeypatch.setattr(GPT, "generate", lambda *_, **settings: asked.update(settings) or iter(()))
    settings = {"temperature": 0.3, "top_k": 4, "top_p": 0.7, "min_p": 0.2, "repetition_penalty": 1.5, "seed": 0}
    assert list(chat.answer("a", GenerationConfig(**settings))) == []
    of_diffusion = {"denoising_steps": None, "block": 32, "fills_window": False}
    assert asked == {**settings, "stop_tokens": (3,), "step": None, "drafter": None, **of_diffusion, "images": None}


def test_answers_are_without_dropout(checkpoint, work):
    """Also after an adapter was taken in and out."""
    contents = load_checkpoint(checkpoint)
    contents["model_config"]["dropout"] = 0.9
    save_checkpoint("dropping.pt", contents)
    generator = load_text_generator("dropping.pt", "cpu", True)
    expected = answer(load_text_generator(str(checkpoint), "cpu", True), "ab")
    assert answer(generator, "ab") == expected
    generator.use_adapter("")
    assert answer(generator, "ab") == expected


def test_merging_overwrites_nothing(call, checkpoint):
    before = checkpoint.read_bytes()
    result = call("inference.py", "-m", checkpoint, "--lora", checkpoint, "--merge", checkpoint)
    assert result.status == 1 and "exists already" in result.err and checkpoint.read_bytes() == before


def test_the_profile_counts_the_tokens_that_were_drawn(call, checkpoint):
    """Not those of the text: special tokens have many characters in it, and <|eos|> has none."""
    args = ("-m", checkpoint, "-p", "abc", "--seed", "1")
    assert "<|" in call("inference.py", *args).out
    assert call("inference.py", *args, "--profile").err.startswith("20 tokens, ")


def test_unknown_characters_are_named(call, checkpoint):
    result = call("inference.py", "-m", checkpoint, "-p", "aΩb\u200cЖ", "-l", "8")
    assert result.status == 0 and result.err == "not in the vocabulary, read as <|unknown|>: Ω\\u200cЖ\n"


def test_a_prompt_longer_than_the_window_is_read_from_its_end(call, checkpoint):
    ask = ("-m", checkpoint, "-t", "0", "-p")
    for n in (32, 50):
        result = call("inference.py", *ask, "b" * n + "a" * 23)
        assert result.status == 0 and f"{n + 23} tokens" in result.err and "newest 24" in result.err
        assert result.out == call("inference.py", *ask, "b" + "a" * 23).out
    assert call("inference.py", *ask, "a" * 31).err == ""
    asked = call("inference.py", *ask, "a" * 50, "-l", "60")
    assert asked.status == 0 and "50 tokens" in asked.err and "newest 32" in asked.err
    refused = call("inference.py", *ask, "a" * 50, "-l", "40")
    assert refused.status == 1 and "50 tokens" in refused.err and "-l" in refused.err and "above 50" in refused.err
    assert call("inference.py", *ask, "a" * 50, "-l", "51").status == 0  # as the error advises
    refused = call("inference.py", "-i", *ask, "a" * 50)
    assert refused.status == 1 and "52 tokens" in refused.err and "window 32" in refused.err
    refused = call("inference.py", "-i", *ask, "a" * 20, "--system", "b" * 20)
    assert refused.status == 1 and "question with its system message has 43 tokens" in refused.err


@pytest.mark.parametrize("length", [20, 32, 33, 100])
def test_a_question_longer_than_the_window_is_refused_whatever_max_length_is(call, checkpoint, length):
    ask = ("-i", "-m", checkpoint, "-l", length)
    for extra in ((), ("--system", "be kind")):
        result = call("inference.py", *ask, "-p", "a" * 40, *extra)
        assert result.status == 1 and result.out == "" and "window 32: shorten it" in result.err, result
    assert call("inference.py", "-i", "-m", checkpoint, "-l", "100", "-p", "a" * 29).status == 0


def test_a_long_text_gets_the_same_warning_with_and_without_max_length(call, checkpoint):
    ask = ("-m", checkpoint, "-p", "a" * 50)
    for argv, n in ((ask, 24), ((*ask, "-l", "60"), 32)):
        assert call("inference.py", *argv).err == f"warning: the prompt has 50 tokens; the model reads the newest {n}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-p", "a", "--system", "b"], ["--system", "add -i"]),
        (["--num_samples", "2"], ["--num_samples", "add -p"]),
        (["-p", "a", "--stop", ""], ["--stop", "empty"]),
        (["-p", "a", "--merge", "new.pt", "--lora", "x.pt"], ["--merge", "leave out --prompt\n"]),
        (
            ["--merge", "x.pt", "--lora", "x.pt", "-i", "--system", "s", "--stop", "a", "-t", "0", "--device", "cpu"],
            ["leave out --instruct, --system, --stop, --device, --temperature\n"],
        ),
        (["--merge", "x.pt"], ["--merge", "--lora FILE"]),
        (["-p", "a", "--encoding", "gbk"], ["--encoding", "leave it out"]),
        (["-p", "a", "--temp", "1"], ["--temp", 'did you mean "--temperature"']),
        (["-p", "a", "--max", "9"], ["--max", 'did you mean "--max_length"']),
        (["-p", "a", "-l", "many"], ["max_length must be an integer", "many"]),
    ],
)
def test_options_that_would_have_no_effect_are_refused(call, checkpoint, argv, words):
    result = call("inference.py", "-m", checkpoint, *argv)
    assert result.status == 1 and result.out == "" and result.err.startswith("error: command line: ")
    assert all(word in result.err for word in words), result.err


def test_special_tokens_in_a_prompt_are_plain_characters(chat):
    ids = chat.prompt_ids("a<|eos|>b")
    assert ids.count(3) == 0 and ids[0] == 4 and ids[-1] == 5


@pytest.mark.parametrize("text", ["\ufeffa\nb\nc", "a\r\nb\r\nc", "a\rb\rc", "\ufeffa\rb\r\nc"])
def test_line_ends_and_byte_order_marks_make_no_difference(checkpoint, chat, text):
    plain = "a\nb\nc"
    for generator in (chat, load_text_generator(str(checkpoint), "cpu", False)):
        assert generator.prompt_ids(text) == generator.prompt_ids(plain)
    assert chat.prompt_ids("d", [system(text), user(text), said(text)]) == chat.prompt_ids(
        "d", [system(plain), user(plain), said(plain)]
    )


TURN = [user("abcd"), said("efg")]  # 10 tokens
TRIMMED = {  # history -> what is kept of it, with the question "last" (6 tokens) in 24 tokens of 32
    "two turns fit no more": ([*TURN, *TURN], TURN),
    "many turns": (TURN * 10, TURN),
    "the system message stays": ([system("sys"), *TURN, *TURN], [system("sys"), *TURN]),
    "and takes the room of a turn": ([system("the system"), *TURN, *TURN], [system("the system")]),
    "later ones too": ([*TURN, system("ab"), *TURN, *TURN], [system("ab"), *TURN]),
    "an answer goes with its question": ([user("abcdefghij"), said("a"), said("b"), *TURN], TURN),
    "a question without an answer": ([user("abcdefghij"), *TURN], TURN),
    "an answer before the first question": ([said("welcome"), *TURN, *TURN], TURN),
}


@pytest.mark.parametrize(("history", "kept"), TRIMMED.values(), ids=TRIMMED.keys())
def test_history_is_trimmed_by_whole_turns(chat, history, kept):
    expected, _ = chat.tokenizer.encode_chat([*kept, user("last")])
    assert chat.prompt_ids("last", history) == expected.tolist()
    assert len(chat.tokenizer.encode_chat([*history, user("last")])[0]) > 24 >= len(expected)


def test_a_smaller_max_length_trims_more(chat):
    assert chat.prompt_ids("last", TURN, max_length=18) == chat.prompt_ids("last")
    with pytest.raises(UserError, match="above 6"):
        chat.prompt_ids("last", TURN, max_length=6)


@pytest.mark.parametrize("stop", [["end"], ["e"], ["xyz", "end"], [], ["abcd", "c"], ["aab"], ["ab", "aab", "b"]])
def test_stop_texts_are_found_however_the_text_is_cut(stop):
    for text in ("the end", "xxabcx", "xxabcde", "xabab", "aaab", "abc", "eend"):
        found = [text.index(s) for s in stop if s in text]
        expected = text[: min(found)] if found else text
        for cuts in itertools.product((False, True), repeat=len(text) - 1):
            pieces = "".join(c + "|" * cut for c, cut in itertools.zip_longest(text, cuts, fillvalue=False)).split("|")
            assert "".join(until_stop(iter(pieces), stop)) == expected, pieces


def test_text_is_not_held_back_longer_than_it_must_be():
    shown = []
    for piece in until_stop((shown.append("read " + c) or c for c in "xabz"), ["abc"]):
        shown.append(piece)
    assert shown == ["read x", "x", "read a", "read b", "read z", "abz"]


def test_what_a_terminal_obeys_is_escaped_and_nothing_else():
    assert escape_control_characters("a\x1b[31mb\x07\u202e\r") == "a\\x1b[31mb\\x07\\u202e\\r"
    deprecated = set(range(0x206A, 0x2070))  # controls that Unicode advises against
    for code in set(range(sys.maxunicode + 1)) - deprecated:
        c = chr(code)
        assert (escape_control_characters(c) == c) == is_harmless(c), hex(code)
        assert escape_control_characters(c).isprintable() or is_harmless(c)
    for text in ("plain 你好\n\t🙂", "می\u200cخواهم", "क्\u200dष", "👩\u200d👩\u200d👧", "❤\ufe0f", "a\u200fb"):
        assert escape_control_characters(text) == text


STRANGE = "ab\r\x1b\x07\x9b\u200c\u200d\u2028\u202e\u2066👩\U000e0041"


def test_a_terminal_gets_no_control_characters_and_a_pipe_the_exact_answer(call, work, monkeypatch):
    args = ("-m", save_model(work / "m.pt", STRANGE), "-p", "ab", "-t", "5", "--seed", "4", "-l", "200")
    generator = load_text_generator("m.pt", "cpu", False)
    exact = "".join(generator.answer("ab", GenerationConfig(temperature=5.0, seed=4, max_length=200)))
    assert set(STRANGE) <= set(exact)
    assert call("inference.py", *args).out == exact + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = call("inference.py", *args).out
    assert all(map(is_harmless, shown)) and "\u200d" in shown and "\\x1b" in shown


class Pipe(io.BytesIO):
    """Bytes that come a few at a time."""

    def __init__(self, contents, n):
        super().__init__(contents)
        self.n = n

    def read1(self, size=-1):
        return super().read1(self.n)


@pytest.fixture
def piped(call, monkeypatch):
    """Run inference.py with bytes on its standard input."""

    def asking(contents: bytes, *argv, at_once=1 << 16):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Pipe(contents, at_once)))
        return call("inference.py", *argv)

    return asking


def test_every_piped_line_gets_one_answer(piped, checkpoint, chat):
    args = ("-i", "-m", checkpoint, "-t", "0", "--stop", "\n")
    chat.stop = ["\n"]
    expected = "".join(answer(chat, text) + "\n" for text in ("ab", "cd"))
    for contents in (b"ab\ncd\n", b"ab\ncd", b"ab\r\ncd\r\n", b"ab\rcd\r", b"\xef\xbb\xbfab\r\ncd\r\n"):
        for at_once in (1, 3, 1 << 16):
            assert piped(contents, *args, at_once=at_once) == (0, expected, ""), contents


def test_a_piped_line_that_is_refused_or_blank_does_not_shift_the_answers(piped, checkpoint, chat):
    args = ("-i", "-m", checkpoint, "-t", "0", "--stop", "\n")
    chat.stop = ["\n"]
    result = piped("ab\n{}\n\n /quit\n/set\nüb\n".format("c" * 40).encode(), *args)
    answers = [answer(chat, "ab"), "", "", *(answer(chat, text) for text in (" /quit", "/set", "üb"))]
    assert result.out == "".join(text + "\n" for text in answers)
    errors = result.err.splitlines()
    assert result.status == 1 and len(errors) == 4
    assert "line 2: the question has 42 tokens" in errors[0] and errors[2].startswith("line 6: not in the vocabulary")
    assert errors[1] == "line 5: read as text: /set is a command in a terminal alone"
    assert errors[3] == "error: 1 of 6 lines got no answer"
    several = piped(b"a" * 40 + b"\n" + b"b" * 40 + b"\n", "-m", checkpoint)
    assert [line.split(": the")[0] for line in several.err.splitlines()] == ["warning: line 1", "warning: line 2"]


ASKED = "你好 ab\n\n你 cd ef\n好\n"


def test_piped_questions_in_another_encoding_are_refused_with_advice_that_works(piped, checkpoint):
    args = ("-i", "-m", checkpoint, "-t", "0")
    expected = piped(ASKED.encode(), *args)
    assert expected.status == 0 and expected.err == "" and len(expected.out) > 8
    for encoding, marks in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff"), ("gb18030", b"")):
        contents = marks + ASKED.replace("\n", "\r\n").encode(encoding)
        refused = piped(contents, *args)
        assert refused.status == 1 and refused.out == "" and "standard input: not UTF-8 text" in refused.err
        advised = refused.err.split("--encoding ")[1].strip() if marks else encoding  # too short to tell gb18030
        assert advised == ("utf-16" if marks else encoding)
        for at_once in (1, 3, 1 << 16):
            assert piped(contents, *args, "--encoding", advised, at_once=at_once) == expected
    for encoding in ("utf-16-le", "utf-16-be"):  # without a mark
        refused = piped("ab\ncd\n".encode(encoding), *args)
        assert refused.status == 1 and refused.out == "" and f"--encoding {encoding}\n" in refused.err
        assert piped("ab\ncd\n".encode(encoding), *args, "--encoding", encoding).status == 0
    assert "no such encoding" in piped(b"ab\n", *args, "--encoding", "gbq").err
    for asked, contents, advice in (
        ("utf-16", "ab\ncd\n".encode("utf-16-le"), "looks like utf-16-le: --encoding utf-16-le"),
        ("utf-16", b"ab\ncd\n", "it is UTF-8: leave out --encoding"),
        ("utf-16", "你好\n".encode(), "it is UTF-8: leave out --encoding"),
        ("utf32", "ab\n".encode("utf-32-le"), "--encoding utf-32-le and utf-32-be take one without"),
    ):
        refused = piped(contents, *args, "--encoding", asked)
        assert refused.status == 1 and refused.out == "" and advice in refused.err and refused.err.count("\n") == 1


def test_the_encoding_of_a_real_pipe_is_named(checkpoint):
    process = start_script("inference.py", "-i", "-m", checkpoint, cwd=checkpoint.parent, stdin=subprocess.PIPE)
    process.stdin.buffer.write("今天天气怎么样？\n你叫什么名字？\n".encode("gbk"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == ""
    assert err == "error: standard input: not UTF-8 text: byte 0xbd at 0; it looks like gb18030: --encoding gb18030\n"


def test_piped_bytes_that_are_no_text_are_refused(piped, checkpoint):
    args = ("-i", "-m", checkpoint, "-t", "0")
    for contents in (b"ab\0\ncd\n", b"%PDF-1.4\xff\0", "ab\n你".encode()[:-1], b"ab\nc\x80d\n"):
        result = piped(contents, *args)
        assert result.status == 1 and result.err.startswith("error: standard input: "), result
        assert result.err.count("\n") == 1


def test_a_byte_order_mark_is_removed_from_the_first_piped_line(piped, checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(TextGenerator, "answer", lambda self, prompt, *_: iter(asked.append(prompt) or ["ok"]))
    result = piped(b"\xef\xbb\xbf\r\na\n\xef\xbb\xbfb", "-i", "-m", checkpoint)
    assert result.out == "\nok\nok\n" and asked == ["a", "\ufeffb"]


def type_lines(monkeypatch, lines):
    typed = iter(lines)

    def read(*_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_a_session_streams_keeps_history_and_obeys_commands(chat, monkeypatch, capsys):
    asked = []

    def fake(self, prompt, settings, history=(), drawn=None, image=None):
        asked.append((prompt, settings.temperature, [m["content"] for m in history]))
        return iter(["ok"])

    monkeypatch.setattr(TextGenerator, "answer", fake)
    lines = [
        "hello",
        "",
        "again",
        "/set temperature 0.1",
        "/set top_q 3",
        "/set temperature cold",
        "/set top_k",
        "/set",
    ]
    lines += [
        "/system be kind",
        "kind",
        "/reset",
        "new",
        "/system",
        "//bin is what",
        "/bin is what",
        "/rest",
        "/",
        "//",
    ]
    type_lines(monkeypatch, [*lines, "/help", "/quit", "never"])
    inference.converse(inference.Session(chat, GenerationConfig(), "", True))
    out, err = capsys.readouterr()
    talk = ["hello", "ok", "again", "ok"]
    assert asked == [
        ("hello", 0.8, []),
        ("again", 0.8, talk[:2]),
        ("kind", 0.1, ["be kind", *talk]),
        ("new", 0.1, ["be kind"]),
        ("/bin is what", 0.1, ["new", "ok"]),
        ("/", 0.1, ["new", "ok", "/bin is what", "ok"]),
    ]
    assert out == "ok\n" * 6
    assert "no such setting as top_q" in err and "must be a number" in err and err.count("temperature = 0.1") == 2
    assert err.count("top_k = None") == 2 and "tokens/s" in err
    assert "unknown command /bin (" in err and 'unknown command /rest; did you mean "/reset"?' in err
    assert "unknown command / (" in err
    for name, (argument, text, _) in inference.COMMANDS.items():
        assert f"{name} {argument}" in err and text in err  # /help names them all


@pytest.mark.parametrize("name", ["/quit", "/exit", "/bye"])
def test_a_session_ends_by_several_names(chat, monkeypatch, capsys, name):
    type_lines(monkeypatch, [name, "/nonsense"])
    inference.converse(inference.Session(chat, GenerationConfig(), "", False))
    assert "error" not in capsys.readouterr().err


def test_the_session_goes_on_after_a_question_that_is_too_long(chat, monkeypatch, capsys):
    type_lines(monkeypatch, ["a" * 40, "/system " + "b" * 40, "c", "/system", "ab"])
    inference.converse(inference.Session(chat, GenerationConfig(temperature=0.0), "", False))
    out, err = capsys.readouterr()
    assert out == answer(chat, "ab") + "\n"
    assert err.count("error: the question") == 2


def test_only_a_conversation_has_a_system_message(checkpoint, monkeypatch, capsys):
    generator = load_text_generator(str(checkpoint), "cpu", False)
    type_lines(monkeypatch, ["/system be kind"])
    inference.converse(inference.Session(generator, GenerationConfig(), "", False))
    assert "start with -i" in capsys.readouterr().err


def test_a_system_message_stands_before_the_first_question(call, checkpoint, chat):
    assert chat.prompt_ids("c", [system("ab")]) == chat.prompt_ids("ab\nc")
    ask = ("-i", "-m", checkpoint, "-t", "0", "-p")
    assert call("inference.py", *ask, "c", "--system", "ab") == call("inference.py", *ask, "ab\nc")


def test_an_adapter_that_does_not_fit_leaves_the_one_in_use(chat, checkpoint, work, monkeypatch, capsys):
    plain, contents = answer(chat, "ab"), load_checkpoint(checkpoint)
    settings = {"rank": 2, "alpha": 200.0, "dropout": 0.0, "targets": ["qkv"]}
    fingerprint = lora.fingerprint(chat.model)
    lora.attach(chat.model, settings)
    weights = {name: torch.ones_like(w) for name, w in lora.adapter_weights(chat.model.state_dict()).items()}
    lora.detach(chat.model)
    described = {"settings": settings, "fingerprint": fingerprint, "base": str(checkpoint)}
    save_checkpoint("good.pt", {**contents, "model": weights, "lora": described})
    save_checkpoint("other.pt", {**contents, "model": weights, "lora": {**described, "fingerprint": "other"}})
    save_checkpoint("damaged.pt", {**contents, "model": {"x.A": torch.ones(1)}, "lora": described})
    chat.use_adapter("good.pt")
    adapted = answer(chat, "ab")
    assert adapted != plain
    for path in ("nosuch.pt", "other.pt", "damaged.pt", str(checkpoint)):
        type_lines(monkeypatch, [f"/lora {path}"])
        inference.converse(inference.Session(chat, GenerationConfig(), "", False))
        assert f"error: {path}: " in capsys.readouterr().err
        assert answer(chat, "ab") == adapted
    chat.use_adapter("")
    assert answer(chat, "ab") == plain


def test_in_a_real_terminal(checkpoint, chat):
    """With a redirected output, the answers alone go there: prompts are for the person."""
    controller, terminal = pty.openpty()
    command = ("-i", "-m", checkpoint, "-t", "0", "--device", "cpu")
    process = start_script("inference.py", *command, cwd=checkpoint.parent, stdin=terminal)
    os.write(controller, b"ab\n/quit\n")
    out, err = process.communicate(timeout=120)
    os.close(terminal), os.close(controller)
    assert process.returncode == 0 and out == answer(chat, "ab") + "\n"
    assert err.count("> ") == 2 and "/help" in err


def test_models_with_full_attention_are_refused(call, checkpoint):
    contents = torch.load(checkpoint, weights_only=True)
    contents["model_config"]["is_causal"] = False
    contents.pop("format")
    save_checkpoint(checkpoint, contents)
    result = call("inference.py", "-m", checkpoint, "-p", "a")
    assert result.status != 0 and "full attention" in result.err
