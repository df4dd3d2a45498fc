"""Finds the published tokenizers and configs, which are not part of the repository."""

import os
from pathlib import Path


def assets_dir() -> Path | None:
    """Return the folder, or None where it is absent."""
    folder = Path(os.environ.get("PHI3_ASSETS") or Path(__file__).parents[2] / "shared" / "assets")
    return folder if folder.is_dir() else None
