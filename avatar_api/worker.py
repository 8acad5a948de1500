"""A runner's loop: take the next job, drive the pipeline clip by clip, join the clips, take the next.

A job's folder holds its inputs, and for each finished clip a segment of video and the state to go on from. A clip is
recorded only when both are in place, so a job that loses its runner at any moment goes on after its last finished
clip, and its video equals an undisturbed one.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from avatar_api.inputs import Inputs, pick_up
from avatar_api.jobs import OUTAGES, Claim, FinishedClip, JobCancelled, JobStore, LeaseLost
from avatar_api.media import VideoWriter
from avatar_api.progress import ENCODING, PREPARING, UPLOADING, Progress
from avatar_api.settings import ServiceSettings
from avatar_api.shutdown import Shutdown
from avatar_api.storage import Storage, StorageError
from infinitetalk.errors import InputError
from infinitetalk.parallel import Followers, device_of
from infinitetalk.pipeline import Clip, ClipState, InfiniteTalkPipeline, Speaker, Step
from infinitetalk.timeline import FRAMES_PER_SECOND

logger = logging.getLogger(__name__)

OUTAGE_WAIT = 2.0  # seconds between questions to a database that does not answer


class Stopping(Exception):  # noqa: N818 - no error: the process was asked to end
    """Raised at a denoising step when the runner has no time left to finish the clip."""


def load(wan: Path, infinitetalk: Path, wav2vec2: Path, settings: ServiceSettings) -> InfiniteTalkPipeline:
    """The pipeline from its snapshots, on as many GPUs as the settings say.

    Raises CheckpointError, InputError for a GPU that is not there, RankError for trouble on another than the first.
    """
    snapshots = partial(InfiniteTalkPipeline.from_snapshots, wan, infinitetalk, wav2vec2, memory=settings.memory)
    if settings.gpus == 1:
        return snapshots(settings.device)
    followers = Followers(snapshots, settings.gpus, settings.device)
    try:
        pipeline = snapshots(device_of(0, settings.device))
        followers.wait()
    except BaseException:
        followers.close()
        raise
    pipeline.ranks = followers
    logger.info("%d ranks share the passes of each step", followers.size)
    return pipeline


def work(store: JobStore, pipeline: InfiniteTalkPipeline, storage: Storage, owner: str, shutdown: Shutdown) -> None:
    """Run jobs, one at a time, until the shutdown is asked for; first the one that this runner died over, if any."""
    store.reclaim(owner)
    if (last := store.last_completed(owner)) is not None:
        _tidy(last.id, storage)  # its dead self may not have come so far
    while not shutdown.asked:
        try:
            claim = store.claim(owner)
        except OUTAGES as error:
            logger.warning("the database is away: %s", error)
            shutdown.wait(OUTAGE_WAIT)
            continue
        if claim is None:
            shutdown.wait(store.poll_seconds)
            continue
        with claim:
            try:
                run(claim, pipeline, storage, shutdown)
            except LeaseLost as reason:
                logger.warning("job %s: dropped: %s", claim.job.id, reason)


def run(claim: Claim, pipeline: InfiniteTalkPipeline, storage: Storage, shutdown: Shutdown) -> None:
    """One job, to whatever end it comes. Raises LeaseLost if that is another runner's to write."""
    job = claim.job.id
    logger.info("job %s: started, %d clips are there already", job, len(claim.clips))
    try:
        result = _generate(claim, pipeline, storage, shutdown)
        claim.complete(result)
    except LeaseLost:
        raise
    except JobCancelled:
        claim.cancelled()
        logger.info("job %s: cancelled", job)
    except Stopping:
        claim.release()
        logger.info("job %s: handed back", job)
    except InputError as error:
        claim.fail(error_object(error), retry=False)
        logger.info("job %s: refused: %s", job, error)
    except Exception as error:
        logger.exception("job %s: failed", job)
        state = claim.fail(error_object(error), retry=True)
        logger.info("job %s: is now %s", job, state)
    else:
        logger.info("job %s: completed", job)
        _tidy(job, storage)


def _tidy(job: str, storage: Storage) -> None:
    """Delete what a completed job does not need any more: its pieces are in the video now."""
    try:
        for made in ("clip-", "so-far-"):
            storage.discard(job, made)
    except StorageError as error:  # they go with the job, when that is deleted
        logger.warning("job %s: what it does not need any more stays: %s", job, error)


def error_object(error: Exception) -> dict[str, Any]:
    """What callers are told of an error: their mistakes in full, ours by kind."""
    if isinstance(error, InputError):
        return {"type": "invalid_request_error", "code": error.code, "message": str(error), "param": error.param}
    message = f"The video could not be generated ({type(error).__name__}); the server's log has the details."
    if isinstance(error, FloatingPointError):
        message = f"The model's output is not a number: {error}"
    return {"type": "server_error", "code": "generation_failed", "message": message, "param": None}


def _generate(claim: Claim, pipeline: InfiniteTalkPipeline, storage: Storage, shutdown: Shutdown) -> dict[str, Any]:
    claim.report({"stage": PREPARING})
    job, folder = claim.job.id, storage.folder(claim.job.id)
    storage.obtain(job, *claim.job.spec["files"], *_needed(claim.clips))
    with pick_up(claim.job.spec, folder) as inputs:
        return _make(inputs, claim, pipeline, storage, shutdown)


def _make(
    inputs: Inputs, claim: Claim, pipeline: InfiniteTalkPipeline, storage: Storage, shutdown: Shutdown
) -> dict[str, Any]:
    request, folder = inputs.request, storage.folder(claim.job.id)
    segments = [folder / clip.result["segment"] for clip in claim.clips]
    state = _last_state(claim.clips, folder)

    if not segments or state is not None:  # else the runner before us finished the last clip, and no more
        progress = Progress()

        def on_step(step: Step) -> None:
            claim.check()
            if shutdown.overdue:
                raise Stopping
            claim.report(progress.step(step.clip, step.clips, step.step, step.steps))

        voices = inputs.read_voices()
        boxes = request.speakers.boxes or [None] * len(voices)
        clips = pipeline.generate(
            inputs.reference,
            [Speaker(voice, box) for voice, box in zip(voices, boxes, strict=True)],
            request.prompt,
            request.settings(),
            scene_starts=inputs.scene_starts(voices),
            on_step=on_step,
            resume_from=state,
        )
        for clip in clips:
            segments.append(_keep(clip, claim, storage))
            if shutdown.asked and clip.state is not None:
                raise Stopping

    claim.report({"stage": ENCODING, "percent": 100.0})
    claim.check()
    if claim.epoch > 1:
        storage.discard(claim.job.id, "video.")  # of runners that were killed while they joined the clips
    video = folder / f"video.{claim.epoch}.mp4"
    height, width = inputs.size
    with VideoWriter(video, width, height, inputs.voice_files, request.speakers.order) as writer:
        for segment in segments:
            writer.append(segment)
    claim.report({"stage": UPLOADING, "percent": 100.0})
    storage.publish(claim.job.id, video.name, on_bytes=lambda _: claim.check())
    frames = writer.frames
    return {"video": video.name, "frames": frames, "seconds": frames / FRAMES_PER_SECOND}


def _last_state(clips: Sequence[FinishedClip], folder: Path) -> ClipState | None:
    if not clips or clips[-1].result["state"] is None:
        return None
    return ClipState.load(folder / clips[-1].result["state"])


def _needed(clips: Sequence[FinishedClip]) -> list[str]:
    """The files of the finished clips that the job goes on from."""
    state = [clips[-1].result["state"]] if clips and clips[-1].result["state"] else []
    return [clip.result["segment"] for clip in clips] + state


def _keep(clip: Clip, claim: Claim, storage: Storage) -> Path:
    """Write a clip's segment and state, then record both: from here on it never runs again."""
    name = f"clip-{clip.index:05d}.{claim.epoch}"  # the epoch: a runner given up for dead may be writing the same clip
    folder = storage.folder(claim.job.id)
    segment, state = folder / f"{name}.mp4", folder / f"{name}.safetensors"
    frames = clip.frames
    with VideoWriter(segment, frames.shape[2], frames.shape[1], sound=None) as writer:
        writer.write(frames)
    if clip.state is not None:
        clip.state.save(state)
    made = [segment.name] + ([state.name] if clip.state else [])
    storage.publish(claim.job.id, *made, on_bytes=lambda _: claim.check())  # and only then may the database know
    recorded = {"segment": segment.name, "state": state.name if clip.state else None, "frames": len(frames)}
    claim.finish_clip(clip.index, recorded)
    return segment
