"""What the documentation names is there: files, modules, and what they hold."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"`([^`\n]+)`|\]\(([^)#\s]+)")
FOLDERS = ("phi3_plugin/", "recipes/", "configs/", "tests/", "docs/", "benchmarks/")


@pytest.mark.parametrize("page", PAGES)
def test_every_path_and_module_exists(page):
    missing = []
    for code, link in CODE.findall((ROOT / page).read_text("utf-8")):
        if link and "://" not in link:
            missing += [] if ((ROOT / page).parent / link).exists() else [link]
        elif re.fullmatch(r"[\w/.-]+", code) and code.startswith(FOLDERS):
            file = code.replace("phi3_plugin/recipes/", "recipes/")
            missing += [] if (ROOT / file).exists() else [code]
        elif re.fullmatch(r"phi3_plugin(\.\w+)+", code) and not _resolves(code):
            missing.append(code)
    assert not missing


def _resolves(dotted):
    module, _, name = dotted.rpartition(".")
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        return bool(module) and _resolves(module) and hasattr(sys.modules.get(module), name)
    return True


def test_the_picture_names_every_module():
    """And no other: what moves, moves there too."""
    picture = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("```")[1]
    named = set(re.findall(r"\w+", picture))
    package = ROOT / "phi3_plugin"
    modules = {file.stem for file in package.rglob("*.py") if not file.stem.startswith("__")}
    assert modules - named - {"inspection", "evaluation", "report"} == set()
    for name in re.findall(r"(\w+)\.py", picture):
        assert name in modules or (ROOT / "recipes" / f"{name}.py").exists(), name
