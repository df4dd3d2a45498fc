"""The added tokens of a tokenizer: where they stand in text, and how to keep text from them."""

import json
import re
import secrets
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


def token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds the tokens as a tokenizer does: first the leftmost, longest."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class Disguise:
    """A tokenizer that knows its added tokens by secret names.

    The template's ``<|end|>`` is replaced by the secret name; one that somebody wrote into a
    message keeps the characters it is written in. All else is encoded as before: the flags of
    the tokens, and what they do to the text beside them, are the same.
    """

    def __init__(self, backend: Tokenizer) -> None:
        """Copy the tokenizer."""
        secret = secrets.token_hex(8)  # nobody's text holds it
        added = backend.get_added_tokens_decoder()
        self._names = {token.content: f"{secret}-{i}-" for i, token in added.items()}
        self._tokens = token_pattern(self._names)
        self._hidden: dict[str, str] = {}
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = self._names[token["content"]]
        self.backend = Tokenizer.from_str(json.dumps(content))
        # Those that were in the model's own vocabulary are new to it and move the others
        ids = self.backend.get_vocab()
        self._true_ids = np.arange(max(ids.values()) + 1, dtype=np.int32)
        for i, token in added.items():
            self._true_ids[ids[self._names[token.content]]] = i

    def hide(self, text: str) -> str:
        """Replace the added tokens in a text of the template, of which there are few."""
        if text not in self._hidden:
            self._hidden[text] = self._tokens.sub(lambda found: self._names[found[0]], text)
        return self._hidden[text]

    def true_ids(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the ids in the original tokenizer, [S] to [S]."""
        return self._true_ids[ids]
