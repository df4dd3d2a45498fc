"""Numbers of a made-up data set, for what shows them, and what reads the pages that do."""

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np

from phi3_plugin.data.findings import Findings
from phi3_plugin.inspect import (
    PACKED,
    UNGROUPED,
    Alike,
    Batching,
    Cut,
    Lengths,
    Shown,
    Statistics,
    Unit,
    histogram,
)

FULL = np.array([10] * 50 + [40] * 40 + [200] * 10)
FOUND = Statistics(
    options={"_component_": "phi3_plugin.data.chat_dataset", "source": "chats.jsonl"},
    options_val=None,
    special_in_text="parse",
    rows=100,
    findings=Findings(),
    samples=100,
    tokens=4100,
    labelled=2050,
    lengths=Lengths(25.0, 200.0, 200, histogram(FULL)),
    longest=200,
    limit=256,
    positions=4096,
    batchings=[Batching(UNGROUPED, 0.1, 25, True), Batching(PACKED, 0.01, 5, False)],
    per_step="4 samples",
    steps=75,
    cuts=[Cut(256, 0.0, 0.0, "yours"), Cut(512, 0.0, 0.0, ""), Cut(4096, 0.0, 0.0, "")],
    alike=Alike(0, [], 0),
    endless=0,
    endless_uncut=0,
)
"""A data set without a problem."""


def numbers(**changes: Any) -> Statistics:
    return replace(FOUND, **changes)


def findings(*noticed: tuple[str, str, str]) -> Findings:
    found = Findings()
    for kind, where, detail in noticed:
        found.add(kind, where, detail)
    return found


def sample(*units: tuple[str, bool], where: str = "chats.jsonl:1", lost: int = 0) -> Shown:
    """Return a sample of ordinary tokens, each a text and whether it is trained on."""
    listed = [
        Unit(text, (n,), trained, text.startswith("<|")) for n, (text, trained) in enumerate(units)
    ]
    return Shown(where, listed, sum(unit.trained for unit in listed), lost)


class Page(HTMLParser):
    """Collects tags, attributes and visible text of a page, all of whose tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("img", "meta", "source", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.tags and self.tags[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join("".join(self.text).split())

    @property
    def charts(self):
        return [v for tag, name, v in self.attributes if (tag, name) == ("svg", "aria-label")]


def check_fetches_nothing(page):
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not {"src", "href", "srcset"} & {name for _, name, _ in page.attributes}
    policy = next(value for _, name, value in page.attributes if value and "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
