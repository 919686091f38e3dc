"""train_deepspeed.py with real processes on gloo: the curve, the weights and the checkpoints of one process."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import DATA, FAST, ROOT, TINY, asked_by, start_script, write_jsonl
from processes import assert_close, curves, end_of, finish, free_port, newest_log, start, train_on

from base.configuration import UserError
from training.deepspeed_launcher import check_hosts, read_hostfile
from training.deepspeed_settings import merge_settings
from weights.checkpointing import finish_sharded, load_checkpoint, load_checkpoint_or_previous, save_shard

pytest.importorskip("deepspeed")

SCRIPT = "train_deepspeed.py"
ARGUMENTS = ["-t", "pretrain", *TINY, *FAST, *DATA, "--gradient_accumulation_steps", "4", "--eval_interval", "10"]
ARGUMENTS += ["--eval_iters", "3", "--lr_decay_iters", "20"]


def config_of(name):
    return ["--deepspeed", "--deepspeed_config", name]


def assert_same_states(one, other, tolerance):
    """Weights and Adam's moments of two checkpoints agree, and so does everything that counts."""
    assert one["model"].keys() == other["model"].keys() and one["step"] == other["step"]
    for name, weight in one["model"].items():
        torch.testing.assert_close(other["model"][name], weight, atol=tolerance, rtol=tolerance)
    parts = ["0", "1"] if "0" in one["optimizer"] else [None]  # Muon's and AdamW's, or AdamW's alone
    for part in parts:
        ours, theirs = (c["optimizer"][part] if part else c["optimizer"] for c in (one, other))
        assert ours["state"].keys() == theirs["state"].keys()
        for index, state in ours["state"].items():
            assert theirs["state"][index].keys() == state.keys()
            for name, value in state.items():
                value, other_value = (
                    torch.as_tensor(v, dtype=torch.float32) for v in (value, theirs["state"][index][name])
                )
                torch.testing.assert_close(other_value, value, atol=tolerance, rtol=tolerance)


@pytest.fixture
def one_process(prepared, call):
    """The curves of 20 steps of train.py, and its last checkpoint."""

    def training(*options):
        assert call("train.py", *ARGUMENTS, *options, "--max_steps", "20", "--stage", "one").status == 0
        return curves(newest_log(prepared)), load_checkpoint("checkpoint/one_last.pt")

    return training


@pytest.fixture
def build_cpu_adam():
    """DeepSpeed compiles its Adam for the CPU at first use, for minutes: before the clock of a job runs."""
    program = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=1200)


@pytest.mark.real("compiles DeepSpeed's Adam for the CPU")
@pytest.mark.parametrize("optimizer", [["--optimizer", "adamw"], []], ids=["adamw", "muon"])
@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_offloading_gives_the_curve_and_the_weights_of_one_process(
    build_cpu_adam, prepared, one_process, name, optimizer
):
    test_zero_gives_the_curve_and_the_weights_of_one_process(prepared, one_process, name, optimizer)


@pytest.mark.parametrize("optimizer", [["--optimizer", "adamw"], []], ids=["adamw", "muon"])  # muon: pretrain.json's
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_zero_gives_the_curve_and_the_weights_of_one_process(prepared, one_process, name, optimizer):
    """A vocabulary and shapes that do not divide by the processes, so that shards are uneven and padded."""
    curve, checkpoint = one_process(*optimizer, "--tie_embeddings", "true")
    arguments = [*config_of(f"deepspeed_{name}"), *ARGUMENTS, *optimizer, "--tie_embeddings", "true"]
    assert_close(curve, train_on(2, prepared, *arguments, "--max_steps", "20", script=SCRIPT), 1e-4)
    assert_same_states(checkpoint, load_checkpoint("checkpoint/pretrain_last"), 1e-5)  # assembled from the shards
    best = load_checkpoint("checkpoint/pretrain.pt")  # gathered by the processes
    assert best["step"] == checkpoint["step"]  # the loss still falls: the last is the best
    assert_same_states(checkpoint, best, 1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zero1", ["--optimizer", "adamw"]),
        ("zero3", ["--optimizer", "adamw"]),
        ("zero2", ["--expert_balance", "bias"]),
        ("zero3", ["--expert_balance", "bias"]),
    ],
)
def test_experts_are_trained_the_same(prepared, one_process, name, options):
    """With auxiliary losses, and with Muon and router biases, which are no parameters but belong into checkpoints."""
    experts = [*options, "--n_expert", "3", "--n_shared_expert", "1"]
    curve, checkpoint = one_process(*experts)
    arguments = [*config_of(f"deepspeed_{name}"), *ARGUMENTS, *experts, "--max_steps", "20"]
    assert_close(curve, train_on(2, prepared, *arguments, script=SCRIPT), 1e-4)
    assert_same_states(checkpoint, load_checkpoint("checkpoint/pretrain_last"), 1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--optimizer", "sgd"], "optimizer sgd with ZeRO stage 2"),
        (["--optimizer", "muon", "--dtype", "float16"], "muon with float16 and ZeRO stage 2"),
        (["--use_lora", "true", "--from_checkpoint", "checkpoint/one.pt"], "an adapter is too small to shard"),
    ],
)
def test_what_zero_cannot_shard_is_refused(prepared, one_process, options, words):
    one_process()
    arguments = [*config_of("deepspeed_zero2"), *ARGUMENTS, "--optimizer", "adamw", *options, "--max_steps", "2"]
    statuses, said = end_of(2, prepared, *arguments, script=SCRIPT)
    assert statuses == [1, 1] and words in said[0] and "Traceback" not in "".join(said)


def test_without_zero_muon_trains_too_and_everything_is_clipped(prepared, one_process):
    curve, checkpoint = one_process("--optimizer", "muon", "--grad_clip", "0.1")
    arguments = [*config_of("deepspeed"), *ARGUMENTS, "--optimizer", "muon", "--grad_clip", "0.1"]
    newest_log(prepared).unlink()
    status, out, err = finish(start(2, *arguments, "--max_steps", "20", cwd=prepared, script=SCRIPT))
    assert status == 0, err
    assert_close(curve, curves(newest_log(prepared)), 1e-4)
    again = out.split("to go on: ")[1]
    assert again.startswith(f"deepspeed --num_gpus 2 {ROOT / SCRIPT} --deepspeed") and "local_rank=" not in again
    for name, weight in load_checkpoint("checkpoint/pretrain_last.pt")["model"].items():
        torch.testing.assert_close(weight, checkpoint["model"][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_runs_resume_between_stages_scripts_and_numbers_of_processes(prepared, one_process, call, optimizer):
    """20 steps at once = 8 with ZeRO 2 on two processes + 6 with train.py + 6 with ZeRO 3 on four."""
    whole, checkpoint = one_process("--optimizer", optimizer)
    arguments = [*ARGUMENTS, "--optimizer", optimizer, "--stage", "parts"]
    parts = train_on(2, prepared, *config_of("deepspeed_zero2"), *arguments, "--max_steps", "8", script=SCRIPT)
    newest_log(prepared).unlink()
    resume = ["--from_checkpoint", "checkpoint/parts_last"]
    assert call("train.py", *arguments, *resume, "--max_steps", "14").status == 0
    second = curves(newest_log(prepared))
    resume = [*config_of("deepspeed_zero3"), "--from_checkpoint", "checkpoint/parts_last.pt"]
    third = train_on(4, prepared, *arguments, *resume, "--max_steps", "20", script=SCRIPT)
    for field in ("loss", "grad_norm"):
        assert parts[field] + second[field] + third[field] == pytest.approx(whole[field], rel=1e-4)
    assert_same_states(checkpoint, load_checkpoint("checkpoint/parts_last"), 1e-5)


def test_resuming_gives_the_same_weights_bit_for_bit(prepared):
    arguments = [*config_of("deepspeed_zero2"), *ARGUMENTS, "--optimizer", "adamw", "--dropout", "0.2"]
    train_on(2, prepared, *arguments, "--max_steps", "8", "--stage", "whole", script=SCRIPT)
    train_on(2, prepared, *arguments, "--max_steps", "4", "--stage", "parts", script=SCRIPT)
    resume = ["--from_checkpoint", "checkpoint/parts_last", "--max_steps", "8", "--stage", "parts"]
    train_on(2, prepared, *arguments, *resume, script=SCRIPT)
    assert_same_states(load_checkpoint("checkpoint/whole_last"), load_checkpoint("checkpoint/parts_last"), 0.0)


@pytest.mark.parametrize("settings", [
    {"zero_optimization": {"stage": 2}},
    {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},  # the weights themselves
])  # fmt: skip
def test_bfloat16_stays_near_float32(prepared, one_process, settings):
    curve, _ = one_process("--optimizer", "adamw", "--eval_interval", "20")
    (prepared / "half.json").write_text(json.dumps(settings))
    arguments = [
        *config_of("half.json"),
        *ARGUMENTS,
        "--optimizer",
        "adamw",
        "--eval_interval",
        "20",
        "--dtype",
        "bfloat16",
    ]
    assert_close(curve, train_on(2, prepared, *arguments, "--max_steps", "20", script=SCRIPT), 0.05)
    assert load_checkpoint("checkpoint/pretrain.pt")["model"]["lm_head.weight"].dtype == torch.float32


def test_a_hostfile_after_the_script_starts_the_launcher(prepared):
    """On one host, whose two slots the launcher starts without ssh."""
    (prepared / "hostfile.txt").write_text("localhost slots=2  # this one\n")
    arguments = [*ARGUMENTS, "--optimizer", "adamw", "--max_steps", "2", "--hostfile=hostfile.txt"]
    arguments += ["--master_port", str(free_port())]
    job = start_script(SCRIPT, *arguments, cwd=prepared, start_new_session=True)
    status, out, err = finish(job)
    assert status == 0, err
    assert "started on this host alone, but hostfile.txt names 1: starting again as" in out
    log = [json.loads(line) for line in newest_log(prepared).read_text().splitlines()]
    assert log[0]["environment"]["processes"] == 2


# ------------------------------------------------------------------------------------------------ without processes


def merged(settings, *argv, world_size=2, dtype=torch.float32):
    config = asked_by(*ARGUMENTS, "--optimizer", "adamw", *argv).training
    return merge_settings(settings, "ds.json", config, dtype, world_size)


def test_our_fields_fill_deepspeeds():
    settings = merged({"zero_optimization": {"stage": 1}, "gradient_clipping": "auto"}, "--grad_clip", "0.5")
    assert settings["train_micro_batch_size_per_gpu"] == 4 and settings["gradient_accumulation_steps"] == 2
    assert settings["train_batch_size"] == 16 and settings["gradient_clipping"] == 0.5
    assert "torch_autocast" not in settings
    assert merged({}, dtype=torch.bfloat16)["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    half = merged({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, dtype=torch.bfloat16)
    assert half["bf16"] == {"enabled": True} and not half["torch_autocast"]["enabled"]
    agreeing = {"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}, "fp16": {"enabled": False}}
    assert "optimizer" not in merged(agreeing, "--learning_rate", "0.001", "--min_lr", "0")


@pytest.mark.parametrize(("settings", "says"), [
    ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu is 8, batch_size is 4"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4 over 2 processes: make them agree"),
    ({"train_batch_size": 8}, r"train_batch_size is 8, batch_size \(4\) x gradient_accumulation_steps \(4\)"),
    ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, grad_clip is 1"),
    ({"bf16": {"enabled": True}}, "bf16.enabled is True, dtype is float32"),
    ({"fp16": {"enabled": True}}, "fp16.enabled is True, dtype is float32"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is True, dtype is float32"),
    ({"optimizer": {"type": "Lion"}}, "optimizer.type is lion, optimizer is adamw"),
    ({"optimizer": {"type": "adamw", "params": {"lr": 1}}}, "optimizer.params.lr is 1, learning_rate is"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler: leave it out; lr_schedule"),
    ({"zero_optimization": {"stage": 4}}, "a stage from 0 to 3"),
    ([], "must be a JSON object"),
])  # fmt: skip
def test_both_fields_are_named_where_they_disagree(settings, says):
    with pytest.raises(UserError, match=says):
        merged(settings)


def test_half_precision_weights_need_zero():
    with pytest.raises(UserError, match=r"bf16\.enabled needs ZeRO"):
        merged({"bf16": {"enabled": True}}, dtype=torch.bfloat16)


@pytest.mark.parametrize(("text", "says"), [
    ("", "no host in it"),
    ("a slots=2\nb\n", 'line 2: must be like "b slots=4"'),
    ("a slots=0\n", "line 1: must be like"),
    ("a slots=two\n", "line 1: must be like"),
    ("a slots=1\n# b\na slots=1\n", "line 3: a is listed twice"),
])  # fmt: skip
def test_a_bad_hostfile_is_explained(work, text, says):
    (work / "hostfile.txt").write_text(text)
    with pytest.raises(UserError, match=says):
        read_hostfile("hostfile.txt")


def test_hosts_are_asked_before_anything_starts(work, monkeypatch):
    """A stand-in for ssh, which knows one host with one GPU."""
    ssh = work / "ssh"
    ssh.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "sys.exit(0 if print(1) is None and sys.argv[-2] == 'known' else 'Could not resolve hostname')\n"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(work), prepend=":")
    check_hosts("hostfile.txt", {"known": 1}, None)
    with pytest.raises(UserError, match="known has slots=2, but 1 GPU"):
        check_hosts("hostfile.txt", {"known": 2}, None)
    with pytest.raises(UserError, match=r"no ssh to other without a password \(Could not resolve hostname\)"):
        check_hosts("hostfile.txt", {"known": 1, "other": 1}, None)


@pytest.mark.parametrize(("argv", "says"), [
    (["--deepspeed_config", "deepspeed_zero2", "--optimizer", "sgd"], "optimizer sgd with ZeRO stage 2"),
    (["--deepspeed_config", "deepsped"], "did you mean"),
    (["--deepspeed_config", "broken.json"], "broken.json"),
    (["--deepspeed_config", "clip.json"], "gradient_clipping is 3, grad_clip is 1"),
    (["--hostfile=nowhere.txt"], "nowhere.txt: no such file"),
    (["--fsdp", "true"], "fsdp shards a model over processes: start train_ddp.py"),
])  # fmt: skip
def test_a_mistake_is_one_line(prepared, call, monkeypatch, argv, says):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # what main() sets is taken back
        monkeypatch.delenv(name)
    (prepared / "broken.json").write_text('{"zero_optimization": ')
    (prepared / "clip.json").write_text('{"gradient_clipping": 3}')
    result = call(SCRIPT, *ARGUMENTS, *argv)
    assert result.status == 1 and says in result.err and "Traceback" not in result.err


def test_without_deepspeed_it_says_so(prepared, call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = call(SCRIPT, *ARGUMENTS)
    assert result.status == 1 and "DeepSpeed is not installed: pip install deepspeed" in result.err


def write_shards(folder, shares, **values):
    for rank, share in enumerate(shares):
        save_shard(folder, 3, rank, len(shares), share)
    finish_sharded(
        folder, len(shares), {"step": 3, "names": {"w": "w"}, "groups": [["w"]], "optimizer_step": 3.0, **values}
    )


@pytest.mark.parametrize(("damage", "says"), [
    (lambda folder: (folder / "latest").unlink(), "nor the folder of a sharded checkpoint"),
    (lambda folder: (folder / "step_3_of_2" / "rank_1.pt").unlink(), "rank_1.pt: missing"),
    (lambda folder: (folder / "step_3_of_2" / "rank_1.pt").write_bytes(b"x"), "rank_1.pt: not a checkpoint"),
    (lambda folder: torch.save({}, folder / "step_3_of_2" / "rank_1.pt"), "damaged"),  # a part of w is missing
    (lambda folder: torch.save(1, folder / "step_3_of_2" / "values.pt"), "values.pt: not from a checkpoint"),
])  # fmt: skip
def test_a_damaged_sharded_checkpoint_is_named(work, damage, says):
    pieces = [
        {"shape": (5,), "start": 3 * r, **dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), torch.ones(3 - r))}
        for r in (0, 1)
    ]
    write_shards(work / "last", [{"w": piece} for piece in pieces])
    damage(work / "last")
    with pytest.raises(UserError, match=says):
        load_checkpoint("last")


def test_a_damaged_sharded_checkpoint_falls_back_to_the_previous_one(work, capsys):
    values = {"names": {"w": "w"}, "groups": [["w"]], "model_config": {}, "tokenizer": {}, "data": {}, "rng": {}}
    values |= {"train_config": {}, "best_val_loss": 1.0, "optimizer_step": 3.0}
    for step in (1, 2, 3):
        share = {part: torch.full((4,), float(step)) for part in ("weight", "exp_avg", "exp_avg_sq")}
        save_shard(work, step, 0, 1, {"w": {"shape": (2, 2), "start": 0, **share}})
        finish_sharded(work, 1, {"step": step, **values})
    assert sorted(folder.name for folder in work.glob("step_*")) == ["step_2_of_1", "step_3_of_1"]
    assert load_checkpoint_or_previous(work)["step"] == 3
    (work / "step_3_of_1" / "rank_0.pt").write_bytes(b"")
    older = load_checkpoint_or_previous(work)
    assert older["step"] == 2 and torch.equal(older["model"]["w"], torch.full((2, 2), 2.0))
    assert "rank_0.pt: " in (said := capsys.readouterr().err) and "using the previous checkpoint, step 2" in said


@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_a_policy_and_its_reference_have_the_precision_of_training(prepared, call, stage):
    """In bfloat16: the margin of a model against itself is zero, the first loss ln 2, as with train.py."""
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i % 7}", "rejected": f"no, not {i % 5}"} for i in range(60)]
    write_jsonl(prepared / "dpo.jsonl", rows)
    write_jsonl(prepared / "sft.jsonl", [{"question": r["prompt"], "answer": r["chosen"]} for r in rows])
    assert call("data.py", "sft.jsonl", "dpo.jsonl", "--output", "pairs", "--block_size", "32").status == 0
    data = lambda name: ["--dataset_path", f'[["pairs/{name}_train.bin", "pairs/{name}_val.bin"]]']  # noqa: E731
    tokenizer = ["--tokenizer_path", "pairs/tokenizer.json", "--optimizer", "adamw"]
    base = ["-t", "sft", "--from_checkpoint", "", *TINY, *FAST, "--block_size", "32", "--n_embd", "32", *tokenizer]
    assert call("train.py", *base, *data("sft"), "--max_steps", "20").status == 0
    dpo = ["-t", "dpo", *FAST, *data("dpo"), *tokenizer, "--dtype", "bfloat16", "--dpo_chosen_weight", "0"]
    curve = train_on(2, prepared, *config_of(f"deepspeed_{stage}"), *dpo, "--max_steps", "1", script=SCRIPT)
    assert curve["loss"] == pytest.approx([math.log(2)], abs=1e-6)


class FusedAdamWithoutKernel(torch.optim.Optimizer):
    """DeepSpeed's FusedAdam as far as it counts: the kernel computes in Python, everything else is as in 0.19."""

    def __init__(self, groups):
        super().__init__(groups, {"eps": 1e-8, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group.setdefault("step", 0)
            if not group["params"]:  # ZeRO 3 steps group by group
                continue
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": group["step"], "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] += 1  # of the group's last parameter alone
            assert isinstance(state["step"], int)  # what the kernel takes
            (a, b), n = group["betas"], state["step"]
            for p in group["params"]:
                moment, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                moment.lerp_(p.grad, 1 - a)
                square.lerp_(p.grad.square(), 1 - b)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(moment, (square / (1 - b**n)).sqrt() + group["eps"], value=-group["lr"] / (1 - a**n))


def use_fused_adam() -> None:
    """Have an engine on the CPU take it, as one on CUDA takes DeepSpeed's."""
    import train_deepspeed
    from training.optimizer import make_optimizer

    def make(self, model):
        self.settings["zero_allow_untested_optimizer"] = True
        return FusedAdamWithoutKernel(make_optimizer(model, self.config, self.device).param_groups)

    train_deepspeed.DeepSpeedEngine.make_optimizer = make


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_the_steps_of_fused_adam_are_saved_and_resumed(prepared, one_process, call, stage):
    """12 steps with it, 4 more by itself, 4 more by train.py: bias correction goes on as in 20 steps of torch's."""
    whole, _ = one_process("--optimizer", "adamw", "--beta2", "0.95")
    arguments = [*ARGUMENTS, "--optimizer", "adamw", "--beta2", "0.95", "--stage", "parts"]
    fused = {"script": SCRIPT, "first": use_fused_adam}
    deepspeed = config_of(f"deepspeed_{stage}")
    parts = train_on(2, prepared, *deepspeed, *arguments, "--max_steps", "12", **fused)["loss"]
    last = "checkpoint/parts_last" + (".pt" if stage == "zero0" else "")
    steps = load_checkpoint(last)["optimizer"]["state"].values()
    assert {float(state["step"]) for state in steps} == {12.0}
    resume = ["--from_checkpoint", last]
    parts += train_on(2, prepared, *deepspeed, *arguments, *resume, "--max_steps", "16", **fused)["loss"]
    assert call("train.py", *arguments, *resume, "--max_steps", "20").status == 0
    parts += curves(newest_log(prepared))["loss"]
    assert parts == pytest.approx(whole["loss"], rel=1e-4)
