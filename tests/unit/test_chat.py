"""What the model is asked in a conversation, its commands, and what ends no conversation."""

import json
import resource
from pathlib import Path

import pytest
import torch

from phi3_plugin.chat import ChatSession
from phi3_plugin.data import chat_dataset, phi3_tokenizer
from phi3_plugin.generate import Answer
from phi3_plugin.options import Sampling
from tests.answers import without_system
from tests.variants import FORGETS, phi4


def spoken(chat):
    """Return a conversation as pairs."""
    return [(turn.role, turn.content) for turn in chat.turns]


class Parrot:
    """Stands in for a generator: says what it is told to, and remembers what it was asked."""

    def __init__(self, *says, temperature=0.0, max_new_tokens=8):
        self.says, self.asked = list(says), []
        self.sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)

    def answer(self, prompt, on_text=None):
        self.asked.append(list(prompt))
        said = self.says.pop(0)
        if isinstance(said, BaseException):
            on_text("half")
            raise said
        on_text(said)
        return Answer(0, said, (1,), "stop", len(prompt))


@pytest.fixture
def chat_with(inputs, capsys):
    """Return a conversation with a parrot."""
    tokenizer = phi3_tokenizer(inputs / "base", dropped="warn")

    def make(*says, positions=512, system=None, **sampling):
        chat = ChatSession(Parrot(*says, **sampling), tokenizer, positions, system)
        chat.asked = lambda: [tokenizer.decode(ids, False) for ids in chat.generator.asked]
        return chat

    return make


def test_the_model_hears_all_that_was_said(chat_with, capsys):
    chat = chat_with("one", "two", system="three")
    assert chat.take("  one plus ") and chat.take(" /two\nlines")
    first, second = chat.asked()
    assert "three" in first and second.startswith(first)
    assert spoken(chat) == [
        ("user", "one plus"),
        ("assistant", "one"),
        ("user", "/two\nlines"),
        ("assistant", "two"),
    ]
    assert capsys.readouterr().out == "one\ntwo\n"


def test_thoughts_stay_in_the_conversation_and_may_be_hidden(chat_with, capsys):
    said = "<think>\ntwo\n</think>\n\nthree"
    chat = chat_with(said, said)
    chat.take("one")
    chat.hide_thoughts = True
    chat.take("four")
    assert spoken(chat)[1::2] == [("assistant", said)] * 2 and said in chat.asked()[1]
    assert capsys.readouterr().out == f"{said}\nthree\n"


def test_thoughts_go_where_the_template_takes_them(tmp_path, capsys):
    tokenizer = phi3_tokenizer(phi4(tmp_path / "base", chat_template=FORGETS), dropped="warn")
    chat = ChatSession(Parrot("<think>\ntwo\n</think>\n\nthree", "five"), tokenizer, 512, None)
    chat.take("one")
    chat.take("four")
    assert spoken(chat)[1] == ("assistant", "three") and chat.turns[1].thought == "two"
    assert "two" not in tokenizer.decode(chat.generator.asked[1], False)
    chat.take(f"/save {tmp_path / 'saved.jsonl'}")
    row = json.loads((tmp_path / "saved.jsonl").read_text())
    assert row["messages"][1]["reasoning_content"] == "two"


def test_reset_and_system(chat_with, capsys):
    chat = chat_with("one", "two", "three")
    for text in ("four", "/system five", "six", "/system", "/reset", "seven"):
        assert chat.take(text)
    first, second, third = chat.asked()
    assert "five" not in first and "five" in second and "six" in second and "four" in second
    assert "five" not in third and "four" not in third and "seven" in third
    assert "The system message is removed" in capsys.readouterr().err


def test_retry_is_another_answer_or_said_to_be_the_same(chat_with, capsys):
    chat = chat_with("one", "two", temperature=0.5)
    chat.take("/retry")
    assert "There is no answer yet." in capsys.readouterr().err
    chat.take("four")
    chat.take("/retry")
    assert spoken(chat) == [("user", "four"), ("assistant", "two")]
    assert chat.generator.asked[0] == chat.generator.asked[1]
    greedy = chat_with("one")
    greedy.take("four")
    greedy.take("/retry")
    assert "the answer would be the same" in capsys.readouterr().err
    assert spoken(greedy) == [("user", "four"), ("assistant", "one")]


def test_an_interrupt_keeps_what_was_said(chat_with, capsys):
    chat = chat_with(KeyboardInterrupt(), "whole", "next")
    assert chat.take("four")
    assert spoken(chat) == [("user", "four"), ("assistant", "half")]
    chat.take("/retry")  # of an answer that is not whole, also at temperature 0
    assert spoken(chat) == [("user", "four"), ("assistant", "whole")]
    chat.take("five")
    assert "whole" in chat.asked()[-1]


def test_a_message_without_an_answer_is_taken_back(chat_with, capsys):
    chat = chat_with("", "one", "", temperature=0.5)
    chat.take("four")
    assert spoken(chat) == [] and "taken back" in capsys.readouterr().err
    chat.take("five")
    chat.take("/retry")
    assert spoken(chat) == [("user", "five"), ("assistant", "one")]
    chat.take("half a \udce9 letter")
    assert "half a surrogate pair" in capsys.readouterr().err and len(chat.turns) == 2


def test_memory_that_runs_out_ends_no_conversation(chat_with, capsys):
    chat = chat_with(torch.OutOfMemoryError("CUDA"))
    assert chat.take("four") and spoken(chat) == []
    assert "no memory left" in capsys.readouterr().err


def test_the_oldest_is_left_out_where_there_is_no_room(chat_with, capsys):
    chat = chat_with(*["one two three"] * 9, positions=60, system="seven")
    for number in range(9):
        chat.take(f"{number} plus one")
    assert all(len(ids) + 8 <= 60 for ids in chat.generator.asked)
    last = chat.asked()[-1]
    assert "seven" in last and "8 plus one" in last and "0 plus one" not in last
    assert "(The model sees 60 tokens: your first 1 no longer.)" in capsys.readouterr().err
    assert len(chat.turns) == 18  # to be saved


def test_a_message_that_is_too_long_is_not_sent(chat_with, capsys):
    chat = chat_with("one", "two", positions=60)
    chat.take("four")
    chat.take("one " * 80)
    assert "Not sent: " in (error := capsys.readouterr().err) and "60 positions" in error
    assert spoken(chat) == [("user", "four"), ("assistant", "one")]
    chat.take("five")
    assert "four" in chat.asked()[-1]


def test_save_adds_a_row_that_the_trainer_reads(chat_with, tmp_path, monkeypatch, capsys, inputs):
    monkeypatch.chdir(tmp_path)
    chat = chat_with("one", system="three")
    Path("chats.jsonl").write_text('{"messages": []}')  # its last line has no end
    chat.take("/save chats.jsonl")
    assert "nothing to save" in capsys.readouterr().err
    chat.take("four")
    for name in ("chats.txt", "", "no/chats.jsonl", "chats.jsonl", "new.jsonl"):
        chat.take(f"/save {name}")
    error = capsys.readouterr().err
    assert "no/chats.jsonl cannot be written: No such file or directory" in error
    assert error.count("ends in .jsonl") == 2 and error.count("Added a conversation of 3") == 2
    first, second = map(json.loads, Path("chats.jsonl").read_text().splitlines())
    assert first == {"messages": []} and second["messages"][0]["role"] == "system"
    assert len(chat_dataset(phi3_tokenizer(inputs / "base"), "new.jsonl")) == 1


def test_save_on_a_full_disk_leaves_no_half_line(chat_with, tmp_path, monkeypatch, capsys):
    file = tmp_path / "chats.jsonl"
    file.write_text("{}\n")
    chat = chat_with("one")
    chat.take("two")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        chat.take(f"/save {file}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "chats.jsonl cannot be written: File too large" in capsys.readouterr().err
    assert file.read_text() == "{}\n"


def test_unknown_commands_are_told(chat_with, capsys):
    chat = chat_with()
    for text in ("/rest", "/etc/passwd says", "/help"):
        assert chat.take(text)
    error = capsys.readouterr().err
    assert "There is no /rest. Did you mean /reset?" in error and "no /etc/passwd." in error
    assert "/save FILE" in error
    assert not chat.take("/exit") and not chat.take("/quit")


def test_a_template_without_system_messages_refuses_them(inputs, tmp_path, capsys):
    tokenizer = phi3_tokenizer(without_system(inputs / "base", tmp_path / "base"), dropped="warn")
    chat = ChatSession(Parrot("one"), tokenizer, 512, None)
    chat.take("/system five")
    assert "leaves system messages out" in capsys.readouterr().err and chat.system is None
