"""Every config in config/ is read, and one step of it is run on a narrow model."""

import json

import pytest
from conftest import ROOT

from model import GPT, ModelConfig
from training.config import TrainConfig

PRESETS = [
    path
    for path in sorted((ROOT / "config").glob("*.json"))
    if not path.stem.startswith(("model", "deepspeed"))
    and path.stem not in ("dpo", "distill", "grpo", "sft_lora", "finetune")  # which have tests of their own
]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_one_step_of_every_preset(call, prepared, path):
    stage_data = "sft" if path.stem == "sft" else "pretrain"
    data = [[f"dataset/{stage_data}_train.bin", f"dataset/{stage_data}_val.bin"]]
    values = json.loads(path.read_text(encoding="utf-8"))
    small = ["--n_embd", "32", "--n_layer", "1", "--block_size", "32"]
    small = [*small, *(("--n_head", "4") if "n_head" in values else ())]
    args = ["--dataset_path", json.dumps(data), "--max_steps", "1", "--lr_decay_iters", "1", "--eval_iters", "1"]
    args += ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--device", "cpu", "--from_checkpoint", ""]
    result = call("train.py", "-t", path, *small, *args)
    assert result.status == 0, result.err
    assert (prepared / "checkpoint" / f"{path.stem}.pt").exists()


def test_the_124m_preset_has_124_million_parameters():
    import torch

    values = json.loads((ROOT / "config" / "gpt2_124m.json").read_text(encoding="utf-8"))
    shape = {name: values[name] for name in values if name in ModelConfig.__dataclass_fields__ and name != "dropout"}
    with torch.device("meta"):
        model = GPT(ModelConfig(vocab_size=50257, **shape))
    assert model.parameter_count() == pytest.approx(124e6, rel=0.02)


def test_presets_say_when_they_end():
    for path in PRESETS:
        values = json.loads(path.read_text(encoding="utf-8"))
        fields = {name: value for name, value in values.items() if name in TrainConfig.__dataclass_fields__}
        assert TrainConfig(**fields).max_steps
