"""A model store of a few small files, for the tests of what is made from it."""

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from container.layers import NEEDED
from models import store

Files = Mapping[str, bytes]


def small_models(size: int = 100_000) -> dict[str, Files]:
    """The three models, each of two files of about `size` bytes and a short one. The same bytes each time."""
    chance = random.Random(0)  # noqa: S311 - no secret
    return {
        name: {
            "config.json": b'{"dim": 5120}\n',
            "model-00001-of-00002.safetensors": chance.randbytes(size + 1),
            "weights/model-00002-of-00002.safetensors": chance.randbytes(size),
        }
        for name in NEEDED
    }


def write_store(home: Path, models: Mapping[str, Files], patch: pytest.MonkeyPatch) -> None:
    """Put the models into the store under `home`, which becomes BENTOML_HOME."""
    patch.setenv("BENTOML_HOME", str(home))
    (home / "models").mkdir(parents=True)
    for name, files in models.items():
        listed = tuple(
            store.File(path, len(content), hashlib.sha256(content).hexdigest()) for path, content in files.items()
        )
        model = store.Model(name, "0123456789ab", f"owner/{name}", "main", "0123456789ab" + 28 * "c", "full", listed)
        store.begin(model)
        for path, content in files.items():
            file = model.staging / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        store.register(model)
