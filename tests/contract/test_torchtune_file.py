"""torchtune's adapter files: loaded by its own model, and given back bit for bit."""

import json

import pytest
import torch

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.checkpoint.torchtune import write_torchtune
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, OutputError
from tests.adapters import (
    PARTS,
    WHOLE,
    adapter,
    adapter_of,
    base_folder,
    merged_logits,
    same,
    split_model,
)

ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")


@pytest.fixture(scope="module", params=["mini", "gqa"])
def base(request, tmp_path_factory):
    return base_folder(request.param, tmp_path_factory.mktemp("base") / "base")


KINDS = {
    "parts": lambda config: adapter(config, PARTS),
    "whole": lambda config: adapter(config, WHOLE),
    "head": lambda config: adapter(config, (*PARTS, "output")),
    "dora": lambda config: adapter(config, WHOLE, dora=True),
    "mixed": lambda config: adapter(config, PARTS, (4, 8, 2), (3.0, 1.5, 0.37)),
    "mixed-whole": lambda config: adapter(config, WHOLE, (4, 8), (3.0, 0.37), dora=True),
    "bf16": lambda config: adapter(config, WHOLE, dtype=torch.bfloat16, dropout=0.25),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_bit_for_bit(base, kind, tmp_path):
    config = read_config(base)
    made = KINDS[kind](config)
    write_torchtune(tmp_path / "adapter_model.pt", made, config)
    assert same(read_adapter(tmp_path, config=config), made)


@pytest.mark.parametrize("kind", ["whole", "mixed"])
def test_torchtunes_model_loads_it_and_computes_the_same(base, kind, tmp_path):
    config = read_config(base)
    made = KINDS[kind](config)
    write_torchtune(tmp_path / "adapter_model.pt", made, config)
    state = torch.load(tmp_path / "adapter_model.pt")
    keys = json.loads((tmp_path / "adapter_config.json").read_text())
    attention = [name for name in ATTENTION if name in keys["target_modules"]]
    # torchtune's model has adapters on all of the MLP or on none of it.
    model = split_model(base, attention, True, alpha=keys["lora_alpha"], rank=keys["r"])
    lora = {name: p for name, p in model.named_parameters() if "lora" in name}
    with torch.no_grad():
        for parameter in lora.values():
            parameter.zero_()
    assert state.keys() <= lora.keys()
    model.load_state_dict(state, strict=False)
    tokens = torch.randint(0, 150, (2, 17))
    ours = merged_logits(base, made, config, tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_what_torchtune_saved_goes_through_peft_and_back(base, use_dora, tmp_path):
    config = read_config(base)
    model = split_model(base, ("q_proj", "v_proj", "output_proj"), True, use_dora=use_dora)
    theirs = adapter_of(model)
    torch.save(theirs, tmp_path / "adapter_0.pt")
    read = read_adapter(tmp_path / "adapter_0.pt", config=config, alpha=12, rank=4)
    tokens = torch.randint(0, 150, (2, 17))
    with torch.no_grad():
        ours = merged_logits(base, read, config, tokens)
        torch.testing.assert_close(model(tokens), ours, rtol=0, atol=1e-5)
    (tmp_path / "peft").mkdir()
    export_adapter(tmp_path / "peft", read, checkpoint_dir=base, card={})
    back = read_adapter(tmp_path / "peft", config=config)
    write_torchtune(tmp_path / "again.pt", back, config)
    again = torch.load(tmp_path / "again.pt")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], value) for name, value in theirs.items())


def test_settings_beside_the_file_are_read(base, tmp_path):
    config = read_config(base)
    theirs = adapter_of(split_model(base, ("q_proj",)))
    torch.save(theirs, tmp_path / "adapter_model.pt")
    with pytest.raises(AdapterError, match="does not say its alpha"):
        read_adapter(tmp_path, config=config)
    keys = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(keys))
    assert set(read_adapter(tmp_path, config=config).scales.values()) == {2.0}


def test_what_torchtune_does_not_have_is_refused(base, tmp_path):
    config = read_config(base)
    file = tmp_path / "adapter_model.pt"
    with pytest.raises(AdapterError, match="torchtune's Phi-3 has no adapter on its embedding"):
        write_torchtune(file, adapter(config, (*WHOLE, "tok_embeddings")), config)
    saved = {"output.weight": torch.ones(160, 64)}
    with pytest.raises(AdapterError, match=r"output\.weight: an adapter of torchtune's holds no"):
        write_torchtune(file, adapter(config, WHOLE, saved=saved), config)
    with pytest.raises(AdapterError, match="no adapter to save"):
        write_torchtune(file, Adapter({}, {}), config)
    assert list(tmp_path.iterdir()) == []
    file.write_text("mine")
    with pytest.raises(OutputError, match="exists and would be overwritten"):
        write_torchtune(file, adapter(config, WHOLE), config)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.pt"]
