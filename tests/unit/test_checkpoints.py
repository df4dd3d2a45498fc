"""The checkpoints of a run: whole or absent, hashed, and never the wrong one."""

import copy
import json
import threading
from pathlib import Path

import pytest
import torch
from phi3_plugin.recipes.lora_finetune import TrainState

from phi3_plugin.errors import CheckpointError, MissingFileError, OutputError
from phi3_plugin.train import checkpoints as run

STATE = {
    "adapter": {},
    "optimizer": {"w": torch.arange(4.0)},
    "best": float("inf"),
    "scheduler": None,
}


class Kill(BaseException):
    """What a SIGKILL is to the code that it interrupts: nothing after it runs."""


def write(folder, text="weights"):
    (folder / "adapter_model.safetensors").write_text(text)
    (folder / "README.md").write_text("card")


def save(output_dir, name, step, text="weights"):
    run.save(output_dir / name, step, lambda folder: write(folder, text), STATE, replace=True)
    return output_dir / name


def weights(folder):
    return (folder / "adapter_model.safetensors").read_text()


@pytest.fixture
def two(tmp_path):
    save(tmp_path, "step_000001", 1)
    save(tmp_path, "step_000002", 2)
    return tmp_path


def test_state_comes_back_with_its_step(tmp_path):
    folder = save(tmp_path / "out", run.step_name(7), 7)
    state = run.load_state(folder, {"step": int, "optimizer": {"w": torch.Tensor}})
    assert folder.name == "step_000007"
    assert state["step"] == 7
    assert torch.equal(state["optimizer"]["w"], STATE["optimizer"]["w"])
    assert run.find(tmp_path / "out", "auto") == (folder, {})


def test_auto_starts_anew_where_there_is_nothing(tmp_path):
    assert run.find(tmp_path / "none", "auto") == (None, {})
    assert run.find(tmp_path / "none", "never") == (None, {})


def test_auto_takes_the_most_steps_whatever_the_folder_is_called(two):
    save(two, run.BEST, 1)
    assert run.find(two, "auto").folder.name == "step_000002"
    save(two, run.BEST, 3)
    assert run.find(two, "auto").folder.name == "best"
    save(two, "step_000003", 3)
    assert run.find(two, "auto").folder.name == "step_000003"
    save(two, run.FINAL, 3)
    assert run.find(two, "auto").folder.name == "final"
    save(two, "step_1000000", 1000000)
    assert run.find(two, "auto").folder.name == "step_1000000"


def changed(folder):
    file = folder / "resume" / "state.pt"
    data = bytearray(file.read_bytes())
    data[-30] ^= 1  # as long as before
    file.write_bytes(data)


def truncated(folder):
    file = folder / "resume" / "state.pt"
    file.write_bytes(file.read_bytes()[:-1])


def missing(folder):
    (folder / "resume" / "state.pt").unlink()


def unhashed(folder):
    (folder / "resume" / "hashes.json").unlink()


def half_hashed(folder):
    file = folder / "resume" / "hashes.json"
    file.write_text(file.read_text()[:40])


def emptied(folder):
    (folder / "resume" / "hashes.json").write_text('{"step": 2, "files": {}}')


DAMAGES = {
    changed: "resume/state.pt has changed since it was written",
    truncated: "resume/state.pt has changed since it was written",
    missing: "resume/state.pt is missing",
    unhashed: "resume/hashes.json is missing or damaged",
    half_hashed: "resume/hashes.json is missing or damaged",
    emptied: "resume/hashes.json does not name resume/state.pt",
}


@pytest.mark.parametrize(
    ("damage", "reason"), DAMAGES.items(), ids=lambda d: getattr(d, "__name__", "")
)
def test_a_damaged_checkpoint_is_skipped_by_auto_and_refused_by_name(damage, reason, two):
    newest = two / "step_000002"
    damage(newest)
    assert run.find(two, "auto") == (two / "step_000001", {newest: reason})
    with pytest.raises(CheckpointError, match=f"resume: .*step_000002 cannot be .*: {reason}"):
        run.find(two, str(newest))


def test_all_damaged_starts_anew_and_says_why(two):
    for folder in two.iterdir():
        missing(folder)
    found = run.find(two, "auto")
    assert found.folder is None
    assert [folder.name for folder in found.passed_over] == ["step_000002", "step_000001"]


def test_what_no_resume_reads_may_be_edited(two):
    newest = two / "step_000002"
    (newest / "README.md").write_text("card, and a line of mine")
    (newest / "adapter_model.safetensors").unlink()
    assert run.find(two, "auto") == (newest, {})


def test_the_weights_of_a_whole_model_are_read_by_a_resume(tmp_path):
    state = {key: value for key, value in STATE.items() if key != "adapter"}

    def export(folder):
        (folder / "model.safetensors").write_text("weights")

    run.save(tmp_path / "final", 1, export, state, replace=True)
    (tmp_path / "final" / "model.safetensors").write_text("Weights")
    assert run.find(tmp_path, "auto").folder is None


@pytest.mark.parametrize("background", [False, True])
def test_what_was_passed_over_is_neither_replaced_nor_removed(background, two):
    save(two, run.FINAL, 2)
    for name in ("step_000001", "step_000002", run.FINAL):
        missing(two / name)
    last = run.find(two, "auto")
    assert last.folder is None
    saver = run.Saver(
        two, 1, lambda name, step: None, passed_over=last.passed_over, background=background
    )
    for step, name in enumerate(["step_000001", "step_000003", "step_000004", run.FINAL], 1):
        saver.save(name, step, lambda folder: write(folder, "new"), STATE)
    saver.wait()
    kept = ["step_000001.passed-over", "step_000002", "final.passed-over"]
    assert [weights(two / name) for name in kept] == ["weights"] * 3
    names = {path.name for path in two.iterdir()}
    assert names == {*kept, "step_000004", run.FINAL}


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"resume: .*step_000009 is not a folder"):
        run.find(tmp_path, str(tmp_path / "step_000009"))


@pytest.mark.parametrize("name", ["step_000001", "best", "final"])
def test_never_refuses_a_folder_that_holds_a_run(name, tmp_path):
    save(tmp_path, name, 1)
    with pytest.raises(OutputError, match=rf"holds the checkpoints of another run \({name}\)"):
        run.find(tmp_path, "never")


def test_never_ignores_what_is_no_checkpoint(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "step_one").mkdir()
    (tmp_path / ".partial-step_000001").mkdir()
    assert run.find(tmp_path, "never").folder is None


def test_an_older_checkpoint_is_not_gone_on_from_beside_newer_ones(two, tmp_path):
    older, newer = two / "step_000001", two / "step_000002"
    with pytest.raises(OutputError, match=r"resume: .*step_000001 is older than step_000002"):
        run.find(two, str(older))
    assert run.find(two, str(newer)) == (newer, {})
    assert run.find(tmp_path / "elsewhere", str(older)) == (older, {})
    newer.rename(tmp_path / "moved away")
    assert run.find(two, str(older)) == (older, {})


def test_another_runs_checkpoint_is_not_gone_on_from_among_ones_own(two, tmp_path):
    other = save(tmp_path / "other", "step_000009", 9)
    with pytest.raises(OutputError, match=r"holds the checkpoints of another run \(step_000002"):
        run.find(two, str(other))


def test_prune_keeps_the_newest_steps_and_best_and_final(tmp_path):
    for step in (2, 10, 999999, 1000000):
        save(tmp_path, run.step_name(step), step)
    save(tmp_path, run.BEST, 2)
    save(tmp_path, run.FINAL, 10)
    run.prune(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 6
    run.prune(tmp_path, 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best", "final", "step_1000000", "step_999999"]


def test_a_kill_while_pruning_leaves_no_half_checkpoint(two, monkeypatch):
    def kill(*_, **__):
        raise Kill

    monkeypatch.setattr(run.shutil, "rmtree", kill)
    with pytest.raises(Kill):
        run.prune(two, 1)
    monkeypatch.undo()
    assert sorted(p.name for p in two.iterdir()) == [".partial-step_000001", "step_000002"]
    save(two, "step_000003", 3)
    assert sorted(p.name for p in two.iterdir()) == ["step_000002", "step_000003"]


def test_a_replacement_that_was_killed_is_put_back_and_swept(two):
    save(two, run.FINAL, 3, "old")
    (two / "final").rename(two / ".partial-old-final")
    (two / ".partial-final").mkdir()
    with pytest.raises(OutputError, match=r"holds the checkpoints of another run \(final, "):
        run.find(two, "never")
    assert run.find(two, "auto") == (two / "final", {})
    assert weights(two / "final") == "old"
    save(two, run.FINAL, 4, "new")
    assert sorted(p.name for p in two.iterdir()) == ["final", "step_000001", "step_000002"]


def test_a_full_disk_while_the_state_is_written_is_one_error(two, monkeypatch):
    monkeypatch.setattr(run, "STATE", "/dev/full")
    with pytest.raises(OutputError, match=r"step_000003 could not be written: .*No space left"):
        save(two, "step_000003", 3)
    assert sorted(path.name for path in two.iterdir()) == ["step_000001", "step_000002"]


def test_a_state_that_would_run_code_is_refused(two):
    class Trap:
        def __reduce__(self):
            return (Path(two / "sprung").touch, ())

    state = two / "step_000002" / "resume" / "state.pt"
    torch.save({"step": 2, "optimizer": Trap()}, state)
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        run.load_state(two / "step_000002", {})
    assert not (two / "sprung").exists()


def test_hashes_name_what_a_resume_reads(two):
    hashes = json.loads((two / "step_000002" / "resume" / "hashes.json").read_text())
    assert hashes["step"] == 2
    assert list(hashes["files"]) == ["resume/state.pt"]


# The saver


class Writer:
    """Writes a checkpoint's only file once it is let; notes in which thread."""

    def __init__(self, error=None):
        self.gate, self.error, self.thread = threading.Event(), error, None

    def __call__(self, folder):
        assert self.gate.wait(timeout=30)
        self.thread = threading.current_thread()
        if self.error:
            raise self.error
        (folder / "adapter_model.safetensors").write_text("weights")


@pytest.fixture
def told():
    return []


@pytest.fixture
def saver(tmp_path, told):
    return run.Saver(tmp_path, 1, lambda *saved: told.append(saved), background=True)


def test_training_waits_unless_it_is_told_not_to(tmp_path, told):
    writer = Writer()
    writer.gate.set()
    saver = run.Saver(tmp_path, None, lambda *saved: told.append(saved), background=False)
    saver.save("step_000001", 1, writer, {})
    assert told == [("step_000001", 1)]
    assert writer.thread is threading.main_thread()


def test_in_the_background_training_goes_on_at_once(tmp_path, saver, told):
    writer = Writer()
    saver.save("step_000001", 1, writer, STATE)
    assert told == []
    assert not (tmp_path / "step_000001").exists()
    writer.gate.set()
    saver.wait()
    assert told == [("step_000001", 1)]
    assert writer.thread is not threading.main_thread()


def test_one_is_written_after_the_other_and_the_oldest_goes(tmp_path, saver, told):
    for step in (1, 2, 3):
        writer = Writer()
        writer.gate.set()
        saver.save(run.step_name(step), step, writer, {})
        assert told == [(run.step_name(n), n) for n in range(1, step)]
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_what_could_not_be_written_stops_the_run_at_the_next_save(tmp_path, saver, told):
    full = Writer(OSError(28, "No space left on device"))
    full.gate.set()
    saver.save("step_000001", 1, full, {})
    with pytest.raises(OutputError, match=r"step_000001 could not be written: .*No space left"):
        saver.save("step_000002", 2, Writer(), {})
    assert list(tmp_path.iterdir()) == told == []
    saver.wait()  # said once


WHOLE = {
    "step": 1,
    "optimizer": {"kind": "AdamW", "state": {}},
    "random": [],
    "train": {
        **{"step": 1, "best": 0.5, "stale": 0, "validated": 0},
        **{"answers_before": {}, "changes": []},
    },
    "data": {},
    "held_out": None,
    "base_hash": "",
    "settings": {"model": {}},
}


def put(state, path, value=...):
    *first, last = path.split(".")
    for key in first:
        state = state[key]
    if value is ...:
        del state[last]
    else:
        state[last] = value


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        *((key, ..., f"{key}: is missing") for key in WHOLE),
        ("train.step", ..., "train.step: is missing"),
        ("train.step", "3", "train.step: is a str, expected int"),
        ("settings.model", 3, "settings.model: is a int, expected dict"),
        ("optimizer", torch.ones(1), "optimizer: is a Tensor, expected dict"),
        ("random", None, "random: is a NoneType, expected list"),
    ],
)
def test_a_state_without_a_key_or_of_another_kind_is_one_error(tmp_path, path, value, problem):
    state = copy.deepcopy(WHOLE)
    put(state, path, value)
    (tmp_path / "resume").mkdir()
    torch.save(state, tmp_path / run.STATE)
    with pytest.raises(CheckpointError, match=rf"state\.pt is no state of a run:\n  {problem}\n"):
        run.load_state(tmp_path, run.RUN_STATE)


def test_a_state_from_before_fp16_is_gone_on_with(tmp_path):
    (tmp_path / "resume").mkdir()
    torch.save(WHOLE, tmp_path / run.STATE)
    train = run.load_state(tmp_path, run.RUN_STATE)["train"]
    assert TrainState(**train).skipped == 0


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("y"), RuntimeError("z")])
def test_what_fails_while_a_state_is_taken_names_the_file(tmp_path, error):
    named = pytest.raises(CheckpointError, match=rf"state\.pt is no state .*{type(error).__name__}")
    with named, run.going_on(tmp_path):
        raise error
    with pytest.raises(type(error)), run.going_on(None):
        raise error
