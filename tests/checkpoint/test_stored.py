"""Weights are read when they are used, the rows that are used, and kept by nobody else."""

import weakref

import pytest
import torch
from safetensors.torch import save_file

from phi3_plugin.checkpoint import files as stored
from phi3_plugin.checkpoint.files import equal, stored_tensors
from phi3_plugin.errors import CheckpointError


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    save_file({"a": torch.randn(7, 3), "b": torch.randn(5)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.fixture
def bytes_read(monkeypatch):
    """Sizes of the tensors that were read."""
    sizes, read_into = [], stored.read_into

    def counted(file, offset, out):
        sizes.append(out.nbytes)
        read_into(file, offset, out)

    monkeypatch.setattr(stored, "read_into", counted)
    return sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_read_alone_and_in_the_dtype_of_the_file(tmp_path, bytes_read, dtype):
    tensors = {"a": torch.randn(7, 3).to(dtype), "b": torch.randn(5).to(dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    opened = stored_tensors(tmp_path / "x.safetensors")
    assert not bytes_read
    for name, value in tensors.items():
        for start, stop in ((0, 2), (2, 5), (4, 99), (3, 3), (9, 12), (None, -1)):
            part = opened[name][start:stop]
            assert part.dtype == dtype and torch.equal(part, value[start:stop])
    assert bytes_read[:3] == [size * 3 * dtype.itemsize for size in (2, 3, 3)]
    with pytest.raises(ValueError, match="consecutive rows"):
        opened["a"][::2]


def test_nothing_is_read_before_a_value_is_used_and_nothing_kept_after(file, bytes_read):
    opened = stored_tensors(file)
    assert not bytes_read
    value = opened["a"][:]
    before = value.clone()
    value += 1  # it belongs to who asked for it
    kept = weakref.ref(value)
    del value
    assert kept() is None
    assert bytes_read == [7 * 3 * 4]
    assert torch.equal(opened["a"][:], before)


def test_a_file_that_becomes_shorter_after_it_was_opened(file):
    opened = stored_tensors(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="became shorter"):
        [value[:] for value in opened.values()]


def test_equal_looks_at_every_row(tmp_path):
    one = torch.randn(7, 3)
    last, row, dtype = one.clone(), one[:6].clone(), one.double()
    last[6, 2] += 1
    tensors = {"one": one, "same": one.clone(), "last": last, "row": row, "dtype": dtype}
    save_file(tensors, tmp_path / "x.safetensors")
    opened = stored_tensors(tmp_path / "x.safetensors")
    same = [name for name in opened if equal(opened["one"], opened[name], rows=2)]
    assert sorted(same) == ["one", "same"]
