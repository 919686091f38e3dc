"""Masked diffusion: the loss against all masks and all orders, the sampler against a known distribution."""

import itertools
import math

import numpy as np
import pytest
import torch

from base.configuration import UserError
from layers.denoising import denoise
from model import GPT, ModelConfig
from text.batches import Batch
from text.token_files import TokenFile
from text.tokenizer import EOS, RESPONSE
from training.diffusion import NEVER, DiffusionLoss, NoisyTrainBatches, NoisyValidationBatches, bound, masked_losses

V, L = 4, 4  # a vocabulary and a length small enough for all texts, masks and orders
ORDERS = list(itertools.permutations(range(L)))


def tiny_model(**shape) -> GPT:
    torch.manual_seed(0)
    fields = {"vocab_size": V, "block_size": L, "n_layer": 2, "n_head": 2, "n_embd": 8, "is_causal": False}
    return GPT(ModelConfig(**{**fields, "mask_token": True, **shape})).double()


class Exact(torch.nn.Module):
    """What a perfect model says: the conditionals of a joint distribution over all texts, (V,) * L probabilities."""

    def __init__(self, joint: np.ndarray) -> None:
        super().__init__()
        self.joint, self.lm_head = joint, torch.nn.Identity()
        self.config = ModelConfig(vocab_size=V, block_size=L, is_causal=False, mask_token=True)

    def hidden(self, idx):
        rows = []
        for row in idx.tolist():
            known = self.joint[tuple(slice(None) if token == V else slice(token, token + 1) for token in row)]
            marginals = [known.sum(tuple(j for j in range(L) if j != i)) for i in range(L)]
            rows.append([m / m.sum() if len(m) == V else np.full(V, 1 / V) for m in marginals])
        return torch.tensor(np.array(rows)).clamp(min=1e-300).log()

    def forward(self, idx, targets, weight, reduction, documents=None, with_logits=False):
        losses = -self.hidden(idx).gather(2, targets[..., None])[..., 0] * weight
        return None, losses.sum() if reduction == "sum" else losses


def a_distribution(seed: int = 0) -> np.ndarray:
    """Far from independent: a few texts have most of the probability."""
    joint = np.random.default_rng(seed).random((V,) * L) ** 8
    return joint / joint.sum()


def log_p(model, text: tuple[int, ...], order: tuple[int, ...]) -> float:
    """log p of a text that a model writes in an order, token by token, by the chain rule."""
    context, total = [V] * L, 0.0
    for i in order:
        logits = model.lm_head(model.hidden(torch.tensor([context])))[0, i]
        total += logits.log_softmax(-1)[text[i]].item()
        context[i] = text[i]
    return total


def batch_of(text: tuple[int, ...], noise: list[float], rate: float) -> Batch:
    idx = torch.tensor([text])
    ones = torch.ones(1, L, dtype=torch.float64)
    noise = torch.tensor([noise], dtype=torch.float64)
    return Batch(idx, idx, ones, L, noise=noise, rate=rate * ones)


def expected_loss(model, text: tuple[int, ...], reduction: str = "sum") -> float:
    """The mean of the loss over all masks and rates: the masks enumerated, the rates by Gauss-Legendre quadrature.

    A mask of m tokens has the probability t^m (1 - t)^(L - m), and the loss the weight 1 / t: polynomials in t, of
    which quadrature gives the integral exactly.
    """
    nodes, weights = np.polynomial.legendre.leggauss(L)
    total = 0.0
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        for mask in itertools.product([0, 1], repeat=L):
            m = sum(mask)
            batch = batch_of(text, [0.0 if masked else NEVER for masked in mask], t)
            loss = masked_losses(model, batch, batch.rate, V, reduction).sum().item()
            total += weight * t**m * (1 - t) ** (L - m) * loss
    return total


# ------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("reduction", ["sum", "none"])
@torch.no_grad()
def test_the_expected_loss_is_the_mean_over_all_orders(reduction):
    model, text = tiny_model(), (0, 3, 1, 1)
    in_orders = [log_p(model, text, order) for order in ORDERS]
    assert expected_loss(model, text, reduction) == pytest.approx(-np.mean(in_orders), rel=1e-9)
    # a bound: the likelihood of a model that draws the order is the mean of p
    assert -np.mean(in_orders) > -math.log(np.mean(np.exp(in_orders)))


@torch.no_grad()
def test_a_perfect_model_reaches_the_entropy_and_no_other_gets_below():
    joint, other = a_distribution(), a_distribution(1)
    texts = [text for text in itertools.product(range(V), repeat=L) if joint[text] > 1e-3]
    for text in texts[:4]:
        assert expected_loss(Exact(joint), text) == pytest.approx(-math.log(joint[text]), rel=1e-9)
    p = np.array([joint[text] for text in texts])
    p /= p.sum()
    mixed = 0.5 * joint + 0.5 * other
    losses = [expected_loss(Exact(mixed), text) for text in texts[:6]]
    assert all(loss > 0 for loss in losses)
    cross_entropy = -(p[:6] * np.log([mixed[text] for text in texts[:6]])).sum()
    assert p[:6] @ losses == pytest.approx(cross_entropy, rel=1e-9)


@torch.no_grad()
def test_the_bound_of_validation_has_the_expected_loss_as_its_mean():
    model, text = tiny_model(), (2, 0, 3, 3)
    rng = np.random.default_rng(0)
    draws = [bound(model, batch_of(text, list(rng.random(L)), 1 - rng.random()), V).sum().item() for _ in range(100)]
    error = np.std(draws) / 10
    assert abs(np.mean(draws) - expected_loss(model, text)) < 3.5 * error
    assert error < 0.1 * np.mean(draws)


def test_a_masked_token_does_not_tell_itself_and_padding_tells_nothing():
    model = tiny_model()
    batch = batch_of((0, 1, 2, 3), [0.5, NEVER, 0.5, NEVER], 0.6)
    losses = masked_losses(model, batch, batch.rate, V, "none")
    assert (losses[0, [1, 3]] == 0).all() and (losses[0, [0, 2]] > 0).all()
    hidden = lambda idx: model.hidden(torch.tensor([idx]), documents=torch.tensor([[1, 1, 1, 0]]))[0, :3]  # noqa: E731
    assert torch.equal(hidden([0, V, 2, 0]), hidden([0, V, 2, 3]))
    assert not torch.equal(hidden([0, V, 2, 0])[0], hidden([0, V, 3, 0])[0])  # from the right, too


def test_the_mask_token_has_no_logit():
    model = tiny_model()
    assert model(torch.tensor([[V, 0, V, 1]]))[0].shape == (1, L, V)
    with pytest.raises(UserError, match=r"0\.\.4"):
        model(torch.tensor([[V + 1]]))
    with pytest.raises(UserError, match=r"0\.\.3"):
        tiny_model(mask_token=False)(torch.tensor([[V]]))


# ------------------------------------------------------------------------------------------------------ noise


@pytest.fixture
def files(prepared):
    return {stage: TokenFile(f"dataset/{stage}_train.bin") for stage in ("pretrain", "sft")}


def batches_of(file: TokenFile, maker=NoisyTrainBatches, **changes):
    settings = {"block_size": 16, "vocab_size": 64, "batch_size": 8, "seed": 1, "answer_block": 4, "ends": (EOS,)}
    settings |= {"mask_span": 1, "in_blocks": False}
    if maker is NoisyTrainBatches:
        settings["accumulation_steps"] = 1
    return maker([file], **{**settings, **changes})


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_noise_is_the_same_however_a_step_is_cut(files, stage):
    """Into micro-batches, or over processes, or resumed."""
    whole = batches_of(files[stage]).at(16)[0]
    assert whole.noise.min() >= 0 and ((whole.noise < 1) | (whole.noise == NEVER)).all()
    n_rows = len(whole.idx)
    for rank in range(2):
        halves = batches_of(files[stage], batch_size=4, accumulation_steps=2, rank=rank, world_size=2).at(16)
        T = halves[0].idx.size(1)
        rows = slice(rank * n_rows // 2, (rank + 1) * n_rows // 2)
        for name in ("idx", "noise", "rate", "loss_mask"):
            assert torch.equal(getattr(halves[0], name), getattr(whole, name)[rows, :T])


def test_rates_are_spread_over_every_batch(files):
    batches = batches_of(files["pretrain"])
    rates = torch.cat([batches.at(8 * step)[0].rate[:, 0] for step in range(50)])
    for step in range(50):
        part = rates[8 * step : 8 * step + 8].sort().values
        assert part.diff().max() < 0.3 and part.min() > 0 and part.max() <= 1
    assert abs(rates.mean() - 0.5) < 0.01 and abs((rates < 0.1).float().mean() - 0.1) < 0.01
    other = batches_of(files["pretrain"], seed=2).at(0)[0]
    assert not torch.equal(other.noise, batches.at(0)[0].noise)


def test_the_noise_of_validation_is_the_same_whatever_the_seed_and_batch_size(files):
    for file in files.values():
        batches = [
            next(iter(batches_of(file, NoisyValidationBatches, n_samples=0, seed=seed, batch_size=size)))
            for seed, size in ((1, 8), (2, 4))
        ]
        T = min(batch.idx.size(1) for batch in batches)
        assert torch.equal(batches[0].noise[:4, :T], batches[1].noise[:4, :T])
        assert torch.equal(batches[0].rate[:4, :T], batches[1].rate[:4, :T])


def test_tokens_of_a_span_are_masked_together_and_each_as_often_as_by_itself(files):
    """Spans of 1 to 4 tokens, 4 samples of each length on average; at every position half of them is masked."""
    batches = [batches_of(files["pretrain"], mask_span=4).at(8 * i)[0] for i in range(200)]
    lengths, begin_with_the_window = [], []
    for noise in torch.cat([batch.noise for batch in batches]).tolist():
        runs = [len(list(same)) for _, same in itertools.groupby(noise)]
        assert len(set(runs[1:-1])) <= 1 and max(runs[0], runs[-1]) <= runs[1]  # whole but for the first and the last
        lengths.append(runs[1])
        begin_with_the_window += [runs[0] == runs[1]] * (runs[1] > 1)
    shares = np.bincount(lengths, minlength=5)[1:] / len(lengths)
    assert abs(shares - 0.25).max() < 0.05, shares
    assert np.mean(begin_with_the_window) < 0.5  # (1/2 + 1/3 + 1/4) / 3
    masked = torch.cat([batch.noise < batch.rate for batch in batches])
    assert abs(masked.float().mean(0) - 0.5).max() < 0.08


def test_validation_masks_every_token_by_itself_whatever_the_span(files):
    """The bound is that of independent masks."""
    for file in files.values():
        spans = [next(iter(batches_of(file, NoisyValidationBatches, n_samples=0, mask_span=span))) for span in (1, 4)]
        assert torch.equal(spans[0].noise, spans[1].noise) and torch.equal(spans[0].rate, spans[1].rate)
        masked = spans[0].noise[spans[0].noise != NEVER]
        assert len(masked.unique()) > 0.99 * len(masked)


def test_of_running_text_all_tokens_are_masked_alike_and_are_the_targets_of_a_causal_model(files):
    from text.batches import TrainBatches

    noisy = batches_of(files["pretrain"]).at(0)[0]
    causal = TrainBatches([files["pretrain"]], block_size=16, vocab_size=64, batch_size=8, seed=1, accumulation_steps=1)
    assert torch.equal(noisy.idx, causal.at(0)[0].targets) and torch.equal(noisy.targets, noisy.idx)
    assert noisy.documents is None and noisy.count == noisy.idx.numel()
    shares = torch.cat([(b := batches_of(files["pretrain"]).at(8 * i)[0]).noise < b.rate for i in range(100)])
    assert abs(shares.float().mean(0) - 0.5).max() < 0.08  # at every position


def test_of_a_conversation_only_an_answer_is_masked_with_its_end_filled(files):
    file = files["sft"]
    for maker in (NoisyTrainBatches, NoisyValidationBatches):
        batches = batches_of(file, maker, **({"n_samples": 0} if maker is NoisyValidationBatches else {}))
        batch = batches.at(0)[0] if maker is NoisyTrainBatches else next(iter(batches))
        for idx, noise, counted, documents in zip(
            batch.idx, batch.noise, batch.loss_mask, batch.documents, strict=True
        ):
            start = idx.tolist().index(RESPONSE) + 1
            end = idx.tolist().index(EOS, start) + 1
            filled = start + math.ceil((end - start) / 4) * 4
            assert (noise[:start] == NEVER).all() and (noise[start:filled] < 1).all()
            assert (idx[end:filled] == EOS).all()
            assert counted.nonzero()[:, 0].tolist() == list(range(start, end))
            assert (
                (noise[filled:] == NEVER).all() and (documents[filled:] == 0).all() and (documents[:filled] == 1).all()
            )


def test_a_turn_is_drawn_and_a_long_answer_may_end_after_any_block(files):
    tokens = np.array([9, 5, 20, 21, 22, EOS, 9, 5, *range(30, 39), EOS])
    mask = np.array([0, 0, 1, 1, 1, 1, 0, 0, *[1] * 10])
    batches = batches_of(files["sft"], block_size=32)
    seen = set()
    for position in range(200):
        sample = batches.add_noise((tokens, mask), position, 0, trains=True)
        masked = np.flatnonzero(sample.noise < 1)
        seen.add((int(masked[0]), len(sample.idx), int(sample.counted.sum())))
        assert masked.tolist() == list(range(masked[0], len(sample.idx)))
    assert seen == {(2, 6, 4), (8, 12, 4), (8, 16, 8), (8, 20, 10)}
    whole = {len(batches.add_noise((tokens, mask), position, 0, trains=False).idx) for position in range(50)}
    assert whole == {6, 20}


def test_an_answer_that_begins_where_the_window_ends_is_left_out(files):
    batches = batches_of(files["sft"], block_size=8)
    two = np.array([9, 5, 20, EOS, 9, 5, 6, 7, EOS]), np.array([0, 0, 1, 1, 0, 0, 0, 0, 1])
    samples = [batches.add_noise(two, position, 0, trains=True) for position in range(20)]
    assert {int(sample.counted.argmax()) for sample in samples} == {2}
    none = batches.add_noise((np.array([9] * 8 + [EOS]), np.array([0] * 8 + [1])), 0, 0, trains=True)
    assert len(none.idx) == 8 and not none.counted.any() and (none.noise == NEVER).all()


@pytest.mark.parametrize("in_blocks", [False, True])
def test_an_answer_is_one_document_though_its_end_is_repeated(files, in_blocks):
    settings = {"block_size": 32, "in_blocks": in_blocks}
    plain, masked = (batches_of(files["sft"], **settings, mask_documents=mask).at(0)[0] for mask in (False, True))
    assert torch.equal(plain.documents, masked.documents) and plain.documents.max() == 1


def test_packed_answers_have_rates_and_documents_of_their_own(files):
    plain = batches_of(files["sft"], block_size=32).at(0)[0]
    packed = batches_of(files["sft"], block_size=32, pack_samples=True).at(0)[0]
    assert len(packed.idx) < len(plain.idx) and packed.count == plain.count
    rates = lambda batch: sorted(set(batch.rate[batch.noise < 1].tolist()))  # noqa: E731
    assert rates(packed) == rates(plain) and len(rates(plain)) == 8
    model = tiny_model(vocab_size=64, block_size=32)
    losses = [masked_losses(model, batch, batch.rate, 64, "sum").item() for batch in (plain, packed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ------------------------------------------------------------------------------------------------------ sampling


def drawn_texts(model, n: int, seed: int = 0, **settings) -> np.ndarray:
    """How often each text was drawn, (V,) * L."""
    counts = np.zeros((V,) * L)
    generator = torch.Generator().manual_seed(seed)

    def draw(logits, context, places):
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    for _ in range(n):
        *_, text = denoise(model, torch.zeros(1, 0, dtype=torch.long), L, draw, block=L, **settings)
        counts[tuple(text.tolist())] += 1
    return counts


def chi_square(counts: np.ndarray, joint: np.ndarray) -> tuple[float, float]:
    """Pearson's statistic, texts expected less than five times in one class, and the one exceeded with p = 0.001."""
    expected = joint.ravel() * counts.sum()
    common = expected >= 5
    observed = np.append(counts.ravel()[common], counts.ravel()[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    k = len(expected) - 1
    limit = k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3  # Wilson and Hilferty 1931
    return ((observed - expected) ** 2 / expected).sum(), limit


def test_one_token_a_pass_draws_from_the_distribution_itself():
    joint = a_distribution()
    statistic, limit = chi_square(drawn_texts(Exact(joint), 800), joint)
    assert statistic < limit
    statistic, limit = chi_square(drawn_texts(Exact(joint), 800, steps=1), joint)  # all at once: independently
    assert statistic > 10 * limit


def test_a_model_that_is_trained_draws_the_texts_of_its_data():
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(V, 0.4), size=V)  # each token depends on the one before: a Markov chain
    joint = np.einsum("ab,bc,cd->abcd", chain, chain, chain) / V
    model = tiny_model(n_embd=32).float()
    texts = np.stack(np.unravel_index(rng.choice(V**L, 40_000, p=joint.ravel()), joint.shape), axis=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss = DiffusionLoss(V)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 300)
        idx = torch.from_numpy(texts[rng.integers(len(texts), size=256)])
        noise = torch.from_numpy(rng.random(idx.shape))
        rate = torch.from_numpy(1 - (rng.random() + np.arange(256) / 256) % 1)[:, None].expand(-1, L)
        batch = Batch(idx, idx, torch.ones(idx.shape), idx.numel(), noise=noise, rate=rate)
        (loss(model, batch, "sum") / batch.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    statistic, limit = chi_square(drawn_texts(model.eval(), 500), joint)
    assert statistic < limit
    at_once, _ = chi_square(drawn_texts(model, 500, steps=1), joint)
    assert at_once > 4 * limit


@torch.no_grad()
def test_what_follows_the_end_is_dropped_and_generation_goes_on_block_by_block():
    """A model that knows its text by heart: token i of the answer at place i, whatever else is there."""

    class Certain(torch.nn.Module):
        def __init__(self, text: list[int], block_size: int) -> None:
            super().__init__()
            self.text, self.lm_head, self.lengths = text, torch.nn.Identity(), []
            self.config = ModelConfig(vocab_size=9, block_size=block_size, is_causal=False, mask_token=True)

        def hidden(self, idx):
            self.lengths.append(idx.size(1))
            known = idx[0][idx[0] != 9].tolist()
            n = len(known) + (idx == 9).sum().item()
            logits = torch.zeros(1, n, 9)
            for place in range(n):
                token = self.text[place] if place < len(self.text) else 1
                logits[0, place, token] = 5 - abs(place - 5) / 10  # the surest in the middle
            return logits

    greedy = lambda logits, known, places: logits.argmax(-1)  # noqa: E731
    text = [7, 8, 2, 3, 4, 5, 6, 3, 1, 1]  # 1 ends it
    model, prompt = Certain(text, 16), torch.tensor([[7, 8]])
    settings = {"stop_tokens": (1,), "block": 4, "fills_window": False}
    states = [state.tolist() for state in denoise(model, prompt, 14, greedy, **settings)]
    assert states[-1] == [2, 3, 4, 5, 6, 3, 1]
    assert states[0] == [9, 9, 9, 5] and states[3] == [2, 3, 4, 5] and states[4][:5] == [2, 3, 4, 5, 6]
    assert model.lengths == [6] * 4 + [10] * 3  # with the end, what follows is known
    model.lengths.clear()
    short = [state.tolist() for state in denoise(Certain([7, 8, 2, 1], 16), prompt, 14, greedy, **settings)]
    assert short == [[2, 9, 9, 9], [2, 1]]  # the end comes last, and is drawn once
    states = [state.tolist() for state in denoise(model, prompt, 14, greedy, **settings, steps=2)]
    assert states[-1] == [2, 3, 4, 5, 6, 3, 1] and model.lengths == [6] * 2 + [10] * 2
    model.lengths.clear()
    states = list(denoise(model, prompt, 6, greedy, **settings | {"stop_tokens": (), "fills_window": True}))
    assert set(model.lengths) == {16} and states[-1].tolist() == [2, 3, 4, 5, 6, 3, 1, 1]
