"""train_ddp.py with real processes on gloo: the same training as on one process, whatever happens to the others."""

import functools
import os
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import DATA, FAST, TINY, asked_by, read_log
from processes import FORKS, assert_close, curves, end_of, finish, newest_log, start, train_on, wait_for, worker
from torch._dynamo.utils import counters

from base.configuration import UserError
from base.files import hold_lock
from model import GPT, ModelConfig
from text.batches import Batch, ValidationBatches
from text.token_files import TokenFile
from train_ddp import DDPEngine, FSDPEngine
from training import optimizer
from training.config import TrainConfig
from training.distributed import DistributedEngine, check_accumulation, is_communication_error
from training.engine import Engine
from training.losses import next_token
from training.setup import build_run
from weights.checkpointing import load_checkpoint

ARGUMENTS = [*TINY, *FAST, "--optimizer", "adamw", "--eval_interval", "10", "--gradient_accumulation_steps", "4"]


@pytest.mark.parametrize(("stage", "n_processes", "options"), [
    ("pretrain", 2, ["--optimizer", "muon"]),
    ("pretrain", 4, []),
    ("sft", 2, []),
    ("pretrain", 2, ["--fsdp", "true"]),
    ("sft", 2, ["--fsdp", "true", "--optimizer", "muon"]),
    ("pretrain", 2, ["--n_expert", "4", "--expert_balance", "bias"]),
    ("pretrain", 2, ["--n_expert", "4", "--optimizer", "muon", "--fsdp", "true"]),
    ("sft", 2, ["--pack_samples", "true", "--attention_window", "4,0"]),
])  # fmt: skip
def test_the_loss_curve_is_that_of_one_process(prepared, call, stage, n_processes, options):
    arguments = ["-t", stage, "--from_checkpoint", "", *ARGUMENTS, *options, "--max_steps", "20", "--eval_iters", "3"]
    assert call("train.py", *arguments, *(["--fsdp", "false"] if "--fsdp" in options else [])).status == 0
    one = curves(newest_log(prepared))
    assert len(one["loss"]) == 20 and len(one["val_loss"]) == 2
    assert_close(one, train_on(n_processes, prepared, *arguments))


def test_checkpoints_go_from_one_number_of_processes_to_another(prepared, call):
    """20 steps at once on one process = 8 on two (sharded) + 6 on one + 6 on two."""
    arguments = ["-t", "pretrain", *ARGUMENTS, "--lr_decay_iters", "20", "--eval_iters", "0"]
    assert call("train.py", *arguments, "--max_steps", "20", "--stage", "whole", *DATA).status == 0
    whole = curves(newest_log(prepared))
    arguments += ["--stage", "parts", *DATA]
    parts = train_on(2, prepared, *arguments, "--max_steps", "8", "--fsdp", "true")
    resume = ["--from_checkpoint", "checkpoint/parts_last.pt"]
    (prepared / newest_log(prepared).name).unlink()
    assert call("train.py", *arguments, "--max_steps", "14", *resume).status == 0
    second = curves(newest_log(prepared))
    third = train_on(2, prepared, *arguments, "--max_steps", "20", *resume)
    for field in ("loss", "grad_norm"):
        assert parts[field] + second[field] + third[field] == pytest.approx(whole[field], rel=1e-5)
    weights = load_checkpoint("checkpoint/whole_last.pt"), load_checkpoint("checkpoint/parts_last.pt")
    assert weights[0]["optimizer"]["state"].keys() == weights[1]["optimizer"]["state"].keys()
    for name, weight in weights[0]["model"].items():
        assert torch.allclose(weight, weights[1]["model"][name], atol=1e-5)


@pytest.mark.parametrize("options", [[], ["--fsdp", "true"]])
def test_continuing_on_as_many_processes_gives_the_same_weights(prepared, options):
    arguments = ["-t", "pretrain", *ARGUMENTS, *options, *DATA, "--dropout", "0.2", "--lr_decay_iters", "8"]
    train_on(2, prepared, *arguments, "--max_steps", "8", "--stage", "whole")
    train_on(2, prepared, *arguments, "--max_steps", "4", "--stage", "parts")
    resume = ["--from_checkpoint", "checkpoint/parts_last.pt"]
    train_on(2, prepared, *arguments, "--max_steps", "8", "--stage", "parts", *resume)
    whole, parts = load_checkpoint("checkpoint/whole_last.pt"), load_checkpoint("checkpoint/parts_last.pt")
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])


def muon_weights() -> list[torch.Tensor]:
    """Weights after three steps; of one shape there are five matrices, two of them fused, of another one."""
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 12, 8), (24, 8), (8, 20))]
    muon = optimizer.Muon(ps, lr=0.1, momentum=0.9, weight_decay=0.1, rows=[[12], [12, 12], [8]])
    for _ in range(3):
        for p in ps:
            p.grad = torch.randn_like(p)
        muon.step()
    return [p.detach() for p in ps]


def be_muon_process(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    n_matrices, orthogonalise = [], optimizer.orthogonalise
    optimizer.orthogonalise = lambda G: (n_matrices.append(len(G)), orthogonalise(G))[1]
    torch.save({"weights": muon_weights(), "n_matrices": sum(n_matrices)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_muon_deals_the_matrices_out(work, world_size):
    """Every process orthogonalises a share, also where shares are uneven or empty; all get what one process gets."""
    jobs = [FORKS.Process(target=be_muon_process, args=(rank, world_size, work)) for rank in range(world_size)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(timeout=60)
        job.kill()
    results = [torch.load(work / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    assert [result["n_matrices"] for result in results] == {2: [3 * 4, 3 * 2], 4: [3 * 3, 3 * 2, 3 * 1, 0]}[world_size]
    for result in results:
        for theirs, first, one in zip(result["weights"], results[0]["weights"], muon_weights(), strict=True):
            assert torch.equal(theirs, first)
            torch.testing.assert_close(theirs, one)


ENDLESS = ["-t", "pretrain", *ARGUMENTS, "--eval_interval", "1000000", "--save_interval", "5", "--decay_lr", "false"]


def test_a_job_whose_process_dies_ends_with_a_message(prepared):
    job = start(2, *ENDLESS, cwd=prepared)
    wait_for(prepared / "checkpoint" / "pretrain_last.pt", job)
    worker(job, 1).kill()
    status, _, err = finish(job, timeout=60)
    assert status != 0
    assert "process 0 lost the connection" in err or "exitcode  : -9" in err
    assert load_checkpoint(prepared / "checkpoint" / "pretrain_last.pt")["step"] >= 5


def test_a_job_whose_process_hangs_ends_within_the_timeout(prepared):
    job = start(2, *ENDLESS, "--process_timeout", "0.1", cwd=prepared)  # 6 seconds
    wait_for(prepared / "checkpoint" / "pretrain_last.pt", job)
    waiting, hung = worker(job, 0), worker(job, 1)
    hung.suspend()
    psutil.wait_procs([waiting], timeout=40)
    hung.kill()  # torchrun would after half a minute
    status, _, err = finish(job, timeout=60)
    assert status != 0 and "process 0 lost the connection to the other processes" in err


def test_torchrun_restarts_a_job_where_it_was(prepared):
    """The process of rank 1 is killed once; what an earlier run left behind is not mistaken for this one's."""
    folder = prepared / "checkpoint"
    folder.mkdir()
    (folder / "pretrain_last.pt").write_bytes(b"of an earlier run")
    job = start(2, *ENDLESS, "--max_steps", "300", cwd=prepared, launcher=["--max-restarts", "1"])
    wait_for(folder / "pretrain_last.pt.bak", job)
    wait_for(folder / "pretrain_last.pt", job)
    worker(job, 1).kill()
    status, out, err = finish(job)
    assert status == 0, err
    assert (folder / "pretrain_last.pt.bak").read_bytes() == b"of an earlier run"
    continued = re.search(r"resumes checkpoint/pretrain_last.pt at step (\d+)", out)
    assert continued and int(continued[1]) % 5 == 0
    assert load_checkpoint(folder / "pretrain_last.pt")["step"] == 300


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves(prepared, signal_number):
    job = start(2, *ENDLESS, cwd=prepared)
    wait_for(prepared / "checkpoint" / "pretrain_last.pt", job)
    if signal_number == signal.SIGINT:
        os.killpg(job.pid, signal_number)  # Ctrl-C reaches everyone in the terminal
    else:
        job.send_signal(signal_number)
    _, out, err = finish(job)
    assert "lost the connection" not in err
    assert "to go on: " in out
    saved = load_checkpoint(prepared / "checkpoint" / "pretrain_last.pt")["step"]
    assert saved == read_log(newest_log(prepared), "train")[-1]["step"]


def test_started_plainly_it_is_one_process(prepared, call, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    result = call("train_ddp.py", "-t", "pretrain", *ARGUMENTS, "--max_steps", "2")
    assert result.status == 0 and "torch.distributed.run --nproc_per_node N" in result.err
    result = call("train_ddp.py", "-t", "pretrain", *ARGUMENTS, "--max_steps", "2", "--fsdp", "true")
    assert result.status == 1 and "start train_ddp.py with torch.distributed.run" in result.err


def test_a_mistake_is_explained(prepared):
    status, _, err = finish(start(2, "-t", "pretrain", *ARGUMENTS, "--gradient_accumulation_steps", "5", cwd=prepared))
    assert status != 0 and 'Traceback (most recent call last):\n  File "/train' not in err
    assert "gradient_accumulation_steps (5) is not divisible by 2 processes: set it to 4 or 6" in err


@pytest.mark.parametrize(("steps", "world_size", "says"), [(5, 2, "4 or 6"), (1, 2, "set it to 2 "), (7, 4, "4 or 8")])
def test_the_nearest_accumulations_that_work_are_named(steps, world_size, says):
    with pytest.raises(UserError, match=says):
        check_accumulation(steps, world_size)
    check_accumulation(8, world_size)


def test_every_process_drops_other_entries():
    """After it has drawn the same initial weights as the others."""
    draws = set()
    for rank in range(3):
        engine = DistributedEngine.__new__(DistributedEngine)
        engine.rank, engine.config = rank, TrainConfig()
        torch.manual_seed(engine.config.random_seed)
        engine.seed_dropout()
        draws.add(tuple(torch.rand(5).tolist()))
    assert len(draws) == 3


def test_communication_errors_are_told_from_other_errors():
    assert is_communication_error(torch.distributed.DistBackendError("x"))
    assert is_communication_error(
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    )
    assert not is_communication_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_gradients_are_exchanged_with_the_last_micro_batch_only(prepared, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    asked = asked_by("-t", "pretrain", *ARGUMENTS)
    engine = DDPEngine(asked.training)
    try:
        run = build_run(asked, engine)
        exchanged, taken = [], []

        def hook(state, bucket):
            exchanged.append(len(taken))
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        engine.network.register_comm_hook(None, hook)
        for batch in run.batches.at(0):
            taken.append(batch)
            engine.forward_backward(next_token, batch, 100, is_last=len(taken) == 4)
        assert set(exchanged) == {4}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_sharded_blocks_learn_as_without_shards(dtype, is_compiled, monkeypatch):
    """In half precision, and compiled: one graph for all blocks. A gradient that is not finite changes nothing."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    config = {"device": "cpu", "dtype": dtype, "warmup_iters": 0}
    plain = Engine(TrainConfig(**config))
    sharded = FSDPEngine(TrainConfig(**config, fsdp=True, compile=str(is_compiled).lower()))
    try:
        curves = []
        for engine in (plain, sharded):
            torch.manual_seed(0)
            engine.prepare(GPT(ModelConfig(vocab_size=61, block_size=16, n_layer=10, n_head=2, n_embd=16)))
            curves.append([])
            for seed in range(4):
                idx, targets = torch.randint(1, 61, (2, 4, 16), generator=torch.Generator().manual_seed(seed))
                loss = engine.forward_backward(next_token, Batch(idx, targets, None, 64), 64, is_last=True)
                curves[-1] += [loss.item(), engine.step(1.0).item()]
        assert curves[1] == pytest.approx(curves[0], rel=1e-6 if dtype == "float32" else 1e-3)
        assert sharded.use_compile == is_compiled and not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == (2 if is_compiled else 0)  # that of a block, that of the trial
        before = sharded.state_dict()["model"]
        sharded.forward_backward(next_token, Batch(idx, targets, None, 64), 64, is_last=True)
        next(iter(sharded.model.parameters())).grad.to_local()[0, 0] = torch.nan
        assert sharded.step(1.0).isnan()
        assert all(torch.equal(before[name], value) for name, value in sharded.state_dict()["model"].items())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_processes_evaluate_as_often_as_one_another_on_everything_once(prepared, world_size):
    file = TokenFile("dataset/sft_val.bin")
    shared = {"block_size": 16, "vocab_size": 100, "batch_size": 4, "seed": 0, "n_samples": 0}
    of_ranks = [list(ValidationBatches([file], rank=r, world_size=world_size, **shared)) for r in range(world_size)]
    assert len({len(batches) for batches in of_ranks}) == 1
    rows = sorted(row.tolist() for batches in of_ranks for batch in batches if batch.count for row in batch.idx[:, :4])
    alone = sorted(row.tolist() for batch in ValidationBatches([file], **shared) for row in batch.idx[:, :4])
    assert rows == alone


@pytest.mark.parametrize(
    ("options", "process_options"),
    [
        (["--problem", "add", "--length", "1-2"], []),
        (["--problem", "sort", "--length", "3"], ["--fsdp", "true"]),
        (["--problem", "sort", "--length", "3", "--loss", "grpo", "--from_checkpoint", "sorter.pt"], []),
    ],
)
def test_a_toy_problem_on_two_processes_is_that_of_one(work, call, options, process_options):
    """Micro-batches and validation are dealt out; losses, accuracy and reward are those of all together."""
    shape = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--device", "cpu"]
    assert call("train.py", "--problem", "sort", "--length", "3", *shape, "--max_steps", "3").status == 0
    (work / "checkpoint" / "problem_sort.pt").rename(work / "sorter.pt")
    steps = ["--max_steps", "4", "--eval_interval", "2", "--eval_iters", "3", "--batch_size", "32"]
    arguments = [*options, *(shape if "grpo" not in options else shape[-2:]), *steps]
    arguments += ["--gradient_accumulation_steps", "2", "--optimizer", "adamw"]
    assert call("train.py", *arguments).status == 0
    one, records = curves(newest_log(work)), read_log(newest_log(work), "val")
    assert_close(one, train_on(2, work, *arguments, *process_options), 1e-4)
    for record, other in zip(records, read_log(newest_log(work), "val"), strict=True):
        for field in {"accuracy", "reward"} & record.keys():
            assert other[field] == pytest.approx(record[field], abs=1e-6)


def test_rewards_need_the_whole_model_on_every_process(work, call):
    shape = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--device", "cpu"]
    assert call("train.py", "--problem", "sort", "--length", "3", *shape, "--max_steps", "1").status == 0
    options = [
        "--problem",
        "sort",
        "--length",
        "3",
        "--loss",
        "grpo",
        "--from_checkpoint",
        "checkpoint/problem_sort.pt",
    ]
    options += ["--device", "cpu", "--fsdp", "true", "--gradient_accumulation_steps", "2", "--batch_size", "32"]
    statuses, said = end_of(2, work, *options, "--max_steps", "1")
    assert statuses == [1, 1] and "loss grpo needs the whole model on every process" in said[0]


WANDB = """
import os
if os.environ["RANK"] == "1":
    raise ImportError
def init(**_):
    {}
class Run:
    def log(self, *_, **__): pass
    def finish(self): pass
"""


def import_from(folder):
    sys.path.insert(0, folder)


@pytest.mark.parametrize(("body", "status"), [("return Run()", 0), ("raise RuntimeError", 1)])
def test_what_one_process_alone_needs_is_for_it_alone(prepared, body, status):
    """A library that the first process has and the other lacks; where it fails in the first one, both end at once."""
    (prepared / "wandb.py").write_text(WANDB.format(body))
    arguments = ["-t", "pretrain", *ARGUMENTS, "--max_steps", "1", "--log_to", "wandb"]
    statuses, said = end_of(2, prepared, *arguments, first=functools.partial(import_from, str(prepared)))
    assert statuses == [status, status], said
    assert "lost the connection" not in "".join(said)
    if status:
        assert "log_to: wandb: RuntimeError" in said[0] and "another process cannot go on" in said[1]


def test_an_output_that_one_process_cannot_write_ends_all(prepared):
    arguments = ["-t", "pretrain", *ARGUMENTS, "--max_steps", "1", "--save_checkpoint_to", "dataset/pretrain.txt"]
    statuses, said = end_of(2, prepared, *arguments)
    assert statuses == [1, 1] and "is a file, not a folder" in said[0] and "another process cannot go on" in said[1]


def test_processes_that_find_the_checkpoints_locked_end_together(prepared):
    with hold_lock(prepared / "checkpoint" / ".pretrain.lock"):
        statuses, said = end_of(2, prepared, "-t", "pretrain", *ARGUMENTS, "--max_steps", "2")
    assert statuses == [1, 1] and "another run is writing the checkpoints of 'pretrain'" in said[0]
    assert "Traceback" not in "".join(said) and not list(prepared.glob("train_*.log"))
