"""Files that are written piece by piece are those that safetensors reads."""

import json
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from phi3_plugin.checkpoint.base import Entry, write_shards, write_tensors
from phi3_plugin.checkpoint.files import stored_tensors
from phi3_plugin.errors import OutputError


def entry(tensor, step=2):
    def pieces():
        yield from (tensor[i : i + step] for i in range(0, len(tensor), step))

    return Entry(tensor.dtype, tuple(tensor.shape), pieces)


def tensors():
    torch.manual_seed(0)
    return {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(7, 3),
        "größe": torch.randn(5, 4).half(),
        "view": torch.randn(4, 6).T,
    }


def test_safetensors_and_our_own_reader_find_every_tensor(tmp_path):
    file, expected = tmp_path / "x.safetensors", tensors()
    write_tensors(file, {name: entry(value) for name, value in expected.items()})
    found = load_file(file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
        stored = stored_tensors(file)[name]
        assert torch.equal(stored[:], value)
        assert stored.offset % value.element_size() == 0
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_shards_keep_to_their_size_and_the_index_finds_them(tmp_path):
    expected = {str(i): torch.full((10,), i, dtype=torch.float32) for i in range(7)}
    files = write_shards(tmp_path, {n: entry(v) for n, v in expected.items()}, shard_bytes=85)
    assert [file.name for file in files] == [
        f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 40
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], expected[name])


def test_a_tensor_larger_than_a_shard_has_one_for_itself(tmp_path):
    large = {name: entry(torch.zeros(10)) for name in "ab"}
    assert len(write_shards(tmp_path, large, shard_bytes=8)) == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((4,), torch.float32, "12 bytes were made, not 16"), ((3,), torch.float16, "A piece is in")],
)
def test_pieces_that_are_not_the_tensor_are_an_error(tmp_path, shape, dtype, message):
    wrong = Entry(dtype, shape, lambda: [torch.zeros(3)])
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "x.safetensors", {"x": wrong})


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(5))
    with pytest.raises(OutputError, match=r"has 0\.0 GB left, but the weights take"):
        write_shards(tmp_path, {"x": entry(torch.zeros(3))})
    assert not list(tmp_path.iterdir())
