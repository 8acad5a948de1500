"""`scripts/jobs.py`, as an operator types it, and running a job again, which it is there for."""

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from avatar_api.jobs import Job, JobNotFailedError, JobNotFoundError, JobSettings, JobStore, LeaseLost
from avatar_api.settings import ServiceSettings
from scripts import jobs as command
from tests.databases import Database, database_fixture, postgres_fixture

__all__ = ["database_fixture", "postgres_fixture"]

QUICK = JobSettings(lease=5, beat=0.1, poll=0.05)
ERROR = {"type": "server_error", "code": "generation_failed", "message": "It broke.", "param": None}
HOOK = "https://example.com/hook?token=1"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    """The one that the command finds by the environment."""
    monkeypatch.setenv("AVATAR_HOME", str(tmp_path))
    with closing(JobStore(ServiceSettings().database, QUICK)) as store:
        yield store


def submit(store: JobStore, client: str = "alice") -> Job:
    job = store.submit({"request": {"prompt": "[bold]", "webhook_url": HOOK}}, client=client, webhook_url=HOOK)
    folder = ServiceSettings().job_folder(job.id)
    folder.mkdir(parents=True)
    (folder / "audio").write_bytes(bytes(1_000_000))
    return job


def run(store: JobStore, job: Job, end: str, clips: int = 0) -> None:
    """What a runner does, up to that end."""
    claim = store.claim("runner")
    assert claim is not None
    assert claim.job.id == job.id
    with claim:
        for index in range(len(claim.clips), len(claim.clips) + clips):
            claim.finish_clip(index, {"segment": f"clip-{index}.mp4", "state": None, "frames": 81})
        if end == "failed":
            claim.fail(ERROR, retry=False)
        elif end == "cancelled":
            store.cancel(job.id)
            claim.cancelled()
        else:
            claim.complete({"video": "video.1.mp4"})


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, and what was printed and complained of."""
    try:
        status = command.main(arguments)
    except SystemExit as exit_:
        print(exit_.code)
        status = 1
    said = capsys.readouterr()
    return status, said.out, said.err


class TestRunningAgain:
    @pytest.mark.parametrize("end", ["failed", "cancelled"])
    def test_a_job_goes_on_after_its_last_finished_clip(self, database: Database, end: str) -> None:
        with closing(JobStore(database.url, QUICK)) as store:
            job = store.submit({"request": {}}, webhook_url=HOOK)
            run(store, job, end, clips=2)
            ended = store.get(job.id).finished_at
            again = store.retry(job.id, HOOK)
            assert (again.state, again.error, again.finished_at, again.attempts) == ("queued", None, None, 0)
            assert not again.cancel_requested
            claim = store.claim("another")
            assert claim is not None
            with claim:
                claim.check()
                assert [clip.index for clip in claim.clips] == [0, 1]
                assert claim.epoch > 1, "its files are not mistaken for the first run's"
                claim.complete({"video": "video.2.mp4"})
            told = store.get(job.id)
            assert told.state == "completed"
            assert told.finished_at is not None
            assert ended is not None
            assert told.finished_at > ended, "the webhook's id is made of it"

    def test_its_webhook_is_sent_again(self, database: Database) -> None:
        with closing(JobStore(database.url, QUICK)) as store:
            job = store.submit({"request": {}}, webhook_url=HOOK)
            run(store, job, "failed")
            assert store.next_webhook(60) is not None
            store.webhook_sent(job.id, None)
            store.retry(job.id, HOOK)
            assert store.next_webhook(60) is None, "not before it has ended"
            run(store, job, "completed")
            told = store.next_webhook(60)
            assert told is not None
            assert (told.webhook_url, told.state, told.webhook_attempts) == (HOOK, "completed", 1)

    def test_it_has_all_its_attempts_again(self, store: JobStore) -> None:
        job = submit(store)
        run(store, job, "failed")
        store.retry(job.id)
        claim = store.claim("runner")
        assert claim is not None
        with claim:
            assert claim.fail(ERROR, retry=True) == "queued"

    def test_a_runner_given_up_for_dead_has_no_part_in_it(self, store: JobStore) -> None:
        job = submit(store)
        claim = store.claim("runner")
        assert claim is not None
        claim.__exit__(None, None, None)  # its heart stands still
        store.reclaim("runner")
        assert store.cancel(job.id).state == "cancelled"
        store.retry(job.id)
        with pytest.raises(LeaseLost):
            claim.fail(ERROR, retry=True)

    @pytest.mark.parametrize("state", ["queued", "in_progress", "completed"])
    def test_no_other_job_can_be(self, store: JobStore, state: str) -> None:
        job = submit(store)
        if state == "completed":
            run(store, job, state)
        claim = store.claim("runner") if state == "in_progress" else None
        with pytest.raises(JobNotFailedError, match=f"is {state}; only a failed or cancelled one"):
            store.retry(job.id)
        if claim is not None:
            claim.__exit__(None, None, None)
        with pytest.raises(JobNotFoundError):
            store.retry("none")


class TestCommand:
    def test_list_shows_the_newest_first_and_filters(self, store: JobStore, capsys: pytest.CaptureFixture[str]) -> None:
        failed = submit(store)
        run(store, failed, "failed")
        waiting = submit(store, client="bob")
        status, out, _ = call(capsys, "list")
        assert status == 0
        assert out.index(waiting.id) < out.index(failed.id)
        assert "generation_failed" in out
        assert "1 queued, 0 in_progress, 0 completed, 1 failed, 0 cancelled" in out
        ids = [
            [json.loads(line)["id"] for line in call(capsys, "list", "--json", *which)[1].splitlines()]
            for which in (("--state", "failed"), ("--client", "bob"), ("--limit", "1"), ("--state", "completed"))
        ]
        assert ids == [[failed.id], [waiting.id], [waiting.id], []]

    def test_list_goes_beyond_a_page(
        self, store: JobStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(command, "PAGE", 2)
        made = [store.submit({}).id for _ in range(5)]
        out = call(capsys, "list", "--json", "--limit", "4")[1]
        assert [json.loads(line)["id"] for line in out.splitlines()] == made[:0:-1]

    def test_show_tells_all_of_a_job(self, store: JobStore, capsys: pytest.CaptureFixture[str]) -> None:
        job = submit(store)
        run(store, job, "failed", clips=2)
        out = call(capsys, "show", job.id)[1]
        for told in (job.id, "It broke.", '"[bold]"', "2 finished clips, 1 files", "audio  1.0 MB"):
            assert told in out
        record = json.loads(call(capsys, "show", job.id, "--json")[1])
        assert record["spec"] == job.spec
        assert record["error"] == ERROR
        assert [clip["index"] for clip in record["clips"]] == [0, 1]
        assert record["files"] == {"audio": 1_000_000}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["finished_at"])

    def test_cancel_and_retry_take_several_and_name_what_they_could_not_do(
        self, store: JobStore, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first, second = submit(store), submit(store)
        status, out, err = call(capsys, "cancel", first.id, "none", second.id)
        assert status == 1
        assert out.splitlines() == [f"{first.id}: cancelled", f"{second.id}: cancelled"]
        assert err == "error: none: There is no job 'none'.\n"
        status, out, _ = call(capsys, "retry", first.id)
        assert (status, out) == (0, f"{first.id}: queued, goes on after 0 finished clips, webhook again\n")
        assert store.get(first.id).webhook_url == HOOK
        run(store, first, "completed")
        status, _, err = call(capsys, "retry", first.id)
        assert status == 1
        assert "is completed; only a failed or cancelled one can be run again" in err

    def test_purge_deletes_only_old_ended_jobs_and_only_when_told_to(
        self, store: JobStore, capsys: pytest.CaptureFixture[str]
    ) -> None:
        failed, done = submit(store), submit(store)
        run(store, failed, "failed")
        run(store, done, "completed")
        waiting = submit(store)
        assert "0 jobs" in call(capsys, "purge", "--older-than", "1", "--yes")[1]
        status, out, _ = call(capsys, "purge", "--older-than", "0", "--state", "failed")
        assert (status, out.splitlines()[0]) == (0, "1 jobs that ended more than 0 days ago, 1.0 MB on this machine.")
        assert "Nothing is deleted yet" in out
        assert store.counts() == {"queued": 1, "completed": 1, "failed": 1}
        call(capsys, "purge", "--older-than", "0", "--state", "failed", "--yes")
        assert store.counts() == {"queued": 1, "completed": 1}
        call(capsys, "purge", "--older-than", "0", "--yes")
        assert [job.id for job in store.all()] == [waiting.id]
        assert [folder.name for folder in ServiceSettings().job_folder("_").parent.iterdir()] == [waiting.id]

    @pytest.mark.parametrize(
        ("variable", "value", "complaint"),
        [
            ("AVATAR_HOME", "/nowhere", "there is no database /nowhere/jobs.db; set AVATAR_HOME"),
            ("AVATAR_DATABASE_URL", "postgresql://u:secret@127.0.0.1:1/x", "the database does not answer"),
            ("AVATAR_DATABASE_URL", "secret", "AVATAR_DATABASE_URL is no SQLAlchemy URL"),
            ("AVATAR_DATABASE_URL", "mysql://u:secret@host/x", "mysql:// is not supported"),
            ("AVATAR_KEEP_DAYS", "0", "AVATAR_KEEP_DAYS: Input should be greater than 0"),
        ],
    )
    def test_wrong_settings_are_named_and_no_secret_shown(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        variable: str,
        value: str,
        complaint: str,
    ) -> None:
        monkeypatch.setenv(variable, value)
        status, out, err = call(capsys, "list")
        assert status == 1
        assert out.startswith("error: ")
        assert complaint in out
        assert "secret" not in out + err

    @pytest.mark.parametrize(
        "arguments",
        [(), ("list", "--state", "done"), ("purge",), ("purge", "--older-than", "-1"), ("list", "--limit", "0")],
    )
    def test_wrong_arguments_are_refused(self, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            command.main(arguments)
        assert "usage:" in capsys.readouterr().err
