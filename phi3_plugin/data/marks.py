r"""Which tokens are trained, told from the added tokens of the template.

Asking a tokenizer where each token starts in the text takes longer than encoding. Most templates
write added tokens around every text, so those tell it too::

    <|user|>\n  H i  <|end|>\n<|assistant|>\n  Y o  <|end|>\n<|endoftext|>
        .       . .     .          .           x x     x          .

Where the template writes more (a newline that stays a token beside what is said) or a text holds
added tokens of its own, the tokenizer has to be asked; see :mod:`phi3_plugin.data.encoder`.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from phi3_plugin.data.added import token_pattern
from phi3_plugin.data.layout import Layout, Piece, Slot


class Marks(NamedTuple):
    """What is trained in a layout with K added tokens."""

    token: NDArray[np.bool_]
    """[K + 1]; each added token. The first entry stands for none."""
    after: NDArray[np.bool_]
    """[K + 1]; what comes before the first added token, and after each."""
    tell: bool
    """Whether these tell; if not, some are trained only in part."""


class Marker:
    """Finds the marks of layouts."""

    def __init__(self, backend: Tokenizer) -> None:
        """Read the added tokens."""
        self._added = {t.content: t for t in backend.get_added_tokens_decoder().values()}
        self._pattern = token_pattern(self._added)
        self._known: dict[Layout, Marks] = {}
        self._simple = not any(t.single_word or t.normalized for t in self._added.values())

    def marks(self, layout: Layout) -> Marks:
        """Return the marks of a layout."""
        if not any(isinstance(part, Slot) for part in layout.parts):
            return self._read(layout)  # Of one conversation alone, so not worth keeping
        if layout not in self._known:
            self._known[layout] = self._read(layout)
        return self._known[layout]

    def _read(self, layout: Layout) -> Marks:
        tokens, after = [False], list[bool | None]()
        before, between = None, list[tuple[str | None, bool]]()
        for text, trained in self._cut(layout):
            token = self._added.get(text) if text else None
            if token is None:
                between.append((text, trained))
                continue
            after.append(_agreed(between, before, token))
            tokens.append(trained)
            before, between = token, []
        after.append(_agreed(between, before, None))
        tell = self._simple and None not in after
        return Marks(np.array(tokens, dtype=np.bool_), np.array(after, dtype=np.bool_), tell)

    def _cut(self, layout: Layout) -> Iterator[tuple[str | None, bool]]:
        """Yield the template's added tokens and what stands between them; None is any text."""
        for part in layout.parts:
            if isinstance(part, Piece) and not part.said:
                for text in re.split(f"({self._pattern.pattern})", part.text):
                    if text:
                        yield text, part.trained
            else:
                yield None, part.trained


def _agreed(
    between: list[tuple[str | None, bool]], before: AddedToken | None, after: AddedToken | None
) -> bool | None:
    """Return whether all tokens between two added ones are trained; None if only some are."""
    kept = list(between)
    while kept and before is not None and before.rstrip and _blank(kept[0]):
        kept.pop(0)  # Swallowed by the added token, which it belongs to then
    while kept and after is not None and after.lstrip and _blank(kept[-1]):
        kept.pop()
    found = {trained for _, trained in kept}
    return None if len(found) > 1 else found == {True}


def _blank(entry: tuple[str | None, bool]) -> bool:
    return entry[0] is not None and not entry[0].strip()
