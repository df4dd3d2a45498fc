"""Folders that `datasets` saved: their rows, and neither caches nor notes."""

import json

import pytest

from phi3_plugin.data.sources import read_sources
from phi3_plugin.errors import ConfigError, DataError, MissingFileError
from tests.data.test_files import A, B, write_arrow

C = {"question": "c", "answer": "d"}


def save(folder, *shards):
    """Write a data set as `save_to_disk` does, and a cache as its `map` does."""
    folder.mkdir(parents=True)
    files = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for file, rows in zip(files, shards, strict=True):
        write_arrow(folder / file, rows)
    write_arrow(folder / "cache-8508cc043eb35038.arrow", [C])
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": file} for file in files], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def save_parts(folder, **parts):
    for name, rows in parts.items():
        save(folder / name, rows)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(parts)}))
    return folder


def values(source, **options):
    return [row.value for found in read_sources(source, **options) for row in found.rows()]


def test_caches_are_no_data(tmp_path):
    assert values(save(tmp_path / "saved", [A], [B])) == [A, B]


def test_what_lies_beside_is_read_as_in_any_folder(tmp_path):
    folder = save(tmp_path / "saved", [A])
    (folder / "more.jsonl").write_text(json.dumps(B))
    assert values(folder) == [A, B]


def test_what_datasets_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([A, B])
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "parts")
    saved = datasets.load_from_disk(tmp_path / "parts")
    saved["train"].map(lambda row: {"question": "changed"})
    assert [file.name for file in (tmp_path / "parts" / "train").glob("cache-*.arrow")]
    assert values(tmp_path / "parts") == [A, B]
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    assert values(tmp_path / "saved") == [A, B]


def test_a_split_is_a_folder(tmp_path):
    parts = str(save_parts(tmp_path / "parts", train=[A, B], test=[C]))
    assert values(parts) == values(f"{parts}/train") == [A, B]
    assert values([parts, {"source": parts, "split": "train"}], split="test") == [C, A, B]
    train, test = read_sources([parts, {"source": parts, "split": "test"}])
    assert train.fingerprint() != test.fingerprint()


@pytest.mark.parametrize("split", ["dev", "train[:1]", "..", "x/../train"])
def test_no_such_split(tmp_path, split):
    parts = save_parts(tmp_path / "parts", train=[A], test=[C])
    with pytest.raises(ConfigError, match=r"^dataset\.source: .*parts has no split '.*'\. It has:"):
        read_sources(parts, split=split)


def test_a_split_that_is_lost(tmp_path):
    parts = save_parts(tmp_path / "parts", train=[A])
    (parts / "train").rename(parts / "moved")
    with pytest.raises(MissingFileError, match=r"there is no file or folder .*parts/train\."):
        read_sources(parts)


def test_a_file_that_is_lost(tmp_path):
    folder = save(tmp_path / "saved", [A], [B])
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(MissingFileError, match=r"state\.json names data-00001-of-00002\.arrow, wh"):
        read_sources(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}', "\xff", "[" * 10**5]
)
def test_notes_that_are_damaged(tmp_path, text):
    folder = save(tmp_path / "saved", [A])
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"state\.json cannot be read as .*, or name its files"):
        read_sources(folder)
    parts = save_parts(tmp_path / "parts", train=[A])
    (parts / "dataset_dict.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"dataset_dict\.json cannot be read as "):
        read_sources(parts)


def test_files_of_that_name_that_are_data(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps([A]))
    assert values(tmp_path) == [A]
