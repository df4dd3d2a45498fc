"""The wheel: what is in it, and that it comes and goes without touching torchtune's files."""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "phi3_plugin", "recipes", "configs")
# Where each folder of the repository lands in the wheel.
FOLDERS = {
    "phi3_plugin": "phi3_plugin",
    "recipes": "phi3_plugin/recipes",
    "configs": "phi3_plugin/configs",
}


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network from a copy, so that the working tree stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_and_nothing_at_the_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = sorted(name for name in names if ".dist-info/" not in name)
    expected = [
        target + "/" + file.relative_to(ROOT / folder).as_posix()
        for folder, target in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".pyi", ".yaml", ".typed", ".j2", ".json")
        and "__pycache__" not in file.parts
    ]
    assert package == sorted(expected)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"phi3_plugin"}


def test_the_wheel_announces_the_hook_to_torch(wheel):
    (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(name).decode()
    assert "[torch.backends]\nphi3_plugin = phi3_plugin.hook:install" in text


def test_installing_and_removing_leaves_torchtune_untouched(wheel, tmp_path):
    venv.create(tmp_path / "env")  # empty: no pip, nothing of this environment
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    copy_distribution("torchtune", site)
    before = hashes(tmp_path / "env")
    assert "recipes/lora_finetune_single_device.py" in {
        file.relative_to(site).as_posix() for file in before if file.is_relative_to(site)
    }

    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    installed = hashes(tmp_path / "env")
    assert before.items() <= installed.items()
    added = installed.keys() - before.keys()
    assert {file.name for file in added if not file.is_relative_to(site)} == {"phi3-tune"}
    assert {file.relative_to(site).parts[0] for file in added if file.is_relative_to(site)} == {
        "phi3_plugin",
        f"phi3_plugin-{importlib.metadata.version('phi3-plugin')}.dist-info",
    }
    code = "from phi3_plugin.hook import _config_files as files; print(*files())"
    found = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.split() == sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))

    # Inside a clone its folder comes first, with `recipes` and `configs` beside it.
    code = f"import phi3_plugin.recipes as recipes; print(recipes.__file__); {code}"
    inside = subprocess.run(
        [python, "-c", code], cwd=wheel.parent, capture_output=True, text=True
    ).stdout.splitlines()
    assert inside == [str(wheel.parent / "recipes" / "__init__.py"), found.stdout.strip()]

    pip("--python", python, "uninstall", "--yes", "phi3-plugin")
    assert hashes(tmp_path / "env") == before


def copy_distribution(name: str, site: Path) -> None:
    """Copy an installed distribution's files, its scripts aside, into another site-packages."""
    for file in importlib.metadata.files(name):
        if ".." not in file.parts and file.locate().is_file():
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), target)


def hashes(folder: Path) -> dict[Path, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
