import subprocess
import sys

import pytest
from phi3_plugin.recipes import phi3_demo
from phi3_plugin.recipes import phi3_demo as commands


def run_demo(*arguments, cwd):
    command = [sys.executable, "-m", "phi3_plugin.recipes.phi3_demo", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_demo_learns_and_can_be_repeated(tmp_path):
    done = run_demo(cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    ran = "tune run phi3_lora_finetune", "step 366/366", "tune run phi3_evaluate"
    for said in (*ran, "Exact match, %", "exact match", "Reverse: "):
        assert said in done.stdout
    folder = tmp_path / "demo_run"
    assert {path.name for path in folder.iterdir()} == {phi3_demo.MARK, *commands.CONTENT}
    assert (folder / "finetuned" / "final" / "adapter_model.safetensors").is_file()
    assert (folder / "evaluation" / "evaluation.html").is_file()
    losses = commands.losses(folder / "finetuned")
    assert len(losses) == 6 * 61
    assert losses[0] > 5 > 0.5 > losses[-1]


def test_a_folder_of_somebody_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("all of it")
    assert phi3_demo.main(["--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"--output: {tmp_path} exists and is not an earlier demo run" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_earlier_run_is_replaced_and_a_users_file_in_it_is_not(tmp_path):
    folder = phi3_demo.prepare_output(tmp_path / "run", keep=False)
    (folder / "finetuned" / "epoch_0").mkdir(parents=True)
    (folder / "tune.log").write_text("old")
    (folder / "notes.txt").write_text("mine")
    assert phi3_demo.prepare_output(folder, keep=False) == folder
    assert {path.name for path in folder.iterdir()} == {phi3_demo.MARK, "notes.txt"}


def test_an_earlier_run_is_kept_on_request(tmp_path):
    names = [phi3_demo.prepare_output(tmp_path / "run", keep=True).name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert phi3_demo.main(["--output", str(tmp_path / "file" / "run")]) == 1
    assert capsys.readouterr().err.startswith("\nphi3_demo: --output: ")


def test_training_that_fails_ends_with_the_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(phi3_demo.task, "make_chats", lambda: ([{"no": "chat"}], []))
    assert phi3_demo.main(["--output", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "training ended with exit code 1" in error
    assert f"dataset.source: {tmp_path / 'run' / 'train.jsonl'}" in error


@pytest.mark.parametrize(
    ("before", "after", "code"), [(0.0, 1.0, 0), (0.05, 0.95, 0), (0.06, 1.0, 1), (0.0, 0.94, 1)]
)
def test_exit_code_follows_both_exact_matches(before, after, code, capsys):
    assert phi3_demo.judge((before, after), (before, after), [6.0, 0.1]) == code
    assert ("FAILED" in capsys.readouterr().out) == bool(code)


def test_another_result_in_peft_is_a_failure(capsys):
    assert phi3_demo.judge((0.0, 0.99), (0.0, 1.0), [6.0, 0.1]) == 1
    assert "in PEFT exact match is 0.0% before and 99.0% after" in capsys.readouterr().out


def test_progress_is_shown_and_everything_logged(tmp_path, capsys):
    lines = [
        "step  32/366    8%  loss 6.2500  lr 1.00e-03  99 tok/s",
        "step  64/366  validation loss 6.0000  perplexity 403",
        "noise",
        "step 366/366  100%  loss 0.1000  lr 1.00e-05  99 tok/s",
    ]
    program = f"print({chr(10).join(lines)!r}); raise SystemExit(3)"
    with (tmp_path / "log").open("w") as log:
        assert commands.run([sys.executable, "-c", program], log, commands.progress) == 3
    shown = [line for line in capsys.readouterr().out.split("\n") if line]
    assert [line.split("loss ")[1] for line in shown] == ["6.250", "0.100"]
    assert "noise" in (tmp_path / "log").read_text()


def test_losses_are_read_from_the_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 6.25}\n{"step": 1, "val_loss": 2}\n{"step": 2, "loss": 0.001}\n'
    )
    assert commands.losses(tmp_path) == [6.25, 0.001]
