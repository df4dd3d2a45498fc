"""Files of strangers: one clear error, nothing run, no memory filled."""

import collections
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from phi3_plugin.checkpoint.adapter import A, B
from phi3_plugin.checkpoint.files import read_tensors
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.config import parse_config
from phi3_plugin.errors import AdapterError
from tests.checkpoint.adapters import adapter
from tests.oracles import MINI_4K, TINY_MHA

CONFIG = parse_config({**MINI_4K, **TINY_MHA})
O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj"


def refused(file, message):
    with pytest.raises(AdapterError, match=message) as error:
        read_adapter(file, config=CONFIG, alpha=8)
    assert len(str(error.value)) < 2000


class Harmful:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("suffix", ["pt", "bin", "pth"])
def test_a_pickle_that_would_run_something_is_refused_before_it_does(tmp_path, suffix):
    target, file = tmp_path / "made", tmp_path / f"adapter.{suffix}"
    torch.save({"x.lora_A": torch.ones(2, 2), "evil": Harmful(target)}, file)
    refused(file, r"asks for 'posix mkdir', which tensors do not need\. Nothing in it was run")
    file.write_bytes(pickle.dumps(Harmful(target)))
    refused(file, "is not an archive of torch.save")
    torch.save({"evil": Harmful(target)}, file, _use_new_zipfile_serialization=False)
    refused(file, "is not an archive of torch.save")
    torch.save({"evil": Harmful(target)}, file, pickle_protocol=4)
    refused(file, "STACK_GLOBAL")
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": bytearray(4)}, "asks for"),
        ({"a": {1, 2}}, "asks for"),
        ({"a": torch.ones(2).to_sparse()}, "asks for"),
        ({"a": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}, "asks for"),
        ({"a": torch.ones(2, device="meta")}, "asks for"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "asks for 'torch LongStorage'"),
        ({"a": torch.ones(2, dtype=torch.float64)}, "'a' is torch.float64, expected float32"),
        ({"a": 3}, "'a' is a int, expected a plain tensor"),
        ({"a": {"b": torch.ones(2)}}, "'a' is a dict"),
        ({3: torch.ones(2)}, "expected names and tensors"),
        ([torch.ones(2)], "holds a list"),
        ({}, "holds no tensors"),
        (collections.OrderedDict(), "holds no tensors"),
    ],
)
def test_a_pickle_of_other_things_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", message)


def rezipped(file, out, compression=zipfile.ZIP_STORED, **changed):
    """Write an archive again, with other contents for some entries."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            name = entry.filename.rpartition("/")[2]
            new.writestr(entry.filename, changed.get(name, old.read(entry)))
    return out


def test_a_zip_bomb_is_refused_by_its_sizes(tmp_path):
    torch.save({"x.lora_A": torch.zeros(8, 8)}, tmp_path / "a.pt")
    how = zipfile.ZIP_DEFLATED
    out = rezipped(tmp_path / "a.pt", tmp_path / "b.pt", how, **{"0": bytes(10**8)})
    assert out.stat().st_size < 200_000
    refused(out, r"unpacks to 100\d+ bytes")


def test_a_storage_that_claims_to_be_larger_than_it_is_is_refused(tmp_path):
    torch.save({"x.lora_A": torch.zeros(8, 8)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old:
        data = old.read("a/data.pkl")
    count, rows = (b"J" + struct.pack("<i", number) for number in (2**30, 2**27))
    big = data.replace(b"K@", count).replace(b"K\x08K\x08", rows + b"K\x08")
    assert len(big) > len(data)
    out = rezipped(tmp_path / "a.pt", tmp_path / "b.pt", **{"data.pkl": big})
    refused(out, "cannot be read as tensors")


def test_a_tensor_that_repeats_one_number_fills_no_memory(tmp_path):
    a = torch.zeros(1).expand(2**20, 2**20)  # four TB, were it written out
    torch.save({f"{O_PROJ}.lora_A.weight": a, f"{O_PROJ}.lora_B.weight": a}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "repeat their numbers up to 8796093022208 bytes")


def test_broken_archives_are_refused(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"x.lora_A": torch.zeros(8, 8)}, file)
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:size])
        refused(file, "is not an archive of torch.save|cannot be read as tensors")
    file.write_bytes(whole)
    for changed in (b"", b"\x80\x02", b"\xff" * 50, b"\x80\x02" + b"(" * 10_000):
        rezipped(file, tmp_path / "b.pt", **{"data.pkl": changed})
        refused(tmp_path / "b.pt", "its pickle is broken|cannot be read as tensors")
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as empty:
        empty.writestr("../../data.txt", "x")
    refused(tmp_path / "c.pt", "has no data.pkl")


def header(text, data=b""):
    return struct.pack("<Q", len(text)) + text + data


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "says that its header"),
        (b"\x08\0\0", "says that its header"),
        (struct.pack("<Q", 2**63) + b"{}", "says that its header has 9223372036854775808"),
        (struct.pack("<Q", 10**8) + b"{}", "says that its header has 100000000"),
        (header(b"[" * 100_000), "its header is broken"),
        (header(b"{]"), "its header is broken"),
        (header(b"[]" + b" " * 20), "no table of tensors"),
        (header(b'{"a": 3, "b": 4, "c": 5}'), "no table of tensors"),
        (header(f'{{"a":{ENTRY},"a":{ENTRY}}}'.encode(), bytes(4)), "'a' is there twice"),
        (header(f'{{"a":{ENTRY}}}'.encode(), bytes(2)), "is damaged or cut short"),
        (header(f'{{"a":{ENTRY.replace("[1]", "[99]")}}}'.encode(), bytes(4)), "is damaged"),
        (header(f'{{"a":{ENTRY.replace("F32", "F64")}}}'.encode(), bytes(4)), "'a' is 'F64', exp"),
        (header(f'{{"a":{ENTRY.replace("F32", "I8")}}}'.encode(), bytes(4)), "'a' is 'I8', exp"),
        (header(f'{{"a":{ENTRY.replace("F32", "X")}}}'.encode(), bytes(4)), "'a' is 'X', exp"),
        (header(b'{"__metadata__":{"a":"b"}}'), "holds no tensors"),
    ],
)
def test_broken_safetensors_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors", message)


def pair(module=O_PROJ, a=(4, 64), b=(64, 4)):
    return {f"{module}.lora_A.weight": torch.ones(a), f"{module}.lora_B.weight": torch.ones(b)}


def without(tensors, end):
    return {name: value for name, value in tensors.items() if not name.endswith(end)}


NAN = {**pair(), f"{O_PROJ}.lora_B.weight": torch.full((64, 4), float("nan"))}
INF = {**pair(), f"{O_PROJ}.lora_A.weight": torch.full((4, 64), float("inf"))}
QKV = O_PROJ.replace("o_proj", "qkv_proj")
HEAD = "base_model.model.lm_head"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(pair(), "lora_B.weight"), r"layers.0.attn.o_proj: has no B"),
        (without(pair(), "lora_A.weight"), r"layers.0.attn.o_proj: has no A"),
        (pair(a=(4, 63)), r"A is \[4, 63\] and B \[64, 4\], expected \[R, 64\] and \[64, R\]"),
        (pair(a=(3, 64)), r"A is \[3, 64\] and B \[64, 4\]"),
        (pair(a=(0, 64), b=(64, 0)), r"A is \[0, 64\]"),
        (pair(a=(4, 64, 1)), r"A is \[4, 64, 1\]"),
        (NAN, "lora_b.weight: holds NaN or infinite"),
        (INF, "lora_a.weight: holds NaN or infinite"),
        (pair("base_model.model.model.layers.3.self_attn.o_proj"), "is no part of an adapter"),
        (pair("base_model.model.model.layers.00.self_attn.o_proj"), "is no part of an adapter"),
        (pair("base_model.model.model.layers.\u0661.self_attn.o_proj"), "is no part of an adapter"),
        (pair("base_model.model../../../etc/passwd"), "is no part of an adapter"),
        (pair("/etc/passwd"), "is no part of an adapter"),
        (pair("x" * 10_000), "is no part of an adapter"),
        (pair("base_model.model.model.layers.0.self_attn.rotary"), "is no part of an adapter"),
        ({**pair(), **pair("module." + O_PROJ)}, "o_proj.lora_a.weight is there twice"),
        (
            {**pair(QKV, b=(192, 4)), **pair(QKV.replace("qkv", "q"))},
            "qkv_proj.q_proj: adapted twice, also in layers.0.attn.qkv_proj",
        ),
        ({"a.weight": torch.ones(2)}, "is no part of an adapter"),
        ({f"{HEAD}.weight": torch.ones(160, 64)}, "has no low-rank adapter"),
        ({**pair(), f"{HEAD}.weight": torch.ones(9, 64)}, r"output: its weight is \[9, 64\], exp"),
        ({**pair(), f"{O_PROJ}.weight": torch.ones(64, 64)}, "layers.0.attn.o_proj: base weights"),
        (
            {**pair(), f"{O_PROJ}.lora_magnitude_vector": torch.ones(3)},
            r"its magnitude is \[3\], expected \[64\]",
        ),
        ({**pair(), "layers.0.attn.o_proj.lora_a.weight": torch.ones(4, 64)}, "there twice"),
        (
            {**pair(), "layers.1.attn.o_proj.lora_a.weight": torch.ones(4, 64)},
            "names of peft and torchtune",
        ),
        ({**pair(), f"{O_PROJ}.lora_B.bias": torch.ones(64)}, "is no part of an adapter"),
    ],
)
def test_tensors_that_are_no_adapter_of_the_base_are_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", message)


def test_all_of_a_kind_are_listed_up_to_a_few(tmp_path):
    wrong = {f"x{i}.lora_A.weight": torch.ones(1) for i in range(30)}
    save_file(wrong, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "and 22 more")


def test_what_torch_saves_of_an_adapter_is_read(tmp_path):
    made = adapter(CONFIG, ("attn.o_proj",), dtype=torch.bfloat16)
    tensors = dict(made.tensors)
    tensors["layers.0.attn.o_proj" + A] = torch.nn.Parameter(tensors["layers.0.attn.o_proj" + A])
    tensors["layers.1.attn.o_proj" + B] = tensors["layers.1.attn.o_proj" + B].T.contiguous().T
    torch.save(collections.OrderedDict(tensors), tmp_path / "a.pt")
    read, _ = read_tensors(tmp_path / "a.pt")
    assert all(torch.equal(read[name], value) for name, value in made.tensors.items())
    assert json.dumps(sorted(read)) == json.dumps(sorted(made.tensors))
