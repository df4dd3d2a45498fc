"""An adapter that meets another base than its own: of the same shapes, so nothing else tells."""

import json

import pytest
from peft import LoraConfig, get_peft_model

from tests.commands import adapter as run
from tests.oracles import MEDIUM_4K, TINY_GQA, hf_model, save_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two bases, and an adapter that we wrote for one of them."""
    folder = tmp_path_factory.mktemp("bases")
    bases = [hf_model(MEDIUM_4K, seed=seed, **TINY_GQA) for seed in (0, 1)]
    for name, model in zip(("own", "other"), bases, strict=True):
        save_checkpoint(model, MEDIUM_4K, folder / name, **TINY_GQA)
    keys = {"r": 4, "target_modules": ["qkv_proj"], "init_lora_weights": False}
    get_peft_model(bases[0], LoraConfig(**keys)).save_pretrained(folder / "theirs")
    given = {"adapter": str(folder / "theirs"), "checkpoint_dir": str(folder / "own")}
    assert run({"verb": "convert", "to": "peft", "output_dir": str(folder / "ours"), **given}) == 0
    return folder


def options(place, verb, adapter, base, **keys):
    where = {"adapter": str(place / adapter), "checkpoint_dir": str(place / base)}
    return {"verb": verb, **where, **keys}


def test_check_tells(place, capsys):
    assert run(options(place, "check", "ours", "own", json=True)) == 0
    assert json.loads(capsys.readouterr().out)["other_base"] is None
    assert run(options(place, "check", "ours", "other")) == 1
    assert "Another base: the adapter was made for weights" in capsys.readouterr().out


def test_of_an_adapter_of_others_nothing_is_known(place, capsys):
    assert run(options(place, "check", "theirs", "other")) == 0
    assert "Another base" not in capsys.readouterr().out


def test_merge_warns(place, tmp_path, capsys):
    merged = str(tmp_path / "merged")
    assert run(options(place, "merge", "ours", "other", output_dir=merged)) == 0
    assert "Warning: the adapter was made for weights" in capsys.readouterr().err
