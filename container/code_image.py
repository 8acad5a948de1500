"""The image without models, as it comes: from podman or docker, from an OCI layout or from a docker archive.

    source = open_source("localhost/avatar-api:latest")     # or oci:DIR, docker-archive:FILE
    code = examine(source, protected, own)                  # read once: digests, and nothing in it that must not be
    for blob, content in wanted(source, code.layers): ...   # and again, to send, where it is large

An engine's image comes through a pipe, `podman save` or `docker save`. podman writes each layer into a file in TMPDIR
(/var/tmp) before it sends it, one after the other: the scratch disk of a push is its largest layer of code. Docker's
daemon writes all of it into its own folder first.
"""

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from container.content import BytesContent, Content, FileContent, StreamContent
from container.errors import ImageError
from container.layers import digest_of_json
from container.scan import LayerScan, check_config

TAR = "application/vnd.oci.image.layer.v1.tar"
SMALL = 2**24  # bytes; what is smaller in an archive, its description and layers of code, is kept in memory


@dataclass(frozen=True)
class Blob:
    """A layer. `name` is where it lies in its source."""

    name: str
    digest: str
    size: int
    media_type: str


@dataclass(frozen=True)
class CodeImage:
    config: dict[str, Any]
    layers: tuple[Blob, ...]

    def to_json(self) -> dict[str, Any]:
        return {"config": self.config, "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CodeImage":
        return cls(value["config"], tuple(Blob(**layer) for layer in value["layers"]))


class Source(Protocol):
    """Where a code image comes from."""

    @property
    def kept(self) -> Mapping[str, bytes]:
        """By its name, what was read and need not be read again."""

    def fingerprint(self) -> str:
        """As long as it is the same, the image is."""

    def contents(self) -> Iterator[tuple[str, Content]]:
        """What may be a layer, and its name, as it comes. Each has to be read before the next is asked for."""

    def description(self) -> tuple[dict[str, Any], list[str]]:
        """The configuration, and the names of the layers, bottom first: known when all contents have been read."""


def open_source(text: str) -> Source:
    kind, colon, rest = text.partition(":")
    if colon and kind == "oci":
        return LayoutSource(Path(rest))
    if colon and kind == "docker-archive":
        return ArchiveSource(Path(rest))
    return EngineSource(text)


def examine(source: Source, protected: Mapping[str, bool], own: Mapping[str, bytes]) -> CodeImage:
    """Read the image once. Raises ImageError for what must not be pushed."""
    problems: list[str] = []
    found: dict[str, Blob] = {}
    for name, content in source.contents():
        scan, start = LayerScan(protected, own), b""
        for block in content.all_blocks():
            start = start or bytes(block[:4])
            if not is_json(start):
                scan.feed(block)
        found[name] = Blob(name, content.digest, content.size, media_type(start))
        problems += scan.problems
    config, names = source.description()
    problems += check_config(config, own)
    platform = f"{config.get('os')}/{config.get('architecture')}"
    if platform != "linux/amd64":
        problems.append(f"it is for {platform}: build it on x86_64, for linux/amd64")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ImageError(f"The code image cannot be pushed: {'; '.join(problems[:5])}{more}.")
    return CodeImage(config, tuple(found[name] for name in names))


def media_type(start: bytes) -> str:
    return f"{TAR}+gzip" if start.startswith(b"\x1f\x8b") else TAR


def is_json(start: bytes) -> bool:
    return start.lstrip()[:1] in (b"{", b"[")


class LayoutSource:
    """A folder in the OCI layout: oci:DIR."""

    kept: Mapping[str, bytes] = {}

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            manifest = self._json(folder / "index.json")
            for _ in range(3):  # an index may hold an index
                if "manifests" not in manifest:
                    break
                chosen = [
                    entry
                    for entry in manifest["manifests"]
                    if entry.get("platform", {}).get("architecture", "amd64") == "amd64"
                ]
                if len(chosen) != 1:
                    raise ImageError(f"oci:{folder} holds {len(chosen)} images for amd64, and one is needed.")
                manifest = self._json(self._blob(chosen[0]["digest"]))
            self._manifest = manifest
            self._config = self._json(self._blob(manifest["config"]["digest"]))
        except (OSError, ValueError, KeyError) as error:
            raise ImageError(f"oci:{folder} is no image in the OCI layout: {error}") from error

    def fingerprint(self) -> str:
        return digest_of_json(self._manifest)

    def contents(self) -> Iterator[tuple[str, Content]]:
        for layer in self._manifest["layers"]:
            path = self._blob(layer["digest"])
            if not path.is_file() or path.stat().st_size != layer["size"]:
                raise ImageError(f"{path} is missing or cut off: write oci:{self._folder} again.")
            yield layer["digest"], FileContent(path)

    def description(self) -> tuple[dict[str, Any], list[str]]:
        return self._config, [layer["digest"] for layer in self._manifest["layers"]]

    def _blob(self, digest: str) -> Path:
        return self._folder / "blobs" / digest.replace(":", "/")

    def _json(self, path: Path) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(path.read_text())
        return value


class ArchiveSource:
    """What `docker save` and `podman save` write: docker-archive:FILE."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.kept: dict[str, bytes] = {}
        self._links: dict[str, str] = {}
        if not path.is_file():
            raise ImageError(f"docker-archive:{path}: there is no such file.")

    def fingerprint(self) -> str:
        state = self._path.stat()
        return digest_of_json([str(self._path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino])

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        with self._path.open("rb") as stream:
            yield stream

    def contents(self) -> Iterator[tuple[str, Content]]:
        try:
            with self._open() as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.issym() or member.islnk():
                        folder = os.path.dirname(name) if member.issym() else ""  # noqa: PTH120 - no path here
                        self._links[name] = os.path.normpath(os.path.join(folder, member.linkname))  # noqa: PTH118
                    content = archive.extractfile(member) if member.isreg() else None
                    if content is None:
                        continue
                    if member.size <= SMALL:
                        self.kept[name] = content.read()
                        if not is_json(self.kept[name][:64]) and self.kept[name]:
                            yield name, BytesContent(self.kept[name], name)
                    else:
                        yield name, StreamContent(content, member.size, name)
        except tarfile.TarError as error:
            raise ImageError(f"{self} is no image, or is cut off: {error}") from error

    def description(self) -> tuple[dict[str, Any], list[str]]:
        try:
            (image,) = json.loads(self.kept["manifest.json"])
            config = json.loads(self.kept[self._resolved(image["Config"])])
            return config, [self._resolved(layer) for layer in image["Layers"]]
        except (KeyError, ValueError, TypeError) as error:
            raise ImageError(f"{self} holds no image, or more than one: {error!r}") from error

    def _resolved(self, name: str) -> str:
        while name in self._links:
            name = self._links[name]
        return name

    def __str__(self) -> str:
        return f"docker-archive:{self._path}"


class EngineSource(ArchiveSource):
    """An image of podman's or docker's, whichever has it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.kept, self._links = {}, {}
        engines = [engine for engine in ("podman", "docker") if shutil.which(engine)]
        if not engines:
            raise ImageError(f"{name}: neither podman nor docker is here to ask for it: install one.")
        for engine in engines:
            inspect = [engine, "image", "inspect", "--format", "{{.Id}}", name]
            answer = subprocess.run(inspect, capture_output=True, text=True)
            if answer.returncode == 0:
                self._engine, self._id = engine, answer.stdout.strip().removeprefix("sha256:")
                return
        said = (answer.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ImageError(
            f"{' and '.join(engines)} have no image {name} ({said}): build it with scripts/build_image.py, "
            "or give oci:DIR or docker-archive:FILE."
        )

    def fingerprint(self) -> str:
        return f"{self._engine}:{self._id}"  # a digest of its configuration, and that of its layers

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        form = ["--quiet", "--format", "docker-archive"] if self._engine == "podman" else []
        command = [self._engine, "save", *form, self._name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None  # noqa: S101 - asked for
            broken = None
            try:
                try:
                    yield process.stdout
                except tarfile.TarError as error:
                    broken = error  # the engine knows why
                while process.stdout.read(SMALL):  # what follows the archive's end
                    pass
                said = process.stderr.read().decode(errors="replace").strip().splitlines()
                if process.wait():
                    raise ImageError(f"{' '.join(command)} failed: {said[-1] if said else 'it says nothing'}")
                if broken is not None:
                    raise broken
            finally:
                process.kill()

    def __str__(self) -> str:
        return self._name


def wanted(source: Source, layers: Sequence[Blob]) -> Iterator[tuple[Blob, Content]]:
    """Those layers of the image; it is read again for what is not kept of it."""
    missing = {layer.name: layer for layer in layers}
    for name in missing.keys() & source.kept.keys():
        yield missing.pop(name), BytesContent(source.kept[name], name)
    for name, content in source.contents() if missing else ():
        if name in missing:
            yield missing.pop(name), content
    if missing:
        raise ImageError(f"{source} is no longer the image that it was: run the same command again.")
