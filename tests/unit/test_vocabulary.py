"""Tokenizer files: stop ids, and folders that are broken or foreign."""

import json

import pytest
from transformers import AutoTokenizer

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import ConfigError, MissingFileError, TokenizerError
from tests.variants import DECODER, MINI, PHI35, edit_json, phi4_mini


def test_stop_tokens(folder):
    ids = phi3_tokenizer(folder).special_tokens
    expected = [ids["<|endoftext|>"], ids["<|end|>"]]
    assert phi3_tokenizer(folder).stop_tokens == expected
    for listed, stops in (([4, 5], [4, 5]), (6, [6])):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        assert phi3_tokenizer(folder).stop_tokens == stops


@pytest.mark.parametrize("ids", [[], [99999], [-1], [3, None], ["<|end|>"]])
def test_stop_ids_that_are_none(folder, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(TokenizerError, match=r"generation_config\.json: eos_token_id: .* must be"):
        phi3_tokenizer(folder)


def test_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint_dir is not set"):
        phi3_tokenizer(None)
    with pytest.raises(MissingFileError, match="nowhere is not a folder"):
        phi3_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_files_that_are_missing_or_broken(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(TokenizerError, match=rf"{name} (cannot be used|is not valid JSON)"):
        phi3_tokenizer(folder)
    (folder / name).unlink()
    with pytest.raises(MissingFileError, match=rf"checkpoint has no {name}\. Download"):
        phi3_tokenizer(folder)


def test_only_sentencepiece_file(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(MissingFileError, match=r"no tokenizer\.json \(only tokenizer\.model"):
        phi3_tokenizer(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_not_text(folder, name):
    (folder / name).write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=rf"{name} is not (UTF-8 text|valid JSON)"):
        phi3_tokenizer(folder)


@pytest.mark.parametrize("text", ["[]", "[" * 10**5])
def test_json_of_another_type(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(
        TokenizerError, match=r"config\.json (must hold a JSON object|is not valid)"
    ):
        phi3_tokenizer(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chat_template": None}, r"no chat_template and there is no chat_template\.jinja"),
        (
            {"chat_template": MINI.replace("['content']", "['content'] | upper")},
            r"tokenizer_config\.json: turns cannot be told apart",
        ),
        ({"pad_token": "<pad>"}, r"pad_token: '<pad>' is not in tokenizer\.json"),
        ({"eos_token": None}, "no eos_token"),
        ({DECODER: {"3": {}}}, "an entry of added_tokens_decoder has no content"),
    ],
)
def test_settings_that_cannot_be_followed(folder, changes, says):
    edit_json(folder / "tokenizer_config.json", **changes)
    with pytest.raises(TokenizerError, match=says):
        phi3_tokenizer(folder)


def test_a_token_that_the_template_writes_is_missing(folder):
    for file, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", DECODER)):
        tokens = json.loads((folder / file).read_text())[key]
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            token["content"] = token["content"].replace("<|user|>", "<|human|>")
        edit_json(folder / file, **{key: tokens})
    with pytest.raises(TokenizerError, match=r"template writes <\|user\|>, no added token of tok"):
        phi3_tokenizer(folder)


def test_files_that_disagree_about_a_token(folder):
    file = folder / "tokenizer_config.json"
    listed = json.loads(file.read_text())[DECODER]
    for token in listed.values():
        token["rstrip"] = False
    edit_json(file, **{DECODER: listed})
    with pytest.raises(TokenizerError, match=r"disagree about .*<\|assistant\|>"):
        phi3_tokenizer(folder)


def test_more_tokens_than_embeddings(folder):
    size = phi3_tokenizer(folder).vocab_size
    edit_json(folder / "config.json", vocab_size=300)
    with pytest.raises(TokenizerError, match=f"has {size} tokens, more than vocab_size: 300"):
        phi3_tokenizer(folder)


def test_which_template_is_read(folder):
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": MINI}]
    edit_json(folder / "tokenizer_config.json", chat_template=several)
    assert phi3_tokenizer(folder).template.source == MINI
    (folder / "chat_template.jinja").write_text(PHI35)
    assert phi3_tokenizer(folder).template.source == PHI35


def test_saved_truncation_and_padding_are_reset(folder):
    edit_json(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    )
    assert len(phi3_tokenizer(folder).encode("the other")) > 2


NESTED = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", '
         '"vocab": {}, "merges": []}}'),
        ("tokenizer.json", NESTED),
        ("tokenizer_config.json", f'{{"a": {NESTED}}}'),
        ("tokenizer_config.json", f'{{"model_max_length": {"9" * 5000}}}'),
        ("tokenizer_config.json", '{"eos_token": "<|endoftext|>", "added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"eos_token": "b", "added_tokens_decoder": {"1": 2}}'),
        ("tokenizer_config.json", '{"eos_token": "<|endoftext|>", "chat_template": [1]}'),
        ("tokenizer_config.json", '{"eos_token": "b", "chat_template": [{"name": []}]}'),
        ("tokenizer_config.json", '{"eos_token": ["<|endoftext|>"]}'),
        ("tokenizer_config.json", '{"eos_token": "", "unk_token": ""}'),
        ("tokenizer_config.json", '{"eos_token": {"content": {}}}'),
        ("generation_config.json", f'{{"eos_token_id": {NESTED}}}'),
        ("generation_config.json", '{"eos_token_id": NaN}'),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
        ("config.json", '{"vocab_size": true}'),
        ("config.json", f'{{"vocab_size": {"9" * 4000}}}'),
    ],
)  # fmt: skip
def test_hostile_json_is_one_error_that_names_the_file(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(TokenizerError, match=name):
        phi3_tokenizer(folder)


@pytest.mark.parametrize("charsmap", ["", None])
def test_a_file_that_makes_the_tokenizers_library_panic_is_one_error(folder, charsmap):
    charsmap = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    edit_json(folder / "tokenizer.json", normalizer=charsmap)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be used: Precompiled"):
        phi3_tokenizer(folder)


def test_a_text_that_makes_the_tokenizers_library_panic_is_one_error(folder):
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    split["pattern"] = {"Regex": "(a+)+$"}
    edit_json(folder / "tokenizer.json", pre_tokenizer=split)
    tokenizer = phi3_tokenizer(folder)
    assert tokenizer.encode("a")
    for encode in (tokenizer.encode, lambda text: tokenizer.tokenize_chats([chat(text)])):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be used: .*retry-limit"):
            encode("a" * 40 + "!")


def test_padding_of_a_file_takes_no_memory(folder):
    strategy = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    edit_json(folder / "tokenizer.json", padding=strategy | pad)
    assert phi3_tokenizer(folder).encode("a")


def chat(text):
    return [make_turn("user", text), make_turn("assistant", "b")]


NAMED = "<|image|>"
NAMES_OF_TOKENS = {
    "extra": {"extra_special_tokens": [NAMED]},
    "extra by name": {"extra_special_tokens": {"image_token": NAMED}},
    "additional": {"additional_special_tokens": [NAMED]},
    "mask": {"mask_token": NAMED},
    "sep": {"sep_token": {"__type": "AddedToken", "content": NAMED, "rstrip": True}},
    "of the model's own": {"image_token": NAMED},
}


@pytest.mark.parametrize("name", NAMES_OF_TOKENS)
def test_a_special_token_that_only_the_settings_name(folder, tmp_path, name):
    """transformers makes it a token of its own; here that must be in tokenizer.json."""
    edit_json(folder / "tokenizer_config.json", **NAMES_OF_TOKENS[name])
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: .*'<\|image\|>' is not in"):
        phi3_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "saved")  # as the error advises
    (tmp_path / "saved" / "config.json").write_text((folder / "config.json").read_text())
    text = "see <|image|> x"
    assert phi3_tokenizer(tmp_path / "saved").encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    "named",
    [
        {"extra_special_tokens": ["the"]},
        {"additional_special_tokens": ["the"]},
        {"cls_token": "the"},
        {"sep_token": {"__type": "AddedToken", "content": "the", "rstrip": True}},
    ],
)
def test_a_special_token_that_is_in_the_vocabulary_alone(tmp_path, named):
    folder = phi4_mini(tmp_path)
    edit_json(folder / "tokenizer_config.json", **named)
    text = "they gather  the  other"
    ids = AutoTokenizer.from_pretrained(folder).encode(text)
    assert phi3_tokenizer(folder).encode(text) == ids


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_files_of_older_versions_name_tokens_too(tmp_path, name):
    folder = phi4_mini(tmp_path)
    content = {"additional_special_tokens": [NAMED]} if name[0] == "s" else {NAMED: 354}
    (folder / name).write_text(json.dumps(content))
    assert len(AutoTokenizer.from_pretrained(folder).encode(NAMED)) == 1
    with pytest.raises(TokenizerError, match=rf"{name}: .*'<\|image\|>' is not in tok"):
        phi3_tokenizer(folder)


def test_too_many_tokens_say_how_to_add_them(folder):
    edit_json(folder / "config.json", vocab_size=300)
    with pytest.raises(
        TokenizerError, match=r"resize_token_embeddings\(\d+\) and .*save_pretrained"
    ):
        phi3_tokenizer(folder)
