"""Compiled layers: how often they are compiled, and when they are by themselves."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from phi3_plugin.models.attention import Documents
from phi3_plugin.train import compiled
from phi3_plugin.train.compiled import WORTH, compiles, trial
from phi3_plugin.train.model import prepare
from phi3_plugin.train.step import with_targets
from phi3_plugin.train.world import World
from tests.chosen import some
from tests.tiny import new_model

PACKS = [(20, 30), (10, 25, 40), (5, 6, 7, 8), (9, 9, 9, 9, 9)]


@pytest.mark.parametrize(
    ("settings", "again"),
    some([({}, 0), ({}, 1), ({"use_dora": True}, 1), ({"lora_dropout": 0.1}, 1)], [({}, 1)]),
)
def test_packs_and_validations_share_what_is_compiled(settings, again, monkeypatch):
    """As on a GPU, shapes alone: the first layer, whose input is frozen, the others, the last."""
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(Documents, "attend", Documents.by_kernel)
    with torch.device("meta"):
        model = new_model(**settings).bfloat16()
    prepare(model, adapter_dtype="fp32", recompute_every=again, compiled=True)

    def logps(lengths):
        tokens = torch.arange(sum(lengths))[None] % 160
        labels = torch.where(tokens % len(lengths) == 0, tokens, -100)
        batch = with_targets({"tokens": tokens, "labels": labels})
        return model(**{k: v.to("meta") for k, v in batch.items()}, lengths=lengths)

    for lengths in PACKS:
        logps(lengths).sum().backward()
    assert counter.frame_count == 3
    model.eval()
    with torch.no_grad():
        for lengths in PACKS:
            logps(lengths)
    assert counter.frame_count == 5
    model.train()
    logps(PACKS[0]).sum().backward()
    assert counter.frame_count == 5


@pytest.fixture
def world():
    world = World("cpu")
    world.device = torch.device("cuda", 0)
    return world


def asked(compile=None, memory_budget=None):
    return SimpleNamespace(compile=compile, memory_budget=memory_budget)


@pytest.mark.parametrize(
    ("settings", "micro_batches", "expected", "words"),
    [
        (asked(), WORTH, True, "a minute longer"),
        (asked(), WORTH - 1, False, None),
        (asked(memory_budget=1 << 30), WORTH, False, "memory_budget"),
        (asked(compile=True), 1, True, None),
        (asked(compile=False), WORTH, False, None),
    ],
)
def test_a_long_run_on_a_gpu_is_compiled(
    world, monkeypatch, settings, micro_batches, expected, words
):
    monkeypatch.setattr(compiled, "trial", lambda device: None)
    found, said = compiles(settings, world, micro_batches)
    assert found is expected
    assert said is None if words is None else words in said


def test_without_a_compiler_it_says_so_in_a_line(world):
    """The machine of the tests has no GPU to compile for, as others have no compiler."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found, said = compiles(asked(), world, WORTH)
    assert not found
    assert said.startswith("compile: layers are not compiled") and "\n" not in said


def test_a_cpu_is_asked_nothing(monkeypatch):
    monkeypatch.setattr(compiled, "trial", lambda device: pytest.fail("it was tried"))
    assert compiles(asked(), World("cpu"), WORTH) == (False, None)


def test_what_a_trial_meets_is_its_first_line(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("Failed to find C compiler.\nTraceback")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert trial(torch.device("cpu")) == "Failed to find C compiler"
