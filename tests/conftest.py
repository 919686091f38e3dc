"""What the tests share: a folder to work in, scripts called as a user calls them, and a tiny corpus."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import train
from base.configuration import run_main
from training.setup import RunConfig, read_configs

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
TINY = ["--n_layer", "2", "--n_head", "2", "--n_embd", "16", "--block_size", "16"]
FAST = ["--batch_size", "4", "--gradient_accumulation_steps", "2", "--device", "cpu", "--warmup_iters", "2"]
DATA = ["--dataset_path", '[["dataset/pretrain_train.bin", "dataset/pretrain_val.bin"]]']


class Result(NamedTuple):
    status: int
    out: str
    err: str


os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads would only wait for each other
torch.set_num_threads(1)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder, with the project's configs found beside the scripts."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(work, monkeypatch, capsys):
    """Run a script's main() in this process: call("data.py", "text.txt") -> Result(status, out, err)."""

    def calling(script: str, *argv: str) -> Result:
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        monkeypatch.setattr(sys.modules["__main__"], "__doc__", module.__doc__)
        capsys.readouterr()
        status = 0
        message = ""
        try:
            run_main(module.main)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            message = f"{end.code}\n" if isinstance(end.code, str) else ""
        out, err = capsys.readouterr()
        return Result(status, out, err + message)

    return calling


@pytest.fixture(scope="module")
def browser():
    """A real Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def asked_by(*argv: str) -> RunConfig:
    """What a command line of train.py asks for."""
    args, overrides = train.make_parser().parse(list(argv))
    return read_configs(args.training, args.model, overrides)


def default_signals() -> None:
    """Signals as a terminal's shell leaves them; under nohup, or in the background, children would ignore some."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def start_script(script: str, *argv: str, cwd: Path, **options) -> subprocess.Popen:
    """Start a script as a process of its own, as a user would."""
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, argv)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        preexec_fn=default_signals,
        **options,
    )


def run_script(script: str, *argv: str, cwd: Path, stdin: str | None = None) -> Result:
    process = start_script(script, *argv, cwd=cwd, stdin=subprocess.PIPE)
    out, err = process.communicate(stdin, timeout=300)
    return Result(process.returncode, out, err)


def is_harmless(c: str) -> bool:
    """What may go to a terminal, by Unicode's tables: no control, separator, reordering, lone surrogate, tag."""
    reorders = unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    is_control = unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
    return c in "\n\t" or not (is_control or reorders or 0xE0000 <= ord(c) < 0xE0080)


def make_text(n_characters: int = 6000, seed: int = 0) -> str:
    rng = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "你好", "世界", "éclair", "🙂"]
    text = ""
    while len(text) < n_characters:
        text += rng.choice(words) + rng.choice([" ", " ", ", ", ".\n"])
    return text[:n_characters]


def make_samples(n: int = 60, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [{"question": f"q{i} " + "a" * rng.randint(0, 5), "answer": "b" * rng.randint(1, 4)} for i in range(n)]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def prepared(work, call):
    """A working folder in which data.py has prepared a tiny corpus for both stages."""
    (work / "dataset").mkdir()
    (work / "dataset" / "pretrain.txt").write_text(make_text(), encoding="utf-8")
    write_jsonl(work / "dataset" / "sft.jsonl", make_samples())
    assert call("data.py", "--block_size", "16").status == 0
    return work


def read_log(path: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["type"] == kind]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="10,000 mutated files, 10,000 training steps")
    parser.addoption("--real", action="store_true", help="only the tests that take minutes each (marked real)")


def pytest_configure(config):
    config.addinivalue_line("markers", "real(why): takes minutes; runs with --real alone, which is `make test-real`")


def pytest_collection_modifyitems(config, items):
    """With --real those that are marked so, else the others."""
    real = [item for item in items if item.get_closest_marker("real")]
    if config.getoption("--real"):
        config.hook.pytest_deselected(items=[item for item in items if item not in real])
        items[:] = real
        return
    for item in real:
        item.add_marker(pytest.mark.skip(reason=f"{item.get_closest_marker('real').args[0]}: --real"))


@pytest.fixture
def long(request) -> bool:
    return request.config.getoption("--long")
