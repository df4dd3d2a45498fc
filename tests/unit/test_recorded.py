"""A recorded step of one token a row answers what steps of their own do; here without a GPU.

A graph replays what was computed once, so what it would compute is computed each time.
"""

import pytest

from phi3_plugin import generate
from phi3_plugin.generate import Generator
from phi3_plugin.models import cache as cached
from phi3_plugin.models.recorded import Recorded
from phi3_plugin.options import Sampling
from tests.answers import Letters, ours, prompts_of, served
from tests.oracles import MINI_4K, TINY_MHA, hf_model, save_checkpoint

SMALL = {**TINY_MHA, "num_hidden_layers": 2, "max_position_embeddings": 128}
LENGTHS = (3, 30, 1, 17, 60, 5, 9)


@pytest.fixture(scope="module", params=[48, None], ids=["ring", "whole"])
def model(request, tmp_path_factory):
    keys = {**SMALL, "sliding_window": request.param}
    theirs = hf_model(MINI_4K, std=0.2, **keys)
    return served(save_checkpoint(theirs, MINI_4K, tmp_path_factory.mktemp("base"), **keys))


@pytest.fixture
def recordings(monkeypatch):
    """Let the CPU be a device with graphs; return the sizes of the caches that were recorded."""
    found = []

    def record(self):
        self._places = self.cache.places
        found.append(self._places)
        return True

    monkeypatch.setattr(generate, "computes_ahead", lambda device: True)
    monkeypatch.setattr(Recorded, "_record", record)
    monkeypatch.setattr(Recorded, "_replay", lambda self: setattr(self, "_logits", self.compute()))
    monkeypatch.setattr(cached, "ROOM", 16)
    return found


@pytest.mark.parametrize("asked", [{}, {"temperature": 1.0, "seed": 3}])
def test_answers_are_the_same(model, asked, monkeypatch, recordings):
    asked = {**asked, "batch_size": 3, "stop_tokens": range(0, 140, 20)}
    prompts = prompts_of(*LENGTHS)
    found = ours(model, prompts, 40, **asked)
    assert 2 <= len(recordings) <= 6
    monkeypatch.setattr(generate, "computes_ahead", lambda device: False)
    assert found == ours(model, prompts, 40, **asked)


def test_a_conversation_goes_on(model, monkeypatch, recordings):
    def talk():
        generator = Generator(model, Letters(), Sampling(max_new_tokens=25))
        (first, *others), said = prompts_of(20, 9, 3), []
        for more in ([], *others):
            prompt = [*first, *[t for answer in said for t in answer], *more]
            said.append(generator.answer(prompt).tokens)
        return said

    found = talk()
    assert recordings
    monkeypatch.setattr(generate, "computes_ahead", lambda device: False)
    assert found == talk()


def test_where_no_graph_can_be_recorded_answers_come_anyhow(model, monkeypatch, caplog):
    prompts = prompts_of(3, 7)
    expected = ours(model, prompts, 9)
    monkeypatch.setattr(generate, "computes_ahead", lambda device: True)
    assert ours(model, prompts, 9) == expected
    assert caplog.text.count("without a CUDA graph") == 1
