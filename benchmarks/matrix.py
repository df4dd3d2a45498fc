"""Run the fast tests on every supported set of packages, and print a table.

    python benchmarks/matrix.py [--folder DIR] [--torchao VERSION]... [pytest arguments ...]

A set is a torchao and the newest PEFT that takes it: PEFT 0.19 and later refuse torchao below
0.16. Everything else is what the present environment has (`make setup`: constraints.txt). Each
set gets an environment of its own in DIR, in front of the present one (see environments.py), and
is kept there for the next run. By default DIR is temporary and `pytest -m "not slow"` is run;
arguments of your own come after that: `tests/unit`, `-x`, `-m "slow"`.

Exits with 1 if a test failed on any set.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from environments import ROOT, Outcomes, build, count, run_pytest, setting, table, versions

SETS = (
    {"torchao": "0.13.0", "peft": "0.18.1"},
    {"torchao": "0.15.0", "peft": "0.18.1"},
    {"torchao": "0.16.0"},
    {"torchao": "0.18.0"},
)
SHOWN = ("torchao", "peft", "transformers")


def main() -> int:
    """Run the sets one after the other and return the exit code."""
    parser = argparse.ArgumentParser(description="Run the fast tests on every supported set.")
    parser.add_argument("--folder", type=Path, help="keeps the environments and logs")
    parser.add_argument("--torchao", action="append", help="only the set with this version")
    options, pytest_arguments = parser.parse_known_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="phi3_plugin_matrix_"))
    chosen = [s for s in SETS if not options.torchao or s["torchao"] in options.torchao]
    rows, failures = [], []
    for packages in chosen:
        outcomes, cells = run(folder / f"torchao-{packages['torchao']}", packages, pytest_arguments)
        rows.append(cells)
        failures += failed(outcomes, packages["torchao"])
        print(" ".join(cells), file=sys.stderr)
    print(setting() + "\n")
    print(table([*SHOWN, "passed", "failed", "skipped", "seconds"], rows))
    print("".join(f"\n- {line}" for line in failures))
    return bool(failures)


def run(folder: Path, packages: dict[str, str], arguments: list[str]) -> tuple[Outcomes, list[str]]:
    """Build one set, test it, and return the outcomes and the cells of its row."""
    python = build(folder, packages)
    started = time.monotonic()
    outcomes = run_pytest(python, ROOT, folder / "pytest.log", "-m", "not slow", *arguments)
    numbers = [count(outcomes, *kinds) for kinds in (["passed"], ["failed", "error"], ["skipped"])]
    seconds = time.monotonic() - started
    found = [str(version) for version in versions(python, *SHOWN).values()]
    return outcomes, [*found, *map(str, numbers), f"{seconds:.0f}"]


def failed(outcomes: Outcomes, torchao: str) -> list[str]:
    """Return a line for every test that failed."""
    bad = ((name, said) for name, (kind, said) in outcomes.items() if kind in ("failed", "error"))
    return [f"torchao {torchao}: {name}: {said}" for name, said in bad]


if __name__ == "__main__":
    sys.exit(main())
