"""What the tests of other programs share: models whose every weight matters, and a real llama.cpp."""

import json
import math
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model import GPT, ModelConfig


def make_model(vocab_size: int, seed: int = 0, std: float = 0.15, **shape) -> GPT:
    """A model with random weights of some size, so that a mistake shows and that it is sure of what it says."""
    torch.manual_seed(seed)
    config = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64, **shape}
    model = GPT(ModelConfig(vocab_size=vocab_size, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn_like(parameter) + (parameter.dim() == 1))
        if model.vision is not None:  # whose pixels are divided by as much
            model.vision.projection.weight.mul_(math.sqrt(model.vision.projection.in_features))
        for name, buffer in model.named_buffers():
            if name.endswith("choice_bias"):
                buffer.copy_(std * torch.randn_like(buffer))
    return model


def start_llama_cpp(path: Path, n_ctx: int) -> Callable[..., dict]:
    """A real llama.cpp with a GGUF file: post("/tokenize", content=...) -> its answer."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(path), n_ctx, -1
    server = xllamacpp.Server(params)

    def post(name: str, **values) -> dict:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}{name}", json.dumps(values).encode(), headers)
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    return post


def chat(post: Callable[..., dict], question: str, max_tokens: int) -> str:
    """llama.cpp's greedy answer to a question."""
    messages = [{"role": "user", "content": question}]
    reply = post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=max_tokens)
    return reply["choices"][0]["message"]["content"]
