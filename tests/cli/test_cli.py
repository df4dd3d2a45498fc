"""`phi3-tune`: `tune` under another name, with our names in it whatever the start-up hook does."""

import logging
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

import phi3_plugin
from phi3_plugin import cli, hook, options
from phi3_plugin.errors import ConfigError
from tests import warm
from tests.cli.test_tune import BIN, NAMES, READ_REGISTRY, RECIPE, command

SWITCHES = ["PHI3_PLUGIN_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"]
OFF = dict.fromkeys(SWITCHES, "0")
VERBS = ["ls", "cp", "run", "validate", "cat"]
OURS = [*cli.RECIPES, "train", "download", "push", "generate", "chat", "adapter", "import-config"]


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


HELP = """
import sys
from phi3_plugin.cli import main
for words in {words!r}:
    sys.argv = ["phi3-tune", *words.split()]
    try:
        main()
    except SystemExit as stopped:
        assert stopped.code == 0
assert not {{"torch", "torchtune", "omegaconf"}} & set(sys.modules)
"""


def help_of(fresh_python, *words: str) -> str:
    return fresh_python(HELP.format(words=words), COLUMNS="200")


def test_help_lists_every_verb_and_is_what_no_word_shows(fresh_python):
    out, same = help_of(fresh_python, "--help"), help_of(fresh_python, "")
    assert out == same and out.startswith("usage: phi3-tune ")
    assert all(re.search(rf"\n    {verb}\b", out) for verb in VERBS + OURS)
    out = help_of(fresh_python, "adapter --help")
    assert "PEFT, vLLM and llama.cpp make of an adapter as it lies there\n" in out


def test_the_help_of_every_verb_is_there_without_torch(fresh_python):
    words = [f"{verb} --help" for verb in (*VERBS, *cli.COMMANDS, *cli.RECIPES)]
    out = help_of(fresh_python, *words)
    for verb in (*VERBS, *cli.COMMANDS, *cli.RECIPES):
        (page,) = re.findall(rf"^usage: phi3-tune {verb} .*?(?=^usage: |\Z)", out, re.M | re.S)
        assert not re.search(r"\$ tune\b", page)
        for name in re.findall(r"docs/\w+\.md", page):
            assert (Path(__file__).parents[2] / name).is_file()
    for verb in (*cli.COMMANDS.values(), *cli.RECIPES.values()):
        assert {f.name for f in fields(verb.options)} == set(cli.field_docs(verb.options))


def test_help_is_quick(fresh_python):
    """The best of three, for the machine may be busy; an import of torch takes seconds."""
    code = f"""
import subprocess, sys, time
def took():
    begin = time.perf_counter()
    subprocess.run([{str(BIN / "phi3-tune")!r}, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin
print(min(took() for _ in range(3)))
"""
    assert float(fresh_python(code)) < 1


def test_the_usage_of_torchtunes_verbs_has_its_options():
    from torchtune._cli.tune import TuneCLIParser

    verbs = TuneCLIParser()._parser._subparsers._group_actions[0].choices
    assert [verb for verb in verbs if verb != "download"] == list(cli.TUNE)  # that is ours
    for name, (usage, _) in cli.TUNE.items():
        known = {flag for action in verbs[name]._actions for flag in action.option_strings}
        assert {*re.findall(r"--[\w-]+", usage)} <= known | {"--config"}


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


@pytest.fixture
def chosen(phi3_tune, monkeypatch):
    """Return what a command hands to the module that does it, and the module."""
    seen = []

    def import_module(name):
        return SimpleNamespace(run=lambda options: seen.append((name, options)) or 3)

    def run(*words: str):
        monkeypatch.setattr("phi3_plugin.cli.import_module", import_module)
        code, out = phi3_tune(*words)
        assert code == 3, out
        return seen.pop()

    return run


def test_words_become_options_in_any_order(chosen):
    words = ["--base", "b", "2 + 2?", "--temperature", "0", "--stop", "a", "3 + 3?"]
    module, o = chosen("generate", *words, "--stop", "b", "--raw")
    assert module == "phi3_plugin.recipes.phi3_generate"
    assert o == options.PromptOptions(
        checkpoint_dir=Path("b"), prompt=("2 + 2?", "3 + 3?"), stop=("a", "b"), raw=True
    )
    _, o = chosen("generate", "--checkpoint-dir", "b", "--file", "-", "-o", "out.jsonl")
    assert (o.prompts, o.output, o.prompt) == ("-", "out.jsonl", ())
    _, o = chosen("generate", "-", "--base", "b")
    assert (o.prompts, o.prompt) == ("-", ())
    module, o = chosen("chat", "--base", "b", "--adapter", "a", "--top-k", "5", "--seed", "0")
    assert module == "phi3_plugin.chat" and (o.adapter, o.top_k) == (Path("a"), 5)
    assert (o.top_k, o.max_new_tokens, o.temperature) == (5, 1024, 0)


def test_verbs_of_adapters_have_options_of_their_own(chosen):
    module, o = chosen("adapter", "convert", "a", "--to", "gguf", "--base", "b", "-o", "c")
    assert module == "phi3_plugin.recipes.phi3_adapter"
    folders = {"adapter": Path("a"), "checkpoint_dir": Path("b"), "output_dir": Path("c")}
    assert o == options.ConvertOptions(**folders, to="gguf")
    words = ["a", "--base", "b", "--output", "c", "--alpha", "0", "--rank", "0"]
    _, o = chosen("adapter", "import", *words, "--enable-lora", "true,false,True")
    expected = {"alpha": 0.0, "rank": 0, "enable_lora": [True, False, True]}
    assert o == options.ImportOptions(**folders, **expected)
    _, o = chosen("adapter", "check", "a", "--runtime", "vLLM", "--runtime", "PEFT", "--json")
    assert o == options.CheckOptions(adapter=Path("a"), runtime=("vLLM", "PEFT"), json=True)
    module, o = chosen("import-config", "s.json", "-o", "o.yaml", "--targets", "as-intended")
    assert module == "phi3_plugin.import_config" and o.targets == "as-intended"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "Hello"], "the following arguments are required: --base"),
        (["generate", "--base", "b", "--top-k", "x"], "argument --top-k: invalid int value: 'x'"),
        (["generate", "--base", "b", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["chat", "--base", "b", "Hello there"], "unrecognized arguments: Hello there"),
        (["chat", "--base", "b", "-o", "x"], "unrecognized arguments: -o x"),
        (["adapter", "chek"], "invalid choice: 'chek'"),
        (["adapter"], "the following arguments are required: VERB"),
        (["adapter", "check", "a", "--runtime", "tgi"], "invalid choice: 'tgi'"),
        (["talk"], "invalid choice: 'talk'"),
    ],
)
def test_words_that_cannot_be(phi3_tune, words, message):
    code, out = phi3_tune(*words)
    assert code == 2 and message in out


def test_values_that_cannot_be_are_an_error_of_ours(phi3_tune):
    code, out = phi3_tune("chat", "--base", "b", "--top-p", "2", "--min-p", "-1")
    assert code == 1 and out.startswith("phi3_plugin: ConfigError: ")
    assert "top_p: 2.0 must be" in out and "min_p: -1.0 must be" in out


def raising(error):
    """Return a function that raises it, whatever it is called with."""

    def function(*_, **__):
        raise error

    return function


def test_verbs_with_a_parser_end_in_a_line(phi3_tune, monkeypatch):
    error = ConfigError("top_k: -1 is wrong.")
    monkeypatch.setattr("phi3_plugin.cli.import_module", raising(error))
    line = "phi3_plugin: ConfigError: top_k: -1 is wrong.\n"
    assert phi3_tune("chat", "--base", "b") == (1, line)


@pytest.mark.parametrize("words", [("chat", "--base", "b"), ("run", "phi3_evaluate")])
def test_ctrl_c_while_it_imports_is_a_line(phi3_tune, monkeypatch, words):
    for name in ("import_module", "as_tune"):
        monkeypatch.setattr(cli, name, raising(KeyboardInterrupt()))
    monkeypatch.setattr("os._exit", sys.exit)
    assert phi3_tune(*words) == (130, "\nphi3_plugin: stopped.\n")
    monkeypatch.setenv("PHI3_PLUGIN_TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt):
        phi3_tune(*words)


@pytest.mark.parametrize(
    ("recipe", "is_ours"), [("phi3_evaluate", True), ("lora_finetune_single_device", False)]
)
def test_ctrl_c_under_tune_is_a_line_where_a_recipe_of_ours_was_asked_for(
    recipe, is_ours, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "excepthook", lambda *_: print("as ever", file=sys.stderr))
    monkeypatch.setattr(sys, "argv", ["tune", "run", recipe, "--config", "phi3_mini_lora"])
    monkeypatch.setattr("os._exit", raising(SystemExit))
    hook._show_errors_as_a_line()
    with suppress(SystemExit):
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == ("\nphi3_plugin: stopped.\n" if is_ours else "as ever\n")


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # pytest has the stderr
def test_the_evaluation_takes_every_run_and_many_processes(phi3_tune, torchrun):
    phi3_tune("run", "--nproc_per_node", "2", "phi3_evaluate", "--config", "phi3_mini_lora")
    assert [args.nproc_per_node for args in torchrun] == ["2"]


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # pytest has the stderr
@pytest.mark.parametrize("recipe", ["lora_finetune_distributed", "folder/mine.py"])
def test_workers_are_phi3_tune_with_the_words_as_typed(phi3_tune, torchrun, recipe, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.py").touch()
    words = [recipe, "--config", "phi3_mini_lora", "seed=1"]
    phi3_tune("run", "--nnodes", "1", "--nproc_per_node=2", *words)
    (args,) = torchrun
    assert args.module and args.standalone and args.nproc_per_node == "2"
    assert args.training_script == "phi3_plugin.cli"
    assert args.training_script_args == ["run", *words]


def test_recipes_for_one_device_refuse_workers_as_under_tune(phi3_tune, torchrun):
    code, out = phi3_tune("run", "--nproc_per_node", "2", RECIPE, "--config", "phi3_mini_lora")
    assert code == 2 and "does not support distributed training" in out and not torchrun


@pytest.mark.exhaustive  # both are off in the two tests below
@pytest.mark.parametrize("switch", SWITCHES)
def test_it_registers_where_the_hook_is_switched_off(fresh_python, switch):
    code = "import sys; from phi3_plugin.cli import main; sys.argv = ['phi3-tune', 'ls']; main()"
    assert set(NAMES) <= set(fresh_python(code, **{switch: "0"}).split())


def then_runs(file: str) -> str:
    """Return the end of a script that goes on as a recipe."""
    return f"import runpy; runpy.run_path({file!r}, run_name='__main__')"


@pytest.mark.slow
def test_with_the_hook_off_a_worker_sees_the_registry_and_our_errors_end_in_one_line(tmp_path):
    """What a launcher starts, as the next test shows, in an interpreter that imports it all."""
    from torchtune import training

    stock = training.__file__.partition("torchtune/training")[0] + f"recipes/{RECIPE}.py"
    (tmp_path / "my_recipe.py").write_text(READ_REGISTRY + then_runs(stock))
    words = ["run", "my_recipe.py", "--config", NAMES[0], "checkpoint_dir=absent", "output_dir=out"]
    worker = [sys.executable, "-m", "phi3_plugin.cli", *words]
    done = command(*worker, cwd=tmp_path, LOCAL_RANK="0", **OFF)
    assert done.returncode == 1 and "registry is complete" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
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
    done = warm.run("phi3-tune", *words, cwd=tmp_path, **environment)
    assert done.returncode == 0 and "registry is complete" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_worker_of_torchrun_sees_the_registry_and_says_what_is_wrong_in_one_line(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "lora_finetune.py"
    config = Path(__file__).parents[2] / "configs" / "phi3_demo.yaml"
    (tmp_path / "worker.py").write_text(READ_REGISTRY + then_runs(str(recipe)))
    done = subprocess.run(
        [sys.executable, "worker.py", "--config", config, "output_dir=out", "batch_size=-1"],
        cwd=tmp_path,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "any", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "registry is complete" in done.stdout
    assert "phi3_plugin: ConfigError: " in done.stderr
    assert "batch_size: -1 must be a whole number above 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train x.csv --batch_size=2", "--batch_size=2: keys are typed without dashes, as batch_"),
        ("train", "phi3-tune train: error: the following arguments are required: DATA"),
        ("chat --bsae x", "phi3-tune chat: error: "),
        ("gone", "phi3-tune: error: argument VERB: invalid choice: 'gone'"),
    ],
)
def test_a_mistake_is_one_line(phi3_tune, words, line):
    code, out = phi3_tune(*words.split())
    assert code == 2 and out.count("\n") == 1 and line in out


def test_version(phi3_tune):
    assert phi3_tune("--version") == (0, f"phi3-tune {phi3_plugin.__version__}\n")


def test_a_shell_is_told_how_a_word_goes_on(phi3_tune, monkeypatch):
    asked = []

    def autocomplete(parser):
        asked.append(parser.prog)
        sys.exit(0)

    argcomplete = SimpleNamespace(autocomplete=autocomplete)
    monkeypatch.setitem(sys.modules, "argcomplete", argcomplete)
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    assert phi3_tune("tra")[0] == 0
    assert asked == ["phi3-tune"]


@pytest.mark.slow
def test_they_are_not_shown_where_torchtune_is_the_first_to_import_torch():
    code = "import torchtune, torchao.prototype.mx_formats"  # as `tune` does it
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_torchaos_warnings_are_not_shown_and_others_are(caplog):
    import torchtune  # noqa: F401

    caplog.clear()  # of what is said where nothing has imported it before
    kernel, enum = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
    kernel.warning("Failed to load /x/_C_mxfp8.so: Could not load this library: /x/_C_mxfp8.so")
    enum.warning("%s is an Enum subclass and is now natively supported by torch.compile", 1)
    assert caplog.messages == []
    kernel.warning("Something else")
    kernel.warning("Failed to load a model")
    assert caplog.messages == ["Something else", "Failed to load a model"]
