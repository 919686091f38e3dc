"""Hugging Face's format: a folder with config.json, model.safetensors and tokenizer.json.

    write_folder("answer", model, tokenizer, torch.float32)     # AutoModelForCausalLM.from_pretrained("answer")
    model, tokenizer = read_folder("answer")

Our network is, with other names, that of six of its classes:

    qk_norm                         Qwen3       attention windows of one size are its sliding_window
    qk_norm and experts             Qwen3-MoE
    neither                         Llama       with `bias`, too
    neither, windows in all layers  Mistral
    neither, but qkv_bias           Qwen2
    layernorm, learned positions    GPT-2       (gpt2.py)
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from base.configuration import UserError, read_json
from model import GPT, ModelConfig
from text.tokenizer import Tokenizer
from weights import gpt2
from weights.tokenizer_json import read_tokenizer, special_names, to_tokenizer_json

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
LLAMA3_BOUNDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of its RoPE scaling, in turns
YARN = {  # what its RoPE scaling is computed with
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}
MAX_SHARDS, MAX_LAYERS = 1000, 10_000
NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BUFFERS = (".rotary_emb.inv_freq",)  # computed anew, which old files hold


# ------------------------------------------------------------------------------------------------------ weights


def correspondence(config: ModelConfig) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Our weights and theirs: (name, [(their name, rows), ...]).

    Ours are theirs on top of each other, row by row: queries, keys and values, or gate and up. The experts' weights,
    which have three dimensions, are (expert, row), flattened.
    """
    if config.norm == "layernorm":
        yield from gpt2.correspondence(config)
        return
    head, C, H = config.head_dim, config.n_embd, config.n_hidden
    rows = {"q": config.n_head * head, "k": config.n_kv_head * head, "v": config.n_kv_head * head}
    kinds = ("weight", "bias") if config.bias else ("weight",)
    qkv_kinds = ("weight", "bias") if config.bias or config.qkv_bias else ("weight",)
    yield "token_embedding.weight", [("model.embed_tokens.weight", config.vocab_size)]
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield f"{ours}.attention_norm.weight", [(f"{theirs}.input_layernorm.weight", C)]
        for kind in qkv_kinds:
            yield f"{ours}.attention.qkv.{kind}", [(f"{theirs}.self_attn.{n}_proj.{kind}", rows[n]) for n in "qkv"]
        for kind in kinds:
            yield f"{ours}.attention.out.{kind}", [(f"{theirs}.self_attn.o_proj.{kind}", C)]
        if config.qk_norm:
            yield f"{ours}.attention.q_norm.weight", [(f"{theirs}.self_attn.q_norm.weight", head)]
            yield f"{ours}.attention.k_norm.weight", [(f"{theirs}.self_attn.k_norm.weight", head)]
        yield f"{ours}.mlp_norm.weight", [(f"{theirs}.post_attention_layernorm.weight", C)]
        if config.n_expert:
            experts = [f"{theirs}.mlp.experts.{e}" for e in range(config.n_expert)]
            yield f"{ours}.mlp.router.weight", [(f"{theirs}.mlp.gate.weight", config.n_expert)]
            yield f"{ours}.mlp.up", [(f"{e}.{part}_proj.weight", H) for e in experts for part in ("gate", "up")]
            yield f"{ours}.mlp.down", [(f"{e}.down_proj.weight", C) for e in experts]
        else:
            for kind in kinds:
                yield f"{ours}.mlp.up.{kind}", [(f"{theirs}.mlp.{part}_proj.{kind}", H) for part in ("gate", "up")]
                yield f"{ours}.mlp.down.{kind}", [(f"{theirs}.mlp.down_proj.{kind}", C)]
    yield "norm.weight", [("model.norm.weight", C)]
    if not config.tie_embeddings:
        yield "lm_head.weight", [("lm_head.weight", config.vocab_size)]


def to_theirs(weights: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights under their names."""
    theirs = {}
    for name, parts in correspondence(config):
        weight = weights[name]
        if weight.dim() == 3:
            weight = weight.flatten(0, 1)
        pieces = weight.split([rows for _, rows in parts])
        theirs |= {part: piece.contiguous() for (part, _), piece in zip(parts, pieces, strict=True)}
    return theirs


def to_ours(weights: dict[str, torch.Tensor], config: ModelConfig, where: str) -> dict[str, torch.Tensor]:
    """Weights under our names, as float32; raises UserError where some are missing, left over, or of another shape."""
    layers = {match[1] for name in weights if (match := re.match(r"(?:model\.layers|transformer\.h)\.(\d+)\.", name))}
    if len(layers) != config.n_layer:  # before anything is built by a number from an untrusted file
        raise UserError(f"{where}: its config says {config.n_layer} layers, its weights have {len(layers)}")
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in GPT(config).state_dict().items()}
    weights = {name: weight for name, weight in weights.items() if not name.endswith(BUFFERS)}
    for name, weight in weights.items():
        if weight.dtype not in NUMBERS:
            raise UserError(f"{where}: {name} is {weight.dtype}: quantised weights are not read from folders")
    ours, used = {}, set()
    for name, parts in correspondence(config):
        shape = shapes[name]
        for part, rows in parts:
            expected = (rows, *shape[1:]) if len(shape) < 3 else (rows, shape[-1])
            found = tuple(weights[part].shape) if part in weights else None
            if found != expected:
                raise UserError(f"{where}: {part} has the shape {found}, by its config {expected}")
        used.update(part for part, _ in parts)
        ours[name] = torch.cat([weights[part].float() for part, _ in parts]).view(shape)
    left = sorted(set(weights) - used - {"lm_head.weight"})
    if left:
        raise UserError(f"{where}: weights that this network has no place for: {', '.join(left[:4])}")
    if config.tie_embeddings:
        ours["lm_head.weight"] = ours["token_embedding.weight"]
    return ours


# ------------------------------------------------------------------------------------------------------ the config


def model_type(config: ModelConfig) -> str:
    """Which of their classes computes what our network does; raises UserError where none does, and says why."""
    if gpt2.is_gpt2(config):
        return "gpt2"
    windows = set(config.windows)
    refused = {
        f"attention {','.join(config.attention)}: theirs is full": set(config.attention) != {"full"},
        f"mlp {config.mlp}: theirs are swiglu": config.mlp != "swiglu",
        f"norm {config.norm}: theirs is rmsnorm": config.norm != "rmsnorm",
        "learned positions: theirs are RoPE": not config.use_rope,
        "is_causal false: theirs are causal": not config.is_causal,
        "masked diffusion: theirs predict the next token alone": config.mask_token,
        "n_shared_expert: theirs has none": config.n_shared_expert > 0,
        "expert_balance bias: theirs have no biases on the choice of experts": config.expert_balance == "bias"
        and config.n_expert > 0,
        "attention_window in some layers, with experts": len(windows) > 1 and config.n_expert > 0,
        "experts without qk_norm": config.n_expert > 0 and not config.qk_norm,
        "bias or qkv_bias with qk_norm": (config.bias or config.qkv_bias) and config.qk_norm,
        "attention_window with several sizes: theirs have one": len(windows - {0}) > 1,
        "attention_window in some layers without qk_norm": len(windows) > 1 and not config.qk_norm,
        "attention_window with bias or qkv_bias": bool(windows - {0}) and (config.bias or config.qkv_bias),
    }
    for reason, is_refused in refused.items():
        if is_refused:
            raise UserError(f"Hugging Face: no model there computes this one: {reason}")
    if config.qk_norm:
        return "qwen3_moe" if config.n_expert else "qwen3"
    if config.qkv_bias and not config.bias:
        return "qwen2"
    return "mistral" if windows != {0} else "llama"


def to_config(config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json, for version 4 of transformers and version 5."""
    token_ids = {name: tokenizer.special_tokens.get(token) for name, token in special_names(tokenizer).items()}
    kind, window = model_type(config), max(config.windows)
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "bos_token_id": token_ids.get("bos_token"),
        "eos_token_id": token_ids.get("eos_token"),
        "pad_token_id": token_ids.get("pad_token"),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "gpt2":
        return common | gpt2.to_config(config)
    theta, scaling = config.rope_theta, {"rope_type": "default"}
    if config.rope_scaling == "ntk" and config.head_dim > 2:  # a larger base is all that it is
        theta *= config.rope_factor ** (config.head_dim / (config.head_dim - 2))
    elif config.rope_scaling in ("linear", "yarn", "llama3"):
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
        if config.rope_scaling == "llama3":
            scaling |= LLAMA3_BOUNDS
        if config.rope_scaling != "linear":
            scaling["original_max_position_embeddings"] = config.rope_trained_length
    values = common | {
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {**scaling, "rope_theta": theta},
    }
    if kind == "llama":
        values["mlp_bias"] = config.bias
    elif kind == "mistral":
        values["sliding_window"] = window
    elif kind.startswith("qwen3"):
        kinds = ["sliding_attention" if w else "full_attention" for w in config.windows]
        values |= {"use_sliding_window": window > 0, "sliding_window": window or None, "layer_types": kinds}
        values["max_window_layers"] = 0 if window else config.n_layer
    if kind == "qwen3_moe":
        values |= {
            "num_experts": config.n_expert,
            "num_experts_per_tok": config.n_expert_per_token,
            "moe_intermediate_size": config.n_hidden,
            "norm_topk_prob": config.n_expert_per_token > 1,  # with one expert, its probability is the gate
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return values


def from_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our config for theirs; raises UserError for what our network does not compute."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(f"{where}: model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    if kind == "gpt2":
        return gpt2.from_config(values, where)

    def number(name: str, default: float | None = None) -> Any:
        value = values.get(name, default)
        if value is None or isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: {name} must be a number, got {json.dumps(value)}")
        return value

    for name in ("num_attention_heads", "hidden_size", "num_hidden_layers", "max_position_embeddings", "vocab_size"):
        if not isinstance(number(name), int) or not 1 <= number(name) <= 1 << 24:
            raise UserError(f"{where}: {name} must be a whole number from 1 on, got {json.dumps(values[name])}")
    heads, width = number("num_attention_heads"), number("hidden_size")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters must be an object, got {json.dumps(rope)[:40]}")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    is_moe, has_bias = kind == "qwen3_moe", bool(values.get("attention_bias"))
    kinds, window = layer_kinds(values, kind, number("num_hidden_layers"), where)
    refused = {
        f"hidden_act {values.get('hidden_act')}": values.get("hidden_act", "silu") not in ("silu", "swish"),
        f"rope_type {scaling}": scaling not in ("default", "linear", "yarn", "llama3"),
        "llama3's RoPE with other bounds": scaling == "llama3" and {**rope, **LLAMA3_BOUNDS} != rope,
        "YaRN with other settings": scaling == "yarn" and any(rope.get(n, v) not in (None, v) for n, v in YARN.items()),
        f"quantised weights ({values.get('quantization_config')!s:.40})": bool(values.get("quantization_config")),
        "biases in attention alone": has_bias != bool(values.get("mlp_bias")) and kind != "qwen2",
        "biases with qk_norm": has_bias and kind.startswith("qwen3"),
        "layers without experts": is_moe and (values.get("mlp_only_layers") or number("decoder_sparse_step", 1) != 1),
        "norm_topk_prob": is_moe and bool(values.get("norm_topk_prob")) != (number("num_experts_per_tok") > 1),
    }
    for reason, is_refused in refused.items():
        if is_refused:
            raise UserError(f"{where}: our network has no {reason}")
    factor = rope.get("factor", 1.0) if scaling != "default" else 1.0
    windows = [window if is_sliding else 0 for is_sliding in kinds]
    trained_length = rope.get("original_max_position_embeddings")
    if scaling == "yarn" and trained_length is None:  # what transformers takes then
        trained_length = number("max_position_embeddings")
    shape = {
        "block_size": number("max_position_embeddings"),
        "vocab_size": number("vocab_size"),
        "n_layer": len(kinds),
        "n_head": heads,
        "n_kv_head": values.get("num_key_value_heads") or heads,
        "n_embd": width,
        "head_dim": values.get("head_dim") or width // heads,
        "n_hidden": number("moe_intermediate_size") if is_moe else number("intermediate_size"),
        "bias": has_bias and kind != "qwen2",
        "qkv_bias": kind == "qwen2",
        "norm_eps": number("rms_norm_eps", 1e-6),
        "qk_norm": kind.startswith("qwen3"),
        "attention_window": windows if any(windows) else [],
        "tie_embeddings": bool(values.get("tie_word_embeddings")),
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        "rope_scaling": "none" if scaling == "default" else scaling,
        "rope_factor": factor,
        "rope_trained_length": trained_length,
        "n_expert": number("num_experts", values.get("num_local_experts")) if is_moe else 0,
        "n_expert_per_token": number("num_experts_per_tok") if is_moe else 2,
        "expert_balance": "loss" if is_moe else "none",
    }
    try:
        return ModelConfig(**shape)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def layer_kinds(values: dict[str, Any], kind: str, layers: int, where: str) -> tuple[list[bool], int]:
    """Whether each layer has a sliding window, and its size (0: no layer has one), by the rules of their classes."""
    if layers > MAX_LAYERS:
        raise UserError(f"{where}: num_hidden_layers is {layers:,}")
    window = values.get("sliding_window", 4096)  # their default
    if not (kind == "mistral" or values.get("use_sliding_window")) or window is None:
        return [False] * layers, 0
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise UserError(f"{where}: sliding_window must be a whole number from 1 on, got {json.dumps(window)[:40]}")
    if kind in ("mistral", "qwen3_moe"):  # in all layers
        return [True] * layers, window
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", 28)  # their default
        return [i >= first for i in range(layers)], window
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(f"{where}: layer_types must be a list of {layers}, one for each layer")
    return [kind == "sliding_attention" for kind in kinds], window


# ------------------------------------------------------------------------------------------------------ folders


def write_folder(folder: str | Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Write a model and its tokenizer; the folder appears whole, or not at all. Raises UserError."""
    import safetensors
    import safetensors.torch

    folder, config = Path(folder), model.config
    if folder.exists():
        raise UserError(f"{folder}: exists already")
    values = to_config(config, tokenizer, dtype)
    weights = to_theirs(model.state_dict(), config)
    if values["model_type"] == "gpt2":
        weights = gpt2.transposed(gpt2.with_zero_biases(weights))
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": values,
        "generation_config.json": {
            **{name: values[name] for name in ("bos_token_id", "pad_token_id")},
            "eos_token_id": sorted(tokenizer.stop_tokens),
        },
        "tokenizer.json": to_tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.block_size,
            "clean_up_tokenization_spaces": False,
            "chat_template": getattr(tokenizer, "jinja", "") or tokenizer.template.to_jinja(),
            **special_names(tokenizer),
        },
    }
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        for name, contents in files.items():
            text = json.dumps(contents, ensure_ascii=False, indent=2) + "\n"
            (temporary / name).write_text(text, encoding="utf-8", newline="\n")
        safetensors.torch.save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        temporary.chmod(0o755)
        temporary.rename(folder)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{folder}: not written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_folder(folder: str | Path, template: str = "") -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a folder; raises UserError that names the file at fault.

    template: the name of the chat template of a foreign tokenizer, where its own is none that is known.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'}: must be a JSON object")
    try:
        config = from_config(values, str(folder / "config.json"))
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise UserError(f"{folder / 'config.json'}: damaged: {error}") from None
    tokenizer = read_tokenizer(folder, values, template)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    weights = read_weights(folder)
    if config.norm == "layernorm":
        weights = gpt2.transposed(gpt2.from_files(weights))
    weights = to_ours(weights, config, str(folder))
    model = GPT(config)
    model.load_state_dict(weights)
    return model, tokenizer


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the parts that model.safetensors.index.json names."""
    import safetensors
    import safetensors.torch

    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        try:
            named = {str(name) for name in read_json(index)["weight_map"].values()}
        except (TypeError, KeyError, AttributeError):
            raise UserError(f"{index}: damaged: it has no weight_map") from None
        files = [folder / Path(name).name for name in sorted(named)[:MAX_SHARDS]]
    weights = {}
    for file in files:
        if not file.is_file():
            has_pickle = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
            reason = ": pickled weights are not read; save_pretrained() of transformers writes this file"
            raise UserError(f"{file}: no such file{reason if has_pickle else ''}")
        try:
            weights |= safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise UserError(f"{file}: damaged: {error}") from None
    return weights
