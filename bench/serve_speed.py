"""How serve.py does with several clients: tokens per second together and in turn, the first token, memory.

    python bench/serve_speed.py                 10.65M parameters, on as many cores as there are
    python bench/serve_speed.py --only together first memory

The server is a process of its own, the clients are threads of this one; all go through HTTP.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from measuring import ROOT, show

from base.configuration import run_main
from model import GPT, ModelConfig
from text.tokenizer import CharTokenizer
from weights.checkpointing import save_checkpoint

SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65}
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;!?")
CLIENTS, TOKENS, ROUNDS, LOAD, REQUESTS = 16, 64, 3, 8, 2000


class Server:
    """serve.py with an untrained model."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = GPT(ModelConfig(**SHAPE))
        values = {
            "step": 0,
            "model_config": model.config.to_dict(),
            "train_config": {},
            "tokenizer": TOKENIZER.to_dict(),
        }
        none = {"optimizer": {}, "rng": {}, "data": {}, "best_val_loss": 0.0}
        save_checkpoint(folder / "m.pt", {"model": model.state_dict(), **values, **none})
        command = [sys.executable, ROOT / "serve.py", "-m", "m.pt", "--port", "0", "--waiting", "1000"]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline().rsplit(":", 1)[1])

    def complete(self, prompt: str, n_tokens: int, on_first: Callable[[], None] = lambda: None) -> int:
        """Have a text continued; returns the number of tokens. on_first: is called when the first one has come."""
        ends = {str(token): -100 for token in TOKENIZER.stop_tokens}
        body = {"prompt": prompt, "max_tokens": n_tokens, "logit_bias": ends, "seed": 0, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", "/v1/completions", json.dumps(body))
        n = 0
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                on_first() if n == 0 else None
                n += 1
        connection.close()
        return n

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


def prompt(i: int) -> str:
    return f"{chr(97 + i % 26)} question that is about as long as questions are{'.' * (i % 7)}"


def at_once(functions: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def together(server: Server) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """Tokens per second of 16 clients one after another, and together, alternately."""
    speeds = {"one after another": [], "together": []}
    clients = [lambda i=i: server.complete(prompt(i), TOKENS) for i in range(CLIENTS)]
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for client in clients:
            client()
        speeds["one after another"].append(CLIENTS * TOKENS / (time.perf_counter() - start))
        start = time.perf_counter()
        at_once(clients)
        speeds["together"].append(CLIENTS * TOKENS / (time.perf_counter() - start))
    turn, same = (statistics.median(values) for values in speeds.values())
    rows = [("16 clients, tokens/s", f"{turn:,.0f} in turn", f"{same:,.0f} together", f"{same / turn:.1f} x")]
    return rows, {"in_turn": turn, "together": same}


def first(server: Server) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """Seconds to the first token, alone and while 8 answers run."""

    def seconds(i: int) -> float:
        start, came = time.perf_counter(), []
        server.complete(prompt(i), 1, lambda: came.append(time.perf_counter() - start))
        return came[0]

    alone, loaded = [], []
    for round in range(ROUNDS):
        alone += [seconds(i) for i in range(100 * round, 100 * round + 10)]
        running = [threading.Barrier(LOAD + 1)]
        others = [threading.Thread(target=server.complete, args=(prompt(i), 190, running[0].wait)) for i in range(LOAD)]
        for other in others:
            other.start()
        running[0].wait()
        loaded += [seconds(i) for i in range(100 * round + 50, 100 * round + 60)]
        for other in others:
            other.join()
    a, b = 1000 * statistics.median(alone), 1000 * statistics.median(loaded)
    return [("first token, ms", f"{a:.0f} alone", f"{b:.0f} beside 8", f"{b / a:.1f} x")], {"alone": a, "beside_8": b}


def memory(server: Server) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """Memory of the server after the first tenth of many requests, and after all."""
    sizes = []
    for part in range(10):
        requests = iter(range(REQUESTS // 10))
        lock = threading.Lock()

        def client(part=part, requests=requests, lock=lock) -> None:
            while True:
                with lock:
                    i = next(requests, None)
                if i is None:
                    return
                server.complete(prompt(part * 1000 + i), 1 + i % 6)

        at_once([client] * LOAD)
        sizes.append(server.memory())
    start, end = sizes[0] / 1e6, sizes[-1] / 1e6
    rows = [
        (f"memory, MB, {REQUESTS:,} requests", f"{start:.1f} after a tenth", f"{end:.1f}", f"{end / start - 1:+.1%}")
    ]
    return rows, {"start": start, "end": end}


PARTS = {"together": together, "first": first, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    rows, results = [("what", "", "", "ratio")], {}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            server.complete(prompt(0), TOKENS)  # the first request warms up
            for name in args.only:
                more, results[name] = PARTS[name](server)
                rows += more
        finally:
            server.process.kill()
            server.process.wait()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    show(f"serving 10.65M parameters on {cores} cores", rows, results)


if __name__ == "__main__":
    run_main(main)
