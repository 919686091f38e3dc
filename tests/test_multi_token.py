"""Multi-token prediction against a naive loop in float64, in training on every engine, and as a drafter."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import DATA, FAST, TINY, read_log
from other_programs import make_model
from processes import curves, newest_log, train_on

from base.configuration import UserError
from layers import experts
from layers.speculative import FutureDrafter
from model import GPT, ModelConfig
from text.batches import collate
from training.optimizer import muon_matrices, rows_of_fused_matrices
from weights.checkpointing import load_checkpoint, load_model

V = 30


@pytest.fixture(autouse=True)
def experts_in_float64(monkeypatch):
    """By a loop: the kernel for groups of rows takes float32 at most."""
    monkeypatch.setattr(experts, "grouped_mm", experts.loop_over_groups)


SHAPES = {
    "default": {},
    "windows": {"attention_window": [3, 0, 5], "n_layer": 3},
    "learned positions, untied": {"use_rope": False, "tie_embeddings": False, "n_kv_head": 2},
    "layernorm, biases": {"norm": "layernorm", "bias": True, "mlp": "gelu"},
    "latent": {"attention": ["full", "latent"]},
    "linear": {"attention": ["full", "linear"]},
    "experts": {"n_expert": 4, "n_hidden": 24, "router_loss_weight": 0.0},
    "shortcut": {
        "n_expert": 4,
        "n_hidden": 24,
        "router_loss_weight": 0.0,
        "n_shared_expert": 1,
        "shortcut_experts": True,
    },
}


def states(model: GPT, tokens: torch.Tensor) -> list[torch.Tensor]:
    """h^0, h^1, ... (n, n_embd) of a text (T + 1,), of which the model reads T tokens: one position fewer each.

    By the formulas of the paper, a module at a time, over the positions alone that have a target.
    """
    T = len(tokens) - 1
    found = [model.hidden(tokens[None, :T])[0]]
    for k, module in enumerate(model.future, 1):
        n = T - k  # position i predicts token i + k + 1
        if n < 1:
            break
        h, e = module.hidden_norm(found[-1][:n]), module.embedding_norm(model.token_embedding.weight[tokens[k : k + n]])
        x = torch.einsum("oi,ni->no", module.join.weight, torch.cat((h, e), dim=1))[None]
        mask = model.masks(n, None, None, x.device)[model.windows[-1]]
        found.append(module.norm(module.block(x, model.rope(slice(n))[-1], mask))[0])
    return found


def naive_loss(model: GPT, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The summed training loss of one text (T + 1,); counts (T + 1,): 1 where a token is to be predicted."""
    n_modules, total = len(model.future), 0.0
    for k, h in enumerate(states(model, tokens)):
        for i, row in enumerate(h):
            target = tokens[i + k + 1]
            loss = -torch.log_softmax(model.lm_head.weight @ row, dim=0)[target]
            total = total + counts[i + k + 1] * loss * (model.config.future_loss_weight / n_modules if k else 1.0)
    return total


def make(n_future: int = 4, **shape) -> GPT:
    return make_model(V, **{"n_embd": 32, "block_size": 24, "n_future": n_future} | shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_those_of_the_naive_loop(shape):
    torch.manual_seed(1)
    model = make(**SHAPES[shape], future_loss_weight=0.7).double().train()
    texts = [torch.randint(V, (n,)) for n in (20, 2, 13)]  # of the second, no module has a target
    masks = [torch.randint(2, (len(text),)).double() for text in texts]
    idx, targets = (torch.zeros(3, 24, dtype=torch.long) for _ in range(2))
    loss_mask = torch.zeros(3, 24, dtype=torch.float64)
    for i, (text, mask) in enumerate(zip(texts, masks, strict=True)):
        for row, values in ((idx, text[:-1]), (targets, text[1:]), (loss_mask, mask[1:])):
            row[i, : len(values)] = values
    for with_logits, exactness in ((False, 1e-9), (True, 1e-6)):  # logits are taken in float32
        model.zero_grad()
        ours = model(idx, targets, loss_mask, "sum", with_logits=with_logits)[1]
        ours.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        expected = sum(naive_loss(model, text, mask) for text, mask in zip(texts, masks, strict=True))
        expected.backward()
        assert ours.item() == pytest.approx(expected.item(), rel=exactness)
        for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=10 * exactness, atol=10 * exactness, msg=name)
        mean = model(idx, targets, loss_mask, with_logits=with_logits)[1]
        assert mean.item() == pytest.approx(expected.item() / loss_mask.sum().item(), rel=exactness)


@pytest.mark.parametrize("shape", ["default", "windows", "latent", "linear"])
def test_samples_packed_into_a_row_predict_nothing_of_each_other(shape):
    model = make(**SHAPES[shape]).double().train()
    texts = [torch.randint(V, (n,)) for n in (9, 3, 12)]
    masks = [(torch.rand(len(text)) < 0.7).double() for text in texts]
    batch = collate([[(t.numpy(), m.numpy()) for t, m in zip(texts, masks, strict=True)]], 24, V, 8)
    ours = model(batch.idx, batch.targets, batch.loss_mask, "sum", batch.documents, with_logits=False)[1]
    alone = sum(naive_loss(model, text, mask) for text, mask in zip(texts, masks, strict=True))
    assert ours.item() == pytest.approx(alone.item(), rel=1e-6)  # (a batch's mask is float32)


def test_validation_is_the_next_tokens_loss_alone():
    model, alone = make(4), make(1)
    alone.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("future.")})
    idx = torch.randint(V, (3, 24))
    for reduction in ("mean", "sum", "none"):
        for network in (model, alone):
            network.train(reduction == "none")  # which no loss in training asks for
        ours, theirs = (network(idx, idx.roll(-1, 1), reduction=reduction)[1] for network in (model, alone))
        assert torch.equal(ours, theirs)
    assert model.flops_per_token() > alone.flops_per_token() and not alone.state_dict().keys() & {"future"}


@pytest.mark.parametrize("T", [1, 2, 24])
def test_every_weight_gets_a_gradient_however_short_the_text(T):
    """DDP and ZeRO wait for all of them."""
    model, idx = make().train(), torch.randint(V, (2, T))
    model(idx, idx, with_logits=False)[1].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weights_and_operations_are_counted_by_hand():
    C, H, D = 32, 96, 3  # D modules
    block = 4 * C * C + 3 * C * H
    model, alone = make(D + 1), make(1)
    norms = 2 * C + 2 * 8  # of a block, and of its queries and keys
    assert model.parameter_count() - alone.parameter_count() == D * (block + norms + 2 * C * C + 3 * C)
    keys = 24 - 24 * 24 / 48
    per_module = 6 * (block + 2 * C * C + V * C) + 12 * C * keys
    assert model.flops_per_token() - alone.flops_per_token() == pytest.approx(D * per_module)


def test_muon_takes_the_maps_of_the_modules_and_what_is_fused_in_them():
    model = make(3, attention=["full", "latent"], n_layer=2)
    names = [name for name in muon_matrices(model) if name.startswith("future.1.")]
    linears = {
        f"future.1.{name}.weight" for name, m in model.future[1].named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert set(names) == linears and "future.1.join.weight" in linears
    for name in names:
        rows = rows_of_fused_matrices(model.config, name, dict(model.named_parameters())[name].size(0))
        like = name.replace("future.1.block.", "blocks.1.")  # the last
        assert rows == rows_of_fused_matrices(model.config, like, sum(rows))


# ------------------------------------------------------------------------------------------------------ training

ARGUMENTS = ["-t", "pretrain", *TINY, *FAST, "--n_future", "3", "--eval_iters", "2", "--max_steps", "6", *DATA]


def test_accumulated_and_distributed_runs_have_one_curve(prepared, call):
    """With Muon, whose matrices the processes deal out; validation is that of a model without modules at the start."""
    options = ["--optimizer", "muon", "--gradient_accumulation_steps", "4", "--eval_interval", "3"]
    assert call("train.py", *ARGUMENTS, *options).status == 0
    one = curves(newest_log(prepared))
    for fsdp in ("false", "true"):
        two = train_on(2, prepared, *ARGUMENTS, *options, "--fsdp", fsdp)
        for field, values in one.items():
            assert two[field] == pytest.approx(values, rel=1e-5), (fsdp, field)
    newest_log(prepared).unlink()
    merged = ["--batch_size", "16", "--gradient_accumulation_steps", "1"]
    assert call("train.py", *ARGUMENTS, *options, *merged).status == 0
    assert curves(newest_log(prepared))["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_zero_3_has_the_curve_of_one_process(prepared, call):
    pytest.importorskip("deepspeed")
    options = ["--optimizer", "adamw", "--eval_interval", "3"]
    assert call("train.py", *ARGUMENTS, *options).status == 0
    one = curves(newest_log(prepared))
    config = ["--deepspeed_config", "deepspeed_zero3"]
    two = train_on(2, prepared, *ARGUMENTS, *options, *config, script="train_deepspeed.py")
    for field, values in one.items():
        assert two[field] == pytest.approx(values, rel=1e-4), field


def test_a_run_resumes_exactly_and_later_stages_keep_the_modules_or_leave_them_out(prepared, call):
    assert call("train.py", *ARGUMENTS, "--stage", "whole").status == 0
    whole = load_checkpoint("checkpoint/whole_last.pt")
    parts = [*ARGUMENTS, "--stage", "pretrain"]
    assert call("train.py", *parts, "--max_steps", "2", "--lr_decay_iters", "6").status == 0
    resumed = call("train.py", *parts, "--from_checkpoint", "checkpoint/pretrain_last.pt")
    assert resumed.status == 0 and "warning: the first loss" not in resumed.err
    again = load_checkpoint("checkpoint/pretrain_last.pt")
    assert all(torch.equal(weight, again["model"][name]) for name, weight in whole["model"].items())

    tuning = ["-t", "sft", *FAST, "--max_steps", "3", "--from_checkpoint", "checkpoint/pretrain_last.pt"]
    assert call("train.py", *tuning, "--pack_samples", "true").status == 0
    tuned = load_checkpoint("checkpoint/sft_last.pt")
    assert tuned["model_config"]["n_future"] == 3
    name = "future.1.join.weight"
    assert not torch.equal(tuned["model"][name], again["model"][name])  # they learn on

    left_out = call("train.py", *tuning, "--stage", "plain", "--n_future", "1")
    assert left_out.status == 0 and "n_future 3 -> 1" in left_out.out
    assert not [name for name in load_checkpoint("checkpoint/plain_last.pt")["model"] if "future" in name]
    fewer = load_model(again, "last", n_future=2)
    assert torch.equal(fewer.future[0].join.weight, again["model"]["future.0.join.weight"]) and len(fewer.future) == 1
    more = call("train.py", *tuning, "--stage", "plain", "--n_future", "4")
    assert more.status == 1 and "n_future is 4 here, 3 in" in more.err

    lora = [*tuning, "--stage", "adapter", "--use_lora", "true", "--optimizer", "adamw"]
    assert call("train.py", *lora).status == 0
    assert not [name for name in load_checkpoint("checkpoint/adapter_lora_last.pt")["model"] if "future" in name]


def test_losses_that_do_not_train_the_modules_are_refused(prepared, call):
    assert call("train.py", *ARGUMENTS).status == 0
    distil = [
        "-t",
        "pretrain",
        *DATA,
        *FAST,
        "--loss",
        "distill",
        "--teacher",
        "checkpoint/pretrain.pt",
        "--stage",
        "d",
    ]
    start = ["--from_checkpoint", "checkpoint/pretrain.pt", "--max_steps", "2"]
    refused = call("train.py", *distil, *start)
    assert (
        refused.status == 1
        and "does not train the modules of n_future 3: leave them out with --n_future 1" in refused.err
    )
    assert call("train.py", *distil, *start, "--n_future", "1").status == 0
    with pytest.raises(UserError, match="needs is_causal"):
        ModelConfig(is_causal=False, n_future=2)


def test_toy_problems_have_no_tokens_that_follow(work, call):
    refused = call("problem.py", "add", "--n_future", "2", "--max_steps", "1", "--device", "cpu")
    assert refused.status == 1 and "n_future 2 is for texts" in refused.err


def test_the_log_shows_what_is_minimised(prepared, call):
    assert call("train.py", *ARGUMENTS, "--max_steps", "1").status == 0
    (first,) = read_log(newest_log(prepared), "train")
    vocab_size = load_checkpoint("checkpoint/pretrain.pt")["model_config"]["vocab_size"]
    assert first["loss"] == pytest.approx(1.3 * math.log(vocab_size), rel=0.05)  # validation: ln(vocab_size)
    (validated,) = read_log(newest_log(prepared), "val")
    assert validated["val_loss"] == pytest.approx(math.log(vocab_size), rel=0.05)


def test_other_formats_get_the_model_without_the_modules(prepared, call):
    assert call("train.py", *ARGUMENTS).status == 0
    model = load_model(load_checkpoint("checkpoint/pretrain.pt"), "pretrain.pt").eval()
    result = call("convert.py", "checkpoint/pretrain.pt", "theirs")
    assert result.status == 0 and "left out: the modules of n_future 3" in result.err, result.err
    assert json.loads(Path("theirs/config.json").read_text())["num_hidden_layers"] == 2
    assert call("convert.py", "theirs", "again.pt").status == 0
    again = load_model(load_checkpoint("again.pt"), "again.pt").eval()
    idx = torch.randint(again.config.vocab_size, (1, 16))
    torch.testing.assert_close(again(idx)[0], model(idx)[0])
    kept = call("convert.py", "checkpoint/pretrain.pt", "copy.pt")
    assert kept.status == 0 and "left out" not in kept.err
    assert len(load_model(load_checkpoint("copy.pt"), "copy.pt").future) == 2


# ------------------------------------------------------------------------------------------------------ drafts


def greedy(logits: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "linear"])
def test_guesses_are_those_of_the_modules_without_a_cache(shape):
    """Texts that change behind what was read, as after wrong guesses, and new texts."""
    model = make(**SHAPES[shape]).double()
    drafter, text = FutureDrafter(model), torch.randint(V, (1, 4))
    read = 0
    while text.size(1) + 3 < 24:
        T = text.size(1)
        wrong = torch.randint(V, (1, 2))  # guesses that the model has read, too
        with torch.inference_mode():
            hidden = model.hidden(torch.cat((text[:, :-1], wrong), dim=1))
            drafter.observe(hidden[:, read:], read)
            read = T - 1
            guesses = drafter.propose(text, 3, greedy)
            known = text[0]
            for k in range(1, 4):  # module k, at the newest position that the model has read
                expected = (model.lm_head.weight @ states(model, torch.cat((known, known[:1])))[k][T - 2]).argmax()
                assert guesses[0, k - 1] == expected
                known = torch.cat((known, expected[None]))
        text = torch.cat((text, torch.randint(V, (1, int(torch.randint(1, 4, ()))))), dim=1)


def learnt_model() -> GPT:
    """A model that has learnt to count, with a few mistakes in its text, and its modules with it."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=V, block_size=24, n_layer=1, n_head=2, n_embd=32, n_future=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        idx = (torch.randint(V, (16, 1)) + torch.arange(25)) % V
        idx = torch.where(torch.rand(idx.shape) < 0.1, torch.randint(V, idx.shape), idx)
        model(idx[:, :-1], idx[:, 1:], with_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_drafts_of_a_model_that_has_learnt_are_right_and_change_nothing():
    model = learnt_model()
    for settings in (
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_k": 5, "seed": 4},
    ):
        drafter = FutureDrafter(model)
        for idx in (torch.tensor([[3]]), torch.arange(9)[None]):  # with one drafter, beyond the window
            alone = [t.item() for t in model.generate(idx, 60, **settings)]
            assert [t.item() for t in model.generate(idx, 60, drafter=drafter, **settings)] == alone
            share = drafter.n_right / drafter.n_guesses
            assert share > (0.9 if settings["temperature"] == 0 else 0.2), (settings, share)
            assert drafter.n_passes + drafter.n_right == 60


def test_a_model_without_modules_cannot_draft(prepared, call):
    with pytest.raises(UserError, match="train one with --n_future 2, 3 or 4"):
        FutureDrafter(make(1))
    assert call("train.py", *ARGUMENTS).status == 0
    ask = ("inference.py", "-m", "checkpoint/pretrain.pt", "-p", "the cat", "--seed", "1", "--device", "cpu")
    alone = call(*ask)
    for weights in ("float32", "int8"):
        drafted = call(*ask, "--weights", weights, "--draft", "future", "--profile")
        assert drafted.status == 0 and "guesses were right" in drafted.err
        assert drafted.out == (alone if weights == "float32" else call(*ask, "--weights", weights)).out
