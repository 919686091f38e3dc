"""Speculative decoding against generation without it, and against probabilities in float64."""

import copy
import itertools

import numpy as np
import pytest
import torch
from other_programs import make_model
from rigged import bigram_model, chain_model, save_rigged, unigram_model

from base.configuration import UserError
from layers.speculative import Drafter, DraftModel, PromptLookup
from model import GPT
from text.tokenizer import CharTokenizer

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "greedy, penalty": {"temperature": 0.0, "repetition_penalty": 1.2},
    "sampling": {"temperature": 1.0},
    "top-k, penalty": {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3},
    "top-p, min-p": {"temperature": 1.3, "top_p": 0.8, "min_p": 0.05},
}
PENALISED = [name for name in SETTINGS if "penalty" in name]
SHAPES = {
    "default": {},
    "windows": {"attention_window": [8, 0, 3], "n_layer": 3},
    "learned positions, grouped queries": {"use_rope": False, "n_kv_head": 2},
    "experts": {"n_expert": 4},
}


def tokens_of(model: GPT, idx: torch.Tensor, n: int, **settings) -> list[int]:
    return [token.item() for token in model.generate(idx, n, **settings)]


def near_copy(model: GPT) -> GPT:
    """A model that mostly agrees with it."""
    draft = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return draft


class Listed(Drafter):
    """Guesses from a list of tokens that begins at a length of the context."""

    n_tokens = 5

    def __init__(self, tokens: list[int], start: int) -> None:
        self.tokens, self.start = torch.tensor([tokens], dtype=torch.long), start

    def propose(self, context, n, draw):
        return self.tokens[:, context.size(1) - self.start :][:, :n]


@pytest.mark.parametrize(
    ("shape", "name"), [*(("default", n) for n in SETTINGS), *((s, n) for s in list(SHAPES)[1:] for n in PENALISED)]
)
def test_the_same_tokens_as_without_beyond_the_context_window(shape, name):
    model, seed = make_model(20, block_size=32, **SHAPES[shape]), 3
    texts = torch.randint(20, (2, 1, 6))
    for drafter in (PromptLookup(), DraftModel(near_copy(model), model), DraftModel(make_model(20, seed=1), model)):
        for idx in texts:  # one after the other with the same drafter
            alone = tokens_of(model, idx, 60, seed=seed, **SETTINGS[name])
            assert tokens_of(model, idx, 60, seed=seed, **SETTINGS[name], drafter=drafter) == alone
            assert drafter.n_passes + drafter.n_right == 60  # a pass gives its right guesses, and one token more


def test_right_guesses_save_passes_and_wrong_ones_cost_none(monkeypatch):
    model, idx = make_model(50), torch.randint(50, (1, 4))
    alone = tokens_of(model, idx, 40, temperature=0.0)
    wrong = [token if i % 3 != 2 else (token + 1) % 50 for i, token in enumerate(alone)]
    passes, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, *rest: passes.append(idx.size(1)) or hidden(self, idx, *rest))
    for guesses, n_passes in ((alone, 8), (wrong, 15), ([], 40)):  # 6, 3 and 1 tokens a pass, after the prompt's
        passes.clear()
        assert tokens_of(model, idx, 40, temperature=0.0, drafter=Listed(guesses, 4)) == alone
        assert len(passes) == n_passes and passes[0] == 4  # nothing is guessed there
        assert all(n <= 6 for n in passes[1:])  # what was read stays read


@pytest.mark.parametrize("limit", [1, 2, 7, 12])
def test_it_ends_where_generation_ends(limit):
    model, idx = make_model(50), torch.randint(50, (1, 4))
    alone = tokens_of(model, idx, 12, temperature=0.0)
    assert tokens_of(model, idx, limit, temperature=0.0, drafter=Listed(alone, 4)) == alone[:limit]
    stop = (alone[limit - 1],)
    expected = tokens_of(model, idx, 12, temperature=0.0, stop_tokens=stop)
    assert tokens_of(model, idx, 12, temperature=0.0, stop_tokens=stop, drafter=Listed(alone, 4)) == expected


def test_prompt_lookup_against_a_naive_search():
    def naive(text: list[int], n: int) -> list[int]:
        for length in range(min(PromptLookup.longest, len(text) - 1), PromptLookup.shortest - 1, -1):
            for end in range(len(text) - 1, length - 1, -1):
                if text[end - length : end] == text[-length:]:
                    return text[end : end + n]
        return []

    rng, n_found = np.random.default_rng(0), 0
    for _ in range(500):
        text = rng.integers(rng.integers(1, 5), size=rng.integers(1, 40)).tolist()
        n = int(rng.integers(0, 9))
        found = PromptLookup().propose(torch.tensor([text]), n, None)[0].tolist()
        assert found == naive(text, n), text
        n_found += bool(found)
    assert 200 < n_found < 480


def test_a_draft_model_guesses_by_the_context_alone():
    """What it keeps of the texts before is what they begin with alike, no more."""
    model, greedy = make_model(20, seed=1), lambda logits, context: logits.argmax(-1)
    drafter = DraftModel(model, model)
    for _ in range(30):  # of two kinds of token, so that texts agree in most places
        context = torch.randint(2, (1, int(torch.randint(1, 20, ()))))
        expected = list(model.generate(context, 4, temperature=0.0))
        assert torch.equal(drafter.propose(context, 4, greedy), torch.stack(expected, dim=1))


def probabilities(log_p: np.ndarray, context: list[int]) -> np.ndarray:
    """What is drawn from, in float64: temperature 0.8, repetition penalty 1.4, top-k 4, top-p 0.9."""
    log_p = log_p.copy()
    for token in set(context):
        log_p[token] *= 1.4  # they are negative
    order = np.argsort(-log_p)[:4]
    p = np.exp(log_p[order] / 0.8)
    p /= p.sum()
    n_kept = int((np.cumsum(p) - p < 0.9).sum())
    kept = np.zeros(len(log_p))
    kept[order[:n_kept]] = p[:n_kept] / p[:n_kept].sum()
    return kept


def test_frequencies_are_the_probabilities_of_the_model_alone():
    """Of all texts of three tokens, enumerated; the draft has other probabilities."""
    rng = np.random.default_rng(1)
    tables = [np.log(rng.dirichlet(np.ones(5), size=5)) for _ in range(2)]
    model, draft = (bigram_model(table) for table in tables)
    drafter, n = DraftModel(draft, model), 1200
    settings = {"temperature": 0.8, "repetition_penalty": 1.4, "top_k": 4, "top_p": 0.9}
    counts, n_right = {}, 0
    for seed in range(n):
        text = tuple(tokens_of(model, torch.tensor([[2]]), 3, seed=seed, **settings, drafter=drafter))
        counts[text] = counts.get(text, 0) + 1
        n_right += drafter.n_right
    assert 0.2 * n < n_right < 1.8 * n  # some guesses are right, some are not
    chi_squared, n_texts = 0.0, 0
    for text in itertools.product(range(5), repeat=3):
        p, context = 1.0, [2]
        for token in text:
            p *= probabilities(tables[0][context[-1]], context)[token]
            context.append(token)
        assert p > 0 or text not in counts
        if p > 0:
            chi_squared += (counts.get(text, 0) - n * p) ** 2 / (n * p)
            n_texts += 1
    assert n_texts > 20 and abs(chi_squared - (n_texts - 1)) < 4 * (2 * (n_texts - 1)) ** 0.5


@pytest.mark.parametrize("seed", range(3))
def test_a_draft_that_draws_with_the_same_random_numbers_is_right_as_often_as_the_paper_says(seed):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(6), size=2)
    distance = np.abs(p - q).sum() / 2
    drafter, n = DraftModel(unigram_model(q, block_size=1024), model := unigram_model(p, block_size=1024)), 1000
    drafter.n_tokens = 1  # so that every guess is judged
    tokens_of(model, torch.tensor([[2]]), n, seed=seed, drafter=drafter)
    share, error = drafter.n_right / drafter.n_guesses, 0.5 / drafter.n_guesses**0.5
    assert (1 - distance) / (1 + distance) - 4 * error < share < 1 - distance + 4 * error
    assert share > (p * q).sum() + 4 * error  # other random numbers would agree so often


def test_what_cannot_guess_is_refused():
    model, idx = make_model(50), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(UserError, match="one sequence"):
        model.generate(idx, 3, drafter=PromptLookup())
    for options, words in (
        ({"vocab_size": 40}, "40 tokens, the model's 50"),
        ({"vocab_size": 50, "block_size": 32}, "--block_size 64"),
        ({"vocab_size": 50, "is_causal": False}, "causal"),
    ):
        with pytest.raises(UserError, match=words):
            DraftModel(make_model(**options), model)


def test_on_the_command_line(call, work):
    tokenizer = CharTokenizer("\n ?abcdefgh")
    model, draft = (chain_model(tokenizer, text) for text in ("abcdefgh", "abcd?fgh"))
    save_rigged(work / "m.pt", model, tokenizer)
    save_rigged(work / "draft.pt", draft, tokenizer)
    ask = ("inference.py", "-i", "-m", "m.pt", "-t", "0", "-p", "ab?", "--device", "cpu")
    for options in ((), ("--stop", "fg"), ("-l", "9"), ("--weights", "int8")):
        alone = call(*ask, *options)
        assert alone.status == 0 and alone.out.startswith("ab")
        for name in ("lookup", "draft.pt"):
            assert call(*ask, *options, "--draft", name) == alone
    # of four passes: the prompt's gives a; the draft guesses bcd, right, and the model says e; after e it is wrong;
    # after f gh and the end
    profile = call(*ask, "--draft", "draft.pt", "--profile").err.splitlines()[-1]
    assert profile == "2.25 tokens a pass; 50% of 12 guesses were right"

    save_rigged(work / "other.pt", chain_model(CharTokenizer("\n ?abcdefgi"), "ab"), CharTokenizer("\n ?abcdefgi"))
    save_rigged(work / "short.pt", chain_model(tokenizer, "ab", block_size=32), tokenizer)
    for options, words in (
        (("--draft", "other.pt"), "other.pt: made with another tokenizer"),
        (("--draft", "short.pt"), "short.pt: the draft's window has 32 tokens, the model's 64: train it with"),
        (("--draft", "none.pt"), "none.pt"),
        (("--draft", "lookup", "--compile"), "leave one out"),
    ):
        refused = call(*ask, *options)
        assert refused.status == 1 and refused.out == "" and words in refused.err and refused.err.count("\n") == 1


def test_a_draft_with_windows_guesses_as_well_for_a_second_text():
    """What its rings have lost is read again: after a text that begins alike, as after none."""
    model = make_model(30, block_size=128, attention_window=[16])
    first = torch.randint(30, (1, 80))
    second = torch.cat((first[:, :40], (first[:, 40:41] + 1) % 30), dim=1)
    used, fresh = DraftModel(model, model), DraftModel(model, model)
    tokens_of(model, first, 40, seed=1, drafter=used)
    for drafter in (used, fresh):
        tokens_of(model, second, 40, seed=1, drafter=drafter)
    assert used.n_right == fresh.n_right == fresh.n_guesses
