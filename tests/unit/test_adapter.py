"""An adapter knows its ranks and kind; scales become one, and the original numbers come back."""

import pytest
import torch

from phi3_plugin.checkpoint.adapter import Adapter, integer_alpha, level_scales, original
from phi3_plugin.errors import AdapterError

O_PROJ, HEAD = "layers.0.attn.o_proj", "output.weight"


def test_trained_tensors_are_sorted():
    values = {
        f"{O_PROJ}.lora_a.weight": torch.ones(4, 8),
        f"{O_PROJ}.lora_b.weight": torch.ones(8, 4),
        HEAD: torch.ones(9, 8),
    }
    adapter = Adapter.of(values, 3.0, dropout=0.1, origin={"layout": "fused"})
    assert adapter.tensors.keys() == values.keys() - {HEAD}
    assert adapter.saved.keys() == {HEAD}
    assert (adapter.scales, adapter.ranks) == ({O_PROJ: 3.0}, {O_PROJ: 4})
    assert (adapter.dropout, adapter.origin) == (0.1, {"layout": "fused"})
    assert not adapter.is_dora
    dora = Adapter.of({**values, f"{O_PROJ}.magnitude": torch.ones(8)}, 3.0)
    assert dora.is_dora
    assert dora.ranks == adapter.ranks


B = "m.lora_b.weight"


def leveled(b, factor):
    """Multiply a B, as for an adapter whose modules are all to have the scale 1."""
    tensors = {"m.lora_a.weight": torch.ones(b.shape[1], 3), B: b}
    return level_scales(Adapter(tensors, {"m": factor}), {"m": 1.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 2.0, 0.125, 3.0, 1 / 3, 1.0056, 2**0.5, 1e-3])
def test_every_number_comes_back(dtype, factor):
    torch.manual_seed(0)
    b = torch.randn(400, 50).to(dtype)
    b[0, :4] = torch.tensor([0.0, -0.0, 1e-6, -1e-6], dtype=dtype)  # subnormal in fp16 when scaled
    tensors, note = leveled(b, factor)
    bits = {2: torch.int16, 4: torch.int32}[b.element_size()]
    again, scales = original(tensors, note, None)
    assert torch.equal(again[B].view(bits), b.view(bits))
    assert torch.equal(tensors[B], (b.double() * factor).to(dtype)) and scales == {"m": factor}


def test_a_power_of_two_needs_no_note():
    b = torch.randn(30, 4)
    assert all("rounded" not in leveled(b, factor)[1] for factor in (0.25, 8.0))


def test_a_note_is_small_where_alpha_nearly_says_the_scale():
    b = torch.randn(3072, 8)
    alpha = integer_alpha([16 / 8**0.5], 8)
    _, note = leveled(b, 16 / 8**0.5 / (alpha / 8))
    assert alpha == 45
    assert len(note["rounded"]["m"]) < 0.01 * b.nbytes


def test_a_number_that_becomes_too_large_is_refused():
    with pytest.raises(
        AdapterError, match=r"m: its B times 100000, .* too large for torch\.float16"
    ):
        leveled(torch.ones(2, 2, dtype=torch.float16), 1e5)


def test_numbers_that_become_too_small_are_refused():
    b = torch.full((2, 2), 1e-3, dtype=torch.float16)
    with pytest.raises(
        AdapterError, match=r"m: its B times 0\.0001, .* too small for torch\.float16"
    ):
        leveled(b, 1e-4)
    assert leveled(b.bfloat16(), 1e-4)[0][B].all()
    assert not leveled(b * 0, 1e-4)[0][B].any()


@pytest.mark.parametrize(
    ("scales", "rank", "alpha"),
    [
        ([3.0, 3.0], 4, 12),
        ([3.0, 1.5, 0.75, 1.0], 4, 12),  # the first three are shifts of each other
        ([16 / 12], 12, 16),
        ([0.01], 4, 1),
        ([1.3 / 4], 4, 1),
        ([2**0.5, 2**0.5, 1.0], 8, 8),
        ([1.0, 2.0, 1.0, 2.0], 8, 16),  # equally good ones: the larger
        ([2.0, 1.0, 0.37, 0.37], 24, 48),
        ([1 / 3.3, 1 / 3.1], 4, 1),
        ([33 / 7, 31 / 7], 4, 18),
    ],
)
def test_alpha_is_whole_and_says_what_most_modules_have(scales, rank, alpha):
    assert integer_alpha(scales, rank) == alpha
    assert integer_alpha(scales[::-1], rank) == alpha  # a file must give the same when it is read
