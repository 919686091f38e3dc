"""Linear attention: the gated delta rule, in chunks and token by token, in the layer of Qwen3-Next."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_attention_kinds import make, tokens
from torch.utils.flop_counter import FlopCounterMode

from base.configuration import UserError
from layers.cache import KVCache
from layers.linear_attention import gated_delta_rule
from layers.speculative import DraftModel, PromptLookup
from model import GPT, ModelConfig
from serving.rows import Rows
from serving.text_generator import load_drafter

SHAPE = {"vocab_size": 50, "block_size": 256, "n_layer": 1, "n_head": 4, "n_embd": 32, "attention": ["linear"]}


def random_inputs(B, H, T, D, seed=0):
    """q, k of length 1, v, log_alpha, beta, S, of the size that a layer has."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = random(3, B, H, T, D)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    return q, k, v, -random(B, H, T, 1).square() / 10, random(B, H, T, 1).sigmoid(), random(B, H, D, D)


def by_definition(q, k, v, log_alpha, beta, S, starts=()):
    """A loop over the tokens, in the words of the paper: S <- S alpha (I - beta k k^T) + beta v k^T, S (D_v, D_k)."""
    S, y = S.mT, []
    for t in range(q.size(2)):
        if t in starts:
            S = torch.zeros_like(S)
        column = lambda x: x[:, :, t, :, None]  # noqa: B023, E731
        alpha, b, identity = column(log_alpha).exp(), column(beta), torch.eye(q.size(-1), dtype=q.dtype)
        S = alpha * S @ (identity - b * column(k) @ column(k).mT) + b * column(v) @ column(k).mT
        y.append((S @ column(q)).squeeze(-1))
    return torch.stack(y, 2), S.mT


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
def test_chunks_give_what_a_loop_over_tokens_gives(T):
    inputs = random_inputs(2, 3, T, 8)
    for ours, expected in zip(gated_delta_rule(*inputs), by_definition(*inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_chunks_have_the_gradients_of_a_loop_over_tokens():
    gradients = []
    for rule in (gated_delta_rule, by_definition):
        inputs = [t.requires_grad_() for t in random_inputs(1, 2, 150, 4)]
        y, S = rule(*inputs)
        (y.sin().sum() + S.cos().sum()).backward()
        gradients.append([t.grad for t in inputs])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("T", [1, 100])
def test_it_is_the_rule_of_transformers(T):
    """Two independent implementations, which compute in float32."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, log_alpha, beta, S = random_inputs(2, 3, T, 16)
    ours = gated_delta_rule(q / 16**0.5, k, v, log_alpha, beta, S)
    swapped = [t.transpose(1, 2) for t in (q, k, v)] + [t.squeeze(-1).transpose(1, 2) for t in (log_alpha, beta)]
    for rule in (qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule):
        y, after = rule(*swapped, initial_state=S, output_final_state=True)
        torch.testing.assert_close(ours[0], y.transpose(1, 2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1], after.double(), rtol=1e-4, atol=1e-5)


def test_a_document_begins_with_an_empty_state():
    """At any place of a chunk, more than once in one, and at the first token of another."""
    inputs, starts = random_inputs(2, 3, 200, 8), (0, 3, 4, 60, 64, 128, 190)
    position = torch.arange(200) - torch.tensor([max(s for s in starts if s <= t) for t in range(200)])
    y, _ = gated_delta_rule(*inputs, position.expand(2, -1))
    torch.testing.assert_close(y, by_definition(*inputs, starts=starts)[0], rtol=1e-10, atol=1e-12)


def test_it_forgets_everything_without_trouble():
    """alpha of e^-500 for every token: g as a quotient of products would be 0 / 0."""
    inputs = random_inputs(1, 2, 100, 8)
    inputs = [t.float().requires_grad_() for t in (*inputs[:3], torch.full((1, 2, 100, 1), -500.0), *inputs[4:])]
    y, _ = gated_delta_rule(*inputs)
    q, k, v, _, beta, _ = inputs
    torch.testing.assert_close(y, (q * k).sum(-1, keepdim=True) * beta * v)  # a token's own value alone
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)


def test_in_float32_chunks_of_equal_keys_are_as_exact_as_a_loop():
    """One key again and again is the hardest system: powers of A, which sum to its inverse, would be huge."""
    q, k, v, log_alpha, beta, S = random_inputs(1, 1, 256, 16)
    k, log_alpha, beta = k[:, :, :1].expand_as(k), log_alpha * 0, beta * 0 + 0.99
    expected = by_definition(q, k, v, log_alpha, beta, S)[0]
    y = gated_delta_rule(*(t.float() for t in (q, k, v, log_alpha, beta, S)))[0]
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


def test_it_is_the_layer_of_qwen3_next():
    """With the same weights, in their order (head by head: q, k, v, gate); over 150 tokens, with their own cache."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    from transformers.cache_utils import DynamicCache

    ours = make(**SHAPE, norm_eps=1e-6).float()
    attention = ours.blocks[0].attention
    settings = {"hidden_size": 32, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    settings |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "num_hidden_layers": 1, "rms_norm_eps": 1e-6}
    config = qwen.Qwen3NextConfig(**settings, layer_types=["linear_attention"], vocab_size=50)
    theirs = qwen.Qwen3NextGatedDeltaNet(config, 0).eval()
    torch.nn.init.uniform_(attention.offset, -5, 0)  # memories of several tokens
    weights = {name: parameter.detach() for name, parameter in attention.named_parameters()}
    heads = torch.cat((weights["qkv.weight"], weights["gate.weight"])).view(4, 4, 8, 32)
    rates = torch.stack((weights["beta.weight"], weights["alpha.weight"]))  # (2, n_head, n_embd)
    renamed = {
        "in_proj_qkvz.weight": heads.transpose(0, 1).reshape(128, 32),
        "in_proj_ba.weight": rates.transpose(0, 1).reshape(8, 32),
        "conv1d.weight": weights["convolution"].T[:, None],
        "A_log": weights["log_rate"],
        "dt_bias": weights["offset"],
        "norm.weight": weights["norm.weight"],
        "out_proj.weight": weights["out.weight"],
    }
    theirs.load_state_dict(renamed)
    x = torch.randn(3, 150, 32)
    cache, kept = KVCache(ours.config, 3, x.device, x.dtype), DynamicCache(config=config)
    with torch.inference_mode():
        expected = theirs(x)
        torch.testing.assert_close(attention(x, None), expected, rtol=1e-4, atol=1e-4)
        assert expected.abs().max() > 0.5
        for part in x.split([90, 1, 1, 58], dim=1):
            cache.begin(part.size(1))
            y = attention(part, None, None, cache)
            cache.advance()
            torch.testing.assert_close(y, theirs(part, cache=kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", [["linear"], ["linear", "full"]])
def test_a_text_in_pieces_is_as_in_one_pass(attention):
    """Chunks that begin anywhere, single tokens between; and a row that begins again knows nothing of what it held."""
    model, idx = make(**SHAPE | {"attention": attention, "n_layer": 2}), tokens(2, 200)
    for block in model.blocks[:: len(attention)]:
        torch.nn.init.uniform_(block.attention.offset, -5, 0)  # memories of several tokens
    cache = KVCache(model.config, 2, idx.device, torch.float64)
    for tensor in cache.tensors():
        tensor.fill_(torch.nan)  # what a text left whose numbers were too large
    with torch.inference_mode():
        whole = model.hidden(idx)
        for _ in range(2):
            parts = [model.hidden(part, cache) for part in idx.split([70, 1, 1, 64, 3, 61], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
            cache.lengths[:] = 0


def test_the_cache_is_as_large_for_any_text_and_in_full_precision():
    """Per layer n_head D^2 numbers and three inputs of the convolution, in float32 whatever the weights are."""
    for block_size in (64, 4096):
        config = ModelConfig(**SHAPE | {"block_size": block_size, "n_layer": 2})
        tensors = KVCache(config, 3, torch.device("cpu"), torch.bfloat16).tensors()
        assert sum(t.nbytes for t in tensors) == 3 * 2 * 4 * (4 * 8 * 8 + 3 * 96)
        assert all(t.dtype == torch.float32 for t in tensors)


def test_drafts_are_refused():
    """A rejected token cannot be taken out of a state again, be it the model's or the draft's."""
    linear, full = (make(attention, block_size=64) for attention in (["full", "linear"], ["full"]))
    with pytest.raises(UserError, match="attention full,linear: no token can be taken back"):
        next(linear.generate(tokens(1, 5), 10, drafter=PromptLookup()))
    with pytest.raises(UserError, match="no token can be taken back"):
        DraftModel(linear, full)
    with pytest.raises(UserError, match="no token can be taken back"):  # not at the first answer
        load_drafter("lookup", SimpleNamespace(model=linear, device=torch.device("cpu")))


def test_steps_of_other_rows_leave_a_state_alone():
    """A step of a batch computes idle rows too: one that is half read, one that is empty."""
    rows, model = Rows(make(**SHAPE), 4), make(**SHAPE)
    texts = tokens(3, 20).tolist()
    with torch.inference_mode():
        for row, text in enumerate(texts):
            rows.read(row, text[:9])
        for token in (3, 4, 5):
            rows.step({1: token})
        hidden = rows.read(2, texts[2][9:])
        torch.testing.assert_close(hidden, model.hidden(torch.tensor(texts[2:]))[0, 9:], rtol=1e-9, atol=1e-9)
        assert not rows.has(1, 9) and rows.has(1, 12) and rows.keep(1, 9) == 0  # nothing can be taken back
        rows.copy(0, 3, 9)
        hidden = rows.read(3, texts[0][9:])
        torch.testing.assert_close(hidden, model.hidden(torch.tensor(texts[:1]))[0, 9:], rtol=1e-9, atol=1e-9)


def test_memories_begin_between_10_and_1000_tokens():
    """Where alpha(x) is 0, -log alpha is the rate; the convolution begins as torch's do, not near 0 as matrices."""
    torch.manual_seed(0)
    attention = GPT(ModelConfig(**SHAPE | {"n_embd": 512})).blocks[0].attention
    rates = attention.log_rate.exp() * torch.nn.functional.softplus(attention.offset)
    torch.testing.assert_close(rates, torch.tensor([10**-1.0, 10 ** (-5 / 3), 10 ** (-7 / 3), 10**-3.0]))
    assert attention.convolution.abs().max() <= 0.5
    assert attention.convolution.std().item() == pytest.approx(0.29, rel=0.05)


def test_flops_are_those_of_its_products():
    """Torch counts products; the triangular system, half a product forward and as much backward, is added here."""
    shape = SHAPE | {"block_size": 1024, "n_head": 2, "n_embd": 64}
    model, idx = GPT(ModelConfig(**shape)), tokens(1, 1024)
    solve = {torch.ops.aten.linalg_solve_triangular: lambda A, B, *_, **__: math.prod(B) * A[-1]}
    with FlopCounterMode(display=False, custom_mapping=solve) as counter:
        model(idx, idx)[1].backward()
    convolution = 6 * model.blocks[0].attention.convolution.numel() * 1024  # sums of products of numbers
    assert counter.get_total_flops() + convolution == pytest.approx(model.flops_per_token() * 1024, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_causal": False}, "attention linear .* is_causal must be true"),
        ({"attention_window": [0, 8]}, "attention_window 8 of layer 2: attention linear has no window; give 0 there"),
        ({"n_kv_head": 2}, "n_kv_head .2. is for full attention"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**{"n_head": 4, "n_embd": 32, "attention": ["linear"], **fields})


def test_beside_full_layers_both_have_what_is_theirs():
    """A window and fewer key/value heads in the full layer; positions by RoPE there alone."""
    options = {"attention": ["linear", "full"], "n_kv_head": 2, "attention_window": [0, 8], "qkv_bias": True}
    model = make(**SHAPE | {"n_layer": 4, "block_size": 16} | options)
    assert model.rope_widths == [0, 8, 0, 8] and model.windows == [None, 8, None, 8]
    generate = lambda cached: torch.stack(list(model.generate(tokens(2, 5), 40, seed=1, use_cache=cached)))  # noqa: E731
    assert torch.equal(generate(True), generate(False))
