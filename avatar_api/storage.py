"""Where jobs' files live: in this machine's folder, or in a bucket that several machines share.

With a bucket the folder is a cache of it. A file is written into the folder first, then published, and only then may
the database know of it; whoever needs it elsewhere obtains it. A name stands for the same content for ever (what
runners make carries their epoch), so a file that lies in the folder is never compared with the bucket's.
"""

import errno
import fcntl
import hashlib
import mimetypes
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NotConnectedError
from botocore.parsers import ResponseParserError
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from avatar_api.settings import ServiceSettings

PART_BYTES = 16 * 2**20  # a larger file is uploaded in such parts, each repeated on its own if it fails
CHUNK_BYTES = 2**20  # what is read of a download at a time
FILES_AT_ONCE = 8
PARTS_AT_ONCE = 4
ATTEMPTS = 5  # of a request, within a second, or 15 if the bucket is overloaded; and of a download that breaks off
CONNECT_SECONDS, ANSWER_SECONDS = 5, 30  # after which an attempt is given up
WATCH_SECONDS = 0.2  # how often a transfer's caller hears of it

CREDENTIALS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary ones, AWS_SESSION_TOKEN"
RIGHTS = "s3:ListBucket, GetObject, PutObject, DeleteObject, ListBucketMultipartUploads and AbortMultipartUpload"
REFUSED_KEY = f"it refuses the credentials; check {CREDENTIALS}"
OTHER_REGION = "it is in another region; set AWS_DEFAULT_REGION to the bucket's"
DENIED = f"access is denied; the credentials need {RIGHTS}"
NO_BUCKET = "there is no such bucket; check AVATAR_S3_BUCKET and AVATAR_S3_ENDPOINT_URL"
NO_SERVICE = "what answers there is not an S3 service; check AVATAR_S3_ENDPOINT_URL"

REMEDIES = {
    "NoSuchBucket": NO_BUCKET,
    "404": NO_SERVICE,  # S3's own answers have a name
    "405": NO_SERVICE,
    "NoSuchKey": "the file is not there; see whether a lifecycle rule or somebody else deletes files from the bucket",
    "AccessDenied": DENIED,
    "403": DENIED,
    "InvalidAccessKeyId": REFUSED_KEY,
    "SignatureDoesNotMatch": REFUSED_KEY,
    "ExpiredToken": REFUSED_KEY,
    "InvalidToken": REFUSED_KEY,
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": OTHER_REGION,
    "AuthorizationHeaderMalformed": OTHER_REGION,
}
AWAY = {429, 500, 502, 503, 504}

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

OnBytes = Callable[[int], object]
"""Called with the bytes that a transfer has moved so far, several times a second, also while nothing moves. It runs in
the thread that asked for the transfer, and what it raises ends the transfer."""


class StorageError(RuntimeError):
    """A file cannot be kept or had. The message says where, why and what to check, and holds no secret.

    `away`: the bucket is out of reach or overloaded, so the same may work later.
    """

    def __init__(self, message: str, away: bool = False) -> None:
        super().__init__(message)
        self.away = away


def may_pass(error: Exception) -> bool:
    """Is it the bucket that is away, or the disk that is full? Then the same may work later."""
    return error.away if isinstance(error, StorageError) else isinstance(error, OSError) and error.errno in DISK_FULL


def open_storage(settings: ServiceSettings) -> "Storage":
    """What the settings ask for. The bucket is not asked for anything yet: `check` does that. Raises StorageError."""
    return S3Storage(settings, settings.s3_bucket) if settings.s3_bucket else Storage(settings)


class Storage:
    """The folder alone. Like the bucket, safe to use from several threads and processes."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings

    def check(self) -> None:
        """Ask once, at start, whether files can be kept, read and deleted. Raises StorageError."""

    def folder(self, job_id: str) -> Path:
        """A job's folder on this machine, made if missing."""
        folder = self._folder(job_id)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def publish(self, job_id: str, *names: str, on_bytes: OnBytes | None = None) -> None:
        """Make files of the folder outlast a power cut, and let other machines have them. Raises StorageError."""
        folder = self.folder(job_id)
        for name in names:
            _sync(folder / _safe(name))
        _sync(folder)

    def obtain(self, job_id: str, *names: str, on_bytes: OnBytes | None = None) -> None:
        """See that published files are in the folder; each appears there whole. Raises StorageError."""
        for name in names:
            file = self._folder(job_id) / _safe(name)
            if not file.exists():
                remedy = "if another machine made it, let the machines share a bucket (AVATAR_S3_BUCKET)"
                raise StorageError(f"{file} is not there; {remedy}.")

    def link(self, job_id: str, name: str, filename: str) -> str | None:
        """Where anybody may download a file as `filename`, for `s3_link_seconds`. None: serve it from the folder."""
        return None

    def discard(self, job_id: str, beginning: str) -> None:
        """Delete the files of a job whose names begin so, everywhere. Raises StorageError."""
        for file in self._folder(job_id).glob(f"{_safe(beginning)}*"):
            file.unlink(missing_ok=True)

    def delete(self, job_id: str) -> None:
        """Delete all files of a job, everywhere; once or again. Raises StorageError, and then there is a folder."""
        self._remove_folder(job_id)

    def forget(self, job_id: str) -> bool:
        """Make room on this machine: remove the folder, if what was published can be had again. Whether it can."""
        return False

    def jobs(self, untouched_seconds: float = 0) -> list[str]:
        """The jobs with a folder on this machine that nothing was written to for so long."""
        before = time.time() - untouched_seconds
        folders = self._settings.job_folder("_").parent.glob("*/")
        return sorted(folder.name for folder in folders if all(file.st_mtime <= before for file in _stats(folder)))

    def names(self, job_id: str) -> list[str]:
        """A job's files, whichever machine published them. Raises StorageError."""
        return sorted(file.name for file in self._folder(job_id).glob("*"))

    def size(self, job_id: str) -> int:
        """Bytes of a job's files on this machine."""
        return sum(file.st_size for file in _stats(self._folder(job_id)) if stat.S_ISREG(file.st_mode))

    def _folder(self, job_id: str) -> Path:
        return self._settings.job_folder(_safe(job_id))

    def _remove_folder(self, job_id: str) -> None:
        folder = self._folder(job_id)
        while folder.exists():
            try:
                shutil.rmtree(folder)
            except OSError as error:  # somebody else deletes it too, or writes a last file into it
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise


class S3Storage(Storage):
    """A bucket, and the folder as its cache. In the bucket, a job's files are `<s3_prefix><job id>/<name>`.

    Credentials and region come from where boto3 looks for them: the environment, its files, the machine's role.
    """

    def __init__(self, settings: ServiceSettings, bucket: str) -> None:
        super().__init__(settings)
        self._bucket = bucket
        self._open(None)

    def check(self) -> None:
        probe = f"{self._settings.s3_prefix}check-{secrets.token_hex(8)}"
        with self._explained(probe):
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=probe)
            if self._settings.s3_endpoint_url is None:  # Amazon refuses links that are signed for another region
                self._open(self._client.head_bucket(Bucket=self._bucket)["BucketRegion"])
            self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=probe)
            self._client.put_object(Bucket=self._bucket, Key=probe, Body=b"")
            self._client.get_object(Bucket=self._bucket, Key=probe)
            self._client.delete_object(Bucket=self._bucket, Key=probe)

    def publish(self, job_id: str, *names: str, on_bytes: OnBytes | None = None) -> None:
        super().publish(job_id, *names)
        self._transfer(self._upload, job_id, names, on_bytes)

    def obtain(self, job_id: str, *names: str, on_bytes: OnBytes | None = None) -> None:
        self.folder(job_id)
        self._transfer(self._download, job_id, names, on_bytes)

    def link(self, job_id: str, name: str, filename: str) -> str | None:
        key = self._key(job_id, name)
        request = {
            "Bucket": self._bucket,
            "Key": key,
            "ResponseContentType": mimetypes.guess_type(filename)[0] or "application/octet-stream",
            "ResponseContentDisposition": f'attachment; filename="{_safe(filename)}"',
        }
        with self._explained(key):
            return str(self._client.generate_presigned_url("get_object", request, self._settings.s3_link_seconds))

    def discard(self, job_id: str, beginning: str) -> None:
        self._delete_keys(self._key(job_id, beginning))
        super().discard(job_id, beginning)

    def delete(self, job_id: str) -> None:
        self.folder(job_id)  # if the bucket does not answer, `jobs` shows what is left to delete
        self._delete_keys(self._key(job_id))
        super().delete(job_id)

    def forget(self, job_id: str) -> bool:
        self._remove_folder(job_id)
        return True

    def names(self, job_id: str) -> list[str]:
        beginning = self._key(job_id)
        with self._explained(beginning):
            return sorted(key.removeprefix(beginning) for key in self._keys(beginning))

    def _open(self, region: str | None) -> None:
        endpoint = self._settings.s3_endpoint_url
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if endpoint else "auto"},
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=ANSWER_SECONDS,
            max_pool_connections=FILES_AT_ONCE + PARTS_AT_ONCE,
            # Many S3-compatible services do not know the checksums that boto3 sends otherwise; ours is metadata.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            with self._explained(self._settings.s3_prefix):
                self._client = boto3.Session().client("s3", region_name=region, endpoint_url=endpoint, config=config)
        except ValueError as error:
            raise StorageError("AVATAR_S3_ENDPOINT_URL is not an address; it looks like https://host:port.") from error
        self._uploads = TransferManager(
            self._client, TransferConfig(PART_BYTES, PART_BYTES, max_request_concurrency=PARTS_AT_ONCE)
        )

    def _key(self, job_id: str, name: str | None = None) -> str:
        return f"{self._settings.s3_prefix}{_safe(job_id)}/{'' if name is None else _safe(name)}"

    def _transfer(
        self,
        move: Callable[[str, str, "_Transfer"], None],
        job_id: str,
        names: Iterable[str],
        on_bytes: OnBytes | None,
    ) -> None:
        """Move several files at once, and let the caller know how far it is. The first error ends it."""
        transfer, pool = _Transfer(), ThreadPoolExecutor(FILES_AT_ONCE)
        try:
            moving = {pool.submit(move, job_id, name, transfer) for name in names}
            while moving:
                done, moving = wait(moving, WATCH_SECONDS, FIRST_EXCEPTION)
                for file in done:
                    file.result()
                if on_bytes is not None:
                    on_bytes(transfer.moved)
        finally:
            transfer.ended.set()
            pool.shutdown(wait=False, cancel_futures=True)  # a thread may be waiting for the bucket: not we

    def _upload(self, job_id: str, name: str, transfer: "_Transfer") -> None:
        key, file = self._key(job_id, name), self._folder(job_id) / name
        with file.open("rb") as content:
            metadata = {"sha256": hashlib.file_digest(content, "sha256").hexdigest()}
        progress = _Progress(transfer)
        with self._explained(key):
            upload = self._uploads.upload(str(file), self._bucket, key, {"Metadata": metadata}, [progress])
            while not progress.done.wait(WATCH_SECONDS):
                if transfer.ended.is_set():
                    upload.cancel()
                    return
            upload.result()

    def _download(self, job_id: str, name: str, transfer: "_Transfer") -> None:
        """Into `<name>.part`, which gets its name when it is whole. Who holds its lock downloads, others wait."""
        file = self._folder(job_id) / _safe(name)
        part = file.with_name(f"{name}.part")
        while not file.exists():
            with part.open("ab") as content:
                if not _lock(content):
                    if transfer.ended.wait(WATCH_SECONDS):
                        return
                elif file.exists():  # the one before us has just finished
                    part.unlink(missing_ok=True)
                elif not self._fetch(self._key(job_id, name), content, transfer):
                    return
                else:
                    os.fsync(content.fileno())
                    part.replace(file)

    def _fetch(self, key: str, content: BinaryIO, transfer: "_Transfer") -> bool:
        """Fill a file and check it. False: the transfer has ended meanwhile."""
        with self._explained(key):
            for further in reversed(range(ATTEMPTS)):
                content.truncate(0)
                answer = self._client.get_object(Bucket=self._bucket, Key=key)
                digest = hashlib.sha256()
                try:
                    for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                        content.write(chunk)
                        digest.update(chunk)
                        transfer.add(len(chunk))
                        if transfer.ended.is_set():
                            return False
                    break
                except (HTTPClientError, IncompleteReadError):
                    if not further or transfer.ended.is_set():
                        raise
        content.flush()
        if digest.hexdigest() != answer["Metadata"].get("sha256"):
            content.truncate(0)
            raise StorageError(f"{self._place(key)}: the content is not what was published; has somebody replaced it?")
        return True

    def _delete_keys(self, beginning: str) -> None:
        """One by one: deleting many at once needs a checksum of a kind on which services do not agree."""
        client, bucket = self._client, self._bucket
        with self._explained(beginning):
            for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=beginning):
                for upload in page.get("Uploads", ()):  # of runners that were killed
                    with suppress(client.exceptions.NoSuchUpload):
                        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                list(pool.map(lambda key: client.delete_object(Bucket=bucket, Key=key), self._keys(beginning)))

    def _keys(self, beginning: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=beginning)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def _place(self, key: str) -> str:
        endpoint = urlsplit(self._settings.s3_endpoint_url or "https://amazonaws.com")
        return f"{key} in bucket {self._bucket} at {endpoint.netloc.rpartition('@')[2] or endpoint.path}"

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError) as error:
            reason, away = _explain(error)
            raise StorageError(f"{self._place(key)}: {reason}.", away) from error


class _Transfer:
    """What several threads have moved together."""

    def __init__(self) -> None:
        self.moved = 0  # bytes
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.moved += count


class _Progress(BaseSubscriber):
    def __init__(self, transfer: _Transfer) -> None:
        self.done = threading.Event()
        self._transfer = transfer

    def on_done(self, **_: Any) -> None:
        self.done.set()

    def on_progress(self, bytes_transferred: int, **_: Any) -> None:
        self._transfer.add(bytes_transferred)  # less than 0 when a part starts again


def _explain(error: Exception) -> tuple[str, bool]:
    """What is wrong and what to do about it, and whether that is to wait. boto3's own messages hold addresses."""
    if isinstance(error, ClientError):
        code, status = str(error.response["Error"]["Code"]), error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status in AWAY or code == "RequestTimeout":
            known = "" if not code.isdecimal() else ", or not an S3 service; check AVATAR_S3_ENDPOINT_URL"
            return f"it is overloaded or out of order ({code}){known}", True
        return REMEDIES.get(code, f"it refuses ({code})"), False
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
        return f"there are no credentials ({type(error).__name__}); set {CREDENTIALS}", False
    if isinstance(error, NotConnectedError | HTTPClientError | IncompleteReadError):
        return f"no answer ({type(error).__name__}); check AVATAR_S3_ENDPOINT_URL and the network", True
    if isinstance(error, ResponseParserError):
        return NO_SERVICE, False
    return f"the settings make no sense ({type(error).__name__}); check AVATAR_S3_* and AWS_*", False


def _safe(name: str) -> str:
    """The ids of jobs and the names of their files are ours: nothing else may reach a path."""
    if not _SAFE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a job or of a file; letters, digits and _ - . make one.")
    return name


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed. False: somebody else has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stats(folder: Path) -> list[os.stat_result]:
    """Of a folder and its files; those that are deleted meanwhile have none."""
    found = []
    with suppress(FileNotFoundError):
        found.append(folder.stat())
        for file in folder.iterdir():
            with suppress(FileNotFoundError):
                found.append(file.stat())
    return found
