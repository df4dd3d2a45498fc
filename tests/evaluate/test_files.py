"""What is written can be read, and is there as a whole or not at all."""

import json
import os

import pytest

from phi3_plugin import evaluate as files
from phi3_plugin.errors import OutputError
from phi3_plugin.evaluate import BASE, Evaluation, Outcome, Sample, Scorer, measures, results
from tests.evaluate.made import HOSTILE, made


def test_samples_are_a_line_each():
    evaluation = made()
    text = files.samples_text(evaluation)
    lines = [json.loads(line) for line in text.splitlines()]  # also where a text has U+2028
    assert len(lines) == 5 and text.endswith("\n")
    assert lines[0]["where"] == "rows.jsonl:1" and lines[0]["reference"].endswith("#### 4")
    assert lines[0]["base"] == {
        "loss": pytest.approx(2.0),
        "correct_tokens": 0,
        "answer": "It is 5",
        "ended": "stop",
        "answer_tokens": 3,
        "scores": {k: pytest.approx(v, abs=1e-4) for k, v in scores(evaluation).items()},
    }
    assert lines[3]["adapter"]["answer"] == HOSTILE
    assert lines[4]["base"]["ended"] == "length" and "中文" in text


def scores(evaluation):
    return evaluation.outcomes[BASE][0].said.scores.values


def test_line_ends_of_unicode_stay_in_their_line():
    sample = Sample("a:1", 1, "x\u2028y\x85z\u2029", "", "none")
    text = files.samples_text(Evaluation([sample], {BASE: [Outcome(1.0, 0, 1)]}, {}))
    assert len(text.splitlines()) == 1
    assert json.loads(text)["prompt"] == sample.prompt
    assert json.loads(text)["not_answered"] == "none"


def test_results_hold_every_number():
    evaluation = made()
    found = results(evaluation, measures(Scorer()), seed=7)
    content = json.loads(files.results_text(evaluation, found, 7))
    loss = content["measures"]["loss"]
    assert loss["base"]["value"] == found[0].models[BASE].value and loss["better"] == "lower"
    assert loss["difference"]["low"] <= loss["difference"]["value"] <= loss["difference"]["high"]
    assert loss["share_of_samples"] == {"better": 1.0, "worse": 0.0, "equal": 0.0}
    assert content["bootstrap"] == {"resamples": 2000, "percent": 95.0, "seed": 7}
    assert content["ended"]["base"] == {"stop": 4, "length": 1}
    assert content["labelled_tokens"] == 15 and content["answered"] == 5


def test_json_has_no_infinity():
    evaluation = Evaluation(
        [Sample("a:1", 1, "", "")], {BASE: [Outcome(1e9, 0, 1)]}, {"x": [1e400]}
    )
    text = files.results_text(evaluation, results(evaluation, measures(None)), 0)
    content = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert content["measures"]["perplexity"]["base"]["value"] is None and content["x"] == [None]


def test_an_earlier_evaluation_is_not_lost(tmp_path):
    files.refuse_earlier(tmp_path)
    (tmp_path / "report.html").write_text("of a training run")
    files.refuse_earlier(tmp_path)
    (tmp_path / files.RESULTS).write_text("{}")
    with pytest.raises(OutputError, match=r"already holds .*results\.json.*overwrite=True"):
        files.refuse_earlier(tmp_path)


def test_files_are_written_whole(tmp_path):
    folder = tmp_path / "a" / "b"
    files.write_files(folder, dict.fromkeys(files.NAMES, "one\n\ud800"))
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == dict.fromkeys(
        files.NAMES, b"one\n?"
    )
    files.write_files(folder, dict.fromkeys(files.NAMES, "two"))
    assert {f.read_text() for f in folder.iterdir()} == {"two"}


@pytest.mark.parametrize("fails", ["write", "rename", "interrupt"])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, fails):
    files.write_files(tmp_path, dict.fromkeys(files.NAMES, "old"))

    def fail(*_):
        raise KeyboardInterrupt if fails == "interrupt" else OSError("disk full")

    monkeypatch.setattr(os, "replace" if fails == "rename" else "fsync", fail)
    expected = KeyboardInterrupt if fails == "interrupt" else OutputError
    with pytest.raises(expected):
        files.write_files(tmp_path, dict.fromkeys(files.NAMES, "new"))
    assert {f.name for f in tmp_path.iterdir()} == set(files.NAMES)
    assert {f.read_text() for f in tmp_path.iterdir()} == {"old"}


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        files.write_files(tmp_path / "file", {"a": "b"})
