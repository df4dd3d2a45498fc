"""Losses of preferences beside TRL's and torchtune's: the same numbers, and how fast.

    python -m venv TRL && TRL/bin/pip install torch==2.13.0 trl==1.16.0 peft
    python benchmarks/preferences.py --trl TRL/bin/python equal
    python benchmarks/preferences.py --trl TRL/bin/python fast
    python benchmarks/preferences.py general

``equal`` trains a tiny checkpoint for 20 steps in fp32 from equal weights, with equal tokens and
schedule, by our recipe and by TRL's trainers, and by torchtune's DPO recipe, and compares losses,
rewards, margins and final adapters. ``fast`` times steps of DPO at Phi-3-mini's width, with two
layers, TRL's and ours in turns, and compares the most that a step of ours allocates with a step of
cross entropy on the same row; some minutes. ``general`` trains on pairs whose better answer has the
words of the question, and tells the accuracy of the reward on held-out ones (``--steps 200``).
"""

import argparse
import importlib.util
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from environments import table
from omegaconf import OmegaConf
from phi3_plugin.recipes import phi3_demo_checkpoint
from phi3_plugin.recipes.lora_finetune import Finetune
from safetensors.torch import load_file
from torch import Tensor

from phi3_plugin.data.collate import IGNORED
from phi3_plugin.data.packing import StockPairs, without_padding
from phi3_plugin.data.preferences import PreferenceDataset, preference_dataset
from phi3_plugin.data.store import ChatRow, Store, StoreWriter
from phi3_plugin.data.tokenizer import Phi3Tokenizer, TokenizedChats, Tokens
from phi3_plugin.train.losses import SFT
from phi3_plugin.train.monitor import History
from phi3_plugin.train.start import initial_adapter
from phi3_plugin.train.step import train_step

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "phi3_mini_dpo.yaml"
WORDS = ["Add:", "plus", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"beta": 0.1}),
    "ipo": ("dpo", {"beta": 0.1, "form": "ipo"}),
    "hinge": ("dpo", {"beta": 0.1, "form": "hinge"}),
    "rpo": ("dpo", {"beta": 0.1, "rpo_alpha": 1.0}),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 0.5}),
    "orpo": ("orpo", {"beta": 0.1}),
    "kto": ("kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
}
"""Name here -> component, options."""

STEPS, PER_STEP, RATE, WARMUP, DECAY = 20, 8, 2e-3, 2, 0.01
MEASURES = ("reward_chosen", "reward_rejected", "reward_margin")


def run_of(folder: Path, *changes: str) -> Finetune:
    """Return our recipe, set up."""
    settings = (
        f"checkpoint_dir={folder / 'base'}",
        "tokenizer.max_seq_len=256",
        "dtype=fp32",
        "device=cpu",
        "shuffle=False",
        "val_fraction=0",
        "gradient_accumulation_steps=1",
        f"batch_size={PER_STEP}",
        f"max_steps={STEPS}",
        f"optimizer.lr={RATE}",
        f"optimizer.weight_decay={DECAY}",
        "optimizer.fused=False",
        "lr_scheduler={_component_: phi3_plugin.train.cosine_with_warmup, "
        f"num_warmup_steps: {WARMUP}}}",
        "enable_activation_checkpointing=False",
        "save_every_epoch=False",
        "save_every_n_steps=null",
        "report=False",
        "prove=False",
        "resume=never",
        *changes,
    )
    cfg = OmegaConf.merge(OmegaConf.load(CONFIG), OmegaConf.from_dotlist(list(settings)))
    recipe = Finetune(cfg)
    recipe.setup()
    return recipe


def words(count: int, draw: random.Random) -> list[str]:
    """Return different number words."""
    return draw.sample(WORDS[2:], count)


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows whose better answer repeats the words of the question in their order."""
    draw, rows = random.Random(seed), []
    while len(rows) < count:
        asked = words(draw.randint(2, 6), draw)
        other = words(draw.randint(2, 6), draw)
        if other != asked:
            texts = {"chosen": " ".join(asked), "rejected": " ".join(other)}
            rows.append({"prompt": "Add: " + " plus ".join(asked), **texts})
    return rows


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as lines of JSON."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def one_token_prompts(tokenizer: Phi3Tokenizer, source: Any) -> StockPairs:
    """Return pairs of which only the last token of the prompt is left.

    TRL's ORPO learns the prompts of chosen answers too, but for their first token.
    """
    data = without_padding(preference_dataset(tokenizer, source))
    folder = tempfile.TemporaryDirectory()
    with StoreWriter(Path(folder.name)) as writer:
        for document in range(len(data.store.samples)):
            tokens, sample = data.store.read(document), data.store.samples[document]
            start = int(tokens.trained.argmax()) - 1
            cut = TokenizedChats.join([Tokens(tokens.ids[start:], tokens.trained[start:])])
            row = ChatRow("", 0, int(sample["row"]), document // 2, [], {}, bool(sample["wanted"]))
            writer.append(cut, np.array([len(cut.ids)]), [row])
    store = Store.open(Path(folder.name))
    assert store is not None
    store.temporary = folder
    return StockPairs(PreferenceDataset(store, np.arange(0, len(store.samples), 2)))


def as_trl(recipe: Finetune, loss: str) -> list[dict[str, Any]]:
    """Return the samples as TRL's trainers take them, up to the last token that is trained on."""
    data, rows = recipe.data.order.dataset, []
    for index in range(len(data)):
        sample = data[index]
        lengths = sample["lengths"].tolist()
        sides = []
        for tokens, labels in zip(
            sample["tokens"].split(lengths), sample["labels"].split(lengths), strict=True
        ):
            trained = (labels != IGNORED).nonzero()[:, 0].tolist()
            ids = tokens.tolist()
            sides.append((ids[: trained[0]], ids[trained[0] : trained[-1] + 1]))
        prompt = sides[0][0]
        if loss == "kto":
            wanted = bool(sample["wanted"][0])
            rows.append({"prompt_ids": prompt, "completion_ids": sides[0][1], "label": wanted})
        else:
            assert sides[1][0] == prompt
            texts = {"prompt": "", "chosen": "", "rejected": ""}  # which nothing reads
            ids = {"prompt_ids": prompt, "chosen_ids": sides[0][1], "rejected_ids": sides[1][1]}
            rows.append({**texts, **ids} if loss in ("simpo", "orpo") else ids)
    if loss == "kto":  # TRL's own rule, for batches of the whole data set
        for row, before in zip(rows, [rows[-1], *rows[:-1]], strict=True):
            row["KL_completion_ids"] = before["completion_ids"]
    return rows


def worst(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest difference, as a share of the largest value."""
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    scale = max(map(abs, theirs))
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / scale


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a tensor, as a share of its norm."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in ours)


def adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter."""
    return load_file(folder / "adapter_model.safetensors")


def trained_by_us(name: str, folder: Path, *changes: str) -> tuple[list[dict[str, Any]], Finetune]:
    """Train by our recipe; its adapter of before the first step is in ``step_000000``."""
    component, options = LOSSES[name]
    loss = {"_component_": f"phi3_plugin.train.losses.{component}", **options}
    source = folder / ("answers.jsonl" if name == "kto" else "pairs.jsonl")
    data = [f"dataset.source={source}"]
    if name == "orpo":
        data.append("dataset._component_=preferences.one_token_prompts")
    recipe = run_of(
        folder, f"loss={json.dumps(loss)}", *data, f"output_dir={folder / name}", *changes
    )
    recipe.save("step_000000")
    recipe.train()
    recipe.finish()
    recipe.close()
    lines = History.read(recipe.s.output_dir / "metrics.jsonl")
    return [line for line in lines if "loss" in line], recipe


def equal_to_trl(names: Sequence[str], python: str, folder: Path) -> list[list[str]]:
    """Return a row for each loss: how far ours and TRL's are apart."""
    rows = []
    for name in names:
        ours, recipe = trained_by_us(name, folder)
        work = folder / f"{name}_trl"
        work.mkdir()
        component, options = LOSSES[name]
        job = {
            "loss": component,
            "options": options,
            "base": str(folder / "base"),
            "adapter": str(folder / name / "step_000000"),
            "rows": as_trl(recipe, name),
            "batch_size": PER_STEP,
            "steps": STEPS,
            "lr": RATE,
            "warmup": WARMUP,
            "weight_decay": DECAY,
            "dtype": "float32",
        }
        theirs = run_trl(python, work, job)
        found = [worst([line["loss"] for line in ours], theirs["losses"])]
        found += [
            worst([line[key] for line in ours], [line[key] for line in theirs["measures"]])
            for key in MEASURES
        ]
        found.append(apart(adapter(folder / name / "final"), adapter(work / "trl")))
        rows.append([name, *(f"{value:.1e}" for value in found)])
        print(rows[-1], flush=True)
    return rows


def run_trl(python: str, folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Train by TRL in its own environment."""
    (folder / "job.json").write_text(json.dumps(job))
    command = [python, str(HERE / "preferences_trl.py"), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def equal_to_torchtune(folder: Path) -> list[str]:
    """Return how far our DPO and torchtune's recipe are apart."""
    import torchtune
    from torchtune._recipe_registry import get_all_recipes

    changes = f"output_dir={folder / 'beside_torchtune'}", "clip_grad_norm=null"  # it never clips
    ours, recipe = trained_by_us("dpo", folder, *changes)
    start = initial_adapter(recipe.model, recipe.s.seed)
    cfg = recipe.cfg.copy()
    OmegaConf.update(cfg, "output_dir", str(folder / "torchtune"))
    OmegaConf.update(
        cfg, "loss", {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1}, merge=False
    )
    OmegaConf.update(cfg, "epochs", math.ceil(STEPS * PER_STEP / len(recipe.data.order.dataset)))
    for key in (
        "max_steps",
        "val_fraction",
        "save_every_epoch",
        "save_every_n_steps",
        "report",
        "prove",
        "resume",
    ):
        if key in cfg:
            del cfg[key]
    found = next(r for r in get_all_recipes() if r.name == "lora_dpo_single_device")
    root = torchtune.__file__.partition("torchtune/__init__")[0]
    spec = importlib.util.spec_from_file_location("stock", f"{root}recipes/{found.file_path}")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stock = module.LoRADPORecipeSingleDevice(cfg)
    stock.setup(cfg)
    with torch.no_grad():
        for name, parameter in stock._model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    stock.train()
    (log,) = (folder / "torchtune" / "logs").iterdir()
    lines = [line for line in log.read_text().splitlines() if "loss:" in line]

    def values(key: str) -> list[float]:
        return [float(line.split(f"{key}:")[1].split()[0]) for line in lines]

    names = {
        "loss": "loss",
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
    }
    names["reward_margin"] = "rewards/margins"
    apart_by = [worst([line[mine] for line in ours], values(key)) for mine, key in names.items()]
    last = max((folder / "torchtune").glob("epoch_*"), key=lambda path: int(path.name[6:]))
    final = apart(adapter(folder / "beside_torchtune" / "final"), adapter(last))
    return ["dpo, torchtune", *(f"{value:.1e}" for value in [*apart_by, final])]


def inputs(folder: Path) -> None:
    """Write a tiny checkpoint, 40 pairs, and 8 answers with labels."""
    phi3_demo_checkpoint.build_checkpoint(folder / "base", words=WORDS)
    rows = pairs(40, 0)
    write_rows(folder / "pairs.jsonl", rows)
    labelled = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if i % 2 else "rejected"],
            "label": bool(i % 2),
        }
        for i, row in enumerate(rows[:PER_STEP])
    ]
    write_rows(folder / "answers.jsonl", labelled)


def equal(options: argparse.Namespace, folder: Path) -> None:
    """Compare with TRL and torchtune."""
    inputs(folder)
    head = ["", "loss", "chosen reward", "rejected reward", "margin", "final adapter"]
    rows = equal_to_trl(options.losses or list(LOSSES), options.trl, folder) if options.trl else []
    rows.append(equal_to_torchtune(folder))
    print(table(head, rows))


WIDE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 2,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Phi-3-mini's sizes, but for the number of its layers."""


def fast(options: argparse.Namespace, folder: Path) -> None:
    """Time steps of DPO, TRL's and ours in turns on the same pairs, and tell what memory ours take.

    Both are there all the time, and each waits while the other makes a step.
    """
    from transformers import Phi3Config, Phi3ForCausalLM

    inputs(folder)
    draw = random.Random(3)

    def answer() -> str:  # about as uneven as answers of assistants are
        return " ".join(draw.choices(WORDS[2:], k=min(int(draw.lognormvariate(4, 0.8)) + 1, 350)))

    def row() -> dict[str, str]:
        asked = " ".join(draw.choices(WORDS[2:], k=draw.randint(10, 80)))
        return {"prompt": asked, "chosen": answer(), "rejected": answer()}

    write_rows(folder / "pairs.jsonl", [row() for _ in range(options.batch * options.steps)])
    for file in (folder / "base").glob("model*"):
        file.unlink()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    Phi3ForCausalLM(Phi3Config(**WIDE)).to(dtype).save_pretrained(folder / "base")
    out = folder / "wide"
    recipe = run_of(
        folder,
        f"dataset.source={folder / 'pairs.jsonl'}",
        "tokenizer.max_seq_len=1024",
        f"batch_size={options.batch}",
        f"dtype={'bf16' if options.dtype == 'bfloat16' else 'fp32'}",
        "adapter_dtype=null",
        f"output_dir={out}",
        f"max_steps={options.steps}",
        "reference=live",
    )
    samples = recipe.data.order.dataset
    recipe.save("step_000000")
    job = {
        "loss": "dpo",
        "options": {"beta": 0.1},
        "base": str(folder / "base"),
        "adapter": str(out / "step_000000"),
        "rows": as_trl(recipe, "dpo"),
        "batch_size": options.batch,
        "steps": options.steps,
        "lr": RATE,
        "warmup": WARMUP,
        "weight_decay": DECAY,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "waits": True,
    }
    trl = Stepped(options.trl, folder, job) if options.trl else None
    head = [
        "step",
        "tokens",
        "of padded",
        *["TRL, s"] * bool(trl),
        "ours, s",
        *["ratio"] * bool(trl),
    ]
    rows, ratios = list[list[str]](), list[float]()
    for step in range(options.steps):
        indices = recipe.data.order.indices(step)
        lengths = [samples[int(n)]["lengths"].tolist() for n in indices]
        total, longest = sum(map(sum, lengths)), max(map(max, lengths))
        if trl:
            trl.wait()
        start = time.perf_counter()
        batches = recipe.data.order.batches(step, 0, recipe.data.collate)
        parts = recipe.world, recipe.model, recipe.optimizer, recipe.loss, batches, 1.0
        result = train_step(*parts)
        recipe.scheduler.step()
        ours = time.perf_counter() - start
        theirs = trl.step() if trl else math.nan
        assert result.moved
        padded = f"{total / (2 * len(lengths) * longest):.0%}"
        both = [f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}"]
        rows.append([str(step), str(total), padded, *(both if trl else both[1:2])])
        print(rows[-1], flush=True)
        ratios += [theirs / ours] if step else []  # in the first, memory is taken and weights read
    print(table(head, rows))
    if trl:
        losses = trl.end()["losses"]
        print(f"\nuseful tokens/s beside TRL's: {median(ratios):.2f}; its losses: {losses}")
    print()
    print(memory(recipe))


class Stepped:
    """TRL in a process of its own, which makes a step when it is told to."""

    def __init__(self, python: str, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder = folder
        (folder / "job.json").write_text(json.dumps(job))
        command = [python, str(HERE / "preferences_trl.py"), str(folder / "job.json")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def wait(self) -> None:
        """Wait until it does nothing."""
        self._line("waiting")

    def step(self) -> float:
        """Let it make one and return its seconds."""
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        return float(self._line("step took ").split()[-1])

    def _line(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        raise RuntimeError("TRL has ended; see above")

    def end(self) -> dict[str, Any]:
        """Wait for the end and return the result."""
        self.process.communicate()
        result: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return result


def memory(recipe: Finetune) -> str:
    """Return what a step of DPO takes beside one of cross entropy on the same packed row."""
    (row,) = recipe.data.order.batches(0, 0, recipe.data.collate)
    plain = {key: value for key, value in row.items() if key != "wanted"}
    parts = recipe.world, recipe.model, recipe.optimizer
    peaks = {}
    for name, loss, batch in (("sft", SFT(), plain), ("dpo", recipe.loss, row)):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            with torch.profiler.profile(profile_memory=True) as profiled:
                train_step(*parts, loss, [batch], 1.0)
            profiled.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_text())["traceEvents"]
        peaks[name] = max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")
    tokens = row["tokens"].shape[1]
    width, size = recipe.model.norm.scale.shape[0], recipe.model.norm.scale.element_size()
    one = tokens * width * size
    cells = [f"{tokens:,}", *(f"{peaks[name] / 2**20:,.2f}" for name in ("sft", "dpo"))]
    cells += [f"{one / 2**20:.2f}", f"{(peaks['dpo'] - peaks['sft']) / one:+.3f}"]
    head = ["tokens of the row", "SFT, MiB", "DPO, MiB", "hidden states, MiB", "more, in these"]
    return table(head, [cells])


def general(options: argparse.Namespace, folder: Path) -> None:
    """Train on pairs and tell the accuracy on others."""
    inputs(folder)
    write_rows(folder / "many.jsonl", pairs(options.pairs, 1))
    recipe = run_of(
        folder,
        f"dataset.source={folder / 'many.jsonl'}",
        f"output_dir={folder / 'general'}",
        "val_fraction=0.1",
        "shuffle=True",
        "run_val_every_n_steps=50",
        f"max_steps={options.steps}",
        "batch_size=32",
    )
    recipe.train()
    recipe.finish()
    recipe.close()
    lines = History.read(folder / "general" / "metrics.jsonl")
    print(
        table(
            ["step", "held-out loss", "held-out accuracy", "margin"],
            [
                [
                    str(line["step"]),
                    *(
                        f"{line[key]:.3f}"
                        for key in ("val_loss", "val_reward_accuracy", "val_reward_margin")
                    ),
                ]
                for line in lines
                if "val_loss" in line
            ],
        )
    )


def main() -> None:
    """Read the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["equal", "fast", "general"])
    parser.add_argument("--trl", help="a Python that has TRL 1.16")
    parser.add_argument("--losses", nargs="*")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step of `fast`")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as folder:
        {"equal": equal, "fast": fast, "general": general}[options.what](options, Path(folder))


if __name__ == "__main__":
    main()
