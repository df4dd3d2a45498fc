"""Rows of sources, and how tests read them."""

from phi3_plugin.data.sources import read_sources

A, B = {"n": 1, "text": "a\u2028b\x85"}, {"n": 2}


def streamed(source, **options):
    return [row for found in read_sources(source, **options) for row in found.rows()]


def ids(source, **options):
    return [row.value["n"] for row in streamed(source, **options)]
