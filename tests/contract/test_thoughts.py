"""Thoughts before answers, beside transformers: ids, and what of them is trained on.

What a model would be asked for is worked out from transformers' own texts: an answer begins where
the prompt for it ends (``add_generation_prompt``), and is learned only if it is still there, whole,
when the conversation goes on.
"""

import json

import pytest
from transformers import AutoTokenizer

from phi3_plugin.data import chat_dataset, phi3_tokenizer, preference_dataset
from phi3_plugin.data.collate import IGNORED
from phi3_plugin.data.dataset import messages_of_rows
from phi3_plugin.data.findings import FORGOTTEN_THOUGHT
from phi3_plugin.evaluate import question_of
from phi3_plugin.options import PromptOptions
from phi3_plugin.prompts import read_prompts
from tests.variants import (
    FORGETS,
    OPEN4,
    PHI4,
    PHI4_MINI_REASONING,
    PHI4_REASONING,
    PHI4_TOKENS,
    TAIL_THINKING,
    THOUGHT_TOKENS,
    WRITES,
    phi4,
    phi4_mini,
)

BLOCKS = WRITES.replace("{% if message.reas", "{% generation %}{% if message.reas").replace(
    "'<|im_end|>' }}" + TAIL_THINKING, "'<|im_end|>' }}{% endgeneration %}" + TAIL_THINKING
)
OPENED = OPEN4 + " + '<think>\n'"
OPENS = WRITES.replace(TAIL_THINKING, TAIL_THINKING.replace(OPEN4, OPENED))
"""A prompt of it ends in ``<think>``, as DeepSeek-R1's does."""
MARKED = (*PHI4_TOKENS, *THOUGHT_TOKENS)


def folder_of(place, template, tokens=PHI4_TOKENS):
    if template is PHI4_MINI_REASONING:
        return phi4_mini(place, chat_template=template)
    return phi4(place, chat_template=template, tokens=tokens)


def user(text="What is 2 + 2?"):
    return {"role": "user", "content": text}


def answer(text="It is 4.", **fields):
    return {"role": "assistant", "content": text, **fields}


def written(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


def samples(folder, rows, special_in_text="parse", **options):
    """Return tokens and labels of rows as a run takes them, and what was noticed."""
    source = written(folder, *({"messages": row} for row in rows))
    tokenizer = phi3_tokenizer(folder, special_in_text=special_in_text)
    dataset = chat_dataset(tokenizer, source=source, **options)
    listed = [dataset[i] for i in range(len(dataset))]
    return [([*one["tokens"]], [*one["labels"]]) for one in listed], dataset.findings


def expected(folder, messages, end):
    """Return tokens and labels as transformers' texts have them."""
    theirs = AutoTokenizer.from_pretrained(folder)

    def text_of(some, ask=False):
        return theirs.apply_chat_template(some, tokenize=False, add_generation_prompt=ask)

    text = text_of(messages)
    encoding = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ids == encoding["input_ids"]
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, said = text_of(messages[:i], ask=True), text_of(messages[: i + 1])
        said = said[: said.rindex(end) + len(end)]
        assert said.startswith(asked)
        if not text.startswith(said):
            continue  # it is no more what the model has written
        for n, (first, last) in enumerate(encoding["offset_mapping"]):
            if first < len(said) and last > len(asked):
                labels[n] = ids[n]
    return ids, labels


def is_as_expected(folder, row, seen=None, end="<|im_end|>", **options):
    """Compare a row with what transformers makes of it, or of one that says it in its words."""
    (sample,), findings = samples(folder, [row], **options)
    assert sample == expected(folder, seen or row, end)
    return findings


THOUGHT = {"reasoning_content": "Two and two.\n\nThat is four."}
ROWS = {
    "none": [user(), answer()],
    "one": [user(), answer(**THOUGHT)],
    "two": [user(), answer(**THOUGHT), user("And 3 + 3?"), answer("6", reasoning_content="Three")],
    "first": [user(), answer(**THOUGHT), user("And 3 + 3?"), answer("6")],
    "last": [user(), answer(), user("And 3 + 3?"), answer("6", **THOUGHT)],
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("template", [WRITES, BLOCKS, FORGETS], ids=["writes", "blocks", "forgets"])
@pytest.mark.parametrize("tokens", [PHI4_TOKENS, MARKED], ids=["text", "tokens"])
def test_a_thought_that_the_template_writes(tmp_path, template, row, tokens):
    folder = folder_of(tmp_path, template, tokens)
    findings = is_as_expected(folder, row)
    left_out = template is FORGETS and len(row) > 2 and "reasoning_content" in row[1]
    assert findings.counts[FORGOTTEN_THOUGHT] == left_out


@pytest.mark.parametrize("name", ["reasoning", "thinking"])
def test_a_thought_under_another_name_is_given_under_the_templates(tmp_path, name):
    row = [user(), answer(**{name: "Two."})]
    is_as_expected(folder_of(tmp_path, WRITES), row, [user(), answer(reasoning_content="Two.")])


@pytest.mark.parametrize(
    ("template", "end"),
    [(PHI4_REASONING, "<|im_end|>"), (PHI4_MINI_REASONING, "<|end|>")],
    ids=["phi4-reasoning", "phi4-mini-reasoning"],
)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_checkpoint_that_thinks_gets_thoughts_in_front_of_the_answer(
    tmp_path, template, end, row
):
    seen = [
        {"role": m["role"], "content": m["content"]}
        if "reasoning_content" not in m
        else answer(f"<think>\n{m['reasoning_content']}\n</think>\n{m['content']}")
        for m in row
    ]
    for tokens in (PHI4_TOKENS, MARKED):
        folder = folder_of(tmp_path / str(len(tokens)), template, tokens)
        is_as_expected(folder, row, seen, end)
        is_as_expected(folder, seen, None, end)  # as it is written already


@pytest.mark.parametrize("template", [WRITES, PHI4_REASONING], ids=["writes", "phi4-reasoning"])
def test_the_marks_stay_tokens_where_special_tokens_are_text(tmp_path, template):
    folder = folder_of(tmp_path, template, MARKED)
    as_text, _ = samples(folder, [ROWS["two"]], special_in_text="text")
    assert as_text == samples(folder, [ROWS["two"]])[0]
    assert phi3_tokenizer(folder).special_tokens["</think>"] in as_text[0][1]


@pytest.mark.parametrize("template", [WRITES, FORGETS], ids=["writes", "forgets"])
def test_what_a_model_is_asked_has_the_thoughts_that_transformers_gives_it(tmp_path, template):
    folder, row = folder_of(tmp_path, template), ROWS["two"]
    tokenizer, theirs = phi3_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    asked = theirs.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=False)
    section = {"source": written(folder, {"messages": row})}
    ((_, messages),) = messages_of_rows(tokenizer, section)
    assert question_of(messages, tokenizer)[::2] == (asked, "6")
    o = PromptOptions(checkpoint_dir=folder, prompts=section["source"])
    (prompt,) = read_prompts(o, tokenizer, 1000)
    assert prompt.ids.tolist() == asked


def test_prompts_of_a_checkpoint_that_does_not_think(tmp_path):
    folder, (*before, _) = folder_of(tmp_path, PHI4), ROWS["two"]
    o = PromptOptions(checkpoint_dir=folder, prompts=written(folder, {"messages": ROWS["two"]}))
    tokenizer = phi3_tokenizer(folder)
    (prompt,) = read_prompts(o, tokenizer, 1000)
    text = f"<think>\n{before[1]['reasoning_content']}\n</think>\n{before[1]['content']}"
    assert text in tokenizer.decode(prompt.ids.tolist())


def test_pairs_of_answers_with_thoughts(tmp_path):
    folder = folder_of(tmp_path, PHI4_REASONING)
    chosen, rejected = [answer("4", reasoning="Two.")], [answer("5", reasoning="Three.")]
    source = written(folder, {"prompt": [user()], "chosen": chosen, "rejected": rejected})
    tokenizer = phi3_tokenizer(folder)
    (pair,) = preference_dataset(tokenizer, source=source)
    learned = [
        tokenizer.decode([i for i in pair[f"{side}_labels"] if i != IGNORED])
        for side in ("chosen", "rejected")
    ]
    assert learned == ["<think>\nTwo.\n</think>\n4", "<think>\nThree.\n</think>\n5"]


def test_a_checkpoint_that_does_not_think_is_told_how_to_write_thoughts(tmp_path):
    folder = folder_of(tmp_path, PHI4)
    row = [user(), answer(**THOUGHT)]
    _, findings = samples(folder, [row, ROWS["none"]], bad_rows="drop")
    ((_, reason),) = findings.places["cannot be used"]
    assert "set dataset.thoughts" in reason
    seen = [user(), answer("<t>" + THOUGHT["reasoning_content"] + "</t>It is 4.")]
    is_as_expected(folder, row, seen, thoughts="<t>{}</t>")


ALSO_OPENS = PHI4_REASONING.replace(OPEN4 + " }}", OPENED + " }}")


@pytest.mark.parametrize("template", [OPENS, ALSO_OPENS], ids=["opens", "opens-in-blocks"])
def test_a_prompt_that_opens_the_thought_is_not_learned(tmp_path, template):
    folder = folder_of(tmp_path, template)
    said = "<think>\nTwo and two.\n</think>\n\nIt is 4."
    row = [user(), answer(said)]
    if "generation %}" in template:  # what stands in there counts, as in transformers' mask
        (sample,), _ = samples(folder, [row])
        theirs = AutoTokenizer.from_pretrained(folder)
        masked = theirs.apply_chat_template(
            row, return_dict=True, return_assistant_tokens_mask=True
        )
        assert [label != IGNORED for label in sample[1]] == [*map(bool, masked["assistant_masks"])]
        return
    is_as_expected(folder, row)
    is_as_expected(folder, [user(), answer(reasoning_content="Two and two.")])
    text = f"{said}<|im_end|>"
    asked = "<|im_start|>user<|im_sep|>What?<|im_end|><|im_start|>assistant<|im_sep|>"
    tokenizer = phi3_tokenizer(folder)
    (sample,) = chat_dataset(tokenizer, source=written(folder, {"text": asked + text}))
    learned = tokenizer.decode([i for i in sample["labels"] if i != IGNORED], False)
    assert learned == text.removeprefix("<think>\n")
