"""A proof that PEFT computes what our model does, and what ends in none."""

import shutil

import pytest
import torch
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint

from phi3_plugin import proof
from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.errors import AdapterError
from phi3_plugin.models import lora_phi3
from tests.variants import edit_json


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and an adapter and a DoRA as a run saves them."""
    folder = tmp_path_factory.mktemp("verdict")
    build_checkpoint(folder / "base", words=["one"])
    for name in ("lora", "dora"):
        model = lora_phi3(folder / "base", ["o_proj"], lora_rank=4, use_dora=name == "dora")
        adapted = {n: p.detach() for n, p in model.named_parameters() if "o_proj.weight" not in n}
        tensors = {n: torch.randn_like(p) for n, p in adapted.items() if ".o_proj." in n}
        scales = {n.removesuffix(".lora_a.weight"): 4.0 for n in tensors if "lora_a" in n}
        (folder / name).mkdir()
        where = {"checkpoint_dir": folder / "base", "card": {}}
        export_adapter(folder / name, Adapter(tensors, scales), **where)
    return folder


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_end_is_a_proof(place, name):
    line = str(proof.proof_of_run(place / name, place / "base"))
    assert line.startswith("Proof: logits in PEFT and here differ by "), line


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
def test_patterns_that_take_long_never_reach_peft(place, tmp_path, keys, monkeypatch):
    monkeypatch.setattr("peft.PeftModel.from_pretrained", None)
    shutil.copytree(place / "lora", tmp_path / "a")
    edit_json(tmp_path / "a" / "adapter_config.json", **keys)
    with pytest.raises(AdapterError, match=next(iter(keys))):
        proof.load_with_peft(place / "base", tmp_path / "a")
