"""`phi3-tune`: `tune` under another name, with our names in it whatever the start-up hook does."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from phi3_plugin.errors import ConfigError
from tests.test_registration import BIN, NAMES, READ_REGISTRY, RECIPE, command

SWITCHES = ["PHI3_PLUGIN_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"]
OFF = dict.fromkeys(SWITCHES, "0")
VERBS = ["download", "ls", "cp", "run", "validate", "cat"]
OURS = ["inspect-data", "evaluate", "generate", "chat", "adapter", "import-config"]


@pytest.fixture
def phi3_tune(monkeypatch, tmp_path, capsys):
    """Call `phi3-tune` in this process, in an empty folder; return its exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # importing `tune` sets ours
    monkeypatch.setattr(sys, "path", [*sys.path])  # `run` appends the folder
    import torchtune  # noqa: F401  torchao says on stderr what it misses, once

    from phi3_plugin.cli import main

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["phi3-tune", *words])
        capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            return end.code, "".join(capsys.readouterr())
        return 0, "".join(capsys.readouterr())

    return run


@pytest.fixture
def torchrun(monkeypatch):
    """Catch what `run` hands to torchrun."""
    seen = []
    monkeypatch.setattr("torchtune._cli.run.run", seen.append)
    return seen


def phi3_tune_process(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return command(BIN / "phi3-tune", *words, cwd=cwd, **environment)


def test_help_names_itself_and_lists_the_verbs_of_tune(phi3_tune):
    code, out = phi3_tune("--help")
    usage = "usage: phi3-tune [-h] {" + ",".join(VERBS + OURS) + "}"
    assert code == 0 and " ".join(out.split()).startswith(usage)
    assert phi3_tune() == (0, out)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_names_itself(phi3_tune, verb):
    code, out = phi3_tune(verb, "--help")
    assert code == 0 and out.startswith(f"usage: phi3-tune {verb} ")
    assert not re.search(r"\$ tune\b", out)


@pytest.mark.parametrize("verb", ["inspect-data", "evaluate"])
def test_the_help_of_a_recipe_needs_no_config_and_is_quick(fresh_python, verb):
    code = f"""if True:
        import sys
        from phi3_plugin import cli
        sys.argv = ["phi3-tune", "{verb}", "--help"]
        cli.main()
        assert "torch" not in sys.modules"""
    said = fresh_python(code)
    assert said.startswith(f"usage: phi3-tune {verb} ")
    (page,) = re.findall(r"docs/\w+\.md", said)
    assert (Path(__file__).parents[1] / page).is_file()


def test_mistakes_are_reported_under_its_name(phi3_tune):
    code, out = phi3_tune("run", RECIPE)
    assert code == 2 and "phi3-tune run: error: " in out


def test_ls_prints_what_tune_prints(phi3_tune, monkeypatch, capsys):
    from torchtune._cli.tune import main

    monkeypatch.setattr(sys, "argv", ["tune", "ls"])
    main()
    expected = capsys.readouterr().out
    assert phi3_tune("ls") == (0, expected)


def test_one_process_runs_as_under_tune(phi3_tune, monkeypatch):
    seen = []
    monkeypatch.setattr("runpy.run_path", lambda path, run_name: seen.append((path, sys.argv)))
    phi3_tune("run", RECIPE, "--config", "phi3_mini_lora", "seed=1")
    ((path, argv),) = seen
    assert path.endswith(f"/recipes/{RECIPE}.py") and argv[0] == path
    assert argv[1] == "--config" and argv[2].endswith("/phi3_mini_lora.yaml")
    assert argv[3:] == ["seed=1"]


def test_a_verb_of_ours_runs_its_recipe(phi3_tune, monkeypatch):
    seen = []
    monkeypatch.setattr("runpy.run_path", lambda path, run_name: seen.append((path, sys.argv)))
    phi3_tune("inspect-data", "--config", "phi3_mini_lora", "samples=3")
    ((path, argv),) = seen
    assert path.endswith("/recipes/phi3_inspect_data.py")
    assert argv[2].endswith("/phi3_mini_lora.yaml") and argv[3:] == ["samples=3"]


def test_the_inspection_refuses_workers(phi3_tune, torchrun):
    code, out = phi3_tune("run", "--nproc_per_node", "2", "phi3_inspect_data", "--config", "x")
    assert code == 2 and "does not support distributed training" in out and not torchrun


def test_verbs_with_a_parser_run_their_module(phi3_tune, monkeypatch):
    seen = []

    def import_module(name):
        return SimpleNamespace(run=lambda given: seen.append((name, given)) or 3)

    monkeypatch.setattr("phi3_plugin.cli.import_module", import_module)
    assert phi3_tune("generate", "2 + 2?", "--base", "b")[0] == 3
    assert phi3_tune("chat", "--base", "b")[0] == 3
    assert phi3_tune("adapter", "check", "a")[0] == 3
    assert seen == [
        ("phi3_plugin.recipes.phi3_generate", {"checkpoint_dir": "b", "prompt": ["2 + 2?"]}),
        ("phi3_plugin.chat", {"checkpoint_dir": "b"}),
        ("phi3_plugin.recipes.phi3_adapter", {"verb": "check", "adapter": "a"}),
    ]


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (ConfigError("top_k: -1 is wrong."), 1, "phi3_plugin: ConfigError: top_k: -1 is wrong."),
        (KeyboardInterrupt(), 130, "Stopped."),
    ],
)
def test_verbs_with_a_parser_end_in_a_line(phi3_tune, monkeypatch, error, code, last):
    def import_module(name):
        raise error

    monkeypatch.setattr("phi3_plugin.cli.import_module", import_module)
    assert phi3_tune("chat", "--base", "b") == (code, last + "\n")


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # pytest has the stderr
def test_the_evaluation_takes_every_run_and_many_processes(phi3_tune, torchrun):
    phi3_tune("run", "--nproc_per_node", "2", "phi3_evaluate", "--config", "phi3_mini_lora")
    assert [args.nproc_per_node for args in torchrun] == ["2"]


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # pytest has the stderr
@pytest.mark.parametrize("recipe", ["lora_finetune_distributed", "folder/mine.py"])
def test_workers_are_phi3_tune_with_the_words_as_typed(phi3_tune, torchrun, recipe):
    words = [recipe, "--config", "phi3_mini_lora", "seed=1"]
    phi3_tune("run", "--nnodes", "1", "--nproc_per_node=2", *words)
    (args,) = torchrun
    assert args.module and args.standalone and args.nproc_per_node == "2"
    assert args.training_script == "phi3_plugin.cli"
    assert args.training_script_args == ["run", *words]


def test_recipes_for_one_device_refuse_workers_as_under_tune(phi3_tune, torchrun):
    code, out = phi3_tune("run", "--nproc_per_node", "2", RECIPE, "--config", "phi3_mini_lora")
    assert code == 2 and "does not support distributed training" in out and not torchrun


@pytest.mark.parametrize("switch", SWITCHES)
def test_it_registers_where_the_hook_is_switched_off(fresh_python, switch):
    code = "import sys; from phi3_plugin.cli import main; sys.argv = ['phi3-tune', 'ls']; main()"
    assert set(NAMES) <= set(fresh_python(code, **{switch: "0"}).split())


@pytest.mark.slow
def test_our_errors_end_in_one_line(tmp_path):
    words = ["run", RECIPE, "--config", NAMES[0], "checkpoint_dir=absent", "output_dir=out"]
    done = phi3_tune_process(*words, cwd=tmp_path, **OFF)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("phi3_plugin: MissingFileError: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [pytest.param({}, marks=pytest.mark.exhaustive), OFF],
    ids=["hook on", "hook off"],
)
def test_workers_see_the_registry(tmp_path, environment):
    (tmp_path / "my_recipe.py").write_text(READ_REGISTRY)
    words = ["run", "--nproc_per_node", "1", "my_recipe.py", "--config", NAMES[0]]
    done = phi3_tune_process(*words, cwd=tmp_path, **environment)
    assert done.returncode == 0 and "registry is complete" in done.stdout, done.stderr


def test_a_worker_of_torchrun_says_what_is_wrong_in_one_line(tmp_path):
    recipe = Path(__file__).parents[1] / "recipes" / "lora_finetune.py"
    config = Path(__file__).parents[1] / "configs" / "phi3_demo.yaml"
    done = subprocess.run(
        [sys.executable, recipe, "--config", config, "output_dir=out", "batch_size=-1"],
        cwd=tmp_path,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "any"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "phi3_plugin: ConfigError: " in done.stderr
    assert "batch_size: -1 must be a whole number above 0" in done.stderr
    assert "Traceback" not in done.stderr
