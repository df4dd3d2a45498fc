"""The recipe on checkpoints with LongRoPE, partial rotation, grouped heads and a tied head."""

import json

import pytest
import torch

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.checkpoint.check import load_base_with_hf
from phi3_plugin.checkpoint.peft import load_adapter
from tests.chosen import some
from tests.oracles import hf_model
from tests.own import (
    TINY,
    VARIANTS,
    finished,
    full_config,
    losses,
    own_run,
    peft_agrees,
    same_losses,
    same_weights,
    tiny_inputs,
)

pytestmark = pytest.mark.slow

LIKE = {
    "3.5-mini": {"sliding_window": 262144},
    "phi-4-mini": {
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module", params=some(LIKE, quick={"phi-4-mini"}))
def inputs(request, tmp_path_factory):
    folder = tiny_inputs(tmp_path_factory.mktemp("inputs"), rows=11)
    full_config(folder)
    file = folder / "base" / "config.json"
    keys = {**json.loads(file.read_text()), **LIKE[request.param]}
    width = keys["hidden_size"] // keys["num_attention_heads"]
    pairs = int(width * keys.get("partial_rotary_factor", 1.0)) // 2
    # The rows have 8 to 22 tokens: some turn by the long factors and some do not.
    keys["original_max_position_embeddings"] = 16
    keys["rope_scaling"] = {
        "type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(pairs)],
        "long_factor": [1.0 + 0.3 * i for i in range(pairs)],
    }
    for old in (folder / "base").glob("model*"):
        old.unlink()
    hf_model(keys, std=0.04).save_pretrained(folder / "base")
    file.write_text(json.dumps(keys))
    return folder


@pytest.fixture
def cwd(inputs, tmp_path):
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def both(cwd, settings, **config):
    """Train on one process and on two; return the folders."""
    one = ("batch_size=1", "gradient_accumulation_steps=4", "output_dir=one")
    alone = finished(*settings, *one, cwd=cwd, **config)
    two = ("batch_size=1", "gradient_accumulation_steps=2", "output_dir=two")
    own = ("--config", str(config["config"])) if config else ()
    done = own_run(*own, *settings, *two, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    same_losses(losses(alone), losses(cwd / "two"))
    return alone, cwd / "two"


@pytest.mark.parametrize("variant", some(VARIANTS, quick={}))
def test_adapters_train_alike_on_one_process_and_two_and_peft_agrees(variant, cwd):
    recompute = f"enable_activation_checkpointing={variant == 'qlora'}"
    one, two = both(cwd, (*TINY, *VARIANTS[variant], recompute, "epochs=2"))
    same_weights(load_adapter(two / "final"), load_adapter(one / "final"))
    peft_agrees(cwd, two / "final", dora="dora" in variant, quantized="q" in variant)


@pytest.mark.exhaustive
def test_all_weights_do_too(cwd):
    settings = [s for s in TINY if "lora" not in s] + ["epochs=2"]
    one, two = both(cwd, settings, config=cwd / "full.yaml")
    weights = load_base_weights(one / "final")
    same_weights(load_base_weights(two / "final"), weights)
    moved = load_base_with_hf(one / "final").state_dict()
    before = load_base_with_hf(cwd / "base").state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in moved.items())


def test_fixed_factors_are_trained_with(cwd):
    runs = [
        finished(
            *TINY, "batch_size=1", f"model.rope_factors={factors}", f"output_dir={factors}", cwd=cwd
        )
        for factors in ("auto", "short", "long")
    ]
    auto, short, long = (losses(run) for run in runs)
    assert short != auto != long != short
