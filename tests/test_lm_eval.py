"""lm-evaluation-harness scores a model through serve.py as the model itself does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import write_jsonl
from servers import TOKENIZER, make_checkpoint, serving

TASK = """task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
"""


@pytest.mark.real("lm-evaluation-harness is a large package, and takes long to import")
def test_lm_evaluation_harness_measures_the_accuracy_that_the_model_has(work, call):
    pytest.importorskip("lm_eval")
    model = make_checkpoint(work / "m.pt", "pretrain")
    assert call("convert.py", "m.pt", "tokenizer/").status == 0
    generator = torch.Generator().manual_seed(0)
    word = lambda n: TOKENIZER.decode(torch.randint(13, 38, (n,), generator=generator).numpy())  # noqa: E731
    questions = [{"question": word(8), "choices": [word(4) for _ in range(4)], "right": i % 4} for i in range(40)]
    write_jsonl(work / "questions.jsonl", questions)
    (work / "letters.yaml").write_text(TASK)

    def score(question: str, choice: str) -> float:
        ids = torch.tensor([TOKENIZER.encode(question + choice).tolist()])
        logprobs = model(ids)[0][0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
        return logprobs[len(question) - 1 :].sum().item()

    scores = [[score(question["question"], choice) for choice in question["choices"]] for question in questions]
    chosen = [max(range(4), key=row.__getitem__) for row in scores]
    accuracy = sum(choice == question["right"] for choice, question in zip(chosen, questions, strict=True)) / 40
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
        got = [float(pair[0]) for pair in sample["filtered_resps"]]
        assert got == pytest.approx(scores[sample["doc_id"]], abs=1e-3)
