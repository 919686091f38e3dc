"""Talk to a checkpoint.

python inference.py -m checkpoint/pretrain.pt -p "Once upon a time"     continues a text
python inference.py -i -m checkpoint/sft.pt                             a conversation; /help lists its commands
python inference.py -i -m checkpoint/sft.pt -p "你好" -t 0              one answer, on standard output alone
cat questions.txt | python inference.py -i -m checkpoint/sft.pt         one answer for every line
python inference.py -m checkpoint/sft.pt --evaluate dataset/held_out.jsonl      exact match of greedy answers
"""

import contextlib
import itertools
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from base.configuration import Config, Parser, UserError, did_you_mean, fields_of, harmless, option, run
from model import GPT
from text.corpus import BadLines, Source, conversations
from text.tokenizer import EOS, Messages, Tokenizer
from training.engine import find_device
from weights import lora
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model, save_checkpoint

HELP = """\
/lora FILE          answer with this adapter; /lora alone: without any
/reset              forget the conversation so far
/set NAME VALUE     change a setting; /set alone shows them
/help               this list
/quit               leave (also Ctrl-D)"""


@dataclass
class Settings(Config):
    """How answers are drawn."""

    max_length: int = option(256, "tokens of prompt and answer together", minimum=1)
    temperature: float = option(0.8, "0: always the likeliest token", minimum=0.0)
    top_k: int | None = option(None, "draw from the k likeliest tokens only", minimum=1)
    top_p: float | None = option(
        None, "draw from the likeliest tokens that sum to this probability", above=0.0, maximum=1
    )
    min_p: float | None = option(
        None, "draw from tokens at least this share as likely as the likeliest", minimum=0, maximum=1
    )
    repetition_penalty: float = option(1.0, "above 1: tokens already seen become less likely", above=0.0)
    seed: int | None = option(None, "seed of the drawing", minimum=0)


@dataclass
class Speaker:
    """A checkpoint ready to talk."""

    model: GPT
    tokenizer: Tokenizer
    device: torch.device
    instruct: bool
    stop: list[str]

    def prompt_ids(self, prompt: str, history: Messages) -> list[int]:
        """Token ids to continue; of a conversation, as many of the newest turns as leave room for an answer."""
        if not self.instruct:
            return self.tokenizer.encode(prompt).tolist()
        messages = [*history, {"role": "user", "content": prompt}]
        while True:
            ids, _ = self.tokenizer.encode_chat(messages)
            if len(ids) <= self.model.config.block_size * 3 // 4 or len(messages) < 3:
                return ids.tolist()
            messages = messages[2:]  # the oldest question and its answer

    def answer(self, prompt: str, settings: Settings, history: Messages = ()) -> Iterator[str]:
        """Pieces of the answer (or continuation) as they are drawn."""
        ids = self.prompt_ids(prompt, list(history))
        room = settings.max_length - len(ids)
        if not ids:
            raise UserError("the prompt is empty")
        if room <= 0:
            raise UserError(
                f"the prompt has {len(ids)} tokens, which leaves no room in max_length {settings.max_length} (-l)"
            )
        steps = self.model.generate(
            torch.tensor([ids], device=self.device),
            room,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            stop_tokens=(EOS,),
            seed=settings.seed,
        )
        tokens = itertools.takewhile(lambda token: token != EOS, (step.item() for step in steps))
        yield from until_stop(self.tokenizer.stream(tokens), self.stop)

    def unknown_note(self, prompt: str) -> str:
        unknown = self.tokenizer.unknown_characters(prompt)
        return f"not in the vocabulary, read as <|unknown|>: {harmless(unknown)}" if unknown else ""


def until_stop(pieces: Iterator[str], stop: list[str]) -> Iterator[str]:
    """The pieces up to the first stop text; what might be the beginning of one is held back until that is known."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[: min(found)]
            return
        keep = max((n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def converse(speaker: Speaker, settings: Settings, profile: bool) -> None:
    """The interactive session: streams answers; a conversation in instruct mode, else continuations."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    print(f"{'conversation' if speaker.instruct else 'continuing texts'}; /help lists the commands", file=sys.stderr)
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
                change_adapter(speaker, arguments[0] if arguments else "")
            elif command == "/set":
                change_setting(settings, arguments)
            else:
                print(HELP, file=sys.stderr)
            continue
        if not line.strip():
            continue
        try:
            answer = speak(speaker, line, settings, history, profile)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:  # ends the answer, not the session
            print()
            continue
        if speaker.instruct:
            history += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def change_adapter(speaker: Speaker, path: str) -> None:
    try:
        use_adapter(speaker.model, path)
    except UserError as error:
        print(f"error: {error}; answering without an adapter", file=sys.stderr)


def use_adapter(model: GPT, path: str) -> None:
    """Let the model answer with the LoRA adapter of a checkpoint instead of the one it has; empty: with none."""
    lora.detach(model)
    if path:
        lora.load_adapter(load_checkpoint(path), model, path)
    model.eval()


def change_setting(settings: Settings, arguments: list[str]) -> None:
    known = fields_of(Settings)
    if len(arguments) == 2 and arguments[0] in known:
        try:
            setattr(settings, arguments[0], known[arguments[0]].check(known[arguments[0]].parse(arguments[1])))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
    elif arguments:
        print(f"error: /set NAME VALUE: no such setting{did_you_mean(arguments[0], known)}", file=sys.stderr)
    else:
        for field in fields(Settings):
            print(f"{field.name} = {getattr(settings, field.name)}", file=sys.stderr)


def speak(speaker: Speaker, prompt: str, settings: Settings, history: Messages, profile: bool) -> str:
    """Print one answer as it is drawn; returns it."""
    note = speaker.unknown_note(prompt)
    if note:
        print(note, file=sys.stderr)
    pieces, began, first = [], time.perf_counter(), None
    for piece in speaker.answer(prompt, settings, history):
        first = first or time.perf_counter()
        pieces.append(piece)
        print(harmless(piece), end="", flush=True)
    print(flush=True)
    if profile and first:
        n_tokens = len(speaker.tokenizer.encode("".join(pieces)))
        seconds = time.perf_counter() - first
        print(
            f"{n_tokens} tokens, {(n_tokens - 1) / max(seconds, 1e-9):.1f} tokens/s after the first, "
            f"first after {1000 * (first - began):.0f} ms",
            file=sys.stderr,
        )
    return "".join(pieces)


def evaluate(speaker: Speaker, path: str, show: int) -> None:
    """Ask every question of a fine-tuning file greedily; print the wrong answers and the share of exact matches."""
    source = Source(Path(path), True)
    if not source.path.is_file():
        raise UserError(f"{path}: no such file")
    asked = [messages for _, messages in conversations(source, BadLines(0))]
    settings = Settings(max_length=speaker.model.config.block_size, temperature=0.0)
    n_right = 0
    for messages in tqdm(asked, desc="asking", unit="question", delay=1, leave=False, dynamic_ncols=True):
        *history, question, expected = messages
        answer = "".join(speaker.answer(question["content"], settings, history))
        n_right += answer.strip() == expected["content"].strip()
        if answer.strip() != expected["content"].strip() and show > 0:
            show -= 1
            tqdm.write(f"wrong: {question['content']!r} -> {harmless(answer)!r}, expected {expected['content']!r}")
    if not asked:
        raise UserError(f"{path}: no questions in it")
    print(f"held-out exact match: {100 * n_right / len(asked):.1f}% ({n_right}/{len(asked)})")


def merge(model: str, adapter: str, output: str) -> None:
    """Write the checkpoint of a model and its adapter together."""
    if not adapter:
        raise UserError("command line: --merge needs the adapter: --lora FILE")
    if Path(output).exists():
        raise UserError(f"{output}: exists already")
    save_checkpoint(output, lora.merged_checkpoint(load_checkpoint(adapter), load_checkpoint(model), adapter))
    print(f"{output}: {model} with {adapter} merged into it")


def load_speaker(path: str, device_name: str, instruct: bool, stop: list[str]) -> Speaker:
    """Model and tokenizer of a checkpoint, on a device."""
    checkpoint = load_checkpoint(path)
    if "lora" in checkpoint:
        raise UserError(f"{path}: an adapter; -m names its model ({checkpoint['lora'].get('base')}), --lora this file")
    tokenizer = load_checkpoint_tokenizer(checkpoint, path)
    device = find_device(device_name)
    model = load_model(checkpoint, path).to(device).eval()
    if not model.config.is_causal:
        raise UserError(f"{path}: a model with full attention answers in one pass; python problem.py talks to it")
    return Speaker(model, tokenizer, device, instruct, stop)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("-m", "--model", default="checkpoint/sft.pt", help="checkpoint [checkpoint/sft.pt]")
    parser.add_argument("-i", "--instruct", action="store_true", help="prompts are questions (instruct template)")
    parser.add_argument("-p", "--prompt", help="answer this and leave")
    short = {"max_length": "-l", "temperature": "-t", "top_k": "-k", "repetition_penalty": "-r"}
    for name, field in fields_of(Settings).items():
        flags = [short[name]] if name in short else []
        text = f"{field.metadata['help']} [{'off' if field.default is None else field.default}]"
        parser.add_argument(*flags, f"--{name}", metavar="X", help=text)
    parser.add_argument("--lora", metavar="FILE", default="", help="answer with this adapter on the model")
    parser.add_argument("--merge", metavar="OUT.pt", help="write model and adapter together as one checkpoint")
    parser.add_argument("--num_samples", type=int, default=1, help="answers to draw for -p [1]")
    parser.add_argument("--stop", action="append", default=[], help="also end at this text; may be given again")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument("--profile", action="store_true", help="print tokens per second")
    parser.add_argument("--evaluate", metavar="FILE", help="exact match on the questions of a fine-tuning jsonl file")
    parser.add_argument("--show", type=int, default=5, help="wrong answers that --evaluate prints [5]")
    return parser


def main() -> None:
    args, _ = make_parser().parse()
    known = fields_of(Settings)
    try:
        given = {
            name: field.parse(getattr(args, name)) for name, field in known.items() if getattr(args, name) is not None
        }
        settings = Settings(**given)
    except UserError as error:
        raise UserError(f"command line: {error}") from None
    if args.num_samples < 1:
        raise UserError(f"command line: --num_samples must be at least 1, got {args.num_samples}")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    if args.merge:
        merge(args.model, args.lora, args.merge)
        return
    speaker = load_speaker(args.model, args.device, args.instruct or bool(args.evaluate), [s for s in args.stop if s])
    if args.lora:
        use_adapter(speaker.model, args.lora)
    if "max_length" not in given:
        settings.max_length = speaker.model.config.block_size
    if args.evaluate:
        evaluate(speaker, args.evaluate, args.show)
    elif args.prompt is not None:
        for i in range(args.num_samples):
            seed = None if settings.seed is None else settings.seed + i
            speak(speaker, args.prompt, Settings(**{**settings.to_dict(), "seed": seed}), [], args.profile)
    elif sys.stdin.isatty():
        converse(speaker, settings, args.profile)
    else:
        for line in sys.stdin:
            if line.strip():
                speak(speaker, line.rstrip("\n"), settings, [], args.profile)


if __name__ == "__main__":
    run(main)
