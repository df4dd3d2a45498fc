"""Folders of mlx-lm: what it would compute with them, by its own rules, and back bit for bit."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phi3_plugin.checkpoint.adapter import MAGNITUDE, A, Adapter, B
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.mlx import mlx_differs, write_mlx
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError
from tests.adapters import BASES, PARTS, WHOLE, adapter, base_folder, same

KINDS = {
    "whole": lambda config: adapter(config, WHOLE),
    "parts": lambda config: adapter(config, PARTS, (4, 8, 2), (3.0, 1.5, 0.37)),
    "dora": lambda config: adapter(config, WHOLE, dora=True, dropout=0.25),
    "dora on parts": lambda config: adapter(config, PARTS, dora=True, scales=(12 / math.sqrt(5),)),
    "last layer": lambda config: adapter(config, WHOLE, layers=[2]),
    "two layers": lambda config: adapter(config, WHOLE, layers=[0, 2]),
    "one module": lambda config: adapter(config, ["attn.o_proj"], scales=(0.1,), ranks=(7,)),
    "bf16": lambda config: adapter(config, WHOLE, (4, 2), (3.0, 0.37), dtype=torch.bfloat16),
}
ENDS = lambda config: adapter(config, (*WHOLE, "output", "tok_embeddings"))  # noqa: E731


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: base_folder(name, tmp_path_factory.mktemp("base") / name) for name in BASES}


def written(made, base, folder):
    folder.mkdir(exist_ok=True)
    write_mlx(folder, made, base)
    return folder


def mlx_weights(folder, weights, layers):
    """Return the weights that mlx-lm computes with: its choice of modules, its formulas.

    Args:
        folder: The adapter.
        weights: Of the base, Hugging Face's names.
        layers: How many the model has.
    """
    keys = json.loads((folder / "adapter_config.json").read_text())
    given = keys["lora_parameters"]
    last = range(layers)[-max(keys["num_layers"], 0) :]
    modules = {name.removesuffix(".weight") for name in weights if "norm" not in name}
    adapted = modules & set(given["keys"])
    adapted |= modules & {f"model.layers.{n}.{key}" for n in last for key in given["keys"]}
    new, tensors = dict(weights), load_file(folder / "adapters.safetensors")
    for module in adapted:
        a, b = (tensors.pop(f"{module}.lora_{which}").double() for which in "ab")
        assert a.shape[1] == given["rank"]
        change = given["scale"] * (a @ b)
        if module != "model.embed_tokens":
            change = change.T
        value = weights[f"{module}.weight"].double() + change
        if keys["fine_tune_type"] == "dora":
            value *= (tensors.pop(f"{module}.m").double() / value.norm(dim=1))[:, None]
        new[f"{module}.weight"] = value
    assert not tensors  # mlx-lm ends with an error where one finds no place
    return new


def expected_weights(made, weights, config):
    """Return the weights with an adapter of whole modules or parts put into them."""
    from phi3_plugin.checkpoint.base import fused_name, part_rows, to_hf

    new = {name: value.double().clone() for name, value in weights.items()}
    for module, scale in made.scales.items():
        whole = fused_name(module)
        weight = new[to_hf(f"{whole}.weight")]
        rows = part_rows(whole, config).get(module, slice(None))
        change = scale * made.tensors[module + B].double() @ made.tensors[module + A].double()
        value = weight[rows] + (change.T if module == "tok_embeddings" else change)
        if made.is_dora:
            norms = made.tensors[module + MAGNITUDE].double()
            value = value * (norms / value.norm(dim=1))[:, None]
        weight[rows] = value
    return new


def stored(base):
    weights = {}
    for file in sorted(base.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


@pytest.mark.parametrize("kind", [*KINDS, "ends"])
def test_mlx_computes_the_adapter_and_it_comes_back_bit_for_bit(bases, kind, tmp_path):
    base = bases["gqa"]
    config, weights = read_config(base), stored(base)
    made = KINDS.get(kind, ENDS)(config)
    folder = written(made, base, tmp_path / "mlx")
    theirs = mlx_weights(folder, weights, config.num_hidden_layers)
    for name, value in expected_weights(made, weights, config).items():
        close = {"rtol": 1e-2, "atol": 1e-3} if kind == "bf16" else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(theirs[name].double(), value, **close)
    assert same(read_adapter(folder, config=config, base=base), made)
    changed = dict(load_file(folder / "adapters.safetensors"))
    name = next(name for name in changed if name.endswith(".lora_b"))
    changed[name] = changed[name] + 1
    with safe_open(folder / "adapters.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(changed, folder / "adapters.safetensors", metadata=metadata)
    again = read_adapter(folder, config=config, base=base)
    assert not same(again, made)
    read = expected_weights(again, weights, config)
    for name, value in mlx_weights(folder, weights, config.num_hidden_layers).items():
        torch.testing.assert_close(read[name], value.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [20.0, 0.37])
def test_an_adapter_of_mlx_goes_through_peft_and_back(bases, scale, tmp_path):
    """PEFT's alpha is an integer there, so that a B may be multiplied in between."""
    base = bases["gqa"]
    config = read_config(base)
    made = written(adapter(config, WHOLE, scales=(scale,)), base, tmp_path / "made")
    tensors, keys = (
        load_file(made / "adapters.safetensors"),
        json.loads((made / "adapter_config.json").read_text()),
    )
    folder = theirs(tmp_path / "mlx", tensors, lora_parameters=keys["lora_parameters"])
    read = read_adapter(folder, config=config, base=base)
    (tmp_path / "peft").mkdir()
    export_adapter(tmp_path / "peft", read, checkpoint_dir=base, card={})
    back = read_adapter(tmp_path / "peft", config=config, base=base)
    again = written(back, base, tmp_path / "again")
    new = json.loads((again / "adapter_config.json").read_text())
    assert new["lora_parameters"] == keys["lora_parameters"]
    others = load_file(again / "adapters.safetensors")
    assert others.keys() == tensors.keys()
    assert all(torch.equal(others[name], value) for name, value in tensors.items())


def test_the_settings_are_those_that_mlx_reads(bases, tmp_path):
    base = bases["gqa"]
    made = adapter(read_config(base), WHOLE, layers=[1, 2], dropout=0.25)
    keys = json.loads((written(made, base, tmp_path / "a") / "adapter_config.json").read_text())
    inner = ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]
    assert keys == {
        "fine_tune_type": "lora",
        "model": str(base),
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 3.0, "dropout": 0.25, "keys": inner},
    }


def test_an_adapter_on_a_tied_embedding_is_one_on_the_head_too(bases, tmp_path):
    base = bases["tied"]
    config = read_config(base)
    made = adapter(config, (*WHOLE, "tok_embeddings"))
    with pytest.raises(AdapterError, match="tok_embeddings: in this base one tensor is embedding"):
        write_mlx(tmp_path, made, base)
    with pytest.raises(AdapterError, match="output: in this base one tensor is embedding and head"):
        write_mlx(tmp_path, adapter(config, (*WHOLE, "output")), base)
    with pytest.raises(AdapterError, match="output, tok_embeddings: in this base"):
        write_mlx(tmp_path, ENDS(config), base)
    a, b = (made.tensors[f"tok_embeddings.lora_{which}.weight"] for which in "ab")
    head = {"output.lora_a.weight": b.T.contiguous(), "output.lora_b.weight": a.T.contiguous()}
    both = Adapter({**made.tensors, **head}, {**made.scales, "output": 3.0})
    folder = written(both, base, tmp_path / "mlx")
    assert not [n for n in load_file(folder / "adapters.safetensors") if n.startswith("lm_head")]
    assert same(read_adapter(folder, config=config, base=base), both)


def test_what_mlx_cannot_compute_is_refused(bases, tmp_path):
    config = read_config(bases["mini"])
    saved = adapter(config, WHOLE, saved={"output.weight": torch.ones(160, 64)})
    with pytest.raises(
        AdapterError, match=r"output\.weight: it replaces no whole weights or rows\. Merge"
    ):
        write_mlx(tmp_path, saved, bases["mini"])
    with pytest.raises(AdapterError, match="no adapter to save"):
        write_mlx(tmp_path, Adapter({}, {}), bases["mini"])
    assert not list(tmp_path.iterdir())


# Folders that mlx-lm wrote: no note, and all that its own configuration says beside


def theirs(folder, tensors, metadata=None, **keys):
    """Write a folder as `mlx_lm.lora` does."""
    parameters = {"rank": 4, "dropout": 0.0, "scale": 20.0, **keys.pop("lora_parameters", {})}
    folder.mkdir(exist_ok=True)
    settings = {
        "adapter_path": "adapters",
        "batch_size": 4,
        "fine_tune_type": "lora",
        "lora_parameters": {k: v for k, v in parameters.items() if v is not None},
        "model": "mlx-community/Phi-3.5-mini-instruct-bf16",
        "num_layers": 16,
        "optimizer_config": {"adam": {}},
        "train": True,
        **keys,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapters.safetensors", metadata=metadata)
    return folder


O_PROJ = "model.layers.1.self_attn.o_proj"
PAIR = {f"{O_PROJ}.lora_a": torch.randn(64, 4), f"{O_PROJ}.lora_b": torch.randn(4, 64)}


def test_what_mlx_wrote_is_read_with_its_scale(bases, tmp_path):
    folder = theirs(tmp_path / "a", PAIR, lora_parameters={"dropout": 0.1, "alpha": 16})
    for path in (folder, folder / "adapters.safetensors"):
        read = read_adapter(path, config=read_config(bases["mini"]))
        assert read.scales == {"layers.1.attn.o_proj": 20.0}
        assert torch.equal(read.tensors["layers.1.attn.o_proj" + A], PAIR[f"{O_PROJ}.lora_a"].T)
        assert torch.equal(read.tensors["layers.1.attn.o_proj" + B], PAIR[f"{O_PROJ}.lora_b"].T)
        assert read.dropout == 0.1
        assert read.base == "mlx-community/Phi-3.5-mini-instruct-bf16"
        assert not read.base_hash


@pytest.mark.parametrize(
    ("keys", "alpha", "scale"),
    [
        ({"lora_parameters": {"scale": None, "alpha": 16}}, 80, 20.0),
        ({"lora_parameters": {"alpha": 16}, "lora_layers": 16}, 160, 40.0),
        ({"lora_layers": 16}, None, 20.0),
        ({}, 80, 20.0),
    ],
)
def test_alpha_says_what_an_early_folder_does_not(bases, tmp_path, keys, alpha, scale):
    folder, config = theirs(tmp_path / "a", PAIR, **keys), read_config(bases["mini"])
    if "alpha" in keys.get("lora_parameters", ()):
        with pytest.raises(AdapterError, match="does not say for certain what B A is multiplied"):
            read_adapter(folder, config=config)
    assert set(read_adapter(folder, config=config, alpha=alpha).scales.values()) == {scale}


MAGNITUDES = {f"{O_PROJ}.m": torch.ones(64)}
REFUSED = {
    "full": (PAIR, {"fine_tune_type": "full", "lora_parameters": None}, "`mlx_lm.fuse` makes"),
    "rank": (PAIR, {"lora_parameters": {"rank": 8}}, "its rank is 4, but lora_parameters.rank is"),
    "no rank": (PAIR, {"lora_parameters": {"rank": None}}, "lora_parameters.rank: is missing"),
    "wrong rank": (PAIR, {"lora_parameters": {"rank": "4"}}, "rank: '4' must be a whole number"),
    "wrong scale": (PAIR, {"lora_parameters": {"scale": 0}}, "scale: 0 must be a number above 0"),
    "wrong dropout": (PAIR, {"lora_parameters": {"dropout": 1}}, "dropout: 1 must be at least 0"),
    "dora unsaid": ({**PAIR, **MAGNITUDES}, {}, "is 'lora', but modules have a magnitude"),
    "dora missing": (PAIR, {"fine_tune_type": "dora"}, "is 'dora', but no module has a magnitude"),
    "no b": ({f"{O_PROJ}.lora_a": torch.ones(64, 4)}, {}, "attn.o_proj: has no B"),
    "other name": ({"model.layers.1.self_attn.q_proj.x": torch.ones(2)}, {}, "is no part of an"),
    "part": ({**PAIR, "model.layers.9.mlp.down_proj.lora_a": torch.ones(96, 4)}, {}, "is no part"),
    "shape": ({**PAIR, f"{O_PROJ}.lora_b": torch.ones(4, 65)}, {}, r"expected \[R, 64\] and"),
    "flat": ({**PAIR, f"{O_PROJ}.lora_b": torch.ones(4)}, {}, r"expected \[R, 64\] and"),
    "not finite": ({**PAIR, f"{O_PROJ}.lora_b": torch.full((4, 64), math.nan)}, {}, "holds NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_folder_of_mlx_is_refused(bases, tmp_path, case):
    tensors, keys, message = REFUSED[case]
    if keys.get("lora_parameters", "") is None:
        folder = theirs(tmp_path / "a", tensors)
        settings = {"fine_tune_type": "full", "lora_parameters": None, "num_layers": 4}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    else:
        folder = theirs(tmp_path / "a", tensors, **keys)
    with pytest.raises(AdapterError, match=message) as error:
        read_adapter(folder, config=read_config(bases["mini"]))
    assert str(folder) in str(error.value)


def test_options_for_others_are_refused(bases, tmp_path):
    folder, config = theirs(tmp_path / "a", PAIR), read_config(bases["mini"])
    with pytest.raises(AdapterError, match=r"alpha: 8, but .* says the scale 20\.0"):
        read_adapter(folder, config=config, alpha=8)
    with pytest.raises(AdapterError, match="enable_lora: is for files of loralib, but"):
        read_adapter(folder, config=config, enable_lora=[True])


def test_a_head_of_its_own_is_not_one_of_a_tied_base(bases, tmp_path):
    pair = {"lm_head.lora_a": torch.ones(64, 4), "lm_head.lora_b": torch.ones(4, 160)}
    folder = theirs(tmp_path / "a", {**PAIR, **pair})
    assert "output" in read_adapter(folder, config=read_config(bases["gqa"])).scales
    with pytest.raises(AdapterError, match=r"'lm_head\.lora_a' is no part of an adapter"):
        read_adapter(folder, config=read_config(bases["tied"]))


def test_where_mlx_computes_another_base_is_told(bases, tmp_path):
    file = tmp_path / "config.json"
    keys = json.loads((bases["mini"] / "config.json").read_text())
    file.write_text(json.dumps(keys))
    (line,) = mlx_differs(tmp_path)
    assert "no sliding window: beyond 2047 tokens" in line
    longrope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    longer = {"max_position_embeddings": 131072, "sliding_window": 262144}
    file.write_text(json.dumps({**keys, **longer, "rope_scaling": longrope}))
    (line,) = mlx_differs(tmp_path)
    assert "up to 4096 tokens it answers as trained only if" in line
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    saved = {**keys, "sliding_window": None, "rope_parameters": rope}
    del saved["rope_scaling"], saved["rope_theta"]
    file.write_text(json.dumps(saved))
    (line,) = mlx_differs(tmp_path)
    assert "does not read rope_parameters" in line
