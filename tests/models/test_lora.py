"""LoRA settings, and gradients against transformers + PEFT from equal weights."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from phi3_plugin.checkpoint.base import load_base_weights, to_peft
from phi3_plugin.errors import AdapterError
from phi3_plugin.models import lora_phi3
from phi3_plugin.models.lora_settings import TARGETS
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_model, save_checkpoint

ALL = list(TARGETS)


def folder_of(model, published, sizes, tmp_path):
    return save_checkpoint(model, published, tmp_path / "base", **sizes)


def with_random_adapter(folder, targets):
    model = lora_phi3(
        folder,
        targets,
        apply_lora_to_mlp=bool({"gate_up_proj", "down_proj"} & set(targets)),
        lora_rank=4,
        lora_alpha=12,
    )
    model.load_state_dict(load_base_weights(folder), strict=False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def peft_twin(base, model, targets):
    twin = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=targets))
    adapter = {to_peft(n): p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    result = set_peft_model_state_dict(twin, adapter)
    assert not result.unexpected_keys
    return twin


@pytest.mark.parametrize(
    ("published", "sizes"), [(MINI_4K, TINY_MHA), (MEDIUM_4K, TINY_GQA)], ids=["mha", "gqa"]
)
@pytest.mark.parametrize(
    "targets",
    [list(c) for n in (1, 4) for c in itertools.combinations(TARGETS, n)],
    ids="+".join,
)
def test_logits_and_gradients_equal_peft(published, sizes, targets, tmp_path):
    base = hf_model(published, **sizes)
    model = with_random_adapter(folder_of(base, published, sizes, tmp_path), targets)
    twin = peft_twin(base, model, targets)
    batch = torch.randint(0, 150, (3, 17))
    labels = torch.randint(0, 150, (3, 17))
    labels[0] = -100  # a row without a label
    labels[1, :9] = -100

    ours, theirs = model(batch), twin(input_ids=batch, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for logits in (ours, theirs):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()

    expected = {
        name.replace(".default", ""): p.grad
        for name, p in twin.named_parameters()
        if p.requires_grad
    }
    grads = {to_peft(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_a_new_adapter_is_the_identity(tmp_path):
    base = hf_model(MINI_4K, **TINY_MHA)
    folder = folder_of(base, MINI_4K, TINY_MHA, tmp_path)
    model = lora_phi3(folder, ALL, apply_lora_to_mlp=True)
    model.load_state_dict(load_base_weights(folder), strict=False)
    batch = torch.randint(0, 150, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(batch), base(input_ids=batch).logits)
    assert all(layer.attn.qkv_proj.lora_a.weight.abs().max() > 0 for layer in model.layers)


def test_dropout_acts_in_training_only(tmp_path):
    base = hf_model(MINI_4K, **TINY_MHA)
    folder = folder_of(base, MINI_4K, TINY_MHA, tmp_path)
    model = lora_phi3(folder, ["o_proj"], lora_dropout=0.5)
    model.load_state_dict(load_base_weights(folder), strict=False)
    for layer in model.layers:
        torch.nn.init.normal_(layer.attn.o_proj.lora_b.weight)
    batch = torch.randint(0, 150, (2, 9))
    with torch.no_grad():
        assert not torch.equal(model(batch), model(batch))
        assert torch.equal(model.eval()(batch), model(batch))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_attn_modules": ["w2"]}, "'w2' is called 'down_proj' here.*Available: qkv"),
        ({"lora_attn_modules": ["foo"]}, "'foo' matches no linear layer.*Available: qkv_proj"),
        ({"lora_attn_modules": []}, "lora_attn_modules: empty"),
        ({"apply_lora_to_mlp": True}, r"apply_lora_to_mlp: True disagrees.*add gate_up_proj"),
        ({"lora_attn_modules": ALL}, r"apply_lora_to_mlp: False disagrees.*Set it to True"),
        ({"lora_rank": 0}, "lora_rank: 0 must be a whole number above 0"),
        ({"lora_rank": -4}, "lora_rank: -4"),
        ({"lora_rank": 1.5}, "lora_rank: 1.5"),
        ({"lora_alpha": 0.5}, "lora_alpha: 0.5 must be a whole number"),
        ({"lora_dropout": 1.0}, "lora_dropout: 1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        lora_phi3(tmp_path, **{"lora_attn_modules": ["o_proj"], **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_attn_modules": ["v_proj", "qkv_proj", "q_proj"]},
            r"lora_attn_modules: 'qkv_proj' and its parts 'q_proj', 'v_proj' .*Keep either",
        ),
        (
            {"lora_attn_modules": ["up_proj", "gate_up_proj"], "apply_lora_to_mlp": True},
            r"'gate_up_proj' and its part 'up_proj' .*Keep either",
        ),
        (
            {"lora_attn_modules": ["o_proj", "k_proj"], "use_dora": True},
            r"use_dora: True needs whole layers, but lora_attn_modules has 'k_proj'.*'qkv_proj'",
        ),
        ({"lora_attn_modules": ["up_proj"]}, "apply_lora_to_mlp: False disagrees.*Set it to True"),
        ({"apply_lora_to_mlp": True}, "apply_lora_to_mlp: True disagrees"),
        ({"lora_attn_modules": ["w1"]}, "'w1' is called 'gate_proj' here.*Available: qkv_proj"),
        ({"lora_attn_modules": ["w3"]}, "'w3' is called 'up_proj' here"),
        ({"lora_attn_modules": ["output_proj"]}, "'output_proj' is called 'o_proj' here"),
    ],
)
def test_wrong_parts_of_layers_are_one_line_each(settings, message, tmp_path):
    with pytest.raises(AdapterError, match=message) as caught:
        lora_phi3(tmp_path, **{"lora_attn_modules": ["q_proj"], **settings})
    assert len(str(caught.value).splitlines()) == 1


def test_all_wrong_settings_are_reported_at_once(tmp_path):
    with pytest.raises(AdapterError) as caught:
        lora_phi3(tmp_path, ["w1", "foo"], lora_rank=0, lora_alpha=-1, lora_dropout=2)
    assert len(str(caught.value).splitlines()) == 5
