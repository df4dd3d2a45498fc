"""The demo's task, reversing five letters: its chats, and the exam on them.

There are almost eight million questions; a model that answers ones it never saw has learned
to reverse, not to remember.
"""

import json
import random
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LETTERS = string.ascii_lowercase
LENGTH = 5
COMMAND = "Reverse:"
TRAIN_CHATS, HELDOUT_CHATS = 2048, 200

Chat = dict[str, Any]


def words() -> list[str]:
    """Return the words that the task is made of, for a tokenizer that knows each as one token."""
    return [COMMAND, *LETTERS]


def chat(letters: str) -> Chat:
    """Return one question with its answer, as a row of a chat file.

    Args:
        letters: The letters to reverse, without spaces.
    """
    question, answer = f"{COMMAND} {' '.join(letters)}", " ".join(reversed(letters))
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def make_chats(seed: int = 0) -> tuple[list[Chat], list[Chat]]:
    """Return the training chats and the held-out chats, which share no question.

    Args:
        seed: Seed of the choice.
    """
    rng = random.Random(seed)
    # A dict keeps the order of the draws and drops repetitions.
    chosen: dict[str, None] = {}
    while len(chosen) < TRAIN_CHATS + HELDOUT_CHATS:
        chosen["".join(rng.sample(LETTERS, LENGTH))] = None
    chats = [chat(letters) for letters in chosen]
    return chats[HELDOUT_CHATS:], chats[:HELDOUT_CHATS]


def to_jsonl(chats: Iterable[Chat]) -> str:
    """Return chats as the text of a file, one on a line."""
    return "".join(json.dumps(chat) + "\n" for chat in chats)


def read_questions(file: Path) -> tuple[list[str], list[str]]:
    """Return the questions of a chat file and the answers expected to them.

    Args:
        file: Chats of one question and one answer each.
    """
    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [question["content"] for question, _ in rows], [answer["content"] for _, answer in rows]


def ask(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Return the model's greedy answers, generated as one left-padded batch.

    Args:
        model: As transformers or PEFT loads it.
        tokenizer: As transformers loads it; Phi-3's pads on the left.
        questions: One user turn each.
    """
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**batch, do_sample=False, max_new_tokens=2 * LENGTH)
    answers = output[:, batch["input_ids"].shape[1] :]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def score(answers: list[str], expected: list[str]) -> float:
    """Return the share of answers that are right to the letter."""
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(expected)


def show_answers(questions: list[str], before: list[str], after: list[str], rows: int = 5) -> None:
    """Print the first questions with the answers of both models, side by side."""
    print(f"  {'question':<22}{'before':<26}after")
    for row in list(zip(questions, before, after, strict=True))[:rows]:
        # An untrained model says anything, half letters and control characters too.
        question, *answers = ("".join(c if " " <= c <= "~" else "?" for c in t) for t in row)
        print(f"  {question:<22}{answers[0][:23]:<26}{answers[1][:23]}")
