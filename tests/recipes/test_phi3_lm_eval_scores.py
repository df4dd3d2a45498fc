"""Documents side by side, and what is refused before it is scored."""

import pytest
from phi3_plugin.recipes.phi3_lm_eval_scores import TOGETHER, batches, inputs_of

from phi3_plugin.errors import DataError


def test_documents_that_turn_by_other_factors_are_kept_apart():
    class Model:
        def turns_alike(self, length, other):
            return (length > 4) == (other > 4)

    documents = [(0,) * n for n in (6, 5, 4, 3, 2)]
    assert [list(map(len, b)) for b in batches(Model(), documents, None)] == [[6, 5], [4, 3, 2]]
    assert [list(map(len, b)) for b in batches(Model(), documents, 2)] == [[6, 5], [4, 3], [2]]
    long = [(0,) * TOGETHER, (0,) * 2, (0,)]
    assert [list(map(len, b)) for b in batches(Model(), long, None)] == [[TOGETHER], [2, 1]]


def test_the_last_token_is_asked_for_and_not_read():
    assert inputs_of("x", [1, 2], [3, 4], 10) == (1, 2, 3)
    assert inputs_of("x", [1, 2, 3], [4, 5], 3) == (2, 3, 4)  # cut at the start
    for context, continuation in (([], [1]), ([1], []), ([1], [2, 3, 4, 5])):
        with pytest.raises(DataError, match="expected some of each and at most 3 to score"):
            inputs_of("x", context, continuation, 3)
