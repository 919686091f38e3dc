"""GGUF, the format of llama.cpp, Ollama and LM Studio: one file with key-value metadata, tokenizer and tensors.

    write_gguf("answer.gguf", model, tokenizer, "q8_0")

llama.cpp knows our network as llama; with qk_norm as qwen3 (and qwen3moe), with qkv_bias as qwen2. It tokenises with
GPT-2's byte-level BPE (model "gpt2"): text is split into words, the words into bytes, and neighbours are merged as long
as a rule says so. A character tokenizer becomes one whose rules build every character out of its bytes.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base.configuration import UserError
from layers.rope import rope_frequencies
from model import GPT, ModelConfig
from text.foreign import PRE_TOKENIZERS, ForeignTokenizer, begin_with, byte_level_json
from text.tokenizer import SPECIAL_TOKENS, BPETokenizer, CharTokenizer, Tokenizer
from weights.huggingface import model_type, to_ours, to_theirs
from weights.tokenizer_json import special_names

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
NAMES = {  # Hugging Face's names of weights -> GGUF's
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
LLAMA3_LENGTH = 8192  # what its RoPE scaling was computed from in all of Meta's models
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


def import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need llama.cpp's own package: pip install gguf") from None
    return gguf


# ------------------------------------------------------------------------------------------------------ weights


def to_gguf_names(weights: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Hugging Face's weights under GGUF's names; the experts of a layer are stacked."""
    result: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name, weight in weights.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight", name):
            experts.setdefault(f"blk.{match[1]}.ffn_{match[2]}_exps.weight", []).append(weight)
            continue
        stem, kind = name.rsplit(".", 1)
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
        ours = f"blk.{layer[1]}.{NAMES[layer[2]]}" if layer else NAMES[stem]
        if turns_neighbours(config) and ours.endswith(("attn_q", "attn_k")):
            weight = interleave_pairs(weight, config.head_dim)
        result[f"{ours}.{kind}"] = weight
    return result | {name: torch.stack(parts) for name, parts in experts.items()}


def turns_neighbours(config: ModelConfig) -> bool:
    """Whether llama.cpp's architecture of a model applies RoPE to neighbouring numbers, as Meta's own code does."""
    return not config.qk_norm and (config.bias or not config.qkv_bias)  # that of llama


def llama3_factors(config: ModelConfig) -> torch.Tensor:
    """By what llama3's RoPE scaling divides the frequencies of the pairs (head_dim / 2,): llama.cpp keeps it so."""
    settings = config.head_dim, config.rope_theta
    plain, _ = rope_frequencies(*settings, "none", 1.0, 1)
    scaled, _ = rope_frequencies(*settings, "llama3", config.rope_factor, config.rope_trained_length)
    return plain / scaled


def interleave_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of queries or keys (n_head head_dim, ...) so that RoPE's pairs (i, i + head_dim / 2) become neighbours.

    llama.cpp's architecture llama turns neighbours; its qwen2 and qwen3 turn halves, as ours.
    """
    heads = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return heads.transpose(1, 2).reshape(weight.shape)


# ------------------------------------------------------------------------------------------------------ tokenizer


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte: itself if it is one, else the next free one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def tokens_and_merges(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The tokens in the order of their ids, spelled in GPT-2's alphabet, and the rules of merging ("left right")."""
    if isinstance(tokenizer, BPETokenizer):  # a foreign one, too
        values = json.loads(tokenizer.to_dict()["tokenizer"])
        model, added = values["model"], {token["content"]: token["id"] for token in values["added_tokens"]}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        by_id = {i: token for token, i in {**model["vocab"], **added}.items()}
        return [by_id.get(i, f"<|unused {i}|>") for i in range(tokenizer.vocab_size)], merges
    alphabet = byte_alphabet()
    spelled = ["".join(alphabet[byte] for byte in character.encode("utf-8")) for character in tokenizer.characters]
    merges: dict[str, None] = {}  # in order, each once
    for word in spelled:
        for i in range(1, len(word)):
            merges[f"{word[:i]} {word[i]}"] = None
    if not merges:  # llama.cpp wants at least one: bytes that UTF-8 does not have, so that it never applies
        merges[f"{alphabet[0xFE]} {alphabet[0xFF]}"] = None
    return [*SPECIAL_TOKENS, *spelled], list(merges)


# ------------------------------------------------------------------------------------------------------ the file


def check_exact(config: ModelConfig, kind: str) -> None:
    """Raises UserError for what llama.cpp would compute otherwise."""
    if max(config.windows):
        raise UserError("GGUF: attention_window: llama.cpp's llama and qwen3 ignore sliding windows")
    if config.n_expert and config.n_expert_per_token == 1:
        raise UserError("GGUF: n_expert_per_token 1: llama.cpp makes the one gate 1, ours is its probability")
    if kind == "gpt2":
        raise UserError("GGUF: learned positions and layernorm (GPT-2) are not written; a folder of Hugging Face's is")
    if kind not in ARCHITECTURES:
        raise UserError(f"GGUF: {kind} is not one of {', '.join(ARCHITECTURES)}")


def metadata(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    theta = config.rope_theta
    if config.rope_scaling == "ntk" and config.head_dim > 2:  # a larger base is all that it is
        theta *= config.rope_factor ** (config.head_dim / (config.head_dim - 2))
    writer.add_rope_freq_base(theta)
    if config.rope_scaling == "llama3":  # (a tensor tells the rest)
        writer.add_rope_scaling_orig_ctx_len(config.rope_trained_length)
    if config.rope_scaling in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling))
        writer.add_rope_scaling_factor(config.rope_factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope_trained_length)
    if config.n_expert:
        writer.add_expert_count(config.n_expert)
        writer.add_expert_used_count(config.n_expert_per_token)
        writer.add_expert_feed_forward_length(config.n_hidden)


def write_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    tokens, merges = tokens_and_merges(tokenizer)
    special = tokenizer.special_tokens
    pre = "gpt-2" if isinstance(tokenizer, BPETokenizer) else "qwen2"
    types = [3 if token in special else 5 if token.startswith("<|unused ") else 1 for token in tokens]
    if isinstance(tokenizer, ForeignTokenizer):
        pre = tokenizer.pre_tokenizer()
        for i in tokenizer.added_tokens():
            types[i] = 3 if tokens[i] in special else 4
    if pre is None:
        raise UserError("GGUF: this tokenizer cuts text into words in a way that has no name in llama.cpp")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    names = special_names(tokenizer)
    for role, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        if names.get(role) in special:
            add(special[names[role]])
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_chat_template(getattr(tokenizer, "jinja", "") or tokenizer.template.to_jinja())


def write_gguf(path: str | Path, model: GPT, tokenizer: Tokenizer, type_name: str) -> None:
    """Write a model and its tokenizer; type_name: one of TYPES. Raises UserError for what the format cannot say."""
    gguf = import_gguf()
    path, config = Path(path), model.config
    kind = model_type(config)
    check_exact(config, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    quantised = getattr(gguf.GGMLQuantizationType, TYPES[type_name])
    file_type = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}[TYPES[type_name]]
    try:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[kind])
        writer.add_name(path.stem)
        writer.add_file_type(file_type)
        metadata(writer, config)
        write_tokenizer(writer, tokenizer)
        weights = to_gguf_names(to_theirs(model.state_dict(), config), config)
        if config.rope_scaling == "llama3":
            weights["rope_freqs.weight"] = llama3_factors(config)
        for name, weight in weights.items():
            array = weight.detach().float().contiguous().numpy()
            is_matrix = array.ndim > 1 and not name.endswith("ffn_gate_inp.weight")  # norms and routers stay exact
            fits = array.shape[-1] % 32 == 0 or TYPES[type_name] != "Q8_0"
            if is_matrix and TYPES[type_name] != "F32":
                raw = quantised if fits else gguf.GGMLQuantizationType.F16  # Q8_0 has blocks of 32 numbers
                writer.add_tensor(name, gguf.quants.quantize(array, raw), raw_dtype=raw)
            else:
                writer.add_tensor(name, array.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    except OSError as error:  # numpy's, for a full disk, says not even that
        raise UserError(f"{path}: not written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------ reading


def read_gguf(path: str | Path, template: str = "") -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a file; quantised weights are expanded to float32. Raises UserError.

    template: the name of the chat template of a foreign tokenizer, where its own is none that is known.
    """
    gguf = import_gguf()
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        check_counts(path)
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        kind = values.get("general.architecture")
        if kind not in ARCHITECTURES.values():
            raise UserError(f"{path}: architecture {kind!r} is not one of {', '.join(ARCHITECTURES.values())}")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = config_of(values, tensors, kind, str(path))
        tokenizer = tokenizer_of(values, config.vocab_size, str(path), template)
        if tokenizer.vocab_size != config.vocab_size:
            raise UserError(f"{path}: {tokenizer.vocab_size} tokens, but weights for {config.vocab_size}")
        weights = {}
        for name, tensor in tensors.items():
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weights[name] = torch.from_numpy(np.array(array, dtype=np.float32))
    except UserError:
        raise
    except Exception as error:  # the package raises whatever numpy does on a damaged file
        raise UserError(f"{path}: damaged, or not a GGUF file: {error or type(error).__name__}") from None
    ours = to_ours(from_gguf_names(weights, config, kind, str(path)), config, str(path))
    model = GPT(config)  # only now: what the file's numbers say has been checked against its weights
    model.load_state_dict(ours)
    return model, tokenizer


def check_counts(path: str | Path) -> None:
    """Raises ValueError for a header that counts more than its file has room for: the package would read on for ever.

    The header: "GGUF", version (uint32), numbers of tensors and of keys (uint64); a key is a text, a type (uint32) and
    a value; a text is its length (uint64) and its bytes; an array its type, its length (uint64) and its values.
    """
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by type
    text_type, array_type = 8, 9
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size

        def skip(n: int) -> None:
            if file.tell() + n > end:
                raise ValueError("its header counts more than the file holds")
            file.seek(n, os.SEEK_CUR)

        def read(n: int) -> int:
            return int.from_bytes(file.read(n), "little")

        def skip_values(kind: int, n: int) -> None:
            if kind in sizes:
                skip(n * sizes[kind])
                return
            for _ in range(n):
                skip(0)  # beyond the end, reading gives zeros for ever
                if kind == text_type:
                    skip(read(8))
                elif kind == array_type:
                    skip_values(read(4), read(8))
                else:
                    raise ValueError(f"a value of the type {kind}")

        skip(8)
        n_tensors, n_keys = read(8), read(8)
        for _ in range(n_keys):
            skip(read(8))
            skip_values(read(4), 1)
        if n_tensors > end:
            raise ValueError("its header counts more than the file holds")


def config_of(values: dict[str, Any], tensors: dict[str, Any], kind: str, where: str) -> ModelConfig:
    """Our config for a file's metadata."""

    def value(name: str, default: Any = None) -> Any:
        found = values.get(f"{kind}.{name}", default)
        if found is None:
            raise UserError(f"{where}: {kind}.{name} is missing")
        return found

    heads, width = int(value("attention.head_count")), int(value("embedding_length"))
    scaling = value("rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise UserError(f"{where}: our network has no rope.scaling.type {scaling}")
    for name, plain in (
        ("rope.dimension_count", int(value("attention.key_length", width // heads))),
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_beta_slow", 1.0),
        ("rope.scaling.yarn_beta_fast", 32.0),
    ):
        if value(name, plain) != plain:
            raise UserError(f"{where}: our network has no {kind}.{name} {value(name)}, only {plain}")
    factor = float(value("rope.scaling.factor", 1.0)) if scaling != "none" else 1.0
    length = int(value("rope.scaling.original_context_length", 0))
    rope_factors = None
    if "rope_freqs.weight" in tensors:  # the file says by what, but not always from which length it was computed
        rope_factors = torch.tensor(tensors["rope_freqs.weight"].data.copy())
        scaling, factor, length = "llama3", rope_factors.max().item(), length or LLAMA3_LENGTH
    n_expert = int(value("expert_count", 0))
    config = ModelConfig(
        block_size=int(value("context_length")),
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        n_layer=int(value("block_count")),
        n_head=heads,
        n_kv_head=int(value("attention.head_count_kv", heads)),
        n_embd=width,
        head_dim=int(value("attention.key_length", width // heads)),
        n_hidden=int(value("expert_feed_forward_length") if n_expert else value("feed_forward_length")),
        bias="blk.0.attn_output.bias" in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors and "blk.0.attn_output.bias" not in tensors,
        norm_eps=float(value("attention.layer_norm_rms_epsilon")),
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tie_embeddings="output.weight" not in tensors,
        rope_theta=float(value("rope.freq_base", 10000.0)),
        rope_scaling=scaling,
        rope_factor=factor,
        rope_trained_length=length or None if scaling in ("yarn", "llama3") else None,
        n_expert=n_expert,
        n_expert_per_token=int(value("expert_used_count", 2)),
        expert_balance="loss" if n_expert else "none",
    )
    if rope_factors is not None and not torch.allclose(rope_factors, llama3_factors(config), rtol=1e-3):
        raise UserError(f"{where}: our network has no such RoPE scaling (rope_freqs)")
    return config


def from_gguf_names(
    weights: dict[str, torch.Tensor], config: ModelConfig, architecture: str, where: str
) -> dict[str, torch.Tensor]:
    """The inverse of to_gguf_names(), of a file of an architecture of llama.cpp's."""
    names = {ours: theirs for theirs, ours in NAMES.items()}
    result = {}
    for name, weight in weights.items():
        if name == "rope_freqs.weight":  # config_of() read it
            continue
        layer = re.match(r"blk\.(\d+)\.(.*)\.(weight|bias)$", name)
        part = re.match(r"ffn_(gate|up|down)_exps$", layer[2]) if layer else None
        if part:
            stem = f"model.layers.{layer[1]}.mlp.experts"
            result |= {f"{stem}.{e}.{part[1]}_proj.weight": matrix for e, matrix in enumerate(weight)}
            continue
        stem, kind = name.rsplit(".", 1)
        if (layer[2] if layer else stem) not in names:
            raise UserError(f"{where}: a tensor that our network has no place for: {name}")
        if layer and architecture == "llama" and layer[2] in ("attn_q", "attn_k"):  # back to halves
            pairs = weight.reshape(-1, config.head_dim // 2, 2, *weight.shape[1:])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        result[f"{prefix}{names[layer[2] if layer else stem]}.{kind}"] = weight
    return result


def tokenizer_of(values: dict[str, Any], vocab_size: int, where: str, template: str) -> Tokenizer:
    """The tokenizer of a file: one of ours, or that of another model."""
    tokens, merges = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.merges", [])
    pre = values.get("tokenizer.ggml.pre")
    if not isinstance(tokens, list) or tokens[: len(SPECIAL_TOKENS)] != list(SPECIAL_TOKENS) or template:
        model = values.get("tokenizer.ggml.model")
        if model != "gpt2" or pre not in PRE_TOKENIZERS:
            raise UserError(
                f"{where}: a tokenizer of the kind {model!r}, {pre!r} is not read; of the kind 'gpt2' these are: "
                + ", ".join(PRE_TOKENIZERS)
            )
        names = {}
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            i = values.get(f"tokenizer.ggml.{key}_token_id")
            names |= {f"{role}_token": tokens[i]} if isinstance(i, int) and 0 <= i < len(tokens) else {}
        types, jinja = values.get("tokenizer.ggml.token_type"), values.get("tokenizer.chat_template", "")
        if not isinstance(types, list) or len(types) != len(tokens):
            raise UserError(f"{where}: it does not say which tokens are special (tokenizer.ggml.token_type)")
        contents = byte_level_json(tokens, types, merges, pre)
        if values.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):  # llama.cpp's own default
            if "bos_token" not in names:
                raise UserError(f"{where}: texts begin with a token that it does not name (bos_token_id)")
            contents["post_processor"] = begin_with(names["bos_token"], tokens.index(names["bos_token"]))
        return ForeignTokenizer.from_tokenizer_json(contents, names, vocab_size, where, jinja, template)
    if pre == "gpt-2":
        return BPETokenizer.from_merges(tokens, merges)
    byte_of = {character: byte for byte, character in byte_alphabet().items()}
    spelled = (bytes(byte_of[c] for c in token) for token in tokens[len(SPECIAL_TOKENS) :])
    return CharTokenizer("".join(word.decode("utf-8") for word in spelled))
