"""A file is whole or not there, and a full disk is one clear error."""

import resource
from contextlib import contextmanager

import pytest

from phi3_plugin.checkpoint.files import whole_files
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.torchtune import write_torchtune
from phi3_plugin.config import parse_config
from phi3_plugin.errors import OutputError
from tests.checkpoint.adapters import WHOLE, adapter
from tests.oracles import MINI_4K, TINY_MHA

CONFIG = parse_config({**MINI_4K, **TINY_MHA})


@contextmanager
def small_disk():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def to_loralib(file):
    write_loralib(file, adapter(CONFIG, WHOLE), CONFIG, merged_linear=False)


def to_torchtune(file):
    write_torchtune(file, adapter(CONFIG, WHOLE), CONFIG)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (to_loralib, "lora.pt"),
        (to_loralib, "lora.safetensors"),
        (to_torchtune, "adapter_model.pt"),
    ],
)
def test_a_full_disk_leaves_nothing(tmp_path, write, name):
    message = rf"{name} could not be written: .*File too large"
    with pytest.raises(OutputError, match=message), small_disk():
        write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(OutputError, match=r"could not be written: .*File name too long"):
        to_loralib(tmp_path / f"{'x' * 252}.pt")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match=r"lora\.pt could not be written: .*No such file"):
        to_loralib(tmp_path / "no" / "lora.pt")


def test_what_fails_elsewhere_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), whole_files(tmp_path / "a") as (partial,):
        partial.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_stays(tmp_path):
    (tmp_path / "lora.pt").symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"lora\.pt exists and would be overwritten"):
        to_loralib(tmp_path / "lora.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.pt"]
