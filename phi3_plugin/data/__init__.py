"""Chats, answers and texts, as the tokens and labels that Hugging Face would make of them."""

from phi3_plugin.data.dataset import ChatDataset, chat_dataset
from phi3_plugin.data.preferences import preference_dataset
from phi3_plugin.data.text import text_dataset
from phi3_plugin.data.tokenizer import Phi3Tokenizer, phi3_tokenizer

__all__ = [
    "ChatDataset",
    "Phi3Tokenizer",
    "chat_dataset",
    "phi3_tokenizer",
    "preference_dataset",
    "text_dataset",
]
