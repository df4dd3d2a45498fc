"""A run that was stopped ends in the same bits as one that was not."""

import shutil

import pytest

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.errors import CheckpointError
from phi3_plugin.train import checkpoints as run
from phi3_plugin.train.monitor import History
from tests.chosen import some
from tests.own import (
    RUN,
    assert_same_end,
    full_config,
    leave_until,
    lines,
    linked,
    own_run,
    same,
    started,
    state,
    train,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("step", some(range(1, 9), quick={1, 3, 4, 8}))
def test_a_run_stopped_after_any_step_ends_in_the_same_bits(step, whole, cwd):
    leave_until(step, whole, cwd / "out")
    recipe = train(cwd, "resume=auto")
    assert recipe.last.folder == cwd / "out" / run.step_name(step)
    assert_same_end(cwd / "out", whole)


def test_a_run_killed_between_its_last_validation_and_its_last_save_does_too(whole, cwd):
    leave_until(9, whole, cwd / "out")
    shutil.rmtree(cwd / "out" / "step_000008")
    recipe = train(cwd, "resume=auto")
    assert recipe.last.folder == cwd / "out" / "best"
    assert_same_end(cwd / "out", whole)


def test_a_finished_run_stays_as_it_is(whole, cwd):
    shutil.copytree(whole, cwd / "out")
    recipe = train(cwd, "resume=auto")
    assert recipe.last.folder == cwd / "out" / "final"
    assert_same_end(cwd / "out", whole)


def test_a_run_that_stopped_improving_does_not_go_on(cwd):
    early = ("optimizer.lr=1.0", "early_stop_patience=1")
    train(cwd, *early)
    stopped = state(cwd / "out" / "final")
    assert stopped["step"] < 9
    expected = lines(cwd / "out")
    for folder in ("final", f"step_{stopped['step']:06d}"):
        train(cwd, *early, "resume=auto")
        assert same(state(cwd / "out" / "final"), stopped)
        assert lines(cwd / "out") == expected
        shutil.rmtree(cwd / "out" / folder)


@pytest.mark.parametrize(
    "settings",
    [
        ("model.use_dora=True", "dtype=bf16", "lora_plus_ratio=4"),
        ("model._component_=phi3_plugin.models.qlora_phi3", "enable_activation_checkpointing=True"),
        ("optimizer={_component_: torch.optim.SGD, lr: 0.1, momentum: 0.9}", "lr_scheduler=null"),
        ("save_in_background=True",),
    ],
    ids=["dora", "nf4", "sgd", "background"],
)
def test_every_kind_of_run_does(settings, cwd):
    train(cwd, *settings, "epochs=1")
    linked(cwd, cwd / "again")
    leave_until(1, cwd / "out", cwd / "again" / "out")
    train(cwd / "again", *settings, "epochs=1", "resume=auto")
    assert_same_end(cwd / "again" / "out", cwd / "out")


@pytest.mark.parametrize("setting", ["seed=1", "batch_size=2", "shuffle=False", "val_fraction=0.4"])
def test_another_order_of_the_data_is_refused(setting, whole, cwd):
    leave_until(2, whole, cwd / "out")
    with (
        pytest.raises(CheckpointError, match="resume: the order of the data would change from"),
        started(*RUN, setting, "resume=auto", cwd=cwd),
    ):
        pass


def test_other_content_of_as_many_samples_is_refused(whole, cwd):
    leave_until(2, whole, cwd / "out")
    rows = (cwd / "rows.jsonl").read_text("utf-8").splitlines(keepends=True)
    (cwd / "rows.jsonl").unlink()
    rows[5] = rows[5].replace("Add:", "plus")
    (cwd / "rows.jsonl").write_text("".join(rows), "utf-8")
    with (
        pytest.raises(CheckpointError, match="resume: the order of the data would change from"),
        started(*RUN, "resume=auto", cwd=cwd),
    ):
        pass


def test_a_base_in_another_precision_is_refused(whole, cwd):
    leave_until(2, whole, cwd / "out")
    with (
        pytest.raises(CheckpointError, match="base weights not in NF4, but now they are"),
        started(*RUN, "model.quantize_base=True", "resume=auto", cwd=cwd),
    ):
        pass


def test_a_named_checkpoint_is_gone_on_from(whole, cwd):
    leave_until(3, whole, cwd / "out")
    recipe = train(cwd, f"resume={cwd / 'out' / 'step_000003'}")
    assert recipe.last.folder == cwd / "out" / "step_000003"
    resumed = [line for line in History.read(cwd / "out" / "metrics.jsonl") if "event" in line]
    assert {"event": "resumed", "step": 3, "folder": "step_000003"} in resumed
    assert_same_end(cwd / "out", whole)


def test_one_process_goes_on_where_two_stopped(cwd):
    """With twice the micro-batches: the same samples in each step, summed in another order."""
    settings = ("model.lora_dropout=0.0", "run_val_every_n_steps=3", "epochs=2")
    two = (*RUN, *settings, "gradient_accumulation_steps=1", "output_dir=two")
    done = own_run(*two, cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    leave_until(4, cwd / "two", cwd / "out")
    recipe = train(cwd, *settings, "resume=auto")
    assert recipe.last.folder.name == "step_000004"
    ours, theirs = lines(cwd / "out"), lines(cwd / "two")
    assert len(ours) == len(theirs) == 6 + 2
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_a_whole_model_ends_in_the_same_bits(cwd):
    config = full_config(cwd)
    settings = [s for s in RUN if not s.startswith("model.")] + ["epochs=1", "keep_best=False"]
    for output, more in (("whole", ()), ("out", ("resume=auto",))):
        if more:
            leave_until(1, cwd / "whole", cwd / "out")
        with started(*settings, f"output_dir={output}", *more, cwd=cwd, config=config) as recipe:
            recipe.train()
            recipe.finish()
    assert recipe.last.folder.name == "step_000001"
    weights = [dict(load_base_weights(cwd / name / "final")) for name in ("out", "whole")]
    assert same(*weights)
    assert same(*(state(cwd / name / "final") for name in ("out", "whole")))
    assert lines(cwd / "out") == lines(cwd / "whole")
