"""Whatever rows hold, each gives a sample with labels or is counted with a reason."""

import json

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.data.findings import DROPPED
from phi3_plugin.errors import ConfigError, DataError
from tests.contract.test_rows_fuzzed import JSON, MANY, ROWS, rows
from tests.variants import MEDIUM, write_checkpoint

OPTIONS = st.fixed_dictionaries(
    {
        "train_on": st.sampled_from(["assistant", "last", "marked", "all"]),
        "truncate": st.sampled_from(["right", "left", "drop"]),
        "add_eos": st.booleans(),
        "tool_calls": st.sampled_from([None, "<|tool|>{}"]),
        "packed": st.booleans(),
        "split_documents": st.booleans(),
        "system_prompt": st.sampled_from([None, "", "be brief"]),
    }
)

USUAL = (
    {"question": "q", "answer": "a"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"text": "<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n"},
)


@pytest.fixture(scope="module", params=["mini", "medium"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return write_checkpoint(
        folder, **({"chat_template": MEDIUM} if request.param[1] == "e" else {})
    )


@given(
    lines=st.lists(rows() | JSON, max_size=5),
    many=st.sampled_from(USUAL) | st.sampled_from(ROWS),
    options=OPTIONS,
    limit=st.sampled_from([1, 4, 12, 40, 400, 400]),
)
@MANY
def test_every_row_is_a_sample_or_counted(
    checkpoint, tmp_path_factory, lines, many, options, limit
):
    lines = [many, *lines, many, many]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    options["split_documents"] &= options["packed"]
    tokenizer = phi3_tokenizer(checkpoint, max_seq_len=limit)
    cache = file.parent / "cache"
    try:
        dataset = chat_dataset(tokenizer, file, bad_rows="drop", cache_dir=cache, **options)
    except (DataError, ConfigError) as error:
        assert len(str(error)) > 20
        return
    packed, dataset = dataset, getattr(dataset, "ds", dataset)
    event("read")
    assert dataset.rows == len(lines) == len(dataset) + dataset.findings.dropped
    for kind in DROPPED:
        places = dataset.findings.places.get(kind, [])
        assert len(places) == dataset.findings.counts[kind]
        assert all(where.startswith(f"{file}:") for where, _ in places)
    for i in range(len(packed)):
        labels = packed[i]["labels"]
        assert any(label != -100 for label in (labels if packed is dataset else labels.tolist()))
    for sample in dataset:
        assert len(sample["tokens"]) == len(sample["labels"]) <= limit
        assert sample["labels"][0] == -100
