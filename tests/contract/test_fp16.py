"""Runs in fp16 follow those in fp32, as those of PEFT under torch's autocast and scaler do."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from phi3_plugin.recipes import lora_finetune
from torch.amp import GradScaler

from phi3_plugin import evaluate, generate, load
from phi3_plugin.checkpoint.base import to_peft
from phi3_plugin.data.collate import pad_right
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.models.phi3 import PRECISIONS
from phi3_plugin.proof import load_base_with_hf
from phi3_plugin.train.monitor import History
from tests.adapters import load_adapter
from tests.chosen import some
from tests.own import (
    BATCH,
    CONFIG,
    TINY,
    VARIANTS,
    assert_same_end,
    finished,
    leave_until,
    linked,
    losses,
    metrics,
    own_run,
    started,
    train,
    write_pairs,
)

pytestmark = pytest.mark.slow

STEPS = (
    *("batch_size=2", "gradient_accumulation_steps=2", "max_steps=8", "optimizer.lr=2e-3"),
    *("lr_scheduler.num_warmup_steps=1", "report=False", "val_fraction=0.2"),
)
WAYS = {
    **VARIANTS,
    "parts": ("model.lora_attn_modules=[q_proj,v_proj]", "model.apply_lora_to_mlp=False"),
    "head": ("model.apply_lora_to_output=True",),
    "embedding": ("model.apply_lora_to_embedding=True",),
    "whole parts": ("model.modules_to_save=[embed_tokens,lm_head]",),
    "new tokens": ("tokenizer.add_tokens=['<call>']",),
    "pissa": ("model.lora_init=pissa",),
    "recomputed": ("enable_activation_checkpointing=True", "clip_grad_norm=0.5"),
}


def gap(ours, exact):
    """Return by how much losses differ at most, relatively."""
    return max(abs(one / other - 1) for one, other in zip(ours, exact, strict=True))


@pytest.mark.parametrize("way", some(WAYS, quick={"qdora", "head", "embedding"}))
def test_losses_are_those_of_fp32_as_far_as_fp16_allows(way, cwd):
    """Training and validation; what is written is what a run in bf16 writes."""
    out = {
        dtype: finished(*TINY, *STEPS, *WAYS[way], f"dtype={dtype}", f"output_dir={dtype}", cwd=cwd)
        for dtype in ("fp32", "fp16")
    }
    ours, exact = (metrics(out[dtype]) for dtype in ("fp16", "fp32"))
    assert gap(losses(out["fp16"]), losses(out["fp32"])) <= 1e-3
    assert {line["loss_scale"] for line in ours} == {65536.0}
    assert "loss_scale" not in exact[0]
    norms = ([line["grad_norm"] for line in lines] for lines in (ours, exact))
    assert gap(*norms) <= 1e-2
    held = ([line["val_loss"] for line in validations(out[dtype])] for dtype in ("fp16", "fp32"))
    assert gap(*held) <= 1e-3
    adapters = [load_adapter(out[dtype] / "final") for dtype in ("fp16", "fp32")]
    kinds = [{name: value.dtype for name, value in adapter.items()} for adapter in adapters]
    assert kinds[0] == kinds[1]


def validations(folder):
    return [line for line in History.read(folder / "metrics.jsonl") if "val_loss" in line]


def in_peft(recipe, adapter, dtype):
    """Train as transformers and PEFT do over a base in fp16, or in fp32; return the losses."""
    model = load_base_with_hf(recipe.s.checkpoint_dir, dtype).train()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS)))
    set_peft_model_state_dict(model, {to_peft(n): v for n, v in adapter.items()})
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}  # PEFT's own choice
    optimizer = torch.optim.AdamW(parameters, lr=recipe.s.optimizer["lr"], weight_decay=0.01)
    scaler, seen = GradScaler("cpu", enabled=dtype == torch.float16), []
    for step in range(recipe.data.total_steps):
        batches = recipe.data.order.batches(step, 0, pad_right)
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        seen.append(0.0)
        for batch in batches:
            with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
                logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            loss = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="sum") / count
            scaler.scale(loss).backward()
            seen[-1] += loss.item()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return seen


def test_peft_under_autocast_is_not_nearer_to_fp32(cwd):
    settings = (*TINY, *STEPS, "lr_scheduler=null", "clip_grad_norm=1.0", "dtype=fp16")
    with started(*settings, "output_dir=out", cwd=cwd) as recipe:
        trained = {
            n: p.detach().clone() for n, p in recipe.model.named_parameters() if p.requires_grad
        }
        exact, theirs = (
            in_peft(recipe, trained, dtype) for dtype in (torch.float32, torch.float16)
        )
        recipe.train()
    ours = losses(cwd / "out")
    assert len(exact) == 8
    assert gap(ours, exact) <= max(gap(theirs, exact), 1e-3)
    assert gap(ours, theirs) <= 2e-3


def test_a_run_stopped_after_skipped_steps_ends_in_the_same_bits(cwd, monkeypatch):
    """The scale is kept, and for how long it has held; the rate has waited for skipped steps."""

    def too_much(dtype, device):
        return GradScaler("cpu", init_scale=2.0**20)

    monkeypatch.setattr(lora_finetune, "loss_scaler", too_much)
    keys = ("dtype=fp16", "output_dir=whole")
    train(cwd, *keys)
    steps, events = metrics(cwd / "whole"), History.read(cwd / "whole" / "metrics.jsonl")
    scales = [line["loss_scale"] for line in steps]
    skipped = [i for i, (one, other) in enumerate(pairwise(scales)) if one != other]
    assert scales[0] == 2.0**20 and len(scales) == 9 and 1 <= len(skipped) <= 3
    assert [e["step"] - 1 for e in events if e.get("event") == "overflowed"] == skipped
    assert [i for i, line in enumerate(steps) if line["grad_norm"] is None] == skipped
    rates = pairwise([line["lr"] for line in steps])
    assert [i for i, (one, other) in enumerate(rates) if one == other] == skipped
    for step in (skipped[0] + 1, skipped[-1] + 1):
        again = linked(cwd, cwd / str(step))
        leave_until(step, cwd / "whole", again / "whole")
        recipe = train(again, *keys, "resume=auto")
        assert recipe.last.folder.name == f"step_{step:06d}"
        assert_same_end(again / "whole", cwd / "whole")


@pytest.mark.parametrize("replicas", some([1, 2], quick={1}))
def test_two_processes_are_one_in_fp16(replicas, cwd):
    settings = (*TINY, *VARIANTS["qlora"], "dtype=fp16", "epochs=1", "batch_size=1")
    one = finished(*settings, "gradient_accumulation_steps=4", "output_dir=one", cwd=cwd)
    two = ("gradient_accumulation_steps=2", "output_dir=two", f"fsdp_replicas={replicas}")
    done = own_run(*settings, *two, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(losses(one)) == 10 and all(map(math.isfinite, losses(one)))
    assert gap(losses(cwd / "two"), losses(one)) <= 1e-3


@pytest.mark.parametrize("loss", some(["dpo", "simpo", "orpo", "kto"], quick={"dpo"}))
def test_losses_of_answers_are_those_of_fp32(loss, cwd):
    write_pairs(cwd, 12)
    own = (f"loss._component_=phi3_plugin.train.losses.{loss}", "dataset.source=pairs.jsonl")
    sizes = ("batch_size=1", "gradient_accumulation_steps=3", "max_steps=5", "optimizer.lr=2e-3")
    exact, half = (
        finished(
            *(*TINY, *own, *sizes, f"dtype={dtype}", f"output_dir={dtype}", "report=False"),
            cwd=cwd,
            config=CONFIG.with_name("phi3_mini_dpo.yaml"),
        )
        for dtype in ("fp32", "fp16")
    )
    assert len(losses(half)) == 5 and losses(half)[-1] < losses(half)[0]
    assert losses(half) == pytest.approx(losses(exact), rel=1e-2, abs=2e-3)
    assert {line["loss_scale"] for line in metrics(half)} == {65536.0}


@pytest.mark.parametrize("quantize", some([False, True], quick={True}))
def test_what_was_trained_answers_in_fp16(quantize, cwd):
    settings = (*TINY, *STEPS, "dtype=fp16", f"model.quantize_base={quantize}", "output_dir=out")
    adapter = finished(*settings, cwd=cwd) / "final"
    answers = []
    for dtype in ("fp16", "fp32"):
        model, tokenizer = load(cwd / "base", adapter, dtype=dtype, quantize=quantize)
        with torch.no_grad():
            logits = model(BATCH)
        assert model.norm.scale.dtype == PRECISIONS[dtype]
        answers.append((logits.float(), generate(model, tokenizer, "Add: one plus two")))
    (half, said), (exact, expected) = answers
    assert (half - exact).norm() <= 2e-3 * exact.norm()
    assert said == expected
    given = {"data": cwd / "rows.jsonl", "base": cwd / "base", "answers": False}
    found = (evaluate(adapter, **given, dtype=dtype)["measures"] for dtype in ("fp16", "fp32"))
    one, other = ([m["loss"][side]["value"] for side in ("base", "adapter")] for m in found)
    assert one == pytest.approx(other, rel=1e-3)
