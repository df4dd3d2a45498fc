"""Every revision of the family against transformers, recorded ids and the text of its turns."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchtune.data import Message
from transformers import AutoTokenizer

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.turns import make_turn
from tests.assets import assets_dir
from tests.chosen import examples
from tests.variants import ENDS, FROM_ASSETS, PHI4_MINI, phi4_mini

SPECIAL = (
    *("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<s>", "</s>"),
    *("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|tool|>", "<|/tool|>", "<unk>"),
)
SPACES = (" ", "\n", "\t", "\u2028", "\u2003", "  \n\n ", "\x1c", "\x85")
FRAGMENTS = (*SPECIAL, *SPACES, "<|en", "d|>", "<|im_", "the", "中", "😀", "{{ a }}", "Qz0zK")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CONTENT = st.lists(st.sampled_from(FRAGMENTS) | TEXT, max_size=4).map("".join)
ROLE = st.sampled_from(["system", "user", "assistant"])
TURNS = st.lists(st.tuples(ROLE, CONTENT), min_size=1, max_size=20)
MANY = examples(60)


@pytest.fixture(scope="session")
def both(supported):
    return phi3_tokenizer(supported, dropped="warn"), AutoTokenizer.from_pretrained(supported)


@pytest.fixture(scope="session")
def end(supported):
    return ENDS.get(supported.name, "<|end|>")


def dicts(turns):
    return [{"role": role, "content": content} for role, content in turns]


def tokenize(ours, turns, **options):
    return ours.tokenize_chats([[make_turn(*turn) for turn in turns]], **options)[0]


@given(turns=TURNS, ask=st.booleans())
@MANY
def test_ids_are_those_of_transformers(both, turns, ask):
    ours, theirs = both
    tokens = tokenize(ours, turns, add_generation_prompt=ask)
    options = {"tokenize": True, "add_generation_prompt": ask, "return_dict": False}
    assert tokens.ids.tolist() == theirs.apply_chat_template(dicts(turns), **options)


@given(turns=TURNS)
@MANY
def test_trained_text_is_what_the_assistant_says(both, end, turns):
    """Whitespace may go to the special token before it, so it is left out of the comparison."""
    ours, _ = both
    tokens = tokenize(ours, [("user", "a"), *turns])
    text = ours.decode(tokens.ids[tokens.trained].tolist(), skip_special_tokens=False)
    said = "".join(content + end for role, content in turns if role == "assistant")
    # SentencePiece's own mark of a space comes back as a space
    assert "".join(text.split()) == "".join(said.replace("▁", " ").split())


@given(turns=TURNS, ask=st.booleans())
@MANY
def test_trained_tokens_start_between_an_answer_and_the_end_after_it(both, end, turns, ask):
    """The places are found by search, so what is said gets an unmistakable border."""
    ours, theirs = both
    turns = [(role, f"({i}A{content}Z{i})") for i, (role, content) in enumerate(turns)]
    tokens = tokenize(ours, turns, add_generation_prompt=ask)
    options = {"tokenize": False, "add_generation_prompt": ask}
    text = theirs.apply_chat_template(dicts(turns), **options)
    starts = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = np.array([start for start, _ in starts], dtype=int)
    trained = np.zeros(len(starts), dtype=bool)
    for i, (role, _) in enumerate(turns):
        if role == "assistant":
            last = text.index(end, text.index(f"Z{i})"))
            trained |= (starts >= text.index(f"({i}A")) & (starts <= last)
    trained[:1] = False
    assert tokens.trained.tolist() == trained.tolist()


@pytest.mark.parametrize("answer", ["Hi there", "1", "中", "x  y\n\nz"])
def test_every_token_of_an_answer_is_trained(both, end, answer):
    ours, _ = both
    turns = [("user", "Hello"), ("assistant", answer), ("user", "x"), ("assistant", answer)]
    tokens = tokenize(ours, turns)
    first = int(np.flatnonzero(tokens.trained)[0])
    parts = np.split(tokens.ids, np.flatnonzero(np.diff(tokens.trained)) + 1)
    texts = [ours.decode(part.tolist(), skip_special_tokens=False).strip() for part in parts]
    assert first > 0
    assert [text.replace(f" {end}", end) for text in texts[1::2]] == [answer + end] * 2
    assert not any(answer in text for text in texts[::2] if answer != "1")


@pytest.mark.parametrize("text", ["the  other", " 中 é", "", "a\n", "<|user|>\nx<|end|> </s> y"])
def test_plain_text_is_that_of_transformers(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_special_ids_are_those_of_transformers(both, end):
    ours, theirs = both
    named = (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id)
    assert named == tuple(getattr(theirs, f"{n}_token_id") for n in ("bos", "eos", "pad", "unk"))
    assert ours.special_tokens[end] == theirs.convert_tokens_to_ids(end)
    assert ours.special_tokens[end] in ours.stop_tokens
    assert ours.vocab_size == len(theirs)


def test_a_folder_saved_by_transformers(both, supported, tmp_path):
    ours, theirs = both
    talk = [Message("user", " Hello\n", masked=True), Message("assistant", "Hi <there>")]
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((supported / "config.json").read_text())
    assert phi3_tokenizer(tmp_path).tokenize_messages(talk) == ours.tokenize_messages(talk)


@given(turns=TURNS, tools=CONTENT)
@MANY
def test_tools_of_the_system_message(phi4_mini_pair, turns, tools):
    ours, theirs = phi4_mini_pair
    messages = [{"role": "system", "content": "s", "tools": tools}, *dicts(turns)]
    tokens = tokenize(ours, [("system", "s", None, tools), *turns])
    assert tokens.ids.tolist() == theirs.apply_chat_template(messages, return_dict=False)


@pytest.fixture(scope="session")
def phi4_mini_pair(tmp_path_factory):
    folder = phi4_mini(tmp_path_factory.mktemp("tools"))
    return phi3_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.assets
def test_recorded_ids(tmp_path):
    if assets_dir() is None:
        pytest.skip("the recorded ids are not here: set PHI3_ASSETS")
    cases = json.loads((assets_dir() / "golden" / "chat_template_golden.json").read_text())
    assert len(cases) == 70
    settings = json.loads(
        (assets_dir() / "models" / "phi4-mini-instruct" / "tokenizer_config.json").read_text()
    )
    assert settings["chat_template"] == PHI4_MINI
    built = {n: phi3_tokenizer(b(tmp_path / n), dropped="warn") for n, b in FROM_ASSETS.items()}
    built["phi4-mini(text only)"] = phi3_tokenizer(phi4_mini(tmp_path / "phi4-mini"))
    for case in cases:
        chat = [make_turn(m["role"], m["content"]) for m in case["messages"]]
        ask = {"add_generation_prompt": case["add_generation_prompt"]}
        rendered = built[case["variant"]].render(chat, **ask)
        assert "".join(piece.text for piece in rendered.pieces) == case["text"], case
        if "input_ids" in case:
            (tokens,) = built[case["variant"]].tokenize_chats([chat], **ask)
            assert tokens.ids.tolist() == case["input_ids"], case
