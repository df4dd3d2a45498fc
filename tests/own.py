"""Runs our own recipe on the CPU, from the command line or inside the test, and compares runs."""

import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from phi3_plugin.recipes import phi3_demo_checkpoint
from phi3_plugin.recipes.lora_finetune import Finetune
from torch import Tensor

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.checkpoint.peft import export_model
from phi3_plugin.models import lora_phi3
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.proof import load_with_peft
from phi3_plugin.train import checkpoints
from phi3_plugin.train.monitor import MEASURED, History
from tests import warm
from tests.adapters import load_adapter, load_trained

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
    "resume=never",
    "save_total_limit=null",
)
"""What a run on `tiny_inputs` is told; nothing is drawn at random in it but what the seed says."""

RUN = (
    *TINY,
    "output_dir=out",
    "model.lora_dropout=0.1",
    "dataset.packed=True",
    "batch_size=1",
    "gradient_accumulation_steps=2",
    "epochs=3",
    "lr_scheduler.num_warmup_steps=1",
    "val_fraction=0.2",
    "run_val_every_n_steps=2",
    "save_every_n_steps=1",
    "report=False",
)
"""All that draws random numbers or keeps a place: dropout, shuffling, packs, accumulation, warm-up
and decay of the rate, validation with its best loss. With 40 rows 3 epochs of 3 steps, the last
of which has one micro-batch instead of two."""

VARIANTS = {
    "lora": (),
    "dora": ("model.use_dora=True",),
    "qlora": ("model.quantize_base=True",),
    "qdora": ("model.quantize_base=True", "model.use_dora=True"),
}

BATCH = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))

WORDS = ["Add:", "plus", "one", "two", "three", "four", "five", "six", "seven"]


def own_run(*settings: str, cwd: Path, processes: int = 1) -> subprocess.CompletedProcess:
    """Run ``tune run phi3_lora_finetune`` with the given rest of the command."""
    many = ("--nproc_per_node", str(processes)) if processes > 1 else ()
    config = () if "--config" in settings else ("--config", "phi3_mini_lora")
    return warm.run("tune", "run", *many, "phi3_lora_finetune", *config, *settings, cwd=cwd)


@contextmanager
def started(*settings: str, cwd: Path, config: Path = CONFIG) -> Iterator[Finetune]:
    """Set the recipe up inside the test; paths are in ``cwd``."""
    recipe = Finetune(merged(*settings, cwd=cwd, config=config))
    try:
        recipe.setup()
        yield recipe
    finally:
        recipe.close()


def finished(*settings: str, cwd: Path, config: Path = CONFIG) -> Path:
    """Run the recipe inside the test and return its output folder."""
    with started(*settings, cwd=cwd, config=config) as recipe:
        recipe.train()
        recipe.finish()
        return recipe.s.output_dir


def train(cwd: Path, *settings: str, config: Path = CONFIG) -> Finetune:
    """Train to the end, or until a signal, in ``cwd``."""
    with started(*RUN, *settings, cwd=cwd, config=config) as recipe:
        recipe.train()
        recipe.finish()
    return recipe


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
    """Write ``base``, of two layers and a width of 256 that NF4 can store, and ``rows.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    phi3_demo_checkpoint.build_checkpoint(folder / "base", words=WORDS, layers=2)
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


def write_pairs(folder: Path, count: int) -> None:
    """Write ``pairs.jsonl``: to each question its answer, and that of another one."""
    rows = []
    for number in range(count):
        (ask, good), (_, bad) = (chat(n)["messages"] for n in (number, number + 17))
        texts = {"chosen": good["content"], "rejected": bad["content"] + " nine"}
        rows.append({"prompt": ask["content"], **texts})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def linked(source: Path, folder: Path, *names: str) -> Path:
    """Give a folder the inputs of another, ``base`` and ``rows.jsonl`` if no others are named."""
    folder.mkdir(exist_ok=True)
    for name in names or ("base", "rows.jsonl"):
        (folder / name).symlink_to(source / name)
    return folder


def losses(folder) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def same_losses(ours: Iterable[float], theirs: Iterable[float], rtol: float = 1e-6) -> None:
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one == pytest.approx(other, rel=rtol), f"step {step}"


def same_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Compare norms: where B started at zero, single elements differ by AdamW's noise."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def leave_until(step: int, out: Path, copy: Path) -> None:
    """Copy a run as a kill after a step leaves it; its metrics were written further on."""
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns("final", "logs"))
    for folder in (*copy.glob("step_*"), copy / "best"):
        if folder.is_dir() and checkpoints.load_state(folder, {})["step"] > step:
            shutil.rmtree(folder)


def lines(out: Path) -> list[dict]:
    """Return what a run measured, without its events and without what depends on the hour."""
    written = [line for line in History.read(out / "metrics.jsonl") if "event" not in line]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in written]


def same(one: object, other: object) -> bool:
    """Whether two states are equal to the last bit."""
    if hasattr(one, "__tensor_flatten__"):  # made of others, and unknown to torch.equal
        parts, rest = one.__tensor_flatten__()
        return (parts, rest) == other.__tensor_flatten__() and all(
            same(getattr(one, part), getattr(other, part)) for part in parts
        )
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def state(folder: Path) -> dict:
    """Return what a run goes on from; its settings differ in ``resume``."""
    return {key: v for key, v in checkpoints.load_state(folder, {}).items() if key != "settings"}


def assert_same_end(out: Path, expected: Path) -> None:
    """Check weights, training state and metrics of two runs, to the last bit."""
    names = ("final", "best") if (expected / "best").exists() else ("final",)
    for name in names:
        assert same(*(load_adapter(folder / name) for folder in (out, expected)))
        assert same(*(state(folder / name) for folder in (out, expected)))
    assert lines(out) == lines(expected)


def peft_agrees(
    cwd: Path,
    folder: Path,
    names: Sequence[str] = TARGETS,
    *,
    dora: bool = False,
    quantized: bool = False,
) -> float:
    """Compare logits over our base weights, which are dequantized where ours are NF4.

    Returns how far the adapter moves them from the base's.
    """
    keys = {"lora_rank": 16, "lora_alpha": 32, "use_dora": dora, "quantize_base": quantized}
    ours = lora_phi3(cwd / "base", list(names), True, **keys).eval()
    weights = load_base_weights(cwd / "base")
    ours.load_state_dict({**weights, **load_trained(folder, cwd / "base")})
    (cwd / "as_computed").mkdir()
    state = ours.state_dict()
    export_model(cwd / "as_computed", {name: state[name] for name in weights}, cwd / "base")
    peft = load_with_peft(cwd / "as_computed", folder)
    batch = torch.randint(0, 400, (2, 30))
    with torch.no_grad():
        theirs = peft(input_ids=batch).logits
        torch.testing.assert_close(ours(batch), theirs, rtol=0, atol=1e-5)
        with peft.disable_adapter():
            return (peft(input_ids=batch).logits - theirs).abs().max().item()


def logits(recipe: Finetune) -> Tensor:
    """Return fp32 logits ``[B, S, V]`` for `BATCH`."""
    recipe.model.eval()
    with torch.no_grad():
        out = recipe.model(BATCH).float()
    recipe.model.train()
    return out
