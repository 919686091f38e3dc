"""Talk to a checkpoint.

python inference.py -m checkpoint/pretrain.pt -p "Once upon a time"     continues a text
python inference.py -i -m checkpoint/sft.pt                             a conversation; /help lists its commands
python inference.py -i -m checkpoint/sft.pt -p "你好" -t 0              one answer, on standard output alone
python inference.py -i -m checkpoint/vision.pt --image X.png            questions about an image; /image names others
cat questions.txt | python inference.py -i -m checkpoint/sft.pt         one answer for every line; --encoding gbk
python inference.py -i -m checkpoint/sft.pt --draft lookup --profile    guesses tokens: the same answers, sooner
python inference.py -m checkpoint/future.pt --draft future               by the model's own modules (n_future)
python inference.py -m checkpoint/pretrain.pt --lora A.pt --merge B.pt  one checkpoint of a model and its adapter
"""

import contextlib
import dataclasses
import os
import shlex
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from base.configuration import (
    BOOLEANS,
    Parser,
    UserError,
    did_you_mean,
    escape_control_characters,
    escape_for,
    fields_of,
    run_main,
)
from serving.text_generator import GenerationConfig, TextGenerator, load_text_generator, unknown_note
from text.encodings import check_encoding
from text.formats import CHUNK, Source, decode_blocks
from text.tokenizer import Messages
from weights import lora
from weights.checkpointing import load_checkpoint, save_checkpoint
from weights.quantise import KINDS


def tell(message: str) -> None:
    """A line on standard error; on standard output are answers alone."""
    print(escape_control_characters(message), file=sys.stderr)


def system_message(text: str) -> Messages:
    """The beginning of a conversation: its system message, if there is one."""
    return [{"role": "system", "content": text}] if text else []


def print_answer(
    generator: TextGenerator,
    prompt: str,
    config: GenerationConfig,
    history: Messages,
    profile: bool,
    where: str = "",
    image: np.ndarray | None = None,
) -> str:
    """Print one answer as it is generated; returns it. where: what notes about the prompt begin with."""
    if unknown := unknown_note(generator.tokenizer, prompt):
        tell(where + unknown)
    pieces, drawn = [], []
    began, first, n_first = time.perf_counter(), None, 0
    with warnings.catch_warnings():  # it also lets Python repeat what it has warned of before
        warnings.showwarning = lambda message, *_: tell(f"warning: {where}{message}")
        for piece in generator.answer(prompt, config, history, drawn, image):
            if first is None:
                first, n_first = time.perf_counter(), len(drawn)
            pieces.append(piece)
            print(escape_for(sys.stdout, piece), end="", flush=True)
    print(flush=True)
    if profile:
        end = time.perf_counter()
        first = first or end
        tell(
            f"{len(drawn)} tokens, {(len(drawn) - n_first) / max(end - first, 1e-9):.1f} tokens/s after the first, "
            f"first after {1000 * (first - began):.0f} ms"
        )
        if drafter := generator.drafter:
            rate, share = len(drawn) / max(1, drafter.n_passes), drafter.n_right / max(1, drafter.n_guesses)
            right = f"{share:.0%} of {drafter.n_guesses} guesses were right"
            tell(f"{rate:.2f} tokens a pass; {right if drafter.n_guesses else 'nothing to guess from'}")
    return "".join(pieces)


# ------------------------------------------------------------------------------------------------- in a terminal


@dataclasses.dataclass
class Session:
    """What is typed in a terminal: a conversation in instruct mode, else texts to continue, and commands."""

    generator: TextGenerator
    config: GenerationConfig
    system: str
    profile: bool
    turns: Messages = dataclasses.field(default_factory=list)  # of the conversation so far
    image: np.ndarray | None = None  # that the next question is about

    def ask(self, text: str) -> None:
        history = system_message(self.system) + self.turns
        answer = print_answer(self.generator, text, self.config, history, self.profile, image=self.image)
        if self.generator.instruct:
            asked = {"role": "user", "content": text} | ({} if self.image is None else {"image": self.image})
            self.turns += [asked, {"role": "assistant", "content": answer}]
            self.image = None  # it is part of the conversation now

    def change_image(self, path: str) -> None:
        if not path:
            raise UserError("/image FILE: which file?")
        if not self.generator.instruct:
            raise UserError("an image is part of a question: start with -i")
        if self.generator.drafter:
            raise UserError("a drafter guesses from text alone: start without --draft")
        if not os.path.isfile(path):  # as terminals write a file that is dropped on them: "two words", two\ words; or ~
            with contextlib.suppress(ValueError):
                path = os.path.expanduser(" ".join(shlex.split(path)))
        image = self.generator.open_image(path)
        self.forget("")
        self.image = image

    def change_adapter(self, path: str) -> None:
        self.generator.use_adapter(path)

    def change_system(self, text: str) -> None:
        if not self.generator.instruct:
            raise UserError("a system message is part of a conversation: start with -i")
        self.system = text
        if unknown := unknown_note(self.generator.tokenizer, text):
            tell(unknown)

    def change_setting(self, text: str) -> None:
        known = fields_of(GenerationConfig)
        name, *value = text.split(maxsplit=1) or [""]
        if name and name not in known:
            raise UserError(f"/set NAME VALUE: no such setting as {name}{did_you_mean(name, known)}")
        if value and name in ("steps", "block") and not self.generator.model.config.mask_token:
            raise UserError(f"{name} is for models of masked diffusion (train.py --loss diffusion)")
        if value:
            self.config = dataclasses.replace(self.config, **{name: known[name].parse(value[0])})
        for shown in [name] if name else known:
            tell(f"{shown} = {getattr(self.config, shown)}")

    def forget(self, _: str) -> None:
        self.turns.clear()
        self.image = None

    def help(self, _: str) -> None:
        tell("\n".join(f"{f'{name} {argument}':<20}{text}" for name, (argument, text, _) in COMMANDS.items()))
        tell("//TEXT              ask /TEXT: every other line that begins with / is a command")

    def leave(self, _: str) -> None:
        raise EOFError


COMMANDS = {  # name -> argument, line of /help, method that takes the argument
    "/system": ("TEXT", "the system message, in front of the conversation; /system alone: none", Session.change_system),
    "/image": ("FILE", "begin a conversation about this png or jpeg image", Session.change_image),
    "/lora": ("FILE", "answer with this adapter; /lora alone: without any", Session.change_adapter),
    "/set": ("NAME VALUE", "change a setting; /set alone shows them", Session.change_setting),
    "/reset": ("", "forget the conversation so far, but for the system message", Session.forget),
    "/help": ("", "this list", Session.help),
    "/quit": ("", "leave (also /exit, /bye, Ctrl-D)", Session.leave),
}
OTHER_NAMES = {"/exit": "/quit", "/bye": "/quit"}


def converse(session: Session) -> None:
    """The interactive session, until Ctrl-D or /quit."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    tell(f"{'conversation' if session.generator.instruct else 'continuing texts'}; /help lists the commands")
    while True:
        try:
            obey(session, read_line())
        except EOFError:
            return
        except UserError as error:
            tell(f"error: {error}")


def read_line() -> str:
    """A line that is typed; the prompt for it goes to where it can be seen."""
    try:
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)
        return input()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        raise


def obey(session: Session, line: str) -> None:
    """Do what a typed line asks for; raises UserError, and EOFError to leave."""
    if line.startswith("/") and not line.startswith("//"):
        name, *argument = line.split(maxsplit=1)
        name = OTHER_NAMES.get(name, name)
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS)
            raise UserError(f"unknown command {name}{hint} (/help lists them; // begins a text with /)")
        COMMANDS[name][2](session, argument[0].strip() if argument else "")
    elif line.strip():
        try:
            session.ask(line.removeprefix("/"))
        except KeyboardInterrupt:  # ends the answer, not the session
            print()


# ----------------------------------------------------------------------------------------------------- in a pipe


def input_lines(encoding: str) -> Iterator[str]:
    """The lines of standard input as they come, without their ends; raises UserError for text in another encoding."""
    source = Source(Path("standard input"), encoding=encoding)
    rest = ""
    for text in decode_blocks(source, iter(lambda: sys.stdin.buffer.read1(CHUNK), b""), is_certain=True):
        *lines, rest = (rest + text).split("\n")
        yield from lines
    if rest:
        yield rest


def answer_lines(
    generator: TextGenerator,
    config: GenerationConfig,
    history: Messages,
    profile: bool,
    encoding: str,
    image: np.ndarray | None = None,
) -> None:
    """An answer for every line of standard input; an empty one for a blank line and for one that is refused.

    Raises UserError at the end if any was refused.
    """
    n_refused = 0
    for number, line in enumerate(input_lines(encoding), 1):
        line = line.removeprefix("\ufeff") if number == 1 else line
        try:
            if line.strip():
                name = line.split(maxsplit=1)[0] if line.startswith("/") else ""
                if name in COMMANDS or name in OTHER_NAMES:
                    tell(f"line {number}: read as text: {name} is a command in a terminal alone")
                print_answer(generator, line, config, history, profile, f"line {number}: ", image)
                continue
        except UserError as error:
            tell(f"error: line {number}: {error}")
            n_refused += 1
        print(flush=True)
    if n_refused:
        raise UserError(f"{n_refused} of {number} lines got no answer")


# ------------------------------------------------------------------------------------------------ command line


def merge(model: str, adapter: str, output: str) -> None:
    """Write the checkpoint of a model and its adapter together."""
    if Path(output).exists():
        raise UserError(f"{output}: exists already")
    save_checkpoint(output, lora.merged_checkpoint(load_checkpoint(adapter), load_checkpoint(model), adapter))
    print(f"{output}: {model} with {adapter} merged into it")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("-m", "--model", metavar="FILE", default="checkpoint/sft.pt", help="checkpoint [%(default)s]")
    parser.add_argument("-i", "--instruct", action="store_true", help="prompts are questions (instruct template)")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this prompt and exit")
    parser.add_argument("--system", metavar="TEXT", default="", help="system message, in front of the questions (-i)")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="png or jpeg that the question is about (-i)"
    )
    parser.add_argument("--lora", metavar="FILE", default="", help="answer with this adapter on the model")
    parser.add_argument("--merge", metavar="OUT.pt", help="write model and adapter together as one checkpoint")
    parser.add_argument("--num_samples", metavar="N", type=int, default=1, help="answers to draw for -p [1]")
    kinds = ("auto", *KINDS)
    parser.add_argument("--weights", choices=kinds, default="float32", help="rounded to fewer bytes; auto: the fastest")
    switch = {"metavar": "true|false", "choices": BOOLEANS, "nargs": "?", "const": "true", "default": "false"}
    parser.add_argument("--compile", **switch, help="compile the step of a token in the background [%(default)s]")
    parser.add_argument("--draft", metavar="NAME", default="", help="guess tokens: lookup, future, or a small model")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="also end at this; may be repeated")
    parser.add_argument("--encoding", metavar="NAME", default="utf-8", help="of standard input: gbk, utf-16 [utf-8]")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument("--profile", action="store_true", help="print tokens per second")
    sampling = parser.add_argument_group("Sampling")
    short = {"max_length": "-l", "temperature": "-t", "top_k": "-k", "repetition_penalty": "-r"}
    for name, field in fields_of(GenerationConfig).items():
        flags = [short[name]] if name in short else []
        sampling.add_argument(*flags, f"--{name}", metavar=field.metavar, help=field.help_text)
    return parser


def check_arguments(parser: Parser, args: Namespace) -> GenerationConfig:
    """The sampling settings of a command line; raises UserError, also for options that would have no effect."""
    not_default = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    for_answers = ", ".join(f"--{name}" for name in not_default if name not in ("model", "lora", "merge"))
    is_pipe = args.prompt is None and not sys.stdin.isatty()
    refusals = [
        (args.merge and for_answers, f"--merge writes a file and answers nothing: leave out {for_answers}"),
        (args.merge and not args.lora, "--merge needs the adapter: --lora FILE"),
        (args.system and not args.instruct, "--system is part of a conversation: add -i"),
        (len(args.image) > 1, "--image: one image goes with a conversation; in it, /image begins one about another"),
        (args.image and not args.instruct, "--image is part of a question: add -i"),
        (args.image and args.draft, "--draft guesses from text alone: leave it out, or --image"),
        (args.num_samples > 1 and args.prompt is None, "--num_samples is for one prompt: add -p"),
        (args.num_samples < 1, f"--num_samples must be at least 1, got {args.num_samples}"),
        (
            args.draft and BOOLEANS[args.compile],
            "--compile is for passes of one token, --draft for more: leave one out",
        ),
        ("" in args.stop, "--stop must not be empty"),
        ("encoding" in not_default and not is_pipe, "--encoding is for questions from a pipe: leave it out"),
    ]
    for is_refused, message in refusals:
        if is_refused:
            raise UserError(f"command line: {message}")
    check_encoding(args.encoding)
    known = fields_of(GenerationConfig)
    given = {name: field.parse(text) for name, field in known.items() if (text := getattr(args, name)) is not None}
    try:
        return GenerationConfig(**given)
    except UserError as error:
        raise UserError(f"command line: {error}") from None


def main() -> None:
    parser = make_parser()
    args, _ = parser.parse()
    config = check_arguments(parser, args)
    warnings.showwarning = lambda message, *_: tell(f"warning: {message}")
    if args.merge:
        merge(args.model, args.lora, args.merge)
        return
    generator = load_text_generator(
        *(args.model, args.device, args.instruct, args.stop, args.lora, args.weights),
        *(BOOLEANS[args.compile], args.draft),
    )
    if generator.step and args.prompt is not None:  # a conversation begins at once, and is faster when that is done
        generator.step.thread.join()
    if args.weights == "auto":
        tell(f"weights: {generator.weights}, the fastest here")
    history = system_message(args.system)
    if unknown := unknown_note(generator.tokenizer, args.system):
        tell(f"--system: {unknown}")
    image = generator.open_image(args.image[0]) if args.image else None
    if generator.model.vision is not None and generator.instruct and image is None and not sys.stdin.isatty():
        tell("this model can see, and was given no image: --image FILE")
    if args.prompt is not None:
        for i in range(args.num_samples):
            if args.num_samples > 1:
                tell(f"answer {i + 1} of {args.num_samples}:")
            seed = None if config.seed is None else config.seed + i
            settings = dataclasses.replace(config, seed=seed)
            print_answer(generator, args.prompt, settings, history, args.profile, image=image)
    elif sys.stdin.isatty():
        converse(Session(generator, config, args.system, args.profile, image=image))
    else:
        answer_lines(generator, config, history, args.profile, args.encoding, image)


if __name__ == "__main__":
    run_main(main)
