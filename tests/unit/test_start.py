"""Adapters that start from the base weight: PiSSA against PEFT, LoftQ against its definition."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from phi3_plugin.checkpoint.base import A, B, load_base_weights, open_weights, to_hf
from phi3_plugin.checkpoint.equivalents import for_original_base, nearest
from phi3_plugin.errors import AdapterError, CheckpointError
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.models.nf4 import nearest_nf4
from phi3_plugin.train.start import (
    Residual,
    adapter_scales,
    adapter_state,
    check_adapter_state,
    split,
    split_names,
)
from tests.twins import BATCH, assert_same, base_of, ours, train_by_hand, trained, twin

CPU = torch.device("cpu")
CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"o_proj": 2, "1.qkv_proj": 7}},
    "dora": {"use_dora": True},
    "head": {"apply_lora_to_output": True},
}


@pytest.fixture(scope="module", params=["mini", "gqa", "tied"])
def base(request, tmp_path_factory):
    return (*base_of(request.param, tmp_path_factory.mktemp("base")), request.param)


def pissa(folder, **keys):
    """Return our model at PiSSA's start, and A0 and B0 by name."""
    model = ours(folder, lora_init="pissa", **keys)
    stored, first, weights = open_weights(folder), {}, {}
    for name in split_names(model):
        module, weight = model.get_submodule(name), stored[f"{name}.weight"]
        a, b = split(module, weight, CPU)
        first |= {name + A: a, name + B: b}
        weights[f"{name}.weight"] = Residual(weight, a, b, module.scaling)[:]
    model.load_state_dict({**first, **weights}, strict=False)
    return model, first


def skip_tied_head(base, case):
    if case == "head" and base[2] == "tied":
        pytest.skip("a tied head has no adapter")


@pytest.mark.parametrize("case", CASES)
def test_pissa_starts_as_the_base_and_as_pefts(base, case):
    skip_tied_head(base, case)
    hf, folder, _ = base
    model, first = pissa(folder, **CASES[case])
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    with torch.no_grad():
        expected = hf(input_ids=BATCH, use_cache=False).logits
        torch.testing.assert_close(model(BATCH), expected, rtol=0, atol=1e-5)
    if case == "plain":
        config = {"r": 4, "lora_alpha": 12, "target_modules": list(TARGETS)}
        theirs = get_peft_model(base_again(base), LoraConfig(**config, init_lora_weights="pissa"))
        for name, scale in adapter_scales(model).items():
            layer = theirs.get_submodule(f"base_model.model.{to_hf(name + '.weight')[:-7]}")
            product = layer.lora_B.default.weight @ layer.lora_A.default.weight
            own = first[name + B] @ first[name + A]
            torch.testing.assert_close(own, product, rtol=0, atol=1e-5)
            left = model.get_submodule(name).weight
            torch.testing.assert_close(left, layer.base_layer.weight, rtol=0, atol=1e-5 * scale)


def base_again(base):
    from copy import deepcopy

    return deepcopy(base[0])


@pytest.mark.parametrize("case", CASES)
def test_a_trained_pissa_is_an_adapter_of_the_original_base(base, case):
    skip_tied_head(base, case)
    hf, folder, _ = base
    keys = CASES[case]
    model, first = pissa(folder, **keys)
    train_by_hand(model)
    values = {name: p.detach().clone() for name, p in trained(model).items()}
    joined = for_original_base(values, first)
    twice = {k: {n: 2 * v for n, v in p.items()} for k, p in keys.items() if k == "rank_pattern"}
    scaled = {"lora_rank": 8, "lora_alpha": 12 * (2**0.5 if "use_rslora" in keys else 2)}
    if "use_rslora" in keys:  # the same scale, which the file says for the double rank
        scaled, twice = {"lora_rank": 8, "lora_alpha": 1}, {"alpha_pattern": every(12 * 2**0.5)}
    if "rank_pattern" in keys:
        twice["alpha_pattern"] = dict.fromkeys(keys["rank_pattern"], 24)
    plain = ours(folder, **{**keys, **scaled, **twice})
    plain.load_state_dict({**load_base_weights(folder), **joined})
    with torch.no_grad():
        torch.testing.assert_close(plain(BATCH), model(BATCH), rtol=0, atol=1e-5)
    if case == "plain":
        assert_same(plain, twin(hf, plain, r=8, lora_alpha=24))


def every(alpha):
    return dict.fromkeys(TARGETS, alpha)


@pytest.mark.parametrize("shape", [(9, 17), (17, 9), (12, 12)])
def test_the_nearest_product_is_that_of_the_singular_vectors(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = nearest(weight, 4)
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(b @ a, u[:, :4] * s[:4] @ v[:4], rtol=0, atol=1e-12)
    torch.testing.assert_close(a.norm(dim=1), s[:4].sqrt())
    torch.testing.assert_close(b.norm(dim=0), s[:4].sqrt())


def test_a_weight_of_a_smaller_rank_has_finite_factors():
    weight = torch.outer(torch.arange(5.0), torch.arange(7.0)).double()
    a, b = nearest(weight, 3)
    torch.testing.assert_close(b @ a, weight)
    a, b = nearest(torch.zeros(5, 7).double(), 2)
    assert not (b @ a).any() and torch.isfinite(a).all()


def test_a_rank_that_a_weight_does_not_have_is_refused():
    with pytest.raises(AdapterError, match="lora_rank: 6 is more than a weight of 5 x 7 has"):
        nearest(torch.zeros(5, 7).double(), 6)


def test_one_thread_and_two_give_the_same_bits():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append([value.float() for value in nearest(weight.double(), 4)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_loftq_takes_most_of_what_nf4_loses():
    from phi3_plugin.models.lora import LoRALinear

    weight = 0.1 * torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    layer = LoRALinear(128, 256, 16, 32, quantize_base=True, init="loftq")
    a, b = split(layer, weight, CPU)
    layer.load_state_dict({"weight": weight, "lora_a.weight": a, "lora_b.weight": b})
    base = layer.weight.detach().to(torch.float32)
    assert torch.equal(base, nearest_nf4(weight))
    lost = weight - base
    smallest = torch.linalg.svdvals(lost)[16:].norm()  # Eckart and Young: no rank-16 is nearer
    left = (lost - layer.scaling * b @ a).norm()
    assert left == pytest.approx(smallest.item(), rel=1e-5)
    assert left < 0.9 * lost.norm()


def test_the_factors_are_those_that_the_adapters_precision_holds(base):
    model = ours(base[1], lora_init="pissa").bfloat16()
    name = split_names(model)[0]
    a, b = split(model.get_submodule(name), open_weights(base[1])[f"{name}.weight"], CPU)
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a, a.bfloat16().float()) and torch.equal(b, b.bfloat16().float())


def test_a_whole_model_is_no_state_of_an_adapter(base):
    model = ours(base[1])
    with pytest.raises(CheckpointError, match="out holds a whole model, but the model has"):
        check_adapter_state(Path("out"), {"settings": {"model": {}}}, model)
    state = {"adapter": adapter_state(model, trained(model), {}), "settings": {"model": {}}}
    check_adapter_state(Path("out"), state, model)
