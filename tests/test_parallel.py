"""Several ranks, here processes on a CPU: the same video as one, and an end to every trouble that one of them has."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import soundfile
import torch
from torch import Tensor

from avatar_api.inputs import lay_down
from avatar_api.jobs import Job, JobSettings, JobStore
from avatar_api.requests import VideoRequest
from avatar_api.settings import ServiceSettings
from avatar_api.shutdown import Shutdown
from avatar_api.storage import open_storage
from avatar_api.worker import load as load_for_runner
from avatar_api.worker import run
from infinitetalk.errors import InputError, RankError
from infinitetalk.parallel import Followers, Share, device_of
from infinitetalk.pipeline import InfiniteTalkPipeline, Speaker, Step
from infinitetalk.settings import Settings
from tests import toy_ranks
from tests.conftest import REPOSITORY
from tests.served import Served
from tests.test_pipeline import PICTURE, video, voice
from tests.test_service import generate as generate_over_http
from tests.toy_ranks import Add, Trouble, die, fail, hang
from tests.waiting import PATIENCE, eventually


def followers_of(process: int) -> list[psutil.Process]:
    """The processes that a process has started as its followers."""
    children = psutil.Process(process).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


SETTINGS = Settings(size="64x64", steps=3, frames_per_clip=9, motion_frames=5)
FRAMES = 15  # three clips
ONE = (Speaker(voice(FRAMES)),)
TWO = (*ONE, Speaker(voice(FRAMES)[::-1].copy()))


def load(snapshots: Path, device: str) -> InfiniteTalkPipeline:
    """Its time embedding changes so slowly that TeaCache skips forwards."""
    pipeline = InfiniteTalkPipeline.from_snapshots(
        snapshots / "Wan2.1-I2V-14B-480P", snapshots / "InfiniteTalk", snapshots / "chinese-wav2vec2-base", device
    )
    with torch.no_grad():
        pipeline.transformer.condition_embedder.time_proj.weight.mul_(0.01)
    return pipeline


@pytest.fixture(scope="class")
def alone(snapshots: Path) -> InfiniteTalkPipeline:
    return load(snapshots, "cpu")


@pytest.fixture(scope="class", params=[2, 3])
def together(
    request: pytest.FixtureRequest, snapshots: Path, alone: InfiniteTalkPipeline
) -> Iterator[InfiniteTalkPipeline]:
    followers = Followers(partial(load, snapshots), request.param, "cpu")
    pipeline = load(snapshots, "cpu")
    followers.wait()
    pipeline.ranks = followers
    yield pipeline
    followers.close()


def generate(pipeline: InfiniteTalkPipeline, settings: Settings = SETTINGS, **options: Any) -> Tensor:
    return video(pipeline.generate(PICTURE, ONE, "A person talks.", settings, **options))


@pytest.fixture(scope="class")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file exists, no follower can load."""
    return tmp_path_factory.mktemp("trouble") / "broken"


@pytest.fixture(scope="class")
def ranks(broken: Path) -> Iterator[Followers]:
    """Three; one that hangs for ten seconds is given up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infinitetalk.parallel.LONGEST_STEP", timedelta(seconds=10))
        ranks = Followers(partial(toy_ranks.load, broken), 3, "cpu")
        ranks.wait()
        yield ranks
        ranks.close()


class TestTheVideo:
    """Real pipelines, rank 0 of two and of three."""

    @pytest.mark.parametrize(
        ("speakers", "changes"),
        [
            (ONE, {}),
            (TWO, {}),
            (ONE, {"text_guidance": 1.0}),
            (TWO, {"text_guidance": 1.0, "projected_guidance": True}),
            (ONE, {"projected_guidance": True}),
            (TWO, {"teacache": 1.0, "steps": 8, "max_frames": 13}),
            (ONE, {"teacache": 1.0, "steps": 8, "max_frames": 13, "text_guidance": 1.0}),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else f"{len(value)}",
    )
    def test_is_that_of_one_process(
        self,
        together: InfiniteTalkPipeline,
        alone: InfiniteTalkPipeline,
        speakers: tuple[Speaker, ...],
        changes: dict[str, Any],
    ) -> None:
        settings = replace(SETTINGS, **changes)
        expected, found = (video(each.generate(PICTURE, speakers, "", settings)) for each in (alone, together))
        assert torch.equal(found, expected)
        if settings.teacache:
            exact = video(alone.generate(PICTURE, speakers, "", replace(settings, teacache=0.0)))
            assert not torch.equal(expected, exact), "forwards were skipped"

    @pytest.mark.parametrize(("text_guidance", "passes"), [(5.0, 3), (1.0, 2)])
    def test_costs_each_rank_its_share_and_no_more(
        self, together: InfiniteTalkPipeline, text_guidance: float, passes: int
    ) -> None:
        forwards: list[object] = []
        counted = together.transformer.register_forward_hook(lambda *_: forwards.append(1))
        generate(together, replace(SETTINGS, text_guidance=text_guidance, max_frames=9))
        counted.remove()
        assert len(forwards) == SETTINGS.steps * (passes // min(passes, together.ranks.size))

    def test_may_be_stopped_anywhere_and_the_next_is_right(
        self, together: InfiniteTalkPipeline, alone: InfiniteTalkPipeline
    ) -> None:
        class StopError(Exception):
            pass

        def stop(step: Step) -> None:
            if step.step == 1:
                raise StopError

        def fail(*_: object) -> None:
            raise StopError

        with pytest.raises(StopError):
            generate(together, on_step=stop)
        clips = together.generate(PICTURE, ONE, "A person talks.", SETTINGS)
        next(clips)
        clips.close()  # type: ignore[attr-defined]
        broken = together.transformer.register_forward_hook(fail)
        with pytest.raises(StopError):  # here, while the others compute
            generate(together)
        broken.remove()
        assert torch.equal(generate(together), generate(alone))

    def test_is_not_made_as_the_published_teacache_would_by_several(self, together: InfiniteTalkPipeline) -> None:
        settings = replace(SETTINGS, frames_per_clip=5, motion_frames=1, teacache=0.2, reference_quirks=True)
        with pytest.raises(InputError, match="use one GPU") as refusal:
            generate(together, settings)
        assert refusal.value.param == "reference_quirks"


class TestTrouble:
    """What happens to followers; the model is a toy."""

    def run(self, ranks: Followers, *shares: Share) -> list[list[float]]:
        step = ranks.begin(20.0, shares)
        return [[one.item() for one in step(torch.tensor(100.0 * number), torch.tensor(0.0))] for number in (1, 2)]

    def test_predictions_come_in_the_order_of_the_shares(self, ranks: Followers) -> None:
        assert self.run(ranks, Add(), Add(), Add()) == [[121, 111, 111], [222, 212, 212]]
        assert self.run(ranks, Add(), Add()) == [[121, 111], [222, 212]], "a rank without a share rests"

    def test_a_follower_that_fails_ends_the_run_with_its_reason(self, ranks: Followers) -> None:
        with pytest.raises(
            torch.OutOfMemoryError, match="rank 2 of 3 failed: OutOfMemoryError on cpu: CUDA out of memory"
        ):
            self.run(ranks, Add(), Add(), Trouble(happens=fail))
        assert not multiprocessing.active_children()

    def test_a_follower_that_cannot_load_says_why(self, ranks: Followers, broken: Path) -> None:
        broken.touch()
        with pytest.raises(torch.OutOfMemoryError, match="failed: OutOfMemoryError on cpu: CUDA out of memory"):
            self.run(ranks, Add(), Add())
        broken.unlink()

    def test_a_follower_that_is_killed_ends_the_run(self, ranks: Followers) -> None:
        with pytest.raises(RankError, match="rank 1 of 3 has died"):
            self.run(ranks, Add(), Trouble(happens=die), Add())

    def test_a_follower_that_hangs_ends_the_run(self, ranks: Followers) -> None:
        with pytest.raises(RankError, match="rank 1 of 3 has died or hangs"):
            self.run(ranks, Add(), Trouble(happens=hang))

    def test_a_follower_that_hangs_although_it_has_no_work_ends_the_next_run(self, ranks: Followers) -> None:
        self.run(ranks, Add(), Add())
        followers_of(os.getpid())[0].suspend()
        with pytest.raises(RankError, match="rank 1 of 3 has died or hangs"):
            self.run(ranks, Add(), Add(), Add())

    def test_a_follower_that_died_while_it_had_no_work_is_replaced_before_it_has(self, ranks: Followers) -> None:
        expected = self.run(ranks, Add(), Add(), Add())
        first, second = multiprocessing.active_children()
        first.kill()
        first.join()
        assert self.run(ranks, Add(), Add(), Add()) == expected
        assert second not in multiprocessing.active_children()
        assert len(multiprocessing.active_children()) == 2


def test_followers_end_with_a_rank_0_that_is_killed_whatever_they_are_at() -> None:
    script = "from infinitetalk.parallel import *; from tests.toy_ranks import *; Followers(load_forever, 2).wait()"
    with subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "loading\n"
        (follower,) = followers_of(leader.pid)
        leader.kill()
    follower.wait(30)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"GPU 100 was asked for, and this machine has \d"):
        device_of(99, "cuda")


class TestTheRunner:
    """The service's, with AVATAR_GPUS."""

    @pytest.fixture
    def voice_file(self, tmp_path: Path) -> Path:
        """Long enough for two clips."""
        soundfile.write(tmp_path / "voice.wav", voice(100), 16000)
        return tmp_path / "voice.wav"

    def test_makes_the_same_video_with_several_even_if_one_dies(
        self, snapshots: Path, pipeline: InfiniteTalkPipeline, voice_file: Path, tmp_path: Path
    ) -> None:
        settings = ServiceSettings(home=tmp_path, device="cpu", gpus=2)
        store = JobStore(settings.database, JobSettings(backoff=0.01))
        request = VideoRequest(prompt="A woman talks.", size="64x64", steps=2)
        portrait = REPOSITORY / "examples" / "portrait.png"
        files = {"image": partial(shutil.copyfile, portrait), "audio": partial(shutil.copyfile, voice_file)}

        def submit(job_id: str) -> Path:
            folder = settings.job_folder(job_id)
            store.submit(lay_down(request, files, folder, 60, "image"), job_id=job_id)
            return folder

        def run_next(ranks: InfiniteTalkPipeline) -> Job:
            with eventually(lambda: store.claim("runner"), seconds=PATIENCE) as claim:
                assert run(claim, ranks, open_storage(settings), Shutdown())
            return store.get(claim.job.id)

        def video_of(job: Job) -> bytes:
            assert job.result is not None, job.error
            return (settings.job_folder(job.id) / str(job.result["video"])).read_bytes()

        submit("one")
        expected = video_of(run_next(pipeline))
        folder = submit("several")
        wan, infinitetalk = snapshots / "Wan2.1-I2V-14B-480P", snapshots / "InfiniteTalk"
        together = load_for_runner(wan, infinitetalk, snapshots / "chinese-wav2vec2-base", settings, None)
        forwards: list[object] = []

        def kill_in_the_second_clip(*_: object) -> None:
            forwards.append(1)
            if len(forwards) == 3:
                multiprocessing.active_children()[0].kill()

        together.transformer.register_forward_hook(kill_in_the_second_clip)
        with closing(together.ranks):
            job = run_next(together)
            assert (job.state, len(store.clips(job.id))) == ("queued", 1)
            assert job.error is not None
            assert "RankError" in job.error["message"]
            assert video_of(run_next(together)) == expected
        assert not list(folder.glob("clip-*"))

    def test_leaves_no_process_behind_when_it_is_killed(
        self,
        bento_home: Path,
        voice_file: Path,
        tmp_path: Path,
    ) -> None:
        with Served(tmp_path, bento_home=bento_home, gpus=2, device="cpu") as server:
            assert (
                generate_over_http(server, voice_file, size="64x64", steps="1", max_seconds="0.04").status_code == 200
            )
            (follower,) = followers_of(server.process("avatar_runner").pid)
            server.kill("avatar_runner")
            follower.wait(30)
