"""The image, models inside, to where it goes: the models' layers at the bottom, the code image's above them.

    survey = survey_image(read_store(), open_source("avatar-api:latest"), output, Digests())
    push(survey, output, digests, replace=False, report=...)

Layers are sent in parallel, straight from the files of the store; what is there already is not. Configuration and
manifest come last: until then there is no image, and afterwards it is whole.
"""

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from container.code_image import TAR, Blob, CodeImage, Source, examine, wanted
from container.content import PassedError, sha256_of
from container.digests import Digests
from container.errors import ImageError
from container.layers import Layer, LayerContent, StoredModel, digest_of_json, fingerprint, plan
from container.outputs import Output
from container.registry import MANIFEST, Manifest, Patience, Reference, TransientError
from container.scan import ancestors, secrets_here

CONFIG = "application/vnd.oci.image.config.v1+json"
KEY = "avatar-api.layer"  # annotation of a model's layer: what is in it, by its lock
MODEL = "avatar-api.model"  # label: which model, at which commit
MOST_LAYERS = 127  # container engines stop there
LIMITS = {"ghcr.io": (10 * 10**9, "GitHub's registry refuses layers above 10 GB")}


@dataclass
class Row:
    """A layer of the image."""

    name: str
    size: int  # bytes
    source: Layer | Blob
    digest: str | None  # None where nobody has read it yet
    there: bool  # where the image goes to


@dataclass
class Survey:
    """What an image is made of, bottom first, and what of it is there already."""

    models: list[StoredModel]
    code: CodeImage
    source: Source
    rows: list[Row]
    existing: Manifest | None

    @property
    def missing(self) -> list[Row]:
        return [row for row in self.rows if not row.there]

    @property
    def is_there(self) -> bool:
        """Is just this image there already?"""
        if self.existing is None or any(row.digest is None for row in self.rows):
            return False
        return sha256_of(compose(self)[1]) == self.existing.digest


def survey_image(models: list[StoredModel], source: Source, output: Output, digests: Digests) -> Survey:
    layers = plan(models)
    code = read_code(source, layers, digests)
    if len(layers) + len(code.layers) > MOST_LAYERS:
        raise ImageError(
            f"The image would have {len(layers)} + {len(code.layers)} layers, and engines stop at {MOST_LAYERS}: "
            "build the code image with fewer."
        )
    existing = output.existing()
    known = layers_of(existing)
    rows = [
        Row(layer.name, layer.size, layer, digests.layer(fingerprint(layer)) or known.get(layer.key), False)
        for layer in layers
    ]
    rows += [Row(f"code {number}", blob.size, blob, blob.digest, False) for number, blob in enumerate(code.layers, 1)]
    survey = Survey(models, code, source, rows, existing)
    if survey.is_there:
        for row in rows:
            row.there = True
        return survey
    with ThreadPoolExecutor(output.parallel) as pool:
        found = pool.map(lambda row: row.digest is not None and output.has(row.digest), rows)
        for row, there in zip(rows, found, strict=True):
            row.there = there
    return survey


def read_code(source: Source, layers: Sequence[Layer], digests: Digests) -> CodeImage:
    """Examine the code image, unless it has been."""
    protected = ancestors(file.path for layer in layers for file in layer.files)
    own = secrets_here()
    told = [[name, sha256_of(value)] for name, value in sorted(own.items())]
    name = digest_of_json([source.fingerprint(), sorted(protected), told])
    seen = digests.code(name)
    if seen is not None:
        return CodeImage.from_json(seen)
    code = examine(source, protected, own)
    diff_ids = code.config["rootfs"]["diff_ids"]
    for blob, diff_id in zip(code.layers, diff_ids, strict=True):
        if blob.media_type == TAR and blob.digest != diff_id:
            raise ImageError(f"{source}: layer {blob.name} is not what its configuration says: save it again.")
    digests.set_code(name, code.to_json())
    return code


def layers_of(manifest: Manifest | None) -> dict[str, str]:
    """The digests of an image's model layers, by what is in them. Whoever can write the tag could write the layers."""
    layers = manifest.json.get("layers", []) if manifest is not None else []
    return {key: layer["digest"] for layer in layers if (key := (layer.get("annotations") or {}).get(KEY))}


def check_limits(reference: Reference, rows: Iterable[Row]) -> None:
    """Raises ImageError for what a registry is known to refuse."""
    most, reason = LIMITS.get(reference.host, (0, ""))
    large = [f"{row.name} ({row.size / 1e9:.1f} GB)" for row in rows if most and row.size > most]
    if large:
        raise ImageError(f"{reason}: {', '.join(large)}. Take another registry, such as Docker Hub.")


def push(
    survey: Survey, output: Output, digests: Digests, replace: bool, report: Callable[[Row, int], object]
) -> tuple[bytes, bytes]:
    """Send what is missing. `report` is told how many bytes of a layer have arrived. Returns config and manifest."""
    if survey.existing is not None and not survey.is_there and not replace:
        raise ImageError(
            "There is an image under this name already, with other content: take another tag, or --replace it."
        )
    if not survey.is_there:
        room, size = output.room(), sum(row.size for row in survey.missing)
        if room is not None and size > room:
            raise ImageError(f"The image takes {size / 1e9:.1f} GB, and there is room for {room / 1e9:.1f}: make room.")
        send(survey, output, digests, report)
        if not replace and output.existing() != survey.existing:
            raise ImageError("Somebody else has pushed an image of this name meanwhile: take another, or --replace it.")
        output.finish(*compose(survey))
    return compose(survey)


def send(survey: Survey, output: Output, digests: Digests, report: Callable[[Row, int], object]) -> None:
    """The missing layers. The first error stops all."""
    stop = threading.Event()

    def tell(row: Row, position: int) -> None:
        if stop.is_set():
            raise StoppedError
        report(row, position)

    def send_layer(row: Row, layer: Layer) -> None:
        before = fingerprint(layer)
        row.digest = output.put(LayerContent(layer), layer.key, partial(tell, row))
        if fingerprint(layer) != before:
            raise ImageError(f"{row.name} was changed while it was sent: run the same command again.")
        digests.set_layer(before, row.digest)
        row.there = True

    def send_code() -> None:
        """In the order in which they come, from a pipe that is opened anew when it has to be."""
        patience = Patience("sending the code image")
        while missing := {row.source: row for row in survey.missing if isinstance(row.source, Blob)}:
            try:
                for blob, content in wanted(survey.source, list(missing)):
                    if output.put(content, blob.digest, partial(tell, missing[blob])) != blob.digest:
                        raise ImageError(f"{survey.source} was changed while it was sent: run the same command again.")
                    for row in survey.rows:
                        row.there = row.there or row.source == blob
                    patience.progress()
            except PassedError:
                patience.wait(TransientError("the registry wants it from the beginning"))

    jobs: list[Callable[[], None]] = [send_code]
    jobs += [partial(send_layer, row, row.source) for row in survey.missing if isinstance(row.source, Layer)]
    pool = ThreadPoolExecutor(output.parallel)
    futures = [pool.submit(job) for job in jobs]
    try:
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class StoppedError(Exception):
    """Another layer has failed, or the user has pressed Ctrl-C."""


def compose(survey: Survey) -> tuple[bytes, bytes]:
    """The image's configuration and manifest."""
    layers = [row for row in survey.rows if isinstance(row.source, Layer)]
    config = json.loads(json.dumps(survey.code.config))
    config["rootfs"]["diff_ids"] = [row.digest for row in layers] + config["rootfs"]["diff_ids"]
    epoch = {"created": "1970-01-01T00:00:00Z"}
    history = config.get("history") or [{"created_by": "code"} for _ in survey.code.layers]
    config["history"] = [epoch | {"created_by": f"models: {row.name}"} for row in layers] + history
    labels = config.setdefault("config", {}).get("Labels") or {}
    labels |= {f"{MODEL}.{model.name}": origin(model) for model in survey.models}
    config["config"]["Labels"] = labels
    written = to_json(config)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": sha256_of(written), "size": len(written)},
        "layers": [describe(row) for row in survey.rows],
        "annotations": {name: value for name, value in labels.items() if name.startswith("org.opencontainers.image.")},
    }
    return written, to_json(manifest)


def origin(model: StoredModel) -> str:
    """The repository and commit of a model; a folder has none, but a version made of its content."""
    return f"{model.lock['repository']}@{model.lock['commit'] or model.version}"


def describe(row: Row) -> dict[str, Any]:
    media_type = TAR if isinstance(row.source, Layer) else row.source.media_type
    described: dict[str, Any] = {"mediaType": media_type, "digest": row.digest, "size": row.size}
    if isinstance(row.source, Layer):
        described["annotations"] = {KEY: row.source.key}
    return described


def to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
