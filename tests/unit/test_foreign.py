"""Files of strangers: read as they compute, or one clear error, nothing run, no memory filled."""

import base64
import collections
import json
import os
import pickle
import struct
import zipfile
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phi3_plugin.checkpoint.adapter import A, B
from phi3_plugin.checkpoint.base import hf_name
from phi3_plugin.checkpoint.files import read_tensors
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.config import parse_config, read_config
from phi3_plugin.errors import AdapterError
from tests.adapters import PARTS, adapter, base_folder, load_trained, merged_logits, same
from tests.contract.test_foreign import FUSED, peft_names, trained_by_peft
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
        ({**pair(), f"{O_PROJ}.lora_B.bias": torch.ones(64)}, "an adapter of LORA with lora_bias"),
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


COPY = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.fixture(scope="module", params=["gqa", "tied"])
def base(request, tmp_path_factory):
    return base_folder(request.param, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def folder(base, tmp_path):
    """Return an adapter on the embedding, beside which PEFT saves the embedding itself."""
    more = {"ensure_weight_tying": True} if read_config(base).tie_word_embeddings else {}
    trained_by_peft(base, tmp_path, target_modules=[*FUSED, "embed_tokens"], **more)
    return tmp_path


def changed(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_copy_of_the_base_is_left_out(base, folder):
    read = read_adapter(folder, config=read_config(base), base=base)
    assert "tok_embeddings" in read.ranks
    assert not read.saved


def test_a_copy_in_another_dtype_is_the_same(base, folder):
    changed(folder, lambda t: t.update({COPY: t[COPY].bfloat16()}))
    assert "tok_embeddings" in read_adapter(folder, config=read_config(base), base=base).ranks


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({COPY: t[COPY] + 0.1}),
        lambda t: t[COPY].__setitem__((-1, 3), float("nan")),
        lambda t: t.update({COPY: torch.ones(3)}),
        lambda t: t.update({COPY: torch.cat([t[COPY], t[COPY][:2]])}),
    ],
    ids=["changed", "NaN", "small", "more tokens"],
)
def test_a_copy_of_another_base_is_refused(base, folder, change):
    changed(folder, change)
    message = r"a copy of tok_embeddings\.weight.* that differs from the base's"
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder, config=read_config(base), base=base)


def test_a_tied_base_that_peft_keeps_tied_computes_the_same(base, tmp_path):
    keys = {"target_modules": FUSED, "modules_to_save": ["embed_tokens"]}
    tokens, theirs = trained_by_peft(base, tmp_path, ensure_weight_tying=True, **keys)
    config = read_config(base)
    ours = merged_logits(base, read_adapter(tmp_path, config=config, base=base), config, tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["lm_head", "base_model.model.model.layers.0.self_attn.o_proj.base_layer.weight"]
)
def test_no_tensor_is_passed_over(base, folder, name):
    changed(folder, lambda t: t.update({name: torch.ones(3)}))
    with pytest.raises(AdapterError, match=f"'{name}' is no part of an adapter"):
        read_adapter(folder, config=read_config(base))


WEIGHTS = "adapter_model.safetensors"
MIXED = ("attn.qkv_proj.v_proj", "attn.qkv_proj.q_proj", "mlp.gate_up_proj", "attn.o_proj")


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    return base_folder("gqa", tmp_path_factory.mktemp("base") / "gqa")


@pytest.fixture
def made(gqa):
    return adapter(read_config(gqa), PARTS, (4, 8), (3.0, 0.37))


@pytest.fixture
def written(gqa, made, tmp_path):
    export_adapter(tmp_path, made, checkpoint_dir=gqa, card={})
    return tmp_path


def rewrite(written, change):
    file = written / WEIGHTS
    with safe_open(file, framework="pt") as opened:
        note = json.loads(opened.metadata()["phi3_plugin"])
    tensors = load_file(file)
    note = change(note, tensors)
    text = note if isinstance(note, str) else json.dumps(note)
    save_file(tensors, file, metadata={"phi3_plugin": text})


def first(note):
    return next(iter(note["modules"]))


def with_modules(note, **values):
    return {**note, "modules": {**note["modules"], first(note): values["value"]}}


def filled(tensors):
    """Give a B numbers for rows of k, which has no adapter."""
    name = next(n for n in tensors if n.endswith("qkv_proj.lora_B.weight"))
    tensors[name] = torch.ones_like(tensors[name])
    return True


BOMB = base64.b64encode(zlib.compress(bytes(50_000_000), 9)).decode()

CHANGES = {
    "no json": lambda note, _: "{",
    "deep json": lambda note, _: "[" * 100_000,
    "a list": lambda note, _: [],
    "modules no object": lambda note, _: {**note, "modules": [1]},
    "a foreign module": lambda note, _: {**note, "modules": {"../../etc/passwd": [4, 3.0]}},
    "a module too many": lambda note, _: {
        **note,
        "modules": {**note["modules"], "layers.2.mlp.down_proj": [4, 3.0]},
    },
    "no modules": lambda note, _: {**note, "modules": {}},
    "text for a rank": lambda note, _: with_modules(note, value=["4", 3.0]),
    "a huge rank": lambda note, _: with_modules(note, value=[10**12, 3.0]),
    "another rank": lambda note, _: with_modules(note, value=[3, 3.0]),
    "another scale": lambda note, _: with_modules(note, value=[4, 2.0]),
    "factor zero": lambda note, _: with_modules(note, value=[4, 3.0, 0.0]),
    "four numbers": lambda note, _: with_modules(note, value=[4, 3.0, 1.0, 1.0]),
    "NaN": lambda note, _: with_modules(note, value=[4, float("nan")]),
    "a bomb": lambda note, _: {**note, "rounded": dict.fromkeys(note["rounded"], BOMB)},
    "no base64": lambda note, _: {**note, "rounded": dict.fromkeys(note["rounded"], "\u00e4!")},
    "a number for text": lambda note, _: {**note, "rounded": dict.fromkeys(note["rounded"], 3)},
    "rows of k": lambda note, tensors: filled(tensors) and note,
}


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("scales", [(1.0, 2.0), (0.37, 1 / 3, 2.0, 1.0)])
def test_it_comes_back_from_one_form_after_the_other(gqa, scales, patterns, tmp_path):
    """Each form has an order of its own, in which two scales may be equally frequent."""
    config, made = read_config(gqa), adapter(read_config(gqa), MIXED, (4, 2), scales)
    read = made
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        write_loralib(tmp_path / f"{name}.safetensors", read, config, merged_linear=True)
        read = read_adapter(tmp_path / f"{name}.safetensors", config=config)
        export_adapter(tmp_path / name, read, checkpoint_dir=gqa, card={}, patterns=patterns)
        read = read_adapter(tmp_path / name, config=config)
        assert same(read, made), name


@pytest.mark.parametrize("change", CHANGES)
def test_a_note_that_does_not_fit_is_left_aside(gqa, made, written, change):
    rewrite(written, CHANGES[change])
    read = read_adapter(written, config=read_config(gqa))
    assert set(read.ranks.values()) == {12}  # those of q and v
    assert not any("qkv_proj." in module for module in read.scales)
    stored = load_file(written / WEIGHTS)
    assert len(read.tensors) == len(stored)
    assert all(torch.isfinite(value).all() for value in read.tensors.values())


def test_a_note_that_no_header_holds_is_left_out(gqa, made, tmp_path, monkeypatch):
    monkeypatch.setattr("phi3_plugin.checkpoint.adapter.NOTE_CHARACTERS", 10)
    export_adapter(tmp_path, made, checkpoint_dir=gqa, card={})
    again = load_trained(tmp_path, gqa)
    assert again.keys() == made.tensors.keys()
    for name, value in made.tensors.items():
        torch.testing.assert_close(again[name], value, rtol=2e-7, atol=0)


def test_a_note_of_parts_that_the_file_has_as_parts_is_left_aside(gqa, tmp_path):
    """Norms of the rows in between are nowhere in such a file."""
    config = read_config(gqa)
    made = adapter(config, PARTS, dora=True)
    tensors = peft_names(made)
    for module in made.ranks:
        name = f"base_model.model.{hf_name(module)}.lora_magnitude_vector"
        tensors[name] = made.tensors[f"{module}.magnitude"]
    keys = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(keys))
    note = json.dumps({"modules": {module: [4, 3.0] for module in made.ranks}})
    save_file(tensors, tmp_path / WEIGHTS, metadata={"phi3_plugin": note})
    assert same(read_adapter(tmp_path, config=config), made)
