"""Log p of labelled tokens, in pieces, beside autograd over whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torchtune.modules import TiedLinear

from phi3_plugin.models import logps as module
from phi3_plugin.models.logps import token_logps
from phi3_plugin.models.lora import Embedding, Linear, LoRALinear, WholeLinear

N, D, V = 150, 16, 23


def lora(dropout=0.0):
    return LoRALinear(D, V, rank=3, alpha=6, dropout=dropout)


HEADS = {
    "frozen": lambda: Linear(D, V).requires_grad_(False),
    "frozen, with an adapter": lambda: lora().requires_grad_(False),
    "whole": lambda: WholeLinear(D, V),
    "adapter": lora,
    "tied": lambda: TiedLinear(Embedding(V, D)),
}


def parameters(head):
    owner = head.tied_module if isinstance(head, TiedLinear) else head
    return [p for p in owner.parameters() if p.requires_grad]


def filled(head, dtype=torch.float32):
    torch.manual_seed(0)
    owner = head.tied_module if isinstance(head, TiedLinear) else head
    with torch.no_grad():
        for parameter in owner.to(dtype).parameters():
            parameter.normal_()
    return head


def inputs(rows=N, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(rows, D).to(dtype).requires_grad_(), torch.randint(V, (rows,))


def whole(hidden, head, targets, smoothing=0.0):
    logits = head(hidden).float()
    return -F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("rows", [N, 64, 1, 0])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_values_and_gradients_are_those_of_whole_logits(kind, rows, smoothing, monkeypatch):
    """Whatever the loss weighs each row with, and however many pieces there are."""
    monkeypatch.setattr(module, "LOGITS", 64 * V)
    head, (hidden, targets) = filled(HEADS[kind]()), inputs(rows)
    ours = token_logps(hidden, head, targets, V, smoothing)
    theirs = whole(hidden, head, targets, smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert ours.dtype == torch.float32
    weights, trained = torch.randn(rows), (hidden, *parameters(head))
    found = torch.autograd.grad(ours, trained, weights)
    for one, other in zip(found, torch.autograd.grad(theirs, trained, weights), strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


def test_bf16_logits_are_read_in_fp32_and_pieces_summed_in_it(monkeypatch):
    """A sum of many small pieces in bf16 would stop growing."""
    monkeypatch.setattr(module, "LOGITS", 1)
    head = filled(WholeLinear(D, V), torch.bfloat16)
    hidden, targets = inputs(64 * 40, torch.bfloat16)
    ours, theirs = token_logps(hidden, head, targets, V), whole(hidden, head, targets)
    assert torch.equal(ours, theirs)
    ours.sum().backward()
    exact = filled(WholeLinear(D, V), torch.bfloat16).float()
    whole(hidden.detach().float(), exact, targets).sum().backward()
    expected = exact.weight.grad
    assert (head.weight.grad - expected).norm() <= 2e-3 * expected.norm()


def test_gradients_in_fp16_do_not_lose_the_many_unlikely_tokens():
    """Beside a token that is sure each is less likely than fp16 has numbers for; all pull alike."""
    torch.manual_seed(0)
    head, vocabulary = Linear(D, 32064).requires_grad_(False), 32064
    hidden, targets = torch.randn(20, D), torch.arange(20)
    head.weight.normal_(std=0.02)[:, 0] += 1
    head.weight[:20] += 18 * hidden / hidden.square().sum(dim=1, keepdim=True)
    head, hidden = head.half(), hidden.half().requires_grad_()
    weight, p = head.weight.float(), head(hidden).float().softmax(dim=1).detach()
    assert p[:, 20:].max() < 2.9e-8 and p[:, 20:].sum(dim=1).max() > 1e-4
    expected = 65536 / 1000 * (p @ weight - weight[targets])
    token_logps(hidden, head, targets, vocabulary).backward(torch.full((20,), -65536 / 1000))
    assert (hidden.grad - expected).norm() <= 2e-3 * expected.norm()


def test_a_dropped_input_of_the_heads_adapter_is_dropped_again(monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 64 * V)
    head, (hidden, targets) = filled(lora(dropout=0.5)), inputs(50)
    values = []
    for logps_of in (
        lambda: token_logps(hidden, head, targets, V),
        lambda: whole(hidden, head, targets),
    ):
        torch.manual_seed(2)
        logps = logps_of()
        torch.manual_seed(3)
        values.append([logps, *torch.autograd.grad(logps.sum(), (hidden, *parameters(head)))])
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_disabled_adapter_has_no_gradient():
    head, (hidden, targets) = filled(lora()), inputs()
    head.weight.requires_grad_(False)
    head.disabled = True
    token_logps(hidden, head, targets, V).sum().backward()
    assert hidden.grad.any() and all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize("kind", ["frozen", "whole"])
def test_no_logits_exist_beyond_a_piece(kind, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 64 * V)
    head, (hidden, targets) = filled(HEADS[kind]()), inputs()
    seen = []
    head.register_forward_hook(lambda *call: seen.append(len(call[-1])))
    token_logps(hidden, head, targets, V).sum().backward()
    assert seen == [64, 64, 22] * (1 if kind == "frozen" else 2)


def test_without_gradients_the_head_runs_once(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", None)
    head, (hidden, targets) = filled(WholeLinear(D, V)), inputs()
    seen = []
    head.register_forward_hook(lambda *call: seen.append(len(call[-1])))
    with torch.no_grad():
        assert not token_logps(hidden.detach(), head, targets, V).requires_grad
    assert seen == [N]


def test_rows_become_probabilities_a_few_at_a_time_and_are_the_same(monkeypatch):
    """Bit for bit; without a gradient the logits stay as they are."""
    head, found = filled(HEADS["frozen"](), torch.bfloat16), []
    hidden, targets = inputs(dtype=torch.bfloat16)
    weights = torch.randn(N)
    for size in (1 << 17, 7 * V, 1):
        monkeypatch.setattr(module, "IN_CACHE", size)
        logps = token_logps(hidden, head, targets, V)
        found.append((logps, *torch.autograd.grad(logps, hidden, weights)))
    for values in zip(*found, strict=True):
        assert all(torch.equal(values[0], other) for other in values[1:])
    logits = []
    head.register_forward_hook(lambda *call: logits.append((call[-1], call[-1].clone())))
    token_logps(hidden.detach(), head, targets, V)
    assert torch.equal(*logits[0])
