"""The recipe computes what transformers and PEFT, torchtune's recipe and other splits compute."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from phi3_plugin.checkpoint.base import load_base_weights, to_hf, to_peft
from phi3_plugin.data.collate import pad_right
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.proof import load_base_with_hf
from phi3_plugin.train import start as lora_finetune_start
from tests.adapters import load_adapter
from tests.chosen import some
from tests.own import (
    CONFIG,
    TINY,
    VARIANTS,
    finished,
    full_config,
    losses,
    merged,
    own_run,
    peft_agrees,
    same_losses,
    same_weights,
    started,
    tiny_inputs,
)
from tests.stock import stock_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Eleven rows: no multiple of any batch here, with answers of 1 to 7 words."""
    folder = tiny_inputs(tmp_path_factory.mktemp("inputs"), rows=11)
    full_config(folder)
    return folder


@pytest.fixture
def cwd(inputs, tmp_path):
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def trained(model) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def hugging_face(recipe, adapter, dora):
    """Train as users of transformers and PEFT do; return losses and what was trained."""
    model = load_base_with_hf(recipe.s.checkpoint_dir).train()
    if adapter:
        targets = {"target_modules": list(TARGETS), "use_dora": dora, "lora_dropout": 0.0}
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, **targets))
        # B is zero and the magnitude is the base's in both; A is drawn.
        drawn = {to_peft(n): v for n, v in adapter.items() if "lora_a" in n}
        set_peft_model_state_dict(model, drawn)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.s.optimizer["lr"], weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, recipe.data.total_steps)
    seen = []
    for step in range(recipe.data.total_steps):
        batches = recipe.data.order.batches(step, 0, pad_right)  # ours are not padded
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        seen.append(0.0)
        for batch in batches:
            logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / count
            loss.backward()
            seen[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return seen, get_peft_model_state_dict(model) if adapter else trained(model)


@pytest.mark.parametrize("variant", ["lora", "dora", "full"])
def test_twenty_steps_are_those_of_transformers_and_peft(variant, cwd):
    full = variant == "full"
    settings = [s for s in TINY if "lora" not in s] if full else [*TINY, *VARIANTS[variant]]
    sizes = ("batch_size=2", "gradient_accumulation_steps=2", "epochs=7", "max_steps=20")
    more = (
        f"optimizer.lr={'1e-4' if full else '2e-3'}",
        "lr_scheduler.num_warmup_steps=3",
        "clip_grad_norm=1.0",
    )
    run = {"cwd": cwd, "config": cwd / "full.yaml" if full else CONFIG}
    with started(*settings, *sizes, *more, "output_dir=out", **run) as recipe:
        adapter = {} if full else trained(recipe.model)
        expected, theirs = hugging_face(recipe, adapter, variant == "dora")
        recipe.train()
    rename = to_hf if full else to_peft
    assert len(expected) == 20
    same_losses(losses(cwd / "out"), expected)
    same_weights({rename(n): v for n, v in trained(recipe.model).items()}, theirs)


@pytest.mark.parametrize("variant", some(["lora", "dora", "qlora"], quick={"lora", "qlora"}))
def test_the_run_is_that_of_torchtunes_recipe(variant, cwd, monkeypatch):
    """Where torchtune drops no sample: eight rows, in their order, in steps of four."""
    (cwd / "rows.jsonl").unlink()
    tiny_inputs(cwd / "eight", rows=8)
    settings = (*TINY, *VARIANTS[variant], "dataset.source=eight/rows.jsonl", "shuffle=False")
    settings += ("batch_size=2", "gradient_accumulation_steps=2", "epochs=5")
    cfg = merged(*settings, "output_dir=stock", cwd=cwd)
    stock = stock_module("lora_finetune_single_device").LoRAFinetuneRecipeSingleDevice(cfg)
    stock.setup(cfg)
    wrapper = "_checkpoint_wrapped_module."
    start = {name.replace(wrapper, ""): p for name, p in trained(stock._model).items()}
    stock.train()
    (log,) = (cwd / "stock" / "logs").iterdir()
    lines = [line for line in log.read_text().splitlines() if "loss:" in line]
    expected = [float(line.split("loss:")[1].split()[0]) for line in lines]

    monkeypatch.setattr(lora_finetune_start, "initial_adapter", lambda model, seed: start)
    out = finished(*settings, "output_dir=out", cwd=cwd)
    assert len(expected) == 10
    same_losses(losses(out), expected)
    same_weights(load_adapter(out / "final"), load_adapter(cwd / "stock" / "epoch_4"))


@pytest.mark.parametrize(
    ("variant", "replicas"),
    some(
        [*((variant, 1) for variant in VARIANTS), ("lora", 2), ("qdora", 2)],
        quick={("lora", 2)},
    ),
)
def test_one_process_two_processes_and_accumulation_are_one_run(variant, replicas, cwd):
    settings = (*TINY, *VARIANTS[variant], "epochs=2")
    outputs = [
        finished(*settings, f"batch_size={size}", f"gradient_accumulation_steps={4 // size}",
                 f"output_dir=by_{size}", cwd=cwd)
        for size in (4, 1)
    ]  # fmt: skip
    sizes = ("batch_size=1", "gradient_accumulation_steps=2", f"fsdp_replicas={replicas}")
    done = own_run(*settings, *sizes, "output_dir=two", cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(losses(outputs[0])) == 6
    expected = load_adapter(outputs[0] / "final")
    for other in (outputs[1], cwd / "two"):
        same_losses(losses(other), losses(outputs[0]))
        same_weights(load_adapter(other / "final"), expected)
    peft_agrees(cwd, cwd / "two" / "final", dora="dora" in variant, quantized="q" in variant)


def test_full_fine_tuning_ends_in_a_folder_that_transformers_loads(cwd):
    settings = [s for s in TINY if "lora" not in s] + ["epochs=2", "batch_size=1"]
    one = ("gradient_accumulation_steps=4", "output_dir=one")
    with started(*settings, *one, cwd=cwd, config=cwd / "full.yaml") as recipe:
        recipe.train()
        recipe.finish()
    batch = torch.randint(0, 400, (2, 30))
    with torch.no_grad():
        ours = recipe.model.eval()(batch)
        theirs = load_base_with_hf(cwd / "one" / "final")(input_ids=batch).logits
        before = load_base_with_hf(cwd / "base")(input_ids=batch).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - before).abs().max() > 0.1

    two = ("--config", "full.yaml", "gradient_accumulation_steps=2", "output_dir=two")
    done = own_run(*two, *settings, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    same_losses(losses(cwd / "two"), losses(cwd / "one"))
    final = [load_base_weights(cwd / name / "final") for name in ("two", "one")]
    same_weights(*final)


BF16 = [(variant, adapters) for variant in VARIANTS for adapters in ("null", "fp32")]
BF16_QUICK = {("qlora", "fp32")}


@pytest.mark.parametrize(("variant", "adapters"), some(BF16, quick=BF16_QUICK))
def test_bf16_learns_with_adapters_in_either_precision(variant, adapters, cwd):
    settings = (*TINY, *VARIANTS[variant], "dtype=bf16", f"adapter_dtype={adapters}")
    settings += ("epochs=3", "optimizer.lr=0.01", "batch_size=1")
    seen = losses(finished(*settings, "gradient_accumulation_steps=4", "output_dir=one", cwd=cwd))
    assert all(map(math.isfinite, seen))
    assert seen[-1] < seen[0] / 2
    kinds = {value.dtype for value in load_adapter(cwd / "one" / "final").values()}
    assert kinds == {torch.float32 if adapters == "fp32" else torch.bfloat16}


@pytest.mark.exhaustive  # bf16 takes long on many CPUs; in fp32 every run of the tests does it
def test_two_processes_learn_in_bf16(cwd):
    settings = (*TINY, *VARIANTS["qlora"], "dtype=bf16", "adapter_dtype=fp32")
    settings += ("epochs=3", "optimizer.lr=0.01", "batch_size=1")
    seen = losses(finished(*settings, "gradient_accumulation_steps=4", "output_dir=one", cwd=cwd))
    two = ("gradient_accumulation_steps=2", "output_dir=two")
    done = own_run(*settings, *two, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    again = losses(cwd / "two")
    # Nothing has moved before the third step; later, sums rounded in another order show.
    same_losses(again[:2], seen[:2], rtol=1e-4)
    assert len(again) == len(seen)
    assert again[-1] < seen[0] / 2
