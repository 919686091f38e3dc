"""Mutation testing: do the tests notice when the code is wrong? One mistake at a time, and the tests that should fail.

    python bench/mutants.py                                 every mutant of mutants.txt
    python bench/mutants.py text/batches.py "warm-up"       those of a file, or with these words in their mistake
    python bench/mutants.py --out results.jsonl             keeps the results, and goes on where it was ended
    python bench/mutants.py --out results.jsonl --whole     tries the survivors against the whole suite

mutants.txt holds, file by file, a mistake that a person could have made, the text that it replaces (-), the new text
(+) and the tests to try (?). A mutant that the tests fail on is killed, one that they pass on survives. Some cannot be
told from the original by any test; they have the reason (=).
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_name("mutants.txt")
PROCESSES = multiprocessing.get_context("fork")
# what takes seconds to import, once: every mutant's process is forked from this one
PRELOADED = ["torch._dynamo", "torch.nn.attention.flex_attention", "hypothesis", "tqdm", "psutil", "datasketch"]
PRELOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen3", "qwen3_moe")]


class Mutant(NamedTuple):
    file: str
    mistake: str
    old: str
    new: str
    tests: str  # arguments of pytest, the files relative to tests/
    equivalent: str  # why no test can tell; empty: it is to be killed

    @property
    def name(self) -> str:
        return f"{self.file}: {self.mistake}"


def read_mutants(path: Path = TABLE) -> list[Mutant]:
    """The mutants of a table, in order."""
    mutants, file, usual_tests = [], "", ""
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        parts: dict[str, list[str]] = {}
        for line in block.rstrip("\n").split("\n"):
            sign, text = (line[0], line[2:]) if line[:2] in ("- ", "+ ", "? ", "= ", "-", "+") else ("", line)
            parts.setdefault(sign, []).append(text)
        (title,), tests = parts[""], " ".join(parts.get("?", []))
        if title.startswith("== "):
            file, usual_tests = title.removeprefix("== "), tests
            continue
        old, new, reason = ("\n".join(parts.get(sign, [])) for sign in "-+=")
        mutants.append(Mutant(file, title, old, new, tests or usual_tests, reason))
    return mutants


def unmutated(mutants: list[Mutant]) -> list[str]:
    """Arguments of pytest that run all tests of the mutants, each once: one entry a file."""
    words: dict[str, dict[str, None]] = {}
    for mutant in mutants:
        *files, _, chosen = [*shlex.split(mutant.tests), *([] if " -k " in mutant.tests else ["-k", ""])]
        for file in files:
            words.setdefault(file, {})[chosen] = None
    return [
        shlex.join([file] if "" in chosen else [file, "-k", " or ".join(f"({word})" for word in chosen)])
        for file, chosen in words.items()
    ]


def copy_project(folder: Path) -> None:
    """The tracked files, and those that are about to be."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_pytest(folder: Path, tests: str, output: Path) -> None:
    """pytest in this process, on the copy of the project."""
    os.setpgrp()  # so that what the tests start can be ended with them
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder / "tests")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # two mutants of one second have files of the same age
    sys.dont_write_bytecode = True
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "bench")]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), "-c", str(folder / "pytest.ini")]
    sys.exit(pytest.main([*options, *shlex.split(tests)]))


def try_tests(folder: Path, tests: str, seconds: float) -> tuple[str, str]:
    """("survived" or "killed", what killed it); raises ValueError where no test was run."""
    output = folder / "output.txt"
    process = PROCESSES.Process(target=run_pytest, args=(folder, tests, output))
    process.start()
    process.join(seconds)
    is_late = process.is_alive()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()
    said = output.read_text(encoding="utf-8", errors="replace")
    if is_late:
        return "killed", f"longer than {seconds:.0f} s"
    if process.exitcode == pytest.ExitCode.OK:
        return "survived", ""
    if process.exitcode == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ValueError(f"no test is meant by {tests}: {said[-500:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    return "killed", failed[1] if failed else f"exit status {process.exitcode}"


def try_mutant(folder: Path, mutant: Mutant, tests: str, seconds: float) -> tuple[str, str]:
    path = folder / mutant.file
    original = path.read_text(encoding="utf-8")
    if original.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: its text occurs {original.count(mutant.old)} times")
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return try_tests(folder, tests, seconds)
    finally:
        path.write_text(original, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="files, or words of the mistakes [all]")
    parser.add_argument("--out", metavar="FILE", help="results, a JSON line each; those in it are not tried again")
    parser.add_argument("--whole", action="store_true", help="try survivors against the whole suite")
    parser.add_argument("--seconds", type=float, default=300, help="time limit for a mutant's own tests [300]")
    args = parser.parse_args()
    mutants = [m for m in read_mutants() if not args.names or any(name in m.name for name in args.names)]
    results: dict[str, dict[str, str]] = {}
    if args.out and Path(args.out).is_file():
        lines = Path(args.out).read_text(encoding="utf-8").splitlines()
        results = {record["name"]: record for record in map(json.loads, lines)}

    def keep(name: str, tests: str, verdict: str, by: str = "") -> None:
        results[name] = {"name": name, "tests": tests, "verdict": verdict, "by": by}
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(results[name], ensure_ascii=False) + "\n")

    def tell(mutant: Mutant, tests: str, verdict: str, by: str) -> None:
        keep(mutant.name, tests, verdict, by)
        print(f"{verdict:<9} {mutant.name}{' by ' + by if by else ''}", flush=True)

    for module in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="mutants_") as name:
        folder = Path(name)
        copy_project(folder)
        waiting = [m for m in mutants if m.name not in results and not m.equivalent]
        unchecked = [m for m in waiting if f"no mutant: {m.tests}" not in results]
        for tests in unmutated(unchecked):
            verdict, by = try_tests(folder, tests, 3600)
            if verdict != "survived":
                sys.exit(f"the tests fail without any mutant: {tests}: {by}")
        for tests in {mutant.tests for mutant in unchecked}:
            keep(f"no mutant: {tests}", tests, "passed")
        for mutant in waiting:
            tell(mutant, mutant.tests, *try_mutant(folder, mutant, mutant.tests, args.seconds))
        if args.whole:
            alive = [m for m in mutants if results.get(m.name, {}).get("verdict") == "survived"]
            for mutant in alive:
                began = time.perf_counter()
                tell(mutant, "", *try_mutant(folder, mutant, ". --ignore test_mutants.py", 3600))
                print(f"          {time.perf_counter() - began:.0f} s", flush=True)

    tried = [results[m.name]["verdict"] for m in mutants if m.name in results]
    equivalent = sum(bool(m.equivalent) for m in mutants)
    killed = tried.count("killed")
    print(f"{len(mutants)} mutants: {killed} killed, {len(tried) - killed} survived, {equivalent} equivalent")


if __name__ == "__main__":
    main()
