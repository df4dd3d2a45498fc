"""How quickly a chat data set becomes packed samples, ours and the peers'.

    python benchmarks/data_speed.py CHECKPOINT QUESTIONS.jsonl [--rounds 5] [--case NAME]...

CHECKPOINT has the tokenizer files of Phi-3; QUESTIONS.jsonl has rows of question and answer, as
GSM8K. Each case runs in a process of its own, the cases take turns; what is timed starts after
the imports and the reading of the tokenizer:

    bare        tokenizers' encode_batch_fast on texts that are rendered already: nothing else
    ours        chat_dataset(packed=True), nothing cached: read, render, tokenize, mask, pack, store
    ours, all   the same, and every pack is built once
    cached      chat_dataset(packed=True) of the same again, and the first pack
    torchtune   torchtune's chat_dataset(packed=True), which writes launch-day tokens
    trl         TRL's preparation with packing (SFTTrainer), in one process and in two

torchtune and TRL read rows of messages, written before. Prints medians, conversations a second
and the ratio to bare; asserts nothing. TRL is left out where it is not installed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from environments import setting, table

SIZE = 2048


def main() -> None:
    """Run every case in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--alone", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(CASES[args.alone](args)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.case or CASES}
    for _ in range(args.rounds):
        for name in found:
            found[name] += filter(None, [in_process(name)])
    print(setting("tokenizers", "datasets", "trl"))
    print(table(["case", "seconds", "conversations/s", "of bare", "packs", "padding"], rows(found)))


def in_process(name: str) -> dict[str, float] | None:
    """Run one case in a process of its own."""
    environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"HF_HOME": folder, "HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *sys.argv, "--alone", name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"{name}: {(done.stderr.strip() or '?').splitlines()[-1]}", file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def rows(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Return the lines of the table."""
    rates = {
        n: statistics.median(r["rows"] / r["seconds"] for r in f) for n, f in found.items() if f
    }
    lines = []
    for name, results in found.items():
        if not results:
            lines.append([name, *["-"] * 5])
            continue
        seconds = [result["seconds"] for result in results]
        spread = f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
        share = f"{rates[name] / rates['bare']:.2f}" if "bare" in rates else "-"
        packs, waste = results[0].get("packs"), results[0].get("waste")
        padding = "-" if waste is None else f"{waste:.2%}"
        lines.append([name, spread, f"{rates[name]:,.0f}", share, str(packs or "-"), padding])
    return lines


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds it took, and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def bare(args: argparse.Namespace) -> dict[str, float]:
    """Encode texts that are rendered already."""
    from phi3_plugin.data import phi3_tokenizer
    from phi3_plugin.data.turns import make_turn

    tokenizer = phi3_tokenizer(args.checkpoint)
    pairs = [json.loads(line) for line in args.source.read_text("utf-8").splitlines()]
    chats = [
        [make_turn("user", pair["question"]), make_turn("assistant", pair["answer"])]
        for pair in pairs
    ]
    texts = [tokenizer.render(chat).text for chat in chats]
    encode = tokenizer.backend.encode_batch_fast
    seconds, _ = timed(lambda: encode(texts, add_special_tokens=False))
    return {"seconds": seconds, "rows": len(texts)}


def ours(args: argparse.Namespace, *, every: bool = False, again: bool = False) -> dict[str, float]:
    """Prepare the data with this package."""
    from phi3_plugin.data import chat_dataset, phi3_tokenizer

    tokenizer = phi3_tokenizer(args.checkpoint, max_seq_len=SIZE)
    with tempfile.TemporaryDirectory() as cache:

        def prepare() -> Any:
            packs = chat_dataset(tokenizer, args.source, packed=True, cache_dir=cache)
            for i in range(len(packs) if every else 1):
                packs[i]
            return packs

        if again:
            prepare()
        seconds, packs = timed(prepare)
    result = {"seconds": seconds, "rows": packs.ds.rows, "packs": len(packs)}
    return result | {"waste": packs.packs.waste}


def messages_file(args: argparse.Namespace, folder: str, *, split: bool) -> str:
    """Write the rows as the peers read them: one list of messages, or prompt and completion."""
    file = Path(folder) / "messages.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for line in args.source.read_text("utf-8").splitlines():
            pair = json.loads(line)
            prompt = [{"role": "user", "content": pair["question"]}]
            answer = [{"role": "assistant", "content": pair["answer"]}]
            row = (
                {"prompt": prompt, "completion": answer} if split else {"messages": prompt + answer}
            )
            out.write(json.dumps(row) + "\n")
    return str(file)


def torchtune(args: argparse.Namespace) -> dict[str, float]:
    """Prepare the data with torchtune's own tokenizer, data set and packer."""
    from torchtune.datasets import chat_dataset
    from torchtune.models.phi3 import phi3_mini_tokenizer

    tokenizer = phi3_mini_tokenizer(str(args.checkpoint / "tokenizer.model"), max_seq_len=SIZE)
    options = {"conversation_column": "messages", "conversation_style": "openai", "packed": True}
    with tempfile.TemporaryDirectory() as folder:
        file = messages_file(args, folder, split=False)
        work = lambda: chat_dataset(tokenizer, source="json", data_files=file, **options)  # noqa: E731
        seconds, packs = timed(work)
    real = sum(int(pack["seq_lens"][:-1].sum()) for pack in packs.packs)
    count = sum(1 for _ in args.source.open())
    waste = 1 - real / (len(packs.packs) * SIZE)
    return {"seconds": seconds, "rows": count, "packs": len(packs.packs), "waste": waste}


def trl(args: argparse.Namespace, processes: int | None = None) -> dict[str, float]:
    """Prepare the data with TRL's SFTTrainer, masks on the completion, best-fit packing."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        file = messages_file(args, folder, split=True)
        config = SFTConfig(
            folder,
            max_length=SIZE,
            packing=True,
            dataset_num_proc=processes,
            use_cpu=True,
            bf16=False,
        )
        trainer: Any = SimpleNamespace(
            _tokenizer=tokenizer, chat_template=None, completion_only_loss=True
        )

        def prepare() -> Any:
            rows = load_dataset("json", data_files=file, split="train")
            prepared = SFTTrainer._prepare_dataset(
                trainer, rows, tokenizer, config, True, None, "train"
            )
            prepared[0]
            return prepared

        seconds, packs = timed(prepare)
        waste = 1 - sum(map(len, packs["input_ids"])) / (len(packs) * SIZE)
    count = sum(1 for _ in args.source.open())
    return {"seconds": seconds, "rows": count, "packs": len(packs), "waste": waste}


CASES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "bare": bare,
    "ours": ours,
    "ours, all": lambda args: ours(args, every=True),
    "cached": lambda args: ours(args, again=True),
    "torchtune": torchtune,
    "trl": trl,
    "trl, 2": lambda args: trl(args, 2),
}

if __name__ == "__main__":
    main()
