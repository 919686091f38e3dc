"""Sparse attention: blocks chosen query by query, as by a loop; with all of them full attention."""

import math

import pytest
import torch
from test_attention_kinds import make, tokens

from base.configuration import UserError
from layers import sparse_attention
from layers.cache import KVCache
from layers.sparse_attention import SparseAttention
from model import ModelConfig
from serving.rows import Rows

SHAPE = {"vocab_size": 50, "block_size": 64, "n_layer": 1, "n_head": 4, "n_embd": 32}
SPARSE = {"attention": ["sparse"], "sparse_block_size": 4, "sparse_top_k": 3}


def one_by_one(q, k, v, b, top_k, is_causal=True):
    """Of one text, q (n_head, T, D), k, v (n_kv_head, T, D): in Python, block by block, for each query by itself."""
    n_groups, T = len(q) // len(k), q.size(1)
    y = torch.zeros_like(q)
    for group in range(len(k)):
        heads = range(group * n_groups, (group + 1) * n_groups)
        for t in range(T):
            blocks = [range(i, min(i + b, T)) for i in range(0, T, b)]
            others = [block for block in blocks if t not in block and (block[0] < t or not is_causal)]
            total = {block: sum(float(q[h, t] @ k[group, block].mean(0)) for h in heads) for block in others}
            chosen = sorted(others, key=total.get, reverse=True)[: top_k - 1]
            chosen += [block for block in blocks if t in block]
            keys = sorted(i for block in chosen for i in block if i <= t or not is_causal)
            for h in heads:
                weights = (k[group, keys] @ q[h, t] / math.sqrt(q.size(-1))).softmax(0)
                y[h, t] = weights @ v[group, keys]
    return y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_kv_head": 2},
        {"n_kv_head": 1, "sparse_top_k": 2},
        {"sparse_top_k": 1},
        {"sparse_block_size": 7},
        {"sparse_block_size": 1, "sparse_top_k": 5},
        {"sparse_block_size": 40},
        {"is_causal": False},
        {"use_rope": False, "qk_norm": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("queries", [1024, 9])
def test_blocks_are_chosen_as_by_a_loop_over_queries(options, queries, monkeypatch):
    """41 tokens: the last block is not whole, whatever its size; a text is read in one piece, or in several."""
    monkeypatch.setattr(sparse_attention, "QUERIES", queries)
    model = make(**{**SHAPE, **SPARSE, **options})
    config, attention, x = model.config, model.blocks[0].attention, torch.randn(2, 41, 32, dtype=torch.float64)
    rope = model.rope(slice(41))[0]
    with torch.no_grad():
        q, k, v = attention.project(x, rope)
        limits = config.sparse_block_size, config.sparse_top_k, config.is_causal
        rows = [one_by_one(*row, *limits) for row in zip(q, k, v, strict=True)]
        expected = attention.out(torch.stack(rows).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, rope), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}, {"is_causal": False}])
@pytest.mark.parametrize("limits", [(4, 16), (5, 100), (64, 1)])
def test_with_all_blocks_it_is_full_attention(options, limits):
    """Logits, and gradients of all weights."""
    sizes = dict(zip(("sparse_block_size", "sparse_top_k"), limits, strict=True))
    full, sparse = make(["full"], **SHAPE, **options), make(["sparse"], **SHAPE, **options, **sizes)
    sparse.load_state_dict(full.state_dict())
    idx, results = tokens(2, 64), []
    for model in (full, sparse):
        logits, loss = model(idx, idx.roll(-1, 1))
        loss.backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}, {"sparse_block_size": 5}])
def test_a_token_moves_nothing_before_it_and_not_what_does_not_read_it(options):
    """One layer: a changed token reaches later queries alone, and of those only the ones that chose its block."""
    model = make(**{**SHAPE, **SPARSE, **options})
    idx = tokens(1, 40)
    changed = idx.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 50
    difference = (model(idx)[0] - model(changed)[0]).abs().amax(-1)[0]
    assert (difference[:10] == 0).all() and difference[10] > 0
    assert (difference[11:] > 0).any() and (difference[11:] == 0).any()


def test_a_step_reads_the_chosen_blocks_alone():
    """What other blocks hold in the cache, be it not a number, changes nothing."""
    model, idx = make(**{**SHAPE, **SPARSE}), tokens(1, 42)
    cache = KVCache(model.config, 1, idx.device, torch.float64)
    with torch.inference_mode():
        model.hidden(idx[:, :41], cache)
        attention, x = model.blocks[0].attention, model.blocks[0].attention_norm(model.token_embedding(idx))
        q, k, _ = attention.project(x, model.rope(slice(42))[0])
        seen = attention.visible(q, k, None)[0, :, -1]  # (n_head, keys)
        assert (seen.sum(-1) == 4 + 4 + 2).all()
        for ring in cache.layers[0][:2]:
            ring[0, :, :42][~seen] = torch.nan
        torch.testing.assert_close(model.hidden(idx[:, 41:], cache)[0, 0], model.hidden(idx)[0, 41])


@pytest.mark.parametrize("options", [{}, {"sparse_block_size": 7}, {"n_kv_head": 1}])
def test_tokens_taken_back_leave_no_trace_in_the_means(options):
    """As a rejected draft does, and a row of the server that is cut back to what two prompts share."""
    model, idx = make(**{**SHAPE, **SPARSE, **options}), tokens(2, 90)
    cache = KVCache(model.config, 2, idx.device, torch.float64)
    old, new = idx.split([37, 53], dim=1)
    with torch.inference_mode():
        for piece in old.split([30, *[1] * 7], dim=1):
            model.hidden(piece, cache)
        cache.lengths[:] = 3, 9
        texts = [old[0, :3], old[1, :9]]
        for piece in new.split([5, *[1] * 48], dim=1):
            texts = [torch.cat(pair) for pair in zip(texts, piece, strict=True)]
            for text, ours in zip(texts, model.hidden(piece, cache), strict=True):
                torch.testing.assert_close(ours[-1], model.hidden(text[None])[0, -1], rtol=1e-9, atol=1e-9)


def test_rows_of_the_server_are_read_continued_and_copied_as_if_alone():
    """Steps compute idle rows too, and leave something in them; a prompt begins with what another has read."""
    model = make(**{**SHAPE, **SPARSE})
    rows, texts = Rows(model, 4), tokens(3, 40).tolist()
    with torch.inference_mode():
        for row, text in enumerate(texts):
            rows.read(row, text[: 9 + row])
        texts[1] = texts[1][:10]
        for token in range(20):
            logits = rows.step({1: token})
            texts[1].append(token)
            torch.testing.assert_close(logits[0], model(torch.tensor([texts[1]]))[0][0, -1], rtol=1e-9, atol=1e-9)
        rows.copy(1, 3, 22)
        assert rows.keep(1, 13) == 13
        for row, before, new in (
            (2, texts[2][:11], texts[2][11:]),
            (3, texts[1][:22], [7, 8]),
            (1, texts[1][:13], [9]),
        ):
            expected = model.hidden(torch.tensor([before + new]))[0, len(before) :]
            torch.testing.assert_close(rows.read(row, new), expected, rtol=1e-9, atol=1e-9)


def test_the_means_take_one_number_per_block_of_keys():
    config = ModelConfig(**{**SHAPE, **SPARSE, "block_size": 62, "n_kv_head": 2})
    shapes = [tensor.shape[1:] for tensor in KVCache(config, 1, torch.device("cpu"), torch.float32).tensors()]
    assert shapes == [(2, 62, 8), (2, 62, 8), (2, 16, 8)]


def test_flops_are_those_of_the_chosen_keys_and_the_scores():
    """By hand: queries at 0..63 read at most 12 keys, here all up to their own as a window would."""
    config = ModelConfig(**SHAPE, **SPARSE)
    read = sum(min(t, 12) for t in range(1, 65)) / 64
    blocks = sum(t / 4 for t in range(1, 65)) / 64
    expected = 12 * 32 * read + 2 * 32 * blocks
    assert SparseAttention.flops_per_token(config, 32) == pytest.approx(expected, rel=0.03)


def test_heads_of_a_group_share_their_blocks():
    model = make(**{**SHAPE, **SPARSE, "n_kv_head": 2})
    x = torch.randn(1, 64, 32, dtype=torch.float64)
    q, k, _ = model.blocks[0].attention.project(x, model.rope(slice(64))[0])
    seen = model.blocks[0].attention.visible(q, k, None)[0]  # (n_head, T, keys)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparse_block_size": 65}, "sparse_block_size .65. is longer than the context window"),
        ({"sparse_block_size": 0}, "sparse_block_size must be at least 1"),
        ({"sparse_top_k": 0}, "sparse_top_k must be at least 1"),
        ({"attention": ["full"]}, "sparse_block_size is for attention sparse: leave it out"),
        ({"attention_window": [0, 8]}, "attention_window 8 of layer 2: attention sparse has no window; give 0 there"),
        ({"n_embd": 12}, "RoPE needs an even head_dim"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**{**SHAPE, **SPARSE, "n_layer": 2, **fields})


def test_what_is_left_out_is_a_quarter_of_the_window():
    config = ModelConfig(block_size=4096, attention=["sparse"])
    assert (config.sparse_block_size, config.sparse_top_k) == (16, 64)
    config = ModelConfig(block_size=10, attention=["sparse"])
    assert (config.sparse_block_size, config.sparse_top_k) == (10, 1)
    assert ModelConfig(**config.to_dict()) == config  # as a checkpoint's config is read
