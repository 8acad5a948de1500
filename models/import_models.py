"""Import the three model snapshots into the Bento model store, from the Hugging Face hub or from a folder.

    python models/import_models.py                     everything, from the hub
    python models/import_models.py --profile runtime   only what serving reads
    python models/import_models.py --source DIR        from DIR/Wan2.1-I2V-14B-480P and so on
    python models/import_models.py --pin               write today's commits into models/snapshots.toml
    python models/import_models.py --lora OWNER/REPOSITORY/FILE
                                                       one LoRA, beside the snapshots

Stopped at any moment, the same command goes on where it was. docs/MODELS.md says more.
"""

import argparse
import errno
import fnmatch
import functools
import glob
import hashlib
import os
import re
import shutil
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from models.store import (
    LOCK,
    MODEL_YAML,
    PART,
    READ_BYTES,
    Advance,
    File,
    ImportRefusedError,
    Model,
    begin,
    fault,
    home,
    new_digest,
    place,
    read_lock,
    register,
    replace_text,
    sha256,
    sync,
    the_only_import,
)

SNAPSHOTS = Path(__file__).with_name("snapshots.toml")

LORA = "lora"  # the profile of a model that is one LoRA

WORKERS = 8  # files at a time
RETRIES = 5  # of one request in a row; of a file, without a byte in between
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between retries, doubling, unless the hub says how long
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP statuses that may pass

Result = TypeVar("Result")
console = Console()


@dataclass(frozen=True)
class Snapshot:
    """A repository on the hub, as models/snapshots.toml names it."""

    repository: str
    revision: str
    runtime: tuple[tuple[str, ...], ...]  # what serving reads: patterns, each with its alternatives

    @property
    def folder(self) -> str:
        return self.repository.rpartition("/")[2]

    @property
    def name(self) -> str:
        """In the Bento model store, which knows lower case only."""
        return self.folder.lower()

    @property
    def pinned(self) -> bool:
        return re.fullmatch("[0-9a-f]{40}", self.revision) is not None

    def complaint(self, alternatives: tuple[str, ...]) -> str:
        return f"lacks {' or '.join(alternatives)}, which serving reads: complete it"


@dataclass(frozen=True)
class LoraOnHub(Snapshot):
    """One file of a repository on the hub."""

    file: str

    @property
    def name(self) -> str:
        return lora_name(Path(self.file))

    def complaint(self, alternatives: tuple[str, ...]) -> str:
        return f"has no {self.file}: correct what --lora says"


def import_models(find: Callable[[], list[Model]], repair: bool) -> None:
    """`find`: what is to be imported, asked for when no other import can come in between."""
    with the_only_import():
        models = find()
        wanted = compare_with_store(models, repair)
        for model, files in wanted.items():
            if files and model.source is None:
                check_access(model, files[0])
        check_space(wanted)
        size = sum(map(size_of, wanted.values()))
        there = sum(bytes_there(model, files) for model, files in wanted.items())
        with byte_bar("Importing", size, there) as advance:
            for model, files in wanted.items():
                if files or read_lock(model.registered) is None:
                    begin(model)
                in_parallel([functools.partial(fetch, model, file) for file in files], advance)
                if files and model.profile == LORA:
                    check_lora(model)
                register(model)
                say(f"{model}: {decimal(size_of(model.files))}, every file verified, in {model.registered}")


# Which files: the list of snapshots, the hub's own list of files, or a folder's.


def read_snapshots(only: Sequence[str]) -> list[Snapshot]:
    """Those of models/snapshots.toml, or of them the ones that `only` names."""
    try:
        snapshots = [
            Snapshot(
                entry["repository"],
                entry["revision"],
                tuple((pattern,) if isinstance(pattern, str) else tuple(pattern) for pattern in entry["runtime"]),
            )
            for entry in tomllib.loads(SNAPSHOTS.read_text())["snapshot"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ImportRefusedError(f"{SNAPSHOTS} is not a list of snapshots: {error!r}.") from error
    names = [snapshot.name for snapshot in snapshots]
    for name in only:
        if name.lower() not in names:
            raise ImportRefusedError(f"--only {name}: there is no such model; there are {', '.join(names)}.")
    return [snapshot for snapshot in snapshots if not only or snapshot.name in map(str.lower, only)]


def find_snapshots(snapshots: Sequence[Snapshot], source: Path | None, profile: str) -> list[Model]:
    """On the hub, or in the folder `source`."""
    if source is not None:
        return models_in_folder(source, snapshots, profile)
    check_token()
    models = [model_on_hub(snapshot, profile) for snapshot in snapshots]
    if not all(snapshot.pinned for snapshot in snapshots):
        say(f"Branches move: --pin writes the commits of today into {SNAPSHOTS.name}.")
    return models


def pin(snapshots: Iterable[Snapshot]) -> None:
    """Write the commits that the revisions name now into models/snapshots.toml."""
    check_token()
    text = SNAPSHOTS.read_text()
    for snapshot in snapshots:
        commit = head_of(snapshot)
        line = rf'(repository = "{re.escape(snapshot.repository)}"\nrevision = ")[^"]*'
        text, count = re.subn(line, rf"\g<1>{commit}", text)
        if count != 1:
            raise ImportRefusedError(f'{SNAPSHOTS}: the line after {snapshot.repository} has to be revision = "…".')
        say(f"{snapshot.repository}: {snapshot.revision} is {commit}")
    replace_text(SNAPSHOTS, text)
    say(f"Written to {SNAPSHOTS}. Commit that file, and every import is of these.")


def head_of(snapshot: Snapshot) -> str:
    """The commit that a snapshot's revision names now."""
    info = ask_hub(lambda: HfApi().model_info(snapshot.repository, revision=snapshot.revision), snapshot.repository)
    return str(info.sha)


def model_on_hub(snapshot: Snapshot, profile: str) -> Model:
    """The files of a commit that a profile wants, as the hub lists them; a pinned one in the store needs no hub."""
    if snapshot.pinned:
        commit = snapshot.revision
        known = read_lock(home() / "models" / snapshot.name / commit[:12])
        if known is not None and known.profile in (profile, "full"):
            return known
    elif begun := commit_begun(snapshot):
        # A branch that has moved during an interrupted import must not throw the finished files away.
        commit = begun
        say(f"{snapshot.name}: going on with {commit[:12]}, whose import was interrupted.")
    else:
        commit = head_of(snapshot)

    def list_files() -> list[File]:
        tree = HfApi().list_repo_tree(snapshot.repository, revision=commit, recursive=True)
        return [
            File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.xet_hash)
            for entry in tree
            if isinstance(entry, RepoFile)
        ]

    listed = ask_hub(list_files, snapshot.repository, retries=0)  # the library tries again by itself
    chosen = choose([file.path for file in listed], snapshot, profile, f"{snapshot.repository} at {commit[:12]}")
    files = tuple(file for file in listed if file.path in chosen)
    model = Model(snapshot.name, commit[:12], snapshot.repository, snapshot.revision, commit, profile, files)
    say_share(model, listed)
    return model


def commit_begun(snapshot: Snapshot) -> str | None:
    """The commit of an interrupted import of this revision."""
    for folder in (home() / "import").glob(f"{snapshot.name}-*"):
        begun = read_lock(folder)
        if begun is not None and (begun.repository, begun.revision) == (snapshot.repository, snapshot.revision):
            return begun.commit
    return None


def models_in_folder(source: Path, snapshots: Sequence[Snapshot], profile: str) -> list[Model]:
    """The same for `source`/<repository's name>. Every wanted file is read once, for its sha256."""
    models = []
    for snapshot in snapshots:
        folder = source / snapshot.folder
        if not folder.is_dir():
            wanted = ", ".join(snapshot.folder for snapshot in snapshots)
            raise ImportRefusedError(f"{folder} is not there: --source takes a folder that holds {wanted}.")
        paths = [path for path in folder.rglob("*") if path.is_file() and is_published(path, folder)]
        listed = [File(str(path.relative_to(folder)), path.stat().st_size, "") for path in paths]
        chosen = choose([file.path for file in listed], snapshot, profile, str(folder))
        files = tuple(sorted((file for file in listed if file.path in chosen), key=lambda file: file.path))
        models.append(Model(snapshot.name, "", snapshot.repository, None, None, profile, files, folder))
        say_share(models[-1], listed)
    with byte_bar("Reading", sum(size_of(model.files) for model in models)) as advance:
        return [
            with_contents_version(model, source / snapshot.folder, advance)
            for model, snapshot in zip(models, snapshots, strict=True)
        ]


def with_contents_version(model: Model, folder: Path, advance: Advance) -> Model:
    sums = in_parallel([functools.partial(sha256, folder / file.path) for file in model.files], advance)
    files = tuple(replace(file, digest=digest) for file, digest in zip(model.files, sums, strict=True))
    content = "".join(f"{file.path} {file.size} {file.digest}\n" for file in files)
    return replace(model, files=files, version=hashlib.sha256(content.encode()).hexdigest()[:12])


def is_published(path: Path, folder: Path) -> bool:
    """Not what git, huggingface_hub or an import has added to a snapshot's folder."""
    return path.relative_to(folder).parts[0] not in (".git", ".cache", LOCK, MODEL_YAML)


def choose(paths: list[str], snapshot: Snapshot, profile: str, where: str) -> set[str]:
    """The paths that a profile wants; whichever it is, what serving reads has to be among `paths`."""
    for path in paths:
        if path.startswith("/") or ".." in path.split("/"):
            raise ImportRefusedError(f"{where} has a file {path!r}, which would lie outside: do not trust this source.")
    runtime: set[str] = set()
    for alternatives in snapshot.runtime:
        found = next(filter(None, (fnmatch.filter(paths, pattern) for pattern in alternatives)), None)
        if found is None:
            raise ImportRefusedError(f"{where} {snapshot.complaint(alternatives)}.")
        runtime.update(found)
    for path in sorted(runtime):
        if shard := re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\..*)", path):
            start, end, count = shard.groups()
            for sibling in (f"{start}{number:05d}{end}" for number in range(1, int(count) + 1)):
                if sibling not in paths:
                    raise ImportRefusedError(f"{where} lacks {sibling}, which serving reads: complete it.")
    return set(paths) if profile == "full" else runtime


def say_share(model: Model, listed: Sequence[File]) -> None:
    """How much of the snapshot its profile takes."""
    part, whole, origin = size_of(model.files), size_of(listed), model.source or f"{model.repository} {model.revision}"
    say(
        f"{model.name}: profile {model.profile} takes {len(model.files)} of {len(listed)} files, "
        f"{decimal(part)} of {decimal(whole)} ({part / max(whole, 1):.1%}), from {origin}"
    )


# One LoRA: the same, of a single file.


def find_lora(asked: str, source: Path | None) -> list[Model]:
    """`asked`: a file, or OWNER/REPOSITORY[@REVISION]/FILE on the hub, or in `source`/REPOSITORY."""
    if not asked.endswith(".safetensors"):
        raise ImportRefusedError(f"--lora {asked}: only .safetensors files are imported, since others can run code.")
    names = [snapshot.name for snapshot in read_snapshots([])]
    if lora_name(Path(asked)) in names:
        raise ImportRefusedError(
            f"--lora {asked}: {lora_name(Path(asked))} is the name of a snapshot: rename the file."
        )
    parts = re.fullmatch(r"([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", asked)
    if source is None and Path(asked).is_file():
        model = lora_in_file(Path(asked), "")
    elif parts is None:
        raise ImportRefusedError(f"--lora {asked} is neither a file here nor OWNER/REPOSITORY/FILE on the hub.")
    elif source is not None:
        model = lora_in_file(source / parts[1].rpartition("/")[2] / parts[3], parts[1])
    else:
        check_token()
        model = model_on_hub(LoraOnHub(parts[1], parts[2] or "main", ((glob.escape(parts[3]),),), parts[3]), LORA)
    held = read_lock(model.registered)
    if held is not None and held.files[0].path != (parts[3] if parts and model.source is None else Path(asked).name):
        raise ImportRefusedError(
            f"--lora {asked}: the store has {held} already, which is {held.files[0].path}: "
            f"`bentoml models delete {held}` makes room for this one."
        )
    return [model]


def lora_in_file(path: Path, repository: str) -> Model:
    if not path.is_file():
        raise ImportRefusedError(f"{path} is not there: --lora with --source takes DIR/REPOSITORY/FILE.")
    with byte_bar("Reading", path.stat().st_size) as advance:
        digest = sha256(path, advance)
    files = (File(path.name, path.stat().st_size, digest),)
    return Model(lora_name(path), digest[:12], repository, None, None, LORA, files, path.parent)


def lora_name(file: Path) -> str:
    """Its name in the Bento model store, which allows 63 lower-case letters, digits and "._-", no sign at the ends."""
    return re.sub("[^a-z0-9._-]+", "-", file.stem.lower())[:63].strip("._-") or LORA


def check_lora(model: Model) -> None:
    """Raises ImportRefusedError where what has been fetched is no LoRA of the transformer; then it is not kept."""
    from infinitetalk.errors import CheckpointError
    from infinitetalk.lora import read_lora  # torch and diffusers: seconds, which importing a snapshot does not need

    try:
        read_lora(model.staging / model.files[0].path)
    except CheckpointError as error:
        shutil.rmtree(model.staging)
        reason = first_line(error).replace(str(model.staging), str(model.source or model.repository))
        raise ImportRefusedError(f"{reason}.") from error


# What is there already, and whether there is room for the rest.


def compare_with_store(models: Iterable[Model], repair: bool) -> dict[Model, list[File]]:
    """What is to be fetched of each model. What is in the store is verified; damage is an error unless `repair`."""
    models = [whole_if_held(model) for model in models]
    held = [model for model in models if model.registered.is_dir()]
    wanted = {model: list(model.files) for model in models}
    with byte_bar("Verifying", sum(size_of(model.files) for model in held)) as advance:
        for model in held:
            checks = [functools.partial(fault, model.registered, file) for file in model.files]
            faults = dict(zip(model.files, in_parallel(checks, advance), strict=True))
            wanted[model] = [file for file, text in faults.items() if text]
            lock = read_lock(model.registered)
            locked = {file.path for file in lock.files} if lock is not None else set()
            damage = [f"{file.path} ({faults[file]})" for file in wanted[model] if file.path in locked]
            if lock is None:
                damage.append(f"{LOCK} (missing or unreadable)")
            if damage and not repair:
                raise ImportRefusedError(
                    f"{model} in {model.registered} is damaged: {', '.join(damage)}. "
                    "The same command with --repair fetches these files again, and no others."
                )
            if not damage:
                say(f"{model}: in the store; its {len(locked)} files are as its lock says")
    return wanted


def whole_if_held(model: Model) -> Model:
    """The model as the store has it where that is the whole: it stays whole where less is asked for."""
    lock = read_lock(model.registered)
    return replace(lock, source=model.source) if lock is not None and lock.profile == "full" else model


def check_space(wanted: dict[Model, list[File]]) -> None:
    """Raises ImportRefusedError where the disk has not the room for what is still missing."""
    missing = 0
    for model, files in wanted.items():
        how = "copies"
        if files and model.source is not None:
            probe = home() / "import" / f"probe{PART}"
            how = place(model.source / min(files, key=lambda file: file.size).path, probe)
            probe.unlink()
            say(f"{model}: made of {how}")
        if how == "copies":
            missing += size_of(files) - bytes_there(model, files)
    free = shutil.disk_usage(home()).free
    if missing > free:
        raise ImportRefusedError(
            f"{home()} has {decimal(free)} free and {decimal(missing)} are still missing: make room there, "
            "set BENTOML_HOME to a larger disk, or take --profile runtime."
        )


def size_of(files: Iterable[File]) -> int:
    return sum(file.size for file in files)


def bytes_there(model: Model, files: Iterable[File]) -> int:
    """What an interrupted import has left of the files."""
    staged = [model.staging / path for file in files for path in (file.path, file.path + PART)]
    return sum(path.stat().st_size for path in staged if path.is_file())


# Fetching.


def fetch(model: Model, file: File, advance: Advance) -> None:
    """Put a verified file into the staging folder. One that is there under its own name is finished."""
    target = model.staging / file.path
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART)
    if model.source is None:
        download(model, file, part, advance)
    else:
        advance(-part.stat().st_size if part.exists() else 0)
        source = model.source / file.path
        if place(source, part) == "copies" and sha256(part) != file.digest:
            raise ImportRefusedError(f"{source} has changed while it was copied: run the same command again.")
        advance(file.size)
    part.rename(target)
    if not console.is_terminal:  # in a log no bar moves
        say(f"{model.name}/{file.path}  {decimal(file.size)}")


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


# Asking the hub, and what its refusals mean.


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
        return f"{subject} has no such revision ({status}): correct it in {SNAPSHOTS} or after --lora."
    if status == 401 and get_token() is None:
        return f"{subject}: the hub demands a token (401), or has no such repository: {set_token}."
    if status in (401, 403):
        return f"{subject}: the token gives no access ({status}): see {page}, and {set_token} with read permission."
    if status == 404:
        remedy = f"correct it in {SNAPSHOTS} or after --lora, or {set_token} if it is private."
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


# Many files at a time under one bar.


def say(text: str) -> None:
    """Print a line, above the bar where there is one."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def byte_bar(title: str, size: int, done: int = 0) -> Iterator[Advance]:
    """A bar over `size` bytes, `done` of them before; with nothing to do, none."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=size == done) as progress:
        task = progress.add_task(title, total=size, completed=done)
        lock, waiting = threading.Lock(), 0

        def advance(count: int) -> None:
            # The bar reckons its rate from the last 1000 steps: they must not be the last tenth of a second.
            nonlocal waiting
            with lock:
                waiting += count
                if abs(waiting) >= min(READ_BYTES, size // 100):
                    progress.advance(task, waiting)
                    waiting = 0

        yield advance
        progress.advance(task, waiting)


class StoppedError(Exception):
    """Another job has failed, or the user has pressed Ctrl-C."""


def in_parallel(jobs: Sequence[Callable[[Advance], Result]], advance: Advance) -> list[Result]:
    """The jobs' results, in order. The first error stops them all, and is raised without waiting for slow servers."""
    stop = threading.Event()

    def advance_or_stop(count: int) -> None:
        if stop.is_set():
            raise StoppedError
        advance(count)

    pool = ThreadPoolExecutor(WORKERS)
    futures = [pool.submit(job, advance_or_stop) for job in jobs]
    try:
        for future in as_completed(futures):
            future.result()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when imported, 2 when that is not possible, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="DIR", help="import from the snapshots' folders in DIR")
    parser.add_argument("--profile", choices=("full", "runtime"), default="full", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these models, such as infinitetalk")
    parser.add_argument("--repair", action="store_true", help="fetch again what is damaged in the store")
    parser.add_argument("--pin", action="store_true", help="import nothing; write the commits of the branch heads")
    parser.add_argument(
        "--lora",
        metavar="FILE",
        help="import only this LoRA: a .safetensors file here, or OWNER/REPOSITORY[@REVISION]/FILE on the hub "
        "(with --source: in DIR/REPOSITORY)",
    )
    options = parser.parse_args(arguments)
    if options.lora is not None and (options.only or options.pin):
        parser.error("--lora imports one file, alone: leave --only and --pin out")
    logging.set_verbosity_error()  # what goes wrong is said here
    try:
        snapshots = read_snapshots(options.only)
        if options.pin:
            pin(snapshots)
        elif options.lora is not None:
            import_models(lambda: find_lora(options.lora, options.source), options.repair)
        else:
            import_models(lambda: find_snapshots(snapshots, options.source, options.profile), options.repair)
    except ImportRefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        where = error.filename or home()
        print(f"error: {where}: {error.strerror or error}: {remedy}, then run the same command.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: that waits for threads which may wait for a server. What they have is on the disk.
    os._exit(status)
