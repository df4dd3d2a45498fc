"""How far apart two adapters are, against the matrices written out."""

from dataclasses import replace

import pytest
import torch

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.difference import differences, product_norm
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError
from tests.oracles import MEDIUM_4K, TINY_GQA

QKV, O_PROJ = "layers.0.attn.qkv_proj", "layers.1.attn.o_proj"


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    import json

    folder = tmp_path_factory.mktemp("sizes")
    (folder / "config.json").write_text(json.dumps({**MEDIUM_4K, **TINY_GQA}))
    return read_config(folder)


def lora(module, rank, out, in_dim, seed=0):
    torch.manual_seed(seed)
    a, b = torch.randn(rank, in_dim), torch.randn(out, rank)
    return {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b}


def no_norms(module):
    raise AssertionError(module)


def product(adapter, module):
    a, b = (adapter.tensors[f"{module}.lora_{kind}.weight"].double() for kind in "ab")
    return adapter.scales[module] * b @ a


def test_other_ranks_and_scales(sizes):
    one = Adapter(lora(O_PROJ, 4, 64, 64), {O_PROJ: 2.0})
    other = Adapter(lora(O_PROJ, 6, 64, 64, seed=1), {O_PROJ: 0.5})
    (found,) = differences(one, other, sizes, no_norms)
    first, second = product(one, O_PROJ), product(other, O_PROJ)
    expected = (first - second).norm() / max(first.norm(), second.norm())
    assert found.relative == pytest.approx(float(expected), rel=1e-12)


def test_the_same_is_zero_however_it_is_scaled(sizes):
    one = Adapter(lora(O_PROJ, 4, 64, 64), {O_PROJ: 2.0})
    assert differences(one, one, sizes, no_norms)[0].relative == 0
    tensors = {n: v * 2 if "lora_b" in n else v for n, v in one.tensors.items()}
    other = Adapter(tensors, {O_PROJ: 1.0})
    assert differences(one, other, sizes, no_norms)[0].relative == 0
    negative = Adapter({n: -v if "lora_b" in n else v for n, v in one.tensors.items()}, one.scales)
    assert differences(one, negative, sizes, no_norms)[0].relative == pytest.approx(2)


def test_a_little_apart_is_not_lost_in_rounding(sizes):
    one = Adapter(lora(O_PROJ, 4, 64, 64), {O_PROJ: 1.0})
    tensors = {n: v.double() for n, v in one.tensors.items()}
    tensors[f"{O_PROJ}.lora_b.weight"] = tensors[f"{O_PROJ}.lora_b.weight"] * (1 + 1e-11)
    (found,) = differences(one, Adapter(tensors, one.scales), sizes, no_norms)
    assert found.relative == pytest.approx(1e-11, rel=1e-3)


def test_parts_are_compared_as_the_layer(sizes):
    part = f"{QKV}.q_proj"
    parts = Adapter(lora(part, 4, 64, 64), {part: 2.0})
    a, b = parts.tensors.values()
    whole_b = torch.cat([b, torch.zeros(sizes.qkv_size - 64, 4)])
    whole = Adapter({f"{QKV}.lora_a.weight": a, f"{QKV}.lora_b.weight": whole_b}, {QKV: 2.0})
    (found,) = differences(parts, whole, sizes, no_norms)
    assert (found.module, found.relative) == (QKV, 0)


def test_what_only_one_has(sizes):
    one = Adapter({**lora(O_PROJ, 2, 64, 64)}, {O_PROJ: 1.0}, {"output.weight": torch.ones(2, 2)})
    other = Adapter(lora(QKV, 2, sizes.qkv_size, 64), {QKV: 1.0})
    found = {d.module: (d.relative, d.only_in) for d in differences(one, other, sizes, no_norms)}
    assert found == {O_PROJ: (None, 0), QKV: (None, 1), "output.weight": (None, 0)}


def test_magnitudes_and_whole_weights(sizes):
    whole = {"output.weight": torch.ones(3, 2)}
    tensors = {**lora(O_PROJ, 2, 64, 64), f"{O_PROJ}.magnitude": torch.ones(64)}
    one = Adapter(tensors, {O_PROJ: 1.0}, whole)
    other = Adapter({**tensors, f"{O_PROJ}.magnitude": torch.full((64,), 0.5)}, {O_PROJ: 1.0})
    other = replace(other, saved={"output.weight": torch.full((3, 2), 4.0)})
    module, saved = differences(one, other, sizes, no_norms)
    assert (module.relative, module.magnitude) == (0, 0.5)
    assert saved.relative == pytest.approx(0.75)


def test_a_dora_is_not_the_lora_of_its_matrices(sizes):
    lora_alone = Adapter(lora(O_PROJ, 2, 64, 64), {O_PROJ: 1.0})
    tensors = {**lora_alone.tensors, f"{O_PROJ}.magnitude": torch.ones(64)}
    dora = Adapter(tensors, {O_PROJ: 1.0})
    for one, other in ((lora_alone, dora), (dora, lora_alone)):
        (found,) = differences(one, other, sizes, no_norms)
        assert (found.relative, found.magnitude) == (0, 1)


def test_an_empty_adapter_is_refused(sizes):
    with pytest.raises(AdapterError, match="no adapter"):
        differences(Adapter({}, {}), Adapter({}, {}), sizes, no_norms)


@pytest.mark.parametrize("shape", [(9, 2, 17), (5, 8, 6)], ids=["narrow", "wide"])
def test_norm_of_a_product(shape):
    out, rank, in_dim = shape
    torch.manual_seed(0)
    b, a = torch.randn(out, rank), torch.randn(rank, in_dim)
    assert product_norm(b, a) == pytest.approx(float((b.double() @ a.double()).norm()), rel=1e-12)
