"""The estimate of a run's memory, against what a step really allocates."""

import json
import math
import random
import weakref
from pathlib import Path

import pytest
import torch
from conftest import asked_by, read_log
from processes import newest_log
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from base import devices
from layers import head
from layers.rope import apply_rope, rope_table
from model import ATTENTION
from training import engine, memory
from training.engine import Engine
from training.setup import build_run
from weights import lora


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that were made inside: of those alive, their peak, and of all together."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak, self.made = {}, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.made += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, key):
        self.now -= self.sizes.pop(key)


SHAPE = ["-t", "pretrain", "--n_layer", "3", "--n_head", "4", "--n_embd", "64", "--block_size", "64"]
OPTIONS = {
    "muon": [],
    "adamw": ["--optimizer", "adamw", "--gradient_accumulation_steps", "2"],
    "few tokens": ["--n_embd", "256", "--batch_size", "1"],
    "gelu, sgd, untied": ["--mlp", "gelu", "--optimizer", "sgd", "--tie_embeddings", "false"],
    "learned positions": ["--use_rope", "false", "--qk_norm", "false"],
    "grouped queries": ["--n_kv_head", "1"],
    "windows, documents": ["--attention_window", "16,0", "--mask_documents", "true"],
    "dropout": ["--dropout", "0.1"],
    "experts": ["--n_expert", "4", "--n_hidden", "96", "--n_shared_expert", "1"],
    "diffusion": ["--loss", "diffusion", "--is_causal", "false"],
    "diffusion in blocks": ["--loss", "diffusion"],
    "bfloat16": ["--dtype", "bfloat16"],
    **{kind: ["--attention", kind] for kind in ATTENTION if kind != "full"},
    "linear, full": ["--attention", "linear,full", "--n_embd", "128"],
    "linear, bfloat16": ["--attention", "linear", "--dtype", "bfloat16", "--block_size", "128"],
    "sparse, documents": ["--attention", "sparse,full", "--sparse_block_size", "8", "--mask_documents", "true"],
    "sparse, bfloat16": ["--attention", "sparse", "--n_kv_head", "2", "--dtype", "bfloat16", "--block_size", "128"],
    "latent, queries too": ["--attention", "latent,full", "--q_rank", "48", "--kv_rank", "96", "--n_embd", "128"],
    "multi-token prediction": ["--n_future", "3"],
    "multi-token prediction, a large vocabulary": ["--n_future", "4", "--batch_size", "4"],
    "a large vocabulary": ["--batch_size", "4"],
}


@pytest.fixture
def texts(work, call):
    """Token files of a small vocabulary, and in large/ of one of 5,000 characters."""
    for folder, n in (("dataset", 60), ("large", 5000)):
        alphabet = [chr(0x4E00 + i) for i in range(n)]
        text = "".join(alphabet + random.Random(0).choices(alphabet, k=8000))
        Path("text.txt").write_text("<|bos|>".join(text[i : i + 40] for i in range(0, len(text), 40)))
        assert call("data.py", "text.txt", "--output", folder).status == 0


def data_options(folder):
    """The options of train.py for the token files in a folder."""
    files = json.dumps([[f"{folder}/pretrain_train.bin", f"{folder}/pretrain_val.bin"]])
    return "--tokenizer_path", f"{folder}/tokenizer.json", "--dataset_path", files


def without_waste(monkeypatch):
    for share in ("LOST_OF_FREED", "LOST_OF_LARGEST", "LOST_OF_UPDATE"):
        monkeypatch.setattr(memory, share, 0.0)


def train_two_steps(run):
    """Two steps of a run; the second has the optimizer's states too."""
    for step in range(2):
        micro_batches = run.batches.at(step)
        for i, batch in enumerate(micro_batches, 1):
            run.engine.forward_backward(run.loss, batch, batch.count, is_last=i == len(micro_batches))
        run.engine.step(0.1)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_estimate_is_what_the_tensors_of_a_step_take(texts, monkeypatch, name):
    """Without what the allocator loses."""
    without_waste(monkeypatch)
    data = data_options("large" if "vocabulary" in name else "dataset")
    asked = asked_by(*SHAPE, "--batch_size", "16", "--device", "cpu", *OPTIONS[name], *data)
    with LiveTensors() as tensors:
        run = build_run(asked, Engine(asked.training))
        train_two_steps(run)
    assert memory.memory_estimate(run, asked.training.batch_size) == pytest.approx(tensors.peak, rel=0.08)


@pytest.mark.parametrize("name", [*OPTIONS, "relu2"])
def test_what_the_blocks_free_is_what_dies_in_the_forward_pass(texts, name):
    options = {"relu2": ["--mlp", "relu2"], **OPTIONS}[name]
    asked = asked_by(*SHAPE, "--batch_size", "16", "--device", "cpu", *options, *data_options("dataset"))
    run = build_run(asked, Engine(asked.training))
    (batch, *_) = run.batches.at(0)
    with run.engine.autocast():
        x = embedding = run.model.token_embedding(batch.idx)
        ropes = run.model.rope(slice(batch.idx.size(1)))
        masks = run.model.masks(batch.idx.size(1), None, batch.documents, batch.idx.device)
        with LiveTensors() as tensors:
            for block, rope, window in zip(run.model.blocks, ropes, run.model.windows, strict=True):
                x = block(x, rope, masks[window])
            for module in run.model.future:
                x = module(x, embedding, rope, masks[window])
    freed = memory.freed_activations(run, *batch.idx.shape)
    assert freed == pytest.approx(tensors.made - tensors.now, rel=0.1)


def test_the_estimate_counts_the_gradients_that_ddp_keeps(texts, monkeypatch):
    """Its buckets (one process has them, too) are there in the forward pass, where other engines have no gradients."""
    without_waste(monkeypatch)
    options = "--optimizer", "adamw", "--n_embd", "256", "--batch_size", "8", "--device", "cpu"
    asked = asked_by(*SHAPE, *options, *data_options("dataset"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with LiveTensors() as tensors:
            run = build_run(asked, Engine(asked.training))
            run.engine.network = DistributedDataParallel(run.engine.model, gradient_as_bucket_view=True)
            train_two_steps(run)
    finally:
        torch.distributed.destroy_process_group()
    estimate = memory.memory_estimate(run, asked.training.batch_size)
    assert estimate == pytest.approx(tensors.peak, rel=0.05)
    run.engine.network = run.engine.model
    assert memory.memory_estimate(run, asked.training.batch_size) < 0.95 * tensors.peak


def test_adapters_add_to_the_layer_in_place():
    """Of all that an adapted layer makes, its update, into which the base's part is added, and that part are large."""
    layer, x = lora.LoRALinear(torch.nn.Linear(8, 4096, bias=False), 2, 4.0, 0.0), torch.randn(64, 8)
    torch.nn.init.normal_(layer.B)
    with LiveTensors() as tensors:
        y = layer(x)
    expected = x @ (layer.base.weight + 2.0 * layer.B @ layer.A).T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert tensors.made < 2.5 * y.nbytes  # the two, and the weights, of which the products make views


def test_a_rotation_makes_one_tensor():
    x, (cos, sin) = torch.randn(4, 16, 2, 32), rope_table(16, 32, 1e4)
    with LiveTensors() as tensors:
        y = apply_rope(x, cos, sin)
    a, b = x.double().chunk(2, -1)
    c, s = cos[..., :16].double(), sin[..., 16:].double()
    torch.testing.assert_close(y.double(), torch.cat((a * c - b * s, b * c + a * s), -1), rtol=1e-5, atol=1e-5)
    assert tensors.made == y.nbytes


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_loss_makes_no_tensor_of_logits_per_chunk(monkeypatch, reduction):
    """All chunks share one memory: freed blocks of that size are seldom of use again to the allocator."""
    chunk, vocab_size = 64, 128
    monkeypatch.setattr(head, "logits_per_chunk", lambda device: chunk * vocab_size)
    layer, made = head.Head(8, vocab_size), []
    for n_chunks in (2, 10):
        hidden, targets = torch.randn(1, n_chunks * chunk, 8), torch.zeros(1, n_chunks * chunk, dtype=torch.long)
        with LiveTensors() as tensors, torch.set_grad_enabled(reduction == "sum"):
            layer(hidden.requires_grad_(reduction == "sum"), targets, reduction=reduction)
        made.append(tensors.made)
    assert made[0] > 4 * chunk * vocab_size  # those of the first chunk are counted
    assert made[1] - made[0] < 8 * 4 * chunk * vocab_size / 2


def test_available_memory_is_what_a_container_leaves(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 1000 kB\nMemAvailable: 6000 kB\n")
    monkeypatch.setattr(devices, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert devices.memory_available(cpu) == 6000 * 1024  # what is free, and cached files
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 300000\n")
    (tmp_path / "memory.current").write_text("500000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.memory_available(cpu) == 6000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert devices.memory_available(cpu) == 800_000 and devices.memory_total() == 1_000_000


def test_the_log_has_the_peak_beside_the_estimate(call, prepared, monkeypatch):
    """What the process took before there was a model is not of the training."""
    peaks = iter((1_000e6, *(1_000e6 + 100e6 * n for n in range(1, 10))))
    monkeypatch.setattr(engine, "peak_memory", lambda device: next(peaks))
    small = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "16", "--device", "cpu"]
    result = call("train.py", "-t", "pretrain", *small, "--max_steps", "4", "--eval_interval", "2")
    assert result.status == 0, result.err
    log = newest_log(prepared)
    assert [record["peak_memory_mb"] for record in read_log(log, "val")] == [100, 200]
    (header,) = read_log(log, "header")
    assert "memory at the peak: 0.30 GB, estimated" in result.out
    low, high = (factor * header["memory_estimate_mb"] / 1e3 for factor in memory.CPU_RANGE)
    assert f"memory: about {header['memory_estimate_mb'] / 1e3:.2f} GB ({low:.2f} to {high:.2f})" in result.out


def test_a_peak_that_nothing_tells_is_null(call, prepared, monkeypatch):
    monkeypatch.setattr(engine, "peak_memory", lambda device: math.nan)  # as on a Mac's GPU
    small = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "16", "--device", "cpu"]
    result = call("train.py", "-t", "pretrain", *small, "--max_steps", "1")
    assert result.status == 0 and "at the peak" not in result.out
    assert [record["peak_memory_mb"] for record in read_log(newest_log(prepared), "val")] == [None]
