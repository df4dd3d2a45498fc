"""What every test shares: fresh processes, no network, and a count of the checks on assets."""

import os
import subprocess
import sys

import pytest

from tests.assets import assets_dir

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants the network is a mistake


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Keep the user's cache of tokenized data out of the tests, and the tests out of it."""
    os.environ["PHI3_PLUGIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def fresh_python(tmp_path):
    """Run code in a new interpreter, in an empty folder, and return what it printed."""

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def pytest_collection_modifyitems(items):
    # The longest file first, so that no process ends with it while the others wait
    items.sort(key=lambda item: item.path.name != "test_docs.py")
    if assets_dir() is None:
        skip = pytest.mark.skip(reason="no ../shared/assets beside the repository, see PHI3_ASSETS")
        for item in items:
            if item.get_closest_marker("assets"):
                item.add_marker(skip)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_terminal_summary(terminalreporter):
    outcomes = {
        report.nodeid: kind
        for kind in ("passed", "failed", "error", "xfailed", "xpassed", "skipped")
        for report in terminalreporter.stats.get(kind, ())
        if "assets" in getattr(report, "keywords", ())
    }
    skipped = sum(kind == "skipped" for kind in outcomes.values())
    ran = len(outcomes) - skipped
    terminalreporter.write_line(f"checks against shared assets: {ran} ran, {skipped} skipped")
