"""Which tokens may be added, what becomes of the rest, and where they are kept."""

import json

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.added_tokens import tokens_beyond, write_added_tokens
from phi3_plugin.data.findings import UNREAD_TOKEN
from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import ConfigError, TokenizerError
from tests.files import write


def ids(tokenizer, *said):
    turns = [make_turn(role, text) for role, text in zip(("user", "assistant"), said, strict=False)]
    return tokenizer.tokenize_chats([turns])[0]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([""], "'' is empty"),
        ([" \n"], "is only white space"),
        (["<a>", "<b>", "<a>"], "'<a>' is there 2 times"),
        (["<|end|>"], "'<|end|>' is one token already"),
        (["the"], "'the' is one token already"),
        (["<call", "<call>"], "'<call' is contained in '<call>'"),
        (["x<|end|>"], "'<|end|>' is contained in 'x<|end|>'"),
        (["\ud800"], "holds half a character"),
        ([3], "must be a list of texts"),
        ("<a>", "must be a list of texts"),
        ([{"content": "<a>", "wide": True}], "must be a list of texts"),
    ],
)
def test_what_cannot_be_a_new_token_is_one_clear_error(tokens, said, folder):
    with pytest.raises(ConfigError) as caught:
        phi3_tokenizer(folder, add_tokens=tokens)
    assert said in str(caught.value)
    assert all(line.startswith("tokenizer.add_tokens: ") for line in str(caught.value).split("\n"))


def test_all_mistakes_are_told_at_once(folder):
    with pytest.raises(ConfigError) as caught:
        phi3_tokenizer(folder, add_tokens=["", "<|end|>", "<a>", "<a>"])
    assert str(caught.value).count("\n") == 2


def test_none_is_none(folder):
    assert phi3_tokenizer(folder, add_tokens=None).new_tokens == {}
    assert phi3_tokenizer(folder).fingerprint == phi3_tokenizer(folder, add_tokens=[]).fingerprint


def test_an_added_token_in_a_message_is_that_token_whatever_special_ones_are(folder):
    """``special_in_text: text`` is against texts that end a turn, not against the user's own."""
    plain = phi3_tokenizer(folder, add_tokens=["<call>"])
    (new,) = plain.new_tokens
    kept = phi3_tokenizer(folder, add_tokens=["<call>"], special_in_text="text")
    for tokenizer in (plain, kept):
        tokens = ids(tokenizer, "a <call> b", "<call> c")
        assert tokens.ids.tolist().count(new) == 2
        assert tokens.trained[tokens.ids == new].tolist() == [False, True]
    assert ids(plain, "a", "b").ids.tolist() == ids(kept, "a", "b").ids.tolist()
    assert ids(plain, "<|end|>", "b").ids.tolist() != ids(kept, "<|end|>", "b").ids.tolist()


def test_prepared_data_is_kept_apart(folder, tmp_path):
    rows = str(write(tmp_path / "rows.jsonl", [{"question": "a <call> b", "answer": "c <call>"}]))
    cache = {"cache_dir": str(tmp_path / "cache")}
    plain = chat_dataset(phi3_tokenizer(folder), rows, **cache)
    added = chat_dataset(phi3_tokenizer(folder, add_tokens=["<call>"]), rows, **cache)
    assert plain.fingerprint != added.fingerprint
    assert len(added[0]["tokens"]) < len(plain[0]["tokens"])
    again = chat_dataset(phi3_tokenizer(folder, add_tokens=["<call>"]), rows, **cache)
    assert again[0]["tokens"] == added[0]["tokens"]


def test_the_files_of_a_folder_have_them_for_transformers_too(folder):
    """With its flags; and they are found again there, and again become the same ids."""
    asked = ["<call>", {"content": "</call>", "normalized": False}]
    tokenizer = phi3_tokenizer(folder, add_tokens=asked)
    entries = [token.entry for token in tokenizer.new_tokens.values()]
    copy = folder.with_name("copy")
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert tokens_beyond(copy, folder) == []
    write_added_tokens(copy, entries)
    assert tokens_beyond(copy, folder) == entries
    text = "a <call>b</call> <call> c"
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens([asked[0], AddedToken("</call>", normalized=False)])
    expected = theirs.encode(text, add_special_tokens=False)
    saved = AutoTokenizer.from_pretrained(copy).encode(text, add_special_tokens=False)
    from_file = phi3_tokenizer(folder, add_tokens=tokens_beyond(copy, folder)).encode(text)
    assert tokenizer.encode(text) == expected == saved == from_file
    assert phi3_tokenizer(copy).encode(text) == expected


def test_tokens_of_another_checkpoints_tokenizer_are_refused(folder):
    (entry,) = (t.entry for t in phi3_tokenizer(folder, add_tokens=["<a>"]).new_tokens.values())
    with pytest.raises(ConfigError, match="'<a>' gets the id"):
        phi3_tokenizer(folder, add_tokens=[{**entry, "id": entry["id"] + 1}])
    copy = folder.with_name("copy")
    copy.mkdir()
    broken = {"added_tokens": [{"id": "1", "content": "<a>"}]}
    (copy / "tokenizer.json").write_text(json.dumps(broken), "utf-8")
    with pytest.raises(TokenizerError, match="added_tokens holds what is no token"):
        tokens_beyond(copy, folder)


def test_a_text_that_is_not_read_as_its_token_is_told(folder, tmp_path, caplog):
    """A Phi-3 finds a text after a space alone, as transformers does, unless it asks otherwise."""
    said = [("a <call> b", "c <call>"), ("a<call> b", "<call> c<call>"), ("a", "b")]
    rows = [{"question": question, "answer": answer} for question, answer in said]
    file = str(write(tmp_path / "rows.jsonl", rows))
    dataset = chat_dataset(phi3_tokenizer(folder, add_tokens=["<call>"]), file)
    assert dataset.findings.counts[UNREAD_TOKEN] == 1
    assert f"1 of 3 rows {UNREAD_TOKEN}. The first: " in caplog.text
    assert "rows.jsonl:2: '<call>' is written 3 times, and read 1" in caplog.text
    anywhere = {"content": "<call>", "normalized": False}
    dataset = chat_dataset(phi3_tokenizer(folder, add_tokens=[anywhere]), file)
    assert not dataset.findings.counts[UNREAD_TOKEN]


def test_a_token_that_no_sample_has_is_told(folder, tmp_path, caplog):
    file = str(write(tmp_path / "rows.jsonl", [{"question": "a <call> b", "answer": "c"}]))
    chat_dataset(phi3_tokenizer(folder, add_tokens=["<call>"]), file)
    assert "tokenizer.add_tokens" not in caplog.text
    chat_dataset(phi3_tokenizer(folder, add_tokens=["<call>", "<cell>"]), file)
    assert "rows.jsonl has '<cell>'" in caplog.text
    assert "tokenizer.add_tokens: no sample of " in caplog.text
