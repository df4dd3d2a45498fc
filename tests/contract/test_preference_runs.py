"""Runs on preferences: however they are split, stopped or computed, and as torchtune's recipe."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from phi3_plugin.train import cached_reference
from phi3_plugin.train import start as starting
from tests.adapters import load_adapter
from tests.chosen import some
from tests.own import (
    RUN,
    TINY,
    assert_same_end,
    finished,
    leave_until,
    linked,
    losses,
    merged,
    metrics,
    own_run,
    same_losses,
    same_weights,
    tiny_inputs,
    write_pairs,
)
from tests.stock import stock_module, torchrun_stock

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "phi3_mini_dpo.yaml"
LOSSES = ("dpo", "simpo", "orpo", "kto")
INPUTS = ("base", "pairs.jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tiny_inputs(tmp_path_factory.mktemp("pairs"), rows=1)
    write_pairs(folder, 20)
    return folder


@pytest.fixture
def cwd(made, tmp_path):
    return linked(made, tmp_path, *INPUTS)


def of(loss, *settings, base=TINY):
    """Return the settings of a run with a loss."""
    own = f"loss._component_=phi3_plugin.train.losses.{loss}"
    return *base, own, "dataset.source=pairs.jsonl", "output_dir=out", "loss.beta=0.5", *settings


def measured(out):
    return [{k: v for k, v in line.items() if k.startswith("reward")} for line in metrics(out)]


@pytest.mark.parametrize("loss", some(LOSSES, quick={"kto"}))
def test_a_run_that_was_stopped_ends_in_the_same_bits(loss, made, cwd):
    settings = of(loss, base=RUN)
    out = finished(*settings, cwd=cwd, config=CONFIG)
    assert len(losses(out)) == 6
    again = linked(made, cwd / "again", *INPUTS)
    leave_until(3, out, again / "out")
    finished(*settings, "resume=auto", cwd=again, config=CONFIG)
    assert_same_end(again / "out", out)


@pytest.mark.parametrize("loss", some(LOSSES, quick={"kto"}))
def test_accumulation_and_packs_are_one_run(loss, cwd):
    settings = of(loss, "epochs=2", "val_fraction=0.2", "run_val_every_n_steps=2")
    outputs = [
        finished(
            *settings,
            f"batch_size={size}",
            f"gradient_accumulation_steps={4 // size}",
            f"output_dir=by_{size}",
            cwd=cwd,
            config=CONFIG,
        )
        for size in (4, 1)
    ]
    same_losses(losses(outputs[1]), losses(outputs[0]), rtol=1e-5)
    same_weights(*(load_adapter(out / "final") for out in reversed(outputs)))
    for one, other in zip(*map(measured, outputs), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert all((out / "best").exists() for out in outputs)


@pytest.mark.parametrize(
    ("loss", "replicas", "more"),
    some(
        [
            *((loss, 1, ()) for loss in LOSSES),
            ("dpo", 2, ()),
            ("kto", 1, ("reference=cached",)),
            ("dpo", 1, ("model._component_=phi3_plugin.models.qlora_phi3",)),
        ],
        quick={("kto", 1, ("reference=cached",))},
    ),
)
def test_two_processes_are_one(loss, replicas, more, cwd):
    """20 pairs in steps of 6: in the last of an epoch one process has nothing."""
    settings = of(loss, *more, "epochs=2", "batch_size=1")
    one = finished(
        *settings, "gradient_accumulation_steps=6", "output_dir=one", cwd=cwd, config=CONFIG
    )
    sizes = ("gradient_accumulation_steps=3", f"fsdp_replicas={replicas}", "output_dir=two")
    done = own_run("--config", "phi3_mini_dpo", *settings, *sizes, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    same_losses(losses(cwd / "two"), losses(one), rtol=1e-5)
    same_weights(load_adapter(cwd / "two" / "final"), load_adapter(one / "final"))
    for ours, other in zip(measured(cwd / "two"), measured(one), strict=True):
        assert ours == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_reference_may_be_computed_once(loss, cwd, monkeypatch):
    settings = of(loss, "epochs=1", "batch_size=4", "val_fraction=0.2")
    live = finished(*settings, "output_dir=live", cwd=cwd, config=CONFIG)
    keep = (f"dataset.cache_dir={cwd / 'kept'}", "reference=cached")
    once = finished(*settings, *keep, "output_dir=once", cwd=cwd, config=CONFIG)
    same_losses(losses(once), losses(live), rtol=1e-5)
    same_weights(load_adapter(once / "final"), load_adapter(live / "final"))
    (file,) = (cwd / "kept").glob("*/reference-*.npy")

    def refused(*_):
        raise AssertionError("it is known")

    monkeypatch.setattr(cached_reference, "_computed", refused)
    again = finished(*settings, *keep, "output_dir=again", cwd=cwd, config=CONFIG)
    assert losses(again) == losses(once)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(AssertionError, match="it is known"):
        finished(*settings, *keep, "output_dir=damaged", cwd=cwd, config=CONFIG)


def test_the_run_is_that_of_torchtunes_dpo_recipe(cwd, monkeypatch):
    """Twenty pairs, in their order, four at once: theirs logs the rewards of the last batch."""
    settings = (*TINY, "dataset.source=pairs.jsonl", "shuffle=False", "epochs=2")
    settings += ("batch_size=4", "gradient_accumulation_steps=1", "clip_grad_norm=null")
    cfg = merged(*settings, "output_dir=stock", cwd=cwd, config=CONFIG)
    stock = stock_module("lora_dpo_single_device").LoRADPORecipeSingleDevice(cfg)
    stock.setup(cfg)
    wrapper = "_checkpoint_wrapped_module."
    start = {
        name.replace(wrapper, ""): p.detach().clone()
        for name, p in stock._model.named_parameters()
        if p.requires_grad
    }
    stock.train()
    (log,) = (cwd / "stock" / "logs").iterdir()
    told = [line for line in log.read_text().splitlines() if "loss:" in line]

    def values(name):
        return [float(line.split(f"{name}:")[1].split()[0]) for line in told]

    monkeypatch.setattr(starting, "initial_adapter", lambda model, seed: start)
    out = finished(*settings, "val_fraction=0", "output_dir=out", cwd=cwd, config=CONFIG)
    assert len(told) == 10
    same_losses(losses(out), values("loss"), rtol=1e-5)
    margins = [line["reward_margin"] for line in measured(out)]
    assert margins == pytest.approx(values("rewards/margins"), rel=1e-3, abs=1e-5)
    same_weights(load_adapter(out / "final"), load_adapter(cwd / "stock" / "epoch_1"))


WHOLE = {"_component_": "phi3_plugin.models.phi3", "checkpoint_dir": "${checkpoint_dir}"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", ["lora_dpo_distributed", "full_dpo_distributed"])
def test_torchtunes_distributed_dpo_recipes_take_our_pairs(recipe, cwd):
    cfg = OmegaConf.load(CONFIG)
    if recipe == "full_dpo_distributed":
        cfg = OmegaConf.merge({**cfg, "model": WHOLE}, {"ref_checkpointer": cfg.checkpointer})
        for section in (cfg.checkpointer, cfg.ref_checkpointer):
            del section["lora_dropout"], section["save_adapter_weights_only"]
    OmegaConf.save(cfg, cwd / "stock.yaml")
    keys = ("checkpoint_dir=base", "output_dir=out", "dataset.source=pairs.jsonl", "dtype=fp32")
    sizes = ("batch_size=2", "gradient_accumulation_steps=1", "epochs=2", "optimizer.fused=False")
    done = torchrun_stock(
        "--config", "stock.yaml", *keys, *sizes, "optimizer.lr=1e-3", cwd=cwd, recipe=recipe
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = (cwd / "out" / "logs").iterdir()
    told = [line for line in log.read_text().splitlines() if "loss:" in line]
    seen = [float(line.split("loss:")[1].split()[0]) for line in told]
    told_as = 2 if "lora" in recipe else 1  # that one tells the sum over both processes
    assert seen[0] == pytest.approx(told_as * 0.6931472, abs=1e-4)
    assert seen[-1] < 0.9 * seen[0]
    weights = "adapter_model.safetensors" if "lora" in recipe else "model.safetensors.index.json"
    assert list((cwd / "out" / "epoch_1").glob(weights.split(".")[0] + "*"))


def test_packed_pairs_and_qlora_train(cwd):
    settings = of("dpo", "model._component_=phi3_plugin.models.qlora_phi3", "dataset.packed=True")
    out = finished(*settings, "batch_size=1", "epochs=4", cwd=cwd, config=CONFIG)
    assert losses(out)[0] == pytest.approx(0.6931472, abs=1e-5)
    assert metrics(out)[-1]["reward_accuracy"] == 1
    assert losses(out)[-1] < 0.5
