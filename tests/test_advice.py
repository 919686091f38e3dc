"""Command lines as people write them, and messages that say what to type: typed as it stands, it works."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FAST, TINY, make_samples, make_text, read_log, write_jsonl
from processes import newest_log

from base.configuration import UserError, fields_of, nearest
from model import ModelConfig
from problems.config import ProblemConfig
from training.advice import going_on, limits_reached, without_flag
from training.config import TrainConfig
from training.distributed import launcher_command
from training.setup import State
from weights.checkpointing import load_checkpoint, training_command

FIELDS = {**fields_of(TrainConfig), **fields_of(ModelConfig), **fields_of(ProblemConfig)}
SMALL = [*TINY, *FAST, "--eval_interval", "2"]
REFUSED = "refused"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", ".8", 0.8),
        ("temperature", "1.", 1.0),
        ("learning_rate", ".001", 0.001),
        ("learning_rate", "1E-3", 0.001),
        ("learning_rate", "1_000", 1000.0),
        ("learning_rate", "+5", 5.0),
        ("max_minutes", ".5", 0.5),
        ("max_minutes", "None", None),
        ("batch_size", "1_000", 1000),
        ("batch_size", "+5", 5),
        ("batch_size", "1e5", 100_000),
        ("batch_size", "1E3", 1000),
        ("batch_size", "12.", 12),
        ("max_steps", "null", None),
        ("attention_window", "1_000,0", [1000, 0]),
        ("attention_window", "[64, 0]", [64, 0]),
        ("attention_window", "64, 0", [64, 0]),
        ("log_to", "wandb, tensorboard", ["wandb", "tensorboard"]),
        ("lora_targets", " qkv,out , ", ["qkv", "out"]),
        *((name, text, True) for name in ("decay_lr", "reverse") for text in ("true", "True", "YES", "on", "1")),
        *((name, text, False) for name in ("decay_lr", "reverse") for text in ("false", "False", "No", "OFF", "0")),
        *(("compile", text, "true") for text in ("true", "True", "yes", "On", "1")),
        *(("compile", text, "false") for text in ("false", "FALSE", "no", "off", "0")),
        *(("compile", text, "auto") for text in ("auto", "Auto")),
        ("batch_size", "1.5", REFUSED),
        ("batch_size", "1e999", REFUSED),
        ("batch_size", "0x10", REFUSED),
        ("learning_rate", "inf", REFUSED),
        ("learning_rate", "0.1.2", REFUSED),
        ("decay_lr", "maybe", REFUSED),
        ("decay_lr", "2", REFUSED),
        ("compile", "maybe", REFUSED),
    ],
)
def test_numbers_and_switches_are_read_as_people_write_them(name, text, value):
    if name == "temperature":
        name = "distill_temperature"
    if value is REFUSED:
        with pytest.raises(UserError, match=f"{name} must be "):
            FIELDS[name].check(FIELDS[name].parse(text))
    else:
        read = FIELDS[name].check(FIELDS[name].parse(text))
        assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--lr", "0.1"], 'did you mean "--learning_rate"?'),
        (["--lr=0.1"], 'did you mean "--learning_rate"?'),
        (["--LR", "1"], 'did you mean "--learning_rate"?'),
        (["--epochs", "3"], 'did you mean "--max_steps"?'),
        (["--wd", "0"], 'did you mean "--weight_decay"?'),
        (["--num-layers", "3"], 'did you mean "--n_layer"?'),
        (["--lr_sched", "linear"], 'did you mean "--lr_schedule"?'),
        (["--batchsize", "3"], 'did you mean "--batch_size"?'),
        (["pretrain"], "unknown argument 'pretrain'; did you mean \"-t pretrain\"?"),
        (["-t", "sft", "my.json"], 'did you mean "-t my.json"?'),
        (["--min_lr", "-1e-4"], "min_lr must be at least 0.0, got -0.0001"),
        (["--min_lr", "-.5"], "min_lr must be at least 0.0, got -0.5"),
        (["--min_lr", "-inf"], "min_lr must be finite"),
        (["--max_steps", "-1"], "max_steps must be at least 1, got -1"),
        (["--attention_window", "-1,0"], "attention_window must be a list of integers of at least 0"),
    ],
)
def test_what_is_meant_is_said(work, call, argv, says):
    assert says in error_of(call, "train.py", *argv)
    assert says in call("train_ddp.py", *argv).err


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("/exit", ["/set", "/quit", "/help"], "/quit"),
        ("/exit", ["/set", "/help"], "/set"),
        ("lr", ["lr_schedule", "learning_rate"], "learning_rate"),
        ("lr", ["lr_schedule"], "lr_schedule"),
        ("nothing", ["set"], ""),
    ],
)
def test_the_nearest_name(name, names, expected):
    assert nearest(name, names) == expected


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("pretrain.pt", "train.py -t pretrain"),
        ("pretrain_last.pt", "train.py -t pretrain"),
        ("sft_lora.pt", "train.py -t sft_lora"),
        ("problem_sort.pt", "problem.py sort"),
        *((name, None) for name in ("problem_sort_grpo.pt", "problem_sort_lora.pt", "problem_nope.pt", "problem_.pt")),
        *((name, None) for name in ("model.pt", "deepspeed.pt", "deepspeed_zero2.pt", "grpo.pt", "pretrain_lora.pt")),
        *((name, None) for name in ("pretrain", "pretrain.pt.bak", "nope.pt", "broken.pt", "renamed.pt")),
    ],
)
def test_a_checkpoint_that_is_missing_names_a_command_only_where_one_makes_it(work, monkeypatch, name, command):
    monkeypatch.setattr(sys, "argv", ["train.py"])  # else that of pytest, which lies elsewhere
    (work / "config").mkdir()
    (work / "config" / "broken.json").write_text("{")
    (work / "config" / "renamed.json").write_text('{"stage": "another", "max_steps": 3}')
    found = training_command(Path("checkpoint", name))
    assert found == (f"; `python {command}` trains it" if command else "")


def test_limits_that_are_reached_exactly_are_named_with_values_that_go_on():
    config = TrainConfig(max_steps=10, patience=3, target_val_loss=1.5)
    state = State(step=10, evals_without_gain=3, best_val_loss=1.5)
    assert limits_reached(config, state) == {"max_steps": 20, "patience": 6, "target_val_loss": "null"}
    assert limits_reached(config, State(step=9, evals_without_gain=2, best_val_loss=1.51)) == {}
    assert limits_reached(TrainConfig(), state) == {}


def test_a_flag_is_taken_out_with_its_value():
    argv = ["-t", "sft", "--max_steps", "5", "--max_steps=5", "--max_steps_more", "6", "-x", "--max_steps"]
    assert without_flag(argv, "--max_steps") == ["-t", "sft", "--max_steps_more", "6", "-x"]


def test_the_command_to_go_on_has_every_flag_once(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    config, engine = TrainConfig(max_steps=10), SimpleNamespace(launcher="python")
    run = SimpleNamespace(config=config, state=State(step=10), engine=engine, last_path=Path("checkpoint/a_last.pt"))
    command = going_on(run, ["-t", "a", "--max_steps", "10", "--from_checkpoint=old.pt"])
    assert command == "python train.py -t a --max_steps 20 --from_checkpoint checkpoint/a_last.pt"
    # a plan that ends before its time
    run.config = TrainConfig(max_steps=10, prediction="predicted 1.234 (1.1 to 1.3, 2.5M tokens)")
    doubtful = going_on(run, ["-t", "a"])
    assert doubtful.startswith(f"{command}  # ") and shlex.split(doubtful, comments=True) == shlex.split(command)


@pytest.mark.parametrize("script", ["inference.py", "train.py"])
def test_a_bare_name_is_that_of_a_checkpoint(prepared, call, script):
    """Also where it is resumed: the last save is not mistaken for another run's."""
    ok(call, "train.py", "-t", "pretrain", *SMALL, "--max_steps", "2", "--stage", "mychat")
    if script == "inference.py":
        assert ok(call, "inference.py", "-m", "mychat", "-p", "the", "-l", "9").out
        Path("mychat").write_text("something else")  # what lies here comes first
        assert "mychat: not a checkpoint" in error_of(call, "inference.py", "-m", "mychat", "-p", "the")
    else:
        resume = ["--max_steps", "4", "--stage", "mychat", "--from_checkpoint", "mychat_last"]
        assert "at step 2" in ok(call, "train.py", "-t", "pretrain", *SMALL, *resume).out
        assert not list(Path("checkpoint").glob("*.bak*"))


def test_a_scripts_own_options_take_numbers_as_fields_do(call, work):
    (work / "x.txt").write_text(make_text(), encoding="utf-8")
    assert (
        call("data.py", "x.txt", "--val_fraction", ".2", "--block_size", "1.6e1", "--max_bad_lines", "1_0").status == 0
    )


def commands_in(text: str) -> list[list[str]]:
    """The commands that a message names."""
    return [shlex.split(command)[1:] for command in re.findall(r"`(python \w+\.py[^`]*)`", text)]


def follow(call, text: str) -> None:
    """Run every command that a message names, in order; where one fails, first what its own message names."""
    assert commands_in(text), text
    for script, *arguments in commands_in(text):
        small = [*SMALL, "--max_steps", "2"] if script == "train.py" else []  # what the message says comes after it
        result = call(script, *small, *arguments)
        if result.status:
            follow(call, result.err)
            result = call(script, *small, *arguments)
        assert result.status == 0, (script, arguments, result.err)


def ok(call, *argv: str):
    result = call(*argv)
    assert result.status == 0, result.err
    return result


def error_of(call, *argv: str) -> str:
    result = call(*argv)
    assert result.status == 1 and result.err.count("\n") == 1, result
    return result.err


# ------------------------------------------------------------------------------------------------- what is missing


@pytest.fixture
def raw(work):
    """Raw text, questions and preference pairs; nothing prepared."""
    (work / "dataset").mkdir()
    (work / "dataset" / "pretrain.txt").write_text(make_text(), encoding="utf-8")
    write_jsonl(work / "dataset" / "sft.jsonl", make_samples())
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    write_jsonl(work / "dataset" / "dpo.jsonl", pairs)
    return work


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_from_raw_text_the_messages_alone_lead_to_a_trained_model(raw, call, stage):
    """Whatever is missing, the error names the command that makes it, until nothing is missing."""
    command = ["train.py", *SMALL, "--max_steps", "2", "-t", stage]
    follow(call, f"`python {shlex.join(command)}`")
    assert Path(f"checkpoint/{stage}.pt").is_file()


@pytest.mark.parametrize(
    ("stage", "raw_file", "line"),
    [
        ("pretrain", "dataset/pretrain.txt", make_text()),
        ("sft", "dataset/sft.jsonl", json.dumps({"question": "the cat", "answer": "sat"})),
        ("dpo", "dataset/dpo.jsonl", json.dumps({"prompt": "the", "chosen": "cat", "rejected": "mat"})),
    ],
)
def test_raw_text_that_is_missing_is_named_with_its_place(work, call, stage, raw_file, line):
    error = error_of(call, "train.py", "-t", stage, "--from_checkpoint", "")
    assert f"put {{}} into {raw_file}, then run".split("{}")[1] in error
    (work / "dataset").mkdir()
    (work / raw_file).write_text("".join(line.replace("the", f"the{i}") + "\n" for i in range(40)), encoding="utf-8")
    follow(call, error)
    assert Path(f"dataset/{stage}_train.bin").is_file()


def other_data(work, call) -> list[str]:
    """Token files of another vocabulary in another folder; the options that name them."""
    (work / "other.txt").write_text("other characters: ЖЩЮ, but the cat too. " * 100, encoding="utf-8")
    ok(call, "data.py", "other.txt", "--block_size", "16", "--output", "other")
    return ["--dataset_path", json.dumps([["other/pretrain_train.bin", "other/pretrain_val.bin"]])]


@pytest.mark.parametrize("tokenizer", [[], ["--tokenizer_path", "o/tokenizer.json"]])
def test_data_in_a_folder_of_its_own_takes_one_round(prepared, call, tokenizer):
    """The token files and the tokenizer that they will need are named at once."""
    Path("o").mkdir()
    Path("o/pretrain.txt").write_text("other characters: ЖЩЮ. " * 200, encoding="utf-8")
    command = ["train.py", "-t", "pretrain", *SMALL, "--max_steps", "2", *tokenizer]
    command += ["--dataset_path", json.dumps([["o/pretrain_train.bin", "o/pretrain_val.bin"]])]
    error = error_of(call, *command)
    assert ("train with --tokenizer_path o/tokenizer.json" in error) == (not tokenizer)
    ok(call, *commands_in(error)[0], "--block_size", "16")
    ok(call, *command, "--tokenizer_path", "o/tokenizer.json")


def test_text_that_the_tokenizer_hardly_knows_is_warned_of(prepared, call):
    """And the command of the warning gives all stages one vocabulary, with which the warning is gone."""
    start = ["train.py", "-t", "sft", *SMALL, "--max_steps", "2", "--from_checkpoint"]
    assert "unknown" not in ok(call, *start, "").err
    ok(call, "train.py", "-t", "pretrain", *SMALL, "--max_steps", "2")
    write_jsonl(prepared / "dataset" / "sft.jsonl", [{"question": f"Ж{i}Щ", "answer": "ЮЖЩ"} for i in range(60)])
    ok(call, "data.py", "dataset/sft.jsonl", "--tokenizer", "checkpoint/pretrain.pt", "--block_size", "16")
    warning = next(line for line in ok(call, *start, "checkpoint/pretrain.pt").err.splitlines() if "unknown" in line)
    assert re.search(r"dataset/sft_(train|val)\.bin: \d\d% of its tokens", warning)
    (again,) = commands_in(warning)
    assert {"dataset/pretrain.txt", "dataset/sft.jsonl"} < set(again)
    ok(call, *again)
    assert "unknown" not in ok(call, *start, "").err


@pytest.mark.parametrize("without", [False, True])
def test_the_tokenizer_beside_the_data_is_found(prepared, call, without):
    data = other_data(prepared, call)
    if without:
        Path("dataset/tokenizer.json").unlink()
    error = error_of(call, "train.py", "-t", "pretrain", *SMALL, *data)
    options = re.search(r"use (--tokenizer_path \S+)", error)[1].split()
    ok(call, "train.py", "-t", "pretrain", *SMALL, "--max_steps", "2", *data, *options)


def test_data_of_a_foreign_vocabulary_is_prepared_again_for_the_checkpoint(prepared, call):
    ok(call, "train.py", "-t", "pretrain", *SMALL, "--max_steps", "2")
    data = other_data(prepared, call)
    start = ["train.py", "-t", "pretrain", *FAST, "--max_steps", "2", *data, "--stage", "second"]
    error = error_of(call, *start, "--from_checkpoint", "checkpoint/pretrain.pt")
    (command,) = commands_in(error)
    assert command[-2:] == ["--tokenizer", "checkpoint/pretrain.pt"]
    if "FILES" in command:  # token files of an earlier version do not know what they were made of
        pytest.skip("data.py does not write its arguments yet")
    follow(call, error)
    ok(call, *start, "--from_checkpoint", "checkpoint/pretrain.pt")


# ------------------------------------------------------------------------------------------------- what does not fit


def option_in(error: str, *names: str) -> list[str]:
    """The options --NAME VALUE that an error names."""
    found = re.findall(rf"(--(?:{'|'.join(names)})) ([\w./]+)", error)
    assert found, error
    return [part for pair in found for part in pair]


@pytest.mark.parametrize(
    ("start", "mistake", "mending"),
    [
        ([], ["--optimizer", "sgd"], "stage"),
        ([], ["--optimizer", "sgd"], "optimizer"),
        ([], ["--learning_rate", "1e-9", "--min_lr", "1e-5"], "min_lr"),
        ([], ["--dataset_path", json.dumps([["dataset/sft_train.bin", "dataset/sft_val.bin"]])], "stage"),
        (["--use_lora", "true"], [], "use_lora"),
        (["--use_lora", "true"], [], "merge"),
        (["--use_lora", "true"], ["--use_lora", "true", "--lora_rank", "2"], "lora_rank"),
        (["--use_lora", "true"], ["--use_lora", "true", "--lora_targets", "qkv"], "lora_targets"),
    ],
)
def test_a_run_that_does_not_fit_its_checkpoint_is_mended_as_the_error_says(prepared, call, start, mistake, mending):
    base = ["train.py", "-t", "pretrain", *FAST, "--optimizer", "adamw", "--eval_interval", "2"]
    ok(call, *base, *TINY, "--max_steps", "2")
    last = "checkpoint/pretrain_last.pt"
    if start:
        ok(call, *base, *start, "--from_checkpoint", last, "--max_steps", "2")
        last = "checkpoint/pretrain_lora_last.pt"
    command = [*base, "--from_checkpoint", last, "--max_steps", "4"]
    error = error_of(call, *command, *mistake)
    if mending == "merge":
        follow(call, error)
        assert Path("merged.pt").is_file()
    elif mending == "stage":
        assert "another --stage" in error
        ok(call, *command, *mistake, "--stage", "second")
        assert load_checkpoint("checkpoint/second_last.pt")["step"] == 4
    else:
        values = option_in(error, mending) if mending != "lora_targets" else ["--lora_targets"]
        values = [*values, "qkv,out,up,down"] if mending == "lora_targets" else values
        assert " ".join(values) in error
        ok(call, *command, *mistake, *values)


# ------------------------------------------------------------------------------------------------- before the start


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sample_tokens", "5", "--sample_prompt", ""], "sample_prompt is empty"),
        (["--log_to", "wandb"], "wandb is not installed"),
        (["--save_checkpoint_to", "dataset/pretrain.txt"], "dataset/pretrain.txt is a file"),
        (["--save_checkpoint_to", "/proc/nowhere/x"], "/proc"),
        (["--teacher", "none.pt"], "--loss distill uses it"),
        (["--loss", "distill", "--teacher", "none.pt"], "none.pt: no such checkpoint"),
        (["--reference", "none.pt"], "--loss dpo or ipo or grpo uses it"),
        (["--sdp_kernel", "cudnn"], "sdp_kernel cudnn does not run here"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(prepared, call, monkeypatch, options, says):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert says in error_of(call, "train.py", "-t", "pretrain", *SMALL, "--max_steps", "3", *options)
    assert not list(prepared.glob("train_*.log")) and not Path("checkpoint").exists()


@pytest.mark.parametrize(
    ("stage", "options", "says"),
    [
        ("pretrain", ["--from_checkpoint", "start.pt", "--max_steps", "2"], "step 2 of 2 (max_steps): --max_steps 4"),
        (
            "pretrain",
            ["--sample_tokens", "5", "--sample_prompt", "theЖ"],
            "sample_prompt: 'Ж' is not in the vocabulary",
        ),
        ("pretrain", ["--sample_prompt", "the"], "sample_prompt has no effect without sample_tokens"),
        (
            "pretrain",
            ["--mask_documents", "true"],
            "no <|bos|> or <|eos|> delimits documents in dataset/pretrain_train.bin",
        ),
        ("sft", ["--mask_documents", "true"], "mask_documents has no effect: it is for running text"),
        ("pretrain", ["--pack_samples", "true"], "pack_samples has no effect: it is for fine-tuning samples"),
        ("sft", ["--pack_samples", "true"], None),
        ("documents", ["--mask_documents", "true"], None),
        ("pretrain", ["--dpo_beta", "0.2"], "dpo_beta has no effect with loss next_token"),
        ("pretrain", ["--lora_rank", "4"], "lora_rank has no effect without --use_lora true"),
        ("pretrain", ["--muon_momentum", "0.9"], "muon_momentum has no effect without --optimizer muon"),
        (
            "pretrain",
            ["--attention", "full,full,full,sparse"],
            "attention: n_layer is 2, so there is no layer for full, sparse",
        ),
        ("pretrain", ["--attention_window", "0,0,8"], "attention_window: n_layer is 2, so there is no layer for 8"),
        ("pretrain", ["--attention_window", "16"], "attention_window has no effect where it is block_size (16)"),
        ("pretrain", ["--attention_window", "15"], None),
        (
            "pretrain",
            ["--attention", "sparse", "--sparse_block_size", "4", "--sparse_top_k", "4"],
            "sparse_top_k 4: as many blocks as block_size (16) has, which is full attention",
        ),
        ("pretrain", ["--attention", "sparse", "--sparse_block_size", "4", "--sparse_top_k", "3"], None),
        ("pretrain", ["--min_lr", "0", "--lr_decay_iters", "2", "--from_checkpoint", "start.pt"], "learning rate is 0"),
    ],
)
def test_what_has_no_effect_is_warned_of(prepared, call, stage, options, says):
    if stage == "documents":
        text = "".join(f"<|bos|>{part}<|eos|>" for part in make_text().split(".\n"))
        Path("dataset/pretrain.txt").write_text(text, encoding="utf-8")
        ok(call, "data.py", "dataset/pretrain.txt", "--block_size", "16")
    base = ["train.py", "-t", "pretrain" if stage == "documents" else stage, *SMALL, "--optimizer", "adamw"]
    if "start.pt" in options:
        ok(call, *base, "--max_steps", "2")
        Path("checkpoint/pretrain_last.pt").rename("start.pt")
    result = ok(call, *base, "--from_checkpoint", "", "--max_steps", "3", *options)
    words = ("effect", "sample_prompt", "is 0", "max_steps", "no layer", "full attention")
    warnings = [line for line in result.err.splitlines() if any(word in line for word in words)]
    assert len(warnings) == (says is not None) and (says or "") in "".join(warnings)


@pytest.mark.parametrize(
    ("wandb", "says"),
    [
        ("", "wandb is not installed"),  # a folder of that name, as wandb itself leaves one
        ("def init(**_): raise RuntimeError", "log_to: wandb: RuntimeError; or take it out"),
        ("def init(**_): raise RuntimeError('not logged in\\nhelp')", "log_to: wandb: not logged in; or take it out"),
    ],
)
def test_a_sink_that_cannot_be_opened_is_told(prepared, call, monkeypatch, wandb, says):
    (prepared / "wandb").mkdir()
    if wandb:
        (prepared / "wandb" / "__init__.py").write_text(wandb)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(str(prepared))
    assert says in error_of(call, "train.py", "-t", "pretrain", *SMALL, "--max_steps", "3", "--log_to", "wandb")
    assert not list(prepared.glob("train_*.log"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


# ------------------------------------------------------------------------------------------------- launchers


@pytest.mark.parametrize(
    ("script", "argv", "launcher", "expected"),
    [
        ("train.py", ["-t", "sft"], "torchrun", "--nproc_per_node 2 train_ddp.py -t sft"),
        ("train.py", ["-t", "sft"], "deepspeed", "deepspeed --num_gpus 2 train_deepspeed.py -t sft"),
        ("train_ddp.py", ["-t", "sft"], "deepspeed", "deepspeed --num_gpus 2 train_deepspeed.py -t sft"),
        (
            "problem.py",
            ["--stage", "sort", "sort", "--plot", "--length=4", "--example", "1234"],
            "torchrun",
            "--nproc_per_node 2 train_ddp.py --problem sort --length 4 --stage sort --gradient_accumulation_steps 2",
        ),
        (
            "problem.py",
            ["sort", "--gradient_accumulation_steps", "4"],
            "deepspeed",
            "deepspeed --num_gpus 2 train_deepspeed.py --problem sort --gradient_accumulation_steps 4",
        ),
        ("problem.py", ["all"], "torchrun", "without a launcher: `python problem.py all"),
        ("problem.py", ["--list"], "deepspeed", "without a launcher: `python problem.py --list"),
        ("problem.py", ["sort", "--checkpoint", "x.pt"], "torchrun", "`python problem.py sort --checkpoint x.pt"),
        ("problem.py", [], "torchrun", "without a launcher: `python problem.py"),
    ],
)
def test_a_script_for_one_process_names_the_one_for_several(work, call, monkeypatch, script, argv, launcher, expected):
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "0"}
    torchrun |= {"LOCAL_WORLD_SIZE": "2"}
    environment = torchrun if launcher == "torchrun" else {"CROSS_SIZE": "1", "LOCAL_SIZE": "2"}
    for name, value in {**environment, "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    added = ["--local_rank=0"] if launcher == "deepspeed" else []
    assert f"{expected}`" in error_of(call, script, *added, *argv)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    result = call(script, *added, *argv)
    assert result.status == 1 and result.err == ""


# ------------------------------------------------------------------------------------------------- to go on


def go_on(call, result) -> list[str]:
    """The arguments of the command to go on that a run has printed."""
    line = next(line for line in result.out.splitlines() if line.startswith("to go on: "))
    command = shlex.split(line.removeprefix("to go on: "))
    assert command[:2] == ["python", command[1]] and command[1].endswith(".py")
    return command[1:]


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (["--max_steps", "4"], 4),
        (["--max_steps=4", "--save_checkpoint_to=a folder"], 4),
        (["-t", "four.json"], 4),
        (["--max_minutes", "0.01"], 1),
        (["--max_steps", "100", "--patience", "2", "--learning_rate", "1e-30", "--muon_learning_rate", "1e-30"], 4),
        (["--max_steps", "100", "--target_val_loss", "50"], 90),
        (["--max_steps", "4", "--use_lora", "true", "--from_checkpoint", "base.pt"], 4),
    ],
)
def test_the_command_to_go_on_goes_on(prepared, call, options, more):
    """Typed as it stands it trains at least `more` steps from where the run ended, whatever ended it."""
    (prepared / "four.json").write_text('{"stage": "pretrain", "max_steps": 4}')
    shape = TINY
    if "base.pt" in options:
        ok(call, "train.py", "-t", "pretrain", *SMALL, "--max_steps", "1", "--optimizer", "muon")
        Path("checkpoint/pretrain.pt").rename("base.pt")
        shape = []
    given = ["--optimizer", "muon", "--min_lr", "0"]
    training = [] if "-t" in options else ["-t", "pretrain"]
    result = ok(call, "train.py", *training, *shape, *FAST, "--eval_interval", "2", *given, *options)
    ended = read_log(newest_log(prepared), "train")[-1]["step"]
    again = ok(call, *go_on(call, result))
    steps = [record["step"] for record in read_log(newest_log(prepared), "train")]
    assert steps[0] == ended + 1 and len(steps) >= more
    assert go_on(call, again)


def test_a_run_that_is_far_beyond_its_limit_goes_on_from_where_it_is(prepared, call):
    base = ["train.py", "-t", "pretrain", *TINY, *FAST]
    ok(call, *base, "--max_steps", "30")
    result = ok(call, *base, "--max_steps", "5", "--from_checkpoint", "pretrain_last")
    assert "at step 30 of 5 (max_steps): --max_steps 60" in result.err
    ok(call, *go_on(call, result))
    assert [record["step"] for record in read_log(newest_log(prepared), "train")] == list(range(31, 61))


@pytest.mark.parametrize("name", ["", ".", " ", "..", "a/b"])
def test_a_stage_needs_a_name(prepared, call, name):
    for command in (("train.py", "-t", "pretrain", *TINY), ("problem.py", "sort")):
        result = call(*command, *FAST, "--stage", name)
        assert result.status == 1 and "stage must be a plain name" in result.err and not Path("checkpoint").exists()


def test_a_problem_goes_on_too(work, call):
    options = [
        "--n_layer",
        "1",
        "--n_embd",
        "16",
        "--n_head",
        "2",
        "--device",
        "cpu",
        "--save_checkpoint_to",
        "my models",
    ]
    result = ok(call, "problem.py", "sort", "--length=3", "--max_steps=2", *options)
    again = go_on(call, result)
    assert again[:2] == ["problem.py", "sort"]
    ok(call, *again)
    assert load_checkpoint("my models/problem_sort_last.pt")["step"] == 4


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "python"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "python"),
        (
            {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "0"}
            | {"LOCAL_WORLD_SIZE": "2"},
            "python -m torch.distributed.run --standalone --nproc_per_node 2",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "0"}
            | {"LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"},
            "python -m torch.distributed.run --nproc_per_node 2",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "0"}
            | {"LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29877"},
            "python -m torch.distributed.run --master_port 29877 --nproc_per_node 2",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
            | {"LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"},
            "python -m torch.distributed.run --nnodes 2 --node_rank 0 --master_addr 10.0.0.1 --master_port 29400 "
            "--max-restarts 3 --nproc_per_node 8",
        ),
        ({"CROSS_SIZE": "1", "LOCAL_SIZE": "4"}, "deepspeed --num_gpus 4"),
        ({"CROSS_SIZE": "2", "LOCAL_SIZE": "4"}, "deepspeed --hostfile HOSTFILE"),
    ],
)
def test_the_launcher_is_told_by_what_it_sets(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher_command() == expected


# ------------------------------------------------------------------------------------------------- the evaluated part


def val_losses(folder) -> list[float]:
    return [record["val_loss"] for record in read_log(newest_log(folder), "val")]


@pytest.fixture
def larger(work, call):
    """A validation text of 375 windows."""
    (work / "long.txt").write_text(make_text(60_000), encoding="utf-8")
    ok(call, "data.py", "long.txt", "--block_size", "16")
    return work


def test_the_validation_loss_does_not_depend_on_the_batch_size(larger, call):
    still = ["--learning_rate", "1e-30", "--muon_learning_rate", "1e-30", "--min_lr", "0", "--max_steps", "1"]
    losses = {}
    for size, part in (("3", "1"), ("64", "1"), ("200", "1"), ("64", "2"), ("64", "0")):
        ok(call, "train.py", "-t", "pretrain", *SMALL, *still, "--batch_size", size, "--eval_iters", part)
        (losses[size, part],) = val_losses(larger)
        newest_log(larger).unlink()
    assert losses["3", "1"] == pytest.approx(losses["64", "1"], rel=1e-6)
    assert losses["200", "1"] == pytest.approx(losses["64", "1"], rel=1e-6)
    assert len({round(losses["64", part], 6) for part in "012"}) == 3  # other parts: else the test did not test


def test_a_best_loss_of_another_part_does_not_count(larger, call):
    base = ["train.py", "-t", "pretrain", *SMALL, "--optimizer", "adamw"]
    ok(call, *base, "--max_steps", "4", "--eval_iters", "1")
    path = Path("checkpoint/pretrain_last.pt")
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "best_val_loss": 0.001}, path)  # none can be better
    before = Path("checkpoint/pretrain.pt").read_bytes()
    resume = ["--from_checkpoint", str(path)]
    result = ok(call, *base, *resume, "--max_steps", "6", "--eval_iters", "1", "--batch_size", "9")
    assert "best validation loss 0.0010" in result.out and Path("checkpoint/pretrain.pt").read_bytes() == before
    result = ok(call, *base, *resume, "--max_steps", "8", "--eval_iters", "2")
    assert "not compared, as it was measured otherwise (samples 100 -> 200)" in result.out
    assert load_checkpoint("checkpoint/pretrain.pt")["step"] == 8
    assert Path("checkpoint/pretrain.pt.bak").read_bytes() == before
    assert load_checkpoint(path)["best_val_loss"] == val_losses(larger)[-1]
