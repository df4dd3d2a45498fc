"""Run torchtune's own tests with and without this plugin, and print every difference.

    git clone --depth 1 --branch v0.6.1 https://github.com/pytorch/torchtune.git SOURCES
    python benchmarks/torchtune_tests.py SOURCES [--folder DIR]

Three runs of the folders below, in environments kept in DIR (by default a temporary folder):

    stock    torchao 0.15, plugin switched off (torchtune does not import on 0.16 and later)
    plugin   torchao 0.15, plugin on
    newest   the torchao of the present environment, plugin on

The tests are copied out of SOURCES, so that they import the installed torchtune. Some fail or skip
for reasons of their own (no network, no GPU, newer packages); they must do so alike. Exits with 1
if a test ends otherwise than in `stock`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path

from environments import Outcomes, build, count, run_pytest, setting, table

FOLDERS = ("models/phi3", "modules/peft", "modules/low_precision", "config", "_cli")
TOOLS = {"pytest-mock": "3.17.0", "pytest-integration": "0.2.3", "expecttest": "0.3.0"}
RUNS = {
    "stock": ({"torchao": "0.15.0"}, "0"),
    "plugin": ({"torchao": "0.15.0"}, "1"),
    "newest": ({}, "1"),
}
"""Run -> (packages, value of PHI3_PLUGIN_AUTOLOAD)."""

TORCHTUNE = Path(str(distribution("torchtune").locate_file("torchtune")))
INI = "[pytest]\naddopts = --import-mode=prepend --without-integration --without-slow-integration\n"


def main() -> int:
    """Run the tests three times and return the exit code."""
    parser = argparse.ArgumentParser(description="Run torchtune's tests with and without us.")
    parser.add_argument("sources", type=Path, help="torchtune's repository at tag v0.6.1")
    parser.add_argument("--folder", type=Path, help="keeps the environments and logs")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="phi3_plugin_torchtune_"))
    results = {name: run(name, options.sources, folder) for name in RUNS}
    rows = [[part, *(summary(within(part, results[name])) for name in RUNS)] for part in FOLDERS]
    print(f"{setting()}; passed / failed / skipped\n")
    newest = version("torchao")
    heads = [f"{name}, torchao {sets.get('torchao', newest)}" for name, (sets, _) in RUNS.items()]
    print(table(["tests/torchtune/", *heads], rows))
    different, alike = compare(results)
    for title, lines in (("Different", different), ("Failing in every run", alike)):
        print(f"\n{title}: {len(lines) or 'none'}")
        print("".join(f"\n- {line}" for line in lines))
    return bool(different)


def run(name: str, sources: Path, folder: Path) -> Outcomes:
    """Make the environment of one run and return what became of the tests in it."""
    packages, switch = RUNS[name]
    python = build(folder / "-".join(["env", *packages.values()]), {**packages, **TOOLS})
    work = copy_tests(sources, folder / "work")
    check(python, work, switch)
    tests = [f"tests/torchtune/{part}" for part in FOLDERS]
    log = folder / f"{name}.log"
    outcomes = run_pytest(python, work, log, *tests, PHI3_PLUGIN_AUTOLOAD=switch)
    print(name, summary(outcomes), file=sys.stderr)
    return outcomes


def copy_tests(sources: Path, work: Path) -> Path:
    """Return a folder with the tests and no torchtune that they could import by mistake.

    The tests run `torchtune/_cli/tune.py` relative to the working directory, so the installed one
    is copied there. Without an `__init__.py` beside it, `import torchtune` passes the folder over.
    """
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(sources / "tests", work / "tests")
    (work / "pytest.ini").write_text(INI)
    (work / "torchtune" / "_cli").mkdir(parents=True)
    shutil.copy(TORCHTUNE / "_cli" / "tune.py", work / "torchtune" / "_cli")
    return work


def check(python: Path, work: Path, switch: str) -> None:
    """Make sure that the tests import the installed torchtune, and our plugin only if asked."""
    code = """
import sys; sys.path.insert(0, "")
import torchtune
print(torchtune.__file__, any("phi3_plugin" in type(f).__module__ for f in sys.meta_path))
"""
    env = {**os.environ, "PHI3_PLUGIN_AUTOLOAD": switch}
    found = subprocess.check_output([python, "-c", code], cwd=work, env=env, text=True).split()
    expected = [str(TORCHTUNE / "__init__.py"), str(switch == "1")]
    if found != expected:
        raise RuntimeError(f"torchtune and plugin are {found}, expected {expected}")


def within(part: str, outcomes: Outcomes) -> Outcomes:
    """Return the outcomes of one folder."""
    start = f"tests.torchtune.{part.replace('/', '.')}."
    return {name: outcome for name, outcome in outcomes.items() if name.startswith(start)}


def summary(outcomes: Outcomes) -> str:
    """Return the numbers of passed, failed and skipped tests."""
    kinds = (["passed"], ["failed", "error"], ["skipped"])
    return " / ".join(str(count(outcomes, *kind)) for kind in kinds)


def compare(results: dict[str, Outcomes]) -> tuple[list[str], list[str]]:
    """Return a line for every test that ends differently, and one for every other that fails."""
    different, alike = [], []
    for name in sorted(set().union(*results.values())):
        seen = {run: outcomes.get(name, ("missing", "")) for run, outcomes in results.items()}
        kind, said = seen["stock"]
        if len({kind for kind, _ in seen.values()}) > 1:
            ends = (f"{run} {kind} {said}".strip() for run, (kind, said) in seen.items())
            different.append(f"{name}: {', '.join(ends)}")
        elif kind in ("failed", "error"):
            alike.append(f"{name}: {said}")
    return different, alike


if __name__ == "__main__":
    sys.exit(main())
