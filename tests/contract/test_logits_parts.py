"""Adapters on parts of a fused layer, against loralib's formula and torchtune's split model."""

import pytest
import torch
import torch.nn.functional as F
from torchtune.models.phi3._component_builders import lora_phi3 as torchtune_lora_phi3
from torchtune.modules.peft import disable_adapter, get_adapter_params

from phi3_plugin.checkpoint.base import load_base_weights, split_weights
from phi3_plugin.config import read_config
from phi3_plugin.models import lora_phi3
from phi3_plugin.models.lora import LoRALinear
from phi3_plugin.models.lora_settings import LoRASettings
from phi3_plugin.models.nf4 import is_nf4
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_model, save_checkpoint

D, R, SCALE = 64, 3, 5 / 3
MHA, GQA, GATE_UP = ("qkv_proj", 3 * D), ("qkv_proj", D + 2 * 16), ("gate_up_proj", 2 * 96)
LAYERS = {"mha": MHA, "gqa": GQA, "gate_up": GATE_UP}
NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
CASES = [
    (MHA, ["q_proj", "v_proj"]),
    (MHA, ["k_proj"]),
    (MHA, ["v_proj", "q_proj", "k_proj"]),
    (GQA, ["q_proj", "v_proj"]),
    (GQA, ["k_proj"]),
    (GQA, ["q_proj", "k_proj", "v_proj"]),
    (GATE_UP, ["gate_proj"]),
    (GATE_UP, ["up_proj"]),
    (GATE_UP, ["gate_proj", "up_proj"]),
]
KEYS = {
    "apply_lora_to_output": False,
    "lora_rank": R,
    "lora_alpha": 5,
    "lora_dropout": 0.0,
    "use_dora": False,
    "quantize_base": False,
}


def new_layer(kind, parts, width=D, **keys):
    """Return a layer with random base and adapters."""
    name, out = kind
    settings = LoRASettings(parts, name == "gate_up_proj", **{**KEYS, **keys})
    layer = settings.make(name, width, out * width // D)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    layer.weight.requires_grad_(False)
    return layer


def group_sizes(kind):
    """Return by part how many of loralib's equal groups it has: one, or several for GQA's q."""
    name, out = kind
    if name == "gate_up_proj":
        return {"gate_proj": 1, "up_proj": 1}
    return {"q_proj": 2 * D // (out - D), "k_proj": 1, "v_proj": 1}


def loralib_merged_linear(layer, kind, x):
    """Compute what loralib 0.1.2 does: ``MergedLinear.merge_AB`` and ``forward``.

    Its groups are of equal size, so a q with several heads for each of k is several groups, all
    with the same A.
    """
    groups = [name for name, times in group_sizes(kind).items() for _ in range(times)]
    enabled = [hasattr(layer, name) for name in groups]
    present = dict(layer.named_children())
    lora_a = torch.cat([present[name].lora_a.weight for name in groups if name in present])
    in_order = [name for name in group_sizes(kind) if name in present]
    lora_b = torch.cat([present[name].lora_b.weight for name in in_order])
    delta = F.conv1d(lora_a[None], lora_b[:, :, None], groups=sum(enabled)).squeeze(0)
    rows = torch.zeros(len(layer.weight), dtype=torch.bool).view(len(groups), -1)
    rows[torch.tensor(enabled)] = True
    padded = delta.new_zeros(layer.weight.shape)
    padded[rows.view(-1)] = delta
    return F.linear(x, layer.weight) + x @ padded.T * SCALE


def gradients(layer):
    values = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    return values


@pytest.mark.parametrize(("kind", "parts"), CASES)
def test_output_and_gradients_are_those_of_loralib(kind, parts):
    layer = new_layer(kind, parts)
    x = torch.randn(2, 17, D, requires_grad=True)
    results = []
    for out in (layer(x), loralib_merged_linear(layer, kind, x)):
        out.square().sum().backward()
        results.append((out, {**gradients(layer), "x": x.grad.clone()}))
        x.grad = None
    (ours, grads), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected.keys()
    assert len(grads) == 2 * len(parts) + 1
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def part_rows(kind, part, width=D):
    groups = group_sizes(kind)
    unit = kind[1] * width // D // sum(groups.values())
    first = unit * sum(list(groups.values())[: list(groups).index(part)])
    return slice(first, first + unit * groups[part])


@pytest.mark.parametrize("base", ["fp32", "nf4", "bf16", "bf16 under fp32 adapters"])
@pytest.mark.parametrize(("kind", "parts"), CASES)
def test_other_rows_are_those_of_the_base_to_the_last_bit(kind, parts, base):
    layer = new_layer(kind, parts, width=256, quantize_base=base == "nf4")
    dtype = torch.bfloat16 if "bf16" in base else torch.float32
    layer.to(torch.bfloat16 if base == "bf16" else torch.float32)
    if base == "bf16 under fp32 adapters":
        layer.weight.data = layer.weight.data.bfloat16()
    x = torch.randn(2, 17, 256).to(dtype)
    out = layer(x)
    with disable_adapter(layer):
        expected = layer(x)
    assert is_nf4(layer.weight) == (base == "nf4")
    assert out.dtype == expected.dtype == dtype
    weight = layer.weight.to(torch.float32)
    torch.testing.assert_close(expected.float(), F.linear(x.float(), weight), rtol=0.01, atol=0.02)
    for part in NAMES[kind[0]]:
        rows = part_rows(kind, part, 256)
        assert torch.equal(out[..., rows], expected[..., rows]) == (part not in parts), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "parts"), CASES)
def test_each_part_is_an_ordinary_adapter_on_its_rows(kind, parts, dtype):
    layer = new_layer(kind, parts).to(dtype)
    x = torch.randn(2, 17, D, dtype=dtype)
    for part in parts:
        rows = part_rows(kind, part)
        alone = LoRALinear(D, rows.stop - rows.start, R, 5).to(dtype)
        adapter = dict(layer.get_submodule(part).named_parameters())
        alone.load_state_dict({"weight": layer.weight[rows], **adapter})
        # One matrix product for all rows may round otherwise than one for some of them.
        tolerance = 1e-6 if dtype is torch.float32 else 0.02
        torch.testing.assert_close(
            layer(x)[..., rows], alone(x), rtol=tolerance, atol=10 * tolerance
        )


def test_a_new_adapter_is_the_identity():
    layer = LoRASettings(["k_proj", "q_proj"], False, **KEYS).make(*MHA[:1], D, MHA[1])
    layer.weight.data.normal_()
    x = torch.randn(2, 9, D)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert layer.q_proj.lora_a.weight.any() and layer.k_proj.lora_a.weight.any()


def test_dropout_is_one_for_all_parts_and_acts_in_training_only():
    layer = new_layer(MHA, ["q_proj", "k_proj"], lora_dropout=0.5)
    layer.k_proj.load_state_dict(layer.q_proj.state_dict())
    layer.weight.data.zero_()
    q, k, v = layer(torch.randn(2, 9, D)).chunk(3, dim=-1)
    assert torch.equal(q, k) and not v.any()
    x = torch.randn(2, 9, D)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


FAMILIES = {"mha": (MINI_4K, TINY_MHA), "gqa": (MEDIUM_4K, TINY_GQA)}
TORCHTUNE = {
    "attn.qkv_proj.": "attn.",
    "attn.o_proj": "attn.output_proj",
    "mlp.gate_up_proj.gate_proj": "mlp.w1",
    "mlp.gate_up_proj.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    published, sizes = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("merged") / "base"
    return save_checkpoint(hf_model(published, **sizes), published, folder, **sizes)


def as_torchtune_names(name):
    for ours, theirs in TORCHTUNE.items():
        name = name.replace(ours, theirs)
    return name


def split_twin(base, model, attention, mlp):
    """Return torchtune's own model, whose q, k, v, gate and up are layers, with our weights."""
    config = read_config(base)
    twin = torchtune_lora_phi3(
        attention,
        mlp,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        embed_dim=config.hidden_size,
        intermediate_dim=config.intermediate_size,
        max_seq_len=64,
        norm_eps=config.rms_norm_eps,
        lora_rank=4,
        lora_alpha=12,
    )
    adapter = {as_torchtune_names(n): p.detach() for n, p in get_adapter_params(model).items()}
    twin.load_state_dict({**split_weights(load_base_weights(base), config), **adapter})
    return twin


@pytest.mark.parametrize(
    ("parts", "mlp"),
    [
        (["q_proj", "v_proj"], []),
        (["k_proj"], []),
        (["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_logits_and_gradients_are_those_of_torchtunes_split_model(base, parts, mlp):
    model = lora_phi3(base, [*parts, *mlp], bool(mlp), lora_rank=4, lora_alpha=12)
    model.load_state_dict(load_base_weights(base), strict=False)
    for parameter in get_adapter_params(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    attention = [as_torchtune_names(f"attn.{part}").removeprefix("attn.") for part in parts]
    twin = split_twin(base, model, attention, bool(mlp))
    batch = torch.randint(0, 150, (2, 17))
    ours, theirs = model(batch), twin(batch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for logits in (ours, theirs):
        logits.square().mean().backward()
    expected = {name: p.grad for name, p in get_adapter_params(twin).items()}
    grads = {as_torchtune_names(n): p.grad for n, p in get_adapter_params(model).items()}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 2e-5 * expected[name].norm(), name
