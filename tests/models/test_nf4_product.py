"""Dequantizing gives torchao's bits, and products keep nothing of it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from phi3_plugin.models import nf4 as module
from phi3_plugin.models.nf4 import is_nf4, nf4_linear, plain, to_nf4
from tests.models.test_nf4 import DTYPES, weight_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(64, 256), (128, 384)])
def test_dequantizing_gives_torchaos_bits(size, dtype, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 8192)  # several pieces, the last one short
    weight = to_nf4(weight_of(*size, dtype))
    assert torch.equal(plain(weight, dtype), weight.get_original_weight())


def test_training_goes_on_after_inference():
    weight, x = to_nf4(weight_of(256, 512, torch.float32)), torch.randn(3, 512)
    module._memory.of.clear()
    with torch.inference_mode():
        first = nf4_linear(x, weight)
    assert torch.equal(nf4_linear(x.requires_grad_(), weight), first)


def test_threads_do_not_write_over_each_other():
    one, x = weight_of(256, 512, torch.float32), torch.eye(512)
    weight = to_nf4(one), to_nf4(-one)
    expected = [w.get_original_weight().t() for w in weight]

    def differences(w, right):
        return sum(not torch.equal(nf4_linear(x, w), right) for _ in range(200))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(differences, weight, expected)) == [0, 0]


def test_a_product_keeps_nothing_dequantized():
    x = torch.randn(3, 128, requires_grad=True)
    weight = to_nf4(weight_of(128, 128, torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = nf4_linear(x, weight)
    assert [is_nf4(tensor) for tensor in kept] == [True]
    direction = torch.randn(3, 128)
    out.backward(direction)
    torch.testing.assert_close(x.grad, direction @ weight.get_original_weight())
