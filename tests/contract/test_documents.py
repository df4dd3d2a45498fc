"""Documents in one row attend as each would alone, without a mask of all pairs."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from phi3_plugin.models import attention as module
from phi3_plugin.models.attention import Documents, borders_of, take

CPU = torch.device("cpu")
HEADS = {"mha": [4, 4, 4], "gqa": [4, 2, 2]}


def row(lengths):
    empty = torch.empty(0)
    return Documents(tuple(lengths), empty, empty)


def by_mask(qkv, heads, lengths, window):
    """The rule, as one mask of all pairs."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(owner))
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    if window:
        seen &= place[:, None] - place < window
    q, k, v = qkv.transpose(1, 2).split(heads, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=heads[0] != heads[1])
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 1, 7, 8, 9, 20, 100])
@pytest.mark.parametrize("lengths", [[30], [1, 8, 9, 1, 21], [40, 3]])
def test_it_is_attention_with_a_mask_of_all_pairs(lengths, window, heads, monkeypatch):
    monkeypatch.setattr(module, "QUERIES", 8)
    torch.manual_seed(0)
    qkv = torch.randn(1, sum(lengths), sum(heads), 16, requires_grad=True)
    ours = row(lengths).attend(qkv, heads, window)
    theirs = by_mask(qkv, heads, lengths, window)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    direction = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(o, qkv, direction)[0] for o in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_no_mask_is_larger_than_the_window(monkeypatch):
    sizes = []
    attention = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **how):
        sizes.append(q.shape[2] * k.shape[2])
        return attention(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(module, "QUERIES", 8)
    row([400]).attend(torch.randn(1, 400, 3, 8), [1, 1, 1], 16)
    assert len(sizes) == 400 / 8
    assert max(sizes) == 8 * (8 + 15)


def test_borders_are_where_documents_begin_and_the_last_ends():
    borders = borders_of((3, 1, 5), CPU)
    assert borders.tolist() == [0, 3, 4, 9]
    assert borders.dtype == torch.int32
    assert torch.equal(row([3, 1, 5]).borders, borders)


def test_taking_tokens_puts_their_gradient_back():
    x = torch.randn(2, 3, 4, requires_grad=True)
    taken = take(x, torch.tensor([0, 2, 4]))
    assert torch.equal(taken[0], x.flatten(0, 1)[[0, 2, 4]])
    taken.backward(torch.ones_like(taken))
    assert x.grad.sum(-1).tolist() == [[4, 0, 4], [0, 4, 0]]
    assert take(x, None) is x
    assert take(x, torch.tensor([], dtype=torch.int64)).shape == (1, 0, 4)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_the_kernel_takes_what_it_is_given(heads):
    """Shapes alone, which needs no GPU."""
    qkv = torch.empty(1, 50, sum(heads), 96, dtype=torch.bfloat16, device="meta")
    qkv.requires_grad_()
    out = Documents((20, 30), qkv, qkv).by_kernel(qkv, heads, 7)
    assert out.shape == (1, 50, heads[0] * 96)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_a_compiled_layer_serves_every_pack():
    """Once for the first pack and once for those of other sizes, not for each; shapes alone."""
    counter = CompileCounter()
    attend = torch.compile(lambda qkv, d: d.by_kernel(qkv, [4, 4, 4], 7), backend=counter)
    for lengths in [(20, 30), (10, 25, 40), (5, 6, 7, 8), (50, 20), (9, 9, 9, 9, 9)]:
        qkv = torch.empty(1, sum(lengths), 12, 16, dtype=torch.bfloat16, device="meta")
        attend(qkv, Documents(lengths, qkv, qkv))
    assert counter.frame_count == 2


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 7, 64])
def test_the_kernel_computes_what_the_cpu_does(window, heads):
    lengths = [130, 1, 65, 300]
    qkv = torch.randn(1, sum(lengths), sum(heads), 96, dtype=torch.bfloat16, device="cuda")
    qkv.requires_grad_()
    ours = Documents(tuple(lengths), qkv, qkv).attend(qkv, heads, window)
    theirs = by_mask(qkv.float().cpu(), heads, lengths, window)
    torch.testing.assert_close(ours.float().cpu(), theirs, rtol=0, atol=2e-2)
    ours.sum().backward()
    assert qkv.grad.isfinite().all()
