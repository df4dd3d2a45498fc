"""Ids against transformers and recorded ones; masks against the conversation's own text."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchtune.data import Message
from transformers import AutoTokenizer

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.template import make_turn
from phi3_plugin.errors import ConfigError, DataError, TokenizerError
from tests.assets import assets_dir
from tests.data.tiny import edit_json, write_checkpoint

SPECIAL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<s>", "</s>")
FRAGMENTS = (
    *SPECIAL,
    "<|en",
    "d|>",
    " ",
    "\n",
    "\t",
    "\u2028",
    "  \n\n ",
    "the",
    "中",
    "😀",
    "{{ a }}",
)
CONTENT = st.lists(
    st.sampled_from(FRAGMENTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    max_size=4,
).map("".join)
TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENT), min_size=1, max_size=30
)
RECORDED = {
    "phi3-mini-4k@2024-07": "phi3-mini-4k-instruct",
    "phi3-mini-128k@2024-06": "phi3-mini-128k-instruct",
    "phi3.5-mini": "phi3.5-mini-instruct",
}
TALK = [
    Message("system", "be the best", masked=True),
    Message("user", " Hello\n", masked=True),
    Message("assistant", "Hi <there>"),
    Message("user", "the?", masked=True),
    Message("assistant", ""),
]


@pytest.fixture(scope="session")
def both(supported):
    return phi3_tokenizer(supported), AutoTokenizer.from_pretrained(supported)


def dicts(turns):
    return [{"role": role, "content": content} for role, content in turns]


@given(turns=TURNS, ask=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_ids_are_those_of_transformers(both, turns, ask):
    ours, theirs = both
    chat = [make_turn(*turn) for turn in turns]
    (tokens,) = ours.tokenize_chats([chat], add_generation_prompt=ask)
    expected = theirs.apply_chat_template(
        dicts(turns), tokenize=True, add_generation_prompt=ask, return_dict=False
    )
    assert tokens.ids.tolist() == expected


@given(turns=TURNS)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_trained_text_is_what_the_assistant_says(both, turns):
    """Whitespace may go to the special token before it, so it is left out of the comparison."""
    ours, _ = both
    chat = [make_turn(*turn) for turn in turns]
    (tokens,) = ours.tokenize_chats([chat])
    text = ours.decode(tokens.ids[tokens.trained].tolist(), skip_special_tokens=False)
    said = "".join(turn.content + "<|end|>" for turn in chat if turn.role == "assistant")
    assert "".join(text.split()) == "".join(said.split())
    assert not tokens.trained[0]


@pytest.mark.parametrize("text", ["the  other", " 中 é", "", "a\n", "<|user|>\nx<|end|> </s> y"])
def test_plain_text_is_that_of_transformers(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_special_ids_are_those_of_transformers(both):
    ours, theirs = both
    named = (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id)
    assert named == tuple(getattr(theirs, f"{n}_token_id") for n in ("bos", "eos", "pad", "unk"))
    assert ours.special_tokens["<|end|>"] == theirs.convert_tokens_to_ids("<|end|>")
    assert ours.vocab_size == len(theirs)


def test_a_folder_saved_by_transformers(both, tmp_path):
    ours, theirs = both
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", "vocab_size": 32064}))
    assert phi3_tokenizer(tmp_path).tokenize_messages(TALK) == ours.tokenize_messages(TALK)


@pytest.mark.assets
def test_recorded_ids():
    if assets_dir() is None:
        pytest.skip("the recorded ids are not here: set PHI3_ASSETS")
    cases = json.loads((assets_dir() / "golden" / "chat_template_golden.json").read_text())
    built = {v: phi3_tokenizer(assets_dir() / "models" / f) for v, f in RECORDED.items()}
    cases = [case for case in cases if case["variant"] in built]
    assert len(cases) == 30
    for case in cases:
        chat = [make_turn(m["role"], m["content"]) for m in case["messages"]]
        ask = case["add_generation_prompt"]
        (tokens,) = built[case["variant"]].tokenize_chats([chat], add_generation_prompt=ask)
        assert tokens.ids.tolist() == case["input_ids"], case


@pytest.mark.assets
def test_recorded_ids_of_plain_text():
    if assets_dir() is None:
        pytest.skip("the recorded ids are not here: set PHI3_ASSETS")
    tokenizer = phi3_tokenizer(assets_dir() / "models" / "phi3-mini-4k-instruct")
    assert tokenizer.stop_tokens == [32000, 32001, 32007]
    for case in json.loads((assets_dir() / "golden" / "plain_text_golden.json").read_text()):
        assert tokenizer.encode(case["text"]) == case["ids"], case


def test_mask_of_a_conversation(tokenizer):
    tokens, mask = tokenizer.tokenize_messages(TALK)
    trained = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    assert tokenizer.decode(trained, skip_special_tokens=False) == "Hi <there><|end|><|end|>"
    assert mask[0] and mask[-1]


def test_masked_is_taken_from_the_message(tokenizer):
    talk = [Message("user", "a"), Message("assistant", "b", masked=True)]
    tokens, mask = tokenizer.tokenize_messages(talk)
    kept = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    assert tokenizer.decode(kept, skip_special_tokens=False) == "a<|end|>"


def test_call_takes_messages_and_adds_tokens(tokenizer):
    sample = tokenizer({"messages": list(TALK), "id": 7})
    assert sample.keys() == {"id", "tokens", "mask"}
    assert (sample["tokens"], sample["mask"]) == tokenizer.tokenize_messages(TALK)


def test_inference_leaves_the_turn_to_the_model(tokenizer):
    prompt = tokenizer({"messages": list(TALK)}, inference=True)["tokens"]
    assert prompt == tokenizer.tokenize_messages(TALK[:-1], add_generation_prompt=True)[0]
    assert prompt[-1] == tokenizer.special_tokens["<|assistant|>"]
    assert prompt == tokenizer({"messages": TALK[:-1]}, inference=True)["tokens"]


def test_training_samples_are_cut_and_prompts_are_not(folder):
    whole, cut = phi3_tokenizer(folder), phi3_tokenizer(folder, max_seq_len=5)
    tokens, mask = cut.tokenize_messages(TALK)
    assert tokens == whole.tokenize_messages(TALK)[0][:5]
    assert len(mask) == 5
    assert cut({"messages": list(TALK)}, inference=True) == whole(
        {"messages": list(TALK)}, inference=True
    )


def test_encode_adds_what_is_asked(tokenizer):
    ids = tokenizer.encode("the", add_bos=True, add_eos=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("the"), tokenizer.eos_id]


def test_optional_names(folder):
    edit_json(
        folder / "tokenizer_config.json",
        bos_token=None,
        pad_token=None,
        unk_token={"content": "<s>"},
    )
    tokenizer = phi3_tokenizer(folder)
    assert tokenizer.pad_id == tokenizer.eos_id
    assert tokenizer.unk_id == tokenizer.special_tokens["<s>"]
    with pytest.raises(TokenizerError, match="names no bos_token"):
        tokenizer.encode("a", add_bos=True)


def test_stop_tokens(folder):
    ids = phi3_tokenizer(folder).special_tokens
    expected = [ids["<|endoftext|>"], ids["<|assistant|>"], ids["<|end|>"]]
    assert phi3_tokenizer(folder).stop_tokens == expected
    for listed, stops in (([4, 5], [4, 5]), (6, [6])):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        assert phi3_tokenizer(folder).stop_tokens == stops


@pytest.mark.parametrize("length", [0, -1, "512", 1.5, True])
def test_bad_length(folder, length):
    with pytest.raises(ConfigError, match=r"tokenizer\.max_seq_len: .* must be a whole number"):
        phi3_tokenizer(folder, max_seq_len=length)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "the conversation is empty"),
        ([Message("ipython", "1")], "unknown role 'ipython'"),
        ([Message("user", [{"type": "image", "content": None}])], "holds image, expected text"),
    ],
)
def test_bad_messages(tokenizer, messages, says):
    with pytest.raises(DataError, match=says):
        tokenizer.tokenize_messages(messages)


def test_many_are_tokenized_as_one_by_one(tmp_path):
    tokenizer = phi3_tokenizer(write_checkpoint(tmp_path))
    chats = [[make_turn("user", "the " * n), make_turn("assistant", "中" * n)] for n in range(5)]
    for chat, tokens in zip(chats, tokenizer.tokenize_chats(chats), strict=True):
        (alone,) = tokenizer.tokenize_chats([chat])
        assert tokens.ids.tolist() == alone.ids.tolist()
        assert tokens.trained.tolist() == alone.trained.tolist()
