"""Models to and from other programs, checked by these programs themselves: transformers and llama.cpp."""

import itertools
import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY, make_text
from other_programs import chat, make_model, start_llama_cpp

from convert import format_of
from model import GPT
from text.tokenizer import EOS, SPECIAL_TOKENS, BPETokenizer, CharTokenizer
from weights import gguf, huggingface, tokenizer_json

TEXT = "Hello 你好世界 🙂 world, éclair?\n\t<|eos|> <|notspecial|> a question 0123456789 'tis  two  spaces"
SHAPES = {
    "qwen3": {},
    "llama": {"qk_norm": False},
    "llama with biases": {"qk_norm": False, "bias": True, "tie_embeddings": False},
    "grouped queries": {"n_kv_head": 2, "tie_embeddings": False},
    "experts": {"n_expert": 4, "n_hidden": 32},
    "one expert": {"n_expert": 4, "n_hidden": 32, "n_expert_per_token": 1},
    "windows": {"attention_window": [4, 0]},
    "mistral": {"attention_window": [5], "qk_norm": False},
    "linear": {"rope_scaling": "linear", "rope_factor": 4.0},
    "ntk": {"rope_scaling": "ntk", "rope_factor": 4.0},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 4.0},
    "another epsilon and base": {"norm_eps": 0.25, "rope_theta": 512.0},
}
REFUSED = {
    "relu2": ({"mlp": "relu2"}, "mlp relu2"),
    "gelu": ({"mlp": "gelu"}, "mlp gelu"),
    "learned positions": ({"use_rope": False}, "learned positions"),
    "full attention": ({"is_causal": False}, "is_causal false"),
    "shared experts": ({"n_expert": 4, "n_hidden": 32, "n_shared_expert": 1}, "n_shared_expert"),
    "balancing biases": ({"n_expert": 4, "n_hidden": 32, "expert_balance": "bias"}, "expert_balance bias"),
    "windows of two sizes": ({"attention_window": [4, 8]}, "several sizes"),
    "biases and qk_norm": ({"bias": True}, "bias with qk_norm"),
}


@pytest.fixture(scope="module")
def tokenizers():
    characters = CharTokenizer.train([TEXT, "abcdefghijklmnopqrstuvwxyz <|>."])
    return {
        "char": characters,
        "bpe": BPETokenizer.train([TEXT * 50], 400),
        "ascii": CharTokenizer.train(["abcdefgh ijk?"]),
    }


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    pieces = [*TEXT.split(" "), " ", "  ", "\n", "你", "🙂", "<|bos|>", "<|", "'s", "12345", "é"]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(n)]


def write(folder: Path, model: GPT, tokenizer) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    huggingface.write_folder(folder, model, tokenizer, torch.float32)
    return folder


# ------------------------------------------------------------------------------------------------------ Hugging Face


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits(tmp_path, tokenizers, shape):
    transformers = pytest.importorskip("transformers")
    model = make_model(tokenizers["char"].vocab_size, **SHAPES[shape])
    folder = write(tmp_path / "m", model, tokenizers["char"])
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    idx = torch.randint(0, model.config.vocab_size, (3, 64))
    with torch.no_grad():
        assert (model(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    # and what transformers saves comes back unchanged
    theirs.save_pretrained(tmp_path / "again")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    back, tokenizer = huggingface.read_folder(tmp_path / "again")
    assert tokenizer.fingerprint() == tokenizers["char"].fingerprint()
    weights = back.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(model(idx)[0], back.eval()(idx)[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_transformers_tokenises_the_same(tmp_path, tokenizers, kind):
    transformers = pytest.importorskip("transformers")
    ours = tokenizers[kind]
    folder = write(tmp_path / "m", make_model(ours.vocab_size), ours)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [TEXT, *random_texts(200)]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text, special=True).tolist(), text
        known = ours.unknown_characters(text) == ""
        assert not known or theirs.decode(ids) == text
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "world"},
        {"role": "user", "content": "你好"},
    ]
    for n in (2, 3, 4):
        ids = theirs.apply_chat_template(messages[:n], return_dict=False, add_generation_prompt=True)
        assert list(ids) == ours.encode_chat(messages[:n])[0].tolist()
    theirs.save_pretrained(tmp_path / "again")
    assert tokenizer_json.our_tokenizer(tmp_path / "again" / "tokenizer.json").fingerprint() == ours.fingerprint()


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_say_is_refused_by_name(tmp_path, tokenizers, name):
    shape, words = REFUSED[name]
    model = make_model(tokenizers["char"].vocab_size, **shape)
    for path, write_model in ((tmp_path / "m", huggingface.write_folder), (tmp_path / "m.gguf", gguf.write_gguf)):
        kind = torch.float32 if path.suffix == "" else "float32"
        with pytest.raises(ValueError, match=words):
            write_model(path, model, tokenizers["char"], kind)
    assert not list(tmp_path.iterdir())


def damage_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


def add_weight(folder: Path) -> None:
    weights = huggingface.read_weights(folder)
    safetensors.torch.save_file(
        {**weights, "model.layers.0.extra.weight": torch.zeros(2)}, folder / "model.safetensors"
    )


def take_a_character(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    values["model"]["vocab"].popitem()
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


DAMAGE = {
    "a weight too many": (add_weight, "no place for: model.layers.0.extra.weight"),
    "a character too few": (take_a_character, "tokens, the model"),
    "another architecture": (lambda f: damage_config(f, model_type="gpt_neox"), "model_type"),
    "another head size": (lambda f: damage_config(f, head_dim=128), "has the shape"),
    "another activation": (lambda f: damage_config(f, hidden_act="gelu"), "hidden_act gelu"),
    "a size that is none": (lambda f: damage_config(f, hidden_size="64"), "hidden_size must be a number"),
    "more layers than weights": (
        lambda f: damage_config(f, num_hidden_layers=3, layer_types=None),
        "weights have 2",
    ),
    "huge sizes": (lambda f: damage_config(f, hidden_size=1 << 19, head_dim=None), "has the shape"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-50]), "damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no such file"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no such file"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "another tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"model": {}}'), "not a tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_folders_are_refused_by_name(tmp_path, call, tokenizers, name):
    damage, words = DAMAGE[name]
    folder = write(tmp_path / "m", make_model(tokenizers["char"].vocab_size), tokenizers["char"])
    damage(folder)
    result = call("convert.py", str(folder), str(tmp_path / "x.pt"))
    assert result.status == 1 and words in result.err and "Traceback" not in result.err
    assert not (tmp_path / "x.pt").exists()


# ------------------------------------------------------------------------------------------------------ GGUF


def llama_cpp(path: Path, questions: list[str]) -> list[str]:
    """Greedy answers of a real llama.cpp."""
    post = start_llama_cpp(path, 64)
    return [chat(post, question, 12) for question in questions]


def our_answers(model: GPT, tokenizer, questions: list[str], max_tokens: int = 12) -> list[tuple[str, float]]:
    """Greedy answers without special tokens, as llama.cpp's, each with the smallest lead of a token over the next."""
    answers = []
    for question in questions:
        ids = tokenizer.encode_chat([{"role": "user", "content": question}])[0].tolist()
        n_prompt, gap = len(ids), float("inf")
        while len(ids) < n_prompt + max_tokens:
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0][0, -1]
            best, second = logits.topk(2).values.tolist()
            gap = min(gap, best - second)
            token = int(logits.argmax())
            if token == EOS:
                break
            ids.append(token)
        plain = [token for token in ids[n_prompt:] if token >= len(SPECIAL_TOKENS)]
        answers.append((tokenizer.decode(plain), gap))
    return answers


@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in ("one expert", "windows", "mistral")])
def test_llama_cpp_answers_the_same(tmp_path, tokenizers, shape):
    tokenizer = tokenizers["char"]
    model = make_model(tokenizer.vocab_size, **SHAPES[shape])
    gguf.write_gguf(tmp_path / "m.gguf", model, tokenizer, "float32")
    questions = [f"Hello {letter}{'你好' * (i % 3)}" for i, letter in enumerate("abcdefghij")]
    ours = our_answers(model, tokenizer, questions)
    clear = [i for i, (_, gap) in enumerate(ours) if gap > 0.01]  # the same sums in another order differ by less
    assert len(clear) >= 5
    theirs = llama_cpp(tmp_path / "m.gguf", questions)
    assert [theirs[i] for i in clear] == [ours[i][0] for i in clear]


@pytest.mark.parametrize("kind", ["bpe", "ascii"])
def test_llama_cpp_reads_other_vocabularies(tmp_path, tokenizers, kind):
    tokenizer = tokenizers[kind]
    model = make_model(tokenizer.vocab_size, seed=3)
    gguf.write_gguf(tmp_path / "m.gguf", model, tokenizer, "float32")
    questions = ["abc a", "bad cab", "each kid", "hide?", "a big dig"]
    ours = our_answers(model, tokenizer, questions)
    theirs = llama_cpp(tmp_path / "m.gguf", questions)
    for (text, gap), answer in zip(ours, theirs, strict=True):
        if gap > 0.01 and "\ufffd" not in text:  # bytes that are no text are shown in another way
            assert answer == text


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in ("one expert", "windows", "mistral", "ntk")])
def test_gguf_files_come_back_unchanged(tmp_path, tokenizers, shape, kind):
    pytest.importorskip("gguf")
    model = make_model(tokenizers[kind].vocab_size, **SHAPES[shape])
    gguf.write_gguf(tmp_path / "m.gguf", model, tokenizers[kind], "float32")
    back, tokenizer = gguf.read_gguf(tmp_path / "m.gguf")
    assert tokenizer.fingerprint() == tokenizers[kind].fingerprint()
    weights = back.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    before, after = model.config.to_dict(), back.config.to_dict()
    for name in ("norm_eps", "rope_theta"):  # float32 in the file
        assert after[name] == pytest.approx(before[name], rel=1e-6)
    assert {name for name in before if before[name] != after[name]} <= {"expert_balance", "norm_eps", "rope_theta"}


@pytest.mark.parametrize(("type_name", "error"), [("float16", 1e-3), ("bfloat16", 1e-2), ("q8_0", 1e-2)])
def test_smaller_numbers_stay_close(tmp_path, tokenizers, type_name, error):
    pytest.importorskip("gguf")
    model = make_model(tokenizers["char"].vocab_size)
    gguf.write_gguf(tmp_path / "m.gguf", model, tokenizers["char"], type_name)
    back, _ = gguf.read_gguf(tmp_path / "m.gguf")
    for name, weight in model.state_dict().items():
        exact = weight.dim() == 1
        assert (back.state_dict()[name] - weight).abs().max() <= (0 if exact else error * weight.abs().max())
    gguf.write_gguf(tmp_path / "f.gguf", model, tokenizers["char"], "float32")
    assert (tmp_path / "m.gguf").stat().st_size < 0.7 * (tmp_path / "f.gguf").stat().st_size


def test_gguf_files_say_what_their_numbers_and_special_tokens_are(tmp_path, tokenizers):
    """By the names in the package of llama.cpp itself."""
    theirs = pytest.importorskip("gguf")
    types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    for name, expected in types.items():
        gguf.write_gguf(tmp_path / "m.gguf", make_model(tokenizers["char"].vocab_size), tokenizers["char"], name)
        fields = theirs.GGUFReader(tmp_path / "m.gguf").fields
        values = {name: field.contents() for name, field in fields.items()}
        assert values["general.file_type"] == theirs.LlamaFileType[expected]
    tokens = values["tokenizer.ggml.tokens"]
    named = {name: tokens[values[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "unknown", "padding")}
    assert named == {"bos": "<|bos|>", "eos": "<|eos|>", "unknown": "<|unknown|>", "padding": "<|Padding|>"}
    assert values["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("where", [0, 5, 40, 300, 2000, -3000, -100])
def test_damaged_gguf_files_are_refused(tmp_path, tokenizers, call, where):
    pytest.importorskip("gguf")
    gguf.write_gguf(tmp_path / "m.gguf", make_model(tokenizers["char"].vocab_size), tokenizers["char"], "float32")
    contents = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(contents[:where] if where else b"")
    result = call("convert.py", str(tmp_path / "cut.gguf"), str(tmp_path / "x.pt"))
    assert result.status == 1 and "cut.gguf" in result.err and "Traceback" not in result.err
    assert not (tmp_path / "x.pt").exists()


# ------------------------------------------------------------------------------------------------------ the command


def test_a_trained_model_goes_round_and_answers_the_same(call, prepared):
    pytest.importorskip("gguf")
    tune = ["--max_steps", "3", "--warmup_iters", "1", "--batch_size", "4", "--learning_rate", "1e-2"]
    assert call("train.py", "-t", "pretrain", *TINY, *tune).status == 0
    way = ["checkpoint/pretrain.pt", "folder/", "m.gguf", "back/", "back.pt"]
    for source, target in itertools.pairwise(way):
        result = call("convert.py", source, target)
        assert result.status == 0 and "to use it: " in result.out, result.err
    command = ["inference.py", "-p", "the cat", "-t", "0", "-l", "16", "-m"]
    assert call(*command, "back.pt").out == call(*command, "checkpoint/pretrain.pt").out
    # and it can be trained further
    assert call("train.py", "-t", "sft", "--from_checkpoint", "back.pt", *tune, "--overlong", "cut").status == 0


def test_a_converted_model_starts_runs_and_resumes_none(call, prepared):
    """It has no optimizer states, so no run may take it for a save of its own, whatever its file is called."""
    tune = ["--max_steps", "1", "--warmup_iters", "1", "--batch_size", "4"]
    assert call("train.py", "-t", "pretrain", *TINY, *tune).status == 0
    assert call("convert.py", "checkpoint/pretrain.pt", "folder/").status == 0
    assert call("convert.py", "folder/", "pretrain.pt").status == 0
    result = call("train.py", "-t", "pretrain", *tune, "--from_checkpoint", "pretrain.pt")
    assert result.status == 0 and "starts from the weights of pretrain.pt" in result.out, result.err


def test_formats_are_told_by_names_and_shards_by_what_is_in_them(work):
    assert [format_of(path) for path in ("a.pt", "A.GGUF", "a/", "a", "a.b")] == [".pt", ".gguf", "", "", ""]
    Path("run_last").mkdir()
    assert format_of("run_last") == ""
    Path("run_last/latest").touch()  # a checkpoint of ours, in shards
    assert format_of("run_last") == ".pt"


def test_an_adapter_is_merged_on_the_way(call, prepared):
    tune = ["--max_steps", "3", "--warmup_iters", "1", "--batch_size", "4", "--learning_rate", "1e-1"]
    assert call("train.py", "-t", "pretrain", *TINY, *tune, "--min_lr", "1e-3").status == 0
    lora = ["--use_lora", "true", "--from_checkpoint", "checkpoint/pretrain.pt", "--overlong", "cut", "--stage", "a"]
    assert call("train.py", "-t", "sft", *tune, *lora, "--min_lr", "1e-3").status == 0
    merged = ["inference.py", "-m", "checkpoint/pretrain.pt", "--lora", "checkpoint/a_lora.pt", "--merge", "merged.pt"]
    assert call(*merged).status == 0
    assert call("convert.py", "merged.pt", "one/").status == 0
    assert call("convert.py", "checkpoint/pretrain.pt", "two/", "--lora", "checkpoint/a_lora.pt").status == 0
    one, two = (huggingface.read_weights(Path(name)) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    plain = call("convert.py", "checkpoint/pretrain.pt", "three/")
    three = huggingface.read_weights(Path("three"))
    assert plain.status == 0 and not all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["none.pt", "x"], ["none.pt", "no such checkpoint"]),
        (["none/", "x.pt"], ["none: no such folder"]),
        (["none.gguf", "x.pt"], ["none.gguf", "no such file"]),
        (["m.pt", "there.gguf"], ["there.gguf", "exists already"]),
        (["m.pt", "x.onnx"], ["x.onnx", "X.gguf llama.cpp's"]),
        (["m.pt", "x/", "--type", "q8_0"], ["q8_0 is for GGUF"]),
        (["m.pt", "x.pt", "--type", "float16"], ["our checkpoints are float32"]),
        (["m.pt", "x.pt", "--type", "q8_0"], ["our checkpoints are float32"]),
        (["m.pt", "x/", "--type", "int4"], ["invalid choice", "q8_0"]),
        (["folder/", "x.pt", "--lora", "a.pt"], ["--lora", "a checkpoint of ours"]),
        (["m.pt"], ["TARGET"]),
    ],
)
def test_mistakes_are_one_line(call, work, tokenizers, argv, words):
    from convert import write_checkpoint

    write_checkpoint("m.pt", make_model(tokenizers["char"].vocab_size), tokenizers["char"], "float32")
    Path("there.gguf").write_bytes(b"")
    Path("folder").mkdir()
    result = call("convert.py", *argv)
    assert result.status == 1 and "Traceback" not in result.err and result.err.count("\n") <= 2
    for word in words:
        assert word in result.err
    assert sorted(path.name for path in Path().iterdir()) == ["folder", "m.pt", "there.gguf"]


def test_no_pickle_is_read(tmp_path, tokenizers):
    """Folders of strangers may hold a pytorch_model.bin, which could run code: it is not looked at."""
    folder = write(tmp_path / "m", make_model(tokenizers["char"].vocab_size), tokenizers["char"])
    weights = huggingface.read_weights(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        huggingface.read_folder(folder)


def test_the_byte_alphabet_is_that_of_gpt2():
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert gguf.byte_alphabet() == bytes_to_unicode()
    assert len(set(np.array(list(gguf.byte_alphabet().values())))) == 256 and make_text(10)


def test_models_of_other_programs_given_as_checkpoints_lead_to_convert(call, work, tokenizers):
    pytest.importorskip("gguf")
    model = make_model(tokenizers["char"].vocab_size)
    gguf.write_gguf("m.gguf", model, tokenizers["char"], "float32")
    write(Path("folder"), model, tokenizers["char"])
    torch.save({"model_args": {}, "model": {}}, "ckpt.pt")
    for path, words in (
        ("m.gguf", "convert.py m.gguf checkpoint/m.pt"),
        ("folder", "convert.py folder"),
        ("ckpt.pt", "nanogpt"),
    ):
        result = call("inference.py", "-m", path, "-p", "x")
        assert result.status == 1 and words in result.err and "Traceback" not in result.err
    Path("text.txt").write_text("abc " * 500, encoding="utf-8")
    result = call("data.py", "text.txt", "--tokenizer", "m.gguf")
    assert result.status == 1 and "convert.py m.gguf" in result.err
    assert call("convert.py", "m.gguf", "checkpoint/m.pt").status == 0  # as advised
    assert call("inference.py", "-m", "checkpoint/m.pt", "-p", "Hello", "-l", "8").status == 0


@pytest.mark.parametrize("target", ["full.gguf", "full", "full.html", "full.pt"])
def test_a_full_disk_is_one_line(work, tokenizers, target):
    """In a process of its own that may write files of 20 KB at most."""
    from convert import write_checkpoint

    write_checkpoint("m.pt", make_model(tokenizers["char"].vocab_size), tokenizers["char"], "float32")
    command = f"ulimit -f 20; {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'convert.py'))} m.pt {target}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and target in done.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["m.pt"]
