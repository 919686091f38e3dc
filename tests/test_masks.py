"""Flex attention against SDPA with a mask; what needs its kernels skips itself, on a CPU the form without them runs."""

from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, FAST, make_text, read_log
from torch.nn.attention import flex_attention as torch_flex

from base.configuration import UserError
from layers.attention import FullAttention
from layers.masks import attention_mask, block_masks
from model import GPT, ModelConfig
from training import preflight
from training.config import TrainConfig
from training.engine import Engine
from training.preflight import choose_attention, flex_attention_problem

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention's kernels are for GPUs")
SHAPE = {"vocab_size": 50, "block_size": 300, "n_layer": 2, "n_head": 4, "n_embd": 64, "n_kv_head": 2}


def draw_documents(rng: torch.Generator, rows: int, T: int) -> torch.Tensor:
    return (torch.rand(rows, T, generator=rng) < 0.02).cumsum(1)


def loss_and_gradient(network: torch.nn.Module, model: GPT, idx: torch.Tensor, documents: torch.Tensor | None):
    model.zero_grad()
    loss = network(idx, idx.roll(-1, 1), None, "sum", documents)[1]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"attention_window": [40, 0]}, {"is_causal": False}, {"attention_window": [40], "is_causal": False}],
)
def test_flex_attention_trains_as_sdpa_does(options, masked, monkeypatch):
    if not masked and "attention_window" not in options:
        options = {**options, "attention_window": [299]}  # (else there is no mask at all)
    # torch refuses to train by flex attention on a CPU, where it has no kernel; the form without one can be trained
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE, **options))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    blocks_made, graphs = [], []
    monkeypatch.setattr("model.block_masks", lambda *a: blocks_made.append(block_masks(*a)) or blocks_made[-1])
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        idx = torch.randint(0, 50, (3, 300), generator=rng)
        documents = draw_documents(rng, 3, 300) if masked else None
        model.use_flex = False
        expected, expected_gradient = loss_and_gradient(model, model, idx, documents)
        model.use_flex = True
        loss, gradient = loss_and_gradient(compiled, model, idx, documents)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(blocks_made) == 3
    assert graphs[0] == graphs[2]  # other documents are nothing new to the compiler


def test_blocks_in_which_nothing_sees_anything_are_passed_over():
    """Documents of 128 in a window of 512: of the 16 blocks SDPA computes all, causal attention needs 10, these 4."""
    documents = torch.arange(512)[None] // 128
    blocks = block_masks(512, {0}, True, documents, documents.device)[0]
    assert blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum() == 4
    windowed = block_masks(512, {100}, True, None, documents.device)[100]
    assert windowed.kv_num_blocks.sum() + windowed.full_kv_num_blocks.sum() == 7


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 100, 129, 256, 400])
@pytest.mark.parametrize("T", [128, 300, 512])
def test_blocks_are_those_that_a_look_at_every_pair_finds(T, window, is_causal):
    """torch's create_block_mask() looks. Ids that do not rise, which nothing here makes, may cost blocks too many."""

    def allowed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        n = indices.size(-1)
        places = torch.where(torch.arange(n) < counts[..., None], indices, n).long()
        return torch.zeros(*indices.shape[:-1], n + 1).scatter(-1, places, 1.0)[..., :n]

    rng = torch.Generator().manual_seed(0)
    rising = draw_documents(rng, 3, T), torch.zeros(2, T, dtype=torch.long)
    for documents in (None, *rising, torch.randint(3, (2, T), generator=rng)):
        blocks = block_masks(T, {window}, is_causal, documents, torch.device("cpu"))[window]
        if blocks is None:
            continue
        n_rows = 1 if documents is None else len(documents)
        expected = torch_flex.create_block_mask(blocks.mask_mod, n_rows, None, T, T, device="cpu")
        part, whole, expected_part, expected_whole = (
            allowed(counts, indices)
            for mask in (blocks, expected)
            for counts, indices in (
                (mask.kv_num_blocks, mask.kv_indices),
                (mask.full_kv_num_blocks, mask.full_kv_indices),
            )
        )
        if documents is None or (documents.diff() >= 0).all():
            assert torch.equal(part, expected_part) and torch.equal(whole, expected_whole)
        assert (whole <= expected_whole).all() and (part + whole >= expected_part + expected_whole).all()


def test_the_blocks_of_a_window_are_made_once_those_of_documents_for_every_batch():
    device = torch.device("cpu")
    first, second = (block_masks(200, {50, 0}, True, None, device) for _ in range(2))
    assert first[50] is second[50] and first[0] is None
    assert block_masks(200, {50}, False, None, device)[50] is not first[50]
    of_batches = [block_masks(200, {50}, True, torch.zeros(1, 200) + torch.arange(200) // n, device) for n in (60, 90)]
    shown = [blocks[50].mask_mod(*map(torch.tensor, (0, 0, 70, 55))).item() for blocks in of_batches]
    assert shown == [False, True]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 7, 50])
def test_both_forms_allow_the_same(window, is_causal):
    T = 200
    for documents in (None, draw_documents(torch.Generator().manual_seed(1), 2, T)):
        mask = attention_mask(T, window, is_causal, documents, torch.device("cpu"))
        blocks = block_masks(T, {window}, is_causal, documents, torch.device("cpu"))[window]
        if mask is None:
            assert blocks is None
            continue
        for b in range(len(mask) if mask.dim() == 4 else 1):  # row by row, column by column
            rows = mask[b, 0] if mask.dim() == 4 else mask
            for query in range(0, T, 13):
                for key in range(0, T, 7):
                    near = abs(query - key) < window if window else True
                    same = documents is None or documents[b, query] == documents[b, key]
                    expected = bool(near and same and (key <= query or not is_causal))
                    place = torch.tensor(b), torch.tensor(0), torch.tensor(query), torch.tensor(key)
                    assert rows[query, key] == blocks.mask_mod(*place) == expected


def test_where_flex_attention_does_not_work_masks_stay_with_sdpa(capsys):
    engine = Engine(TrainConfig(device="cpu"))
    reason = flex_attention_problem(FullAttention, ModelConfig(**SHAPE), engine)
    assert reason == "NotImplementedError"  # torch trains by it on GPUs alone
    model = GPT(ModelConfig(**SHAPE))
    choose_attention(TrainConfig(pack_samples=True), model, engine)
    assert not model.use_flex and capsys.readouterr().err == ""  # a CPU is not even asked


def test_flash_attention_with_a_mask_is_refused(monkeypatch):
    monkeypatch.setattr(preflight, "check_kernel", lambda *_: None)  # which tries the kernel
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    model = GPT(ModelConfig(**SHAPE))
    with pytest.raises(UserError, match="sdp_kernel flash supports no masks"):
        choose_attention(TrainConfig(sdp_kernel="flash", mask_documents=True), model, on_gpu)
    with pytest.raises(UserError, match="attention sparse"):  # which hides what it did not choose
        sparse = GPT(ModelConfig(**SHAPE, attention=["full", "sparse"]))
        choose_attention(TrainConfig(sdp_kernel="flash"), sparse, on_gpu)
    choose_attention(TrainConfig(sdp_kernel="flash"), model, on_gpu)


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_on_a_gpu_uses_it_and_learns_the_same(dtype, work, call):
    (work / "dataset").mkdir()
    text = "".join(f"<|bos|>{make_text(150, seed)}<|eos|>\n" for seed in range(200))
    (work / "dataset" / "pretrain.txt").write_text(text, encoding="utf-8")
    assert call("data.py", "--block_size", "256").status == 0
    shape = ["--n_layer", "2", "--n_head", "2", "--n_embd", "64", "--block_size", "256", "--n_kv_head", "1"]
    options = [*FAST, *DATA, *shape, "--device", "cuda", "--dtype", dtype, "--mask_documents", "true"]
    losses = []
    for kernel in ("auto", "mem_efficient"):
        result = call("train.py", *options, "--sdp_kernel", kernel, "--stage", kernel, "--max_steps", "20")
        assert result.status == 0, result.err
        assert ("flex for masks" in result.out) == (kernel == "auto")
        losses.append([record["loss"] for record in read_log(max(work.glob("train_*.log")), "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if dtype == "float32" else 0.02)
