"""Multiple choice in the files of C-Eval, CMMLU and MMLU: sets whose right share is known, models rigged to know it."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from rigged import save_rigged, unigram_model

from evaluation import choices
from model import GPT, ModelConfig
from serving.text_generator import TextGenerator
from text.tokenizer import BPETokenizer, CharTokenizer

CHARACTERS = "\n .:：ABCDEMSTQabcdefghijklmnopqrstuvwxyz答案题一二三四以下是关于的单项选择。Answer"
TOKENIZER = CharTokenizer("".join(sorted(set(CHARACTERS))))
HEADERS = {"ceval": "id,question,A,B,C,D,answer,explanation", "cmmlu": ",Question,A,B,C,D,Answer", "mmlu": ""}


def table(form, rows):
    """A file in the very form of a benchmark: rows of (question, four options, letter)."""
    lines = [HEADERS[form]] if HEADERS[form] else []
    for i, (question, options, letter) in enumerate(rows):
        cells = [question, *options, letter]
        cells = {"ceval": [str(i), *cells, "1. because,\n2. so"], "cmmlu": [str(i), *cells], "mmlu": cells}[form]
        lines.append(",".join(f'"{cell}"' if set(cell) & set(',\n"') else cell for cell in cells))
    return "\n".join(lines) + "\n"


def rows_with(letters, chinese=False):
    """A question for each letter. The right option alone is made of z, but for every third one: b."""
    rows = []
    for i, letter in enumerate(letters):
        options = ["x" * (1 + (i + k) % 3) for k in range(4)]
        options["ABCD".index(letter)] = "b" if i % 3 == 2 else "z" * (1 + i % 4)
        rows.append((f"{'题一' if chinese else 'q, one'} {'abcd'[i % 4]}", options, letter))
    return rows


def rigged_for(letter, block_size=200):
    """A unigram model: of the letters this one is the likeliest; of the small ones z, then x, then b.

    A space is nearly certain, so that the one before an English answer takes nothing from it.
    """
    weights = np.ones(TOKENIZER.vocab_size)
    for character, weight in {letter: 50, "z": 20, "x": 10, "b": 1, " ": 1e6}.items():
        weights[TOKENIZER.encode(character)[0]] = weight
    return unigram_model(weights / weights.sum(), block_size)


def rows_of(out):
    """The cells of a printed table by subject."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


@pytest.mark.parametrize(("form", "chinese"), [("ceval", True), ("cmmlu", True), ("mmlu", False)])
def test_the_share_right_is_that_of_the_letter_which_a_model_prefers(call, work, form, chinese):
    save_rigged(work / "m.pt", rigged_for("C"), TOKENIZER)
    (work / "val").mkdir()
    names = {"anatomy_val.csv": "CABCDCCB", "law_test.csv" if form == "mmlu" else "law_val.csv": "ABDC" * 3}
    for name, letters in names.items():
        (work / "val" / name).write_text(table(form, rows_with(letters, chinese)), encoding="utf-8")
    result = call("evaluate.py", "--choices", "val", "-m", "m.pt")
    found = rows_of(result.out)
    assert result.status == 0 and list(found) == ["subject", "anatomy", "law", "all", "mean"]
    # by letter: C is right in 4 of 8 and in 3 of 12. By answer: z is the likeliest, but b, a third, never
    share = {"anatomy": (4 / 8, 6 / 8, 8), "law": (3 / 12, 8 / 12, 12), "all": (7 / 20, 14 / 20, 20)}
    for subject, (by_letter, by_answer, n) in share.items():
        cells = [f"{100 * p:.1f}% ± {100 * math.sqrt(p * (1 - p) / (n - 1)):.1f}" for p in (by_letter, by_answer)]
        assert found[subject] == [str(n), *cells, "25.0%"]
    error = math.sqrt(0.25 / 7 + 0.1875 / 11) / 2
    assert found["mean"][1] == f"37.5% ± {100 * error:.1f}"
    single = rows_of(call("evaluate.py", "--choices", "val/anatomy_val.csv", "-m", "m.pt").out)
    assert list(single) == ["subject", "anatomy"] and single["anatomy"] == found["anatomy"]
    assert rows_of(call("evaluate.py", "--choices", "val", "-m", "m.pt", "--limit", "4").out)["all"][0] == "8"


def test_jsonl_has_the_same_questions(call, work):
    rows = rows_with("CABD" * 3)
    (work / "a.csv").write_text(table("ceval", rows), encoding="utf-8")
    named = [
        {"id": i, "question": q, **dict(zip("ABCD", options, strict=True)), "answer": letter}
        for i, (q, options, letter) in enumerate(rows)
    ]
    listed = [
        {"question": q, "subject": "law", "choices": options, "answer": "ABCD".index(letter)}
        for q, options, letter in rows
    ]
    write_jsonl(work / "b.jsonl", named)
    write_jsonl(work / "c.jsonl", listed)
    read = [choices.read_choices(f"{name}") for name in ("a.csv", "b.jsonl", "c.jsonl")]
    contents = [[(c.question, c.options, c.answer) for c in questions] for questions in read]
    assert contents[0] == contents[1] == contents[2]
    assert contents[0] == [(q, options, "ABCD".index(letter)) for q, options, letter in rows]
    assert [questions[0].subject for questions in read] == ["a", "b", "law"]
    assert [questions[1].where for questions in read] == ["line 5", "line 2", "line 2"]  # an explanation has two lines


def test_a_prompt_is_as_the_benchmarks_have_it():
    english = choices.Choice("f", "line 1", "high_school_physics", "What falls?", ["stones", "smoke"], 0)
    assert english.ask(True) == "What falls?\nA. stones\nB. smoke\nAnswer:"
    assert english.ask(False) == "What falls?\nAnswer:"
    chinese = choices.Choice("f", "line 1", "agronomy", "肉质较好的部位是", ["胸", "腹"], 1)
    assert chinese.ask(True) == "肉质较好的部位是\nA. 胸\nB. 腹\n答案："
    tokenizer = BPETokenizer.train([english.ask(True), chinese.ask(True)], 300)
    for question, reply in ((english, " stones"), (chinese, "胸")):
        context, ids = choices.encode_plain(tokenizer, "Head.", [question], question, question.options[0], False)
        asked = question.ask(False)
        right = question.options[question.answer]
        before = f"Head.\n\n{asked}{' ' * (question is english)}{right}\n\n{asked}"
        assert tokenizer.decode(context) == before and tokenizer.decode(ids) == reply


def naive(model, context, reply):
    """log p of a reply, a forward pass for each of its tokens, in double precision."""
    model, seen, total = copy.deepcopy(model).double(), list(context), 0.0
    for token in reply:
        total += model(torch.tensor([seen]))[0][0, -1].log_softmax(-1)[token].item()
        seen.append(token)
    return total


def test_log_likelihoods_are_those_of_a_naive_loop():
    torch.manual_seed(1)
    model = GPT(ModelConfig(vocab_size=40, block_size=24, n_layer=2, n_head=2, n_embd=16)).eval()
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 40, n).tolist() for n in (1, 7, 20)]
    pairs = [(context, rng.integers(0, 40, n).tolist()) for context in contexts for n in (1, 1, 2, 4)]
    pairs += [(contexts[1], [3, 9]), (contexts[1], [3, 8])]  # which read the same
    found = choices.log_likelihoods(model, pairs)
    assert found == pytest.approx([naive(model, *pair) for pair in pairs], rel=1e-4)


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_judgement_is_that_of_a_naive_loop_over_the_whole_prompt(is_chat):
    """The prompts are written out here once more: heading, an example, the question."""
    torch.manual_seed(2)
    model = GPT(ModelConfig(vocab_size=TOKENIZER.vocab_size, block_size=300, n_layer=1, n_head=2, n_embd=16)).eval()
    generator = TextGenerator(model, TOKENIZER, torch.device("cpu"), True)
    question = choices.Choice("f", "line 1", "the_law", "one", ["two", "three", "b", "four"], 1)
    shot = choices.Choice("g", "line 1", "the_law", "five", ["six", "seven"], 0)
    letters, answers, n_cut = choices.judge(generator, [question], {"art": [question], "the_law": [shot]}, is_chat)
    listed = "one\nA. two\nB. three\nC. b\nD. four\nAnswer:"
    heading = "Multiple choice about the law."
    if is_chat:
        system, asked, said = ("<|InstructMark|>", "<|ResponseMark|>", "<|eos|>")
        by_letter = f"{system}{heading}\nfive\nA. six\nB. seven\nAnswer:{asked}A{said}{system}{listed}{asked}"
        by_answer = f"{system}{heading}\nfive\nAnswer:{asked}six{said}{system}one\nAnswer:{asked}"
        template = TOKENIZER.encode_chat([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])[0]
        joint = TOKENIZER.decode(template).removeprefix(system).removesuffix(f"q{asked}").removeprefix("s")
        by_letter, by_answer = (text.replace(f"{heading}\n", heading + joint, 1) for text in (by_letter, by_answer))
        space = ""
    else:
        by_letter = f"{heading}\n\nfive\nA. six\nB. seven\nAnswer: A\n\n{listed}"
        by_answer = f"{heading}\n\nfive\nAnswer: six\n\none\nAnswer:"
        space = " "
    encode = lambda text: TOKENIZER.encode(text, special=True).tolist()  # noqa: E731
    expected = [naive(model, encode(by_letter), encode(space + letter)) for letter in "ABCD"]
    assert letters[0] == pytest.approx(expected, rel=1e-4)
    expected = [naive(model, encode(by_answer), encode(space + o)) / len(o) for o in question.options]
    assert answers[0] == pytest.approx(expected, rel=1e-4) and n_cut == 0


def test_examples_are_the_first_ones_of_the_subject(call, work):
    for folder in ("dev", "val"):
        (work / folder).mkdir()
    for subject, letters, shots in (("law", "AABD", "ABCDA"), ("art", "DDDB", "DACBD")):
        (work / "val" / f"{subject}_val.csv").write_text(table("ceval", rows_with(letters)), encoding="utf-8")
        (work / "dev" / f"{subject}_dev.csv").write_text(table("ceval", rows_with(shots)), encoding="utf-8")
    model = rigged_for("A", 1000)
    generator = TextGenerator(model, TOKENIZER, torch.device("cpu"), True)
    questions = choices.read_choices("val")
    examples = choices.examples_for(questions, choices.read_choices("dev"), 3)
    seen = []
    for question in questions:
        pairs, _, _ = choices.fit(generator, question, examples[question.subject], True, False)
        seen.append(re.findall("Answer: ([ABCD])", TOKENIZER.decode(pairs[0][0])))
    assert seen == [["D", "A", "C"]] * 4 + [["A", "B", "C"]] * 4  # files by name: art, then law
    save_rigged(work / "m.pt", model, TOKENIZER)
    found = rows_of(call("evaluate.py", "--choices", "val", "--shots", "3", "--dev", "dev", "-m", "m.pt").out)
    assert found["law"][1].startswith("50.0%") and found["art"][1].startswith("0.0%")


def test_what_does_not_fit_is_left_out_from_the_front():
    """Examples, the heading, the beginning of the question; never the end, where the answer begins."""
    question = choices.Choice("f", "line 1", "law", "one two three", ["a", "b"], 0)
    shots = [choices.Choice("g", "line 1", "law", name, ["a", "b"], 0) for name in ("first", "second")]
    found = {}
    for size in range(200, 10, -1):
        generator = TextGenerator(rigged_for("A", size), TOKENIZER, torch.device("cpu"), True)
        pairs, read, is_cut = choices.fit(generator, question, shots, True, False)
        assert all(len(context) + len(reply) <= size + 1 for context, reply in pairs) and read == [1.0, 1.0]
        text = TOKENIZER.decode(pairs[0][0])
        assert text.endswith("Answer:")
        parts = tuple(word for word in ("Multiple", "first", "second", "one two") if word in text)
        found.setdefault((parts, is_cut), size)
    assert list(found) == [
        (("Multiple", "first", "second", "one two"), False),
        (("Multiple", "second", "one two"), False),
        (("Multiple", "one two"), False),
        (("one two",), False),
        ((), True),
    ]


def test_an_option_longer_than_the_window_is_not_likelier_by_what_is_not_read_of_it():
    """A model that knows nothing: whatever is read of an option, every token of it is as likely as any other."""
    vocabulary = TOKENIZER.vocab_size
    generator = TextGenerator(rigged_for("A", 20), TOKENIZER, torch.device("cpu"), True)
    generator.model = unigram_model(np.full(vocabulary, 1 / vocabulary), 20)
    question = choices.Choice("f", "line 1", "law", "one", ["two", "three " * 30 + "one", "one two"], 0)
    _, ((short, long, other),), n_cut = choices.judge(generator, [question], {}, False)
    assert n_cut == 1
    # a space before each reply is a token more: 4 of 3 characters, 8 of 7
    assert [short, long, other] == pytest.approx([-math.log(vocabulary) * n for n in (4 / 3, 184 / 183, 8 / 7)])


def test_options_that_are_equally_likely_share_the_point(call, work):
    """Letters that are not in the vocabulary say nothing: a quarter is right, whichever letter is."""
    tokenizer = CharTokenizer("\n :aeinrsqwxz")
    save_rigged(work / "m.pt", unigram_model(np.full(tokenizer.vocab_size, 1 / tokenizer.vocab_size)), tokenizer)
    (work / "a.csv").write_text(table("mmlu", rows_with("AAAA")), encoding="utf-8")
    result = call("evaluate.py", "--choices", "a.csv", "-m", "m.pt")
    assert rows_of(result.out)["a"][1] == "25.0% ± 0.0"
    assert "in the questions: not in the vocabulary, read as <|unknown|>: " in result.err


def test_a_question_has_no_more_options_than_it_names(call, work):
    """In a table with columns for four: the two that are left empty are not chosen, and chance is one of two."""
    save_rigged(work / "m.pt", rigged_for("D"), TOKENIZER)
    (work / "a.csv").write_text("question,A,B,C,D,answer\nq,b,z,,,B\n", encoding="utf-8")
    assert rows_of(call("evaluate.py", "--choices", "a.csv", "-m", "m.pt").out)["a"][1:] == ["50.0%", "100.0%", "50.0%"]
    (work / "a.csv").write_text("question,A,B,C,D,answer\nq,b,z,,,D\n", encoding="utf-8")
    assert 'the answer is "D", not one of A, B' in call("evaluate.py", "--choices", "a.csv", "-m", "m.pt").err


def test_answers_go_to_a_file_and_models_are_compared(call, work):
    save_rigged(work / "b.pt", rigged_for("B"), TOKENIZER)
    save_rigged(work / "c.pt", rigged_for("C"), TOKENIZER)
    (work / "a.csv").write_text(table("cmmlu", rows_with("CCCB" * 10)), encoding="utf-8")
    result = call("evaluate.py", "--choices", "a.csv", "-m", "b.pt", "c.pt", "--out", "said.jsonl")
    by_letter, by_answer = result.out.splitlines()[-2:]
    assert by_letter.startswith("by letter: c.pt is better than b.pt by 50 percentage points, 95% ")
    assert by_answer == "by answer: no difference between b.pt and c.pt"
    said = [json.loads(line) for line in (work / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(said) == 80 and [row["by_letter"] for row in said] == ["B"] * 40 + ["C"] * 40
    assert said[0]["answer"] == "C" and said[0]["where"] == "line 2" and said[0]["subject"] == "a"
    likely = dict(zip("ABCD", said[0]["log_likelihood_by_letter"], strict=True))
    assert likely["B"] - likely["A"] == pytest.approx(math.log(50), rel=1e-4)


def test_malformed_files_are_named_with_their_line(call, work):
    save_rigged(work / "m.pt", rigged_for("C"), TOKENIZER)
    good = table("ceval", rows_with("AB"))
    contents = {
        "letter.csv": (good + "2,q,a,b,c,d,E,x\n", 'letter.csv: line 6: the answer is "E", not one of A, B, C, D'),
        "empty.csv": (good + "2,q,a,b,c,d,,x\n", 'empty.csv: line 6: the answer is "", not one of'),
        "short.csv": (good + "2,q,a,b\n", "short.csv: line 6: 4 columns, the first row has 8"),
        "quote.csv": (good + '2,"q,a,b,c,d,A,x\n', "quote.csv: line 6: not valid CSV"),
        "secret.csv": (
            "id,question,A,B,C,D\n0,q,a,b,c,d\n",
            "secret.csv: line 2: no column answer: the test files of C-",
        ),
        "none.csv": ("id,question,answer\n0,q,A\n", "none.csv: line 2: no options: they are in the columns A, B, C, D"),
        "unnamed.csv": ("a,b\n", "unnamed.csv: line 1: neither a row that names the columns"),
        "blank.csv": (good + "2, ,a,b,c,d,A,x\n", "blank.csv: line 6: the question is empty"),
        "header.csv": ("id,question,A,B,C,D,answer\n", "header.csv: no questions in it"),
        "zero.csv": ("", "zero.csv: the file is empty"),
        "j.jsonl": (
            '{"question": "q", "A": "a", "B": "b", "answer": "A"}\n{"question"\n',
            "j.jsonl: line 2: column 12",
        ),
        "k.jsonl": (
            '{"question": "q", "choices": ["a", "b"], "answer": 2}\n',
            "k.jsonl: line 1: the answer is 2, not one of A, B",
        ),
        "l.jsonl": ('{"A": "a", "B": "b", "answer": "A"}\n', "l.jsonl: line 1: no question"),
        "m.jsonl": ('{"question": "q", "A": ["a", "b"], "B": "b"}\n', 'm.jsonl: line 1: "A" is a list of 2 texts'),
    }
    for name, (text, words) in contents.items():
        (work / name).write_text(text, encoding="utf-8")
        result = call("evaluate.py", "--choices", name, "-m", "m.pt")
        assert result.status == 1 and words in result.err and "Traceback" not in result.err, (name, result.err)
    (work / "gbk.csv").write_bytes(table("cmmlu", rows_with("AB", chinese=True)).encode("gbk"))
    assert "not UTF-8 text" in call("evaluate.py", "--choices", "gbk.csv", "-m", "m.pt").err
    assert call("evaluate.py", "--choices", "gbk.csv", "-m", "m.pt", "--encoding", "gbk").status == 0
    (work / "all" / "dev").mkdir(parents=True)
    (work / "all" / "dev" / "law_dev.csv").write_text(good, encoding="utf-8")
    assert "no .csv or .jsonl files in it; name one of its folders: dev" in call("evaluate.py", "--choices", "all").err
    few = call("evaluate.py", "--choices", "letter.csv", "-m", "m.pt", "--shots", "3", "--dev", "all/dev")
    assert few.status == 1 and "letter.csv: line 6" in few.err
    (work / "law.csv").write_text(good, encoding="utf-8")
    few = call("evaluate.py", "--choices", "law.csv", "-m", "m.pt", "--shots", "3", "--dev", "all/dev")
    assert few.status == 1 and "--shots 3: all/dev/law_dev.csv has 2 examples of law" in few.err
    (work / "art.csv").write_text(good, encoding="utf-8")
    other = call("evaluate.py", "--choices", "art.csv", "-m", "m.pt", "--shots", "1", "--dev", "all/dev")
    assert other.status == 1 and "has 0 examples of art" in other.err
