"""The demo: it learns, it proves what it learned, and its checkpoint is laid out like Phi-3's."""

import json
import logging
import os
import subprocess
import sys
import warnings
from hashlib import sha256

import pytest
import torch
from phi3_plugin.recipes import phi3_demo as demo
from phi3_plugin.recipes.phi3_demo_checkpoint import ADDED_TOKENS, build_checkpoint
from tokenizers import Tokenizer
from torchtune.data import Message
from transformers import AutoTokenizer

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.config import read_config
from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.errors import CheckpointError
from phi3_plugin.lock import LOCK
from phi3_plugin.models import phi3
from phi3_plugin.proof import load_base_with_hf
from tests import warm
from tests.assets import assets_dir

SMALL = """
import functools, sys, sysconfig
from phi3_plugin.recipes import phi3_demo as demo
sysconfig.get_path = lambda name: sys.argv[1]
demo.build_checkpoint = functools.partial(demo.build_checkpoint, layers=2)
demo.LETTERS, demo.LENGTH = "abcdefghij", 3
demo.TRAIN_CHATS, demo.HELDOUT_CHATS, demo.LEARNED = 640, 64, 0.5
sys.exit(demo.main([]))
"""
"""Half the layers and a third of the steps on an easier task, of which half is learned; `tune` is
where it is told."""


@pytest.mark.slow
def test_a_small_demo_learns(tmp_path):
    learns("-c", SMALL, os.environ[warm.STARTED], cwd=tmp_path, steps=6 * 19)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_demo_learns(tmp_path):
    learns("-m", "phi3_plugin.recipes.phi3_demo", cwd=tmp_path, steps=6 * 61)


def learns(*words, cwd, steps):
    done = warm.run("python", *words, cwd=cwd, timeout=600, PYTHONWARNINGS="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    ran = "tune run phi3_lora_finetune", f"step {steps}/{steps}", "tune run phi3_evaluate"
    for said in (*ran, "Exact match, %", "exact match", "Reverse: "):
        assert said in done.stdout
    folder = cwd / "demo_run"
    assert {path.name for path in folder.iterdir()} == {demo.MADE_BY_DEMO, *demo.CONTENT}
    assert (folder / "finetuned" / "final" / "adapter_model.safetensors").is_file()
    assert (folder / "evaluation" / "evaluation.html").is_file()
    lines = map(json.loads, (folder / "finetuned" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == steps
    assert losses[0] > 5 > 0.5 > losses[-1]


def test_a_folder_of_somebody_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("all of it")
    assert demo.main(["--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"--output: {tmp_path} exists and is not an earlier demo run" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_earlier_run_is_replaced_and_a_users_file_in_it_is_not(tmp_path):
    folder = tmp_path / "run"
    demo.prepare_output(folder).release()
    (folder / "finetuned" / "epoch_0").mkdir(parents=True)
    (folder / "tune.log").write_text("old")
    (folder / "notes.txt").write_text("mine")
    demo.prepare_output(folder).release()
    names = {path.name for path in folder.iterdir()} - {LOCK}
    assert names == {demo.MADE_BY_DEMO, "notes.txt"}


def test_two_demos_do_not_write_into_one_folder(tmp_path, capsys):
    with demo.prepare_output(tmp_path / "run"):
        (tmp_path / "run" / "tune.log").write_text("of the first")
        second = [sys.executable, "-m", demo.__name__, "--output", tmp_path / "run"]
        done = subprocess.run(second, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"phi3_demo: --output: another process writes into {tmp_path}/run" in done.stderr
    assert (tmp_path / "run" / "tune.log").read_text() == "of the first"


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--output", str(tmp_path / "file" / "run")]) == 1
    assert capsys.readouterr().err.startswith("\nphi3_demo: --output: ")


@pytest.mark.parametrize(
    ("in_peft", "here", "code"),
    [
        ((0.0, 1.0), (0.0, 1.0), 0),
        ((0.05, 0.95), (0.05, 0.95), 0),
        ((0.06, 1.0), (0.06, 1.0), 1),
        ((0.0, 0.94), (0.0, 0.94), 1),
        ((0.0, 0.99), (0.0, 1.0), 1),
    ],
)
def test_exit_code_follows_all_exact_matches(in_peft, here, code, capsys):
    assert demo.judge(in_peft, here, [6.0, 0.1]) == code
    assert ("FAILED" in capsys.readouterr().out) == bool(code)


def test_a_command_that_fails_ends_with_the_reason(tmp_path, capsys, monkeypatch):
    lines = [
        "step  32/366    8%  loss 6.2500  lr 1.00e-03  99 tok/s",
        "step  64/366  validation loss 6.0000  perplexity 403",
        "step 366/366  100%  loss 0.1000  lr 1.00e-05  99 tok/s",
        "dataset.source: there is no such file",
    ]
    program = tmp_path / "tune"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + "exit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"(?s)run x ended with exit code 3.*no such file"):
        demo.run_tune(["run", "x"], {"key": "a b"}, tmp_path / "log", demo.show_progress)
    shown = capsys.readouterr().out
    assert "$ tune run x \\\n      'key=a b'" in shown
    assert [line.split("loss ")[1] for line in shown.splitlines() if "loss" in line] == [
        *("6.250", "0.100")
    ]
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_the_chats_depend_on_no_version_of_python():
    """What the demo learns is known for these."""
    train, heldout = demo.make_chats()
    text = "".join(json.dumps(chat) + "\n" for chat in [*train, *heldout])
    digest = sha256(text.encode()).hexdigest()
    assert digest == "6d534059cdc55a54d8855b5fde209666494436c394ec47d20c8b731d94f5c646"
    questions, unseen = ([c["messages"][0]["content"] for c in part] for part in (train, heldout))
    assert len(set(unseen)) == demo.HELDOUT_CHATS and len(set(questions)) == demo.TRAIN_CHATS
    assert not set(questions) & set(unseen)
    for chat in heldout:
        question, answer = (turn["content"].split() for turn in chat["messages"])
        assert question == ["Reverse:", *answer[::-1]]


def test_answers_that_are_right_to_the_letter():
    assert demo.exact_match(["a b", "a b ", "b a", ""], ["a b", "a b", "a b", "a b"]) == 0.25


def test_shown_answers_hold_no_control_characters(capsys):
    demo.show_answers(["Reverse: a"], ["\x1b[2J\n\x07" + "x" * 99], ["a"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2
    assert all(line.isprintable() and len(line) < 80 for line in shown)


# The checkpoint

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Reverse: k f a q z"},
    {"role": "assistant", "content": "z q a f k"},
    {"role": "user", "content": "Grüße,\n  and 2 + 2?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    build_checkpoint(folder, words=demo.WORDS)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_transformers_loads_it_without_a_word(folder, caplog):
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, tokenizer = load_base_with_hf(folder), AutoTokenizer.from_pretrained(folder)
    finally:
        transformers_log.removeHandler(caplog.handler)
    loud = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not [r for r in loud if r.name.startswith("transformers")]
    assert type(model).__name__ == "Phi3ForCausalLM"
    assert tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == [
        tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|assistant|>", "<|end|>")
    ]


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
def test_ids_follow_phi3s_rules(folder, prompt):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = CHAT[1 : 2 if prompt else 3]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
    # No BOS, no newline after a role token or <|end|>, one token a word.
    expected = ["<|user|>", "▁Reverse:", "▁k", "▁f", "▁a", "▁q", "▁z", "<|end|>", "<|assistant|>"]
    if not prompt:
        expected += ["▁z", "▁q", "▁a", "▁f", "▁k", "<|end|>", "<|endoftext|>"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected


def test_ids_are_equal_in_transformers_tokenizers_and_here(folder):
    hf, raw = (
        AutoTokenizer.from_pretrained(folder),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    text = hf.apply_chat_template(CHAT, tokenize=False)
    ids = hf.apply_chat_template(CHAT)["input_ids"]
    assert raw.encode(text).ids == ids
    messages = [Message(role=m["role"], content=m["content"]) for m in CHAT]
    assert phi3_tokenizer(folder).tokenize_messages(messages)[0] == ids


def test_text_survives_bytes_and_spaces(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Grüße,  12 × 3 → ok\n\ttab"
    ids = tokenizer(text)["input_ids"]
    assert "<unk>" not in tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.decode(ids) == text


def test_our_model_takes_every_weight(folder):
    model = phi3(folder)
    model.load_state_dict(load_base_weights(folder))
    ids = torch.arange(17)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), load_base_with_hf(folder)(ids).logits)


def test_weights_lie_in_shards_under_an_index(folder):
    index = read(folder, "model.safetensors.index.json")
    files = {file.name for file in folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) == 2
    assert index["metadata"]["total_size"] == 4 * load_base_with_hf(folder).num_parameters()


def test_equal_words_give_equal_files(folder, tmp_path):
    build_checkpoint(tmp_path, words=demo.WORDS)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_vocabulary_is_rounded_up_as_in_phi3(folder):
    config = read_config(folder)
    tokens = len(AutoTokenizer.from_pretrained(folder))
    assert tokens < config.vocab_size < tokens + 64
    assert config.vocab_size % 64 == 0
    assert config.head_dim % 2 == 0


@pytest.mark.assets
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"],
)
def test_files_differ_from_the_published_ones_in_sizes_and_ids_only(folder, name):
    ours, published = (read(where, name) for where in (folder, mini_4k()))
    published.pop("auto_map", None)  # remote code, which nothing needs any more
    assert ours.keys() == published.keys()
    changed = {key for key in ours if ours[key] != published[key]}
    assert changed <= {
        *("_name_or_path", "torch_dtype", "added_tokens_decoder", "model_max_length"),
        *("eos_token_id", "pad_token_id", "vocab_size", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "sliding_window"),
        *("max_position_embeddings", "original_max_position_embeddings"),
    }


@pytest.mark.assets
def test_tokenizer_has_the_structure_of_the_published_one(folder):
    ours, published = (read(where, "tokenizer.json") for where in (folder, mini_4k()))
    for content in (ours, published):
        del content["model"]["vocab"], content["model"]["merges"]
        for token in content["added_tokens"]:
            del token["id"]
    ours["model"].pop("ignore_merges")  # newer than the published file
    assert ours == published


@pytest.mark.assets
def test_added_tokens_have_the_published_flags_and_order(folder):
    decoders = [
        read(where, "tokenizer_config.json")["added_tokens_decoder"]
        for where in (folder, mini_4k())
    ]
    ours, published = (list(decoder.values()) for decoder in decoders)
    assert ours == published
    assert list(read(folder, "added_tokens.json")) == [text for text, _ in ADDED_TOKENS]


def mini_4k():
    return assets_dir() / "models" / "phi3-mini-4k-instruct"
