"""What a run costs besides its steps: starting the program, and saving the adapter."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from training_cases import ALPHA, RANK, Case, Setup

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.peft import TOKENIZER_FILES, export_adapter

IMPORTS = {
    "ours": "phi3_plugin.recipes.lora_finetune",
    "torchtune": "torchtune.training, torchtune.datasets, torchtune.models.phi3",
    "PEFT": "torch, peft, transformers.models.phi3.modeling_phi3",
}
"""What each has to import before it can train."""


def footer(setup: Setup, cases: dict[str, Case]) -> None:
    """Print it, each as the best of three."""
    names = [name for name in IMPORTS if name in cases]
    starts = [f"{name} {best(partial(importing, IMPORTS[name])):.1f} s" for name in names]
    if starts:
        print(f"Importing what trains, in a new process: {', '.join(starts)}.")
    saves = []
    for name, save in {"ours": ours, "PEFT": peft}.items():
        if name in cases:
            with tempfile.TemporaryDirectory() as folder:
                seconds = best(partial(save, setup, cases[name], Path(folder)))
                saves.append(f"{name} {seconds:.2f} s")
    if saves:
        print(f"Saving the adapter: {', '.join(saves)}; ours with tokenizer and model card.")


def best(work: Callable[[], None]) -> float:
    """Return the least seconds of three runs."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def importing(modules: str) -> None:
    """Import modules in a new process."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", f"import {modules}"]
    subprocess.run(command, check=True, env=offline, stderr=subprocess.DEVNULL)


def ours(setup: Setup, case: Case, folder: Path) -> None:
    """Export the adapter as our recipe does, but for its state to resume from."""
    base, out = folder / "base", folder / "out"
    for place in (base, out):
        place.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (setup.folder / name).is_file():
            shutil.copyfile(setup.folder / name, base / name)
    (base / "config.json").write_text(json.dumps(setup.keys))
    trained = {n: p.detach().cpu() for n, p in case.model.named_parameters() if p.requires_grad}
    export_adapter(out, Adapter.of(trained, ALPHA / RANK), checkpoint_dir=base, card={})


def peft(setup: Setup, case: Case, folder: Path) -> None:
    """Save the adapter as PEFT does."""
    case.model.save_pretrained(folder)
