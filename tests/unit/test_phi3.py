"""RMSNorm, SwiGLU and the rotation against autograd's own; the builders' signatures."""

import inspect
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from phi3_plugin.models import lora_phi3, lora_phi3_mini, qlora_phi3
from phi3_plugin.models.lora_settings import LoRASettings
from phi3_plugin.models.phi3 import RMSNorm, swiglu
from phi3_plugin.models.rope import rotate
from tests.twins import kept_by


def plain_norm(x, scale, eps):
    wide = x.float()
    return scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_what_autograd_gives(dtype, frozen):
    torch.manual_seed(0)
    norm = RMSNorm(48, 1e-5)
    norm.scale.data.normal_()
    norm = norm.to(dtype).requires_grad_(not frozen)
    x, direction = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True), torch.randn(2, 5, 48)
    ours, theirs = norm(x), plain_norm(x, norm.scale, 1e-5)
    assert torch.equal(ours, theirs)
    wanted = [x] if frozen else [x, norm.scale]
    found, expected = (torch.autograd.grad(o, wanted, direction.to(dtype)) for o in (ours, theirs))
    atol = 1e-6 if dtype == torch.float32 else 0.05
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=atol)
        assert one.dtype == dtype


def test_the_norm_keeps_its_input_and_a_number_a_token():
    x = torch.randn(5, 48, dtype=torch.bfloat16, requires_grad=True)
    sizes = kept_by(lambda: RMSNorm(48, 1e-5).to(torch.bfloat16)(x))
    assert sorted(sizes) == [5, 48, 5 * 48]


def test_swiglu_is_what_autograd_gives():
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), up * F.silu(gate), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(swiglu, x)
    assert kept_by(lambda: swiglu(x)) == [x.numel()]


@pytest.mark.parametrize("rotated", [16, 12])
def test_rotating_in_place_is_what_autograd_gives(rotated):
    angles = torch.rand(1, 5, 1, rotated // 2, dtype=torch.float64)
    x = torch.randn(1, 5, 6, 16, dtype=torch.float64, requires_grad=True)

    def turned(x):
        return rotate((x * 1).flatten(2), angles.cos(), angles.sin(), 4, 16)

    low, high, rest = x[:, :, :4].split([rotated // 2, rotated // 2, 16 - rotated], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    expected = torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
    torch.testing.assert_close(turned(x)[:, :, :4], expected)
    assert torch.equal(turned(x)[:, :, 4:], x[:, :, 4:])
    assert torch.autograd.gradcheck(turned, x)


@pytest.mark.parametrize("build", [lora_phi3, qlora_phi3])
def test_the_signature_names_every_option(build):
    """`tune validate` reads it."""
    parameters = inspect.signature(build).parameters
    assert list(parameters)[:2] == ["checkpoint_dir", "lora_attn_modules"]
    assert {field.name for field in fields(LoRASettings)} < parameters.keys()
    assert parameters["quantize_base"].default is (build is qlora_phi3)


def test_the_builder_without_a_folder_takes_torchtunes_options_in_their_order():
    from torchtune.models.phi3 import lora_phi3_mini as torchtunes

    theirs = [*inspect.signature(torchtunes).parameters]
    assert [*inspect.signature(lora_phi3_mini).parameters][: len(theirs)] == theirs
