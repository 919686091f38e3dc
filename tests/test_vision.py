"""A model that sees: patches, their places among the tokens, and training, resuming and answering with images."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, asked_by, write_jsonl
from PIL import Image
from processes import assert_close, curves, newest_log, train_on
from test_memory import LiveTensors, train_two_steps, without_waste
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import plot_attention
from base.configuration import UserError
from inference import Session
from model import GPT, ModelConfig
from serving.text_generator import GenerationConfig, TextGenerator, load_text_generator
from text.batches import TrainBatches
from text.template import TEMPLATES
from text.token_files import TokenFile
from text.tokenizer import PADDING, BPETokenizer, CharTokenizer
from training import memory
from training.engine import Engine
from training.optimizer import muon_matrices, rows_of_fused_matrices
from training.setup import build_run
from vision.encoder import patches
from weights.checkpointing import load_checkpoint, save_checkpoint

SIZE, PATCH = 16, 4
N = (SIZE // PATCH) ** 2
V = 50


def make_model(**fields) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": V, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_vision_layer": 1}
    return GPT(ModelConfig(**{**shape, "image_size": SIZE, "patch_size": PATCH, **fields}))


def random_images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def a_prompt(n_rows: int = 1) -> torch.Tensor:
    """(n_rows, N + 6) ids: a token, an image, five more tokens."""
    return torch.cat((torch.full((n_rows, 1), 4), torch.full((n_rows, N), V), torch.arange(7, 12).expand(n_rows, 5)), 1)


# ------------------------------------------------------------------------------------------------------ the encoder


def test_patches_are_those_of_unfold():
    images = torch.randn(3, 3, SIZE, SIZE)
    torch.testing.assert_close(patches(images, PATCH), F.unfold(images, PATCH, stride=PATCH).mT)


def test_projected_patches_equal_a_convolution():
    model = make_model(n_vision_layer=0)
    images, projection = random_images(2), model.vision.projection
    kernel = projection.weight.view(-1, 3, PATCH, PATCH) / math.sqrt(3 * PATCH * PATCH)
    expected = F.conv2d(6 - images.float() / 42.5, kernel, projection.bias, stride=PATCH).flatten(2).mT
    torch.nn.init.normal_(model.vision.position)
    torch.testing.assert_close(model.vision(images), expected + model.vision.position)


def test_patches_go_to_their_places_in_order():
    """Two images in one row and one in the next: each place reads the patch that a loop puts there."""
    model, images = make_model().eval(), random_images(3)
    idx = torch.full((2, 2 * N + 3), 9)
    idx[0, 1 : 1 + N] = idx[0, 2 + N : 2 + 2 * N] = idx[1, 3 : 3 + N] = V
    x = model.embed(idx, images)
    vectors = [model.vision(image[None])[0] for image in images]
    left = iter(torch.cat(vectors))
    for row, at in np.ndindex(*idx.shape):
        expected = next(left) if idx[row, at] == V else model.token_embedding.weight[9]
        torch.testing.assert_close(x[row, at], expected)


def test_a_patch_sees_all_others_in_the_encoder():
    images = random_images(1)
    with torch.no_grad():
        before = make_model().vision(images)[0]
        images[0, :, -1, -1] = 255 - images[0, :, -1, -1]  # in the last patch
        after = make_model().vision(images)[0]
    assert not torch.allclose(before[0], after[0])


def test_places_and_images_must_agree():
    model = make_model()
    with pytest.raises(UserError, match="32 patches of 2 images for 16 places"):
        model(a_prompt(), images=random_images(2))
    with pytest.raises(UserError, match="outside the vocabulary"):
        model(a_prompt())
    with pytest.raises(UserError, match="reads text alone"):
        make_model(image_size=0)(a_prompt(), images=random_images(1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 18}, "divisible by patch_size"),
        ({"block_size": 16}, "16 patches, the window"),
        ({"is_causal": False}, "is_causal to true"),
    ],
)
def test_shapes_that_cannot_work_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        make_model(**fields)


def test_gradients_reach_the_projection_and_the_positions():
    model = make_model()
    idx = a_prompt()
    targets = torch.where(idx == V, PADDING, idx).roll(-1)
    mask = torch.zeros(idx.shape)
    mask[:, -3:] = 1
    model(idx, targets, mask, images=random_images(1))[1].backward()
    for name, p in model.vision.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_no_images_give_every_weight_a_gradient_all_the_same():
    """What DDP asks for: a process whose rows are text alone uses all weights, too."""
    model = make_model()
    idx = torch.arange(6, 16)[None]
    model(idx, idx, images=random_images(0))[1].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().sum() == 0 for p in model.vision.parameters())


def test_muon_takes_the_matrices_of_the_encoders_blocks():
    """Queries, keys and values each for itself; the projection is to patches what an embedding is to tokens."""
    model = make_model()
    matrices = {name: p for name, p in muon_matrices(model).items() if name.startswith("vision.")}
    blocks = {name: p for name, p in model.vision.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    assert blocks and matrices == {f"vision.{name}": p for name, p in blocks.items()}
    rows = {name: rows_of_fused_matrices(model.config, name, p.size(0)) for name, p in matrices.items()}
    heads = model.config.n_head, model.config.n_kv_head, model.config.n_kv_head
    assert rows["vision.blocks.0.attention.qkv.weight"] == [n * model.config.head_dim for n in heads]
    assert all(sum(rows[name]) == p.size(0) for name, p in matrices.items())


def test_the_answer_depends_on_the_order_of_the_patches():
    model, images = make_model().eval(), random_images(1)
    moved = torch.cat((images[..., SIZE // 2 :], images[..., : SIZE // 2]), -1)
    with torch.no_grad():
        one, other = (model(a_prompt(), images=image)[0][:, -1] for image in (images, moved))
    assert not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "latent", "linear"])
def test_cached_decoding_equals_reading_everything_again(kind):
    model = make_model(attention=[kind], head_dim=16).eval()
    for p in model.parameters():  # larger than at the start, so that tokens differ
        p.data.mul_(3)
    idx, images = a_prompt(2), random_images(2)
    runs = [
        torch.stack([*model.generate(idx, 12, temperature=0.0, use_cache=cached, images=images)], 1)
        for cached in (True, False)
    ]
    assert torch.equal(*runs)
    with torch.no_grad():
        logits = model(torch.cat((idx, runs[0]), 1), images=images)[0][:, idx.size(1) - 1 : -1]
    assert torch.equal(logits.argmax(-1), runs[0])


def test_generation_with_an_image_ends_with_the_window():
    model = make_model()
    assert len([*model.generate(a_prompt(), 1000, images=random_images(1), repetition_penalty=1.5)]) == 64 - (N + 6) + 1


def test_a_compiled_model_is_one_graph():
    """Of images and text together, as torch.compile takes it; another batch of the same shape is no further graph."""
    model, n_graphs = make_model(), []

    def backend(graph, inputs):
        n_graphs.append(len(inputs))
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed in (0, 1):
        images, idx = random_images(2, seed), a_prompt(2)
        torch.testing.assert_close(compiled(idx, images=images)[0], model(idx, images=images)[0])
    assert len(n_graphs) == 1


def test_operations_are_those_that_torch_counts():
    """Forward and backward of a sequence with an image, by torch's own counter, attention included."""
    model = make_model(n_vision_layer=2, is_causal=True)
    text = make_model(image_size=0)
    idx = torch.randint(0, V, (1, 64))
    seen = idx.clone()
    seen[0, 1 : 1 + N] = V
    counts = []
    for net, ids, images in ((model, seen, random_images(1)), (text, idx, None)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            net(ids, idx, images=images)[1].backward()
        counts.append(counter.get_total_flops())
    ours = 64 * (model.flops_per_token(64) - text.flops_per_token(64))
    first = 2 * N * 3 * PATCH * PATCH * 32  # pixels need no gradient: the projection's backward pass is half as much
    assert ours - first == pytest.approx(counts[0] - counts[1], rel=0.02)


# ------------------------------------------------------------------------------------------------------ from end to end


@pytest.mark.real("trains on handwritten digits")
def test_handwritten_digits_are_read():
    """Of 360 that are held out, 97% at least; images alone tell them apart: the question is always the same."""
    pytest.importorskip("sklearn", reason="needs pip install scikit-learn")
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "vision_accuracy.py", "digits"], capture_output=True, text=True
    )
    right = int(re.search(r"exact match: .* \((\d+)/360\)", done.stdout)[1])
    assert right >= 0.97 * 360


COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}
SHAPE = ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "48", "--image_size", "8"]
SHAPE += ["--patch_size", "4", "--n_vision_layer", "1"]
FAST = ["--batch_size", "16", "--max_steps", "6", "--eval_interval", "100", "--compile", "false", "--device", "cpu"]


@pytest.fixture
def coloured(work, call):
    """Pictures of which one half has a colour, prepared: 160 to train on, 40 held out; a twelfth of text alone."""
    rng, rows = np.random.default_rng(0), {"vision": [], "vision_held_out": []}
    (work / "p").mkdir()
    for i in range(200):
        name = list(COLOURS)[i % 4]
        pixels = np.full((8, 8, 3), 128) + rng.integers(-9, 10, (8, 8, 3))
        side = slice(0, 4) if rng.integers(2) else slice(4, 8)
        pixels[:, side] = np.array(COLOURS[name]) + rng.integers(-15, 16, 3)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(work / "p" / f"{i}.png")
        row = {"image": f"p/{i}.png", "question": "Which colour?", "answer": name}
        rows["vision" if i < 160 else "vision_held_out"].append(row)
    rows["vision"] += [{"question": f"{i} {i}", "answer": f"{i}"} for i in range(16)]
    for name, lines in rows.items():
        write_jsonl(work / f"{name}.jsonl", lines)
    result = call("data.py", "vision.jsonl", "--image_size", "8", "--patch_size", "4", "--block_size", "48")
    assert result.status == 0, result.err
    return work


def test_a_trained_model_answers_by_what_it_sees(coloured, call):
    result = call("train.py", "-t", "vision", *SHAPE, *FAST, "--max_steps", "200")
    assert result.status == 0, result.err
    result = call(
        "evaluate.py", "--questions", "vision_held_out.jsonl", "-m", "checkpoint/vision.pt", "--out", "a.jsonl"
    )
    right = int(re.search(r"exact match: .* \((\d+)/40\)", result.out)[1])
    assert right >= 36
    assert json.loads((coloured / "a.jsonl").read_text().splitlines()[0])["image"] == "p/160.png"

    answer = call("inference.py", "-i", "-m", "vision", "--image", "p/160.png", "-p", "Which colour?", "-t", "0")
    assert (answer.out, answer.err) == ("red\n", "")
    generator = load_text_generator("checkpoint/vision.pt", "cpu", True)
    red, blue = (generator.open_image(f"p/{i}.png") for i in (160, 162))  # two turns, each with its own image
    history = [{"role": "user", "content": "Which colour?", "image": red}, {"role": "assistant", "content": "red"}]
    ids = generator.prompt_ids("Which colour?", history, image=blue)
    assert ids.count(generator.tokenizer.vocab_size) == 4  # the older turn is left out: it would fill the window
    config = GenerationConfig(temperature=0.0)
    assert "".join(generator.answer("Which colour?", config, history, image=blue)) == "blue"


def test_a_resumed_run_is_exact(coloured, call):
    whole = [*SHAPE, *FAST, "--save_interval", "3", "--log_interval", "1", "--dropout", "0.1"]
    assert call("train.py", "-t", "vision", *whole).status == 0
    expected = load_checkpoint("checkpoint/vision_last.pt")["model"]
    shutil.rmtree(coloured / "checkpoint")
    assert call("train.py", "-t", "vision", *whole, "--max_steps", "3", "--lr_decay_iters", "6").status == 0
    result = call("train.py", "-t", "vision", *whole, "--from_checkpoint", "checkpoint/vision_last.pt")
    assert result.status == 0, result.err
    weights = load_checkpoint("checkpoint/vision_last.pt")["model"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert "vision.projection.weight" in weights


def test_the_drawn_attention_is_what_the_answer_looks_at(coloured, call, monkeypatch):
    """Shares of attention to patches, against weights computed where the model itself asks for attention."""
    assert call("train.py", "-t", "vision", *SHAPE, *FAST).status == 0
    argv = ["-m", "checkpoint/vision.pt", "--image", "p/160.png", "-p", "Which colour?"]
    result = call("plot_attention.py", *argv)
    answer = call("inference.py", "-i", *argv, "-t", "0").out.strip()
    assert result.status == 0 and result.out.startswith(f"attention.png: {answer}"), result.err
    assert Image.open("attention.png").size[0] > 100
    result = call("plot_attention.py", *argv, "--image", "p/162.png")
    assert result.status == 1 and "one image goes with a question" in result.err

    generator = load_text_generator("checkpoint/vision.pt", "cpu", True)
    image = generator.open_image("p/160.png")
    tokens, looks = plot_attention.patch_attention(generator, "Which colour?", image)
    ids, drawn = generator.prompt_ids("Which colour?", image=image), []
    list(generator.answer("Which colour?", GenerationConfig(temperature=0.0), drawn=drawn, image=image))
    assert len(tokens) == len(drawn)
    first = len(ids) - 1  # predicts the answer's first token
    seen, sdpa = [], F.scaled_dot_product_attention

    def recording(q, k, *args, **kwargs):
        T = q.size(2)
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
        seen.append(scores.softmax(-1)[0].mean(0))
        return sdpa(q, k, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    with torch.no_grad():
        generator.model(torch.tensor([[*ids, *drawn[:-1]]]), images=torch.from_numpy(image)[None])
    seen = seen[1:]  # without the encoder's own block
    patches_at = slice(len(ids) - 5, len(ids) - 1)  # before the mark of the answer
    expected = torch.stack([weights[first:, patches_at] for weights in seen])
    torch.testing.assert_close(torch.from_numpy(looks).flatten(2), expected)


@pytest.mark.parametrize("ending", [None, -1, -2])
def test_characters_of_several_tokens_are_drawn_whole(monkeypatch, ending):
    """None: <|eos|> ends the answer; else it is cut there, inside of the last character."""
    tokenizer = BPETokenizer.train(["What is at the top left?"], 270)
    generator = TextGenerator(make_model(vocab_size=tokenizer.vocab_size), tokenizer, torch.device("cpu"), True)
    ids = tokenizer.encode("green 绿圆").tolist()
    ids = [*ids, tokenizer.eos] if ending is None else ids[:ending]
    assert len(ids) >= 10
    monkeypatch.setattr(generator, "answer", lambda *_, drawn, **__: iter(drawn.extend(ids) or ()))
    tokens, _ = plot_attention.patch_attention(generator, "What?", random_images(1)[0].numpy())
    assert len(tokens) == len(ids) and not any("\ufffd" in token for token in tokens[:-1])
    assert "".join(tokens) == ("green 绿圆(end)" if ending is None else tokenizer.decode(ids))


@pytest.mark.parametrize("options", [["--pack_samples", "true"], ["--gradient_accumulation_steps", "4"]])
def test_packing_and_accumulation_give_the_same_loss_and_gradients(coloured, options):
    """The same 64 samples as one batch, in four, and side by side in fewer rows."""

    def gradients(*argv):
        asked = asked_by("-t", "vision", *SHAPE, *FAST, *argv)
        run = build_run(asked, Engine(asked.training))
        micro_batches = run.batches.at(0)
        count = sum(batch.count for batch in micro_batches)
        loss = sum(run.engine.forward_backward(run.loss, batch, count, False) for batch in micro_batches)
        return loss, {name: p.grad for name, p in run.model.named_parameters()}

    size = "16" if options[0].startswith("--grad") else "64"
    (loss, expected), (ours, found) = gradients("--batch_size", "64"), gradients(*options, "--batch_size", size)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [[], ["--fsdp", "true"]])
def test_two_processes_train_as_one_does(coloured, call, options):
    """Also where one of them has rows of text alone, of which every weight must take part all the same."""
    arguments = ["-t", "vision", *SHAPE, *FAST, "--batch_size", "1", "--gradient_accumulation_steps", "2"]
    arguments += ["--max_steps", "30", "--eval_interval", "30", "--optimizer", "adamw"]
    assert call("train.py", *arguments).status == 0
    one = curves(newest_log(coloured))
    assert len(one["loss"]) == 30
    assert_close(one, train_on(2, coloured, *arguments, *options))


def test_patches_are_never_targets(coloured):
    batches = TrainBatches(
        [TokenFile("dataset/vision_train.bin")],
        block_size=48,
        vocab_size=40,
        batch_size=32,
        accumulation_steps=1,
        seed=0,
        image_size=8,
    )
    vocab_size = TokenFile("dataset/vision_train.bin").header["vocab_size"]
    batches.vocab_size = vocab_size
    (batch,) = batches.at(0)
    assert (batch.idx == vocab_size).sum() == 4 * len(batch.images) > 0
    assert batch.targets.max() < vocab_size
    follows = (batch.idx == vocab_size).roll(-1, 1)  # whose next is a patch
    follows[:, -1] = False
    assert not batch.loss_mask[follows].any()


def test_a_text_model_learns_to_see(coloured, call):
    """From a checkpoint of text alone: its weights are kept, and the encoder is new."""
    write_jsonl(coloured / "sft.jsonl", [{"question": f"q {i}", "answer": "red"} for i in range(40)])
    assert call("data.py", "sft.jsonl", "--block_size", "48").status == 0
    text = [*SHAPE[:8], *FAST, "--from_checkpoint", ""]
    assert call("train.py", "-t", "sft", *text).status == 0
    asked = asked_by("-t", "vision", *FAST, *SHAPE[8:], "--from_checkpoint", "checkpoint/sft.pt")
    run = build_run(asked, Engine(asked.training))
    before = load_checkpoint("checkpoint/sft.pt")["model"]
    weights = run.model.state_dict()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert set(weights) - set(before) == {name for name in weights if name.startswith("vision.")}

    lora = call("train.py", "-t", "vision", *FAST, *SHAPE[8:], "--from_checkpoint", "sft", "--use_lora", "true")
    assert lora.status == 1 and "train an encoder with all weights first" in lora.err
    result = call("convert.py", "checkpoint/sft.pt", "out.html")
    assert result.status == 0, result.err
    result = call("inference.py", "-i", "-m", "checkpoint/sft.pt", "--image", "p/0.png", "-p", "q")
    assert result.status == 1 and "reads text alone" in result.err
    result = call("evaluate.py", "--questions", "vision_held_out.jsonl", "-m", "checkpoint/sft.pt")
    assert result.status == 1 and "line 1: a question about an image" in result.err


def test_a_model_that_sees_trains_on(coloured, call):
    """By the preset, whose sizes are for new encoders; and on text alone, where the encoder stays as it is."""
    assert call("train.py", "-t", "vision", *SHAPE, *FAST, "--n_vision_layer", "1").status == 0
    on = ["--from_checkpoint", "checkpoint/vision_last.pt", *FAST]
    result = call("train.py", "-t", "vision", *on, "--max_steps", "8")
    assert result.status == 0, result.err
    teacher = ["--loss", "distill", "--stage", "small", "--teacher"]
    result = call("train.py", "-t", "vision", *on, *teacher, "checkpoint/vision.pt")
    assert result.status == 0, result.err

    seeing = load_checkpoint("checkpoint/vision_last.pt")["model"]
    pairs = [{"prompt": f"q {i}", "chosen": "red", "rejected": "blue"} for i in range(40)]
    write_jsonl(coloured / "dpo.jsonl", pairs)
    write_jsonl(coloured / "sft.jsonl", [{"question": row["prompt"], "answer": "red"} for row in pairs])
    for stage in ("sft", "dpo"):
        options = ["--block_size", "48", "--tokenizer", "checkpoint/vision.pt"]
        assert call("data.py", f"{stage}.jsonl", *options).status == 0
        train_on(
            2,
            coloured,
            "-t",
            stage,
            *on,
            "--gradient_accumulation_steps",
            "2",
            "--weight_decay",
            "0.5",
            "--optimizer",
            "adamw",
        )
        after = load_checkpoint(f"checkpoint/{stage}_last.pt")["model"]
        assert all(torch.equal(after[name], seeing[name]) == name.startswith("vision.") for name in after)

    assert call("train.py", "-t", "sft", *SHAPE[:8], *FAST, "--from_checkpoint", "", "--stage", "blind").status == 0
    result = call("train.py", "-t", "vision", *on, *teacher, "checkpoint/blind.pt")
    assert result.status == 1 and "teacher: checkpoint/blind.pt reads text alone" in result.err
    result = call("train.py", "-t", "vision", *FAST, *SHAPE[8:], "--stage", "blind", "--from_checkpoint", "blind")
    assert result.status == 1 and "gets another --stage name" in result.err


def test_a_conversation_about_an_image(coloured, call, monkeypatch):
    """What is left out of the window, forgotten, or missing, is said."""
    assert call("train.py", "-t", "vision", *SHAPE, *FAST).status == 0
    generator = load_text_generator("checkpoint/vision.pt", "cpu", True)
    red = generator.open_image("p/0.png")
    history = [{"role": "user", "content": "red", "image": red}, {"role": "assistant", "content": "b" * 24}]
    with pytest.warns(UserWarning, match="the image was left out with the oldest turns"):
        list(generator.answer("e" * 12, GenerationConfig(temperature=0.0), history))
    session = Session(generator, GenerationConfig(), "", False)
    session.change_image("p/0.png")
    assert session.image is not None
    session.forget("")
    assert session.image is None
    (coloured / "p" / "it's red.png").write_bytes((coloured / "p" / "0.png").read_bytes())
    monkeypatch.setenv("HOME", str(coloured / "p"))
    for path in ("p/it's red.png", '"p/it\'s red.png"', r"p/it\'s\ red.png", r"~/it\'s\ red.png"):
        session.image = None
        session.change_image(path)  # as it is, and as a terminal writes what is dropped on it
        assert np.array_equal(session.image, red)
    with pytest.raises(UserError, match="no such file"):
        session.change_image("'missing.png'")
    session.generator = load_text_generator("checkpoint/vision.pt", "cpu", True, draft="lookup")
    with pytest.raises(UserError, match="guesses from text alone"):
        session.change_image("p/0.png")
    (coloured / "p" / "160.png").unlink()
    result = call("evaluate.py", "--questions", "vision_held_out.jsonl", "-m", "checkpoint/vision.pt")
    assert result.status == 1 and "160.png: no such file" in result.err


def test_an_adapter_of_a_model_that_sees(coloured, call):
    assert call("train.py", "-t", "vision", *SHAPE, *FAST).status == 0
    options = ["--from_checkpoint", "checkpoint/vision.pt", "--use_lora", "true", "--max_steps", "2"]
    result = call("train.py", "-t", "vision", *SHAPE, *FAST, *options, "--optimizer", "adamw")
    assert result.status == 0, result.err
    weights = load_checkpoint("checkpoint/vision_lora.pt")["model"]
    assert weights and all(name.endswith((".A", ".B")) for name in weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image_size", "0"], "gives a new model an encoder"),
        (["--image_size", "16"], "images of 8 pixels in patches of 4"),
        (["--patch_size", "2", "--block_size", "64"], "images of 8 pixels in patches of 4"),
        (["--patch_size", "3"], "divisible by patch_size"),
    ],
)
def test_images_of_another_size_are_refused(coloured, call, options, words):
    result = call("train.py", "-t", "vision", *SHAPE, *FAST, *options)
    assert result.status == 1 and words in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("template", ["nano", "chatml"])
def test_an_image_stands_after_its_question_or_before(template):
    """After all that is asked, a system message included, and before what ends the question."""
    tokenizer = CharTokenizer("".join(map(chr, [10, *range(32, 127)])))
    tokenizer.template = TEMPLATES[template]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "ab", "image": 0}]
    messages += [{"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    text = TEMPLATES[template].text(messages)
    plain = tokenizer.encode(text, special=True).tolist()
    assert tokenizer.encode_chat([{k: v for k, v in m.items() if k != "image"} for m in messages])[0].tolist() == plain
    mark = TEMPLATES[template].user[0]
    starts = {True: text.index("ab") + 2, False: text.rindex(mark, 0, text.index("ab")) + len(mark)}
    for image_last, start in starts.items():
        ids, mask = tokenizer.encode_chat(messages, 3, image_last)
        first, second = (tokenizer.encode(part, special=True).tolist() for part in (text[:start], text[start:]))
        assert ids.tolist() == [*first, *[tokenizer.vocab_size] * 3, *second]
        assert mask.any() and not mask[ids == tokenizer.vocab_size].any()


def test_a_model_of_an_earlier_version_reads_images_before_questions(coloured, call):
    """Its checkpoint does not say where they stand, nor do its token files."""
    ahead = ["--image_size", "8", "--patch_size", "4", "--image_last", "false"]
    assert call("data.py", "vision.jsonl", "--block_size", "48", *ahead).status == 0
    assert call("train.py", "-t", "vision", *SHAPE, *FAST, "--image_last", "false").status == 0
    checkpoint = load_checkpoint("checkpoint/vision_last.pt")
    assert checkpoint["model_config"].pop("image_last") is False
    save_checkpoint("old.pt", checkpoint)
    generator = load_text_generator("old.pt", "cpu", True)
    ids = generator.prompt_ids("ab", image=np.zeros((3, 8, 8), np.uint8))
    assert ids[1:5] == [generator.tokenizer.vocab_size] * 4 and not generator.model.config.image_last
    assert call("data.py", "vision.jsonl", "--block_size", "48", *ahead[:4]).status == 0  # images come last now
    go_on = ["train.py", "-t", "vision", *FAST, "--from_checkpoint", "old.pt", "--max_steps", "8"]
    result = call(*go_on)
    assert result.status == 1 and "in patches of 4, after their questions, which this model does not" in result.err
    script, *options = shlex.split(re.search("`python (.*?)`", result.err)[1])
    assert options[-2:] == ["--image_last", "false"] and call(Path(script).name, *options).status == 0
    file = TokenFile("dataset/vision_train.bin")
    assert file.header["image_last"] is False
    for value, status in (("true", 1), ("false", 0)):
        assert call(*go_on, "--image_last", value).status == status
    (coloured / "config").mkdir()
    (coloured / "config" / "vision.json").write_text('{"image_size": 8, "patch_size": 4, "image_last": false}')
    for given, stands_last in (([], False), (["--image_last", "true"], True)):
        assert call("data.py", "vision.jsonl", "--block_size", "48", *given).status == 0
        assert TokenFile("dataset/vision_train.bin").header["image_last"] is stands_last
    write_jsonl(coloured / "sft.jsonl", [{"question": "q", "answer": "a"}])
    result = call("data.py", "sft.jsonl", "--image_last", "false")
    assert result.status == 1 and "--image_last are for questions about images" in result.err


def test_the_advice_on_sizes_works(coloured, call):
    arguments = ["-t", "vision", *SHAPE, *FAST, "--image_size", "16"]
    result = call("train.py", *arguments)
    script, *options = shlex.split(re.search("`python (.*?)`", result.err)[1])
    assert call(Path(script).name, *options).status == 0
    assert call("train.py", *arguments).status == 0


def test_a_model_that_sees_says_so_where_there_is_no_image(coloured, call):
    assert call("train.py", "-t", "vision", *SHAPE, *FAST).status == 0
    result = call("inference.py", "-i", "-m", "checkpoint/vision.pt", "-p", "Which colour?")
    assert result.status == 0 and "given no image: --image FILE" in result.err
    for options, words in (
        (["-p", "Which?", "--image", "p/0.png"], "add -i"),
        (["-i", "-p", "Which?", "--image", "p/0.png", "--image", "p/1.png"], "one image goes with a conversation"),
        (["-i", "-p", "Which?", "--image", "missing.png"], "missing.png: no such file"),
        (["-i", "-p", "Which?", "--image", "vision.jsonl"], "vision.jsonl: not a png or jpeg"),
        (["-i", "-p", "Which?", "--image", "p/0.png", "--draft", "lookup"], "guesses from text alone"),
    ):
        result = call("inference.py", "-m", "checkpoint/vision.pt", *options)
        assert result.status == 1 and words in result.err and result.err.count("\n") == 1
    for target in ("out.html", "out.gguf", "out"):
        result = call("convert.py", "checkpoint/vision.pt", target)
        assert result.status == 1 and "no other format here has a place" in result.err


@pytest.mark.parametrize("options", [[], ["--optimizer", "adamw"], ["--dtype", "bfloat16"]])
def test_the_memory_estimate_includes_the_encoder(coloured, call, monkeypatch, options):
    """64 patches an image, three blocks: most of the activations are the encoder's."""
    sizes = ["--image_size", "32", "--patch_size", "4", "--block_size", "112"]
    assert call("data.py", "vision.jsonl", *sizes).status == 0
    without_waste(monkeypatch)
    shape = ["--n_layer", "1", "--n_head", "2", "--n_embd", "64", "--n_vision_layer", "3", *sizes]
    asked = asked_by("-t", "vision", *shape, *FAST, *options)
    with LiveTensors() as tensors:
        run = build_run(asked, Engine(asked.training))
        train_two_steps(run)
    assert memory.memory_estimate(run, asked.training.batch_size) == pytest.approx(tensors.peak, rel=0.08)
