"""Text from a model: how a token is chosen, when an answer ends, and many answers at once."""
