"""The distance to a teacher, in pieces, beside autograd over whole logits."""

import pytest
import torch
import torch.nn.functional as F

from phi3_plugin.models import logps
from phi3_plugin.models.distillation import Teaching, token_distances
from tests.unit.test_logps import HEADS, D, N, V, filled, inputs, parameters


def teaching(rows=N, ratio=0.3, temperature=1.0, dtype=torch.float32):
    torch.manual_seed(4)
    head = torch.nn.Linear(D + 5, V, bias=False, dtype=dtype).requires_grad_(False)
    return Teaching(torch.randn(rows, D + 5).to(dtype), head, ratio, temperature)


def whole(hidden, head, targets, of):
    """Return loss, log p and distance as torch's own functions say them."""
    logits, taught = head(hidden).float(), of.head(of.hidden).float()
    logp = -F.cross_entropy(logits, targets, reduction="none")
    one, other = (torch.log_softmax(x / of.temperature, -1) for x in (logits, taught))
    kl = torch.stack(
        [F.kl_div(p, q.exp(), reduction="sum") for p, q in zip(one, other, strict=True)]
    )
    return of.kd_ratio * of.temperature**2 * kl - (1 - of.kd_ratio) * logp, logp, kl


@pytest.mark.parametrize(("ratio", "temperature"), [(0.3, 1.0), (1.0, 2.5)])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_are_those_of_whole_logits(kind, ratio, temperature, monkeypatch):
    monkeypatch.setattr(logps, "LOGITS", 2 * 64 * V)
    head, (hidden, targets) = filled(HEADS[kind]()), inputs()
    of = teaching(ratio=ratio, temperature=temperature)
    found = token_distances(hidden, head, targets, V, of)
    expected = whole(hidden, head, targets, of)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    weights, trained = torch.randn(N), (hidden, *parameters(head))
    ours = torch.autograd.grad(found[0], trained, weights)
    for one, other in zip(ours, torch.autograd.grad(expected[0], trained, weights), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("kind", ["frozen", "whole"])
def test_only_the_loss_has_a_gradient(kind):
    head, (hidden, targets) = filled(HEADS[kind]()), inputs()
    found = token_distances(hidden, head, targets, V, teaching())
    for slope in torch.autograd.grad(found[1:].sum(), (hidden, *parameters(head))):
        assert not slope.any()


def test_no_rows_have_no_distance():
    head, (hidden, targets) = filled(HEADS["frozen"]()), inputs(0)
    found = token_distances(hidden, head, targets, V, teaching(0))
    found[0].sum().backward()
    assert found.shape == (3, 0) and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("kind", ["frozen", "whole"])
def test_no_logits_exist_beyond_a_piece(kind, monkeypatch):
    monkeypatch.setattr(logps, "LOGITS", 2 * 64 * V)
    head, (hidden, targets), of = filled(HEADS[kind]()), inputs(), teaching()
    seen, asked = [], []
    head.register_forward_hook(lambda *call: seen.append(len(call[-1])))
    of.head.register_forward_hook(lambda *call: asked.append(len(call[-1])))
    token_distances(hidden, head, targets, V, of)[0].sum().backward()
    assert seen == asked == [64, 64, 22] * (1 if kind == "frozen" else 2)


def test_bf16_logits_are_compared_in_fp32():
    head = filled(HEADS["frozen"](), torch.bfloat16)
    (hidden, targets), of = inputs(dtype=torch.bfloat16), teaching(dtype=torch.bfloat16)
    found = token_distances(hidden, head, targets, V, of)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(whole(hidden, head, targets, of)))


def test_a_model_that_is_its_teacher_is_at_no_distance():
    head, (hidden, targets) = filled(HEADS["frozen"]()), inputs()
    of = Teaching(hidden.detach(), head, 1.0, 1.0)
    found = token_distances(hidden, head, targets, V, of)
    assert found[[0, 2]].abs().max() < 1e-5
    found[0].sum().backward()
    assert hidden.grad.abs().max() < 1e-5


def test_gradients_in_fp16_do_not_lose_the_many_unlikely_tokens():
    """Beside a token that both are sure of each is less likely than fp16 has numbers for."""
    wide = 20000
    torch.manual_seed(0)
    weight = torch.randn(wide, D) * 0.1
    weight[0] = 1.0
    hidden = torch.full((3, D), 1.0) + 0.01 * torch.randn(3, D)
    targets = torch.zeros(3, dtype=torch.long)
    found = {}
    for dtype in (torch.float16, torch.float32):
        head = torch.nn.Linear(D, wide, bias=False, dtype=dtype).requires_grad_(False)
        head.weight.copy_(weight.half())
        of = Teaching((hidden + 0.1).to(dtype), head, 0.5, 1.0)
        given = hidden.half().to(dtype).requires_grad_()
        token_distances(given, head, targets, wide, of)[0].sum().mul(1e4).backward()
        found[dtype] = given.grad.float()
    off = (found[torch.float16] - found[torch.float32]).norm()
    assert off <= 2e-2 * found[torch.float32].norm()
