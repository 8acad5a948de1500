"""What is old goes: finished videos after their time, or sooner where the disk is short. Never one in the making."""

import logging
import threading
import time
from collections.abc import Iterator

from avatar_api.database import OUTAGES
from avatar_api.jobs import FINISHED, Job, JobNotFinishedError, JobNotFoundError, JobStore
from avatar_api.logs import of_job
from avatar_api.settings import ServiceSettings
from avatar_api.storage import Storage, StorageError

logger = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
ORPHAN_SECONDS = 24 * 3600.0
"""A folder that no job has, and that nobody has touched for so long, was left by a process that died submitting."""


class Housekeeper:
    """Cleans up now and then, from a thread of the API process. Several at once do no harm."""

    def __init__(self, store: JobStore, storage: Storage, settings: ServiceSettings) -> None:
        self._store, self._storage, self._settings = store, storage, settings
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="housekeeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping.wait(EVERY_SECONDS):
            try:
                self.clean()
            except (*OUTAGES, StorageError, OSError) as error:
                logger.warning("cleaning up is put off: %s", error)

    def clean(self) -> None:
        """Delete what is too old, then the oldest while there is too much, then folders that nobody owns."""
        latest = time.time() - self._settings.keep_days * 24 * 3600
        for job in self._finished():
            if job.finished_at is not None and job.finished_at < latest:
                self._delete(job, f"finished more than {self._settings.keep_days:g} days ago")
        if self._settings.keep_bytes is not None:
            sizes = {job.id: self._storage.size(job.id) for job in self._store.all()}
            total = sum(sizes.values())
            for job in self._finished():
                if total <= self._settings.keep_bytes:
                    break
                total -= sizes.get(job.id, 0)
                if not self._storage.forget(job.id):  # with a bucket the folder is a cache
                    self._delete(job, f"the videos take more than {self._settings.keep_bytes} bytes")
        for folder in self._storage.jobs(ORPHAN_SECONDS):
            try:
                self._store.get(folder)
            except JobNotFoundError:
                self._storage.delete(folder)

    def _finished(self) -> Iterator[Job]:
        """The finished jobs, the oldest first."""
        return (job for job in self._store.all() if job.state in FINISHED)

    def _delete(self, job: Job, reason: str) -> None:
        try:
            self._store.delete(job.id)
        except (JobNotFoundError, JobNotFinishedError):
            return
        self._storage.delete(job.id)
        with of_job(job.id):
            logger.info("job %s: deleted: %s", job.id, reason)
