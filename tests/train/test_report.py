"""A report is one safe file, equal for equal runs, whatever the run has left behind."""

import base64
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from phi3_plugin.errors import OutputError
from phi3_plugin.pages.report import Facts, versions, write_report

FACTS = Facts(
    ending="Finished after 3 epochs.",
    finished=True,
    adapter="out/epoch_2",
    settings={
        "seed": 3,
        "dataset": {"source": "train.jsonl", "packed": True, "splits": ["a", "b"]},
        "optimizer": {"lr": 2e-4, "betas": [0.9, 0.95], "fused": None},
        "steps": [{"at": 1}, {"at": 2}],
    },
    versions={"torch": "2.13.0", "device": "CPU"},
    adapted_modules=[f"layers.{layer}.attn.{name}" for layer in range(32) for name in ("a", "b")],
    trainable_parameters=8_912_896,
    total_parameters=3_829_992_448,
    samples=[{"prompt": "2 < 3?", "before": "No.", "after": "Yes.\nIndeed."}],
)


def history(steps, validations=True):
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "epoch": step // 100,
                "loss": 1 + 2 / step + 0.1 * math.sin(step),
                "lr": 1e-4,
                "grad_norm": 0.5,
                "tokens": 1000,
                "tokens_per_second": 2000.0,
                "seconds": 0.5,
                "peak_memory_gib": 3.25,
            }
        )
        if validations and step % 10 == 0:
            lines.append({"step": step, "val_loss": 1 + 1 / step, "val_perplexity": 3.0})
    return lines


class Page(HTMLParser):
    """Collects tags, attributes and visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        if self.tags and self.tags[-1] != "style":
            self.text.append(data.strip())

    @property
    def words(self):
        return " ".join(filter(None, self.text))

    @property
    def charts(self):
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "alt")]


def report(folder, lines, facts=FACTS):
    return Page(write_report(folder, lines, facts).read_text("utf-8"))


def test_what_a_reader_finds(tmp_path):
    lines = [*history(100), {"event": "skipped", "step": 5}, {"event": "skipped", "step": 9}]
    page = report(tmp_path, [*lines, {"event": "resumed", "step": 40}])
    for expected in (
        "Finished after 3 epochs.",
        "out/epoch_2",
        "dataset.source train.jsonl",
        "dataset.packed true",
        "dataset.splits a, b",
        "optimizer.lr 0.0002",
        "optimizer.betas 0.9, 0.95",
        "optimizer.fused null",
        "steps.1.at 2",
        "torch 2.13.0",
        "layers.*.attn.a × 32",
        "8,912,896 of 3,829,992,448 (0.23 %)",
        "Skipped steps 2",
        "Resumed at step 40",
        "Tokens 100,000",
        "Training time 0:00:50",
        "2 < 3?",
        "Yes.\nIndeed.",
    ):
        assert expected in page.words, expected
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["loss.png", "report.html"]


def test_every_chart_says_what_it_shows(tmp_path):
    charts = report(tmp_path, history(100)).charts
    assert charts == [
        "Training loss: 3.084 at step 1, 0.9694 at step 100. "
        "Validation loss: 1.1 at step 10, 1.01 at step 100.",
        "Learning rate: 0.0001 at step 1, 0.0001 at step 100.",
        "Gradient norm: 0.5 at step 1, 0.5 at step 100.",
        "Tokens per second: 2,000 at step 1, 2,000 at step 100.",
    ]


def test_equal_input_gives_equal_files(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        write_report(folder, history(300), FACTS)
    for name in ("report.html", "loss.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_matplotlibrc_of_the_user_changes_nothing(tmp_path):
    import matplotlib

    plain = write_report(tmp_path / "plain", history(30), FACTS).read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "black", "lines.linewidth": 9}):
        assert write_report(tmp_path / "dark", history(30), FACTS).read_bytes() == plain


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}$\\frac{$"


def test_no_text_of_the_run_becomes_markup(tmp_path):
    facts = Facts(
        title=EVIL,
        ending=EVIL,
        finished=False,
        adapter=EVIL,
        settings={EVIL: {EVIL: [EVIL]}},
        versions={EVIL: EVIL},
        adapted_modules=[EVIL],
        trainable_parameters=1,
        total_parameters=2,
        samples=[{"prompt": EVIL, "before": EVIL, "after": EVIL}],
    )
    lines = [*history(20), {"event": EVIL, "step": 3}, {"step": 4, "loss": EVIL, "epoch": EVIL}]
    page, harmless = report(tmp_path, lines, facts), report(tmp_path / "b", history(20))
    assert set(page.tags) <= set(harmless.tags)
    assert page.words.count(EVIL) >= 9
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_nothing_is_fetched(tmp_path):
    page = report(tmp_path, history(20))
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset"):
            assert value.startswith("data:image/svg+xml;base64,"), (tag, name)
            svg = base64.b64decode(value.partition(",")[2]).decode()
            assert "<image" not in svg and not re.search(r'href="(?!#)', svg)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    policy = next(value for _, name, value in page.attributes if value and "default-src" in value)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs(tmp_path, steps):
    page = report(tmp_path, history(steps, validations=False))
    assert len(page.charts) == 4
    assert "Best validation" not in page.words


def test_a_run_without_a_step(tmp_path):
    facts = replace(FACTS, finished=False, ending="Stopped.", adapter=None, samples=[])
    page = report(tmp_path, [], facts)
    assert page.charts == []
    assert "No step was recorded" in page.words
    assert "No adapter was saved" in page.words
    assert not (tmp_path / "loss.png").exists()


def test_a_picture_of_an_earlier_report_does_not_stay(tmp_path):
    report(tmp_path, history(5))
    report(tmp_path, [])
    assert not (tmp_path / "loss.png").exists()


def test_fields_may_be_missing_or_null(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "grad_norm": None}, {"step": 3}]
    page = report(tmp_path, lines, replace(FACTS, samples=[{"prompt": "Only this"}]))
    assert len(page.charts) == 1
    assert "Only this" in page.words
    assert report(tmp_path, [{"step": 10, "val_loss": 1.5}]).charts


@pytest.mark.parametrize("spike", [1e9, -1e9, 0.0])
def test_a_spike(tmp_path, spike):
    lines = history(300)
    lines[40]["grad_norm"] = lines[40]["loss"] = spike
    assert len(report(tmp_path, lines).charts) == 4


def test_text_that_utf8_cannot_hold(tmp_path):
    facts = replace(FACTS, samples=[{"prompt": "\ud800", "before": "\x00", "after": "naïve 你好"}])
    assert "naïve 你好" in report(tmp_path, history(2), facts).words


def test_secrets_are_not_shown(tmp_path):
    settings = {"hf_token": "s3cret", "logger": {"api_key": "s3cret"}, "tokenizer": {"path": "p"}}
    page = report(tmp_path, history(2), replace(FACTS, settings=settings))
    assert "s3cret" not in page.words
    assert "tokenizer.path p" in page.words


def test_a_long_run_makes_a_small_report(tmp_path):
    lines = history(100_000)
    lines[50_000]["loss"] = 3.75
    page = write_report(tmp_path, lines, FACTS)
    assert page.stat().st_size < 500_000
    assert (tmp_path / "loss.png").stat().st_size < 300_000


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"report\.html could not be written"):
        write_report(tmp_path / "file", history(2), FACTS)


def test_versions_name_what_was_used():
    found = versions("CPU")
    assert list(found) == ["phi3-plugin", "torch", "torchtune", "torchao", "python", "device"]
    assert found["torchtune"] == "0.6.1" and found["device"] == "CPU"
    assert re.match(r"\d+\.\d+", found["torch"])
