"""Adapters on parts of our fused layers: exported exactly, and given back bit for bit."""

import json

import pytest
import torch
from torchtune.modules.peft import get_adapter_params

from phi3_plugin.checkpoint import Phi3Checkpointer
from phi3_plugin.checkpoint.base import INNER, base_hash, load_base_weights
from phi3_plugin.checkpoint.base import TORCHTUNE_LAYERS as PARTS
from phi3_plugin.checkpoint.peft import check_same
from phi3_plugin.checkpoint.peft import load_note as load_origin
from phi3_plugin.errors import CheckpointError
from phi3_plugin.models import lora_phi3
from phi3_plugin.models import lora_settings as names
from phi3_plugin.proof import load_with_peft
from tests.adapters import load_adapter, load_trained
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_model, save_checkpoint

STATE = {"optimizer": {}, "seed": 7, "epochs_run": 1, "total_epochs": 3}
FAMILIES = {"mha": (MINI_4K, TINY_MHA), "gqa": (MEDIUM_4K, TINY_GQA)}
R, ALPHA = 4, 12


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    published, sizes = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("parts") / "base"
    return save_checkpoint(hf_model(published, **sizes), published, folder, **sizes)


def trained_model(base, targets, dtype=torch.float32, **keys):
    mlp = any(names.FUSED.get(name, name) in names.MLP_TARGETS for name in targets)
    model = lora_phi3(base, targets, mlp, lora_rank=R, lora_alpha=ALPHA, **keys)
    model.load_state_dict(load_base_weights(base), strict=False)
    for parameter in get_adapter_params(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def adapter_of(model):
    return {name: p.detach() for name, p in get_adapter_params(model).items()}


def save(base, out, model):
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "w1"], "peft_type": "LORA"}
    Phi3Checkpointer(base, out).save_checkpoint(
        {"adapter": adapter_of(model), "adapter_config": config, **STATE}, 0, True
    )
    return out / "epoch_0"


CASES = [
    (["q_proj", "v_proj"], 2),
    (["k_proj"], 1),
    (["gate_proj"], 1),
    (["up_proj", "down_proj"], 1),
    (["q_proj", "v_proj", "o_proj", "up_proj"], 2),
    (["qkv_proj", "gate_proj", "up_proj"], 2),
    (["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"], 3),
]


@pytest.mark.parametrize(("targets", "times"), CASES)
def test_peft_computes_the_same_and_resume_gives_the_same_bits(base, targets, times, tmp_path):
    model = trained_model(base, targets)
    folder = save(base, tmp_path / "out", model)
    batch = torch.randint(0, 150, (2, 17))
    with torch.no_grad():
        theirs = load_with_peft(base, folder)(input_ids=batch).logits
        torch.testing.assert_close(model(batch), theirs, rtol=0, atol=1e-5)

    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (times * R, times * ALPHA)
    assert config["target_modules"] == sorted({names.FUSED.get(name, name) for name in targets})
    resumed = Phi3Checkpointer(
        base, tmp_path / "out", lora_attn_modules=targets, should_load_recipe_state=True
    ).load_checkpoint()["adapter"]
    expected = adapter_of(model)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_rows_of_other_parts_stay_zero(base, tmp_path):
    folder = save(base, tmp_path / "out", trained_model(base, ["v_proj"]))
    for name, value in load_adapter(folder).items():
        if name.endswith("lora_b.weight"):
            kv = (len(value) - 64) // 2
            assert not value[:-kv].any() and value[-kv:].all()


def test_bf16_comes_back_bit_for_bit_and_the_folder_names_the_parts(base, tmp_path):
    model = trained_model(base, ["v_proj", "q_proj", "o_proj"], torch.bfloat16)
    folder = save(base, tmp_path / "out", model)
    assert load_origin(folder) == {
        "layout": "fused",
        "base_hash": base_hash(base),
        "modules": {
            f"layers.{layer}.attn.{module}": [R, ALPHA / R]
            for layer in range(3)
            for module in ("qkv_proj.q_proj", "qkv_proj.v_proj", "o_proj")
        },
    }
    card = (folder / "README.md").read_text("utf-8")
    assert "rank 8, alpha 24" in card
    assert "| trained | o_proj, q_proj, v_proj, each of rank 4 |" in card
    again, expected = load_trained(folder, base), adapter_of(model)
    assert again.keys() == expected.keys()
    assert all(again[name].dtype == torch.bfloat16 for name in again)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_a_head_keeps_its_adapter(base, tmp_path):
    model = trained_model(base, ["q_proj", "v_proj"], apply_lora_to_output=True)
    folder = save(base, tmp_path / "out", model)
    batch = torch.randint(0, 150, (2, 17))
    with torch.no_grad():
        theirs = load_with_peft(base, folder)(input_ids=batch).logits
        torch.testing.assert_close(model(batch), theirs, rtol=0, atol=1e-5)
    Phi3Checkpointer(
        base,
        tmp_path / "out",
        lora_attn_modules=["v_proj", "q_proj"],
        should_load_recipe_state=True,
    ).load_checkpoint()
    check_same(folder, load_trained(folder, base), adapter_of(model))


def test_whole_layers_are_written_as_ever(base, tmp_path):
    folder = save(base, tmp_path / "out", trained_model(base, ["qkv_proj", "o_proj"]))
    assert not any("qkv_proj." in module for module in load_origin(folder)["modules"])
    again = load_trained(folder, base)
    assert all(torch.equal(again[name], value) for name, value in load_adapter(folder).items())


@pytest.mark.parametrize("asked", [["q_proj", "k_proj"], ["qkv_proj"], ["q_proj"]])
def test_a_resume_with_other_parts_is_refused(base, asked, tmp_path):
    model = trained_model(base, ["q_proj", "v_proj"])
    folder = save(base, tmp_path / "out", model)
    resumed = Phi3Checkpointer(
        base, tmp_path / "out", lora_attn_modules=asked, should_load_recipe_state=True
    )
    message = r"lora_attn_modules: \[.*\], but .*epoch_0 was saved .* with \['q_proj', 'v_proj'\]"
    with pytest.raises(CheckpointError, match=message):
        resumed.load_checkpoint()
    shown = ", ".join(sorted(asked))
    message = f"LoRA of rank 4 on q_proj, v_proj, but the model has LoRA of rank 4 on {shown}"
    with pytest.raises(CheckpointError, match=message):
        load_trained(folder, base, adapter_of(trained_model(base, asked)))


def test_another_rank_is_refused(base, tmp_path):
    folder = save(base, tmp_path / "out", trained_model(base, ["q_proj"]))
    other = adapter_of(lora_phi3(base, ["q_proj"], lora_rank=8))
    message = r"LoRA of rank 4 on q_proj, .* has LoRA of rank 8 on q_proj\."
    with pytest.raises(CheckpointError, match=message):
        load_trained(folder, base, other)


def test_both_tables_of_parts_agree():
    """Models and checkpoint do not import each other, so each says what a fused layer holds."""
    for fused, parts in names.PARTS.items():
        (module,) = (module for module in PARTS if module.endswith(f".{fused}"))
        assert tuple(INNER[f"{module}.{part}"] for part in parts) == PARTS[module]
