"""Every row of the real files: ids and labels against the chat template of transformers."""

import json

import pytest
from transformers import AutoTokenizer

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from tests.assets import assets_dir
from tests.chosen import some

FILES = {
    "gsm8k_train.jsonl": 7473,
    "gsm8k_test.jsonl": 1319,
    "oasst_en_100_messages.jsonl": 564,
    "fastchat_dummy_conversation.json": 500,
    "mbpp_alpaca.jsonl": 974,
    "self_instruct_alpaca.jsonl": 427,
}


@pytest.mark.assets
@pytest.mark.parametrize("name", some(FILES, quick={*FILES} - {"gsm8k_train.jsonl"}))
def test_every_row_of_the_real_files(name):
    """Ids against the chat template of transformers, and what is trained against the answers."""
    if assets_dir() is None:
        pytest.skip("the real data is not here: set PHI3_ASSETS")
    folder = assets_dir() / "models" / "phi3.5-mini-instruct"
    tokenizer, theirs = phi3_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    file = assets_dir() / "data" / name
    dataset = chat_dataset(tokenizer, file)
    assert len(dataset) == dataset.rows == FILES[name] and not dataset.findings.dropped
    text = file.read_text()
    rows = json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))
    chats = [as_messages(row) for row in rows]
    expected = theirs.apply_chat_template(chats, tokenize=True, return_dict=False)
    end = tokenizer.special_tokens["<|end|>"]
    for chat, ids, sample in zip(chats, expected, dataset, strict=True):
        assert sample["tokens"] == ids
        assert sample["labels"] == labels(ids, [m["role"] for m in chat], tokenizer, end)


def labels(ids, roles, tokenizer, end):
    """Mark what stands between the token of a role and the one that ends the turn."""
    marked, speaks = [], None
    heads = {tokenizer.special_tokens[f"<|{role}|>"]: role for role in ("user", "assistant")}
    for token in ids:
        marked.append(token if speaks == "assistant" and token not in heads else -100)
        speaks = None if token == end else heads.get(token, speaks)
    assert marked.count(end) == roles.count("assistant")
    return marked


def as_messages(row):
    if "messages" in row:
        return row["messages"]
    if "question" in row:
        turns = [("user", row["question"]), ("assistant", row["answer"])]
    elif "instruction" in row:
        extra = f"\n Input: {row['input']}" if row["input"] else ""
        turns = [("user", row["instruction"] + extra), ("assistant", row["output"])]
    else:
        roles = {"human": "user", "gpt": "assistant"}
        turns = [(roles[m["from"]], m["value"]) for m in row["conversations"]]
    return [{"role": role, "content": content} for role, content in turns]
