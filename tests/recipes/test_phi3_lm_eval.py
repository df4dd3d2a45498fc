"""`phi3-tune lm-eval`: what the harness is told, and tasks from the command line to the results."""

import json
import sys

import pytest
from phi3_plugin.recipes.phi3_lm_eval import as_typed_for_the_harness, run

from phi3_plugin.errors import ConfigError, MissingFileError
from tests.own import WORDS
from tests.recipes.harnessed import harness_inputs, needs_harness


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return harness_inputs(tmp_path_factory.mktemp("harness"))


def test_the_harness_gets_its_own_command_line(place):
    base, made = str(place / "base"), str(place / "adapter")
    words = ["--base", base, "--tasks", "a", "b", "--adapter", made, "--limit", "3"]
    line = as_typed_for_the_harness(words)
    assert line[:3] == ["run", "--model", "phi3_plugin"]
    assert json.loads(line[4]) == {"base": base, "adapter": made}
    assert line[5:] == ["--batch_size", "auto", "--tasks", "a", "b", "--limit", "3"]
    assert as_typed_for_the_harness(["run", *words]) == line
    line = as_typed_for_the_harness([*words, "-b", "4"])
    assert "--batch_size" not in line
    assert as_typed_for_the_harness(["ls", "tasks"]) == ["ls", "tasks"]


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["--tasks", "a"], ConfigError, "--base is not set"),
        (["--base", "{base}"], ConfigError, "--tasks is not set"),
        (["--base", "{base}", "--model", "hf", "-t", "a"], ConfigError, "call lm_eval itself"),
        (["--base", "nowhere", "--tasks", "a"], MissingFileError, "nowhere is not a folder"),
        (["--base", "{base}", "--adapter", "none", "-t", "a"], MissingFileError, "none is not"),
    ],
)
def test_mistakes_are_told_before_the_harness_starts(place, words, kind, message):
    with pytest.raises(kind, match=message):
        as_typed_for_the_harness([word.format(base=place / "base") for word in words])


def test_without_the_harness_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'phi3-plugin\[lm_eval\]'"):
        run(["--base", "x"])


def tasks(folder):
    """Write a task with choices and one with answers, of two questions."""
    rows = [{"q": f"Add: {w} plus two", "choices": ["three", "four"], "a": 1} for w in WORDS[2:4]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, "utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choices = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{a}}"}
    answers = {"doc_to_target": "{{choices[a]}}", "generation_kwargs": {"max_gen_toks": 4}}
    for name, kind, metric, more in (
        ("tiny_choices", "multiple_choice", "acc", choices),
        ("tiny_answers", "generate_until", "exact_match", answers),
    ):
        keys = {"task": name, "output_type": kind, "metric_list": [{"metric": metric}]}
        (folder / f"{name}.yaml").write_text(json.dumps({**shared, **keys, **more}), "utf-8")


@needs_harness
@pytest.mark.slow
def test_tasks_run_from_the_command_line(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks(tmp_path)
    before, out = list(sys.argv), tmp_path / "out"
    words = ["--base", str(place / "base"), "--adapter", str(place / "adapter"), "--dtype", "fp32"]
    words += ["--tasks", "tiny_choices,tiny_answers", "--include_path", str(tmp_path)]
    words += ["--apply_chat_template", "--output_path", str(out), "--log_samples"]
    assert run(words) == 0
    assert sys.argv == before
    printed = capsys.readouterr().out
    assert "tiny_choices" in printed and "exact_match" in printed
    (results,) = out.rglob("results_*.json")
    found = json.loads(results.read_text("utf-8"))
    assert found["config"]["model_args"]["adapter"] == str(place / "adapter")
    assert 0 <= found["results"]["tiny_choices"]["acc,none"] <= 1
    with pytest.raises(ConfigError, match="lm_eval: Tasks not found: no_such_task"):
        run(["--base", str(place / "base"), "--tasks", "no_such_task"])
