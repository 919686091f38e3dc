"""Mixtures of experts in training: what the router learns from, what its balance counts, what adapters leave alone."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, FAST, TINY, read_log
from processes import assert_close, curves, newest_log, train_on

from base.configuration import UserError
from layers import experts
from layers.experts import MixtureOfExperts, Routing, grouped_mm, mixture_layers
from model import GPT, ModelConfig
from text.batches import Batch
from training.config import TrainConfig
from training.grpo import PolicyLoss
from training.losses import DistillationLoss, PreferenceLoss
from weights.checkpointing import load_checkpoint, load_model
from weights.gguf import check_exact
from weights.huggingface import model_type
from weights.webpage import network_of

SHAPE = {"vocab_size": 40, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_hidden": 16, "n_expert": 4}


def make(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(**SHAPE | options))


@pytest.mark.parametrize("n_expert_per_token", [1, 2])
def test_the_loss_alone_teaches_the_router(n_expert_per_token):
    model = make(n_expert_per_token=n_expert_per_token, expert_balance="none")
    idx = torch.randint(0, 40, (3, 16))
    model(idx, idx.roll(-1, 1))[1].backward()
    assert all(layer.router.weight.grad.abs().max() > 1e-6 for layer in mixture_layers(model))


def test_one_expert_of_an_earlier_version_is_refused(prepared, call):
    options = [*TINY, *FAST, *DATA, "--n_expert", "4", "--n_expert_per_token", "1", "--optimizer", "adamw"]
    assert call("train.py", "-t", "pretrain", *options, "--max_steps", "1").status == 0
    checkpoint = load_checkpoint("checkpoint/pretrain.pt")
    load_model(checkpoint, "pretrain.pt")
    del checkpoint["model_config"]["rope_trained_length"]
    with pytest.raises(UserError, match="of an earlier version"):
        load_model(checkpoint, "pretrain.pt")


def naive_shortcut(model, idx):
    """Logits of ids (T,), token by token, as ScMoE is drawn: each expert a function of one vector, in float64."""
    config, rope = model.config, model.rope(slice(len(idx)))
    swiglu = lambda x, up, down: down @ (F.silu((up @ x)[: config.n_hidden]) * (up @ x)[config.n_hidden :])  # noqa: E731
    x, before = model.token_embedding(idx), None
    for block, angles in zip(model.blocks, rope, strict=True):
        x = x + block.attention(block.attention_norm(x)[None], angles)[0]
        h = block.mlp_norm(x)
        rows = []
        for own, read in zip(h, h if before is None else before, strict=True):
            probabilities = (block.mlp.router.weight @ read).softmax(0)
            best = sorted(range(config.n_expert), key=lambda i: -probabilities[i])[: config.n_expert_per_token]
            share = 1.0 if config.n_expert_per_token == 1 else sum(probabilities[i] for i in best)
            y = sum(probabilities[i] / share * swiglu(read, block.mlp.up[i], block.mlp.down[i]) for i in best)
            rows.append(y + swiglu(own, block.mlp.shared.up.weight, block.mlp.shared.down.weight))
        x, before = x + torch.stack(rows), h
    return model.lm_head(model.norm(x))


@pytest.mark.parametrize("n_expert_per_token", [1, 2])
def test_shortcut_experts_read_what_the_layer_before_gave_its_mlp(n_expert_per_token, monkeypatch):
    """Logits and gradients of a naive module; and, as all models, the same token by token."""
    options = {"n_shared_expert": 1, "shortcut_experts": True, "n_layer": 3, "n_expert_per_token": n_expert_per_token}
    monkeypatch.setattr(experts, "grouped_mm", experts.loop_over_groups)  # in float64, which the kernel does not take
    model = make(**options).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    idx, gradients = torch.randint(0, 40, (2, 9)), []
    for forward in (lambda: model(idx)[0], lambda: torch.stack([naive_shortcut(model, row) for row in idx])):
        model.zero_grad()
        logits = forward()
        logits.sin().sum().backward()
        gradients.append([logits, *(p.grad for p in model.parameters())])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)  # the router computes in float32
    model.eval()
    options = {"max_new_tokens": 20, "seed": 1}  # past the window of 16
    cached = torch.stack(list(model.generate(idx, **options)))
    assert torch.equal(cached, torch.stack(list(model.generate(idx, **options, use_cache=False))))


def test_shortcut_experts_cost_no_weight_and_no_operation():
    plain, shortcut = (make(n_shared_expert=1, shortcut_experts=on) for on in (False, True))
    assert plain.parameter_count() == shortcut.parameter_count()
    assert plain.flops_per_token() == shortcut.flops_per_token()


@pytest.mark.parametrize("options", [{"n_shared_expert": 0}, {"n_expert": 0}])
def test_shortcut_experts_need_a_shared_one(options):
    with pytest.raises(UserError, match="shortcut_experts needs n_expert"):
        make(**{"n_shared_expert": 1, "shortcut_experts": True, **options})


def test_formats_that_know_no_shortcut_refuse_it():
    config = make(n_shared_expert=1, shortcut_experts=True).config
    for refused in (model_type, network_of, lambda config: check_exact(config, model_type(config))):
        with pytest.raises(UserError, match=r"n_shared_expert|shortcut_experts"):
            refused(config)


@pytest.mark.parametrize(
    ("script", "options", "alone"),
    [("train_ddp.py", ["--fsdp", "true", "--compile", "false"], ["--fsdp", "false"]), ("train_deepspeed.py", [], [])],
    ids=["fsdp", "zero3"],
)
def test_shortcut_experts_on_two_processes_train_as_on_one(prepared, call, script, options, alone):
    """What passes from layer to layer beside the stream must not be lost where layers are sharded."""
    arguments = ["-t", "sft", "--from_checkpoint", "", *TINY, *FAST, "--eval_iters", "2", "--max_steps", "4"]
    arguments += ["--n_expert", "4", "--n_shared_expert", "1", "--shortcut_experts", "true", "--n_hidden", "32"]
    arguments += ["--gradient_accumulation_steps", "2", "--eval_interval", "2", "--expert_balance", "none", *options]
    assert call("train.py", *arguments, *alone).status == 0
    one = curves(newest_log(prepared))
    if script == "train_deepspeed.py":
        pytest.importorskip("deepspeed")
        arguments = ["--deepspeed", "--deepspeed_config", "deepspeed_zero3", *arguments]
    assert_close(one, train_on(2, prepared, *arguments, script=script))


def test_padding_is_no_part_of_the_balance():
    """A batch, and the same with padding behind its rows: the same counts, the same balancing loss."""
    model = make()
    idx = torch.randint(1, 40, (3, 10))
    padded = torch.cat((idx, torch.zeros(3, 6, dtype=torch.long)), dim=1)
    mask = (torch.arange(16) < 10).float().expand(3, 16).clone()
    mask[:, :4] = 0  # a question's tokens are no targets, but tokens
    losses, counts = [], []
    for tokens, loss_mask in ((idx, mask[:, :10]), (padded, mask)):
        for layer in mixture_layers(model):
            layer.tokens_per_expert.zero_()
        model(tokens, tokens, loss_mask)
        losses.append(model.router_loss.item())
        counts.append(torch.stack([layer.tokens_per_expert.clone() for layer in mixture_layers(model)]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.equal(counts[0], counts[1]) and counts[0].sum() == 2 * 3 * 10 * 2  # layers, rows, tokens, choices


def test_the_balancing_loss_is_the_formula_over_the_tokens_that_count():
    layer = MixtureOfExperts(make().config, None)
    torch.nn.init.normal_(layer.up), torch.nn.init.normal_(layer.down)
    x, is_token = torch.randn(2, 5, 16), torch.arange(10).view(2, 5) % 3 > 0
    routing = Routing(is_token)
    layer(x, routing)
    probabilities = layer.router(x[is_token]).softmax(-1).double()
    fraction = torch.zeros(4, dtype=torch.float64)
    for row in probabilities:
        for expert in row.topk(2).indices:
            fraction[expert] += 1 / (2 * len(probabilities))
    expected = sum(4 * fraction[i] * probabilities[:, i].mean() for i in range(4))
    assert routing.losses[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_models_balancing_loss_is_the_mean_over_its_layers():
    """A router without a preference: every expert has the same probability, so that each layer's loss is 1."""
    model = make(n_layer=3, router_loss_weight=0.5)
    for layer in mixture_layers(model):
        torch.nn.init.zeros_(layer.router.weight)
    idx = torch.randint(1, 40, (2, 16))
    model(idx, idx)
    assert model.router_loss.item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("with_logits", [True, False])
def test_a_sum_has_the_balancing_loss_once_for_each_of_its_targets(with_logits):
    idx, mask = torch.randint(1, 40, (3, 16)), (torch.arange(16) > 4).float().expand(3, 16)
    values = {}
    for weight in (0.0, 2.0):
        model = make(router_loss_weight=weight)
        values[weight] = [model(idx, idx, mask, kind, None, with_logits)[1].item() for kind in ("sum", "mean")]
    added = model.router_loss.item()  # of each target, and of their mean
    assert added > 1
    assert [b - a for a, b in zip(*values.values(), strict=True)] == pytest.approx([3 * 11 * added, added], rel=1e-3)


def test_biases_choose_the_experts_but_do_not_weigh_them():
    layer = MixtureOfExperts(make(expert_balance="bias").config, None)
    torch.nn.init.normal_(layer.up), torch.nn.init.normal_(layer.down)
    layer.choice_bias.copy_(torch.tensor([0.0, 5.0, 0.0, 5.0]))  # so that it is 1 and 3 for every token
    x = torch.randn(1, 6, 16)
    gates = layer.router(x).softmax(-1)[..., [1, 3]]
    expected = torch.zeros(1, 6, 16)
    for gate, i in zip((gates / gates.sum(-1, keepdim=True)).unbind(-1), (1, 3), strict=True):
        a, b = (x @ layer.up[i].mT).chunk(2, -1)
        expected += gate[..., None] * ((torch.nn.functional.silu(a) * b) @ layer.down[i].mT)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_experts_drop_as_a_dense_mlp_does():
    x = torch.ones(1, 1000, 16)
    layer = MixtureOfExperts(make(dropout=0.3).config, None)
    torch.nn.init.normal_(layer.up), torch.nn.init.normal_(layer.down), layer.router.weight.data.zero_()
    share = (layer(x) == 0).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.02)
    assert (layer.eval()(x) == 0).float().mean() == 0


def balancing_share(loss, batch: Batch, **options) -> tuple[float, float]:
    """What the balancing loss adds to a training loss, and what it is to add."""
    values = []
    for weight in (0.0, 3.0):
        model = make(router_loss_weight=weight, **options).train()
        values.append(loss(model, batch, "sum").item())
    return values[1] - values[0], model.router_loss.item() * batch.count


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo", "orpo", "grpo", "distill"])
def test_every_objective_includes_the_balancing_loss_once(kind):
    torch.manual_seed(1)
    idx, targets = torch.randint(1, 40, (2, 4, 16))
    mask = torch.ones(4, 16)
    if kind == "distill":
        batch, loss = Batch(idx, targets, mask, 64), DistillationLoss(make(n_expert=0), 2.0, 0.75)
    elif kind == "grpo":
        zeros = torch.zeros(4, 16)
        batch, loss = Batch(idx, targets, mask, 4, None, zeros, zeros, torch.ones(4)), PolicyLoss(0.2, 0.01)
    else:
        batch = Batch(idx, targets, mask, 2, reference=torch.zeros(2))
        loss = PreferenceLoss(TrainConfig(loss=kind), lambda *values: list(values))
    added, expected = balancing_share(loss, batch)
    assert expected > 0.5 and added == pytest.approx(expected, rel=1e-3)


def test_an_adapter_leaves_the_router_biases_of_its_base_alone(prepared, call):
    """Its file does not hold them: what it is trained with must be what it is loaded with."""
    options = [*TINY, "--n_expert", "4", "--expert_balance", "bias", "--expert_bias_rate", "0.05"]
    plain = ["-t", "pretrain", *FAST, *DATA, "--eval_iters", "0", "--optimizer", "adamw", "--max_steps", "12"]
    assert call("train.py", *plain, *options).status == 0
    base = load_checkpoint("checkpoint/pretrain.pt")["model"]
    biases = [name for name in base if name.endswith("choice_bias")]
    assert biases and any(base[name].abs().max() > 0.04 for name in biases)  # the base's did move
    adapter = ["--use_lora", "true", "--from_checkpoint", "checkpoint/pretrain.pt", "--stage", "tuned"]
    assert call("train.py", *plain, *adapter, "--learning_rate", "0.01", "--warmup_iters", "1").status == 0
    trained = read_log(newest_log(prepared), "val")[-1]["val_loss"]
    resume = ["--use_lora", "true", "--from_checkpoint", "checkpoint/tuned_lora_last.pt", "--stage", "again"]
    assert (
        call("train.py", *plain, *resume, "--max_steps", "1", "--learning_rate", "1e-30", "--min_lr", "0").status == 0
    )
    assert read_log(newest_log(prepared), "val")[-1]["val_loss"] == pytest.approx(trained, rel=1e-5)


def test_under_autocast_experts_compute_in_half_precision(monkeypatch):
    """As a GPU's kernel for grouped products needs them: their rows are cast, which autocast does not do for it."""
    model, idx = make(), torch.randint(1, 40, (3, 16))
    exact = model(idx, idx)[1]
    seen = []
    monkeypatch.setattr(experts, "grouped_mm", lambda x, *a: seen.append(x.dtype) or grouped_mm(x, *a))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx)[1]
    loss.backward()
    assert set(seen) == {torch.bfloat16} and loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert all(layer.up.grad.dtype == torch.float32 and layer.up.grad.norm() > 0 for layer in mixture_layers(model))
