"""The inspection tells what a run would see, and whether it would start."""

import json
import sys

import pytest
from omegaconf import OmegaConf
from phi3_plugin.recipes import phi3_inspect_data as recipe

from phi3_plugin import settings as strict
from phi3_plugin.errors import ConfigError, DataError
from phi3_plugin.train.data import load_data
from tests import warm
from tests.own import CONFIG, TINY, chat, merged, tiny_inputs

RUNS = [f for f in sorted(CONFIG.parent.glob("*.yaml")) if "dataset" in OmegaConf.load(f)]
TEXT = CONFIG.parent / "phi3_mini_text.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint without weights, and 20 rows."""
    folder = tiny_inputs(tmp_path_factory.mktemp("inputs"), rows=20)
    for file in (folder / "base").glob("*.safetensors*"):
        file.unlink()
    return folder


@pytest.fixture
def inspect(folder, tmp_path, capsys):
    """Run the recipe in this process; return its exit code, what it printed, and the page."""

    def run(*settings, config=CONFIG):
        tiny = [key for key in TINY if "lora_dropout" not in key]  # not in all configs
        cfg = merged(*tiny, f"output_dir={tmp_path}", *settings, cwd=folder, config=config)
        code = recipe.main.__wrapped__(cfg)
        return code, capsys.readouterr().out, (tmp_path / "data.html").read_text("utf-8")

    return run


def rows_file(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return f"dataset.source={file}"


def lines(*rows):
    return [json.dumps(row) + "\n" for row in rows]


def test_from_the_command_line(folder, tmp_path):
    output = tmp_path / "out"
    (output / "final").mkdir(parents=True)  # that of an earlier run does not matter
    settings = (*TINY, f"output_dir={output}", "dtype=bf16", "device=cuda")
    command = ("run", "phi3_inspect_data", "--config", "phi3_mini_lora", *settings)
    done = warm.run("tune", *command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Training data: rows.jsonl")
    assert done.stdout.splitlines()[-1] == f"All of it: {output / 'data.html'}"
    assert "\x1b" not in done.stdout and "Traceback" not in done.stderr
    assert {file.name for file in output.iterdir()} == {"final", "data.html"}


def test_the_numbers_are_those_of_the_samples(inspect, folder):
    code, out, page = inspect("samples=2")
    feed = load_data(strict.read(merged(*TINY, "output_dir=out", cwd=folder)), 1)
    dataset = feed.order.dataset
    said = out.splitlines()
    share = f"{100 * dataset.labelled.sum() / dataset.lengths.sum():.0f} %"
    assert code == 0
    assert "Rows                    20 read" in said
    assert f"Tokens an epoch         {dataset.lengths.sum():,}" in said
    assert f"Trained on              {dataset.labelled.sum():,} ({share})" in said
    assert "Training                2 steps of 16 samples" in said
    assert page.count("<summary>rows.jsonl:") == 2
    start = said.index("1. rows.jsonl:1: 8 tokens, 2 trained")
    assert said[start + 1 : start + 5] == [
        "| <|user|>·Add:·one<|end|><|assistant|>",
        "+ ·one<|end|>",
        "| <|endoftext|>",
        "",
    ]


@pytest.mark.parametrize("config", RUNS, ids=lambda file: file.stem)
def test_every_config_is_taken_as_it_is(inspect, config, tmp_path):
    pair = {"prompt": "Add", "chosen": "one", "rejected": "two"}
    own = {"preference_dataset": pair, "text_dataset": {"text": "one plus two"}}
    row = own.get(OmegaConf.load(config).dataset._component_.rpartition(".")[2])
    rows = [] if row is None else [rows_file(tmp_path, *lines(*[row] * 20))]
    code, out, _ = inspect("dtype=bf16", *rows, config=config)
    assert code == 0 and "Rows                    20 read" in out


@pytest.mark.parametrize(("loss", "told"), [("kto", False), (None, True)])
def test_torchtune_has_none_of_our_losses(inspect, tmp_path, loss, told):
    row = {"prompt": "Add", "chosen": "one", "rejected": "two"}
    ours = [] if loss is None else [f"loss={{_component_: phi3_plugin.train.losses.{loss}}}"]
    rows = rows_file(tmp_path, *lines(*[row] * 20))
    _, out, _ = inspect(rows, *ours, config=CONFIG.with_name("phi3_mini_dpo.yaml"))
    assert ("by torchtune's recipes" in out) is told


def test_weights_are_shown(inspect, tmp_path):
    pair = {"question": "Add", "answer": "one"}
    weights = [{"weight": 0.5}, {}, {"weight": 0}] * 6
    rows = rows_file(tmp_path, *lines(*({**pair, **weight} for weight in weights)))
    code, out, page = inspect(rows)
    assert code == 0 and "1. rows.jsonl:1, weight 0.5: " in out and "2. rows.jsonl:2: " in out
    assert "left out: 6 have a weight of 0" in out and "6 have a weight other than 1" in page


def test_raw_text_is_shown_in_windows(inspect, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "long.txt").write_text("plus one " * 200, "utf-8")
    (texts / "empty.md").write_text("", "utf-8")
    settings = (f"dataset.source={texts}", "dataset.overlap=4", "batch_size=1")
    code, out, page = inspect(*settings, config=TEXT)
    assert code == 0 and "Rows                    2 read" in out
    assert "left out: 1 has no text" in out
    for text in (out, page):
        assert "long.txt" in text and "ends a turn" not in text and "If samples are cut" not in text
    assert "Samples are cut" not in out


def test_bad_rows_are_shown_and_end_with_1(inspect, tmp_path):
    source = rows_file(tmp_path, *lines(chat(1), {"messages": []}), "{broken\n", *lines(chat(2)))
    code, out, page = inspect(source)
    assert code == 1
    assert "x dataset: 2 rows cannot be read or used: training would stop" in out
    for text in (out, page):
        assert "rows.jsonl:2: messages is empty" in text and "rows.jsonl:3: broken JSON" in text
    code, out, _ = inspect(source, "dataset.bad_rows=drop")
    assert code == 0 and "! dataset: 2 rows cannot be read or used; dataset.bad_rows=drop" in out


def test_validation_data_of_its_own(inspect, tmp_path):
    source = rows_file(tmp_path, *lines(chat(1), chat(99)), "{broken\n")
    val = [source.replace("dataset", "dataset_val", 1)]
    code, out, _ = inspect(*val, "dataset_val._component_=phi3_plugin.data.chat_dataset")
    assert code == 1 and "dataset_val: 1 row cannot be read or used" in out
    assert "Validation              2 samples" in out
    assert "1 of 2 validation samples (50 %) can be found in the training data" in " ".join(
        out.split()
    )


def test_nothing_left_is_an_error(inspect, tmp_path):
    with pytest.raises(DataError, match="is left"):
        inspect(rows_file(tmp_path, "{broken\n"))


def test_its_own_keys_are_checked_together(inspect):
    with pytest.raises(ConfigError) as error:
        inspect("samples=-1", "processes=0", "compare=maybe")
    assert str(error.value).splitlines() == [
        "samples: -1 must be a whole number from 0 to 2**63 - 1.",
        "processes: 0 must be a whole number above 0.",
        "compare: 'maybe' must be True or False.",
    ]


def test_other_keys_are_those_of_a_run(inspect):
    with pytest.raises(ConfigError, match="smaples: 3 is given, but this recipe has no such key"):
        inspect("smaples=3")


@pytest.mark.parametrize(("variable", "colored"), [("", True), ("1", False)])
def test_no_color(inspect, monkeypatch, variable, colored):
    monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    assert ("\x1b[" in inspect()[1]) == colored


def test_a_data_set_of_the_users_own(inspect, tmp_path, monkeypatch):
    (tmp_path / "my_own_rows.py").write_text(
        "def rows(tokenizer, source=None):\n"
        "    return [{'tokens': [5, 6, 7], 'labels': [-100, 6, 7]}] * 9\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = inspect("dataset._component_=my_own_rows.rows", "compare=True")
    assert code == 0 and "Samples                 9" in out
    assert "compare: only samples of phi3_plugin.data.chat_dataset can be compared." in out


@pytest.mark.parametrize("settings", [[], ["dataset.train_on=all", "tokenizer.max_seq_len=20"]])
def test_compared_with_transformers(inspect, settings):
    _, out, _ = inspect("compare=True", *settings)
    assert "Beside transformers     20 samples, all equal" in out


def test_a_difference_is_reported(inspect, tmp_path):
    row = chat(1)
    row["messages"][0]["content"] += "<|end|>"
    source = rows_file(tmp_path, *lines(chat(2), row))
    code, out, _ = inspect(source, "compare=True", "tokenizer.special_in_text=text")
    assert code == 0 and "Beside transformers     2 samples, of which 1 differ" in out
    assert "rows.jsonl:2: token " in out
    assert "! 1 of 2 samples differ from what transformers makes of them." in out


def test_without_transformers(inspect, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, _ = inspect("compare=True")
    assert code == 0 and "compare: transformers is not installed." in out


def test_why_no_row_can_be_used(inspect, tmp_path):
    row = lines({"messages": "hi"})
    says = r"no sample is left of 1 rows: 1 cannot be used\.\n.*rows\.jsonl:1: messages is str"
    with pytest.raises(DataError, match=says):
        inspect(rows_file(tmp_path, *row))


def test_which_columns_are_read_and_which_are_not(inspect, tmp_path):
    row = {"instruction": "Who?", "context": "Ann did it.", "response": "Ann", "category": "\x1bqa"}
    _, text, page = inspect(rows_file(tmp_path, *lines(row, row | {"licen\x1bce": "x"})))
    told = "read as instruction, response and context. Not read: category, licen\\x1bce"
    assert told in " ".join(text.split())
    assert "read as instruction, response and context" in page
    assert "\x1b" not in text + page


def test_steps_are_those_of_our_recipe_and_beside_them_those_of_torchtunes(inspect, tmp_path):
    rows = lines(*({"question": f"q {n}", "answer": "a" * (n % 7)} for n in range(240)))
    sizes = ("batch_size=4", "gradient_accumulation_steps=4", rows_file(tmp_path, *rows))
    texts = {
        name: " ".join(inspect(*sizes, config=CONFIG.with_name(f"{name}.yaml"))[1].split())
        for name in ("phi3_mini_lora", "phi3_mini_lora_1gpu")
    }
    for text in texts.values():  # 12 of 240 are held out
        assert "Training 15 steps of 16 samples" in text and "Validation 12 samples" in text
    assert "by torchtune's recipes 15 steps, 15 an epoch" in texts["phi3_mini_lora"]
    assert "Batches; only torchtune's recipes pad padding" in texts["phi3_mini_lora"]
    assert "torchtune" not in texts["phi3_mini_lora_1gpu"]
    assert "padding" not in texts["phi3_mini_lora_1gpu"]
