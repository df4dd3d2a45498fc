import pytest
from tokenizers import AddedToken, Tokenizer, models

from phi3_plugin.data.template import Disguise, token_pattern


def test_the_leftmost_and_longest_token_is_found():
    assert token_pattern(["<|a|>", "<|a|><|b|>", "|><"]).findall("<|a|><|b|><|a|>x") == [
        "<|a|><|b|>",
        "<|a|>",
    ]
    assert token_pattern(["a", "ab", "b+"]).findall("xabb+") == ["ab", "b+"]


def test_no_token_is_never_found():
    assert token_pattern([]).findall("a") == []


@pytest.mark.parametrize("known", [True, False])
def test_ids_are_those_of_the_original(known):
    """A token may be in the model's own vocabulary, or have been added to it."""
    backend = Tokenizer(models.BPE(vocab={"<e>": 0, "a": 1, "<": 2, "e": 3, ">": 4}, merges=[]))
    backend.add_special_tokens([AddedToken("<e>" if known else "<f>"), AddedToken("<g>")])
    token = "<e>" if known else "<f>"
    disguise = Disguise(backend)
    encoding = disguise.backend.encode(disguise.hide(f"a{token}a<g>") + "<e>")
    expected = backend.encode(f"a{token}a<g>").ids
    assert disguise.true_ids(encoding.ids).tolist() == [*expected, 2, 3, 4]
