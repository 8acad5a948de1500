"""What a machine that is gone left of a job in the bucket, or on a volume: its inputs and its finished clips.

Machines that share a database need none of this: it knows the clips. Workers that come and go, each with a database of
its own, share the files alone.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from avatar_api.inputs import Source
from avatar_api.storage import Storage
from avatar_api.video_writer import open_written

_CLIP = re.compile(r"clip-(\d{5})\.(\d+)\.(mp4|safetensors)")


@dataclass(frozen=True)
class Remains:
    files: dict[str, Source]
    """The inputs that are there; all of them, if there is a clip."""
    clips: list[dict[str, Any]]
    """The first clips, as the worker records them."""


def remains(job_id: str, input_names: tuple[str, ...], storage: Storage) -> Remains:
    """What can be gone on from; without a finished clip, nothing. Raises StorageError.

    A clip counts as finished if both its segment and the state after it are there. So the last one of a video, which
    leaves no state, is made again.
    """
    names = storage.names(job_id)
    found: dict[int, dict[int, set[str]]] = {}
    for clip in filter(None, map(_CLIP.fullmatch, names)):
        found.setdefault(int(clip[1]), {}).setdefault(int(clip[2]), set()).add(clip[3])
    clips: list[dict[str, Any]] = []
    while whole := [epoch for epoch, kinds in found.get(len(clips), {}).items() if len(kinds) == 2]:
        segment, state = (f"clip-{len(clips):05d}.{max(whole)}.{kind}" for kind in ("mp4", "safetensors"))
        storage.obtain(job_id, segment)
        frames = _frames(storage.folder(job_id) / segment)
        clips.append({"segment": segment, "state": state, "frames": frames})
    inputs = [name for name in input_names if name in names] if clips else []
    return Remains({name: partial(_obtain, job_id, name, storage) for name in inputs}, clips)


def _obtain(job_id: str, name: str, storage: Storage, target: Path) -> None:
    storage.obtain(job_id, name)


def _frames(segment: Path) -> int:
    with open_written(segment) as film:
        return film.streams.video[0].frames
