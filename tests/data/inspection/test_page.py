"""The page is one safe file, whatever the data holds."""

import re
from html.parser import HTMLParser

import pytest

from phi3_plugin.data.formats import BROKEN, UNUSABLE
from phi3_plugin.errors import OutputError
from phi3_plugin.inspect import Cut, Unit, problems
from phi3_plugin.pages.inspection import HEAD, TAIL, render, write_page
from tests.data.inspection.inspected import findings, numbers, sample

MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}{% if %}"
EVIL = f"{MARKUP}\x1b[2J\u202e\ud800"


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
            self.text.append(data)

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def page(*samples, **changes):
    return Page(render(numbers(**changes), samples))


def test_what_a_reader_finds():
    found = page(sample((" Hi", False), ("\n\tYes", True)))
    for said in (
        "chats.jsonl",
        "No problem was found.",
        "Tokens an epoch 4,100",
        "Median 25, 95 % have up to 200, longest 200. Samples are cut at 256.",
        "plain chosen 10 % 25",
        "packed 1.0 % 5",
        "256 yours 0 % 0 %",
        "chats.jsonl:1: 2 tokens, 1 trained",
        "·Hi⏎ ⇥Yes",
    ):
        assert said in found.words, said
    assert ("span", "title", "id 1, trained") in found.attributes
    assert ("span", "class", "u trained") in found.attributes


def test_problems_come_first():
    found = page(findings=findings((BROKEN, "chats.jsonl:4", "broken JSON")))
    (problem,) = problems(numbers(findings=findings((BROKEN, "", ""))))
    assert found.words.index(problem.text) < found.words.index("Tokens an epoch")
    assert "chats.jsonl:4: broken JSON" in found.words


def test_nothing_of_the_data_becomes_markup():
    noticed = findings((UNUSABLE, EVIL, EVIL))
    options = {"_component_": EVIL}
    found = page(sample((EVIL, True), where=EVIL), findings=noticed, options=options)
    harmless = page(
        sample(("a", True)), findings=findings((UNUSABLE, "b", "c")), options={"_component_": "x"}
    )
    assert set(found.tags) <= {*harmless.tags, "i"}
    shown = f"{MARKUP}\\x1b[2J\\u202e\\ud800"
    # Twice as the title, as a place, as what is said of it, and as where the sample stands
    assert found.words.count(shown) == 5 and shown.replace(" ", "·") in found.words
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]


def test_nothing_is_fetched_and_nothing_runs():
    found = page(sample(("a", True)))
    assert not {"script", "link", "iframe", "object", "img"} & set(found.tags)
    assert not [name for _, name, _ in found.attributes if name in ("src", "href")]
    policy = next(value for _, name, value in found.attributes if value and "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_character_of_several_tokens_names_all_ids():
    one = sample(("a", True))
    one.units[0] = Unit("😀", (243, 162, 155, 131), True, False)
    assert ("span", "title", "ids 243, 162, 155, 131, trained") in page(one).attributes


def test_a_cut_sample_and_a_long_one():
    assert "✂ 7 tokens cut here, not seen" in page(sample(("a", True), lost=7)).words
    many = sample(*((f"<{n}>", True) for n in range(HEAD + TAIL + 30)))
    found = page(many)
    assert "… 30 more …" in found.words
    assert f"<{HEAD - 1}>" in found.words and f"<{HEAD}>" not in found.words


def test_bars_over_the_limit():
    found = page(limit=100)
    assert ("tr", "class", "over") in found.attributes and "orange bars" in found.words
    assert "orange" not in page().words


def test_samples_that_are_dropped():
    words = page(limit=100, cuts=[Cut(100, 0.5, 0.31, "yours", True)], truncate="drop").words
    assert "Samples of more than 100 are dropped; orange bars are longer." in words
    assert "If samples are dropped above tokens samples dropped tokens lost" in words
    assert "100 yours 50 % ≥ 31 %" in words and "cut" not in words


def test_no_sample_and_no_limit():
    assert "The first samples" not in page(limit=None).words


def test_it_is_written_whole(tmp_path):
    path = write_page(tmp_path / "new" / "folder", numbers(), [sample(("😀\ud800", True))])
    assert path == tmp_path / "new" / "folder" / "data.html"
    assert [file.name for file in path.parent.iterdir()] == ["data.html"]
    assert re.match("<!DOCTYPE html>", path.read_text("utf-8"))
    path.write_text("old")
    write_page(path.parent, numbers(), [])
    assert path.read_text("utf-8").endswith("</html>")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"data\.html could not be written.*output_dir=DIR"):
        write_page(tmp_path / "file", numbers(), [])
