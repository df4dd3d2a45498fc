"""A run that goes on with other settings: they hold from there on, or are refused, and told."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from phi3_plugin.errors import AdapterError, CheckpointError
from phi3_plugin.options import OnResume, marks
from phi3_plugin.settings import HINTS
from phi3_plugin.train import checkpoints
from phi3_plugin.train.monitor import History
from phi3_plugin.train.optimizer import replay
from phi3_plugin.train.resume import changes_of, moved, record, told
from tests.own import (
    CONFIG,
    RUN,
    leave_until,
    linked,
    metrics,
    started,
    train,
)

HONOURED, FREE, CONTENT, REFUSED = OnResume

OTHERS = {
    "checkpoint_dir": ("elsewhere", CONTENT),
    "output_dir": ("elsewhere", FREE),
    "model.lora_rank": (4, CONTENT),
    "model.lora_dropout": (0.3, HONOURED),
    "model.rope_factors": ("short", REFUSED),
    "tokenizer.max_seq_len": (50, CONTENT),
    "dataset.train_on": ("last", CONTENT),
    "dataset_val": ({"_component_": "phi3_plugin.data.chat_dataset", "source": "v"}, CONTENT),
    "val_fraction": (0.5, CONTENT),
    "batch_size": (7, CONTENT),
    "gradient_accumulation_steps": (7, CONTENT),
    "collate_fn": ("phi3_plugin.data.collate.pad_left", HONOURED),
    "shuffle": (False, CONTENT),
    "group_by_length": (True, CONTENT),
    "seed": (7, CONTENT),
    "init_adapter": ("somebodys", REFUSED),
    "epochs": (7, HONOURED),
    "max_steps": (7, HONOURED),
    "optimizer._component_": ("torch.optim.RAdam", REFUSED),
    "optimizer.lr": (0.7, HONOURED),
    "optimizer.weight_decay": (0.7, HONOURED),
    "optimizer.betas": ([0.7, 0.8], HONOURED),
    "optimizer.eps": (0.7, HONOURED),
    "optimizer.amsgrad": (True, REFUSED),
    "optimizer.maximize": (True, REFUSED),
    "optimizer.fused": (False, FREE),
    "optimizer.foreach": (True, FREE),
    "lr_scheduler": (None, HONOURED),
    "lr_scheduler.warmup_ratio": (0.7, HONOURED),
    "lora_plus_ratio": (7, HONOURED),
    "clip_grad_norm": (0.7, HONOURED),
    "loss": ({"_component_": "phi3_plugin.train.losses.dpo", "beta": 0.2}, REFUSED),
    "reference": ("cached", FREE),
    "teacher_dir": ("elsewhere", CONTENT),
    "teacher_adapter": ("somebodys", CONTENT),
    "teacher_quantized": (True, REFUSED),
    "max_nonfinite_steps": (7, FREE),
    "dtype": ("fp32", REFUSED),
    "adapter_dtype": ("bf16", REFUSED),
    "device": ("cpu", FREE),
    "neftune_alpha": (5.0, HONOURED),
    "compile": (True, FREE),
    "enable_activation_checkpointing": (7, FREE),
    "memory_budget": ("7GiB", FREE),
    "enable_activation_offloading": (True, FREE),
    "fsdp_cpu_offload": (True, FREE),
    "fsdp_reshard_after_forward": (False, FREE),
    "fsdp_replicas": (7, FREE),
    "save_every_n_steps": (7, FREE),
    "save_every_epoch": (False, FREE),
    "save_total_limit": (7, FREE),
    "save_in_background": (True, FREE),
    "resume": ("auto", FREE),
    "checkpointer": ({"card": {"data": "mine"}}, FREE),
    "run_val_every_n_steps": (7, HONOURED),
    "early_stop_patience": (7, HONOURED),
    "keep_best": (False, FREE),
    "metric_logger": (None, FREE),
    "log_every_n_steps": (7, FREE),
    "sample_prompts": (["Why?"], HONOURED),
    "sample_max_new_tokens": (7, FREE),
    "plan": (True, FREE),
    "report": (False, FREE),
    "prove": (False, FREE),
    "push_to_hub": ("user/name", FREE),
}
"""Every key of a run, and the parts of its sections that differ from the section: another value
than that of the config, and what becomes of it."""


def given(**more):
    cfg = OmegaConf.load(CONFIG)
    cfg.update(checkpoint_dir="base", output_dir="out")
    cfg.dataset.source = "rows.jsonl"
    return OmegaConf.merge(cfg, OmegaConf.create(more))


@pytest.mark.parametrize("key", OTHERS)
def test_every_key_is_honoured_or_free_or_refused(key):
    value, expected = OTHERS[key]
    cfg = given()
    OmegaConf.update(cfg, key, value, force_add=True, merge=False)
    changes = changes_of(record(given()), record(cfg))
    if key == "checkpoint_dir":  # the hash of the weights decides
        assert changes == []
        return
    assert {c.mark for c in changes} == ({expected} - {FREE})
    if expected is not FREE and not isinstance(value, dict):
        (change,) = [c for c in changes if c.key == key]
        assert change.after == value


def test_the_table_has_every_key_and_each_key_one_mark():
    assert {key.split(".")[0] for key in OTHERS} == {*HINTS}
    assert [key for key, hint in HINTS.items() if len(marks(hint, OnResume)) != 1] == []


@pytest.mark.parametrize("mark", OnResume)
def test_the_documentation_says_which(mark):
    text = (CONFIG.parents[1] / "docs" / "recipe.md").read_text("utf-8")
    (row,) = re.findall(rf"^\| {mark.value} \|(.*)\|$", text, re.M)
    for key, (_, expected) in OTHERS.items():
        name = f"`{key.removesuffix('._component_')}`"
        assert (name in row) == (expected is mark) or "." in key, key


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"max_nonfinite_steps": 3}),
        ({}, {"optimizer": {"betas": [0.9, 0.999]}}),
        ({"optimizer": {"weight_decay": 1}}, {"optimizer": {"weight_decay": 1.0}}),
        ({"seed": None}, {"seed": 0}),
        ({"adapter_dtype": None}, {"adapter_dtype": "bf16"}),
        ({}, {"adapter_dtype": "fp32", "run_val_every_n_steps": 50, "resume": "auto"}),
        ({"model": {"lora_init": "kaiming"}}, {}),
        ({}, {"sample_prompts": []}),
        ({"init_adapter": "gone"}, {}),
        ({"lr_scheduler": {"_component_": None}}, {"lr_scheduler": None}),
    ],
)
def test_what_is_the_same_in_other_words_is_no_change(before, after):
    assert changes_of(record(given(**before)), record(given(**after))) == []


def test_a_component_of_somebody_elses_is_compared_by_its_arguments():
    own = {"_component_": "builders.make", "width": 4}
    (change,) = changes_of(
        record(given(model={**own, "gain": 1.0})), record(given(model={**own, "gain": 2.0}))
    )
    assert (change.key, change.mark) == ("model.gain", REFUSED)


def test_the_base_may_be_elsewhere():
    changes = changes_of(record(given()), record(given(checkpoint_dir="moved")))
    assert [change.key for change in changes] == []


def test_a_value_of_the_environment_is_noticed_and_not_kept(monkeypatch):
    lr = {"optimizer": {"lr": "${oc.decode:${oc.env:RATE}}"}}
    kept = []
    for rate in ("0.125", "0.125", "0.25"):
        monkeypatch.setenv("RATE", rate)
        kept.append(record(given(**lr)))
    assert changes_of(kept[0], kept[1]) == []
    (change,) = changes_of(kept[1], kept[2])
    assert change.key == "optimizer.lr" and change.mark is HONOURED
    assert "0.125" not in json.dumps(kept)


def test_a_record_tells_every_value_and_since_when():
    changes = [
        {"step": 4, "key": "a", "before": 1, "after": 2},
        {"step": 6, "key": "b", "before": None, "after": "x"},
        {"step": 8, "key": "a", "before": 2, "after": 3},
    ]
    assert told(changes) == {
        "a": "1; from step 5 on 2; from step 9 on 3",
        "b": "null; from step 7 on 'x'",
    }


# Whole runs of nine steps


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of every file that is no lock."""
    paths = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock"))
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


@pytest.mark.slow
def test_what_is_honoured_holds_from_there_on_and_is_told(whole, cwd):
    leave_until(4, whole, cwd / "out")
    keys = ("optimizer.lr=5e-5", "optimizer.weight_decay=0.9", "optimizer.betas=[0.5,0.6]")
    more = ("model.lora_dropout=0.3", "lora_plus_ratio=4", "clip_grad_norm=0.5", "report=True")
    recipe = train(cwd, *keys, *more, "lr_scheduler=null", "sample_prompts=[two]", "resume=auto")
    slow, fast = recipe.optimizer.param_groups
    assert (slow["lr"], fast["lr"]) == (5e-5, 2e-4)
    for group in (slow, fast):
        assert (tuple(group["betas"]), group["weight_decay"]) == ((0.5, 0.6), 0.9)
    assert {line["lr"] for line in metrics(cwd / "out")[4:]} == {5e-5}
    assert {line["lr"] for line in metrics(whole)[:4]} == {
        line["lr"] for line in metrics(cwd / "out")[:4]
    }
    events = History.read(cwd / "out" / "metrics.jsonl")
    changed = {line["key"]: line["step"] for line in events if line.get("event") == "changed"}
    assert {*changed.values()} == {4}
    assert {"optimizer.lr", "lr_scheduler", "lora_plus_ratio", "model.lora_dropout"} < {*changed}
    expected = "0.001; from step 5 on 5e-05"
    assert expected in (cwd / "out" / "report.html").read_text("utf-8")
    assert f"| optimizer.lr | {expected} |" in (cwd / "out/final/README.md").read_text("utf-8")
    # The record stays, and what holds now is what a repetition is compared with
    before = files(cwd / "out")
    with started(
        *RUN, *keys, *more, "lr_scheduler=null", "sample_prompts=[two]", "resume=auto", cwd=cwd
    ) as again:
        again.train()
        again.finish()
    assert again.finished and files(cwd / "out") == before
    # A schedule where there was none: its rate after nine of twelve steps
    recipe = train(cwd, *keys, *more, "sample_prompts=[one,two]", "epochs=4", "resume=auto")
    assert [line["step"] for line in metrics(cwd / "out")] == [*range(1, 13)]
    assert 0 < metrics(cwd / "out")[9]["lr"] < 5e-5
    assert recipe.optimizer.param_groups[0]["lr"] == 0


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_no_file(whole, cwd, capsys):
    shutil.copytree(whole, cwd / "out")
    before = files(cwd / "out")
    with started(*RUN, "resume=auto", "save_every_n_steps=5", cwd=cwd) as recipe:
        recipe.train()
        recipe.finish()
    assert "finished after 9 steps" in capsys.readouterr().out
    with (
        pytest.raises(CheckpointError, match="finished run of 9 steps") as caught,
        started(
            *RUN,
            "resume=auto",
            "optimizer.lr=5e-3",
            "model.lora_dropout=0.3",
            "dtype=bf16",
            cwd=cwd,
        ),
    ):
        pass
    for line in ("optimizer.lr: 0.001 before, 0.005 now", "lora_dropout", "dtype", "max_steps"):
        assert line in str(caught.value)
    with (
        pytest.raises(CheckpointError, match=r"max_steps: null before, 9 now"),
        started(*RUN, "resume=auto", "max_steps=9", "epochs=7", cwd=cwd),
    ):
        pass
    assert files(cwd / "out") == before


@pytest.mark.slow
def test_a_longer_run_starts_at_the_rate_of_its_own_schedule(whole, cwd):
    shutil.copytree(whole, cwd / "out")
    assert metrics(whole)[-1]["lr"] < 1e-4
    with started(*RUN, "resume=auto", "epochs=6", cwd=cwd) as recipe:
        rate = recipe.optimizer.param_groups[0]["lr"]
    with started(*RUN, "output_dir=new", "epochs=6", cwd=cwd) as fresh:
        replay(fresh.scheduler, 9)
    assert rate == fresh.optimizer.param_groups[0]["lr"] > 5e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dtype=bf16", "dtype: 'fp32' before, 'bf16' now"),
        ("adapter_dtype=bf16", "adapter_dtype: 'fp32' before, 'bf16' now"),
        ("optimizer.amsgrad=True", r"optimizer\.amsgrad: False before, True now"),
        ("max_steps=1", "has made 2 steps, and the run is to have 1"),
    ],
)
def test_what_cannot_change_is_refused_by_name(setting, message, whole, cwd):
    leave_until(2, whole, cwd / "out")
    with (
        pytest.raises(CheckpointError, match=message),
        started(*RUN, setting, "resume=auto", cwd=cwd),
    ):
        pass


@pytest.mark.slow
def test_other_validation_data_is_refused(whole, cwd):
    leave_until(2, whole, cwd / "out")
    with started(*RUN, "resume=auto", cwd=cwd) as recipe:
        order_val = recipe.data.order_val
        saved = {**recipe.state_dict({}), "held_out": {"samples": 1, "content": "x"}}
        with pytest.raises(CheckpointError, match="validation data would change from"):
            recipe.check_data(saved)
        recipe.data = type(recipe.data)(**{**vars(recipe.data), "order_val": None})
        with pytest.raises(CheckpointError, match="validation data would change from"):
            recipe.check_data({**saved, "held_out": {"samples": len(order_val.dataset)}})


# A state that is damaged


def rewritten(damage):
    """Return what writes a state anew, with the hash that belongs to it."""

    def write(folder):
        file = folder / checkpoints.STATE
        state = torch.load(file, weights_only=True)
        damage(state, file)
        files = {checkpoints.STATE: hashlib.sha256(file.read_bytes()).hexdigest()}
        (folder / checkpoints.HASHES).write_text(json.dumps({"step": 2, "files": files}))

    return write


def without(state, file):
    del state["random"]
    torch.save(state, file)


def of_other_types(state, file):
    state["train"]["answers_before"] = ["Yes."]
    state["optimizer"]["state"] = None
    torch.save(state, file)


def of_other_data(state, file):
    state["data"]["samples"] = torch.ones(3)
    torch.save(state, file)


def of_another_step(state, file):
    state["train"]["step"] = -7
    torch.save(state, file)


def of_another_shape(state, file):
    state["adapter"]["trained"] = {name: t[:1] for name, t in state["adapter"]["trained"].items()}
    torch.save(state, file)


def a_list(state, file):
    torch.save([state], file)


def no_archive(state, file):
    file.write_text("<html>")


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [without, of_other_types, of_other_data, of_another_step, of_another_shape, a_list, no_archive],
)
def test_a_state_that_is_none_is_one_error_that_names_it(damage, whole, cwd):
    leave_until(2, whole, cwd / "out")
    rewritten(damage)(cwd / "out" / "step_000002")
    before = files(cwd / "out")
    with (
        pytest.raises(CheckpointError, match=r"step_000002") as caught,
        started(*RUN, "resume=auto", cwd=cwd),
    ):
        pass
    assert "state.pt" in str(caught.value) or damage is of_another_shape
    assert files(cwd / "out") == before


@pytest.mark.slow
def test_a_state_that_is_cut_short_is_passed_over_for_the_one_before_it(whole, cwd, capsys):
    leave_until(2, whole, cwd / "out")
    file = cwd / "out" / "step_000002" / checkpoints.STATE
    file.write_bytes(file.read_bytes()[:1000])
    with started(*RUN, "resume=auto", cwd=cwd) as recipe:
        assert recipe.state.step == 1
    said = capsys.readouterr().err
    assert f"resume: skipped {file.parents[1]}: resume/state.pt has changed" in said


# Another base of equal shapes


@pytest.fixture
def elsewhere(cwd):
    """A base of the same config.json and other weights."""
    shutil.copytree(cwd / "base", cwd / "other")
    for file in (cwd / "other").glob("*.safetensors"):
        weights = {name: value + 0.01 for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    return "checkpoint_dir=other"


@pytest.mark.slow
def test_a_run_does_not_go_on_over_another_base(whole, elsewhere, cwd):
    leave_until(2, whole, cwd / "out")
    with (
        pytest.raises(CheckpointError, match="trained over other base weights than those of"),
        started(*RUN, "resume=auto", elsewhere, cwd=cwd),
    ):
        pass
    shutil.copytree(cwd / "base", cwd / "moved")
    with started(*RUN, "resume=auto", "checkpoint_dir=moved", cwd=cwd) as recipe:
        assert recipe.differences == [] or moved(recipe.differences)


@pytest.mark.slow
def test_an_adapter_of_another_base_is_not_trained_on(whole, elsewhere, cwd):
    adapter = f"init_adapter={whole / 'final'}"
    with (
        pytest.raises(AdapterError, match=r"init_adapter: .* was made for other weights than"),
        started(*RUN, adapter, elsewhere, cwd=cwd),
    ):
        pass
    with started(*RUN, adapter, cwd=cwd):
        pass


@pytest.mark.slow
def test_questions_may_change(whole, cwd):
    """Their answers before training are not known, and nothing else is shown in their place."""
    leave_until(8, whole, cwd / "out")
    train(cwd, "sample_prompts=[one,two]", "report=True", "resume=auto")
    page = (cwd / "out" / "report.html").read_text("utf-8")
    assert page.count("no answer") >= 2


@pytest.mark.slow
def test_equal_runs_write_equal_files(whole, cwd):
    linked(cwd, cwd / "again")
    for folder in (cwd, cwd / "again"):
        train(folder, "max_steps=2")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = (folder / "out" / "final" / name for folder in (cwd, cwd / "again"))
        assert one.read_bytes() == other.read_bytes()
