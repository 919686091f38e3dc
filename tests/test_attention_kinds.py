"""What every kind of attention shares, tried on each of the table: a new one is covered by its entry there."""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import FAST, TINY
from processes import assert_close, curves, newest_log, train_on
from torch.utils.flop_counter import FlopCounterMode

from base.configuration import UserError
from layers.attention_maps import attention_maps
from layers.cache import KVCache
from model import ATTENTION, GPT, ModelConfig
from training.optimizer import make_optimizer, muon_matrices, rows_of_fused_matrices
from weights import lora
from weights.checkpointing import load_model
from weights.gguf import check_exact
from weights.huggingface import model_type
from weights.webpage import network_of

PATTERNS = [[kind] for kind in ATTENTION] + [[kind, "full"] for kind in ATTENTION if kind != "full"]
KINDS = pytest.mark.parametrize("attention", PATTERNS, ids=",".join)
OTHERS = pytest.mark.parametrize("attention", PATTERNS[1:], ids=",".join)
RECURRENT = [kind for kind, attention in ATTENTION.items() if attention.IS_RECURRENT]


def has_state(attention) -> bool:
    """Whether a layer reads from left to right into a state, without windows, masks and weights."""
    return bool({*RECURRENT} & {*attention})


def make(attention, **options) -> GPT:
    """In float64, with weights so large that a mistake shows; windows where the kind may have one."""
    torch.manual_seed(0)
    windows = enumerate(options.pop("attention_window", []))
    options["attention_window"] = [w * ATTENTION[attention[i % len(attention)]].HAS_WINDOW for i, w in windows]
    if "sparse" in attention:  # blocks that end within the texts, and fewer than there are
        options = {"sparse_block_size": 3, "sparse_top_k": 2, **options}
    shape = {"vocab_size": 50, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, **options}
    model = GPT(ModelConfig(attention=attention, **shape)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.25)
    return model.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))


@KINDS
@pytest.mark.parametrize("options", [{}, {"use_rope": False}, {"attention_window": [3, 0, 7, 1]}, {"bias": True}])
def test_rows_of_a_cache_are_as_if_alone(attention, options):
    """Texts that are read in pieces of any length, alone or some together, in rows that others have left."""
    if attention == ["full"] and "attention_window" in options:
        options = {**options, "n_kv_head": 1}  # of grouped queries, too
    model, rng = make(attention, n_layer=4, **options), random.Random(0)
    cache = KVCache(model.config, 3, torch.device("cpu"), torch.float64)
    texts, seen = [[], [], []], 0
    for _ in range(120):
        first = rng.randrange(3)
        rows = slice(first, rng.randint(first + 1, 3))
        T = rng.choice([1, 1, 1, 2, 5, 9, 14])
        for row in range(rows.start, rows.stop):
            if len(texts[row]) + T > 16:
                texts[row], cache.lengths[row] = [], 0
        idx = torch.tensor([[rng.randrange(50) for _ in range(T)] for _ in range(rows.start, rows.stop)])
        with torch.inference_mode():
            logits = model.lm_head(model.hidden(idx, cache[rows]))
            for row, new, cached in zip(range(rows.start, rows.stop), idx.tolist(), logits, strict=True):
                texts[row] += new
                expected = model(torch.tensor([texts[row]]))[0][0, -T:]
                torch.testing.assert_close(cached, expected, rtol=1e-9, atol=1e-9)
        assert cache.lengths.tolist() == [len(text) for text in texts]
        seen += len({len(texts[row]) for row in range(rows.start, rows.stop)}) > 1
    assert seen > 20  # rows of different lengths were together


@KINDS
@pytest.mark.parametrize("window", [[], [5, 0]])
def test_generation_goes_on_past_the_context_window(attention, window):
    """As without a cache, which reads everything anew for each token."""
    model, options = make(attention, attention_window=window), {"max_new_tokens": 45, "seed": 3}
    cached = torch.stack(list(model.generate(tokens(2, 5), **options)))
    assert torch.equal(cached, torch.stack(list(model.generate(tokens(2, 5), **options, use_cache=False))))


@KINDS
@pytest.mark.parametrize("options", [{}, {"attention_window": [3]}, {"use_rope": False}, {"is_causal": False}])
def test_documents_in_one_window_are_as_if_alone(attention, options):
    """And a causal model sees nothing of what follows."""
    if has_state(attention) and "is_causal" in options:
        with pytest.raises(UserError, match="is_causal must be true"):
            make(attention, **options)
        return
    model, idx, lengths = make(attention, **options), tokens(1, 16), [5, 1, 7, 3]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model.lm_head(model.hidden(idx, documents=documents))
    alone = [model(part)[0] for part in idx.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-9)
    changed = idx.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 50
    difference = (model(idx)[0] - model(changed)[0]).abs().amax(-1)[0]
    assert bool((difference[:10] == 0).all()) == model.config.is_causal and (difference[10:] > 0).any()


@KINDS
def test_flops_are_those_that_torch_counts(attention):
    """Of both passes, with the kernel that is made of matrix products; full attention, as that one skips no key."""
    if has_state(attention):
        pytest.skip("is causal, and counted in test_linear_attention.py")
    config = {"vocab_size": 50, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "is_causal": False}
    model, idx = GPT(ModelConfig(attention=attention, **config), sdp_kernel="math"), tokens(2, 16)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == pytest.approx(model.flops_per_token() * 32, rel=0.01)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@KINDS
def test_weights_begin_by_their_place(attention):
    """Those onto the residual stream smaller; all others, of whatever name, at the usual size."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=50, n_layer=8, n_embd=128, attention=attention))
    for name, parameter in model.blocks.named_parameters():
        if ".attention." in name and parameter.dim() >= 2 and not name.endswith("convolution"):
            std = 0.02 / 4 if name.endswith("attention.out.weight") else 0.02
            precision = max(0.05, 4 / (2 * parameter.numel()) ** 0.5)  # of small matrices by chance less
            assert parameter.std().item() == pytest.approx(std, rel=precision), name


@KINDS
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns_and_a_checkpoint_keeps_it(attention, optimizer):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1}
    model = GPT(ModelConfig(attention=attention, **shape))
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99}
    settings |= {"muon_learning_rate": 0.02, "muon_momentum": 0.9, "optimizer": optimizer}
    steps, idx, losses = make_optimizer(model, SimpleNamespace(**settings), torch.device("cpu")), tokens(4, 17), []
    for name, p in muon_matrices(model).items():
        rows = rows_of_fused_matrices(model.config, name, p.size(-2))
        assert sum(rows) == p.size(-2) and min(rows) > 0, name
    for _ in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        losses.append(loss.item())
        steps.zero_grad()
        loss.backward()
        steps.step()
    assert losses[-1] < 0.6 * losses[0]
    again = load_model({"model_config": model.config.to_dict(), "model": model.state_dict()}, "here")
    assert torch.equal(model.eval()(idx[:, :16])[0], again.eval()(idx[:, :16])[0])


@KINDS
@pytest.mark.parametrize("targets", [["qkv"], ["qkv", "out", "up", "down"]])
def test_an_adapter_attached_is_the_same_as_merged(attention, targets):
    """In one pass, and token by token, which may take the weights another way."""
    model, idx = make(attention), tokens(2, 16)
    before = model(idx)[0]
    lora.attach(model, {"rank": 4, "alpha": 8.0, "dropout": 0.5, "targets": targets})
    model.eval()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(name.endswith((".A", ".B")) for name in trainable)
    for block in model.blocks:
        layers = {name for name, layer in block.attention.named_modules() if isinstance(layer, torch.nn.Linear)}
        adapted = {name.removesuffix(".base") for name in layers if name.endswith(".base")}
        assert layers - {f"{name}.base" for name in adapted} == ({"out"} if targets == ["qkv"] else set())
    assert torch.equal(model(idx)[0], before)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)
    generate = lambda: torch.stack(list(model.generate(idx[:, :3], 12, temperature=0.0)))  # noqa: E731
    attached, generated = model(idx)[0], generate()
    lora.merge(model)
    torch.testing.assert_close(model(idx)[0], attached, rtol=1e-9, atol=1e-9)
    assert torch.equal(generate(), generated) and (attached - before).abs().max() > 0.1


@KINDS
def test_attention_maps_are_the_weights_that_attention_applies(attention):
    model, idx = make(attention, n_embd=16), tokens(3, 9)
    if has_state(attention):
        with pytest.raises(UserError, match="a linear layer has no attention weights"):
            attention_maps(model, idx)
        return
    maps, x = attention_maps(model, idx), model.token_embedding(idx)
    assert torch.allclose(maps.sum(-1), torch.ones_like(maps[..., 0])) and (maps.triu(1) == 0).all()
    for block, rope, weights in zip(model.blocks, model.rope(slice(9)), maps, strict=True):
        values = block.attention.project(block.attention_norm(x), rope)[2]
        x = x + block.attention.out((weights @ values).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.mlp_norm(x))
    torch.testing.assert_close(model.lm_head(model.norm(x)), model(idx)[0], rtol=1e-9, atol=1e-9)


@OTHERS
def test_formats_that_know_full_attention_alone_refuse_it(attention):
    """GPT-2's shape, too, which has a class of its own."""
    gpt2 = {"use_rope": False, "norm": "layernorm", "mlp": "gelu", "bias": True, "qk_norm": False}
    for options in ({}, gpt2):
        config = ModelConfig(vocab_size=50, n_head=2, n_embd=16, attention=attention, **options)
        for refused in (model_type, network_of, lambda config: check_exact(config, model_type(config))):
            with pytest.raises(UserError, match=attention[0]):
                refused(config)


def test_kinds_are_repeated_over_the_layers():
    pattern = [*ATTENTION][::-1]
    config = ModelConfig(n_layer=5, attention=pattern)
    assert config.attention_classes == [ATTENTION[pattern[i % len(pattern)]] for i in range(5)]
    assert ModelConfig(n_layer=2).attention_classes == [ATTENTION["full"]] * 2
    with pytest.raises(UserError, match="did you mean latent"):
        ModelConfig(attention=["latnet"])
    with pytest.raises(UserError, match="attention must name a kind"):
        ModelConfig(attention=[])


@pytest.mark.parametrize("kind", PATTERNS[1:][: len(ATTENTION) - 1], ids=",".join)
def test_a_kind_that_no_layer_has_is_not_asked(kind):
    """A pattern may be longer than the layers: one layer of `full,latent` is full attention with all its options."""
    config = ModelConfig(attention=["full", *kind], vocab_size=50, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)
    assert config.attention_classes == [ATTENTION["full"]] and config.kv_rank is None


# kinds that are trained here, and what each is given; latent attention has tests of its own form
LEARNT = {"linear": [], "sparse": ["--sparse_block_size", "4", "--sparse_top_k", "2"]}


@pytest.mark.parametrize(
    ("script", "options", "alone"),
    [
        ("train_ddp.py", ["--optimizer", "muon"], []),
        ("train_ddp.py", ["--fsdp", "true", "--compile", "false"], ["--fsdp", "false"]),
        ("train_deepspeed.py", [], []),
    ],
    ids=["ddp", "fsdp", "zero3"],
)
@pytest.mark.parametrize("kind", LEARNT)
def test_on_two_processes_it_is_the_training_of_one(prepared, call, kind, script, options, alone):
    """Packed samples, micro-batches."""
    arguments = ["-t", "sft", "--from_checkpoint", "", *TINY, *FAST, "--pack_samples", "true", "--eval_iters", "2"]
    arguments += ["--attention", f"{kind},full", *LEARNT[kind], "--max_steps", "4"]
    arguments += ["--gradient_accumulation_steps", "4", "--eval_interval", "2", *options]
    assert call("train.py", *arguments, *alone).status == 0
    one = curves(newest_log(prepared))
    assert len(one["loss"]) == 4 and len(one["val_loss"]) == 2
    if script == "train_deepspeed.py":
        pytest.importorskip("deepspeed")
        arguments = ["--deepspeed", "--deepspeed_config", "deepspeed_zero3", *arguments]
    assert_close(one, train_on(2, prepared, *arguments, script=script))


@pytest.mark.parametrize("kind", LEARNT)
def test_a_run_resumes_and_talks(prepared, call, kind):
    arguments = ["-t", "pretrain", *TINY, *FAST, "--eval_interval", "10", "--lr_decay_iters", "8"]
    arguments += ["--attention", kind, *LEARNT[kind], "--optimizer", "muon"]
    assert call("train.py", *arguments, "--max_steps", "8", "--stage", "whole").status == 0
    whole = curves(newest_log(prepared))["loss"]
    assert call("train.py", *arguments, "--max_steps", "5", "--stage", "parts").status == 0
    resumed = ["--from_checkpoint", "checkpoint/parts_last.pt", "--max_steps", "8"]
    assert call("train.py", *arguments, "--stage", "parts", *resumed).status == 0
    assert curves(newest_log(prepared))["loss"] == whole[5:]
    ask = ["inference.py", "-m", "checkpoint/parts_last.pt", "-p", "the", "-t", "0", "-l", "90", "--weights"]
    answers = [call(*ask, kind) for kind in ("float32", "bfloat16", "int8")]
    assert all(answer.status == 0 and answer.out for answer in answers), answers
    refused = call("convert.py", "checkpoint/parts_last.pt", "elsewhere")
    assert refused.status == 1 and f"attention {kind}: theirs is full" in refused.err
