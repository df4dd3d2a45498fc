"""Documents: read, cut into windows, held out whole and packed; bad ones counted or refused."""

import gzip
import json

import numpy as np
import pytest

from phi3_plugin.data import chat_dataset, phi3_tokenizer, text_dataset
from phi3_plugin.data.findings import NO_TEXT
from phi3_plugin.data.packing import without_padding
from phi3_plugin.data.sources import local_files
from phi3_plugin.errors import ConfigError, DataError, MissingFileError
from tests.files import write_arrow
from tests.variants import write_checkpoint

LONG = "the other brother gathered there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def make(tmp_path, folder, monkeypatch):
    """Read files, given by name and content, or rows of one table."""
    monkeypatch.chdir(tmp_path)

    def build(files, limit=None, **options):
        texts = tmp_path / "texts"
        texts.mkdir(exist_ok=True)
        if isinstance(files, list):
            files = {"rows.jsonl": "\n".join(map(json.dumps, files))}
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            (texts / name).write_bytes(content)
        options = {"source": str(texts), **options}
        return text_dataset(phi3_tokenizer(folder, max_seq_len=limit), **options)

    return build


@pytest.fixture
def ids(folder):
    tokenizer = phi3_tokenizer(folder)
    return lambda text: tokenizer.encode(text, add_eos=True)


def tokens_of(dataset):
    return [sample["tokens"] for sample in dataset]


def test_each_file_is_a_document_and_each_row_of_a_table(make, ids, tmp_path):
    packed = gzip.compress(b"the e")
    dataset = make({"a.txt": "the a\r\nb", "b.MD": "\ufeffthe b", "c.txt.gz": packed})
    assert tokens_of(dataset) == [ids("the a\nb"), ids("the b"), ids("the e")]
    for sample in dataset:
        assert sample["labels"] == [-100, *sample["tokens"][1:]]
    assert dataset.places(0).endswith("a.txt")
    (tmp_path / "texts" / "table.jsonl").write_text('{"text": "the c", "url": "x"}\n')
    write_arrow(tmp_path / "texts" / "z.arrow", [{"text": "the d"}])
    (tmp_path / "texts" / "README.md").write_text("the card")
    rows = make({})
    expected = ["the a\nb", "the b", "the e", "the c", "the d"]
    assert sorted(tokens_of(rows)) == sorted(map(ids, expected))
    assert any("table.jsonl" in told or "url" in told for told in rows.findings.columns_told())


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (("a.txt", "test.md", "valid notes.txt"), ("a.txt", "test.md", "valid notes.txt")),
        (
            ("training plan.md", "test plan.md", "a.md"),
            ("a.md", "test plan.md", "training plan.md"),
        ),
        (("train.txt", "test.txt", "valid.txt.gz"), ("train.txt",)),
        (("chats_train.jsonl", "test.md"), ("chats_train.jsonl",)),
    ],
)
def test_a_document_is_held_out_by_its_name_only_where_that_is_plain(tmp_path, files, read):
    for name in files:
        (tmp_path / name).touch()
    found, _ = local_files(str(tmp_path), documents=True)
    assert [path.name for path in found] == sorted(read)


def test_a_column_of_another_name(make, ids):
    rows = [{"body": "the", "text": "no"}, {"body": "other", "id": 1, "role": "x"}]
    assert tokens_of(make(rows, column="body")) == [ids("the"), ids("other")]
    source = {"source": "texts", "column": "text", "max_samples": 1, "weight": 2}
    assert tokens_of(make(rows, source=source)) == [ids("no")] * 2


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_windows(make, ids, overlap):
    whole = ids(LONG)
    dataset = make([{"text": LONG}, {"text": "the"}], limit=8, overlap=overlap)
    *windows, short = list(dataset)
    assert short["tokens"] == ids("the")
    found, trained = [], []
    for i, window in enumerate(windows):
        again = overlap if i else 0
        assert len(window["tokens"]) == 8 or i == len(windows) - 1
        assert window["tokens"][:again] == found[len(found) - again :]
        assert window["labels"] == [
            -100 if n < max(again, 1) else token for n, token in enumerate(window["tokens"])
        ]
        found += window["tokens"][again:]
        trained += [label for label in window["labels"] if label != -100]
    left_out = len(whole) - len(found)
    assert found == whole[: len(found)] and left_out <= (1 if overlap == 0 else 0)
    if overlap:
        assert trained == whole[1:]
    assert not dataset.findings.dropped and len(dataset.lost) == 0


def test_a_document_that_fits_is_one_window_to_the_last_token(make, ids):
    size = len(ids(LONG))
    for overlap in (0, 2):
        assert len(make([{"text": LONG}], limit=size, overlap=overlap)) == 1
    (*_, last) = make([{"text": LONG}], limit=size - 1, overlap=2)
    assert last["tokens"] == ids(LONG)[-3:] and last["labels"] == [-100, -100, ids(LONG)[-1]]


def test_special_tokens_are_text_unless_told_otherwise(make, ids, folder):
    text = "the<|end|> other"
    tokenizer = phi3_tokenizer(folder)
    end = tokenizer.special_tokens["<|end|>"]
    (as_text,), (parsed,) = make([{"text": text}]), make([{"text": text}], special_in_text="parse")
    assert end not in as_text["tokens"] and tokenizer.decode(as_text["tokens"][:-1]) == text
    assert parsed["tokens"] == ids(text) and end in parsed["tokens"]
    ended = "the<|endoftext|>"
    assert tokens_of(make([{"text": ended}], special_in_text="parse")) == [tokenizer.encode(ended)]


def test_documents_are_held_out_whole(make):
    rows = [{"text": f"{LONG} {n}", "book": n // 2} for n in range(20)] * 2
    for group, size in ((None, 2), ("book", 4)):
        dataset = make(rows, limit=8, overlap=1, group_by=group)
        kept, held = dataset.hold_out(0.2, 0)
        sides = [{dataset.store.samples["row"][i] for i in part.chosen} for part in (kept, held)]
        assert sides[1] and not sides[0] & sides[1]
        assert len(sides[1]) % size == 0


def test_packs_are_full_of_windows(make, ids):
    rows = [{"text": " ".join(["the"] * n)} for n in range(1, 16)]
    dataset = make(rows, limit=16, packed=True)
    packs = without_padding(dataset)
    assert packs.waste < 0.1 and len(dataset[0]["tokens"]) == 16
    end = ids("")[-1]
    found = np.concatenate([packs[i]["tokens"].numpy() for i in range(len(packs))])
    assert (found == end).sum() == len(rows)
    assert sum(packs.lengths) == sum(make(rows, limit=16).lengths)


def test_the_cache_knows_documents_from_conversations(make, folder, tmp_path):
    rows = [{"text": "<|user|>\nthe<|end|>\n<|assistant|>\nother<|end|>\n"}]
    cache = {"cache_dir": str(tmp_path / "kept")}
    text = make(rows, **cache)
    assert make(rows, **cache).store.folder == text.store.folder
    others = [make(rows, special_in_text="parse", **cache), make(rows, overlap=1, limit=9, **cache)]
    chat = chat_dataset(phi3_tokenizer(folder), "texts", **cache)
    stores = [data.store.folder for data in (text, *others, chat)]
    assert len({*stores}) == 4
    labels = chat[0]["labels"]  # of what the assistant says, as ever
    assert 0 < sum(label != -100 for label in labels) < len(labels) - 1


def test_documents_without_text_are_counted(make, ids):
    rows = [{"text": ""}, {"text": " \n"}, {"text": None}, {"text": "the"}]
    dataset = make(rows)
    assert tokens_of(dataset) == [ids("the")]
    assert dataset.findings.counts[NO_TEXT] == 3 and dataset.rows == 4


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.txt": ""}, "no sample is left of 1 rows: 1 have no text"),
        ({"a.txt": b"the \xff other"}, "a.txt: it is not UTF-8 text: byte 0xff after 4 characters"),
        ({"a.txt": b"\x89PNG\0\0"}, "a.txt: it is no text: it holds a byte 0"),
        ({"a.txt": b"\x1f\x8bxx"}, "holds gzip data. Rename it so that it ends in .gz"),
        ({"a.md.gz": b"the"}, "is not a whole gzip file"),
        ({"a.txt": "x" * 4_000_001}, "the document has 4,000,001 characters, more than 4,000,000"),
        ([{"content": "the"}], "there is no 'text'; the keys are: content"),
        ([{"text": 3}], "text is int, expected a string"),
    ],
    ids=["empty", "not utf-8", "binary", "gzip", "broken gzip", "too long", "no column", "number"],
)
def test_bad_documents_are_one_error(make, files, said):
    with pytest.raises(DataError, match=r"dataset\.source") as error:
        make(files)
    assert said in str(error.value)


def test_bad_documents_may_be_left_out(make, ids):
    dataset = make({"a.txt": b"\xff", "b.txt": "the"}, bad_rows="drop")
    assert tokens_of(dataset) == [ids("the")] and dataset.findings.dropped == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 8, "overlap": 8}, "dataset.overlap: 8 must be less than the length of a window"),
        ({"overlap": 8}, "tokenizer.max_seq_len=None"),
        ({"overlap": -1}, "dataset.overlap: -1 must be a whole number, 0 or above"),
        (
            {"format": "alpaca"},
            "dataset.format: 'alpaca' is given, but text_dataset has no such",
        ),
        ({"source": {"source": "texts", "format": "alpaca"}}, "dataset.source.format"),
        ({"packed": True}, "dataset.packed: True needs the length of a pack"),
    ],
)
def test_wrong_options(make, options, said):
    with pytest.raises(ConfigError) as error:
        make([{"text": "the"}], **options)
    assert said in str(error.value)


def test_what_is_not_there(make):
    with pytest.raises(MissingFileError, match=r"there is no file or folder notes\.txt"):
        make({}, source="notes.txt")
    with pytest.raises(MissingFileError, match=r"holds no file that ends in .txt, .md, .json"):
        make({})


def test_conversations_are_not_read_from_texts(folder, tmp_path):
    (tmp_path / "a.txt").write_text("the")
    with pytest.raises(DataError, match=r"a.txt must end in .json"):
        chat_dataset(phi3_tokenizer(folder), tmp_path / "a.txt")
