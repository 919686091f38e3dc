import itertools
import json
import math
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAST, ROOT, TINY, Result, make_samples, read_log, run_script, start_script, write_jsonl

from base.configuration import UserError
from model import GPT, ModelConfig
from text.batches import TrainBatches
from text.token_files import TokenFile
from text.tokenizer_files import load_tokenizer
from training.config import TrainConfig
from training.engine import Engine, place_steps
from training.losses import next_token
from training.optimizer import SCHEDULES, CombinedOptimizer, Muon, make_optimizer, orthogonalise, schedule
from training.run_log import StopRequest
from training.setup import changed_fields
from training.sources import mean_baselines
from weights.checkpointing import load_checkpoint, set_aside


def config(folder, **fields):
    values = {
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "warmup_iters": 2,
        "max_steps": 12,
        "eval_interval": 4,
        "eval_iters": 3,
        "learning_rate": 1e-2,
        "min_lr": 1e-3,
        "save_interval": 5,
        "device": "cpu",
        "block_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        **fields,
    }
    path = folder / f"{fields.get('stage', 'pretrain')}_config.json"
    path.write_text(json.dumps({"stage": "pretrain", **values}), encoding="utf-8")
    return path


def only_log(folder):
    logs = sorted(folder.glob("train_*.log"))
    log = logs[-1]
    for other in logs[:-1]:
        other.rename(other.with_suffix(".old"))
    return log


def same_weights(a, b) -> bool:
    a, b = load_checkpoint(a)["model"], load_checkpoint(b)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_resume_gives_the_same_weights_and_the_logs_join(call, prepared, optimizer, stage):
    path = config(prepared, stage=stage, optimizer=optimizer, dropout=0.1, max_steps=60, lr_decay_iters=60)
    assert call("train.py", "-t", path, "--save_checkpoint_to", "whole").status == 0
    whole = only_log(prepared)
    losses = [record["loss"] for record in read_log(whole, "train")]
    evals = read_log(whole, "val")
    whole.rename("whole.txt")
    assert call("train.py", "-t", path, "--max_steps", "30", "--save_checkpoint_to", "parts").status == 0
    only_log(prepared).rename("first.txt")
    last = f"parts/{stage}_last.pt"
    result = call("train.py", "-t", path, "--from_checkpoint", last, "--save_checkpoint_to", "parts")
    assert result.status == 0 and "resumes" in result.out
    assert same_weights(f"whole/{stage}_last.pt", last)
    assert same_weights(f"whole/{stage}.pt", f"parts/{stage}.pt")
    resumed = read_log(only_log(prepared), "train")
    assert [record["step"] for record in resumed] == list(range(31, 61))
    assert [record["loss"] for record in resumed] == losses[30:]
    assert read_log(only_log(prepared), "val")[-1]["val_loss"] == evals[-1]["val_loss"]
    assert load_checkpoint(last)["best_val_loss"] == load_checkpoint(f"whole/{stage}_last.pt")["best_val_loss"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(call, prepared):
    path = config(prepared)
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        call("train.py", "-t", path, "--save_checkpoint_to", folder, "--random_seed", seed)
    assert same_weights("a/pretrain_last.pt", "b/pretrain_last.pt")
    assert not same_weights("a/pretrain_last.pt", "c/pretrain_last.pt")


def test_a_step_equals_one_large_batch_whatever_the_masks(prepared):
    """Accumulation over micro-batches with different numbers of answers, against one batch computed by hand."""
    options = {"block_size": 16, "vocab_size": 200, "seed": 1, "pad_to": 16}
    file = TokenFile("dataset/sft_train.bin")
    micro = TrainBatches([file], batch_size=3, accumulation_steps=4, **options).at(0)
    assert len({batch.count for batch in micro}) > 1
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=200, block_size=16, n_layer=1, n_head=2, n_embd=16))
    idx, targets, mask = (torch.cat([getattr(b, f) for b in micro]) for f in ("idx", "targets", "loss_mask"))
    log_probabilities = F.log_softmax(model(idx)[0].double(), -1)
    picked = log_probabilities.gather(-1, targets[..., None])[..., 0]
    expected = -picked[mask.bool()].mean()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    engine = Engine(TrainConfig(device="cpu"))
    engine.prepare(model)
    count = sum(batch.count for batch in micro)
    loss = sum(engine.forward_backward(next_token, batch, count, False).item() for batch in micro)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_logged_losses_are_those_of_the_whole_step(call, prepared):
    path = config(prepared, max_steps=1, decay_lr=False, warmup_iters=0)
    call("train.py", "-t", path)
    logged = read_log(only_log(prepared), "train")[0]["loss"]
    torch.manual_seed(1337)
    vocab_size = TokenFile("dataset/pretrain_train.bin").header["vocab_size"]
    model = GPT(ModelConfig(vocab_size=vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=16))
    options = {"block_size": 16, "vocab_size": vocab_size, "batch_size": 4, "accumulation_steps": 2, "seed": 1337}
    micro = TrainBatches([TokenFile("dataset/pretrain_train.bin")], **options).at(0)
    assert logged == pytest.approx(np.mean([model(b.idx, b.targets)[1].item() for b in micro]), rel=1e-5)


def test_the_logged_rate_is_that_of_the_step(call, prepared):
    """By hand: two steps of warm-up, then a straight line from the peak down to min_lr at the last step and one."""
    path = config(prepared, max_steps=12, lr_schedule="linear")
    call("train.py", "-t", path)
    expected = [1e-2 / 3, 2e-2 / 3, *(1e-3 + 9e-3 * (1 - i / 10) for i in range(10))]
    assert [record["lr"] for record in read_log(only_log(prepared), "train")] == pytest.approx(expected)


def test_min_lr_is_a_rate_and_the_decay_ends_with_max_steps():
    settings = TrainConfig(learning_rate=0.02, min_lr=0.001, warmup_iters=10, max_steps=110)
    assert 0.02 * settings.lr_scale(60) == pytest.approx((0.02 + 0.001) / 2)
    assert 0.02 * settings.lr_scale(110) == 0.02 * settings.lr_scale(500) == pytest.approx(0.001)
    assert TrainConfig(learning_rate=0.02, min_lr=0.02).lr_scale(10**6) == 1
    with pytest.raises(UserError, match="must not be above learning_rate"):
        TrainConfig(learning_rate=0.02, min_lr=0.021)


def test_logged_tokens_are_all_that_the_model_read(call, prepared):
    """With the questions and the padding, over all micro-batches; and the use of the device's speed follows from it."""
    result = call("train.py", "-t", config(prepared, stage="sft", max_steps=4))
    records = read_log(only_log(prepared), "train")
    file = TokenFile("dataset/sft_train.bin")
    options = {"block_size": 16, "vocab_size": 500, "batch_size": 4, "accumulation_steps": 2, "seed": 1337}
    batches = TrainBatches([file], **options)
    read = [sum(batch.idx.numel() for batch in batches.at(8 * step)) for step in range(4)]
    assert [record["tokens"] for record in records] == np.cumsum(read).tolist()
    peak = float(re.search(r"matmul ([\d,]+) GFLOP/s", result.out)[1].replace(",", ""))
    for record, n_tokens in zip(records, read, strict=True):
        assert record["tokens_per_s"] == pytest.approx(1000 * n_tokens / record["ms_per_step"])
        assert record["mfu"] == pytest.approx(record["gflops"] / peak, rel=0.1)  # (the peak is shown rounded)


@pytest.mark.parametrize("options", [["--eval_interval", "100"], ["--sample_tokens", "9", "--sample_prompt", "the"]])
def test_evaluations_and_samples_do_not_disturb_the_training(call, prepared, options):
    """With dropout: it is off in between and on again after, and draws the same random numbers."""
    path = config(prepared, dropout=0.3, eval_interval=2, eval_iters=1)
    for folder, more in (("one", []), ("other", options)):
        assert call("train.py", "-t", path, "--save_checkpoint_to", folder, *more).status == 0
    assert same_weights("one/pretrain_last.pt", "other/pretrain_last.pt")


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_validation_loss_and_its_error_equal_a_direct_computation(call, prepared, stage):
    path = config(prepared, stage=stage, eval_iters=0)
    call("train.py", "-t", path)
    record = read_log(only_log(prepared), "val")[-1]
    checkpoint = load_checkpoint(f"checkpoint/{stage}_last.pt")
    model = GPT(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    file = TokenFile(f"dataset/{stage}_val.bin")
    if stage == "pretrain":
        rows = [(file.tokens[s : s + 17], None) for s in range(0, len(file.tokens) - 1, 16)]
    else:
        edges = [(a, b) for a, b in pairwise(file.starts) if b - a <= 17]
        rows = [(file.tokens[a:b], file.loss_mask[a:b]) for a, b in edges]
    sums, counts = [], []
    for tokens, mask in rows:
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        losses = F.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:], reduction="none")
        keep = torch.ones(len(losses)) if mask is None else torch.from_numpy(mask[1:].astype(np.float32))
        sums.append((losses * keep).sum().item())
        counts.append(keep.sum().item())
    s, c = np.array(sums), np.array(counts)
    mean = s.sum() / c.sum()
    assert record["val_loss"] == pytest.approx(mean, rel=1e-5)
    assert record["val_loss_se"] == pytest.approx(math.sqrt(((s - mean * c) ** 2).sum()) / c.sum(), rel=1e-3)
    assert record["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    text = load_tokenizer("dataset/tokenizer.json").decode(file.tokens)
    n_targets, n_characters = len(file.tokens), len(text)  # one token is one character
    if stage == "sft":  # an answer has <|eos|> beside its characters; only they are in the loss
        answers = re.findall(r"<\|ResponseMark\|>(.*?)<\|eos\|>", text)
        n_characters = sum(map(len, answers))
        n_targets = n_characters + len(answers)
    expected = mean * n_targets / n_characters / math.log(2)
    assert record["bits_per_character"] == pytest.approx(expected, rel=1e-5)


def test_training_learns_and_fine_tuning_starts_from_it(call, prepared):
    path = config(prepared, max_steps=80, eval_interval=40)
    assert call("train.py", "-t", path).status == 0
    losses = [record["loss"] for record in read_log(only_log(prepared), "train")]
    assert losses[-1] < 0.7 * losses[0]
    result = call(
        "train.py", "-t", config(prepared, stage="sft", max_steps=10), "--from_checkpoint", "checkpoint/pretrain.pt"
    )
    assert result.status == 0 and "starts from the weights" in result.out
    assert load_checkpoint("checkpoint/sft.pt")["step"] <= 10


def test_the_best_checkpoint_is_saved_only_when_validation_improves(call, prepared):
    path = config(prepared, max_steps=12, eval_interval=2, learning_rate=1e-2)
    call("train.py", "-t", path)
    records = read_log(only_log(prepared), "val")
    best = min(records, key=lambda record: record["val_loss"])
    checkpoint = load_checkpoint("checkpoint/pretrain.pt")
    assert checkpoint["step"] == best["step"]
    assert checkpoint["best_val_loss"] == best["val_loss"]
    before = (prepared / "checkpoint" / "pretrain.pt").read_bytes()
    args = ("--from_checkpoint", "checkpoint/pretrain_last.pt", "--max_steps", "24", "--learning_rate", "50")
    call("train.py", "-t", path, *args, "--min_lr", "50", "--grad_clip", "0")
    assert (prepared / "checkpoint" / "pretrain.pt").read_bytes() == before
    assert load_checkpoint("checkpoint/pretrain_last.pt")["step"] == 24


def test_a_new_run_keeps_what_an_earlier_one_left(call, prepared):
    path = config(prepared)
    call("train.py", "-t", path)
    before = (prepared / "checkpoint" / "pretrain.pt").read_bytes()
    call("train.py", "-t", path, "--random_seed", "7")
    assert (prepared / "checkpoint" / "pretrain.pt.bak").read_bytes() == before
    assert (prepared / "checkpoint" / "pretrain.pt").read_bytes() != before


def stopped(call, monkeypatch, *argv):
    """A run that is asked to stop in its second step, before its first evaluation."""
    asked = itertools.count()
    with monkeypatch.context() as patches:
        patches.setattr(StopRequest, "requested", property(lambda _: next(asked) > 0))
        assert call("train.py", *argv).status == 0


@pytest.mark.parametrize("case", ["other evaluation", "new run", "copied", "newer best"])
def test_a_best_model_is_never_overwritten_by_another_run(prepared, call, monkeypatch, case):
    """Only the best that a run has measured itself, or resumes with, is its own, whatever lies under the name."""
    path, last, best = config(prepared), Path("checkpoint/pretrain_last.pt"), Path("checkpoint/pretrain.pt")
    assert call("train.py", "-t", path, "--max_steps", "8").status == 0
    good, options = best.read_bytes(), ["--random_seed", "1337"]
    if case == "other evaluation":
        options = ["--overlong", "cut"]
        stopped(call, monkeypatch, "-t", path, *options, "--from_checkpoint", last)
    elif case == "new run":
        options = ["--random_seed", "7"]
        stopped(call, monkeypatch, "-t", path, *options)
    elif case == "copied":  # from the last save of one run, over the best of another
        last = last.rename("mine.pt")
        assert call("train.py", "-t", path, "--max_steps", "4", "--random_seed", "7").status == 0
        good = best.read_bytes()
        Path("checkpoint/pretrain.pt.bak").unlink()
    else:  # resumed from a save before its best
        checkpoint = torch.load(last, weights_only=True)
        torch.save({**checkpoint, "best_val_loss": checkpoint["best_val_loss"] + 1}, last)
    result = call("train.py", "-t", path, "--max_steps", "16", "--from_checkpoint", last, *options)
    assert result.status == 0, result.err
    assert ("no validation loss yet" in result.out) == (case in ("other evaluation", "new run"))
    assert Path(f"{best}.bak").read_bytes() == good != best.read_bytes() and "kept as pretrain.pt.bak" in result.out


@pytest.mark.parametrize("value", ["\x1b]0;x\x07", "\u202ereversed", "a\nb", ["\x1b"], {"\x9b": 1}, "long" * 1000])
def test_what_changed_is_told_without_control_characters(value):
    (line,) = changed_fields({"stage": "sft"}, {"stage": value})
    assert line.isprintable() and len(line) < 100


def test_every_model_that_is_set_aside_stays(prepared, call):
    """A good model, then two short trial runs over it; a folder of shards likewise."""
    path = config(prepared)
    models = []
    for seed in ("1", "2", "3", "4"):
        result = call("train.py", "-t", path, "--max_steps", "4", "--random_seed", seed)
        models.append(Path("checkpoint/pretrain.pt").read_bytes())
    assert "kept as pretrain.pt.bak3" in result.out and "kept as pretrain_last.pt.bak3" in result.out
    for name, model in zip((".bak", ".bak2", ".bak3", ""), models, strict=True):
        assert Path(f"checkpoint/pretrain.pt{name}").read_bytes() == model
    for i in range(3):
        shards = Path("checkpoint/pretrain_last")
        shards.mkdir()
        (shards / "latest").write_text(str(i))
        set_aside(shards)
    assert [Path(f"checkpoint/pretrain_last.bak{n}/latest").read_text() for n in ("", 2, 3)] == ["0", "1", "2"]


def test_checkpoints_hold_what_the_format_says(call, prepared):
    call("train.py", "-t", config(prepared))
    checkpoint = torch.load("checkpoint/pretrain.pt", weights_only=True)
    names = "model optimizer step model_config train_config tokenizer rng data best_val_loss format"
    assert set(names.split()) <= checkpoint.keys()
    assert not any("_orig_mod" in name or name.startswith("module.") for name in checkpoint["model"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_the_step_saves_and_tells_how_to_go_on(prepared, number):
    path = config(prepared, max_steps=100000, eval_interval=100000)
    process = start_script("train.py", "-t", path, cwd=prepared)
    try:
        deadline = time.time() + 60
        while time.time() < deadline:
            logs = list(prepared.glob("train_*.log"))
            if logs and len(logs[0].read_text().splitlines()) > 5:
                break
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "--from_checkpoint checkpoint/pretrain_last.pt" in out and "not evaluated yet" in out
    checkpoint = load_checkpoint(prepared / "checkpoint" / "pretrain_last.pt")
    logged = read_log(logs[0], "train")[-1]["step"]
    assert checkpoint["step"] == logged
    assert "Traceback" not in err


def test_a_later_signal_ends_at_once_but_an_echo_does_not():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, in the background
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # a launcher passing it on
        assert stop.requested
        stop.requested_at -= 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_the_time_limit_ends_the_run_with_an_evaluation(call, prepared):
    began = time.time()
    path = config(prepared, max_steps=100000, eval_interval=100000)
    result = call("train.py", "-t", path, "--max_minutes", "0.03")
    assert result.status == 0 and time.time() - began < 60
    step = load_checkpoint("checkpoint/pretrain_last.pt")["step"]
    assert 0 < step < 100000
    assert read_log(only_log(prepared), "val")[-1]["step"] == step


def test_patience_counts_evaluations_without_gain(call, prepared):
    path = config(prepared, optimizer="sgd", max_steps=1000, eval_interval=2, patience=3, beta1=0.0)
    result = call("train.py", "-t", path, "--learning_rate", "1e-30", "--min_lr", "0", "--weight_decay", "0")
    assert result.status == 0
    assert load_checkpoint("checkpoint/pretrain_last.pt")["step"] == 8  # one first gain, then three without


def test_a_diverging_run_stops_and_keeps_the_best_checkpoint(call, prepared):
    path = config(prepared, eval_interval=1, max_steps=200, optimizer="sgd", grad_clip=0.0)
    result = call("train.py", "-t", path, "--learning_rate", "1e9", "--min_lr", "1e9", "--warmup_iters", "3")
    assert result.status != 0 and "step " in result.err and "best checkpoint" in result.err
    assert math.isfinite(load_checkpoint("checkpoint/pretrain.pt")["best_val_loss"])


@pytest.mark.real("compiles in C++ for half a minute")
def test_compile_leaves_no_trace(call, prepared, monkeypatch):
    path = config(prepared, max_steps=6)
    compiled = call("train.py", "-t", path, "--compile", "true", "--save_checkpoint_to", "compiled")
    assert compiled.status == 0
    names = load_checkpoint("compiled/pretrain_last.pt")["model"].keys()
    call("train.py", "-t", path, "--save_checkpoint_to", "plain")
    assert names == load_checkpoint("plain/pretrain_last.pt")["model"].keys()
    args = ("--max_steps", "8", "--save_checkpoint_to", "plain")
    assert call("train.py", "-t", path, "--from_checkpoint", "compiled/pretrain_last.pt", *args).status == 0

    def broken(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    result = call("train.py", "-t", path, "--compile", "true", "--save_checkpoint_to", "fallback")
    assert result.status == 0 and "continuing without" in result.err
    assert load_checkpoint("fallback/pretrain_last.pt")["step"] == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_about_as_well(call, prepared, dtype):
    path = config(prepared, max_steps=30)
    finals = {}
    for name in ("float32", dtype):
        assert call("train.py", "-t", path, "--dtype", name, "--save_checkpoint_to", name).status == 0
        finals[name] = read_log(only_log(prepared), "val")[-1]["val_loss"]
    assert finals[dtype] == pytest.approx(finals["float32"], rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in load_checkpoint(f"{dtype}/pretrain.pt")["model"].values())


def test_the_check_tells_whether_the_set_up_can_learn(call, prepared):
    path = config(prepared)
    result = call("train.py", "-t", path, "--check")
    assert result.status == 0 and "check passed" in result.out
    result = call("train.py", "-t", path, "--check", "--learning_rate", "1e-9", "--min_lr", "0")
    assert result.status != 0 and "check failed" in result.err
    assert not list((prepared / "checkpoint").glob("*")) if (prepared / "checkpoint").exists() else True


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["--warmup_iters", "100"], "warmup_iters"),
        (["--lr_decay_iters", "1000"], "lr_decay_iters"),
        (["--n_embd", "256"], "weights per token"),
        (["--block_size", "700"], "shorter than one window"),
        (["--block_size", "700", "--rope_theta", "100"], "rope_theta 100: after "),
    ],
)
def test_settings_that_cannot_make_sense_are_warned_of(call, prepared, overrides, warning):
    result = call("train.py", "-t", config(prepared, max_steps=1, batch_size=1), *overrides)
    assert result.status == 0 and "warning: " in result.err and warning in result.err


def test_an_odd_first_loss_is_warned_of(call, prepared, monkeypatch):
    assert "first loss" not in call("train.py", "-t", config(prepared, max_steps=1)).err
    initialise = GPT._initialise

    def too_large(model):
        initialise(model)
        torch.nn.init.normal_(model.token_embedding.weight, std=2.0)

    monkeypatch.setattr(GPT, "_initialise", too_large)
    result = call("train.py", "-t", config(prepared, max_steps=1))
    assert result.status == 0 and "warning: the first loss is" in result.err


def test_preflight_and_samples_are_printed(call, prepared):
    result = call("train.py", "-t", config(prepared), "--sample_tokens", "10", "--sample_prompt", "the ")
    for word in ("parameters", "epoch", "device: cpu", "attention", "GB", "unigram", "lzma", "sample: "):
        assert word in result.out
    uniform = math.log(TokenFile("dataset/pretrain_val.bin").header["vocab_size"])
    assert f"uniform {uniform:.3f} ({uniform / math.log(2):.2f} bits/character)" in result.out  # a token is one


def test_tensorboard_gets_the_curves(call, prepared):
    pytest.importorskip("tensorboard")
    assert call("train.py", "-t", config(prepared), "--log_to", "tensorboard").status == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((prepared / "runs").iterdir()))).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 13))
    assert len(events.Scalars("val/val_loss")) == 3


# ---------------------------------------------------------------------------------------- schedules and optimizers


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_and_come_down(name):
    values = [schedule(name, step, 10, 110, 0.1) for step in range(200)]
    assert values[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])  # neither 0 nor twice the peak
    end = 1.0 if name == "constant" else 0.1
    assert values[110] == pytest.approx(end) and values[199] == pytest.approx(end)
    middle = {"cosine": 0.55, "linear": 0.55, "wsd": 1.0, "constant": 1.0}[name]
    assert values[60] == pytest.approx(middle)
    late = {"cosine": 0.1 + 0.45 * (1 + math.cos(0.9 * math.pi)), "linear": 0.19, "wsd": 0.55, "constant": 1.0}[name]
    assert values[100] == pytest.approx(late)  # of wsd, in the middle of its last fifth


def test_newton_schulz_brings_singular_values_near_one():
    torch.manual_seed(0)
    G = torch.randn(3, 40, 20) * torch.logspace(-1, 1, 20)
    values = torch.linalg.svdvals(orthogonalise(G))
    assert values.min() > 0.6 and values.max() < 1.3
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    similarity = F.cosine_similarity(orthogonalise(G).flatten(1), (U @ V).flatten(1))
    assert (similarity > 0.95).all()


def test_muon_equals_the_one_in_torch():
    """Same momentum and scaling as torch.optim.Muon, which works in bfloat16 on one matrix at a time."""
    torch.manual_seed(0)
    weights = [torch.randn(24, 8), torch.randn(8, 24), torch.randn(24, 8)]
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    a = Muon(ours, lr=0.1, momentum=0.9, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, w in zip(ours, theirs, weights, strict=True):
        assert F.cosine_similarity((p - w).flatten(), (q - w).flatten(), dim=0) > 0.999
        assert (p - w).norm().item() == pytest.approx((q - w).norm().item(), rel=0.02)


LATENT = {"attention": ["latent"], "kv_rank": 12, "q_rank": 10, "rope_dim": 2}


@pytest.mark.parametrize(
    "shape", [{}, {"n_kv_head": 1}, {"mlp": "gelu"}, {"n_expert": 3, "n_shared_expert": 1}, LATENT]
)
def test_muon_treats_joined_matrices_as_if_they_were_apart(shape):
    """Queries, keys and values, latents and rotary keys, gate and up, experts: each moves as a parameter of its own."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, n_embd=16, n_head=2, n_layer=1, n_hidden=24, **shape)
    model = GPT(config)
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.1), torch.device("cpu"))
    kv = config.n_kv_head * config.head_dim
    gate = [24, 24] if config.mlp == "swiglu" else [24]
    sizes = {"q_down.weight": [10], "q_up.weight": [16], "kv_down.weight": [12, 2], "kv_up.weight": [12, 16]}
    sizes |= {"qkv.weight": [16, kv, kv], "out.weight": [16], "up.weight": gate, "down.weight": [16]}
    sizes |= {"mlp.up": [24, 24], "mlp.down": [16]}
    apart = {}
    for name, p in model.blocks.named_parameters():
        p.grad = torch.randn_like(p)
        rows = next((rows for ending, rows in sizes.items() if name.endswith(ending)), None)
        if rows and "router" not in name:
            assert sum(rows) == p.size(-2)
            matrices = [m for part in p.detach().split(rows, -2) for m in part.reshape(-1, *part.shape[-2:])]
            gradients = [m for part in p.grad.split(rows, -2) for m in part.reshape(-1, *part.shape[-2:])]
            apart[name] = rows, [torch.nn.Parameter(m.clone()) for m in matrices]
            for parameter, gradient in zip(apart[name][1], gradients, strict=True):
                parameter.grad = gradient.clone()
    Muon([p for _, ps in apart.values() for p in ps], lr=0.02, momentum=0.95, weight_decay=0.1).step()
    optimizer.step()
    for name, (rows, ps) in apart.items():
        parts = dict(model.blocks.named_parameters())[name].split(rows, -2)
        moved = [m for part in parts for m in part.reshape(-1, *part.shape[-2:])]
        assert all(torch.allclose(m, p, atol=1e-6) for m, p in zip(moved, ps, strict=True)), name


def test_muon_is_for_maps_between_hidden_states():
    """Not for embeddings, the output layer and routers, whose rows are looked up or chosen among."""
    model = GPT(ModelConfig(vocab_size=50, n_embd=16, n_head=2, n_layer=1, n_expert=3, tie_embeddings=False))
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon"), torch.device("cpu"))
    by_muon = {id(p) for p in optimizer.optimizers[0].param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in by_muon}
    assert names == {f"blocks.0.{n}" for n in ("attention.qkv.weight", "attention.out.weight", "mlp.up", "mlp.down")}


def test_weight_decay_is_on_matrices_only():
    model = GPT(ModelConfig(vocab_size=50, n_embd=16, n_head=2, n_layer=1, bias=True))
    for name in ("adamw", "sgd", "muon"):
        optimizer = make_optimizer(model, TrainConfig(optimizer=name), torch.device("cpu"))
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        assert len({id(p) for p in grouped}) == len(grouped) == len(list(model.parameters()))
        for group in optimizer.param_groups:
            assert group["weight_decay"] == 0.0 or all(p.dim() >= 2 for p in group["params"])


# ------------------------------------------------------------------------------------------------- the real thing


def test_the_road_from_a_text_file_to_an_answer(tmp_path):
    """Every command of the README's road, each a process of its own."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "pretrain.txt").write_text("one two three four five.\n" * 200, encoding="utf-8")
    write_jsonl(tmp_path / "dataset" / "sft.jsonl", [*make_samples(20), {"question": "one", "answer": "two"}])
    small = [*TINY, *FAST, "--max_steps", "10", "--eval_interval", "5"]

    def ok(*command: str, stdin: str | None = None) -> Result:
        result = run_script(*command, cwd=tmp_path, stdin=stdin)
        assert result.status == 0 and "Traceback" not in result.err, result
        return result

    ok("data.py", "--block_size", "16")
    ok("train.py", "-t", "pretrain", *small)
    ok("train.py", "-t", "sft", *FAST, "--max_steps", "10")
    answer = ok("inference.py", "-i", "-m", "checkpoint/sft.pt", "-p", "one", "-t", "0", "-l", "12")
    assert answer.err == "" and answer.out.count("\n") <= 3
    piped = ok("inference.py", "-i", "-m", "checkpoint/sft.pt", "-t", "0", "-l", "12", stdin="one\none\n")
    assert piped.out == answer.out * 2
    log = next(tmp_path.glob("train_*.log")).name
    ok("plot_loss.py", "-n", log, "-o", "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_help_lists_every_field():
    process = start_script("train.py", "--help", cwd=ROOT)
    out, _ = process.communicate(timeout=60)
    for name in (*ModelConfig.__dataclass_fields__, *TrainConfig.__dataclass_fields__):
        assert f"--{name}" in out


def test_adams_steps_are_placed_where_a_fused_kernel_wants_them():
    """Shown on the meta device: a ZeRO checkpoint's groups do not say fused, so torch leaves the steps on the CPU."""
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([p])
    states = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    optimizer.load_state_dict({"state": states, "param_groups": [{"params": [0]}]})
    optimizer.param_groups[0]["fused"] = True
    assert optimizer.state[p]["step"].device.type == "cpu"
    place_steps(CombinedOptimizer(optimizer))
    assert optimizer.state[p]["step"].device.type == "meta"


def test_baselines_are_those_of_all_validation_files():
    """A file counts by its targets in nats per token, by its characters in bits per character."""
    one = {"n_loss_tokens": 30, "n_characters": 60, "baselines": {"unigram": 2.0, "zlib_bits_per_character": 3.0}}
    other = {"n_loss_tokens": 10, "n_characters": 40, "baselines": {"unigram": 4.0, "zlib_bits_per_character": 1.0}}
    assert mean_baselines([one]) == one["baselines"]
    assert mean_baselines([one, other]) == {"unigram": 2.5, "zlib_bits_per_character": 2.2}
    other["baselines"].pop("zlib_bits_per_character")  # of a file of questions there is none
    assert mean_baselines([one, other]) == {"unigram": 2.5}
