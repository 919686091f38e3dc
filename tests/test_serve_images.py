"""Images for serve.py, asked by the real `openai` client, and by whoever means harm."""

import asyncio
import base64
import itertools
import socket
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from servers import TOKENIZER, make_checkpoint, serving
from test_images import contents, gradient, header_of, with_scans
from test_scheduler import Asked, make_batch, question, run

from model import ATTENTION
from serving import http
from serving.rows import PIECE
from serving.scheduler import Refused
from serving.text_generator import GenerationConfig, load_text_generator
from vision.images import read_image

openai = pytest.importorskip("openai")
SEES = {"image_size": 8, "patch_size": 4, "n_vision_layer": 1}
NO_END = {str(TOKENIZER.eos): -100}  # an answer of full length
CHAT = "/v1/chat/completions"


def pixels(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, size, size), dtype=np.uint8)


def as_url(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def part(file: bytes, kind: str = "png") -> dict:
    return {"type": "image_url", "image_url": {"url": as_url(file, kind)}}


def about(file: bytes, text: str = "hello", kind: str = "png") -> list[dict]:
    """A question about an image, in OpenAI's form."""
    return [{"role": "user", "content": [{"type": "text", "text": text}, part(file, kind)]}]


PICTURES = [contents(Image.fromarray(pixels(i, 12).transpose(1, 2, 0))) for i in range(6)]  # made smaller, to 8 x 8


# ------------------------------------------------------------------------------------------------------ the scheduler

SHAPES = {
    "full": {},
    "large": {"image_size": 40},  # 100 patches: more than a piece of a prompt
    "windows": {"attention_window": [11, 0], "n_kv_head": 2},
    "experts": {"n_expert": 4},
    **{kind: {"attention": [kind, "full"]} for kind in ATTENTION if kind != "full"},
}


def seeing_prompt(batch, i: int) -> tuple[list[int], np.ndarray | None]:
    """Token ids of a question, of every third without an image, and the image."""
    config = batch.model.config
    if i % 3 == 2:
        return question(i), None
    places = [config.vocab_size] * config.n_patches
    return [4, *places, *question(i, 3 + i * 7 % 90)], pixels(i, config.image_size)


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_alone_among_others_and_of_generate_are_the_same(shape):
    """To the last bit; model.generate() knows no rows, no pieces and no other answers."""
    shape = {**SEES, **SHAPES[shape]}
    sampling = [{"temperature": i % 2, "seed": i, "repetition_penalty": (1.0, 1.4)[i % 4 > 1]} for i in range(12)]
    settings = [{"sampling": values, "n_logprobs": 2} for values in sampling]
    together, alone = make_batch(**shape), make_batch(**shape)
    prompts = [seeing_prompt(together, i) for i in range(12)]
    asked = [
        Asked(together, ids, 6, image=image, **options) for (ids, image), options in zip(prompts, settings, strict=True)
    ]
    run(together)
    for (ids, image), options, among in zip(prompts, settings, asked, strict=True):
        single = Asked(alone, ids, 6, image=image, **options)
        run(alone)
        assert single.ids == among.ids and single.end == among.end
        assert [(t.logprob, t.top) for t in single.tokens] == [(t.logprob, t.top) for t in among.tokens]
        images = None if image is None else torch.from_numpy(image)[None]
        steps = together.model.generate(
            torch.tensor([ids]), 6, images=images, stop_tokens=TOKENIZER.stop_tokens, **options["sampling"]
        )
        expected = [step.item() for step in steps]
        assert among.ids == [token for token in expected if token not in TOKENIZER.stop_tokens]


@pytest.mark.parametrize("size", [8, 32, 40])
def test_a_beginning_is_shared_by_prompts_about_the_same_image_alone(size):
    """4, 64 or 100 patches: the first piece ends behind the image, or in it, and then is read on to a later end."""
    make = lambda: make_batch(n_rows=2, image_size=size, patch_size=4)  # noqa: E731
    batch, beginning = make(), [4, *[TOKENIZER.vocab_size] * (size // 4) ** 2]
    long, short = [*beginning, *question(1, 2 * PIECE)], [*beginning, *question(1, 2 * PIECE)[:11]]
    shared = (len(long) - 1) // PIECE * PIECE
    expected = {"first": 0, "other image": 0, "again": shared, "shorter": 0}
    asked = {"first": (long, 1), "other image": (long, 2), "again": (long, 1), "shorter": (short, 1)}
    for name, (ids, seed) in asked.items():
        one = Asked(batch, ids, image=pixels(seed, size), n_logprobs=1)
        run(batch)
        alone = Asked(fresh := make(), ids, image=pixels(seed, size), n_logprobs=1)
        run(fresh)
        assert one.generation.n_reused == expected[name], name
        assert one.tokens and one.tokens == alone.tokens, name


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_rounded_models_see(weights):
    batch, (ids, image) = make_batch(weights=weights, **SEES), ([4, *[TOKENIZER.vocab_size] * 4, 9, 5], pixels(1))
    asked = [Asked(batch, ids, image=shown, n_logprobs=1) for shown in (image, pixels(2))]
    run(batch)
    assert all(one.end in ("length", "stop") for one in asked) and asked[0].tokens != asked[1].tokens


# ---------------------------------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sees")
    make_checkpoint(folder / "vision.pt", "vision", **SEES)
    make_checkpoint(folder / "sft.pt")
    for i, file in enumerate(PICTURES):
        (folder / f"{i}.png").write_bytes(file)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "-m", "vision.pt", "-m", "sft.pt") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def local(folder):
    """The same model in this process, without a server."""
    return load_text_generator(str(folder / "vision.pt"), "cpu", instruct=True)


def ask(client, messages, **options):
    options = {"model": "vision", "temperature": 0, "logit_bias": NO_END, "max_tokens": 20, **options}
    return client.chat.completions.create(messages=messages, **options)


def text_of(reply) -> str:
    return reply.choices[0].message.content


def test_models_say_whether_they_see(client):
    listed = {model.id: model.nano for model in client.models.list()}
    assert (listed["vision"]["image_size"], listed["sft"]["image_size"]) == (8, 0)
    assert listed["sft"]["max_image_bytes"] == 0
    fits = about(bytes(listed["vision"]["max_image_bytes"]))
    with pytest.raises(openai.BadRequestError, match="not a png or jpeg"):  # it was looked at
        ask(client, fits, max_tokens=1)


def test_answers_are_those_of_inference(client, folder, call):
    """Greedy ones and drawn ones, for png and jpeg; and that the images make the difference."""
    photo = contents(Image.fromarray(gradient(40, 30)), "JPEG")
    (folder / "photo.jpg").write_bytes(photo)
    files = ("0.png", PICTURES[0], "png"), ("1.png", PICTURES[1], "PNG"), ("photo.jpg", photo, "jpeg")
    answers = set()
    for name, file, kind in files:
        for options in ({"temperature": 0}, {"temperature": 0.9, "seed": 7}):
            settings = [text for option, value in options.items() for text in (f"--{option}", value)]
            where = ["-m", folder / "vision.pt", "--image", folder / name]
            printed = call("inference.py", "-i", *where, "-p", "what is it?", *settings)
            assert printed.status == 0, printed.err
            reply = ask(client, about(file, "what is it?", kind), logit_bias={}, max_tokens=None, **options)
            assert f"{text_of(reply)}\n" == printed.out
            answers.add(printed.out)
    assert len(answers) >= 4
    assert reply.usage.prompt_tokens == 4 + len("what is it?") + 2


def test_follow_up_questions_see_the_image(client, local):
    config = GenerationConfig(temperature=0.0)
    history = [{"role": "user", "content": "hi", "image": read_image(PICTURES[2], 8)}]
    history.append({"role": "assistant", "content": "".join(local.answer("hi", config, image=history[0]["image"]))[:9]})
    expected = "".join(local.answer("why?", config, history))
    messages = [*about(PICTURES[2], "hi"), history[1], {"role": "user", "content": "why?"}]
    others = [*about(PICTURES[3], "hi"), *messages[1:]], [{"role": "user", "content": "hi"}, *messages[1:]]
    options = {"logit_bias": {}, "max_tokens": None, "logprobs": True}
    replies = [ask(client, asked, **options) for asked in (messages, *others)]
    assert text_of(replies[0]) == expected
    assert len({reply.choices[0].logprobs.content[0].logprob for reply in replies}) == 3


def test_an_image_leaves_with_its_question_when_the_window_is_full(client, server):
    turns = [{"role": ("assistant", "user")[i % 2], "content": "a" * 30} for i in range(4)]
    answers = [text_of(ask(client, [*about(file), *turns])) for file in PICTURES[:2]]
    assert answers[0] == answers[1] == text_of(ask(client, turns[1:]))
    body = {"model": "vision", "add_generation_prompt": True}
    assert "image" not in server.post("/tokenize", messages=[*about(PICTURES[0]), *turns], **body).json


def test_streams_stop_texts_log_probabilities_and_several_answers(client):
    messages = about(PICTURES[0])
    whole = ask(client, messages, logprobs=True, top_logprobs=3)
    chunks = list(ask(client, messages, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(whole)
    assert len(whole.choices[0].logprobs.content) == 20
    stop = text_of(whole)[5:7]
    ended = text_of(whole)[: text_of(whole).index(stop)]
    assert text_of(ask(client, messages, stop=stop)) == ended
    drawn = ask(client, messages, temperature=1, seed=3, n=2).choices
    alone = [text_of(ask(client, messages, temperature=1, seed=seed)) for seed in (3, 4)]
    assert [choice.message.content for choice in drawn] == alone
    assert text_of(ask(client, messages, extra_body={"repetition_penalty": 1.5})) != text_of(whole)


def test_where_an_image_stands_in_its_question_makes_no_difference(client):
    text = {"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}
    mixed = [{"role": "user", "content": [text[0], part(PICTURES[0]), text[1]]}]
    assert text_of(ask(client, mixed)) == text_of(ask(client, about(PICTURES[0])))


def test_conversations_with_and_without_images_get_together_what_each_gets_alone(client):
    """To the last bit; the same long text about several images, too: of one no other begins with what was read."""
    asked = [about(file, text) for file in PICTURES[:4] for text in ("hello", "who are you? " * 6)]
    asked += [[{"role": "user", "content": text}] for text in ("hello", "no, " * 18, "bye", "yes, " * 15)]

    def answer(messages) -> list[tuple[str, float]]:
        choice = ask(client, messages, logprobs=True).choices[0]
        return [(entry.token, entry.logprob) for entry in choice.logprobs.content]

    alone = [answer(messages) for messages in asked]
    assert all(one != other for one, other in itertools.combinations(alone, 2))
    together, threads = {}, []
    for i, messages in enumerate(asked):
        give = lambda i=i, messages=messages: together.update({i: answer(messages)})  # noqa: E731
        threads.append(threading.Thread(target=give))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(asked))] == alone


def test_a_beginning_about_the_same_image_alone_is_used_again(client, local):
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "tell me " * 8}]  # more than a piece
    config = GenerationConfig(temperature=0.0, max_length=100)
    for file, is_reused in ((PICTURES[4], False), (PICTURES[5], False), (PICTURES[4], True)):
        history = [{"role": "user", "content": "b", "image": read_image(file, 8)}, turns[0]]
        n_tokens = len(local.prompt_ids(turns[1]["content"], history, room=0))
        reply = ask(client, [*about(file, "b"), *turns], logit_bias={}, max_tokens=100 - n_tokens)
        assert text_of(reply) == "".join(local.answer(turns[1]["content"], config, history, room=0))
        assert (reply.usage.prompt_tokens_details.cached_tokens > 0) is is_reused


def test_tokenize_shows_what_the_model_reads(server, local):
    for file in (PICTURES[0], contents(Image.fromarray(gradient(40, 30)), "JPEG")):
        read = server.post("/tokenize", messages=about(file), add_generation_prompt=True).json
        assert read["tokens"] == local.prompt_ids("hello", image=read_image(file, 8))
        assert read["pieces"] == ["<|InstructMark|>", *"hello", *[""] * 4, "<|ResponseMark|>"]
        shown = base64.b64decode(read["image"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(read_image(shown, 8), read_image(file, 8))  # so it can be sent in its place


# ---------------------------------------------------------------------------------------------------- what is refused

ADDRESS = "http://127.0.0.1:1/cat.png"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
FRAMES = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in (0, 200)]


def url(value) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": value}}]}]


REFUSED = {
    "an address": (url(ADDRESS), "nothing is fetched"),
    "an address in capitals": (url("HTTPS://example.com/cat.png"), "nothing is fetched"),
    "a file": (url("file:///etc/passwd"), "nothing is fetched"),
    "no url": (url(None), "nothing is fetched"),
    "a number": (url(5), "nothing is fetched"),
    "a path": (url("0.png"), "nothing is fetched"),
    "bare base64": (url(as_url(PICTURES[0]).partition(",")[2]), "nothing is fetched"),
    "an svg": (about(SVG, kind="svg+xml"), "nothing is fetched"),
    "an svg that is said to be a png": (about(SVG), "not a png or jpeg"),
    "a gif": (about(contents(FRAMES[0], "GIF")), "not a png or jpeg"),
    "an animation": (about(contents(FRAMES[0], save_all=True, append_images=FRAMES[1:])), "animated, 2 pictures"),
    "a bomb": (about(header_of(60_000, 60_000)), "pixels; at most"),
    "a larger bomb": (about(header_of(2**31 - 1, 2**31 - 1)), "pixels"),
    "a jpeg of endless scans": (about(with_scans(10_000), kind="jpeg"), "more than 64 scans"),
    "half of a png": (about(contents(Image.fromarray(gradient(40, 40)))[:200]), "damaged"),
    "half of a jpeg": (about(contents(Image.fromarray(gradient(40, 40)), "JPEG")[:400], kind="jpeg"), "damaged"),
    "nothing": (about(b""), "not a png or jpeg"),
    "zeros": (about(bytes(100_000)), "not a png or jpeg"),
    "base64 that is cut": (url(as_url(PICTURES[0])[:-3]), "base64 is damaged"),
    "base64 with a sign": (url(as_url(PICTURES[0]) + "!"), "base64 is damaged"),
    "base64 with a letter of Chinese": (url(as_url(PICTURES[0]) + "图"), "base64 is damaged"),
    "two images": ([{"role": "user", "content": [part(PICTURES[0]), part(PICTURES[1])]}], "one image at most"),
    "a later image": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *about(PICTURES[0])],
        "in its first question",
    ),
    "an image of a system message": ([{**about(PICTURES[0])[0], "role": "system"}, *about(b"")], "first question"),
    "an image of an answer": ([{**about(PICTURES[0])[0], "role": "assistant"}, *about(b"")], "first question"),
    "sound": ([{"role": "user", "content": [{"type": "input_audio"}]}], "text and image_url"),
    "an image that fills the window": (about(PICTURES[0], "a" * 123), "window 128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_plainly(client, server, folder, case):
    messages, words = REFUSED[case]
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        ask(client, messages, max_tokens=1)
    error = refused.value
    assert error.param.startswith("messages") and error.type == "invalid_request_error"
    assert len(error.message) < 300 and "Traceback" not in error.message and str(folder) not in error.message
    if case != "an image that fills the window":
        reply = server.post("/tokenize", model="vision", messages=messages)
        assert reply.status == 400 and words in reply.json["error"]["message"]
    stream = server.post(CHAT, model="vision", messages=messages, stream=True)
    assert stream.status == 400 and words in stream.json["error"]["message"]


def test_base64_may_be_in_lines(client):
    """As base64 and openssl write it."""
    in_lines = f"data:image/png;base64,{base64.encodebytes(PICTURES[0]).decode()}"
    assert in_lines.count("\n") > 2
    assert text_of(ask(client, url(in_lines))) == text_of(ask(client, about(PICTURES[0], "")))


def test_a_model_of_text_alone_says_so_by_its_name(client):
    with pytest.raises(openai.BadRequestError, match="the model sft reads text alone") as refused:
        ask(client, about(PICTURES[0]), model="sft")
    assert refused.value.param == "messages[0].content"


def test_nothing_is_fetched(client):
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.5)
        with pytest.raises(openai.BadRequestError):
            ask(client, url(f"http://127.0.0.1:{other.getsockname()[1]}/cat.png"))
        with pytest.raises(TimeoutError):
            other.accept()


def test_other_paths_have_no_place_for_images(server, local):
    parts = about(PICTURES[0])[0]["content"]
    for prompt in (parts, [parts], [local.model.config.vocab_size] * 4):
        reply = server.post("/v1/completions", model="vision", prompt=prompt, echo=True, logprobs=1)
        assert reply.status == 400 and reply.json["error"]["param"] == "prompt"
    ids = local.prompt_ids("hello", image=read_image(PICTURES[0], 8))
    reply = server.post("/inspect", model="vision", tokens=ids)
    assert reply.status == 400 and "those of an image" in reply.json["error"]["message"]
    assert server.post("/inspect", model="vision", tokens=local.prompt_ids("hello")).status == 200


def test_a_body_of_forty_megabytes_is_refused_and_the_next_is_answered(client):
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, about(bytes(30 << 20)))
    assert refused.value.status_code == 413 and "12,582,912 bytes" in refused.value.message
    assert text_of(ask(client, about(PICTURES[0])))


def test_more_images_than_a_few_wait_for_nothing(monkeypatch):
    """One is read, 8 wait, and the next is refused with what tells its client to try again; those answer in the end."""
    may_go = threading.Event()
    monkeypatch.setattr(http, "read_pixels", lambda *_: may_go.wait(20) and pixels(0))
    batch = make_batch(**SEES)
    server = http.Server({batch.name: batch}, None, None)
    read = lambda: http.read_conversation(server, batch, {"messages": about(PICTURES[0])})  # noqa: E731

    async def ask_ten():
        first = [asyncio.create_task(read()) for _ in range(9)]
        while server.n_images < 9:
            await asyncio.sleep(0.01)
        with pytest.raises(Refused) as refused:
            await asyncio.wait_for(read(), 5)
        first.pop().cancel()  # a client that leaves the queue
        await asyncio.sleep(0.05)
        first.append(asyncio.create_task(read()))
        await asyncio.sleep(0.05)
        may_go.set()
        return refused.value, await asyncio.gather(*first)

    error, answers = asyncio.run(ask_ten())
    response = asyncio.run(http.refuse(None, error))
    assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
    assert all(messages[0]["image"].shape == (3, 8, 8) for messages in answers) and not server.n_images


def test_large_and_damaged_images_disturb_nobody(client):
    large = contents(Image.new("L", (5700, 5700)), compress_level=1)  # takes a second to decode
    others = [about(PICTURES[0]), [{"role": "user", "content": "hello"}]]
    alone, refused = [text_of(ask(client, messages)) for messages in others], []

    def attack(file: bytes) -> None:
        try:
            ask(client, about(file), max_tokens=1)
        except openai.BadRequestError as error:
            refused.append(error)

    threads = [threading.Thread(target=attack, args=[file]) for file in (large, large[:-999], header_of(9**6, 9**6))]
    for thread in threads:
        thread.start()
    assert [text_of(ask(client, messages)) for messages in others] == alone
    for thread in threads:
        thread.join()
    assert len(refused) == 2
