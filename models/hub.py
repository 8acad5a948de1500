"""The Hugging Face hub: what a repository holds, its files' bytes, and what it means where the hub refuses.

What may pass is tried again; whatever remains is an ImportRefusedError of one line that says what to do.
"""

import functools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import (
    HfApi,
    RepoFile,
    constants,
    get_hf_file_metadata,
    get_session,
    get_token,
    hf_hub_url,
    hf_raise_for_status,
)
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    logging,
    parse_ratelimit_headers,
)

from models.console import say
from models.store import READ_BYTES, Advance, File, ImportRefusedError, Model, new_digest, sync

RETRIES = 5  # of one request in a row; of a file, without a byte in between
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between retries, doubling, unless the hub says how long
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP statuses that may pass

Result = TypeVar("Result")

logging.set_verbosity_error()  # what goes wrong is said here


# What there is.


def head_of(repository: str, revision: str) -> str:
    """The commit that a revision names now."""
    return str(ask_hub(lambda: HfApi().model_info(repository, revision=revision), repository).sha)


def files_of(repository: str, commit: str) -> list[File]:
    """All files of a commit."""

    def list_files() -> list[File]:
        return [
            File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.xet_hash)
            for entry in HfApi().list_repo_tree(repository, revision=commit, recursive=True)
            if isinstance(entry, RepoFile)
        ]

    return ask_hub(list_files, repository, retries=0)  # the library tries again by itself


def check_token() -> None:
    """Raises ImportRefusedError where a token is set that the hub does not know. The token itself is never shown."""
    token = get_token()
    if token is None:
        return
    origin = "The token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "The token that `hf auth login` saved"
    remedy = f"make one with read permission on {constants.ENDPOINT}/settings/tokens, or unset it."
    if not re.fullmatch("[!-~]+", token):
        raise ImportRefusedError(f"{origin} has characters that no token has: {remedy}")
    try:
        ask_hub(HfApi().whoami, "the token")
    except ImportRefusedError as error:
        if status_of(error.__cause__) in (401, 403):
            raise ImportRefusedError(f"{origin} is not valid ({status_of(error.__cause__)}): {remedy}") from error
        raise


def check_access(model: Model, file: File) -> None:
    """Raises ImportRefusedError where the hub lists a repository's files but does not hand them out."""
    url = hf_hub_url(model.repository, file.path, revision=model.commit)
    ask_hub(lambda: get_hf_file_metadata(url), model.repository)


# A file's bytes.


def download(model: Model, file: File, part: Path, advance: Advance) -> None:
    """Fetch a file of the hub into `part`, on from where an earlier attempt has ended.

    huggingface_hub's own download forgets a file that the end of the process has cut off, here perhaps 19 GB of 20.
    So only the bytes come through its session and its xet library; the file on the disk is ours.
    """
    where, failures, wrong = f"{model.repository}/{file.path}", 0, False
    with part.open("a+b") as content:
        if content.tell() > file.size:
            content.truncate(0)
        content.seek(0)
        digest = new_digest(file)
        while chunk := content.read(READ_BYTES):
            digest.update(chunk)
        while True:
            try:
                if content.tell() < file.size:
                    for chunk in bytes_from_hub(model, file, content.tell()):
                        content.write(chunk)
                        digest.update(chunk)
                        advance(len(chunk))
                        failures = 0
                if content.tell() < file.size:
                    raise ConnectionError(f"cut off after {content.tell()} of {file.size} bytes")
            except (httpx2.HTTPError, ConnectionError) as error:
                failures += 1
                wait_or_give_up(error, failures, RETRIES, where)
                continue
            if digest.hexdigest() == file.digest:
                return sync(content)
            if wrong:
                raise ImportRefusedError(
                    f"{where} came with a wrong checksum twice: something on the way, such as a proxy or a mirror "
                    "(HF_ENDPOINT), changes it; go without and run the same command again."
                )
            say(f"{where}: wrong checksum; fetching it once more.")
            wrong = True
            advance(-content.tell())
            content.truncate(0)
            content.seek(0)
            digest = new_digest(file)


def bytes_from_hub(model: Model, file: File, start: int) -> Iterator[bytes]:
    """A file's content from byte `start` on; it may end early, or raise httpx2.HTTPError or ConnectionError."""
    if file.xet is not None and not constants.HF_HUB_DISABLE_XET:
        yield from bytes_from_xet(model, file, start)
        return
    headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    url = hf_hub_url(model.repository, file.path, revision=model.commit)
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else start  # a server that sends the whole, whatever is asked for
        for chunk in response.iter_bytes():
            if skip < len(chunk):
                yield chunk[skip:]
            skip = max(0, skip - len(chunk))


def bytes_from_xet(model: Model, file: File, start: int) -> Iterator[bytes]:
    import hf_xet  # type: ignore[import-untyped]

    try:
        with one_connects:
            group = xet_downloads(model.repository, model.commit)
        yield from group.download_stream(hf_xet.XetFileInfo(file.xet, file.size), start=start)
    except Exception as error:  # the library documents none of them
        raise ConnectionError(f"xet storage: {first_line(error)} (HF_HUB_DISABLE_XET=1 does without)") from error


one_connects = threading.Lock()


@functools.cache
def xet_downloads(repository: str, commit: str) -> Any:
    """The connection to xet storage that a repository's files share, with a token for it that renews itself."""
    import hf_xet

    url = f"{constants.ENDPOINT}/api/models/{repository}/xet-read-token/{commit}"
    return hf_xet.XetSession().new_download_stream_group(
        token_refresh_url=url, token_refresh_headers=build_hf_headers()
    )


# Asking, and what refusals mean.


def ask_hub(question: Callable[[], Result], subject: str, retries: int = RETRIES) -> Result:
    """The hub's answer. What may pass is tried again, anything else raises ImportRefusedError."""
    failures = 0
    while True:
        try:
            return question()
        except (httpx2.HTTPError, ConnectionError) as error:
            failures += 1
            wait_or_give_up(error, failures, retries, subject)
        except (ValueError, KeyError, TypeError) as error:
            raise ImportRefusedError(
                f"{subject}: {constants.ENDPOINT} does not answer as a hub does ({first_line(error)}): "
                "check HF_ENDPOINT, and whether a proxy wants a login."
            ) from error


def wait_or_give_up(error: Exception, failures: int, retries: int, subject: str) -> None:
    """Sleep as long as the hub says, or ever longer; raises ImportRefusedError where trying again has no point."""
    status = status_of(error)
    final = isinstance(error, OfflineModeIsEnabled) or (status is not None and status not in TRANSIENT)
    if final or failures > retries:
        raise ImportRefusedError(explain(error, subject)) from error
    seconds = wait_asked_for(error) or min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
    reason = f"the hub answers {status}" if status is not None else first_line(error)
    say(f"{subject}: {reason}; trying again in {seconds:g} s ({failures} of {retries})")
    time.sleep(seconds)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status, of an error that is an answer."""
    response = getattr(error, "response", None)
    return response.status_code if response is not None else None


def wait_asked_for(error: Exception) -> float | None:
    """Seconds that an answer of the hub says to wait."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    if headers.get("Retry-After", "").isdigit():
        return float(headers["Retry-After"])
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def explain(error: Exception, subject: str) -> str:
    """One line: what is wrong with a repository or a file of one, and what to do."""
    status, hub = status_of(error), constants.ENDPOINT
    page = f"{hub}/{'/'.join(subject.split('/')[:2])}"
    set_token = f"set HF_TOKEN to a token from {hub}/settings/tokens"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the hub is needed: unset it, or import from a folder with --source."
    if isinstance(error, GatedRepoError):
        return f"{subject} is gated ({status}): accept its terms on {page} and {set_token} of the same account."
    if isinstance(error, RevisionNotFoundError):
        return f"{subject} has no such revision ({status}): correct it in models/snapshots.toml or after --lora."
    if status == 401 and get_token() is None:
        return f"{subject}: the hub demands a token (401), or has no such repository: {set_token}."
    if status in (401, 403):
        return f"{subject}: the token gives no access ({status}): see {page}, and {set_token} with read permission."
    if status == 404:
        remedy = f"correct it in models/snapshots.toml or after --lora, or {set_token} if it is private."
        return f"{subject} is not on {hub} (404): {remedy}"
    if status == 429:
        return f"{subject}: the hub limits requests (429), after {RETRIES} retries too: wait a while, or {set_token}."
    if status is not None:
        return f"{subject}: the hub answers {status}: wait a while; the same command goes on from here."
    return (
        f"{subject}: {first_line(error)}, after {RETRIES} retries too: check the network, the proxy and HF_ENDPOINT "
        f"({hub}); the same command goes on from here. Without a network there is --source."
    )


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
