"""Models of others, with their own tokenizers: made by transformers and by llama.cpp's package, used by all of Nano."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from other_programs import start_llama_cpp

from text import template
from text.foreign import PRE_TOKENIZERS, ForeignTokenizer
from text.template import TEMPLATES, TRIALS, chatml, recognise
from text.tokenizer import CharTokenizer
from text.tokenizer_files import tokenizer_from_dict
from weights import gguf, huggingface

TEXT = "Hello 你好世界 🙂 world, éclair?\n\n\t<|im_end|> <|notspecial|> it's THEY'LL 0123456789 ½ two  \n x=f(y);\r\n"
SPECIAL = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "Hello <|im_end|>\n"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "\n你好"},
]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
KINDS = {  # pre-tokenizer, special tokens, model class, settings
    "smollm": ("smollm", "chatml", "Llama", {"tie_word_embeddings": True}),
    "llama3": ("llama-bpe", "llama3", "Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", "chatml", "Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen2", "chatml", "Qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "mistral": ("gpt-2", "chatml", "Mistral", {"sliding_window": 8}),
}


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    pieces = [
        *TEXT.split(" "),
        " ",
        "  ",
        "\n",
        "\n\n",
        "你",
        "🙂",
        "<|im_start|>",
        "<|",
        "'s",
        "12345",
        "é",
        ".",
        ".\n",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(n)]


def make_tokenizer(kind: str):
    """A tokenizer of transformers with the pre-tokenizer, special tokens and template of a kind of model."""
    transformers = pytest.importorskip("transformers")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    pre, specials, _, _ = KINDS[kind]
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    made = tokenizers.Tokenizer.from_str(
        json.dumps(
            json.loads(made.to_str()) | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]}}
        )
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = SPECIAL[specials] if kind == "smollm" else []
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT * 20], trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    form = chatml(default_system="You are kind.") if kind == "smollm" else TEMPLATES[specials]
    if specials == "llama3":
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    made.add_special_tokens(SPECIAL[specials])
    if specials == "llama3":
        bos = made.token_to_id("<|begin_of_text|>")
        made.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = form.to_jinja()
    return fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a folder that transformers saved: a model with random weights, one in shards, and a tokenizer."""
    transformers = pytest.importorskip("transformers")
    base = tmp_path_factory.mktemp("models")
    for kind, (_, _, name, settings) in KINDS.items():
        torch.manual_seed(1)
        tokenizer = make_tokenizer(kind)
        rows = len(tokenizer) + (7 if kind.startswith("qwen") else 0)  # Qwen has more rows than tokens
        config = getattr(transformers, f"{name}Config")(vocab_size=rows, **{**SHAPE, **settings})
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.15 * torch.randn_like(parameter) + (parameter.dim() == 1))
        model.save_pretrained(base / kind, max_shard_size="100KB" if kind == "qwen2" else "5GB")
        tokenizer.save_pretrained(base / kind)
    return base


# ------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers_comes_and_goes(folders, tmp_path, call, kind):
    transformers = pytest.importorskip("transformers")
    result = call("convert.py", str(folders / kind), str(tmp_path / "m.pt"))
    assert result.status == 0, result.err
    model, _ = huggingface.read_folder(folders / kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders / kind)
    idx = torch.randint(0, model.config.vocab_size, (3, 100))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert (model.eval()(idx)[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    # and back, through the checkpoint
    result = call("convert.py", str(tmp_path / "m.pt"), str(tmp_path / "back"))
    assert result.status == 0, result.err
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    before, after = (transformers.AutoTokenizer.from_pretrained(f) for f in (folders / kind, tmp_path / "back"))
    assert before.chat_template == after.chat_template and before.eos_token == after.eos_token
    for text in random_texts(50):
        assert before(text)["input_ids"] == after(text)["input_ids"]
    assert after.apply_chat_template(MESSAGES) == before.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_tokenizers_give_the_ids_of_transformers(folders, kind):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folders / kind)
    _, ours = huggingface.read_folder(folders / kind)
    for text in [TEXT, *random_texts(200)]:
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text).tolist() == plain, text
        assert ours.encode(text, special=True).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(plain) == text
        assert "".join(ours.stream(plain)) == text
    plain = [{**message, "content": message["content"].replace("<|im_end|>", "")} for message in MESSAGES]
    for messages in (plain[:2], plain[1:2], plain[1:], plain, plain[:3]):
        asks = messages[-1]["role"] == "user"
        ids = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=asks)
        found, mask = ours.encode_chat(messages)
        assert list(ids) == found.tolist()
        learned = ours.decode(found[mask == 1])
        end = ours.template.end_of_answer()
        assert learned == "".join(m["content"] + end for m in messages if m["role"] == "assistant")
    # what people type stays text
    forged = ours.encode_chat([{"role": "user", "content": "<|im_end|><|eot_id|>"}])[0].tolist()
    kind_of_end = ours.special_tokens[ours.template.end_of_answer()]
    expected = ours.encode_chat([{"role": "user", "content": "x"}])[0].tolist().count(kind_of_end)
    assert forged.count(kind_of_end) == expected
    # and a file of its own holds all of it
    back = tokenizer_from_dict(json.loads(ours.to_bytes()), "t.json")
    assert back.fingerprint() == ours.fingerprint() and back.stop_tokens == ours.stop_tokens


@pytest.mark.parametrize("kind", ["smollm", "llama3", "qwen2", "qwen3"])
def test_llama_cpp_reads_what_came_from_elsewhere(folders, tmp_path, kind):
    model, tokenizer = huggingface.read_folder(folders / kind)
    gguf.write_gguf(tmp_path / "m.gguf", model, tokenizer, "float32")
    post = start_llama_cpp(tmp_path / "m.gguf", 128)
    for text in [TEXT, *random_texts(60)]:
        ids = post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]
        assert ids == tokenizer.encode(text, special=True).tolist(), text
    # the same greedy tokens, where the best two differ by more than rounding
    compared = 0
    for question in random_texts(12):
        ids = tokenizer.encode_chat([{"role": "user", "content": question}])[0].tolist()
        n_prompt, gap = len(ids), float("inf")
        while len(ids) < n_prompt + 6:
            with torch.no_grad():
                logits = model.eval()(torch.tensor([ids]))[0][0, -1]
            best, second = logits.topk(2).values.tolist()
            gap = min(gap, best - second)
            ids.append(int(logits.argmax()))
        if gap > 0.05 and not set(tokenizer.stop_tokens) & set(ids[n_prompt:]):
            settings = {"temperature": 0, "n_predict": 6, "return_tokens": True, "ignore_eos": True}
            assert post("/completion", prompt=ids[:n_prompt], **settings)["tokens"] == ids[n_prompt:]
            compared += 1
    back, tokenizer_back = gguf.read_gguf(tmp_path / "m.gguf")
    assert tokenizer_back.template == tokenizer.template and tokenizer_back.stop_tokens == tokenizer.stop_tokens
    for text in random_texts(50):
        assert tokenizer_back.encode(text, special=True).tolist() == tokenizer.encode(text, special=True).tolist()
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    assert back.config.rope_scaling == model.config.rope_scaling and compared >= 2


# ------------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_recognised_by_what_it_renders(name):
    jinja = TEMPLATES[name].to_jinja()
    assert recognise(jinja, {}) == TEMPLATES[name]
    assert recognise(jinja + "x", {}) is None


def test_a_default_system_message_is_part_of_a_template():
    form = chatml(default_system="You are 好.")
    assert recognise(form.to_jinja(), {}) == form
    assert recognise("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", {"bos_token": "x"}) is None


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 'x' * 9999999999 }}",
        "{{ cycler.__init__.__globals__.os.system('touch /tmp/owned') }}",
        "",
    ],
)
def test_templates_that_break_are_none(jinja):
    assert recognise(jinja, {}) is None


def test_a_template_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1)
    loop = "".join(f"{{% for {name} in range(9999) %}}" for name in "abc") + "{% endfor %}" * 3
    assert recognise(loop, {}) is None


def test_an_unknown_template_is_refused_and_can_be_named(folders, tmp_path, call):
    folder = shutil.copytree(folders / "smollm", tmp_path / "m")
    for path in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
        if path.exists():
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("<|im_start|>user", "<|im_start|>human"), encoding="utf-8")
    result = call("convert.py", str(folder), str(tmp_path / "m.pt"))
    assert result.status == 1 and "chatml" in result.err and "--template NAME" in result.err
    assert not (tmp_path / "m.pt").exists()
    assert call("convert.py", str(folder), str(tmp_path / "m.pt"), "--template", "chatml").status == 0
    result = call("convert.py", str(folder), str(tmp_path / "n.pt"), "--template", "llama3")
    assert result.status == 1 and "the tokenizer has no <|begin_of_text|>" in result.err


def test_what_our_own_template_gives_is_what_it_always_was():
    """<|InstructMark|>question<|ResponseMark|>answer<|eos|>, a system message before the next question."""
    tokenizer = CharTokenizer.train(["abcdef\n"])
    ids, mask = tokenizer.encode_chat(
        [
            {"role": "system", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "e", "weight": 0},
        ]
    )
    names = "<|InstructMark|>a\nb<|ResponseMark|>c<|eos|><|InstructMark|>d<|ResponseMark|>e<|eos|>"
    assert ids.tolist() == tokenizer.encode(names, special=True).tolist()
    assert mask.tolist() == [0] * 5 + [1, 1] + [0] * 5
    assert [TEMPLATES["nano"].text(trial) for trial in TRIALS][1] == "<|InstructMark|> S\n\n Q1\n<|ResponseMark|>"


# ------------------------------------------------------------------------------------------------------ use


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["model"].update(type="Unigram"), "byte-level BPE"),
        (lambda v: v.update(pre_tokenizer={"type": "Metaspace"}), "byte-level BPE"),
        (lambda v: v.update(added_tokens=[]), "special tokens"),
        (lambda v: v.pop("model"), "not a tokenizer.json"),
        (lambda v: v["model"].update(merges="x"), "cannot read it"),
    ],
)
def test_tokenizers_that_are_not_read_are_refused_by_name(folders, tmp_path, call, change, words):
    folder = shutil.copytree(folders / "qwen2", tmp_path / "m")
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    result = call("convert.py", str(folder), str(tmp_path / "m.pt"))
    assert result.status == 1 and words in result.err and "Traceback" not in result.err
    assert not (tmp_path / "m.pt").exists()


def test_everything_works_on_a_model_from_elsewhere(folders, work, call):
    """Data, fine-tuning, LoRA, preferences, talking, evaluation, and out again, with its own tokens and template."""
    assert call("convert.py", str(folders / "smollm"), "m.pt").status == 0
    Path("dataset").mkdir()
    words = ["cat", "dog", "sun", "sea", "hat", "pen"]
    rows = [{"question": f"say {a} {b}", "answer": f"{b} {a}"} for a in words for b in words]
    Path("dataset/sft.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pairs = [{"prompt": f"say {a} {b}", "chosen": f"{b} {a}", "rejected": a} for a in words for b in words]
    Path("dataset/dpo.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    text = "".join(f"document {i} of many<|eos|>" for i in range(90))
    Path("dataset/pretrain.txt").write_text(text, encoding="utf-8")
    result = call("data.py", "--tokenizer", "m.pt", "--block_size", "64")
    assert result.status == 0, result.err
    tune = ["--max_steps", "30", "--warmup_iters", "2", "--batch_size", "16", "--learning_rate", "1e-2"]
    tune += ["--tokenizer_path", "dataset/tokenizer.json"]
    text = ["--mask_documents", "true", "--block_size", "64", "--max_steps", "2"]
    result = call("train.py", "-t", "pretrain", "--from_checkpoint", "m.pt", *tune, *text)
    assert result.status == 0 and "mask_documents has no effect" not in result.err, result.err
    result = call("train.py", "-t", "sft", "--from_checkpoint", "m.pt", *tune)
    assert result.status == 0, result.err
    answer = call("inference.py", "-i", "-m", "checkpoint/sft.pt", "-p", "say cat dog", "-t", "0")
    assert answer.status == 0 and answer.out.strip() == "dog cat"
    lora = ["--use_lora", "true", "--stage", "style"]
    assert call("train.py", "-t", "sft", "--from_checkpoint", "m.pt", *tune, *lora, "--max_steps", "3").status == 0
    dpo = ["--from_checkpoint", "checkpoint/sft.pt", "--learning_rate", "1e-4", "--max_steps", "3"]
    result = call("train.py", "-t", "dpo", *tune, *dpo)
    assert result.status == 0, result.err
    Path("asked.jsonl").write_text(json.dumps(rows[1]) + "\n", encoding="utf-8")
    result = call("evaluate.py", "--questions", "asked.jsonl", "-m", "checkpoint/sft.pt")
    assert result.status == 0 and "100.0% (1/1)" in result.out
    out = call("convert.py", "m.pt", "tuned/", "--lora", "checkpoint/style_lora.pt")
    assert out.status == 0 and Path("tuned/tokenizer.json").is_file()
    back = ForeignTokenizer.from_dict(json.loads(Path("dataset/tokenizer.json").read_text(encoding="utf-8")), "t")
    assert np.array_equal(back.encode(TEXT), huggingface.read_folder("tuned")[1].encode(TEXT))


# ------------------------------------------------------------------------------------------------------ traps


def changed_folder(folders: Path, target: Path, kind: str, name: str, change) -> Path:
    """A copy of a folder of transformers with one of its JSON files changed in place by change(values)."""
    folder = shutil.copytree(folders / kind, target)
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    change(values)
    (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_what_fine_tuning_left_in_a_tokenizer_cuts_and_pads_nothing(folders, tmp_path):
    def change(values: dict) -> None:
        values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
        values["padding"] = {**padding, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
        values["model"]["dropout"] = 0.5

    folder = changed_folder(folders, tmp_path / "m", "smollm", "tokenizer.json", change)
    (_, plain), (_, changed) = huggingface.read_folder(folders / "smollm"), huggingface.read_folder(folder)
    for text in [TEXT, *random_texts(20)]:
        assert changed.encode(text).tolist() == plain.encode(text).tolist()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{% elif message['role'] == 'user' %}", "{% elif message['role'] == 'user' %}{% set x = 1 %}"),  # the same
        (
            "+ (message['content']) + '<|im_end|>\\n' }}{% endif %}",
            "+ (message['content'] | trim) + '<|im_end|>\\n' }}{% endif %}",
        ),
        (
            "+ (message['content']) + '<|im_end|>\\n' }}{% elif",
            "+ (message['content'] | trim) + '<|im_end|>\\n' }}{% elif",
        ),
        (
            "+ (message['content']) + '<|im_end|>\\n' }}{% endif %}",
            "+ (message['content'].split('</think>')[-1]) + '<|im_end|>\\n' }}{% endif %}",
        ),
    ],
)
def test_templates_that_differ_in_one_place_are_told_apart(old, new):
    jinja = chatml().to_jinja()
    assert old in jinja
    found = recognise(jinja.replace(old, new), {})
    assert (found == chatml()) == ("set x" in new) and (found is None) == ("set x" not in new)


def test_templates_may_ask_for_tools_and_mark_what_is_learned():
    jinja = "{% if tools is not none %}x{% endif %}" + chatml().to_jinja()
    jinja = jinja.replace("{{ '<|im_start|>assistant", "{%- generation -%}{{ '<|im_start|>assistant", 1)
    assert recognise(jinja, {}) == chatml()


@pytest.mark.parametrize(
    ("kind", "name", "change", "words"),
    [
        ("llama3", "config.json", lambda v: v.update(num_hidden_layers=10**12), "num_hidden_layers"),
        ("llama3", "config.json", lambda v: v.update(num_hidden_layers=2.0), "num_hidden_layers"),
        ("llama3", "config.json", lambda v: v.update(rope_parameters=[1]), "rope_parameters"),
        ("llama3", "config.json", lambda v: v.update(model_type=["llama"]), "model_type"),
        ("llama3", "config.json", lambda v: v.update(quantization_config={"bits": 4}), "quantised"),
        ("llama3", "config.json", lambda v: v.update(max_position_embeddings=1 << 20, head_dim=1 << 17), "RoPE"),
        ("mistral", "config.json", lambda v: v.update(sliding_window="abc"), "sliding_window"),
        (
            "qwen3",
            "config.json",
            lambda v: v.update(use_sliding_window=True, sliding_window=8, layer_types=5),
            "layer_types",
        ),
        ("llama3", "config.json", lambda v: v["rope_parameters"].update(rope_type="yarn", beta_slow=4), "YaRN"),
        ("llama3", "tokenizer_config.json", lambda v: v.clear(), None),
        ("smollm", "tokenizer.json", lambda v: v["model"].update(continuing_subword_prefix="##"), "cannot read it"),
        ("smollm", "tokenizer.json", lambda v: v["model"]["vocab"].update(zz=70000), "rows"),
        ("smollm", "tokenizer.json", lambda v: [t.update(rstrip=True) for t in v["added_tokens"]], "white space"),
        ("qwen2", "model.safetensors.index.json", lambda v: v.update(weight_map=[1]), "weight_map"),
    ],
)
def test_files_that_say_something_else_are_refused(folders, tmp_path, call, kind, name, change, words):
    folder = changed_folder(folders, tmp_path / "m", kind, name, change)
    result = call("convert.py", str(folder), str(tmp_path / "m.pt"))
    assert "Traceback" not in result.err and result.err.count("\n") <= 1
    if words:
        assert result.status == 1 and words in result.err and result.err.count(str(folder)) <= 1
        assert not (tmp_path / "m.pt").exists()


def test_a_mistral_ignores_a_switch_that_qwen_has(folders, tmp_path):
    change = lambda values: values.update(use_sliding_window=False)  # noqa: E731
    folder = changed_folder(folders, tmp_path / "m", "mistral", "config.json", change)
    assert huggingface.read_folder(folder)[0].config.windows == [8, 8]


def test_yarn_is_that_of_transformers(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    for n, settings in enumerate(({"original_max_position_embeddings": 32}, {}, {"beta_fast": 32})):
        rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, **settings}
        change = lambda values, rope=rope: values.update(rope_parameters=rope)  # noqa: E731
        folder = changed_folder(folders, tmp_path / str(n), "llama3", "config.json", change)
        model, _ = huggingface.read_folder(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        idx = torch.randint(0, model.config.vocab_size, (2, 100))
        with torch.no_grad():
            expected = theirs(idx).logits
            assert (model.eval()(idx)[0] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_numbers_other_than_floating_point_are_refused(folders, tmp_path, call):
    import safetensors.torch

    folder = shutil.copytree(folders / "smollm", tmp_path / "m")
    weights = {name: weight.to(torch.int8) for name, weight in huggingface.read_weights(folder).items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = call("convert.py", str(folder), str(tmp_path / "m.pt"))
    assert result.status == 1 and "torch.int8" in result.err


def test_a_long_text_keeps_the_token_that_begins_it(folders):
    from serving.text_generator import TextGenerator

    model, tokenizer = huggingface.read_folder(folders / "llama3")
    generator = TextGenerator(model, tokenizer, torch.device("cpu"), instruct=False)
    bos = tokenizer.special_tokens["<|begin_of_text|>"]
    assert generator.prompt_ids("Hello")[0] == bos
    with pytest.warns(UserWarning, match="reads the newest"):
        ids = generator.prompt_ids("Hello world " * 200)
    assert ids[0] == bos and ids.count(bos) == 1 and len(ids) == 96
    with pytest.raises(ValueError, match="the prompt is empty"):
        generator.prompt_ids("")


# ------------------------------------------------------------------------------------------------------ GGUF of others


def write_by_hand(path: Path, model, tokenizer, change) -> None:
    """A GGUF file of a model, with change(fields, tensors) on what the package reads of it."""
    package = pytest.importorskip("gguf")
    gguf.write_gguf(path, model, tokenizer, "float32")
    reader = package.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values = {name: (field.contents(), field.types) for name, field in fields.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    values.pop("general.architecture")
    change(values, tensors)
    writer = package.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, (value, types) in values.items():
        writer.add_key_value(name, value, types[0], sub_type=types[1] if len(types) > 1 else None)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_llama_with_biases_on_queries_alone_turns_neighbours(folders, tmp_path):
    model, tokenizer = huggingface.read_folder(folders / "smollm")
    idx = torch.randint(0, 300, (2, 60))

    def add_biases(values: dict, tensors: dict) -> None:
        for i in range(2):
            for name in ("attn_q", "attn_k", "attn_v"):
                rows = len(tensors[f"blk.{i}.{name}.weight"])
                tensors[f"blk.{i}.{name}.bias"] = np.zeros(rows, np.float32)

    write_by_hand(tmp_path / "m.gguf", model, tokenizer, add_biases)
    back, _ = gguf.read_gguf(tmp_path / "m.gguf")
    with torch.no_grad():
        assert (back.eval()(idx)[0] - model.eval()(idx)[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda v, t: v.update({"llama.rope.dimension_count": (8, v["llama.rope.dimension_count"][1])}),
            "dimension_count",
        ),
        (lambda v, t: v.pop("tokenizer.ggml.token_type"), "token_type"),
        (lambda v, t: v.pop("tokenizer.ggml.bos_token_id"), "bos_token_id"),
        (lambda v, t: v.update({"tokenizer.ggml.pre": ("dbrx", v["tokenizer.ggml.pre"][1])}), "dbrx"),
    ],
)
def test_gguf_files_that_say_something_else_are_refused(folders, tmp_path, change, words):
    model, tokenizer = huggingface.read_folder(folders / "llama3")
    write_by_hand(tmp_path / "m.gguf", model, tokenizer, change)
    with pytest.raises(ValueError, match=words):
        gguf.read_gguf(tmp_path / "m.gguf")


def test_a_llama3_file_without_a_word_about_bos_adds_it_as_llama_cpp_does(folders, tmp_path):
    model, tokenizer = huggingface.read_folder(folders / "llama3")
    write_by_hand(tmp_path / "m.gguf", model, tokenizer, lambda v, t: v.pop("tokenizer.ggml.add_bos_token"))
    assert gguf.read_gguf(tmp_path / "m.gguf")[1].adds_bos


def test_a_normalizer_that_llama_cpp_lacks_is_refused(folders, tmp_path):
    change = lambda values: values.update(normalizer={"type": "Lowercase"})  # noqa: E731
    model, tokenizer = huggingface.read_folder(
        changed_folder(folders, tmp_path / "m", "smollm", "tokenizer.json", change)
    )
    with pytest.raises(ValueError, match="no name in"):
        gguf.write_gguf(tmp_path / "m.gguf", model, tokenizer, "float32")


@pytest.mark.parametrize("count", ["tensors", "keys", "array", "text"])
def test_a_header_that_counts_more_than_its_file_holds_ends_at_once(tmp_path, call, count):
    n = {name: (1 << 40).to_bytes(8, "little") for name in ("tensors", "keys", "array", "text")}
    one, none = (1).to_bytes(8, "little"), (0).to_bytes(8, "little")
    key = (
        one
        + b"k"
        + {
            "array": (9).to_bytes(4, "little") + bytes(4) + n["array"],
            "text": (8).to_bytes(4, "little") + n["text"],
        }.get(count, b"")
    )
    header = b"GGUF" + (3).to_bytes(4, "little") + (n["tensors"] if count == "tensors" else none)
    (tmp_path / "m.gguf").write_bytes(header + (n["keys"] if count == "keys" else one) + key)
    result = call("convert.py", str(tmp_path / "m.gguf"), str(tmp_path / "m.pt"))
    assert result.status == 1 and "damaged" in result.err
