"""problem.py and tasks.py: answers checked by slow, obvious programs; held-out instances really held out."""

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, is_harmless, read_log, run_script

import problem
from base.configuration import UserError
from problems import instances as drawing
from problems import tasks
from problems.config import parse_length
from problems.instances import HeldOut, InstanceSampler, TrainInstances, exact_match
from problems.tasks import PROBLEMS, Instances, Problem, spell
from text.tokenizer import EOS
from training.config import TrainConfig
from training.engine import Engine
from training.setup import problem_config
from training.sources import ToyProblem, problem_tokenizer
from weights.checkpointing import load_checkpoint

QUICK = ["--device", "cpu", "--n_embd", "32", "--batch_size", "64", "--eval_interval", "50", "--warmup_iters", "5"]


def make_sampler(name, **given):
    return InstanceSampler(problem_config(name, given).settings, problem_tokenizer(PROBLEMS[name]))


def make_batches(name, **shared):
    return TrainInstances(make_sampler(name), batch_size=8, accumulation_steps=2, seed=1337, **shared)


def draw_texts(name, n=300, split="train", **overrides):
    """(prompt, answer) texts of n instances of every length of the problem."""
    sampler = make_sampler(name, **overrides)
    pairs = []
    for length in parse_length(sampler.config.train_length):
        instances = sampler.draw(np.random.default_rng(length), n, length, split)
        pairs += [
            (problem.text_of(p), problem.text_of(a)) for p, a in zip(instances.prompt, instances.answer, strict=True)
        ]
    return pairs


def value_of(tokens):
    """The value of a prefix expression, read by recursive descent from a list of tokens."""
    token = tokens.pop(0)
    if token != "(":
        return int(token)
    sign, left, right = tokens.pop(0), value_of(tokens), value_of(tokens)
    assert tokens.pop(0) == ")"
    return left & right if sign == "*" else left | right


def balanced(text):
    stack = []
    for character in text:
        if character in "([":
            stack.append(character)
        elif not stack or stack.pop() + character not in ("()", "[]"):
            return False
    return not stack


def product(text):
    return math.prod(map(int, text.split("*")))


def times(text):
    """Long multiplication on paper: a times each digit of b from the last, then the product, all written backwards."""
    a, b = text.split("*")
    partial = [str(int(a) * int(digit)).zfill(len(a) + 1)[::-1] for digit in b[::-1]]
    return ",".join([*partial, str(int(a) * int(b)).zfill(2 * len(a))[::-1]])


OBVIOUS = {
    "q": lambda t: str(sum({"0": 1, "6": 1, "9": 1, "8": 2}.get(c, 0) for c in t)),
    "sort": lambda t: "".join(sorted(t)),
    "palindrome": lambda t: t[::-1],
    "boolean": lambda t: str(value_of(re.findall(r"[()*+01]", t))),
    "add": lambda t: str(sum(map(int, t.split("+")))).zfill(11)[::-1],
    "multiply": times,
    "modular": lambda t: f"{sum(map(int, t.split('+'))) % 97:02d}",
    "parity": lambda t: "".join(str(t[:i].count("1") % 2) for i in range(1, len(t) + 1)),
    "majority": lambda t: str(int(t.count("1") > t.count("0"))),
    "brackets": lambda t: str(int(balanced(t))),
    "copy": lambda t: t,
    "recall": lambda t: dict(zip(t[0:16:2], t[1:16:2], strict=True))[t[-1]],
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_answers_are_what_an_obvious_program_says(name):
    pairs = draw_texts(name)
    assert len(pairs) >= 300
    ends = PROBLEMS[name].ends
    for prompt, answer in pairs:
        assert prompt.endswith(ends)
        assert answer == OBVIOUS[name](prompt.removesuffix(ends)), prompt
        assert set(prompt + answer) <= set(PROBLEMS[name].alphabet)


def test_the_answer_of_recall_cannot_be_told_from_what_else_is_asked():
    """If every key were asked once, the answer would be the value that is left: counting, without finding the key."""
    left = []
    for prompt, _ in draw_texts("recall"):
        keys, asked = prompt[0:16:2], prompt[17::2]
        assert asked[-1] not in asked[:-1]  # it has to be found among the pairs, which may be far away
        left.append(sorted(set(keys) - set(asked[:-1])))
        assert asked[-1] in left[-1]
    sizes = np.array([len(keys) for keys in left])
    expected = 1 + 7 * (6 / 7) ** 7  # the key itself, and those of seven that seven draws miss
    assert abs(sizes.mean() - expected) < 4 * sizes.std() / len(sizes) ** 0.5
    assert (sizes == 1).mean() < 0.05


@pytest.mark.parametrize(
    ("name", "overrides", "obvious"),
    [
        ("add", {"reverse": False}, lambda t: str(sum(map(int, t.split("+")))).zfill(11)),
        ("add", {"pad": False}, lambda t: str(sum(map(int, t.split("+"))))[::-1]),
        ("multiply", {"scratchpad": False, "pad": False}, lambda t: str(product(t))[::-1]),
        ("multiply", {"scratchpad": False, "reverse": False}, lambda t: str(product(t)).zfill(t.index("*") * 2)),
        ("parity", {"scratchpad": False}, lambda t: str(t.count("1") % 2)),
        ("modular", {"operation": "-"}, lambda t: f"{(int(t[:2]) - int(t[3:])) % 97:02d}"),
        ("modular", {"operation": "*"}, lambda t: f"{int(t[:2]) * int(t[3:]) % 97:02d}"),
        ("modular", {"operation": "/"}, lambda t: f"{int(t[:2]) * pow(int(t[3:]), -1, 97) % 97:02d}"),
        ("recall", {"noise": 3}, lambda t: dict(re.findall(r"([a-z])(\d)\d{3}", t[: t.index("?")]))[t[-1]]),
        ("modular", {"modulus": 113}, lambda t: f"{sum(map(int, t.split('+'))) % 113:03d}"),
    ],
)  # fmt: skip
def test_options_change_the_answers(name, overrides, obvious):
    for prompt, answer in draw_texts(name, **overrides):
        assert answer == obvious(prompt.removesuffix("=")), prompt


def test_the_auxiliary_target_of_a_closing_bracket_is_its_value():
    sampler = make_sampler("boolean")
    instances = sampler.draw(np.random.default_rng(0), 200, 4, "train")
    for prompt, aux_targets in zip(instances.prompt, instances.aux_targets, strict=True):
        text = problem.text_of(prompt)
        opened = []
        for i, character in enumerate(text):
            if character == "(":
                opened.append(i)
            expected = 0
            if character == ")":
                expected = ord(str(value_of(re.findall(r"[()*+01]", text[opened.pop() : i + 1]))))
            assert aux_targets[i] == expected


def test_boolean_expressions_keep_to_their_depth_and_leaf_probability():
    texts = [prompt for prompt, _ in draw_texts("boolean", 2000, length="4")]
    depths = [max(np.cumsum([(c == "(") - (c == ")") for c in text])) for text in texts]
    assert max(depths) == 4
    operands = sum(text.count("(") - 1 + len(re.findall(r" (?=[01])", text)) for text in texts)
    shallow = [text for text in draw_texts("boolean", 2000, length="1", leaf_probability=0.2)]
    assert all(text.count("(") == 1 for text, _ in shallow)
    first_operand_is_leaf = np.mean([text[3] != "(" for text in texts])
    assert operands and abs(first_operand_is_leaf - 0.2) < 0.03


def test_brackets_come_in_both_kinds_of_answer_and_are_hard_to_tell_by_counting():
    pairs = draw_texts("brackets", 3000)
    share = np.mean([answer == "1" for _, answer in pairs])
    assert 0.4 < share < 0.65
    wrong = [prompt for prompt, answer in pairs if answer == "0"]
    assert all(sum(map(text.count, "([")) == 10 for text in wrong)  # as many opening as closing ones


def test_balanced_words_of_every_shape_are_equally_likely():
    words = tasks.balanced_words(np.random.default_rng(0), 14_000, 4)
    shapes, counts = np.unique((words < 2).astype(int), axis=0, return_counts=True)
    assert len(shapes) == 14  # the fourth Catalan number
    assert ((counts - 1000) ** 2 / 1000).sum() < 40  # chi-squared, 13 degrees of freedom: 1 in 8,000


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_prompt_is_both_trained_on_and_held_out(name):
    n = {"boolean": 600}.get(name, 2000)
    splits = {split: {prompt for prompt, _ in draw_texts(name, n, split)} for split in drawing.SPLITS}
    assert all(splits.values())
    assert not splits["train"] & splits["test"]
    assert not splits["train"] & splits["val"]
    assert not splits["val"] & splits["test"]


def test_held_out_instances_are_distinct():
    for name in ("sort", "boolean", "modular"):
        prompts = [prompt for prompt, _ in draw_texts(name, 1000, "test")]
        assert len(prompts) == len(set(prompts)) == 1000


def test_modular_splits_the_whole_table_by_the_train_fraction():
    whole = {f"{a:02d}+{b:02d}=" for a in range(97) for b in range(97)}
    splits = {split: {prompt for prompt, _ in draw_texts("modular", 10_000, split)} for split in ("val", "test")}
    train = {prompt for prompt, _ in draw_texts("modular", 100_000)}
    assert train | splits["val"] | splits["test"] == whole
    assert abs(len(train) / 97**2 - 0.5) < 0.02
    assert abs(len({p for p, _ in draw_texts("modular", 100_000, train_fraction=0.3)}) / 97**2 - 0.3) < 0.02


def test_the_split_is_the_same_for_every_seed():
    sampler = make_sampler("sort")
    trained = {
        problem.text_of(prompt)
        for seed in (1, 2)
        for prompt in sampler.draw(np.random.default_rng(seed), 3000, 3, "train").prompt
    }
    held_out = {
        problem.text_of(prompt)
        for seed in (3, 4)
        for instances in HeldOut(sampler, "test", range(3, 4), 100, batch_size=8, seed=seed).by_length.values()
        for prompt in instances.prompt
    }
    assert len(trained) > 800 and held_out and not trained & held_out


def test_hashes_do_not_depend_on_what_stands_behind_the_text():
    codes = np.array([[49, 50, 51], [50, 49, 51]], np.uint32)
    padded = np.pad(codes, ((0, 0), (0, 5)))
    assert (drawing.hash_rows(codes) == drawing.hash_rows(padded)).all()
    assert len(set(drawing.hash_rows(codes).tolist())) == 2


def test_the_rest_of_the_training_part_goes_to_validation_and_test_one_to_four():
    sampler = make_sampler("sort", train_fraction=0.8)
    hashes = np.arange(10_000, dtype=np.uint64) * np.uint64(2**64 // 10_000) + np.uint64(2**63 // 10_000)  # evenly
    assert np.bincount(sampler.split_of(hashes)).tolist() == [8000, 400, 1600]


def test_what_short_lengths_lack_the_longer_ones_make_up_for():
    """Of one digit there are ten instances, of two a hundred: those of three digits are the more."""
    held_out = HeldOut(make_sampler("sort"), "test", range(1, 4), 60, batch_size=8, seed=1)
    sizes = [len(instances.prompt) for instances in held_out.by_length.values()]
    assert sum(sizes) == len(held_out) == 60 and sizes[0] < 20 and sizes[2] > 20


def test_numbers_of_every_length_are_added_and_none_begins_with_0():
    pairs = draw_texts("add", 3000, length="4", pad=False)
    numbers = [number for prompt, _ in pairs for number in prompt.removesuffix("=").split("+")]
    shares = np.bincount([len(number) for number in numbers]) / len(numbers)
    assert shares[1:] == pytest.approx([0.25] * 4, abs=0.03)
    assert not any(number.startswith("0") and len(number) > 1 for number in numbers)


@pytest.mark.parametrize("modulus", [2, 3, 13, 4, 9, 91])
def test_division_takes_a_prime_modulus(modulus):
    if modulus in (2, 3, 13):
        assert draw_texts("modular", 5, operation="/", modulus=modulus, train_fraction=0.9)
        return
    with pytest.raises(UserError, match="needs a prime modulus"):
        draw_texts("modular", 5, operation="/", modulus=modulus)


def test_only_a_whole_score_is_shown_as_100_percent():
    assert str(problem.Score(99_999, 100_000)) == "99.99% (99999/100000)"
    assert str(problem.Score(5, 5)) == "100.00% (5/5)"


def test_the_accuracy_is_over_all_lengths():
    asked = problem_config("sort", {"length": "1-2", "device": "cpu"})
    source = ToyProblem(asked.training, asked.settings, None)
    source.engine = Engine(asked.training)
    source.exact_match = lambda: {1: np.array([True, True, True]), 2: np.array([False])}
    assert source.metrics() == {"accuracy": 0.75}


def test_train_length_and_test_length_are_more_specific_than_length():
    settings = make_sampler("sort", length="5", train_length="2-3", test_length="4").config
    assert (settings.train_length, settings.test_length, settings.longest) == ("2-3", "4", 4)
    assert make_sampler("sort", length="5", train_length="2").config.test_length == "5"
    assert parse_length("2-3") == range(2, 4) and parse_length("7") == range(7, 8)


def test_auxiliary_targets_are_learnt_beside_the_answer_and_only_where_they_are_wanted():
    """Of (* 1 0) = 0 the value of the bracket is a target, too."""
    sampler = make_sampler("boolean", length="1", leaf_probability=0.0)
    batch, answer_mask = sampler.encode(sampler.draw(np.random.default_rng(0), 8, 1, "train"))
    assert (batch.loss_mask.sum(1) == 3).all() and (answer_mask.sum(1) == 2).all() and batch.count == 24
    sampler = make_sampler("boolean", length="1", leaf_probability=0.0, supervise=False)
    batch, answer_mask = sampler.encode(sampler.draw(np.random.default_rng(0), 8, 1, "train"))
    assert torch.equal(batch.loss_mask.bool(), answer_mask) and batch.count == 16


def test_an_answer_without_its_end_is_wrong():
    """The characters are right, but the model would not stop: greedy decoding would go on."""
    sampler = make_sampler("q", length="3")
    held_out = HeldOut(sampler, "test", range(3, 4), 8, batch_size=4, seed=1)
    for flaw, expected in ((-1, True), (EOS, False), (0, True)):

        class Oracle(torch.nn.Module):
            def forward(self, idx):
                """Gives the target of every position, but <|eos|> or padding is spoilt."""
                target = next(batch.targets for batch in held_out if torch.equal(batch.idx, idx))
                target = torch.where(target == flaw, 9, target)  # noqa: B023
                return torch.nn.functional.one_hot(target, 20).float(), None

        oracle = Oracle()
        right = exact_match(oracle, held_out, Engine(TrainConfig(device="cpu")))
        assert (right[3] == expected).all() and len(right[3]) == len(held_out) and oracle.training


def test_an_answer_is_right_whatever_is_said_on_the_way():
    """The auxiliary targets inside of an expression are all missed."""
    sampler = make_sampler("boolean", length="2", leaf_probability=0.0)
    held_out = HeldOut(sampler, "test", range(2, 3), 8, batch_size=8, seed=1)
    ((_, (batch, answer_mask)),) = held_out.examples()
    assert (batch.loss_mask.sum(1) > answer_mask.sum(1)).all()

    class Oracle(torch.nn.Module):
        def forward(self, idx):
            return torch.nn.functional.one_hot(torch.where(answer_mask, batch.targets, 19), 20).float(), None

    assert exact_match(Oracle(), held_out, Engine(TrainConfig(device="cpu")))[2].all()


def test_batches_are_a_function_of_the_position():
    batches, again = make_batches("add"), make_batches("add")
    again.at(0)
    for first, second in zip(batches.at(160), again.at(160), strict=True):
        assert torch.equal(first.idx, second.idx) and torch.equal(first.targets, second.targets)
    assert not torch.equal(batches.at(0)[0].idx, batches.at(0)[1].idx)
    assert not torch.equal(batches.at(0)[0].idx, batches.at(batches.samples_per_step)[0].idx)


def test_encoding_shifts_causal_answers_and_leaves_full_ones_in_place():
    sampler = make_sampler("q", length="2")
    batch, answer_mask = sampler.encode(Instances(spell(np.array([[8, 0]])), spell(np.array([[3]]))))
    text = sampler.problem.alphabet
    ids = {character: 6 + i for i, character in enumerate(sorted(text))}
    assert batch.idx.tolist() == [[ids["8"], ids["0"], ids["3"]]]
    assert batch.targets.tolist() == [[0, ids["3"], EOS]]
    assert answer_mask.tolist() == [[False, True, True]] and batch.count == 2
    sampler = make_sampler("sort", length="2")
    batch, answer_mask = sampler.encode(Instances(spell(np.array([[8, 0]])), spell(np.array([[0, 8]]))))
    assert batch.targets.tolist() == [batch.idx[0].flip(0).tolist()] and answer_mask.all()


def last_score(out):
    match = re.fullmatch(r"accuracy: (\d+\.\d\d)% \((\d+)/(\d+)\)", out.strip().splitlines()[-1])
    assert match, out
    return float(match[1]), int(match[2]), int(match[3])


@pytest.fixture
def sorted_model(work, call):
    """A model that has nearly learnt to sort three digits."""
    result = call("problem.py", "sort", "--length", "3", "--max_steps", "300", *QUICK, "--plot", "--example", "312")
    assert result.status == 0, result.err
    return result


def test_training_ends_with_the_accuracy_and_leaves_checkpoint_log_and_pictures(sorted_model, work):
    percent, n_right, n = last_score(sorted_model.out)
    assert percent > 90 and 50 < n < 110  # of 1,000 instances about 8% are left to the test
    assert abs(percent - 100 * n_right / n) < 0.01
    assert re.search(r"^right: \d{3} -> \d{3}$", sorted_model.out, re.M)
    assert (work / "checkpoint" / "problem_sort.pt").is_file()
    (log,) = work.glob("train_*.log")
    accuracies = [record["accuracy"] for record in read_log(log, "val")]
    assert len(accuracies) == 6 and accuracies[-1] > accuracies[0]
    for name in ("problem_sort.png", "problem_sort_attention.png"):
        assert (work / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_checkpoint_is_tested_without_training(sorted_model, call, work):
    before = (work / "checkpoint" / "problem_sort.pt").read_bytes()
    result = call("problem.py", "sort", "--checkpoint", "checkpoint/problem_sort.pt", "--device", "cpu")
    assert result.status == 0, result.err
    assert last_score(result.out) == last_score(sorted_model.out)
    assert (work / "checkpoint" / "problem_sort.pt").read_bytes() == before
    assert len(list(work.glob("train_*.log"))) == 1


def test_inputs_can_be_typed(sorted_model, work):
    typed = "312\nsort 99\nsort 12a\n3121\n\n021\n"
    result = run_script("problem.py", "--device", "cpu", cwd=work, stdin=typed)
    answers = result.out.split()
    assert result.status == 0 and len(answers) == 3 and (answers[0], answers[2]) == ("123", "012")
    assert "'a'" in result.err and "window of 3" in result.err
    alone = run_script(
        "problem.py", "--checkpoint", "checkpoint/problem_sort.pt", "--device", "cpu", cwd=work, stdin=typed
    )
    assert alone.out.split() == answers


def test_numbers_are_padded_as_the_model_knows_them(work, call):
    assert call("problem.py", "add", "--length", "2-3", "--max_steps", "2", *QUICK).status == 0
    solver = problem.load_solver("checkpoint/problem_add.pt", torch.device("cpu"), "add")
    cases = {"1+2": "001+002=", "1+2=": "001+002=", "12+34=": "12+34=", "1+234=": "001+234=", "12+3": "012+003="}
    assert {text: solver.complete(text) for text in cases} == cases
    assert call("problem.py", "modular", "--max_steps", "1", *QUICK).status == 0
    solver = problem.load_solver("checkpoint/problem_modular.pt", torch.device("cpu"), "modular")
    assert solver.complete("7+62") == "07+62="


def test_typing_has_commands_and_names_strange_forms(sorted_model, work):
    result = run_script("problem.py", "--device", "cpu", cwd=work, stdin="/help\n12\n/foo\nsort\n/quit\n312\n")
    assert result.status == 0 and len(result.out.split()) == 1
    for words in ("/quit or Ctrl-D ends", "an input like ", "has another form", "/foo: no such command"):
        assert words in result.err


def test_what_is_typed_cannot_take_over_the_terminal(sorted_model, work):
    result = run_script("problem.py", "--device", "cpu", cwd=work, stdin="/\x1b]0;x\x07\n1\x1b[31m2\n\u202e\n")
    assert result.status == 0 and all(is_harmless(c) for c in result.err)
    assert "no such command" in result.err and "not in the alphabet" in result.err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["palindrome", "--checkpoint", "checkpoint/problem_sort.pt"],
            "a model of the problem sort, not of palindrome",
        ),
        (["sort", "--length", "3", "--train_fraction", "0.5", "--from_checkpoint"], "--train_fraction 0.9"),
        (
            ["sort", "--train_fraction", "0.5", "--checkpoint", "checkpoint/problem_sort.pt"],
            "it would mix training and test instances",
        ),
        (["add", "--from_checkpoint"], "a model of the problem sort: its alphabet is not that of add"),
        (
            ["sort", "--loss", "grpo", "--from_checkpoint"],
            "needs a window of 6 tokens, block_size is 3: take a smaller",
        ),
    ],
)
def test_a_checkpoint_of_another_problem_or_split_is_refused(sorted_model, call, argv, says):
    path = [] if "--checkpoint" in argv else ["checkpoint/problem_sort.pt"]
    result = call("problem.py", *argv, *path, "--device", "cpu")
    assert result.status == 1 and says in result.err and result.err.count("\n") == 1
    mended = re.search(r"--train_fraction \S+$", result.err.strip())
    if mended:
        argv = [argument for argument in argv if argument not in ("--train_fraction", "0.5")]
        argv = [*argv, *path, "--max_steps", "301", "--stage", "problem_sort", *mended[0].split()]
        assert call("problem.py", *argv, *QUICK).status == 0


def test_help_leaves_out_what_is_refused(call, work):
    out = call("problem.py", "--help").out
    assert "--tokenizer_path" not in out and "--teacher" not in out and "--learning_rate" in out


def test_a_wider_test_needs_rotary_positions(sorted_model, call):
    arguments = ["problem.py", "sort", "--checkpoint", "checkpoint/problem_sort.pt", "--device", "cpu"]
    result = call(*arguments, "--test_length", "2-5", "--test_instances", "400")
    assert result.status == 0, result.err
    lengths = re.findall(r"^ +(\d) digits: +\d+\.\d\d% \((\d+)/(\d+)\)", result.out, re.M)
    assert [int(length) for length, _, _ in lengths] == [2, 3, 4, 5]
    assert sum(int(n) for _, _, n in lengths) == last_score(result.out)[2]
    learned = [*QUICK, "--max_steps", "2", "--length", "3", "--use_rope", "false", "--stage", "learned"]
    assert call("problem.py", "sort", *learned).status == 0
    result = call(
        "problem.py", "sort", "--checkpoint", "checkpoint/learned.pt", "--test_length", "5", "--device", "cpu"
    )
    assert result.status == 1 and "needs a window of 5 tokens, block_size is 3" in result.err


def test_exact_match_is_what_greedy_generation_says(work, call):
    """The answers of a half-trained model, character by character, against the one pass of the test."""
    assert call("problem.py", "add", "--length", "1-2", "--max_steps", "300", *QUICK).status == 0
    held_out = HeldOut(make_sampler("add", length="1-2"), "test", range(1, 3), 150, batch_size=64, seed=1337)
    solver = problem.load_solver("checkpoint/problem_add.pt", torch.device("cpu"), "add")
    right = exact_match(solver.model, held_out, Engine(TrainConfig(device="cpu")))
    n_right = 0
    for length, verdicts in right.items():
        prompt, answer, _ = held_out.by_length[length]
        for i, verdict in enumerate(verdicts):
            assert (solver.answer(problem.text_of(prompt[i])) == problem.text_of(answer[i])) == verdict
        n_right += verdicts.sum()
    assert 0 < n_right < problem.total(right).n  # both verdicts were put to the test


def test_continuing_gives_the_same_weights(work, call):
    arguments = ["problem.py", "parity", "--length", "6", *QUICK, "--save_interval", "20", "--lr_decay_iters", "40"]
    assert call(*arguments, "--max_steps", "40", "--stage", "whole").status == 0
    assert call(*arguments, "--max_steps", "20", "--stage", "parts").status == 0
    last = "checkpoint/parts_last.pt"
    assert call(*arguments, "--max_steps", "40", "--stage", "parts", "--from_checkpoint", last).status == 0
    whole, parts = load_checkpoint("checkpoint/whole_last.pt"), load_checkpoint(last)
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])


def largest(rng, n, length, config):
    digits = rng.integers(0, 10, (n, length))
    return Instances(spell(digits), spell(digits.max(axis=1, keepdims=True)))


def test_a_new_problem_is_a_generator_and_an_entry(work, call, monkeypatch):
    entry = Problem("the largest digit", "0123456789=", largest, ends="=", length="4")
    monkeypatch.setitem(PROBLEMS, "largest", entry)
    result = call("problem.py", "largest", "--max_steps", "150", *QUICK)
    assert result.status == 0, result.err
    assert last_score(result.out)[0] > 95
    for name in ("docs/toy-problems.md", "docs/toy-problems.zh.md"):
        readme = (ROOT / name).read_text(encoding="utf-8")
        assert inspect.getsource(largest) in readme and '"0123456789=", largest, ends="=", length="4"' in readme


def test_a_generator_that_leaves_its_alphabet_is_named(work, call, monkeypatch):
    for alphabet, lacks in (("012345678=", "9"), ("123456789=", "0")):
        monkeypatch.setitem(PROBLEMS, "largest", Problem("", alphabet, largest, ends="=", length="4"))
        result = call("problem.py", "largest", "--max_steps", "1", *QUICK)
        assert result.status == 1 and f"makes '{lacks}', which is not in its alphabet" in result.err


def test_all_runs_every_problem_and_ends_with_a_table(work, call, monkeypatch):
    for name in [name for name in PROBLEMS if name not in ("q", "sort")]:
        monkeypatch.delitem(PROBLEMS, name)
    result = call("problem.py", "all", "--length", "3", "--max_steps", "20", *QUICK)
    rows = [line.split("|")[1].strip() for line in result.out.strip().splitlines()[-4:]]
    assert result.status == 0 and rows[0] == "problem" and rows[2:] == ["q", "sort"]


def test_the_list_shows_every_problem(work, call):
    out = call("problem.py", "--list").out
    assert all(f"| {name} " in out for name in PROBLEMS)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["srot"], 'did you mean "sort"?'),
        (["sort", "--length", "six"], "a length must be N or A-B"),
        (["sort", "--length", "0"], "from 1 on"),
        (["sort", "--length", "9-3"], "a length must be N or A-B"),
        (["sort", "--length", "20", "--block_size", "10"], "length 20 needs a window of 20 tokens, block_size is 10"),
        (["modular", "--length", "3"], "modular has no length"),
        (["modular", "--operation", "/", "--modulus", "12"], "needs a prime modulus, got 12"),
        (["modular", "--operation", "^"], "operation must be one of"),
        (["majority", "--length", "8"], "odd length"),
        (["recall", "--length", "27"], "at most 26"),
        (["add", "--length", "19"], "at most 18"),
        (["sort", "--modulus", "5"], "--modulus belongs to modular, not to sort"),
        (["sort", "--tokenizer_path", "x.json"], "means nothing here"),
        (["sort", "--is_causal", "true"], "is defined with is_causal false"),
        (["sort", "--n_head", "3"], "must be divisible by n_head"),
        (["sort", "--checkpoint", "none.pt"], "none.pt: no such checkpoint"),
        (["sort", "--from_checkpoint", "none.pt"], "none.pt: no such checkpoint"),
        (["sort", "--example", "123"], "--example needs --plot"),
        ([], "no problem has been trained"),
    ],
)
def test_mistakes_get_one_line(work, call, argv, says):
    result = call("problem.py", *argv, "--max_steps", "1")
    assert result.status == 1 and says in result.err
    assert len(result.err.strip().splitlines()) == 1 and not Path("checkpoint").exists()


def test_a_checkpoint_of_another_kind_is_refused(prepared, call):
    train = ["train.py", "-t", "pretrain", "--n_layer", "1", "--n_embd", "16", "--block_size", "16", "--max_steps", "1"]
    assert call(*train, "--device", "cpu").status == 0
    for argv in (["sort", "--checkpoint"], ["--checkpoint"]):
        result = call("problem.py", *argv, "checkpoint/pretrain.pt")
        assert result.status == 1 and "not a checkpoint of problem.py" in result.err
    result = call("problem.py", "sort", "--from_checkpoint", "checkpoint/pretrain.pt")
    assert result.status == 1 and "its alphabet is not that of sort" in result.err


def test_a_small_space_is_tested_whole():
    held_out = HeldOut(make_sampler("sort", length="2"), "test", range(2, 3), 10_000, batch_size=256, seed=1337)
    sampler = make_sampler("sort", length="2")
    everything = np.array([[a, b] for a in range(10) for b in range(10)])
    expected = sampler.split_of(drawing.hash_rows(spell(everything))) == drawing.SPLITS.index("test")
    assert len(held_out.by_length[2].prompt) == expected.sum() > 0


def test_another_runs_checkpoint_is_not_tested_for_this_one(sorted_model, call, monkeypatch):
    """Where no evaluation was finite, there is no best checkpoint, whatever an earlier run left."""
    monkeypatch.setattr("train.evaluate", lambda run: (math.nan, math.nan))
    result = call("problem.py", "sort", "--length", "3", "--max_steps", "3", *QUICK)
    assert result.status == 1 and "no evaluation was finite" in result.err and "accuracy: " not in result.out


def test_a_model_config_is_heeded_for_problems_too(work, call):
    (work / "narrow.json").write_text('{"n_layer": 1, "n_head": 1, "n_embd": 16}')
    arguments = ["--problem", "sort", "--length", "3", "--max_steps", "1", "--device", "cpu"]
    assert call("train.py", *arguments, "-m", "narrow.json").status == 0
    assert load_checkpoint("checkpoint/problem_sort.pt")["model_config"]["n_embd"] == 16
    assert call("train.py", *arguments, "-m", "none").status == 1


def test_an_adapter_of_a_problem_is_tested_and_talked_to(sorted_model, call, work):
    (work / "checkpoint" / "problem_sort.pt").rename(work / "base.pt")
    adapter = ["--use_lora", "true", "--from_checkpoint", "base.pt", "--length", "3", "--max_steps", "20"]
    trained = call("problem.py", "sort", *adapter, "--device", "cpu", "--learning_rate", "0.001")
    assert trained.status == 0, trained.err
    again = call("problem.py", "sort", "--checkpoint", "checkpoint/problem_sort_lora.pt", "--device", "cpu")
    assert again.status == 0 and last_score(again.out) == last_score(trained.out)
