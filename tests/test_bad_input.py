"""Invalid input from the user: one line of error, a non-zero exit status, and no file written or changed."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import is_harmless, make_samples, make_text, run_script, write_jsonl

from weights.checkpointing import finish_sharded, save_shard


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() for path in files}


def refused(result, *words: str) -> None:
    assert result.status != 0
    error = result.err.strip().splitlines()
    assert 1 <= len(error) <= 2 and "Traceback" not in result.err, result.err
    assert error[-1].startswith("error: ")
    for word in words:
        assert word in result.err, result.err


@pytest.fixture
def trained(call, prepared):
    (prepared / "t.json").write_text(
        json.dumps(
            {
                "stage": "pretrain",
                "block_size": 16,
                "n_layer": 1,
                "n_head": 2,
                "n_embd": 16,
                "batch_size": 2,
                "gradient_accumulation_steps": 1,
                "max_steps": 2,
                "warmup_iters": 1,
                "eval_iters": 1,
                "device": "cpu",
            }
        ),
        encoding="utf-8",
    )
    assert call("train.py", "-t", "t.json").status == 0
    for log in prepared.glob("*.log"):
        log.unlink()
    return prepared


BAD_RAW = {
    "missing": ("no such file", None),
    "empty": ("is empty", b""),
    "blank": ("no training text", b"\n \n"),
    "latin1": ("not UTF-8 text: byte 0xe9 at 3", "caf\xe9 au lait, s'il vous pla\xeet".encode("latin-1")),
    "late": ("byte 0xff at 5000000", b"a" * 5_000_000 + b"\xff" + b"b" * 100),
    "utf16": ("--encoding utf-16", "hello there".encode("utf-16")),
    "binary": ("binary", b"\0\1\2\3" * 100),
    "short": ("fewer than one window", b"too short"),
    "gzip": ("damaged", b"\x1f\x8bnonsense that is not gzip"),
}


@pytest.mark.parametrize("name", BAD_RAW)
def test_bad_raw_text(call, work, name):
    message, contents = BAD_RAW[name]
    path = work / ("x.txt.gz" if name == "gzip" else "x.txt")
    if contents is not None:
        path.write_bytes(contents)
    before = snapshot(work)
    refused(call("data.py", path.name), path.name, message)
    assert snapshot(work) == before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"question": "q", "answer": "a"}'], "at least 2"),
        (['{"q": "a"}'] * 20, '"question"'),
        (["not json"] * 20, "x.jsonl"),
        ([json.dumps(s) for s in make_samples(5)] + ['{"question": {}, "answer": "a"}'] * 20, "line 16"),
        ([json.dumps(s) for s in make_samples(5)] + ['{"messages": []}'] * 20, "bad lines"),
        (
            [json.dumps(s) for s in make_samples(5)]
            + [json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]})] * 20,
            "no answer in it",
        ),
    ],
)
def test_bad_jsonl(call, work, lines, message):
    (work / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    before = snapshot(work)
    result = call("data.py", "x.jsonl")
    assert result.status != 0 and "Traceback" not in result.err
    assert message in result.err.strip().splitlines()[-1]
    assert snapshot(work) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["nothing to prepare", "dataset/pretrain.txt"]),
        (["folder"], ["folder", "no text files"]),
        (["x.txt", "--val_fraction", "1.5"], ["val_fraction"]),
        (["x.txt", "--val_fraction", "much"], ["val_fraction"]),
        (["x.txt", "--tokenizer", "none.json"], ["none.json", "no such file"]),
        (["x.txt", "--tokenizer", "bpe", "--vocab_size", "10"], ["vocab_size"]),
        (["x.txt", "--tokeniser", "bpe"], ["--tokeniser", 'did you mean "--tokenizer"']),
        (["--inspect", "x.txt"], ["x.txt", "not a token file"]),
        (["--inspect", "none.bin"], ["none.bin", "no such file"]),
    ],
)
def test_bad_data_commands(call, work, argv, words):
    (work / "x.txt").write_text(make_text(), encoding="utf-8")
    (work / "folder").mkdir()
    before = snapshot(work)
    refused(call("data.py", *argv), *words)
    assert snapshot(work) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--batch_size", "0"], ["batch_size must be at least 1, got 0"]),
        (["--gradient_accumulation_steps", "0"], ["gradient_accumulation_steps"]),
        (["--batch_size", "1e12"], ["batch_size must be at most"]),
        (["--batch_size", "1000000", "--n_embd", "4096"], ["out of memory", "halve batch_size to 500000"]),
        (["--n_embd", "1048576"], ["weights alone would take", "lower n_embd"]),
        (["--max_steps", "0"], ["max_steps"]),
        (["--batch_size", "many"], ["batch_size must be an integer", "many"]),
        (["--learning_rate", "-1"], ["learning_rate must be above 0"]),
        (["--learning_rate", "nan"], ["learning_rate"]),
        (["--learning_rate", "1e-9"], ["min_lr", "learning_rate"]),
        (["--decay_lr", "maybe"], ["decay_lr must be true or false"]),
        (["--optimizer", "adam"], ["did you mean adamw"]),
        (["--batchsize", "4"], ["--batchsize", 'did you mean "--batch_size"']),
        (["--batch_size"], ["--batch_size", "expected one argument"]),
        (["--n_embd", "30", "--n_head", "4"], ["n_embd (30) must be divisible by n_head (4)"]),
        (["--n_embd", "6"], ["even head_dim"]),
        (["--n_head", "4", "--n_kv_head", "3"], ["n_kv_head"]),
        (["--is_causal", "false"], ["full attention"]),
        (["--vocab_size", "17"], ["vocab_size is 17", "tokenizer"]),
        (["--block_size", "100000"], ["fewer than one window"]),
        (["--device", "cuda:9"], ["cuda:9", "does not exist"]),
        (["--device", "gpu"], ["'gpu'", "not a device's name"]),
        (["--stage", "../x"], ["stage"]),
        (["--log_to", "paper"], ["log_to", "tensorboard"]),
        (["--dataset_path", '[["a.bin"]]'], ["dataset_path", "pairs"]),
        (["--dataset_path", '[["a.bin", "b.bin"]]'], ["a.bin", "no such file"]),
        (["--tokenizer_path", "none.json"], ["none.json", "no such file"]),
        (["--from_checkpoint", "checkpoint/none.pt"], ["none.pt", "no such checkpoint", "checkpoint/pretrain.pt"]),
        (["--from_checkpoint", "checkpoint/pretrain.pt", "--n_layer", "3"], ["n_layer is 3 here, 1 in"]),
        (["--from_checkpoint", "checkpoint/pretrain.pt", "--optimizer", "sgd"], ["optimizer"]),
        (["-t", "pretrian"], ["pretrian", 'did you mean "pretrain"']),
        (["-t", "bad.json"], ["bad.json", "line 2, column 3"]),
        (["-t", "field.json"], ["field.json", '"learning_rat"', 'did you mean "learning_rate"']),
        (["-t", "type.json"], ["type.json", "batch_size must be an integer"]),
        (["-t", "twice.json"], ["twice.json", "batch_size", "twice"]),
        (["-t", "list.json"], ["list.json", "JSON object"]),
        (["-t", "latin.json"], ["latin.json", "not UTF-8"]),
        (["-m", "field.json"], ["field.json", '"learning_rat"']),
    ],
)
def test_bad_training_commands(call, trained, overrides, words):
    (trained / "bad.json").write_text("{\n  batch_size: 3}", encoding="utf-8")
    (trained / "field.json").write_text('{"learning_rat": 1e-3}', encoding="utf-8")
    (trained / "type.json").write_text('{"batch_size": "12"}', encoding="utf-8")
    (trained / "twice.json").write_text('{"batch_size": 1, "batch_size": 2}', encoding="utf-8")
    (trained / "list.json").write_text("[]", encoding="utf-8")
    (trained / "latin.json").write_bytes(b'{"stage": "\xe9"}')
    before = snapshot(trained)
    argv = overrides if "-t" in overrides else ["-t", "t.json", *overrides]
    refused(call("train.py", *argv), *words)
    assert snapshot(trained) == before


def test_data_of_another_vocabulary_is_refused(call, trained):
    (trained / "other.txt").write_text("other characters: ЖЩЮ " * 100, encoding="utf-8")
    assert call("data.py", "other.txt", "--block_size", "16", "--output", "other").status == 0
    data = json.dumps([["other/pretrain_train.bin", "other/pretrain_val.bin"]])
    before = snapshot(trained)
    refused(call("train.py", "-t", "t.json", "--dataset_path", data), "other/pretrain_train.bin", "another vocabulary")
    args = ("--dataset_path", data, "--from_checkpoint", "checkpoint/pretrain.pt")
    refused(call("train.py", "-t", "t.json", *args), "checkpoint/pretrain.pt")
    assert snapshot(trained) == before


class Malice:
    def __reduce__(self):
        return (Path.write_text, (Path("owned.txt"), "code was run"))


def bad_checkpoint(folder: Path, kind: str) -> str:
    """Write a checkpoint that must be refused; returns a part of the expected error message."""
    good = folder / "checkpoint" / "pretrain.pt"
    path = folder / "bad.pt"
    contents = torch.load(good, weights_only=True)
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-500])
        return "truncated"
    if kind == "empty":
        path.write_bytes(b"")
        return "bad.pt"
    if kind == "text":
        path.write_text("hello", encoding="utf-8")
        return "bad.pt"
    if kind == "pickle":
        torch.save(Malice(), path, _use_new_zipfile_serialization=False)  # a bare pickle, no zip around it
        return "tensors and plain values"
    if kind == "malicious":
        contents["train_config"] = Malice()
        word = "tensors and plain values"
    elif kind == "shape":
        contents["model"]["norm.weight"] = torch.ones(5)
        word = "norm.weight"
    elif kind == "layers":
        contents["model_config"]["n_layer"] = 9999
        word = "layer"
    elif kind == "huge":
        contents["model_config"].update(n_embd=2**20, n_hidden=2**22)
        word = "bad.pt"
    elif kind == "tensor":
        contents = torch.ones(3)
        word = "not a checkpoint of this toolkit"
    elif kind == "format":
        contents["format"] = 99
        word = "format 99"
    elif kind == "missing":
        del contents["step"]
        word = "step is missing"
    torch.save(contents, path)
    return word


@pytest.mark.parametrize("script", ["train.py", "inference.py", "problem.py"])
@pytest.mark.parametrize(
    "kind",
    ["truncated", "empty", "text", "pickle", "malicious", "shape", "layers", "huge", "tensor", "format", "missing"],
)
def test_bad_checkpoints(call, trained, script, kind):
    word = bad_checkpoint(trained, kind)
    before = snapshot(trained)
    if script == "train.py":
        result = call(script, "-t", "t.json", "--from_checkpoint", "bad.pt")
    elif script == "inference.py":
        result = call(script, "-m", "bad.pt", "-p", "the ")
    else:
        result = call(script, "sort", "--checkpoint", "bad.pt")
        word = ""  # (it would not be one of problem.py either)
    refused(result, "bad.pt", word)
    assert snapshot(trained) == before and not (trained / "owned.txt").exists()


@pytest.mark.parametrize("part", ["values.pt", "rank_0.pt"])
@pytest.mark.parametrize("script", ["train.py", "inference.py"])
def test_shards_of_strangers_run_no_code(call, trained, script, part):
    """A folder as train_deepspeed.py leaves it; every script puts it together the same way."""
    folder = trained / "stranger"
    shares = {"w": {"shape": (1,), "start": 0, **{name: torch.ones(1) for name in ("weight", "exp_avg", "exp_avg_sq")}}}
    save_shard(folder, 3, 0, 1, shares)
    finish_sharded(folder, 1, {"step": 3, "names": {"w": "w"}, "groups": [["w"]], "optimizer_step": 3.0})
    torch.save(Malice(), folder / "step_3_of_1" / part)
    before = snapshot(trained)
    argv = ("-t", "t.json", "--from_checkpoint", "stranger") if script == "train.py" else ("-m", "stranger", "-p", "a")
    refused(call(script, *argv), part, "tensors and plain values")
    assert snapshot(trained) == before and not (trained / "owned.txt").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-m", "none.pt"], ["none.pt", "no such checkpoint"]),
        (["-m", "checkpoint"], ["checkpoint", "not a file"]),
        (["--lora", "none.pt"], ["none.pt", "no such checkpoint"]),
        (["-l", "4"], ["the prompt has 4 tokens", "max_length (-l) 4", "above 4"]),
        (["-i", "-p", "a" * 20], ["the question has 22 tokens", "window 16"]),
        (["-t", "-1"], ["temperature must be at least 0"]),
        (["-k", "0"], ["top_k must be at least 1"]),
        (["--top_p", "2"], ["top_p"]),
        (["-l", "x"], ["max_length must be an integer"]),
        (["--num_samples", "0"], ["num_samples"]),
        (["--device", "cuda:7"], ["cuda:7"]),
        (["-p", ""], ["empty"]),
        (["-i", "-p", " "], ["empty"]),
        (["--promt", "x"], ["--promt", 'did you mean "--prompt"']),
    ],
)
def test_bad_inference_commands(call, trained, argv, words):
    base = [] if "-m" in argv else ["-m", "checkpoint/pretrain.pt"]
    base += [] if "-p" in argv else ["-p", "the "]
    refused(call("inference.py", *base, *argv), *words)


HOSTILE_PROMPTS = {
    "control characters": "a\x01\x02\x1b[2J\x07b",
    "NUL": "a\0b",
    "look-alikes": "<|eos|><|Padding|><|InstructMark|> <|endoftext|>",
    "lone surrogate": "a\ud800b",
    "right to left": "\u202eabc\u202c\u200f",
    "1 MB": "the cat " * 130_000,
}


@pytest.mark.parametrize("mode", [[], ["-i"]], ids=["text", "chat"])
@pytest.mark.parametrize("prompt", HOSTILE_PROMPTS.values(), ids=HOSTILE_PROMPTS.keys())
def test_hostile_prompts_do_no_harm(call, trained, monkeypatch, prompt, mode):
    """The result is an answer or a one-line error; a terminal finds nothing in it to obey."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    result = call("inference.py", "-m", "checkpoint/pretrain.pt", "-p", prompt, "-l", "2000000", *mode, "--stop", "e")
    assert result.status == 0 or result.err.splitlines()[-1].startswith("error: "), result.err
    assert "Traceback" not in result.err
    assert all(map(is_harmless, result.out + result.err))


def strange_file(folder: Path, kind: str) -> str:
    """Create x.txt as something that cannot be read, or make the output unwritable; returns the output folder."""
    if kind == "FIFO":
        os.mkfifo(folder / "x.txt")
    elif kind == "directory":
        (folder / "x.txt").mkdir()
    elif kind == "loop":
        (folder / "x.txt").symlink_to("x.txt")
    elif kind == "dangling":
        (folder / "x.txt").symlink_to("nowhere.txt")
    elif kind == "device":
        (folder / "x.txt").symlink_to("/dev/zero")
    else:
        (folder / "x.txt").write_text(make_text(), encoding="utf-8")
        if kind == "forbidden":
            (folder / "x.txt").chmod(0)
        elif kind == "output is a file":
            (folder / "dataset").write_text("", encoding="utf-8")
        elif kind == "output is read-only":
            return "/proc/nowhere"
    return "dataset"


@pytest.mark.parametrize(
    "kind",
    ["FIFO", "directory", "loop", "dangling", "device", "forbidden", "output is a file", "output is read-only"],
)
def test_strange_files(call, work, kind):
    if kind == "forbidden" and os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    output = strange_file(work, kind)
    before = snapshot(work) if kind not in ("FIFO", "device") else {}
    result = call("data.py", "x.txt", "--output", output)
    refused(result, "x.txt" if not kind.startswith("output") else output)
    assert kind in ("FIFO", "device") or snapshot(work) == before


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    [
        ("problem.py", ["srot"], ["srot", 'did you mean "sort"']),
        ("problem.py", ["sort", "--length", "0"], ["length"]),
        ("problem.py", ["sort", "--length", "9-3"], ["length"]),
        ("problem.py", ["sort", "--max_steps", "-3"], ["max_steps"]),
        ("problem.py", ["sort", "--lenght", "3"], ["--lenght", 'did you mean "--length"']),
        ("problem.py", ["sort", "--checkpoint", "none.pt"], ["none.pt", "no such checkpoint"]),
        ("problem.py", ["sort", "--checkpoint", "checkpoint/pretrain.pt"], ["pretrain.pt"]),
        ("problem.py", ["sort", "--train_fraction", "2"], ["train_fraction"]),
        ("plot_loss.py", [], ["-n"]),
        ("plot_loss.py", ["-n", "t.json"], ["t.json", "no training steps"]),
        ("plot_loss.py", ["-n", "checkpoint"], ["checkpoint", "not a file"]),
        ("plot_loss.py", ["-n", "x.log", "-o", "checkpoint/pretrain.pt/x.png"], ["x.png", "no such folder"]),
        ("train_ddp.py", ["--batchsize", "4"], ["--batchsize"]),
        ("train_ddp.py", ["-t", "t.json", "--fsdp", "perhaps"], ["fsdp must be true or false"]),
        ("train_deepspeed.py", ["--deepspeed_config", "none"], ["none"]),
        ("train_deepspeed.py", ["--hostfile", "none.txt"], ["none.txt"]),
    ],
)
def test_bad_commands_of_the_other_scripts(call, trained, script, argv, words):
    if script == "train_deepspeed.py":
        pytest.importorskip("deepspeed")
    before = snapshot(trained)
    refused(call(script, *argv), *words)
    assert snapshot(trained) == before


@pytest.mark.parametrize("argv", [["data.py"], ["plot_loss.py"], ["inference.py", "-p", "a", "-m"], ["train.py", "-t"]])
def test_an_error_that_quotes_a_name_sends_no_commands_to_the_terminal(call, work, argv):
    result = call(*argv, "no\x1b[31m\x9b\u202efile")
    assert result.status == 1 and "no" in result.err and "file" in result.err
    assert all(map(is_harmless, result.err)), result.err


def test_mistakes_end_real_processes_with_one_line(tmp_path):
    for command in (
        ["data.py"],
        ["train.py", "-t", "nowhere"],
        ["train.py"],
        ["inference.py", "-m", "none.pt"],
        ["plot_loss.py", "-n", "none.log"],
    ):
        result = run_script(*command, cwd=tmp_path)
        assert result.status != 0 and result.out == ""
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_does_no_harm(tmp_path):
    import subprocess
    import sys

    from conftest import ROOT

    write_jsonl(tmp_path / "s.jsonl", make_samples(50))
    command = f"{sys.executable} {ROOT / 'data.py'} s.jsonl --block_size 64 | true"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "dataset" / "tokenizer.json").exists()
