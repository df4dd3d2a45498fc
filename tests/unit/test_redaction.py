"""What is passed on of a configuration holds no secret, and a text stays the text that it is."""

import json

import pytest
from omegaconf import OmegaConf

from phi3_plugin.options import HIDDEN, resolved, unknown_key
from phi3_plugin.redaction import as_config, redacted
from phi3_plugin.train.data import instantiate


def test_nothing_of_the_environment_is_in_it(monkeypatch):
    monkeypatch.setenv("PASS", "hunter2")
    cfg = OmegaConf.create(
        {
            "logger": {
                "api_key": "${oc.env:PASS}",
                "run": "a-${oc.env:PASS}-b",
                "list": ["${oc.env:PASS}", {"deep": "${logger.run}"}],
                "default": "${oc.env:MISSING,hunter2}",
                "decoded": "${oc.decode:${oc.env:PASS}}",
            },
            "again": "${logger.api_key}",
        }
    )
    shown = redacted(cfg)
    assert "hunter2" not in json.dumps(shown)
    assert shown["again"] == shown["logger"]["api_key"] == "${oc.env:PASS}"
    assert shown["logger"]["run"] == "a-${oc.env:PASS}-b"
    assert shown["logger"]["default"] == "${oc.env:MISSING}"
    assert resolved(cfg)["again"] == "hunter2"  # as ever, for who computes with it


@pytest.mark.parametrize(
    "key",
    [
        *("api_key", "wandb_key", "KEY", "hf_token", "client_secret", "password", "db_passwd"),
        *("auth", "authorization", "basic_auth", "credentials"),
    ],
)
def test_secrets_of_every_type_are_hidden(key):
    for value in ("hunter2", 123456, ["hunter2", 7], {"user": "me", "value": "hunter2"}):
        shown = json.dumps(redacted({"logger": {key: value}}))
        assert "hunter2" not in shown and "123456" not in shown and HIDDEN in shown
    assert redacted({"logger": {key: None}}) == {"logger": {key: None}}


@pytest.mark.parametrize("key", ["tokenizer", "sample_max_new_tokens", "author", "dataset", "keep"])
def test_what_is_no_secret_is_shown(key):
    assert redacted({key: {"path": "base"}}) == {key: {"path": "base"}}


@pytest.mark.parametrize(
    "text",
    ["Hello ${name}", r"a\${x}", r"a\\${x} \ b", "${", "${oc.env:HOME}", "${a} \\", r"\n $ {"],
)
def test_a_text_stays_what_it_is(text):
    kept = as_config({"system_prompt": text, "list": [text], "section": {"again": text}})
    plain = OmegaConf.to_container(kept, resolve=True)
    assert plain == {"system_prompt": text, "list": [text], "section": {"again": text}}
    section = {"_component_": "builtins.dict", "system_prompt": text, "deep": {"list": [text]}}
    assert instantiate(section) == {"system_prompt": text, "deep": {"list": [text]}}


def test_an_escaped_interpolation_is_resolved_once():
    cfg = OmegaConf.create({"dataset": {"system_prompt": r"Hello \${name}"}})
    assert resolved(cfg) == {"dataset": {"system_prompt": "Hello ${name}"}}


def test_a_complaint_of_a_key_does_not_show_its_secret():
    text = unknown_key("metric_logger.api_key", "hunter2", "DiskLogger", ["log_dir"])
    assert "hunter2" not in text and text.startswith(f"metric_logger.api_key: {HIDDEN} is given")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://bob:s3cr3t@host:80/a@b", "https://(not shown)@host:80/a@b"),
        ("postgres://${oc.env:USER}:pw@host", "postgres://(not shown)@host"),
        (
            "see hf://hf_abc@datasets/x and s3://bucket/k",
            "see hf://(not shown)@datasets/x and s3://bucket/k",
        ),
        ("https://host/a?mail=a@b.c", "https://host/a?mail=a@b.c"),
    ],
)
def test_no_login_of_an_address_is_shown(given, shown, monkeypatch):
    monkeypatch.setenv("USER", "bob")
    cfg = OmegaConf.create(
        {"metric_logger": {"tracking_uri": given}, "dataset": {"source": [given]}}
    )
    assert redacted(cfg) == {
        "metric_logger": {"tracking_uri": shown},
        "dataset": {"source": [shown]},
    }
