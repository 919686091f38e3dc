"""serve.py as a real process, asked by the real `openai` client."""

import json
import math
import signal
import socket
import sys
import threading
import time
import xml.etree.ElementTree

import pytest
import torch
from conftest import write_jsonl
from servers import TOKENIZER, make_checkpoint, serving

import serving as serving_package
from layers.attention_maps import attention_maps
from serving.requests import token_pieces
from serving.text_generator import GenerationConfig, load_text_generator
from text.tokenizer import BPETokenizer
from training.config import TrainConfig
from weights import lora
from weights.checkpointing import load_checkpoint, load_model, save_checkpoint

openai = pytest.importorskip("openai")
BYTES = BPETokenizer.train(["abc"], 262)  # the bytes alone: a character of Chinese is three tokens
NO_END = {str(TOKENIZER.eos): -100}  # an answer of full length
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "checkpoint").mkdir()
    make_checkpoint(folder / "checkpoint" / "sft.pt")
    make_checkpoint(folder / "checkpoint" / "pretrain.pt", "pretrain", seed=1)
    make_checkpoint(folder / "checkpoint" / "experts.pt", seed=2, n_expert=4)
    make_checkpoint(folder / "checkpoint" / "bytes.pt", seed=4, tokenizer=BYTES)
    save_adapter(folder / "checkpoint" / "polite.pt", folder / "checkpoint" / "sft.pt")
    steps = [{"type": "train", "step": i, "loss": 3 / (i + 1), "lr": 1e-3, "ms_per_step": 100.0} for i in range(50)]
    header = {"type": "header", "stage": "sft", "train_config": {"stage": "sft", "max_steps": 100}}
    best = {"type": "val", "step": 49, "val_loss": 0.5, "best_val_loss": 0.25}
    write_jsonl(folder / "train_20260101_000000.log", [header, *steps, best])
    write_jsonl(folder / "secret.log", [header, *steps])
    return folder


def save_adapter(path, base):
    """An adapter that changes what the model says."""
    checkpoint = load_checkpoint(base)
    model = load_model(checkpoint, base)
    fingerprint = lora.fingerprint(model)
    settings = lora.settings_of(TrainConfig())
    torch.manual_seed(3)
    lora.attach(model, settings)
    for name, weight in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(weight, std=0.5)
    adapter = {"base": str(base), "fingerprint": fingerprint, "settings": settings}
    save_checkpoint(path, {**checkpoint, "model": lora.adapter_weights(model.state_dict()), "lora": adapter})


@pytest.fixture(scope="module")
def server(folder):
    models = ("-m", "sft", "-m", "pretrain", "-m", "checkpoint/experts.pt", "-m", "bytes")
    with serving(folder, *models, "--lora", "checkpoint/polite.pt", "--waiting", "8", "--rows", "4") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def local(folder):
    """The same model in this process, without a server."""
    return load_text_generator(str(folder / "checkpoint" / "sft.pt"), "cpu", instruct=True)


def ask(client, messages=HELLO, **options):
    return client.chat.completions.create(**{"model": "sft", "messages": messages, "temperature": 0, **options})


def test_models_are_listed_with_their_shape(client, server):
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["sft", "pretrain", "experts", "bytes", "polite"]
    nano = listed["sft"].nano
    assert (nano["block_size"], nano["n_layer"], nano["n_expert"], nano["weights"]) == (128, 2, 0, "float32")
    assert nano["vocab_size"] == TOKENIZER.vocab_size and nano["chat_template"] == "nano" and nano["instruct"]
    assert not listed["pretrain"].nano["instruct"] and listed["experts"].nano["n_expert"] == 4
    assert listed["polite"].nano["adapter"] == "polite"
    assert client.models.retrieve("pretrain").id == "pretrain"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("nothing")
    assert refused.value.code == "model_not_found"


def test_a_greedy_answer_is_that_of_inference(client, local):
    config = GenerationConfig(temperature=0.0, max_length=len(local.prompt_ids("hello")) + 20)
    reply = ask(client, max_tokens=20)
    (choice,) = reply.choices
    assert choice.message.content == "".join(local.answer("hello", config)) and choice.message.role == "assistant"
    assert reply.usage.prompt_tokens == 7 and reply.usage.total_tokens == 7 + reply.usage.completion_tokens
    assert reply.object == "chat.completion" and reply.model == "sft" and reply.id.startswith("chatcmpl-")


def test_a_drawn_answer_is_that_of_inference_with_the_same_seed(client, local):
    settings = {"temperature": 0.9, "top_p": 0.9, "seed": 11}
    expected = "".join(local.answer("hello", GenerationConfig(**settings, min_p=0.01, top_k=30, max_length=27)))
    extra = {"top_k": 30, "min_p": 0.01}
    reply = ask(client, max_tokens=20, **settings, extra_body=extra)
    assert reply.choices[0].message.content == expected
    other = ask(client, max_tokens=20, **{**settings, "seed": 12}, extra_body=extra)
    assert other.choices[0].message.content != expected


def test_a_stream_says_what_the_whole_answer_says(client):
    whole = ask(client, max_tokens=20, logit_bias=NO_END)
    chunks = list(ask(client, max_tokens=20, logit_bias=NO_END, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 20
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].usage.completion_tokens == 20 and not chunks[-1].choices
    assert all(c.usage is None for c in chunks[:-1]) and {c.object for c in chunks} == {"chat.completion.chunk"}


def test_a_stream_ends_with_done(server):
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    reply = server.ask("POST", "/v1/chat/completions", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: {") for event in events[:-2])


def test_log_probabilities_come_with_ids_and_candidates(client, local):
    reply = ask(client, max_tokens=5, logprobs=True, top_logprobs=3, logit_bias=NO_END)
    ids = local.prompt_ids("hello")
    for entry in reply.choices[0].logprobs.content:
        logprobs = local.model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)
        assert entry.logprob == pytest.approx(logprobs[entry.id].item(), abs=1e-4)
        assert TOKENIZER.decode([entry.id]) == entry.token == bytes(entry.bytes).decode()
        top = logprobs.topk(3)
        assert [candidate.id for candidate in entry.top_logprobs] == top.indices.tolist()
        assert [candidate.logprob for candidate in entry.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
        ids.append(entry.id)
    assert len(reply.choices[0].logprobs.content) == 5
    streamed = ask(client, max_tokens=5, logprobs=True, top_logprobs=3, logit_bias=NO_END, stream=True)
    entries = [entry for c in streamed if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert entries == reply.choices[0].logprobs.content


def test_n_answers_have_their_own_seeds_and_count_the_prompt_once(client):
    reply = ask(client, n=3, temperature=1, seed=5, max_tokens=12)
    alone = [ask(client, temperature=1, seed=5 + i, max_tokens=12).choices[0].message.content for i in range(3)]
    assert [choice.message.content for choice in reply.choices] == alone and len(set(alone)) > 1
    assert [choice.index for choice in reply.choices] == [0, 1, 2] and reply.usage.prompt_tokens == 7
    texts = ["", "", ""]
    for chunk in ask(client, n=3, temperature=1, seed=5, max_tokens=12, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == alone


def test_stop_texts_end_an_answer(client):
    whole = ask(client, max_tokens=30, logit_bias=NO_END).choices[0].message.content
    stop = whole[5:7]
    for given in (stop, ["zzzzz", stop]):
        choice = ask(client, max_tokens=30, logit_bias=NO_END, stop=given).choices[0]
        assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    streamed = ask(client, max_tokens=30, logit_bias=NO_END, stop=[stop], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == whole[: whole.index(stop)]


def test_the_token_that_ends_an_answer_ends_it(client):
    choice = ask(client, logit_bias={str(TOKENIZER.eos): 100}).choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == ""


def test_an_answer_ends_where_the_window_does(client):
    reply = ask(client, logit_bias=NO_END)
    assert reply.usage.total_tokens == 128 and reply.choices[0].finish_reason == "length"


def test_system_messages_and_text_parts_are_read(client, server):
    system = {"role": "system", "content": "be kind"}
    parts = {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
    expected = TOKENIZER.encode_chat([system, *HELLO])[0].tolist()
    body = {"messages": [system, parts], "add_generation_prompt": True}
    assert server.post("/tokenize", **body).json["tokens"] == expected
    assert ask(client, [system, parts], max_tokens=3).usage.prompt_tokens == len(expected)
    developer = {**system, "role": "developer"}
    assert server.post("/tokenize", messages=[developer, *HELLO]).json["tokens"] == expected


def test_special_tokens_in_messages_are_plain_text(server):
    tokens = server.post("/tokenize", prompt="a<|eos|>b").json["tokens"]
    assert TOKENIZER.eos not in tokens and len(tokens) == 9


def test_an_answer_that_was_begun_goes_on(client):
    whole = ask(client, max_tokens=12, logit_bias=NO_END).choices[0].message.content
    begun = [*HELLO, {"role": "assistant", "content": whole[:5]}]
    body = {"continue_final_message": True}
    rest = ask(client, begun, max_tokens=7, logit_bias=NO_END, extra_body=body).choices[0].message.content
    assert whole[:5] + rest == whole
    body = {"continue_token_ids": TOKENIZER.encode(whole[:5]).tolist()}
    rest = ask(client, max_tokens=7, logit_bias=NO_END, extra_body=body).choices[0].message.content
    assert whole[:5] + rest == whole


def test_completions_take_texts_and_ids_and_give_ids(client):
    options = {"model": "pretrain", "temperature": 0, "max_tokens": 6, "logit_bias": NO_END}
    text = client.completions.create(prompt="hello", **options)
    ids = client.completions.create(prompt=TOKENIZER.encode("hello").tolist(), **options)
    assert text.choices[0].text == ids.choices[0].text == TOKENIZER.decode(ids.choices[0].token_ids)
    assert text.usage.prompt_tokens == 5 and text.object == "text_completion"
    several = client.completions.create(prompt=["hello", "world"], n=2, **options)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == [text.choices[0].text] * 2
    assert several.usage.prompt_tokens == 10 and several.usage.completion_tokens == 24
    streamed = client.completions.create(prompt="hello", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_a_text(client, folder, max_tokens):
    """What lm-evaluation-harness asks for."""
    model = load_text_generator(str(folder / "checkpoint" / "pretrain.pt"), "cpu", instruct=False).model
    reply = client.completions.create(
        model="pretrain", prompt=["hello, world", "hi"], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
    )
    for text, choice in zip(["hello, world", "hi"], reply.choices, strict=True):
        ids = TOKENIZER.encode(text).tolist()
        logprobs = model(torch.tensor([ids]))[0][0].log_softmax(-1)
        got = choice.logprobs
        assert choice.text.startswith(text) and got.tokens[: len(text)] == list(text)
        assert got.token_logprobs[0] is None and got.top_logprobs[0] is None
        expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        assert got.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        best = [max(top.values()) for top in got.top_logprobs[1 : len(ids)]]
        assert best == pytest.approx(logprobs[:-1].max(-1).values.tolist(), abs=1e-4)
        assert got.text_offset[: len(ids)] == list(range(len(ids)))
        assert len(got.tokens) == len(got.token_logprobs) == len(got.top_logprobs) == len(ids) + max_tokens


def test_the_token_that_ends_a_completion_is_scored_too(client):
    """lm-evaluation-harness leaves out the last token, whatever it is: there has to be one."""
    ends = {str(TOKENIZER.eos): 100}
    for stream in (False, True):
        reply = client.completions.create(
            model="pretrain", prompt="abc", echo=True, logprobs=1, max_tokens=1, logit_bias=ends, stream=stream
        )
        (choice,) = [chunk.choices[0] for chunk in reply] if stream else reply.choices
        assert choice.text == "abc" and choice.finish_reason == "stop" and choice.token_ids == []
        assert choice.logprobs.tokens == ["a", "b", "c", "<|eos|>"] and len(choice.logprobs.token_logprobs) == 4


def test_errors_are_the_clients_and_name_the_field(client):
    wrong = {
        "temperature": -1,
        "top_p": 0,
        "max_tokens": "many",
        "n": 0,
        "logit_bias": {"x": 1},
        "stop": [""],
        "seed": 1.5,
        "messages": [],
        "top_logprobs": 21,
    }
    for field, value in wrong.items():
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, **{field: value})
        assert refused.value.param == field and field in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, [{"role": "user", "content": "a" * 200}])
    assert refused.value.code == "context_length_exceeded" and "128" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        ask(client, model="other")
    assert ask(client, max_tokens=1, extra_body={"no_such_field": {"a": 1}}).choices


def test_settings_of_whatever_size_are_answered_and_disturb_nobody(client):
    others = []
    running = threading.Thread(target=lambda: others.append(ask(client, n=2, logit_bias=NO_END, max_tokens=60)))
    running.start()
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        for value in (5e-324, 1e-46, 1e-30, 1.0):
            body = {"temperature": 1, name: value}
            assert ask(client, max_tokens=3, logit_bias=NO_END, extra_body=body).usage.completion_tokens == 3
    running.join()
    assert others[0].usage.completion_tokens == 120


def test_more_answers_than_the_server_ever_takes_are_an_error(client):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, n=13, max_tokens=1)
    assert "12 at most" in refused.value.message


def test_an_adapter_answers_as_inference_with_it(client, folder):
    adapter = folder / "checkpoint" / "polite.pt"
    local = load_text_generator(str(folder / "checkpoint" / "sft.pt"), "cpu", True, adapter=str(adapter))
    expected = "".join(local.answer("hello", GenerationConfig(temperature=0.0, max_length=27)))
    assert ask(client, model="polite", max_tokens=20).choices[0].message.content == expected
    assert expected != ask(client, max_tokens=20).choices[0].message.content


def test_sixteen_clients_get_what_each_gets_alone(client):
    questions = [f"{'abcdefghijklmnop'[i]} question" for i in range(10)]
    alone = [ask(client, [{"role": "user", "content": q}], max_tokens=10).choices[0].message.content for q in questions]
    together = [None] * len(questions)

    def one(i):
        reply = ask(client, [{"role": "user", "content": questions[i]}], max_tokens=10)
        together[i] = reply.choices[0].message.content

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_tokenize_gives_pieces(server):
    reply = server.post("/tokenize", prompt="hi 你", is_chat=True).json
    assert reply["tokens"] == TOKENIZER.encode_chat([{"role": "user", "content": "hi 你"}])[0].tolist()
    assert reply["pieces"] == ["<|InstructMark|>", "h", "i", " ", "你", "<|ResponseMark|>"]
    assert reply["count"] == 6 and reply["max_model_len"] == 128


def test_characters_of_several_tokens_come_whole(client, server):
    reply = server.post("/tokenize", model="bytes", prompt="a你🙂").json
    assert reply["pieces"] == ["a", "", "", "你", "", "", "", "🙂"] and reply["count"] == 8
    you = {str(token): 100 for token in BYTES.encode("你").tolist()}  # its three bytes, in whatever order
    options = {"model": "bytes", "max_tokens": 12, "logprobs": True, "temperature": 1, "seed": 1, "logit_bias": you}
    whole = ask(client, **options).choices[0]
    pieces = [c.choices[0].delta.content or "" for c in ask(client, stream=True, **options) if c.choices[0].delta]
    assert "".join(pieces) == whole.message.content and len(whole.logprobs.content) == 12
    assert all(entry.bytes is None for entry in whole.logprobs.content)


def test_tokens_are_found_in_the_text_by_their_offsets(client):
    """Parts of a character, too, and where a text that may become a stop text is held back."""
    you = {str(token): 100 for token in BYTES.encode("你").tolist()}
    prompt = "a你b🙂c"
    reply = client.completions.create(model="bytes", prompt=prompt, echo=True, logprobs=3, max_tokens=3, logit_bias=you)
    (choice,) = reply.choices
    assert choice.logprobs.text_offset[:11] == [0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 5] and choice.text.startswith(prompt)
    assert choice.logprobs.tokens[:2] == ["a", f"token_id:{BYTES.encode('你')[0]}"]
    assert [len(top) for top in choice.logprobs.top_logprobs[1:]] == [3] * (len(choice.logprobs.tokens) - 1)
    options = {"model": "pretrain", "temperature": 0, "max_tokens": 6, "logit_bias": NO_END, "logprobs": 1}
    whole = client.completions.create(prompt="ab", **options).choices[0]
    streamed = client.completions.create(prompt="ab", stop=[whole.text[:3] + "你好你"], stream=True, **options)
    offsets = [offset for chunk in streamed for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset == list(range(6))


def test_pieces_of_a_long_text_are_found_quickly(monkeypatch):
    ids, n_decoded, decode = BYTES.encode("a你b🙂" * 1000).tolist(), [], BPETokenizer.decode
    monkeypatch.setattr(BPETokenizer, "decode", lambda self, ids: n_decoded.append(1) or decode(self, ids))
    assert token_pieces(BYTES, ids) == ["a", "", "", "你", "b", "", "", "", "🙂"] * 1000
    assert len(n_decoded) < 7010  # seven parts of characters in each
    n_decoded.clear()
    assert token_pieces(BYTES, BYTES.encode("abc" * 1000).tolist()) == list("abc" * 1000) and len(n_decoded) < 5


def test_inspect_shows_attention_and_experts(server, folder):
    ids = TOKENIZER.encode("hello world").tolist()
    for name in ("sft", "experts"):
        path = str(folder / "checkpoint" / f"{name}.pt")
        model = load_text_generator(path, "cpu", instruct=True).model
        reply = server.post("/inspect", model=name, tokens=ids, position=6).json
        maps = attention_maps(model, torch.tensor([ids]))[:, 0, :, 6, :7]
        got = torch.tensor(reply["attention"])
        assert got.shape == (2, 4, 7) and torch.allclose(got, maps, atol=1e-5)
        assert (reply["experts"] is None) == (name == "sft")
    for chosen in reply["experts"]:
        weights = [expert["weight"] for expert in chosen]
        assert len(chosen) == 2 and sum(weights) == pytest.approx(1) and weights == sorted(weights, reverse=True)
    x = []
    mixture = model.blocks[0].mlp
    mixture.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    model(torch.tensor([ids]))
    scores = (x[0][0, 6] @ mixture.router.weight.T).softmax(-1).topk(2)
    assert [expert["id"] for expert in reply["experts"][0]] == scores.indices.tolist()


def test_trainings_are_listed_and_drawn(server, folder):
    (run,) = server.get("/training").json["runs"]
    assert run["name"] == "train_20260101_000000.log" and run["stage"] == "sft" and run["step"] == 49
    assert run["val_loss"] == 0.5 and run["best_val_loss"] == 0.25 and run["best_checkpoint"] == "sft.pt"
    assert run["running"] and run["seconds_left"] == pytest.approx(5.1)
    drawn = server.get(f"/training/curves.svg?log={run['name']}")
    assert drawn.status == 200 and drawn.headers["content-type"] == "image/svg+xml"
    assert xml.etree.ElementTree.fromstring(drawn.body).tag.endswith("svg")
    assert str(folder).encode() not in drawn.body
    for name in ("secret.log", "../serve0/train_20260101_000000.log", "/etc/passwd", "", "train_x.log"):
        assert server.get(f"/training/curves.svg?log={name}").status == 400
    assert server.get("/training/curves.svg").status == 400


def wait_until(holds):
    for _ in range(400):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 20 seconds")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(server, stream):
    cancelled = server.number("nano_cancelled_total")
    data = json.dumps({"messages": HELLO, "stream": stream, "n": 12, "logit_bias": NO_END}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(head.encode() + data)
        if stream:
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    wait_until(lambda: server.number("nano_cancelled_total") > cancelled)
    wait_until(lambda: server.number("nano_running") == server.number("nano_waiting") == 0)


def test_too_many_waiting_are_told_when_to_come_back(client, server):
    with ask(client, n=12, logit_bias=NO_END, stream=True) as running:
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client, n=9)
    assert int(refused.value.response.headers["retry-after"]) > 0
    wait_until(lambda: server.number("nano_running") == server.number("nano_waiting") == 0)


def test_metrics_are_prometheus_text(server):
    text = server.get("/metrics").body.decode()
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert {"nano_requests_total", "nano_generated_tokens_total", "nano_first_token_seconds_sum"} <= names
    before = server.number("nano_generated_tokens_total")
    server.post("/v1/chat/completions", messages=HELLO, max_tokens=3, logit_bias=NO_END)
    assert server.number("nano_generated_tokens_total") == before + 3
    assert all(math.isfinite(float(line.split()[-1])) for line in text.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end_and_refuses_new_ones(folder, number):
    with serving(folder, "-m", "sft", "--rows", "2") as running:
        whole = running.post("/v1/chat/completions", messages=HELLO, temperature=0, logit_bias=NO_END).json
        body = {"messages": HELLO, "temperature": 0, "logit_bias": NO_END, "n": 6}
        replies = []
        thread = threading.Thread(target=lambda: replies.append(running.post("/v1/chat/completions", **body)))
        thread.start()
        while running.number("nano_running") == 0:
            time.sleep(0.01)
        running.process.send_signal(number)
        statuses = set()
        while thread.is_alive():
            try:
                statuses.add(running.post("/v1/chat/completions", messages=HELLO).status)
                statuses.add(running.get("/health").status)
            except OSError:
                break
            time.sleep(0.02)
        thread.join()
        texts = {choice["message"]["content"] for choice in replies[0].json["choices"]}
        assert texts == {whole["choices"][0]["message"]["content"]}
        assert statuses == {503}
        assert running.process.wait(20) == 0


@pytest.mark.parametrize(
    "argv, said",
    [
        (["-m", "nothing"], "no such checkpoint"),
        (["-m", "sft", "-m", "checkpoint/sft.pt"], "two models are named sft"),
        (["-m", "sft", "--port", "99999"], "--port must be 0 to 65535"),
        (["-m", "sft", "--rows", "0"], "--rows must be 1 to 1024"),
        (["-m", "sft", "--api_key", ""], "--api_key must be"),
        (["-m", "sft", "--cors", "*"], "--cors must be"),
        (["-m", "sft", "--cors", "http://a.example/"], "--cors must be"),
        (["-m", "sft", "--host", "192.0.2.1"], "cannot listen at 192.0.2.1:0: Cannot assign"),
        (["-m", "pretrain", "--lora", "checkpoint/polite.pt"], "another base model"),
        (["-m", "checkpoint/polite.pt"], "an adapter; -m names its model"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(folder, call, monkeypatch, argv, said):
    monkeypatch.chdir(folder)
    result = call("serve.py", "--port", "0", *argv, "--device", "cpu")
    assert result.status == 1 and said in result.err and result.err.startswith("error: ") and result.out == ""


def test_a_port_that_is_taken_is_an_error(folder, call, monkeypatch):
    monkeypatch.chdir(folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = call("serve.py", "-m", "sft", "--port", str(taken.getsockname()[1]), "--device", "cpu")
    assert result.status == 1 and "in use" in result.err and "--port" in result.err


def test_without_starlette_the_line_to_install_it_is_printed(folder, call, monkeypatch):
    for name in ("api", "guard", "http", "completions"):  # as if they had never been imported
        monkeypatch.delitem(sys.modules, f"serving.{name}", raising=False)
        monkeypatch.delattr(serving_package, name, raising=False)
    for name in ("starlette", *(name for name in sys.modules if name.startswith("starlette."))):
        monkeypatch.setitem(sys.modules, name, None)
    result = call("serve.py", "-m", "nothing")
    assert result.status == 1 and result.err.endswith("pip install -r requirements-serve.txt\n")
