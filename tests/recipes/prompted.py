"""What tests of phi3_generate share: files of prompts, keys, and a run that is stopped."""

import json
import shutil
from pathlib import Path

from phi3_plugin.recipes import phi3_generate

ROWS = [{"prompt": f"Add: {words}", "id": n} for n, words in enumerate(["one", "two", "one two"])]


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def read(name):
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


def keys(**more):
    return {"checkpoint_dir": "base", "dtype": "fp32", "device": "cpu", "max_new_tokens": 6, **more}


def of_file(**more):
    return keys(prompts="prompts.jsonl", output="out.jsonl", **more)


def stop_after(monkeypatch, count, error=KeyboardInterrupt):
    """Let what writes answers end in the middle; return how to undo that."""
    stock = phi3_generate.Generator.answers

    def answers(self, *given, **more):
        for n, answer in enumerate(stock(self, *given, **more)):
            if n == count:
                raise error
            yield answer

    monkeypatch.setattr(phi3_generate.Generator, "answers", answers)
    return lambda: monkeypatch.setattr(phi3_generate.Generator, "answers", stock)


def said(chat):
    """Return a conversation as pairs."""
    return [(turn.role, turn.content) for turn in chat.said]


def without_system(base, folder):
    """Copy a checkpoint; in the copy, the chat template leaves system messages out."""
    shutil.copytree(base, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    start, end = (settings["chat_template"].index(word) for word in ("{% if m", "{% elif m"))
    template = settings["chat_template"]
    settings["chat_template"] = template[:start] + "{% if m" + template[end + 9 :]
    file.write_text(json.dumps(settings))
    return folder
