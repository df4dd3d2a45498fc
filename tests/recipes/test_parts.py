"""Adapters on parts of the fused layers, trained by our recipe and by torchtune's."""

import shutil

import pytest
import torch

from phi3_plugin.checkpoint.peft import load_adapter
from phi3_plugin.errors import CheckpointError
from tests.chosen import some
from tests.own import (
    RUN,
    TINY,
    assert_same_end,
    finished,
    leave_until,
    losses,
    own_run,
    peft_agrees,
    same_losses,
    same_weights,
    started,
    train,
)
from tests.stock import tune_run

pytestmark = pytest.mark.slow

PARTS = ["q_proj", "v_proj", "o_proj", "up_proj"]
# torchtune's recipes look for these names in those of the parameters; `v_proj` and `up_proj` are
# found in `qkv_proj` and `gate_up_proj` by accident, these are not.
OTHERS = ["q_proj", "k_proj", "gate_proj"]


def modules(names):
    return f"model.lora_attn_modules=[{','.join(names)}]"


@pytest.mark.parametrize("quantized", some([False, True], []))
def test_one_process_and_two_are_one_run_that_peft_computes(quantized, cwd):
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


@pytest.mark.parametrize("more", [(), ("dtype=bf16", "lora_plus_ratio=4")], ids=["fp32", "bf16"])
def test_a_stopped_run_ends_in_the_same_bits(more, cwd):
    settings = (modules(PARTS), "epochs=1", *more)
    train(cwd, *settings)
    (cwd / "again").mkdir()
    for name in ("base", "rows.jsonl"):
        (cwd / "again" / name).symlink_to(cwd / name)
    leave_until(1, cwd / "out", cwd / "again" / "out")
    recipe = train(cwd / "again", *settings, "resume=auto")
    assert recipe.last.folder.name == "step_000001"
    assert_same_end(cwd / "again" / "out", cwd / "out")


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
def test_torchtunes_recipe_trains_saves_and_resumes(cwd):
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
