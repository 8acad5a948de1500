"""Where an image goes to: a registry, a folder in the OCI layout, or a file for `docker load`."""

import io
import json
import os
import shutil
import tarfile
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from container.content import BLOCK, BytesContent, Content, ContentReader, sha256_of
from container.digests import Digests
from container.registry import INDEX, MANIFEST, Manifest, Reference, Registry, Report


class Output(Protocol):
    """Where an image goes."""

    parallel: int

    def has(self, digest: str) -> bool: ...

    def put(self, content: Content, key: str, report: Report) -> str:
        """Take a layer; `key` is its name for the time being. Returns its digest."""

    def existing(self) -> Manifest | None:
        """The image that is there under this name."""

    def room(self) -> int | None:
        """Bytes of free disk; None where that is not known."""

    def finish(self, config: bytes, manifest: bytes) -> None:
        """Make the layers an image."""


class RegistryOutput:
    """A registry's repository and tag."""

    parallel = 4

    def __init__(self, registry: Registry, digests: Digests) -> None:
        self.registry, self._digests = registry, digests
        self._place = f"{registry.reference.host}/{registry.reference.repository}"
        self.has = registry.has

    def existing(self) -> Manifest | None:
        return self.registry.manifest(self.registry.reference.tag)

    def put(self, content: Content, key: str, report: Report) -> str:
        name = f"{self._place} {key}"
        remember = partial(self._digests.set_upload, name)
        digest = self.registry.upload(content, report, self._digests.upload(name), remember)
        remember("")
        return digest

    def room(self) -> int | None:
        return None

    def finish(self, config: bytes, manifest: bytes) -> None:
        self.registry.upload(BytesContent(config, "the configuration"), lambda _: None)
        self.registry.put_manifest(self.registry.reference.tag, manifest, MANIFEST)


class LayoutOutput:
    """oci:DIR. Blobs appear under their digests when they are whole, index.json last."""

    parallel = 2

    def __init__(self, folder: Path, tag: str) -> None:
        self._folder, self._tag = folder, tag
        (folder / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)

    def has(self, digest: str) -> bool:
        return self._path(digest).is_file()

    def existing(self) -> Manifest | None:
        try:
            index = (self._folder / "index.json").read_bytes()
        except FileNotFoundError:
            return None
        try:
            (entry,) = json.loads(index)["manifests"]
            return Manifest(self._path(entry["digest"]).read_bytes(), MANIFEST)
        except (OSError, ValueError, KeyError):
            return Manifest(index, INDEX)  # something else

    def put(self, content: Content, key: str, report: Report) -> str:
        part = self._folder / "blobs" / f"{key.removeprefix('sha256:')}.part"
        position = 0
        with part.open("wb") as file:
            for block in content.all_blocks():
                file.write(block)
                position += len(block)
                report(position)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path(content.digest))
        return content.digest

    def room(self) -> int | None:
        return shutil.disk_usage(self._folder).free

    def finish(self, config: bytes, manifest: bytes) -> None:
        for content in (config, manifest):
            self._path(sha256_of(content)).write_bytes(content)
        described = {"mediaType": MANIFEST, "digest": sha256_of(manifest), "size": len(manifest)}
        platform = {"architecture": "amd64", "os": "linux"}
        annotations = {"org.opencontainers.image.ref.name": self._tag}
        index = {"schemaVersion": 2, "manifests": [described | {"platform": platform, "annotations": annotations}]}
        (self._folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        part = self._folder / "index.json.part"
        part.write_text(json.dumps(index))
        part.replace(self._folder / "index.json")

    def _path(self, digest: str) -> Path:
        return self._folder / "blobs" / digest.replace(":", "/")


class ArchiveOutput:
    """docker-archive:FILE. One layer after the other, what they are at the end; the file appears when it is whole."""

    parallel = 1

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._part = path.with_name(path.name + ".part")
        self._names: dict[str, str] = {}
        self._archive: tarfile.TarFile | None = None
        path.parent.mkdir(parents=True, exist_ok=True)

    def has(self, digest: str) -> bool:
        return digest in self._names

    def existing(self) -> Manifest | None:
        return Manifest(b"{}", MANIFEST) if self._path.exists() else None  # what is in it is not looked at

    def put(self, content: Content, key: str, report: Report) -> str:
        name = f"{key.removeprefix('sha256:')}.tar"
        self._add(name, content.size, io.BufferedReader(ContentReader(content, report), BLOCK))
        self._names[content.digest] = name
        return content.digest

    def room(self) -> int | None:
        return shutil.disk_usage(self._path.parent).free

    def finish(self, config: bytes, manifest: bytes) -> None:
        layers = [self._names[layer["digest"]] for layer in json.loads(manifest)["layers"]]
        name = f"{sha256_of(config).removeprefix('sha256:')}.json"
        description = json.dumps([{"Config": name, "RepoTags": [self._name], "Layers": layers}]).encode()
        for path, text in ((name, config), ("manifest.json", description)):
            self._add(path, len(text), io.BytesIO(text))
        assert self._archive is not None  # noqa: S101 - something was added
        self._archive.close()
        self._part.replace(self._path)

    def _add(self, name: str, size: int, content: IO[bytes]) -> None:
        if self._archive is None:
            self._archive = tarfile.open(self._part, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - until finish
        info = tarfile.TarInfo(name)
        info.size = size
        self._archive.addfile(info, content)


def open_output(text: str, digests: Digests) -> Output:
    kind, colon, rest = text.partition(":")
    if colon and kind == "oci":
        return LayoutOutput(Path(rest), "latest")
    if colon and kind == "docker-archive":
        return ArchiveOutput(Path(rest), "avatar-api:latest")
    return RegistryOutput(Registry(Reference.parse(text)), digests)
