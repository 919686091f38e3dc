"""What happens when a run is killed, its disk fills, its checkpoint rots or its gradients explode: nothing is lost."""

import functools
import io
import random
import re
import resource
import shlex
import time
import zipfile

import pytest
import torch
from conftest import DATA, FAST, TINY, Result, make_text, read_log
from processes import break_loss, end_of, fork, newest_log, train_on

import train
from base.configuration import UserError
from model import GPT, ModelConfig
from training import losses, preflight
from weights.checkpointing import SaveError, load_checkpoint, load_checkpoint_or_previous, load_model

KILLS = 50
ARGUMENTS = ["-t", "pretrain", *TINY, *FAST, *DATA, "--gradient_accumulation_steps", "1", "--optimizer", "adamw"]
ARGUMENTS += ["--decay_lr", "false", "--eval_iters", "1", "--stage", "run"]
ON = ["--from_checkpoint", "checkpoint/run_last.pt"]


def same_weights(one, other) -> bool:
    states = [list(checkpoint["optimizer"]["state"].values()) for checkpoint in (one, other)]
    moments = all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*states, strict=True))
    return moments and all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def trained(call, *options) -> Result:
    result = call("train.py", *ARGUMENTS, *options)
    assert result.status == 0, result.err
    return result


@pytest.mark.real("kills a run 50 times")
def test_killed_at_any_moment_a_run_goes_on_as_if_it_had_not_been(prepared, call):
    """50 times kill -9, some of them in the middle of a save: every second step is one."""
    rng, last = random.Random(0), prepared / "checkpoint" / "run_last.pt"
    arguments = [*ARGUMENTS, "--dropout", "0.1", "--save_interval", "2", "--eval_interval", "7"]
    half_written = 0
    for _ in range(KILLS):
        job = fork("train.py", *arguments, "--max_steps", "1000000", *(ON if last.exists() else []), cwd=prepared)
        started = load_checkpoint(last)["step"] if last.exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and job.is_alive():  # until it has saved for the first time
            if last.exists() and load_checkpoint(last)["step"] > started:
                break
        assert job.is_alive(), (prepared / "output.txt").read_text()
        time.sleep(rng.uniform(0, 0.03))
        job.kill()
        job.join()
        half_written += len(list(last.parent.glob(".*.tmp")))
        assert load_checkpoint(last)["step"] > started
    steps = str(load_checkpoint(last)["step"] + 3)
    trained(call, *arguments[len(ARGUMENTS) :], "--max_steps", steps, *ON)
    assert not list(last.parent.glob(".*.tmp"))
    undisturbed = ["--dropout", "0.1", "--eval_interval", "7", "--max_steps", steps, "--stage", "undisturbed"]
    trained(call, *undisturbed)
    assert same_weights(load_checkpoint(last), load_checkpoint("checkpoint/undisturbed_last.pt"))
    assert half_written > 0  # else the test did not test


def test_a_second_run_of_the_same_name_is_refused_while_the_first_one_lives(prepared, call):
    job = fork("train.py", *ARGUMENTS, "--max_steps", "1000000", "--save_interval", "5", cwd=prepared)
    deadline = time.monotonic() + 60
    while not (prepared / "checkpoint" / "run_last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    result = call("train.py", *ARGUMENTS, "--max_steps", "2")
    assert result.status == 1 and "another run is writing the checkpoints of 'run' into checkpoint" in result.err
    trained(call, "--max_steps", "2", "--stage", "other")
    job.kill()
    job.join()
    trained(call, "--max_steps", "2")


def test_a_full_disk_leaves_the_old_checkpoint_and_the_training_going(prepared, call):
    """No file may grow beyond 20 kB: the log can, a checkpoint cannot."""
    trained(call, "--max_steps", "4")
    last = prepared / "checkpoint" / "run_last.pt"
    before = last.read_bytes()
    full = {resource.RLIMIT_FSIZE: 20_000}
    options = [*ON, "--max_steps", "9", "--save_interval", "2", "--eval_interval", "4"]
    job = fork("train.py", *ARGUMENTS, *options, cwd=prepared, limits=full)
    job.join(60)
    said = (prepared / "output.txt").read_text()
    assert job.exitcode == 1 and "training goes on to the next save" in said
    assert said.count("run_last.pt: not written (File too large): it needs about") >= 2
    assert "Traceback" not in said and "error: checkpoint/run_last.pt: not written" in said
    assert read_log(newest_log(prepared), "train")[-1]["step"] == 9
    assert last.read_bytes() == before and not list(last.parent.glob(".*.tmp"))

    job = fork("train.py", *ARGUMENTS, *options, "--stop_on_failed_save", "true", cwd=prepared, limits=full)
    job.join(60)
    assert job.exitcode == 1 and read_log(newest_log(prepared), "train")[-1]["step"] < 9
    assert last.read_bytes() == before


def test_a_best_that_could_not_be_saved_is_no_best(prepared, call, monkeypatch):
    """The disk is full at the first evaluation; the second, no better one has room, and is saved."""
    save, failures = train.save, iter([True])

    def full(run, path, log):
        if path == run.best_path and next(failures, False):
            raise SaveError(f"{path}: not written")
        save(run, path, log)

    monkeypatch.setattr(train, "save", full)
    options = ["--max_steps", "4", "--eval_interval", "2", "--learning_rate", "1e-30", "--min_lr", "0"]
    result = trained(call, *options, "--optimizer", "sgd")
    assert "training goes on to the next save" in result.out
    records = read_log(newest_log(prepared), "val")
    assert records[0]["best_val_loss"] is None and records[1]["best_val_loss"] == records[1]["val_loss"]
    assert load_checkpoint("checkpoint/run.pt")["step"] == 4


def test_a_log_that_cannot_be_written_does_not_end_the_run(prepared, call):
    """No file may grow beyond 5 kB: neither the log nor a checkpoint; the log ends with a whole line."""
    limits = {resource.RLIMIT_FSIZE: 5_000}
    job = fork("train.py", *ARGUMENTS, "--max_steps", "60", cwd=prepared, limits=limits)
    job.join(60)
    said = (prepared / "output.txt").read_text()
    assert (
        job.exitcode == 1 and "Traceback" not in said and "run_last.pt: not written" in said
    )  # the checkpoint's fault
    assert said.count(".log: not written (") == 1 and "60/60" in said
    steps = [record["step"] for record in read_log(newest_log(prepared), "train")]
    assert 3 < len(steps) < 60 and steps == list(range(1, len(steps) + 1))


def test_a_flipped_bit_or_a_missing_end_is_noticed(prepared, call):
    trained(call, "--max_steps", "4", "--save_interval", "2")
    last = prepared / "checkpoint" / "run_last.pt"
    whole, rng = last.read_bytes(), random.Random(0)
    sound = load_checkpoint(last)
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        last.write_bytes(damaged)
        try:
            assert same_weights(
                load_checkpoint(last), sound
            )  # a bit of the archive's that says nothing, such as a date
        except UserError as error:
            assert "run_last.pt" in str(error)
    for size in [0, 1, *(rng.randrange(len(whole)) for _ in range(10))]:
        last.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"run_last\.pt"):
            load_checkpoint(last)


def test_every_bit_of_a_weight_is_covered(prepared, call):
    trained(call, "--max_steps", "2")
    last = prepared / "checkpoint" / "run_last.pt"
    whole = last.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size > 400]
        places = [whole.index(archive.read(entry)) + entry.file_size // 2 for entry in entries]
    for place in places:
        last.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="checksum"):
            load_checkpoint(last)


def test_resuming_falls_back_to_the_previous_checkpoint(prepared, call, capsys):
    trained(call, "--max_steps", "4", "--save_interval", "2")
    last = prepared / "checkpoint" / "run_last.pt"
    assert load_checkpoint(f"{last}.previous")["step"] == 2
    last.write_bytes(last.read_bytes()[:-100])
    result = trained(call, "--max_steps", "6", *ON)
    assert "run_last.pt: " in result.err and "using the previous checkpoint, step 2" in result.err
    assert load_checkpoint(last)["step"] == 6
    trained(call, "--max_steps", "6", "--stage", "whole")
    assert same_weights(load_checkpoint(last), load_checkpoint("checkpoint/whole_last.pt"))
    last.unlink()
    assert load_checkpoint_or_previous(last)["step"] > 0  # NAME.previous alone is enough


@pytest.fixture
def break_the_loss(monkeypatch):
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    return break_loss


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(prepared, call, break_the_loss):
    break_the_loss({3, 4, 7})
    result = trained(call, "--max_steps", "10", "--max_skipped_steps", "2")
    assert "step 4: skipped: loss nan" in result.out + result.err
    checkpoint = load_checkpoint("checkpoint/run_last.pt")
    assert checkpoint["data"]["skipped_steps"] == 3 and checkpoint["step"] == 10
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())
    assert read_log(newest_log(prepared), "train")[-1]["skipped_steps"] == 3


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train_ddp.py", []),
        ("train_ddp.py", ["--fsdp", "true"]),
        *[("train_deepspeed.py", ["--deepspeed_config", f"deepspeed_zero{stage}"]) for stage in (0, 2, 3)],
    ],
)
def test_processes_skip_a_step_together_and_forget_its_gradient(prepared, script, options):
    """A micro-batch of one process is NaN; the next step is finite on all, so nothing of it stayed."""
    if script == "train_deepspeed.py":
        pytest.importorskip("deepspeed")
    arguments = [*ARGUMENTS, "--gradient_accumulation_steps", "2", "--max_steps", "6", *options]
    curve = train_on(2, prepared, *arguments, script=script, first=functools.partial(break_loss, {2}))
    assert [loss is not None for loss in curve["loss"]] == [True, True, False, True, True, True]
    assert None not in curve["grad_norm"][3:]
    assert read_log(newest_log(prepared), "train")[-1]["skipped_steps"] == 1


@pytest.mark.parametrize(
    ("script", "options", "suffix"),
    [
        ("train_ddp.py", ["--fsdp", "true"], ".pt"),
        ("train_deepspeed.py", ["--deepspeed_config", "deepspeed_zero2"], ""),
    ],
)
def test_processes_that_cannot_save_end_together(prepared, script, options, suffix):
    """A full disk: no process waits for another that has given up, and all go on training until then."""
    if script == "train_deepspeed.py":
        pytest.importorskip("deepspeed")
    arguments = [*ARGUMENTS, "--gradient_accumulation_steps", "2", "--save_interval", "2", *options]
    full = {resource.RLIMIT_FSIZE: 8_000}
    statuses, said = end_of(2, prepared, *arguments, "--max_steps", "5", script=script, limits=full)
    assert statuses == [1, 1], said
    assert "training goes on to the next save" in said[0]
    assert f"run_last{suffix}" in said[0] and "not written" in said[0] and "Traceback" not in "".join(said)
    assert [record["step"] for record in read_log(newest_log(prepared), "train")] == [1, 2, 3, 4, 5]
    assert not (prepared / "checkpoint" / "run_last" / "latest").exists()


def test_a_run_that_only_skips_stops_and_keeps_the_best(prepared, call, break_the_loss):
    break_the_loss(range(6, 1000))
    result = call("train.py", *ARGUMENTS, "--max_steps", "100", "--eval_interval", "5", "--max_skipped_steps", "3")
    assert result.status == 1 and "step 10: the loss is nan" in result.err
    assert "the best checkpoint is kept in checkpoint/run.pt; try a lower learning_rate" in result.err
    assert load_checkpoint("checkpoint/run.pt")["step"] == 5


def test_steps_skipped_between_two_logs_are_told_and_counted(prepared, call, break_the_loss):
    """Step 3 alone, and 7 to 16 in a row, which are told of once."""
    break_the_loss({2, *range(6, 16)})
    result = trained(call, "--max_steps", "16", "--log_interval", "4", "--eval_interval", "100")
    said = [line for line in (result.out + result.err).replace("\r", "\n").splitlines() if "skipped" in line]
    assert [line.strip() for line in said] == [
        "step 4: 1 of the last steps skipped: loss or gradient not finite",
        "step 8: 2 of the last steps skipped: loss or gradient not finite",
    ]
    assert read_log(newest_log(prepared), "train")[-1]["skipped_steps"] == 11


def test_a_run_that_only_skips_is_ended_by_an_evaluation_where_logs_are_rare(prepared, call, break_the_loss):
    break_the_loss(range(6, 1000))
    often = ["--max_steps", "100", "--eval_interval", "5", "--log_interval", "100"]
    result = call("train.py", *ARGUMENTS, *often, "--max_skipped_steps", "3")
    assert result.status == 1 and "step 10: the loss is nan" in result.err and "3 steps before were" in result.err


def test_changed_fields_are_listed_and_changed_data_is_refused(prepared, call):
    trained(call, "--max_steps", "2", "--learning_rate", "0.001", "--min_lr", "0")
    result = trained(call, "--max_steps", "4", "--learning_rate", "0.002", "--min_lr", "0", *ON)
    assert "changed since then: max_steps 2 -> 4, learning_rate 0.001 -> 0.002, lr_decay_iters 2 -> 4" in result.out
    (prepared / "more.txt").write_text(make_text(9000, seed=1), encoding="utf-8")
    assert call("data.py", "more.txt", "--tokenizer", "dataset/tokenizer.json", "--output", "other").status == 0
    other = ["--dataset_path", '[["other/pretrain_train.bin", "other/pretrain_val.bin"]]']
    result = call("train.py", *ARGUMENTS, *other, *ON)
    assert result.status == 1 and "dataset_path: the training files have" in result.err
    # another text in the place of the first: what the run read can be prepared again, by the command that is named
    first = (prepared / "dataset" / "pretrain_train.bin").read_bytes()
    assert call("data.py", "more.txt", "--tokenizer", "char").status == 0
    result = call("train.py", *ARGUMENTS, *ON)
    again = re.search("prepared by `python data.py (.*)`", result.err).group(1)
    assert result.status == 1 and call("data.py", *shlex.split(again)).status == 0
    assert (prepared / "dataset" / "pretrain_train.bin").read_bytes()[-5000:] == first[-5000:]
    assert trained(call, "--max_steps", "6", *ON).status == 0


def test_too_little_memory_is_explained_with_sizes(prepared):
    """An address space of 4 GB, a micro-batch that wants more."""
    big = ["--batch_size", "4096", "--block_size", "256", "--n_embd", "256", "--n_layer", "4"]
    limits = {resource.RLIMIT_AS: 4 * 10**9}
    job = fork("train.py", *ARGUMENTS, *big, "--max_steps", "1", cwd=prepared, limits=limits)
    job.join(120)
    said = (prepared / "output.txt").read_text()
    assert job.exitcode == 1 and "Traceback" not in said, said
    assert "out of memory at batch_size 4096, block_size 256" in said and "halve batch_size to 2048" in said


def test_out_of_memory_is_told_from_other_errors():
    assert preflight.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not preflight.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_a_file_that_would_grow_when_read_is_refused(work):
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 10**7)
    assert (work / "bomb.pt").stat().st_size < 20_000
    with pytest.raises(UserError, match=r"bomb\.pt: compressed"):
        load_checkpoint("bomb.pt")


def test_weights_that_only_claim_to_be_large_are_refused(work, prepared, call):
    """One number that poses as a matrix of 10^12: nothing of that size is made."""
    trained(call, "--max_steps", "1")
    checkpoint = load_checkpoint("checkpoint/run.pt")
    shape = {**checkpoint["model_config"], "n_embd": 10**6, "vocab_size": 10**6, "n_hidden": 4 * 10**6}
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in GPT(ModelConfig(**shape)).state_dict().items()}
    checkpoint["model"] = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    torch.save({**checkpoint, "model_config": shape}, "hostile.pt")
    assert (work / "hostile.pt").stat().st_size < 10**6
    with pytest.raises(UserError, match="not stored in full"):
        load_model(load_checkpoint("hostile.pt"), "hostile.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to(torch.float8_e4m3fn), "holds float8_e4m3fn, not floating point"),
        (lambda w: w.to(torch.complex64), "holds complex64, not floating point"),
        (lambda w: (100 * w).to(torch.int32), "holds int32, not floating point"),
        (lambda w: w.to_sparse(), "not stored in full"),
        (lambda w: w.to("meta"), "not stored in full"),
        (lambda w: w.tolist(), "must be a dict of tensors"),
    ],
)
def test_weights_of_another_kind_are_refused_by_name(prepared, call, change, message):
    trained(call, "--max_steps", "1")
    checkpoint = load_checkpoint("checkpoint/run.pt")
    name = "blocks.0.mlp.down.weight"
    checkpoint["model"][name] = change(checkpoint["model"][name])
    torch.save(checkpoint, "odd.pt")
    with pytest.raises(UserError, match=rf"odd\.pt: .*{message}") as error:
        load_model(load_checkpoint("odd.pt"), "odd.pt")
    assert name in str(error.value) or "holds" not in message


def test_a_killed_runs_leftovers_are_no_checkpoints(prepared, call):
    folder = prepared / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / ".run_last.pt.123.tmp").write_bytes(b"half")
    (folder / ".other.pt.123.tmp").write_bytes(b"of another run")
    trained(call, "--max_steps", "1")
    assert not (folder / ".run_last.pt.123.tmp").exists() and (folder / ".other.pt.123.tmp").exists()


def test_float16_goes_on_with_its_scale(prepared, call):
    """Small enough a scale that it grows on the way; the weights are those of an undisturbed run."""
    half = ["--dtype", "float16", "--eval_interval", "100"]
    trained(call, *half, "--max_steps", "8", "--stage", "whole")
    trained(call, *half, "--max_steps", "4")
    scaler = load_checkpoint("checkpoint/run_last.pt")["scaler"]
    assert scaler["scale"] > 0 and scaler["_growth_tracker"] > 0
    trained(call, *half, "--max_steps", "8", *ON)
    whole, parts = load_checkpoint("checkpoint/whole_last.pt"), load_checkpoint("checkpoint/run_last.pt")
    assert same_weights(whole, parts) and whole["scaler"] == parts["scaler"]
    assert whole["scaler"]["_growth_tracker"] > scaler["_growth_tracker"]


def test_another_precision_goes_on_and_says_so(prepared, call):
    trained(call, "--max_steps", "2", "--lr_decay_iters", "4")
    result = trained(call, "--max_steps", "4", "--lr_decay_iters", "4", "--dtype", "bfloat16", *ON)
    assert "dtype 'auto' -> 'bfloat16'" in result.out
    assert load_checkpoint("checkpoint/run_last.pt")["step"] == 4
