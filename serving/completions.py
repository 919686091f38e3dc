"""The two kinds of completions: a request becomes answers of the scheduler, and these a reply, whole or in a stream."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from serving import requests
from serving.answers import Chat, Completion, to_json, usage
from serving.guard import error_body
from serving.http import answer, read_body, read_conversation
from serving.requests import BadRequest
from serving.scheduler import Batch, Generation, Piece, Scheduler


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
    messages = await read_conversation(server, batch, body)
    del body["messages"]  # with an image it is large, and an answer takes long

    def prepare() -> tuple[list[Generation], SimpleNamespace]:
        fields = requests.read_fields(requests.CHAT_FIELDS, body)
        if fields.top_logprobs and not fields.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        if fields.max_completion_tokens is not None:
            fields.max_tokens = fields.max_completion_tokens
        if fields.max_tokens == 0:
            raise BadRequest("max_tokens must be at least 1", "max_tokens")
        begun = requests.read_begun(batch.generator, body)
        ids = requests.chat_prompt(batch.generator, messages, fields.continue_final_message, begun)
        found = requests.generations([ids], fields, body, batch.generator, "messages", pieces.deliver)
        for generation in found:
            generation.n_logprobs = fields.top_logprobs if fields.logprobs else None
            generation.begun = begun
            generation.image = requests.image_among(messages, ids, batch.generator)
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
        if fields.echo and fields.logprobs is not None and batch.model.config.mask_token:
            raise BadRequest("echo with logprobs: masked diffusion predicts no token from those before it", "echo")
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
            one.text, one.finish_reason, one.stop_token = one.text + piece.text, piece.finish_reason, piece.stop_token
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
