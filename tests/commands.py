"""Commands of ours called with their keys, as a YAML or the command line gives them."""

from typing import Any

from phi3_plugin.options import ChatOptions, PromptOptions, read_options


def adapter(keys: dict[str, Any]) -> int:
    """Run the verb of `phi3-tune adapter` that ``verb`` names."""
    from phi3_plugin.recipes import phi3_adapter

    keys = dict(keys)
    kind, _ = phi3_adapter.VERBS[keys.pop("verb")]
    return phi3_adapter.run(read_options(kind, keys, "adapter"))


def generate(keys: dict[str, Any]) -> int:
    """Run `phi3-tune generate`."""
    from phi3_plugin.recipes import phi3_generate

    return phi3_generate.run(read_options(PromptOptions, keys, "generate"))


def chat(keys: dict[str, Any]) -> int:
    """Run `phi3-tune chat`."""
    from phi3_plugin import chat

    return chat.run(read_options(ChatOptions, keys, "chat"))
