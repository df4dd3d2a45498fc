"""Show what a run would be trained on, before anything is trained and without its model.

    tune run phi3_inspect_data --config phi3_mini_lora checkpoint_dir=A output_dir=B \
      dataset.source=C

It takes the configuration of a run as it is. Keys of its own: samples=8, how many to show;
processes=1, for how many to count steps; compare=True, to compare ids and masks with transformers.
Needs no weights, and writes output_dir/data.html. Ends with 1 if training would not start.
"""

import os
import shutil
import sys
from dataclasses import replace
from typing import NamedTuple

from omegaconf import DictConfig
from torchtune import config

from phi3_plugin import settings as strict
from phi3_plugin.errors import ConfigError
from phi3_plugin.inspect import (
    CHAT_DATASETS,
    all_rows,
    compare_with_hf,
    problems,
    show,
    statistics,
    survey,
    truncation,
    unpacked,
)
from phi3_plugin.pages import for_stdout
from phi3_plugin.pages.inspection import Terminal, write_page
from phi3_plugin.train.feed import make_feed

WIDEST = 100
"""Columns of a terminal that are used at most."""


class Options(NamedTuple):
    """The keys that only this recipe has."""

    samples: int = 8
    processes: int = 1
    compare: bool = False


def take_options(cfg: DictConfig) -> Options:
    """Take the recipe's own keys out of a configuration.

    Raises:
        ConfigError: One has a value that it cannot have.
    """
    given = {key: cfg.pop(key) for key in Options._fields if key in cfg}
    options, wrong = Options(**given), list[str]()
    for key, least in (("samples", 0), ("processes", 1)):
        if type(value := getattr(options, key)) is not int or value < least:
            wrong.append(f"{key}: {value!r} must be a whole number from {least}.")
    if not isinstance(options.compare, bool):
        wrong.append(f"compare: {options.compare!r} must be True or False.")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return options


@config.parse
def main(cfg: DictConfig) -> int:
    """Show what a run would be trained on; see the top of this file."""
    options = take_options(cfg)
    settings = strict.read(cfg, options.processes)

    # What the run would be fed, batch by batch
    feed = make_feed(all_rows(settings), options.processes)
    dataset = unpacked(feed.order.dataset)
    samples = survey(dataset, feed.tokenizer.stop_tokens)
    stats = statistics(settings, feed, samples, options.processes)

    if options.compare and settings.dataset["_component_"] not in CHAT_DATASETS:
        print("compare: only samples of phi3_plugin.data.chat_dataset can be compared.")
    elif options.compare:
        try:
            stats = replace(stats, compared=compare_with_hf(settings, feed, samples))
        except ImportError:
            print("compare: transformers is not installed. Run: pip install 'phi3-plugin[hf]'")

    first = range(min(options.samples, len(dataset)))
    from_start = truncation(settings) == "left"
    shown = show(dataset, first, feed.tokenizer, from_start=from_start)
    page = write_page(settings.output_dir, stats, shown)

    columns = min(shutil.get_terminal_size().columns, WIDEST)
    terminal = Terminal(columns, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    print(for_stdout(terminal.report(stats, shown, str(page))), end="")
    return int(any(problem.stops for problem in problems(stats)))


if __name__ == "__main__":
    sys.exit(main())
