"""The whole way, with torchtune's unmodified recipe: YAML, GSM8K rows, adapter, PEFT."""

import json
import shutil

import pytest
import torch

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.models import lora_phi3
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.proof import load_with_peft
from tests.adapters import load_adapter
from tests.chosen import some
from tests.own import linked
from tests.stock import gsm8k, tiny_checkpoint, tune_run

pytestmark = [pytest.mark.assets, pytest.mark.slow]

RUN = (
    "--config",
    "phi3_mini_lora.yaml",
    "checkpoint_dir=base",
    "dataset.source=rows.jsonl",
    "dtype=fp32",
    "batch_size=2",
    "gradient_accumulation_steps=2",
    "epochs=2",
    "lr_scheduler.num_warmup_steps=3",
    "optimizer.lr=0.01",
    "model.lora_dropout=0.0",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("stock")
    tiny_checkpoint(cwd / "base")
    gsm8k(cwd / "rows.jsonl", 16)
    done = tune_run(*RUN, "output_dir=out", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd


def test_each_epoch_is_a_peft_folder(run):
    assert sorted(p.name for p in (run / "out").glob("epoch_*")) == ["epoch_0", "epoch_1"]
    files = {p.name for p in (run / "out" / "epoch_1").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= files
    assert {"tokenizer.json", "tokenizer_config.json"} <= files
    assert "config.json" not in files  # transformers would take the folder for a whole model
    config = json.loads((run / "out" / "epoch_1" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(TARGETS)


def test_peft_computes_what_our_model_computes(run):
    folder = run / "out" / "epoch_1"
    adapter = load_adapter(folder)
    assert len(adapter) == 2 * 4 * 2
    model = lora_phi3(
        run / "base", list(TARGETS), apply_lora_to_mlp=True, lora_rank=16, lora_alpha=32
    )
    model.load_state_dict({**load_base_weights(run / "base"), **adapter})
    model.eval()
    peft = load_with_peft(run / "base", folder)  # raises on missing or unexpected keys
    batch = torch.randint(0, 32000, (2, 60))
    with torch.no_grad():
        ours, theirs = model(batch), peft(input_ids=batch).logits
        with peft.disable_adapter():
            base = peft(input_ids=batch).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - base).abs().max() > 1e-2  # something was trained


def test_resume_ends_in_the_same_adapter(run, tmp_path):
    linked(run, tmp_path)
    shutil.copytree(run / "out" / "epoch_0", tmp_path / "out" / "epoch_0")
    done = tune_run(*RUN, "output_dir=out", "resume_from_checkpoint=True", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = load_adapter(run / "out" / "epoch_1")
    resumed = load_adapter(tmp_path / "out" / "epoch_1")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_packed_documents_train_like_documents_one_by_one(run, tmp_path):
    """Equal sums over the same documents give equal first losses; nothing leaks across."""
    linked(run, tmp_path)
    gsm8k(tmp_path / "six.jsonl", 6)
    shared = ("dataset.source=six.jsonl", "shuffle=False", "epochs=1", "max_steps_per_epoch=1")
    shared += ("lr_scheduler.num_warmup_steps=0", "gradient_accumulation_steps=1")
    packs = ("dataset.packed=True", "tokenizer.max_seq_len=2048", "batch_size=1")
    losses = []
    for output, settings in (("padded", ("batch_size=6",)), ("packed", packs)):
        done = tune_run(*RUN, *shared, f"output_dir={output}", *settings, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (log,) = (tmp_path / output / "logs").iterdir()
        losses.append(float(log.read_text().split("loss:")[1].split()[0]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    some(
        [
            ("output_dir=out", "OutputError: output_dir: out holds the checkpoints of another run"),
            ("checkpoint_dir=null", "ConfigError: checkpoint_dir is not set"),
            ("dataset.source=null", "dataset.source is not set"),
            ("dataset.source=two.jsonl", "no optimizer step"),
            ("model.lora_attn_modules=[w1]", "'w1' is called 'gate_proj' here"),
        ],
        {("dataset.source=two.jsonl", "no optimizer step")},
    ),
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(setting, message, run):
    gsm8k(run / "two.jsonl", 2)
    before = sorted(run.iterdir())
    done = tune_run(*RUN, "output_dir=new", setting, cwd=run)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(run.iterdir()) == before


def test_fp16_is_refused_with_what_to_use_instead(run):
    done = tune_run(*RUN, "output_dir=new", "dtype=fp16", cwd=run)
    assert done.returncode != 0
    assert "fp16 precision is not supported in this recipe. Please use fp32 or bf16" in done.stderr
    assert not (run / "new").exists()
