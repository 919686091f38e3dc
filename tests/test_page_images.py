"""Images on the page of serve.py: chosen, dropped, pasted and taken away, in a real Chromium."""

import base64
import functools
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from servers import make_checkpoint, serving
from test_images import contents, gradient
from test_page import CHARACTERS, Served, as_messages, pages_of
from test_webpage import make_model

import convert
from serving.text_generator import GenerationConfig, TextGenerator
from vision.images import read_image

SEES = {"patch_size": 4, "block_size": 48}
MODELS = {
    "vision": make_model(CHARACTERS.vocab_size, image_size=8, **SEES),
    "larger": make_model(CHARACTERS.vocab_size, seed=1, image_size=16, **SEES),
    "text": make_model(CHARACTERS.vocab_size, seed=2),
}
PHOTO = contents(Image.fromarray(gradient(60, 40)), "JPEG")
PICTURE = contents(Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for name, model in MODELS.items():
        convert.write_checkpoint(f"{folder / name}.pt", model, CHARACTERS, "float32")
    make_checkpoint(folder / "pretrained.pt", "pretrain", CHARACTERS, image_size=8, **SEES)
    (folder / "photo.jpg").write_bytes(PHOTO)
    (folder / "picture.png").write_bytes(PICTURE)
    (folder / "half.png").write_bytes(PICTURE[:300])
    (folder / "large.png").write_bytes(bytes(800_000))
    (folder / "drawing.svg").write_text("<svg/>")
    return folder


@pytest.fixture(scope="module")
def address(browser, folder) -> Iterator[str]:
    pytest.importorskip("uvicorn")
    models = [argument for name in (*MODELS, "pretrained") for argument in ("-m", f"{name}.pt")]
    with serving(folder, *models, "--max_body", "1048576") as server:
        yield server.url


class Seeing(Served):
    """The page, and what a person does with images."""

    def choose(self, path: Path) -> None:
        with self.tab.expect_file_chooser() as chooser:
            self.tab.click("#attach")
        chooser.value.set_files(path)

    def transfer(self, kind: str, path: Path, type: str, target: str) -> None:
        """Drop a file on the page, or paste it."""
        values = [base64.b64encode(path.read_bytes()).decode(), path.name, type]
        script = """([data, name, type]) => {
            const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type }));
            return transfer;
        }"""
        transfer = self.tab.evaluate_handle(script, values)
        event = "dataTransfer" if kind != "paste" else "clipboardData"
        make = "(target, [kind, key, transfer]) => target.dispatchEvent(Object.defineProperty("
        make += "new Event(kind, { bubbles: true, cancelable: true }), key, { value: transfer }))"
        self.tab.locator(target).evaluate(make, [kind, event, transfer])

    def attached(self) -> np.ndarray:
        """What the preview shows, as pixels (3, S, S)."""
        url = self.tab.locator("#attached img").get_attribute("src")
        file = base64.b64decode(url.removeprefix("data:image/png;base64,"))
        return read_image(file, Image.open(io.BytesIO(file)).width)


@pytest.fixture
def open_page(browser, address):
    with pages_of(Seeing, browser, address, "vision") as opening:
        yield opening


@functools.cache
def said(model: str, question: str, file: bytes, *history: str) -> str:
    """What Python answers, greedily; the image is in the first question."""
    generator = TextGenerator(MODELS[model], CHARACTERS, torch.device("cpu"), True)
    image, messages = read_image(file, MODELS[model].config.image_size), as_messages(*history)
    if messages:
        messages[0]["image"] = image
    config = GenerationConfig(temperature=0.0)
    return "".join(generator.answer(question, config, messages, image=None if messages else image))


def test_a_chosen_image_is_shown_as_the_model_sees_it_and_asked_about(open_page, folder):
    page = open_page()
    page.choose(folder / "photo.jpg")
    page.tab.wait_for_selector("#attached img")
    assert np.array_equal(page.attached(), read_image(PHOTO, 8))
    first = page.ask("hello")
    assert first == said("vision", "hello", PHOTO) != said("vision", "hello", PICTURE)
    assert page.tab.locator("#attached").is_hidden() and page.tab.locator(".turn > img").count() == 1
    assert page.ask("what?") == said("vision", "what?", PHOTO, "hello", first)
    page.press("again", 0)
    page.wait()
    assert page.answers()[0] == first
    page.press("edit", 0)
    page.tab.fill(".edit textarea", "AB 1")
    page.tab.press(".edit textarea", "Enter")
    page.wait()
    assert page.answers() == [said("vision", "AB 1", PHOTO)]
    letters = page.tab.locator(".answer .token", has_text=re.compile("[a-z]"))  # a line end could not be pressed
    letters.first.click()
    assert page.tab.locator("#look-inside").is_hidden()
    page.tab.locator("#candidates .is-drawn button").click()
    page.wait()
    assert page.answers() == [said("vision", "AB 1", PHOTO)] and page.tab.locator(".answer").count() == 1


def test_an_image_is_dropped_pasted_and_taken_away(open_page, folder):
    page = open_page()
    page.transfer("drop", folder / "picture.png", "image/png", "#welcome")
    page.tab.wait_for_selector("#attached img")
    assert page.ask("hello") == said("vision", "hello", PICTURE)
    page.transfer("paste", folder / "photo.jpg", "image/jpeg", "#question")  # begins another conversation
    page.tab.wait_for_selector("#attached img")
    assert page.tab.locator(".turn").count() == 0
    assert page.ask("hello") == said("vision", "hello", PHOTO)
    page.tab.click("#new")
    page.choose(folder / "picture.png")
    page.tab.wait_for_selector("#attached img")
    page.tab.click("#detach")
    assert page.tab.locator("#attached").is_hidden() and page.tab.locator("#attach").is_visible()
    answer = page.ask("hello")
    assert answer not in (said("vision", "hello", PHOTO), said("vision", "hello", PICTURE))
    assert page.tab.locator(".turn > img").count() == 0


def test_the_button_is_there_for_models_that_see_alone(open_page, folder):
    page = open_page("text")
    button = page.tab.locator("#attach")
    assert button.is_hidden()
    page.transfer("drop", folder / "picture.png", "image/png", "#welcome")
    assert page.notice == "text: reads text alone, and cannot see an image."
    page.tab.select_option("#model", "vision")
    assert button.is_visible() and "sees images of 8 × 8 pixels" in page.tab.locator("#figures").text_content()
    page.tab.select_option("#second", "text")
    assert button.is_hidden()
    page.tab.select_option("#second", "")
    page.set(mode="text")
    assert button.is_hidden()
    page.transfer("drop", folder / "picture.png", "image/png", "#welcome")
    assert "choose Conversation" in page.notice
    page.set(mode="chat")
    page.choose(folder / "picture.png")
    page.tab.wait_for_selector("#attached img")
    page.tab.select_option("#model", "text")
    page.start("hello")
    page.wait()
    assert "reads text alone" in page.notice and page.tab.input_value("#question") == "hello"
    page.tab.select_option("#model", "vision")
    assert page.ask("hello") == said("vision", "hello", PICTURE)  # both had come back to where they were


def test_models_with_different_eyes_see_the_same_file(open_page, folder):
    page = open_page("vision", "larger")
    page.choose(folder / "photo.jpg")
    page.tab.wait_for_selector("#attached img")
    page.start("hello")
    page.wait()
    assert page.answers() == [said(name, "hello", PHOTO) for name in ("vision", "larger")]


def test_the_image_is_shown_as_the_chosen_model_sees_it(open_page, folder):
    page = open_page("larger")
    page.choose(folder / "photo.jpg")
    page.tab.wait_for_selector("#attached img")
    assert np.array_equal(page.attached(), read_image(PHOTO, 16))
    page.tab.select_option("#model", "vision")
    assert np.array_equal(page.attached(), read_image(PHOTO, 8))
    page.tab.select_option("#model", "text")  # which will say that it sees none
    assert page.tab.locator("#attached img").is_visible()
    page.tab.select_option("#model", "larger")
    page.ask("hello")
    url = page.tab.locator(".turn > img").get_attribute("src")
    assert np.array_equal(read_image(base64.b64decode(url.partition(",")[2]), 16), read_image(PHOTO, 16))


def test_a_model_that_only_continues_texts_takes_the_image_away(open_page, folder):
    page = open_page()
    page.choose(folder / "photo.jpg")
    page.tab.wait_for_selector("#attached img")
    page.tab.select_option("#model", "pretrained")
    assert page.tab.locator("#attached").is_hidden() and page.tab.locator("#attach").is_hidden()
    page.tab.select_option("#model", "vision")
    assert page.tab.locator("#attached").is_hidden() and page.tab.locator("#attach").is_visible()


def test_what_cannot_be_used_is_said_and_nothing_is_lost(open_page, folder):
    page = open_page()
    page.tab.fill("#question", "hello")
    for name, words in (
        ("half.png", "The image cannot be used: the image: a damaged image"),
        ("drawing.svg", "This is no png or jpeg image."),
        ("large.png", "The image has 0.8 MB, and the server takes 0.8: make it smaller."),
    ):
        page.choose(folder / name)
        page.tab.wait_for_selector(f"#notice:has-text({json.dumps(words)})")
        assert page.tab.input_value("#question") == "hello" and page.tab.locator("#attached").is_hidden()
    assert all("400" in trouble for trouble in page.troubles)
    page.troubles.clear()


def test_a_conversation_about_an_image_is_kept_and_no_training_data(open_page, folder):
    page = open_page()
    page.choose(folder / "photo.jpg")
    page.tab.wait_for_selector("#attached img")
    first = page.ask("hello")
    page.press("good")
    page.tab.reload()
    page.tab.wait_for_selector("#models:not([hidden])")
    page.set(temperature="0")
    page.tab.click("#history-button")
    assert page.tab.locator("#export-sft").is_disabled() and page.tab.locator("#export-good").is_disabled()
    page.tab.click("#kept .title")
    assert page.answers() == [first] and page.tab.locator(".turn > img").count() == 1
    assert page.ask("what?") == said("vision", "what?", PHOTO, "hello", first)
    page.ask("a" * 30)
    assert "nor the image" in page.below()[0]
    kept = page.tab.evaluate("Object.values(localStorage).join('').length")
    assert kept < 60_000


def test_a_phone_in_chinese(open_page, folder):
    page = open_page(locale="zh-CN", viewport={"width": 390, "height": 800}, has_touch=True)
    assert page.tab.locator("#attach").text_content() == "就图片提问"
    page.choose(folder / "picture.png")
    page.tab.wait_for_selector("#attached img")
    assert page.tab.locator("#attached img").get_attribute("aria-label") == "模型看到的图片"
    assert page.tab.locator("html").evaluate("e => e.scrollWidth") <= 390
    page.transfer("drop", folder / "drawing.svg", "image/svg+xml", "#welcome")
    assert page.notice == "这不是 png 或 jpeg 图片。"
