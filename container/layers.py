"""The models of the store as image layers: uncompressed tar files that are never written to a disk.

    layers = plan(read_store())
    for layer in layers:
        content = LayerContent(layer)   # its bytes, from any position on

Which file lies in which layer, and every byte of a layer, follows from the locks and the files alone: the same models
give the same digests on every machine, and a registry that has a layer does not get it again. Weights do not
compress, so nothing is. Files keep their place in the store, under /home/bentoml/bento/models.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from container.content import Content, file_blocks, sha256_of
from container.errors import ImageError

STORE = "home/bentoml/bento/models"
OWNER = 1034  # BentoML's user in the image, and its group

LARGE = 2 * 10**9  # bytes; a file of this size has a layer of its own: it is sent again only when it changes itself
FULL = 8 * 10**9  # bytes that smaller files fill a layer with: a layer that fails is sent again

LOCK, MODEL_YAML, LATEST = "snapshot.lock.json", "model.yaml", "latest"
NEEDED = ("wan2.1-i2v-14b-480p", "chinese-wav2vec2-base", "infinitetalk")
TAR_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class StoredModel:
    """A model of the store with its lock."""

    folder: Path
    lock: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.lock["name"])

    @property
    def version(self) -> str:
        return str(self.lock["version"])

    @property
    def path(self) -> str:
        """Its folder in the image."""
        return f"{STORE}/{self.name}/{self.version}"


@dataclass(frozen=True)
class Entry:
    """A file of a layer, or a directory: the one without content, whose path ends in a slash."""

    path: str
    size: int = 0
    source: Path | bytes | None = None
    sha256: str = ""  # of the content

    @cached_property
    def header(self) -> bytes:
        info = tarfile.TarInfo(self.path.rstrip("/"))
        info.type = tarfile.DIRTYPE if self.source is None else tarfile.REGTYPE
        info.mode = 0o755 if self.source is None else 0o644
        info.size, info.mtime = self.size, 0
        info.uid = info.gid = 0 if self.path == "home/" else OWNER  # the base image's
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


@dataclass(frozen=True)
class Layer:
    """`name` is for people; `key` stands for what is in it, wherever its files lie."""

    name: str
    entries: tuple[Entry, ...]

    @cached_property
    def size(self) -> int:
        """Of the tar file, in bytes."""
        return sum(len(entry.header) + entry.size + -entry.size % TAR_BLOCK for entry in self.entries) + 2 * TAR_BLOCK

    @cached_property
    def key(self) -> str:
        return digest_of_json([[entry.path, entry.size, entry.sha256] for entry in self.entries])

    @property
    def files(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.source is not None]


def store_home() -> Path:
    return Path(os.environ.get("BENTOML_HOME") or "~/bentoml").expanduser()


def read_store(home: Path | None = None) -> list[StoredModel]:
    """What is imported: the latest version of each model that has a lock, LoRAs too. Sizes are as the locks say."""
    store = (home or store_home()) / "models"
    models = []
    for latest in sorted(store.glob(f"*/{LATEST}")):
        folder = latest.parent / latest.read_text().strip()
        if (folder / LOCK).is_file():
            models.append(read_model(folder))
    for name in NEEDED:
        if name not in [model.name for model in models]:
            raise ImageError(f"{store} has no {name}: python models/import_models.py --only {name}")
    return models


def read_model(folder: Path) -> StoredModel:
    repair = "python models/import_models.py --repair"
    try:
        lock = json.loads((folder / LOCK).read_text())
        files = {str(path): int(entry["size"]) for path, entry in lock["files"].items()}
        model = StoredModel(folder, lock)
        if (model.name, model.version) != (folder.parent.name, folder.name):
            raise ValueError(f"it is of {model.name}:{model.version}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(f"{folder / LOCK} cannot be used ({error}): {repair}") from error
    for path, size in files.items():
        file = folder / path
        if not file.is_file():
            raise ImageError(f"{file} is missing: {repair}")
        if file.stat().st_size != size:
            raise ImageError(f"{file} has {file.stat().st_size} bytes, and its lock says {size}: {repair}")
    return model


def plan(models: Iterable[StoredModel]) -> list[Layer]:
    """The layers, bottom first. No layer has files of two models, but for the last: what registers them all."""
    models = sorted(models, key=lambda model: model.name)
    layers = [layer for model in models for layer in plan_model(model)]
    registration = [entry for model in models for entry in registered(model)]
    return [*layers, Layer("registration", with_directories(registration))]


def plan_model(model: StoredModel) -> Iterator[Layer]:
    files = [
        Entry(f"{model.path}/{path}", entry["size"], model.folder / path, entry["sha256"])
        for path, entry in sorted(model.lock["files"].items())
    ]
    groups = [[file] for file in files if file.size >= LARGE]
    room = -1  # not even for an empty file
    for file in (file for file in files if file.size < LARGE):
        if file.size > room:
            groups.append([])
            room = FULL
        groups[-1].append(file)
        room -= file.size
    for group in groups:
        first = group[0].path.removeprefix(f"{model.path}/")
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        yield Layer(f"{model.name}/{first}{more}", with_directories(group))


def registered(model: StoredModel) -> Iterator[Entry]:
    """What BentoML and the server's start read beside the files, without what differs from one import to the next."""
    lock = json.dumps(model.lock, indent=2, sort_keys=True) + "\n"
    text = (model.folder / MODEL_YAML).read_text()
    text = re.sub(r"(?m)^creation_time:.*$", "creation_time: 1970-01-01T00:00:00+00:00", text)
    text = re.sub(r"(?m)^(  python_version|  bentoml_version):.*$", r'\1: ""', text)
    for path, content in (
        (f"{STORE}/{model.name}/{LATEST}", model.version),
        (f"{model.path}/{LOCK}", lock),
        (f"{model.path}/{MODEL_YAML}", text),
    ):
        yield Entry(path, len(content.encode()), content.encode(), hashlib.sha256(content.encode()).hexdigest())


def with_directories(files: Sequence[Entry]) -> tuple[Entry, ...]:
    """The files in order of their paths, each after the directories above it."""
    entries: dict[str, Entry] = {}
    for file in sorted(files, key=lambda file: file.path):
        for parent in reversed(PurePosixPath(file.path).parents[:-1]):
            entries.setdefault(f"{parent}/", Entry(f"{parent}/"))
        entries[file.path] = file
    return tuple(entries.values())


class LayerContent(Content):
    """A layer's bytes. The first time through, each file is compared with its lock."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.size)
        self._layer = layer
        self._entry_sha256, self._checked = hashlib.sha256(), 0

    def __str__(self) -> str:
        return self._layer.name

    def _read(self, start: int, end: int) -> Iterator[memoryview]:
        position = 0
        for piece, size in self._pieces():
            first, last = max(start - position, 0), min(end - position, size)
            if first < last and isinstance(piece, Entry):
                yield from self._file(piece, position, first, last)
            elif first < last:
                yield memoryview(piece)[first:last]  # type: ignore[arg-type]
            position += size

    def _pieces(self) -> Iterator[tuple[Entry | bytes, int]]:
        """What a tar file is put together from, and the size of each."""
        for entry in self._layer.entries:
            yield entry.header, len(entry.header)
            yield entry, entry.size
            yield ZEROS, -entry.size % TAR_BLOCK
        yield ZEROS, len(ZEROS)

    def _file(self, entry: Entry, start: int, first: int, last: int) -> Iterator[memoryview]:
        """A file's bytes from `first` to `last`; `start` is the file's position in the layer."""
        if isinstance(entry.source, Path):
            blocks = file_blocks(entry.source, first, last)
        else:
            blocks = iter([memoryview(entry.source or b"")[first:last]])
        position = start + first
        for block in blocks:
            end = position + len(block)
            if end > self._checked:
                if self._checked <= start:  # its first bytes
                    self._entry_sha256 = hashlib.sha256()
                self._entry_sha256.update(block[max(self._checked - position, 0) :])
                self._checked = end
                if end == start + entry.size and self._entry_sha256.hexdigest() != entry.sha256:
                    raise ImageError(
                        f"{entry.source!s} is damaged, its content is not what its lock says: "
                        "python models/import_models.py --repair"
                    )
            yield block
            position = end


ZEROS = bytes(2 * TAR_BLOCK)


def digest_of_json(value: Any) -> str:
    return sha256_of(json.dumps(value).encode())


def fingerprint(layer: Layer) -> str:
    """Of the files on this disk: as long as it is the same, nothing has to be read to know the layer's digest."""
    states = []
    for entry in layer.files:
        if isinstance(entry.source, Path):
            state = entry.source.stat()
            states.append([str(entry.source), state.st_size, state.st_mtime_ns, state.st_ino])
    return digest_of_json([layer.key, states])
