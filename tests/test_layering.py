"""The shape of the package, read from its imports: arrows point down, heavy things stay outside."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "phi3_plugin").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
PYTHON = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

# Upper layers may import lower ones, never the other way round or sideways.
MIDDLE = ("models", "data", "checkpoint", "train", "generate", "evaluate")
LAYER = {"recipes": 3, **dict.fromkeys(MIDDLE, 2)}
LOWEST = {"config": 1, "adapter_cli": 1, "generate_cli": 1, "errors": 0, "positions": 0}

# Each of these comes in through one door.
ONLY_IN = {
    "transformers": {"phi3_plugin/checkpoint/check.py"},
    "peft": {"phi3_plugin/checkpoint/check.py"},
    "torch.distributed": {"phi3_plugin/train/world.py", "phi3_plugin/launch.py"},
    "torchao": {"phi3_plugin/models/nf4.py", "phi3_plugin/autoload.py"},
}


def path(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(file: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, wherever in it and however it says so."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path(file)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def part(dotted: str) -> str | None:
    """Return the folder or module of ours that a dotted name belongs to."""
    words = dotted.split(".")
    return words[1] if words[0] == "phi3_plugin" and len(words) > 1 else None


def own_part(file: Path) -> str:
    inside = file.relative_to(ROOT).parts
    return inside[0] if inside[0] == "recipes" else Path(inside[1]).stem


@pytest.mark.parametrize("file", SOURCES, ids=path)
def test_arrows_point_down(file):
    here, rank = own_part(file), {**LAYER, **LOWEST}
    if here in ("__init__", "autoload", "cli"):
        return  # the entrance: it may name anything, and test_nothing_heavy watches what it loads
    for name in imports(file):
        there = part(name)
        if there in rank and there != here:
            assert rank[there] < rank[here], f"{path(file)} imports {name}"


@pytest.mark.parametrize("file", SOURCES, ids=path)
def test_each_heavy_package_has_one_door(file):
    for name in imports(file):
        for package, doors in ONLY_IN.items():
            assert not within(name, package) or path(file) in doors, f"{path(file)}: {name}"


@pytest.mark.parametrize("file", PYTHON, ids=path)
def test_files_are_short_and_named_for_what_they_do(file):
    assert len(file.read_text("utf-8").splitlines()) <= 250
    assert file.stem not in ("utils", "common", "helpers", "misc")


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.py")), ids=path)
def test_no_recipe_shadows_a_module(file):
    # Its folder comes first on sys.path in torchrun's workers.
    if file.stem != "__init__":
        assert file.stem.startswith("phi3_") or file.stem.startswith("lora_finetune")


def test_nothing_heavy_comes_with_the_package(fresh_python):
    code = """
import sys
before = set(sys.modules)
import phi3_plugin, phi3_plugin.errors
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new == {"phi3_plugin"}, new
import phi3_plugin.autoload, phi3_plugin.launch
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new <= sys.stdlib_module_names | {"phi3_plugin"}, new
"""
    fresh_python(code)
