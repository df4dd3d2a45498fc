"""`phi3-tune`: torchtune's `tune`, with our names in it also where the start-up hook is off.

Beside the verbs of `tune` it has one for each recipe of ours that is not a training run:
`phi3-tune inspect-data ...` is `phi3-tune run phi3_inspect_data ...`. Those that take free text or
are no recipe have a parser of their own: adapter_cli.py, generate_cli.py.

The hook (autoload.py) can be switched off for us alone or for every backend of torch, and both
switches reach the workers that `tune run` starts. `phi3-tune` changes neither. It registers in its
own process, and lets each worker be another `phi3-tune`, which does the same.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from phi3_plugin import adapter_cli, autoload, generate_cli
from phi3_plugin.errors import Phi3Error

if TYPE_CHECKING:
    import argparse


VERBS = {
    "inspect-data": ("phi3_inspect_data", "Show what a run would be trained on"),
    "evaluate": ("phi3_evaluate", "Measure a model on held-out data"),
}
"""Our own verbs: the recipe that each runs, and what it does."""

PARSED = {
    "generate": ("phi3_generate", generate_cli.VERBS["generate"][0]),
    "chat": ("phi3_chat", generate_cli.VERBS["chat"][0]),
    "adapter": ("phi3_adapter", "Check, convert, merge and import adapters"),
    "import-config": (
        "phi3_import_config",
        "Turn the dictionaries of Microsoft's samples into our YAML",
    ),
}
"""Those that parse their own words: the module whose run() each calls, and what it does."""


def main() -> None:
    """Run `phi3-tune` with the command line of this process."""
    autoload.register()
    verb, words = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if verb in PARSED:
        sys.exit(_run_parsed(sys.argv[1:]))
    if verb in VERBS and {"-h", "--help"} & {*words}:
        return print(_help(verb), end="")
    from torchtune._cli.tune import TuneCLIParser  # not earlier: importing torchtune must find us

    tune = TuneCLIParser()
    subparsers = tune._parser._subparsers._group_actions[0]
    for verb, (_, does) in (VERBS | PARSED).items():
        subparsers.add_parser(verb, help=does)
    verbs = subparsers.choices
    tune._parser.description = "torchtune's command line, with Phi-3."
    for parser in (tune._parser, *verbs.values()):
        _rename(parser)
    _make_workers_register(verbs["run"].get_default("func").__self__)
    _run_recipes()
    tune.run(tune.parse_args())


def _run_parsed(words: list[str]) -> int:
    """Run a verb that has a parser; return the exit code. `--help` imports nothing else."""
    options = _parsed(words)
    try:
        module = import_module(f"phi3_plugin.recipes.{PARSED[words[0]][0]}")
        return int(module.run(options))
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except Phi3Error as error:
        if os.environ.get("PHI3_PLUGIN_TRACEBACK") == "1":
            raise
        print(f"phi3_plugin: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parsed(words: list[str]) -> Any:
    if words[0] in generate_cli.VERBS:
        return generate_cli.parse(words)
    return adapter_cli.parse(words)[1]


def _help(verb: str) -> str:
    """Return the help of a verb that is a recipe, for which `run` would ask for a config."""
    recipe, does = VERBS[verb]
    return (
        f"usage: phi3-tune {verb} [TORCHRUN-OPTIONS] --config CONFIG [KEY=VALUE ...]\n\n"
        f"{does}. CONFIG is that of a training run; KEY=VALUE replaces what it says.\n"
        f"The same as phi3-tune run {recipe}. docs/{verb.partition('-')[0]}.md lists the keys.\n"
    )


def _run_recipes() -> None:
    """Write a verb of ours as the `run` that it stands for."""
    if sys.argv[1:2] and sys.argv[1] in VERBS:
        sys.argv[1:2] = ["run", VERBS[sys.argv[1]][0]]


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
