"""benchmarks/gpu.py: every part of it at a tiny size on the CPU, and what it does with bad ones."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from tests import warm
from tests.chosen import some

TINY = gpu.parts(gpu.arguments().parse_args(["tokenizer", "rows", "--tiny"]), "")
QUICK = {"LoRA, recomputed", "QLoRA, recomputed", "Attention"}
FIGURES = {"Tests": " skipped", "Answers": " x |"}
"""What stands in the output of a part that has no table in the form of the others."""


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Long enough to fill packs."""
    file = tmp_path_factory.mktemp("chats") / "rows.jsonl"
    rows = [{"question": "one " * (20 + n), "answer": "two " * (30 + n)} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.mark.parametrize("title", some([part.title for part in TINY], QUICK))
def test_a_part_runs_at_a_tiny_size(title, inputs, chats):
    args = gpu.arguments().parse_args([str(inputs / "base"), str(chats), "--tiny"])
    command = next(part.command for part in gpu.parts(args, "") if part.title == title)
    done = warm.run("python", *command[1:], cwd=gpu.ROOT)
    assert done.returncode == 0, done.stderr
    assert FIGURES.get(title, "\n| --- |") in done.stdout
    assert "Failed" not in done.stdout and "nan" not in done.stdout


@pytest.mark.exhaustive
def test_one_command_runs_them(inputs, chats, tmp_path):
    where = "--out", tmp_path / "gpu.md", "--part", "Attention", "--part", "Tests"
    words = "-m", "benchmarks.gpu", inputs / "base", chats, "--tiny", *where
    done = warm.run("python", *words, cwd=gpu.ROOT)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "gpu.md").read_text("utf-8")
    assert text.index("torchtune 0.6.1") < text.index("## Tests") < text.index("| FlexAttention |")


def part(title, code, seconds=60.0):
    return gpu.Part(title, seconds, [sys.executable, "-S", "-c", code])


HANGS = """
import subprocess, time
print("half", subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


def test_what_hangs_or_fails_ends_no_other(tmp_path):
    file, parts = (
        tmp_path / "gpu.md",
        [
            part("Broken", "print('| a |'); raise ValueError('no kernel')"),
            part("Hangs", HANGS, seconds=1.0),
            part("Whole", "print('setting\\n\\n| a |\\n| --- |')"),
        ],
    )
    assert gpu.conduct(parts, file, 60) == ["Broken", "Hangs"]
    broken, hangs, whole = file.read_text("utf-8").split("\n## ")[1:]
    assert "Ended with 1." in broken and "ValueError: no kernel" in broken
    assert "Killed after 1 s." in hangs
    assert whole.endswith("setting\n\n| a |\n| --- |\n\n")
    child = Path("/proc") / hangs.split("half ")[1].split()[0] / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_without_time_a_part_does_not_begin(tmp_path):
    assert gpu.conduct([part("Late", "print(1)")], tmp_path / "gpu.md", 0) == ["Late"]
    assert "no time was left" in (tmp_path / "gpu.md").read_text("utf-8")


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "raise AssertionError('no driver')")
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no CUDA device: AssertionError: no driver.*--tiny"):
        gpu.main()


def test_mfu_is_of_a_device_that_is_known():
    assert gpu.peak("NVIDIA H200, 140 GiB") == ["--peak", "989"]
    assert gpu.peak("NVIDIA H100 PCIe, 80 GiB") == ["--peak", "756"]
    assert gpu.peak("some other") == []
