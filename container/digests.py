"""What a push remembers, in BENTOML_HOME/push/digests.json: so that an unchanged image is pushed without reading it.

Digests stand under fingerprints of the files that they were made of: path, size, time of change and inode. Losing the
file costs reading everything once more, and nothing else.
"""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from container.layers import store_home


class Digests:
    """May be used by several threads and processes."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or store_home() / "push" / "digests.json"
        self._lock = threading.Lock()

    def layer(self, fingerprint: str) -> str | None:
        """The digest of a layer."""
        return self._read()["layers"].get(fingerprint)

    def code(self, fingerprint: str) -> dict[str, Any] | None:
        """A code image that has been examined."""
        return self._read()["code"].get(fingerprint)

    def upload(self, name: str) -> str:
        """Where an upload that was interrupted goes to."""
        return str(self._read()["uploads"].get(name, ""))

    def set_layer(self, fingerprint: str, digest: str) -> None:
        with self._changed() as state:
            state["layers"][fingerprint] = digest

    def set_code(self, fingerprint: str, code: dict[str, Any]) -> None:
        with self._changed() as state:
            state["code"][fingerprint] = code

    def set_upload(self, name: str, location: str) -> None:
        """An empty location when it has ended."""
        with self._changed() as state:
            state["uploads"].pop(name, None)
            if location:
                state["uploads"][name] = location

    def _read(self) -> dict[str, Any]:
        try:
            state = json.loads(self._path.read_text())
            return {part: dict(state[part]) for part in ("layers", "code", "uploads")}
        except (OSError, ValueError, KeyError, TypeError):
            return {"layers": {}, "code": {}, "uploads": {}}

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                state = self._read()
                yield state
                part = self._path.with_name(f"{self._path.name}.part")
                part.touch(mode=0o600)  # an upload's location is for us alone
                part.write_text(json.dumps(state))
                part.replace(self._path)
            finally:
                os.close(folder)
