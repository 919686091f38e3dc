"""Multiple choice: C-Eval, CMMLU and MMLU, in the files in which they are published.

    questions = read_choices("ceval/val")
    letters, answers, _ = judge(generator, questions, examples={}, is_chat=False)
    share = sum(map(share_right, questions, letters)) / len(questions)

A model's choice is the option that it finds likeliest; nothing is generated. By letter: after the question with all of
its options, one a line, which letter comes next. By answer: after the question alone, which option comes next, by
log-likelihood per character. Small models know answers long before they know what the letters are for (OLMES, Gu et
al. 2024, arXiv:2406.08446, compares the two).
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from base.configuration import UserError
from evaluation.statistics import ratio
from model import GPT
from serving.text_generator import TextGenerator
from text.formats import Source, json_lines, json_values, printable_name, table_rows
from text.recognition import suffix_of
from text.records import to_text
from text.tokenizer import Tokenizer, normalise

LETTERS = "ABCDEFGHIJ"
SUFFIXES = (".csv", ".jsonl", ".json")
SPLITS = ("_dev", "_val", "_test")  # C-Eval's and MMLU's files are named subject_split.csv
chinese = re.compile("[\u3400-\u9fff]")

Likely = np.ndarray  # a log-likelihood for each option (n_options,)
Pair = tuple[list[int], list[int]]  # token ids of a context and of what may follow it


@dataclass
class Choice:
    """A question with its options."""

    file: str
    where: str  # "line 3"
    subject: str
    question: str
    options: list[str]
    answer: int  # the number of the right option

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]

    @property
    def is_chinese(self) -> bool:
        """Whether it is asked in Chinese."""
        return bool(chinese.search(self.question + "".join(self.options)))

    def ask(self, by_letter: bool) -> str:
        """The question as a prompt, with its options or without, up to where the answer begins."""
        options = [f"{letter}. {option}" for letter, option in zip(self.letters, self.options, strict=True)]
        end = "答案：" if self.is_chinese else "Answer:"
        return "\n".join([self.question, *(options if by_letter else []), end])

    def replies(self, by_letter: bool) -> list[str]:
        """What may follow."""
        return list(self.letters) if by_letter else self.options


# ------------------------------------------------------------------------------------------------------ files


def read_choices(path: str, encoding: str = "utf-8", limit: int | None = None) -> list[Choice]:
    """The questions of a file, or of the files of a folder, the first ones of each up to a limit; raises UserError."""
    place = Path(path)
    if not path or not place.exists():
        raise UserError(f"{path or repr(path)}: no such file")
    files = [place]
    if place.is_dir():
        inside = [file for file in sorted(place.iterdir()) if not file.name.startswith(".")]
        files = [file for file in inside if file.is_file() and suffix_of(Source(file)) in SUFFIXES]
        if not files:
            folders = ", ".join(file.name for file in inside if file.is_dir())
            advice = f"; name one of its folders: {folders[:200]}" if folders else ""
            raise UserError(f"{path}: no .csv or .jsonl files in it{advice}")
    read = (itertools.islice(read_file(Source(file, encoding=encoding)), limit) for file in files)
    questions = list(itertools.chain.from_iterable(read))
    if not questions:
        raise UserError(f"{path}: no questions in it")
    return questions


def read_file(source: Source) -> Iterator[Choice]:
    """The questions of a file; raises UserError that names file and line."""
    name = printable_name(Path(source.path.name)).split(".")[0]
    subject = next((name.removesuffix(split) for split in SPLITS if name.endswith(split)), name)
    suffix = suffix_of(source)
    if suffix not in SUFFIXES:
        raise UserError(f"{source.name}: multiple choice is read from .csv and .jsonl files")
    records = {".csv": table_records, ".jsonl": json_lines, ".json": json_values}[suffix](source, lambda n: None)
    for where, values in records:
        try:
            if isinstance(values, UserError):
                raise values
            yield parse_choice(values, source.name, where, subject)
        except UserError as error:
            raise UserError(f"{source.name}: {where}: {error}") from None


def table_records(source: Source, progress: Any) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """The rows of a table as records: with the names of its first row, or, as MMLU has none, by their order.

    C-Eval: id,question,A,B,C,D,answer,explanation. CMMLU: a nameless column, Question,A,B,C,D,Answer. MMLU: question,
    options, answer.
    """
    header = None
    for where, row in table_rows(source, progress):
        if header is None:
            is_header = "question" in [name.strip().lower() for name in row]
            n_options = len(row) - 2
            if not is_header and not 2 <= n_options <= len(LETTERS):
                raise UserError(
                    f"{source.name}: {where}: neither a row that names the columns (question, A, B, C, D, answer) "
                    "nor a question, its options and the letter of the right one"
                )
            header = row if is_header else ["question", *LETTERS[:n_options], "answer"]
            if is_header:
                continue
        if len(row) != len(header):
            yield where, UserError(f"{len(row)} columns, the first row has {len(header)}")
        else:
            yield where, dict(zip(header, row, strict=True))


def parse_choice(values: dict[str, Any], file: str, where: str, subject: str) -> Choice:
    """A record with question, A, B, ... and answer, whatever their capitals; or with "choices", a list of options.

    answer: a letter, or with a list the number of the option, from 0 on, as Hugging Face's MMLU has it.
    """
    values = {str(name).strip().lower(): value for name, value in values.items()}
    listed = values.get("choices")
    if isinstance(listed, list):
        values |= {letter.lower(): option for letter, option in zip(LETTERS, listed, strict=False)}
    options = []
    for letter in LETTERS:
        if letter.lower() not in values:
            break
        options.append(to_text(values[letter.lower()], letter).strip())
    while options and not options[-1]:  # a table has as many columns as the question with the most options
        options.pop()
    if len(options) < 2:
        raise UserError('no options: they are in the columns A, B, C, D, or in the list "choices"')
    question = to_text(values.get("question"), "question").strip()
    if not question:
        raise UserError("no question" if "question" not in values else "the question is empty")
    answer = values.get("answer")
    if answer is None:
        raise UserError("no column answer: the test files of C-Eval keep theirs secret, those in val/ have them")
    if isinstance(answer, int) and not isinstance(answer, bool) and isinstance(listed, list):
        right = answer
    else:
        letter = to_text(answer, "answer").strip().upper()
        right = LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS else -1
    if not 0 <= right < len(options):
        given, letters = json.dumps(answer, ensure_ascii=False)[:40], ", ".join(LETTERS[: len(options)])
        raise UserError(f"the answer is {given}, not one of {letters}")
    own = values.get("subject")
    return Choice(file, where, own if isinstance(own, str) and own else subject, question, options, right)


def examples_for(questions: list[Choice], examples: list[Choice], n_shots: int) -> dict[str, list[Choice]]:
    """The first n_shots examples of each subject; raises UserError for a subject that has fewer."""
    found: dict[str, list[Choice]] = {}
    for example in examples:
        found.setdefault(example.subject, []).append(example)
    for subject in dict.fromkeys(question.subject for question in questions):
        if len(found.get(subject, [])) < n_shots:
            raise UserError(
                f"--shots {n_shots}: {examples[0].file if len(found) == 1 else '--dev'} has "
                f"{len(found.get(subject, []))} examples of {subject}"
            )
    return {subject: shots[:n_shots] for subject, shots in found.items()}


# ------------------------------------------------------------------------------------------------------ judging


def judge(
    generator: TextGenerator, questions: list[Choice], examples: dict[str, list[Choice]], is_chat: bool
) -> tuple[list[Likely], list[Likely], int]:
    """For each question the log-likelihood of every letter, and of every answer per character.

    And the number of questions that do not fit into the window, of which the model reads the end, and of options that
    do not the beginning.
    """
    letters, answers, n_cut = [], [], 0
    for question in tqdm(questions, desc="judging", delay=1, leave=False, dynamic_ncols=True, disable=None):
        shots = examples.get(question.subject, [])
        of_letters, _, letters_cut = fit(generator, question, shots, True, is_chat)
        of_answers, read, answers_cut = fit(generator, question, shots, False, is_chat)
        likely = log_likelihoods(generator.model, of_letters + of_answers)
        n = len(question.options)
        letters.append(likely[:n])
        # of an option longer than the window a part is judged, and divided by the characters of this part
        sizes = [max(1, len(option)) * part for option, part in zip(question.options, read, strict=True)]
        answers.append(likely[n:] / sizes)
        n_cut += letters_cut or answers_cut
    return letters, answers, n_cut


def share_right(question: Choice, likely: Likely) -> float:
    """1 if the right option is the likeliest, 0 if it is not, 1 / k if it is among k that are equally likely."""
    best = likely == likely.max()
    return float(best[question.answer] / best.sum())


def describe(model: str, question: Choice, letters: Likely, answers: Likely) -> dict[str, Any]:
    """The record of --out."""
    record = {"model": model, "file": question.file, "where": question.where, "subject": question.subject}
    record |= {"question": question.question, "answer": question.letters[question.answer]}
    for name, likely in (("by_letter", letters), ("by_answer", answers)):
        record |= {name: question.letters[likely.argmax()], f"log_likelihood_{name}": likely.tolist()}
    return record


def subject_table(questions: list[Choice], letters: list[Likely], answers: list[Likely]) -> list[tuple[str, ...]]:
    """Rows of the share right by subject, with its standard error, and what guessing gives.

    all: of all questions. mean: of the subjects, which then count alike, as C-Eval and CMMLU are reported.
    """
    chance = np.array([1 / len(question.options) for question in questions])
    kinds = [np.array(list(map(share_right, questions, likely))) for likely in (letters, answers)]
    subjects = np.array([question.subject for question in questions])
    rows = [("subject", "questions", "by letter", "by answer", "chance")]
    means = []  # (subjects, kinds, 2): share and standard error
    for subject in dict.fromkeys(subjects.tolist()):
        of = subjects == subject
        means.append([ratio(kind[of], np.ones(of.sum())) for kind in kinds])
        shares = (percent(*mean) for mean in means[-1])
        rows.append((subject, str(of.sum()), *shares, f"{100 * chance[of].mean():.1f}%"))
    if len(means) > 1:
        shares = (percent(*ratio(kind, np.ones(len(kind)))) for kind in kinds)
        rows.append(("all", str(len(questions)), *shares, f"{100 * chance.mean():.1f}%"))
        share, error = np.array(means).mean(0)[:, 0], np.sqrt((np.array(means)[..., 1] ** 2).sum(0)) / len(means)
        of_subjects = np.mean([chance[subjects == subject].mean() for subject in dict.fromkeys(subjects.tolist())])
        rows.append(("mean", "", *map(percent, share, error), f"{100 * of_subjects:.1f}%"))
    return rows


def percent(share: float, error: float) -> str:
    """A share in percent with its standard error, which a single question has none of."""
    return f"{100 * share:.1f}%" + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")


def fit(
    generator: TextGenerator, question: Choice, shots: list[Choice], by_letter: bool, is_chat: bool
) -> tuple[list[Pair], list[float], bool]:
    """Token ids of what comes before a reply and of the reply, for every reply; and whether the question was cut.

    Between the two the share of each reply that is read: 1 unless it alone is longer than the window.

    Together they have no more tokens than the window: examples that do not fit are left out, the first ones first, then
    the heading, then the beginning of the question.
    """
    room = generator.model.config.block_size + 1  # the last token is predicted, not read
    encode, subject = encode_chat if is_chat else encode_plain, question.subject.replace("_", " ")
    heading = f"以下是关于{subject}的单项选择题。" if question.is_chinese else f"Multiple choice about {subject}."
    for head, n_shots in [*((heading, n) for n in range(len(shots), -1, -1)), ("", 0)]:
        chosen = shots[len(shots) - n_shots :]
        replies = question.replies(by_letter)
        pairs = [encode(generator.tokenizer, head, chosen, question, reply, by_letter) for reply in replies]
        if all(len(context) + len(reply) <= room for context, reply in pairs):
            return pairs, [1.0] * len(pairs), False
    cut = [(context, reply[: room - 1]) for context, reply in pairs]
    read = [len(short) / len(reply) for (_, short), (_, reply) in zip(cut, pairs, strict=True)]
    return [(context[len(reply) - room :], reply) for context, reply in cut], read, True


def encode_plain(
    tokenizer: Tokenizer, heading: str, shots: list[Choice], question: Choice, reply: str, by_letter: bool
) -> Pair:
    """Context and reply as one text: heading, examples with their answers, question."""

    def answered(choice: Choice, text: str) -> str:
        return choice.ask(by_letter) + ("" if choice.is_chinese else " ") + text

    blocks = [heading] * bool(heading)
    blocks += [answered(shot, shot.replies(by_letter)[shot.answer]) for shot in shots]
    before = normalise("\n\n".join([*blocks, question.ask(by_letter)]))
    whole = normalise("\n\n".join([*blocks, answered(question, reply)]))
    context, ids = tokenizer.encode(before).tolist(), tokenizer.encode(whole).tolist()
    # a token may begin in the context and end in the reply: then it belongs to the reply
    n = next((i for i, (a, b) in enumerate(zip(context, ids, strict=False)) if a != b), min(len(context), len(ids) - 1))
    first = [tokenizer.bos] if tokenizer.adds_bos else []
    return first + ids[:n], ids[n:]


def encode_chat(
    tokenizer: Tokenizer, heading: str, shots: list[Choice], question: Choice, reply: str, by_letter: bool
) -> Pair:
    """Context and reply in the model's chat template: the heading as system message, every example a turn."""
    messages = [{"role": "system", "content": heading}] * bool(heading)
    for shot in shots:
        messages += [{"role": "user", "content": shot.ask(by_letter)}]
        messages += [{"role": "assistant", "content": shot.replies(by_letter)[shot.answer]}]
    messages += [{"role": "user", "content": question.ask(by_letter)}]
    return tokenizer.encode_chat(messages)[0].tolist(), tokenizer.encode(reply or " ").tolist()


@torch.inference_mode()
def log_likelihoods(model: GPT, pairs: list[Pair]) -> np.ndarray:
    """log p(reply | context) in nats of pairs of token ids (n,), neither of them empty, in one batch.

    What the model reads, context and reply but for the reply's last token, is read once where several pairs share it:
    the letters of a question differ in nothing else.
    """
    device = next(model.parameters()).device
    read = [(*context, *reply[:-1]) for context, reply in pairs]
    rows = {tokens: i for i, tokens in enumerate(dict.fromkeys(read))}
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)  # padding comes last: no token sees it
    for tokens, i in rows.items():
        idx[i, : len(tokens)] = torch.tensor(tokens)
    hidden = model.hidden(idx.to(device))  # (B, T, n_embd)
    found = []
    for tokens, (_, reply) in zip(read, pairs, strict=True):
        last = hidden[rows[tokens], len(tokens) - len(reply) : len(tokens)]  # (len(reply), n_embd)
        log_p = model.lm_head(last).float().log_softmax(-1)  # (len(reply), vocab_size)
        found.append(log_p[range(len(reply)), reply].sum().item())
    return np.array(found)
