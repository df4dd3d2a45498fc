"""Our names in torchtune's command line: listed, copied, shown, validated and run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_plugin.errors import ConfigError
from tests import warm
from tests.chosen import some

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
NAMES = [file.stem for file in CONFIGS]
RECIPE, DISTRIBUTED = "lora_finetune_single_device", "lora_finetune_distributed"
OURS, INSPECT, EVALUATE = "phi3_lora_finetune", "phi3_inspect_data", "phi3_evaluate"
OF_NO_RUN = ADAPTER, GENERATE = "phi3_adapter", "phi3_generate"
OF_RUNS = [file for file in CONFIGS if file.stem not in OF_NO_RUN]  # those are recipes' names too
DPO = "lora_dpo_single_device", "lora_dpo_distributed"
DISTILL = "knowledge_distillation_single_device", "knowledge_distillation_distributed"
LISTED = (RECIPE, *DPO, DISTRIBUTED, *DISTILL, OURS, INSPECT, ADAPTER, GENERATE, EVALUATE)
BY_PATH = "phi3_plugin/recipes/lora_finetune.py"
BIN = Path(sys.executable).parent


def recipes_of(file: Path) -> tuple[str, ...]:
    """Which recipes must list a config: keys that only ours knows keep it from torchtune's."""
    if file.stem in OF_NO_RUN:
        return (file.stem,)
    if "\ncheckpointer:" not in file.read_text():
        return (OURS, INSPECT, EVALUATE)
    if "preference_dataset" in file.read_text():
        return (*DPO, OURS, INSPECT, EVALUATE)
    if "ForwardKL" in file.read_text():
        return (*DISTILL, OURS, INSPECT, EVALUATE)
    stock = (RECIPE,) if file.stem == "phi3_demo" else (RECIPE, DISTRIBUTED)
    return (*stock, OURS, INSPECT, EVALUATE)


STOCK = [file.stem for file in CONFIGS if RECIPE in recipes_of(file)]

READ_REGISTRY = f"""
import os, torchtune
from torchtune._recipe_registry import get_all_recipes
recipe = next(r for r in get_all_recipes() if r.name == {RECIPE!r})
names = [c.name for c in recipe.configs if os.path.isabs(c.file_path)]
assert os.environ["LOCAL_RANK"] == "0" and names == {STOCK!r}, names
print("registry is complete")
"""


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """Call `tune` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # importing `tune` sets ours
    from torchtune._cli.tune import main

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["tune", *arguments])
        main()

    return run


@pytest.fixture
def get_config():
    """Return what `tune run` looks a config up with."""
    import argparse

    from torchtune._cli.run import Run

    return Run(argparse.ArgumentParser().add_subparsers())._get_config


def command(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_config_is_registered_once_per_recipe_under_its_stem():
    from torchtune._recipe_registry import get_all_recipes

    ours = [
        (recipe.name, config.name, config.file_path)
        for recipe in get_all_recipes()
        for config in recipe.configs
        if os.path.isabs(config.file_path)
    ]
    assert ours == [
        (recipe, file.stem, str(file))
        for recipe in LISTED
        for file in CONFIGS
        if recipe in recipes_of(file)
    ]


def test_no_registered_name_looks_like_a_file():
    from torchtune._recipe_registry import get_all_recipes

    names = [config.name for recipe in get_all_recipes() for config in recipe.configs]
    assert not [name for name in names if name.endswith((".yaml", ".yml"))]


def test_ls_shows_each_name_of_ours_once(tune, capsys):
    tune("ls")
    table, _, more = capsys.readouterr().out.partition("\n\n")
    columns = [(line[:40].strip(), line[41:].strip()) for line in table.splitlines()]
    names = [name for row in columns for name in row if name.startswith("phi")]
    ours = [name for name in LISTED if name.startswith("phi3_")]
    # torchtune has configs that begin so, and two recipes have a config of their name
    assert sorted(n for n in names if n in {*NAMES, *ours}) == sorted([*NAMES, *ours])
    start = next(i for i, (name, _) in enumerate(columns) if name == OURS)
    assert [config for _, config in columns[start:]][: len(OF_RUNS)] == [f.stem for f in OF_RUNS]
    assert "phi3_evaluate" in more
    assert "llama2/7B_lora_single_device" in table


@pytest.mark.parametrize("file", OF_RUNS, ids=lambda file: file.stem)
def test_cp_copies_the_config(tune, file, tmp_path):
    tune("cp", file.stem, ".")
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("file", OF_RUNS, ids=lambda file: file.stem)
def test_cat_shows_the_config(tune, file, capsys):
    import yaml

    tune("cat", file.stem)
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(file.read_text())


@pytest.mark.parametrize("file", CONFIGS, ids=NAMES)
def test_validate_accepts_the_config(tune, file, capsys):
    tune("validate", str(file))
    assert "well-formed" in capsys.readouterr().out


@pytest.mark.parametrize("file", CONFIGS, ids=NAMES)
def test_run_takes_the_name_with_and_without_yaml(get_config, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get_config(file.stem, None).file_path == str(file)
    assert get_config(file.name, None).file_path == str(file)
    assert get_config("folder/" + file.name, None) is None


@pytest.mark.parametrize("name", ["phi3_mini_lora.yaml", "./phi3_mini_lora"])
def test_run_takes_a_local_file_first_that_is_named_as_one(
    get_config, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("seed: 0\n")
    assert get_config(name, None) is None  # not a registered config, so `tune run` reads the path
    said = capsys.readouterr().err
    if name.endswith(".yaml"):  # also the name of a shipped one
        assert f"{tmp_path / name}, not the shipped phi3_mini_lora." in said


@pytest.mark.parametrize("name", ["phi3_mini_lora", "generation"])
def test_a_bare_name_is_a_registered_config_whatever_lies_around(
    get_config, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    registered = get_config(name, None)
    (tmp_path / name).write_text("seed: 0\n")
    assert get_config(name, None) == registered


def test_run_takes_the_config_where_a_folder_has_its_name(get_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phi3_mini_lora").mkdir()
    assert get_config("phi3_mini_lora", None).file_path == str(
        CONFIGS[NAMES.index("phi3_mini_lora")]
    )


def test_torchtunes_own_names_are_looked_up_as_ever(get_config, tmp_path, monkeypatch):
    from torchtune._recipe_registry import get_all_recipes

    monkeypatch.chdir(tmp_path)
    for recipe in get_all_recipes():
        for config in recipe.configs:
            assert get_config(config.name, recipe) is config
    assert get_config("generation.yaml", None) is None
    assert get_config("no_such_config", None) is None


@pytest.mark.parametrize("torchrun", [[], ["--nproc_per_node", "2"]], ids=["one", "torchrun"])
def test_a_slash_path_to_a_recipe_becomes_its_module(tune, monkeypatch, torchrun):
    seen = []
    monkeypatch.setattr("runpy.run_module", lambda name, run_name: seen.append(name))
    monkeypatch.setattr(
        "torchtune._cli.run.run", lambda args: seen.append(args.module and args.training_script)
    )
    monkeypatch.setattr(sys, "path", [*sys.path])  # `run` appends the folder
    tune("run", *torchrun, BY_PATH, "--config", "x")
    assert seen == ["phi3_plugin.recipes.lora_finetune"]


@pytest.mark.parametrize(
    ("recipe", "advice"),
    [
        ("phi3_lora_finetun", "Did you mean phi3_lora_finetune?"),
        ("gone.py", "is neither a recipe nor a file."),
        ("my/gone.py", "is neither a recipe nor a file."),
        ("phi3_plugin/recipes/gone.py", "is neither"),
    ],
)
def test_a_mistyped_recipe_is_one_line(tune, recipe, advice):
    with pytest.raises(ConfigError) as error:
        tune("run", recipe, "--config", "phi3_mini_lora")
    assert advice in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["epochs 3", "--epochs=3", "dataset.source='x", "epochs"])
def test_what_cannot_be_read_is_one_line_before_anything_is_done(tune, word, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # `run` appends the folder
    for config in ("phi3_mini_lora", "gone.yaml"):
        with pytest.raises(ConfigError) as error:
            tune("run", OURS, "--config", config, word)
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "torchrun",
    [pytest.param([], marks=pytest.mark.exhaustive), ["--nproc_per_node", "1"]],
    ids=["one", "torchrun"],
)
def test_a_slash_path_runs_our_recipe_from_any_folder(tmp_path, torchrun):
    run = ["tune", "run", *torchrun, BY_PATH, "--config", "phi3_mini_lora", "dtype=int4"]
    done = warm.run(*run, cwd=tmp_path)
    assert done.returncode == 1
    assert "phi3_plugin: ConfigError: " in done.stderr and "dtype: 'int4'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("file", some(OF_RUNS, quick={"phi3_mini_full_8gpu"}))
def test_run_reaches_the_recipe_and_shows_our_error_as_one_line(file, tmp_path):
    recipe = recipes_of(file)[0]
    keys = ("checkpoint_dir=absent", "output_dir=out", "dataset.source=chats.jsonl")
    run = [BIN / "tune", "run", recipe, "--config", file.stem, *keys]
    done = command(*run, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    kind = "ConfigError" if recipe == OURS else "MissingFileError"
    assert last.startswith(f"phi3_plugin: {kind}: checkpoint_dir") and "absent" in last


@pytest.mark.slow
def test_a_traceback_is_shown_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("PHI3_PLUGIN_TRACEBACK", "1")
    run = ["tune", "run", RECIPE, "--config", "phi3_mini_lora", "checkpoint_dir=absent"]
    done = warm.run(*run, "output_dir=out", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "MissingFileError: " in done.stderr


@pytest.mark.slow
def test_errors_that_are_not_ours_keep_their_traceback(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 0\n")
    done = warm.run("tune", "run", RECIPE, "--config", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "phi3_plugin: " not in done.stderr


@pytest.mark.slow
def test_an_edited_copy_wins_over_the_registered_config(tmp_path):
    text = CONFIGS[NAMES.index("phi3_mini_lora")].read_text()
    edited = text.replace("checkpoint_dir: null", "checkpoint_dir: edited", 1)
    (tmp_path / "phi3_mini_lora.yaml").write_text(edited)
    run = ["tune", "run", RECIPE, "--config", "phi3_mini_lora.yaml", "output_dir=out"]
    done = warm.run(*run, cwd=tmp_path)
    assert done.returncode == 1 and "edited" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.slow
@pytest.mark.exhaustive  # as they are under `tune run`, below
def test_torchrun_workers_see_the_registry(tmp_path):
    (tmp_path / "script.py").write_text(READ_REGISTRY)
    run = [BIN / "torchrun", "--standalone", "--nproc_per_node", "1", "script.py"]
    done = command(*run, cwd=tmp_path)
    assert done.returncode == 0 and "registry is complete" in done.stdout, done.stderr


@pytest.mark.slow
def test_tune_run_starts_torchrun_workers_that_see_the_registry(tmp_path):
    (tmp_path / "my_recipe.py").write_text(READ_REGISTRY)
    run = ["tune", "run", "--nproc_per_node", "1", "my_recipe.py", "--config", NAMES[0]]
    done = warm.run(*run, cwd=tmp_path)  # workers that import all are in test_cli.py
    assert done.returncode == 0 and "registry is complete" in done.stdout, done.stderr
