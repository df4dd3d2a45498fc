"""The peak memory of a full-size step with our recipe, and how the cost grows with the tokens.

    python benchmarks/training_memory.py FOLDER [--case qlora] [--case lora] [--tokens 2048]
    python benchmarks/training_memory.py --linear [--rounds 2]

FOLDER gets a random bf16 checkpoint of Phi-3-mini's size, 7.6 GB, unless it has one. Each case
runs in a process of its own: it sets up model and optimizer as our recipe does by the shipped
configuration for one GPU, less dropout, and trains one step on one pack of random documents, two
thirds of it labelled. The peak is what the process had resident at most (VmHWM) from the start
of loading to the end of the step, less what it had after its imports; pages of mapped files
count. The limit is that of training_limit.py, measured after the step.

With --linear: width 1024, 4 layers, LoRA over bf16, in this process. Packs of more and more
tokens in documents of 512, then a pack of 8192 tokens in more and more documents; best of the
rounds. All of it on the CPU. Prints tables; asserts nothing. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from environments import setting, table
from load_memory import peak, random_checkpoint
from omegaconf import OmegaConf
from phi3_plugin.recipes.lora_finetune import Finetune
from training_cases import Samples, Setup, ours
from training_limit import HEAD, Roofline, Work, layer_shapes, least, machine, work_of

import phi3_plugin.models  # noqa: F401  or loading would be charged for the import
from phi3_plugin.data.collate import concatenate
from phi3_plugin.models.phi3 import PRECISIONS
from phi3_plugin.train.losses import SFT
from phi3_plugin.train.step import train_step

CONFIGS = Path(__file__).parents[1] / "configs"
CASES = {"qlora": "phi3_mini_qlora_1gpu.yaml", "lora": "phi3_mini_lora_1gpu.yaml"}
VOCABULARY, DOCUMENT, PACK = 32000, 512, 8192
GIB = 2**30


def main() -> None:
    """Measure what is asked for and print the tables."""
    args = arguments().parse_args()
    if args.alone:
        print(json.dumps(measure(args.alone, args)))
        return
    print(setting("torchao") + f"; {machine()}\n")
    print(" ".join(["python benchmarks/training_memory.py", *sys.argv[1:]]) + "\n")
    if args.linear:
        linear(args)
        return
    if not args.folder:
        raise SystemExit("Give a folder for the checkpoint, or --linear.")
    if not (args.folder / "config.json").exists():
        random_checkpoint(args.folder, args.layers)
    head = ["case", "load, GiB", "load and step, GiB", "load, s", "step, s", "limit, s", "of limit"]
    print(table(head, [row(name, args) for name in args.case or CASES]))


def arguments() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one")
    parser.add_argument("--tokens", type=int, default=2048, help="of the pack")
    parser.add_argument("--document", type=int, default=DOCUMENT, help="tokens of each in it")
    parser.add_argument("--layers", type=int, default=32, help="of a checkpoint that is made")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="fp32 where bf16 has no instructions",
    )
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--linear", action="store_true", help="cost by tokens and documents")
    parser.add_argument("--longest", type=int, default=32768, help="tokens of the last pack")
    parser.add_argument("--rounds", type=int, default=2, help="of --linear")
    parser.add_argument("--alone", choices=CASES, help=argparse.SUPPRESS)
    return parser


def row(name: str, args: argparse.Namespace) -> list[str]:
    """Measure a case in a new process and return its cells."""
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(name, found, file=sys.stderr)
    memory = [f"{found[key] / GIB:.2f}" for key in ("loaded", "peak")]
    seconds = [f"{found[key]:.1f}" for key in ("load", "step", "limit")]
    return [name, *memory, *seconds, f"{found['limit'] / found['step']:.2f}"]


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Load and train a step here; return bytes beyond the imports', and seconds."""
    batch = documents(args.tokens, args.document)
    with tempfile.TemporaryDirectory() as out:
        recipe = new_recipe(name, args, out)
    before, start = restart_peak(), time.perf_counter()
    recipe.data = SimpleNamespace(total_steps=1)
    recipe.setup_model()
    recipe.setup_optimizer()
    loaded, middle = peak(), time.perf_counter()
    rest: tuple[Any, ...] = SFT(), [concatenate(batch)], recipe.s.clip_grad_norm
    result = train_step(recipe.world, recipe.model, recipe.optimizer, *rest)
    end, highest = time.perf_counter(), peak()
    if not result.moved:
        raise SystemExit(f"{name}: {result.problem}")
    found = {"loaded": loaded - before, "peak": highest - before, "loss": result.loss}
    keys = json.loads((args.folder / "config.json").read_text())
    limit = fewest_seconds(keys, work_of(batch), args)
    return {**found, "load": middle - start, "step": end - middle, "limit": limit}


def new_recipe(name: str, args: argparse.Namespace, out: str) -> Any:
    """Return our recipe as the shipped configuration makes it, with nothing loaded."""
    cfg = OmegaConf.load(CONFIGS / CASES[name])
    cfg.checkpoint_dir, cfg.output_dir = str(args.folder), out
    cfg.enable_activation_checkpointing, cfg.device = args.recompute, "cpu"
    cfg.dtype = args.dtype
    cfg.model.lora_dropout = 0.0
    cfg.dataset.source = "none.jsonl"  # a recipe wants a name; nothing is read
    return Finetune(cfg)


def restart_peak() -> int:
    """Let the peak begin with what is resident now, and return that."""
    with suppress(OSError):  # where this is not allowed, the peak is that of the imports
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def documents(tokens: int, size: int) -> Samples:
    """Return random documents of a pack; a third of each is the question."""
    generator = torch.Generator().manual_seed(0)
    sizes = [min(size, tokens - start) for start in range(0, tokens, size)]
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in sizes]
    thirds = [len(row) // 3 for row in rows]
    labels = [[-100] * n + row[n:] for row, n in zip(rows, thirds, strict=True)]
    return [{"tokens": t, "labels": own} for t, own in zip(rows, labels, strict=True)]


def fewest_seconds(keys: dict[str, Any], work: Work, args: argparse.Namespace) -> float:
    """Return how long a step takes at the rate of the matrix products."""
    shapes = {**layer_shapes(keys), HEAD: (keys["vocab_size"], keys["hidden_size"])}
    weights = {n: torch.empty(s, dtype=PRECISIONS[args.dtype]).normal_() for n, s in shapes.items()}
    roofline = Roofline(keys, weights, work)
    roofline.measure(3)
    return least(keys, work, args.recompute) / roofline.rate


def linear(args: argparse.Namespace) -> None:
    """Print what a token costs in longer packs, and in more documents."""
    device = torch.device("cpu")
    switches = {"recompute": args.recompute, "quantize": False, "compiled": False, "liger": False}
    dtypes = args.dtype, "fp32"  # of the base, of the adapter
    setup = Setup("small", None, Path(), device, *dtypes, **switches, pad=0, size=None)
    case = ours(setup)
    case.step(documents(2 * DOCUMENT, DOCUMENT))
    lengths = [2048 << n for n in range(5) if 2048 << n <= args.longest]
    longest = setup.keys["max_position_embeddings"]
    pack = min(PACK, args.longest)
    counts = [1 << n for n in range(8) if pack >> n <= longest]
    for sizes in ([(n, DOCUMENT) for n in lengths], [(pack, pack // count) for count in counts]):
        found = {(n, d): cost(case.step, documents(n, d), args.rounds) for n, d in sizes}
        base = found[sizes[0]][0] / sizes[0][0]
        lines = [
            [
                f"{n:,}",
                f"{d:,}",
                str(-(-n // d)),
                f"{seconds:.2f}",
                f"{seconds / n * 1e6:,.0f}",
                f"{seconds / n / base:.2f}",
                f"{grown / 2**20:,.0f}",
            ]
            for (n, d), (seconds, grown) in found.items()
        ]
        head = ["tokens", "of a document", "documents", "seconds", "us a token", "of the first"]
        print(table([*head, "peak above the model, MiB"], lines) + "\n")


def cost(step: Any, batch: Samples, rounds: int) -> tuple[float, int]:
    """Return the least seconds of a step, and the bytes that it added to the process at most."""
    seconds, before = [], restart_peak()
    for _ in range(rounds):
        start = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - start)
    return min(seconds), peak() - before


if __name__ == "__main__":
    main()
