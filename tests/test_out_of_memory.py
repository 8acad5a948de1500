"""A video that is too large for the GPU is tried once more with less on it, and then fails with the reason."""

import gc
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from avatar_api.inputs import lay_down
from avatar_api.jobs import JobStore
from avatar_api.requests import VideoRequest
from avatar_api.settings import ServiceSettings
from avatar_api.shutdown import Shutdown
from avatar_api.storage import open_storage
from avatar_api.worker import load, work
from infinitetalk.memory import PRESETS, smaller
from infinitetalk.pipeline import InfiniteTalkPipeline, Step
from tests.conftest import REPOSITORY


class Runner:
    """The service's runner, with presets of memory that hold only so many of a job's clips."""

    def __init__(self, home: Path, snapshots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = ServiceSettings(home=home, device="cpu")
        self.store = JobStore(self.settings.database)
        self.loaded: list[str] = []
        """Presets, in the order they were loaded."""
        self.ran: list[tuple[str, int]] = []
        """Preset and clip of every clip that was begun."""
        self._parts = [snapshots / name for name in ("Wan2.1-I2V-14B-480P", "InfiniteTalk", "chinese-wav2vec2-base")]
        self._transformers: list[Callable[[], object]] = []
        self._monkeypatch = monkeypatch

    def submit(self, job_id: str) -> None:
        """A job of two clips."""
        voice = self.settings.home / "voice.wav"
        soundfile.write(voice, 0.1 * np.random.default_rng(0).standard_normal(16000 * 100 // 25), 16000)
        portrait = REPOSITORY / "examples" / "portrait.png"
        files = {"image": partial(shutil.copyfile, portrait), "audio": partial(shutil.copyfile, voice)}
        request = VideoRequest(size="64x64", steps=1, text_guidance=1)
        self.store.submit(lay_down(request, files, self.settings.job_folder(job_id), 60, "image"), job_id=job_id)

    def work(self, usual: str, room: dict[str, int]) -> None:
        """Until nothing is left to do. room: by preset, the clips that a job gets before memory is full."""
        shutdown = Shutdown()
        generate = InfiniteTalkPipeline.generate

        def in_little_memory(pipeline: InfiniteTalkPipeline, *arguments: Any, on_step: Any, **options: Any) -> Any:
            def full_at(step: Step) -> None:
                self.ran.append((pipeline.preset.name, step.clip))
                if step.clip >= room[pipeline.preset.name]:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
                on_step(step)

            return generate(pipeline, *arguments, on_step=full_at, **options)

        def load_models(memory: str) -> InfiniteTalkPipeline:
            gc.collect()
            assert not any(transformer() for transformer in self._transformers), "two pipelines would not fit"
            self.loaded.append(memory)
            wan, infinitetalk, wav2vec2 = self._parts
            pipeline = load(wan, infinitetalk, wav2vec2, self.settings, memory)
            self._transformers.append(weakref.ref(pipeline.transformer))
            return pipeline

        claim = self.store.claim

        def claim_or_stop(owner: str) -> Any:
            claimed = claim(owner)
            if claimed is None:
                shutdown.ask(0)
            return claimed

        with self._monkeypatch.context() as patched:
            patched.setattr(InfiniteTalkPipeline, "generate", in_little_memory)
            patched.setattr(self.store, "claim", claim_or_stop)
            work(self.store, load_models(usual), open_storage(self.settings), "runner", shutdown, load_models)


@pytest.fixture
def runner(tmp_path: Path, snapshots: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(tmp_path, snapshots, monkeypatch)


def test_it_goes_on_with_the_next_smaller_preset_and_the_next_job_has_the_usual_one(runner: Runner) -> None:
    runner.submit("large")
    runner.work("80gb", {"80gb": 1, "48gb": 2})
    assert runner.loaded == ["80gb", "48gb", "80gb"]
    assert runner.ran == [("80gb", 0), ("80gb", 1), ("48gb", 1)], "the clip that fitted does not run again"
    job = runner.store.get("large")
    assert (job.state, job.result and job.result["frames"]) == ("completed", 100)


def test_one_that_does_not_fit_then_either_fails_and_says_so(runner: Runner) -> None:
    runner.submit("large")
    runner.work("80gb", {"80gb": 0, "48gb": 0, "24gb": 2})
    assert runner.ran == [("80gb", 0), ("48gb", 0)], "once more, and no third time"
    job = runner.store.get("large")
    assert (job.state, job.attempts) == ("failed", 1)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("out_of_memory", "size")
    assert "ask for a smaller one" in job.error["message"]


def test_the_smallest_preset_fails_at_once(runner: Runner) -> None:
    runner.submit("large")
    runner.work("24gb", {"24gb": 0})
    assert runner.loaded == ["24gb"]
    assert runner.store.get("large").state == "failed"


def test_presets_have_an_order() -> None:
    assert [(one := smaller(preset)) and one.name for preset in PRESETS.values()] == ["80gb", "48gb", "24gb", None]
