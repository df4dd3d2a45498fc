"""Many answers at once: each as if it were alone, ended for the right reason, streamed whole."""

import pytest
import torch

from phi3_plugin.errors import CheckpointError, ConfigError, DataError
from phi3_plugin.generate import Generator, Sampling
from tests.generate.spoken import Letters, ours, prompts_of, served
from tests.oracles import MINI_4K, TINY_MHA, hf_model, save_checkpoint

SMALL = {**TINY_MHA, "num_hidden_layers": 2, "sliding_window": 48, "max_position_embeddings": 128}
LENGTHS = (3, 30, 1, 17, 60, 5, 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    hf = hf_model(MINI_4K, std=0.2, **SMALL)
    return served(save_checkpoint(hf, MINI_4K, tmp_path_factory.mktemp("base"), **SMALL))


def generator(model, batch_size=3, stops=(), **asked) -> Generator:
    return Generator(model, Letters(stops), Sampling(**asked), batch_size=batch_size)


def by_number(answers):
    return sorted(answers, key=lambda answer: answer.index)


@pytest.mark.parametrize("asked", [{}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}])
def test_an_answer_does_not_depend_on_its_neighbours(model, asked):
    prompts = prompts_of(*LENGTHS)
    alone = ours(model, prompts, 30, batch_size=1, stop_tokens=range(0, 140, 20), **asked)
    assert len(set(map(len, alone))) > 2  # they end at different times
    for size in (2, 3, 16):
        found = ours(model, prompts, 30, batch_size=size, stop_tokens=range(0, 140, 20), **asked)
        assert found == alone


def test_other_seeds_draw_other_tokens_and_the_same_seed_the_same(model):
    asked = {"temperature": 1.0, "count": 20}
    prompts = prompts_of(5, 5)
    first, again, other = (ours(model, prompts, seed=s, **asked) for s in (1, 1, 2))
    assert first == again
    assert first[0] != first[1] and first[0] != other[0]


def test_one_prompt_asked_twice_is_answered_differently(model):
    (prompt,) = prompts_of(5)
    first, second = ours(model, [prompt, prompt], 20, temperature=1.0)
    assert first != second


def test_says_why_an_answer_ended(model):
    prompts = prompts_of(10, 120)
    answers = by_number(generator(model, max_new_tokens=16).answers(prompts))
    assert [answer.reason for answer in answers] == ["length", "context"]
    assert [len(answer.tokens) for answer in answers] == [16, 8]
    assert [answer.prompt_tokens for answer in answers] == [10, 120]
    third = answers[0].tokens[2]
    first = answers[0].tokens.index(third)
    stopped = next(generator(model, stops=[third]).answers(prompts[:1]))
    assert stopped.reason == "stop"
    assert stopped.tokens == answers[0].tokens[: first + 1]
    assert stopped.text == Letters().decode(stopped.tokens[:-1])
    hurried = next(generator(model, max_time=1e-9).answers(prompts[:1]))
    assert (hurried.reason, len(hurried.tokens)) == ("time", 1)


def test_stop_texts_end_an_answer_and_are_no_part_of_it(model):
    (prompt,) = prompts_of(10)
    whole = next(generator(model, max_new_tokens=16).answers([prompt]))
    stop = whole.text[5:8]
    answer = next(generator(model, stop=(stop,)).answers([prompt]))
    assert answer.reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]


def test_a_special_token_ends_an_answer_as_a_stop_text(model):
    special = Letters.special_tokens["<|other|>"]
    asked = generator(model, stop=("<|other|>",))
    assert special in asked._ends and not asked._stop


def test_streams_every_answer_whole(model):
    pieces: dict[int, str] = {}

    def tell(index, piece):
        pieces[index] = pieces.get(index, "") + piece

    asked = generator(model, max_new_tokens=20, stop=("zq", "Ab"))
    answers = list(asked.answers(prompts_of(*LENGTHS), tell))
    assert len(answers) == len(LENGTHS)
    assert {a.index: a.text for a in answers if a.text} == pieces


def test_no_prompts_no_answers(model):
    assert list(generator(model).answers([])) == []


@pytest.mark.parametrize("length, says", [(0, "prompt 2 is empty"), (128, "128 tokens, but.* 128")])
def test_refuses_what_cannot_be_answered(model, length, says):
    with pytest.raises(DataError, match=says):
        list(generator(model).answers(prompts_of(4, length)))
    with pytest.raises(DataError, match=says.replace("2", "1", 1) if not length else says):
        generator(model).answer(prompts_of(length)[0])


def test_a_prompt_that_fills_all_but_one_position_gets_one_token(model):
    answer = generator(model).answer(prompts_of(127)[0])
    assert (answer.reason, len(answer.tokens)) == ("context", 1)


def fed(model, monkeypatch) -> list[int]:
    """Return a list that grows by the number of tokens the model reads at a time."""
    sizes = []
    stock = model.step

    def step(cache, rows, lengths):
        sizes.append(sum(lengths))
        return stock(cache, rows, lengths)

    monkeypatch.setattr(model, "step", step)
    return sizes


def test_what_was_heard_is_not_read_again(model, monkeypatch):
    asked = generator(model, max_new_tokens=4)
    first = prompts_of(20)[0]
    answer = asked.answer(first)
    second = [*first, *answer.tokens, *prompts_of(6, seed=1)[0]]
    sizes = fed(model, monkeypatch)
    found = asked.answer(second)
    assert sizes[0] == 7  # the last token of the answer was never read
    assert found.tokens == generator(model, max_new_tokens=4).answer(second).tokens
    # Another history: what is shared is kept
    third = [*second[:22], *prompts_of(5, seed=2)[0]]
    del sizes[:]
    assert asked.answer(third).tokens == generator(model, max_new_tokens=4).answer(third).tokens
    assert sizes[0] <= 8
    # The very same prompt
    assert asked.answer(third).tokens == asked.answer(third).tokens


def test_a_ring_that_has_been_written_over_is_read_anew(model):
    asked = generator(model, max_new_tokens=4)
    first = prompts_of(60)[0]
    asked.answer(first)
    for prompt in (first[:50], first, [*first, *prompts_of(30, seed=3)[0]], first[:3]):
        assert (
            asked.answer(prompt).tokens == generator(model, max_new_tokens=4).answer(prompt).tokens
        )


def test_goes_on_after_an_interrupt(model):
    asked, first = generator(model, max_new_tokens=8), prompts_of(40)[0]
    said = 0

    def interrupt(piece):
        nonlocal said
        said += 1
        if said == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked.answer(first, interrupt)
    expected = generator(model, max_new_tokens=8).answer(first)
    assert asked.answer(first).tokens == expected.tokens


@pytest.mark.parametrize("heard", [30, 44, 60])
@pytest.mark.parametrize("layer", [0, 1])
def test_what_an_interrupted_reading_wrote_over_is_read_anew(model, monkeypatch, heard, layer):
    asked, first = generator(model, max_new_tokens=4), prompts_of(heard)[0]
    answer = asked.answer(first)
    second = [*first, *answer.tokens, *prompts_of(30, seed=1)[0]]  # more than the window
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(model.layers[layer].mlp, "forward", interrupt)
        asked.answer(second)
    third = [*second[: heard + 4], *prompts_of(5, seed=2)[0]]
    assert asked.answer(third).tokens == generator(model, max_new_tokens=4).answer(third).tokens


def interrupt(*_):
    raise KeyboardInterrupt


def test_sizes_of_what_is_read_at_once_are_bounded(model, monkeypatch):
    monkeypatch.setattr("phi3_plugin.generate.TOGETHER", 40)
    sizes, prompts = fed(model, monkeypatch), prompts_of(*LENGTHS)
    found = by_number(generator(model, batch_size=8, max_new_tokens=3).answers(prompts))
    assert max(sizes) == 60 and sizes[0] == 34
    assert [list(a.tokens) for a in found] == ours(model, prompts, 3, batch_size=1)


@pytest.mark.parametrize("token", [160, -1])
def test_refuses_tokens_that_the_model_does_not_know(model, token):
    with pytest.raises(DataError, match=rf"1 has the token {token}, but the model knows 160"):
        generator(model).answer([3, token])


def test_refuses_to_answer_none_at_a_time(model):
    with pytest.raises(ConfigError, match=r"batch_size: 0 must be a whole number from 1\."):
        generator(model, batch_size=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("asked", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.2}])
def test_a_broken_model_says_nothing(model, monkeypatch, value, asked):
    monkeypatch.setattr(model.norm.scale, "data", torch.full_like(model.norm.scale, value))
    with pytest.raises(CheckpointError, match="scores are not finite"):
        generator(model, **asked).answer([3, 4])


def test_inference_mode_may_come_and_go(model):
    asked, first = generator(model, max_new_tokens=4), prompts_of(20)[0]
    with torch.inference_mode():
        inside = asked.answer(first)
    assert asked.answer(first).tokens == inside.tokens


def test_autocast_changes_nothing(model):
    prompts = prompts_of(20, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(model, prompts, 4)
    assert found == ours(model, prompts, 4)


@torch.no_grad()
def test_nothing_needs_a_gradient(model):
    assert not any(parameter.requires_grad for parameter in model.parameters())
