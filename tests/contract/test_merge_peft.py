"""A merged checkpoint computes what transformers and PEFT compute with the adapter."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.config import read_config
from phi3_plugin.models import lora_phi3
from phi3_plugin.proof import load_base_with_hf
from tests.chosen import some
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_model, save_checkpoint

R, ALPHA = 3, 6
TIED = {**MINI_4K, "tie_word_embeddings": True}
BASES = {"mha": (MINI_4K, TINY_MHA), "gqa": (MEDIUM_4K, TINY_GQA), "tied": (TIED, TINY_GQA)}
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"o_proj": 5}, "alpha_pattern": {"o_proj": 1, "down_proj": 4}},
    "embedding": {"target_modules": [*FUSED, "embed_tokens"]},
    "head": {"target_modules": [*FUSED, "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "dora embedding": {"use_dora": True, "target_modules": [*FUSED, "embed_tokens"]},
    "dora head": {"use_dora": True, "target_modules": [*FUSED, "lm_head"]},
}
PARTS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def write_base(folder, kind="mha"):
    published, sizes = BASES[kind]
    return save_checkpoint(hf_model(published, **sizes), published, folder, **sizes)


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("merge") / "base", request.param)


def peft_model(base, **keys):
    """Return PEFT's model with random adapters, and what it adds as our adapter."""
    keys = {"target_modules": FUSED, "r": R, "lora_alpha": ALPHA, **keys}
    model = get_peft_model(load_base_with_hf(base), LoraConfig(task_type="CAUSAL_LM", **keys))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "magnitude" in name:
                parameter.data *= 0.5 + torch.rand_like(parameter)
            else:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.eval(), ours(model)


def ours(model):
    """Read the modules of PEFT's model; no name of a file is involved."""
    tensors, scales, saved = {}, {}, {}
    for name, module in model.get_base_model().named_modules():
        name = renamed(name)
        if hasattr(module, "modules_to_save"):
            saved[f"{name}.weight"] = module.modules_to_save["default"].weight.detach()
        if getattr(module, "r", None):
            kind = "lora_embedding_" if len(module.lora_embedding_A) else "lora_"
            for letter in "AB":
                part = getattr(module, kind + letter)["default"]
                weight = getattr(part, "weight", part).detach()
                tensors[f"{name}.lora_{letter.lower()}.weight"] = weight
            scales[name] = module.scaling["default"]
            if "default" in module.lora_magnitude_vector:
                norms = module.lora_magnitude_vector["default"].weight.detach()
                tensors[f"{name}.magnitude"] = norms
    return Adapter(tensors, scales, saved)


def renamed(name):
    for theirs, other in {
        "model.embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn": "attn",
        "model.layers": "layers",
    }.items():
        name = name.replace(theirs, other)
    return name


def logits(model):
    batch = torch.randint(0, 150, (2, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=batch, use_cache=False).logits


@pytest.mark.parametrize("kind", some(KINDS, ["dora", "rslora", "both", "saved embedding"]))
def test_the_merged_model_computes_what_peft_does(base, kind, tmp_path):
    model, adapter = peft_model(base, **KINDS[kind])
    report = merge_into(tmp_path / "out", base, adapter)
    expected, found = logits(model), logits(load_base_with_hf(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - logits(load_base_with_hf(base))).abs().max() > 0.01
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    changes_the_ends = bool({"tok_embeddings.weight", "output.weight"} & {*report.changed})
    assert report.untied == (tied and changes_the_ends)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] == (tied and not report.untied)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_parts_change_their_own_rows_only(base, dora, tmp_path):
    keys = {"lora_rank": R, "lora_alpha": ALPHA, "use_dora": dora}
    model = lora_phi3(base, PARTS, True, **keys) if not dora else None
    model = model or lora_phi3(base, FUSED[:2], False, **keys)
    model.load_state_dict(load_base_weights(base), strict=False)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if dora and hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
            module.magnitude.data *= 1.5
    trained = {n: p.detach() for n, p in model.named_parameters() if "lora" in n or "magn" in n}
    merge_into(tmp_path / "out", base, Adapter.of(trained, ALPHA / R))
    batch = torch.randint(0, 150, (2, 17))
    with torch.no_grad():
        found = load_base_with_hf(tmp_path / "out")(input_ids=batch).logits
        torch.testing.assert_close(found, model.eval()(batch), rtol=0, atol=1e-5)
    if not dora:
        one, other = (load_base_weights(f) for f in (base, tmp_path / "out"))
        config = read_config(base)
        keys = slice(config.hidden_size, config.hidden_size + config.head_dim)
        name = "layers.0.attn.qkv_proj.weight"
        assert torch.equal(one[name][keys], other[name][keys])
        assert not torch.equal(one[name][: keys.start], other[name][: keys.start])


SPLIT = {
    "attn.qkv_proj.q_proj": "attn.q_proj",
    "attn.o_proj": "attn.output_proj",
    "mlp.gate_up_proj.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}


def test_names_of_torchtunes_split_model_are_the_same_places(base, tmp_path):
    torch.manual_seed(4)
    config, tensors = read_config(base), {}
    sizes = {"attn.o_proj": config.hidden_size, "mlp.down_proj": config.hidden_size}
    for name in SPLIT:
        rows = sizes.get(name, config.intermediate_size if "mlp" in name else config.hidden_size)
        width = config.intermediate_size if "down" in name else config.hidden_size
        tensors[f"layers.2.{name}.lora_a.weight"] = torch.randn(R, width)
        tensors[f"layers.2.{name}.lora_b.weight"] = torch.randn(rows, R)
    split = {}
    for name, value in tensors.items():
        inner, _, kind = name.removeprefix("layers.2.").partition(".lora_")
        split[f"layers.2.{SPLIT[inner]}.lora_{kind}"] = value
    for folder, values in {"ours": tensors, "split": split}.items():
        merge_into(tmp_path / folder, base, Adapter.of(values, 1.0))
    one, other = (load_base_weights(tmp_path / folder) for folder in ("ours", "split"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    before = load_base_weights(base)
    assert sum(not torch.equal(value, before[name]) for name, value in one.items()) == len(SPLIT)
