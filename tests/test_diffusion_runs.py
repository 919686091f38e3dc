"""Masked diffusion from data to answers: training that resumes and distributes, inference, evaluation, the server."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import DATA, FAST, ROOT, TINY, make_text, read_log, run_script, write_jsonl
from processes import assert_close, curves, newest_log, train_on
from servers import serving
from test_compile import SHAPE
from torch._dynamo.utils import counters

from base.configuration import UserError
from model import GPT, ModelConfig
from serving.text_generator import GenerationConfig, load_text_generator
from text.token_files import TokenFile
from training.diffusion import DiffusionLoss, NoisyTrainBatches
from training.setup import read_configs
from weights.checkpointing import load_checkpoint, load_model

LOSS = ["--loss", "diffusion", "--optimizer", "adamw", "--answer_block", "4"]
DIFFUSION = [*LOSS, "--is_causal", "false"]
IN_BLOCKS = [*LOSS, "--is_causal", "true"]
SFT = '[["dataset/sft_train.bin", "dataset/sft_val.bin"]]'


def same_weights(a: str, b: str) -> bool:
    weights = [load_checkpoint(path)["model"] for path in (a, b)]
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("diffusion", [DIFFUSION, IN_BLOCKS], ids=["full", "blocks"])
@pytest.mark.parametrize(
    ("stage", "options"), [("pretrain", []), ("sft", []), ("sft", ["--pack_samples", "true"])], ids=str
)
def test_a_resumed_run_and_other_micro_batches_are_the_same_run(call, prepared, stage, options, diffusion):
    data = ["--dataset_path", f'[["dataset/{stage}_train.bin", "dataset/{stage}_val.bin"]]', "--from_checkpoint", ""]
    options = options or ["--dropout", "0.1"]
    run = ["-t", stage, *TINY, *FAST, *data, *diffusion, *options, "--eval_interval", "4", "--lr_decay_iters", "8"]
    call("train.py", *run, "--max_steps", "8", "--save_checkpoint_to", "whole")
    whole = curves(newest_log(prepared))
    newest_log(prepared).rename("whole.txt")
    call("train.py", *run, "--max_steps", "4", "--save_checkpoint_to", "parts")
    newest_log(prepared).rename("first.txt")
    last = f"parts/{stage}_last.pt"
    result = call("train.py", *run, "--max_steps", "8", "--from_checkpoint", last, "--save_checkpoint_to", "parts")
    assert result.status == 0, result.err
    assert same_weights(last, f"whole/{stage}_last.pt")
    assert curves(newest_log(prepared))["loss"] == whole["loss"][4:]
    newest_log(prepared).rename("second.txt")
    if "--dropout" not in options:  # whose random numbers come in the order of the micro-batches
        sizes = ["--batch_size", "2", "--gradient_accumulation_steps", "4", "--save_checkpoint_to", "cut"]
        assert call("train.py", *run, "--max_steps", "8", *sizes).status == 0
        cut = curves(newest_log(prepared))
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert cut["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)


@pytest.mark.parametrize("diffusion", [DIFFUSION, IN_BLOCKS], ids=["full", "blocks"])
def test_two_processes_are_the_same_run(call, prepared, diffusion):
    arguments = ["-t", "sft", *TINY, *FAST, "--dataset_path", SFT, "--from_checkpoint", "", *diffusion]
    arguments += ["--max_steps", "3", "--eval_interval", "3", "--n_expert", "2", "--n_expert_per_token", "1"]
    assert call("train.py", *arguments).status == 0
    alone = curves(newest_log(prepared))
    assert_close(train_on(2, prepared, *arguments), alone)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_compiled_model_is_one_graph(prepared, in_blocks):
    file = TokenFile("dataset/sft_train.bin")
    vocab_size = file.header["vocab_size"]
    batches = NoisyTrainBatches(
        [file],
        **{"batch_size": 6, "accumulation_steps": 1, "seed": 1, "pad_to": 32, "is_compiled": True, "block_size": 32},
        **{"vocab_size": vocab_size, "answer_block": 8, "mask_span": 1, "ends": (3,), "pack_samples": True},
        in_blocks=in_blocks,
    )
    model = GPT(ModelConfig(**SHAPE, vocab_size=vocab_size, is_causal=in_blocks, mask_token=True))
    torch._dynamo.reset()
    counters.clear()
    model.compile(backend="aot_eager")
    loss = DiffusionLoss(vocab_size)
    for step in range(6):
        loss(model, batches.at(6 * step)[0], "sum").backward()
    # the second for any number of rows, which packed ones vary in
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask_token", "true"], "loss next_token cannot train: --loss diffusion does"),
        (["--is_causal", "false"], "--loss diffusion trains with full attention"),
        (["--is_causal", "false", "--mask_token", "true"], "loss next_token cannot train: --loss diffusion does"),
        ([*DIFFUSION, "--answer_block", "0"], "answer_block must be at least 1"),
        ([*DIFFUSION, "--attention", "linear"], "is_causal must be true"),
        ([*IN_BLOCKS, "--attention", "full,linear"], "takes attention full and latent, layer 2 has linear"),
        ([*IN_BLOCKS, "--n_future", "2"], "a model of masked diffusion has no n_future"),
    ],
)
def test_what_cannot_be_trained_is_refused(call, prepared, options, message):
    result = call("train.py", "-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "1", *options)
    assert result.status and message in result.err and "Traceback" not in result.err


def test_a_causal_model_becomes_one_of_diffusion(call, prepared):
    run = ["-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "1"]
    assert call("train.py", *run).status == 0
    start = ["--from_checkpoint", "checkpoint/pretrain.pt", "--loss", "diffusion", "--is_causal", "false"]
    other, slow = ["--stage", "other"], ["--learning_rate", "1e-9", "--muon_learning_rate", "1e-9"]
    result = call("train.py", *run, *start, *other, *slow)
    assert result.status == 0 and "is_causal True -> False" in result.out + result.err, result.err
    causal, ready = load_checkpoint("checkpoint/pretrain.pt"), load_checkpoint("checkpoint/other.pt")
    assert ready["model_config"]["mask_token"] and not ready["model_config"]["is_causal"]
    for name, weight in causal["model"].items():
        torch.testing.assert_close(ready["model"][name], weight, atol=1e-6, rtol=0)
    mean = causal["model"]["token_embedding.weight"].mean(0, keepdim=True)
    torch.testing.assert_close(ready["model"]["mask_embedding.weight"], mean, atol=1e-6, rtol=0)

    model, V = load_model(causal, "", is_causal=False, mask_token=True).eval(), causal["model_config"]["vocab_size"]
    alike = GPT(ModelConfig(**causal["model_config"] | {"is_causal": False})).eval()
    alike.load_state_dict(causal["model"])
    idx = torch.arange(3, 11)[None]
    assert torch.equal(model(idx)[0], alike(idx)[0])  # the same weights, full attention
    with torch.no_grad():
        alike.token_embedding.weight[0] = mean
        masked, zero = model(torch.tensor([[5, V, 7]]))[0], alike(torch.tensor([[5, 0, 7]]))[0]
    torch.testing.assert_close(masked[..., 1:], zero[..., 1:])  # (embeddings are tied: row 0 is a logit's, too)


def test_masked_diffusion_is_for_texts_and_no_teacher(call, prepared):
    result = call("train.py", "--problem", "sort", "--max_steps", "1", "--mask_token", "true")
    assert result.status == 1 and "mask_token is for masked diffusion of texts" in result.err
    result = call("train.py", "--problem", "recall", "--max_steps", "1", "--mask_token", "true")
    assert result.status == 1 and "mask_token is for masked diffusion of texts" in result.err
    run = ["-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "1"]
    assert call("train.py", *run, *DIFFUSION, "--stage", "full").status == 0
    result = call("train.py", *run, "--loss", "distill", "--teacher", "checkpoint/full.pt", "--stage", "other")
    assert result.status == 1 and "full attention: it sees the next token" in result.err


@pytest.mark.parametrize(
    ("trained", "options", "message"),
    [
        ([], ["--max_steps", "2"], "takes another --stage name"),  # the same stage
        ([], ["--stage", "other", "--use_lora", "true"], "has no mask token, and an adapter adds none"),
        (["--n_future", "2"], ["--stage", "other"], "add --n_future 1"),
        ([], ["--stage", "other", "--n_future", "2"], "add --n_future 1"),
        (
            ["--attention", "linear"],
            ["--stage", "other"],
            "cannot become a model of masked diffusion: attention linear",
        ),
    ],
)
def test_a_causal_model_that_cannot_become_one_is_refused(call, prepared, trained, options, message):
    run = ["-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "1"]
    assert call("train.py", *run, *trained).status == 0
    start = ["--from_checkpoint", "checkpoint/pretrain.pt", "--loss", "diffusion"]
    result = call("train.py", *run, *start, *options, "--is_causal", "false")
    assert result.status == 1 and message in result.err and result.err.count("\n") == 1
    if trained == ["--n_future", "2"]:  # the advice
        assert call("train.py", *run, *start, *options, "--is_causal", "false", "--n_future", "1").status == 0
    elif "--n_future" not in options:  # in blocks, likewise
        result = call("train.py", *run, *start, *options)
        message = message.replace("diffusion: attention linear", "diffusion: masked diffusion in blocks")
        assert result.status == 1 and message in result.err


def test_the_preset_has_the_shape_of_the_causal_model():
    """So a quickstart's model may be its start, and one of another shape, too: the shape is a default."""
    blocks, full, causal = (read_configs(name, None, {}) for name in ("block_diffusion", "diffusion", "pretrain"))
    assert full.model == {"is_causal": False} and blocks.model == {"is_causal": True}
    shape = json.loads((ROOT / "config" / "model.json").read_text())
    assert blocks.model_defaults == full.model_defaults == causal.model_defaults == shape


def test_neither_form_becomes_the_other(call, prepared):
    run = ["-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "1"]
    for diffusion, other, preset in ((DIFFUSION, IN_BLOCKS, "diffusion"), (IN_BLOCKS, DIFFUSION, "block_diffusion")):
        result = call("train.py", *run, *diffusion, "--stage", preset, "--answer_block", "500")
        form = "in blocks of " if preset == "block_diffusion" else "with full attention, "
        assert result.status == 0 and f"masked diffusion {form}" in result.out + result.err
        assert "answer_block 500 is more than the window" in result.out + result.err
        start = ["--from_checkpoint", f"checkpoint/{preset}.pt", "--stage", "next"]
        result = call("train.py", *run, *other, *start)
        assert result.status == 1 and f"-t {preset} and -t {preset}_sft go on with it" in result.err
        assert call("train.py", "-t", preset, *FAST, *DATA, "--max_steps", "1", *start).status == 0  # the advice


def test_a_damaged_causal_model_is_no_start(call, prepared):
    run = ["-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "1"]
    assert call("train.py", *run).status == 0
    causal = load_checkpoint("checkpoint/pretrain.pt")
    for embedding in ({}, {"token_embedding.weight": torch.ones(())}):
        weights = {name: weight for name, weight in causal["model"].items() if name != "token_embedding.weight"}
        with pytest.raises(UserError, match=r"do not fit the model: token_embedding\.weight"):
            load_model(causal | {"model": weights | embedding}, "x.pt", is_causal=False, mask_token=True)


# ------------------------------------------------------------------------------------------------------ answers


ANSWERS = {"a": "yes", "b": "no, never", "c": "may be"}


@pytest.fixture(scope="module", params=["false", "true"], ids=["full", "blocks"])
def folder(tmp_path_factory, request):
    """A model, causal or not, that was taught what to say to a, to b, to c; and to repeat what was said before."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "dataset").mkdir()
    (folder / "dataset" / "pretrain.txt").write_text(make_text(2000) + "yes no, never may be abcde", encoding="utf-8")
    rows = [{"question": q + "!" * i, "answer": a} for i in range(12) for q, a in ANSWERS.items()]
    for i, (q, a) in itertools.product(range(12), ANSWERS.items()):
        said = [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        rows.append({"messages": [*said, {"role": "user", "content": "e" + "!" * i}, said[1]]})
    write_jsonl(folder / "dataset" / "sft.jsonl", rows)
    prepared = run_script("data.py", "--block_size", "48", cwd=folder)
    assert prepared.status == 0, prepared.err
    shape = ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "48", "--answer_block", "8"]
    args = [
        "-t",
        "sft",
        *shape,
        *FAST,
        "--dataset_path",
        SFT,
        "--from_checkpoint",
        "",
        *LOSS[:-2],
        "--is_causal",
        request.param,
    ]
    args += ["--gradient_accumulation_steps", "1", "--batch_size", "16", "--learning_rate", "0.003", "--min_lr", "0"]
    args += [
        "--rope_theta",
        "100",
        "--max_steps",
        "300",
        "--eval_interval",
        "300",
        "--eval_iters",
        "1",
        "--pack_samples",
        "false",
    ]
    result = run_script("train.py", *args, cwd=folder)
    assert result.status == 0, result.err
    assert "val bound, at most" in result.out + result.err
    assert read_log(newest_log(folder), "val")[-1]["is_bound"] is True
    return folder


@pytest.fixture
def trained(folder, call, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_a_trained_model_answers_everywhere(trained, call):
    model = ["-m", "checkpoint/sft.pt"]
    for question, answer in ANSWERS.items():
        for options in ([], ["--steps", "4"], ["--block", "8"]):
            result = call("inference.py", "-i", *model, "-t", "0", "-p", question, *options)
            assert (result.status, result.out) == (0, answer + "\n"), result.err
    limited = call("inference.py", "-i", *model, "-t", "0", "-p", "b", "-l", "7")
    assert limited.out == "no, \n"

    generator = load_text_generator("checkpoint/sft.pt", "cpu", None)
    assert generator.instruct and generator.answer_block == 8
    greedy = GenerationConfig(temperature=0.0)
    for earlier in ANSWERS:  # a conversation: what is asked for stands in an earlier turn
        history = [{"role": "user", "content": earlier}, {"role": "assistant", "content": ANSWERS[earlier]}]
        assert "".join(generator.answer("e!", greedy, history)) == ANSWERS[earlier]
    pieces = list(generator.answer("c", greedy))
    assert len(pieces) > 1 and "".join(pieces) == ANSWERS["c"]
    drawn = [["".join(generator.answer("c", GenerationConfig(temperature=2.0, seed=s))) for _ in "12"] for s in (1, 2)]
    assert drawn[0][0] == drawn[0][1] != drawn[1][0]

    rows = [{"question": question, "answer": answer} for question, answer in ANSWERS.items()]
    write_jsonl(trained / "held_out.jsonl", rows)
    result = call("evaluate.py", "--questions", "held_out.jsonl", *model)
    assert "exact match: 100.0% (3/3)" in result.out

    result = run_script("bench/denoising_steps.py", "held_out.jsonl", *model, "--steps", "8", "1", cwd=trained)
    assert result.status == 0 and "checkpoint/sft.pt, 8" in result.out and "100.0%" in result.out, result.err

    text = ["evaluate.py", "dataset/pretrain.txt", *model]
    assert call(*text).status == 0 and not Path("perplexity.png").exists()

    refusals = [
        ([*text, "-o", "p.png"], "a model of masked diffusion has no loss by position"),
        (["inference.py", "-i", *model, "-p", "a", "--draft", "lookup"], "--draft is for models that generate token"),
        (["inference.py", "-i", *model, "-p", "a", "--compile"], "--compile is for models that generate token"),
        (["inference.py", "-i", *model, "-p", "a", "--weights", "auto"], "--weights auto is for models"),
        (["inference.py", "-i", *model, "-p", "a", "--steps", "0"], "steps must be at least 1"),
        (["evaluate.py", "dataset/pretrain.txt", *model, "--stride", "4"], "masked diffusion has a bound"),
        (["convert.py", "checkpoint/sft.pt", "folder"], "Hugging Face: no model there"),
        (["convert.py", "checkpoint/sft.pt", "model.gguf"], "no model there computes"),
        (["convert.py", "checkpoint/sft.pt", "page.html"], "masked diffusion"),
    ]
    for command, message in refusals:
        result = call(*command)
        assert result.status and message in result.err and "Traceback" not in result.err, command
    assert call("inference.py", "-i", *model, "-p", "a", "-t", "0", "--weights", "int8").out == "yes\n"


def test_the_server_answers_with_it(trained):
    with serving(trained, "-m", "checkpoint/sft.pt", "--rows", "2") as server:
        ask = lambda text, **fields: server.post(  # noqa: E731
            "/v1/chat/completions", messages=[{"role": "user", "content": text}], temperature=0, **fields
        )
        for question, answer in ANSWERS.items():
            choice = ask(question).json["choices"][0]
            assert choice["message"]["content"] == answer and choice["finish_reason"] == "stop"
        assert ask("b", max_tokens=3).json["choices"][0]["finish_reason"] == "length"
        assert ask("b", steps=2).json["choices"][0]["message"]["content"] == ANSWERS["b"]
        entries = ask("a", logprobs=True, top_logprobs=2).json["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in entries] == list("yes") and all(e["logprob"] > -1 for e in entries)
        assert all(e["top_logprobs"][0]["token"] == e["token"] for e in entries)
        yes = load_text_generator("checkpoint/sft.pt", "cpu", True).tokenizer.encode("y").tolist()[0]
        assert "y" not in ask("a", logit_bias={str(yes): -100}).json["choices"][0]["message"]["content"]
        lines = ask("c", stream=True).body.decode().splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(texts) == ANSWERS["c"] and len(texts) > 4
        n = [choice["message"]["content"] for choice in ask("b", n=5).json["choices"]]
        assert n == [ANSWERS["b"]] * 5  # more than there are rows
        echoed = server.post("/v1/completions", prompt="a", echo=True, logprobs=1)
        assert echoed.status == 400 and "masked diffusion" in echoed.json["error"]["message"]
        assert server.number("nano_running") == 0 and server.number("nano_generated_tokens_total") > 50


@pytest.mark.parametrize("diffusion", [DIFFUSION, IN_BLOCKS], ids=["full", "blocks"])
def test_a_text_is_continued_and_its_bound_measured(call, prepared, diffusion):
    shape = ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "16"]
    run = ["-t", "pretrain", *shape, *FAST, *DATA, "--max_steps", "100", "--learning_rate", "0.01", "--eval_iters", "0"]
    run += ["--eval_interval", "100", "--sample_tokens", "8"]
    assert call("train.py", *run, "--stage", "c").status == 0
    newest_log(prepared).unlink()
    assert call("train.py", *run, *diffusion, "--stage", "d").status == 0
    model = ["-m", "checkpoint/d.pt"]
    results = [call("inference.py", *model, "-p", "the cat", "--seed", "1", "-l", "40") for _ in range(2)]
    assert results[0] == results[1] and len(results[0].out) == 34
    assert not load_text_generator("checkpoint/d.pt", "cpu", None).instruct  # whatever the stage is called
    (prepared / "val.txt").write_text(make_text(3000, seed=5), encoding="utf-8")
    results = [call("evaluate.py", "val.txt", *model) for _ in range(2)]
    assert results[0] == results[1] and "overall: an upper bound on the loss, " in results[0].out
    for kind in ("int8", "int4"):  # whose output layer computes logits alone
        rounded = call("evaluate.py", "val.txt", *model, "--weights", kind)
        assert rounded.status == 0 and "overall: an upper bound on the loss, " in rounded.out, rounded.err
    both = call("evaluate.py", "val.txt", "-m", "checkpoint/d.pt", "checkpoint/c.pt")
    assert "checkpoint/c.pt: loss " in both.out and "positions" not in both.out
    bound = read_log(newest_log(prepared), "val")[-1]["val_loss"]
    found = float(results[0].out.split("loss, ")[1].split(" ")[0])
    assert abs(found - bound) < 0.3
