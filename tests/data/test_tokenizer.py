"""What a tokenizer does beside the ids, which are compared for every revision in test_family."""

import json

import pytest
from torchtune.data import Message

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.formats import make_turn
from phi3_plugin.errors import ConfigError, DataError, TokenizerError
from tests.assets import assets_dir
from tests.data.tiny import edit_json, write_checkpoint

TALK = [
    Message("system", "be the best", masked=True),
    Message("user", " Hello\n", masked=True),
    Message("assistant", "Hi <there>"),
    Message("user", "the?", masked=True),
    Message("assistant", ""),
]


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
    expected = [ids["<|endoftext|>"], ids["<|end|>"]]
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
        ([Message("ipython", "1")], "leaves out the ipython message"),
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
