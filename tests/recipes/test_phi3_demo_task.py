import pytest
from phi3_plugin.recipes import phi3_demo_task as task


def prompts(chats):
    return [chat["messages"][0]["content"] for chat in chats]


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_shipped_files_are_what_the_generator_writes(part):
    file = {"train": task.TRAIN_FILE, "heldout": task.HELDOUT_FILE}[part]
    chats = dict(zip(("train", "heldout"), task.make_chats(), strict=True))[part]
    assert file.read_text(encoding="utf-8") == task.to_jsonl(chats)


def test_held_out_questions_are_many_and_unseen():
    train, heldout = task.make_chats()
    assert len(set(prompts(heldout))) == len(heldout) >= 100
    assert len(set(prompts(train))) == len(train)
    assert not set(prompts(train)) & set(prompts(heldout))


def test_chat_reverses():
    question, answer = task.chat("kfaqz")["messages"]
    assert question == {"role": "user", "content": "Reverse: k f a q z"}
    assert answer == {"role": "assistant", "content": "z q a f k"}


def test_questions_come_with_their_answers():
    questions, answers = task.read_questions()
    assert len(questions) == task.HELDOUT_CHATS
    for question, answer in zip(questions, answers, strict=True):
        assert question.split()[1:] == answer.split()[::-1]


def test_score_counts_answers_that_are_right_to_the_letter():
    assert task.score(["a b", "a b ", "b a", ""], ["a b", "a b", "a b", "a b"]) == 0.25


def test_shown_answers_hold_no_control_characters(capsys):
    task.show_answers(["Reverse: a"], ["\x1b[2J\n\x07" + "x" * 99], ["a"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2
    assert all(line.isprintable() and len(line) < 80 for line in shown)
