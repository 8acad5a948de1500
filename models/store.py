"""A model in the Bento model store: its files, its lock, and how it gets there in one step.

BENTOML_HOME/models/NAME/VERSION/      the snapshot's files, model.yaml for BentoML, snapshot.lock.json
BENTOML_HOME/models/NAME/latest        the version imported last
BENTOML_HOME/import/NAME-VERSION/      the same while it is put together; BentoML does not look here
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOCK = "snapshot.lock.json"
MODEL_YAML = "model.yaml"
PART = ".part"  # what a file's name ends in until the file is whole and verified

READ_BYTES = 4 * 2**20  # at a time
FICLONE = 0x40049409  # ioctl: share another file's blocks until one of the two is written to

Advance = Callable[[int], object]
"""Called with the number of bytes that are done; raises where the work is to stop."""


class ImportRefusedError(Exception):
    """Nothing can be imported as asked. The message is one line and says what to do."""


@dataclass(frozen=True)
class File:
    """`digest`: the sha256, 64 digits; or 40 digits of git's sha1, all that the hub tells about small files."""

    path: str
    size: int  # bytes
    digest: str
    xet: str | None = None  # the hub's name for it in xet storage


@dataclass(frozen=True)
class Model:
    """A snapshot at one commit, or with one content, and those of its files that are wanted. Also what a lock holds."""

    name: str
    version: str
    repository: str
    revision: str | None  # None for a folder, like the commit
    commit: str | None
    profile: str
    files: tuple[File, ...]
    source: Path | None = None  # the folder that it comes from; None for the hub

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"

    @property
    def registered(self) -> Path:
        return home() / "models" / self.name / self.version

    @property
    def staging(self) -> Path:
        return home() / "import" / f"{self.name}-{self.version}"


def home() -> Path:
    return Path(os.environ.get("BENTOML_HOME") or "~/bentoml").expanduser()


@contextmanager
def the_only_import() -> Iterator[None]:
    """Raises ImportRefusedError where another import is running, or where a model cannot be renamed into the store."""
    staging, store = home() / "import", home() / "models"
    for folder in (staging, store):
        folder.mkdir(parents=True, exist_ok=True)
    if staging.stat().st_dev != store.stat().st_dev:
        raise ImportRefusedError(f"{store} is a filesystem of its own: mount {home()} there instead.")
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ImportRefusedError(f"Another import into {home()} is running: wait for it to end.") from error
    finally:
        os.close(descriptor)


# Contents.


def new_digest(file: File) -> Any:
    """A hash object of the kind of the file's digest."""
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def digest_of(path: Path, digest: Any, advance: Advance) -> str:
    with path.open("rb") as content:
        while chunk := content.read(READ_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return str(digest.hexdigest())


def sha256(path: Path, advance: Advance = lambda _: None) -> str:
    return digest_of(path, hashlib.sha256(), advance)


def fault(folder: Path, file: File, advance: Advance) -> str:
    """What is wrong with a file, "" if nothing is. The size tells first; only then is the content read."""
    path = folder / file.path
    if not path.is_file():
        return "missing"
    if path.stat().st_size != file.size:
        return f"{path.stat().st_size} bytes instead of {file.size}"
    return "" if digest_of(path, new_digest(file), advance) == file.digest else "wrong checksum"


def place(source: Path, target: Path) -> str:
    """Hard link, reflink or copy, the first that the filesystems allow; says which."""
    target.unlink(missing_ok=True)
    source = source.resolve()  # of a symbolic link, as in the hub's own cache, the file itself
    try:
        os.link(source, target)
        return "hard links"
    except OSError:
        pass
    with source.open("rb") as original, target.open("wb") as copy:
        try:
            fcntl.ioctl(copy, FICLONE, original.fileno())
            return "reflinks"
        except OSError:
            shutil.copyfileobj(original, copy, READ_BYTES)
            sync(copy)
    return "copies"


def sync(content: Any) -> None:
    content.flush()
    os.fsync(content.fileno())


def replace_text(path: Path, text: str) -> None:
    """All at once, and never into a file that is linked elsewhere."""
    part = path.with_name(path.name + PART)
    part.write_text(text)
    part.replace(path)


# The lock and BentoML's own file.


def write_lock(folder: Path, model: Model) -> None:
    lock = {
        "name": model.name,
        "version": model.version,
        "repository": model.repository,
        "revision": model.revision,
        "commit": model.commit,
        "profile": model.profile,
        "files": {file.path: {"size": file.size, "sha256": file.digest} for file in model.files},
    }
    replace_text(folder / LOCK, json.dumps(lock, indent=2) + "\n")


def read_lock(folder: Path) -> Model | None:
    """None where there is no lock, or none that can be read."""
    try:
        lock = json.loads((folder / LOCK).read_text())
        files = tuple(File(path, entry["size"], entry["sha256"]) for path, entry in lock.pop("files").items())
        return Model(**lock, files=files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_model_yaml(folder: Path, model: Model) -> None:
    """What BentoML wants to know. The strings are quoted, because a version may look like a number."""
    metadata = {"repository": model.repository, "commit": model.commit or "", "profile": model.profile}
    replace_text(
        folder / MODEL_YAML,
        f"""\
name: {json.dumps(model.name)}
version: {json.dumps(model.version)}
module: ""
labels: {{}}
options: {{}}
metadata: {json.dumps(metadata)}
context:
  framework_name: ""
  framework_versions: {{}}
  bentoml_version: {json.dumps(importlib.metadata.version("bentoml"))}
  python_version: {json.dumps(platform.python_version())}
signatures: {{}}
api_version: v1
creation_time: {datetime.now(UTC).isoformat()}
""",
    )


# Into the store.


def begin(model: Model) -> None:
    """Make the staging folder, with a lock that says what it is going to be."""
    model.staging.mkdir(parents=True, exist_ok=True)
    write_lock(model.staging, replace(model, files=()))


def register(model: Model) -> None:
    """The staging folder becomes the model; of a model that is in the store, its files replace and complete those."""
    staged = model.staging
    if staged.is_dir():
        remove_unwanted(model)
        write_model_yaml(staged, model)
        write_lock(staged, replace(model, files=tuple(with_sha256(model, file) for file in model.files)))
        if not model.registered.is_dir():
            model.registered.parent.mkdir(exist_ok=True)
            staged.rename(model.registered)
        else:
            files = [path for path in staged.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == LOCK):  # the lock last
                target = model.registered / path.relative_to(staged)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
            shutil.rmtree(staged)
    replace_text(model.registered.parent / "latest", model.version)
    for leftover in (home() / "import").glob(f"{model.name}-*"):  # an interrupted import of another version
        shutil.rmtree(leftover)


def remove_unwanted(model: Model) -> None:
    """What an interrupted import of another profile has left in the staging folder."""
    wanted = {file.path for file in model.files}
    for path in sorted(model.staging.rglob("*"), reverse=True):  # a folder comes after what is in it
        if path.is_file() and str(path.relative_to(model.staging)) not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def with_sha256(model: Model, file: File) -> File:
    staged = model.staging / file.path
    path = staged if staged.is_file() else model.registered / file.path
    return file if len(file.digest) == 64 else replace(file, digest=sha256(path))
