"""The server's application: OpenAI's API, the page, and what the page shows of a model and of trainings.

    app = make_app(Server(batches, Scheduler(batches), draw_curves))     # an ASGI application

A request becomes Generations (requests.py), which the scheduler's thread continues; their pieces come back through a
queue of the request's own, and become an answer in OpenAI's form (answers.py).
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from base.configuration import UserError
from serving import requests
from serving.answers import Chat, Completion, to_json, usage
from serving.guard import error_body
from serving.inspection import inspect_token
from serving.metrics import metrics_text
from serving.requests import BadRequest
from serving.scheduler import Batch, Generation, Piece, Refused, Scheduler
from serving.training_logs import TrainingLogs

PAGE = Path(__file__).with_name("page")
MEDIA_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
}
BODY_SECONDS = 30  # that a request's body may take to arrive
LAST_PIECE_SECONDS = 30  # beyond a request's own limit


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
    return requests.parse_json(bytes(body))


# ---------------------------------------------------------------------------------------------------- completions


class Pieces:
    """The pieces of a request's answers, from the scheduler's thread to the event loop."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def deliver(self, index: int, piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, piece))

    async def each(self, n: int) -> AsyncIterator[tuple[int, Piece]]:
        """(index, piece), until all n answers have ended."""
        while n:
            index, piece = await self.queue.get()
            n -= piece.finish_reason is not None
            yield index, piece


async def chat_completions(request: Request) -> Response:
    server, body = request.app.state.server, await read_body(request)
    batch = server.batch(body.get("model"))
    tokenizer, pieces = batch.generator.tokenizer, Pieces()

    def prepare() -> tuple[list[Generation], SimpleNamespace]:
        fields = requests.read_fields(requests.CHAT_FIELDS, body)
        if fields.top_logprobs and not fields.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        if fields.max_completion_tokens is not None:
            fields.max_tokens = fields.max_completion_tokens
        if fields.max_tokens == 0:
            raise BadRequest("max_tokens must be at least 1", "max_tokens")
        messages = requests.read_messages(body)
        ids = requests.chat_prompt(batch.generator, messages, fields.continue_final_message)
        found = requests.generations([ids], fields, body, batch.generator, "messages", pieces.deliver)
        for generation in found:
            generation.n_logprobs = fields.top_logprobs if fields.logprobs else None
        return found, fields

    generations, fields = await run_in_threadpool(prepare)  # as a long text takes long to tokenise
    return await respond(
        request, batch, generations, pieces, fields, body, Chat(tokenizer, batch.name, fields.logprobs)
    )


async def completions(request: Request) -> Response:
    server, body = request.app.state.server, await read_body(request)
    batch = server.batch(body.get("model"))
    tokenizer, pieces = batch.generator.tokenizer, Pieces()

    def prepare() -> tuple[list[Generation], SimpleNamespace]:
        fields = requests.read_fields(requests.COMPLETION_FIELDS, body)
        if fields.max_tokens == 0 and not fields.echo:
            raise BadRequest("max_tokens must be at least 1, or echo true", "max_tokens")
        prompts = requests.read_prompts(batch.generator, body)
        found = requests.generations(prompts, fields, body, batch.generator, "prompt", pieces.deliver)
        for generation in found:
            generation.n_logprobs = fields.logprobs
            generation.with_prompt = fields.echo and fields.logprobs is not None
        return found, fields

    generations, fields = await run_in_threadpool(prepare)
    echoed = [generation.ids for generation in generations] if fields.echo else []
    form = Completion(tokenizer, batch.name, fields.logprobs is not None, echoed)
    return await respond(request, batch, generations, pieces, fields, body, form)


async def respond(
    request: Request,
    batch: Batch,
    generations: list[Generation],
    pieces: Pieces,
    fields: SimpleNamespace,
    body: dict[str, Any],
    form: Chat | Completion,
) -> Response:
    """Have the answers generated, and send them whole or in a stream."""
    scheduler, with_usage = request.app.state.server.scheduler, requests.read_usage_option(body)
    scheduler.submit(batch, generations)
    if fields.stream:
        events = stream_events(scheduler, generations, pieces, form, fields.n, with_usage)
        return StreamingResponse(events, media_type="text/event-stream")

    whole = [Piece() for _ in generations]

    async def collect() -> None:
        async for index, piece in pieces.each(len(generations)):
            if piece.error:
                raise piece.error
            one = whole[index]
            one.text, one.finish_reason = one.text + piece.text, piece.finish_reason
            one.tokens += piece.tokens
            one.prompt += piece.prompt

    async def client_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(collect()), asyncio.create_task(client_gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        scheduler.cancel(generations)
        for task in tasks:
            task.cancel()
    choices = [form.choice(i, piece, in_stream=False) for i, piece in enumerate(whole)]
    return answer({**form.head(form.whole), "choices": choices, "usage": usage(generations, fields.n)})


async def stream_events(
    scheduler: Scheduler,
    generations: list[Generation],
    pieces: Pieces,
    form: Chat | Completion,
    n: int,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """The server-sent events of a stream."""
    none = {"usage": None} if with_usage else {}
    event = lambda value: b"data: " + to_json(value) + b"\n\n"  # noqa: E731
    chunk = lambda choice: event({**form.head(form.chunk), "choices": [choice], **none})  # noqa: E731
    try:
        for index in range(len(generations)):
            if first := form.first(index):
                yield chunk(first)
        async for index, piece in pieces.each(len(generations)):
            if piece.error:
                yield b"data: " + error_body(piece.error.status, str(piece.error)) + b"\n\n"
                break
            if piece.text or form.with_logprobs or piece.finish_reason or isinstance(form, Completion):
                yield chunk(form.choice(index, piece, in_stream=True))
        if with_usage:
            yield event({**form.head(form.chunk), "choices": [], "usage": usage(generations, n)})
        yield b"data: [DONE]\n\n"
    finally:
        scheduler.cancel(generations)


# -------------------------------------------------------------------------------------------------- what there is


def describe(batch: Batch, created: int) -> dict[str, Any]:
    """A model, in OpenAI's form and, under "nano", what it is."""
    generator = batch.generator
    config = generator.model.config
    shape = {name: getattr(config, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    nano = {
        **shape,
        "n_expert": config.n_expert,
        "parameters": generator.model.parameter_count(),
        "chat_template": generator.tokenizer.template.name,
        "instruct": generator.instruct,  # whether it was taught to answer
        "adapter": batch.adapter,
        "weights": generator.weights,
    }
    return {"id": batch.name, "object": "model", "created": created, "owned_by": "nano", "nano": nano}


async def models(request: Request) -> Response:
    server = request.app.state.server
    listed = [describe(batch, server.started) for batch in server.batches.values()]
    if name := request.path_params.get("name"):
        server.batch(name)
        return answer(next(model for model in listed if model["id"] == name))
    return answer({"object": "list", "data": listed})


async def tokenize(request: Request) -> Response:
    body = await read_body(request)
    generator = request.app.state.server.batch(body.get("model")).generator

    def prepare() -> dict[str, Any]:
        if body.get("messages") is not None:
            ids = requests.conversation_ids(generator, requests.read_messages(body), body.get("add_generation_prompt"))
        elif body.get("is_chat"):
            question = {"role": "user", "content": requests.read_text(body.get("prompt"), "prompt")}
            ids = requests.conversation_ids(generator, [question], True)
        else:
            ids = requests.text_ids(generator, requests.read_text(body.get("prompt"), "prompt"))
        pieces = requests.token_pieces(generator.tokenizer, ids)
        window = generator.model.config.block_size
        return {"tokens": ids, "pieces": pieces, "count": len(ids), "max_model_len": window}

    return answer(await run_in_threadpool(prepare))


async def inspect(request: Request) -> Response:
    server, body = request.app.state.server, await read_body(request)
    batch = server.batch(body.get("model"))
    ids = requests.read_ids(batch.generator, body.get("tokens"), "tokens")
    position = body.get("position", len(ids) - 1)
    if type(position) is not int or not 0 <= position < len(ids):
        raise BadRequest(f"position must be an integer in 0..{len(ids) - 1}", "position")
    if position >= batch.model.config.block_size:
        raise BadRequest(f"position must be inside the window of {batch.model.config.block_size}", "position")
    job = server.scheduler.between_turns(lambda: inspect_token(batch.model, ids[: position + 1]))
    return answer(await asyncio.wrap_future(job))


async def health(request: Request) -> Response:
    is_ending = request.app.state.server.scheduler.is_draining
    return answer({"status": "ending" if is_ending else "ok"}, 503 if is_ending else 200)


async def metrics(request: Request) -> Response:
    server = request.app.state.server
    return Response(metrics_text(server.batches.values(), server.requests), media_type="text/plain; version=0.0.4")


async def training(request: Request) -> Response:
    return answer({"runs": await run_in_threadpool(request.app.state.server.logs.runs)})


async def curves(request: Request) -> Response:
    server, names = request.app.state.server, request.query_params.getlist("log")
    try:
        async with server.drawing:
            drawn = await run_in_threadpool(server.logs.curves, names)
    except UserError as error:  # a log without a training step, one that is none
        raise BadRequest(str(error), "log") from None
    return Response(drawn, media_type="image/svg+xml")


async def page(request: Request) -> Response:
    """The page and its files: those of its folder that have one of MEDIA_TYPES, by name."""
    name = request.path_params.get("name", "index.html")
    files = {file.relative_to(PAGE).as_posix(): file for file in PAGE.rglob("*") if file.suffix in MEDIA_TYPES}
    if name not in files:
        raise HTTPException(405 if f"/{name}" in {route.path for route in ROUTES} else 404)
    return FileResponse(files[name], media_type=MEDIA_TYPES[files[name].suffix])


# ---------------------------------------------------------------------------------------------------- application


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


ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name}", models),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/inspect", inspect, methods=["POST"]),
    Route("/health", health),
    Route("/metrics", metrics),
    Route("/training", training),
    Route("/training/curves.svg", curves),
    Route("/", page),
    Route("/{name:path}", page),
]


def is_page(path: str) -> bool:
    """Whether a path is one of the page's files, which need no API key."""
    paths = {"/", "/health", *(f"/{file.relative_to(PAGE).as_posix()}" for file in PAGE.rglob("*"))}
    return path in paths


class CountRequests:
    """Counts answers by path and status, around the application."""

    def __init__(self, app: Callable, counts: Counter) -> None:
        self.app, self.counts = app, counts

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        known = {route.path for route in ROUTES}
        path = scope["path"] if scope["path"] in known else "other"

        async def counting(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.counts[path, message["status"]] += 1
            await send(message)

        await self.app(scope, receive, counting)


def make_app(server: Server) -> Callable:
    handlers = {Refused: refuse, HTTPException: refuse_path, ClientDisconnect: gone, Exception: fail}
    app = Starlette(routes=ROUTES, exception_handlers=handlers)
    app.state.server = server
    return CountRequests(app, server.requests)
