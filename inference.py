"""Talk to a checkpoint.

python inference.py -m checkpoint/pretrain.pt -p "Once upon a time"     continues a text
python inference.py -i -m checkpoint/sft.pt                             a conversation; /help lists its commands
python inference.py -i -m checkpoint/sft.pt -p "你好" -t 0              one answer, on standard output alone
cat questions.txt | python inference.py -i -m checkpoint/sft.pt         one answer for every line
python inference.py -m checkpoint/pretrain.pt --lora A.pt --merge B.pt  one checkpoint of a model and its adapter
"""

import contextlib
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path

from base.configuration import Parser, UserError, did_you_mean, escape_control_characters, fields_of, run_main
from serving.text_generator import GenerationConfig, TextGenerator, load_text_generator
from text.tokenizer import Messages
from weights import lora
from weights.checkpointing import load_checkpoint, save_checkpoint

HELP = """\
/lora FILE          answer with this adapter; /lora alone: without any
/reset              forget the conversation so far
/set NAME VALUE     change a setting; /set alone shows them
/help               this list
/quit               leave (also Ctrl-D)"""


def converse(generator: TextGenerator, config: GenerationConfig, profile: bool) -> None:
    """The interactive session: streams answers; a conversation in instruct mode, else continuations."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    print(f"{'conversation' if generator.instruct else 'continuing texts'}; /help lists the commands", file=sys.stderr)
    history: Messages = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if line.startswith("/"):
            command, *arguments = line.split()
            if command == "/quit":
                return
            if command == "/reset":
                history.clear()
            elif command == "/lora":
                change_adapter(generator, arguments[0] if arguments else "")
            elif command == "/set":
                change_setting(config, arguments)
            else:
                print(HELP, file=sys.stderr)
            continue
        if not line.strip():
            continue
        try:
            answer = print_answer(generator, line, config, history, profile)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:  # ends the answer, not the session
            print()
            continue
        if generator.instruct:
            history += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def change_adapter(generator: TextGenerator, path: str) -> None:
    try:
        generator.use_adapter(path)
    except UserError as error:
        print(f"error: {error}; answering without an adapter", file=sys.stderr)


def change_setting(config: GenerationConfig, arguments: list[str]) -> None:
    known = fields_of(GenerationConfig)
    if len(arguments) == 2 and arguments[0] in known:
        try:
            setattr(config, arguments[0], known[arguments[0]].check(known[arguments[0]].parse(arguments[1])))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
    elif arguments:
        print(f"error: /set NAME VALUE: no such setting{did_you_mean(arguments[0], known)}", file=sys.stderr)
    else:
        for field in fields(GenerationConfig):
            print(f"{field.name} = {getattr(config, field.name)}", file=sys.stderr)


def print_answer(
    generator: TextGenerator, prompt: str, config: GenerationConfig, history: Messages, profile: bool
) -> str:
    """Print one answer as it is generated; returns it."""
    unknown = generator.tokenizer.unknown_characters(prompt)
    if unknown:
        print(f"not in the vocabulary, read as <|unknown|>: {escape_control_characters(unknown)}", file=sys.stderr)
    pieces, began, first = [], time.perf_counter(), None
    for piece in generator.answer(prompt, config, history):
        first = first or time.perf_counter()
        pieces.append(piece)
        print(escape_control_characters(piece), end="", flush=True)
    print(flush=True)
    if profile and first:
        n_tokens = len(generator.tokenizer.encode("".join(pieces)))
        seconds = time.perf_counter() - first
        print(
            f"{n_tokens} tokens, {(n_tokens - 1) / max(seconds, 1e-9):.1f} tokens/s after the first, "
            f"first after {1000 * (first - began):.0f} ms",
            file=sys.stderr,
        )
    return "".join(pieces)


def merge(model: str, adapter: str, output: str) -> None:
    """Write the checkpoint of a model and its adapter together."""
    if not adapter:
        raise UserError("command line: --merge needs the adapter: --lora FILE")
    if Path(output).exists():
        raise UserError(f"{output}: exists already")
    save_checkpoint(output, lora.merged_checkpoint(load_checkpoint(adapter), load_checkpoint(model), adapter))
    print(f"{output}: {model} with {adapter} merged into it")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("-m", "--model", metavar="FILE", default="checkpoint/sft.pt", help="checkpoint [%(default)s]")
    parser.add_argument("-i", "--instruct", action="store_true", help="prompts are questions (instruct template)")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this prompt and exit")
    parser.add_argument("--lora", metavar="FILE", default="", help="answer with this adapter on the model")
    parser.add_argument("--merge", metavar="OUT.pt", help="write model and adapter together as one checkpoint")
    parser.add_argument("--num_samples", metavar="N", type=int, default=1, help="answers to draw for -p [1]")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="also end at this; may be repeated")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument("--profile", action="store_true", help="print tokens per second")
    sampling = parser.add_argument_group("Sampling")
    short = {"max_length": "-l", "temperature": "-t", "top_k": "-k", "repetition_penalty": "-r"}
    for name, field in fields_of(GenerationConfig).items():
        flags = [short[name]] if name in short else []
        text = field.help_text.replace("[256]", "[the model's window]")
        sampling.add_argument(*flags, f"--{name}", metavar=field.metavar, help=text)
    return parser


def main() -> None:
    args, _ = make_parser().parse()
    known = fields_of(GenerationConfig)
    try:
        given = {
            name: field.parse(getattr(args, name)) for name, field in known.items() if getattr(args, name) is not None
        }
        config = GenerationConfig(**given)
    except UserError as error:
        raise UserError(f"command line: {error}") from None
    if args.num_samples < 1:
        raise UserError(f"command line: --num_samples must be at least 1, got {args.num_samples}")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    if args.merge:
        merge(args.model, args.lora, args.merge)
        return
    generator = load_text_generator(args.model, args.device, args.instruct, [s for s in args.stop if s], args.lora)
    if "max_length" not in given:
        config.max_length = generator.model.config.block_size
    if args.prompt is not None:
        for i in range(args.num_samples):
            seed = None if config.seed is None else config.seed + i
            again = GenerationConfig(**{**config.to_dict(), "seed": seed})
            print_answer(generator, args.prompt, again, [], args.profile)
    elif sys.stdin.isatty():
        converse(generator, config, args.profile)
    else:
        for line in sys.stdin:
            if line.strip():
                print_answer(generator, line.rstrip("\n"), config, [], args.profile)


if __name__ == "__main__":
    run_main(main)
