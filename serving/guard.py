"""What stands between the network and the application: who may ask, from which page, how long they may take.

A page of a stranger, open in the same browser, can reach a server on 127.0.0.1. What it asks for carries its Origin,
which is refused; and where its own name is made to point to 127.0.0.1 (DNS rebinding), the Host is that name, which is
refused too. Clients that are slow to ask or to read are cut off.
"""

import asyncio
import hmac
import ipaddress
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.answers import to_json

MAX_CONNECTIONS = 400
MAX_HEADER_BYTES = 16 << 10
HEADER_SECONDS = 10  # for the first line and the headers of a request
STALLED_SECONDS = 30  # that a client may leave what was sent to it unread
POLICY = (  # what the page may load and do: its own files alone
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error in OpenAI's form."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return to_json({"error": {"message": message, "type": kind, "param": param, "code": code}})


class Guard:
    """An ASGI application around another one: checks Host, Origin and API key, and adds headers to all answers."""

    def __init__(
        self, app: Callable, hosts: Iterable[str], origins: Iterable[str], key: str, is_open: Callable[[str], bool]
    ) -> None:
        """hosts: names of this server beside localhost and IP addresses; origins: pages that may ask, beside its own.

        key: that requests must have, "" for none; is_open(path): whether it is not needed there.
        """
        self.app, self.hosts, self.origins = app, {"localhost", *map(str.lower, hosts)}, set(origins)
        self.key, self.is_open = key, is_open

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                added = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        if refusal := self.refusal(scope):
            status, text = refusal
            body, headers = error_body(status, text), [(b"content-type", b"application/json")]
            if status == 401:
                headers.append((b"www-authenticate", b"Bearer"))
            await send_with_headers({"type": "http.response.start", "status": status, "headers": headers})
            await send_with_headers({"type": "http.response.body", "body": body})
            return
        await self.app(scope, receive, send_with_headers)

    def refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """Status and message for a request that is not let in."""
        values = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"origin", b"authorization") and name in values:
                return 400, f"the header {name.decode()} is given twice"
            values[name] = value.decode("latin-1")
        host = values.get(b"host", "")
        if not self.knows(host):
            return 403, "this server does not have the name in the request's Host header; --allow_host NAME allows one"
        origin = values.get(b"origin")
        if origin is not None and origin not in self.origins and urlsplit_netloc(origin) != host.lower():
            return 403, "requests of other pages are refused; --cors ORIGIN allows one"
        if self.key and not self.is_open(scope["path"]):
            given = values.get(b"authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.key}".encode()):
                return 401, "an API key is needed: the header Authorization: Bearer KEY"
        return None

    def knows(self, host: str) -> bool:
        """Whether a Host header is an IP address or one of the server's names: no one else's name can be."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def protect(
    app: Callable, hosts: Iterable[str], origins: list[str], key: str, is_open: Callable[[str], bool]
) -> Callable:
    """The application in its Guard; pages of other origins that may ask are told so (CORS)."""
    guarded = Guard(app, hosts, origins, key, is_open)
    if not origins:
        return guarded
    # OpenAI's client for browsers sends a dozen headers of its own
    return CORSMiddleware(guarded, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])


def urlsplit_netloc(origin: str) -> str:
    """Host and port of an http origin; "" for others, such as "null"."""
    scheme, _, rest = origin.partition("://")
    return rest.lower() if scheme in ("http", "https") else ""


class BoundedProtocol(H11Protocol):
    """HTTP for a bounded number of connections, that gives up clients who are slow to ask or to read."""

    header_timer: asyncio.TimerHandle | None = None
    stalled_timer: asyncio.TimerHandle | None = None
    is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self.is_refused = True
            body = error_body(503, f"too many connections: there are {MAX_CONNECTIONS} already")
            head = (
                f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            )
            transport.write(f"{head}Retry-After: 5\r\nConnection: close\r\n\r\n".encode() + body)
            transport.close()
            return
        self.watch_client()

    def data_received(self, data: bytes) -> None:
        if not self.is_refused:
            super().data_received(data)
            self.watch_client()

    def watch_client(self) -> None:
        """Run a clock while the headers of a request are not complete, or the rest of one is that was answered."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        is_awaited = theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours in (h11.DONE, h11.MUST_CLOSE))
        if not is_awaited and self.header_timer:
            self.header_timer.cancel()
            self.header_timer = None
        elif is_awaited and not self.header_timer:
            self.header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and (self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]):
            self.watch_client()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled_timer = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled_timer:
            self.stalled_timer.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self.header_timer, self.stalled_timer):
            if timer:
                timer.cancel()
        super().connection_lost(error)
