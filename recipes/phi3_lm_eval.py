"""Tasks of EleutherAI's lm-evaluation-harness, on a base or a base with an adapter.

    phi3-tune lm-eval --base Phi-3-mini-4k --adapter my_adapter/epoch_0 --tasks arc_easy

Everything else goes to the harness's own command line as it is. See docs/lm_eval.md.
"""

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from phi3_plugin.config import read_config
from phi3_plugin.errors import ConfigError, MissingFileError, Phi3Error

OTHERS = ("ls", "validate")
"""Commands of the harness that need no model; without one it is `run`."""

TASKS = ("-t", "--tasks", "-C", "--config")
"""What says which tasks are run."""

BATCH = ("-b", "--batch_size", "-C", "--config")
"""What says how many documents are scored at a time."""


def run(words: Sequence[str]) -> int:
    """Run the harness and return the exit code.

    Args:
        words: What was typed after the verb.

    Raises:
        ConfigError: The harness is not installed, a key is missing or wrong.
        MissingFileError: Base or adapter is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm_eval is not installed: pip install 'phi3-plugin[lm_eval]'")
    line = as_typed_for_the_harness(words)
    from lm_eval.__main__ import cli_evaluate

    if "--model" in line:  # help and the like need none
        importlib.import_module("phi3_plugin.recipes.phi3_lm_eval_model")  # registers it
    try:
        with _typed(line):
            cli_evaluate()
    except Phi3Error:
        raise
    except ValueError as error:  # as the harness says that a task or a key is unknown
        raise ConfigError(f"lm_eval: {error}") from error
    return 0


def as_typed_for_the_harness(words: Sequence[str]) -> list[str]:
    """Return the harness's own command line.

    Args:
        words: What was typed after our verb.

    Raises:
        ConfigError: The base or a task is not named.
        MissingFileError: Base or adapter is not there.
    """
    if words[:1] and words[0] in OTHERS:
        return list(words)
    given, rest = parser().parse_known_args(words[1:] if words[:1] == ["run"] else words)
    if given.help:
        parser().print_help()
        print("\nAll else is for the harness:\n")
        return ["run", "--help"]
    model = {key: value for key, value in vars(given).items() if value and key != "help"}
    _check(model, rest)
    batch = [] if any(_is(word, BATCH) for word in rest) else ["--batch_size", "auto"]
    # As JSON, since the harness takes a comma in a path for the next key.
    return ["run", "--model", "phi3_plugin", "--model_args", json.dumps(model), *batch, *rest]


def parser() -> argparse.ArgumentParser:
    """Return the parser of what is ours."""
    own = argparse.ArgumentParser(
        prog="phi3-tune lm-eval",
        usage="phi3-tune lm-eval --base DIR [--adapter DIR] --tasks TASK ... [of the harness]",
        description="Run tasks of EleutherAI's lm-evaluation-harness.",
        add_help=False,
        allow_abbrev=False,
    )
    own.add_argument("--base", metavar="DIR", help="folder of the base model, as it was downloaded")
    own.add_argument("--adapter", metavar="DIR", help="folder of an adapter, ours or anyone's")
    own.add_argument("--dtype", choices=("bf16", "fp32"), help="to compute in (default: bf16)")
    own.add_argument("--quantize", action="store_true", help="the base in NF4, as in QLoRA")
    own.add_argument("-h", "--help", action="store_true", help="also lists what the harness takes")
    return own


def _check(model: dict[str, str], rest: Sequence[str]) -> None:
    """Refuse what is not there, before the harness reads its tasks, which takes a while."""
    if any(_is(word, ("-M", "--model")) for word in rest):
        raise ConfigError("--model: it is phi3_plugin here. For another one call lm_eval itself.")
    if "base" not in model:
        raise ConfigError("--base is not set. Give the folder of the base model.")
    if not any(_is(word, TASKS) for word in rest):
        raise ConfigError("--tasks is not set. `phi3-tune lm-eval ls tasks` lists all there are.")
    read_config(model["base"])
    if "adapter" in model and not Path(model["adapter"]).exists():
        raise MissingFileError(f"--adapter: {model['adapter']} is not there.")


def _is(word: str, flags: Sequence[str]) -> bool:
    return word.partition("=")[0] in flags


@contextmanager
def _typed(words: Sequence[str]) -> Iterator[None]:
    """Let the harness read a command line."""
    before, sys.argv = sys.argv, ["lm-eval", *words]
    try:
        yield
    finally:
        sys.argv = before
