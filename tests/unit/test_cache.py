"""Cached rows, and layers that only answer: both compute what the model does without them."""

import weakref

import pytest
import torch
from torch import nn
from torchtune.training import set_default_dtype

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.models import cache as module
from phi3_plugin.models import phi3
from phi3_plugin.models.cache import ServedLinear, serve
from phi3_plugin.models.lora import (
    DoRALinear,
    Linear,
    LoRALinear,
    LowRank,
    MergedLoRALinear,
    WholeLinear,
)
from tests.twins import BATCH, base_of, ours, train_by_hand

IN, OUT = 256, 384


def merged(**keys) -> MergedLoRALinear:
    rows = {"q_proj": 256, "k_proj": 64, "v_proj": 64}
    adapters = {name: LowRank(IN, rows[name], 4, 6) for name in ("q_proj", "v_proj")}
    return MergedLoRALinear(IN, rows, adapters, **keys)


MAKERS = {
    "plain": lambda: Linear(IN, OUT),
    "nf4": lambda: Linear(IN, OUT, quantize=True),
    "whole": lambda: WholeLinear(IN, OUT),
    "lora": lambda: LoRALinear(IN, OUT, 4, 6),
    "qlora": lambda: LoRALinear(IN, OUT, 4, 6, quantize_base=True),
    "dora": lambda: DoRALinear(IN, OUT, 4, 6),
    "qdora": lambda: DoRALinear(IN, OUT, 4, 6, quantize_base=True),
    "parts": merged,
    "quantized parts": lambda: merged(quantize_base=True),
}


def filled(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(0.05 * torch.randn(OUT, IN))
        for name, parameter in layer.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
            if "magnitude" in name:
                parameter.uniform_(0.5, 1.5)
    return layer.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_computes_the_same(name, dtype):
    with set_default_dtype(dtype):
        layer = filled(MAKERS[name]())
    stands_for = ServedLinear(layer)
    bits = 2e-6 if dtype == torch.float32 else 1e-2
    for shape in ((1, 1), (1, 7), (2, 3)):
        x = torch.randn(*shape, IN).to(dtype)
        expected, found = layer(x), stands_for(x)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        if name in ("plain", "nf4", "whole"):
            torch.testing.assert_close(
                found, expected, rtol=0, atol=0 if dtype != torch.float32 else 2e-6
            )
        assert (found - expected).float().norm() <= bits * expected.float().norm()


@torch.no_grad()
def test_a_disabled_adapter_stays_out():
    layer = filled(LoRALinear(IN, OUT, 4, 6))
    layer.disabled = True
    x = torch.randn(3, IN)
    torch.testing.assert_close(ServedLinear(layer)(x), x @ layer.weight.t(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mini", "gqa", "tied"])
@torch.no_grad()
def test_a_model_answers_as_before(family, tmp_path):
    _, folder = base_of(family, tmp_path)
    model = ours(folder, lora_rank=3)
    train_by_hand(model)
    before = model(BATCH)
    serve(model)
    torch.testing.assert_close(model(BATCH), before, rtol=0, atol=1e-5)
    assert not any(hasattr(module, "lora_a") for module in model.modules())
    assert isinstance(model.output, ServedLinear)


@torch.no_grad()
def test_models_that_share_weights_still_do(tmp_path):
    _, folder = base_of("mini", tmp_path)
    base = phi3(folder)
    base.load_state_dict(load_base_weights(folder))
    adapted = ours(folder)
    for name, parameter in base.named_parameters():
        module, _, own = name.rpartition(".")
        setattr(adapted.get_submodule(module), own, parameter)
    train_by_hand(adapted)
    before = base(BATCH), adapted(BATCH)
    serve(base, adapted)
    for model, logits in zip((base, adapted), before, strict=True):
        torch.testing.assert_close(model(BATCH), logits, rtol=0, atol=1e-5)
    pairs = zip(base.modules(), adapted.modules(), strict=True)
    shared = [one.weight is two.weight for one, two in pairs if isinstance(one, ServedLinear)]
    assert len(shared) == 2 * 4 + 1 and all(shared)


def test_weights_are_laid_out_one_layer_at_a_time(tmp_path, monkeypatch):
    _, folder = base_of("mini", tmp_path)
    model = phi3(folder)
    plain = [weakref.ref(module.weight) for module in model.modules() if type(module) is Linear]
    left = []

    def laid(weight):
        left.append(sum(one() is not None for one in plain))
        return weight.detach().clone(), False

    monkeypatch.setattr(module, "laid_out", laid)
    serve(model)
    assert left == [*range(len(plain), 0, -1)]


@torch.no_grad()
def test_what_is_ready_stays_so(tmp_path):
    _, folder = base_of("tied", tmp_path)
    base, adapted = phi3(folder), ours(folder)
    base.load_state_dict(load_base_weights(folder))
    train_by_hand(adapted)
    before = base(BATCH), adapted(BATCH)
    serve(base)
    serve(base)
    serve(base, adapted)
    for model, logits in zip((base, adapted), before, strict=True):
        torch.testing.assert_close(model(BATCH), logits, rtol=0, atol=1e-5)
