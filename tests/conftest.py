"""What every test shares: fresh processes, no network, and a count of the checks on assets.

Imports nothing at the top that brings torch: the process that shares the tests out needs none.
"""

import gc
import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests import warm
from tests.assets import assets_dir
from tests.variants import BUILT, FROM_ASSETS, write_checkpoint


def pytest_configure():
    if warm.STARTED not in os.environ:  # else in a worker
        os.environ[warm.STARTED] = str(warm.start())
    warm.trust_the_disk()


def pytest_collection_finish():
    gc.freeze()  # or each collection would walk over all that was imported and thousands of tests


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Keep the user's cache of tokenized data out of the tests, and the tests out of it."""
    os.environ["PHI3_PLUGIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def fresh_python(tmp_path):
    """Run code in a new interpreter, in an empty folder, and return what it printed."""

    return partial(warm.run_python, cwd=tmp_path)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A tiny checkpoint and 40 chats, made once; nobody may write to them."""
    from tests.own import tiny_inputs

    return tiny_inputs(tmp_path_factory.mktemp("inputs"), 40)


@pytest.fixture(scope="session")
def whole(inputs):
    """The folder of a run of three epochs of three steps that nothing disturbed."""
    from tests.own import train

    recipe = train(inputs)
    assert (recipe.data.order.steps_per_epoch, recipe.data.total_steps) == (3, 9)
    return inputs / "out"


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A base, and an adapter and a DoRA as a run saves them; nobody may write to them."""
    import torch
    from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint

    from phi3_plugin.checkpoint.adapter import Adapter
    from phi3_plugin.checkpoint.peft import export_adapter
    from phi3_plugin.models import lora_phi3

    folder = tmp_path_factory.mktemp("verdict")
    build_checkpoint(folder / "base", words=["one"])
    for name in ("lora", "dora"):
        model = lora_phi3(folder / "base", ["o_proj"], lora_rank=4, use_dora=name == "dora")
        adapted = {n: p.detach() for n, p in model.named_parameters() if "o_proj.weight" not in n}
        tensors = {n: torch.randn_like(p) for n, p in adapted.items() if ".o_proj." in n}
        scales = {n.removesuffix(".lora_a.weight"): 4.0 for n in tensors if "lora_a" in n}
        (folder / name).mkdir()
        where = {"checkpoint_dir": folder / "base", "card": {}}
        export_adapter(folder / name, Adapter(tensors, scales), **where)
    return folder


@pytest.fixture(scope="session")
def impatient_child(tmp_path_factory):
    """What renders templates within one second of computing, and the program that it starts."""
    from phi3_plugin.data import rendering

    text = Path(rendering.__file__).read_text("utf-8")
    file = tmp_path_factory.mktemp("impatient") / "rendering.py"
    file.write_text(text.replace("SECONDS = 3\n", "SECONDS = 0\n"), "utf-8")
    assert file.read_text("utf-8") != text
    child = rendering._Child()
    yield child, str(file)
    child.end()


@pytest.fixture
def impatient(impatient_child, monkeypatch):
    """Give what a stranger wrote, a template or a pattern, one second of computing, not several."""
    from phi3_plugin.checkpoint import peft_config
    from phi3_plugin.data import rendering

    child, file = impatient_child
    monkeypatch.setattr(rendering, "_CHILD", child)
    monkeypatch.setattr(rendering, "__file__", file)
    limit = f"({peft_config.SECONDS}, {peft_config.SECONDS})"
    assert limit in peft_config._MATCHER
    monkeypatch.setattr(peft_config, "_MATCHER", peft_config._MATCHER.replace(limit, "(1, 1)"))


@pytest.fixture
def cwd(inputs, tmp_path):
    """A folder of a test's own that has them."""
    for name in ("base", "rows.jsonl"):
        (tmp_path / name).symlink_to(inputs / name)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint's tokenizer files."""
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def tokenizer(folder):
    from phi3_plugin.data import phi3_tokenizer

    return phi3_tokenizer(folder)


@pytest.fixture(
    scope="session",
    params=[*BUILT, *(pytest.param(name, marks=pytest.mark.assets) for name in FROM_ASSETS)],
)
def supported(request, tmp_path_factory):
    """A checkpoint folder of each revision."""
    folder = tmp_path_factory.mktemp("supported") / request.param
    if request.param in BUILT:
        return BUILT[request.param](folder)
    if assets_dir() is None:
        pytest.skip("the published tokenizers are not here: set PHI3_ASSETS")
    return FROM_ASSETS[request.param](folder)


def pytest_collection_modifyitems(items):
    # The files with most slow tests first, so that none of them ends while the other worker waits
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
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
