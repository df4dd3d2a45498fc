"""What can be typed after `phi3-tune adapter`, and the keys of the recipe that does the same."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from phi3_plugin import cli as adapter_cli
from phi3_plugin.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"verb": "chek"}, "verb: 'chek' must be one of check, convert, merge, import."),
        ({"verb": "check"}, "adapter is not set. Add adapter=... to the command."),
        ({"verb": "check", "adapter": "a", "to": "peft"}, "to: 'peft' is given, but check takes"),
        ({"verb": "check", "adapter": "a", "runtime": "tgi"}, "runtime: 'tgi' must be one of"),
        ({"verb": "check", "adapter": "a", "json": "yes"}, "json: 'yes' must be True or False."),
        ({"verb": "import", "adapter": "a", "rank": "x"}, "rank: 'x' must be a whole number."),
        ({"verb": "import", "adapter": "a", "rank": 4.5}, "rank: 4.5 must be a whole number."),
        ({"verb": "import", "adapter": "a", "alpha": True}, "alpha: True must be a number."),
        (
            {"verb": "check", "adapter": 123},
            "adapter: 123 is read as int. Write a name, such as ./",
        ),
        ({"verb": "check", "adapter": ["a"]}, "adapter: ['a'] is read as list."),
        (
            {"verb": "import", "adapter": "a", "enable_lora": True},
            "enable_lora: True must be a list of True and False.",
        ),
        ({"verb": ["check"]}, "verb: ['check'] must be one of"),
    ],
)
def test_wrong_keys_are_named(given, message):
    with pytest.raises(ConfigError) as error:
        adapter_cli.checked(given)
    assert message in str(error.value)


def test_the_shipped_config_has_every_key():
    keys = OmegaConf.load(Path(__file__).parents[1] / "configs" / "phi3_adapter.yaml")
    assert set(keys) == {"verb", *adapter_cli.ADAPTER_OPTIONS}
    assert adapter_cli.checked({**keys, "adapter": "a"}) == {"verb": "check", "adapter": "a"}
    runtime = {**keys, "adapter": "a", "runtime": "vLLM"}
    assert adapter_cli.checked(runtime)["runtime"] == ["vLLM"]


def test_every_verb_and_form_has_its_function():
    from phi3_plugin.recipes import phi3_adapter

    assert list(phi3_adapter.VERBS) == list(adapter_cli.ADAPTER_VERBS)
    assert tuple(phi3_adapter.FORMS) == adapter_cli.FORMS


@pytest.mark.parametrize("verb", adapter_cli.ADAPTER_VERBS)
def test_help_lists_what_a_verb_takes(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        adapter_cli.parse_adapter(["adapter", verb, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and out.startswith(f"usage: phi3-tune adapter {verb} ")
    needs, takes = adapter_cli.ADAPTER_VERBS[verb][1:]
    flags = [adapter_cli.ADAPTER_OPTIONS[key].flags for key in (*needs, *takes)]
    assert all(names[0] in out for names in flags if names)


def test_the_list_of_verbs_has_whole_sentences(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        adapter_cli.parse_adapter(["adapter", "--help"])
    out = capsys.readouterr().out
    assert "PEFT, vLLM and llama.cpp make of an adapter as it lies there\n" in out
    assert "Write an adapter in another form\n" in out


def test_words_become_keys():
    words = ["adapter", "convert", "a", "--to", "peft", "--base", "b", "-o", "c", "--alpha", "3"]
    expected = {"verb": "convert", "adapter": "a", "to": "peft", "checkpoint_dir": "b"}
    assert adapter_cli.parse_adapter(words) == (
        "adapter",
        {**expected, "output_dir": "c", "alpha": 3.0},
    )
    words = ["adapter", "import", "a", "--base", "b", "-o", "c", "--alpha", "0", "--rank", "0"]
    assert adapter_cli.parse_adapter(words)[1].items() >= {("alpha", 0.0), ("rank", 0)}
    words = ["adapter", "check", "a", "--runtime", "vLLM", "--runtime", "PEFT", "--json"]
    assert adapter_cli.parse_adapter(words)[1]["runtime"] == ["vLLM", "PEFT"]


def test_help_needs_the_standard_library_alone(fresh_python):
    out = fresh_python("""
import sys
from phi3_plugin.cli import main
sys.argv = ["phi3-tune", "adapter", "--help"]
try:
    main()
except SystemExit as stopped:
    assert stopped.code == 0
assert "torch" not in sys.modules and "torchtune" not in sys.modules
""")
    assert "check" in out and "merge" in out
