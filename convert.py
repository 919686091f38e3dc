"""Models to and from other programs: Hugging Face's transformers, llama.cpp, Ollama, a browser.

python convert.py checkpoint/sft.pt answer/                    a folder for transformers, vLLM and what builds on them
python convert.py checkpoint/sft.pt answer.gguf --type q8_0    a file for llama.cpp, Ollama, LM Studio
python convert.py checkpoint/sft.pt answer.html                one web page that runs the model, to mail to a friend
python convert.py checkpoint/sft.pt answer/ --lora checkpoint/sft_lora.pt      with an adapter merged into it
python convert.py out/ckpt.pt checkpoint/mine.pt --from nanogpt --tokenizer data/shakespeare_char/meta.pkl
python convert.py SmolLM2-135M-Instruct/ checkpoint/smollm2.pt                and from there, with its tokenizer

What a file is shows in its name: X.pt is ours, X.gguf llama.cpp's, X.html a page, a folder Hugging Face's. What a
format cannot say exactly is refused, with the reason; modules for multi-token prediction (n_future) are left out.
"""

import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path

import torch

from base.configuration import Parser, UserError, command_line, run_main
from model import GPT
from text.template import TEMPLATES
from text.tokenizer import Tokenizer
from weights import gguf, huggingface, lora, webpage
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model, save_checkpoint
from weights.nanogpt import read_nanogpt

TEMPLATE_HELP = "chat template of SOURCE, where its own is none that is known: " + ", ".join(TEMPLATES)
TYPES = ("float32", "bfloat16", "float16", "q8_0")


def read_checkpoint(path: str, adapter: str = "") -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a checkpoint of ours, with an adapter merged into it."""
    checkpoint = load_checkpoint(path)
    if "lora" in checkpoint:
        raise UserError(f"{path}: an adapter: SOURCE is its model ({checkpoint['lora'].get('base')}), --lora this file")
    if adapter:
        checkpoint = lora.merged_checkpoint(load_checkpoint(adapter), checkpoint, adapter)
    return load_model(checkpoint, path), load_checkpoint_tokenizer(checkpoint, path)


def write_checkpoint(path: str, model: GPT, tokenizer: Tokenizer, type_name: str) -> str:
    """Write a checkpoint to start from; returns the command that uses it."""
    if type_name != "float32":
        raise UserError(f"--type {type_name}: our checkpoints are float32")
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": {},
        "step": 0,
        "model_config": model.config.to_dict(),
        "train_config": {"stage": f"converted_{Path(path).stem}"},
        "tokenizer": tokenizer.to_dict(),
        "rng": {},
        "data": {},
        "best_val_loss": math.inf,
    }
    save_checkpoint(path, checkpoint)
    is_chat = tokenizer.kind == "foreign" and tokenizer.template.name != "plain"
    return command_line("inference.py", *(["-i"] if is_chat else []), "-m", path)


def write_huggingface(path: str, model: GPT, tokenizer: Tokenizer, type_name: str) -> str:
    if type_name == "q8_0":
        raise UserError("--type q8_0 is for GGUF and pages; Hugging Face's folders are float32, bfloat16, float16")
    huggingface.write_folder(path, model, tokenizer, getattr(torch, type_name))
    arguments, prompt = json.dumps(str(Path(path)), ensure_ascii=False), '[{"role": "user", "content": "Hello"}]'
    code = f'from transformers import pipeline; print(pipeline("text-generation", {arguments})({prompt}))'
    return f"python -c {shlex.quote(code)}"


def write_gguf(path: str, model: GPT, tokenizer: Tokenizer, type_name: str) -> str:
    gguf.write_gguf(path, model, tokenizer, type_name)
    name = Path(path)
    modelfile = f"FROM ./{name.name}\nPARAMETER temperature 0.8\n"
    return (
        f"llama-cli -m {shlex.quote(path)}\nfor Ollama, in a file named Modelfile beside it:\n{modelfile}"
        f"then: ollama create {shlex.quote(name.stem)} -f Modelfile"
    )


def read_page(path: str, _: str = "") -> tuple[GPT, Tokenizer]:
    raise UserError(f"{path}: a web page is not read back: convert the checkpoint that it was made of")


def write_page(path: str, model: GPT, tokenizer: Tokenizer, type_name: str) -> str:
    webpage.write_page(path, model, tokenizer, type_name)
    return f"open {path} in a browser; it is one file, and loads nothing else"


FORMATS = {  # by the end of the name; "" is a folder
    ".pt": (read_checkpoint, write_checkpoint),
    ".gguf": (gguf.read_gguf, write_gguf),
    ".html": (read_page, write_page),
    "": (huggingface.read_folder, write_huggingface),
}


def without_modules(model: GPT) -> GPT:
    """The model alone, without its modules for multi-token prediction."""
    alone = GPT(dataclasses.replace(model.config, n_future=1))
    alone.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("future.")})
    return alone


DEFAULT_TYPES = {".html": "q8_0"}  # elsewhere float32


def format_of(path: str) -> str:
    """The key of FORMATS for a path; raises UserError."""
    suffix = Path(path).suffix.lower()
    is_folder = path.endswith("/") or Path(path).is_dir() or suffix not in FORMATS
    if is_folder and suffix in (".htm", ".safetensors", ".bin", ".onnx", ".ckpt", ".pth"):
        raise UserError(f"{path}: X.pt is ours, X.gguf llama.cpp's, X.html a page, other names folders")
    if is_folder and (Path(path) / "latest").is_file():
        return ".pt"  # a checkpoint in shards
    return "" if is_folder else suffix


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="X.pt, X.gguf, or a folder of Hugging Face's")
    parser.add_argument("target", metavar="TARGET", help="likewise, or X.html")
    parser.add_argument("--type", choices=TYPES, help="of the numbers [float32; of a page q8_0: 8 bits]")
    parser.add_argument("--template", metavar="NAME", default="", choices=tuple(TEMPLATES), help=TEMPLATE_HELP)
    parser.add_argument("--lora", metavar="FILE", default="", help="merge this adapter of SOURCE into it")
    parser.add_argument("--from", dest="origin", choices=("nanogpt",), default="", help="SOURCE is nanoGPT's X.pt")
    parser.add_argument(
        "--tokenizer", metavar="FILE", default="", help="for nanoGPT: meta.pkl or GPT-2's tokenizer.json"
    )
    args, _ = parser.parse()
    source, target = format_of(args.source), format_of(args.target)
    if Path(args.target).exists():
        raise UserError(f"{args.target}: exists already")
    if args.lora and source != ".pt":
        raise UserError("--lora: an adapter belongs to a checkpoint of ours")
    if args.template and source == ".pt":
        raise UserError("--template: the tokenizer of a checkpoint of ours has its template already")
    if args.origin and (source != ".pt" or args.lora):
        raise UserError("--from nanogpt: SOURCE is a checkpoint of nanoGPT's (out/ckpt.pt), without --lora")
    if args.tokenizer and not args.origin:
        raise UserError("--tokenizer is for --from nanogpt: what else is read has its tokenizer with it")
    read, (_, write) = FORMATS[source][0], FORMATS[target]
    if args.origin:
        model, tokenizer = read_nanogpt(args.source, args.tokenizer)
    else:
        model, tokenizer = read(args.source, args.lora or args.template)
    if model.vision is not None and target != ".pt":
        raise UserError(f"{args.source}: a model that sees: no other format here has a place for its image encoder")
    if target != ".pt" and model.config.n_future > 1:
        what = f"the modules of n_future {model.config.n_future}, which only training and --draft future use"
        print(f"{args.target}: left out: {what}", file=sys.stderr)
        model = without_modules(model)
    type_name = args.type or DEFAULT_TYPES.get(target, "float32")
    use = write(args.target, model.eval(), tokenizer, type_name)
    files = [Path(args.target)] if Path(args.target).is_file() else list(Path(args.target).iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{args.target}: {model.parameter_count():,} weights, {type_name}, {size / 1e6:.1f} MB")
    print(f"to use it: {use}")


if __name__ == "__main__":
    run_main(main)
