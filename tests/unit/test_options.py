"""A dataclass of options is read from a YAML or a command line: strictly, and all at once."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torchtune import config

from phi3_plugin import options
from phi3_plugin.errors import ConfigError
from phi3_plugin.options import (
    CheckOptions,
    ConvertOptions,
    Count,
    Folder,
    GenerateOptions,
    ImportOptions,
    PromptOptions,
    Sampling,
    Texts,
    check_command,
    read_options,
    with_words,
    yaml_file,
)

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True, kw_only=True)
class Tea:
    """A dataclass with a section."""

    cups: Count
    pot: Folder | None = None
    guests: Texts = field(default_factory=list)
    answers: Sampling = field(default_factory=Sampling)


def problems(cls, given):
    with pytest.raises(ConfigError) as caught:
        read_options(cls, given, "the tea")
    return str(caught.value).splitlines()


def test_values_become_what_the_dataclass_holds():
    assert read_options(
        Tea, {"cups": 2, "pot": "blue", "answers": {"stop": "###", "top_k": None}}
    ) == Tea(cups=2, pot=Path("blue"), answers=Sampling(stop=("###",)))
    cfg = OmegaConf.create({"cups": 3, "guests": ["a", "${cups}"], "answers": None, "pot": None})
    with pytest.raises(ConfigError, match="guests: "):
        read_options(Tea, cfg)
    cfg.guests = ["a"]
    assert read_options(Tea, cfg) == Tea(cups=3, guests=["a"])


def test_every_mistake_is_a_line_under_its_key():
    given = {"cup": 1, "pot": 5, "answers": {"top_p": 2, "temprature": 1, "beams": 4}, "x": 1}
    lines = problems(Tea, given)
    assert [line.split(":")[0] for line in lines] == [
        *("cup", "x", "pot"),
        *("answers.temprature", "answers.beams", "answers.top_p"),
    ]
    assert lines[0] == "cup: 1 is given, but the tea has no such key. Did you mean 'cups'?"
    assert lines[1].endswith("Available: cups, pot, guests, answers.")
    assert "Did you mean 'temperature'?" in lines[3]


def test_what_must_be_set_and_what_refers_to_nothing():
    assert problems(Tea, {}) == [
        "cups is not set. Set it in the YAML or add cups=VALUE to the command."
    ]
    (line,) = problems(Tea, OmegaConf.create({"cups": "${nowhere}"}))
    assert line == "cups: Interpolation key 'nowhere' not found."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_new_tokens", value) for value in (0, 2.0, True, "3")),
        *(("temperature", value) for value in (-1, float("nan"), float("inf"), "0")),
        *(("top_k", value) for value in (-1, 0.5, False)),
        *(("top_p", value) for value in (0, 1.5)),
        *(("min_p", value) for value in (-0.1, 1)),
        *(("repetition_penalty", value) for value in (0, 1e7)),
        *(("seed", value) for value in (-1, 2**63)),
        *(("max_time", value) for value in (0, float("inf"))),
        *(("stop", value) for value in ("", ["a", ""], [1], 5)),
    ],
)
def test_what_an_answer_cannot_be_asked(name, value):
    (line,) = problems(Sampling, {name: value})
    assert line.startswith(f"{name}: {value!r} must be ")


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (CheckOptions, {}, "adapter is not set."),
        (CheckOptions, {"adapter": "a", "to": "peft"}, "to: 'peft' is given, but the tea has no"),
        (CheckOptions, {"adapter": "a", "runtime": "tgi"}, "runtime: 'tgi' must be one of PEFT, "),
        (CheckOptions, {"adapter": "a", "runtime": []}, None),
        (CheckOptions, {"adapter": "a", "json": "yes"}, "json: 'yes' must be True or False."),
        (CheckOptions, {"adapter": 123}, "adapter: 123 must be text; put quotes around a number."),
        (CheckOptions, {"adapter": ["a"]}, "adapter: ['a'] must be text"),
        (ImportOptions, {"rank": "x"}, "rank: 'x' must be a whole number or null."),
        (ImportOptions, {"rank": 4.5}, "rank: 4.5 must be a whole number or null."),
        (ImportOptions, {"alpha": True}, "alpha: True must be a number or null."),
        (ImportOptions, {"enable_lora": True}, "enable_lora: True must be a list of True and"),
        (ImportOptions, {"enable_lora": "yes,no"}, "enable_lora: 'yes,no' must be a list of True"),
        (ConvertOptions, {"to": "ollama"}, "to: 'ollama' must be peft or peft-patterns or"),
        (GenerateOptions, {"checkpoint_dir": "b", "prompt": ["Hi"]}, "prompt: ['Hi'] is given, "),
        (GenerateOptions, {"checkpoint_dir": "b", "system": 5}, "system: 5 must be text;"),
    ],
)
def test_what_verbs_refuse(cls, given, message):
    if cls in (ImportOptions, ConvertOptions):
        given = {"adapter": "a", "checkpoint_dir": "b", "output_dir": "c", **given}
    if message is None:
        read_options(cls, given)
    else:
        (line,) = problems(cls, given)
        assert line.startswith(message)


def test_lists_of_a_yaml_and_of_a_command_are_alike():
    base = {"adapter": "a", "checkpoint_dir": "b", "output_dir": "c"}
    for value in ([True, False], "true,false", "1, 0"):
        assert read_options(ImportOptions, {**base, "enable_lora": value}).enable_lora == [
            True,
            False,
        ]
    for value in ("vLLM", ["vLLM"]):
        assert read_options(CheckOptions, {"adapter": "a", "runtime": value}).runtime == ("vLLM",)
    assert read_options(PromptOptions, {"checkpoint_dir": "b", "prompts": [None]}).prompts == "-"


def test_the_shipped_configs_have_every_key():
    keys = OmegaConf.load(CONFIGS / "phi3_generate.yaml")
    assert set(keys) == set(GenerateOptions.__dataclass_fields__)
    assert all(value is None for value in keys.values())
    keys = set(OmegaConf.load(CONFIGS / "phi3_adapter.yaml"))
    verbs = ("check", "convert", "merge", "import", "convert-base")
    from phi3_plugin.recipes.phi3_adapter import VERBS

    assert tuple(VERBS) == verbs
    fields = {name for cls, _ in VERBS.values() for name in cls.__dataclass_fields__}
    assert keys == {"verb", *fields}


@pytest.mark.parametrize(
    ("cls", "keys"),
    [
        (options.PromptOptions, ("checkpoint_dir", "adapter", "prompts", "output")),
        (options.ChatOptions, ("checkpoint_dir", "adapter")),
        (options.EvaluateOptions, ("adapter",)),
        (options.CheckOptions, ("adapter", "checkpoint_dir")),
        (options.MergeOptions, ("adapter", "checkpoint_dir", "output_dir")),
        (options.ImportConfigOptions, ("sample", "output")),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_path_of_a_command(cls, keys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    required = dict.fromkeys(options.required(cls), "peft")
    given = {**required, **dict.fromkeys(keys, "~/x")}
    read = options.read_options(cls, given)
    assert {str(getattr(read, key)) for key in keys} == {"/home/me/x"}


# Words of a command line


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("epochs", "'epochs' is no key=value, such as epochs=2."),
        ("epochs 3", "'epochs 3' is no key=value"),
        ("--epochs=3", "--epochs=3: keys are typed without dashes, as epochs=3."),
        ("--batch-size", "--batch-size: keys are typed without dashes, as batch_size=VALUE."),
        ("a='x", "a='x: it cannot be read ("),
        ("a=[1", "a=[1: it cannot be read ("),
    ],
)
def test_a_word_that_cannot_be_read_is_one_line(tmp_path, word, line):
    (tmp_path / "c.yaml").write_text("epochs: 1\n")
    with pytest.raises(ConfigError) as error:
        check_command(["--config", str(tmp_path / "c.yaml"), "seed=1", word])
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", "3", "a: 1\n\tb: 2\n", "\x00"])
def test_a_file_that_is_no_yaml_is_one_line(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^--config: .*c\.yaml is no YAML") as error:
        check_command([f"--config={tmp_path / 'c.yaml'}"])
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_there_is_one_line(tmp_path):
    for name in ("gone.yaml", "."):
        with pytest.raises(ConfigError, match="cannot be read"):
            check_command(["--config", str(tmp_path / name)])
    check_command(["--config", "gone.yaml", "--help"])


def test_words_are_merged_as_torchtune_does(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {_component_: a.b, rank: 8}\nlr: 1e-4\nout: ${lr}\n")
    words = ["model=c.d", "model.rank=4", "~lr", "stop=['a', b]"]
    merged = OmegaConf.to_container(with_words(yaml_file(tmp_path / "c.yaml"), words))
    assert merged["model"] == {"_component_": "c.d", "rank": 4}
    assert (merged["out"], merged["stop"]) == ("${lr}", ["a", "b"])


@pytest.mark.parametrize(
    ("words", "section"),
    [
        (["loss={_component_: c.d}"], {"_component_": "c.d"}),
        (["loss={_component_: c.d, beta: 3}", "loss.gamma=1"],
         {"_component_": "c.d", "beta": 3, "gamma": 1}),
        (["loss.gamma=1", "loss={_component_: c.d}"], {"_component_": "c.d"}),
        (["loss={beta: 0.2}"], {"_component_": "a.b", "beta": 0.2, "nested": {"x": 1}}),
        (["loss={nested: {y: 2}}", "loss=c.d"],
         {"_component_": "c.d", "beta": 0.1, "nested": {"x": 1, "y": 2}}),
        (["loss= {_component_: c.d, at: '${lr}'}"], {"_component_": "c.d", "at": "${lr}"}),
    ],
)  # fmt: skip
def test_a_section_is_typed_as_a_mapping(tmp_path, words, section):
    text = "loss: {_component_: a.b, beta: 0.1, nested: {x: 1}}\nlr: 1\nplain: {x: 1}\n"
    (tmp_path / "c.yaml").write_text(text)
    both = [with_words(yaml_file(tmp_path / "c.yaml"), [*words, *more]) for more in ([], ["~lr"])]
    for merged in both:
        assert OmegaConf.to_container(merged)["loss"] == section
    plain = with_words(yaml_file(tmp_path / "c.yaml"), ["plain={y: 2}"])
    assert OmegaConf.to_container(plain)["plain"] == {"x": 1, "y": 2}


def test_a_recipe_of_torchtunes_reads_it_too(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("loss: {_component_: a.b, beta: 0.1}\n")
    words = ["--config", str(tmp_path / "c.yaml"), "loss={_component_: c.d}"]
    monkeypatch.setattr(sys, "argv", ["recipe", *words])
    with pytest.raises(SystemExit) as ended:
        config.parse(lambda cfg: cfg)()
    assert ended.value.code == {"loss": {"_component_": "c.d"}}


def test_a_mapping_that_is_not_closed_is_one_line(tmp_path):
    (tmp_path / "c.yaml").write_text("loss: {_component_: a.b}\n")
    with pytest.raises(ConfigError, match=r"loss=.*cannot be read"):
        with_words(yaml_file(tmp_path / "c.yaml"), ["loss={_component_: c.d"])
