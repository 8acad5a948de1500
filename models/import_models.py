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
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.filesize import decimal

from models.console import byte_bar, console, in_parallel, leave, say
from models.hub import check_access, check_token, download, files_of, first_line, head_of
from models.store import (
    LOCK,
    MODEL_YAML,
    PART,
    Advance,
    File,
    ImportRefusedError,
    Model,
    begin,
    fault,
    home,
    place,
    read_lock,
    register,
    replace_text,
    sha256,
    the_only_import,
)

SNAPSHOTS = Path(__file__).with_name("snapshots.toml")

LORA = "lora"  # the profile of a model that is one LoRA


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
        commit = head_of(snapshot.repository, snapshot.revision)
        line = rf'(repository = "{re.escape(snapshot.repository)}"\nrevision = ")[^"]*'
        text, count = re.subn(line, rf"\g<1>{commit}", text)
        if count != 1:
            raise ImportRefusedError(f'{SNAPSHOTS}: the line after {snapshot.repository} has to be revision = "…".')
        say(f"{snapshot.repository}: {snapshot.revision} is {commit}")
    replace_text(SNAPSHOTS, text)
    say(f"Written to {SNAPSHOTS}. Commit that file, and every import is of these.")


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
        commit = head_of(snapshot.repository, snapshot.revision)

    listed = files_of(snapshot.repository, commit)
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
    leave(main())  # what threads have fetched is on the disk
