"""Files made to run long or to fail in an unforeseen place: still one clear error."""

import json
import pickle
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from phi3_plugin.checkpoint.files import read_state, read_tensors
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.config import parse_config
from phi3_plugin.errors import AdapterError, CheckpointError
from tests.oracles import MINI_4K, TINY_MHA

CONFIG = parse_config({**MINI_4K, **TINY_MHA})
O_PROJ = "model.layers.0.self_attn.o_proj"
ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
CENTRAL = b"PK\x01\x02"


def test_a_name_that_is_there_twice_among_many_is_found_at_once(tmp_path):
    entries = ",".join(f'"{name}":{ENTRY}' for name in (*range(100_000), 99_999))
    text = f"{{{entries}}}".encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    start = time.perf_counter()
    with pytest.raises(AdapterError, match="'99999' is there twice"):
        read_tensors(tmp_path / "a.safetensors")
    assert time.perf_counter() - start < 10  # minutes where each is compared with each


def test_an_archive_that_says_it_is_encrypted_is_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    at = data.find(CENTRAL)
    while at >= 0:
        data[at + 8] |= 1
        at = data.find(CENTRAL, at + 4)
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(AdapterError, match=r"is not an archive of torch\.save: .*encrypted"):
        read_tensors(tmp_path / "a.pt")


def test_tensors_that_share_their_numbers_are_refused_with_what_helps(tmp_path):
    shared = torch.randn(64, 64)
    torch.save({"a": shared, "b": shared}, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match=r"or share them\. Save each with \.clone\(\)"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"alpha": 4, "enable_lora": 5}, "enable_lora: 'qkv_proj': 5 is not used"),
        ({"alpha": 4, "enable_lora": {"qkv_proj": None}}, "'qkv_proj': None is not used"),
        ({"alpha": 4, "enable_lora": "x" * 10_000}, r"'qkv_proj': 'xx+\.\.\. is not used"),
        ({"alpha": 10**400}, r"alpha: 1000+\.\.\. for layers\.0\.attn\.o_proj must be a number"),
        ({"alpha": {O_PROJ: 10**400}}, r"alpha: 1000+\.\.\. for layers"),
        ({"alpha": 1e-320}, "alpha: 1e-320 for layers"),
        ({"alpha": {"other": 3}}, "alpha: None for layers"),
    ],
)
def test_what_a_loralib_file_says_of_itself_is_checked(tmp_path, about, message):
    tensors = {f"{O_PROJ}.lora_A": torch.ones(4, 64), f"{O_PROJ}.lora_B": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"phi3_plugin": json.dumps(about)})
    with pytest.raises(AdapterError, match=message) as error:
        read_adapter(tmp_path / "a.safetensors", config=CONFIG)
    assert len(str(error.value)) < 400


def test_enable_lora_for_another_programs_file_is_not_passed_over(tmp_path):
    ends = {".lora_A.weight": (4, 64), ".lora_B.weight": (64, 4)}
    save_file({O_PROJ + e: torch.ones(s) for e, s in ends.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"enable_lora: is for files of loralib, but .* peft's"):
        read_adapter(tmp_path / "a.safetensors", config=CONFIG, alpha=8, enable_lora=[True])


def test_a_pickle_that_makes_many_objects_is_refused_before_it_is_looked_at(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"}" * 5_000_000 + b".")
    with pytest.raises(AdapterError, match=r"has no data\.pkl of a sensible size"):
        read_tensors(tmp_path / "a.pt")


def test_a_state_with_any_byte_changed_is_one_clear_error_or_read(tmp_path):
    file = tmp_path / "state.pt"
    torch.save({"optimizer": {"state": {0: torch.ones(2)}}, "step": 3}, file)
    whole = file.read_bytes()
    start = whole.find(b"data.pkl") + 8
    for at in range(start, whole.find(b"PK", start)):
        for byte in (0x00, 0x28, 0x89, 0xFF):
            file.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            try:
                assert isinstance(read_state(file), dict)
            except CheckpointError as error:
                assert "state.pt " in str(error)


@pytest.mark.parametrize("state", [[1, 2], 3, None])
def test_a_state_that_is_none_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt holds a \w+, no state\. Move it"):
        read_state(tmp_path / "state.pt", " Move it.")
    (tmp_path / "state.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read|holds a"):
        read_state(tmp_path / "state.pt")
