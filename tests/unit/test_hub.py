"""Models by their name: what is downloaded, what is not, and what is said where it fails."""

import logging
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint

from phi3_plugin import hub as models
from phi3_plugin.checkpoint.peft import base_name
from phi3_plugin.config import checkpoint_folder, read_config
from phi3_plugin.errors import MissingFileError
from phi3_plugin.options import AnswerOptions, CheckOptions, DownloadOptions, read_options
from phi3_plugin.settings import without_weights
from tests.hub import client, serving

NAME = "somebody/tiny-phi3"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint as repositories have them, with files that nobody needs."""
    folder = tmp_path_factory.mktemp("hub") / "repository"
    build_checkpoint(folder, words=["one"])
    for name in ("README.md", "modeling_phi3.py", "pytorch_model.bin", "onnx/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not needed")
    return folder


@pytest.fixture
def hub(base, tmp_path, monkeypatch):
    with serving() as server:
        server.models[NAME] = base
        client(server, tmp_path / "cache", monkeypatch)
        monkeypatch.chdir(tmp_path)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        yield server
        models.checkpoint.cache_clear()


def test_a_name_is_downloaded_once_and_read_like_a_folder(hub, base):
    folder = checkpoint_folder(NAME)
    assert read_config(NAME) == read_config(base)
    names = {file.name for file in folder.rglob("*")}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", SHARD} <= names
    assert not {"README.md", "modeling_phi3.py", "pytorch_model.bin", "onnx"} & names
    assert base_name(folder) == NAME
    asked = len(hub.asked)
    models.checkpoint.cache_clear()
    assert checkpoint_folder(NAME) == folder
    assert len(hub.asked) == asked  # nor does another process ask again


def test_the_options_of_every_verb_take_it(hub):
    o = read_options(AnswerOptions, {"checkpoint_dir": NAME})
    assert (o.checkpoint_dir / SHARD).is_file()
    assert read_options(CheckOptions, {"adapter": "a", "checkpoint_dir": NAME}).checkpoint_dir == (
        o.checkpoint_dir
    )


def test_configuration_without_weights(hub):
    folder = models.checkpoint(NAME, weights=False)
    assert not (folder / SHARD).exists()
    assert read_config(folder).hidden_size
    assert (checkpoint_folder(NAME) / SHARD).is_file()  # nor is that taken for whole


def test_an_inspection_and_a_plan_download_no_weights(hub, base):
    cfg = OmegaConf.create(
        {"checkpoint_dir": NAME, "model": {"checkpoint_dir": "${checkpoint_dir}"}}
    )
    folder = Path(without_weights(cfg).model.checkpoint_dir)
    assert read_config(folder).hidden_size and not (folder / SHARD).exists()
    cfg.checkpoint_dir = str(base)
    assert without_weights(cfg) is cfg
    assert without_weights(OmegaConf.create({"checkpoint_dir": "???"}))


def test_what_is_no_adapter_is_refused_by_name(hub):
    with pytest.raises(MissingFileError, match=rf"^{NAME} has no adapter_config.json and no "):
        models.adapter(NAME)


def test_the_weights_of_an_adapter_may_be_named_as_mlx_does(hub, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("adapter_config.json", "adapters.safetensors", "0000100_adapters.safetensors"):
        (theirs / name).write_text("{}")
    hub.models["somebody/mlx"] = theirs
    found = {file.name for file in models.adapter("somebody/mlx").iterdir()}
    assert found == {"adapter_config.json", "adapters.safetensors"}


def test_a_path_of_an_adapter_that_is_not_there_yet_asks_nobody(hub, tmp_path):
    (tmp_path / "run").mkdir()
    assert models.adapter("run/final") == Path("run/final")
    assert models.adapter("a/b/c") == Path("a/b/c")
    assert not hub.asked


def test_a_download_goes_on_where_it_broke_off(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    hub.cut_after = 5000
    with pytest.raises(MissingFileError, match="broke off") as error:
        checkpoint_folder(NAME)
    assert "\n" not in str(error.value)
    hub.cut_after = None
    hub.asked.clear()
    assert (checkpoint_folder(NAME) / SHARD).is_file()


def test_without_a_network(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MissingFileError, match=f"^{NAME}: .*cannot be reached") as error:
        checkpoint_folder(NAME)
    assert "\n" not in str(error.value)


def test_offline(hub, monkeypatch):
    folder = checkpoint_folder(NAME)
    models.checkpoint.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert checkpoint_folder(NAME) == folder
    with pytest.raises(MissingFileError, match=r"not wholly in the cache .* HF_HUB_OFFLINE is set"):
        checkpoint_folder("somebody/else")


def test_gated(hub, monkeypatch):
    hub.gated.add(NAME)
    with pytest.raises(MissingFileError, match=f"gated. Accept its terms at {hub.endpoint}/{NAME}"):
        checkpoint_folder(NAME)
    monkeypatch.setenv("HF_TOKEN", "good")
    assert checkpoint_folder(NAME).is_dir()


def test_a_name_that_is_not_there(hub):
    with pytest.raises(MissingFileError, match=r"no such folder here and no such model") as error:
        checkpoint_folder("somebody/tiny-phi4")
    assert "\n" not in str(error.value)


def test_a_folder_here_comes_first(hub, base, capsys):
    shutil.copytree(base, NAME)
    assert checkpoint_folder(NAME) == Path(NAME)
    assert (hub.asked, capsys.readouterr().err) == ([], "")  # a relative path like any other
    name = models.DEFAULT_BASE
    shutil.copytree(base, name)
    models.say_that_a_folder_has_the_name.cache_clear()
    assert (checkpoint_folder(name), checkpoint_folder(name)) == (Path(name), Path(name))
    (line,) = capsys.readouterr().err.splitlines()
    assert "is the folder" in line


@pytest.mark.parametrize("output", [None, "here"])
def test_the_verb_says_where_it_is(hub, output, capsys):
    given = {"name": NAME} if output is None else {"name": NAME, "output_dir": output}
    assert models.run(read_options(DownloadOptions, given)) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / SHARD).is_file()
    assert base_name(folder) == NAME
    if output:
        assert folder == Path(output).resolve()


def test_a_word_that_is_no_name():
    with pytest.raises(MissingFileError, match="phi3 is no name of the Hub's"):
        models.run(read_options(DownloadOptions, {"name": "phi3"}))
