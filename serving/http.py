"""What every path of the server's application shares: what it knows, bodies read, answers and errors written."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.answers import to_json
from serving.guard import error_body
from serving.requests import BadRequest, parse_json, read_messages, read_pixels
from serving.scheduler import Batch, Refused, Scheduler
from serving.training_logs import TrainingLogs
from text.tokenizer import Messages

BODY_SECONDS = 30  # that a request's body may take to arrive
MAX_IMAGES = 8  # that wait to be read: each holds its file in memory, and can take a second


@dataclass
class Server:
    """What the application knows."""

    batches: dict[str, Batch]  # by the models' names, the first is the default
    scheduler: Scheduler
    logs: TrainingLogs
    max_body: int = 1 << 20  # bytes
    started: int = 0  # Unix time
    requests: Counter = field(default_factory=Counter)  # by path and status
    drawing: asyncio.Lock = field(default_factory=asyncio.Lock)  # figures are drawn one at a time
    decoding: asyncio.Lock = field(default_factory=asyncio.Lock)  # and images read: a large one takes 400 MB

    n_images: int = 0  # that wait for it, or are being read

    @property
    def max_image_bytes(self) -> int:
        """Of a file that fits into a request: base64 makes four characters of three bytes, around it are a few more."""
        return max(0, self.max_body - 1024) // 4 * 3

    def batch(self, name: Any) -> Batch:
        """The model of a request; raises BadRequest."""
        if name is None:
            return next(iter(self.batches.values()))
        if not isinstance(name, str) or name not in self.batches:
            raise BadRequest(f"model must be one of {', '.join(self.batches)}", "model", 404, "model_not_found")
        return self.batches[name]


def answer(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object of a request; raises BadRequest."""
    limit, body = request.app.state.server.max_body, bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise BadRequest(f"the body has more than {limit:,} bytes", status=413)
    except TimeoutError:
        raise BadRequest(f"the body has not come within {BODY_SECONDS} seconds", status=408) from None
    return parse_json(bytes(body))


async def read_conversation(server: Server, batch: Batch, body: dict[str, Any]) -> Messages:
    """The messages of a request, with the pixels (3, S, S) of its image if there is one; raises Refused."""
    messages = await run_in_threadpool(read_messages, body)
    for i, message in enumerate(messages):
        if "image" in message:
            file, name = message["image"], f"messages[{i}].content"
            if server.n_images > MAX_IMAGES:
                raise Refused(f"{MAX_IMAGES} images wait to be read already: try again in a moment", 429)
            server.n_images += 1
            try:
                async with server.decoding:
                    message["image"] = await run_in_threadpool(read_pixels, batch.generator, batch.name, file, name)
            finally:
                server.n_images -= 1
    return messages


async def refuse(request: Request, error: Refused) -> Response:
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    headers = {"retry-after": str(error.retry_after)} if error.status in (429, 503) else {}
    body = error_body(error.status, str(error), param, code)
    return Response(body, error.status, headers, media_type="application/json")


async def refuse_path(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return Response(error_body(error.status_code, message), error.status_code, error.headers, "application/json")


async def fail(request: Request, error: Exception) -> Response:
    return Response(error_body(500, "internal error; the server's terminal says more"), 500, None, "application/json")


async def gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


ERRORS = {Refused: refuse, HTTPException: refuse_path, ClientDisconnect: gone, Exception: fail}
