"""Write a file so that it is either whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from phi3_plugin.checkpoint.folder import PARTIAL
from phi3_plugin.errors import OutputError


@contextmanager
def whole_files(*finals: Path) -> Iterator[list[Path]]:
    """Give a name beside each file, and rename all into place when the block ends well.

    Args:
        finals: The files to create; the last one is what readers look for.

    Yields:
        Where to write them.

    Raises:
        OutputError: One exists, or writing fails (disk full, no permission).
    """
    # Other than Path.exists, also where a link leads nowhere; and a name may be too long to ask.
    if exists := [final for final in finals if os.path.lexists(final)]:
        raise OutputError(
            f"{exists[0]} exists and would be overwritten. Move it or choose another."
        )
    partials = [final.with_name(f"{PARTIAL}{final.name}") for final in finals]
    try:
        yield partials
        for partial, final in zip(partials, finals, strict=True):
            partial.rename(final)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{finals[-1]} could not be written: {error}.") from error
    finally:
        for partial in partials:
            with suppress(OSError):  # which is told above, such as a name that is too long
                partial.unlink(missing_ok=True)
