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

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from phi3_plugin.compare import compare_with_hf
from phi3_plugin.inspect import (
    advice,
    all_rows,
    is_chat_dataset,
    show,
    statistics,
    survey,
    truncation,
    unpacked,
)
from phi3_plugin.options import InspectOptions
from phi3_plugin.pages.inspection import Terminal, write_page
from phi3_plugin.settings import LOSSES, read_beside, without_weights
from phi3_plugin.terminal import for_stdout
from phi3_plugin.train.data import load_data

WIDEST = 100
"""Columns of a terminal that are used at most."""


@config.parse
def main(cfg: DictConfig) -> int:
    """Show what a run would be trained on; see the top of this file."""
    settings, options = read_beside(without_weights(cfg), InspectOptions, cfg.get("processes", 1))

    # What the run would be fed, batch by batch
    data = load_data(all_rows(settings), options.processes)
    dataset = unpacked(data.order.dataset)
    samples = survey(dataset, data.tokenizer.stop_tokens)
    stock = None
    loss = str(OmegaConf.select(cfg, "loss._component_"))
    if settings.checkpointer is not None and not loss.startswith(LOSSES):
        # So torchtune's recipes may run as well
        stock = data.order
        if settings.val_fraction is None and not settings.dataset_val and data.order_val:
            # They hold nothing out by themselves
            whole = replace(all_rows(settings), val_fraction=0.0, early_stop_patience=None)
            stock = load_data(whole, options.processes).order
    stats = statistics(settings, data, samples, options.processes, stock)

    if options.compare and not is_chat_dataset(settings.dataset):
        print("compare: only samples of phi3_plugin.data.chat_dataset can be compared.")
    elif options.compare:
        try:
            stats = replace(stats, compared=compare_with_hf(settings, data, samples))
        except ImportError:
            print("compare: transformers is not installed. Run: pip install 'phi3-plugin[hf]'")

    first = range(min(options.samples, len(dataset)))
    from_start = truncation(settings) == "left"
    shown = show(dataset, first, data.tokenizer, from_start=from_start)
    page = write_page(settings.output_dir, stats, shown)

    columns = min(shutil.get_terminal_size().columns, WIDEST)
    terminal = Terminal(columns, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    print(for_stdout(terminal.report(stats, shown, str(page))), end="")
    return int(any(problem.stops for problem in advice(stats)))


if __name__ == "__main__":
    sys.exit(main())
