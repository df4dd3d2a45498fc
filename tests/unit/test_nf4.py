"""Quantizing and dequantizing piece by piece gives torchao's bits; products keep nothing of it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from phi3_plugin.models import nf4
from phi3_plugin.models.nf4 import (
    NF4_BLOCK,
    NF4Tensor,
    is_nf4,
    nf4_linear,
    nf4_zeros,
    plain,
    rows_of,
    to_nf4,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
WHOLE = {"scaler_mean", "nf4"}
"""Parts that every shard has whole."""


def parts(weight):
    return {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}


def same(one, other):
    """Whether all parts have the same dtype and bits, NaN included."""
    one, other = parts(one), parts(other)
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and torch.equal(one[n].view(-1).view(torch.uint8), other[n].view(-1).view(torch.uint8))
        for n in one
    )


def weight_of(rows, columns, dtype):
    """Values of several sizes; a group of zeros, one with an outlier, ties, and subnormals."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1) ** 4
    flat = weight.view(-1)
    flat[:64], flat[64], flat[128:192], flat[192:256] = 0, 1e4, 0.5, 1e-7
    return weight.to(dtype)


def in_the_model(dtype, *size):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return nf4_zeros(*size).data
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(384, 256), (512, 96), (128, 1024), (7, NF4_BLOCK)])
@pytest.mark.parametrize("piece", [1, 30_000, 1 << 22])
def test_pieces_are_the_whole(monkeypatch, stored, dtype, size, piece):
    weight = weight_of(*size, stored)
    expected = in_the_model(dtype, *size)
    expected.copy_(weight)  # what load_state_dict does
    monkeypatch.setattr(nf4, "QUANTIZED_AT_ONCE", piece)
    with torch.device("meta"):
        like = in_the_model(dtype, *size)
    found = rows_of(weight, like, 0, 1, CPU)
    assert (found.shape, found.dtype, found.n_blocks) == (like.shape, dtype, like.n_blocks)
    assert found.device == CPU and same(found, expected)
    like = in_the_model(dtype, *size)
    assert rows_of(weight, like, 0, 1, CPU) is like
    assert same(like, expected)


@pytest.mark.parametrize("shape", [(193, 5), (300,), (130, 2, 3)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_plain_rows_are_filled_in_place_or_made(monkeypatch, shape, size):
    monkeypatch.setattr(nf4, "QUANTIZED_AT_ONCE", 1)
    weight = torch.randn(shape)
    for rank, rows in enumerate(weight.bfloat16().chunk(size)):
        for device in ("cpu", "meta"):
            like = torch.zeros(rows.shape, dtype=torch.bfloat16, device=device)
            found = rows_of(weight, like, rank, size, CPU)
            assert (found is like) == (device == "cpu")
            assert torch.equal(found, rows)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_shards_are_parts_of_the_whole(size, dtype, stored):
    weight = weight_of(384, 256, stored)
    with torch.device("meta"):
        like = in_the_model(dtype, 384, 256)
    shards = [parts(rows_of(weight, like, rank, size, CPU)) for rank in range(size)]
    one = in_the_model(dtype, 384, 256)
    one.copy_(weight)
    for name, whole in parts(one).items():
        if name in WHOLE:
            assert all(torch.equal(shard[name], whole) for shard in shards)
        else:
            assert torch.equal(torch.cat([shard[name] for shard in shards]), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_gets_the_code_that_torchao_finds(dtype):
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    for values in (finite[: len(finite) // 64 * 64], every):
        levels = to_nf4(values.view(-1, 64)[:256].reshape(1, -1).nan_to_num()).nf4
        expected = NF4Tensor.convert_to_norm_float_weight(values, len(values) // 64, 64, levels)
        assert torch.equal(nf4._coder(levels)(values), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_zeros_are_those_of_torchao(dtype, device):
    with torch.device(device):
        zeros = in_the_model(dtype, 256, 192)
        expected = to_nf4(torch.zeros(256, 192, dtype=dtype))
    assert zeros.__tensor_flatten__()[1] == expected.__tensor_flatten__()[1]
    assert {n: v.shape for n, v in parts(zeros).items()} == {
        n: v.shape for n, v in parts(expected).items()
    }
    if device == "cpu":
        assert same(zeros, expected)
        assert not zeros.get_original_weight().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(64, 256), (128, 384)])
def test_dequantizing_gives_torchaos_bits(size, dtype, monkeypatch):
    monkeypatch.setattr(nf4, "DEQUANTIZED_AT_ONCE", 10240)  # several pieces, the last one short
    weight = to_nf4(weight_of(*size, dtype))
    assert torch.equal(plain(weight, dtype), weight.get_original_weight())


def test_training_goes_on_after_inference():
    weight, x = to_nf4(weight_of(256, 512, torch.float32)), torch.randn(3, 512)
    nf4._memory.of.clear()
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


@pytest.mark.parametrize("size", [1, 1e-3])
def test_scales_of_a_weight_in_fp16_keep_their_range(size):
    """Where they are alike, what they are divided by is more than fp16 has numbers for."""
    weight = size * torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    found = rows_of(weight, in_the_model(torch.float16, *weight.shape), 0, 1, CPU)
    exact = rows_of(weight, in_the_model(torch.float32, *weight.shape), 0, 1, CPU)
    assert found.dtype == torch.float16
    assert found.quantization_factor.isfinite().all()
    difference = plain(found, torch.float32) - plain(exact, torch.float32)
    assert difference.norm() <= 1e-3 * weight.norm()
