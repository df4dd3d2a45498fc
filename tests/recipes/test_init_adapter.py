"""Training goes on from an adapter of somebody's, if the model's keys are those that it fits."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from phi3_plugin.checkpoint.check import load_base_with_hf, load_with_peft
from phi3_plugin.errors import AdapterError, ConfigError, Phi3Error
from phi3_plugin.models.lora_settings import TARGETS
from tests.chosen import some
from tests.own import BATCH, TINY, full_config, logits, started

pytestmark = pytest.mark.slow


def foreign(cwd, **keys):
    """Write an adapter as PEFT makes one, with random weights."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 10, "target_modules": list(TARGETS), **keys}
    model = get_peft_model(load_base_with_hf(cwd / "base"), LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.05)
        expected = model(input_ids=BATCH).logits
    model.save_pretrained(cwd / "theirs")
    return expected


FOREIGN = {
    "ranks": (
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
        ["model.rank_pattern={o_proj: 2}", "model.alpha_pattern={o_proj: 10, 1.down_proj: 3}"],
    ),
    "rslora": ({"use_rslora": True}, ["model.use_rslora=True"]),
    "dora": ({"use_dora": True, "layers_to_transform": [0]}, ["model.use_dora=True"]),
    "whole": ({"modules_to_save": ["lm_head"]}, ["model.modules_to_save=[lm_head]"]),
}


@pytest.mark.parametrize("kind", some(FOREIGN, ["ranks", "dora"]))
def test_training_goes_on_from_somebodys_adapter(kind, cwd):
    theirs, keys = FOREIGN[kind]
    expected = foreign(cwd, **theirs)
    layers = ["model.layers_to_transform=[0]"] if kind == "dora" else []
    ours = [*keys, *layers, "model.lora_rank=4", "model.lora_alpha=10"]
    run = (*TINY, *ours, "output_dir=out", f"init_adapter={cwd / 'theirs'}")
    with started(*run, "max_steps=2", cwd=cwd) as recipe:
        torch.testing.assert_close(logits(recipe), expected, rtol=0, atol=2e-5)
        recipe.train()
        recipe.finish()
    peft = load_with_peft(cwd / "base", cwd / "out" / "final")
    with torch.no_grad():
        theirs = peft(input_ids=BATCH).logits
    torch.testing.assert_close(logits(recipe), theirs, rtol=0, atol=2e-5)


def test_keys_that_do_not_fit_are_told_with_those_that_do(cwd):
    keys = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
    expected = foreign(cwd, **keys, use_dora=True)
    run = (*TINY, "output_dir=out", f"init_adapter={cwd / 'theirs'}")
    with (
        pytest.raises(AdapterError, match=r"does not fit the model's keys\. These would") as caught,
        started(*run, cwd=cwd),
    ):
        pass
    told = re.findall(r"model\.\S+=.*", str(caught.value))
    assert {line.partition("=")[0] for line in told} == {
        "model.lora_rank",
        "model.lora_alpha",
        "model.rank_pattern",
        "model.alpha_pattern",
        "model.use_dora",
    }
    with started(*run, *(line.replace("'", "") for line in told), cwd=cwd) as recipe:
        torch.testing.assert_close(logits(recipe), expected, rtol=0, atol=2e-5)


def test_a_pattern_that_the_adapter_does_not_have_is_told_to_be_removed(cwd):
    expected = foreign(cwd)
    ours = ("model.lora_rank=4", "model.lora_alpha=10", "model.rank_pattern={o_proj: 2}")
    run = (*TINY, *ours, "output_dir=out", f"init_adapter={cwd / 'theirs'}")
    with (
        pytest.raises(AdapterError, match=r"would fit:\n  model\.rank_pattern=null$"),
        started(*run, cwd=cwd),
    ):
        pass
    with started(*run, "model.rank_pattern=null", cwd=cwd) as recipe:
        torch.testing.assert_close(logits(recipe), expected, rtol=0, atol=2e-5)


def test_a_part_of_a_pattern_that_must_go_is_named(cwd):
    foreign(cwd, rank_pattern={"o_proj": 2})
    ours = ("model.lora_rank=4", "model.lora_alpha=10", "model.alpha_pattern={o_proj: 10}")
    ranks = "model.rank_pattern={o_proj: 2, qkv_proj: 3}"
    run = (*TINY, *ours, ranks, "output_dir=out", f"init_adapter={cwd / 'theirs'}")
    match = r"remove from the YAML what is not there: rank_pattern\.qkv_proj$"
    with pytest.raises(AdapterError, match=match), started(*run, cwd=cwd):
        pass


def test_an_adapter_that_is_not_there_or_starts_elsewhere_is_refused(cwd):
    with (
        pytest.raises(ConfigError, match="init_adapter: 'nowhere' is not there") as caught,
        started(*TINY, "output_dir=out", "init_adapter=nowhere", "model.lora_init=pissa", cwd=cwd),
    ):
        pass
    assert "init_adapter: 'nowhere' conflicts with lora_init: 'pissa'" in str(caught.value)


def test_an_adapter_of_another_base_is_refused(cwd):
    foreign(cwd)
    file = cwd / "theirs" / "adapter_model.safetensors"
    narrow = {n: v[:, :-8].contiguous() for n, v in load_file(file).items() if "lora_A" in n}
    save_file({**load_file(file), **narrow}, file)
    keys = ("model.lora_rank=4", "model.lora_alpha=10", f"init_adapter={cwd / 'theirs'}")
    with (
        pytest.raises(Phi3Error, match=r"248"),
        started(*TINY, *keys, "output_dir=out", cwd=cwd),
    ):
        pass


def test_an_adapter_of_loftq_goes_on_over_its_own_base_only(cwd):
    loftq = ("model.quantize_base=True", "model.lora_init=loftq")
    first = ("output_dir=first", "max_steps=2")
    with started(*TINY, *loftq, *first, cwd=cwd) as recipe:
        recipe.train()
        recipe.finish()
        expected = logits(recipe)
    more = ("output_dir=out", f"init_adapter={cwd / 'first' / 'final'}")
    with (
        pytest.raises(AdapterError, match=r"would fit:\n  model\.lora_init=loftq$"),
        started(*TINY, "model.quantize_base=True", *more, cwd=cwd),
    ):
        pass
    with started(*TINY, *loftq, *more, cwd=cwd) as recipe:
        assert torch.equal(logits(recipe), expected)


def test_a_run_of_ours_with_pissa_goes_on_as_a_plain_adapter(cwd):
    keys = ("model.lora_rank=4", "model.lora_alpha=8")
    with started(
        *TINY, *keys, "model.lora_init=pissa", "output_dir=a", "max_steps=2", cwd=cwd
    ) as r:
        r.train()
        r.finish()
        expected = logits(r)
    keys = ("model.lora_rank=8", "model.lora_alpha=16", f"init_adapter={cwd / 'a' / 'final'}")
    with started(*TINY, *keys, "output_dir=out", cwd=cwd) as recipe:
        torch.testing.assert_close(logits(recipe), expected, rtol=0, atol=2e-5)


def test_a_model_without_adapters_cannot_start_from_one(cwd):
    settings = [key for key in TINY if "lora" not in key]
    run = (*settings, "output_dir=out", f"init_adapter={cwd / 'base'}")
    with (
        pytest.raises(AdapterError, match=r"init_adapter: .* needs a model with adapters"),
        started(*run, cwd=cwd, config=full_config(cwd)),
    ):
        pass
