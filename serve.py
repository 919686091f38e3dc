"""Talk to checkpoints in a browser, or from any program that knows OpenAI's API; several people at once.

python serve.py -m checkpoint/sft.pt                        prints the address of the page; Ctrl-C ends it
python serve.py -m sft -m pretrain --lora checkpoint/sft_lora.pt        several models, and an adapter of one of them
python serve.py -m sft --host 0.0.0.0 --api_key SECRET      for other machines, too; without --api_key one is made up
curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "hello"}]}'

It needs starlette and uvicorn (pip install -r requirements-serve.txt). docs/serve.md lists what can be asked for.
"""

import errno
import logging
import os
import re
import secrets
import socket
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from base.configuration import Parser, UserError, escape_control_characters, run_main
from plot_loss import svg
from serving.denoising import DenoisingBatch
from serving.scheduler import Batch, Scheduler
from serving.text_generator import TextGenerator, load_text_generator
from serving.training_logs import TrainingLogs
from weights.checkpointing import find_checkpoint
from weights.quantise import KINDS

KEEP_ALIVE_SECONDS = 30  # that a connection may stay open between two requests
LARGE_CACHE = 1 << 30  # bytes that are worth a line
TEXT_BODY, IMAGE_BODY = 1 << 20, 12 << 20  # bytes of a request; the second has room for a photo of 9 MB, in base64
LOCAL = ("127.0.0.1", "localhost", "::1")


def tell(message: str) -> None:
    print(escape_control_characters(message), file=sys.stderr, flush=True)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    repeated = {"action": "append", "default": []}
    parser.add_argument(
        "-m", "--model", metavar="FILE", **repeated, help="checkpoint; repeat for several [checkpoint/sft.pt]"
    )
    parser.add_argument("--lora", metavar="FILE", **repeated, help="an adapter of one of the models, by its own name")
    parser.add_argument("--weights", choices=("auto", *KINDS), default="float32", help="as of inference.py [float32]")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    network = parser.add_argument_group("Network")
    network.add_argument("--port", metavar="N", type=int, default=8000, help="0: any that is free [8000]")
    network.add_argument("--host", metavar="NAME", default=LOCAL[0], help="address to listen at [this machine alone]")
    network.add_argument(
        "--api_key", metavar="TEXT", help="requests need it, as a bearer token [none; random for --host]"
    )
    network.add_argument("--allow_host", metavar="NAME", **repeated, help="another name that this machine is called by")
    network.add_argument("--cors", metavar="ORIGIN", **repeated, help="pages of this origin may ask, too")
    limits = parser.add_argument_group("Limits")
    limits.add_argument("--rows", metavar="N", type=int, default=16, help="answers generated together, per model [16]")
    limits.add_argument("--waiting", metavar="N", type=int, default=64, help="answers that may wait, per model [64]")
    limits.add_argument("--seconds", metavar="N", type=int, default=300, help="that an answer may take [300]")
    limits.add_argument("--max_body", metavar="BYTES", type=int, help="of a request [1 MiB; where a model sees, 12]")
    return parser


def check_arguments(args: Namespace) -> None:
    """Raises UserError for what the server could not start with."""
    key = args.api_key or ""
    origin = next((text for text in args.cors if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*A-Z]+", text)), None)
    is_key = key.isascii() and key.isprintable() and "" != key == key.strip()
    rules = {
        "port": (args.port, 0 <= args.port < 1 << 16, "0 to 65535"),
        "rows": (args.rows, 1 <= args.rows <= 1024, "1 to 1024"),
        "waiting": (args.waiting, args.waiting >= 0, "at least 0"),
        "seconds": (args.seconds, args.seconds >= 1, "at least 1"),
        "max_body": (args.max_body, args.max_body is None or args.max_body >= 1024, "at least 1024"),
        "cors": (origin, origin is None, "as browsers send it: http://name.example:8080, no path, no capitals"),
        "api_key": (args.api_key, args.api_key is None or is_key, "letters, digits and signs of ASCII without spaces"),
    }
    for name, (value, holds, rule) in rules.items():
        if not holds:
            raise UserError(f"command line: --{name} must be {rule}, got {value!r}")


def load_models(args: Namespace) -> dict[str, Batch]:
    """The models to talk to, by name: the checkpoints', then the adapters' on the model that each was trained on."""
    paths = args.model or ["checkpoint/sft.pt"]
    loaded: dict[str, tuple[TextGenerator, str | None]] = {}
    for path in paths:
        add_model(loaded, path, (load_text_generator(path, args.device, None, weights=args.weights), None))
    for path in args.lora:
        add_model(loaded, path, (load_adapted(path, paths, args), Path(path).stem))
    limits = {"n_rows": args.rows, "max_waiting": args.waiting, "seconds": args.seconds}
    makers = {True: DenoisingBatch, False: Batch}
    return {
        name: makers[generator.model.config.mask_token](name, generator, adapter=adapter, **limits)
        for name, (generator, adapter) in loaded.items()
    }


def add_model(loaded: dict[str, Any], path: str, model: tuple[TextGenerator, str | None]) -> None:
    name = find_checkpoint(path).stem
    if name in loaded:
        raise UserError(f"command line: two models are named {name} (a model's name is its file's)")
    loaded[name] = model


def load_adapted(path: str, models: list[str], args: Namespace) -> TextGenerator:
    """The model of an adapter, which is one of these, with it; raises UserError if it fits none."""
    refusals = []
    for model in models:
        try:
            return load_text_generator(model, args.device, None, adapter=path, weights=args.weights)
        except UserError as error:
            refusals.append(str(error))
    raise UserError(refusals[0] if len(models) == 1 else f"{path}: an adapter of none of the models: {refusals[0]}")


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        is_system = error.errno is not None and error.errno > 0  # and not of the look-up of a name
        reason = os.strerror(error.errno) if is_system else error.strerror or str(error)
        hint = "; --port 0 finds a free one" if error.errno == errno.EADDRINUSE else ""
        raise UserError(f"cannot listen at {host}:{port}: {reason}{hint}") from None


def make_server(app: Any, scheduler: Scheduler) -> Any:
    """uvicorn's server; a signal first lets the answers that run end, a second one ends them."""
    import uvicorn

    from serving.guard import MAX_HEADER_BYTES, BoundedProtocol

    class Server(uvicorn.Server):
        def handle_exit(self, number: int, frame: Any) -> None:
            if scheduler.is_draining:
                self.force_exit = True
                self.should_exit = True
            scheduler.is_draining = True
            tell("ending: running answers are finished, new ones refused (again: at once)")

        async def on_tick(self, counter: int) -> bool:
            if scheduler.is_draining and scheduler.is_idle:
                self.should_exit = True
            return await super().on_tick(counter)

    return Server(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_level=logging.ERROR,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=10,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
    )


def main() -> None:
    args, _ = make_parser().parse()
    check_arguments(args)
    try:
        from serving import api, guard, http
    except ImportError as error:
        name = (error.name or "").split(".")[0]
        if name not in ("starlette", "uvicorn", "h11", "anyio"):
            raise
        raise UserError(f"{name} is not installed: pip install -r requirements-serve.txt") from None
    with listen(args.host, args.port) as sock:
        batches = load_models(args)
        key = args.api_key or ("" if args.host in LOCAL else secrets.token_urlsafe(24))
        scheduler, logs = Scheduler(list(batches.values())), TrainingLogs(Path(), svg)
        sees = any(batch.model.vision is not None for batch in batches.values())
        max_body = args.max_body or (IMAGE_BODY if sees else TEXT_BODY)
        server = http.Server(batches, scheduler, logs, max_body, int(time.time()))
        app = guard.protect(api.make_app(server), [args.host, *args.allow_host], args.cors, key, api.is_page)
        tell(f"models: {', '.join(batches)}")
        size = sum(batch.rows.memory() for batch in batches.values())
        if size > LARGE_CACHE:
            tell(f"their key/value caches take {size / 1e9:.1f} GB for {args.rows} rows each; --rows N takes less")
        if key and not args.api_key:
            tell(f"API key, made up: {key}")
        shown = LOCAL[0] if args.host in ("0.0.0.0", "::") else args.host
        print(f"http://{f'[{shown}]' if ':' in shown else shown}:{sock.getsockname()[1]}", flush=True)
        make_server(app, scheduler).run(sockets=[sock])
    scheduler.stop()


if __name__ == "__main__":
    run_main(main)
