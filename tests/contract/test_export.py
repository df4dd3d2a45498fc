"""Adapters of every kind: what PEFT computes of our folders, and what comes back of them."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError
from phi3_plugin.proof import load_base_with_hf
from tests.adapters import (
    BASES,
    PARTS,
    WHOLE,
    adapter,
    base_folder,
    load_trained,
    merged_logits,
    same,
)
from tests.chosen import some

ROOT8 = 12 / 8**0.5


def kinds(config):
    """Return adapters by name; each is made when it is asked for."""
    vocab, d = config.vocab_size, config.hidden_size
    head, rows = torch.randn(vocab, d) * 0.06, torch.randn(vocab, d) * 0.06
    saved = {"output.weight": head, "tok_embeddings.weight": rows}
    mixed = {"ranks": (4, 8, 2), "scales": (3.0, 1.5, 0.37)}
    return {
        "lora": lambda: adapter(config, WHOLE),
        "dora": lambda: adapter(config, WHOLE, dora=True),
        "rslora": lambda: adapter(config, WHOLE, (8,), (ROOT8,), origin={"rslora": True}),
        "parts": lambda: adapter(config, PARTS),
        "mixed": lambda: adapter(config, WHOLE, **mixed),
        "mixed-parts": lambda: adapter(config, PARTS, **mixed),
        "saved": lambda: adapter(config, WHOLE, saved=saved),
        "saved-head": lambda: adapter(config, WHOLE, saved={"output.weight": head}),
        "saved-dora": lambda: adapter(config, WHOLE, dora=True, saved=saved),
        "embedding": lambda: adapter(config, (*WHOLE, "tok_embeddings")),
        "head": lambda: adapter(config, (*WHOLE, "output")),
        "some-layers": lambda: adapter(config, WHOLE, layers=(0, 2)),
        "mixed-dora": lambda: adapter(config, WHOLE, dora=True, **mixed),
        "parts-dora": lambda: adapter(config, PARTS, dora=True),
        "rslora-mixed": lambda: adapter(
            config, PARTS, (8, 2), (ROOT8, 12 / 2**0.5), origin={"rslora": True}
        ),
        "everything": lambda: adapter(
            config,
            (*PARTS, "tok_embeddings"),
            layers=(1,),
            saved={"output.weight": head},
            **mixed,
        ),
        "bf16": lambda: adapter(config, PARTS, dtype=torch.bfloat16, **mixed),
    }


NAMES = [
    *("lora", "dora", "rslora", "parts", "mixed", "mixed-parts", "saved", "saved-head"),
    "saved-dora",
    *("embedding", "head", "some-layers", "mixed-dora", "parts-dora", "rslora-mixed"),
    *("everything", "bf16"),
]
QUICK = ["gqa-mixed-parts", "tied-embedding", "tied-everything", "mini-rslora-mixed", "tied-saved"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: base_folder(name, tmp_path_factory.mktemp("base") / name) for name in BASES}


def exported(base, made, folder, **keys):
    folder.mkdir()
    export_adapter(folder, made, checkpoint_dir=base, card={}, **keys)
    return folder


def peft_logits(base, folder, tokens):
    """Return PEFT's logits after checking that there are no adapters but those of the file."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base_with_hf(base), str(folder)).eval()
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    stored = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    made = {n.partition(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    assert made == stored
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("patterns", some([False, True], [False]), ids=["uniform", "patterns"])
@pytest.mark.parametrize(("base", "kind"), some(itertools.product(BASES, NAMES), QUICK))
def test_peft_computes_it_and_it_comes_back_bit_for_bit(bases, base, kind, patterns, tmp_path):
    folder, tokens = bases[base], torch.randint(0, 150, (2, 17))
    config = read_config(folder)
    made = kinds(config)[kind]()
    out = exported(folder, made, tmp_path / "out", patterns=patterns)
    ours = merged_logits(folder, made, config, tokens)
    tolerance = 2e-2 if kind == "bf16" else 1e-5
    torch.testing.assert_close(peft_logits(folder, out, tokens), ours, rtol=0, atol=tolerance)
    assert (ours - load_base_with_hf(folder)(input_ids=tokens).logits).abs().max() > 0.05

    again = read_adapter(out, config=config)
    assert same(again, made)
    assert again.origin == made.origin
    trained = load_trained(out, folder)
    assert trained.keys() == {*made.tensors, *made.saved}


def test_a_uniform_file_has_one_rank_and_a_whole_alpha(bases, tmp_path):
    made = kinds(read_config(bases["gqa"]))["mixed-parts"]()
    out = exported(bases["gqa"], made, tmp_path / "out")
    keys = json.loads((out / "adapter_config.json").read_text())
    assert isinstance(keys["lora_alpha"], int)
    assert keys["rank_pattern"] == keys["alpha_pattern"] == {}
    assert not keys["use_rslora"]
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in list(file.keys()) if name.endswith("lora_A.weight")]
        assert {file.get_slice(name).get_shape()[0] for name in names} == {keys["r"]}


def test_patterns_say_what_differs(bases, tmp_path):
    config = read_config(bases["mini"])
    made = adapter(config, WHOLE, (4, 8, 4, 4), (3.0, 3.0, 3.0, 1.0))
    out = exported(bases["mini"], made, tmp_path / "out", patterns=True)
    keys = json.loads((out / "adapter_config.json").read_text())
    assert (keys["r"], keys["rank_pattern"]) == (4, {"o_proj": 8})
    assert (keys["lora_alpha"], keys["alpha_pattern"]) == (12, {"o_proj": 24, "down_proj": 4})


def test_rslora_is_said_where_every_module_has_it(bases, tmp_path):
    made = kinds(read_config(bases["mini"]))["rslora"]()
    out = exported(bases["mini"], made, tmp_path / "out", patterns=True)
    keys = json.loads((out / "adapter_config.json").read_text())
    assert (keys["use_rslora"], keys["r"], keys["lora_alpha"]) == (True, 8, 12)


def test_a_changed_file_is_read_as_others_read_it(bases, tmp_path):
    config = read_config(bases["mini"])
    made = kinds(config)["mixed-parts"]()
    out = exported(bases["mini"], made, tmp_path / "out")
    file = out / "adapter_config.json"
    keys = json.loads(file.read_text())
    file.write_text(json.dumps({**keys, "lora_alpha": keys["lora_alpha"] * 2}))
    again = read_adapter(out, config=config)
    assert set(again.ranks.values()) == {keys["r"]}
    assert set(again.scales.values()) == {keys["lora_alpha"] * 2 / keys["r"]}


def plain(made):
    """Take one magnitude away."""
    gone = "layers.0.attn.o_proj.magnitude"
    return Adapter({n: v for n, v in made.tensors.items() if n != gone}, made.scales)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: Adapter({}, {}), "no adapter to save"),
        (lambda a: Adapter(a.tensors, dict.fromkeys(a.scales, 0.0)), "its scale is 0.0"),
        (lambda a: plain(a), "layers.0.attn.o_proj has no magnitude, but others do"),
    ],
)
def test_what_no_file_can_say_is_refused(bases, change, message, tmp_path):
    made = change(kinds(read_config(bases["mini"]))["dora"]())
    with pytest.raises(AdapterError, match=message):
        exported(bases["mini"], made, tmp_path / "out")
