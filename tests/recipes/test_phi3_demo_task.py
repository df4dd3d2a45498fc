from hashlib import sha256

from phi3_plugin.recipes import phi3_demo as task


def prompts(chats):
    return [chat["messages"][0]["content"] for chat in chats]


def test_the_chats_depend_on_the_seed_alone():
    """And on no version of Python: what the demo learns is known for these."""
    train, heldout = task.make_chats()
    digest = sha256(task.to_jsonl([*train, *heldout]).encode()).hexdigest()
    assert digest == "6d534059cdc55a54d8855b5fde209666494436c394ec47d20c8b731d94f5c646"
    assert task.make_chats(seed=1) == task.make_chats(seed=1) != (train, heldout)


def test_held_out_questions_are_many_and_unseen():
    train, heldout = task.make_chats()
    assert len(set(prompts(heldout))) == len(heldout) >= 100
    assert len(set(prompts(train))) == len(train)
    assert not set(prompts(train)) & set(prompts(heldout))


def test_chat_reverses():
    question, answer = task.chat("kfaqz")["messages"]
    assert question == {"role": "user", "content": "Reverse: k f a q z"}
    assert answer == {"role": "assistant", "content": "z q a f k"}


def test_questions_come_with_their_answers(tmp_path):
    file = tmp_path / "heldout.jsonl"
    file.write_text(task.to_jsonl(task.make_chats()[1]))
    questions, answers = task.read_questions(file)
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
