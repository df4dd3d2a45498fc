"""Tokenized data is found again exactly as long as nothing it depends on has changed."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time

import pytest

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data import dataset as cache
from phi3_plugin.errors import ConfigError, DataError, OutputError
from tests.chosen import some
from tests.data.tiny import MEDIUM, edit_json, write_checkpoint

PAIRS = [{"question": "the " * n, "answer": f"other {n}"} for n in range(1, 9)]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)))
    return file


@pytest.fixture
def stores(tmp_path):
    """Return the folders in the cache."""
    folder = tmp_path / "kept"

    def find():
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())

    find.folder = folder
    return find


@pytest.fixture
def read(folder, source, stores):
    def build(**options):
        tokens = {"max_seq_len": options.pop("max_seq_len", None)}
        tokenizer = phi3_tokenizer(options.pop("path", folder), **tokens)
        options = {"source": source, "cache_dir": stores.folder} | options
        return chat_dataset(tokenizer, options.pop("source"), **options)

    return build


def test_the_second_time_nothing_is_tokenized(read, stores, monkeypatch):
    first = list(read())
    monkeypatch.setattr("phi3_plugin.data.tokenizer.Phi3Tokenizer.encode_chats", None)
    again = read()
    assert list(again) == first and again.rows == 8
    assert again.places(3).endswith("pairs.jsonl:4")
    assert len(stores()) == 1


def test_what_is_decided_after_reading_shares_the_store(read, stores):
    read()
    for options in ({"held_out": 0.5}, {"seed": 3}, {"bad_rows": "drop"}):
        read(**options)
    read(max_seq_len=64)
    read(max_seq_len=64, packed=True)
    assert len(stores()) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"train_on": "all"},
        {"system_prompt": "s"},
        {"truncate": "left"},
        {"add_eos": True},
        {"filter": "'8' in answer"},
        {"max_samples": 2},
        {"columns": {"user": "answer", "assistant": "question"}},
        {"max_seq_len": 12},
        {"group_by": "answer"},
    ],
)
def test_every_option_has_a_store_of_its_own(read, stores, options):
    plain = list(read())
    changed = list(read(**options))
    assert len(stores()) == 2
    assert changed != plain or options.keys() & {"truncate", "add_eos", "group_by"}


def test_an_edit_of_equal_length_at_the_same_time_is_seen(read, source, stores):
    read()
    stamp = source.stat()
    source.write_text(source.read_text().replace("other 8", "other 9"))
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert source.stat().st_size == stamp.st_size
    assert "9" in phi3_text(read()[7]) and len(stores()) == 2


def phi3_text(sample):
    return "".join(chr(t) if t < 0 else str(t) for t in sample["labels"] if t != -100)


def test_another_template_or_tokenizer_is_seen(read, stores, tmp_path, folder):
    read()
    read(path=write_checkpoint(tmp_path / "medium", chat_template=MEDIUM))
    read(path=write_checkpoint(tmp_path / "launch", rstrip=False))
    edit_json(folder / "tokenizer_config.json", eos_token="</s>")
    read()
    assert len(stores()) == 4


def test_another_program_is_seen(read, stores, monkeypatch):
    read()
    monkeypatch.setattr(cache, "_code", lambda: "changed")
    read()
    assert len(stores()) == 2


@pytest.mark.parametrize("name", ["tokens.bin", "trained.bin", "samples.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_broken_store_is_written_again(read, stores, name, damage):
    first = list(read())
    file = stores.folder / stores()[0] / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3])
    assert list(read()) == first and len(stores()) == 1


def test_nothing_is_kept_of_a_source_that_breaks(read, source, stores):
    source.write_text("{}")
    with pytest.raises(DataError):
        read()
    assert not stores()
    folder = stores.folder.parent / "broken.json"
    folder.write_text("[" + json.dumps(PAIRS[0]) + ", {")
    with pytest.raises(DataError, match="broken JSON"):
        read(source=folder)
    assert not stores()


KILLED = """
import os, signal, sys
from phi3_plugin.data import chat_dataset, phi3_tokenizer, store
write = store.StoreWriter.{method}
def die(self, *args):
    write(self, *args)
    os.kill(os.getpid(), signal.SIGKILL)
store.StoreWriter.{method} = die
chat_dataset(phi3_tokenizer(sys.argv[1]), sys.argv[2], cache_dir=sys.argv[3])
"""


@pytest.mark.parametrize("method", some(["append", "_finish"], quick={"append"}))
def test_a_killed_run_leaves_nothing_that_is_taken_for_data(read, folder, source, stores, method):
    code = KILLED.format(method=method)
    done = subprocess.run([sys.executable, "-c", code, folder, source, stores.folder])
    assert done.returncode == -9
    assert [name.endswith("-unfinished") for name in stores()] == [True]
    assert len(read()) == 8
    assert [name.endswith("-unfinished") for name in stores()] == [False]


TOGETHER = """
import sys
from phi3_plugin.data import chat_dataset, phi3_tokenizer, reading
write = reading.Reading.write
def told(*args):
    print("wrote")
    write(*args)
reading.Reading.write = told
print(sum(chat_dataset(phi3_tokenizer(sys.argv[1]), sys.argv[2], cache_dir=sys.argv[3]).lengths))
"""


def test_of_several_processes_one_writes(folder, source, stores):
    command = [sys.executable, "-c", TOGETHER, folder, source, stores.folder]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate()[0].split() for run in runs]
    assert sorted(words[0] == "wrote" for words in said) == [False, True]
    assert len({words[-1] for words in said}) == 1


def test_what_was_killed_before_goes_with_the_next_store(read, folder, source, stores):
    code = KILLED.format(method="append")
    subprocess.run([sys.executable, "-c", code, folder, source, stores.folder])
    source.write_text(source.read_text() + "\n" + json.dumps(PAIRS[0]))
    read()
    assert [name.endswith("-unfinished") for name in stores()] == [False]


def test_a_store_that_is_removed_while_it_is_used(read, stores):
    dataset = read()
    shutil.rmtree(stores.folder)
    assert len(list(dataset)) == 8
    with pytest.raises(OutputError, match="was removed while it was used"):
        dataset.places(0)
    with pytest.raises(OutputError, match="was removed while it was used"):
        pickle.loads(pickle.dumps(dataset))[0]


def test_another_place_of_the_same_file(read, source, stores):
    read(source=str(source.parent / "*.jsonl"))
    source.rename(source.with_name("other.jsonl"))
    assert read(source=str(source.parent / "*.jsonl")).places(0).endswith("other.jsonl:1")


def test_a_folder_that_is_none(read):
    with pytest.raises(ConfigError, match=r"dataset\.cache_dir: 3 must be a folder"):
        read(cache_dir=3)


def test_old_stores_go_when_a_new_one_is_written(read, stores):
    read()
    (old,) = stores()
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(stores.folder / old, (long_ago, long_ago))
    read(train_on="all")
    assert old not in stores() and len(stores()) == 1


def test_a_named_folder_that_cannot_be_written_to(read, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OutputError, match=r"written to .*file.* dataset\.cache_dir"):
        read(cache_dir=file)


def test_without_a_home_nothing_is_kept(read, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "file"))
    dataset = read(cache_dir=None)
    assert len(list(dataset)) == 8
    assert "tokenized data is not kept" in caplog.text
    assert pickle.loads(pickle.dumps(dataset))[7] == dataset[7]  # for loader workers
    private = dataset.store.folder
    assert private.is_dir()
    del dataset
    assert not private.is_dir()


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    assert cache.default_folder() == tmp_path
    monkeypatch.delenv(cache.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "phi3_plugin"
