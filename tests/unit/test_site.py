"""The site of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_page_is_in_the_navigation_once():
    text = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\w+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(file.name for file in (ROOT / "docs").glob("*.md"))
