"""Distillation: that of torch over transformers' logits, and however a run is split or stopped."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from phi3_plugin.recipes import phi3_demo_checkpoint
from transformers import Phi3ForCausalLM

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.checkpoint.peft import export_model
from phi3_plugin.errors import CheckpointError, ConfigError
from phi3_plugin.models.nf4 import is_nf4
from phi3_plugin.proof import load_with_peft
from phi3_plugin.train import start as starting
from tests.adapters import load_adapter
from tests.chosen import some
from tests.own import (
    RUN,
    TINY,
    WORDS,
    assert_same_end,
    chat,
    finished,
    leave_until,
    linked,
    losses,
    merged,
    metrics,
    own_run,
    same_losses,
    same_weights,
    started,
    tiny_inputs,
)
from tests.stock import stock_module, torchrun_stock, tune_run

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "phi3_mini_distill.yaml"
TEACHER = "teacher_dir=teacher"
INPUTS = ("base", "rows.jsonl", "teacher", "adapter")
TEACHERS = {"another": (TEACHER,), "adapter": ("teacher_adapter=adapter",), "base": ()}
MODEL = "model._component_=phi3_plugin.models."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a student's base, a teacher that is surer of itself, and its adapter."""
    folder = tiny_inputs(tmp_path_factory.mktemp("distillation"), rows=40)
    plain = folder / "plain"
    phi3_demo_checkpoint.build_checkpoint(plain, words=WORDS, layers=3)
    weights = {name: 2 * weight for name, weight in load_base_weights(plain).items()}
    (folder / "teacher").mkdir()
    export_model(folder / "teacher", weights, plain)
    out = finished(*TINY, "output_dir=out", "optimizer.lr=1e-2", "max_steps=6", cwd=folder)
    out.joinpath("final").rename(folder / "adapter")
    return folder


@pytest.fixture
def cwd(made, tmp_path):
    return linked(made, tmp_path, *INPUTS)


def at(cwd, settings):
    """Return the settings with the paths of teachers in a folder."""
    return [
        f"{key}={cwd / value}" if key in ("teacher_dir", "teacher_adapter") else f"{key}={value}"
        for key, _, value in (setting.partition("=") for setting in settings)
    ]


def run(*settings, cwd):
    return finished(*at(cwd, settings), cwd=cwd, config=CONFIG)


def measured(out):
    return [{key: line[key] for key in ("kl", "sft_loss")} for line in metrics(out)]


def of_transformers(model, teacher, samples, ratio, temperature):
    """Return the loss, the distance and the cross entropy of chats, from whole logits."""
    kl, entropy, tokens = 0.0, 0.0, 0
    for sample in samples:
        ids, labels = (torch.as_tensor(sample[key]) for key in ("tokens", "labels"))
        rows = (labels[1:] != -100).nonzero().squeeze(1)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, rows].float()
        with torch.no_grad():
            taught = teacher(input_ids=ids[None], use_cache=False).logits[0, rows].float()
        one, other = (torch.log_softmax(x / temperature, -1) for x in (logits, taught))
        kl = kl + F.kl_div(one, other, reduction="sum", log_target=True)
        entropy = entropy + F.cross_entropy(logits, labels[1:][rows], reduction="sum")
        tokens += len(rows)
    kl, entropy = kl / tokens, entropy / tokens
    return ratio * temperature**2 * kl + (1 - ratio) * entropy, kl, entropy


@pytest.mark.parametrize(
    ("teacher", "temperature"),
    some(
        [("another", 1.0), ("another", 2.0), ("adapter", 1.0), ("base", 1.0)],
        quick={("another", 2.0), ("adapter", 1.0)},
    ),
)
def test_losses_and_adapter_are_those_of_torch_over_transformers(teacher, temperature, cwd):
    """Six steps, from an adapter that is not the identity, by transformers' models and PEFT's."""
    ratio = 0.7
    settings = (*TINY, "output_dir=out", "max_steps=6", "val_fraction=0", "batch_size=4")
    settings += (
        "init_adapter=" + str(cwd / "adapter"),
        "optimizer.fused=False",
        *TEACHERS[teacher],
    )
    settings += ("lr_scheduler=null", "gradient_accumulation_steps=2", "kd_loss=null")
    loss = {"_component_": "phi3_plugin.train.losses.distill"}
    loss |= {"kd_ratio": ratio, "temperature": temperature}
    cfg = merged(*at(cwd, settings), cwd=cwd, config=CONFIG)
    cfg.loss, cfg.kd_ratio = loss, None
    OmegaConf.save(cfg, cwd / "own.yaml")
    with started(cwd=cwd, config=cwd / "own.yaml") as recipe:
        order = recipe.data.order
        steps = [[order.dataset[i] for i in order.indices(step)] for step in range(6)]
        recipe.train()
        recipe.finish()
    out = cwd / "out"

    theirs = load_with_peft(cwd / "base", cwd / "adapter")
    trained = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    if teacher == "another":
        taught = Phi3ForCausalLM.from_pretrained(cwd / "teacher", dtype=torch.float32)
    elif teacher == "adapter":
        taught = load_with_peft(cwd / "base", cwd / "adapter")
    else:
        taught = Phi3ForCausalLM.from_pretrained(cwd / "base", dtype=torch.float32)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.01)
    for samples, line in zip(steps, metrics(out), strict=True):
        loss, kl, entropy = of_transformers(theirs, taught, samples, ratio, temperature)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["kl"] == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
        assert line["sft_loss"] == pytest.approx(entropy.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ours = load_with_peft(cwd / "base", out / "final").state_dict()
    for name, other in trained.items():
        assert (ours[name] - other).norm() <= 1e-4 * other.norm(), name


@pytest.mark.parametrize("teacher", some(TEACHERS, quick={"adapter"}))
def test_a_run_that_was_stopped_ends_in_the_same_bits(teacher, made, cwd):
    settings = (*RUN, *TEACHERS[teacher])
    out = run(*settings, cwd=cwd)
    again = linked(made, cwd / "again", *INPUTS)
    leave_until(3, out, again / "out")
    run(*settings, "resume=auto", cwd=again)
    assert_same_end(again / "out", out)


def test_accumulation_and_packs_are_one_run(cwd):
    settings = (*TINY, TEACHER, "epochs=1", "val_fraction=0.2", "run_val_every_n_steps=2")
    outputs = [
        run(
            *settings,
            f"batch_size={size}",
            f"gradient_accumulation_steps={8 // size}",
            f"output_dir=by_{size}",
            cwd=cwd,
        )
        for size in (8, 2)
    ]
    same_losses(losses(outputs[1]), losses(outputs[0]), rtol=1e-5)
    same_weights(*(load_adapter(out / "final") for out in reversed(outputs)))
    for one, other in zip(*map(measured, outputs), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert all((out / "best").exists() for out in outputs)


QLORA = f"{MODEL}qlora_phi3"


@pytest.mark.parametrize(
    ("settings", "replicas"),
    some(
        [
            ((TEACHER,), 1),
            ((TEACHER, "enable_activation_checkpointing=True"), 2),
            ((TEACHER, "teacher_quantized=True", QLORA), 1),
            (("teacher_adapter=adapter", "model.apply_lora_to_output=True"), 1),
            (("teacher_adapter=adapter",), 2),
            ((QLORA,), 1),
        ],
        quick={((TEACHER, "teacher_quantized=True", QLORA), 1)},
    ),
)
def test_two_processes_are_one(settings, replicas, cwd):
    """40 chats in steps of 6: in the last one process has nothing."""
    settings = (*TINY, *at(cwd, settings), "epochs=1", "batch_size=1", "val_fraction=0")
    one = run(*settings, "gradient_accumulation_steps=6", "output_dir=one", cwd=cwd)
    sizes = ("gradient_accumulation_steps=3", f"fsdp_replicas={replicas}", "output_dir=two")
    done = own_run("--config", "phi3_mini_distill", *settings, *sizes, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    same_losses(losses(cwd / "two"), losses(one), rtol=1e-5)
    same_weights(load_adapter(cwd / "two" / "final"), load_adapter(one / "final"))
    for ours, other in zip(measured(cwd / "two"), measured(one), strict=True):
        assert ours == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_the_teacher_is_stored_as_asked_and_the_base_once(cwd):
    """Of the student's base with another adapter only that adapter is new."""
    for settings, quantized in (
        ((TEACHER, "teacher_quantized=True"), True),
        (("teacher_adapter=adapter", QLORA), True),
        (("teacher_adapter=adapter",), False),
    ):
        settings = (*TINY, *settings, "output_dir=out")
        with started(*at(cwd, settings), cwd=cwd, config=CONFIG) as recipe:
            (teacher,) = recipe.teacher.args
            weights = dict(teacher.named_parameters())
            shared = {name for name, p in recipe.model.named_parameters() if p is weights.get(name)}
            assert is_nf4(weights["layers.0.attn.qkv_proj.weight"]) == quantized
            assert not any(p.requires_grad for name, p in weights.items() if name not in shared)
            if "teacher_adapter=adapter" in settings:
                assert {name for name in weights if "lora_" not in name} == shared
            else:
                assert not shared


def test_another_teacher_ends_a_resume(made, cwd):
    settings = (*TINY, "output_dir=out", "max_steps=1", "resume=auto")
    run(*settings, TEACHER, cwd=cwd)
    (cwd / "moved").symlink_to(made / "teacher")
    longer = (*settings, "max_steps=2")
    for other in (("teacher_dir=base",), (), ("teacher_adapter=adapter",)):
        with pytest.raises(CheckpointError, match="another teacher"):
            run(*longer, *other, cwd=cwd)
    with pytest.raises(CheckpointError, match=r"loss\.kd_ratio: 0\.5 before, 0\.25 now"):
        run(*longer, TEACHER, "kd_ratio=0.25", cwd=cwd)
    assert len(losses(run(*longer, "teacher_dir=moved", cwd=cwd))) == 2


def words_of(folder, words):
    phi3_demo_checkpoint.build_checkpoint(folder, words=words, layers=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*WORDS, *(f"w{n}" for n in range(70))], r"teacher_dir: .*predicts \d+ tokens and the st"),
        (
            [*WORDS[:-1], "eight"],
            r"teacher_dir: .*token \d+ is .* for the student and .* for the teacher",
        ),
    ],
)
def test_another_vocabulary_is_one_error_before_weights_are_loaded(words, message, cwd):
    words_of(cwd / "stranger", words)
    for file in cwd.glob("stranger/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])  # to load them would be another error
    with pytest.raises(ConfigError, match=message):
        run(*TINY, "output_dir=out", "teacher_dir=stranger", cwd=cwd)
    assert not (cwd / "out" / "metrics.jsonl").exists()


def test_tokens_that_a_teacher_does_not_have_are_refused(cwd):
    with pytest.raises(ConfigError, match="'<call>' for the student and none for the teacher"):
        run(*TINY, "output_dir=out", TEACHER, "tokenizer.add_tokens=['<call>']", cwd=cwd)


# torchtune's own recipes.


def told(out):
    (log,) = (out / "logs").iterdir()
    lines = [line for line in log.read_text().splitlines() if "kd_loss:" in line]
    return [
        {name: float(line.split(f" {name}:")[1].split()[0]) for name in ("class_loss", "kd_loss")}
        for line in lines
    ]


def test_the_run_is_that_of_torchtunes_recipe(cwd, monkeypatch):
    """Twenty steps over forty chats in the order of the file.

    Its distance lacks the teacher's own entropy, a constant, which is taken off here. Its gradients
    are divided by the number of tokens once too often, which AdamW does not notice where that is
    the same in each step, and its eps small beside them.
    """
    chats = [chat(number) for number in range(40)]
    for one in chats:
        words = one["messages"][1]["content"].split() * 4
        one["messages"][1]["content"] = " ".join(words[:4])
    (cwd / "equal.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chats), "utf-8")
    settings = (*TINY, TEACHER, "shuffle=False", "epochs=1", "optimizer.eps=1e-20")
    settings += ("dataset.source=equal.jsonl",)
    settings += ("batch_size=2", "gradient_accumulation_steps=1", "kd_ratio=0.4")
    cfg = merged(*at(cwd, settings), "output_dir=stock", cwd=cwd, config=CONFIG)
    stock = stock_module("knowledge_distillation_single_device").KDRecipeSingleDevice(cfg)
    stock.setup(cfg)
    entropies = []

    def with_entropy(student, teacher, labels, loss=stock._kd_loss_fn):
        q = [torch.log_softmax(piece.float(), -1) for piece in teacher]
        entropy = torch.cat([-(piece.exp() * piece).sum(-1) for piece in q], dim=1)
        entropies.append(entropy[labels != -100].mean().item())
        return loss(student, teacher, labels)

    stock._kd_loss_fn = with_entropy
    wrapper = "_checkpoint_wrapped_module."
    start = {
        name.replace(wrapper, ""): p.detach().clone()
        for name, p in stock._model.named_parameters()
        if p.requires_grad
    }
    stock.train()
    monkeypatch.setattr(starting, "initial_adapter", lambda model, seed: start)
    out = run(*settings, "val_fraction=0", "output_dir=out", cwd=cwd)
    theirs = told(cwd / "stock")
    assert len(theirs) == 20
    for line, other, entropy in zip(metrics(out), theirs, entropies, strict=True):
        assert line["sft_loss"] == pytest.approx(other["class_loss"], rel=1e-5)
        assert line["kl"] == pytest.approx(other["kd_loss"] - entropy, rel=1e-5, abs=1e-5)
    same_weights(load_adapter(out / "final"), load_adapter(cwd / "stock" / "epoch_0"))


STOCK = (
    *("checkpoint_dir=base", TEACHER, "output_dir=out", "dataset.source=rows.jsonl", "dtype=fp32"),
    *("batch_size=4", "gradient_accumulation_steps=1", "epochs=2", "optimizer.lr=1e-3"),
    *("max_steps_per_epoch=4", "tokenizer.max_seq_len=96", "optimizer.fused=False", "device=cpu"),
)


def runs_stock(run_recipe, recipe, cwd, *settings):
    done = run_recipe("--config", str(CONFIG), *STOCK, *settings, cwd=cwd, recipe=recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    return cwd / "out"


def test_torchtunes_recipe_trains_resumes_and_ends_in_an_adapter(made, cwd):
    """Its last epoch learns from the weights of before, not from ones with the adapter in them."""
    recipe = "knowledge_distillation_single_device"
    out = runs_stock(tune_run, recipe, cwd)
    losses_of = [line["class_loss"] for line in told(out)]
    assert len(losses_of) == 8 and losses_of[-1] < 0.8 * losses_of[0]
    again = linked(made, cwd / "again", *INPUTS)
    shutil.copytree(out / "epoch_0", again / "out" / "epoch_0")
    resumed = runs_stock(tune_run, recipe, again, "resume_from_checkpoint=True")
    ours, theirs = load_adapter(resumed / "epoch_1"), load_adapter(out / "epoch_1")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    load_with_peft(cwd / "base", out / "epoch_1")


@pytest.mark.parametrize("kind", some(["lora", "qlora", "dora"], quick=()))
def test_torchtunes_distributed_recipe_ends_in_an_adapter(kind, cwd):
    keys = {"qlora": (QLORA, "teacher_quantized=True"), "dora": ("model.use_dora=True",)}
    settings = keys.get(kind, ())
    out = runs_stock(torchrun_stock, "knowledge_distillation_distributed", cwd, *settings)
    assert len(told(out)) == 8
    load_with_peft(cwd / "base", out / "epoch_1")


def test_torchtunes_recipe_is_told_of_another_vocabulary_at_once(cwd):
    words_of(cwd / "stranger", [*WORDS[:-1], "eight"])
    settings = ("--config", str(CONFIG), *STOCK, "teacher_dir=stranger")
    done = tune_run(*settings, cwd=cwd, recipe="knowledge_distillation_single_device")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "has another vocabulary: token " in done.stderr
    assert not (cwd / "out").exists()
