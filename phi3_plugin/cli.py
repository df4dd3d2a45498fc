"""`phi3-tune`: torchtune's `tune` with our verbs, and our names whatever the start-up hook does.

    phi3-tune run phi3_lora_finetune --config ...   and the other verbs of `tune`
    phi3-tune evaluate --config ...                 a recipe of ours: `run phi3_evaluate`
    phi3-tune generate --base ... "What is 2 + 2?"  a dataclass of options.py, read and run

Needs the standard library alone until a verb runs, so that `--help` is quick.

The hook (hook.py) can be switched off for us alone or for every backend of torch, and both
switches reach the workers that `tune run` starts. `phi3-tune` changes neither. It registers in its
own process, and lets each worker be another `phi3-tune`, which does the same.
"""

import argparse
import ast
import inspect
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from phi3_plugin import __version__, hook, options
from phi3_plugin.errors import Phi3Error
from phi3_plugin.options import Flags
from phi3_plugin.terminal import end_stopped, show_error


class Verb(NamedTuple):
    """What our own verbs take, and who does them."""

    options: type[Any]
    module: str
    """Its ``run()`` takes the options and returns the exit code; or, of a recipe, its name."""


COMMANDS = {
    "train": Verb(options.TrainOptions, "first_run"),
    "download": Verb(options.DownloadOptions, "hub"),
    "push": Verb(options.PushOptions, "upload"),
    "generate": Verb(options.PromptOptions, "recipes.phi3_generate"),
    "chat": Verb(options.ChatOptions, "chat"),
    "adapter check": Verb(options.CheckOptions, "recipes.phi3_adapter"),
    "adapter convert": Verb(options.ConvertOptions, "recipes.phi3_adapter"),
    "adapter merge": Verb(options.MergeOptions, "recipes.phi3_adapter"),
    "adapter import": Verb(options.ImportOptions, "recipes.phi3_adapter"),
    "convert-base": Verb(options.ConvertBaseOptions, "recipes.phi3_adapter"),
    "import-config": Verb(options.ImportConfigOptions, "import_config"),
}
"""Those whose words become a dataclass."""

RECIPES = {
    "inspect-data": Verb(options.InspectOptions, "phi3_inspect_data"),
    "evaluate": Verb(options.EvaluateOptions, "phi3_evaluate"),
}
"""Those that run a recipe with the YAML of a training run."""

TUNE = {
    "ls": ("", "List all recipes and configs"),
    "cp": (
        "RECIPE_OR_CONFIG DESTINATION [--no-clobber] [--make-parents]",
        "Copy a recipe or config to a place of your own",
    ),
    "run": (
        "[--nproc_per_node N] [--nnodes N] [--rdzv_backend c10d] [--rdzv_endpoint HOST:PORT] "
        "[TORCHRUN-OPTIONS] RECIPE --config CONFIG [KEY=VALUE ...]",
        "Run a recipe, in one process or in many",
    ),
    "validate": ("CONFIG", "Say whether a config is well-formed"),
    "cat": ("CONFIG [--sort]", "Print a config"),
}
"""torchtune's own verbs: what they take, and what they do."""


def main() -> None:
    """Run `phi3-tune` with the command line of this process."""
    try:
        _main()
    except KeyboardInterrupt:
        if os.environ.get("PHI3_PLUGIN_TRACEBACK") == "1":
            raise
        end_stopped()


def _main() -> None:
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how a word goes on
        import argcomplete

        argcomplete.autocomplete(parsers()[0])
    hook.register()
    words = sys.argv[1:]
    asks_for_help = bool({"-h", "--help"} & {*words})
    if words and words[0] in (*TUNE, *RECIPES) and not asks_for_help:
        return tune(words)
    top, verbs = parsers()
    name = next((name for name in COMMANDS if words[: name.count(" ") + 1] == name.split()), None)
    if name is None:
        top.parse_args(words or ["--help"])  # ends with the help, or says what is wrong
        return None
    given = vars(verbs[name].parse_intermixed_args(words[name.count(" ") + 1 :]))
    sys.exit(_run(name, {key: value for key, value in given.items() if value is not None}))


def _run(name: str, given: dict[str, Any]) -> int:
    """Do a verb of ours and return the exit code."""
    verb = COMMANDS[name]
    if given.get("prompt") == ["-"]:  # standard input, as everywhere, and no prompt
        given |= {"prompt": [], "prompts": "-"}
    try:
        chosen = options.read_options(verb.options, given, f"phi3-tune {name}")
        return int(import_module(f"phi3_plugin.{verb.module}").run(chosen))
    except Phi3Error as error:
        if os.environ.get("PHI3_PLUGIN_TRACEBACK") == "1":
            raise
        show_error(error)
        return 1


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        word = re.match(r"unrecognized arguments: (--?[\w-]+(?:=.*)?)", message)
        if word and self.prog.endswith(" train"):
            message = options.no_key(word[1].split()[0])
        self.exit(2, f"{self.prog}: error: {message} See {self.prog} --help.\n")


# What can be typed: the fields of the dataclasses, with the text under each as its help.


def parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser of the whole command line, and those of `COMMANDS` in it."""
    top = _Parser(prog="phi3-tune", description="torchtune's command line, with Phi-3.")
    top.add_argument("--version", action="version", version=f"phi3-tune {__version__}")
    commands = top.add_subparsers(title="subcommands", required=True, metavar="VERB")
    for name, (usage, does) in TUNE.items():
        commands.add_parser(
            name,
            help=does,
            description=f"{does}.",
            usage=f"phi3-tune {name} {usage}",
            epilog=f"A verb of torchtune's: `tune {name} --help` explains every option.",
        )
    for name, (taken, recipe) in RECIPES.items():
        does = inspect.cleandoc(taken.__doc__ or "")
        commands.add_parser(
            name,
            help=does.rstrip("."),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"phi3-tune {name} [TORCHRUN-OPTIONS] --config CONFIG [KEY=VALUE ...]",
            description=f"{does} CONFIG is that of a training run; KEY=VALUE replaces what it "
            f"says.\nThe same as phi3-tune run {recipe}; docs/{name.partition('-')[0]}.md "
            "explains. Keys of its own:\n\n"
            + "\n".join(f"  {key:<22} {text}" for key, text in field_docs(taken).items()),
        )
    does = "Check, convert, merge and import adapters"
    adapter = commands.add_parser("adapter", help=does, description=f"{does}.")
    inner = adapter.add_subparsers(required=True, metavar="VERB")
    verbs = {}
    for name, verb in COMMANDS.items():
        does = inspect.cleandoc(verb.options.__doc__ or "")
        group, last = (inner, name.split()[-1]) if " " in name else (commands, name)
        verbs[name] = group.add_parser(last, help=_first_sentence(does), description=does)
        add_arguments(verbs[name], verb.options)
    return top, verbs


def _first_sentence(text: str) -> str:
    return text.splitlines()[0].split(". ")[0].rstrip(".")


def add_arguments(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Let a parser take the fields of a dataclass. What is not typed is None."""
    docs, needed = field_docs(cls), options.required(cls)
    for key, hint in get_type_hints(cls, include_extras=True).items():
        usual = Flags((f"--{key.replace('_', '-')}",))
        flags = [usual, *options.marks(hint, Flags)][-1]  # that of an alias comes before its own
        how: dict[str, Any] = {"help": docs[key].replace("%", "%%"), **_typed(hint, flags)}
        if flags.names:
            parser.add_argument(*flags.names, dest=key, required=key in needed, **how)
        else:
            parser.add_argument(key, **how)


def _typed(hint: Any, flags: Flags) -> dict[str, Any]:
    """Return what argparse is told of the values that a field takes."""
    kinds = {*_types(hint)}
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return {"choices": choices}
    if bool in kinds:
        return {"action": "store_true", "default": None}
    if tuple in kinds and not flags.names:
        return {"nargs": "*", "metavar": flags.metavar, "default": None}
    if tuple in kinds:
        shape = {"choices": flags.choices} if flags.choices else {"metavar": flags.metavar}
        return {"action": "append", **shape}
    for number in (int, float):
        if number in kinds:
            return {"type": number, "metavar": flags.metavar or "N"}
    return {"metavar": flags.metavar}


def _types(hint: Any) -> list[Any]:
    """Return the types in an annotation, without what marks them."""
    hint = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
    if get_origin(hint) is Literal or not get_args(hint):
        return [hint]
    if get_origin(hint) in (list, tuple):
        return [get_origin(hint)]
    return [inner for part in get_args(hint) for inner in _types(part)]


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Return the text that stands under each field of a dataclass in its source."""
    found = {}
    for one in reversed(cls.__mro__):
        for line, under in pairwise(_classes(one.__module__).get(one.__name__, ())):
            match line, under:
                case ast.AnnAssign(target=ast.Name(key)), ast.Expr(ast.Constant(str(text))):
                    found[key] = " ".join(text.split())
    return found


@cache
def _classes(module: str) -> dict[str, list[ast.stmt]]:
    """Return what stands in each class of a module of ours."""
    if module != options.__name__:
        return {}
    tree = ast.parse(inspect.getsource(options))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


# The verbs of torchtune, and recipes of ours, run by its own command line.


def tune(words: Sequence[str]) -> None:
    """Hand a verb to torchtune's command line, as if its name were ours."""
    from torchtune._cli.tune import TuneCLIParser  # not earlier: importing torchtune must find us

    sys.argv[1:] = as_tune(words)
    tune = TuneCLIParser()
    verbs = tune._parser._subparsers._group_actions[0].choices
    for parser in (tune._parser, *verbs.values()):
        _rename(parser)
    _make_workers_register(verbs["run"].get_default("func").__self__)
    tune.run(tune.parse_args())


def as_tune(words: Sequence[str]) -> list[str]:
    """Return words in which a recipe of ours is the `run` that it stands for."""
    if words[0] in RECIPES:
        return ["run", RECIPES[words[0]].module, *words[1:]]
    return [*words]


def _rename(parser: argparse.ArgumentParser) -> None:
    """Say `phi3-tune` wherever a parser says `tune` to the user."""
    for field in ("prog", "usage", "epilog"):
        text = getattr(parser, field)
        if text is not None:
            setattr(parser, field, re.sub(r"(?<![\w-])tune\b", "phi3-tune", text))


def _make_workers_register(run: Any) -> None:
    """Let torchrun start `phi3-tune run RECIPE ...` in each worker instead of the bare recipe."""
    stock = run._run_distributed

    def _run_distributed(args: argparse.Namespace, is_builtin: bool) -> None:
        as_typed = sys.argv[-len(args.recipe_args) - 1 :]  # args holds paths, which `run` refuses
        args.recipe, args.recipe_args = "phi3_plugin.cli", ["run", *as_typed]
        stock(args, is_builtin=False)  # so that torchrun takes the recipe as a module

    run._run_distributed = _run_distributed


if __name__ == "__main__":
    main()
