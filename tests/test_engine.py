"""What one step does to the weights, by hand; what a resumed run takes over; what the config decides about a run."""

import copy
import json
import math
import time
from pathlib import Path

import pytest
import torch
from conftest import DATA, FAST, TINY, asked_by, read_log
from processes import newest_log
from torch.utils._python_dispatch import TorchDispatchMode

import train
from base.configuration import UserError
from base.devices import find_device
from model import GPT, ModelConfig
from text.batches import Batch
from training.config import TrainConfig
from training.engine import Engine
from training.losses import next_token
from training.run_log import create_log_file
from training.setup import build_run
from weights.checkpointing import load_checkpoint

PRETRAIN = ["-t", "pretrain", *TINY, *FAST, *DATA, "--optimizer", "sgd", "--eval_iters", "1"]
STILL = ["--learning_rate", "1e-30", "--min_lr", "0"]  # no step changes a weight


def make_engine(**fields) -> Engine:
    torch.manual_seed(0)
    engine = Engine(TrainConfig(device="cpu", **fields))
    engine.prepare(GPT(ModelConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=16)))
    return engine


def weights_of(engine: Engine) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in engine.model.parameters()])


def set_gradients(engine: Engine, seed: int = 0) -> torch.Tensor:
    """Random gradients, all in one row."""
    generator = torch.Generator().manual_seed(seed)
    for p in engine.model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return torch.cat([p.grad.flatten().double() for p in engine.model.parameters()])


def learn(engine: Engine, seed: int = 0) -> float:
    """A whole step on a random batch; the gradient's norm."""
    idx, targets = torch.randint(0, 20, (2, 4, 8), generator=torch.Generator().manual_seed(seed))
    engine.forward_backward(next_token, Batch(idx, targets, None, 32), 32, True)
    return engine.step(1.0).item()


# ------------------------------------------------------------------------------------------------------ a step


@pytest.mark.parametrize("grad_clip", [0.0, 0.5, 1e6])
def test_the_gradient_is_clipped_to_grad_clip_and_0_means_not_at_all(grad_clip):
    engine = make_engine(optimizer="sgd", learning_rate=1.0, beta1=0.0, weight_decay=0.0, grad_clip=grad_clip)
    gradient, before = set_gradients(engine), weights_of(engine)
    norm = gradient.norm().item()
    assert engine.step(0.5).item() == pytest.approx(norm, rel=1e-5)  # that of before
    clipped = gradient * (min(grad_clip, norm) / norm if grad_clip else 1)
    torch.testing.assert_close(weights_of(engine), before - 0.5 * clipped, rtol=1e-4, atol=1e-5)


def test_no_gradient_is_left_for_the_next_step():
    engine = make_engine(optimizer="sgd", beta1=0.0, weight_decay=0.0)
    set_gradients(engine)
    engine.step(1.0)
    before = weights_of(engine)
    engine.step(1.0)
    assert torch.equal(weights_of(engine), before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer, value):
    """Neither weights nor moments: the step after it is as if it had not been."""
    weights = []
    for is_disturbed in (False, True):
        engine = make_engine(optimizer=optimizer)
        set_gradients(engine, 1)
        engine.step(1.0)
        if is_disturbed:
            before = weights_of(engine)
            set_gradients(engine, 2)
            next(iter(engine.model.parameters())).grad[0, 0] = value
            assert not math.isfinite(engine.step(1.0)) and torch.equal(weights_of(engine), before)
        set_gradients(engine, 3)
        engine.step(1.0)
        weights.append(weights_of(engine))
    assert torch.equal(*weights)


def test_adamw_is_its_formula():
    engine = make_engine(learning_rate=0.1, min_lr=0.0, beta1=0.8, beta2=0.95, weight_decay=0.3, grad_clip=0.0)
    w, m, v = weights_of(engine), 0.0, 0.0
    decays = torch.cat([torch.full((p.numel(),), float(p.dim() >= 2)) for p in engine.model.parameters()])
    for t in range(1, 4):
        g = set_gradients(engine, t)
        engine.step(0.5)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        w = w * (1 - 0.05 * 0.3 * decays) - 0.05 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    torch.testing.assert_close(weights_of(engine), w, rtol=1e-4, atol=1e-5)


def test_sgd_is_its_formula():
    engine = make_engine(optimizer="sgd", learning_rate=0.1, beta1=0.9, weight_decay=0.0, grad_clip=0.0)
    w, m = weights_of(engine), 0.0
    for t in range(3):
        m = 0.9 * m + set_gradients(engine, t)
        engine.step(1.0)
        w = w - 0.1 * m
    torch.testing.assert_close(weights_of(engine), w, rtol=1e-4, atol=1e-5)


def test_the_schedule_scales_the_rates_of_all_groups_each_from_its_own_peak():
    engine = make_engine(optimizer="muon", learning_rate=0.004, muon_learning_rate=0.02)
    for scale in (0.5, 0.25, 1.0):  # not one after another
        set_gradients(engine)
        engine.step(scale)
        assert [group["lr"] for group in engine.optimizer.param_groups] == [0.02 * scale, 0.004 * scale]


def test_float16_clips_by_the_norm_of_the_true_gradients():
    """Not by that of the gradients that are scaled up, which is 65,536 times as large."""
    norms = [learn(make_engine(dtype=dtype)) for dtype in ("float32", "float16")]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


# ------------------------------------------------------------------------------------------------------ resuming


def test_a_resumed_engine_goes_on_with_moments_scale_and_random_numbers():
    engine = make_engine(dtype="float16")
    learn(engine)
    engine.scaler.load_state_dict({**engine.scaler.state_dict(), "scale": 8.0})
    torch.rand(7)  # as dropout would have drawn
    state = copy.deepcopy(engine.state_dict())
    draws = torch.rand(5)
    other = make_engine(dtype="float16")
    other.model.load_state_dict(state["model"])
    other.load_state_dict(state)
    assert torch.equal(torch.rand(5), draws) and other.scaler.get_scale() == 8.0
    for each in (engine, other):
        learn(each, 1)
    assert torch.equal(weights_of(engine), weights_of(other))


def test_a_resumed_engine_keeps_its_own_settings():
    """Rates and decay are the config's that it is resumed with, not the checkpoint's."""
    state = make_engine(learning_rate=0.1, min_lr=0.0, weight_decay=0.5).state_dict()
    other = make_engine(learning_rate=0.01, min_lr=0.0, weight_decay=0.2)
    other.load_state_dict(state)
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.2, 0.0]
    other.step(0.5)
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.005, 0.005]


def ok(call, *argv):
    result = call("train.py", *argv)
    assert result.status == 0, result.err
    return result


def test_the_resumed_state_goes_on_counting(prepared, call):
    """Tokens, skipped steps, and evaluations without gain, which a gain sets back."""
    ok(call, *PRETRAIN, *STILL, "--max_steps", "2")
    last = "checkpoint/pretrain_last.pt"
    checkpoint = torch.load(last, weights_only=True)
    tokens, best = checkpoint["data"]["tokens"], checkpoint["best_val_loss"]
    assert tokens == 2 * 2 * 4 * 16  # steps, micro-batches, rows, columns
    counts = {"skipped_steps": 3, "evals_without_gain": 4, "tokens": 10_000}
    for kept_best, without_gain in ((best - 1, 5), (best + 1, 0)):
        data = {**checkpoint["data"], **counts}
        torch.save({**checkpoint, "data": data, "best_val_loss": kept_best}, last)
        ok(call, *PRETRAIN, *STILL, "--max_steps", "3", "--from_checkpoint", last)
        after = load_checkpoint(last)["data"]
        assert (after["skipped_steps"], after["tokens"]) == (3, 10_000 + tokens // 2)
        assert after["evals_without_gain"] == without_gain


# ------------------------------------------------------------------------------------------------------ configs


def test_the_command_lines_fields_win_over_the_configs_file(work):
    Path("mine.json").write_text(json.dumps({"learning_rate": 0.5, "batch_size": 3, "n_layer": 7}))
    asked = asked_by("-t", "mine.json", "--batch_size", "5", "--n_head", "1")
    assert (asked.training.learning_rate, asked.training.batch_size) == (0.5, 5)
    assert (asked.model["n_layer"], asked.model["n_head"]) == (7, 1)
    assert asked.training.stage == "mine" and asked.training.dataset_path[0][0] == "dataset/mine_train.bin"
    renamed = asked_by("-t", "mine.json", "--stage", "other").training
    assert renamed.stage == "other" and renamed.dataset_path[0][1] == "dataset/mine_val.bin"


def test_a_config_of_ones_own_is_found_before_the_projects(work):
    Path("config").mkdir()
    Path("config/sft.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"learning_rate": 0.125}).encode())
    assert asked_by("-t", "sft").training.learning_rate == 0.125  # with a byte-order mark, as Windows has it


def test_a_field_that_is_given_twice_is_refused(work):
    Path("c.json").write_text('{"batch_size": 1, "max_steps": 2, "batch_size": 3}')
    with pytest.raises(UserError, match=r'c\.json: "batch_size" is given twice'):
        asked_by("-t", "c.json")


def test_dropout_is_the_models_unless_the_run_says_otherwise(prepared, call):
    dropouts = {}
    for stage, options in {
        "new": ["--dropout", "0.2"],
        "kept": ["--from_checkpoint", "checkpoint/new.pt"],
        "other": ["--from_checkpoint", "checkpoint/new.pt", "--dropout", "0.4"],
        "none": ["--from_checkpoint", "checkpoint/new.pt", "--dropout", "0"],
    }.items():
        ok(call, *PRETRAIN, "--max_steps", "1", "--stage", stage, *options)
        dropouts[stage] = load_checkpoint(f"checkpoint/{stage}.pt")["model_config"]["dropout"]
    assert dropouts == {"new": 0.2, "kept": 0.2, "other": 0.4, "none": 0.0}


def test_devices_are_counted_from_0(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(find_device(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name in ("cuda:2", "cpu:1", "mps"):
        with pytest.raises(UserError, match="does not exist here"):
            find_device(name)


def built(*argv: str):
    asked = asked_by(*argv)
    return build_run(asked, Engine(asked.training))


def test_positions_restart_as_the_config_says(prepared):
    for value in ("true", "false"):
        run = built(*PRETRAIN, "--mask_documents", "true", "--restart_positions", value)
        assert run.model.restart_positions == (value == "true")


def test_samples_are_packed_where_the_config_says_so(prepared):
    sft = ["-t", "sft", *TINY, "--block_size", "64", *FAST, "--from_checkpoint", "", "--batch_size", "16"]
    plain, packed = (built(*sft, "--pack_samples", value).batches.at(0)[0] for value in ("false", "true"))
    assert plain.count == packed.count and len(plain.idx) == 16 > 2 * len(packed.idx)
    assert plain.documents is None and packed.documents.max() > 1


def test_eval_iters_are_hundreds_of_samples_and_0_is_all(prepared):
    n = {k: len(built(*PRETRAIN, "--block_size", "2", "--eval_iters", k).validation.samples) for k in ("0", "1", "2")}
    assert (n["1"], n["2"]) == (100, 200) and n["0"] > 250


def test_full_attention_is_refused_for_text(prepared, call):
    result = call("train.py", *PRETRAIN, "--is_causal", "false", "--max_steps", "1")
    assert result.status == 1 and "sees the very token it is to predict" in result.err


# ------------------------------------------------------------------------------------------------------ what is told


def test_a_log_is_never_overwritten(work, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    paths = []
    for contents in (b"one", b"two"):
        file, path = create_log_file()
        file.write(contents)
        file.close()
        paths.append(path)
    assert [path.read_bytes() for path in paths] == [b"one", b"two"] and paths[0].name == "train_now.log"


def test_the_experts_load_is_that_since_the_last_evaluation(prepared, call, monkeypatch):
    counts = iter([[[4.0, 0.0], [2.0, 2.0]]] * 2 + [[[0.0, 4.0], [1.0, 3.0]]] * 2)
    monkeypatch.setattr(train, "count_expert_tokens", lambda *_: torch.tensor(next(counts)))
    options = ["--n_expert", "2", "--n_expert_per_token", "1", "--eval_interval", "2", "--max_steps", "4"]
    result = ok(call, *PRETRAIN, *options)
    loads = [record["expert_load"] for record in read_log(newest_log(prepared), "val")]
    assert loads == [[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.25, 0.75]]]
    assert result.out.count("busiest expert 2.00x the mean") == 2


def test_one_process_of_a_host_reads_the_token_files_for_their_checksums(prepared, monkeypatch):
    """The others map them alone; where that one finds damage, all of them end."""
    read = []
    monkeypatch.setattr(
        "text.token_files.chunks_of", lambda file: read.append(file.name) or iter(lambda: file.read(), b"")
    )
    engines = [Engine(asked_by(*PRETRAIN).training) for _ in range(2)]
    engines[1].local_rank = 1
    runs = []
    for engine in engines:
        runs.append(build_run(asked_by(*PRETRAIN), engine))
        assert len(read) == 2  # training and validation
    assert torch.equal(*(run.batches.at(0)[0].idx for run in runs))
    path = Path("dataset/pretrain_train.bin")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="wrong checksum"):
        build_run(asked_by(*PRETRAIN), engines[0])
    monkeypatch.setattr(engines[1], "sum_over_ranks", lambda *values: [value + 1 for value in values])
    with pytest.raises(UserError, match="another process cannot go on"):
        build_run(asked_by(*PRETRAIN), engines[1])


# ------------------------------------------------------------------------------------------------------ waiting


class Reads(TorchDispatchMode):
    """Counts the numbers that Python reads from tensors: on a GPU it would wait for each."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], 0),
        (["--dtype", "float16"], 0),
        (["--n_expert", "4", "--n_hidden", "16", "--expert_balance", "bias"], 0),
        (["--optimizer", "muon"], 1),  # whose step is not one kernel that could decide by itself
    ],
    ids=["adamw", "float16", "experts", "muon"],
)
def test_between_log_records_a_step_reads_nothing_from_the_device(prepared, call, monkeypatch, options, expected):
    monkeypatch.setattr("model.check_token_ids", lambda *_: None)  # for CPUs alone
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [value.item() for value in tensor.flatten()])
    options = ["--optimizer", "adamw", *options, "--log_interval", "1000", "--eval_interval", "1000"]
    counts = []
    for n_steps in ("5", "15"):
        with Reads() as reads:
            ok(call, *PRETRAIN, *options, "--max_steps", n_steps)
        counts.append(reads.n)
    assert counts[0] > 0 and counts[1] - counts[0] == 10 * expected


def test_the_speed_of_a_record_is_that_since_the_one_before(prepared, call):
    """Of all steps since then, without what evaluations and saves took."""
    options = ["--max_steps", "12", "--eval_interval", "6", "--save_interval", "6"]
    ok(call, *PRETRAIN, *options, "--log_interval", "4")
    records = read_log(newest_log(prepared), "train")
    assert [record["step"] for record in records] == [4, 8, 12]
    for record in records:
        assert record["tokens_per_s"] == pytest.approx(2 * 4 * 16 / (record["ms_per_step"] / 1000), rel=1e-6)
