"""What is said of a saved adapter, during a run and at its end."""

import pytest
import torch
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint

from phi3_plugin.checkpoint import check as hook
from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.models import lora_phi3


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


def test_each_runtime_is_named(place):
    line = hook.served_by(place / "lora")
    assert line == "lora: PEFT loads, vLLM loads, llama.cpp loads."
    line = hook.served_by(place / "dora")
    assert line.startswith("dora: PEFT loads, vLLM rejected (DoRA is not supported), llama.cpp ")


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_end_is_a_proof(place, name):
    line = hook.proof(place / name, place / "base")
    assert line.startswith("Proof: logits in PEFT and here differ by "), line


def test_too_little_memory_leaves_it_to_the_user(place, monkeypatch):
    monkeypatch.setattr(hook, "memory_free", lambda: 1000)
    line = hook.proof(place / "lora", place / "base")
    command = f"phi3-tune adapter check {place / 'lora'} --base {place / 'base'}"
    assert line.startswith("No proof: PEFT would take ") and line.endswith(command)


def test_nothing_that_fails_ends_a_run(place, monkeypatch):
    def failing(*_):
        raise RuntimeError("a model that is newer")

    monkeypatch.setattr(hook, "proven", failing)
    line = hook.proof(place / "lora", place / "base")
    assert line == "No proof: RuntimeError: a model that is newer"


def test_memory_is_read_where_there_is_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(hook, "MEMINFO", tmp_path / "meminfo")
    assert hook.memory_free() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    assert hook.memory_free() == 5120
