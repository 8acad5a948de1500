"""Secrets that the service makes for itself at its first start, each in a file that only its owner may read."""

import contextlib
import os
import tempfile
from pathlib import Path


def kept_secret(file: Path, proposed: str) -> str:
    """The secret in the file; `proposed`, if there is no file yet. Several processes agree on one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        descriptor, draft = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mode 0600
        with os.fdopen(descriptor, "w") as written:
            written.write(proposed + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)
        Path(draft).unlink()
    return file.read_text().strip()
