"""lm-evaluation-harness scores a model through serve.py as evaluate.py does without a server."""

import json
import os
import random
import subprocess
import sys

import pytest
from conftest import write_jsonl
from servers import make_checkpoint, serving

from evaluation.choices import fit, judge, read_choices, share_right
from serving.text_generator import load_text_generator
from text.tokenizer import BPETokenizer

TASK = """task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: prompts.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: replies
doc_to_target: answer
target_delimiter: ""
"""


@pytest.mark.real("lm-evaluation-harness is a large package, and takes long to import")
def test_lm_evaluation_harness_measures_what_evaluate_measures(work, call):
    pytest.importorskip("lm_eval")
    make_checkpoint(work / "m.pt", "pretrain", BPETokenizer.train(["abc"], 262))  # every byte a token
    assert call("convert.py", "m.pt", "tokenizer/").status == 0
    rng = random.Random(0)
    word = lambda n: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=n))  # noqa: E731
    write_jsonl(
        work / "choices.jsonl",
        [{"question": word(8), "choices": [word(4) for _ in range(4)], "answer": i % 4} for i in range(40)],
    )
    questions, generator = read_choices("choices.jsonl"), load_text_generator("m.pt", "cpu", instruct=False)
    _, likely, _ = judge(generator, questions, {}, is_chat=False)
    accuracy = sum(map(share_right, questions, likely)) / len(questions)

    prompts = []
    for question in questions:
        pairs, *_ = fit(generator, question, [], False, False)
        (context, *_), replies = zip(*[map(generator.tokenizer.decode, pair) for pair in pairs], strict=True)
        prompts.append({"context": context, "replies": replies, "answer": question.answer})
    write_jsonl(work / "prompts.jsonl", prompts)
    (work / "letters.yaml").write_text(TASK)
    with serving(work, "-m", "m.pt") as server:
        args = f"model=m,base_url={server.url}/v1/completions,tokenizer=tokenizer,max_length=128,num_concurrent=4"
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", args]
        command += ["--tasks", "letters", "--include_path", ".", "--output_path", "out", "--log_samples"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "home")}
        done = subprocess.run(command, cwd=work, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = work.glob("out/**/results_*.json")
    assert json.loads(results.read_text())["results"]["letters"]["acc,none"] == pytest.approx(accuracy)
    (samples,) = work.glob("out/**/samples_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        got = [float(pair[0]) / 4 for pair in sample["filtered_resps"]]  # per character of the answer
        assert got == pytest.approx(likely[sample["doc_id"]].tolist(), abs=1e-3)
