"""Data cleaning: MinHash against exact Jaccard similarity, filters, splitting at sentence ends."""

import functools
import json
import random

import pytest
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from text.cleaning import N_SHINGLE, Cleaner, CleaningConfig, split_at_sentences
from text.token_files import TokenFile
from text.tokenizer_files import load_tokenizer

letters = random.Random(5)
WORDS = ["ship", "sea", "storm"] + ["".join(letters.choices("abcdefghijklmnop", k=5)) for _ in range(300)]


def sentence(rng: random.Random, n: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n)) + "."


@functools.cache
def ngrams(text: str) -> frozenset[str]:
    return frozenset(text[i : i + N_SHINGLE] for i in range(len(text) - N_SHINGLE + 1))


def jaccard(a: str, b: str) -> float:
    return len(ngrams(a) & ngrams(b)) / len(ngrams(a) | ngrams(b))


def documents_of(folder) -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    texts = [tokenizer.decode(TokenFile(folder / f"pretrain_{split}.bin").tokens) for split in ("train", "val")]
    return [text for part in texts for text in part.replace("<|bos|>", "").split("<|eos|>") if text]


def test_near_duplicates_are_those_of_high_jaccard_similarity():
    pytest.importorskip("datasketch")
    rng = random.Random(0)
    texts = [" ".join(sentence(rng) for _ in range(6)) for _ in range(60)]
    cleaner = Cleaner(CleaningConfig(near_duplicates=0.7))
    assert all(cleaner.accept(text) for text in texts)
    same = [text.replace("a", "A").replace(" ", "  ", 3) for text in texts]
    assert not any(cleaner.accept(text) for text in same)
    changed = [text[:-40] + sentence(rng, 5) for text in texts]
    near = [jaccard(a, b) for a, b in zip(texts, changed, strict=True)]
    assert min(near) > 0.7 and sum(cleaner.accept(text) for text in changed) <= 6  # (MinHash is an estimate)
    other = [" ".join(sentence(rng) for _ in range(6)) for _ in range(60)]
    assert all(cleaner.accept(text) for text in other)
    assert cleaner.dropped["near-duplicates"] >= 114


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_near_duplicates_are_those_that_comparing_all_pairs_finds(threshold):
    """Precision is exact; recall is that of the bands, 0.99 at the threshold and more above it."""
    pytest.importorskip("datasketch")
    rng = random.Random(1)
    texts = []
    for _ in range(50):
        words = sentence(rng, 40).split()
        texts.append(" ".join(words))
        for n_changed in (0, 1, 2, 4, 8, 14, 20):  # similarities from 1 down to about 0.2
            changed = list(words)
            for i in rng.sample(range(40), n_changed):
                changed[i] = "".join(rng.choices("qrstuvwxyz", k=5))
            texts.append(" ".join(changed))
    near = Cleaner(CleaningConfig(near_duplicates=threshold)).near_duplicates
    kept: list[str] = []
    n_similar = n_found = 0
    for text in texts:
        is_similar = any(jaccard(text, other) >= threshold for other in kept)
        found = near.has_similar(text)
        assert is_similar or not found
        n_similar, n_found = n_similar + is_similar, n_found + found
        if not found:
            kept.append(text)
    assert n_similar >= 50 and n_found >= 0.985 * n_similar


def is_kept(text: str, **options) -> bool:
    return Cleaner(CleaningConfig(**options)).accept(text)


def test_limits_are_what_is_allowed_at_most_and_at_least():
    assert is_kept("abcd", min_characters=4) and not is_kept("abc", min_characters=4)
    assert is_kept("abcd", max_characters=4) and not is_kept("abcde", max_characters=4)
    in_pieces = Cleaner(CleaningConfig(max_characters=4))
    assert in_pieces.accept_length("ab", 4) and not in_pieces.accept_length("ab", 5)
    assert is_kept("a" * 8 + "##", max_symbols=0.2) and not is_kept("a" * 7 + "###", max_symbols=0.2)
    assert is_kept("क्षि, é", max_symbols=0.0)  # vowel signs and accents belong to their letters


def test_dropped_texts_are_reported_and_not_in_the_files(work, call):
    pytest.importorskip("datasketch")
    rng = random.Random(1)
    good = [" ".join(sentence(rng) for _ in range(5)) for _ in range(30)]
    bad = [
        "too short",
        "x" * 3000,
        "@#$% ^&* <<>> {}{}{} ~~~ ||| [][]  " * 4,
        good[3].replace("a", "A"),
        "业" * 8,
    ]
    write_jsonl(work / "d.jsonl", [{"text": text} for text in [*good, *bad, good[0]]])
    options = ["--near_duplicates", "0.8", "--min_characters", "20", "--max_characters", "2000", "--max_symbols", "0.2"]
    result = call("data.py", "d.jsonl", *options, "--block_size", "64")
    assert result.status == 0, result.err
    assert sorted(documents_of(work / "dataset")) == sorted(good)
    for words in (
        "2 shorter than min_characters, as 'too short'",
        "1 longer than",
        "1 more symbols",
        "2 near-duplicates",
    ):
        assert f"dropped: {words}" in result.out
    header = TokenFile("dataset/pretrain_train.bin").header
    assert sum(header["dropped"].values()) == 6 and header["duplicates_removed"] == 0
    assert "业" not in json.loads((work / "dataset" / "tokenizer.json").read_text(encoding="utf-8"))["characters"]


def test_of_preference_pairs_the_prompt_counts_once(work, call):
    """36 characters with both answers and the line ends between; 64 with the prompt of both."""
    rows = [{"prompt": f"a prompt of many letters {i:02}", "chosen": f"yes{i:02}", "rejected": "no"} for i in range(20)]
    write_jsonl(work / "d.jsonl", [*rows, {**rows[0], "rejected": "no, " * 20}])
    result = call("data.py", "d.jsonl", "--max_characters", "36", "--block_size", "64")
    assert result.status == 0 and "dropped: 1 longer" in result.out, result.err + result.out
    assert sum(len(TokenFile(f"dataset/dpo_{split}.bin").starts) - 1 for split in ("train", "val")) == 40


def test_fine_tuning_samples_are_filtered_too(work, call):
    rows = [{"question": f"what is {i}?", "answer": f"it is number {i}"} for i in range(20)]
    write_jsonl(work / "s.jsonl", [*rows, {"question": "?", "answer": "!"}])
    result = call("data.py", "s.jsonl", "--min_characters", "10", "--block_size", "64")
    assert result.status == 0 and "dropped: 1 shorter" in result.out
    assert sum(len(TokenFile(f"dataset/sft_{split}.bin").starts) - 1 for split in ("train", "val")) == 20


def test_long_documents_are_split_at_sentence_ends(work, call):
    text = "".join(f"今天是第{i}天。我们去海边！" for i in range(30)) + "“真的吗？”他问。"
    text += "".join(f"Sentence number {i}. Another one! " for i in range(20))
    write_jsonl(work / "d.jsonl", [{"text": text}, {"text": "A short one."}])
    assert call("data.py", "d.jsonl", "--split_documents", "100", "--block_size", "64").status == 0
    found = documents_of(work / "dataset")
    assert "A short one." in found and len(found) > 8
    assert all(len(piece) <= 100 and piece[-1] in "。！”.!？" for piece in found)
    assert sum(map(len, found)) >= 0.95 * len(text)  # (except white space at the edges)


def test_numbers_and_addresses_are_not_cut_at_their_points():
    text = "Pi is 3.14159 or so, see www.example.com for more. " * 3 + "圆周率是3.14。"
    for longest in range(52, 60):
        pieces = list(split_at_sentences(text, longest))
        assert pieces == ["Pi is 3.14159 or so, see www.example.com for more. "] * 3 + ["圆周率是3.14。"]


def test_pieces_are_as_long_as_they_may_be_and_keep_special_tokens_whole():
    assert list(split_at_sentences("Aaaaa. Bbbbbb. " * 3, 15)) == ["Aaaaa. Bbbbbb. "] * 3
    for n in range(16):
        pieces = list(split_at_sentences("a" * n + "<|unknown|>" + "b" * 20, 16))
        assert sum("<|unknown|>" in piece for piece in pieces) == 1 and max(map(len, pieces)) <= 16


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab。！.? \n”", max_size=200), st.integers(16, 40))
def test_splitting_loses_nothing(text, longest):
    pieces = list(split_at_sentences(text, longest))
    assert "".join(pieces) == text and all(0 < len(piece) <= longest for piece in pieces)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--near_duplicates", "2"], "near_duplicates must be at most 1"),
        (["--min_characters", "9", "--max_characters", "8"], "must not be above max_characters"),
        (["--split_documents", "3"], "split_documents must be at least 16"),
        (["--min_characters", "1000"], "no training text"),
    ],
)
def test_bad_options_are_refused(work, call, options, words):
    write_jsonl(work / "d.jsonl", [{"text": "a text"}, {"text": "another"}])
    result = call("data.py", "d.jsonl", *options)
    assert result.status == 1 and words in result.err and not (work / "dataset").exists()
