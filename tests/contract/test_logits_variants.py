"""Scales, ranks, layers and modules trained whole, against PEFT's model with equal weights."""

import pytest
import torch

from phi3_plugin.errors import AdapterError
from phi3_plugin.models import lora_phi3
from phi3_plugin.models.lora_settings import TARGETS, keys_of, keys_of_model
from phi3_plugin.train.start import adapter_scales, initial_adapter
from tests.chosen import some
from tests.twins import BATCH, FAMILIES, assert_same, base_of, ours, train_by_hand, twin

RANKS = {
    "rank_pattern": {"o_proj": 2, "1.qkv_proj": 5, "qkv_proj": 3},
    "alpha_pattern": {"o_proj": 3, "layers.1.qkv_proj": 7},
}
THEIR_RANKS = {  # the first that fits counts
    "rank_pattern": {"o_proj": 2, "layers.1.self_attn.qkv_proj": 5, "qkv_proj": 3},
    "alpha_pattern": {"o_proj": 3, "layers.1.self_attn.qkv_proj": 7},
}
RS, DORA = {"use_rslora": True}, {"use_dora": True}
LAYERS = {"layers_to_transform": [1]}
WHOLE = {"modules_to_save": ["lm_head", "embed_tokens"]}
EMBEDDING = {"apply_lora_to_embedding": True}
HEAD = {"apply_lora_to_output": True}
WITH_EMBEDDING = {"target_modules": [*TARGETS, "embed_tokens"]}
CASES = {
    "rslora": (RS, RS),
    "ranks": (RANKS, THEIR_RANKS),
    "rslora+ranks": ({**RS, **RANKS}, {**RS, **THEIR_RANKS}),
    "dora+rslora+ranks": ({**DORA, **RS, **RANKS}, {**DORA, **RS, **THEIR_RANKS}),
    "layers": (LAYERS, LAYERS),
    "layers+dora": ({**LAYERS, **DORA}, {**LAYERS, **DORA}),
    "whole": (WHOLE, WHOLE),
    "whole+dora+ranks": ({**WHOLE, **DORA, **RANKS}, {**WHOLE, **DORA, **THEIR_RANKS}),
    "embedding": (EMBEDDING, WITH_EMBEDDING),
    "embedding+head+rslora": (
        {**EMBEDDING, **HEAD, **RS},
        {"target_modules": [*TARGETS, "embed_tokens", "lm_head"], **RS},
    ),
    "embedding+whole head": (
        {**EMBEDDING, "modules_to_save": ["output"], "rank_pattern": {"tok_embeddings": 2}},
        {**WITH_EMBEDDING, "modules_to_save": ["lm_head"], "rank_pattern": {"embed_tokens": 2}},
    ),
}
UNTIED = [case for case in CASES if "whole" in case or "embedding" in case]
QUICK = [
    "mini-ranks",
    "gqa-dora+rslora+ranks",
    "tied-rslora",
    "gqa-layers",
    "mini-whole+dora+ranks",
]
QUICK += ["mini-embedding+head+rslora", "gqa-embedding+whole head", "tied-layers"]
COMBINED = [(f, c) for f in FAMILIES for c in CASES if f != "tied" or c not in UNTIED]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {family: base_of(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize(("family", "case"), some(COMBINED, QUICK))
def test_logits_and_gradients_equal_peft(bases, family, case):
    hf, folder = bases[family]
    keys, theirs = CASES[case]
    model = ours(folder, **keys)
    train_by_hand(model)
    targets = theirs.get("target_modules", TARGETS)
    more = {key: value for key, value in theirs.items() if key != "target_modules"}
    assert_same(model, twin(hf, model, targets, **more))


@pytest.mark.parametrize("case", CASES)
def test_all_of_them_start_as_the_base(bases, case):
    hf, folder = bases["gqa"]
    model = ours(folder, **CASES[case][0])
    values = initial_adapter(model, seed=3)
    assert values.keys() == {n for n, _ in model.named_parameters() if "lora" in n or "magn" in n}
    model.load_state_dict(values, strict=False)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    with torch.no_grad():
        expected = hf(input_ids=BATCH, use_cache=False).logits
        torch.testing.assert_close(model(BATCH), expected, rtol=0, atol=1e-5)
    again = initial_adapter(model, seed=3)
    assert all(torch.equal(again[name], value) for name, value in values.items())


def test_a_gaussian_start_has_the_spread_of_pefts(bases):
    model = ours(bases["mini"][1], lora_init="gaussian", rank_pattern={"o_proj": 16})
    values = initial_adapter(model, seed=0)
    for rank, target in ((4, "qkv_proj"), (16, "o_proj")):
        drawn = torch.cat([v.flatten() for n, v in values.items() if f"{target}.lora_a" in n])
        assert drawn.std().item() == pytest.approx(1 / rank, rel=0.1)
        own = model.layers[0].attn.get_submodule(target).lora_a.weight
        assert own.std().item() == pytest.approx(1 / rank, rel=0.15)
    assert not any(value.any() for name, value in values.items() if "lora_b" in name)


def test_parts_have_ranks_and_scales_of_their_own(bases):
    keys = {"rank_pattern": {"v_proj": 2, "1.v_proj": 8}, "alpha_pattern": {"q_proj": 4.5}}
    model = ours(bases["gqa"][1], ["q_proj", "v_proj"], **keys)
    assert adapter_scales(model) == {
        "layers.0.attn.qkv_proj.q_proj": 4.5 / 4,
        "layers.0.attn.qkv_proj.v_proj": 12 / 2,
        "layers.1.attn.qkv_proj.q_proj": 4.5 / 4,
        "layers.1.attn.qkv_proj.v_proj": 12 / 8,
    }
    assert model.layers[1].attn.qkv_proj.v_proj.lora_a.weight.shape == (8, 64)


@pytest.mark.parametrize(
    "keys",
    [
        RANKS,
        {**RS, **RANKS, **DORA},
        {**LAYERS, "alpha_pattern": {"o_proj": 1.5}},
        {**WHOLE, "rank_pattern": {"0.o_proj": 1}},
        {**EMBEDDING, **HEAD, "rank_pattern": {"embed_tokens": 2, "output": 3}},
    ],
)
def test_a_model_says_the_keys_that_make_it_again(bases, keys):
    folder = bases["mini"][1]
    said = keys_of_model(ours(folder, **keys))
    again = ours(folder, **{k: v for k, v in said.items() if k not in NAMED})
    model = ours(folder, **keys)
    assert adapter_scales(again) == adapter_scales(model)
    shapes = [
        {n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (again, model)
    ]
    assert shapes[0] == shapes[1] or said["use_dora"]


def test_the_order_of_the_modules_decides_nothing():
    ranks = {"qkv_proj": 1, "o_proj": 2, "down_proj": 5}
    modules = {f"layers.{n}.attn.{name}": rank for n in (0, 1) for name, rank in ranks.items()}
    kind = {"layers": 2, "use_dora": False, "use_rslora": False}
    said = [
        keys_of(dict(order), dict.fromkeys(modules, 2.0), [], **kind)
        for order in (modules.items(), reversed(modules.items()))
    ]
    assert said[0] == said[1]
    assert said[0]["lora_rank"] == 1 and said[0]["rank_pattern"] == {"o_proj": 2, "down_proj": 5}


NAMED = ("lora_attn_modules", "apply_lora_to_mlp")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank_pattern": {"o_prj": 2}}, r"rank_pattern: 'o_prj' matches no adapter.*adapted are"),
        ({"rank_pattern": {"lm_head": 2}}, "rank_pattern: 'lm_head' matches no adapter"),
        ({"rank_pattern": {"1.o_proj": 0}}, "rank_pattern.1.o_proj: 0 must be a whole number"),
        ({**LAYERS, "rank_pattern": {"0.o_proj": 2}}, "'0.o_proj' is in a layer without adapters"),
        ({**HEAD, "rank_pattern": {"3.lm_head": 2}}, "'3.lm_head' matches no adapter"),
        ({"rank_pattern": [2]}, r"rank_pattern: \[2\] must be a section"),
        ({"alpha_pattern": {"o_proj": -1}}, "alpha_pattern.o_proj: -1 must be a number above 0"),
        (
            {"alpha_pattern": {"7.o_proj": 1}},
            "alpha_pattern: there is no layer 7. The last one is 1",
        ),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform: there is no layer 2"),
        ({"layers_to_transform": []}, r"layers_to_transform: \[\] must be a list of layer numbers"),
        ({"layers_to_transform": "1"}, "layers_to_transform: '1' must be a list"),
        (
            {"lora_init": "olora"},
            "lora_init: 'olora' must be one of kaiming, gaussian, pissa",
        ),
        ({"modules_to_save": "lm_head"}, "modules_to_save: 'lm_head' must be a list of names"),
        ({"modules_to_save": [1]}, r"modules_to_save: \[1\] must be a list of names"),
        ({"use_rslora": "False"}, "use_rslora: 'False' must be True or False"),
        ({"use_dora": 1}, "use_dora: 1 must be True or False"),
        ({"modules_to_save": ["norm"]}, "modules_to_save: 'norm' cannot be trained whole.*lm_head"),
        ({**WHOLE, **HEAD}, "modules_to_save: 'lm_head' conflicts with apply_lora_to_output: True"),
        ({**WHOLE, **EMBEDDING}, "'embed_tokens' conflicts with apply_lora_to_embedding: True"),
        ({**EMBEDDING, **DORA}, "apply_lora_to_embedding: True conflicts with use_dora: True"),
        (
            {"lora_init": "pissa", "quantize_base": True},
            "lora_init: 'pissa' needs a base that",
        ),
        ({"lora_init": "loftq"}, "lora_init: 'loftq' makes up for what NF4 loses"),
    ],
)
def test_wrong_settings_are_one_line(bases, keys, message):
    with pytest.raises(AdapterError, match=message) as caught:
        lora_phi3(bases["mini"][1], ["o_proj"], **keys)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("targets", ["o_proj", {"o_proj": 1}, 3])
def test_targets_that_are_no_list_are_one_line(bases, targets):
    with pytest.raises(AdapterError, match=r"lora_attn_modules: .* must be a list of names") as e:
        lora_phi3(bases["mini"][1], targets)
    assert len(str(e.value).splitlines()) == 1


def test_one_place_under_two_names_is_refused(bases):
    pattern = {"1.o_proj": 2, "layers.1.o_proj": 3}
    with pytest.raises(AdapterError, match=r"rank_pattern: '1\.o_proj' is there twice"):
        lora_phi3(bases["mini"][1], ["o_proj"], rank_pattern=pattern)


def test_parts_cannot_be_split_off_the_base(bases):
    with pytest.raises(AdapterError, match=r"lora_init: 'pissa' needs whole layers.*'q_proj'"):
        lora_phi3(bases["mini"][1], ["q_proj"], lora_init="pissa")


def test_what_a_tied_checkpoint_cannot_have_is_said_at_once(bases):
    keys = {**EMBEDDING, **HEAD, "layers_to_transform": [9]}
    with pytest.raises(AdapterError) as caught:
        lora_phi3(bases["tied"][1], ["o_proj"], **keys)
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("apply_lora_to_output: True needs a head of its own, but this check")
    assert second.startswith("apply_lora_to_embedding: True needs an embedding of its own")
    assert third.startswith("layers_to_transform: there is no layer 9")
    with pytest.raises(AdapterError, match=r"modules_to_save: \['lm_head'\] needs a head and an"):
        lora_phi3(bases["tied"][1], ["o_proj"], modules_to_save=["lm_head"])


def test_torchtunes_recipes_refuse_by_name_what_they_cannot_save(bases, monkeypatch):
    from torchtune.recipe_interfaces import FTRecipeInterface

    class Recipe(FTRecipeInterface):
        pass

    folder = bases["mini"][1]
    monkeypatch.setattr("__main__.Recipe", Recipe, raising=False)
    fine = {**LAYERS, "lora_init": "gaussian"}
    assert lora_phi3(folder, ["o_proj"], **fine).layers[1].attn.o_proj.rank == 8
    keys = {**RS, "rank_pattern": {"o_proj": 2}, **EMBEDDING, "modules_to_save": ["output"]}
    with pytest.raises(AdapterError) as caught:
        lora_phi3(folder, ["o_proj"], lora_init="pissa", **keys)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [*keys, "lora_init"]
    assert all("Use phi3_lora_finetune with the same YAML" in line for line in lines)
