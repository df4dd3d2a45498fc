"""`phi3-tune`: torchtune's `tune`, with our names in it also where the start-up hook is off.

Beside the verbs of `tune` it has one for each recipe of ours that is not a training run:
`phi3-tune inspect-data ...` is `phi3-tune run phi3_inspect_data ...`. Those of adapters have a
parser of their own, in adapter_cli.py.

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

from phi3_plugin import adapter_cli, autoload
from phi3_plugin.errors import Phi3Error

if TYPE_CHECKING:
    import argparse


VERBS = {"inspect-data": ("phi3_inspect_data", "Show what a run would be trained on")}
"""Our own verbs: the recipe that each runs, and what it does."""

ADAPTER_VERBS = {
    "adapter": "Check, convert, merge, import and compare adapters",
    "import-config": "Turn the dictionaries of Microsoft's samples into our YAML",
}
"""Those that adapter_cli.py runs."""


def main() -> None:
    """Run `phi3-tune` with the command line of this process."""
    autoload.register()
    if sys.argv[1:2] and sys.argv[1] in ADAPTER_VERBS:
        sys.exit(_run_adapter_verb(sys.argv[1:]))
    from torchtune._cli.tune import TuneCLIParser  # not earlier: importing torchtune must find us

    tune = TuneCLIParser()
    subparsers = tune._parser._subparsers._group_actions[0]
    ours = {verb: does for verb, (_, does) in VERBS.items()} | ADAPTER_VERBS
    for verb, does in ours.items():
        subparsers.add_parser(verb, help=does)
    verbs = subparsers.choices
    tune._parser.description = "torchtune's command line, with Phi-3."
    for parser in (tune._parser, *verbs.values()):
        _rename(parser)
    _make_workers_register(verbs["run"].get_default("func").__self__)
    _run_recipes()
    tune.run(tune.parse_args())


def _run_adapter_verb(words: list[str]) -> int:
    """Run `adapter` or `import-config`; return the exit code. `--help` imports nothing else."""
    command, options = adapter_cli.parse(words)
    name = "phi3_adapter" if command == "adapter" else "phi3_import_config"
    try:
        return int(import_module(f"phi3_plugin.recipes.{name}").run(options))
    except Phi3Error as error:
        if os.environ.get("PHI3_PLUGIN_TRACEBACK") == "1":
            raise
        print(f"phi3_plugin: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _run_recipes() -> None:
    """Write a verb of ours as the `run` that it stands for; its `--help` is that of `run`."""
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
