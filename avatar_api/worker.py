"""A runner's loop: take the next job, drive the pipeline clip by clip, join the clips, take the next.

A job's folder holds its inputs, and for each finished clip a segment of video and the state to go on from. A clip is
recorded only when both are in place, so a job that loses its runner at any moment goes on after its last finished
clip, and its video equals an undisturbed one. One that is too large for the GPU is tried once more with the next
smaller memory preset.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from avatar_api import logs, metrics, tracing
from avatar_api.database import OUTAGES
from avatar_api.inputs import Inputs, pick_up
from avatar_api.jobs import Claim, FinishedClip, JobCancelled, JobStore, LeaseLost
from avatar_api.progress import ENCODING, GENERATING, PREPARING, UPLOADING, Progress
from avatar_api.refusals import Refusal, refusal
from avatar_api.settings import ServiceSettings
from avatar_api.shutdown import Shutdown
from avatar_api.storage import Storage, StorageError, may_pass
from avatar_api.video_writer import VideoWriter
from infinitetalk.clips import Clip, ClipState, Speaker, Step
from infinitetalk.errors import InputError
from infinitetalk.lora import Lora, read_lora
from infinitetalk.memory import smaller
from infinitetalk.parallel import Followers, device_of
from infinitetalk.settings import FEW_STEPS
from infinitetalk.timeline import FRAMES_PER_SECOND

if TYPE_CHECKING:
    from infinitetalk.pipeline import InfiniteTalkPipeline

logger = logging.getLogger(__name__)

OUTAGE_WAIT = 2.0  # seconds between questions to a database or a bucket that is away, or to a disk that is full

PIECES = ("clip-", "so-far-")
"""What the names of files begin with that a finished video has in it."""

TOO_LARGE = Refusal(
    500, "The GPU's memory is too small for a video of this size; ask for a smaller one.", "out_of_memory", "size"
).error
GPU_FAILED = Refusal(
    500, "The GPU failed while the video was made; the server's log has the details. Try again.", "gpu_failed"
).error
GPU_FAILED_EXIT = 71  # exit status, EX_OSERR

for _name in (PREPARING, GENERATING, ENCODING, UPLOADING):
    metrics.STAGE_SECONDS.labels(_name)  # is 0 until the first
metrics.FAILURES.labels("generation_failed")


class Stopping(Exception):  # noqa: N818 - no error: the process was asked to end
    """Raised when the runner has no time left to finish the clip, or what comes before and after the clips."""


def load(
    wan: Path, infinitetalk: Path, wav2vec2: Path, settings: ServiceSettings, memory: str | None
) -> "InfiniteTalkPipeline":
    """The pipeline from its snapshots, on as many GPUs as the settings say; memory: a preset, or None to go by the GPU.

    Raises CheckpointError, InputError for a GPU that is not there, RankError for trouble on another than the first.
    """
    from infinitetalk.pipeline import InfiniteTalkPipeline  # takes seconds

    snapshots = partial(InfiniteTalkPipeline.from_snapshots, wan, infinitetalk, wav2vec2, memory=memory)
    if settings.gpus == 1:
        return snapshots(settings.device, on_loaded=metrics.start_took)
    followers = Followers(snapshots, settings.gpus, settings.device)
    try:
        pipeline = snapshots(device_of(0, settings.device), on_loaded=metrics.start_took)
        followers.wait()
    except BaseException:
        followers.close()
        raise
    pipeline.ranks = followers
    logger.info("%d ranks share the passes of each step", followers.size)
    return pipeline


def load_fast_loras(pipeline: "InfiniteTalkPipeline", settings: ServiceSettings) -> Sequence[tuple[Lora, float]]:
    """The LoRA of `quality=fast` and its scale, if there is one. Raises CheckpointError where it does not fit."""
    if settings.fast_lora is None:
        return ()
    loras = [(read_lora(settings.fast_lora), FEW_STEPS[settings.fast_preset].scale)]
    with pipeline.with_loras(loras):
        logger.info("quality=fast: %s, as %s wants it", settings.fast_lora, settings.fast_preset)
    return loras


def work(
    store: JobStore,
    pipeline: "InfiniteTalkPipeline",
    storage: Storage,
    owner: str,
    shutdown: Shutdown,
    load_again: "Callable[[str], InfiniteTalkPipeline]",
    fast_loras: Sequence[tuple[Lora, float]] = (),
) -> None:
    """Run jobs, one at a time, until the shutdown is asked for; first the one that this runner died over, if any.

    load_again: the same pipeline, with another memory preset; fast_loras: those of `quality=fast`.
    """
    usual = pipeline.preset
    store.reclaim(owner)
    if (last := store.last_completed(owner)) is not None:
        _tidy(last.id, storage, *PIECES)  # its dead self may not have come so far
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
        job = claim.job
        if claim.epoch == 1 and job.started_at is not None:
            metrics.WAIT_SECONDS.observe(job.started_at - job.created_at)
        traced = tracing.job_span(job.traceparent, job=job.id, attempt=job.attempts, clips_before=len(claim.clips))
        with claim, logs.of_job(job.id), traced:
            try:
                fits = run(claim, pipeline, storage, shutdown, fast_loras)
                if not fits and (less := smaller(usual)) is not None:
                    logger.warning("job %s: too large for the GPU; once more with preset %s", job.id, less.name)
                    pipeline.close()
                    pipeline = load_again(less.name)
                    fits = run(claim, pipeline, storage, shutdown, fast_loras)
                if not fits:
                    claim.fail(TOO_LARGE, retry=False)
            except LeaseLost as reason:
                logger.warning("job %s: dropped: %s", job.id, reason)
        if pipeline.preset is not usual:  # the next job may fit, and be exact where this one was decoded in tiles
            pipeline.close()
            pipeline = load_again(usual.name)


def run(
    claim: Claim,
    pipeline: "InfiniteTalkPipeline",
    storage: Storage,
    shutdown: Shutdown,
    fast_loras: Sequence[tuple[Lora, float]] = (),
) -> bool:
    """One job, to whatever end it comes. False: the GPU's memory is too small for it, and it has not ended yet.

    Raises LeaseLost if the job is another runner's by now.
    """
    job, begun = claim.job.id, time.monotonic()
    logger.info("job %s: started, %d clips are there already", job, len(claim.clips))
    try:
        result = _generate(_Run(claim, storage, shutdown, fast_loras), pipeline)
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
        tracing.failed(error)
        claim.fail(error_object(error), retry=False)
        logger.info("job %s: refused: %s", job, error)
    except FloatingPointError as error:  # the same again would come of the same
        tracing.failed(error)
        claim.fail(error_object(error), retry=False)
        logger.error("job %s: failed: %s", job, error)
    except torch.OutOfMemoryError as error:
        logger.warning("job %s: %s", job, str(error))  # the error itself, if it is kept, keeps tensors on the GPU
        return False
    except torch.AcceleratorError as error:  # whatever this process asks of the GPU from now on fails too
        tracing.failed(error)
        claim.fail(GPU_FAILED, retry=True)
        logger.critical("job %s: the GPU failed; this process exits: %s", job, error)
        os._exit(GPU_FAILED_EXIT)
    except Exception as error:
        logger.exception("job %s: failed", job)
        tracing.failed(error)
        state = claim.fail(error_object(error), retry=True)
        logger.info("job %s: is now %s", job, state)
    else:
        logger.info("job %s: completed", job)
        metrics.start_took("first_video", time.monotonic() - begun)
        _tidy(job, storage, *PIECES)
    return True


def _tidy(job: str, storage: Storage, *beginnings: str) -> None:
    """Delete the files of a job that begin so, which it does not need any more."""
    try:
        for made in beginnings:
            storage.discard(job, made)
    except StorageError as error:  # they go with the job, when that is deleted
        logger.warning("job %s: what it does not need any more stays: %s", job, error)


def error_object(error: Exception) -> dict[str, Any]:
    """What callers are told of an error: their mistakes in full, ours by kind."""
    if isinstance(error, InputError):
        return refusal(error).error
    code, message = "generation_failed", f"The video could not be generated ({type(error).__name__}); "
    message += "the server's log has the details."
    if isinstance(error, FloatingPointError):
        code, message = "not_a_number", f"The model's output is not a number: {error} Try another seed or other inputs."
    return Refusal(500, message, code).error


@dataclass(frozen=True)
class _Run:
    """What a job is made with."""

    claim: Claim
    storage: Storage
    shutdown: Shutdown
    fast_loras: Sequence[tuple[Lora, float]]
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds that each stage took."""

    @property
    def folder(self) -> Path:
        return self.storage.folder(self.claim.job.id)

    def check(self, *_: object) -> None:
        """At every step, and several times a second of a transfer. Raises what is to end the run."""
        self.claim.check()
        if self.shutdown.overdue:
            raise Stopping

    def obtain(self, *names: str) -> None:
        self._insist(lambda: self.storage.obtain(self.claim.job.id, *names, on_bytes=self.check))

    def write(self, act: Callable[[], object]) -> None:
        """What is written took minutes of a GPU: it is not given up because the disk is full."""
        self._insist(act)

    def publish(self, *names: str) -> None:
        self._insist(lambda: self.storage.publish(self.claim.job.id, *names, on_bytes=self.check))

    def _insist(self, act: Callable[[], object]) -> None:
        """Again and again while the bucket is away or the disk full, for as long as an outage may last."""
        waits_since: float | None = None
        while True:
            try:
                act()
            except (StorageError, OSError) as error:
                now = time.monotonic()
                if not may_pass(error) or (waits_since and now - waits_since > self.claim.settings.outage):
                    raise
                if waits_since is None:
                    waits_since = now
                    logger.warning("job %s waits: %s", self.claim.job.id, error)
            else:
                if waits_since is not None:
                    logger.warning("job %s goes on after %.0f s", self.claim.job.id, time.monotonic() - waits_since)
                return
            self.check()
            time.sleep(OUTAGE_WAIT)


def _generate(run: _Run, pipeline: "InfiniteTalkPipeline") -> dict[str, Any]:
    claim = run.claim
    claim.report({"stage": PREPARING})
    with _stage(PREPARING, run):
        run.obtain(*claim.job.spec["files"], *_needed(claim.clips))
        picked_up = pick_up(claim.job.spec, run.folder, run.check)
    with picked_up as inputs:
        return _make(inputs, run, pipeline)


def _make(inputs: Inputs, run: _Run, pipeline: "InfiniteTalkPipeline") -> dict[str, Any]:
    request, claim, folder = inputs.request, run.claim, run.folder
    state = _last_state(claim.clips, folder)

    if not claim.clips or state is not None:  # else the runner before us finished the last clip, and no more
        progress, making = Progress(), time.monotonic()

        def on_step(step: Step) -> None:
            run.check()
            metrics.start_took("first_step", time.monotonic() - making)  # encoders, and kernels that are loaded by then
            claim.report(progress.step(step.clip, step.clips, step.step, step.steps))
            _report_memory(pipeline.device)

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
        with _stage(GENERATING, run), _quality(request.quality, run.fast_loras, pipeline):
            begun = time.monotonic()
            for clip in clips:
                _keep(clip, run)
                taken, begun = time.monotonic() - begun, time.monotonic()
                metrics.CLIP_SECONDS.observe(taken)
                tracing.past_span("clip", taken, clip=clip.index)
                if run.shutdown.asked and clip.state is not None:
                    raise Stopping

    claim.report({"stage": ENCODING, "percent": 100.0})
    if claim.epoch > 1:
        _tidy(claim.job.id, run.storage, "video.")  # of runners that were killed while they joined the clips
    video = folder / f"video.{claim.epoch}.mp4"
    segments = [str(finished.result["segment"]) for finished in claim.clips]
    frames = sum(finished.result["frames"] for finished in claim.clips)
    with _stage(ENCODING, run):
        run.obtain(*claim.job.spec["files"], *segments)
        run.write(lambda: inputs.join(video, [folder / segment for segment in segments]))
    claim.report({"stage": UPLOADING, "percent": 100.0})
    with _stage(UPLOADING, run):
        run.publish(video.name)
    timings = {name: round(seconds, 3) for name, seconds in run.timings.items()}
    return {"video": video.name, "frames": frames, "seconds": frames / FRAMES_PER_SECOND, "timings": timings}


@contextmanager
def _stage(name: str, run: _Run) -> Iterator[None]:
    """A part of the job, in its trace, and in Prometheus and the result if it comes to its end."""
    begun = time.monotonic()
    with tracing.span(name):
        yield
    run.timings[name] = time.monotonic() - begun
    metrics.STAGE_SECONDS.labels(name).observe(run.timings[name])


@contextmanager
def _quality(
    quality: str, fast_loras: Sequence[tuple[Lora, float]], pipeline: "InfiniteTalkPipeline"
) -> Iterator[None]:
    """The weights for it."""
    if quality != "fast":
        yield
        return
    if not fast_loras:  # the server that took the job has one
        raise InputError("quality", "quality is 'fast', and this runner has no LoRA for it; set AVATAR_FAST_LORA.")
    with pipeline.with_loras(fast_loras):
        yield


def _report_memory(device: torch.device) -> None:
    """Of this process's GPU; those of further ranks are not seen from here."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        metrics.gpu_memory(str(gpu.uuid), allocated=allocated, reserved=reserved, total=gpu.total_memory)


def _last_state(clips: Sequence[FinishedClip], folder: Path) -> ClipState | None:
    if not clips or clips[-1].result["state"] is None:
        return None
    return ClipState.load(folder / clips[-1].result["state"])


def _needed(clips: Sequence[FinishedClip]) -> list[str]:
    """The files of the finished clips that the job goes on from."""
    state = [clips[-1].result["state"]] if clips and clips[-1].result["state"] else []
    return [clip.result["segment"] for clip in clips] + state


def _keep(clip: Clip, run: _Run) -> None:
    """Write a clip's segment and state, then record both: from here on it never runs again."""
    epoch = run.claim.epoch  # in the name: a runner given up for dead may be writing the same clip
    segment, state = (f"clip-{clip.index:05d}.{epoch}.{kind}" for kind in ("mp4", "safetensors"))
    frames = clip.frames

    def write() -> None:
        with VideoWriter(run.folder / segment, frames.shape[2], frames.shape[1], sound=None) as writer:
            writer.write(frames)
        if clip.state is not None:
            draft = run.folder / f"{state}.part"  # on a volume others see the folder, too
            clip.state.save(draft)
            draft.replace(run.folder / state)

    run.write(write)
    with tracing.span("publish"):
        run.publish(segment, *([state] if clip.state else []))  # and only then may the database know
    recorded = {"segment": segment, "state": state if clip.state else None, "frames": len(frames)}
    run.claim.finish_clip(clip.index, recorded)
