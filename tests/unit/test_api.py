"""The Python way: four calls, each of a file of its own name, and nothing imported before."""

import inspect
import os
import signal

import pytest
from phi3_plugin.recipes import lora_finetune

import phi3_plugin
from phi3_plugin import api, evaluate, generate, load, train
from phi3_plugin.errors import ConfigError
from tests.own import metrics

FEW = {"max_steps": 2, "prove": False, "report": False, "dtype": "fp32"}


@pytest.fixture(scope="module")
def adapter(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("api") / "run"
    rows = {"data": inputs / "rows.jsonl", "base": inputs / "base", "output": out}
    return train(**rows, lr=1e-2, **FEW, **{"model.lora_rank": 4})


def test_importing_is_free(fresh_python):
    code = """
import sys, phi3_plugin
from phi3_plugin import api
assert not {"torch", "torchtune", "omegaconf", "huggingface_hub"} & set(sys.modules)
from phi3_plugin import train
print(train.__name__, callable(train), train.cosine_with_warmup.__name__)
"""
    assert fresh_python(code).strip() == "phi3_plugin.train True cosine_with_warmup"


@pytest.mark.parametrize("name", api.__all__)
def test_a_module_is_called_as_its_function(name):
    module, function = getattr(phi3_plugin, name), getattr(api, name)
    assert inspect.ismodule(module)
    assert inspect.signature(module) == inspect.signature(function)
    assert module.__doc__ == function.__doc__
    for parameter in inspect.signature(function).parameters:
        assert f" {parameter}: " in function.__doc__ or f"**{parameter}: " in function.__doc__


def test_load_is_the_one_of_its_file():
    assert inspect.signature(api.load).parameters.keys() == (
        inspect.signature(load.load).parameters.keys()
    )


def test_from_data_to_numbers(adapter, inputs):
    assert adapter.name == "final"
    assert (adapter / "adapter_config.json").is_file()
    assert len(metrics(adapter.parent)) == 2
    model, tokenizer = load(inputs / "base", adapter, dtype="fp32")
    question = "Add: one plus two"
    one = generate(model, tokenizer, question, max_new_tokens=3)
    assert isinstance(one, str)
    said = [{"role": "user", "content": question}]
    assert generate(model, tokenizer, [question, said], max_new_tokens=3) == [one, one]
    assert generate(model, tokenizer, said, max_new_tokens=3) == one
    assert generate(model, tokenizer, [], max_new_tokens=3) == []
    with pytest.raises(ConfigError, match="'temperature'"):
        generate(model, tokenizer, question, temperatur=1)
    results = evaluate(adapter, answers=False, max_samples=8)
    assert results["samples"] == 8 and "difference" in results["measures"]["loss"]
    again = evaluate(
        adapter, inputs / "rows.jsonl", base=inputs / "base", answers=False, max_samples=8
    )
    assert again["measures"] == results["measures"]


def test_an_adapter_of_somebody_elses_names_its_base(whole, tmp_path):
    results = evaluate(
        whole / "final",
        whole.parent / "rows.jsonl",
        output=tmp_path / "evaluation",
        answers=False,
        max_samples=2,
        dtype="fp32",
    )
    assert results["checkpoint_dir"] == str(whole.parent / "base")


def test_an_interrupt_saves_and_gives_signals_back(inputs, tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    step = lora_finetune.train_step

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(lora_finetune, "train_step", interrupted)
    rows = {"data": inputs / "rows.jsonl", "base": inputs / "base", "output": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        train(**rows, **FEW)
    assert (tmp_path / "run" / "step_000001").is_dir()
    assert {number: signal.getsignal(number) for number in before} == before


def test_no_qlora_is_said(monkeypatch, tmp_path):
    seen = {}

    def fake(o, settings):
        seen.update(settings, qlora=o.qlora)
        return 0, tmp_path

    monkeypatch.setattr("phi3_plugin.first_run.train", fake)
    assert train("x.csv", qlora=False) == tmp_path / "final"
    assert seen == {"model._component_": "phi3_plugin.models.lora_phi3", "qlora": False}
