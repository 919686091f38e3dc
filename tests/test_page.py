"""The page of serve.py: a real server, a real Chromium, and the models in Python beside them."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from browsers import MARKUP, Tab, probability
from conftest import ROOT, start_script
from test_webpage import LETTERS, answer_from, answer_of, make_model, make_parrot

import convert
from layers.attention_maps import attention_maps
from layers.experts import mixture_layers
from text.token_files import TokenFile
from text.tokenizer import EOS, BPETokenizer, CharTokenizer
from text.tokenizer_files import load_tokenizer

KEY = "a secret"
CHARACTERS = CharTokenizer.train([LETTERS])
BYTES = BPETokenizer.train(["say it " * 50], 270)
EMOJI = BYTES.encode("a🦊桃").tolist()  # of several bytes each, a token for each byte
PARROT = [*CHARACTERS.encode(MARKUP).tolist(), EOS]


def make_endless():
    """A model that never ends an answer, with a long window."""
    model = make_model(CHARACTERS.vocab_size, block_size=2048, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0  # a logit of 0 is never the largest
    return model


MODELS = {
    "first": make_model(CHARACTERS.vocab_size, block_size=64),
    "second": make_model(CHARACTERS.vocab_size, seed=1, block_size=64),
    "experts": make_model(CHARACTERS.vocab_size, n_expert=4, n_hidden=32),
    "parrot": make_parrot(CHARACTERS, MARKUP, PARROT),
    "endless": make_endless(),
    "emoji": make_parrot(BYTES, "say", [*EMOJI, EOS]),
}


def log_lines(stage: str, n_steps: int, first: int = 1) -> str:
    """A log of training, from a step on."""
    lines = []
    if first == 1:
        config = {"stage": stage, "max_steps": 1000}
        lines.append({"type": "header", "stage": stage, "train_config": config, "model_config": {}})
    for step in range(first, first + n_steps):
        lines.append(
            {"type": "train", "step": step, "loss": 4 / step, "lr": 0.001, "grad_norm": 1.0, "tokens_per_s": 9.0}
        )
        lines[-1]["ms_per_step"] = 6000.0
    step = first + n_steps - 1
    lines.append({"type": "val", "step": step, "val_loss": 4.5 / step, "best_val_loss": 4.5 / step})
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the server runs, with its models and the logs of three trainings."""
    folder = tmp_path_factory.mktemp("served")
    for name, model in MODELS.items():
        tokenizer = BYTES if name == "emoji" else CHARACTERS
        convert.write_checkpoint(f"{folder / name}.pt", model, tokenizer, "float32")
    for i, stage in enumerate(("pretrain", "sft", "dpo")):
        (folder / f"train_20260101_00000{i}.log").write_text(log_lines(stage, 5))
    return folder


@pytest.fixture(scope="module")
def address(browser, folder) -> Iterator[str]:
    """Of a server that needs a key."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    models = [argument for name in MODELS for argument in ("-m", f"{name}.pt")]
    process = start_script("serve.py", *models, "--port", "0", "--api_key", KEY, "--device", "cpu", cwd=folder)
    try:
        yield process.stdout.readline().strip() or pytest.fail(process.communicate()[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


class Served(Tab):
    """The page of the server."""

    def __init__(self, browser, address: str, key: str = KEY, **context) -> None:
        browser_context = browser.new_context(
            **{"locale": "en-GB", "viewport": {"width": 1200, "height": 800}, **context}
        )
        if key:
            browser_context.add_init_script(f"sessionStorage.setItem('nano:key', {json.dumps(key)})")
        super().__init__(browser_context, address, is_ready="#models:not([hidden])" if key else "#key-dialog[open]")

    def wait(self) -> None:
        self.tab.wait_for_selector("#stop", state="hidden")

    def answers(self) -> list[str]:
        return self.tab.locator(".answer").all_text_contents()

    def press(self, action: str, nth: int = -1) -> None:
        """A word below an answer or beside a question."""
        self.tab.locator(f".turn .{action}").nth(nth).click()

    def hold(self, token: int) -> None:
        """Press a token of the last answer."""
        self.tab.locator(".answer").last.locator(".token").nth(token).click()

    def exported(self, name: str) -> tuple[Path, list[dict]]:
        """A file of training data, and its lines."""
        self.tab.click("#history-button")
        with self.tab.expect_download() as download:
            self.tab.click(f"#export-{name}")
        self.tab.locator("#history .close").click()
        path = download.value.path()
        return path, [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@contextmanager
def pages_of(kind: type[Served], browser, address: str, first_model: str) -> Iterator[Callable[..., Served]]:
    """Open pages: opening() -> a page of this kind, with the likeliest token always drawn; in the end, no troubles."""
    pages = []

    def opening(model: str = first_model, second: str = "", **context) -> Served:
        page = kind(browser, address, **context)
        pages.append(page)
        page.tab.select_option("#model", model)
        page.tab.select_option("#second", second)
        return page.set(temperature="0")

    yield opening
    for page in pages:
        troubles = page.troubles
        page.context.close()
        assert not troubles


@pytest.fixture
def open_page(browser, address):
    with pages_of(Served, browser, address, "first") as opening:
        yield opening


def until(page: Served, script: str) -> None:
    """Wait for what a function of the page's returns; the page's policy forbids Playwright's own way."""
    for _ in range(600):
        if page.tab.evaluate(script):
            return
        page.tab.wait_for_timeout(100)
    pytest.fail(f"never: {script}")


def said(model: str, question: str, history=()) -> str:
    """What Python answers, greedily."""
    return answer_of(MODELS[model], CHARACTERS, question, history)[0]


def as_messages(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# -------------------------------------------------------------------------------------------------- conversation


def test_answers_are_those_of_python_and_follow_the_conversation(open_page):
    page, history = open_page(), []
    for question in ("hello", "what?", "AB 1"):
        answer = said("first", question, history)
        assert page.ask(question) == answer
        history += as_messages(question, answer)
    page.tab.click("#new")
    page.set(system="be kind")
    assert page.ask("hello") == said("first", "hello", [{"role": "system", "content": "be kind"}])
    page.set(system="", mode="text")
    assert page.ask("hello w") == answer_of(MODELS["first"], CHARACTERS, "hello w", instruct=False)[0]


def test_the_settings_are_those_of_inference(open_page):
    page = open_page()
    page.set(max_length="20")
    assert page.ask("hello") == answer_of(MODELS["first"], CHARACTERS, "hello", max_length=20)[0]
    page.tab.click("#new")
    page.set(max_length="", stop_text=said("first", "hello")[3:6])
    assert page.ask("hello") == said("first", "hello")[:3]
    page.set(stop_text="", temperature="1.5", seed="7")
    sampled = {page.ask_anew("hello") for _ in range(3)}
    assert len(sampled) == 1 and said("first", "hello") not in sampled
    page.press("again")  # the next seed, as --num_samples takes it
    page.wait()
    assert page.answers()[0] not in sampled
    page.set(max_length="3").start("hello")
    page.wait()
    assert "maximum length 3 counts too" in page.notice and page.tab.input_value("#question") == "hello"


def test_what_was_not_read_is_said(open_page):
    page = open_page()
    answers = [page.ask(question * 30) for question in "ab"]
    assert page.below()[0] == "The window is full: the oldest turn was not read."
    assert answers[1] == said("first", "b" * 30, as_messages("a" * 30, answers[0]))
    page.ask_anew("¿qué?")
    assert "not in the vocabulary" in page.below()[0]


def test_answers_stream_stop_and_are_kept(open_page):
    page = open_page("endless")
    page.start("hello")
    page.tab.wait_for_selector(".token:nth-child(20)")
    assert page.tab.locator("#stop").is_visible()
    page.tab.click("#stop")
    page.wait()
    text = page.answers()[0]
    assert page.below()[0] == "Stopped." and 20 <= len(text) < 1900
    page.start("and?")
    page.tab.wait_for_selector(".turn:nth-child(2) .token", state="attached")  # a line end has no width
    page.tab.reload()  # while an answer is given
    page.tab.wait_for_selector("#models:not([hidden])")
    page.tab.click("#history-button")
    page.tab.click("#kept .title")
    assert page.answers()[0] == text and len(page.answers()[1]) > 0
    assert page.tab.locator(".token").count() > 20  # with its probabilities


def test_an_edited_question_goes_on_from_there_and_nothing_is_lost(open_page):
    page = open_page()
    first, second = page.ask("hello"), page.ask("what?")
    page.press("edit", 0)
    page.tab.fill(".edit textarea", "AB 1")
    page.tab.press(".edit textarea", "Enter")
    page.wait()
    assert page.answers() == [said("first", "AB 1")]
    assert page.ask("what?") == said("first", "what?", as_messages("AB 1", said("first", "AB 1")))
    page.press("previous", 0)
    assert page.answers() == [first, second]
    assert page.tab.locator(".question").all_text_contents() == ["hello", "what?"]
    page.press("edit", 0)
    page.tab.press(".edit textarea", "Escape")
    assert page.answers() == [first, second]


def test_another_answer_stands_beside_the_first(open_page):
    page = open_page()
    page.ask("hello")
    page.tab.select_option("#model", "second")
    page.press("again")
    page.wait()
    assert page.answers() == [said("second", "hello")] and "2 / 2" in page.tab.locator(".pager").text_content()
    page.press("previous")
    assert page.answers() == [said("first", "hello")]
    assert page.tab.evaluate("document.activeElement.matches('.pager button')")  # keys can go on
    history = as_messages("hello", said("first", "hello"))
    assert page.ask("what?") == said("second", "what?", history)


def test_another_answer_branches_from_a_token(open_page):
    page, model = open_page(), MODELS["first"]
    page.ask("hello")
    ids = CHARACTERS.encode_chat(as_messages("hello"))[0].tolist()
    drawn = answer_of(model, CHARACTERS, "hello")[1]
    logits = model(torch.tensor([ids + drawn]))[0][0, len(ids) - 1 :]
    ranks = logits.topk(10).indices
    page.tab.select_option("#model", "second")  # the answer is the first one's, and goes on as that
    page.hold(4)
    assert page.others()[0][0] == CHARACTERS.decode([drawn[4]]).replace(" ", "␣")
    assert abs(page.others()[0][1] - logits.softmax(-1)[4].max().item()) < 1e-4
    page.tab.locator("#candidates button").nth(1).click()
    page.wait()
    assert page.answers() == [answer_from(model, CHARACTERS, "hello", [*drawn[:4], ranks[4, 1].item()])]
    assert "2 / 2" in page.tab.locator(".pager").text_content()
    page.press("previous")
    place = next(i for i, row in enumerate(ranks.tolist()) if EOS in row)
    page.hold(place)
    page.tab.locator("#candidates button", has_text="<|eos|>").click()  # the answer ends there
    page.wait()
    assert page.answers() == [CHARACTERS.decode(drawn[:place])]


def test_an_answer_branches_inside_of_a_character(open_page):
    page = open_page("emoji")
    assert page.ask("say") == "a🦊桃" and page.tab.locator(".token").count() == len(EMOJI) == 8
    page.hold(2)  # the second byte of the fox
    page.tab.locator("#candidates .is-drawn button").click()
    page.wait()
    assert page.answers() == ["a🦊桃"] and "2 / 2" in page.tab.locator(".pager").text_content()


def test_two_models_answer_side_by_side(open_page):
    page = open_page("first", "second")
    page.start("hello")
    page.wait()
    assert page.answers() == [said("first", "hello"), said("second", "hello")]
    assert page.tab.locator(".by").all_text_contents() == ["first", "second"]
    left, right = (page.tab.locator(".reply").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    page.press("choose", 1)
    page.tab.select_option("#second", "")
    history = as_messages("hello", said("second", "hello"))
    assert page.ask("what?") == said("first", "what?", history)
    page.tab.click("#new")
    page.tab.select_option("#second", "first")
    page.set(temperature="1.5").start("hello")
    page.wait()
    one, other = page.answers()
    assert one == other != said("first", "hello")  # the same seed


# ---------------------------------------------------------------------------------------------------- what is kept


def test_good_and_bad_answers_become_training_data(open_page, call, work):
    page = open_page()
    questions = [f"hello {letter}" for letter in "abcd"]
    for question in questions:
        page.tab.click("#new")
        page.tab.select_option("#model", "first")
        page.ask(question)
        page.press("bad")
        page.tab.select_option("#model", "second")
        page.press("again")
        page.wait()
        page.press("good")
    page.ask("and?")  # not rated
    bad, good = ([said(name, question) for question in questions] for name in ("first", "second"))
    path, pairs = page.exported("dpo")
    expected = [
        {"prompt": as_messages(q), "chosen": g, "rejected": b} for q, g, b in zip(questions, good, bad, strict=True)
    ]
    assert sorted(map(str, pairs)) == sorted(map(str, expected))
    (work / "pairs.jsonl").write_bytes(path.read_bytes())
    path, lines = page.exported("good")
    assert {line["messages"][-1]["content"] for line in lines} == set(good) and len(lines) == len(questions)
    (work / "good.jsonl").write_bytes(path.read_bytes())
    page.press("previous", 0)  # the bad answer is shown
    path, lines = page.exported("sft")
    weights = [message.get("weight") for line in lines for message in line["messages"]]
    assert len(lines) == len(questions) - 1 and 0 not in weights  # a line with a bad answer alone teaches nothing
    page.press("next", 0)
    page.press("bad", 0)
    _, lines = page.exported("sft")
    assert [m.get("weight") for m in lines[0]["messages"]] == [None, 0, None, None]

    result = call("data.py", "good.jsonl", "pairs.jsonl", "--val_fraction", "0.4", "--block_size", "300")
    assert result.status == 0, result.err
    for stage, n_answers in (("sft", len(questions)), ("dpo", 2 * len(questions))):
        files = [TokenFile(f"dataset/{stage}_{split}.bin") for split in ("train", "val")]
        tokenizer = load_tokenizer("dataset/tokenizer.json")
        prepared = "".join(tokenizer.decode(file.tokens) for file in files)
        assert prepared.count("<|eos|>") == n_answers
        for question, answers in zip(questions, zip(good, bad, strict=True), strict=True):
            for answer in answers[: 1 + (stage == "dpo")]:
                assert f"<|InstructMark|>{question}<|ResponseMark|>{answer}<|eos|>" in prepared


def test_a_full_storage_gives_up_probabilities_but_no_words(open_page):
    page = open_page()
    answer = page.ask("hello")
    page.tab.evaluate("localStorage.setItem('other', 'x'.repeat(5 * 2 ** 20 - 40_000))")
    for question in ("what?", "AB 1", "abc"):
        page.ask_anew(question)
    kept = page.tab.evaluate(
        "Object.entries(localStorage).filter(([key]) => key.startsWith('nano')).sort().map(([, v]) => v)"
    )
    trees = [json.loads(text)["root"]["children"][0]["children"][0] for text in kept]
    assert [tree["content"] for tree in trees] == [answer, *(said("first", q) for q in ("what?", "AB 1", "abc"))]
    assert not trees[0]["tokens"] and trees[-1]["tokens"]
    fill = "for (let size = 2 ** 20; size >= 1; size /= 2)"
    fill += " try { for (;;) localStorage.setItem(Math.random(), 'x'.repeat(size)); } catch {}"
    for _ in range(8):  # until there are no probabilities left to give up
        page.tab.evaluate(f"() => {{ {fill} }}")
        page.tab.click("#new")
        page.start("hello")
        page.wait()
        if page.notice:
            break
    assert "storage is full" in page.notice


def test_conversations_are_opened_and_deleted(open_page):
    page = open_page()
    page.ask(MARKUP)
    answer = page.ask_anew("what?")
    page.tab.click("#history-button")
    assert page.tab.locator("#kept .title").all_text_contents() == ["what?", MARKUP]
    page.tab.locator("#kept .remove").nth(1).click()
    assert page.tab.locator("#kept .title").count() == 2  # asked again
    page.tab.locator("#kept .remove").nth(1).click()
    assert page.tab.locator("#kept .title").all_text_contents() == ["what?"]
    page.tab.locator("#history .close").click()
    page.tab.click("#new")
    page.tab.click("#history-button")
    page.tab.click("#kept .title")
    assert page.answers() == [answer]


# ------------------------------------------------------------------------------------------------------ look inside


def test_attention_and_experts_of_a_token(open_page):
    page, model = open_page("experts"), MODELS["experts"]
    page.ask("hello")
    ids = CHARACTERS.encode_chat(as_messages("hello"))[0].tolist()
    drawn = answer_of(model, CHARACTERS, "hello")[1]
    page.hold(5)
    page.tab.click("#look-inside")
    page.tab.wait_for_selector("#inside[open]")
    read = ids + drawn[:5]  # what the token was chosen after
    routed = []
    for layer in mixture_layers(model):
        layer.router.register_forward_hook(lambda *args: routed.append(args[2][-1].softmax(-1)))
    maps = attention_maps(model, torch.tensor([read]))[:, 0, :, -1]  # (n_layer, n_head, T)
    for layer, head in ((1, 2), (0, 0), (1, None)):
        page.tab.select_option("#layer", index=layer)
        page.tab.select_option("#head", index=0 if head is None else 1 + head)
        weights = maps[layer].mean(0) if head is None else maps[layer, head]
        shown = page.tab.locator("#attended span:not(.next)").evaluate_all("all => all.map((span) => span.title)")
        assert len(shown) == len(read)
        for title, token, weight in zip(shown, read, weights.tolist(), strict=True):
            name, share = title.rsplit(" ", 1) if "<" not in title.rsplit(" ", 1)[-1] else title.split(" ", 1)
            assert name.removesuffix(" <") == CHARACTERS.decode([token]).replace(" ", "␣").replace("\n", "⏎")
            assert abs(probability(share) - weight) < 1e-4 + 5e-5
    rows = page.tab.locator("#experts li").all_text_contents()
    for row, probabilities in zip(rows, routed, strict=True):
        top = probabilities.topk(2)
        gates = (top.values / top.values.sum()).tolist()
        expected = [f"{expert} ({100 * gate:.2f}%)" for expert, gate in zip(top.indices.tolist(), gates, strict=True)]
        assert row == ", ".join(expected)
    assert page.tab.locator("#most-attended li").count() == 5


def test_tokens_can_be_branched_by_keys(open_page):
    page = open_page()
    page.ask("hello")
    while not page.tab.evaluate("document.activeElement.matches('.answer')"):
        page.tab.keyboard.press("Shift+Tab")
    for key in ("Home", "ArrowRight", "Enter"):
        page.tab.keyboard.press(key)
    assert page.tab.evaluate("document.activeElement.closest('#candidates') !== null")
    page.tab.keyboard.press("Escape")
    assert page.tab.evaluate("document.activeElement.matches('.answer')") and page.tab.locator("#others").is_hidden()
    for key in ("ArrowRight", "ArrowRight", "Enter", "Tab", "Enter"):
        page.tab.keyboard.press(key)
    page.wait()
    assert "2 / 2" in page.tab.locator(".pager").text_content()


# ---------------------------------------------------------------------------------------------------------- training


def test_trainings_are_followed_and_compared(open_page, folder):
    for log in folder.glob("*.log"):
        log.touch()  # else it has ended
    page = open_page()
    page.tab.click("#training-link")
    curves = "document.querySelector('#curves')"
    is_drawn = f"!{curves}.hidden && {curves}.complete && {curves}.naturalWidth > 300"
    row = page.tab.locator("#runs tbody tr")
    row.nth(2).wait_for()
    until(page, is_drawn)
    newest = [row.nth(i).locator("td").all_text_contents() for i in range(3)]
    stages = [cells[1].split()[0] for cells in newest]
    assert set(stages) == {"pretrain", "sft", "dpo"}
    assert newest[0][2:5] == ["5 / 1,000", "0.9000", f"0.9000 {stages[0]}.pt"]
    assert newest[0][5] == "1 h 40 min left"  # 995 steps of 6 s
    before = page.tab.locator("#curves").get_attribute("src")
    name = row.nth(0).get_attribute("data-name")
    with open(folder / name, "a") as log:
        log.write(log_lines("", 5, first=6))
    until(page, f"{is_drawn} && {curves}.src !== {json.dumps(before)}")
    assert "10 / 1,000" in row.filter(has_text=stages[0]).text_content()
    boxes = page.tab.locator("#runs input")
    boxes.nth(1).check()
    boxes.nth(2).check()  # the third takes the place of the first
    assert [boxes.nth(i).is_checked() for i in range(3)] == [False, True, True]
    names = [row.nth(i).get_attribute("data-name") for i in (1, 2)]
    until(page, f"{curves}.alt.endsWith({json.dumps(', '.join(names))})")
    page.tab.go_back()
    assert page.tab.locator("#question").is_visible() and page.tab.locator("#training").is_hidden()


# ------------------------------------------------------------------------------------------------ what a page must not


def test_markup_stays_text_wherever_it_stands(open_page):
    page = open_page("parrot")
    assert page.ask(MARKUP) == MARKUP
    page.hold(0)
    page.tab.click("#look-inside")
    page.tab.wait_for_selector("#inside[open]")
    page.tab.locator("#inside .close").click()
    page.tab.click("#history-button")
    assert page.tab.locator("#kept .title").text_content() == MARKUP
    assert page.tab.locator("script").count() == 1


def test_nothing_is_asked_of_others_and_the_policy_holds(open_page, address):
    page = open_page()
    page.ask("hello")
    page.tab.click("#training-link")
    page.tab.wait_for_selector("#curves:not([hidden])")
    assert all(url.startswith((address, f"blob:{address}", "data:")) for url in page.requests)
    policy = page.tab.evaluate("fetch('/').then((response) => response.headers.get('content-security-policy'))")
    assert "script-src 'self'" in policy and "style-src 'self'" in policy and "unsafe" not in policy
    html = (ROOT / "page" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script>|https?:", html)
    for file in (ROOT / "page").glob("*.js"):
        assert not re.search(
            r"innerHTML|insertAdjacent|outerHTML|document\.write|\beval\b|https?:", file.read_text("utf-8")
        )


def test_the_key_is_asked_for_once(browser, address):
    page = Served(browser, address, key="")
    for key in ("wrong", KEY):
        page.tab.fill("#key", key)
        page.tab.press("#key", "Enter")
    page.tab.wait_for_selector("#models:not([hidden])")
    page.set(temperature="0")
    assert page.ask("hello") == said("first", "hello")
    page.tab.reload()
    page.tab.wait_for_selector("#models:not([hidden])")
    assert page.tab.locator("#key-dialog").is_hidden()
    assert KEY not in page.tab.evaluate("JSON.stringify(localStorage)")
    assert all("401" in trouble for trouble in page.troubles)
    page.context.close()


def test_what_fails_is_said_and_the_question_stays(open_page):
    page = open_page()
    page.tab.route("**/v1/chat/completions", lambda route: route.abort())
    page.start("hello")
    page.wait()
    assert page.notice == "No answer: the server cannot be reached" and page.tab.input_value("#question") == "hello"
    assert page.tab.locator(".turn").count() == 0
    page.tab.unroute("**/v1/chat/completions")
    page.start("a" * 200)
    page.wait()
    assert "202 tokens, the model's window 64" in page.notice
    assert page.ask("hello") == said("first", "hello")
    assert all("ERR_FAILED" in trouble for trouble in page.troubles)
    page.troubles.clear()


# --------------------------------------------------------------------------------------------------- whoever reads it


def test_a_phone_in_chinese_and_dark(open_page, folder):
    phone = {"viewport": {"width": 390, "height": 800}, "has_touch": True}
    page = open_page("first", "experts", locale="zh-CN", color_scheme="dark", **phone)

    def fits() -> bool:
        wide = "e => [...document.querySelectorAll('dialog[open], body')].every((e) => e.scrollWidth <= 390)"
        return page.tab.locator("html").evaluate("e => e.scrollWidth") <= 390 and page.tab.locator("html").evaluate(
            wide
        )

    assert page.tab.locator("html").get_attribute("lang") == "zh-Hans" and fits()
    page.start("你好 " * 8)
    page.wait()
    top, bottom = (page.tab.locator(".reply").nth(i).bounding_box() for i in (0, 1))
    assert bottom["y"] >= top["y"] + top["height"] and fits()  # one below the other
    page.tab.locator(".token").nth(2).tap()
    page.tab.locator("#look-inside").tap()
    page.tab.wait_for_selector("#inside[open]")
    assert "注意力" in page.tab.locator("#inside h2").text_content() and fits()
    page.tab.locator("#inside .close").tap()
    for dialog in ("history", "settings"):
        page.tab.locator(f"#{dialog}-button").tap()
        assert page.tab.locator(f"#{dialog}[open]").is_visible() and fits()
        page.tab.locator(f"#{dialog} .close").tap()
    next(folder.glob("*.log")).touch()
    page.tab.locator("#training-link").tap()
    page.tab.locator("#runs tbody tr").first.wait_for()
    assert fits() and "剩" in page.tab.locator("#runs").text_content()


def test_every_word_is_there_in_both_languages_and_everything_has_a_name(open_page):
    source = (ROOT / "page" / "served_words.js").read_text(encoding="utf-8")
    english, chinese = source.split("  zh: {")
    keys = [re.findall(r'^    "?([\w-]+)"?:', words, re.MULTILINE) for words in (english, chinese)]
    assert keys[0] == keys[1]
    page = open_page("first", "experts")
    page.start("hello")
    page.wait()
    page.press("again")
    page.wait()
    for opener in ("settings-button", "history-button"):
        page.tab.click(f"#{opener}")
        unnamed = page.tab.locator("button, input, textarea, select, a, summary").evaluate_all(
            "all => all.filter((e) => e.checkVisibility() && "
            "!(e.ariaLabel || e.labels?.length || e.textContent.trim()))"
            ".map((e) => e.outerHTML)"
        )
        assert unnamed == []
        page.tab.keyboard.press("Escape")
    assert "undefined" not in page.tab.locator("body").text_content()
    page.tab.click("#language")
    assert "undefined" not in page.tab.locator("body").text_content()
