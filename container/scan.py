"""What no layer of code and no configuration may hold: a secret, or something that hides the models below it.

    scan = LayerScan(protected, own)
    for block in layer:
        scan.feed(block)
    scan.problems     # one line each

A secret is named, never shown.
"""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from container.content import BLOCK
from container.credentials import stored_secrets
from container.errors import ImageError

WHITEOUT, OPAQUE, AUFS = ".wh.", ".wh..wh..opq", ".wh..wh."

SECRETS = {  # what it is: what every one of them has in it, and how it looks
    "a Hugging Face token": (b"hf_", rb"\bhf_[A-Za-z0-9]{34}\b"),
    "a GitHub token": (b"gh", rb"\bgh[opsu]_[A-Za-z0-9]{36}\b"),
    "a fine-grained GitHub token": (b"github_pat_", rb"\bgithub_pat_[A-Za-z0-9_]{82}\b"),
    "a Docker Hub token": (b"dckr_", rb"\bdckr_[op]at_[A-Za-z0-9_-]{27,32}\b"),
    "a RunPod key": (b"rpa_", rb"\brpa_[A-Z0-9]{40}[a-z0-9]{6}\b"),
    "an AWS key": (b"AKIA", rb"\bAKIA(?![A-Z0-9]*EXAMPLE)[A-Z0-9]{16}\b"),
    "an OpenAI key": (b"sk-proj-", rb"\bsk-proj-[A-Za-z0-9_-]{40,}"),
    "a GitLab token": (b"glpat-", rb"\bglpat-[A-Za-z0-9_-]{20}\b"),
}
PATTERNS = {what: (part, re.compile(pattern)) for what, (part, pattern) in SECRETS.items()}
GZIP = 31  # zlib's word for it
LONGEST = 256  # bytes of a secret that may lie across two blocks
LOGINS = re.compile(
    r"(^|/)(\.netrc|\.git-credentials|\.pypirc|\.docker/config\.json|\.aws/credentials|containers/auth\.json"
    r"|\.ssh/id_[a-z0-9]+|huggingface/(token|stored_tokens))$"
)
SECRET_NAME = re.compile(r"(?i)(^|_)(token|secret|password|passwd|api_?keys?|access_?key|credentials?)($|_)")
ASSIGNED = re.compile(
    r"(?i)\b(\w*(?:token|secret|password|passwd|api_?key|access_?key))\s*[=:]\s*(?![\s$'\"]|\*{3})\S{6}"
)
PACKAGES = "/site-packages/"  # in a file's path: anyone can download it; transformers publishes its tests' token
SHORTEST = 12  # characters that a value of this machine's environment must have to be looked for


def secrets_here(environment: Mapping[str, str] = os.environ) -> dict[str, bytes]:
    """The secrets that this machine could have left in an image: the name of each, and its value."""
    found = {
        name: value
        for name, value in environment.items()
        if SECRET_NAME.search(name) and not name.endswith(("_FILE", "_PATH", "_DIR"))
    }
    home = Path(environment.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    if (home / "token").is_file():
        found[str(home / "token")] = (home / "token").read_text().strip()
    found |= stored_secrets()
    return {name: value.encode() for name, value in found.items() if len(value) >= SHORTEST and value[0] != "/"}


def find_secrets(content: bytes, own: Mapping[str, bytes], published: bool = False) -> list[str]:
    """What is in a text or a piece of a file; in a published one, whatever looks like a secret is none."""
    kinds = {} if published else PATTERNS
    found = [what for what, (part, pattern) in kinds.items() if part in content and pattern.search(content)]
    return found + [f"the value of {name}" for name, value in own.items() if value in content]


def check_config(config: Mapping[str, Any], own: Mapping[str, bytes]) -> list[str]:
    """An image's configuration: environment, labels, history, commands."""
    problems = [f"its configuration has {what} in it" for what in find_secrets(json.dumps(config).encode(), own)]
    for variable in (config.get("config") or {}).get("Env") or []:
        name, _, value = variable.partition("=")
        if value and SECRET_NAME.search(name):
            problems.append(f"its environment sets {name}")
    for entry in config.get("history") or []:
        shown = ASSIGNED.findall(f"{entry.get('created_by', '')} {entry.get('comment', '')}")
        problems += [f"its history shows {name}" for name in shown]
    return problems


def ancestors(files: Iterable[str]) -> dict[str, bool]:
    """The files that must stay visible and the directories above them; True for directories."""
    paths = dict.fromkeys(files, False)
    for file in list(paths):
        paths |= {str(parent): True for parent in PurePosixPath(file).parents[:-1]}
    return paths


class LayerScan:
    """Reads a layer as it passes."""

    def __init__(self, protected: Mapping[str, bool], own: Mapping[str, bytes]) -> None:
        self.problems: list[str] = []
        self._protected, self._own = protected, own
        self._inflate: Any = None
        self._started = False
        self._header = bytearray()  # what there is of the next one
        self._left, self._padding = 0, 0  # bytes of the entry under way
        self._name, self._kind = "", b""
        self._named: dict[str, str] = {}  # by a PAX or GNU header, for the entry that follows
        self._told = bytearray()  # the content of such a header
        self._tail = b""

    def feed(self, block: memoryview) -> None:
        if not self._started:
            self._started = True
            start = bytes(block[:4])
            if start[:2] == b"\x1f\x8b":
                self._inflate = zlib.decompressobj(GZIP)
            elif start == b"\x28\xb5\x2f\xfd":
                raise ImageError("The code image has zstd layers, which cannot be looked into: save it with gzip.")
        if self._inflate is None:
            self._read(block)
            return
        rest = bytes(block)
        while rest:  # a little at a time, whatever it grows to, and one gzip stream after the other
            self._read(memoryview(self._inflate.decompress(rest, BLOCK)))
            rest = self._inflate.unconsumed_tail
            if self._inflate.eof:
                rest, self._inflate = self._inflate.unused_data, zlib.decompressobj(GZIP)

    def _read(self, block: memoryview) -> None:
        while block:
            if self._left:
                part, block = block[: self._left], block[self._left :]
                self._left -= len(part)
                self._content(bytes(part))
            elif self._padding:
                count = min(self._padding, len(block))
                self._padding, block = self._padding - count, block[count:]
            else:
                count = tarfile.BLOCKSIZE - len(self._header)
                self._header += block[:count]
                block = block[count:]
                if len(self._header) == tarfile.BLOCKSIZE:
                    self._begin(bytes(self._header))
                    self._header.clear()

    def _begin(self, header: bytes) -> None:
        if not any(header):  # the end
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ImageError(f"A layer of the code image is no tar file ({error}): build the image again.") from error
        self._kind = info.type
        has_content = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in PREFIXES
        size = info.size
        if info.type not in PREFIXES:
            size = int(self._named.pop("size", size))
            self._name = str(PurePosixPath("/", self._named.pop("path", info.name))).lstrip("/")
            self._named.clear()
            self._check_path(info, size)
        self._left = size if has_content else 0
        self._padding = -self._left % tarfile.BLOCKSIZE
        self._told.clear()
        self._tail = b""

    def _content(self, part: bytes) -> None:
        if self._kind in PREFIXES:
            self._told += part
            if not self._left:
                self._named |= named_by(self._kind, bytes(self._told))
            return
        part = self._tail + part
        for what in find_secrets(part, self._own, PACKAGES in f"/{self._name}"):
            problem = f"/{self._name} has {what} in it"
            if problem not in self.problems:
                self.problems.append(problem)
        self._tail = part[-LONGEST:]

    def _check_path(self, info: tarfile.TarInfo, size: int) -> None:
        name, folder = PurePosixPath(self._name).name, str(PurePosixPath(self._name).parent)
        if name == OPAQUE:
            hidden = next((path for path in self._protected if folder == "." or path.startswith(f"{folder}/")), None)
        elif name.startswith(AUFS):
            hidden = None
        elif name.startswith(WHITEOUT):
            removed = str(PurePosixPath(folder, name.removeprefix(WHITEOUT)))
            hidden = removed if removed in self._protected else None
        else:
            covered = self._protected.get(self._name) is not None
            hidden = self._name if covered and not (info.isdir() and self._protected[self._name]) else None
        if hidden is not None:
            self.problems.append(
                f"/{self._name} would hide the models' /{hidden}: build the code image without models "
                "(scripts/build_image.py)"
            )
        if size and info.isreg() and LOGINS.search(self._name):
            self.problems.append(f"/{self._name} is a file of logins")


PREFIXES = (  # entries that say something of the next one
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def named_by(kind: bytes, content: bytes) -> dict[str, str]:
    """What a PAX or GNU header says of the entry that follows."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    told = {}
    if kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        position = 0
        while match := re.compile(rb"(\d+) ([^=]+)=").match(content, position):
            end = position + int(match[1])
            told[match[2].decode()] = content[match.end() : end - 1].decode("utf-8", "surrogateescape")
            position = end
    return told
