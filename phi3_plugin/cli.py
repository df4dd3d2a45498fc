"""`phi3-tune`: torchtune's `tune`, with our names in it also where the start-up hook is off.

Beside the verbs of `tune` it has one for each recipe of ours that is not a training run:
`phi3-tune inspect-data ...` is `phi3-tune run phi3_inspect_data ...`.

The hook (autoload.py) can be switched off for us alone or for every backend of torch, and both
switches reach the workers that `tune run` starts. `phi3-tune` changes neither. It registers in its
own process, and lets each worker be another `phi3-tune`, which does the same.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from phi3_plugin import autoload

if TYPE_CHECKING:
    import argparse


VERBS = {"inspect-data": ("phi3_inspect_data", "Show what a run would be trained on")}
"""Our own verbs: the recipe that each runs, and what it does."""


def main() -> None:
    """Run `phi3-tune` with the command line of this process."""
    autoload.register()
    from torchtune._cli.tune import TuneCLIParser  # not earlier: importing torchtune must find us

    tune = TuneCLIParser()
    subparsers = tune._parser._subparsers._group_actions[0]
    for verb, (_, does) in VERBS.items():
        subparsers.add_parser(verb, help=does)
    verbs = subparsers.choices
    tune._parser.description = "torchtune's command line, with Phi-3."
    for parser in (tune._parser, *verbs.values()):
        _rename(parser)
    _make_workers_register(verbs["run"].get_default("func").__self__)
    _run_recipes()
    tune.run(tune.parse_args())


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
