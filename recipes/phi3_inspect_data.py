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
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig
from torchtune import config

from phi3_plugin import inspect as st
from phi3_plugin import settings as strict
from phi3_plugin.checkpoint.check import hf_ids
from phi3_plugin.config import read_config
from phi3_plugin.data.order import Order
from phi3_plugin.data.packing import Packs
from phi3_plugin.errors import ConfigError
from phi3_plugin.inspect import (
    CHAT_DATASETS,
    Compared,
    Samples,
    Shown,
    Speller,
    alike,
    as_trained,
    compare,
    conversations,
    cuts,
    marked,
    problems,
    show,
    survey,
)
from phi3_plugin.pages.inspection import Terminal, for_stdout, write_page
from phi3_plugin.settings import Settings
from phi3_plugin.train.feed import Feed, make_feed

COMPARED = 1000
"""Samples that are compared at most; transformers takes a millisecond for each."""

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


class Inspection:
    """One data set, from settings to numbers."""

    def __init__(self, settings: Settings, options: Options) -> None:
        """Read and tokenize: all rows, also where a run would stop at the first broken ones."""
        self.s, self.options = settings, options
        self.feed: Feed = make_feed(all_rows(settings), options.processes)
        self.dataset = st.unpacked(self.feed.order.dataset)
        self.limit: int | None = getattr(self.feed.tokenizer, "max_seq_len", None)
        self.is_chat = settings.dataset["_component_"] in CHAT_DATASETS
        self.truncate = settings.dataset.get("truncate", "right") if self.is_chat else "right"
        self.samples: Samples = survey(self.dataset, self.feed.tokenizer.stop_tokens)

    def statistics(self) -> st.Statistics:
        """Count everything."""
        s, dataset, samples = self.s, self.dataset, self.samples
        lost = getattr(dataset, "lost", samples.full[:0])
        tokens, labelled = st.epoch(self.feed.order.dataset, samples)
        positions = read_config(s.checkpoint_dir).max_position_embeddings
        named = {positions: "model's most"} | ({self.limit: "yours"} if self.limit else {})
        things = "packs" if isinstance(self.feed.order.dataset, Packs) else "samples"
        return st.Statistics(
            options=s.dataset,
            options_val=s.dataset_val,
            special_in_text=s.tokenizer.get("special_in_text", "parse"),
            rows=getattr(dataset, "rows", len(dataset)),
            findings=getattr(dataset, "findings", st.Findings()),
            samples=len(samples.lengths),
            tokens=tokens,
            labelled=labelled,
            lengths=st.lengths_of(np.concatenate([samples.full, lost])),
            longest=int(samples.lengths.max()),
            limit=self.limit,
            truncate=self.truncate,
            positions=positions,
            batchings=list(self.batchings()),
            per_step=f"{self.feed.order.per_step:,} {things}",
            steps=self.feed.total_steps,
            cuts=cuts(samples, lost, named, limit=self.limit, truncate=self.truncate),
            alike=alike(samples),
            endless=int((~samples.stops).sum()),
            endless_uncut=int((~samples.stops & (samples.full <= samples.lengths)).sum()),
            held_out=self.held_out(),
            compared=self.compared() if self.options.compare else None,
        )

    def batchings(self) -> Iterator[st.Batching]:
        """Yield the ways to put the samples into batches, the chosen one as the run would."""
        orders = self.orders()
        chosen = self.feed.order
        mine = st.GROUPED if chosen.group_by_length else st.PLAIN
        mine = st.PACKED if isinstance(chosen.dataset, Packs) else mine
        for name, order in {**orders, mine: chosen}.items():
            yield st.Batching(name, self.padding(order), order.steps_per_epoch, name == mine)

    def orders(self) -> dict[str, Order]:
        """Return the orders of a run that chooses them."""
        s, shuffle = self.s, self.s.shuffle
        times, processes = s.gradient_accumulation_steps, self.options.processes
        sizes = {"accumulation": times, "processes": processes, "seed": s.seed}
        order = partial(Order, batch_size=s.batch_size, shuffle=shuffle, **sizes)
        orders = {st.PLAIN: order(self.dataset)}
        if shuffle:
            orders[st.GROUPED] = order(self.dataset, group_by_length=True)
        if self.limit is not None and self.is_chat:
            seed, pad = s.dataset.get("seed", 0), self.feed.tokenizer.pad_id
            orders[st.PACKED] = order(Packs(self.dataset, self.limit, pad, seed=seed))
        return orders

    def padding(self, order: Order) -> float:
        """Return which share of an epoch's tokens is padding."""
        if isinstance(order.dataset, Packs):
            return order.dataset.waste
        return st.padding(self.samples.lengths, batches(order))

    def held_out(self) -> st.Part | None:
        """Look at the validation data, if there is any."""
        if self.feed.order_val is None:
            return None
        dataset = self.feed.order_val.dataset
        seen = survey(st.unpacked(dataset), self.feed.tokenizer.stop_tokens)
        return st.part(dataset, seen, self.samples)

    def compared(self) -> Compared | None:
        """Compare the first samples with transformers; None if that cannot be done."""
        if not self.is_chat:
            print("compare: only samples of phi3_plugin.data.chat_dataset can be compared.")
            return None
        pairs = list(islice(self.conversations(), COMPARED))
        try:
            theirs = hf_ids(self.s.checkpoint_dir, [messages for _, messages in pairs])
        except ImportError:
            print("compare: transformers is not installed. Run: pip install 'phi3-plugin[hf]'")
            return None
        tokenizer = self.feed.tokenizer
        choices = {"limit": self.limit, "options": self.s.dataset, "eos_id": tokenizer.eos_id}
        return compare(
            (self.samples.places[i], marked(self.dataset, i), as_trained(their, **choices))
            for (i, _), their in zip(pairs, theirs, strict=True)
        )

    def conversations(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield samples and the messages they were made of, but for shortened ones."""
        samples, left = self.samples, self.truncate == "left"
        numbers = {where: i for i, where in reversed(list(enumerate(samples.places)))}
        for where, messages in conversations(self.feed.tokenizer, self.s.dataset):
            i = numbers.get(where)
            if i is not None and not (left and samples.full[i] > samples.lengths[i]):
                yield i, messages

    def shown(self) -> list[Shown]:
        """Return the first samples, token by token."""
        first = range(min(self.options.samples, len(self.dataset)))
        left, speller = self.truncate == "left", Speller(self.feed.tokenizer)
        return show(self.dataset, first, speller, from_start=left)


def all_rows(settings: Settings) -> Settings:
    """Return settings under which rows that cannot be used are counted, and stop nothing."""
    sections = {"dataset": settings.dataset, "dataset_val": settings.dataset_val}
    changed = {
        name: {**section, "bad_rows": "drop"}
        for name, section in sections.items()
        if section and section["_component_"] in CHAT_DATASETS
    }
    return replace(settings, **changed)


def batches(order: Order) -> Iterator[list[int]]:
    """Yield the samples of each batch of the first epoch."""
    for step in range(order.steps_per_epoch):
        chosen = order.indices(step)
        yield from (
            chosen[i : i + order.batch_size] for i in range(0, len(chosen), order.batch_size)
        )


@config.parse
def main(cfg: DictConfig) -> int:
    """Show what a run would be trained on; see the top of this file."""
    options = take_options(cfg)
    settings = strict.read(cfg, options.processes)
    inspection = Inspection(settings, options)
    found, samples = inspection.statistics(), inspection.shown()
    page = write_page(settings.output_dir, found, samples)
    columns = min(shutil.get_terminal_size().columns, WIDEST)
    terminal = Terminal(columns, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    print(for_stdout(terminal.report(found, samples, str(page))), end="")
    return int(any(problem.stops for problem in problems(found)))


if __name__ == "__main__":
    sys.exit(main())
