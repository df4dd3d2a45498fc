"""Sample questions are answered at each validation, on any number of processes."""

import json

import pytest
import torch

from phi3_plugin.generate import BROKEN
from phi3_plugin.generate import answers_in_training as answers
from tests.chosen import some
from tests.own import TINY, finished, own_run, started, tiny_inputs

PROMPTS = ["Add: one plus two", "Add: six plus one", "seven"]
ASKED = (
    *TINY,
    f"sample_prompts={json.dumps(PROMPTS)}",
    "sample_max_new_tokens=9",
    "val_fraction=0.2",
    "run_val_every_n_steps=2",
    "batch_size=2",
    "gradient_accumulation_steps=1",
    "max_steps_per_epoch=null",
    "max_steps=5",
    "optimizer.lr=2e-2",
)


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    return tiny_inputs(tmp_path_factory.mktemp("samples"), rows=24)


@pytest.fixture(scope="module")
def alone(cwd):
    return finished(*ASKED, "output_dir=one", cwd=cwd)


def told(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [(line["step"], line["answers"]) for line in lines if "answers" in line]


def test_each_validation_asks(alone):
    steps, said = zip(*told(alone), strict=True)
    assert steps == (2, 4, 5)
    assert all(len(texts) == len(PROMPTS) for texts in said)
    assert said[0] != said[-1]


def test_the_report_shows_them(alone):
    page = (alone / "report.html").read_text("utf-8")
    assert page.count("At each validation") == len(PROMPTS)
    assert page.count('<th scope="row">Step 4</th>') == len(PROMPTS)


@pytest.mark.parametrize("compiled", some(["compile=False", "compile=True"], ["compile=False"]))
def test_answers_are_what_the_whole_model_says(cwd, compiled):
    more = compiled, "enable_activation_checkpointing=True"
    with started(*ASKED, *more, "output_dir=whole", cwd=cwd) as recipe:
        model, tokenizer = recipe.model, recipe.data.tokenizer
        found = answers(model, tokenizer, PROMPTS, 9)
        assert model.training
        model.eval()
        for prompt, text in zip(PROMPTS, found, strict=True):
            assert text == by_hand(model, tokenizer, prompt)


def test_a_model_that_diverged_is_no_reason_to_stop(cwd):
    with started(*ASKED, "output_dir=diverged", cwd=cwd) as recipe, torch.no_grad():
        recipe.model.norm.scale.fill_(torch.inf)
        assert answers(recipe.model, recipe.data.tokenizer, PROMPTS, 9) == [BROKEN] * len(PROMPTS)
        assert recipe.model.training


@torch.no_grad()
def by_hand(model, tokenizer, prompt: str) -> str:
    from torchtune.data import Message

    sample = tokenizer({"messages": [Message(role="user", content=prompt)]}, inference=True)
    tokens, said = list(sample["tokens"]), []
    while len(said) < 9:
        said.append(int(model(torch.tensor([tokens + said]))[0, -1].argmax()))
        if said[-1] in tokenizer.stop_tokens:
            return tokenizer.decode(said[:-1])
    return tokenizer.decode(said)


@pytest.mark.slow
def test_sharded_models_answer_too(cwd, alone):
    own = [setting for setting in ASKED if not setting.startswith("batch_size")]
    own_run(*own, "batch_size=1", "output_dir=two", cwd=cwd, processes=2)
    assert told(cwd / "two") == told(alone)


def test_a_finished_run_that_is_resumed_says_it_once_more(cwd, alone):
    before = told(alone)
    finished(*ASKED, "output_dir=one", "resume=auto", cwd=cwd)
    assert told(alone) == before
