"""Bytes on their way into an image: read in blocks from any position on, hashed the first time that they pass."""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from container.errors import ImageError

BLOCK = 2**20  # bytes that are read, hashed and sent at a time: they stay in the processor's cache


class Content:
    """A blob of `size` bytes. `digest` is "sha256:…"; what has not been read yet is read for it."""

    chunk = 128 * 2**20  # bytes that one request sends; what a cut connection costs at most

    def __init__(self, size: int) -> None:
        self.size = size
        self._sha256, self._hashed = hashlib.sha256(), 0

    def blocks(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from `start` to `end`. A block is valid until the next is asked for."""
        if start > self._hashed:  # goes on with what another process has begun to send
            for _ in self.blocks(self._hashed, start):
                pass
        position = start
        for block in self._read(start, end):
            if position + len(block) > self._hashed:
                self._sha256.update(block[self._hashed - position :])
                self._hashed = position + len(block)
            position += len(block)
            yield block
        if position != end:
            raise ImageError(f"{self} ends after {position} of {self.size} bytes: was it changed meanwhile?")

    def all_blocks(self) -> Iterator[memoryview]:
        """From the beginning to the end; of a stream, a chunk at a time is kept in memory."""
        for start in range(0, self.size, self.chunk):
            yield from self.blocks(start, min(start + self.chunk, self.size))

    @property
    def digest(self) -> str:
        if self._hashed < self.size:
            for _ in self.blocks(self._hashed, self.size):
                pass
        return f"sha256:{self._sha256.hexdigest()}"

    def _read(self, start: int, end: int) -> Iterator[memoryview]:
        raise NotImplementedError


class FileContent(Content):
    """A file's."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.stat().st_size)
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def _read(self, start: int, end: int) -> Iterator[memoryview]:
        yield from file_blocks(self._path, start, end)


class BytesContent(Content):
    """Bytes in memory."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(len(content))
        self._content, self._name = memoryview(content), name

    def __str__(self) -> str:
        return self._name

    def _read(self, start: int, end: int) -> Iterator[memoryview]:
        for position in range(start, end, BLOCK):
            yield self._content[position : min(position + BLOCK, end)]


class StreamContent(Content):
    """What comes through a pipe, once: only the request that is under way can be sent again."""

    chunk = 16 * 2**20

    def __init__(self, stream: IO[bytes], size: int, name: str) -> None:
        super().__init__(size)
        self._stream, self._name = stream, name
        self._kept, self._start = bytearray(), 0  # the bytes of the request under way, and their position

    def __str__(self) -> str:
        return self._name

    def _read(self, start: int, end: int) -> Iterator[memoryview]:
        if start < self._start:
            raise PassedError(f"{self} has passed byte {start}")
        if start - self._start >= len(self._kept):  # what came before has arrived
            self._skip(start - self._start - len(self._kept))
            self._kept, self._start = bytearray(), start
        for position in range(start, end, BLOCK):
            stop = min(position + BLOCK, end)
            missing = stop - self._start - len(self._kept)
            while missing > 0 and (piece := self._stream.read(missing)):
                self._kept += piece
                missing -= len(piece)
            yield memoryview(bytes(self._kept[position - self._start : stop - self._start]))

    def _skip(self, count: int) -> None:
        while count > 0 and (piece := self._stream.read(min(count, BLOCK))):
            count -= len(piece)


class PassedError(Exception):
    """Bytes of a stream are wanted that have gone by: it has to be opened anew."""


def sha256_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def file_blocks(path: Path, start: int, end: int) -> Iterator[memoryview]:
    """A file's bytes through one buffer; fewer than asked for where it is shorter."""
    buffer = bytearray(min(BLOCK, max(end - start, 1)))
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end and (count := file.readinto(view[: end - start])):
            yield view[:count]
            start += count


class ContentReader(io.RawIOBase):
    """A content to be read from its beginning like a file; `report` is told how far."""

    def __init__(self, content: Content, report: Callable[[int], object]) -> None:
        self._blocks, self._rest = content.all_blocks(), memoryview(b"")
        self._report, self._position = report, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._blocks, memoryview(b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        self._report(self._position)
        return count
