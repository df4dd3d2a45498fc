"""How much memory a long chat data set takes, and how long it takes to be read.

    python benchmarks/data_memory.py CHECKPOINT [--rows 200000] [--turns 4] [--words 60]
        [--kind jsonl]...

CHECKPOINT has the tokenizer files of Phi-3. Writes rows of random words, turns of so many words
each, as .jsonl, .json (one list), .jsonl.gz, .csv (one pair a row) and .parquet; each kind is read,
tokenized, packed at 2048 and read once through in a process of its own. The peak is what the
process had resident at most (VmHWM), less what it had after its imports and the tokenizer. Prints
one row a kind; asserts nothing. Linux only.
"""

import argparse
import csv
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environments import setting, table

KINDS = ("jsonl", "json", "jsonl.gz", "csv", "parquet")
MB = 1e6


def main() -> None:
    """Write each kind, measure it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measured(args)))
        return
    lines = []
    for kind in args.kind or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"chats.{kind}"
            write(file, kind, args)
            command = [sys.executable, *sys.argv, "--alone", file]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        lines.append([kind, *json.loads(done.stdout.splitlines()[-1])])
    print(setting("tokenizers", "pyarrow"))
    print(f"{args.rows:,} conversations of {args.turns} turns of {args.words} words")
    print(table(["file", "size, MB", "tokens", "seconds", "peak above imports, MB"], lines))


def measured(args: argparse.Namespace) -> list[str]:
    """Read one file, and return its cells of the table."""
    from phi3_plugin.data import chat_dataset, phi3_tokenizer

    tokenizer = phi3_tokenizer(args.checkpoint, max_seq_len=2048)
    before, start = resident("VmRSS"), time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        packs: Any = chat_dataset(tokenizer, args.alone, packed=True, cache_dir=cache)
        seconds = time.perf_counter() - start
        for i in range(len(packs)):
            packs[i]
        tokens = int(packs.packs.lengths.sum())
    size = args.alone.stat().st_size / MB
    peak = (resident("VmHWM") - before) / MB
    return [f"{size:,.0f}", f"{tokens:,}", f"{seconds:.0f}", f"{peak:,.0f}"]


def resident(field: str) -> float:
    """Return bytes of this process that are or were in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * float(status.split(f"{field}:")[1].split()[0])


def write(file: Path, kind: str, args: argparse.Namespace) -> None:
    """Write the rows in one of the kinds."""
    if kind == "csv":
        with file.open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["question", "answer"])
            for talk in talks(args):
                half = len(talk) // 2
                writer.writerow([" ".join(talk[:half]), " ".join(talk[half:])])
    elif kind == "parquet":
        write_parquet(file, args)
    else:
        open_file = gzip.open if kind.endswith("gz") else open
        start, between, end = ("[", ",\n", "]") if kind == "json" else ("", "\n", "\n")
        with open_file(file, "wt") as out:
            for n, talk in enumerate(talks(args)):
                out.write((between if n else start) + json.dumps({"messages": messages(talk)}))
            out.write(end)


def write_parquet(file: Path, args: argparse.Namespace) -> None:
    """Write row groups of 10,000 rows."""
    import pyarrow as pa
    from pyarrow import parquet

    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    with parquet.ParquetWriter(file, pa.schema([("messages", kind)])) as writer:
        rows = list[dict[str, Any]]()
        for n, talk in enumerate(talks(args), 1):
            rows.append({"messages": messages(talk)})
            if len(rows) == 10_000 or n == args.rows:
                writer.write_table(pa.Table.from_pylist(rows, writer.schema))
                rows.clear()


def talks(args: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the texts of each conversation."""
    random.seed(0)
    words = ["".join(random.choices("etaoinshrdlu", k=random.randint(2, 9))) for _ in range(5000)]
    for _ in range(args.rows):
        yield [" ".join(random.choices(words, k=args.words)) for _ in range(args.turns)]


def messages(talk: list[str]) -> list[dict[str, str]]:
    """Return the texts as messages."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(talk)]


if __name__ == "__main__":
    main()
