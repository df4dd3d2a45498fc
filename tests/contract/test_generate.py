"""Greedy answers are those of transformers, token for token, in fp32."""

import pytest

from phi3_plugin.models.cache import serve
from tests.answers import ours, prompts_of, served, theirs
from tests.chosen import some
from tests.family import LONG, published, sizes
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_model, save_checkpoint
from tests.twins import base_of, train_by_hand, twin
from tests.twins import ours as adapted

FAMILIES = {"mini": (MINI_4K, TINY_MHA), "gqa": (MEDIUM_4K, TINY_GQA)}
COUNT = 64
"""Prompts that end so far before a threshold are answered across it."""


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    keys, small = FAMILIES[request.param]
    model = hf_model(keys, std=0.2, **small)  # lower, and all answers end in one token
    folder = save_checkpoint(model, keys, tmp_path_factory.mktemp("base"), **small)
    return model, served(folder)


def test_one_by_one(both):
    for prompt in prompts_of(1, 17):
        assert ours(both[1], [prompt], COUNT) == theirs(both[0], [prompt], COUNT)


def test_in_a_batch_and_refilled(both):
    prompts = prompts_of(3, 30, 1, 17, 12)
    expected = theirs(both[0], prompts, COUNT)
    assert ours(both[1], prompts, COUNT) == expected
    assert ours(both[1], prompts, COUNT, batch_size=2) == expected


@pytest.mark.parametrize("length", some([2000, 2046, 2047, 2048, 2300], {2000, 2047}))
def test_across_the_window(both, length):
    prompts = prompts_of(length, length - 20)
    expected = theirs(both[0], prompts, COUNT)
    assert ours(both[1], prompts, COUNT) == expected
    assert ours(both[1], prompts[:1], COUNT) == expected[:1]


KNOWN = [variant for variant in LONG if variant != "mini-128k-april"]
"""Those whose config.json transformers takes as it is."""


@pytest.fixture(scope="module", params=some(KNOWN, {"medium-128k"}))
def long(request, tmp_path_factory):
    keys, small = published(request.param), {**sizes(request.param), "num_hidden_layers": 2}
    model = hf_model(keys, **small)
    folder = save_checkpoint(model, keys, tmp_path_factory.mktemp("base"), **small)
    return model, served(folder)


@pytest.mark.parametrize("length", some([4050, 4095, 4096, 4097], {4096}))
def test_across_the_switch_of_factors(long, length):
    prompts = prompts_of(length)
    assert ours(long[1], prompts, COUNT) == theirs(long[0], prompts, COUNT)


def test_across_the_switch_in_a_batch(long):
    """Beside a short one each is answered as it is alone."""
    prompts, count = [*prompts_of(4080, 4080), *prompts_of(20, seed=1)], COUNT // 2
    expected = [*theirs(long[0], prompts[:2], count), *theirs(long[0], prompts[2:], count)]
    assert ours(long[1], prompts, count) == expected


ADAPTED = [(family, dora) for family in ("mini", "gqa", "tied") for dora in (False, True)]


@pytest.mark.parametrize(("family", "dora"), some(ADAPTED, {("gqa", False), ("tied", True)}))
def test_with_an_adapter(family, dora, tmp_path):
    keys = {"use_dora": True} if dora else {}
    base, folder = base_of(family, tmp_path)
    model = adapted(folder, **keys)
    train_by_hand(model)
    peft = twin(base, model, **keys)
    prompts = prompts_of(17, 5, 2020)
    expected = theirs(peft, prompts, COUNT)
    assert expected != theirs(base, prompts, COUNT)
    assert ours(model, prompts, COUNT) == expected  # as training asks
    serve(model)
    assert ours(model, prompts, COUNT) == expected
