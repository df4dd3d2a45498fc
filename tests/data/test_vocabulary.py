"""Every broken or foreign tokenizer folder is refused, and the message says what to do."""

import json

import pytest

from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.errors import ConfigError, MissingFileError, TokenizerError
from tests.data.tiny import MINI, PHI35, edit_json
from tests.data.variants import DECODER


def test_path_not_set():
    with pytest.raises(ConfigError, match="checkpoint_dir is not set"):
        phi3_tokenizer(None)


def test_no_folder(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere is not a folder"):
        phi3_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(MissingFileError, match=rf"checkpoint has no {name}\. Download"):
        phi3_tokenizer(folder)


def test_only_sentencepiece_file(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(MissingFileError, match=r"no tokenizer\.json \(only tokenizer\.model"):
        phi3_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_broken_json(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(TokenizerError, match=rf"{name} (cannot be read|is not valid JSON)"):
        phi3_tokenizer(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_not_text(folder, name):
    (folder / name).write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=rf"{name} is not UTF-8 text"):
        phi3_tokenizer(folder)


def test_json_of_another_type(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="must hold a JSON object, not list"):
        phi3_tokenizer(folder)


def test_no_chat_template(folder):
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(TokenizerError, match=r"no chat_template and there is no chat_template\.ji"):
        phi3_tokenizer(folder)


def test_a_template_whose_turns_cannot_be_told_apart(folder):
    shouting = MINI.replace("['content']", "['content'] | upper")
    edit_json(folder / "tokenizer_config.json", chat_template=shouting)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: turns cannot be told apart"):
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
    listed = json.loads(file.read_text())["added_tokens_decoder"]
    for token in listed.values():
        token["rstrip"] = False
    edit_json(file, added_tokens_decoder=listed)
    with pytest.raises(TokenizerError, match=r"disagree about .*<\|assistant\|>"):
        phi3_tokenizer(folder)


def test_more_tokens_than_embeddings(folder):
    size = phi3_tokenizer(folder).vocab_size
    edit_json(folder / "config.json", vocab_size=300)
    with pytest.raises(TokenizerError, match=f"has {size} tokens, more than vocab_size: 300"):
        phi3_tokenizer(folder)


def test_named_token_that_does_not_exist(folder):
    edit_json(folder / "tokenizer_config.json", pad_token="<pad>")
    with pytest.raises(TokenizerError, match=r"pad_token: '<pad>' is not in tokenizer\.json"):
        phi3_tokenizer(folder)


def test_no_eos_token(folder):
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(TokenizerError, match="no eos_token"):
        phi3_tokenizer(folder)


@pytest.mark.parametrize("ids", [[], [99999], [-1], [3, None], ["<|end|>"]])
def test_stop_ids_that_are_none(folder, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(TokenizerError, match=r"generation_config\.json: eos_token_id: .* must be"):
        phi3_tokenizer(folder)


def test_a_template_file_beside_wins(folder):
    (folder / "chat_template.jinja").write_text(PHI35)
    edit_json(folder / "tokenizer_config.json", chat_template="{{ raise_exception('old') }}")
    phi3_tokenizer(folder)


def test_the_default_of_several_templates(folder):
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": MINI}]
    edit_json(folder / "tokenizer_config.json", chat_template=several)
    phi3_tokenizer(folder)


def test_saved_truncation_and_padding_are_reset(folder):
    edit_json(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    )
    assert len(phi3_tokenizer(folder).encode("the other")) > 2
