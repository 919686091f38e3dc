"""A real serve.py for the tests: checkpoints to talk to, a process that listens, and plain requests to it."""

import http.client
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from conftest import start_script
from other_programs import make_model

from model import GPT
from text.tokenizer import CharTokenizer, Tokenizer
from weights.checkpointing import save_checkpoint

CHARACTERS = "\n .,?!abcdefghijklmnopqrstuvwxyz你好"
TOKENIZER = CharTokenizer(CHARACTERS)


def make_checkpoint(path: Path, stage: str = "sft", tokenizer: Tokenizer = TOKENIZER, **shape) -> GPT:
    """A checkpoint of an untrained model with large weights; returns the model."""
    model = make_model(tokenizer.vocab_size, **{"block_size": 128, **shape})
    values = {
        "model": model.state_dict(),
        "optimizer": {},
        "step": 1,
        "model_config": model.config.to_dict(),
        "train_config": {"stage": stage},
        "tokenizer": tokenizer.to_dict(),
        "rng": {},
        "data": {},
        "best_val_loss": 1.0,
    }
    save_checkpoint(path, values)
    return model


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


class RunningServer:
    """A serve.py that listens."""

    def __init__(self, process: subprocess.Popen, url: str) -> None:
        self.process, self.url = process, url
        self.port = int(url.rsplit(":", 1)[1])

    def ask(self, method: str, path: str, body: bytes | dict | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, data, named)
            reply = connection.getresponse()
            return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def post(self, path: str, **body) -> Answer:
        return self.ask("POST", path, body)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, **headers)

    def client(self):
        """OpenAI's own client of it; needs that package."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def number(self, metric: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.get("/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == metric)


@contextmanager
def serving(folder: Path, *argv: str) -> Iterator[RunningServer]:
    """serve.py in a process of its own, in a folder, at a free port."""
    process = start_script("serve.py", "--port", "0", "--device", "cpu", *argv, cwd=folder)
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), process.communicate(timeout=10)[1]
        yield RunningServer(process, url)
    finally:
        process.kill()
        process.communicate()
