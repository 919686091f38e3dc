"""GPT-2's network (Radford et al. 2019), as Hugging Face's folders and nanoGPT's checkpoints name its parts.

It is ours with norm layernorm, learned positions, and an MLP of gelu (nanoGPT) or its approximation by tanh (GPT-2).
"""

from collections.abc import Iterator
from typing import Any

import torch

from base.configuration import UserError
from model import ModelConfig

GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # their names -> ours
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, which old files hold
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def is_gpt2(config: ModelConfig) -> bool:
    """Whether GPT-2 computes what our network of this config does."""
    is_full = set(config.attention) == {"full"} and not max(config.windows)
    is_dense = is_full and not config.n_expert and config.n_kv_head == config.n_head
    same_heads = config.head_dim * config.n_head == config.n_embd and not config.qk_norm
    same_layers = config.norm == "layernorm" and not config.use_rope and config.mlp in GELU.values()
    return (
        is_dense and same_heads and same_layers and config.is_causal and not config.mask_token and not config.qkv_bias
    )


def correspondence(config: ModelConfig) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Our weights and theirs: (name, [(their name, rows)]), in the form of huggingface.correspondence()."""
    C, H = config.n_embd, config.n_hidden
    kinds = ("weight", "bias") if config.bias else ("weight",)
    yield "token_embedding.weight", [("transformer.wte.weight", config.vocab_size)]
    yield "position_embedding.weight", [("transformer.wpe.weight", config.block_size)]
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        for kind in kinds:
            yield f"{ours}.attention_norm.{kind}", [(f"{theirs}.ln_1.{kind}", C)]
            yield f"{ours}.attention.qkv.{kind}", [(f"{theirs}.attn.c_attn.{kind}", 3 * C)]
            yield f"{ours}.attention.out.{kind}", [(f"{theirs}.attn.c_proj.{kind}", C)]
            yield f"{ours}.mlp_norm.{kind}", [(f"{theirs}.ln_2.{kind}", C)]
            yield f"{ours}.mlp.up.{kind}", [(f"{theirs}.mlp.c_fc.{kind}", H)]
            yield f"{ours}.mlp.down.{kind}", [(f"{theirs}.mlp.c_proj.{kind}", C)]
    for kind in kinds:
        yield f"norm.{kind}", [(f"transformer.ln_f.{kind}", C)]
    if not config.tie_embeddings:
        yield "lm_head.weight", [("lm_head.weight", config.vocab_size)]


def transposed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face keeps the matrices of the layers as (in, out), a linear layer as (out, in)."""
    return {name: weight.T.contiguous() if name.endswith(MATRICES) else weight for name, weight in weights.items()}


def from_files(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names of correspondence(): old files have no "transformer." and hold masks."""
    has_prefix = any(name.startswith("transformer.") for name in weights)
    prefix = "" if has_prefix else "transformer."
    return {
        name if name == "lm_head.weight" else prefix + name: weight
        for name, weight in weights.items()
        if not name.endswith(BUFFERS)
    }


def with_zero_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's GPT-2 always has biases: zero, where ours has none."""
    names = [name for name in weights if ".h." in name or ".ln_f." in name]
    biases = {name.replace(".weight", ".bias"): len(weights[name]) for name in names}
    return {name: torch.zeros(rows) for name, rows in biases.items()} | weights


def to_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of the network."""
    return {
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_hidden,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.mlp],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def from_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our config for theirs; raises UserError for what our network does not compute."""
    activation = values.get("activation_function", "gelu_new")
    refused = {
        f"activation_function {activation}": activation not in GELU,
        "scale_attn_by_inverse_layer_idx": bool(values.get("scale_attn_by_inverse_layer_idx")),
        "attention without scaling": not values.get("scale_attn_weights", True),
    }
    for reason, is_refused in refused.items():
        if is_refused:
            raise UserError(f"{where}: our network has no {reason}")
    names = {"block_size": "n_positions", "vocab_size": "vocab_size"} | {n: n for n in ("n_layer", "n_head", "n_embd")}
    shape = {ours: values.get(theirs) for ours, theirs in names.items()}
    for ours, value in shape.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{where}: {names[ours]} must be a number, got {value!r}")
    return make_config(
        **shape,
        n_hidden=values.get("n_inner"),
        mlp=GELU[activation],
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        bias=True,
        tie_embeddings=bool(values.get("tie_word_embeddings", True)),
    )


def make_config(**settings: Any) -> ModelConfig:
    """The config of a GPT-2 of these sizes."""
    return ModelConfig(**{"norm": "layernorm", "use_rope": False, "qk_norm": False, **settings})
