"""The models that a container serves: where they lie, whether they are whole, and the guide's names for them.

They lie in the image, under $BENTO_PATH/models, or else in a volume, under $BENTOML_HOME/models. Each has a lock,
snapshot.lock.json, with every file's size and sha256.
"""

import hashlib
import json
import os
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

LOCK = "snapshot.lock.json"
READERS = 8  # files at a time, for their sha256


class NotWholeError(Exception):
    """A model or a file of one is missing or damaged. The message names it and says what to do."""


@dataclass(frozen=True)
class Embedded:
    """A model of a store, in the version that is served."""

    published: str
    """The name of its repository on the hub, such as Wan2.1-I2V-14B-480P. The store's is the same in lower case."""
    path: Path


def published_names() -> list[str]:
    """Of the models that the service needs."""
    snapshots = tomllib.loads((Path(__file__).parents[1] / "models" / "snapshots.toml").read_text())
    return [entry["repository"].rpartition("/")[2] for entry in snapshots["snapshot"]]


def find() -> list[Embedded]:
    """The models as BentoML finds them: the image's own if it has any, else those of the volume.

    Raises NotWholeError where one is not there in the version that the image was built with.
    """
    bento = Path(os.environ["BENTO_PATH"])
    services = yaml.safe_load((bento / "bento.yaml").read_text())["services"]
    versions = dict(model["tag"].split(":") for service in services for model in service["models"])
    inside, volume = bento / "models", Path(os.environ["BENTOML_HOME"]) / "models"
    store = inside if any(inside.glob("*/latest")) else volume
    models = []
    for published in published_names():
        name = published.lower()
        latest = store / name / "latest"
        if not latest.is_file():
            raise NotWholeError(
                f"{published} is neither in this image ({inside}) nor in {volume}. Run the image that "
                f"scripts/push_image.py has made, or mount a model store: -v ~/bentoml/models:{volume}:ro."
            )
        if (version := latest.read_text().strip()) != versions[name]:
            raise NotWholeError(
                f"{latest} says {version}, and the image was built with {name}:{versions[name]}. "
                "Import that version, or build the image again."
            )
        models.append(Embedded(published, store / name / version))
    return models


def verify(models: Sequence[Embedded], contents: bool) -> tuple[int, int]:
    """Every file against its lock: its size, and with `contents` its sha256. Returns the number of files and of bytes.

    Raises NotWholeError, which names the files that are missing or differ.
    """
    files = [(model.path / path, entry) for model in models for path, entry in _locked(model).items()]
    with ThreadPoolExecutor(READERS) as pool:
        faults = [fault for fault in pool.map(partial(_fault, contents=contents), files) if fault]
    if faults:
        remedy = "Pull the image again; a mounted store is mended with models/import_models.py --repair."
        raise NotWholeError("\n".join([*faults, remedy]))
    return len(files), sum(entry["size"] for _, entry in files)


def link(models: Sequence[Embedded]) -> None:
    """Make the models reachable under the guide's names. Those of the image are already."""
    for model in models:
        name = Path(os.environ["MODEL_STORAGE_PATH"]) / model.published
        if name.readlink() != model.path:
            name.unlink()
            name.symlink_to(model.path)


def _locked(model: Embedded) -> dict[str, Any]:
    try:
        files: dict[str, Any] = json.loads((model.path / LOCK).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise NotWholeError(f"{model.path / LOCK} cannot be read ({error}). Pull the image again.") from error
    return files


def _fault(file: tuple[Path, dict[str, Any]], contents: bool) -> str:
    """What is wrong with a file, "" if nothing is."""
    path, entry = file
    if not path.is_file():
        return f"{path} is missing."
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read by uid {os.getuid()}: chmod -R a+rX the mounted store."
    if (size := path.stat().st_size) != entry["size"]:
        return f"{path} has {size} bytes instead of {entry['size']}."
    if contents:
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != entry["sha256"]:
                return f"{path} is damaged: its sha256 is not the one in {LOCK}."
    return ""
