"""What we change in `tune run` and in `tune ls`.

hook.py calls :func:`change_run` and :func:`change_ls` when torchtune's module has been imported, so
this file keeps to its rule: the standard library alone at import. Each function puts a method in
the place of torchtune's, which it calls in the end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path
    from types import ModuleType

STOPPED = 130
"""What a worker returns that was stopped and has said so."""
SAVED = 128 + signal.SIGTERM
"""And one that has saved before."""


def change_run(run: ModuleType, recipes: Mapping[str, Path], configs: Collection[str]) -> None:
    """Let `tune run` take local configs first, refuse lonely nodes, and pass signals on.

    Args:
        run: The module ``torchtune._cli.run``.
        recipes: Our recipes by name, which end well on SIGTERM and SIGINT.
        configs: The names of our configs.
    """
    stock_config, stock_distributed = run.Run._get_config, run.Run._run_distributed
    stock_run = run.Run._run_cmd
    ours = spellings(recipes)

    def _get_config(self: Any, config_str: str, specific_recipe: Any) -> Any:
        stem, suffix = os.path.splitext(config_str)
        is_path = suffix in (".yaml", ".yml") or os.path.basename(config_str) != config_str
        if is_path and os.path.isfile(config_str):
            if stem in configs:
                text = f"--config: {os.path.abspath(config_str)}, not the shipped {stem}."
                print(f"phi3_plugin: {text}", file=sys.stderr)
            return None  # "not registered": `tune run` then reads config_str as a path
        # A bare name is a shipped config, whatever lies in the current folder: a YAML is a program.
        config = stock_config(self, config_str, specific_recipe)
        if config is None and suffix == ".yaml" and stem in configs:
            return stock_config(self, stem, specific_recipe)
        return config

    def _run_distributed(self: Any, args: Any, is_builtin: bool) -> None:
        nodes = str(args.nnodes).rpartition(":")[2]
        if nodes.isdigit() and int(nodes) > 1 and not args.rdzv_endpoint:
            # Each node would train its own model, in silence
            self._parser.error(
                f"--nnodes {args.nnodes} needs --rdzv_endpoint HOST:PORT (and --rdzv_backend "
                "c10d), the same on every node. Without it each node trains alone."
            )
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup, to outlive the terminal
            handled = args.signals_to_handle.split(",")
            args.signals_to_handle = ",".join(name for name in handled if name != "SIGHUP")
        # `phi3-tune` starts itself in the workers, with the recipe after the verb.
        recipe = args.recipe_args[1] if args.recipe == "phi3_plugin.cli" else args.recipe
        if recipe not in ours:
            stock_distributed(self, args, is_builtin)
            return
        with ending_at_once(), signals_for_workers() as asked:
            stock_distributed(self, args, is_builtin)
            if asked:
                sys.exit(0)

    def _run_cmd(self: Any, args: Any) -> None:
        if self._get_recipe(args.recipe) is None and not is_module(args.recipe):
            from phi3_plugin.errors import ConfigError
            from phi3_plugin.options import closest

            meant = closest(args.recipe, [recipe.name for recipe in run.get_all_recipes()])
            advice = f"Did you mean {meant}?" if meant else "`tune ls` lists the recipes."
            raise ConfigError(f"{args.recipe} is neither a recipe nor a file. {advice}")
        stock_run(self, args)

    run.Run._run_cmd = _run_cmd
    run.Run._get_config = _get_config
    run.Run._run_distributed = _run_distributed


def is_module(name: str) -> bool:
    """Whether Python finds a recipe that is named as a file or as a module."""
    module = name.removesuffix(".py").replace("/", ".")
    if os.path.isfile(name) or os.path.isfile(module.replace(".", "/") + ".py"):
        return True
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def change_ls(ls: Any, recipes: Collection[str], configs: Collection[str]) -> None:
    """Let `tune ls` show each config of ours once: with the first recipe of ours that takes it.

    Args:
        ls: The module ``torchtune._cli.ls``.
        recipes: The names of our recipes.
        configs: The names of our configs.
    """
    stock, of_all = ls.List._ls_cmd, ls.get_all_recipes

    def shown() -> list[Any]:
        left, rows = set(configs), []
        for recipe in of_all():
            names = [c for c in recipe.configs if c.name not in configs]
            if recipe.name in recipes:
                names += [c for c in recipe.configs if c.name in left]
                left -= {c.name for c in names}
            rows.append(replace(recipe, configs=names))
        return rows

    def _ls_cmd(self: Any, args: Any) -> None:
        ls.get_all_recipes = shown
        try:
            stock(self, args)
        finally:
            ls.get_all_recipes = of_all
        print(
            "\nThe configs of phi3_lora_finetune are taken by phi3_evaluate and phi3_inspect_data\n"
            "too; those that end in _lora and _qlora by torchtune's LoRA recipes as well,\n"
            "phi3_mini_dpo and phi3_mini_distill by its recipes of DPO and of distillation."
        )

    ls.List._ls_cmd = _ls_cmd


def spellings(recipes: Mapping[str, Path]) -> set[str]:
    """Return what recipes are called by their names, and by the paths that work from anywhere."""
    found = {*recipes, *map(str, recipes.values())}
    for file in recipes.values():
        found |= {f"phi3_plugin/recipes/{file.name}", f"phi3_plugin.recipes.{file.stem}"}
    return found


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Leave out, at a sys.exit, the seconds in which Python takes itself apart.

    Within it the process is a command's alone, and nobody waits for more of it.
    """
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.code, int):  # a text, to be printed
            raise
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the terminal may be gone
                stream.flush()
        os._exit(end.code)


@contextlib.contextmanager
def signals_for_workers() -> Iterator[list[signal.Signals]]:
    """Within it, torchrun lets its workers end at the first of three signals, and waits for them.

    SIGTERM, SIGINT and SIGHUP, which a closed terminal sends.

    By itself torchrun ends with an error and kills workers that need more than 30 seconds. That is
    still what a second signal does, and a signal before there are workers. Workers get a SIGTERM
    for any: one that is not listening yet, for it imports, dies of that without a word.
    A worker that ends with 130, for nothing is to be saved, is no failure: the command does too.
    One that has saved ends with 143, and the command with the number of the signal that came.
    A worker that failed has said why; torchrun's account of it is shown if it was killed instead.

    Yields:
        The signal, once it has come.
    """
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    stock, asked = PContext.start, list[signal.Signals]()

    def start(workers: Any) -> None:
        if asked:  # only --max_restarts leads here: it must not undo what was asked
            raise SignalException(f"Not restarted after {asked[0].name}", asked[0])
        stock(workers)
        _listen(workers, asked)

    # They say which worker is sent which signal, and who failed first
    logs = [logging.getLogger(module.__module__) for module in (PContext, SimpleElasticAgent)]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    PContext.start = start  # type: ignore[assignment, method-assign]
    try:
        yield asked
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if asked and SAVED in codes:
            raise SystemExit(128 + asked[0]) from None
        _, first = error.get_first_failure()
        # torchrun ends the others when the first has ended, by a SIGTERM
        if asked and (STOPPED in codes or first.exitcode == -signal.SIGTERM):
            main = error.failures.get(0)
            if main is None or main.exitcode != STOPPED:  # else it has said so, for all
                _say(f"{asked[0].name}: stopped.")
            raise SystemExit(STOPPED) from None
        if first.exitcode < 0:  # the number of a signal
            raise
        raise SystemExit(first.exitcode) from None
    except SignalException as error:  # torchrun has ended the workers
        _say(f"{signal.Signals(error.sigval).name}: stopped at once.")
        raise SystemExit(STOPPED) from None
    finally:
        PContext.start = stock  # type: ignore[method-assign]
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _listen(workers: Any, asked: list[signal.Signals]) -> None:
    """Take torchrun's place as the handler of the first signal, and note which one it was."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    # torchrun has handlers in the main thread only, and for what --signals-to-handle lists.
    of_torchrun = {
        number: handler
        for number, handler in handlers.items()
        if str(getattr(handler, "__module__", "")).startswith("torch.")
    }

    def pass_on(number: int, frame: object) -> None:
        asked.append(signal.Signals(number))
        for each, handler in of_torchrun.items():
            signal.signal(each, handler)
        _say(f"{asked[0].name} goes to the workers, to save and end. Repeat it to cut them short.")
        # Torchrun gives workers a session of their own, so Ctrl-C in a terminal comes this way too.
        for worker in workers.subprocess_handlers.values():
            worker.proc.send_signal(signal.SIGTERM)  # not sent to one that has ended

    for number in of_torchrun:
        signal.signal(number, pass_on)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # print() fails if a signal came within another one
        os.write(2, f"phi3_plugin: {text}\n".encode())
