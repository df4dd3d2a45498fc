"""A DoRA refitted as LoRA: the nearest of its rank, with the error that is left."""

import pytest
import torch

from phi3_plugin.checkpoint import refit as module
from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.hf import load_base_weights, open_weights
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.checkpoint.refit import nearest, refit
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError
from tests.oracles import MINI_4K, TINY_MHA, hf_model, save_checkpoint

Q, OUT, UP = "attn.qkv_proj.q_proj", "attn.o_proj", "mlp.gate_up_proj"
SHAPES = {Q: (64, 64), OUT: (64, 64), UP: (192, 64)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refit") / "base"
    return save_checkpoint(hf_model(MINI_4K, **TINY_MHA), MINI_4K, folder, **TINY_MHA)


def dora(base, names=(Q, OUT), plain=(UP,)):
    torch.manual_seed(0)
    weights, tensors = load_base_weights(base), {}
    for name in (*names, *plain):
        out, inner = SHAPES[name]
        tensors[f"layers.0.{name}.lora_a.weight"] = torch.randn(2, inner) * 0.2
        tensors[f"layers.0.{name}.lora_b.weight"] = torch.randn(out, 2) * 0.2
        if name in names:
            whole = weights[f"layers.0.{name.removesuffix('.q_proj')}.weight"][:out]
            norms = whole.norm(dim=1) * (0.8 + 0.4 * torch.rand(out))
            tensors[f"layers.0.{name}.magnitude"] = norms
    return Adapter.of(tensors, 2.0, base="mine")


def changed(base, adapter, out):
    merge_into(out, base, adapter)
    one, other = load_base_weights(base), load_base_weights(out)
    return {
        name: other[name] - one[name] for name in one if not torch.equal(one[name], other[name])
    }


def test_at_full_rank_nothing_is_lost(base, tmp_path):
    adapter = dora(base)
    found, error = refit(adapter, open_weights(base), read_config(base), 64)
    assert error < 1e-5 and not found.is_dora
    assert found.base == "mine" and found.ranks[f"layers.0.{Q}"] == 64
    expected, got = changed(base, adapter, tmp_path / "a"), changed(base, found, tmp_path / "b")
    assert expected.keys() == got.keys() and len(got) == 3
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_error_is_what_the_merged_weights_show(base, tmp_path, rank):
    adapter = dora(base, plain=())
    found, error = refit(adapter, open_weights(base), read_config(base), rank)
    wanted, got = changed(base, adapter, tmp_path / "a"), changed(base, found, tmp_path / "b")
    lost = sum((wanted[n] - got[n]).square().sum() for n in wanted)
    best = 0.0
    for name, value in wanted.items():
        rows = value[:64] if "qkv" in name else value
        best += torch.linalg.svdvals(rows.double())[rank:].square().sum().item()
    total = sum(value.square().sum() for value in wanted.values())
    assert error == pytest.approx((lost / total).sqrt().item(), rel=1e-3)
    assert error == pytest.approx((best / total.item()) ** 0.5, rel=1e-3)
    assert 0.01 < error < 0.95


def test_modules_without_a_magnitude_stay_as_they_are(base):
    adapter = dora(base)
    found, _ = refit(adapter, open_weights(base), read_config(base), 3)
    for kind in "ab":
        name = f"layers.0.{UP}.lora_{kind}.weight"
        assert found.tensors[name] is adapter.tensors[name]
    assert found.scales[f"layers.0.{UP}"] == 2.0 and found.scales[f"layers.0.{OUT}"] == 1.0


def test_an_embedding_has_its_norms_by_column(base, tmp_path):
    torch.manual_seed(1)
    a, b = torch.randn(2, 160) * 0.2, torch.randn(64, 2) * 0.2
    norms = load_base_weights(base)["tok_embeddings.weight"].norm(dim=0) * 1.3
    name = "tok_embeddings"
    tensors = {f"{name}.lora_a.weight": a, f"{name}.lora_b.weight": b, f"{name}.magnitude": norms}
    adapter = Adapter.of(tensors, 1.0)
    found, error = refit(adapter, open_weights(base), read_config(base), 64)
    assert error < 1e-5 and found.tensors[f"{name}.lora_a.weight"].shape == (64, 160)
    expected, got = changed(base, adapter, tmp_path / "a"), changed(base, found, tmp_path / "b")
    torch.testing.assert_close(got[f"{name}.weight"], expected[f"{name}.weight"], rtol=0, atol=1e-5)


def test_large_layers_are_as_near_to_within_a_hundredth(monkeypatch):
    torch.manual_seed(2)
    falling = torch.linspace(1, 0.2, 90)  # DoRA's singular values fall slowly
    u, v = (torch.linalg.qr(torch.randn(n, 90))[0] for n in (200, 90))
    delta = u @ torch.diag(falling) @ v.T
    best = falling[8:].norm()
    monkeypatch.setattr(module, "EXACT", 10)
    before = torch.random.get_rng_state()
    a, b = nearest(delta, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert best <= (delta - b @ a).norm() * 1.00001 <= 1.01 * best


def test_a_rank_above_the_layers_is_filled_with_zeros():
    a, b = nearest(torch.ones(3, 5), 7)
    assert a.shape == (7, 5) and b.shape == (3, 7)
    torch.testing.assert_close(b @ a, torch.ones(3, 5))


def test_what_gives_nothing_is_refused(base):
    weights, config = open_weights(base), read_config(base)
    with pytest.raises(AdapterError, match="refit_rank: 1000000000 is above 64"):
        refit(dora(base), weights, config, 10**9)
    with pytest.raises(AdapterError, match="no DoRA, so there is nothing to refit"):
        refit(dora(base, names=(), plain=(UP,)), weights, config, 4)


@pytest.mark.parametrize("rank", [0, -1, 2.5])
def test_a_rank_must_be_one(base, rank):
    with pytest.raises(AdapterError, match=f"rank: {rank} must be a whole number above 0"):
        refit(dora(base), open_weights(base), read_config(base), rank)


def test_another_base_is_refused(base):
    weights = load_base_weights(base)
    name = f"layers.0.{OUT}.weight"
    with pytest.raises(
        AdapterError, match=r"\[64, 64\] weights, which are \[64, 63\] in this base"
    ):
        refit(dora(base), {**weights, name: weights[name][:, :63]}, read_config(base), 2)
    del weights[name]
    with pytest.raises(AdapterError, match=f"the base has no {name}"):
        refit(dora(base), weights, read_config(base), 2)
