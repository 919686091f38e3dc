"""The server's application: OpenAI's API, the page, and what the page shows of a model and of trainings.

app = make_app(Server(batches, Scheduler(batches), logs))     # an ASGI application
"""

import asyncio
import base64
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from base.configuration import UserError
from serving import requests
from serving.completions import chat_completions, completions
from serving.http import ERRORS, Server, answer, read_body, read_conversation
from serving.inspection import inspect_token
from serving.metrics import metrics_text
from serving.requests import BadRequest
from serving.scheduler import Batch
from vision.images import to_png

PAGE = Path(__file__).parent.parent / "page"
MEDIA_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
}


def describe(batch: Batch, server: Server) -> dict[str, Any]:
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
        "stop_tokens": list(generator.tokenizer.stop_tokens),
        "image_size": config.image_size,  # 0: a model of text alone
        "max_image_bytes": server.max_image_bytes if config.image_size else 0,
    }
    return {"id": batch.name, "object": "model", "created": server.started, "owned_by": "nano", "nano": nano}


async def models(request: Request) -> Response:
    server = request.app.state.server
    listed = [describe(batch, server) for batch in server.batches.values()]
    if name := request.path_params.get("name"):
        server.batch(name)
        return answer(next(model for model in listed if model["id"] == name))
    return answer({"object": "list", "data": listed})


async def tokenize(request: Request) -> Response:
    server, body = request.app.state.server, await read_body(request)
    batch = server.batch(body.get("model"))
    generator = batch.generator
    messages = [] if body.get("messages") is None else await read_conversation(server, batch, body)

    def prepare() -> dict[str, Any]:
        fields = requests.read_fields(requests.TOKENIZE_FIELDS, body)
        if messages:
            ids = requests.conversation_ids(generator, messages, fields.add_generation_prompt)
        elif fields.is_chat:
            question = {"role": "user", "content": requests.read_text(body.get("prompt"), "prompt")}
            ids = requests.conversation_ids(generator, [question], True)
        else:
            ids = requests.text_ids(generator, requests.read_text(body.get("prompt"), "prompt"))
        pieces = requests.token_pieces(generator.tokenizer, ids)
        window = generator.model.config.block_size
        read = {"tokens": ids, "pieces": pieces, "count": len(ids), "max_model_len": window}
        if (image := requests.image_among(messages, ids, generator)) is not None:
            read["image"] = f"data:image/png;base64,{base64.b64encode(to_png(image)).decode()}"
        return read

    return answer(await run_in_threadpool(prepare))


async def inspect(request: Request) -> Response:
    server, body = request.app.state.server, await read_body(request)
    batch = server.batch(body.get("model"))
    tokens, config = body.get("tokens"), batch.model.config
    if config.image_size and isinstance(tokens, list) and config.vocab_size in tokens:
        raise BadRequest("tokens: those of an image cannot be looked into, as the request has no image", "tokens")
    ids = requests.read_ids(batch.generator, tokens, "tokens")
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
    app = Starlette(routes=ROUTES, exception_handlers=ERRORS)
    app.state.server = server
    return CountRequests(app, server.requests)
