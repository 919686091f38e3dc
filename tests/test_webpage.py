"""The web page that convert.py writes, opened from disk in a real Chromium and compared with the model in Python."""

import functools
import itertools
import json
import random
import re
import warnings

import numpy as np
import other_programs
import pytest
import torch
from browsers import MARKUP, Tab, probability
from test_foreign import KINDS, make_tokenizer

from base.configuration import UserError
from layers.sampling import filter_logits
from model import GPT
from serving.text_generator import GenerationConfig, TextGenerator
from text.foreign import ForeignTokenizer
from text.tokenizer import EOS, SPECIAL_TOKENS, BPETokenizer, CharTokenizer
from weights import webpage

LETTERS = "abcdefghijklmnopqrstuvwxyz ABC?.,<>/()1你好世界水果🙂é\n"
SHAPES = {
    "grouped queries": {"n_kv_head": 2},
    "one key/value head, untied": {"n_kv_head": 1, "tie_embeddings": False},
    "without qk_norm": {"qk_norm": False},
    "biases": {"bias": True},
    "windows": {"attention_window": [5, 0]},
    "gelu, biases": {"mlp": "gelu", "bias": True},
    "relu2": {"mlp": "relu2"},
    "odd widths": {"n_embd": 36, "n_hidden": 45, "n_head": 2},
    "learned positions": {"use_rope": False},
    "linear": {"rope_scaling": "linear", "rope_factor": 4.0},
    "ntk": {"rope_scaling": "ntk", "rope_factor": 4.0},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 4.0},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 4.0},
    "Qwen's biases, heads of another size": {"qkv_bias": True, "qk_norm": False, "head_dim": 24, "n_kv_head": 2},
    "GPT-2's": {"norm": "layernorm", "bias": True, "mlp": "gelu_tanh", "use_rope": False, "qk_norm": False},
    "layernorm": {"norm": "layernorm"},
    "experts": {"n_expert": 4, "n_hidden": 32},
    "one expert a token": {"n_expert": 4, "n_hidden": 32, "n_expert_per_token": 1},
    "shared experts, biases on the choice": {
        **{"n_expert": 4, "n_hidden": 32, "n_shared_expert": 2, "expert_balance": "bias"}
    },
}


# --------------------------------------------------------------------------------------------------------- the models


@pytest.fixture(scope="module")
def characters():
    return CharTokenizer.train([LETTERS])


@pytest.fixture(scope="module")
def bpe():
    text = "The quick brown fox, 12345 times! 水果是桃子。你好世界 🙂 éclair's don't  two\n\n  lines\t"
    return BPETokenizer.train([text * 50], 400)


@pytest.fixture(scope="module")
def tokenizers(characters, bpe):
    """kind -> our tokenizers, and those of other families of models: tokenizers("llama3")."""

    def making(kind: str):
        if kind in ("characters", "bpe"):
            return characters if kind == "characters" else bpe
        theirs = make_tokenizer(kind)
        contents = json.loads(theirs.backend_tokenizer.to_str())
        if kind.startswith("qwen"):  # as Qwen has: normalisation, and a token that is found though it is not special
            contents["normalizer"] = {"type": "NFC"}
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
            for n, content in enumerate(("<t", "<tool>")):  # the longer one is taken
                contents["added_tokens"].append({"id": len(theirs) + n, "content": content, **flags})
        names = {name: getattr(theirs, name) for name in ("bos_token", "eos_token", "pad_token")}
        names = {name: token for name, token in names.items() if token}
        n_rows = len(theirs) + 7  # more than tokens
        return ForeignTokenizer.from_tokenizer_json(contents, names, n_rows, kind, theirs.chat_template)

    return functools.cache(making)


make_model = functools.partial(other_programs.make_model, std=0.2)  # large, so that it is sure of what it says


def make_parrot(tokenizer, question: str, answer: list[int]) -> GPT:
    """A model that gives one answer to a question, by position alone: position p is the unit vector e_p."""
    model = make_model(tokenizer.vocab_size, use_rope=False, tie_embeddings=False, n_embd=64)
    n_prompt = len(tokenizer.encode_chat([{"role": "user", "content": question}])[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(parameter.dim() == 1))
        model.position_embedding.weight.copy_(torch.eye(64))
        for i, token in enumerate(answer):
            model.lm_head.weight[token, n_prompt - 1 + i] = 5.0
    return model


def rounded(model: GPT) -> GPT:
    """The model with the numbers that its weights are after 8 bits: q8_0 by its definition, number by number."""
    copy = GPT(model.config).eval()
    copy.load_state_dict(model.state_dict())
    for name, weight in copy.state_dict().items():
        if weight.dim() < 2 or name.endswith("router.weight"):
            continue
        for row in weight.view(-1, weight.size(-1)):
            for block in row.split(32):
                scale = block.abs().max() / 127
                block.copy_((block / scale).round() * scale.half().float())
    return copy


def questions(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS.strip(), k=rng.randint(1, 20))) for _ in range(n)]


def answer_of(
    model: GPT, tokenizer, question: str, history=(), max_length: int | None = None, instruct: bool = True
) -> tuple[str, list[int]]:
    """What Python answers, greedily, and the tokens that were drawn."""
    generator, drawn = TextGenerator(model, tokenizer, torch.device("cpu"), instruct), []
    config = GenerationConfig(temperature=0.0, max_length=max_length)
    return "".join(generator.answer(question, config, history, drawn)), drawn


def answer_from(model: GPT, tokenizer, question: str, begun: list[int]) -> str:
    """What Python answers, greedily, when the answer begins with these tokens."""
    ids = tokenizer.encode_chat([{"role": "user", "content": question}])[0].tolist() + begun
    room = model.config.block_size - len(ids)
    rest = model.generate(torch.tensor([ids]), room, temperature=0.0, stop_tokens=tokenizer.stop_tokens)
    tokens = [*begun, *(token.item() for token in rest)]
    return tokenizer.decode([token for token in tokens if token not in tokenizer.stop_tokens])


def is_tie(model: GPT, tokenizer, question: str, drawn: list[int]) -> bool:
    """Whether the two best logits of some step are so close that rounding decides."""
    ids = tokenizer.encode_chat([{"role": "user", "content": question}])[0].tolist()
    logits = model(torch.tensor([ids + drawn[:-1]]))[0][0, len(ids) - 1 :]
    best = logits.topk(2).values
    return bool(((best[:, 0] - best[:, 1]) < 1e-4).any())


# ------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture
def open_page(browser, tmp_path):
    """Write a model as a page and open it: open_page(model, tokenizer) -> Tab."""
    pages = []

    def opening(model, tokenizer, type_name: str = "float32", name: str = "answer", **context) -> Tab:
        path = tmp_path / f"{name}.html"
        webpage.write_page(path, model, tokenizer, type_name)
        pages.append(Tab(browser.new_context(**{"locale": "en-GB", **context}), path.as_uri()))
        return pages[-1]

    yield opening
    for page in pages:
        troubles = page.troubles
        page.context.close()
        assert not troubles


@pytest.fixture(scope="module")
def scripts(browser):
    """The functions of tokenizer.js and model.js, in an empty page."""
    tab = browser.new_page()
    tab.add_script_tag(content=webpage.read_source("tokenizer.js") + webpage.read_source("model.js"))
    yield tab
    tab.close()


# ------------------------------------------------------------------------------------------- the same as in Python


@pytest.mark.parametrize("type_name", webpage.TYPES)
def test_fifty_greedy_answers_are_those_of_python(open_page, characters, type_name):
    model = make_model(characters.vocab_size)
    page = open_page(model, characters, type_name).set(temperature="0")
    if type_name == "q8_0":
        model = rounded(model)
    lengths = set()
    for question in questions(50):
        expected, drawn = answer_of(model, characters, question)
        lengths.add(drawn[-1] == EOS)
        assert page.ask_anew(question) == expected or is_tie(model, characters, question, drawn)
    assert lengths == {True, False}  # some answers ended by themselves


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_network_is_computed(open_page, characters, shape):
    model = make_model(characters.vocab_size, **SHAPES[shape])
    page = open_page(model, characters, "q8_0" if shape == "odd widths" else "float32").set(temperature="0")
    model = rounded(model) if shape == "odd widths" else model
    for question in questions(3):
        assert page.ask_anew(question) == answer_of(model, characters, question)[0]


def test_byte_level_bpe_speaks_chinese_and_emoji(open_page, bpe):
    model = make_model(bpe.vocab_size)
    page = open_page(model, bpe).set(temperature="0")
    for question in ["Hello 世界 🙂", "水果是什么？", "don't  stop\n\n now", "🙂🙃", *questions(4)]:
        assert page.ask_anew(question) == answer_of(model, bpe, question)[0]
    # an emoji of several tokens appears when its last byte has come
    tokens = bpe.encode("a🦊桃").tolist()
    assert len(tokens) > 4
    page = open_page(make_parrot(bpe, "say", [*tokens, EOS]), bpe).set(temperature="0")
    assert page.ask("say") == "a🦊桃"
    assert page.tab.locator(".token").count() == len(tokens) + 1
    # bytes that are no text
    odd = bpe.encode("🦊").tolist()[:2] + bpe.encode("a").tolist() + bpe.encode("桃")[:1].tolist()
    parrot = make_parrot(bpe, "say", [*odd, EOS])
    page = open_page(parrot, bpe).set(temperature="0")
    assert page.ask("say") == answer_of(parrot, bpe, "say")[0]


def odd_texts() -> list[str]:
    rng = random.Random(0)
    pieces = [
        "The quick",
        " brown",
        "don't",
        "'ll",
        "'LL",
        "x'y",
        "123",
        "½²",
        "你好",
        "水果",
        "🙂",
        "👩‍👩‍👧",
        "é",
        "e\u0301",
    ]
    spaces = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r",
        "\x85",
        "\xa0",
        "\u3000",
        "\u2028",
        "\ufeff",
        "\u200b",
        "\x1c",
        "\x00",
    ]
    pieces += ["'ſ", "'S", "<tool>", "<t", "<|im_end|>", "<|eot_id|>"]
    texts = ["".join(rng.choices(pieces + spaces + list("!?-_<|>"), k=rng.randint(1, 15))) for _ in range(400)]
    return [*texts, *pieces, *spaces, *SPECIAL_TOKENS, "", "水" * 300, "a" * 300]


@pytest.mark.parametrize("kind", ["characters", "bpe", *KINDS])
def test_every_tokenizer_gives_the_ids_of_python(scripts, tokenizers, kind):
    tokenizer, texts = tokenizers(kind), odd_texts()
    name = "CharTokenizer" if kind == "characters" else "BPETokenizer"
    describe = f"const t = new {name}(described);"
    encode = f"([described, texts]) => {{ {describe} return texts.map((text) => t.encode(text)); }}"
    ids = scripts.evaluate(encode, [webpage.describe_tokenizer(tokenizer), texts])
    for text, found in zip(texts, ids, strict=True):
        assert found == tokenizer.encode(text).tolist(), repr(text)
    lone = scripts.evaluate(
        f"(described) => {{ {describe} return t.encode('a\\ud800b'); }}", webpage.describe_tokenizer(tokenizer)
    )
    assert lone == tokenizer.encode("a\ud800b").tolist()
    conversation = [
        {"role": "system", "content": "be kind\n"},
        {"role": "user", "content": " hello <|eos|> <|im_end|>"},
        {"role": "assistant", "content": "你好 "},
        {"role": "user", "content": " who?"},
    ]
    for messages in (conversation, conversation[1:], conversation[:2]):
        chat = f"([described, template, messages]) => {{ {describe} return encodeChat(t, template, messages); }}"
        arguments = [webpage.describe_tokenizer(tokenizer), webpage.describe_template(tokenizer), messages]
        assert scripts.evaluate(chat, arguments) == tokenizer.encode_chat(messages)[0].tolist()


@pytest.mark.parametrize("kind", ["smollm", "llama3"])
def test_models_of_others_answer_by_their_own_template(open_page, tokenizers, kind):
    tokenizer = tokenizers(kind)
    model = make_model(tokenizer.vocab_size, n_kv_head=2, block_size=128)
    page = open_page(model, tokenizer).set(temperature="0")
    for question in ["hello world", "你好 🙂"]:
        assert page.ask_anew(question) == answer_of(model, tokenizer, question)[0]
    page.set(mode="text")
    assert page.ask("hello world") == answer_of(model, tokenizer, "hello world", instruct=False)[0]


def test_a_tokenizer_that_the_page_does_not_have_is_refused(tokenizers):
    values = tokenizers("smollm").to_dict()
    contents = json.loads(values["tokenizer"])
    contents["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    other = ForeignTokenizer.from_dict({**values, "tokenizer": json.dumps(contents)}, "x")
    with pytest.raises(UserError, match="cut text into words"):
        webpage.describe_tokenizer(other)
    contents = {**json.loads(values["tokenizer"]), "normalizer": {"type": "Lowercase"}}
    other = ForeignTokenizer.from_dict({**values, "tokenizer": json.dumps(contents)}, "x")
    with pytest.raises(UserError, match="Lowercase"):
        webpage.describe_tokenizer(other)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.6}, {"top_k": 8, "top_p": 0.9}]
)
def test_tokens_are_drawn_from_the_same_distribution(scripts, settings):
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **settings}
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 2
    scaled = filter_logits(logits[None] / settings["temperature"], settings["top_k"], settings["top_p"])
    expected = scaled.softmax(-1)[0].numpy()
    draw = "([x, s]) => Array.from({length: 20000}, () => sample(Float64Array.from(x), s))"
    drawn = scripts.evaluate(draw, [logits.tolist(), settings])
    shares = np.bincount(drawn, minlength=30) / len(drawn)
    assert set(np.flatnonzero(shares)) <= set(np.flatnonzero(expected))
    assert np.abs(shares - expected).max() < 0.02
    greedy = scripts.evaluate("x => sample(Float64Array.from(x), {temperature: 0})", logits.tolist())
    assert greedy == logits.argmax().item()


def test_a_long_conversation_slides_the_window_as_python_does(open_page, characters):
    model = make_model(characters.vocab_size, seed=1)
    page = open_page(model, characters).set(temperature="0", max_length="300", system="be kind")
    history, n_tokens, was_forgotten = [{"role": "system", "content": "be kind"}], 0, False
    for question in itertools.cycle(questions(12, seed=3)):
        expected, drawn = answer_of(model, characters, question, history, max_length=300)
        assert page.ask(question) == expected
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": expected}]
        was_forgotten |= any("not read" in line for line in page.below())
        n_tokens += len(drawn) + len(question)
        if n_tokens > 2000:
            break
    assert was_forgotten


def test_texts_are_continued(open_page, characters):
    model = make_model(characters.vocab_size)
    page = open_page(model, characters).set(mode="text", temperature="0")
    for text in questions(5):
        assert page.ask(text) == answer_of(model, characters, text, instruct=False)[0]
    long = "abc " * 40
    with pytest.warns(UserWarning, match="160 tokens; the model reads the newest 48"):
        expected = answer_of(model, characters, long, instruct=False)[0]
    assert page.ask(long) == expected
    assert page.below()[0] == "The text has 160 tokens; the model reads the newest 48."
    page.set(max_length="200")
    with pytest.warns(UserWarning, match="reads the newest 64"):
        expected = answer_of(model, characters, long, max_length=200, instruct=False)[0]
    assert page.ask(long) == expected


def test_a_long_text_keeps_the_token_that_begins_it(open_page, tokenizers):
    tokenizer = tokenizers("llama3")
    model = make_model(tokenizer.vocab_size)
    page = open_page(model, tokenizer).set(mode="text", temperature="0")
    for text in ("Hello", "Hello world, " * 40):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert page.ask(text) == answer_of(model, tokenizer, text, instruct=False)[0]


def test_weights_that_no_browser_reads_are_refused(tmp_path, characters, monkeypatch):
    monkeypatch.setattr(webpage, "MAX_BASE64", 1000)
    with pytest.raises(UserError, match="more than a browser reads"):
        webpage.write_page(tmp_path / "large.html", make_model(characters.vocab_size), characters, "q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1e-6, 1e8])
def test_weights_that_eight_bits_cannot_hold_stay_exact(size):
    model = make_model(50)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.mul_(size)
    kinds = {tensor["name"]: tensor["type"] for tensor in webpage.pack_weights(model, "q8_0")[0]}
    assert kinds["blocks.0.mlp.up.weight"] == "float32" and kinds["blocks.1.mlp.up.weight"] == "q8_0"


def test_added_tokens_that_take_what_stands_beside_them_are_refused(tokenizers):
    contents = json.loads(tokenizers("qwen2").to_dict()["tokenizer"])
    next(token for token in contents["added_tokens"] if token["content"] == "<tool>")["single_word"] = True
    names, rows = tokenizers("qwen2").names, tokenizers("qwen2").vocab_size
    changed = ForeignTokenizer.from_tokenizer_json(contents, names, rows, "x", tokenizers("qwen2").jinja)
    with pytest.raises(UserError, match="<tool>"):
        webpage.describe_tokenizer(changed)


def test_the_probabilities_shown_are_those_of_the_logits(open_page, characters):
    model = make_model(characters.vocab_size)
    page = open_page(model, characters).set(temperature="0")
    question = "hello?"
    _, drawn = answer_of(model, characters, question)
    page.ask(question)
    ids = characters.encode_chat([{"role": "user", "content": question}])[0].tolist()
    expected = model(torch.tensor([ids + drawn]))[0][0, len(ids) - 1 :].softmax(-1)
    for i in (0, 1, 7, len(drawn) - 1):
        page.tab.locator(".token").nth(i).hover()
        top = expected[i].topk(10)
        names = [characters.decode([token]).replace(" ", "␣").replace("\n", "⏎") for token in top.indices.tolist()]
        shown = page.others()
        assert [text for text, _ in shown] == names
        assert all(abs(p - q) < 1e-4 for (_, p), q in zip(shown, top.values.tolist(), strict=True))
        share = probability(page.tab.locator("#drawn-probability").text_content())
        assert abs(share - expected[i, drawn[i]].item()) < 1e-4


# ------------------------------------------------------------------------------------------------ what a page must not


def test_markup_stays_text_wherever_it_stands(open_page, characters):
    answer = [*characters.encode(MARKUP).tolist(), EOS]
    name = "<script>alert(1)<b>"
    page = open_page(make_parrot(characters, MARKUP, answer), characters, name=name).set(temperature="0")
    assert page.ask(MARKUP) == MARKUP
    assert page.tab.locator(".question").text_content() == MARKUP
    assert page.tab.title() == name and page.tab.locator("#name").text_content() == name
    page.tab.locator(".token").first.hover()
    assert page.tab.locator("main script, header script, #others script, b b").count() == 0
    assert page.tab.locator("script").count() == 3  # the page's own: its code, its description, the model


def test_nothing_is_loaded_and_nothing_leaves(open_page, characters, tmp_path):
    page = open_page(make_model(characters.vocab_size), characters)
    page.ask("hello?")
    assert len(page.requests) == 2  # the page and its worker
    assert all(url.startswith(("file:", "blob:", "data:")) for url in page.requests)
    text = (tmp_path / "answer.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "unsafe" not in text
    assert not re.search(r"https?:|//[a-z]+\.[a-z]", text)


def test_text_inside_json_cannot_end_the_script():
    value = {"characters": "</script><!--<script>", "more": "\u2028&"}
    text = webpage.as_json(value)
    assert "<" not in text and json.loads(text) == value
    sources = [webpage.join_modules(), webpage.read_source("page.css", webpage.SHARED)]
    for source in [*sources, webpage.read_source("tokenizer.js"), webpage.read_source("model.js")]:
        assert not re.search("</(script|style)|<!--", source, re.IGNORECASE)


@pytest.mark.parametrize("type_name, size", [("q8_0", 34 / 32), ("float32", 4)])
def test_the_size_is_that_of_the_weights_in_base64(tmp_path, characters, type_name, size):
    model = make_model(characters.vocab_size, n_embd=128, n_layer=4)
    webpage.write_page(tmp_path / "a.html", model, characters, type_name)
    weights = model.parameter_count() * size * 4 / 3
    assert (tmp_path / "a.html").stat().st_size < 1.02 * weights + 80_000


def test_eight_bits_are_those_of_llama_cpp():
    gguf = pytest.importorskip("gguf")
    matrix = np.random.default_rng(0).normal(size=(50, 96)).astype(np.float32)
    matrix[3] = 0
    matrix[4, :32] = 1.5 * np.arange(32)
    theirs = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    assert webpage.to_q8_0(matrix) == theirs.tobytes()


# -------------------------------------------------------------------------------------------------- what a person does


def test_stop_and_new(open_page, characters):
    model = make_parrot(characters, "abc?", characters.encode("it never ends").tolist())
    page = open_page(model, characters).set(temperature="0", max_length="100000000")
    page.start("abc?")
    page.tab.wait_for_selector(".token:nth-child(20)")
    page.tab.click("#stop")
    page.tab.wait_for_selector("#stop", state="hidden")
    assert page.below()[0] == "Stopped."
    page.start("and?")
    page.tab.wait_for_selector(".turn:nth-child(2) .token")
    page.tab.click("#new")  # while an answer is given
    assert page.tab.locator(".turn").count() == 0 and page.tab.locator("#welcome").is_visible()
    page.set(max_length="")
    assert page.ask("abc?") == answer_of(model, characters, "abc?")[0]
    assert page.tab.locator(".turn").count() == 1


def test_questions_are_edited_and_answers_branch(open_page, characters):
    model = make_model(characters.vocab_size)
    page = open_page(model, characters).set(temperature="0")
    first = page.ask("hello")
    _, drawn = answer_of(model, characters, "hello")
    page.tab.locator(".token").nth(4).click()
    second = page.tab.locator("#candidates button").nth(1)
    name = second.locator(".text").text_content().replace("␣", " ")
    second.click()
    page.tab.wait_for_selector("#stop", state="hidden")
    (token,) = [i for i in range(characters.vocab_size) if characters.decode([i]) == name]
    assert page.tab.locator(".answer").text_content() == answer_from(model, characters, "hello", [*drawn[:4], token])
    page.tab.click(".edit")
    page.tab.fill(".edit textarea", "what?")
    page.tab.press(".edit textarea", "Enter")
    page.tab.wait_for_selector("#stop", state="hidden")
    assert page.tab.locator(".answer").text_content() == answer_of(model, characters, "what?")[0]
    page.tab.locator(".previous").first.click()
    page.tab.locator(".reply .previous").click()
    assert page.tab.locator(".answer").text_content() == first


def test_what_cannot_be_answered_is_said(open_page, characters):
    page = open_page(make_model(characters.vocab_size), characters).set(temperature="0")
    page.ask("¿qué? ¿qué?")
    unknown = characters.unknown_characters("¿qué?")
    assert page.below()[0] == f"Not in the vocabulary, read as <|unknown|>: {' '.join(unknown)}"
    page.start("a" * 100)
    page.tab.wait_for_selector("#stop", state="hidden")
    assert "102 tokens, the model's window 64" in page.notice
    assert page.tab.input_value("#question") == "a" * 100  # it can be shortened
    page.set(max_length="5").start("hello world")
    page.tab.wait_for_selector("#stop", state="hidden")
    assert "which the maximum length 5 counts too" in page.notice


def test_tokens_can_be_read_by_keyboard_and_by_touch(open_page, characters):
    page = open_page(
        make_model(characters.vocab_size), characters, has_touch=True, viewport={"width": 390, "height": 800}
    )
    page.set(temperature="0").ask("hello?")
    assert page.tab.locator("html").evaluate("e => e.scrollWidth") <= 390
    card = page.tab.locator("#others")
    assert card.is_hidden()
    page.tab.locator(".token").nth(3).tap()
    box = card.bounding_box()
    assert min(box["x"], box["y"]) >= 0
    assert box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 800
    token = page.tab.locator(".token.shown").bounding_box()
    assert box["y"] >= token["y"] + token["height"] or box["y"] + box["height"] <= token["y"]  # it stays in sight
    page.tab.locator("h1").tap()
    assert card.is_hidden()
    page.tab.focus("#question")
    while not page.tab.evaluate("document.activeElement.matches('.answer')"):  # it stands before the question
        page.tab.keyboard.press("Shift+Tab")
    assert card.is_visible()
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.tab.keyboard.press(key)
    assert page.tab.locator(".token.shown").evaluate("e => [...e.parentNode.children].indexOf(e)") == 2
    assert "%" in page.tab.locator("#spoken").text_content()
    page.tab.keyboard.press("Escape")
    assert card.is_hidden()
    unnamed = page.tab.locator("button, input, textarea").evaluate_all(
        "all => all.filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).map(e => e.id)"
    )
    assert unnamed == []


def test_english_and_chinese_light_and_dark(open_page, characters):
    page = open_page(make_model(characters.vocab_size), characters, locale="zh-CN", color_scheme="dark")
    paper = "e => getComputedStyle(e).backgroundColor"
    html = page.tab.locator("html")
    assert html.get_attribute("lang") == "zh-Hans" and page.tab.locator("#new").text_content() == "新对话"
    assert html.evaluate(paper) == "rgb(23, 22, 20)"
    page.ask("ß")
    assert "不在词表中" in page.below()[0]
    page.tab.click("#language")
    page.tab.click("#theme")
    assert html.get_attribute("lang") == "en" and page.tab.locator("#new").text_content() == "New"
    assert "Not in the vocabulary" in page.below()[0]  # what was said before, too
    assert html.evaluate(paper) == "rgb(252, 251, 248)"
    english, chinese = webpage.read_source("words.js", webpage.SHARED).split("const said")[0].split("  zh: {")
    assert re.findall(r"^    (\w+):", english, re.MULTILINE) == re.findall(r"^    (\w+):", chinese, re.MULTILINE)


# ------------------------------------------------------------------------------------------------------- convert.py


def test_convert_writes_a_page_and_does_not_read_it(prepared, call):
    tiny = ["--n_layer", "2", "--n_head", "2", "--n_embd", "16", "--block_size", "16", "--device", "cpu"]
    assert call("train.py", "-t", "pretrain", *tiny, "--max_steps", "1", "--batch_size", "4").status == 0
    result = call("convert.py", "checkpoint/pretrain.pt", "page.html")
    assert result.status == 0 and "q8_0" in result.out and "open page.html in a browser" in result.out
    assert (prepared / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    result = call("convert.py", "page.html", "back.pt")
    assert result.status == 1 and "is not read back" in result.err
    result = call("convert.py", "checkpoint/pretrain.pt", "half.html", "--type", "float16")
    assert result.status == 1 and "q8_0 or float32" in result.err and not (prepared / "half.html").exists()


def test_full_attention_is_refused(tmp_path, characters):
    with pytest.raises(UserError, match="is_causal false"):
        webpage.write_page(tmp_path / "a.html", make_model(characters.vocab_size, is_causal=False), characters, "q8_0")
    assert not list(tmp_path.iterdir())
