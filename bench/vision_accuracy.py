"""What a model that sees has learnt: questions about pictures with and without them, and handwritten digits.

    python bench/vision_accuracy.py blind dataset/vision_held_out.jsonl dataset/vision.jsonl checkpoint/vision.pt
    python bench/vision_accuracy.py digits     handwritten digits of scikit-learn: prepare, train, ask (a minute or two)

The first tells seeing from guessing: beside the answers with pictures stand those with every picture grey, and the best
guess from the training file's text: the answer that the same question had most often there, or its kind if it is new.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from measuring import ROOT, show

from base.configuration import UserError, run_main
from evaluation.questions import ask, turns_of
from serving.text_generator import load_text_generator
from text.corpus import read_conversations

GREY = 128
SHAPE = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "block_size": 64,
    "image_size": 8,
    "patch_size": 2,
    "n_vision_layer": 0,
}
STEPS = 1500
MOVES = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))  # pixels down and to the right


def blind(questions: str, training: str, model: str) -> dict[str, tuple[int, float, float, float]]:
    """By kind of question: their number, and exact match with the pictures, with grey ones, and by the best guess."""
    generator, turns = load_text_generator(model, "cpu", True), turns_of(read_conversations(questions))
    seen = [ask(generator, turn).is_exact for turn in turns]
    size = generator.model.config.image_size
    generator.open_image = lambda path: np.full((3, size, size), GREY, np.uint8)
    unseen = [ask(generator, turn).is_exact for turn in turns]
    answers: dict[str, Counter] = defaultdict(Counter)  # by question, and by kind and language
    for turn in turns_of(read_conversations(training)):
        for name in (turn.question, kind_and_language(turn.question)):
            answers[name][turn.expected] += 1
    guesses = [answers.get(turn.question) or answers[kind_and_language(turn.question)] for turn in turns]
    guessed = [guess.most_common(1)[0][0] == turn.expected for guess, turn in zip(guesses, turns, strict=True)]
    kinds, right = [kind_of(turn.question) for turn in turns], np.array([seen, unseen, guessed])  # (3, questions)
    parts = {kind: np.array([other == kind for other in kinds]) for kind in sorted(set(kinds))}
    parts["all"] = np.ones(len(kinds), bool)
    return {kind: (int(part.sum()), *right[:, part].mean(1).tolist()) for kind, part in parts.items()}


def kind_of(question: str) -> str:
    """What is asked, told by words of dataset/pictures.py."""
    words = {"everything": ("What is there", "图中有什么", "Count everything", "每种东西")}
    words |= {"number": ("number", "数字"), "count": ("How many", "几个", "多少个"), "place": ("Where", "哪里")}
    words |= {"chart": (" bar", "柱子"), "colour": ("colour", "颜色"), "shape": ("shape", "形状")}
    return next((kind for kind, names in words.items() if any(name in question for name in names)), "thing")


def kind_and_language(question: str) -> str:
    return f"{kind_of(question)} {question.isascii()}"


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 handwritten digits (8 x 8 pixels, 17 greys), black on white: every fifth one is held out.

    Each of the others is written five times, four times moved by a pixel: they are few.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, lines = load_digits(), {"vision.jsonl": "", "vision_held_out.jsonl": ""}
    (folder / "digits").mkdir()
    for i, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        file, moves = ("vision.jsonl", MOVES) if i % 5 else ("vision_held_out.jsonl", MOVES[:1])
        for j, move in enumerate(moves):
            name = f"digits/{i:04}_{j}.png"
            Image.fromarray((255 - np.roll(pixels, move, (0, 1)) * 255 / 16).astype(np.uint8)).save(folder / name)
            row = {"image": name, "question": "Which digit is it?", "answer": str(digit)}
            lines[file] += json.dumps(row) + "\n"
    for name, text in lines.items():
        (folder / name).write_text(text)


def digits(seed: int = 1337) -> str:
    """Prepares, trains and asks in a folder of its own; the last line of evaluate.py."""
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder))
        sizes = [
            text for name in ("image_size", "patch_size", "block_size") for text in (f"--{name}", str(SHAPE[name]))
        ]
        shape = [text for name, value in SHAPE.items() for text in (f"--{name}", str(value))]
        train = ["-t", "vision", *shape, "--max_steps", str(STEPS), "--compile", "false", "--random_seed", str(seed)]
        for script, *options in (
            ["data.py", "vision.jsonl", *sizes],
            ["train.py", *train],
            ["evaluate.py", "--questions", "vision_held_out.jsonl", "-m", "checkpoint/vision.pt"],
        ):
            done = subprocess.run(
                [sys.executable, ROOT / script, *options], cwd=folder, check=True, capture_output=True, text=True
            )
        return done.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("blind", "digits"))
    parser.add_argument("files", nargs="*", help="blind: held-out questions, those of training, checkpoint")
    args = parser.parse_args()
    if args.what == "blind" and len(args.files) != 3:
        raise UserError("blind: name the held-out questions, those of training, and the checkpoint")
    if args.what == "blind":
        results = blind(*args.files)
        rows = [("questions", "number", "seeing", "blind", "best guess")]
        rows += [(kind, str(n), *(f"{share:.1%}" for share in shares)) for kind, (n, *shares) in results.items()]
        show(f"exact match, {args.files[2]}", rows, results)
    else:
        print(digits())


if __name__ == "__main__":
    run_main(main)
