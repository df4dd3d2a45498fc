"""The page shows what models say, and does nothing that they say."""

import re
from html.parser import HTMLParser

import pytest

from phi3_plugin.evaluate import BASE, Evaluation, Outcome, Sample, Scorer, measures, results
from phi3_plugin.pages.evaluation import LONGEST, page_of_evaluation
from tests.evaluate.made import HOSTILE, made

WANTED = measures(Scorer())


class Reader(HTMLParser):
    """Collects tags and texts, and checks that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(evaluation, count=10):
    page = page_of_evaluation(evaluation, results(evaluation, WANTED), count=count)
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return page, reader


def test_nothing_a_model_says_is_more_than_text():
    page, reader = read(made())
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "b", "link", "img", "iframe"}
    assert not any(
        key.startswith("on") or key in ("src", "href") for _, a in reader.tags for key in a
    )
    text = "".join(reader.texts)
    assert '<script>alert("x")</script> & {{ 7 * 7 }} \\u202e\\x1b[31m</div>' in text
    assert "\u202e" not in page and "\x1b" not in page
    assert "http" not in page.replace("http-equiv", "")
    policy = [a["content"] for t, a in reader.tags if a.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "<b>rows</b>" in text  # the name of a source is text too


@pytest.mark.parametrize("where", ["prompt", "reference", "base", "adapter"])
def test_every_place_is_escaped(where):
    texts = {"prompt": "p", "reference": "r", "base": "b", "adapter": "a", where: HOSTILE}
    page, reader = read(made(rows=[tuple(texts.values())]))
    assert "<script" not in page and '<script>alert("x")' in "".join(reader.texts)


def test_lists_of_answers():
    page, _ = read(made())
    assert page.index("Gained most") < page.index("Lost most") < page.index("Worst answers")
    assert page.count("<summary>") == 3 + 2 + 2
    assert read(made(), count=1)[0].count("<summary>") == 3
    assert read(made(), count=0)[0].count("<summary>") == 0
    page, _ = read(made(adapter=False))
    assert "Gained most" not in page and "is the adapter better?" not in page


def test_the_numbers_are_there():
    _, reader = read(made(times=8))
    text = " ".join(" ".join(reader.texts).split())
    assert "Loss 2.2600 2.2" in text and "+40.00" in text
    assert "60 % better, 20 % worse, 20 % equal" in text
    assert "The adapter is better than the base in 10 measures" in text
    assert "32 ended by themselves, 8 cut at generation.max_new_tokens" in text
    widths = [float(a["width"]) for t, a in reader.tags if t == "rect"]
    assert sum(widths) == pytest.approx(len(widths) / 3)


def test_long_texts_are_cut():
    page, _ = read(made(rows=[("p" * (LONGEST + 1234), "r", "b", "a")]))
    assert "p" * LONGEST + "… 1,234 more characters in samples.jsonl" in page


def test_without_answers():
    evaluation = Evaluation(
        [Sample("a:1", 2, "", "")], {BASE: [Outcome(1.0, 1, 2)]}, {"base": None}
    )
    page, _ = read(evaluation)
    assert "0.5000" in page and "Worst answers" not in page
    assert re.search(r"<th>base</th> <td>null</td>", page)
