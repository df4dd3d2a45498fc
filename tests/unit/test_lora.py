"""The frozen linear layer with adapters against autograd's own, in fp64; whole models against PEFT.

Options and what is wrong with them are in test_lora_settings.py.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from phi3_plugin.models import lora as module
from phi3_plugin.models.lora import Update, lora_linear
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.models.nf4 import nf4_zeros
from tests.twins import BATCH, assert_same, base_of, kept_by, ours, train_by_hand, twin

INPUT, OUTPUT, RANK = 6, 10, 3


def random(*shape, **how):
    return torch.randn(*shape, dtype=torch.float64, **how)


def factors(*rows):
    """Return adapters for consecutive rows, with gradients; those of None have none."""
    start, found = 0, []
    for count, has_one in rows:
        if has_one:
            a, b = random(RANK, INPUT, requires_grad=True), random(count, RANK, requires_grad=True)
            found.append(Update(start, 0.7 + start, a, b))
        start += count
    return found


def composed(x, weight, adapters, kept=None, dropout=0.0):
    """The same by autograd, one operation after the other."""
    out = x @ weight.t()
    seen = x if kept is None else x * kept / (1 - dropout)
    for start, scaling, a, b in adapters:
        padding = (start, len(weight) - start - len(b))
        out = out + nn.functional.pad(seen @ a.t() @ b.t() * scaling, padding)
    return out


@pytest.mark.parametrize("shape", [(5,), (2, 4), (0,)])
@pytest.mark.parametrize(
    "rows",
    [[(10, True)], [(4, True), (3, False), (3, True)], [(4, False), (6, True)]],
    ids=["all", "first and last", "last"],
)
def test_it_is_what_autograd_gives(rows, shape):
    torch.manual_seed(0)
    x, weight, adapters = random(*shape, INPUT, requires_grad=True), random(OUTPUT, INPUT), None
    adapters = factors(*rows)
    trained = [x, *(f for adapter in adapters for f in (adapter.a, adapter.b))]
    ours, theirs = lora_linear(x, weight, adapters), composed(x, weight, adapters)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    direction = random(*ours.shape)
    found, expected = (torch.autograd.grad(out, trained, direction) for out in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_dropout_is_the_same_forward_and_backward(monkeypatch):
    torch.manual_seed(0)
    x, weight, (adapter,) = (
        random(7, INPUT, requires_grad=True),
        random(OUTPUT, INPUT),
        factors((OUTPUT, True)),
    )
    kept = torch.rand(7, INPUT) >= 0.4
    monkeypatch.setattr(module, "keep_mask", lambda x, dropout: kept)
    ours = lora_linear(x, weight, [adapter], dropout=0.4)
    theirs = composed(x, weight, [adapter], kept, 0.4)
    torch.testing.assert_close(ours, theirs)
    trained, direction = (x, adapter.a, adapter.b), random(7, OUTPUT)
    found, expected = (torch.autograd.grad(out, trained, direction) for out in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_dropout_drops_its_share():
    torch.manual_seed(0)
    kept = module.keep_mask(torch.empty(1000, 100), 0.3)
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert module.keep_mask(torch.empty(3, 3), 0.0) is None


def test_a_weight_that_is_trained_too_has_its_gradient():
    torch.manual_seed(0)
    x, weight = random(7, INPUT), random(OUTPUT, INPUT, requires_grad=True)
    adapters, direction = factors((OUTPUT, True)), random(7, OUTPUT)
    found, expected = (
        torch.autograd.grad(linear(x, weight, adapters), weight, direction)[0]
        for linear in (lora_linear, composed)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("quantized", [False, True])
def test_only_the_input_and_what_is_as_narrow_as_the_rank_are_kept(quantized):
    tokens, wide, rank = 50, 256, 4
    weight = nf4_zeros(wide, wide) if quantized else torch.zeros(wide, wide)
    a, b = nn.Parameter(torch.zeros(rank, wide)), nn.Parameter(torch.zeros(wide, rank))
    x = torch.randn(tokens, wide, requires_grad=True)
    sizes = kept_by(lambda: lora_linear(x, weight, [Update(0, 2.0, a, b)]))
    parameters = {weight.numel(), a.numel(), b.numel()}
    assert sorted(n for n in sizes if n not in parameters) == [tokens * rank, tokens * wide]


def test_recomputing_leaves_out_the_last_large_product(monkeypatch):
    calls = []
    add = module._add_base
    monkeypatch.setattr(module, "_add_base", lambda *given: calls.append(1) or add(*given))
    x, weight = random(7, INPUT, requires_grad=True), random(INPUT, INPUT)
    one, two = (
        Update(0, 1.0, random(2, INPUT, requires_grad=True), random(INPUT, 2)) for _ in range(2)
    )

    def both(x):
        return lora_linear(lora_linear(x, weight, [one]), weight, [two])

    both(x).sum().backward()
    expected, calls[:] = x.grad, []
    x.grad = None
    checkpoint(both, x, use_reentrant=False).sum().backward()
    assert len(calls) == 3  # both, and the first again
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32])
def test_adapters_of_another_precision_have_gradients_of_their_own(adapters):
    x = torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True)
    a, b = (torch.randn(*s, dtype=adapters, requires_grad=True) for s in ((4, 32), (16, 4)))
    out = lora_linear(x, torch.randn(16, 32, dtype=torch.bfloat16), [Update(0, 0.5, a, b)])
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == adapters


@pytest.fixture(scope="module", params=["mini", "gqa"])
def base(request, tmp_path_factory):
    return base_of(request.param, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("targets", [*([name] for name in TARGETS), TARGETS], ids="+".join)
def test_logits_and_gradients_equal_peft(base, targets):
    hf, folder = base
    model = ours(folder, targets)
    train_by_hand(model)
    assert_same(model, twin(hf, model, targets))


@torch.no_grad()
def test_a_new_adapter_is_the_identity(base):
    hf, folder = base
    model = ours(folder)
    assert torch.equal(model(BATCH), hf(input_ids=BATCH, use_cache=False).logits)
    assert all(layer.attn.qkv_proj.lora_a.weight.any() for layer in model.layers)


@torch.no_grad()
def test_dropout_acts_in_training_only(base):
    model = ours(base[1], ["o_proj"], lora_dropout=0.5).train()
    train_by_hand(model)
    assert not torch.equal(model(BATCH), model(BATCH))
    assert torch.equal(model.eval()(BATCH), model(BATCH))
