"""nanoGPT's checkpoints (out/ckpt.pt), to go on with them here.

    model, tokenizer = read_nanogpt("out/ckpt.pt", "data/shakespeare_char/meta.pkl")

Its network is GPT-2's. Its checkpoint does not hold the vocabulary: that of characters is in meta.pkl, GPT-2's in the
tokenizer.json of any GPT-2.
"""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch

from base.configuration import UserError, read_json
from model import GPT
from text.foreign import ForeignTokenizer
from text.tokenizer import SPECIAL_TOKENS, CharTokenizer, Tokenizer
from weights import gpt2
from weights.huggingface import to_ours

MAX_META = 64 << 20  # bytes of a meta.pkl
BELOW = 20.0  # nats that the logits of added tokens lie below all others together


def read_nanogpt(path: str, vocabulary: str) -> tuple[GPT, Tokenizer]:
    """The model of a checkpoint, and the tokenizer of a meta.pkl or tokenizer.json; raises UserError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = [name for name in ("model", "model_args") if not isinstance(checkpoint.get(name), dict)]
        if missing:
            raise UserError(f"{path}: not a checkpoint of nanoGPT: it has no {', '.join(missing)}")
        settings, weights = checkpoint["model_args"], checkpoint["model"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # torch raises whatever the zip reader and the unpickler do, and advises to trust it
        raise UserError(f"{path}: not a checkpoint of nanoGPT, or damaged ({type(error).__name__})") from None
    if not vocabulary:
        raise UserError(
            f"{path}: checkpoints of nanoGPT have no vocabulary: --tokenizer data/NAME/meta.pkl (or GPT-2's "
            "tokenizer.json) gives it"
        )
    sizes = {name: settings.get(name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes.values()):
        raise UserError(f"{path}: its model_args lack {', '.join(n for n, size in sizes.items() if size is None)}")
    config = gpt2.make_config(**sizes, mlp="gelu", bias=bool(settings.get("bias", True)))
    named = {str(name).removeprefix("_orig_mod."): weight for name, weight in weights.items()}  # torch.compile's prefix
    if not all(isinstance(weight, torch.Tensor) and weight.layout is torch.strided for weight in named.values()):
        raise UserError(f"{path}: its weights are not tensors")
    ours = to_ours(gpt2.from_files(named), config, path)
    if not all(weight.isfinite().all() for weight in ours.values()):
        raise UserError(f"{path}: its weights are not finite: that run diverged")
    model = GPT(config)
    model.load_state_dict(ours)
    if Path(vocabulary).suffix == ".json":
        names = {"eos_token": "<|endoftext|>"}
        values = read_json(vocabulary)
        return model, ForeignTokenizer.from_tokenizer_json(values, names, config.vocab_size, vocabulary)
    characters = read_characters(vocabulary)
    if len(characters) != config.vocab_size:
        raise UserError(f"{vocabulary}: {len(characters)} characters, but the model has {config.vocab_size}")
    return with_special_tokens(model), CharTokenizer(characters)


class PlainUnpickler(pickle._Unpickler):
    """Reads dicts, lists, texts and numbers; whatever would import or run something is refused.

    It builds on the unpickler written in Python: that in C sets aside memory by a number which the file names.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def read_characters(path: str) -> str:
    """The characters of a meta.pkl in the order of their ids; raises UserError."""
    try:
        if Path(path).stat().st_size > MAX_META:
            raise ValueError("too large")
        with open(path, "rb") as file:
            names = PlainUnpickler(file).load()["itos"]
        if not all(isinstance(name, str) and len(name) == 1 for name in names.values()):
            raise ValueError("its tokens are not single characters")
        characters = "".join(names[i] for i in range(len(names)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # an unpickler raises anything on a damaged file
        raise UserError(f"{path}: not a meta.pkl of nanoGPT: {error or type(error).__name__}") from None
    return characters


def with_special_tokens(model: GPT) -> GPT:
    """The same network with our special tokens in front of its vocabulary, which it never draws by itself.

    Their rows of the embedding, which is the output layer too, are solved for by least squares: over hidden states of
    text that the model itself draws, their logits are to lie BELOW nats under the logarithm of the others' sum.
    """
    config, n_added = model.config, len(SPECIAL_TOKENS)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    idx = torch.randint(config.vocab_size, (16, 1))
    drawn = [tokens[:, None] for tokens in model.eval().generate(idx, config.block_size - 1, seed=0)]
    torch.random.set_rng_state(generator_state)
    idx = torch.cat([idx, *drawn], 1)[:, : config.block_size]
    with torch.no_grad():
        hidden = model.hidden(idx).flatten(0, 1)
        wanted = model.lm_head(hidden).logsumexp(-1) - BELOW
        ridge = 1e-3 * hidden.square().sum(0).mean() * torch.eye(config.n_embd)
        row = torch.linalg.lstsq(hidden.T @ hidden + ridge, (hidden.T @ wanted)[:, None]).solution[:, 0]
    weights = model.state_dict()
    embedding = torch.cat([row.expand(n_added, -1), weights["token_embedding.weight"]])
    larger = GPT(dataclasses.replace(config, vocab_size=config.vocab_size + n_added))
    larger.load_state_dict({**weights, "token_embedding.weight": embedding, "lm_head.weight": embedding})
    return larger
