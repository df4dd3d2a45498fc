"""Every kind of adapter, trained by our recipe, is what PEFT computes and what a resume gives."""

import pytest
import torch

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.checkpoint.peft import export_model
from phi3_plugin.errors import CheckpointError
from phi3_plugin.proof import load_base_with_hf, load_with_peft
from tests.adapters import load_trained
from tests.chosen import some
from tests.own import (
    BATCH,
    RUN,
    TINY,
    assert_same_end,
    leave_until,
    linked,
    logits,
    losses,
    own_run,
    same_losses,
    same_weights,
    started,
    train,
)

pytestmark = pytest.mark.slow

RANKS = "model.rank_pattern={o_proj: 3, 1.qkv_proj: 5}"
ALPHAS = "model.alpha_pattern={o_proj: 7, 1.down_proj: 2.5}"
EMBEDDING = "model.apply_lora_to_embedding=True"
LOFTQ = ("model.quantize_base=True", "model.lora_init=loftq")
KINDS = {
    "rslora": ("model.use_rslora=True", RANKS, ALPHAS),
    "parts": (
        "model.lora_attn_modules=[q_proj,v_proj,up_proj]",
        "model.rank_pattern={v_proj: 3, 0.up_proj: 5}",
        "model.modules_to_save=[embed_tokens]",
        "model.use_rslora=True",
    ),
    "layers": ("model.layers_to_transform=[1]", "model.lora_init=gaussian", "lora_plus_ratio=4"),
    "embedding": (EMBEDDING, "model.modules_to_save=[lm_head]", "lora_plus_ratio=4"),
    "whole": ("model.modules_to_save=[output,tok_embeddings]", "model.use_dora=True"),
    "pissa": ("model.lora_init=pissa", RANKS),
    "pissa-dora": ("model.lora_init=pissa", "model.use_dora=True", "model.use_rslora=True"),
    "loftq": LOFTQ,
    "qlora": ("model.quantize_base=True", "model.modules_to_save=[lm_head]", RANKS),
    "loftq-dora": (*LOFTQ, "model.use_dora=True", RANKS),
    "bf16": ("dtype=bf16", "adapter_dtype=fp32", EMBEDDING, "model.modules_to_save=[lm_head]"),
    "bf16-whole": ("dtype=bf16", "adapter_dtype=fp32", "model.modules_to_save=[embed_tokens]"),
}


def base_as_computed(recipe, cwd):
    """Return the folder of the base: the original, or what NF4 left of it."""
    if not recipe.s.model.get("quantize_base"):
        return cwd / "base"
    (cwd / "as_computed").mkdir()
    state, names = recipe.model.state_dict(), load_base_weights(cwd / "base")
    export_model(cwd / "as_computed", {name: state[name] for name in names}, cwd / "base")
    return cwd / "as_computed"


@pytest.mark.parametrize("kind", some(KINDS, ["rslora", "embedding", "pissa", "loftq", "bf16"]))
def test_peft_computes_what_was_trained_and_a_resume_ends_in_the_same_bits(kind, cwd):
    settings = (*KINDS[kind], "epochs=1", "optimizer.lr=5e-3", "model.lora_rank=4")
    recipe = train(cwd, *settings)
    if not kind.startswith("bf16"):
        peft = load_with_peft(base_as_computed(recipe, cwd), cwd / "out" / "final")
        with torch.no_grad():
            theirs = peft(input_ids=BATCH).logits
            torch.testing.assert_close(logits(recipe), theirs, rtol=0, atol=2e-5)
            with peft.disable_adapter():
                assert (peft(input_ids=BATCH).logits - theirs).abs().max() > 0.01
    linked(cwd, cwd / "again")
    leave_until(1, cwd / "out", cwd / "again" / "out")
    again = train(cwd / "again", *settings, "resume=auto")
    assert again.last.folder.name == "step_000001"
    assert_same_end(cwd / "again" / "out", cwd / "out")


@pytest.mark.parametrize("kind", some(KINDS, ["pissa"]))
def test_one_process_and_two_are_one_run(kind, cwd):
    settings = (*TINY, *KINDS[kind], "model.lora_rank=4", "batch_size=1", "max_steps=4")
    one = ("gradient_accumulation_steps=4", "output_dir=one")
    with started(*settings, *one, cwd=cwd) as recipe:
        recipe.train()
        recipe.finish()
    two = ("gradient_accumulation_steps=2", "output_dir=two")
    done = own_run(*settings, *two, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    rtol = 1e-2 if kind.startswith("bf16") else 1e-5
    same_losses(losses(cwd / "two"), losses(cwd / "one"), rtol)
    if not kind.startswith("bf16"):
        trained = (load_trained(cwd / name / "final", cwd / "base") for name in ("two", "one"))
        same_weights(*trained)


def test_pissa_starts_as_the_base_and_has_its_gradients_elsewhere(cwd):
    with started(*TINY, "model.lora_init=pissa", "output_dir=out", cwd=cwd) as recipe:
        base = load_base_with_hf(cwd / "base")
        with torch.no_grad():
            expected = base(input_ids=BATCH).logits
        torch.testing.assert_close(logits(recipe), expected, rtol=0, atol=2e-5)
        name = "layers.0.attn.o_proj"
        left = recipe.model.get_submodule(name).weight
        assert (left - load_base_weights(cwd / "base")[f"{name}.weight"]).abs().max() > 0.01


def test_an_adapter_of_loftq_says_what_it_belongs_to(cwd):
    train(cwd, *LOFTQ, "epochs=1")
    card = (cwd / "out" / "final" / "README.md").read_text("utf-8")
    assert "| base to serve | the base weights in NF4, as in training" in card


@pytest.mark.parametrize("setting", ["model.use_rslora=True", "model.alpha_pattern={o_proj: 3}"])
def test_a_resume_with_another_scale_is_refused(setting, cwd):
    train(cwd, "epochs=1")
    with (
        pytest.raises(CheckpointError, match=r"resume: .* was trained with the scale 2 on layers"),
        started(*RUN, setting, "resume=auto", cwd=cwd),
    ):
        pass


@pytest.mark.parametrize(
    ("start", "other"),
    [
        (LOFTQ, LOFTQ[:1]),
        (LOFTQ[:1], LOFTQ),
        (("model.lora_init=pissa",), ("model.lora_rank=32", "model.lora_alpha=64")),
        ((), ("model.lora_init=pissa", "model.lora_rank=8", "model.lora_alpha=16")),
    ],
)
def test_a_resume_with_another_start_is_refused(start, other, cwd):
    # All of them have the shapes and scales of what was saved.
    train(cwd, *start, "epochs=1")
    with (
        pytest.raises(CheckpointError, match=r"resume: .* was started with lora_init: .* but the"),
        started(*RUN, *other, "resume=auto", cwd=cwd),
    ):
        pass
