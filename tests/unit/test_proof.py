"""A proof that PEFT computes what our model does, and what ends in none."""

import shutil

import pytest

from phi3_plugin import proof
from phi3_plugin.errors import AdapterError
from tests.variants import edit_json


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_end_is_a_proof(place, name, recwarn):
    line = str(proof.proof_of_run(place / name, place / "base"))
    assert line.startswith("Proof: logits in PEFT and here differ by "), line
    assert not [each for each in recwarn if "is_gradient_checkpointing" in str(each.message)]


def test_too_little_memory_leaves_it_to_the_user(place, monkeypatch):
    monkeypatch.setattr(proof, "memory_free", lambda: 1000)
    line = str(proof.proof_of_run(place / "lora", place / "base"))
    command = f"phi3-tune adapter check {place / 'lora'} --base {place / 'base'}"
    assert line.startswith("No proof: PEFT would take ") and line.endswith(command)


def test_nothing_that_fails_ends_a_run(place, monkeypatch):
    def failing(*_):
        raise RuntimeError("a model that is newer")

    monkeypatch.setattr(proof, "proven", failing)
    line = str(proof.proof_of_run(place / "lora", place / "base"))
    assert line == "No proof: RuntimeError: a model that is newer"


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": "(.*.*.*.*)+x"},
        {"exclude_modules": "(.*.*.*.*)+x"},
        {"rank_pattern": {"(.*.*.*.*)+x": 4}},
        {"layers_pattern": "(.*.*.*.*)+x"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("impatient")
def test_patterns_that_take_long_never_reach_peft(place, tmp_path, keys, monkeypatch):
    monkeypatch.setattr("peft.PeftModel.from_pretrained", None)
    shutil.copytree(place / "lora", tmp_path / "a")
    edit_json(tmp_path / "a" / "adapter_config.json", **keys)
    with pytest.raises(AdapterError, match=next(iter(keys))):
        proof.load_with_peft(place / "base", tmp_path / "a")
