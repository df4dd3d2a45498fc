"""What torchtune's own recipe takes of our newer keys, and what it refuses by name."""

import pytest
import torch

from phi3_plugin.proof import load_with_peft
from tests.adapters import load_adapter
from tests.own import TINY, tiny_inputs
from tests.stock import tune_run

pytestmark = pytest.mark.slow


@pytest.fixture
def cwd(tmp_path):
    return tiny_inputs(tmp_path, 8)


def test_keys_that_it_cannot_save_are_one_error_before_training(cwd):
    keys = ("model.use_rslora=True", "model.lora_init=pissa", "model.modules_to_save=[lm_head]")
    done = tune_run("--config", "phi3_mini_lora", *TINY, *keys, "output_dir=out", cwd=cwd)
    assert done.returncode != 0
    for key in ("use_rslora: True", "modules_to_save: ['lm_head']", "lora_init: 'pissa'"):
        assert f"{key} is not supported by torchtune's recipes" in done.stderr, done.stderr
    assert not (cwd / "out" / "epoch_0").exists()


def test_layers_and_a_gaussian_start_are_its_too(cwd):
    keys = ("model.layers_to_transform=[1]", "model.lora_init=gaussian", "optimizer.lr=5e-3")
    sizes = ("batch_size=2", "gradient_accumulation_steps=1")
    done = tune_run("--config", "phi3_mini_lora", *TINY, *keys, *sizes, "output_dir=out", cwd=cwd)
    assert done.returncode == 0, done.stderr
    adapter = load_adapter(cwd / "out" / "epoch_0")
    assert all(name.startswith("layers.1.") for name in adapter)
    peft = load_with_peft(cwd / "base", cwd / "out" / "epoch_0")
    with torch.no_grad():
        assert torch.isfinite(peft(input_ids=torch.arange(9)[None]).logits).all()
