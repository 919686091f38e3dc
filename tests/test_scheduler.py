"""Continuous batching: what an answer is does not depend on what else runs."""

import math
import time
from collections import Counter

import pytest
import torch
from other_programs import make_model
from servers import TOKENIZER

from model import ATTENTION
from serving.metrics import metrics_text
from serving.rows import PIECE
from serving.scheduler import Batch, Generation, Refused, Sampling, Scheduler
from serving.text_generator import TextGenerator
from weights.quantise import with_weights

CPU = torch.device("cpu")
SHAPES = {
    "llama": {},
    "gpt2": {"use_rope": False, "norm": "layernorm", "mlp": "gelu", "bias": True, "qk_norm": False},
    "windows": {"attention_window": [8, 0], "n_kv_head": 2},
    "odd": {"attention_window": [11], "block_size": 99, "n_kv_head": 1},
    "experts": {"n_expert": 4},
    **{kind: {"attention": [kind, "full"]} for kind in ATTENTION if kind != "full"},
    "int8": {"weights": "int8"},
    "bfloat16": {"weights": "bfloat16"},
}
EXACT = [shape for shape in SHAPES if shape not in ("int8", "bfloat16")]  # rounding makes near-ties


def make_batch(n_rows=16, max_waiting=1000, seconds=300, weights="float32", **shape):
    model, _ = with_weights(make_model(TOKENIZER.vocab_size, **{"block_size": 256, **shape}), weights)
    return Batch("m", TextGenerator(model, TOKENIZER, CPU, True), n_rows, max_waiting, seconds)


class Asked:
    """An answer that was asked for, and the pieces that came of it."""

    def __init__(self, batch, ids, n=8, **options):
        self.pieces = []
        sampling = Sampling(**{"temperature": 0.0, **options.pop("sampling", {})})
        self.generation = Generation(list(ids), n, sampling, self.pieces.append, **options)
        batch.arrived.append(self.generation)

    @property
    def tokens(self):
        return [info for piece in self.pieces for info in piece.tokens]

    @property
    def ids(self):
        return [info.id for info in self.tokens]

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)

    @property
    def end(self):
        return self.pieces[-1].finish_reason if self.pieces else None


def run(batch):
    while not batch.is_idle:
        batch.turn()


def question(i, length=None):
    generator = torch.Generator().manual_seed(i)
    length = length or 3 + i % 23
    return torch.randint(6, TOKENIZER.vocab_size, (length,), generator=generator).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_alone_and_among_fifteen_others_are_the_same_to_the_last_bit(shape):
    n_questions = 200 if shape == "llama" else 32
    settings = [{"sampling": {"temperature": i % 2 * 1.0, "seed": i, "top_k": 20}, "n_logprobs": 2} for i in range(200)]
    together = make_batch(**SHAPES[shape])
    asked = [Asked(together, question(i), 6, **settings[i]) for i in range(n_questions)]
    run(together)
    alone = make_batch(**SHAPES[shape])
    for i, among in enumerate(asked):
        single = Asked(alone, question(i), 6, **settings[i])
        run(alone)
        assert single.ids == among.ids and single.text == among.text
        assert [(t.logprob, t.top) for t in single.tokens] == [(t.logprob, t.top) for t in among.tokens]


@pytest.mark.parametrize("shape", EXACT)
def test_answers_are_those_of_generate(shape):
    """model.generate() reads one sequence at a time, without pieces, rows or a batch."""
    batch = make_batch(**SHAPES[shape])
    model, stops = batch.model, TOKENIZER.stop_tokens
    prompts = [question(i) for i in range(20)] + [question(i, PIECE + i % 20) for i in range(6)]
    asked = [Asked(batch, ids, 12) for ids in prompts]
    sampling = {"temperature": 0.9, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 5}
    drawn = [Asked(batch, ids, 12, sampling=sampling) for ids in prompts]
    run(batch)
    for answers, options in ((asked, {"temperature": 0.0}), (drawn, sampling)):
        for ids, answer in zip(prompts, answers, strict=True):
            steps = model.generate(torch.tensor([ids]), 12, stop_tokens=stops, **options)
            expected = [step.item() for step in steps]
            assert answer.ids == [token for token in expected if token not in stops]
            assert answer.end == ("stop" if expected[-1] in stops else "length")


def test_log_probabilities_are_those_of_one_pass_in_double_precision():
    batch = make_batch()
    ids = question(3, PIECE + 9)
    asked = Asked(batch, ids, 5, n_logprobs=3, with_prompt=True, sampling={"logit_bias": {7: 3.0}})
    run(batch)
    everything = [*ids, *asked.ids]
    logprobs = batch.model.double()(torch.tensor([everything]))[0][0].log_softmax(-1)
    infos = [*asked.pieces[0].prompt, *asked.tokens]
    assert [info.id for info in infos] == everything and infos[0].logprob is None
    for position, info in enumerate(infos[1:]):
        top = logprobs[position].topk(3)
        assert info.logprob == pytest.approx(logprobs[position, info.id].item(), abs=1e-4)
        assert [token for token, _ in info.top] == top.indices.tolist()
        assert [value for _, value in info.top] == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("shape, n_shared", [("llama", 2 * PIECE), ("windows", 0)])
def test_a_shared_beginning_is_read_once_and_changes_nothing(shape, n_shared):
    """A sliding window has lost the beginning when another prompt could use it: that is read again."""
    system = question(1, 2 * PIECE + 5)
    batch = make_batch(n_rows=4, **SHAPES[shape])
    first = Asked(batch, [*system, 9, 10])
    run(batch)
    rest = [Asked(batch, [*system, 9 + i, 11], n_logprobs=1) for i in range(6)]
    run(batch)
    assert first.generation.n_reused == 0
    assert [answer.generation.n_reused for answer in rest] == [n_shared] * 6
    assert batch.counts["reused_tokens"] == 6 * n_shared
    for i, answer in enumerate(rest):
        fresh = make_batch(**SHAPES[shape])
        alone = Asked(fresh, [*system, 9 + i, 11], n_logprobs=1)
        run(fresh)
        assert [(t.id, t.logprob) for t in alone.tokens] == [(t.id, t.logprob) for t in answer.tokens]
    scored = Asked(batch, system, 0, with_prompt=True)
    run(batch)
    assert len(scored.pieces[0].prompt) == len(system) and scored.end == "length"


@pytest.mark.parametrize("window", [PIECE, 2 * PIECE])
def test_a_window_that_is_just_full_does_not_give_what_it_has_lost(window):
    """While its row is idle, the others' steps write into it: behind its end, and so over its first token."""
    shape = {"attention_window": [window, 0]}
    batch = make_batch(n_rows=4, **shape)
    Asked(batch, question(1, window), 1)
    run(batch)
    Asked(batch, question(2), 3)
    run(batch)
    ids = [*question(1, window)[:PIECE], *question(3, 20)]
    asked = Asked(batch, ids, 4, n_logprobs=1)
    run(batch)
    fresh = make_batch(n_rows=4, **shape)
    alone = Asked(fresh, ids, 4, n_logprobs=1)
    run(fresh)
    assert [(t.id, t.logprob) for t in asked.tokens] == [(t.id, t.logprob) for t in alone.tokens]


def test_a_prompt_of_whole_pieces_that_is_known_already_is_still_answered():
    batch = make_batch()
    ids = question(1, 2 * PIECE)
    first, second = Asked(batch, ids), Asked(batch, ids)
    run(batch)
    assert first.ids == second.ids and second.generation.n_reused == PIECE


def test_reading_a_long_prompt_does_not_stall_the_others():
    batch = make_batch(block_size=1024)
    short = Asked(batch, question(1), 100, sampling={"logit_bias": {3: -100.0}})
    batch.turn()
    long = Asked(batch, question(2, 1000), 3)
    while not long.pieces:
        before = len(short.tokens)
        batch.turn()
        assert len(short.tokens) == before + 1
    assert len(short.tokens) >= 7


def test_answers_join_and_leave_between_steps():
    batch = make_batch(n_rows=4)
    no_end = {"logit_bias": {3: -100.0}}
    long = Asked(batch, question(1), 40, sampling=no_end)
    short = [Asked(batch, question(i), 2, sampling=no_end) for i in range(2, 12)]
    while not all(answer.end for answer in short):
        batch.turn()
    assert not long.end and len(long.tokens) < 40
    run(batch)
    assert long.end == "length" and len(long.tokens) == 40


def test_a_cancelled_answer_frees_its_row_within_two_turns():
    batch = make_batch(n_rows=2)
    asked = [Asked(batch, question(i), 100, sampling={"logit_bias": {3: -100.0}}) for i in range(4)]
    batch.turn()
    assert len(batch.running) == 2 and batch.n_waiting == 2
    asked[0].generation.is_cancelled = asked[2].generation.is_cancelled = True
    batch.turn()
    batch.turn()
    assert {generation for generation in batch.running.values()} == {asked[1].generation, asked[3].generation}
    n = len(asked[0].pieces)
    run(batch)
    assert len(asked[0].pieces) == n and not asked[2].pieces and batch.counts["cancelled"] == 2


def test_stop_texts_end_an_answer_before_them():
    batch = make_batch()
    whole = Asked(batch, question(1), 20, sampling={"logit_bias": {3: -100.0}})
    run(batch)
    stop = whole.text[4:7]
    until = whole.text.index(stop)
    ended = Asked(batch, question(1), 20, sampling={"logit_bias": {3: -100.0}}, stop=["zzzz", stop])
    run(batch)
    assert ended.text == whole.text[:until] and ended.end == "stop" and len(ended.tokens) == until + 3


def test_text_that_was_held_back_comes_with_the_end():
    """It might have been the beginning of a stop text."""
    batch = make_batch()
    whole = Asked(batch, question(1), 9, sampling={"logit_bias": {3: -100.0}})
    run(batch)
    held = Asked(
        batch, question(1), 9, sampling={"logit_bias": {3: -100.0}}, stop=[TOKENIZER.decode(whole.ids[-3:]) + "never"]
    )
    run(batch)
    assert held.text == whole.text and held.end == "length" and len(held.pieces[-1].text) > 1


def test_logit_bias_forces_and_forbids_tokens():
    batch = make_batch()
    forced = Asked(batch, question(1), 5, sampling={"logit_bias": {9: 100.0}, "temperature": 1.0})
    free = Asked(batch, question(1), 5)
    run(batch)
    forbidden = Asked(batch, question(1), 5, sampling={"logit_bias": dict.fromkeys(free.ids, -100.0)})
    run(batch)
    assert forced.ids == [9] * 5
    assert not set(forbidden.ids) & set(free.ids)


def test_nothing_but_numbers_ends_one_answer_with_an_error():
    batch = make_batch()
    with torch.no_grad():
        batch.model.token_embedding.weight[7] = math.nan
    broken = Asked(batch, [7, 8])
    run(batch)
    assert broken.end == "error" and "not finite" in str(broken.pieces[-1].error)


def test_an_answer_that_takes_too_long_ends_with_an_error():
    batch = make_batch(seconds=1)
    asked = Asked(batch, question(1), 100)
    batch.turn()
    asked.generation.overdue_at = 0.0
    batch.turn()
    assert asked.end == "error" and asked.pieces[-1].error.status == 504 and batch.is_idle


def test_too_many_waiting_are_refused_and_nothing_after_the_end():
    batch = make_batch(n_rows=4, max_waiting=2)
    scheduler = Scheduler([batch])
    try:
        batch.free.clear()  # as if all rows were taken
        with pytest.raises(Refused) as refused:
            scheduler.submit(batch, [Generation([7], 1, Sampling(), print) for _ in range(3)])
        assert refused.value.status == 429 and refused.value.retry_after > 0
        with pytest.raises(Refused) as refused:  # it would not help to try again
            scheduler.submit(batch, [Generation([7], 1, Sampling(), print) for _ in range(7)])
        assert refused.value.status == 400
        scheduler.is_draining = True
        with pytest.raises(Refused) as refused:
            scheduler.submit(batch, [Generation([7], 1, Sampling(), print)])
        assert refused.value.status == 503
    finally:
        scheduler.stop()


def test_work_between_turns_is_done_and_what_nobody_waits_for_is_not():
    scheduler = Scheduler([make_batch(n_rows=1)])
    try:
        cancelled = []
        held = scheduler.between_turns(lambda: time.sleep(0.2))
        unwanted = scheduler.between_turns(lambda: cancelled.append(1))
        unwanted.cancel()
        assert scheduler.between_turns(lambda: 5).result(20) == 5 and held.done() and not cancelled
        with pytest.raises(ZeroDivisionError):
            scheduler.between_turns(lambda: 1 / 0).result(20)
    finally:
        scheduler.stop()


@pytest.mark.parametrize("step", ["copy", "read", "step"])
def test_an_error_of_one_model_does_not_end_the_others(capsys, step):
    good, bad = make_batch(), make_batch()
    setattr(bad.rows, step, lambda *_: 1 / 0)
    scheduler = Scheduler([bad, good])
    try:
        asked = [Asked(batch, question(1)) for batch in (bad, good)]
        scheduler.wake.set()
        for answer in asked:
            for _ in range(500):
                if answer.end:
                    break
                scheduler.thread.join(0.02)
        assert [answer.end for answer in asked] == ["error", "length"]
        assert asked[0].pieces[-1].error.status == 500 and len(bad.free) == bad.rows.n_rows
    finally:
        scheduler.stop()


def test_a_model_is_not_idle_between_waiting_and_reading(monkeypatch):
    """Another thread asks whether the server may end."""
    batch, seen = make_batch(), []
    asked = Asked(batch, question(1))
    prepare = Generation.prepare
    monkeypatch.setattr(Generation, "prepare", lambda *args: seen.append(batch.is_idle) or prepare(*args))
    run(batch)
    assert seen == [False] and asked.end


def test_many_jobs_do_not_stall_the_answers():
    batch = make_batch()
    scheduler = Scheduler([batch])
    try:
        scheduler.between_turns(lambda: time.sleep(0.2))  # until all that follows is there
        asked = Asked(batch, question(1), 100, sampling={"logit_bias": {3: -100.0}})
        jobs = [scheduler.between_turns(lambda: len(asked.tokens)) for _ in range(10)]
        seen = [job.result(20) for job in jobs]
        assert len(set(seen)) == len(jobs)
    finally:
        scheduler.stop()


def test_metrics_count_beyond_six_digits():
    batch = make_batch(n_rows=1)
    batch.counts["generated_tokens"] = 1_234_567
    assert 'nano_generated_tokens_total{model="m"} 1234567\n' in metrics_text([batch], Counter())
