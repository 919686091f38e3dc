"""Latent attention: DeepSeek's, with a cache of latents alone, whatever way a token is decoded."""

import math

import pytest
import torch
from conftest import FAST, TINY
from processes import assert_close, curves, newest_log, train_on
from test_attention_kinds import make, tokens

from base.configuration import UserError
from layers.cache import KVCache
from layers.latent_attention import LatentAttention
from model import GPT, ModelConfig
from serving.rows import Rows
from weights.quantise import to_int8

SHAPE = {"vocab_size": 50, "block_size": 16, "n_layer": 1, "n_head": 4, "n_embd": 32, "kv_rank": 20, "rope_dim": 4}


@pytest.mark.parametrize("q_rank", [None, 24])
@pytest.mark.parametrize("is_interleaved", [False, True], ids=["halves", "neighbours"])
def test_it_is_the_attention_of_deepseek_v3(q_rank, is_interleaved):
    """With the same weights, in their order. Theirs may rotate pairs of neighbours, where ours has pairs (i, i + 2)."""
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    options = {"qk_norm": False, "norm_eps": 1e-6, "rope_theta": 5000.0, "bias": q_rank is not None}
    ours = make(["latent"], **SHAPE, **options, q_rank=q_rank)
    config, attention = ours.config, ours.blocks[0].attention
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    settings = {"kv_lora_rank": 20, "q_lora_rank": q_rank, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    settings |= {"v_head_dim": 8, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    settings |= {"max_position_embeddings": 16, "rope_parameters": rope, "attention_bias": config.bias}
    settings |= {"rope_interleave": is_interleaved, "attn_implementation": "sdpa"}  # (eager's softmax is in float32)
    theirs = deepseek.DeepseekV3Attention(deepseek.DeepseekV3Config(**settings), 0).double().eval()

    def reordered(weight, n_heads):
        """The rotary rows of every head in the order of theirs."""
        order = [0, 2, 1, 3] if is_interleaved else [0, 1, 2, 3]
        heads = weight.unflatten(0, (n_heads, -1))
        return torch.cat((heads[:, :-4], heads[:, -4:][:, order]), dim=1).flatten(0, 1)

    weights = {name: parameter.detach() for name, parameter in attention.named_parameters()}
    k, v = weights["kv_up.weight"].split((16, 32))
    renamed = {"o_proj.weight": weights["out.weight"], "kv_a_layernorm.weight": weights["kv_latent_norm.weight"]}
    renamed["kv_a_proj_with_mqa.weight"] = reordered(weights["kv_down.weight"], 1)
    renamed["kv_b_proj.weight"] = torch.cat((k.view(4, 4, 20), v.view(4, 8, 20)), dim=1).flatten(0, 1)  # head by head
    if q_rank:
        renamed["q_a_proj.weight"], renamed["q_a_layernorm.weight"] = (
            weights[f"q_{name}.weight"] for name in ("down", "latent_norm")
        )
        renamed |= {"q_a_proj.bias": weights["q_down.bias"], "o_proj.bias": weights["out.bias"]}
        renamed["kv_a_proj_with_mqa.bias"] = reordered(weights["kv_down.bias"], 1)
    renamed["q_b_proj.weight" if q_rank else "q_proj.weight"] = reordered(weights[f"q{'_up' * bool(q_rank)}.weight"], 4)
    theirs.load_state_dict(renamed)
    for name in ("kv_a_layernorm", "q_a_layernorm")[: 2 if q_rank else 1]:  # theirs compute in float32: torch's own
        norm = torch.nn.RMSNorm(getattr(theirs, name).weight.shape, eps=1e-6, dtype=torch.float64)
        norm.weight = getattr(theirs, name).weight
        setattr(theirs, name, norm)

    x = torch.randn(3, 16, 32, dtype=torch.float64)
    angles = deepseek.DeepseekV3RotaryEmbedding(theirs.config)(x, torch.arange(16)[None])
    mask = torch.full((16, 16), -math.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        expected, y = theirs(x, angles, mask)[0], attention(x, ours.rope(slice(16))[0])
    assert (y - expected).abs().max() < 1e-12 and expected.abs().max() > 0.5


@pytest.mark.parametrize("options", [{}, {"q_rank": 12}, {"rope_dim": 0}, {"qk_norm": False}, {"rope_dim": 6}])
@pytest.mark.parametrize("window", [[], [5, 0]])
def test_decoding_with_absorbed_matrices_equals_decoding_with_keys_and_values(options, window, monkeypatch):
    """Piece by piece, forced either way, in rows of different lengths; both as without a cache."""
    model = make(["latent"], **{**SHAPE, "n_layer": 2, **options}, attention_window=window)
    idx, hidden = tokens(2, 16), {}
    for absorbs in (True, False):
        monkeypatch.setattr(LatentAttention, "absorbs", lambda self, T, absorbs=absorbs: absorbs)
        cache, parts = KVCache(model.config, 2, idx.device, torch.float64), []
        with torch.inference_mode():
            model.hidden(idx[:1, :3], cache[:1])  # the first row is three tokens ahead
            for start, end in ((0, 1), (1, 6), (6, 7), (7, 12), (12, 13)):
                piece = torch.stack((idx[0, start + 3 : end + 3], idx[1, start:end]))
                parts.append(model.hidden(piece, cache))
        hidden[absorbs] = torch.cat(parts, dim=1)
    torch.testing.assert_close(hidden[True], hidden[False], rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        whole = model.hidden(idx)
    torch.testing.assert_close(hidden[True], torch.stack((whole[0, 3:], whole[1, :13])), rtol=1e-10, atol=1e-10)


def test_it_decodes_in_the_way_that_takes_fewer_operations():
    """Counted by torch: a step alone absorbs, a prompt does not, and the rule is right from where it changes."""
    from torch.utils.flop_counter import FlopCounterMode

    config = {"vocab_size": 50, "block_size": 512, "n_layer": 1, "n_head": 4, "n_embd": 128, "attention": ["latent"]}
    model = GPT(ModelConfig(**config, kv_rank=96), sdp_kernel="math").eval()
    attention, flops = model.blocks[0].attention, {}
    chosen = {T: attention.absorbs(T) for T in (1, 4, 16, 32, 64, 128)}
    assert chosen[1] and not chosen[128]
    for T in chosen:
        for absorbs in (True, False):
            attention.absorbs = lambda T, absorbs=absorbs: absorbs
            cache = KVCache(model.config, 1, torch.device("cpu"), torch.float32)
            cache.lengths[:] = 512 - T
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                model.hidden(torch.zeros(1, T, dtype=torch.long), cache)
            flops[absorbs] = counter.get_total_flops()
        near = abs(flops[True] / flops[False] - 1) < 0.1  # (the matrices take some as well)
        assert near or chosen[T] == (flops[True] < flops[False]), (T, flops)


def test_the_cache_holds_the_latent_and_the_rotary_key():
    """Per token and layer 4 (kv_rank + rope_dim) bytes, however many heads there are, and as much as a window has."""
    shape = {"vocab_size": 50, "block_size": 64, "n_layer": 3, "n_embd": 128}
    for n_head in (4, 16):
        rows = Rows(GPT(ModelConfig(**shape, n_head=n_head, attention=["latent"], kv_rank=32, rope_dim=4)), 2)
        assert rows.memory() == 2 * 64 * 3 * 4 * 36
    full = Rows(GPT(ModelConfig(**shape, n_head=4)), 2)
    assert full.memory() == 2 * 64 * 3 * 4 * 256  # keys and values
    config = ModelConfig(**shape, attention=["latent", "full"], attention_window=[8, 16, 0], kv_rank=32, rope_dim=4)
    sizes = [t.nbytes for t in KVCache(config, 1, torch.device("cpu"), torch.bfloat16).tensors()]
    assert sizes == [2 * 36 * 8, 2 * 128 * 16, 2 * 128 * 16, 2 * 36 * 64]


def test_rope_turns_only_its_part():
    """Equal tokens: with a rotary part attention tells their distances, without it all are one."""
    for rope_dim, is_uniform in ((4, False), (0, True)):
        model = make(["latent"], **{**SHAPE, "rope_dim": rope_dim})
        q, k, _ = model.blocks[0].attention.project(torch.ones(1, 9, 32, dtype=torch.float64), model.rope(slice(9))[0])
        scores = (q @ k.mT)[0]
        assert torch.allclose(scores, scores[:, :1, :1].expand_as(scores)) == is_uniform
        torch.testing.assert_close(q[..., :4], q[:, :, :1, :4].expand(-1, -1, 9, -1))
        torch.testing.assert_close(
            scores[:, 1:, 1:], scores[:, :-1, :-1], rtol=1e-4, atol=1e-5
        )  # by the distance alone


@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_takes_their_size_from_queries_and_rotary_keys(qk_norm):
    model = make(["latent"], **SHAPE, qk_norm=qk_norm, norm_eps=1e-12)
    attention, x, rope = model.blocks[0].attention, torch.randn(2, 9, 32, dtype=torch.float64), model.rope(slice(9))[0]
    with torch.no_grad():
        before = attention(x, rope)
        attention.q.weight *= 7
        attention.kv_down.weight[20:] *= 7  # that of the rotary key
        assert torch.allclose(attention(x, rope), before, rtol=1e-7) == qk_norm


def test_eight_bit_weights_are_the_same_absorbed_or_not(monkeypatch):
    model, idx = to_int8(make(["latent"], **SHAPE).float()), tokens(1, 16)
    logits = []
    for absorbs in (True, False):
        monkeypatch.setattr(LatentAttention, "absorbs", lambda self, T, absorbs=absorbs: absorbs)
        cache = KVCache(model.config, 1, idx.device, torch.float32)
        with torch.inference_mode():
            logits.append(torch.cat([model.lm_head(model.hidden(part, cache)) for part in idx.split([12, 1, 3], 1)], 1))
    p, q = (part.double().log_softmax(-1) for part in logits)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.01  # activations are rounded to 8 bits


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 12}, "head_dim 3 is too small to rotate"),
        ({"n_kv_head": 2}, "n_kv_head .2. is for full attention.*leave n_kv_head out"),
        ({"qkv_bias": True}, "qkv_bias is for full attention"),
        ({"rope_dim": 3}, "rope_dim must be even and below head_dim .8., got 3"),
        ({"rope_dim": 8}, "rope_dim must be even and below head_dim"),
        ({"rope_dim": 4, "use_rope": False}, "leave rope_dim out"),
        ({"kv_rank": 0}, "kv_rank must be at least 1"),
        ({"attention": ["full"], "kv_rank": 8}, "kv_rank is for attention latent: leave it out"),
        ({"attention": ["full"], "q_rank": 0}, "q_rank is for attention latent"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**{"n_head": 4, "n_embd": 32, "attention": ["latent"], **fields})


def test_what_is_left_out_follows_from_the_heads():
    config = ModelConfig(n_head=4, n_embd=64, attention=["latent"])
    assert (config.kv_rank, config.q_rank, config.rope_dim) == (32, 0, 8)
    assert ModelConfig(n_head=4, n_embd=64, attention=["latent"], use_rope=False).rope_dim == 0
    assert ModelConfig(**config.to_dict()) == config  # as a checkpoint's config is read
    assert ModelConfig(n_head=4, n_embd=24, attention=["latent"]).rope_dim == 2  # even
    config = ModelConfig()
    assert (config.kv_rank, config.q_rank, config.rope_dim) == (None, None, None)


@pytest.mark.parametrize("options", [["--optimizer", "muon"], ["--fsdp", "true", "--compile", "false"]])
def test_on_two_processes_it_is_the_training_of_one(prepared, call, options):
    """Packed samples, windows, micro-batches."""
    arguments = ["-t", "sft", "--from_checkpoint", "", *TINY, *FAST, "--pack_samples", "true", "--eval_iters", "2"]
    arguments += ["--attention", "latent,full", "--attention_window", "0,6", "--q_rank", "8", "--max_steps", "6"]
    arguments += ["--gradient_accumulation_steps", "4", "--eval_interval", "3", *options]
    assert call("train.py", *arguments, *(["--fsdp", "false"] if "--fsdp" in options else [])).status == 0
    one = curves(newest_log(prepared))
    assert len(one["loss"]) == 6 and len(one["val_loss"]) == 2
    assert_close(one, train_on(2, prepared, *arguments))


def test_a_run_resumes_talks_and_keeps_its_shape(prepared, call):
    arguments = ["-t", "pretrain", *TINY, *FAST, "--eval_interval", "10", "--optimizer", "muon"]
    latent = ["--attention", "latent", "--kv_rank", "12"]
    tune = [*arguments, "--lr_decay_iters", "8"]
    assert call("train.py", *tune, *latent, "--max_steps", "8", "--stage", "whole").status == 0
    whole = curves(newest_log(prepared))["loss"]
    parts = [*tune, "--stage", "parts"]
    assert call("train.py", *parts, *latent, "--max_steps", "5").status == 0
    resumed = [*parts, "--from_checkpoint", "checkpoint/parts_last.pt", "--max_steps", "8"]
    assert call("train.py", *resumed, *latent).status == 0
    assert curves(newest_log(prepared))["loss"] == whole[5:]
    changed = call("train.py", *resumed, "--attention", "full", "--max_steps", "9")
    assert changed.status == 1 and "attention is" in changed.err and "keeps its shape" in changed.err
    ask = ["inference.py", "-m", "checkpoint/parts_last.pt", "-p", "the", "-t", "0", "-l", "30", "--weights"]
    answers = [call(*ask, kind) for kind in ("float32", "bfloat16", "int8")]
    assert all(answer.status == 0 and answer.out for answer in answers), answers
    refused = call("convert.py", "checkpoint/parts_last.pt", "elsewhere")
    assert refused.status == 1 and "attention latent: theirs is full" in refused.err
