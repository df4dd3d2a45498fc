"""Runs our own recipe on the CPU: from the command line as a user does, or inside the test."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from phi3_plugin.recipes import phi3_demo_checkpoint
from phi3_plugin.recipes.lora_finetune import Finetune

from tests.stock import TUNE, _run

CONFIG = Path(__file__).parents[1] / "configs" / "phi3_mini_lora.yaml"
TINY = (
    "checkpoint_dir=base",
    "dataset.source=rows.jsonl",
    "tokenizer.max_seq_len=96",
    "model.lora_dropout=0.0",
    "optimizer.lr=1e-3",
    "dtype=fp32",
    "device=cpu",
    "prove=False",
)
"""What a run on `tiny_inputs` is told; nothing is drawn at random in it but what the seed says."""

WORDS = ["Add:", "plus", "one", "two", "three", "four", "five", "six", "seven"]


def own_run(*settings: str, cwd: Path, processes: int = 1) -> subprocess.CompletedProcess:
    """Run ``tune run phi3_lora_finetune`` with the given rest of the command."""
    many = ("--nproc_per_node", str(processes)) if processes > 1 else ()
    config = () if "--config" in settings else ("--config", "phi3_mini_lora")
    return _run(TUNE, "run", *many, "phi3_lora_finetune", *config, *settings, cwd=cwd)


@contextmanager
def started(*settings: str, cwd: Path, config: Path = CONFIG) -> Iterator[Finetune]:
    """Set the recipe up inside the test; paths are in ``cwd``."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    recipe = Finetune(merged(*settings, cwd=cwd, config=config))
    try:
        recipe.setup()
        yield recipe
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finished(*settings: str, cwd: Path, config: Path = CONFIG) -> Path:
    """Run the recipe inside the test and return its output folder."""
    with started(*settings, cwd=cwd, config=config) as recipe:
        recipe.train()
        recipe.finish()
        return recipe.s.output_dir


def merged(*settings: str, cwd: Path, config: Path = CONFIG) -> DictConfig:
    """Return YAML and settings as a recipe gets them, with absolute paths."""
    cfg = OmegaConf.merge(OmegaConf.load(config), OmegaConf.from_dotlist(list(settings)))
    for key in ("checkpoint_dir", "output_dir", "dataset.source"):
        OmegaConf.update(cfg, key, str(cwd / OmegaConf.select(cfg, key)))
    return cfg


def full_config(folder: Path) -> Path:
    """Write a YAML that trains the whole model instead of adapters."""
    cfg = OmegaConf.load(CONFIG)
    cfg.model = {
        "_component_": "phi3_plugin.models.phi3",
        "checkpoint_dir": "${checkpoint_dir}",
    }
    del cfg.checkpointer
    OmegaConf.save(cfg, folder / "full.yaml")
    return folder / "full.yaml"


def metrics(folder: Path) -> list[dict]:
    """Return the steps of a run, one dictionary each, from its metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def tiny_inputs(folder: Path, rows: int) -> Path:
    """Write ``base``, a checkpoint of width 256 that NF4 can store, and ``rows.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    phi3_demo_checkpoint.build_checkpoint(folder / "base", words=WORDS)
    text = "".join(json.dumps(chat(number)) + "\n" for number in range(rows))
    (folder / "rows.jsonl").write_text(text, "utf-8")
    return folder


def chat(number: int) -> dict:
    """Return a chat; question and answer are of other lengths for each number up to 35."""
    words = WORDS[2:]
    question = " plus ".join(words[(number + i) % 7] for i in range(1 + number % 5))
    answer = " ".join(words[(3 * number + i) % 7] for i in range(1 + number * 3 % 7))
    return {
        "messages": [
            {"role": "user", "content": f"Add: {question}"},
            {"role": "assistant", "content": answer},
        ]
    }
