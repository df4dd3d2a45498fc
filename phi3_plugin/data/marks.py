r"""Which tokens are trained, told from the added tokens of the template.

Asking a tokenizer where each token starts in the text takes longer than encoding. Most templates
write added tokens around every text, so those tell it too::

    <|user|>\n  H i  <|end|>\n<|assistant|>\n  Y o  <|end|>\n<|endoftext|>
        .       . .     .          .           x x     x          .

Where the template writes more (a newline that stays a token beside what is said) or a text holds
added tokens of its own, the tokenizer has to be asked; see :mod:`phi3_plugin.data.encoder`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from phi3_plugin.data.added import token_pattern
from phi3_plugin.data.layout import Layout, Slot
from phi3_plugin.data.spaces import Script, script

Part = tuple[str | Slot | None, bool]
"""Text of the template, a slot, or None for a text that is said; and whether it is trained on."""


class Marks(NamedTuple):
    """What is trained in a layout with K added tokens."""

    token: NDArray[np.bool_]
    """[K + 1]; each added token. The first entry stands for none."""
    after: NDArray[np.bool_]
    """[K + 1]; what comes before the first added token, and after each."""
    tell: bool
    """Whether these tell; if not, some are trained only in part."""
    script: Script | None
    """How such a conversation is written with its normalizer done, if that is known."""


class Marker:
    """Finds the marks of layouts."""

    def __init__(self, backend: Tokenizer) -> None:
        """Read the added tokens."""
        self._added = {t.content: t for t in backend.get_added_tokens_decoder().values()}
        self._pattern = token_pattern(self._added)
        self._simple = not any(t.single_word or t.normalized for t in self._added.values())

    def marks(self, layout: Layout) -> Marks:
        """Return the marks of a layout."""
        # With the layout, which the template forgets: there may be any number of shapes
        if self not in layout.notes:
            layout.notes[self] = self._read(layout)
        found: Marks = layout.notes[self]
        return found

    def _read(self, layout: Layout) -> Marks:
        tokens, trained = list[AddedToken](), [False]
        between: list[list[Part]] = [[]]
        for part, counts in self._cut(layout):
            if isinstance(part, str) and part in self._added:
                tokens.append(self._added[part])
                trained.append(counts)
                between.append([])
            else:
                between[-1].append((part, counts))
        beside = [None, *tokens, None]
        after = [_agreed(b, *beside[i : i + 2]) for i, b in enumerate(between)]
        tell = self._simple and None not in after
        parts = [[part for part, _ in listed if part is not None] for listed in between]
        whole = sum(map(len, parts)) == sum(map(len, between))
        written = script(parts, tokens) if tell and whole else None
        return Marks(
            np.array(trained, dtype=np.bool_), np.array(after, dtype=np.bool_), tell, written
        )

    def _cut(self, layout: Layout) -> Iterator[Part]:
        """Yield the template's added tokens, and what stands between."""
        for part in layout.parts:
            if isinstance(part, Slot):
                yield part, part.trained
            elif part.said:
                yield None, part.trained
            else:
                for text in re.split(f"({self._pattern.pattern})", part.text):
                    if text:
                        yield text, part.trained


def _agreed(
    between: Sequence[tuple[str | Slot | None, bool]],
    before: AddedToken | None,
    after: AddedToken | None,
) -> bool | None:
    """Return whether all tokens between two added ones are trained; None if only some are."""
    kept = list(between)
    while kept and before is not None and before.rstrip and _blank(kept[0]):
        kept.pop(0)  # Swallowed by the added token, which it belongs to then
    while kept and after is not None and after.lstrip and _blank(kept[-1]):
        kept.pop()
    found = {trained for _, trained in kept}
    return None if len(found) > 1 else found == {True}


def _blank(entry: Part) -> bool:
    return isinstance(entry[0], str) and not entry[0].strip()
