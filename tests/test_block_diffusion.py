"""Masked diffusion in blocks: the rows of a text and its copy against one block at a time with a mask made by hand."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_diffusion import chi_square

from base.configuration import UserError
from layers.cache import KVCache
from layers.denoising import block_states, denoise
from model import GPT, ModelConfig
from serving.denoising import Places
from text.batches import Batch, TrainBatches
from text.token_files import TokenFile
from text.tokenizer import EOS
from training import preflight
from training.config import TrainConfig
from training.diffusion import NEVER, DiffusionLoss, NoisyTrainBatches, NoisyValidationBatches, masked_losses

V, L, BLOCK = 4, 4, 2  # L targets behind a token that is given, in blocks of two
BLOCKS = torch.arange(L)[None] // BLOCK
KINDS = [
    {},
    {"attention": ["latent"]},
    {"attention_window": [3, 0]},
    {"use_rope": False},
    {"n_kv_head": 1},
]


def tiny_model(**shape) -> GPT:
    torch.manual_seed(0)
    fields = {"vocab_size": V, "block_size": L, "n_layer": 2, "n_head": 2, "n_embd": 8, "mask_token": True}
    model = GPT(ModelConfig(**{**fields, **shape})).double()
    for p in model.parameters():
        p.data.mul_(5)  # far from uniform
    return model.eval()


@torch.no_grad()
def block_logits(model: GPT, text: list[int], part: list[int]) -> torch.Tensor:
    """Logits (n, V) of the tokens of a block behind a text: one sequence, its mask filled in pair by pair."""
    idx = torch.tensor([text + part[:-1]])
    T, first = idx.size(1), len(text) - 1
    masks = {}
    for window in set(model.windows):
        masks[window] = torch.zeros(T, T, dtype=torch.bool)
        for q, k in itertools.product(range(T), repeat=2):
            both_in_block = q >= first and k >= first
            masks[window][q, k] = (k <= q or both_in_block) and (not window or abs(q - k) < window)
    model.masks = lambda *_: masks
    try:
        return model.lm_head(model.hidden(idx)[0, first:])
    finally:
        del model.masks


def log_p(model: GPT, text: tuple[int, ...], begin: int, order: tuple[int, ...]) -> float:
    """log p of text[begin : begin + len(order)] behind what comes before, written in an order, by the chain rule."""
    part, total = [V] * len(order), 0.0
    for i in order:
        logits = block_logits(model, list(text[:begin]), part)[i]
        part[i] = text[begin + i]
        total += logits.log_softmax(-1)[part[i]].item()
    return total


def batch_of(text: tuple[int, ...], noise: list[float], rate: float) -> Batch:
    idx = torch.tensor([text])
    ones = torch.ones(1, L, dtype=torch.float64)
    noise = torch.tensor([noise], dtype=torch.float64)
    return Batch(idx[:, :-1], idx[:, 1:], ones, L, noise=noise, rate=rate * ones, blocks=BLOCKS)


@torch.no_grad()
def expected_parts(model: GPT, text: tuple[int, ...], reduction: str) -> float:
    """The mean over all masks and rates, as in test_diffusion.py, of one block after the other."""
    nodes, weights = np.polynomial.legendre.leggauss(BLOCK)
    total = 0.0
    for begin in range(0, L, BLOCK):
        for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            for mask in itertools.product([0, 1], repeat=BLOCK):
                noise = [NEVER] * L
                noise[begin : begin + BLOCK] = [0.0 if masked else NEVER for masked in mask]
                batch = batch_of(text, noise, t)
                loss = masked_losses(model, batch, batch.rate, V, reduction).sum().item()
                total += weight * t ** sum(mask) * (1 - t) ** (BLOCK - sum(mask)) * loss
    return total


# ------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_the_expected_loss_is_the_mean_over_all_orders_of_each_block(kind):
    model, text = tiny_model(**kind), (2, 0, 3, 1, 1)
    orders = list(itertools.permutations(range(BLOCK)))
    expected = -sum(np.mean([log_p(model, text, 1 + b, order) for order in orders]) for b in range(0, L, BLOCK))
    assert expected_parts(model, text, "none") == pytest.approx(expected, rel=1e-6)
    # in training the next tokens are learnt, too, by a causal model that knows of no blocks
    idx = torch.tensor([text])
    next_token = model(idx[:, :-1], idx[:, 1:], reduction="sum")[1].item()
    n_blocks = L // BLOCK  # expected_parts() adds up so many means
    assert expected_parts(model, text, "sum") == pytest.approx(expected + n_blocks * next_token, rel=1e-6)


@torch.no_grad()
def test_a_block_sees_what_was_before_it_and_all_of_itself_and_nothing_else():
    model = tiny_model(block_size=6)
    blocks = torch.tensor([[0, 0, 0, 1, 1, 1]])

    def parts(tokens: list[int], masked: set[int]) -> torch.Tensor:
        idx, ones = torch.tensor([tokens]), torch.ones(1, 6)
        noise = torch.tensor([[0.0 if i in masked else NEVER for i in range(6)]])
        batch = Batch(idx[:, :-1], idx[:, 1:], ones, 6, noise=noise, rate=ones, blocks=blocks)
        return masked_losses(model, batch, batch.rate, V, "none")[0]

    text = [0, 1, 2, 3, 1, 2, 0]  # targets 1 to 6: 1 2 3 | 1 2 0
    of = parts(text, {0, 4})
    assert (of[[1, 2, 3, 5]] == 0).all() and (of[[0, 4]] > 0).all()
    assert parts([0, 1, 2, 3, 0, 2, 0], {0, 4})[0] == of[0]  # a later block
    assert parts([0, 1, 0, 3, 1, 2, 0], {0, 4})[0] != of[0]  # on its right, in its block
    assert parts([0, 1, 0, 3, 1, 2, 0], {0, 1, 4})[0] == parts(text, {0, 1, 4})[0]  # masked
    assert parts([0, 1, 2, 0, 1, 2, 0], {0, 4})[0] == of[0]  # the last of a block, which is drawn last
    assert parts([0, 0, 2, 3, 1, 2, 0], {0, 4})[4] != of[4]  # a block before, though it is masked there
    assert parts([0, 1, 2, 3, 0, 2, 0], {0, 4})[4] != of[4] != parts([0, 1, 2, 3, 1, 0, 0], {3})[3]
    assert parts([0, 1, 2, 3, 1, 0, 0], {3})[3] != parts(text, {3})[3]
    # the token before a block is seen from there, whether it is masked in its own or not
    assert parts(text, {2, 4})[4] == of[4] and parts([0, 1, 2, 1, 1, 2, 0], {2, 4})[4] != of[4]


@torch.no_grad()
def test_documents_and_packed_samples_are_kept_apart():
    model = tiny_model(block_size=8)
    a, b = [0, 1, 2, 3, 1], [3, 2, 2, 0, 1]
    noise = [0.1, 0.7, 0.3, 0.2]

    def parts(rows: list[list[int]], blocks: list[int], documents: list[int] | None) -> torch.Tensor:
        idx = torch.tensor([list(itertools.chain(*(row[:-1] for row in rows)))])
        targets = torch.tensor([list(itertools.chain(*(row[1:] for row in rows)))])
        noises, ones = torch.tensor([noise * len(rows)]), torch.ones(idx.shape)
        documents = None if documents is None else torch.tensor([documents])
        settings = {"noise": noises, "rate": 0.5 * ones, "blocks": torch.tensor([blocks])}
        batch = Batch(idx, targets, ones, idx.numel(), documents, **settings)
        return masked_losses(model, batch, batch.rate, V, "none")[0]

    alone = torch.cat([parts([row], [0, 0, 1, 1], None) for row in (a, b)])
    packed = parts([a, b], [0, 0, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 2, 2, 2, 2])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ noise


def batches_of(file: TokenFile, maker=NoisyTrainBatches, **changes):
    settings = {"batch_size": 4, "seed": 1, "block_size": 16, "vocab_size": file.header["vocab_size"]}
    settings |= {"answer_block": 4, "ends": (EOS,), "mask_span": 1, "in_blocks": True}
    if maker is NoisyTrainBatches:
        settings["accumulation_steps"] = 1
    return maker([file], **settings | changes)


def test_of_running_text_the_targets_are_those_of_a_causal_model(prepared):
    file = TokenFile("dataset/pretrain_train.bin")
    settings = {"batch_size": 4, "seed": 1, "block_size": 16, "vocab_size": file.header["vocab_size"]}
    causal = TrainBatches([file], accumulation_steps=1, **settings)
    starts = set()
    for position in range(0, 40, 4):
        batch, plain = batches_of(file).at(position)[0], causal.at(position)[0]
        assert torch.equal(batch.idx, plain.idx) and torch.equal(batch.targets, plain.targets)
        assert (batch.loss_mask == 1).all() and batch.count == plain.count
        for blocks, rates in zip(batch.blocks.numpy(), batch.rate.numpy(), strict=True):
            _, sizes = np.unique(blocks, return_counts=True)
            assert (np.diff(blocks) >= 0).all() and (sizes[1:-1] == 4).all() and sizes.max() <= 4
            starts.add(int(sizes[0]))
            of_block = [set(rates[blocks == n]) for n in np.unique(blocks)]
            assert all(len(one) == 1 for one in of_block) and len(set.union(*of_block)) == len(of_block)
    assert starts == {1, 2, 3, 4}  # a block may have begun before the window
    validation = batches_of(file, NoisyValidationBatches, n_samples=8)
    assert all((batch.blocks == torch.arange(16) // 4 + 1).all() for batch in validation if batch.count)


def test_an_answer_begins_a_block_and_its_last_block_is_filled(prepared):
    file = TokenFile("dataset/sft_train.bin")
    batches = batches_of(file, block_size=32, batch_size=8)
    seen = set()
    for batch in (batches.at(8 * step)[0] for step in range(6)):
        for row in range(8):
            blocks, told = batch.blocks[row].numpy(), batch.noise[row].numpy() < NEVER
            start, n = told.argmax(), int(told.sum())
            assert told[start : start + n].all() and (n % 4 == 0 or start + n == 32)
            assert (blocks[:start] == 0).all() and (blocks[start : start + n] == 1 + np.arange(n) // 4).all()
            assert (blocks[start + n :] > blocks[start + n - 1]).all()  # padding is of no block
            counted = batch.loss_mask[row].numpy() > 0
            filled = told & ~counted
            assert not (counted & ~told).any() and (batch.targets[row].numpy()[filled] == EOS).all()
            assert (batch.idx[row, 1 : start + n].numpy() == batch.targets[row, : start + n - 1].numpy()).all()
            seen.add(int(filled.sum()))
    assert len(seen) > 1
    packed = batches_of(file, block_size=32, batch_size=8, pack_samples=True).at(0)[0]
    for blocks, documents in zip(packed.blocks.numpy(), packed.documents.numpy(), strict=True):
        assert (np.diff(blocks) >= 0).all()
        assert all(len(set(documents[blocks == n])) == 1 for n in blocks)  # no block is of two samples


# ------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_a_pass_with_a_cache_tells_what_one_without_does(kind):
    model = tiny_model(block_size=16, **kind)
    text, part = torch.tensor([3, 1, 0, 2, 2, 1]), torch.tensor([V, 2, V, V])
    cache = KVCache(model.config, 1, text.device, torch.float64, spare=4)
    for known in (text[:3], text):  # what came since is read with the first pass of a block
        expected = block_logits(model, known.tolist(), part.tolist())
        for _ in range(2):
            found = model.lm_head(block_states(model, known, part, cache, use_cache=True))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            assert cache.lengths[0] == len(known) - 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("steps", [None, 2])
def test_the_cache_changes_no_token_even_past_the_window(kind, steps):
    model = tiny_model(block_size=10, **kind)
    prompt = torch.tensor([[1, 3, 0]])

    def states(use_cache: bool, n: int = 25) -> list[list[int]]:
        generator = torch.Generator().manual_seed(3)
        draw = lambda logits, known, places: torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]  # noqa: E731
        found = denoise(model, prompt, n, draw, (), steps=steps, block=4, use_cache=use_cache)
        return [state.tolist() for state in found]

    found = states(True)
    assert found == states(False) and len(found[-1]) >= 25 and V not in found[-1]
    for before, after in itertools.pairwise(found):  # what was drawn stays
        assert all(a in (b, V) for a, b in zip(before, after, strict=False))
    for state in found:  # a block's last token comes last: no other has seen it
        assert all(part[-1] == V or V not in part for part in (state[:4], state[4:8]) if part)


def test_a_block_of_one_is_the_next_token():
    model = tiny_model(block_size=10)
    idx = torch.tensor([[1, 3, 0]])
    greedy = lambda logits, *_: logits.argmax(-1)  # noqa: E731
    *_, found = denoise(model, idx, 6, greedy, (), block=1)
    for token in found:
        assert token == model(idx)[0][0, -1].argmax()
        idx = torch.cat((idx, token[None, None]), dim=1)


def test_a_model_that_is_trained_draws_the_texts_of_its_data():
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(V, 0.4), size=V)  # each token depends on the one before: a Markov chain
    joint = np.einsum("ab,bc,cd,de->abcde", chain, chain, chain, chain) / V
    model = tiny_model(n_embd=32).float().train()
    for p in model.parameters():
        p.data.div_(5)
    texts = np.stack(np.unravel_index(rng.choice(V**5, 40_000, p=joint.ravel()), joint.shape), axis=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss = DiffusionLoss(V)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
        idx = torch.from_numpy(texts[rng.integers(len(texts), size=256)])
        noise = torch.from_numpy(rng.random((256, L)))
        rate = torch.from_numpy(1 - rng.random((256, L // BLOCK))).repeat_interleave(BLOCK, dim=1)
        settings = {"noise": noise, "rate": rate, "blocks": BLOCKS.expand(256, -1)}
        batch = Batch(idx[:, :-1], idx[:, 1:], torch.ones(256, L), 256 * L, **settings)
        (loss(model, batch, "sum") / batch.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    def drawn(steps: int | None) -> np.ndarray:
        generator, counts = torch.Generator().manual_seed(0), np.zeros((V,) * L)
        draw = lambda logits, *_: torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]  # noqa: E731
        for _ in range(600):
            *_, text = denoise(model, torch.tensor([[1]]), L, draw, (), steps=steps, block=BLOCK)
            counts[tuple(text.tolist())] += 1
        return counts

    given = joint[1] / joint[1].sum()
    statistic, limit = chi_square(drawn(None), given)
    assert statistic < limit
    at_once, _ = chi_square(drawn(1), given)
    assert at_once > 2 * limit


def test_the_server_counts_the_caches_that_answers_make(monkeypatch):
    model, made = tiny_model(block_size=16, attention_window=[3, 0]), []

    class Counted(KVCache):
        def __init__(self, *arguments, **settings) -> None:
            super().__init__(*arguments, **settings)
            made.append(sum(tensor.nbytes for layer in self.layers for tensor in layer))

    monkeypatch.setattr("layers.denoising.KVCache", Counted)
    next(denoise(model, torch.tensor([[1, 3, 0]]), 8, lambda logits, *_: logits.argmax(-1), (), block=4))
    assert Places(model, 3, block=4).memory() == 3 * made[0]
    assert Places(tiny_model(is_causal=False), 3, block=4).memory() == 0


@pytest.mark.parametrize("is_causal", [True, False])
def test_no_flex_attention_for_a_text_and_its_copy(monkeypatch, is_causal):
    monkeypatch.setattr(preflight, "flex_attention_problem", lambda *_: "")
    config = TrainConfig(loss="diffusion", sdp_kernel="auto")
    engine = SimpleNamespace(device=torch.device("cuda"), use_compile=True, is_main=True)
    model = tiny_model(is_causal=is_causal)
    preflight.choose_attention(config, model, engine)
    assert model.use_flex == (not is_causal)  # copies_mask() is a tensor, and its memory is counted


def test_other_kinds_of_attention_and_modules_are_refused():
    for shape, message in (
        ({"attention": ["full", "linear"]}, "layer 2 has linear"),
        ({"attention": ["sparse"]}, "layer 1 has sparse"),
        ({"n_future": 2}, "no n_future"),
        ({"image_size": 8, "patch_size": 8}, "no image_size"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_model(**shape)


def test_training_takes_the_operations_of_a_text_and_its_copy():
    plain, blocks = (GPT(ModelConfig(vocab_size=V, n_embd=32, mask_token=mask)) for mask in (False, True))
    assert blocks.flops_per_token() == 2 * plain.flops_per_token()
    assert math.isclose(blocks.parameter_count(), plain.parameter_count() + 32)
