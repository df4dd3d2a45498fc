"""Environments that differ from the present one in a few packages, and pytest run in them.

An environment made here has its own interpreter, its own `tune`, `torchrun` and `phi3-tune`, and
its own copies of the packages that differ. All else, torch above all, comes from the environment
that runs this code: its site-packages stand behind those of the new one on the import path. So
one costs seconds and megabytes, and nothing in it can bring another torch. What it cannot show:
whether pip resolves the set from nothing, for the packages are installed without dependencies.
"""

import os
import subprocess
import sys
import sysconfig
import time
import venv
from importlib.metadata import entry_points
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]

Outcomes = dict[str, tuple[str, str]]
"""Test name -> (passed, failed, error or skipped; the first line of what it said)."""

SCRIPT = """#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


def build(folder: Path, packages: dict[str, str]) -> Path:
    """Return the interpreter of an environment in which `packages` have the given versions.

    Args:
        folder: Where the environment is, or will be.
        packages: Exact versions by name. What already has its version is left alone.
    """
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        venv.create(folder)
        put_behind(python)
    found = versions(python, *packages)
    pins = [f"{name}=={wanted}" for name, wanted in packages.items() if found[name] != wanted]
    if pins:
        # --target, since it never uninstalls: the other environment must stay as it is.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", site_packages(python), *pins], check=True)
    return python


def put_behind(python: Path) -> None:
    """Let an empty environment see our packages behind its own, and give it our commands."""
    behind = sysconfig.get_path("purelib")
    # addsitedir also reads the .pth files there, which an editable install needs.
    line = f"import site; site.addsitedir({behind!r})\n"
    (site_packages(python) / "behind.pth").write_text(line)
    for command in entry_points(group="console_scripts"):
        if command.name in ("tune", "torchrun", "phi3-tune"):
            script = python.with_name(command.name)
            words = {"module": command.module, "function": command.attr}
            script.write_text(SCRIPT.format(python=python, **words))
            script.chmod(0o755)


def site_packages(python: Path) -> Path:
    """Return the site-packages folder of the environment of an interpreter."""
    (folder,) = python.parents[1].glob("lib/python*/site-packages")
    return folder


def versions(python: Path, *names: str) -> dict[str, str | None]:
    """Return the versions that an environment sees of some packages, None where one is missing."""
    code = """
import importlib.metadata as metadata, sys
for name in sys.argv[1:]:
    try:
        print(metadata.version(name))
    except metadata.PackageNotFoundError:
        print()
"""
    found = subprocess.check_output([python, "-c", code, *names], text=True)
    return dict(zip(names, (line or None for line in found.splitlines()), strict=True))


def run_pytest(python: Path, folder: Path, log: Path, *arguments: str, **env: str) -> Outcomes:
    """Run pytest in an environment and return what became of every test.

    Args:
        python: The environment's interpreter.
        folder: The working directory.
        log: File for the output; the report goes beside it.
        arguments: For pytest.
        env: Environment variables to set.

    Raises:
        RuntimeError: pytest ended without a report, or was not able to start.
    """
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report.absolute()}", "--continue-on-collection-errors"]
    with log.open("w") as output:
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            env={**os.environ, **env},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode > 1 or not report.exists():  # 0: all passed, 1: some failed
        raise RuntimeError(f"pytest ended with exit code {done.returncode}: see {log}")
    return read(report)


def read(report: Path) -> Outcomes:
    """Return the outcomes in a JUnit report; a test that failed twice is listed once."""
    outcomes: Outcomes = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}".lstrip(":")
        bad = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        if bad is not None:
            kind = {"failure": "failed"}.get(bad.tag, bad.tag)
            outcomes[name] = kind, (bad.get("message") or "").partition("\n")[0]
        else:
            outcomes.setdefault(name, ("passed", ""))
    return outcomes


def count(outcomes: Outcomes, *kinds: str) -> int:
    """Return how many tests ended in one of the given ways."""
    return sum(kind in kinds for kind, _ in outcomes.values())


def setting(*packages: str) -> str:
    """Return a line on what all environments share: Python, torch, torchtune and these packages."""
    found = versions(Path(sys.executable), "torch", "torchtune", *packages)
    shared = [f"{name} {version}" for name, version in found.items()]
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{time.strftime('%Y-%m-%d')}: Python {python}, {', '.join(shared)}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
