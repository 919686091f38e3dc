import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.configuration import UserError
from text.tokenizer import (
    BOS,
    EOS,
    INSTRUCT,
    RESPONSE,
    SPECIAL_TOKENS,
    UNKNOWN,
    BPETokenizer,
    CharTokenizer,
    remove_special_tokens,
    split_at_lines,
)
from text.tokenizer_files import load_tokenizer

TEXTS = [
    "Hello, world!\n\ttabs",
    "你好，世界。業餘無線電",
    "🙂👩‍👩‍👧‍👦🇨🇳 emoji with joiners",
    "e\u0301 is not é; क्षि; \u200f right to left עברית",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎 astral",
    "",
]
ALL = "".join(TEXTS)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([ALL * 3, "the cat sat on the mat " * 50, "你好世界" * 50], vocab_size=400)


def both(bpe):
    return [CharTokenizer.train([ALL]), bpe]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_is_exact(text, bpe):
    for tokenizer in both(bpe):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.stream(ids.tolist())) == text
    assert len(CharTokenizer.train([ALL]).encode(text)) == len(text)


def test_character_ids_equal_a_dictionary_look_up():
    tokenizer = CharTokenizer.train([ALL])
    table = {character: i for i, character in enumerate(sorted(set(ALL)), start=len(SPECIAL_TOKENS))}
    assert tokenizer.encode(ALL).tolist() == [table[character] for character in ALL]


@settings(max_examples=200, deadline=None)
@given(st.text().filter(lambda text: remove_special_tokens(text) == text))  # which no vocabulary is made of
def test_any_text_survives(text):
    tokenizer = CharTokenizer.train([text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    other = CharTokenizer("abc ")
    assert len(other.encode(text)) == len(text)
    expected = "".join(character if character in "abc " else "<|unknown|>" for character in text)
    assert other.decode(other.encode(text)) == expected


def test_unknown_characters_get_the_unknown_id_and_are_listed():
    tokenizer = CharTokenizer("abc")
    assert tokenizer.encode("aXbX喵").tolist() == [6, UNKNOWN, 7, UNKNOWN, UNKNOWN]
    assert tokenizer.unknown_characters("aXbX喵") == "X喵"
    assert tokenizer.unknown_characters("abc") == ""


def test_lone_surrogates_do_no_harm(bpe):
    for tokenizer in both(bpe):
        assert len(tokenizer.encode("a\ud800b\udfff")) >= 4


def test_special_tokens_are_recognised_in_training_text_only(bpe):
    text = "a<|eos|><|bos|>b <|eos|"
    for tokenizer in both(bpe):
        special = tokenizer.encode(text, special=True).tolist()
        assert special.count(EOS) == 1 and special.count(BOS) == 1
        assert tokenizer.decode(special) == text or tokenizer.kind == "char"
        typed = tokenizer.encode(text).tolist()
        assert not {EOS, BOS} & set(typed)
    assert bpe.decode(bpe.encode(text)) == text


def test_special_tokens_have_fixed_ids(bpe):
    for tokenizer in both(bpe):
        for i, token in enumerate(SPECIAL_TOKENS):
            assert tokenizer.encode(token, special=True).tolist() == [i]
            assert tokenizer.decode([i]) == token


def test_conversations_follow_the_template(bpe):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye <|eos|>"},
        {"role": "assistant", "content": "so long"},
    ]
    for tokenizer in [CharTokenizer.train(["be kind hi hello bye so long<|eos|>\n<|>"]), bpe]:
        ids, mask = tokenizer.encode_chat(messages)
        plain = lambda text: tokenizer.encode(text).tolist()  # noqa: E731, B023
        parts = [
            ([INSTRUCT, *plain("be kind\nhi"), RESPONSE], 0),
            ([*plain("hello"), EOS], 1),
            ([INSTRUCT, *plain("bye <|eos|>"), RESPONSE], 0),
            ([*plain("so long"), EOS], 1),
        ]
        assert ids.tolist() == [token for part, _ in parts for token in part]
        assert mask.tolist() == [loss for part, loss in parts for _ in part]
        prompt, mask = tokenizer.encode_chat(messages[:-1])
        assert prompt.tolist() == ids.tolist()[: len(prompt)] and prompt[-1] == RESPONSE


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path, bpe, kind):
    tokenizer = bpe if kind == "bpe" else CharTokenizer.train([ALL])
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode(ALL).tolist() == tokenizer.encode(ALL).tolist()
    assert again.vocab_size == tokenizer.vocab_size
    assert CharTokenizer("ab").fingerprint() != CharTokenizer("ba").fingerprint()


def test_bpe_equals_the_library_itself(bpe, tmp_path):
    import tokenizers

    reference = tokenizers.Tokenizer.from_str(bpe.to_dict()["tokenizer"])
    for text in TEXTS:
        assert bpe.encode(text).tolist() == reference.encode(text, add_special_tokens=False).ids
    assert len(bpe.encode("the cat sat on the mat ")) < 12
    assert bpe.vocab_size <= 400


def test_a_stream_that_ends_inside_of_a_character_gives_what_there_is(bpe):
    ids = bpe.encode("the 🙂").tolist()[:-1]
    assert bpe.decode(ids).endswith("\ufffd") and "".join(bpe.stream(ids)) == bpe.decode(ids)


SPACES = " \n\t\r"


@pytest.fixture(scope="module")
def bpe_of_spaces() -> BPETokenizer:
    """It has learnt tokens of several white-space characters."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(SPACES + "\n\nab", k=30)) for _ in range(300)]
    return BPETokenizer.train(texts, vocab_size=600)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=SPACES + "ab.", max_size=30), st.integers(1, 5))
def test_a_text_is_not_cut_where_white_space_may_be_one_token(bpe_of_spaces, text, size):
    ids = [i for piece in split_at_lines(text, size) for i in bpe_of_spaces.encode(piece)]
    assert ids == bpe_of_spaces.encode(text).tolist()


def test_the_tokenizer_of_spaces_has_what_its_test_needs(bpe_of_spaces):
    assert all(len(bpe_of_spaces.encode(text)) == 1 for text in ("\n\n", "\n ", " \n"))


def test_bpe_learns_nothing_across_special_tokens():
    tokenizer = BPETokenizer.train(["ab<|eos|>cd"] * 100, vocab_size=300)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("abcd")] == ["ab", "cd"]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab'st \n\r\t\x1c\x85\u00a0\u30003。", max_size=40), st.integers(1, 5))
def test_a_text_split_at_lines_is_encoded_like_the_unsplit_text(bpe, text, size):
    pieces = list(split_at_lines(text, size))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in bpe.encode(piece)] == bpe.encode(text).tolist()


@pytest.mark.parametrize(
    "contents",
    [
        "",
        "[]",
        "{}",
        "{",
        json.dumps({"format": 1, "kind": "char", "special_tokens": list(SPECIAL_TOKENS)}),
        json.dumps({"format": 9, "kind": "char", "special_tokens": list(SPECIAL_TOKENS), "characters": "ab"}),
        json.dumps({"format": 1, "kind": "char", "special_tokens": list(SPECIAL_TOKENS), "characters": "aa"}),
        json.dumps({"format": 1, "kind": "words", "special_tokens": list(SPECIAL_TOKENS), "characters": "ab"}),
        json.dumps({"format": 1, "kind": "bpe", "special_tokens": list(SPECIAL_TOKENS), "tokenizer": "{}"}),
        json.dumps({"format": 1, "kind": "char", "special_tokens": ["<pad>"], "characters": "ab"}),
    ],
)
def test_broken_tokenizer_json_are_refused_by_name(tmp_path, contents):
    path = tmp_path / "tokenizer.json"
    path.write_text(contents, encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_ids_outside_the_vocabulary_are_refused(bpe):
    for tokenizer in both(bpe):
        with pytest.raises(UserError, match="token ids must be in"):
            tokenizer.decode([tokenizer.vocab_size])
