"""torchtune's own split model: exported exactly, and given back bit for bit."""

import itertools

import pytest
import torch

from phi3_plugin.errors import CheckpointError
from phi3_plugin.proof import load_with_peft
from phi3_plugin.train.stock import Phi3Checkpointer
from tests.adapters import adapter_of, load_adapter, split_model
from tests.chosen import some
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_model, save_checkpoint

ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
STATE = {"optimizer": {}, "seed": 7, "epochs_run": 1, "total_epochs": 3}
FAMILIES = {"mha": (MINI_4K, TINY_MHA), "gqa": (MEDIUM_4K, TINY_GQA)}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    published, sizes = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("split") / "base"
    return save_checkpoint(hf_model(published, **sizes), published, folder, **sizes)


def save(base, out, model, alpha=12):
    config = {"r": 4, "lora_alpha": alpha, "target_modules": ["q_proj"], "peft_type": "LORA"}
    Phi3Checkpointer(base, out, layout="split").save_checkpoint(
        {"adapter": adapter_of(model), "adapter_config": config, **STATE}, 0, True
    )
    return out / "epoch_0"


CASES = {
    "+".join(subset): (subset, False, False)
    for n in (1, 2, 3)
    for subset in itertools.combinations(ATTENTION, n)
} | {
    "mlp": (("output_proj",), True, False),
    "all": (ATTENTION, True, False),
    "head": (("q_proj", "v_proj"), True, True),
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("case", some(CASES, ["k_proj", "q_proj+v_proj", "all", "head"]))
def test_peft_computes_the_same_and_resume_gives_the_same_bits(base, case, use_dora, tmp_path):
    attention, mlp, output = CASES[case]
    model = split_model(base, attention, mlp, output and not use_dora, use_dora=use_dora)
    folder = save(base, tmp_path / "out", model)
    batch = torch.randint(0, 150, (2, 17))
    with torch.no_grad():
        theirs = load_with_peft(base, folder)(input_ids=batch).logits
        torch.testing.assert_close(model(batch), theirs, rtol=0, atol=1e-5)

    resumed = Phi3Checkpointer(
        base, tmp_path / "out", layout="split", should_load_recipe_state=True
    ).load_checkpoint()
    expected = adapter_of(model)
    assert resumed["adapter"].keys() == expected.keys()
    assert all(torch.equal(resumed["adapter"][name], expected[name]) for name in expected)
    assert resumed["model"].keys() == model.state_dict().keys() - expected.keys()


def test_one_rank_and_a_whole_alpha(base, tmp_path):
    import json

    model = split_model(base, ("q_proj", "k_proj", "v_proj"), mlp=True)
    folder = save(base, tmp_path / "out", model)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (12, 36)
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "qkv_proj"]
    ranks = {v.shape[0] for n, v in load_adapter(folder).items() if n.endswith("lora_a.weight")}
    assert ranks == {12}


def test_a_scale_that_no_whole_alpha_says_is_carried_by_b(base, tmp_path):
    model = split_model(base, ("q_proj",), alpha=1.3)
    folder = save(base, tmp_path / "out", model, alpha=1.3)
    batch = torch.randint(0, 150, (2, 17))
    with torch.no_grad():
        theirs = load_with_peft(base, folder)(input_ids=batch).logits
        torch.testing.assert_close(model(batch), theirs, rtol=0, atol=1e-5)


def test_resume_with_the_other_layout_is_refused(base, tmp_path):
    save(base, tmp_path / "out", split_model(base, ("q_proj",)))
    with pytest.raises(CheckpointError, match="saved from a model with layout 'split'"):
        Phi3Checkpointer(base, tmp_path / "out", should_load_recipe_state=True).load_checkpoint()
