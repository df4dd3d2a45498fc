"""Our own adapter folders, read back when a run goes on."""

import pytest
import torch
from safetensors.torch import save_file

from phi3_plugin.checkpoint.peft import WEIGHTS, load_adapter, load_origin
from phi3_plugin.errors import CheckpointError, MissingFileError

NAME = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"


@pytest.mark.parametrize("load", [load_adapter, load_origin])
def test_a_damaged_file_is_one_clear_error(tmp_path, load):
    with pytest.raises(MissingFileError, match="it is not an adapter folder"):
        load(tmp_path)
    save_file({NAME: torch.ones(4, 8)}, tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is damaged or cut short: .* Copy it"):
        load(tmp_path)


@pytest.mark.parametrize("note", ["{", "[]", "[" * 100_000, "3"])
def test_a_note_of_others_is_none(tmp_path, note):
    save_file({NAME: torch.ones(4, 8)}, tmp_path / WEIGHTS, metadata={"phi3_plugin": note})
    assert load_origin(tmp_path) == {}
    assert load_adapter(tmp_path).keys() == {"layers.0.attn.o_proj.lora_a.weight"}
