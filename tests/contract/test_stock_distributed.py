"""torchtune's unmodified distributed recipe: two processes, sharded, resumed, loaded by PEFT."""

import shutil
from pathlib import Path

import pytest
import torch

from phi3_plugin.models import lora_phi3
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.proof import load_with_peft
from tests.adapters import load_adapter
from tests.chosen import some
from tests.own import linked, tiny_inputs
from tests.stock import torchrun_stock

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "phi3_mini_lora.yaml"
RUN = (
    "--config",
    str(CONFIG),
    "checkpoint_dir=base",
    "output_dir=out",
    "dataset.source=rows.jsonl",
    "dtype=fp32",
    "batch_size=2",
    "gradient_accumulation_steps=2",
    "epochs=2",
    "lr_scheduler.num_warmup_steps=2",
    "optimizer.lr=0.01",
    "model.lora_dropout=0.0",
    "tokenizer.max_seq_len=128",
)
VARIANTS = {
    "lora": (),
    "qlora": ("model.quantize_base=True",),
    "dora": ("model.use_dora=True",),
    "qdora": ("model.quantize_base=True", "model.use_dora=True"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_inputs(tmp_path_factory.mktemp("inputs"), 16)


def run(inputs, cwd, *settings):
    linked(inputs, cwd)
    done = torchrun_stock(*RUN, *settings, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return cwd / "out"


@pytest.mark.parametrize("variant", some(VARIANTS, quick={"qdora"}))
def test_two_processes_resume_and_peft(variant, inputs, tmp_path):
    settings = VARIANTS[variant]
    out = run(inputs, tmp_path / "whole", *settings)

    stopped = tmp_path / "stopped"
    shutil.copytree(out / "epoch_0", stopped / "out" / "epoch_0")
    resumed = run(inputs, stopped, *settings, "resume_from_checkpoint=True")
    expected, again = load_adapter(out / "epoch_1"), load_adapter(resumed / "epoch_1")
    assert again.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=name)

    peft_equals_ours(inputs / "base", out / "epoch_1", "dora" in variant, "q" in variant)


def peft_equals_ours(base, folder, dora, quantized):
    """Compare logits; PEFT's base gets our dequantized weights where ours are NF4."""
    from phi3_plugin.checkpoint.base import load_base_weights, to_hf

    targets = list(TARGETS)
    keys = {"lora_rank": 16, "lora_alpha": 32, "use_dora": dora, "quantize_base": quantized}
    ours = lora_phi3(base, targets, True, **keys).eval()
    ours.load_state_dict({**load_base_weights(base), **load_adapter(folder)})
    peft = load_with_peft(base, folder)
    weights = {n: v for n, v in ours.state_dict().items() if "lora" not in n and "magn" not in n}
    hf = peft.get_base_model().state_dict()
    for name, value in weights.items():
        module = to_hf(name).removesuffix(".weight")
        places = [f"{module}.base_layer.weight", f"{module}.weight"]
        hf[next(place for place in places if place in hf)].copy_(value)
    batch = torch.randint(0, 400, (2, 30))
    with torch.no_grad():
        theirs = peft(input_ids=batch).logits
        torch.testing.assert_close(ours(batch), theirs, rtol=0, atol=1e-5)
