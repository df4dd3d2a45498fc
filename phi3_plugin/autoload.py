"""Puts our names into torchtune's registry when, and only when, torchtune is imported."""


def install() -> None:
    """Do nothing yet."""
