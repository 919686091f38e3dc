"""serve.py among strangers: malformed requests, foreign pages, slow clients, too many of them."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest
from servers import TOKENIZER, make_checkpoint, serving

uvicorn = pytest.importorskip("uvicorn")
guard = pytest.importorskip("serving.guard")
CHAT, COMPLETIONS, TOKENIZE, INSPECT = "/v1/chat/completions", "/v1/completions", "/tokenize", "/inspect"
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields):
    return CHAT, {"messages": HELLO, "max_tokens": 1, **fields}


def message(**fields):
    return CHAT, {"messages": [{"role": "user", "content": "hello", **fields}], "max_tokens": 1}


def completion(**fields):
    return COMPLETIONS, {"prompt": "hello", "max_tokens": 1, **fields}


DEEP = b"[" * 100_000
MALFORMED = [
    (CHAT, b""),
    (CHAT, b"{"),
    (CHAT, b"nonsense"),
    (CHAT, b"[]"),
    (CHAT, b"null"),
    (CHAT, b"3"),
    (CHAT, b'"text"'),
    (CHAT, b"\xff\xfe{}"),
    (CHAT, b'{"messages": "\xc3\x28"}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}'),
    (CHAT, DEEP),
    (CHAT, b'{"messages": ' + DEEP),
    (CHAT, b'{"a":' * 50_000),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": -Infinity}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "n": ' + b"9" * 5000 + b"}"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "n": ' + b"9" * 400 + b"}"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1e400}'),
    (CHAT, {}),
    (CHAT, {"messages": None}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": {}}),
    (CHAT, {"messages": "hello"}),
    (CHAT, {"messages": [None]}),
    (CHAT, {"messages": [[]]}),
    (CHAT, {"messages": [{"content": "a"}]}),
    (CHAT, {"messages": [{"role": "user"}]}),
    (CHAT, {"messages": [{"role": "system", "content": "a"}]}),
    (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": "a"}]}),
    (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": "a" * 500}], "continue_final_message": True}),
    message(role="tool"),
    message(role=["user"]),
    message(role=None),
    message(content=None),
    message(content=5),
    message(content={"text": "a"}),
    message(content=[5]),
    message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
    message(content=[{"type": "text", "text": 5}]),
    message(content=[{"type": "text"}]),
    message(content="a" * 5000),
    chat(temperature="hot"),
    chat(temperature=True),
    chat(temperature=-0.1),
    chat(temperature=1e9),
    chat(top_p=0),
    chat(top_p=1.5),
    chat(top_k=-2),
    chat(top_k=0.5),
    chat(min_p=2),
    chat(repetition_penalty=0),
    chat(max_tokens=0),
    chat(max_tokens=-1),
    chat(max_completion_tokens="1"),
    chat(n=0),
    chat(n=10_000),
    chat(seed=1 << 70),
    chat(seed="one"),
    chat(stop=5),
    chat(stop=[5]),
    chat(stop=""),
    chat(stop="\ufeff"),
    chat(stop=["a"] * 100),
    chat(stop=["a" * 10_000]),
    chat(stream="yes"),
    chat(stream_options=[1]),
    chat(stream_options=[]),
    chat(stream_options=0),
    chat(stream_options={"include_usage": 0}),
    chat(stream_options={"include_usage": "yes"}),
    chat(logprobs=1),
    chat(top_logprobs=5),
    chat(logprobs=True, top_logprobs=21),
    chat(logprobs=True, top_logprobs=-1),
    chat(logit_bias=[1]),
    chat(logit_bias=[]),
    chat(logit_bias=False),
    chat(logit_bias={"7": "a"}),
    chat(logit_bias={"7": 101}),
    chat(logit_bias={"7": True}),
    chat(logit_bias={"-1": 1}),
    chat(logit_bias={"99999": 1}),
    chat(logit_bias={"9" * 5000: 1}),
    chat(logit_bias={"٣": 1}),
    chat(model=5),
    chat(model="../../etc/passwd"),
    chat(model={"a": 1}),
    chat(continue_final_message=True),
    chat(continue_token_ids="abc"),
    chat(continue_token_ids=[-1]),
    chat(continue_token_ids=[7] * 1000),
    chat(continue_final_message="yes"),
    (COMPLETIONS, {}),
    completion(prompt=""),
    completion(prompt=[]),
    completion(prompt=[[]]),
    completion(prompt=[""]),
    completion(prompt=5),
    completion(prompt=[5.5]),
    completion(prompt=[True]),
    completion(prompt=[-1]),
    completion(prompt=[TOKENIZER.vocab_size]),
    completion(prompt=[1 << 80]),
    completion(prompt=["a", 5]),
    completion(prompt=["a"] * 1000),
    completion(prompt=[7] * 1000),
    completion(prompt="a" * 900_000),
    completion(max_tokens=0),
    completion(logprobs=True),
    completion(logprobs=99),
    completion(echo="yes"),
    completion(prompt=["a"] * 60, n=60),
    (TOKENIZE, {}),
    (TOKENIZE, {"prompt": 5}),
    (TOKENIZE, {"messages": 5}),
    (TOKENIZE, {"messages": [5]}),
    (TOKENIZE, {"prompt": None, "is_chat": True}),
    (TOKENIZE, {"prompt": "a", "is_chat": "no"}),
    (TOKENIZE, {"messages": HELLO, "add_generation_prompt": "no"}),
    (INSPECT, {}),
    (INSPECT, {"tokens": "abc"}),
    (INSPECT, {"tokens": []}),
    (INSPECT, {"tokens": [7, -1]}),
    (INSPECT, {"tokens": [7], "position": 1}),
    (INSPECT, {"tokens": [7], "position": -1}),
    (INSPECT, {"tokens": [7], "position": "0"}),
    (INSPECT, {"tokens": [7], "position": True}),
    (INSPECT, {"tokens": [7] * 1000, "position": 999}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    make_checkpoint(folder / "m.pt")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "-m", "m.pt") as running:
        yield running


@pytest.fixture(scope="module")
def half_requests(server):
    """Clients who never finish what they began; opened before the other tests run, looked at after them."""
    begun = [
        b"",
        b"G",
        b"GET / HTTP/1.1\r\nHost: localh",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET",
    ]
    socks = []
    for beginning in begun:
        socks.append(socket.create_connection(("127.0.0.1", server.port)))
        socks[-1].sendall(beginning)
    yield socks, time.monotonic()
    for sock in socks:
        sock.close()


@pytest.fixture(autouse=True)
def nothing_is_lost(server, half_requests):
    """After whatever a test does, the next one is answered."""
    yield
    assert server.post(CHAT, messages=HELLO, max_tokens=1).status == 200


def raw(server, data, timeout=20):
    """What comes back for some bytes, until the server closes or says no more."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while chunk := sock.recv(65536):
                received += chunk
                if b"\r\n\r\n" in received:
                    break
        return received


def test_malformed_requests_are_the_clients_fault(server, folder):
    assert len(MALFORMED) >= 60
    for path, body in MALFORMED:
        reply = server.ask("POST", path, body)
        assert 400 <= reply.status < 500, (path, body, reply)
        error = reply.json["error"]
        assert error["message"] and {"type", "param", "code"} <= error.keys()
        assert str(folder) not in error["message"] and "Traceback" not in error["message"]


def test_lone_surrogates_and_control_characters_are_answered(server):
    for text in ("\ud800", "\udc80x", "\x00\x1b[2J", "\ufffd\ufeff", "a\r\nb", "\u202e" * 5):
        for path, body in (
            message(content=text),
            completion(prompt=text, echo=True, logprobs=1),
            (TOKENIZE, {"prompt": text}),
        ):
            reply = server.ask("POST", path, body)
            assert reply.status == 200 and reply.json, (path, text, reply)
        for fields in ({"stop": text}, {"model": text}, {"logit_bias": {text: 1}}, {"user": text}):
            assert server.ask("POST", *chat(**fields)).status in (200, 400, 404)


def test_paths_lead_nowhere_else(server):
    for path in (
        "/../serve.py",
        "/..%2fserve.py",
        "/%2e%2e/serve.py",
        "/page/../../serve.py",
        "//etc/passwd",
        "/\\..\\serve.py",
        "/m.pt",
        "/%00",
        "/index.html%00.js",
        "/.git/config",
        "/v1/models/..%2f..%2fm.pt",
        "/" + "a" * 5000,
        "/%ff%fe",
    ):
        reply = server.get(path)
        assert reply.status == 404 and reply.json["error"]["message"], (path, reply)
    assert server.get(CHAT).status == 405 and server.ask("DELETE", "/v1/models").status == 405


def test_answers_carry_the_policy(server):
    for reply in (server.get("/"), server.get("/health"), server.get("/nothing"), server.get("/v1/models", Host="a.b")):
        assert reply.headers["content-security-policy"].startswith("default-src 'none'")
        assert reply.headers["x-content-type-options"] == "nosniff" and "server" not in reply.headers
        assert "access-control-allow-origin" not in reply.headers


def test_other_names_and_other_pages_are_refused(server):
    for host in ("localhost", "127.0.0.1:80", "[::1]:8000", "LOCALHOST"):
        assert server.get("/v1/models", Host=host).status == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "a b", "[", "localhost@evil"):
        assert server.get("/v1/models", Host=host).status == 403, host
    own = f"127.0.0.1:{server.port}"
    assert server.get("/v1/models", Host=own, Origin=f"http://{own}").status == 200
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{server.port + 1}", "file://", f"ftp://{own}", ""):
        assert server.get("/v1/models", Host=own, Origin=origin).status == 403, origin
    preflight = server.ask("OPTIONS", CHAT, None, Origin="http://evil.example", Access_Control_Request_Method="POST")
    assert preflight.status == 403


def test_names_of_the_server_are_names_in_whatever_case():
    allowed = guard.Guard(None, ["MyLaptop.local"], [], "", bool)
    assert allowed.knows("mylaptop.local:8000") and allowed.knows("MYLAPTOP.LOCAL") and not allowed.knows("laptop")


def test_two_hosts_or_keys_are_refused(server):
    twice = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n"
    assert raw(server, twice).startswith(b"HTTP/1.1 400")
    origins = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nOrigin: http://evil\r\n\r\n"
    assert raw(server, origins).startswith(b"HTTP/1.1 400")


def test_a_body_that_is_too_large_is_refused(server):
    reply = server.ask("POST", CHAT, json.dumps({"messages": [{"role": "user", "content": "a" * (1 << 20)}]}).encode())
    assert reply.status == 413 and "1,048,576" in reply.json["error"]["message"]
    claimed = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n".encode()
    assert b" 413 " in raw(server, claimed + b"a" * (3 << 20))


def test_headers_are_bounded(server):
    for n in (10_000, 100_000, 1_000_000):
        reply = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * n + b"\r\n\r\n")
        assert reply == b"" or reply[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 400"), n
    many = b"".join(b"X-%d: a\r\n" % i for i in range(100_000))
    reply = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")
    assert reply == b"" or reply.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "data", [b"\x00\x01\x02\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_not_http_is_refused(server, data):
    assert raw(server, data, timeout=1)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 403")


def test_a_client_that_reads_nothing_costs_nothing(server):
    """Its answer is bounded, and the others' go on."""
    body = json.dumps({"messages": HELLO, "stream": True, "n": 64, "logprobs": True, "top_logprobs": 20}).encode()
    socks = []
    for _ in range(2):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        socks.append(sock)
    assert server.post("/tokenize", prompt="a").status == 200
    for sock in socks:
        sock.close()
    for _ in range(200):
        if server.number("nano_running") == server.number("nano_waiting") == 0:
            return
        time.sleep(0.05)
    raise AssertionError("rows are still taken")


def test_a_client_that_reads_nothing_is_cut_off(monkeypatch):
    """Within STALLED_SECONDS, here 0.3: the application hears that it is gone."""
    monkeypatch.setattr(guard, "STALLED_SECONDS", 0.3)
    heard = threading.Event()

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def pour():
            while True:
                await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})

        pouring = asyncio.create_task(pour())
        while (await receive())["type"] != "http.disconnect":
            pass
        pouring.cancel()
        heard.set()

    config = uvicorn.Config(endless, http=guard.BoundedProtocol, lifespan="off", log_level="critical")
    own = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: own.run(sockets=[listening]))
        thread.start()
        with socket.create_connection(listening.getsockname()) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert heard.wait(20)
        own.should_exit = True
        thread.join()


def test_a_client_that_never_ends_an_answered_request_is_cut_off(monkeypatch):
    """However many bytes of its body keep coming."""
    monkeypatch.setattr(guard, "HEADER_SECONDS", 0.3)

    async def refuse(scope, receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    own = uvicorn.Server(uvicorn.Config(refuse, http=guard.BoundedProtocol, lifespan="off", log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: own.run(sockets=[listening]))
        thread.start()
        try:
            with socket.create_connection(listening.getsockname()) as sock:
                sock.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n")
                assert sock.recv(4096).startswith(b"HTTP/1.1 404")
                with pytest.raises(ConnectionError):
                    for _ in range(100):
                        sock.sendall(b"a")
                        time.sleep(0.05)
        finally:
            own.should_exit = True
            thread.join()


def test_five_hundred_connections_are_answered_or_refused(server):
    socks = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(500)]
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    statuses = []
    for sock in socks:
        with contextlib.suppress(ConnectionError):
            sock.sendall(request)
        try:
            statuses.append(sock.recv(65536)[9:12])
        except ConnectionError:
            statuses.append(b"")
    for sock in socks:
        sock.close()
    assert set(statuses) <= {b"200", b"503", b""} and statuses.count(b"200") >= 300 and b"503" in statuses


def test_half_requests_are_given_up(server, half_requests):
    socks, began = half_requests
    for sock in socks:
        sock.settimeout(max(1.0, began + 30 - time.monotonic()))
        with contextlib.suppress(ConnectionError):
            while sock.recv(65536):  # the answer to a whole request before the half one, then the end
                pass
    assert time.monotonic() - began < 30


@pytest.fixture(scope="module")
def guarded(folder):
    with serving(
        folder, "-m", "m.pt", "--host", "0.0.0.0", "--api_key", "sesame", "--cors", "http://a.example"
    ) as running:
        yield running


def test_other_machines_need_the_key(guarded):
    for path in ("/v1/models", "/metrics", "/training", "/training/curves.svg", "/nothing"):
        refused = guarded.get(path)
        assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json["error"]["type"] == "authentication_error"
        assert guarded.get(path, Authorization="Bearer sesame").status != 401
    for wrong in ("sesame", "Bearer", "Bearer sesam", "Bearer sesame ", "Basic sesame", "Bearer s\xe9same"):
        assert guarded.get("/v1/models", Authorization=wrong).status in (401, 200 if wrong == "Bearer sesame " else 401)
    assert guarded.get("/health").status == 200 and guarded.get("/").status != 401
    reply = guarded.ask("POST", CHAT, {"messages": HELLO, "max_tokens": 1})
    assert reply.status == 401


def test_cors_is_for_the_origins_that_were_given(guarded):
    allowed = guarded.get("/v1/models", Authorization="Bearer sesame", Origin="http://a.example")
    assert allowed.status == 200 and allowed.headers["access-control-allow-origin"] == "http://a.example"
    asks = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization,content-type,x-stainless-lang",
    }
    preflight = guarded.ask("OPTIONS", CHAT, None, Origin="http://a.example", **asks)
    assert preflight.status == 200 and "POST" in preflight.headers["access-control-allow-methods"]
    other = guarded.get("/v1/models", Authorization="Bearer sesame", Origin="http://b.example")
    assert other.status == 403 and "access-control-allow-origin" not in other.headers


def test_a_key_is_made_up_for_other_machines(folder):
    with serving(folder, "-m", "m.pt", "--host", "0.0.0.0") as running:
        assert running.get("/v1/models").status == 401
        running.process.terminate()
        errors = running.process.stderr.read()
        key = next(line.split(": ")[1] for line in errors.splitlines() if line.startswith("API key"))
        assert len(key) >= 20
