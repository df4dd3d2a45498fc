"""torchtune's recipes that train all weights: a Hugging Face checkpoint, or a refusal at once."""

import shutil

import pytest
import torch

from phi3_plugin.checkpoint.base import load_base_weights
from tests.stock import check_checkpoint, gsm8k, tiny_checkpoint, tune_run

pytestmark = [pytest.mark.assets, pytest.mark.slow]

YAML = """
checkpoint_dir: base
output_dir: out
model: {_component_: phi3_plugin.models.phi3, checkpoint_dir: base}
tokenizer: {_component_: phi3_plugin.data.phi3_tokenizer, path: base, max_seq_len: 128}
dataset: {_component_: phi3_plugin.data.chat_dataset, source: rows.jsonl}
checkpointer:
  _component_: phi3_plugin.checkpoint.Phi3Checkpointer
  checkpoint_dir: base
  checkpoint_files:
    [model-00001-of-00003.safetensors, model-00002-of-00003.safetensors,
     model-00003-of-00003.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: PHI3_MINI
resume_from_checkpoint: false
optimizer: {_component_: torch.optim.AdamW, lr: 1e-3}
optimizer_in_bwd: false
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
metric_logger: {_component_: phi3_plugin.train.DiskLogger, output_dir: "${output_dir}"}
batch_size: 2
gradient_accumulation_steps: 1
epochs: 2
max_steps_per_epoch: 2
shuffle: true
seed: 0
clip_grad_norm: null
compile: false
device: cpu
dtype: fp32
log_peak_memory_stats: false
enable_activation_checkpointing: false
"""


@pytest.fixture
def cwd(tmp_path):
    tiny_checkpoint(tmp_path / "base")
    gsm8k(tmp_path / "rows.jsonl", 12)
    (tmp_path / "stock.yaml").write_text(YAML, encoding="utf-8")
    return tmp_path


def test_full_fine_tuning_writes_checkpoints_and_resumes(cwd):
    run = ("--config", "stock.yaml")
    done = tune_run(*run, cwd=cwd, recipe="full_finetune_single_device")
    assert done.returncode == 0, done.stderr
    whole = cwd / "out" / "epoch_1"
    check_checkpoint(whole, cwd / "base", torch.randint(0, 32000, (2, 30)))
    (cwd / "out").rename(cwd / "whole")
    shutil.copytree(cwd / "whole" / "epoch_0", cwd / "out" / "epoch_0")
    resume = "resume_from_checkpoint=True"
    done = tune_run(*run, resume, cwd=cwd, recipe="full_finetune_single_device")
    assert done.returncode == 0, done.stderr
    expected, again = (load_base_weights(cwd / o / "epoch_1") for o in ("whole", "out"))
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())
