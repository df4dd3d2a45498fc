"""Samples as a reader can check them: the text of every token, and what training makes of it."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_plugin.data.dataset import IGNORED
from phi3_plugin.data.inspection.survey import arrays, place
from phi3_plugin.data.tokenizer import Phi3Tokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""How a vocabulary with byte fallback spells a byte of a character that it has no token for."""

UNFINISHED = "\ufffd"
"""What decoding gives for a part of a character."""

LONGEST = 4
"""Tokens that a character can take: as many as UTF-8 has bytes for it."""

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
"""Unicode categories of what shows nothing, looks like a space, or changes how others show."""


class Unit(NamedTuple):
    """A token; or several, where a character takes more than one."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool
    """Whether it is an added token such as ``<|end|>``."""


class Shown(NamedTuple):
    """One sample."""

    where: str
    """Where its row stands."""
    units: list[Unit]
    trained: int
    """Tokens that are trained on."""
    lost: int
    """Tokens that were cut off."""
    from_start: bool = False
    """Whether they came before the first unit, or between the system message and the rest."""

    @property
    def tokens(self) -> int:
        """Tokens of the sample."""
        return sum(len(unit.ids) for unit in self.units)

    @property
    def border(self) -> str:
        """What is said where the sample was cut."""
        if not self.lost:
            return ""
        tokens = f"{self.lost:,} {'token' if self.lost == 1 else 'tokens'}"
        return f"✂ {tokens} cut {'before the last turns' if self.from_start else 'here'}, not seen"


class Speller:
    """Gives each token of a sample its text, with the space before it."""

    def __init__(self, tokenizer: Phi3Tokenizer) -> None:
        """Read the added tokens."""
        self._tokenizer, self._backend = tokenizer, tokenizer._backend
        decoder = self._backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in decoder.items()}
        # Decoding drops the space at the very start, so that every text gets one before it
        self._before = tokenizer.encode("a")[-1:]
        self._skip = len(tokenizer.decode(self._before, False))

    def units(self, ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> list[Unit]:
        """Spell a sample.

        Args:
            ids: [S]
            trained: [S]; whether the loss counts the token.
        """
        units, parts = list[Unit](), list[int]()
        for i, counts in zip(ids.tolist(), trained.tolist(), strict=True):
            if i in self._added:
                units.append(Unit(self._added[i], (i,), counts, True))
                parts = []
                continue
            units.append(Unit(self._spelled(i), (i,), counts, False))
            # Parts of characters stand alone until the last one comes
            parts = [*parts[1 - LONGEST :], i] if UNFINISHED in self._text([i]) else []
            if whole := self._whole(parts):
                units[-len(whole) :] = [Unit(self._text(whole), tuple(whole), counts, False)]
                parts = []
        return units

    def _whole(self, parts: list[int]) -> list[int]:
        tails = (parts[start:] for start in range(len(parts) - 1))
        return next((tail for tail in tails if UNFINISHED not in self._text(tail)), [])

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([*self._before, *ids], False)[self._skip :]

    def _spelled(self, i: int) -> str:
        text, spelled = self._text([i]), self._backend.id_to_token(i)
        return spelled if UNFINISHED in text and spelled and BYTE.fullmatch(spelled) else text


def show(
    dataset: Any, indices: Iterable[int], speller: Speller, *, from_start: bool = False
) -> list[Shown]:
    """Spell some samples of a data set.

    Args:
        dataset: Holds them.
        indices: Which.
        speller: Of its tokenizer.
        from_start: Whether long samples were cut from their start.
    """
    shown = []
    for i in indices:
        ids, labels = arrays(dataset, i)
        full = int(dataset.full[i]) if hasattr(dataset, "full") else len(ids)
        trained = labels != IGNORED
        units = speller.units(ids, trained)
        lost = full - len(ids)
        shown.append(Shown(place(dataset, i), units, int(trained.sum()), lost, from_start))
    return shown


def harmless(text: str) -> str:
    r"""Spell out, as ``\x1b`` or ``\u202e``, what could drive a terminal or hide in a page.

    Plain spaces, line ends and tabs stay, and so do letters of every script and emoji.
    """
    return "".join(char if _shows(char) else _code(char) for char in text)


def _shows(char: str) -> bool:
    return char in " \n\t" or unicodedata.category(char) not in HIDDEN


def _code(char: str) -> str:
    number = ord(char)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
