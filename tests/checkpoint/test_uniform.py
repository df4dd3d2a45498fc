"""Scales become one, and the original numbers come back from what little is noted."""

import pytest
import torch

from phi3_plugin.checkpoint.adapter import exact, rescale, restore, whole_alpha
from phi3_plugin.errors import AdapterError

B = "m.lora_b.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 2.0, 0.125, 3.0, 1 / 3, 1.0056, 2**0.5, 1e-3])
def test_every_number_comes_back(dtype, factor):
    torch.manual_seed(0)
    b = torch.randn(400, 50).to(dtype)
    b[0, :4] = torch.tensor([0.0, -0.0, 1e-6, -1e-6], dtype=dtype)  # subnormal in fp16 when scaled
    scaled, notes = rescale({B: b}, {"m": factor})
    bits = {2: torch.int16, 4: torch.int32}[b.element_size()]
    again = restore(scaled[B], factor, notes.get("m"))
    assert torch.equal(again.view(bits), b.view(bits))
    assert torch.equal(scaled[B], (b.double() * factor).to(dtype))


def test_a_power_of_two_needs_no_note():
    b = torch.randn(30, 4)
    assert rescale({B: b}, {"m": 0.25})[1] == rescale({B: b}, {"m": 8.0})[1] == {}


def test_a_note_is_small_where_alpha_nearly_says_the_scale():
    b = torch.randn(3072, 8)
    alpha = whole_alpha([16 / 8**0.5], 8)
    _, notes = rescale({B: b}, {"m": 16 / 8**0.5 / (alpha / 8)})
    assert alpha == 45
    assert len(notes["m"]) < 0.01 * b.nbytes


def test_a_number_that_becomes_too_large_is_refused():
    with pytest.raises(
        AdapterError, match=r"m: its B times 100000, .* too large for torch\.float16"
    ):
        rescale({B: torch.ones(2, 2, dtype=torch.float16)}, {"m": 1e5})


def test_numbers_that_become_too_small_are_refused():
    b = torch.full((2, 2), 1e-3, dtype=torch.float16)
    with pytest.raises(
        AdapterError, match=r"m: its B times 0\.0001, .* too small for torch\.float16"
    ):
        rescale({B: b}, {"m": 1e-4})
    assert rescale({B: b.bfloat16()}, {"m": 1e-4})[0][B].all()
    assert not rescale({B: b * 0}, {"m": 1e-4})[0][B].any()


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
    assert whole_alpha(scales, rank) == alpha
    assert whole_alpha(scales[::-1], rank) == alpha  # a file must give the same when it is read


def test_a_shift_of_the_exponent_is_exact():
    assert exact(3.0, 0.75)
    assert not exact(3.0, 1.0)
