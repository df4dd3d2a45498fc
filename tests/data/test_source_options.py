"""What a configuration may say about sources, and that every mistake in it is named."""

import json

import pytest
from omegaconf import OmegaConf

from phi3_plugin.data.sources import read_sources
from phi3_plugin.errors import ConfigError, MissingFileError
from tests.data.rows import A, B, ids, streamed


def test_several_sources(data):
    both = ["data/b.jsonl", {"source": data / "a.json", "weight": 0.5}]
    assert [row.value for row in streamed(both)] == [A, B, B]
    assert [(s.name, s.weight) for s in read_sources(both)] == [
        ("data/b.jsonl", 1),
        (str(data / "a.json"), 0.5),
    ]
    assert ids({"source": "data/b.jsonl", "max_samples": 1}) == [1]


def test_a_sources_own_options_go_first(data):
    own = {"source": "data/b.jsonl", "columns": {"user": "q", "assistant": "a"}, "max_samples": 1}
    first, second = read_sources([own, "data/a.json"], format="alpaca", filter="n", max_samples=9)
    assert (first.format, first.columns, first.max_samples) == (None, own["columns"], 1)
    assert (second.format, second.columns, second.max_samples) == ("alpaca", None, 9)
    assert first.filter == second.filter == "n"
    assert json.loads(json.dumps(first.settings()))["columns"] == own["columns"]


def test_configs_as_omegaconf_makes_them(data):
    columns = {"user": "q", "assistant": "a"}
    listed = [{"source": "data/b.jsonl", "weight": 2, "columns": columns}, "data/a.json"]
    config = OmegaConf.create({"source": listed, "columns": columns})
    assert read_sources(config.source, columns=config.columns) == read_sources(
        listed, columns=columns
    )
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
        read_sources(listed, format=3, filter="(")
    says = [
        r"dataset.format: 3 is unknown. Known formats:",
        r"dataset.filter: '(' is no expression: ",
        r"dataset.source[0].wight is unknown. Known keys: source, weight, format, columns, ",
        r"dataset.source[0].weight: 0 must be a number above 0",
        r"dataset.source[0].format: 'chatml' is unknown",
        r"dataset.source[1].source is not set. Give a ",
        r"dataset.source[1].weight: True must be a number",
        r"dataset.source[1].filter: 'a b' is no expression: ",
        r"dataset.source[1].columns: {'user': 'q'} must name one column",
        r"dataset.source[2]: 3 must be a string",
        r"dataset.source[3].source is not set",
        r"dataset.source[3].max_samples: 0 must be a whole number above 0",
        r"dataset.source[3].subset: 3 must be text",
        r"dataset.source[3].streaming: 'no' must be True or False",
        r"dataset.source[3].split: None must be text",
        r"dataset.source[4].weight: nan must be a number",
        r"dataset.source[4].format and dataset.source[4].columns are both set",
    ]
    problems = [line for line in str(error.value).splitlines() if line.startswith("dataset")]
    assert len(problems) == len(says)
    for say in says:
        assert any(problem.startswith(say) for problem in problems), say


def test_every_missing_file_is_named(data):
    with pytest.raises(MissingFileError) as error:
        read_sources(["data/a.json", "data/x", "data/*.csv"])
    assert str(error.value).splitlines()[0] == (
        "dataset.source: there is no file or folder data/x."
    )
    assert "data/*.csv holds no file" in str(error.value).splitlines()[1]


def test_a_split_is_not_passed_over(data):
    listed = ["data", {"source": "data/a.json", "split": "train"}, "data/x", "org/set"]
    with pytest.raises(ConfigError) as error:
        read_sources([*listed, {"source": "data/*.json", "split": "dev"}], split="test")
    assert str(error.value).splitlines() == [
        "dataset.source: data is local and has no split 'test'. Remove split, or set it for the "
        "sources of the hub alone, as in {source: gsm8k, split: test}.",
        "dataset.source: data/*.json is local and has no split 'dev'. Remove split, or set it for "
        "the sources of the hub alone, as in {source: gsm8k, split: dev}.",
        "dataset.source: there is no file or folder data/x.",
    ]
    assert read_sources("org/set", split="test")[0].split == "test"


@pytest.mark.parametrize("source", [[], {}, {"weight": 1}])
def test_no_source(source):
    with pytest.raises(
        ConfigError, match=r"^dataset\.source(\.source)? is not set\. Give a \.json"
    ):
        read_sources(source)
