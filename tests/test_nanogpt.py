"""GPT-2's network: of transformers, and of a nanoGPT written here after its file format, trained for a while."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_foreign import make_tokenizer

from model import GPT
from text.tokenizer import SPECIAL_TOKENS
from weights import gpt2, huggingface, nanogpt

LINES = "the cat sat on the mat\nand the dog ran to the sea\na cat, a dog, a hat; no cat? yes!\n" * 40
SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32}


class NanoGPT(nn.Module):
    """GPT-2 as nanoGPT's checkpoints name it: LayerNorm, learned positions, exact GELU, tied embeddings."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head

        def block() -> nn.ModuleDict:
            attention = {"c_attn": nn.Linear(n_embd, 3 * n_embd, bias), "c_proj": nn.Linear(n_embd, n_embd, bias)}
            mlp = {"c_fc": nn.Linear(n_embd, 4 * n_embd, bias), "c_proj": nn.Linear(4 * n_embd, n_embd, bias)}
            parts = {"attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)}
            return nn.ModuleDict({**{f"ln_{i}": nn.LayerNorm(n_embd, bias=bias) for i in (1, 2)}, **parts})

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(block() for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd, bias=bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        parts, (B, T) = self.transformer, idx.shape
        x = parts["wte"](idx) + parts["wpe"](torch.arange(T))
        for block in parts["h"]:
            q, k, v = block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, -1)
            q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
            scores = q @ k.mT / math.sqrt(q.size(-1))
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
            x = x + block["attn"]["c_proj"]((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))
            x = x + block["mlp"]["c_proj"](F.gelu(block["mlp"]["c_fc"](block["ln_2"](x))))
        return self.lm_head(parts["ln_f"](x))


@pytest.fixture(scope="module", params=[True, False], ids=["biases", "no biases"])
def run(request, tmp_path_factory):
    """A folder with out/ckpt.pt and meta.pkl after 50 steps of training; the model; its characters."""
    folder = tmp_path_factory.mktemp("nanogpt")
    characters = sorted(set(LINES))
    ids = torch.tensor([characters.index(c) for c in LINES])
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(characters), "bias": request.param}
    model = NanoGPT(**sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        starts = torch.randint(len(ids) - 33, (16, 1))
        batch = ids[starts + torch.arange(33)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prefix = "_orig_mod." if request.param else ""
    weights = {prefix + name: weight for name, weight in model.state_dict().items()}
    checkpoint = {"model": weights, "model_args": {**sizes, "dropout": 0.0}, "optimizer": optimizer.state_dict()}
    torch.save({**checkpoint, "iter_num": 50, "best_val_loss": 1.0, "config": {"dataset": "x"}}, folder / "ckpt.pt")
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder, model.eval(), characters


def test_a_checkpoint_of_nanogpt_goes_on_here(run, work, call):
    folder, theirs, characters = run
    command = ["convert.py", str(folder / "ckpt.pt"), "mine.pt", "--from", "nanogpt"]
    assert call(*command, "--tokenizer", str(folder / "meta.pkl")).status == 0
    model, tokenizer = nanogpt.read_nanogpt(str(folder / "ckpt.pt"), str(folder / "meta.pkl"))
    n_special = len(SPECIAL_TOKENS)
    text = LINES[7:39]
    idx = torch.tensor([[characters.index(c) for c in text]])
    assert tokenizer.encode(text).tolist() == (idx[0] + n_special).tolist()
    with torch.no_grad():
        logits = model.eval()(idx + n_special)[0]
        assert (logits[..., n_special:] - theirs(idx)).abs().max() < 1e-4
        # our special tokens, which nanoGPT has not, are next to impossible
        assert logits.softmax(-1)[..., :n_special].sum(-1).max() < 1e-4
    # greedy text is that of a plain loop over their model
    expected = idx[:, :6]
    while expected.size(1) < 30:
        with torch.no_grad():
            expected = torch.cat([expected, theirs(expected)[:, -1:].argmax(-1)], 1)
    answer = call("inference.py", "-m", "mine.pt", "-p", text[:6], "-t", "0", "-l", "30")
    assert answer.out.rstrip("\n") == "".join(characters[i] for i in expected[0, 6:]).rstrip("\n")
    # and training goes on
    Path("dataset").mkdir()
    Path("dataset/pretrain.txt").write_text(LINES, encoding="utf-8")
    assert call("data.py", "--tokenizer", "mine.pt", "--block_size", "32").status == 0
    tune = ["--from_checkpoint", "mine.pt", "--max_steps", "3", "--warmup_iters", "1", "--batch_size", "4"]
    result = call("train.py", "-t", "pretrain", *tune)
    assert result.status == 0, result.err


def test_with_gpt2s_vocabulary(work):
    values = json.loads(make_tokenizer("mistral").backend_tokenizer.to_str())
    Path("tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 512, "bias": True}
    theirs = NanoGPT(**sizes)
    torch.save({"model": theirs.state_dict(), "model_args": sizes}, "ckpt.pt")
    model, tokenizer = nanogpt.read_nanogpt("ckpt.pt", "tokenizer.json")
    ids = torch.from_numpy(tokenizer.encode("Hello world, hello").astype("int64"))[None]
    with torch.no_grad():
        assert (model.eval()(ids)[0] - theirs(ids)).abs().max() < 1e-4
    assert tokenizer.template.name == "plain" and tokenizer.decode([tokenizer.eos]) == "<|endoftext|>"


class Hostile:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (pickle.dumps({"itos": Hostile()}), "not a meta.pkl"),
        (pickle.dumps({"itos": {0: "ab"}}), "single characters"),
        (pickle.dumps({"stoi": {}}), "itos"),
        (pickle.dumps({"itos": {0: "a", 1: "b"}}), "2 characters, but the model has"),
        (b"\x80\x04", "not a meta.pkl"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "not a meta.pkl"),  # a memo of 2^31 entries
        (b"", "not a meta.pkl"),
    ],
)
def test_bad_vocabularies_are_refused_and_never_run(run, work, call, contents, words):
    folder, _, _ = run
    Path("meta.pkl").write_bytes(contents)
    command = ["convert.py", str(folder / "ckpt.pt"), "mine.pt", "--from", "nanogpt", "--tokenizer", "meta.pkl"]
    result = call(*command)
    assert result.status == 1 and words in result.err and "Traceback" not in result.err
    assert sorted(path.name for path in Path().iterdir()) == ["meta.pkl"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("model_args"), "model_args"),
        (lambda c: c["model_args"].update(n_layer="2"), "model_args"),
        (lambda c: c["model_args"].update(n_layer=3), "its weights have 2"),
        (lambda c: c["model"].popitem(), "has the shape None"),
        (lambda c: c["model"].update(other=torch.zeros(1)), "no place for"),
        (lambda c: c["model_args"].update(n_embd=1 << 20, block_size=1 << 20), "has the shape"),
        (lambda c: [w.fill_(math.nan) for w in c["model"].values()], "not finite"),
        (lambda c: c["model"].update({0: torch.zeros(1)}), "no place for"),
    ],
)
def test_bad_checkpoints_are_refused(run, work, call, change, words):
    folder, _, _ = run
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    checkpoint["model"].pop("lm_head.weight", None)
    checkpoint["model"].pop("_orig_mod.lm_head.weight", None)
    change(checkpoint)
    torch.save(checkpoint, "bad.pt")
    result = call("convert.py", "bad.pt", "m.pt", "--from", "nanogpt", "--tokenizer", str(folder / "meta.pkl"))
    assert result.status == 1 and words in result.err and "Traceback" not in result.err
    assert call("convert.py", "bad.pt", "m.pt", "--from", "nanogpt").status == 1
    assert not Path("m.pt").exists()


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_gpt2_of_transformers_comes_and_goes(tmp_path, call, activation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    tokenizer = make_tokenizer("mistral")
    names = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": len(tokenizer)}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**names, activation_function=activation)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + (parameter.dim() == 1))
    theirs.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert call("convert.py", str(tmp_path / "m"), str(tmp_path / "m.pt")).status == 0
    assert call("convert.py", str(tmp_path / "m.pt"), str(tmp_path / "back")).status == 0
    ours, _ = huggingface.read_folder(tmp_path / "back")
    idx = torch.randint(0, len(tokenizer), (2, 60))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert (ours.eval()(idx)[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in theirs.state_dict().items())
    result = call("convert.py", str(tmp_path / "m.pt"), str(tmp_path / "m.gguf"))
    assert result.status == 1 and "learned positions" in result.err
    # the files of the first release: no "transformer." before names, and masks among the weights
    import safetensors.torch

    old = {name.removeprefix("transformer."): w for name, w in huggingface.read_weights(tmp_path / "m").items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    shutil.copytree(tmp_path / "m", tmp_path / "old")
    safetensors.torch.save_file({**old, **masks}, tmp_path / "old" / "model.safetensors")
    first, _ = huggingface.read_folder(tmp_path / "old")
    assert all(torch.equal(first.state_dict()[name], weight) for name, weight in ours.state_dict().items())


def test_without_biases_gpt2_gets_zeros(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = GPT(gpt2.make_config(**SIZES, vocab_size=90, mlp="gelu")).eval()
    from text.tokenizer import CharTokenizer

    tokenizer = CharTokenizer.train(["".join(map(chr, range(33, 33 + 84)))])
    huggingface.write_folder(tmp_path / "m", ours, tokenizer, torch.float32)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    idx = torch.randint(0, 90, (2, 30))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
