import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from base.configuration import UserError
from layers.attention_maps import attention_maps
from layers.cache import KVCache
from layers.experts import count_expert_tokens, mixture_layers
from layers.head import ChunkedCrossEntropy, Head, loss_and_gradients_compiled, softmax_gradient
from layers.norm import rms_norm
from layers.sampling import filter_logits, penalise_repetition
from model import GPT, SDP_KERNELS, ModelConfig

SMALL = {"vocab_size": 50, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}


def make(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**SMALL, **changes}))
    for parameter in model.parameters():  # large weights, so that differences show
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model.eval()


@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_rms_norm_and_its_gradients_are_those_of_torch(shape):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = F.rms_norm(x, (7,), eps=1e-3) * weight
    dy = torch.randn_like(expected)
    ours = rms_norm(x, weight, 1e-3)
    assert torch.allclose(ours, expected, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(rms_norm(x, weight, 1e-3), expected, atol=1e-12)
    gradients = (torch.autograd.grad(y, (x, weight), dy) for y in (ours, expected))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))
    half = x.detach().bfloat16().requires_grad_()
    y = rms_norm(half, weight.float(), 1e-3)
    (dx,) = torch.autograd.grad(y, half, dy.bfloat16())
    assert y.dtype == dx.dtype == torch.bfloat16
    assert torch.allclose(y.double(), expected, rtol=0.02, atol=0.02)
    large = torch.full((7,), 1000.0, dtype=torch.float16)  # its square is beyond float16
    torch.testing.assert_close(rms_norm(large, torch.ones(7), 1e-3), torch.ones(7, dtype=torch.float16))


def tokens(*shape: int, vocab_size: int = 50) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(1))


def to_transformers(model: GPT, reference: torch.nn.Module) -> None:
    """Copy our weights into a Llama or Qwen3 of the transformers library."""
    ours = model.state_dict()
    config = model.config
    kv_dim = config.n_kv_head * config.head_dim
    n_expert = config.n_expert
    theirs = {"model.embed_tokens.weight": ours["token_embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    theirs["lm_head.weight"] = ours["lm_head.weight"]
    for i in range(config.n_layer):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        for suffix in ("weight", "bias") if config.bias else ("weight",):
            q, k, v = ours[f"{a}attention.qkv.{suffix}"].split([config.n_embd, kv_dim, kv_dim])
            theirs |= {
                f"{b}self_attn.q_proj.{suffix}": q,
                f"{b}self_attn.k_proj.{suffix}": k,
                f"{b}self_attn.v_proj.{suffix}": v,
                f"{b}self_attn.o_proj.{suffix}": ours[f"{a}attention.out.{suffix}"],
            }
            if not n_expert:
                gate, up = ours[f"{a}mlp.up.{suffix}"].chunk(2)
                theirs[f"{b}mlp.gate_proj.{suffix}"], theirs[f"{b}mlp.up_proj.{suffix}"] = gate, up
                theirs[f"{b}mlp.down_proj.{suffix}"] = ours[f"{a}mlp.down.{suffix}"]
        if n_expert:
            theirs[f"{b}mlp.gate.weight"] = ours[f"{a}mlp.router.weight"]
            theirs[f"{b}mlp.experts.gate_up_proj"] = ours[f"{a}mlp.up"]
            theirs[f"{b}mlp.experts.down_proj"] = ours[f"{a}mlp.down"]
        theirs[f"{b}input_layernorm.weight"] = ours[f"{a}attention_norm.weight"]
        theirs[f"{b}post_attention_layernorm.weight"] = ours[f"{a}mlp_norm.weight"]
        if config.qk_norm:
            theirs[f"{b}self_attn.q_norm.weight"] = ours[f"{a}attention.q_norm.weight"]
            theirs[f"{b}self_attn.k_norm.weight"] = ours[f"{a}attention.k_norm.weight"]
    reference.load_state_dict(theirs)


def settings_of(model: GPT) -> dict:
    """What a config of the transformers library needs to describe our model."""
    config = model.config
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.bias,
        "attn_implementation": "eager",
    }


def assert_same_logits(model: GPT, reference: torch.nn.Module, idx: torch.Tensor) -> None:
    to_transformers(model, reference.eval())
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], reference(idx).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qwen3", "llama"])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_logits_equal_transformers(qk_norm, n_kv_head, tie):
    transformers = pytest.importorskip("transformers")
    bias = not qk_norm  # Llama has the option, Qwen3 has it for attention only
    model = make(qk_norm=qk_norm, n_kv_head=n_kv_head, tie_embeddings=tie, rope_theta=5000.0, bias=bias)
    shared = settings_of(model)
    if qk_norm:
        reference = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shared))
    else:
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, mlp_bias=bias))
    assert_same_logits(model, reference, tokens(3, 16))


@pytest.mark.parametrize("n_expert_per_token", [1, 2, 8])
def test_experts_equal_transformers(n_expert_per_token):
    transformers = pytest.importorskip("transformers")
    model = make(n_expert=8, n_expert_per_token=n_expert_per_token, n_hidden=24)
    experts = {"num_experts": 8, "num_experts_per_tok": n_expert_per_token, "moe_intermediate_size": 24}
    experts["norm_topk_prob"] = n_expert_per_token > 1  # one expert: its probability is the gate, as in Switch
    config = transformers.Qwen3MoeConfig(**settings_of(model), **experts, mlp_only_layers=[])
    assert_same_logits(model, transformers.Qwen3MoeForCausalLM(config), tokens(3, 16))


@pytest.mark.parametrize("window", [1, 3, 15, 16])
def test_windows_equal_transformers(window):
    transformers = pytest.importorskip("transformers")
    model = make(qk_norm=False, attention_window=[window])
    config = transformers.MistralConfig(**settings_of(model), sliding_window=window)
    assert_same_logits(model, transformers.MistralForCausalLM(config), tokens(3, 16))


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_scaled_rope_equals_transformers(kind, factor):
    """theirs is "dynamic" for ntk: its base follows the length read, ours is that of the full length."""
    transformers = pytest.importorskip("transformers")
    model = make(rope_scaling=kind, rope_factor=factor, block_size=64, rope_theta=5000.0)
    trained = int(64 / factor)
    rope = {"linear": {"factor": factor}, "ntk": {"rope_type": "dynamic", "factor": 1.0}, "yarn": {"factor": factor}}
    rope = {"rope_type": kind, "rope_theta": 5000.0, "original_max_position_embeddings": trained, **rope[kind]}
    settings = settings_of(model) | {"rope_parameters": rope}
    settings["max_position_embeddings"] = trained if kind == "ntk" else 64
    reference = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings))
    assert_same_logits(model, reference, tokens(2, 64))


def naive_attention(q, k, v, is_causal):
    """One query at a time, in float64."""
    B, H, T, D = q.shape
    y = torch.zeros(B, H, T, D, dtype=torch.float64)
    for t in range(T):
        keys = slice(0, t + 1 if is_causal else T)
        scores = (q[:, :, t : t + 1].double() @ k[:, :, keys].double().mT) / math.sqrt(D)
        y[:, :, t : t + 1] = scores.softmax(-1) @ v[:, :, keys].double()
    return y


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("repeated", [False, True])
def test_attention_equals_a_naive_loop(is_causal, repeated, monkeypatch):
    """repeated: key/value heads are copied for the query heads, as for kernels that know no groups of them."""
    if repeated:
        monkeypatch.setattr("layers.attention.takes_groups", lambda *_: False)
    model = make(is_causal=is_causal, use_rope=False, qk_norm=False, n_kv_head=2)
    attention = model.blocks[0].attention
    x = torch.randn(2, 16, 32)
    q, k, v = attention.qkv(x).split([32, 16, 16], dim=-1)
    q = q.view(2, 16, 4, 8).transpose(1, 2)
    k, v = (t.view(2, 16, 2, 8).transpose(1, 2)[:, [0, 0, 1, 1]] for t in (k, v))
    expected = naive_attention(q, k, v, is_causal).transpose(1, 2).reshape(2, 16, 32).float()
    torch.testing.assert_close(attention(x, None, None), attention.out(expected), rtol=1e-4, atol=1e-5)


def test_rope_scores_depend_on_the_distance_alone():
    model = make(block_size=64)
    attention = model.blocks[0].attention
    from layers.rope import apply_rope

    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    assert attention.config.head_dim == 8

    def score(i: int, j: int) -> float:
        at = lambda x, p: apply_rope(x, model.rope_cos[p : p + 1], model.rope_sin[p : p + 1])  # noqa: E731
        return (at(q, i) * at(k, j)).sum().item()

    assert score(7, 3) == pytest.approx(score(45, 41), rel=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-4


@pytest.mark.parametrize("is_causal", [True, False])
def test_causal_models_do_not_see_the_future(is_causal):
    model = make(is_causal=is_causal)
    idx = tokens(1, 16)
    changed = idx.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 50
    before = (model(idx)[0] - model(changed)[0])[:, :10].abs().max()
    assert (before == 0) == is_causal


@pytest.mark.parametrize("mlp", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("n_kv_head", [4, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_every_combination_trains(mlp, use_rope, n_kv_head, bias):
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SMALL, mlp=mlp, use_rope=use_rope, n_kv_head=n_kv_head, bias=bias, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    idx = tokens(4, 17)
    losses = []
    for _ in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(50), abs=0.5)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("mlp", ["swiglu", "gelu", "relu2"])
def test_every_kind_of_mlp_is_its_formula(mlp):
    layer = make(mlp=mlp, n_hidden=24, bias=True).blocks[0].mlp
    x = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = (x @ layer.up.weight.double().mT + layer.up.bias.double()).split(24, dim=-1)
    if mlp == "swiglu":
        hidden = parts[0] / (1 + (-parts[0]).exp()) * parts[1]
    elif mlp == "gelu":
        hidden = parts[0] * (1 + torch.erf(parts[0] / math.sqrt(2))) / 2  # x times the normal distribution up to x
    else:
        hidden = parts[0].clamp(min=0) ** 2
    expected = hidden @ layer.down.weight.double().mT + layer.down.bias.double()
    torch.testing.assert_close(layer(x.float()).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_hidden_width_gives_equal_parameter_counts_rounded_up():
    assert ModelConfig(n_embd=100, n_head=2).n_hidden == 288  # 8/3 of 100, up to a multiple of 32
    assert ModelConfig(n_embd=100, n_head=2, mlp="gelu").n_hidden == 416
    assert ModelConfig(n_embd=96).n_hidden == 256


@pytest.mark.parametrize("kernel", ["math", "flash"])
def test_attention_kernels_agree(kernel):
    model, idx = make(), tokens(2, 16)
    expected = model(idx)[0]
    model.sdp_kernel = kernel
    torch.testing.assert_close(model(idx)[0], expected, rtol=1e-4, atol=1e-4)
    assert kernel in SDP_KERNELS


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("loss_mask", [None, torch.arange(2 * 9).view(2, 9) % 3 > 0])
@pytest.mark.parametrize("chunk", [4, 17])
def test_a_loss_without_logits_is_the_same_loss(monkeypatch, tie_embeddings, loss_mask, chunk):
    """The logits of a few tokens at a time, and 2 or 1 at the end, or all at once: the same loss and gradients."""
    model = make(tie_embeddings=tie_embeddings).double()
    idx, targets = tokens(2, 9), tokens(2, 9).flip(0)
    loss_mask = None if loss_mask is None else loss_mask.float()
    monkeypatch.setattr("layers.head.logits_per_chunk", lambda device: chunk * 50 + 7)
    gradients = []
    for with_logits in (True, False):
        model.zero_grad()
        logits, loss = model(idx, targets, loss_mask, "sum", None, with_logits)
        assert (logits is not None) == with_logits
        (3 * loss).backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
        with torch.no_grad():
            assert model(idx, targets, loss_mask, "sum", None, with_logits)[1] == loss
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, check_dtype=False)
    count = 18 if loss_mask is None else 12
    mean = model(idx, targets, loss_mask, "mean", None, False)[1]
    assert mean.item() == pytest.approx(gradients[0][0].item() / count)


def test_a_target_that_is_not_in_the_loss_needs_no_logits():
    """Whatever the hidden state before it is; and in a form for GPUs, which would wait for the number of targets."""
    weight, targets = torch.randn(50, 8, dtype=torch.float64), torch.arange(12) % 50
    hidden, mask = torch.randn(12, 8, dtype=torch.float64), (torch.arange(12) % 3 > 0).double()
    head = Head(8, 50).double()
    gradients = []
    for form in ("whole", "left out", "masked"):
        head.weight.data, head.weight.grad = weight.clone(), None
        h = hidden.clone().requires_grad_()
        if form == "whole":
            loss = (F.cross_entropy(h @ head.weight.T, targets, reduction="none") * mask).sum()
        elif form == "left out":
            holes = torch.where(mask[:, None] > 0, h, torch.nan)
            loss = head(holes.view(2, 6, 8), targets.view(2, 6), mask.view(2, 6))
        else:
            loss = ChunkedCrossEntropy.apply(h, head.weight, targets, mask, 5)
        loss.backward()
        gradients.append([loss.detach(), h.grad, head.weight.grad])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("chunk_size", [5, 12])
def test_the_loss_compiled_for_a_gpu_is_that_of_all_logits(monkeypatch, chunk_size):
    """Run as it is written: tests/test_gpu.py compiles it."""
    monkeypatch.setattr("layers.head.compiled_softmax_gradient", lambda: softmax_gradient)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (12, 50))
    targets, mask = torch.arange(12) * 4, (torch.arange(12) % 3 > 0).long()
    loss = (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * mask).sum()
    loss.backward()
    with torch.no_grad():
        actual = loss_and_gradients_compiled(hidden, weight, targets, mask, chunk_size)
    for a, b in zip(actual, (loss.detach(), hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(a, b)


def test_losses_of_single_targets_need_no_logits_either(monkeypatch):
    """Values and gradients by chunks of 4 tokens, as of all logits at once."""
    model, idx, targets = make(), tokens(2, 9), tokens(2, 9).flip(0)
    mask, weights = (torch.arange(18).view(2, 9) % 3 > 0).float(), torch.linspace(-1, 1, 18).view(2, 9)
    monkeypatch.setattr("layers.head.logits_per_chunk", lambda device: 4 * 50 + 7)
    found = []
    for with_logits in (True, False):
        model.zero_grad()
        logits, losses = model(idx, targets, mask, "none", None, with_logits)
        assert (logits is not None) == with_logits and losses.shape == (2, 9)
        (losses * weights).sum().backward()
        found.append([losses.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_loss_is_the_mean_over_the_masked_in_targets():
    model, idx, targets = make(), tokens(2, 5), tokens(2, 5).flip(0)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).float()
    probabilities = model(idx)[0].double().softmax(-1)
    losses = [-math.log(probabilities[b, t, targets[b, t]].item()) for b, t in ((0, 1), (0, 2), (1, 0))]
    assert model(idx, targets, mask)[1].item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert model(idx, targets, mask, "sum")[1].item() == pytest.approx(sum(losses), rel=1e-5)
    assert (model(idx, targets, mask, "none")[1] == 0).sum() == 7
    assert model(idx, targets)[1].item() != pytest.approx(sum(losses) / 3, rel=1e-3)


@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_cached_logits_equal_uncached_ones(use_rope, n_kv_head):
    model, idx = make(use_rope=use_rope, n_kv_head=n_kv_head), tokens(2, 16)
    with torch.no_grad():
        expected = model(idx)[0]
        cache = KVCache(model.config, 2, idx.device, torch.float32)
        parts = [model.lm_head(model.hidden(part, cache)) for part in idx.split([5, 1, 1, 6, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_windows_are_repeated_over_the_layers():
    assert ModelConfig(n_layer=5, attention_window=[4, 0]).windows == [4, 0, 4, 0, 4]
    assert ModelConfig(n_layer=2).windows == [0, 0]


@pytest.mark.parametrize("pattern", [[4], [4, 0], [1], [0, 7, 3]])
def test_a_windowed_cache_holds_no_more_than_its_window(pattern):
    model, idx = make(n_layer=3, attention_window=pattern), tokens(2, 16)
    with torch.no_grad():
        expected = model(idx)[0]
        cache = KVCache(model.config, 2, idx.device, torch.float32)
        parts = [model.lm_head(model.hidden(part, cache)) for part in idx.split([6, 1, 1, 5, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    for window, (keys, values) in zip(model.config.windows, cache.layers, strict=True):
        assert keys.size(2) == values.size(2) == (window or 16)
    options = {"max_new_tokens": 40, "seed": 3}
    cached = torch.stack(list(model.generate(idx[:, :3], **options)))
    assert torch.equal(cached, torch.stack(list(model.generate(idx[:, :3], **options, use_cache=False))))


@pytest.mark.parametrize("options", [{}, {"use_rope": False}, {"attention_window": [3]}, {"is_causal": False}])
def test_documents_in_one_window_are_as_if_alone(options):
    model, idx = make(**options), tokens(1, 16)
    lengths = [5, 1, 7, 3]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model.lm_head(model.hidden(idx, documents=documents))
    alone = [model(part)[0] for part in idx.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
    assert (packed - model(idx)[0]).abs().max() > 0.1  # it makes a difference


def test_documents_may_go_on_in_position():
    """restart_positions false: a document sees itself alone, at the positions that it has in the window."""
    model, idx = make(use_rope=False), tokens(2, 12)
    model.restart_positions = False
    documents = torch.tensor([[0] * 5 + [1] * 7])
    packed = model(idx, documents=documents.expand(2, -1))[0]
    torch.testing.assert_close(packed[:, :5], model(idx[:, :5])[0], rtol=1e-4, atol=1e-4)
    alone = make(use_rope=False)
    with torch.no_grad():  # a model whose position 0 is the position 5 of the other
        alone.position_embedding.weight[:7] = model.position_embedding.weight[5:12]
    torch.testing.assert_close(packed[:, 5:], alone(idx[:, 5:])[0], rtol=1e-4, atol=1e-4)


def test_experts_are_balanced_by_either_means():
    """A router that begins with a favourite: with balance it ends near equal shares, without it does not."""
    shares = {}
    for balance in ("loss", "bias", "none"):
        torch.manual_seed(0)
        options = {"n_expert": 4, "n_expert_per_token": 1, "expert_balance": balance, "n_hidden": 32}
        model = GPT(ModelConfig(**SMALL, **options, router_loss_weight=1.0, expert_bias_rate=0.01))
        with torch.no_grad():
            model.token_embedding.weight[:, 0] += 0.2  # something that all tokens have in common
            for mixture in mixture_layers(model):
                mixture.router.weight[0, 0] += 1.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(60):
            idx = tokens(8, 16) if step == 0 else torch.randint(0, 50, (8, 16))
            model(idx, idx)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
            counts = count_expert_tokens(model, lambda counts: counts)
        assert counts.sum() == 2 * 8 * 16
        shares[balance] = (counts / counts.sum(1, keepdim=True)).max().item()
    assert max(shares["loss"], shares["bias"]) < 0.45 < 0.7 < shares["none"], shares


def test_shared_experts_and_idle_ones():
    """All experts at work with equal gates and the shared one: a plain sum."""
    model = make(n_expert=2, n_expert_per_token=2, n_shared_expert=1, n_layer=1)
    mixture = model.blocks[0].mlp
    torch.nn.init.zeros_(mixture.router.weight)
    x = torch.randn(1, 5, 32)
    swiglu = lambda up, down: (F.silu((x @ up.mT).chunk(2, -1)[0]) * (x @ up.mT).chunk(2, -1)[1]) @ down.mT  # noqa: E731
    halves = [swiglu(up, down) / 2 for up, down in zip(mixture.up, mixture.down, strict=True)]
    torch.testing.assert_close(mixture(x), sum(halves) + mixture.shared(x), rtol=1e-4, atol=1e-5)


def test_flops_count_what_is_at_work():
    dense, sparse = make(n_hidden=64), make(n_hidden=32, n_expert=8, n_expert_per_token=2)
    router = 2 * 6 * 8 * 32
    assert sparse.flops_per_token() == dense.flops_per_token() + router
    assert sparse.parameter_count() > 1.5 * dense.parameter_count()
    full, windowed = make(), make(attention_window=[4])
    saved = sum(t + 1 - min(t + 1, 4) for t in range(16)) / 16  # keys a token
    assert full.flops_per_token() - windowed.flops_per_token() == pytest.approx(12 * 2 * 32 * saved, rel=0.1)


@pytest.mark.parametrize("length", [1, 10, 16, 40])
def test_generation_with_cache_equals_without_past_the_window(length):
    model = make()
    idx = tokens(2, length)
    options = {"max_new_tokens": 50, "temperature": 0.7, "top_k": 20, "seed": 3}
    if length > 16:
        with pytest.warns(UserWarning, match="40 tokens"):
            cached = torch.stack(list(model.generate(idx, **options)))
        with pytest.warns(UserWarning):
            uncached = torch.stack(list(model.generate(idx, **options, use_cache=False)))
    else:
        with warnings.catch_warnings(action="error"):  # nothing is left out of the prompt
            cached = torch.stack(list(model.generate(idx, **options)))
        uncached = torch.stack(list(model.generate(idx, **options, use_cache=False)))
    assert cached.shape == (50, 2)
    assert torch.equal(cached, uncached)


def test_greedy_generation_is_the_argmax_of_the_whole_window():
    model, idx = make(), tokens(1, 4)
    for token in model.generate(idx, 10, temperature=0):
        assert token.item() == model(idx)[0][0, -1].argmax().item()
        idx = torch.cat((idx, token[:, None]), dim=1)


@pytest.mark.parametrize("length", [5, 40])
def test_of_a_full_window_the_newest_three_quarters_are_read_on(length):
    """Against a loop that feeds the model by hand."""
    model, idx = make(), tokens(1, length)
    window, expected = idx[:, -16:], []
    for _ in range(40):
        expected.append(model(window)[0][0, -1].argmax().item())
        window = torch.cat((window, torch.tensor([[expected[-1]]])), dim=1)
        window = window[:, -12:] if window.size(1) > 16 else window
    with warnings.catch_warnings(action="ignore"):
        assert [token.item() for token in model.generate(idx, 40, temperature=0)] == expected


def test_same_seed_same_text_other_seed_other_text():
    model, idx = make(), tokens(1, 4)
    draw = lambda seed: [t.item() for t in model.generate(idx, 30, seed=seed)]  # noqa: E731
    assert draw(1) == draw(1) != draw(2)
    assert draw(0) == draw(0)


def test_stopped_rows_stay_stopped_and_end_generation():
    model, idx = make(), tokens(2, 4)
    free = torch.stack(list(model.generate(idx, 40, seed=5)))
    stop = free[3, 0].item()
    stopped = torch.stack(list(model.generate(idx, 40, seed=5, stop_tokens=(stop,))))
    first = (free[:, 0] == stop).nonzero()[0].item()
    assert (stopped[first:, 0] == stop).all()
    other = (free[:, 1] == stop).nonzero()
    assert len(stopped) == (40 if len(other) == 0 else max(first, other[0].item()) + 1)


def test_full_attention_predicts_in_one_pass():
    model, idx = make(is_causal=False), tokens(2, 16)
    assert torch.equal(model.predict(idx), model(idx)[0].argmax(-1))
    with pytest.raises(UserError, match="predict"):
        model.generate(idx, 3)
    with pytest.raises(UserError, match="full attention"):
        make().predict(idx)


def slow_filter(logits: list[float], top_k, top_p, min_p) -> set[int]:
    """The tokens that may be drawn, by the definitions."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    if top_p:
        total = sum(math.exp(logits[i]) for i in order)
        kept, mass = [], 0.0
        for i in order:
            if mass < top_p:
                kept.append(i)
            mass += math.exp(logits[i]) / total
        order = kept
    if min_p:
        order = [i for i in order if math.exp(logits[i]) >= min_p * math.exp(logits[order[0]])]
    return set(order)


@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.0, 0.1, 1.0])
def test_filters_equal_their_definitions(top_k, top_p, min_p):
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(2)) * 2
    filtered = filter_logits(logits, top_k, top_p, min_p)
    for row, kept in zip(logits, filtered, strict=True):
        allowed = set(torch.isfinite(kept).nonzero().flatten().tolist())
        assert allowed == slow_filter(row.tolist(), top_k, top_p if top_p != 1.0 else None, min_p)


def test_top_p_keeps_no_more_than_sums_to_p_exactly():
    """Four equally likely tokens, whose sums are exact in binary: half of them have half of the probability."""
    for p, n in ((1e-300, 1), (0.25, 1), (0.5, 2), (0.75, 3), (0.51, 3)):
        assert filter_logits(torch.zeros(1, 4), top_p=p).isfinite().sum() == n


def test_repetition_penalty_lowers_what_was_seen():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    assert penalise_repetition(logits, torch.tensor([[0, 1, 1]]), 2.0).tolist() == [[1.0, -4.0, 1.0]]
    assert penalise_repetition(logits, torch.tensor([[0, 1, 1]]), 1e-300).isfinite().all()


def test_parameter_count_and_flops_are_those_counted_by_hand():
    model = GPT(ModelConfig(**SMALL, qk_norm=False, n_hidden=64))
    per_layer = 32 * 96 + 32 * 32 + 32 * 128 + 64 * 32
    assert model.parameter_count() == 2 * (per_layer + 64) + 32 + 50 * 32
    from torch.utils.flop_counter import FlopCounterMode

    full = GPT(ModelConfig(**SMALL, is_causal=False), sdp_kernel="math")
    with FlopCounterMode(display=False) as counter:
        idx = tokens(2, 16)
        full(idx, idx)[1].backward()
    assert counter.get_total_flops() == pytest.approx(full.flops_per_token() * 32, rel=0.01)


@pytest.mark.parametrize("options", [{"bias": True}, {"n_expert": 2}])
def test_residual_projections_start_smaller_and_biases_at_zero(options):
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=50, n_layer=8, n_embd=128, **options))
    block = model.blocks[0]
    down = block.mlp.down if "n_expert" in options else block.mlp.down.weight
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (block.attention.out.weight, down):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("token", [-1, 50, 10**6])
def test_tokens_outside_the_vocabulary_are_refused(token):
    model, idx = make(), tokens(1, 4)
    idx[0, 2] = token
    with pytest.raises(UserError, match=f"{token}.*outside the vocabulary 0..49"):
        model(idx)
    with pytest.raises(UserError, match="outside the vocabulary"):
        model.generate(idx, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 30}, "n_embd .30. must be divisible by n_head .4."),
        ({"n_embd": 20}, "even head_dim"),
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"mlp": "swiglo"}, "did you mean swiglu"),
        ({"dropout": 1.0}, "dropout must be at most"),
        ({"n_head": "four"}, 'n_head must be an integer, got "four"'),
        ({"bias": 1}, "bias must be true or false"),
        ({"norm_eps": float("nan")}, "norm_eps must be finite"),
    ],
)
def test_impossible_shapes_are_refused_with_the_reason(fields, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**{**SMALL, **fields})


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 2}, {"repetition_penalty": 0}]
)
def test_sampling_settings_without_meaning_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        make().generate(tokens(1, 4), 3, **options)


def test_dropout_is_off_when_evaluating_and_on_when_training():
    model, idx = make(dropout=0.5), tokens(2, 16)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("place", ["embedding", "attention weights", "attention output", "mlp"])
def test_every_dropout_drops_its_share(place, monkeypatch):
    """In training, each place alone: zeros in the share of the rate, the rest scaled up."""
    model = make(dropout=0.3, n_embd=64, n_head=1, n_layer=1, qk_norm=False).train()
    block, x = model.blocks[0], torch.ones(8, 16, 64)
    if place == "embedding":
        seen = []
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(tokens(8, 16))
        (y,), undropped = seen, model.token_embedding(tokens(8, 16))
    elif place == "attention weights":  # inside of torch's function, which is told the rate
        rates = []
        drop = lambda q, k, v, mask, rate, *_, **__: rates.append(rate) or v  # noqa: E731
        monkeypatch.setattr(F, "scaled_dot_product_attention", drop)
        block.attention(x, None)
        block.attention.eval()(x, None)
        assert rates == [0.3, 0.0]
        return
    elif place == "attention output":
        model.config.dropout = 0.0  # of the weights
        y, undropped = block.attention(x, None), block.attention.eval()(x, None)
    else:
        y, undropped = block.mlp(x), block.mlp.eval()(x)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(y[kept], undropped[kept] / 0.7)


def test_learned_positions_tell_places_apart():
    model = make(use_rope=False)
    logits = model(torch.full((1, 16), 7))[0]
    assert not torch.allclose(logits[0, 0], logits[0, 5])
    assert F.cosine_similarity(logits[0, 0], logits[0, 5], dim=0) < 0.999


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("use_rope", [True, False])
def test_attention_maps_are_the_weights_that_attention_applies(is_causal, use_rope):
    """Weights times values, through the rest of each layer, must give the logits of the fused attention."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=11, block_size=9, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, is_causal=is_causal, use_rope=use_rope
    )
    model, idx = GPT(config).double(), torch.randint(11, (3, 9))
    maps = attention_maps(model, idx)
    assert maps.shape == (2, 3, 4, 9, 9)
    assert torch.allclose(maps.sum(-1), torch.ones_like(maps[..., 0]))
    assert bool((maps.triu(1) == 0).all()) == is_causal
    x = model.token_embedding(idx)
    x = x if use_rope else x + model.position_embedding.weight[:9]
    for block, weights in zip(model.blocks, maps, strict=True):
        values = block.attention.qkv(block.attention_norm(x))[..., -8:].view(3, 9, 2, 4).transpose(1, 2)
        values = values.repeat_interleave(2, dim=1)
        x = x + block.attention.out((weights @ values).transpose(1, 2).reshape(3, 9, 16))
        x = x + block.mlp(block.mlp_norm(x))
    assert torch.allclose(model.lm_head(model.norm(x)), model(idx)[0], atol=1e-6)


def test_top_k_keeps_k_also_where_several_are_equally_likely():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    for k in (1, 2, 3):
        assert filter_logits(logits, top_k=k).isfinite().sum() == k


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature):
    model = make().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)  # logits so large that such a temperature takes them out of float32's range
    prompt = tokens(1, 4)
    draw = lambda **settings: [t.item() for t in model.generate(prompt, 8, seed=0, **settings)]  # noqa: E731
    assert draw(temperature=temperature, top_p=0.9, min_p=0.1) == draw(temperature=0.0)


def test_float16_moves_the_rows_of_rare_tokens():
    """The gradient is made after the loss is scaled, as GradScaler means it: no more rows underflow than by logits."""
    torch.manual_seed(0)
    model = make(vocab_size=4000, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # rare tokens: probabilities far below those of the others
    idx, targets = torch.randint(0, 4000, (2, 4, 16))
    underflows = []
    for with_logits in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(idx, targets, None, "sum", None, with_logits)[1]
        (loss * 2.0**10).backward()
        underflows.append((model.lm_head.weight.grad == 0).all(1).sum().item())
    assert underflows[0] == underflows[1]
