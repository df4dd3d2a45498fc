"""The recipe as its users run it: sample answers, optimizers, adapters to start from, parts, kin.

That it computes what others compute is in tests/contract/test_parity.py, that a resumed run ends in
the same bits in test_resume.py there.
"""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torchtune.data import Message

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.errors import AdapterError, CheckpointError, ConfigError, Phi3Error
from phi3_plugin.generate import NOT_FINITE, answers_in_training
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.proof import load_base_with_hf, load_with_peft
from phi3_plugin.settings import read
from tests.adapters import load_adapter
from tests.chosen import some
from tests.oracles import hf_model
from tests.own import (
    BATCH,
    CONFIG,
    RUN,
    TINY,
    VARIANTS,
    assert_same_end,
    finished,
    full_config,
    leave_until,
    lines,
    logits,
    losses,
    merged,
    metrics,
    own_run,
    peft_agrees,
    same_losses,
    same_weights,
    started,
    tiny_inputs,
    train,
)
from tests.stock import tune_run

pytestmark = pytest.mark.slow


# Sample questions

PROMPTS = ["Add: one plus two", "Add: six plus one", "seven"]
ASKED = (
    *TINY,
    f"sample_prompts={json.dumps(PROMPTS)}",
    "sample_max_new_tokens=5",
    "val_fraction=0.2",
    "run_val_every_n_steps=2",
    "batch_size=2",
    "gradient_accumulation_steps=1",
    "max_steps=5",
    "optimizer.lr=2e-2",
)


@pytest.fixture(scope="module")
def asked(inputs):
    return finished(*ASKED, "output_dir=asked", cwd=inputs)


def answers(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [(row["step"], row["answers"]) for row in rows if "answers" in row]


def test_each_validation_asks_and_the_report_shows_it(asked):
    steps, texts = zip(*answers(asked), strict=True)
    assert steps == (2, 4, 5)
    assert all(len(each) == len(PROMPTS) for each in texts)
    assert texts[0] != texts[-1]
    page = (asked / "report.html").read_text("utf-8")
    assert page.count("At each validation") == len(PROMPTS)
    assert page.count('<th scope="row">Step 4</th>') == len(PROMPTS)


@pytest.mark.parametrize("compiled", some(["compile=False", "compile=True"], ["compile=False"]))
def test_answers_are_what_the_whole_model_says(cwd, compiled):
    more = compiled, "enable_activation_checkpointing=True"
    with started(*ASKED, *more, "output_dir=out", cwd=cwd) as recipe, torch.no_grad():
        model, tokenizer = recipe.model, recipe.data.tokenizer
        found = answers_in_training(model, tokenizer, PROMPTS, 9)
        assert model.training
        model.eval()
        for prompt, text in zip(PROMPTS, found, strict=True):
            assert text == by_hand(model, tokenizer, prompt)
        model.train()
        model.norm.scale.fill_(torch.inf)  # a model that diverged is no reason to stop
        assert answers_in_training(model, tokenizer, PROMPTS, 9) == [NOT_FINITE] * len(PROMPTS)
        assert model.training


def by_hand(model, tokenizer, prompt: str) -> str:
    sample = tokenizer({"messages": [Message(role="user", content=prompt)]}, inference=True)
    tokens, answer = list(sample["tokens"]), []
    while len(answer) < 9:
        answer.append(int(model(torch.tensor([tokens + answer]))[0, -1].argmax()))
        if answer[-1] in tokenizer.stop_tokens:
            return tokenizer.decode(answer[:-1])
    return tokenizer.decode(answer)


def test_sharded_models_answer_too(cwd, asked):
    done = own_run(*ASKED, "batch_size=1", "output_dir=two", cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    assert answers(cwd / "two") == answers(asked)


# Optimizers chosen by name: they learn as AdamW does, and resumed runs end in the same bits

TORCHAO = pytest.param(
    "torchao.optim.AdamW8bit",
    id="torchao",
    marks=pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "g++")) is None,
        reason="torchao compiles its step, and there is no C++ compiler",
    ),
)
BITSANDBYTES = pytest.param("bitsandbytes.optim.AdamW8bit", id="bitsandbytes")
PAGED = pytest.param(
    "bitsandbytes.optim.PagedAdamW8bit",
    id="paged",
    marks=[
        pytest.mark.exhaustive,
        pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    ],
)


def using(component):
    if component.startswith("bitsandbytes."):
        pytest.importorskip("bitsandbytes")
    return f"optimizer._component_={component}"


@pytest.fixture(scope="module")
def plain(inputs):
    """A YAML without the fused AdamW, which only torch has."""
    cfg = OmegaConf.load(CONFIG)
    del cfg.optimizer["fused"]
    OmegaConf.save(cfg, inputs / "plain.yaml")
    return inputs / "plain.yaml"


def size_of(state):
    """Return the bytes of the tensors in a state."""
    if isinstance(state, dict):
        return sum(size_of(value) for key, value in state.items() if key != "step")
    if hasattr(state, "__tensor_flatten__"):
        return sum(size_of(getattr(state, part)) for part in state.__tensor_flatten__()[0])
    return state.nbytes if isinstance(state, torch.Tensor) else 0


def learned(steps, expected, rtol):
    """Compare the losses of two runs, and the rates that their steps had."""
    for one, other in zip(steps, expected, strict=True):
        assert one["lr"] == pytest.approx(other["lr"], rel=1e-6)
        assert one["loss"] == pytest.approx(other["loss"], rel=rtol), one["step"]


def test_fused_adamw_is_adamw(whole, plain, cwd):
    recipe = train(cwd, config=plain)
    assert recipe.s.optimizer["_component_"] == "torch.optim.AdamW"
    assert {size_of(state) / p.numel() for p, state in recipe.optimizer.state.items()} == {8}
    learned(metrics(cwd / "out"), metrics(whole), 1e-6)


@pytest.fixture(params=some(["eager", "compiled"], quick={"eager"}))
def step_is(request):
    """How torchao's step runs; to compile it takes half a minute."""
    with torch.compiler.set_stance("force_eager" if request.param == "eager" else "default"):
        yield


@pytest.mark.usefixtures("step_is")
@pytest.mark.parametrize("component", [TORCHAO, BITSANDBYTES])
def test_eight_bits_learn_what_adamw_learns(component, whole, plain, cwd):
    """The rank is 16 and the width 256: A and B have 4096 values or more, so 8 bits hold them."""
    recipe = train(cwd, using(component), config=plain)
    steps = metrics(cwd / "out")
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    learned(steps, metrics(whole), 2e-3)
    # One byte a value and moment; in layers this small the tables of 1 KB weigh half a byte.
    sizes = [size_of(state) / p.numel() for p, state in recipe.optimizer.state.items()]
    assert len(sizes) == 16
    assert max(sizes) < 2.6


@pytest.mark.usefixtures("step_is")
@pytest.mark.parametrize("component", [TORCHAO, BITSANDBYTES, PAGED])
def test_a_resumed_run_with_eight_bits_ends_in_the_same_bits(component, plain, cwd):
    """The first checkpoint is written while training goes on: it must own what it writes."""
    settings = (using(component), "lora_plus_ratio=4", "epochs=1", "save_in_background=True")
    train(cwd, *settings, "output_dir=whole", config=plain)
    leave_until(1, cwd / "whole", cwd / "out")
    recipe = train(cwd, *settings, "resume=auto", config=plain)
    assert recipe.last.folder.name == "step_000001"
    slow, fast = (group["lr"] for group in recipe.optimizer.param_groups)
    assert float(fast) == pytest.approx(4 * float(slow))
    assert_same_end(cwd / "out", cwd / "whole")


def two_processes(cwd, plain, *settings):
    keys = ("--config", str(plain), *RUN, "gradient_accumulation_steps=1", "epochs=1")
    done = own_run(*keys, *settings, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "unwaited collective" not in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("component", [TORCHAO, BITSANDBYTES])
def test_two_processes_with_eight_bits_do_too(component, plain, cwd):
    settings = (using(component), f"fsdp_replicas={1 if 'torchao' in component else 2}")
    two_processes(cwd, plain, *settings, "output_dir=whole")
    leave_until(2, cwd / "whole", cwd / "out")
    two_processes(cwd, plain, *settings, "resume=auto")
    assert_same_end(cwd / "out", cwd / "whole")


@pytest.mark.exhaustive
@pytest.mark.parametrize("component", [TORCHAO])
def test_one_process_goes_on_where_two_stopped(component, plain, cwd):
    """With whole tensors instead of halves, more of which are large enough for 8 bits."""
    no_dropout = (using(component), "model.lora_dropout=0.0")
    two_processes(cwd, plain, *no_dropout, "output_dir=two")
    leave_until(1, cwd / "two", cwd / "out")
    train(cwd, *no_dropout, "epochs=1", "resume=auto", config=plain)
    ours, theirs = (lines(cwd / name) for name in ("out", "two"))
    assert len(ours) == len(theirs) == 3 + 2
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("component", [TORCHAO, PAGED])
def test_eight_bits_on_a_gpu(component, plain, cwd):
    settings = (using(component), "device=cuda", "model.lora_dropout=0.0")
    train(cwd, *settings, "output_dir=whole", config=plain)
    steps = metrics(cwd / "whole")
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    leave_until(4, cwd / "whole", cwd / "out")
    train(cwd, *settings, "resume=auto", config=plain)
    assert metrics(cwd / "out")[-1]["loss"] == pytest.approx(steps[-1]["loss"], rel=1e-3)


def test_another_optimizer_does_not_go_on(whole, plain, cwd):
    leave_until(2, whole, cwd / "out")
    other = "optimizer._component_=torch.optim.RAdam"
    with pytest.raises(CheckpointError, match=r"optimizer\._component_: 'torch\.optim\.AdamW' b"):
        train(cwd, other, "resume=auto", config=plain)


def problems(cwd, plain, component):
    cfg = merged(*RUN, f"optimizer._component_={component}", cwd=cwd, config=plain)
    with pytest.raises(ConfigError) as raised:
        read(cfg)
    return str(raised.value).splitlines()


def test_a_package_that_is_not_installed_is_one_clear_line(plain, cwd, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (line,) = problems(cwd, plain, "bitsandbytes.optim.AdamW8bit")
    assert line.startswith(
        "optimizer._component_: 'bitsandbytes.optim.AdamW8bit' cannot be imported. "
    )


def test_bitsandbytes_is_refused_where_processes_share_weights(plain, cwd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = problems(cwd, plain, "bitsandbytes.optim.AdamW8bit")[-1]
    assert "cannot update weights that processes share. Set fsdp_replicas=2, or use" in line


# Training goes on from an adapter of somebody's, if the model's keys are those that it fits


def foreign(cwd, **keys):
    """Write an adapter as PEFT makes one, with random weights, and return its logits."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 10, "target_modules": list(TARGETS), **keys}
    model = get_peft_model(load_base_with_hf(cwd / "base"), LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.05)
        expected = model(input_ids=BATCH).logits
    model.save_pretrained(cwd / "theirs")
    return expected


FOREIGN = {
    "ranks": (
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
        ["model.rank_pattern={o_proj: 2}", "model.alpha_pattern={o_proj: 10, 1.down_proj: 3}"],
    ),
    "rslora": ({"use_rslora": True}, ["model.use_rslora=True"]),
    "dora": (
        {"use_dora": True, "layers_to_transform": [0]},
        ["model.use_dora=True", "model.layers_to_transform=[0]"],
    ),
    "whole": ({"modules_to_save": ["lm_head"]}, ["model.modules_to_save=[lm_head]"]),
}


@pytest.mark.parametrize("kind", some(FOREIGN, ["ranks", "dora"]))
def test_training_goes_on_from_somebodys_adapter(kind, cwd):
    theirs, keys = FOREIGN[kind]
    expected = foreign(cwd, **theirs)
    run = (*TINY, *keys, "model.lora_rank=4", "model.lora_alpha=10", "output_dir=out")
    with started(*run, f"init_adapter={cwd / 'theirs'}", "max_steps=2", cwd=cwd) as recipe:
        torch.testing.assert_close(logits(recipe), expected, rtol=0, atol=2e-5)
        recipe.train()
        recipe.finish()
    peft = load_with_peft(cwd / "base", cwd / "out" / "final")
    with torch.no_grad():
        theirs = peft(input_ids=BATCH).logits
    torch.testing.assert_close(logits(recipe), theirs, rtol=0, atol=2e-5)


def test_keys_that_do_not_fit_are_told_with_those_that_do(cwd):
    keys = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
    expected = foreign(cwd, **keys, use_dora=True)
    run = (*TINY, "output_dir=out", f"init_adapter={cwd / 'theirs'}")
    with (
        pytest.raises(AdapterError, match=r"does not fit the model's keys\. These would") as caught,
        started(*run, cwd=cwd),
    ):
        pass
    told = re.findall(r"model\.\S+=.*", str(caught.value))
    assert {line.partition("=")[0] for line in told} == {
        "model.lora_rank",
        "model.lora_alpha",
        "model.rank_pattern",
        "model.alpha_pattern",
        "model.use_dora",
    }
    with started(*run, *(line.replace("'", "") for line in told), cwd=cwd) as recipe:
        torch.testing.assert_close(logits(recipe), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({}, ("rank_pattern={o_proj: 2}",), r"would fit:\n  model\.rank_pattern=null$"),
        (
            {"rank_pattern": {"o_proj": 2}},
            ("alpha_pattern={o_proj: 10}", "rank_pattern={o_proj: 2, qkv_proj: 3}"),
            r"remove from the YAML what is not there: rank_pattern\.qkv_proj$",
        ),
    ],
)
def test_what_must_go_from_a_pattern_is_named(theirs, ours, message, cwd):
    foreign(cwd, **theirs)
    keys = ("lora_rank=4", "lora_alpha=10", *ours)
    run = (*TINY, *(f"model.{key}" for key in keys), f"init_adapter={cwd / 'theirs'}")
    with (
        pytest.raises(AdapterError, match=message),
        started(*run, "output_dir=out", cwd=cwd),
    ):
        pass


def test_an_adapter_that_is_not_there_or_starts_elsewhere_is_refused(cwd):
    with (
        pytest.raises(ConfigError, match="init_adapter: 'nowhere' is not there") as caught,
        started(*TINY, "output_dir=out", "init_adapter=nowhere", "model.lora_init=pissa", cwd=cwd),
    ):
        pass
    assert "init_adapter: 'nowhere' conflicts with lora_init: 'pissa'" in str(caught.value)


def test_an_adapter_of_another_base_is_refused(cwd):
    foreign(cwd)
    file = cwd / "theirs" / "adapter_model.safetensors"
    narrow = {n: v[:, :-8].contiguous() for n, v in load_file(file).items() if "lora_A" in n}
    save_file({**load_file(file), **narrow}, file)
    keys = ("model.lora_rank=4", "model.lora_alpha=10", f"init_adapter={cwd / 'theirs'}")
    with (
        pytest.raises(Phi3Error, match=r"248"),
        started(*TINY, *keys, "output_dir=out", cwd=cwd),
    ):
        pass


def test_an_adapter_of_loftq_goes_on_over_its_own_base_only(cwd):
    loftq = ("model.quantize_base=True", "model.lora_init=loftq")
    with started(*TINY, *loftq, "output_dir=first", "max_steps=2", cwd=cwd) as recipe:
        recipe.train()
        recipe.finish()
        expected = logits(recipe)
    more = ("output_dir=out", f"init_adapter={cwd / 'first' / 'final'}")
    with (
        pytest.raises(AdapterError, match=r"would fit:\n  model\.lora_init=loftq$"),
        started(*TINY, "model.quantize_base=True", *more, cwd=cwd),
    ):
        pass
    with started(*TINY, *loftq, *more, cwd=cwd) as recipe:
        assert torch.equal(logits(recipe), expected)


def test_a_run_of_ours_with_pissa_goes_on_as_a_plain_adapter(cwd):
    pissa = ("model.lora_rank=4", "model.lora_alpha=8", "model.lora_init=pissa", "max_steps=2")
    with started(*TINY, *pissa, "output_dir=first", cwd=cwd) as recipe:
        recipe.train()
        recipe.finish()
        expected = logits(recipe)
    twice = ("model.lora_rank=8", "model.lora_alpha=16", "output_dir=out")
    with started(*TINY, *twice, f"init_adapter={cwd / 'first' / 'final'}", cwd=cwd) as recipe:
        torch.testing.assert_close(logits(recipe), expected, rtol=0, atol=2e-5)


def test_a_model_without_adapters_cannot_start_from_one(cwd):
    settings = [key for key in TINY if "lora" not in key]
    run = (*settings, "output_dir=out", f"init_adapter={cwd / 'base'}")
    with (
        pytest.raises(AdapterError, match=r"init_adapter: .* needs a model with adapters"),
        started(*run, cwd=cwd, config=full_config(cwd)),
    ):
        pass


# Adapters on parts of the fused layers, trained by our recipe and by torchtune's

PARTS = ["q_proj", "v_proj", "o_proj", "up_proj"]
# torchtune's recipes look for these names in those of the parameters; `v_proj` and `up_proj` are
# found in `qkv_proj` and `gate_up_proj` by accident, these are not.
OTHERS = ["q_proj", "k_proj", "gate_proj"]


def modules(names):
    return f"model.lora_attn_modules=[{','.join(names)}]"


@pytest.mark.exhaustive
@pytest.mark.parametrize("quantized", [False, True])
def test_parts_on_one_process_and_two_are_one_run_that_peft_computes(quantized, cwd):
    settings = (*TINY, modules(PARTS), f"model.quantize_base={quantized}", "batch_size=1")
    settings += ("max_steps=8", "optimizer.lr=5e-3")
    one = finished(*settings, "gradient_accumulation_steps=4", "output_dir=one", cwd=cwd)
    two = ("gradient_accumulation_steps=2", "output_dir=two")
    done = own_run(*settings, *two, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(losses(one)) == 8
    same_losses(losses(cwd / "two"), losses(one))
    same_weights(load_adapter(cwd / "two" / "final"), load_adapter(one / "final"))
    assert peft_agrees(cwd, cwd / "two" / "final", PARTS, quantized=quantized) > 0.01


def test_a_resume_with_other_parts_is_one_clear_error(cwd):
    train(cwd, modules(PARTS), "epochs=1")
    message = "rank 16 on o_proj, q_proj, up_proj, v_proj, but the model has LoRA of rank 16 on g"
    other = modules(["q_proj", "gate_up_proj"])
    with (
        pytest.raises(CheckpointError, match=message),
        started(*RUN, other, "resume=auto", cwd=cwd),
    ):
        pass


@pytest.mark.exhaustive
def test_torchtunes_recipe_trains_saves_and_resumes_parts(cwd):
    settings = ("--config", "phi3_mini_lora", *TINY, modules(OTHERS), "epochs=2", "batch_size=2")
    settings += ("gradient_accumulation_steps=2", "optimizer.lr=5e-3", "output_dir=out")
    done = tune_run(*settings, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert peft_agrees(cwd, cwd / "out" / "epoch_1", OTHERS) > 0.01
    expected = load_adapter(cwd / "out" / "epoch_1")
    shutil.rmtree(cwd / "out" / "epoch_1")

    told = ("checkpointer.lora_attn_modules=${model.lora_attn_modules}", modules(["up_proj"]))
    done = tune_run(*settings, "resume_from_checkpoint=True", *told, cwd=cwd)
    assert done.returncode != 0
    assert "lora_attn_modules: ['up_proj'], but out/epoch_0 was saved from a" in done.stderr
    assert "Traceback" not in done.stderr

    done = tune_run(*settings, "resume_from_checkpoint=True", cwd=cwd)
    assert done.returncode == 0, done.stderr
    again = load_adapter(cwd / "out" / "epoch_1")
    assert all(torch.equal(again[name], value) for name, value in expected.items())


# Checkpoints with LongRoPE, partial rotation, grouped heads and a tied head

LIKE = {
    "3.5-mini": {"sliding_window": 262144},
    "phi-4-mini": {
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module", params=some(LIKE, quick={"phi-4-mini"}))
def family(request, tmp_path_factory):
    folder = tiny_inputs(tmp_path_factory.mktemp("family"), rows=11)
    full_config(folder)
    file = folder / "base" / "config.json"
    keys = {**json.loads(file.read_text()), **LIKE[request.param]}
    width = keys["hidden_size"] // keys["num_attention_heads"]
    pairs = int(width * keys.get("partial_rotary_factor", 1.0)) // 2
    # The rows have 8 to 22 tokens: some turn by the long factors and some do not.
    keys["original_max_position_embeddings"] = 16
    keys["rope_scaling"] = {
        "type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(pairs)],
        "long_factor": [1.0 + 0.3 * i for i in range(pairs)],
    }
    for old in (folder / "base").glob("model*"):
        old.unlink()
    hf_model(keys, std=0.04).save_pretrained(folder / "base")
    file.write_text(json.dumps(keys))
    return folder


@pytest.fixture
def relatives(family, tmp_path):
    for path in family.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def both(cwd, settings, **config):
    """Train on one process and on two; return the folders."""
    one = ("batch_size=1", "gradient_accumulation_steps=4", "output_dir=one")
    alone = finished(*settings, *one, cwd=cwd, **config)
    two = ("batch_size=1", "gradient_accumulation_steps=2", "output_dir=two")
    own = ("--config", str(config["config"])) if config else ()
    done = own_run(*own, *settings, *two, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    same_losses(losses(alone), losses(cwd / "two"))
    return alone, cwd / "two"


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", VARIANTS)
def test_relatives_train_alike_on_one_process_and_two_and_peft_agrees(variant, relatives):
    recompute = f"enable_activation_checkpointing={variant == 'qlora'}"
    one, two = both(relatives, (*TINY, *VARIANTS[variant], recompute, "epochs=2"))
    same_weights(load_adapter(two / "final"), load_adapter(one / "final"))
    peft_agrees(relatives, two / "final", dora="dora" in variant, quantized="q" in variant)


@pytest.mark.exhaustive
def test_all_weights_of_relatives_do_too(relatives):
    settings = [s for s in TINY if "lora" not in s] + ["epochs=2"]
    one, two = both(relatives, settings, config=relatives / "full.yaml")
    weights = load_base_weights(one / "final")
    same_weights(load_base_weights(two / "final"), weights)
    moved = load_base_with_hf(one / "final").state_dict()
    before = load_base_with_hf(relatives / "base").state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in moved.items())


def test_fixed_factors_are_trained_with(relatives):
    auto, short, long = (
        losses(
            finished(
                *TINY,
                "batch_size=1",
                "max_steps=2",
                f"model.rope_factors={factors}",
                f"output_dir={factors}",
                cwd=relatives,
            )
        )
        for factors in ("auto", "short", "long")
    )
    assert short != auto != long != short
