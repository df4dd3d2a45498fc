"""What a source names, on disk and on the hub, and which of its rows are read."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from phi3_plugin.data.sources import (
    Filtered,
    FilterFailed,
    Source,
    SourceOptions,
    compile_filter,
    read_sources,
)
from phi3_plugin.errors import ConfigError, DataError, MissingFileError
from tests.files import A, B, C, places, read, values, write, write_arrow


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of two files with rows and one without, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in (A, C))
    (folder / "b.jsonl").write_text(text + "\n\n", encoding="utf-8")
    (folder / "a.json").write_text("\ufeff " + json.dumps([B]), encoding="utf-8")
    (folder / "notes.txt").write_text("no data")
    return folder


# What a source names on this machine


def test_folder_and_glob_are_read_in_order(data):
    for source in ("data", "data/", "data/*.json*", data, "./data"):
        assert values(source) == [B, A, C]
    assert values("data/[b]*") == [A, C]
    assert values("**/a.json") == [B]
    (data / "x.json").mkdir()
    assert values("data") == [B, A, C]
    (data / "b.jsonl").rename(data / "b[1].jsonl")
    assert values("data/b[1].jsonl") == [A, C]
    data.rename("[data] 1")
    assert values("[data] 1") == values("[data] 1/*.json*") == [B, A, C]


def test_home_is_expanded(data, monkeypatch):
    monkeypatch.setenv("HOME", str(data))
    assert values("~/a.json") == [B]


@pytest.mark.parametrize(
    "source",
    [
        *("./x", "x.jsonl", "org/x.json", "org/x.JSON", "x.csv", "x.jsonl.gz", "a/x.parquet"),
        *("/a/b", "~/x", "a/b/c", "data/train", "..\\x"),
    ],
)
def test_no_such_path(data, source):
    with pytest.raises(MissingFileError, match="there is no file or folder"):
        read_sources(source)


def test_glob_and_folder_without_files(data):
    (data / "empty").mkdir()
    for source in ("data/*.jsonlines", "data/empty"):
        with pytest.raises(MissingFileError, match=r"holds no file that ends in .*\.parquet\."):
            read_sources(source)


def test_files_that_were_there_when_checked(data):
    (source,) = read_sources("data/b.jsonl")
    Path("data/b.jsonl").unlink()
    for use in (lambda: list(source.rows()), source.fingerprint):
        with pytest.raises(DataError, match=r"b\.jsonl cannot be read: "):
            use()


def test_fingerprint_is_of_names_and_content(data):
    def prints(source):
        return [found.fingerprint() for found in read_sources(source)]

    before = prints(["data", "data/*.json*", "data/a.json"])
    assert before[0] == before[1] != before[2]
    (data / "more").mkdir()
    moved = (data / "a.json").rename(data / "more" / "a.json")
    assert prints(moved) == before[2:]
    assert prints(moved.rename(data / "c.json")) != before[2:]
    (data / "b.jsonl").write_text("{}")
    (data / "c.json").rename(data / "a.json")
    assert prints("data") != before[:1]


def test_fingerprints_do_not_take_one_file_for_another(tmp_path):
    for n, (one, other) in enumerate([("ab", "c"), ("a", "bc")]):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "a.json").write_text(one)
        (tmp_path / str(n) / "b.json").write_text(other)
    one, other = read_sources([str(tmp_path / "0"), str(tmp_path / "1")])
    assert one.fingerprint() != other.fingerprint()


def make(folder, *names):
    """Write files of one row each, which tells the file's name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [{"file": name}])
    return folder


def files(source, **options):
    return sorted(row["file"] for row in values(source, **options))


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (
            ["data/train-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
            {"train": [0], "test_sft": [1]},
        ),
        (
            ["train.jsonl", "valid.jsonl", "test.jsonl"],
            {"train": [0], "validation": [1], "valid": [1], "test": [2]},
        ),
        (
            ["my_train_1.jsonl", "my-train-2.json", "chats.eval.csv"],
            {"train": [0, 1], "test": [2], "eval": [2]},
        ),
        (["train/a.jsonl", "dev/a.jsonl"], {"train": [0], "validation": [1], "dev": [1]}),
        (["x/training data/test.jsonl", "x/test/train.jsonl"], {"train": [0], "test": [1]}),
        (["chats.jsonl", "more/chats.jsonl", "test.jsonl"], {"train": [0, 1], "test": [2]}),
        (["train/a.jsonl", "train/validation.jsonl", "val/a.csv"], {"train": [0, 1]}),
        (["constraints.jsonl", "contest.jsonl", "evals.jsonl"], {"train": [0, 1, 2]}),
    ],
)
def test_a_folder_has_the_splits_that_its_names_say(tmp_path, names, splits):
    folder = make(tmp_path / "test", *names)
    assert files(folder) == sorted(names[i] for i in splits["train"])
    for split, chosen in splits.items():
        assert files(folder, split=split) == sorted(names[i] for i in chosen)
    with pytest.raises(ConfigError, match=r"test (is local and )?has no split 'other'"):
        files(folder, split="other")


def test_the_only_split_is_read_unless_another_is_asked_for(tmp_path):
    folder = make(tmp_path / "x", "test_1.jsonl", "test_2.jsonl")
    make(folder / "sub", "validation.jsonl")
    assert files(folder / "sub") == files(folder / "sub", split="val") == ["validation.jsonl"]
    (folder / "sub" / "validation.jsonl").unlink()
    assert files(folder) == ["test_1.jsonl", "test_2.jsonl"]
    with pytest.raises(ConfigError, match=r"has no split 'train'\. It has: test\. Choose one"):
        files(folder, split="train")


def test_several_splits_and_none_of_them_train(tmp_path):
    folder = make(tmp_path / "x", "test/a.jsonl", "val/a.jsonl")
    with pytest.raises(ConfigError, match=r"has no split 'train'\. It has: test, validation"):
        files(folder)


def test_what_a_folder_says_is_not_read(tmp_path):
    folder = make(tmp_path / "x", "train.jsonl", "more.jsonl.zst", "sub/more.csv")
    for name in (".hidden.jsonl", "._train.jsonl", ".git/a.jsonl", "__pycache__/a.json"):
        make(folder, name)
    for name in ("README.md", "dataset_infos.json", "LICENSE", ".gitattributes", "load.py"):
        (folder / name).write_text("{}")
    (folder / "chats.txt").write_text("a")
    (folder / "sub" / "b.zip").write_text("a")
    (source,) = read_sources(folder)
    assert values(folder) == [{"file": "train.jsonl"}]
    assert source.passed_over == ("chats.txt", "more.jsonl.zst", "sub/b.zip", "sub/more.csv")
    (folder / "train.jsonl").unlink()
    assert files(folder) == ["more.jsonl.zst", "sub/more.csv"]
    assert read_sources(folder)[0].passed_over == ("chats.txt", "sub/b.zip")


CLONE = """---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: [main/test-*]}
- config_name: more
  data_files: {train: more/*.jsonl, val: more/dev.csv}
- config_name: whole
  data_dir: whole
- config_name: outside
  data_files: ../*.jsonl
---
# A data set
"""


def test_a_clone_of_the_hub_has_the_subsets_that_its_readme_lists(tmp_path):
    folder = tmp_path / "clone"
    make(tmp_path, "outside.jsonl")
    make(folder, "main/train-0.parquet", "main/test-0.parquet", "more/a.jsonl", "more/dev.csv")
    make(folder, "whole/train.jsonl", "whole/test.jsonl")
    (folder / "README.md").write_text(CLONE)
    assert files(folder, subset="main") == ["main/train-0.parquet"]
    assert files(folder, subset="main", split="test") == ["main/test-0.parquet"]
    assert files(folder, subset="more") == ["more/a.jsonl"]
    assert files(folder, subset="more", split="val") == ["more/dev.csv"]
    assert files(folder, subset="whole") == ["whole/train.jsonl"]
    with pytest.raises(ConfigError, match="has several subsets: main, more, whole, outside"):
        files(folder)
    with pytest.raises(ConfigError, match="has no subset 'x'"):
        files(folder, subset="x")
    with pytest.raises(ConfigError, match="has no split 'validation'"):
        files(folder, subset="main", split="dev")
    with pytest.raises(MissingFileError):
        files(folder, subset="outside")
    (folder / "README.md").write_text(
        CLONE.replace("- config_name: more", "  default: true\n- x: 1")
    )
    assert files(folder) == ["main/train-0.parquet"]


@pytest.mark.parametrize("text", ["# no head", "---\n[\n---\n", "---\nconfigs: 3\n---\n", "---\n"])
def test_a_readme_that_lists_nothing(tmp_path, text):
    folder = make(tmp_path / "clone", "train.jsonl", "test.jsonl")
    (folder / "README.md").write_text(text)
    assert files(folder) == ["train.jsonl"]


def test_a_folder_of_other_files_says_which(tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(MissingFileError, match=r"holds no file that ends in .* It has: a\.xlsx\."):
        read_sources(tmp_path)


@pytest.mark.parametrize("name", ["json", "csv", "parquet", "text", "imagefolder"])
def test_a_kind_of_file_is_no_source(data, name):
    with pytest.raises(ConfigError, match=rf"'{name}' is a kind of file and names no data"):
        read_sources(name)
    (data.parent / name).mkdir()
    make(data.parent / name, "a.jsonl")
    assert files(name) == ["a.jsonl"]


def test_a_local_source_has_no_subset(data):
    with pytest.raises(ConfigError, match=r"data is local and has no subset 'main'\. Name"):
        read_sources({"source": "data", "subset": "main"})


# What a configuration may say about sources


def test_several_sources(data):
    both = ["data/b.jsonl", {"source": data / "a.json", "weight": 0.5}]
    assert values(both) == [A, C, B]
    assert [(s.name, s.weight) for s in read_sources(both)] == [
        ("data/b.jsonl", 1),
        (str(data / "a.json"), 0.5),
    ]
    assert values({"source": "data/b.jsonl", "max_samples": 1}) == [A]


def test_a_sources_own_options_go_first(data):
    own = {"source": "data/b.jsonl", "columns": {"user": "q", "assistant": "a"}, "max_samples": 1}
    common = SourceOptions(format="alpaca", filter="n", max_samples=9)
    first, second = read_sources([own, "data/a.json"], common)
    assert (first.format, first.columns, first.max_samples) == (None, own["columns"], 1)
    assert (second.format, second.columns, second.max_samples) == ("alpaca", None, 9)
    assert first.filter == second.filter == "n"
    assert json.loads(json.dumps(first.settings()))["columns"] == own["columns"]


def test_configs_as_omegaconf_makes_them(data):
    columns = {"user": "q", "assistant": "a"}
    listed = [{"source": "data/b.jsonl", "weight": 2, "columns": columns}, "data/a.json"]
    config = OmegaConf.create({"source": listed, "columns": columns})
    common = SourceOptions(columns=columns)
    assert read_sources(config.source, common) == read_sources(listed, common)
    assert type(read_sources(config.source)[0].columns) is dict


def test_every_wrong_option_is_named(data):
    listed = [
        {"source": "data/b.jsonl", "wight": 2, "weight": 0, "format": "chatml"},
        {"weight": True, "filter": "a b", "columns": {"user": "q"}},
        3,
        {"source": None, "max_samples": 0, "subset": 3, "streaming": "no", "split": None},
        {"source": "nowhere/x", "weight": float("nan"), "format": "text", "columns": {}},
    ]
    with pytest.raises(ConfigError) as error:
        read_sources(listed)
    says = [
        "dataset.source[0].wight: 2 is given, but a source has no such key. Did you mean 'weight'?",
        "dataset.source[0].weight: 0 must be a number above 0",
        "dataset.source[0].format: 'chatml' must be the name of a format",
        "dataset.source[1].source is not set. Give a ",
        "dataset.source[1].weight: True must be a number",
        "dataset.source[1].filter: 'a b' is no expression: ",
        "dataset.source[1].columns: {'user': 'q'} must be the name of one column",
        "dataset.source[2]: 3 must be a string",
        "dataset.source[3].source is not set",
        "dataset.source[3].max_samples: 0 must be a whole number above 0",
        "dataset.source[3].subset: 3 must be text",
        "dataset.source[3].streaming: 'no' must be True or False",
        "dataset.source[4].weight: nan must be a number",
        "dataset.source[4].columns: {} must be",
        "dataset.source[4].format and dataset.source[4].columns are both set",
    ]
    problems = [line for line in str(error.value).splitlines() if line.startswith("dataset")]
    assert len(problems) == len(says)
    for say in says:
        assert any(problem.startswith(say) for problem in problems), say


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": "no column"}, r"prompt: 'no column' is no prompt: it must name columns"),
        ({"prompt": "{a"}, r"prompt: '\{a' is no prompt: "),
        ({"prompt": "{a:>3} {}"}, "is no prompt: it must name"),
        ({"prompt": "{a}", "format": "alpaca"}, "format and dataset.source.prompt are both set"),
        ({"prompt": "{a}", "columns": {"user": "q", "assistant": "a"}}, "is what the user says"),
        ({"columns": {"assistant": "a"}}, "columns names no column for user. Name it, or set"),
        ({"columns": {"assistant": "a", "thought": "t"}}, "columns names no column for user."),
        ({"roles": {"human": 3}}, "roles: .* must be the meaning of names"),
        ({"roles": {"human": "<|user|>"}}, "roles: .* must be the meaning of names"),
    ],
)
def test_what_says_how_rows_are_read(data, options, says):
    with pytest.raises(ConfigError, match=says):
        read_sources({"source": "data", **options})


@pytest.mark.parametrize(
    "columns",
    [
        *({}, {"user": "q"}, {"user": "q", "assistant": 3}, ["q", "a"]),
        {"user": "q", "assistant": "a", "tool": "t"},
    ],
)
def test_columns_are_named_for_both_sides(data, columns):
    with pytest.raises(ConfigError, match=r"columns: .* must be the name of one column for user"):
        read_sources({"source": "data", "columns": columns})


def test_every_missing_file_is_named(data):
    with pytest.raises(MissingFileError) as error:
        read_sources(["data/a.json", "data/x", "data/*.csv"])
    first, second = str(error.value).splitlines()
    assert first == "dataset.source: there is no file or folder data/x."
    assert "data/*.csv holds no file" in second


def test_a_split_is_not_passed_over(data):
    listed = ["data", {"source": "data/a.json", "split": "train"}, "data/x", "org/set"]
    with pytest.raises(ConfigError) as error:
        read_sources(
            [*listed, {"source": "data/*.json", "split": "dev"}], SourceOptions(split="test")
        )
    first, second, third = str(error.value).splitlines()
    assert first.startswith("dataset.source: data is local and has no split 'test'. Remove split")
    assert second.startswith("dataset.source: data/*.json is local and has no split 'dev'. ")
    assert third == "dataset.source: there is no file or folder data/x."
    assert read_sources("org/set", SourceOptions(split="test"))[0].split == "test"


@pytest.mark.parametrize("source", [None, "", [], {}, {"weight": 1}])
def test_no_source(source):
    says = r"^dataset\.source(\.source)? is not set\. Give a \.json"
    with pytest.raises(ConfigError, match=says):
        read_sources(source)


# Filters


@pytest.mark.parametrize(
    ("expression", "row", "passes"),
    [
        ("lang == 'en' and rating >= 4", {"lang": "en", "rating": 4}, True),
        ("lang == 'en' and rating >= 4", {"lang": "de", "rating": 4}, False),
        ("text | length > 2", {"text": "abc"}, True),
        ("lang in ['en', 'de']", {"lang": "fr"}, False),
        ("rating is defined and rating", {}, False),
        ("messages[-1].role == 'assistant'", {"messages": [{"role": "assistant"}]}, True),
        ("row['a b'] is none", {"a b": None}, True),
        ("result > 1", {"result": 2}, True),
        ("row['row'] > 1 and row['a b']", {"row": 2, "a b": 3}, True),
        ("row['self'] > 1 and x.self > 2", {"self": 2, "x": {"self": 3}}, True),
        ("lang is eq('en') and rating is ge(4)", {"lang": "en", "rating": 4}, True),
        ("text", {"text": ""}, False),
    ],
)
def test_filters(expression, row, passes):
    assert compile_filter(expression)(row) is passes


@pytest.mark.parametrize("expression", ["", "a b", "a >", "{{ a }}", "a | nothing", "(" * 2000])
def test_no_filter(expression):
    with pytest.raises(ConfigError, match=r"dataset\.filter: .* is no expression: "):
        compile_filter(expression)


@pytest.mark.parametrize(
    "expression",
    [
        *("missing", "missing > 1", "text > 1", "text.__class__.__mro__", "row.clear()"),
        *("messages.append(1)", "range(3)", "lipsum()", "''.join(1)", "1 // 0"),
    ],
)
def test_a_filter_that_fails(expression):
    row = {"text": "a", "messages": []}
    with pytest.raises(FilterFailed, match=r"dataset\.filter .* failed: "):
        compile_filter(expression)(row)
    assert row == {"text": "a", "messages": []}


@pytest.fixture
def rated(tmp_path):
    file = tmp_path / "rated.jsonl"
    rows = [json.dumps({"n": n, "rating": n % 3, "la ng": "en"}) for n in range(9)]
    file.write_text("\n".join([*rows[:4], "{", *rows[4:]]))
    return file


def test_rows_that_pass_a_filter(rated):
    common = SourceOptions(filter="rating >= 1 and row['la ng'] in ['en', 'de']")
    (source,) = read_sources(rated, common)
    rows = list(source.rows())
    assert [row.value["n"] for row in rows if isinstance(row.value, dict)] == [1, 2, 4, 5, 7, 8]
    assert places(row for row in rows if isinstance(row.value, Filtered)) == ["1", "4", "8"]
    errors = (DataError, Filtered)
    assert places(row for row in rows if type(row.value) is errors[0]) == ["5"]


def test_a_filter_that_fails_on_a_row_is_that_rows_error(rated):
    rows = read(rated, filter="n < 3 or rating.size > 0 or missing")
    errors = [row for row in rows if isinstance(row.value, DataError)]
    assert places(errors) == ["4", "5", *"6789", "10"]
    assert places(row for row in errors if not isinstance(row.value, FilterFailed)) == ["5"]
    assert "dataset.filter 'n < 3 or rating.size > 0 or missing' failed" in str(errors[0].value)


def test_a_filter_that_nothing_passes(rated):
    rated.write_text(rated.read_text().replace("{\n", ""))
    with pytest.raises(DataError, match=r"no row of .*rated\.jsonl passes the filter 'n > 99'"):
        read(rated, filter="n > 99")


def test_max_samples_counts_what_passes(rated):
    rows = read(rated, filter="rating == 0", max_samples=2)
    assert [row.value["n"] for row in rows] == [0, 3]
    assert places(read(rated, max_samples=5)) == ["1", "2", "3", "4", "5", "6"]
    assert len(read(rated, max_samples=99)) == 10


# Rows of one turn each

TURNS = [
    {"c_id": 0, "role": "user", "message": "a", "lang": "en", "n": 1},
    {"c_id": 0, "role": "assistant", "message": "b", "lang": "en", "n": 2},
    {"c_id": 1, "role": "user", "message": "c", "lang": "de", "n": 1},
]


def test_turns_of_a_conversation_are_joined(tmp_path):
    file = write(tmp_path / "a.jsonl", TURNS)
    first, second = read(file)
    assert (first.where, second.where) == (f"{file}:1", f"{file}:3")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert first.value == {"c_id": 0, "lang": "en", "messages": messages}
    assert values(file, filter="lang == 'de'") == [second.value]
    assert values(file, max_samples=1) == [first.value]
    assert values(file, columns={"user": "message", "assistant": "role"}) == TURNS


def test_turns_of_other_names(tmp_path):
    rows = [{"Session ID": 1}, {"ID": "x", "From": "human", "Text": "a"}]
    assert values(write(tmp_path / "a.jsonl", rows)) == rows
    (row,) = values(write(tmp_path / "b.jsonl", rows[1:]))
    assert row == {"ID": "x", "messages": [{"from": "human", "value": "a"}]}
    lists = [{"id": 1, "role": "x", "text": ["y"]}]
    assert values(write(tmp_path / "c.jsonl", lists)) == lists


def test_turns_that_do_not_follow_each_other(tmp_path):
    rows = read(write(tmp_path / "a.jsonl", [*TURNS, TURNS[0]]))
    assert len(rows) == 3
    assert "c_id 0 was there before; put the rows of each together" in str(rows[2].value)
    lines = [json.dumps(row) for row in TURNS]
    (tmp_path / "b.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    broken, whole = read(tmp_path / "b.jsonl")
    assert "b.jsonl:2: broken JSON" in str(broken.value)
    assert whole.value["c_id"] == 1


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []

    class Rows(list):
        _fingerprint = "abc"

    def lost():
        yield A
        raise ConnectionError("cut off")

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "gone":
            raise ConnectionError("no network")
        return lost() if args[0] == "lost" else Rows([A, B])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub(hub):
    rows = read("org/set", split="test", subset="main")
    assert rows == [("org/set[0]", A), ("org/set[1]", B)]
    assert hub == [(("org/set", "main"), {"split": "test"})]
    assert read("gsm8k")[0].where == "gsm8k[0]"


def test_hub_is_loaded_once(hub):
    (source,) = read_sources("org/set")
    assert source.fingerprint() == source.fingerprint()
    assert [row.value for row in source.rows()] == [row.value for row in source.rows()] == [A, B]
    assert len(hub) == 1
    (other,) = read_sources("org/set", SourceOptions(subset="b"))
    assert other.fingerprint() != source.fingerprint()


def test_hub_as_a_stream(hub):
    (source,) = read_sources("org/set", SourceOptions(streaming=True, max_samples=1))
    assert source.fingerprint() is None
    assert not hub
    assert [row.value for row in source.rows()] == [A]
    assert hub == [(("org/set", None), {"split": "train", "streaming": True})]


def test_hub_that_fails(hub):
    with pytest.raises(DataError, match=r"'gone' is no local file and could not .*: no network"):
        read("gone")
    (source,) = read_sources("lost", SourceOptions(streaming=True))
    rows = source.rows()
    assert next(rows).value == A
    with pytest.raises(DataError, match=r"'lost' .* could not be read to its end .*: cut off"):
        next(rows)


def test_a_hub_set_of_no_known_print():
    source = Source("x")
    source.__dict__["_hub"] = [{"tools": [{"name": "f", "b": None}], "n": None}]
    assert source.fingerprint() is None
    # Nulls that the hub's tables add to tools
    assert [row.value for row in source.rows()] == [{"tools": [{"name": "f"}], "n": None}]


# Folders that `datasets` saved


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


def test_caches_and_notes_are_no_data(tmp_path):
    folder = save(tmp_path / "saved", [A], [B])
    assert values(folder) == [A, B]
    (folder / "more.jsonl").write_text(json.dumps(C))  # read as in any folder
    assert values(folder) == [A, B, C]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").write_text(json.dumps([A]))
    assert values(tmp_path / "other") == [A]


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
        read_sources(parts, SourceOptions(split=split))


def test_saved_files_that_are_lost(tmp_path):
    parts = save_parts(tmp_path / "parts", train=[A])
    (parts / "train").rename(parts / "moved")
    with pytest.raises(MissingFileError, match=r"there is no file or folder .*parts/train\."):
        read_sources(parts)
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
