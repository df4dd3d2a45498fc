"""Uploads to a stand-in for the Hub."""

import json

import pytest
import torch

from phi3_plugin.errors import ConfigError, MissingFileError, OutputError
from phi3_plugin.load import load
from phi3_plugin.options import AnswerOptions, read_options
from phi3_plugin.upload import push
from tests import own
from tests.hub import client, serving

NAME = "somebody/mine"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as server:
        client(server, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "good")
        yield server


@pytest.fixture
def adapter(tmp_path):
    """What an upload looks at: an adapter over a folder of this machine."""
    folder, base = tmp_path / "final", str(tmp_path / "my-phi3")
    (folder / "resume").mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "README.md").write_text(f"---\ntags: [lora]\n---\nLoRA for {base}")
    for name in ("adapter_model.safetensors", "resume/state.pt", ".lock"):
        (folder / name).write_bytes(b"\x00content")
    return folder


def test_what_serves_goes_up_and_names_no_folder_of_this_machine(hub, adapter, tmp_path):
    assert push(adapter, NAME) == f"{hub.endpoint}/{NAME}"
    files = hub.uploaded[NAME]
    assert {*files} == {"adapter_config.json", "README.md", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] == b"\x00content"
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "my-phi3"}


def test_a_base_of_the_hub_keeps_its_name(hub, adapter):
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    push(adapter, NAME)
    assert b'"a/b"' in hub.uploaded[NAME]["adapter_config.json"]


def test_without_a_token(hub, adapter, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OutputError, match=r"there is no token.*HF_TOKEN"):
        push(adapter, NAME)


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "may not write"), (403, "may not write"), (409, "same time"), (400, "refuses it")],
)
def test_what_the_hub_refuses(hub, adapter, status, said, monkeypatch):
    if status == 409:  # which means of a repository that it is there
        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    hub.refuses = status
    with pytest.raises(OutputError, match=said) as error:
        push(adapter, NAME)
    assert "\n" not in str(error.value)


def test_without_a_network(hub, adapter, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", broken)
    with pytest.raises(OutputError, match="cannot be reached"):
        push(adapter, NAME)


def broken(*_, **__):
    raise ConnectionError("Connection refused")


def test_what_cannot_be_uploaded_asks_nobody(hub, adapter, tmp_path):
    with pytest.raises(ConfigError, match="USER/NAME"):
        push(adapter, "mine")
    with pytest.raises(MissingFileError, match="neither an adapter nor a model"):
        push(tmp_path, NAME)
    assert not hub.asked


def test_a_run_ends_in_an_upload_and_serves_by_that_name(hub, tmp_path, monkeypatch, capsys):
    own.tiny_inputs(tmp_path, 4)
    run = own.train(tmp_path, "max_steps=3", f"push_to_hub={NAME}")
    assert f"Uploaded to {hub.endpoint}/{NAME}." in capsys.readouterr().out
    final, files = run.s.output_dir / "final", hub.uploaded[NAME]
    assert files["adapter_model.safetensors"] == (final / "adapter_model.safetensors").read_bytes()
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    hub.models[NAME] = tmp_path / "repository"
    for name, content in files.items():
        (hub.models[NAME] / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.models[NAME] / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(9)[None]
    (ours, _), (theirs, _) = (load("base", a, dtype="fp32") for a in (final, NAME))
    assert torch.equal(ours(ids), theirs(ids))
    o = read_options(AnswerOptions, {"checkpoint_dir": "base", "adapter": NAME})
    assert (o.adapter / "adapter_config.json").is_file()
