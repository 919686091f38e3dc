import itertools
import json
import math
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_samples, make_text, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from base.configuration import UserError
from base.prefetching import prefetch
from model import GPT, ModelConfig
from text.baselines import compression_baselines, token_baselines
from text.batches import (
    Pairs,
    Samples,
    TrainBatches,
    ValidationBatches,
    Windows,
    collate,
    document_ids,
    pack,
    prefetch_steps,
)
from text.token_files import TokenFile, TokenFileWriter
from text.tokenizer import BOS, EOS, PADDING, RESPONSE, UNKNOWN, CharTokenizer
from text.tokenizer_files import load_tokenizer


def tokens_of(folder, stage, split):
    return TokenFile(folder / f"{stage}_{split}.bin").tokens.tolist()


def text_of(folder, stage, split):
    return load_tokenizer(folder / "tokenizer.json").decode(tokens_of(folder, stage, split))


def samples_of(path, tokenizer):
    file = TokenFile(path)
    pairs = zip(file.starts, file.starts[1:], strict=False)
    return [tokenizer.decode(file.tokens[a:b]) for a, b in pairs]


def test_running_text_is_split_by_position(call, work):
    text = make_text(5000)
    (work / "a.txt").write_text(text, encoding="utf-8")
    assert call("data.py", "a.txt", "--block_size", "16", "--val_fraction", "0.2").status == 0
    assert text_of(work / "dataset", "pretrain", "train") == text[:4000]
    assert text_of(work / "dataset", "pretrain", "val") == text[4000:]


@pytest.mark.parametrize("paths", [["folder"], ["folder/1.txt", "folder/sub/2.MD"]], ids=["folder", "two"])
def test_every_file_is_a_document(call, work, paths):
    text = make_text(5000)
    (work / "folder" / "sub").mkdir(parents=True)
    (work / "folder" / "1.txt").write_text(text[:2000], encoding="utf-8")
    (work / "folder" / "sub" / "2.MD").write_text(text[2000:], encoding="utf-8")
    assert call("data.py", *paths, "--block_size", "16").status == 0
    train = f"<|bos|>{text[:1800]}<|bos|>{text[2000:4700]}"
    assert text_of(work / "dataset", "pretrain", "train") == train
    assert text_of(work / "dataset", "pretrain", "val") == f"{text[1800:2000]}<|eos|>{text[4700:]}<|eos|>"


def test_small_chunks_give_the_same_file_as_large_ones(call, work, monkeypatch):
    from text import corpus, formats

    text = (
        make_text(5000).replace("\n", "\r\n")
        + "<|bos|>one document<|eos|>\n<|bos|>another 文档<|eos|>"
        + make_text(500)
    )
    (work / "a.txt").write_bytes(text.encode("utf-8"))
    assert call("data.py", "a.txt", "--block_size", "16", "--output", "large").status == 0
    monkeypatch.setattr(formats, "CHUNK", 97)
    monkeypatch.setattr(corpus, "CHUNK", 97)
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 1000)
    assert call("data.py", "a.txt", "--block_size", "16", "--output", "small").status == 0
    for split in ("train", "val"):
        assert tokens_of(work / "small", "pretrain", split) == tokens_of(work / "large", "pretrain", split)
    assert "\r" not in text_of(work / "small", "pretrain", "train")


def test_the_same_input_gives_the_same_bytes(call, prepared):
    before = {path.name: path.read_bytes() for path in (prepared / "dataset").iterdir()}
    assert call("data.py", "--block_size", "16").status == 0
    assert {path.name: path.read_bytes() for path in (prepared / "dataset").iterdir()} == before


def test_documents_are_deduplicated_and_never_in_both_splits(call, work):
    documents = [f"document {i % 40} " + "x" * 20 for i in range(100)]
    write_jsonl(work / "a.jsonl", [{"text": document} for document in documents])
    (work / "b.txt").write_text("".join(f"<|bos|>{document}<|eos|>\n" for document in documents), encoding="utf-8")
    result = call("data.py", "a.jsonl", "b.txt", "--block_size", "16")
    assert "160 exact duplicates removed" in result.out
    sides = {}
    for split in ("train", "val"):
        ids = tokens_of(work / "dataset", "pretrain", split)
        assert ids.count(BOS) == ids.count(EOS)
        text = text_of(work / "dataset", "pretrain", split)
        sides[split] = [d.removeprefix("<|bos|>") for d in text.split("<|eos|>") if d]
    assert not set(sides["train"]) & set(sides["val"])
    assert sorted(sides["train"] + sides["val"]) == sorted(set(documents))
    assert len(sides["val"]) == 4


def test_fine_tuning_samples_follow_the_template_and_only_answers_are_in_the_loss(call, work):
    samples = make_samples(30)
    conversation = [
        {"role": "system", "content": "kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    write_jsonl(work / "s.jsonl", [*samples, samples[0], {"messages": conversation}])
    result = call("data.py", "s.jsonl", "--block_size", "64")
    assert result.status == 0 and "1 exact duplicates removed" in result.out
    tokenizer = load_tokenizer(work / "dataset" / "tokenizer.json")
    found = [s for split in ("train", "val") for s in samples_of(work / "dataset" / f"sft_{split}.bin", tokenizer)]
    expected = [f"<|InstructMark|>{s['question']}<|ResponseMark|>{s['answer']}<|eos|>" for s in samples]
    expected.append(
        "<|InstructMark|>kind\none<|ResponseMark|>two<|eos|><|InstructMark|>three<|ResponseMark|>four<|eos|>"
    )
    assert sorted(found) == sorted(expected)
    for split in ("train", "val"):
        file = TokenFile(work / "dataset" / f"sft_{split}.bin")
        inside = False  # an answer begins after <|ResponseMark|> and ends with <|eos|>
        for token, mask in zip(file.tokens.tolist(), file.loss_mask.tolist(), strict=True):
            assert mask == inside
            inside = token == RESPONSE or (inside and token != EOS)


def test_other_programs_can_open_the_files(prepared):
    safetensors = pytest.importorskip("safetensors.numpy")
    for name in ("pretrain_train", "sft_val"):
        file, theirs = TokenFile(f"dataset/{name}.bin"), safetensors.load_file(f"dataset/{name}.bin")
        assert theirs["tokens"].dtype == np.uint16 and (theirs["tokens"] == file.tokens).all()
        if file.starts is not None:
            assert (theirs["starts"] == file.starts).all() and (theirs["loss_mask"] == file.loss_mask).all()


def test_large_vocabularies_get_wider_tokens(call, work):
    (work / "a.txt").write_text(
        "".join(map(chr, range(0x4E00, 0x9FFF)))
        + "".join(map(chr, range(0x20000, 0x2A6DF))) * 2
        + "".join(map(chr, range(0xAC00, 0xD7A4))),
        "utf-8",
    )
    assert call("data.py", "a.txt", "--block_size", "16").status == 0
    file = TokenFile("dataset/pretrain_train.bin")
    assert file.tokens.dtype == np.uint32 and file.header["vocab_size"] > 1 << 16
    assert file.tokens.max() == file.header["vocab_size"] - 1


def test_a_training_part_of_one_window_is_enough(call, work):
    (work / "a.txt").write_text("ab" * 50, encoding="utf-8")
    assert call("data.py", "a.txt", "--block_size", "89").status == 0  # 90 of the 100 tokens are for training
    refused = call("data.py", "a.txt", "--block_size", "90")
    assert refused.status == 1 and "90 training tokens are fewer than one window of 90 + 1" in refused.err


def test_baselines_are_those_computed_by_hand():
    found = token_baselines(np.array([3, 0, 1]), np.array([0, 2, 2]))  # how often each of three tokens occurs
    assert found["uniform"] == pytest.approx(math.log(3))
    assert found["unigram"] == pytest.approx(-(2 * math.log(1 / 7) + 2 * math.log(2 / 7)) / 4)  # one is added to each
    found = compression_baselines("世界 " * 1000)
    assert found["zlib_bits_per_character"] == 8 * len(zlib.compress(("世界 " * 1000).encode(), 9)) / 3000
    assert 0 < found["lzma_bits_per_character"] < 1


def test_a_compressed_sample_is_a_million_bytes_in_any_script():
    """lzma takes seconds for a million Chinese characters, longer than the rest of data.py for 100 MB."""
    text = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 400_000)))
    head = text[:333_333].encode()  # the next character would end after 1,000,002 bytes
    assert compression_baselines(text)["zlib_bits_per_character"] == 8 * len(zlib.compress(head, 9)) / 333_333


def test_a_reused_tokenizer_reports_unknown_characters(call, prepared):
    (prepared / "other.txt").write_text("the cat Ω sat Ω on the mat\n" * 20, encoding="utf-8")
    result = call("data.py", "other.txt", "--tokenizer", "dataset/tokenizer.json", "--output", "o", "--block_size", "8")
    assert result.status == 0 and "Ω" in result.err
    assert "40 of" in result.out and "<|unknown|>" in result.out
    assert sum(tokens_of(prepared / "o", "pretrain", s).count(UNKNOWN) for s in ("train", "val")) == 40


def test_bpe_is_trained_and_used(call, work):
    (work / "a.txt").write_text(make_text(8000), encoding="utf-8")
    assert call("data.py", "a.txt", "--tokenizer", "bpe", "--vocab_size", "300", "--block_size", "16").status == 0
    assert load_tokenizer("dataset/tokenizer.json").kind == "bpe"
    assert text_of(work / "dataset", "pretrain", "train") == make_text(8000)[:7200]


def test_bad_lines_are_skipped_with_their_numbers_up_to_a_limit(call, work):
    lines = [json.dumps(sample) for sample in make_samples(20)]
    lines[3], lines[7], lines[11] = '{"question": "no answer"}', "{not json", '{"question": "q", "answer": {}}'
    (work / "s.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = call("data.py", "s.jsonl", "--block_size", "64")
    assert result.status == 0
    for number, word in ((4, '"answer" is missing'), (8, "not valid JSON"), (12, '"answer" is not text')):
        assert f"line {number}: " in result.err and word in result.err
    assert result.err.count("skipped") == 3
    assert call("data.py", "s.jsonl", "--block_size", "64", "--max_bad_lines", "3").status == 0
    result = call("data.py", "s.jsonl", "--block_size", "64", "--max_bad_lines", "2", "--output", "other")
    assert result.status != 0 and "more than 2 bad lines" in result.err
    assert not list((work / "other").glob("*")) if (work / "other").exists() else True


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_inspect_prints_header_statistics_and_samples(call, prepared, stage):
    result = call("data.py", "--inspect", f"dataset/{stage}_train.bin")
    assert result.status == 0
    header = TokenFile(f"dataset/{stage}_train.bin").header
    assert (
        f"{header['n_tokens']:,} tokens" in result.out and "<|eos|>" in result.out and "distinct samples" in result.out
    )
    if stage == "sft":
        share = 1 - header["n_loss_tokens"] / header["n_tokens"]
        assert f"masked out of the loss: {share:.1%}" in result.out


# ------------------------------------------------------------------------------------------------------ batches


def reader(folder, stage="pretrain", **changes):
    options = {"block_size": 16, "vocab_size": 500, "batch_size": 4, "accumulation_steps": 2, "seed": 1, **changes}
    return TrainBatches([TokenFile(folder / "dataset" / f"{stage}_train.bin")], **options)


def test_an_epoch_holds_every_window_once(prepared):
    batches = reader(prepared, batch_size=1, accumulation_steps=1)
    tokens = TokenFile("dataset/pretrain_train.bin").tokens.astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, 17)
    for epoch in (0, 1):
        rows = [batches.at(epoch * batches.samples_per_epoch + i)[0] for i in range(batches.samples_per_epoch)]
        starts = []
        for row in rows:
            window = torch.cat((row.idx[0], row.targets[0, -1:])).numpy()
            starts.append(np.flatnonzero((windows == window).all(axis=1)).tolist())
        offset = batches.datasets[0]._offset[1]
        expected = [offset + i * 16 for i in range(batches.samples_per_epoch)]
        order = [next(s for s in places if s in expected) for places in starts]
        assert sorted(order) == expected and order != expected
        assert all(torch.equal(row.idx[0, 1:], row.targets[0, :-1]) for row in rows)


def test_epochs_differ_and_seeds_differ(prepared):
    batches = reader(prepared)
    assert not torch.equal(batches.at(0)[0].idx, batches.at(batches.samples_per_epoch)[0].idx)
    assert not torch.equal(batches.at(0)[0].idx, reader(prepared, seed=2).at(0)[0].idx)
    assert torch.equal(batches.at(0)[0].idx, reader(prepared).at(0)[0].idx)


def test_every_epoch_has_its_own_order_and_its_own_offset(prepared):
    batches = reader(prepared)
    assert not np.array_equal(batches.order(0), batches.order(1))
    file = SimpleNamespace(tokens=np.arange(40), path="file")
    offsets = [int(Windows(file, 8, seed=1).get(0, epoch)[0][0]) for epoch in range(200)]
    assert set(offsets) == set(range(8))  # every place to begin at, and no other
    assert len(Windows(SimpleNamespace(tokens=np.arange(9), path="file"), 8, seed=1)) == 1
    with pytest.raises(UserError, match="fewer than one window"):
        Windows(SimpleNamespace(tokens=np.arange(8), path="file"), 8, seed=1)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_processes(prepared, stage, world_size):
    whole = reader(prepared, stage, accumulation_steps=4).at(40)
    parts = [
        reader(prepared, stage, accumulation_steps=4, rank=r, world_size=world_size).at(40) for r in range(world_size)
    ]
    dealt = [parts[i % world_size][i // world_size] for i in range(4)]
    for a, b in zip(whole, dealt, strict=True):
        assert torch.equal(a.idx, b.idx) and torch.equal(a.targets, b.targets) and a.count == b.count


def test_masked_batches_count_answers_only(prepared):
    file = TokenFile("dataset/sft_train.bin")
    batches = reader(prepared, "sft", batch_size=8, accumulation_steps=1, block_size=32)
    total = 0
    for position in range(0, batches.samples_per_epoch - batches.samples_per_epoch % 8, 8):
        (batch,) = batches.at(position)
        assert batch.count == batch.loss_mask.sum() == (batch.loss_mask * (batch.targets != PADDING)).sum()
        total += batch.count
        for idx, targets, mask in zip(batch.idx, batch.targets, batch.loss_mask, strict=True):
            first = (idx == RESPONSE).nonzero()[0].item()
            assert mask[:first].sum() == 0 and mask[first] == 1
            assert targets[mask.bool()][-1] == EOS
    assert total <= file.header["n_loss_tokens"]


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_overlong_samples_are_dropped_or_cut(call, work, overlong):
    rows = [{"question": "q", "answer": "a" * (5 if i % 3 else 60)} for i in range(30)]
    rows = [{**row, "question": f"q{i}"} for i, row in enumerate(rows)]
    write_jsonl(work / "s.jsonl", rows)
    result = call("data.py", "s.jsonl", "--block_size", "16")
    assert "longer than block_size 16" in result.out
    file = TokenFile("dataset/sft_train.bin")
    n_long = int((np.diff(file.starts) > 17).sum())
    batches = reader(work, "sft", overlong=overlong)
    assert batches.datasets[0].n_overlong == n_long > 0
    assert batches.samples_per_epoch == len(file.starts) - 1 - (n_long if overlong == "drop" else 0)
    assert all(batch.idx.size(1) <= 16 for batch in batches.at(0))


def token_file(path, samples, **metadata) -> TokenFile:
    """A file of samples, each given as its loss mask: its tokens are 10, 11, ..."""
    with open(path, "wb+") as file:
        writer = TokenFileWriter(file, CharTokenizer("".join(map(chr, range(97, 141)))), has_samples=True)
        for mask in samples:
            writer.add(np.arange(10, 10 + len(mask)), 0, np.array(mask, dtype=np.uint8))
        writer.finish(metadata)
    return TokenFile(path)


def test_overlong_begins_above_block_size_plus_1(tmp_path):
    just_fits, too_long, answered_late = [0] * 4 + [1] * 5, [0] * 4 + [1] * 6, [0] * 9 + [1] * 3
    file = token_file(tmp_path / "file", [just_fits, too_long, answered_late])
    dropped, cut = Samples(file, 8, "drop"), Samples(file, 8, "cut")
    assert (len(dropped), dropped.n_overlong) == (1, 2) and len(dropped.get(0, 0)[0]) == 9
    assert (len(cut), cut.n_overlong) == (2, 2)  # nothing of the last one's answer would be left
    tokens, mask = cut.get(1, 0)
    assert tokens.tolist() == list(range(10, 19)) and mask.tolist() == too_long[:9]


def test_pairs_are_overlong_by_either_answer(tmp_path):
    short, just_fits, long = [0, 1, 1], [0] * 4 + [1] * 5, [0] * 4 + [1] * 6
    pairs = [short, long, long, short, just_fits, just_fits, short, short]
    dataset = Pairs(token_file(tmp_path / "file", pairs, has_pairs=True), 8)
    assert dataset.kept.tolist() == [2, 3] and dataset.n_overlong == 2
    assert [len(side[0]) for side in dataset.get(0, 0)[:2]] == [9, 9]


@pytest.mark.parametrize("format", [1, 3])
def test_token_files_of_another_format_are_refused(tmp_path, format):
    with pytest.raises(UserError, match=f"format {format} is not supported"):
        token_file(tmp_path / "file", [[0, 1]], format=format)


def test_token_ids_in_a_batch_are_inside_the_vocabulary():
    sample = (np.array([1, 2, 5]), None)  # the largest one is a target only
    assert collate([[sample]], 8, 6, 1).targets.tolist() == [[2, 5]]
    with pytest.raises(UserError, match="token id 5 in the data is outside the vocabulary of 5"):
        collate([[sample]], 8, 5, 1)


def test_datasets_of_a_curriculum_are_shuffled_apart(prepared):
    file = TokenFile("dataset/pretrain_train.bin")
    options = {"block_size": 16, "vocab_size": 500, "batch_size": 4, "accumulation_steps": 1, "seed": 1}
    first, second = np.split(TrainBatches([file, file], **options).order(0)[:, 1], 2)
    assert sorted(first) == sorted(second) and not np.array_equal(first, second)


def test_a_curriculum_passes_over_its_datasets_in_order(call, prepared):
    (prepared / "b.txt").write_text(make_text(4000, seed=5), encoding="utf-8")
    call("data.py", "b.txt", "--tokenizer", "dataset/tokenizer.json", "--output", "b", "--block_size", "16")
    files = [TokenFile("dataset/pretrain_train.bin"), TokenFile("b/pretrain_train.bin")]
    options = {"block_size": 16, "vocab_size": 500, "batch_size": 4, "accumulation_steps": 1, "seed": 1}
    batches = TrainBatches(files, **options)
    order = batches.order(0)[:, 0].tolist()
    assert order == sorted(order) and set(order) == {0, 1}
    first = TrainBatches(files[:1], **options)
    assert torch.equal(first.at(0)[0].idx, batches.at(0)[0].idx)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_sees_every_target_once(prepared, stage, world_size):
    file = TokenFile(f"dataset/{stage}_val.bin")
    options = {"block_size": 32, "vocab_size": 500, "batch_size": 4, "seed": 1, "n_samples": 0}
    parts = [ValidationBatches([file], **options, rank=r, world_size=world_size) for r in range(world_size)]
    count = sum(batch.count for part in parts for batch in part)
    assert count == (len(file.tokens) - 1 if stage == "pretrain" else file.header["n_loss_tokens"])


def test_partial_validation_is_the_same_part_every_time(prepared):
    file = TokenFile("dataset/pretrain_val.bin")
    options = {"block_size": 16, "vocab_size": 500, "batch_size": 4, "seed": 1, "n_samples": 12}
    batches = ValidationBatches([file], **options)
    first, second = list(batches), list(batches)
    assert len(first) == 3
    assert all(torch.equal(a.idx, b.idx) for a, b in zip(first, second, strict=True))
    other_seed = list(ValidationBatches([file], **{**options, "seed": 2}))
    assert all(torch.equal(a.idx, b.idx) for a, b in zip(first, other_seed, strict=True))
    beginning = torch.cat([batch.idx for batch in ValidationBatches([file], **{**options, "n_samples": 0})])[:12]
    assert not torch.equal(torch.cat([batch.idx for batch in first]), beginning)


def test_prefetching_gives_the_same_batches_and_passes_errors_on(prepared):
    batches = reader(prepared)
    ahead = prefetch_steps(batches, 8)
    for position in range(8, 80, batches.samples_per_step):
        assert torch.equal(next(ahead)[1].idx, batches.at(position)[1].idx)
    ahead.close()

    with pytest.raises(UserError, match="outside the vocabulary"):
        next(prefetch_steps(reader(prepared, vocab_size=8), 0))


def test_prefetch_yields_every_item_and_closing_it_ends_the_thread():
    assert list(prefetch(range(7), depth=2)) == list(range(7))
    assert list(prefetch([], depth=1)) == []
    before = threading.active_count()
    endless = prefetch(itertools.count())
    assert next(endless) == 0 and threading.active_count() == before + 1
    endless.close()
    assert threading.active_count() == before


def test_prefetch_makes_no_more_ahead_than_it_is_told():
    made = []
    ahead = prefetch((made.append(i) or i for i in itertools.count()), depth=3)
    next(ahead)
    time.sleep(0.2)
    assert 1 < len(made) <= 5  # the one that was taken, three that wait, and one more in hand
    ahead.close()


def test_on_policy_batches_are_made_when_they_are_asked_for():
    """They are drawn from the model as it is at that step."""
    asked = []
    batches = SimpleNamespace(at=lambda position: asked.append(position) or [], samples_per_step=8, is_on_policy=True)
    steps = prefetch_steps(batches, 16)
    for _ in range(2):
        next(steps)
        time.sleep(0.05)
    assert asked == [16, 24]


def test_target_counts_equal_a_dictionary_count(tmp_path):
    """In pieces of any size, from no token to millions."""
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, 300, n) for n in (1, 5, 0, 3_000_000, 70_000, *[2] * 50)]
    with open(tmp_path / "file", "wb") as file:
        tokenizer = CharTokenizer("".join(map(chr, range(1000, 1294))))  # and 6 special tokens
        writer = TokenFileWriter(file, tokenizer, has_samples=False)
        for ids in pieces:
            writer.add(ids, len(ids))
        expected = Counter(itertools.chain.from_iterable(ids.tolist() for ids in pieces))
        assert writer.counts.tolist() == [expected[i] for i in range(300)]
        assert writer.n_unknown == expected[UNKNOWN] and writer.counts.sum() == writer.n_tokens


@pytest.mark.parametrize("damage", ["truncate", "header", "length", "grow", "text", "empty"])
def test_damaged_token_files_are_refused_by_name(prepared, damage):
    path = prepared / "dataset" / "sft_train.bin"
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncate": data[:-10],
            "header": data[:20] + b"xxxx" + data[24:],
            "length": b"\xff" * 8 + data[8:],
            "grow": data + b"1",
            "text": b"just some text, nothing else",
            "empty": b"",
        }[damage]
    )
    with pytest.raises(UserError, match=r"sft_train\.bin"):
        TokenFile(path)


def peak_memory(script, *argv) -> float:
    """Peak resident memory of a script in a process of its own, in MB."""
    command = [sys.executable, ROOT / "bench" / "peak_memory.py", script, *argv]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) / 1e6


def test_memory_does_not_grow_with_the_corpus(work):
    piece = make_text(100_000).encode("utf-8")
    peaks = []
    for megabytes in (20, 60):
        Path("big.txt").write_bytes(piece * (megabytes * 1_000_000 // len(piece)))
        peaks.append(peak_memory(ROOT / "data.py", "big.txt", "--output", "o"))
    assert peaks[1] < peaks[0] + 30


def test_peak_memory_is_that_of_the_process_alone(work):
    """The parent holds 300 MB, which are part of what the system reports of its children (ru_maxrss)."""
    parent = b"x" * 300_000_000
    Path("small.py").touch()
    Path("large.py").write_text("text = len('0123456789') * 'x' * 10_000_000")
    small, large = peak_memory("small.py"), peak_memory("large.py")
    assert small < 50 and 95 < large - small < 120
    del parent


def test_packed_samples_give_the_gradient_of_padded_ones(prepared):
    """The same samples in fewer rows: the same sum of losses, the same gradient."""
    file = TokenFile("dataset/sft_train.bin")
    torch.manual_seed(0)
    shape = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(ModelConfig(**shape, vocab_size=file.header["vocab_size"]))
    found = []
    for pack_samples in (False, True):
        options = {"block_size": 64, "batch_size": 24, "seed": 1, "vocab_size": file.header["vocab_size"]}
        batches = TrainBatches([file], accumulation_steps=1, pack_samples=pack_samples, **options)
        (batch,) = batches.at(0)
        loss = model(batch.idx, batch.targets, batch.loss_mask, "sum", batch.documents)[1]
        model.zero_grad()
        loss.backward()
        found.append((batch, loss, [p.grad.clone() for p in model.parameters()]))
    (padded, loss, gradients), (packed, packed_loss, packed_gradients) = found
    assert packed.count == padded.count and packed.idx.numel() < padded.idx.numel()
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-3, atol=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 17), min_size=1, max_size=40))
def test_packing_loses_nothing_and_overfills_nothing(lengths):
    samples = [(np.full(length, i), None) for i, length in enumerate(lengths)]
    rows = pack(samples, 16)
    assert sorted(tokens[0] for row in rows for tokens, _ in row) == list(range(len(lengths)))
    used = [sum(len(tokens) - 1 for tokens, _ in row) for row in rows]
    assert max(used) <= 16
    assert len(rows) == 1 or sum(sorted(used)[:2]) > 16  # else two rows would fit into one


def test_documents_are_numbered_by_their_delimiters():
    a, bos, eos = 9, 2, 3
    assert document_ids(np.array([a, a, eos, bos, a, eos, a, bos, a])).tolist() == [1, 1, 1, 2, 2, 2, 3, 4, 4]
    assert document_ids(np.array([bos, a, bos, eos, eos, bos, a])).tolist() == [1, 1, 2, 2, 3, 4, 4]


def test_documents_of_text_are_masked_and_turns_of_a_conversation_are_not(prepared):
    """A conversation of two turns has <|eos|> inside; it is one document all the same."""
    text = (np.array([2, 9, 9, 3, 2, 9, 9, 9, 3]), None)
    chat = (np.array([4, 9, 5, 9, 3, 4, 9, 5, 9, 3]), np.array([0, 0, 0, 1, 1, 0, 0, 0, 1, 1]))
    batch = collate([[text], [chat]], 16, 20, 1, mask_documents=True)
    assert batch.documents[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 0]
    assert batch.documents[1].tolist() == [1] * 9
    assert collate([[text], [chat]], 16, 20, 1).documents is None
    assert collate([[chat, chat]], 32, 20, 1).documents[0].tolist() == [1] * 9 + [2] * 9
