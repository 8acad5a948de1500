"""What can be seen of a video before it is finished: the clips so far as one film, and a thumbnail."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from avatar_api.decoder import Decoder
from avatar_api.inputs import DECODERS, decoding_seconds, voice_files
from avatar_api.jobs import FinishedClip, Job
from avatar_api.storage import Storage
from avatar_api.video_writer import open_written
from infinitetalk.timeline import FRAMES_PER_SECOND

THUMBNAIL_SIDE = 512  # pixels, at most


def so_far(job: Job, clips: Sequence[FinishedClip], storage: Storage) -> Path | None:
    """A film of the clips that are finished, with their sound; None if there is none. Made once for each number."""
    if not clips:
        return None
    folder = storage.folder(job.id)
    film = folder / f"so-far-{len(clips)}.mp4"
    if film.exists():
        return film
    segments = [str(clip.result["segment"]) for clip in clips]
    storage.obtain(job.id, *segments, *job.spec["files"])
    draft = film.with_name(f"{film.name}.{os.getpid()}-{id(clips)}")
    seconds = sum(clip.result["frames"] for clip in clips) / FRAMES_PER_SECOND
    with DECODERS, Decoder(decoding_seconds(seconds)) as decoder:
        voices, order = voice_files(job.spec, folder), job.spec["request"]["speakers"]["order"]
        decoder.join(draft, [folder / segment for segment in segments], voices, order)
    draft.replace(film)
    return film


def thumbnail(job: Job, clips: Sequence[FinishedClip], storage: Storage) -> Path | None:
    """A JPEG of the first picture; None as long as there is none."""
    folder = storage.folder(job.id)
    picture = folder / "thumbnail.jpg"
    if picture.exists():
        return picture
    source = job.result["video"] if job.result else clips[0].result["segment"] if clips else None
    if source is None:
        return None
    storage.obtain(job.id, source)
    with open_written(folder / source) as film:
        image: Image.Image = next(film.decode(video=0)).to_image()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    draft = picture.with_name(f"{picture.name}.{os.getpid()}-{id(image)}")
    image.save(draft, "JPEG", quality=85)
    draft.replace(picture)
    return picture
