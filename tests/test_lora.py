"""LoRA: what is trained, what is saved, and that merged, attached and resumed all mean the same."""

import pytest
import torch
from conftest import DATA, FAST, TINY
from processes import train_on

from base.configuration import UserError
from model import GPT, ModelConfig
from serving.text_generator import GenerationConfig, load_text_generator
from weights import lora
from weights.checkpointing import load_checkpoint, load_model

SFT = ["--dataset_path", '[["dataset/sft_train.bin", "dataset/sft_val.bin"]]']
LORA = [
    "-t",
    "sft",
    *SFT,
    *FAST,
    "--use_lora",
    "true",
    "--lora_rank",
    "4",
    "--eval_interval",
    "5",
    "--optimizer",
    "adamw",
]
ON_BASE = ["--from_checkpoint", "checkpoint/base.pt"]
SETTINGS = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": list(lora.TARGETS)}


@pytest.fixture
def base(prepared, call):
    """A little trained model to adapt."""
    args = ["-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "10", "--stage", "base"]
    assert call("train.py", *args).status == 0
    return prepared


def trained(call, *options):
    result = call("train.py", *LORA, *options)
    assert result.status == 0, result.err
    return result


def random_adapter(model: GPT, settings=SETTINGS) -> None:
    lora.attach(model, settings)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)


EXPERTS = {"n_expert": 4, "n_expert_per_token": 2, "n_shared_expert": 1}


@pytest.mark.parametrize("options", [{}, EXPERTS])
def test_it_begins_as_the_base_and_merges_into_an_ordinary_model(options):
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=20, block_size=16, n_layer=2, n_head=2, n_embd=16, **options)).eval()
    idx = torch.randint(0, 20, (2, 16))
    names, before = list(model.state_dict()), model(idx)[0]
    lora.attach(model, SETTINGS)
    assert torch.equal(model(idx)[0], before)
    lora.detach(model)
    random_adapter(model)
    adapted = model(idx)[0]
    assert (adapted - before).abs().max() > 0.01
    by_hand, state = GPT(model.config).eval(), model.state_dict()
    added = {}
    for name, A in state.items():
        if name.endswith(".A"):  # of a linear layer's weight, or of the experts' matrices
            weight = name.replace(".adapters.", ".").removesuffix(".A") + ("" if ".adapters." in name else ".weight")
            added[weight] = 2.0 * state[name.removesuffix("A") + "B"] @ A
    weights = {name.replace(".base.", "."): weight for name, weight in state.items() if name[-2:] not in (".A", ".B")}
    assert len(added) == 2 * (6 if options else 4) and added.keys() <= weights.keys()
    by_hand.load_state_dict({name: weight + added.get(name, 0) for name, weight in weights.items()})
    torch.testing.assert_close(adapted, by_hand(idx)[0], rtol=1e-4, atol=1e-5)
    lora.merge(model)
    torch.testing.assert_close(model(idx)[0], adapted, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


def test_a_starts_with_outputs_of_the_inputs_size():
    """Entries of variance 1 / n_in: A x is as large as the entries of x, whatever the width."""
    torch.manual_seed(0)
    for n_in in (16, 400):
        layer = lora.LoRALinear(torch.nn.Linear(n_in, 8), 100, 1.0, 0.0)
        assert (torch.randn(200, n_in) @ layer.A.mT).std().item() == pytest.approx(1.0, rel=0.05)


def test_an_adapter_drops_its_inputs_in_training_alone():
    """Of inputs that are all 1, through A and B of ones: the count of those that are left, scaled up."""
    linear = lora.LoRALinear(torch.nn.Linear(1000, 1, bias=False), 1, 1.0, 0.4)
    experts = lora.LoRAExperts(torch.zeros(2, 1, 1000), 1, 1.0, 0.4)
    torch.nn.init.zeros_(linear.base.weight)
    for layer, more in ((linear, ()), (experts, (torch.tensor([1, 2]),))):
        torch.nn.init.ones_(layer.A), torch.nn.init.ones_(layer.B)
        x = torch.ones(3, 1000)
        assert (layer.eval()(x, *more) == 1000).all()
        dropped = layer.train()(x, *more)
        assert (dropped != 1000).all() and ((dropped - 1000).abs() < 130).all()  # five standard deviations


@pytest.mark.parametrize("options", [{}, EXPERTS])
def test_the_adapter_alone_can_be_trained(options):
    model = GPT(ModelConfig(vocab_size=20, block_size=16, n_layer=2, n_head=2, n_embd=16, **options))
    lora.attach(model, SETTINGS)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if name.endswith((".A", ".B"))} != set()


def test_only_the_adapter_is_trained_and_saved(base, call):
    result = trained(call, "--max_steps", "10", *ON_BASE)
    assert "trainable (LoRA)" in result.out
    whole, adapter = load_checkpoint("checkpoint/base.pt"), load_checkpoint("checkpoint/sft_lora.pt")
    assert (
        adapter["model"].keys() == lora.adapter_weights(adapter["model"]).keys() and len(adapter["model"]) == 2 * 4 * 2
    )
    sizes = [sum(weight.numel() for weight in checkpoint["model"].values()) for checkpoint in (adapter, whole)]
    assert sizes[0] < sizes[1]
    model = load_model(whole, "base")
    lora.load_adapter(adapter, model, "adapter")
    state = model.state_dict()
    assert all(
        torch.equal(state[name.replace(".weight", ".base.weight")], weight)
        for name, weight in whole["model"].items()
        if name.replace(".weight", ".base.weight") in state
    )
    assert any(weight.abs().max() > 0 for name, weight in adapter["model"].items() if name.endswith(".B"))


def test_it_goes_on_as_if_it_had_not_stopped(base, call):
    options = ["--lora_dropout", "0.2", "--lr_decay_iters", "8"]
    trained(call, *options, "--max_steps", "8", "--stage", "whole", *ON_BASE)
    trained(call, *options, "--max_steps", "4", "--stage", "parts", *ON_BASE)
    trained(
        call, *options, "--max_steps", "8", "--stage", "parts", "--from_checkpoint", "checkpoint/parts_lora_last.pt"
    )
    whole, parts = (load_checkpoint(f"checkpoint/{name}_lora_last.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_experts_are_adapted_each_for_itself(prepared, call):
    """Trained, resumed, merged: what is saved is small, and every expert got something of its own."""
    args = ["-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "10", "--stage", "base"]
    assert call("train.py", *args, "--n_expert", "4", "--n_shared_expert", "1").status == 0
    trained(call, "--max_steps", "8", "--stage", "whole", *ON_BASE)
    trained(call, "--max_steps", "4", "--lr_decay_iters", "8", "--stage", "parts", *ON_BASE)
    trained(call, "--max_steps", "8", "--stage", "parts", "--from_checkpoint", "checkpoint/parts_lora_last.pt")
    whole, parts = (load_checkpoint(f"checkpoint/{name}_lora_last.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    B = whole["blocks.0.mlp.adapters.up.B"]
    assert len(B) == 4 and all(expert.abs().max() > 0 for expert in B)
    options = ["-m", "checkpoint/base.pt", "--lora", "checkpoint/whole_lora.pt"]
    assert call("inference.py", *options, "--merge", "merged.pt").status == 0
    say = ["-p", "the ", "-t", "0", "-l", "12"]
    assert call("inference.py", *options, *say).out == call("inference.py", "-m", "merged.pt", *say).out


@pytest.mark.parametrize("options", [[], ["--fsdp", "true"]])
def test_on_several_processes_it_is_the_same_adapter(base, call, options):
    trained(call, "--max_steps", "6", "--stage", "one", *ON_BASE)
    train_on(2, base, *LORA, *ON_BASE, "--max_steps", "6", "--stage", "two", *options)
    one, two = (load_checkpoint(f"checkpoint/{name}_lora_last.pt")["model"] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_answers_with_adapters_switched_and_merged(base, call):
    for seed in ("1", "2"):
        options = ["--max_steps", "20", "--learning_rate", "0.05", "--random_seed", seed, "--stage", f"s{seed}"]
        trained(call, *options, *ON_BASE)
    ask = ["-i", "-p", "q1 aaa", "-t", "0", "-l", "16"]
    plain = call("inference.py", "-m", "checkpoint/base.pt", *ask).out
    answers = [
        call("inference.py", "-m", "checkpoint/base.pt", "--lora", f"checkpoint/s{i}_lora_last.pt", *ask).out
        for i in (1, 2)
    ]
    assert len({plain, *answers}) >= 2
    merge = ["-m", "checkpoint/base.pt", "--lora", "checkpoint/s1_lora_last.pt", "--merge", "merged.pt"]
    assert call("inference.py", *merge).status == 0
    assert call("inference.py", "-m", "merged.pt", *ask).out == answers[0]
    assert "exists already" in call("inference.py", *merge).err

    generator = load_text_generator("checkpoint/base.pt", "cpu", True)
    for path, expected in (
        ("checkpoint/s1_lora_last.pt", answers[0]),
        ("checkpoint/s2_lora_last.pt", answers[1]),
        ("", plain),
    ):
        generator.use_adapter(path)
        settings = GenerationConfig(max_length=16, temperature=0.0)
        assert "".join(generator.answer("q1 aaa", settings)) + "\n" == expected


def test_what_does_not_belong_together_is_refused(base, call):
    trained(call, "--max_steps", "2", *ON_BASE)
    adapter = "checkpoint/sft_lora.pt"
    refusals = {
        (
            "train.py",
            *LORA,
            "--max_steps",
            "2",
            *ON_BASE,
            "--lora_rank",
            "17",
        ): "lora_rank (17) must be between 1 and n_embd (16)",
        ("train.py", *LORA, "--max_steps", "2", "--from_checkpoint", ""): "needs a trained model",
        ("train.py", "-t", "sft", *SFT, *FAST, "--from_checkpoint", adapter): "an adapter; --use_lora true resumes it",
        ("train.py", *LORA, "--from_checkpoint", adapter, "--lora_rank", "2"): "a run keeps it: --lora_rank",
        ("inference.py", "-m", adapter, "-p", "a"): "an adapter; -m names its model (checkpoint/base.pt)",
        ("inference.py", "-m", "checkpoint/base.pt", "--lora", "checkpoint/base.pt", "-p", "a"): "a full model",
        ("inference.py", "-m", "checkpoint/base.pt", "--merge", "x.pt"): "--merge needs the adapter",
    }
    for command, words in refusals.items():
        result = call(*command)
        assert result.status == 1 and words in result.err, result.err
    args = ["-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "11", "--stage", "other"]
    assert call("train.py", *args).status == 0
    result = call("inference.py", "-m", "checkpoint/other.pt", "--lora", adapter, "-p", "a")
    assert result.status == 1 and "trained on another base model (checkpoint/base.pt)" in result.err


def test_a_rank_is_at_most_the_width():
    config = ModelConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2, n_embd=16)
    lora.attach(GPT(config), {**SETTINGS, "rank": 16})
    with pytest.raises(UserError, match="between 1 and n_embd"):
        lora.attach(GPT(config), {**SETTINGS, "rank": 17})


def test_a_merged_model_is_a_run_of_its_own(base, call):
    """It has no optimizer states: under its adapter's name it would be resumed without them."""
    trained(call, "--max_steps", "2", *ON_BASE)
    merge = ["-m", "checkpoint/base.pt", "--lora", "checkpoint/sft_lora.pt", "--merge", "merged.pt"]
    assert call("inference.py", *merge).status == 0
    settings = load_checkpoint("merged.pt")["train_config"]
    assert settings["stage"] not in ("sft", "base") and not settings["use_lora"]
    assert call("train.py", "-t", "sft", *SFT, *FAST, "--max_steps", "1", "--from_checkpoint", "merged.pt").status == 0


def test_a_hostile_adapter_is_refused(base, call):
    trained(call, "--max_steps", "2", *ON_BASE)
    adapter, model = (
        load_checkpoint("checkpoint/sft_lora.pt"),
        load_model(load_checkpoint("checkpoint/base.pt"), "base"),
    )
    for changes in (
        {"rank": 10**9},
        {"rank": 0},
        {"rank": "x"},
        {"alpha": None},
        {"targets": ["nothing"]},
        {"targets": 3},
    ):
        settings = {**adapter["lora"]["settings"], **changes}
        with pytest.raises(UserError):
            lora.load_adapter({**adapter, "lora": {**adapter["lora"], "settings": settings}}, model, "x.pt")
        lora.detach(model)
