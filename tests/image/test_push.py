"""push_image.py, from a store of small models to a registry on loopback: what arrives, is sent, and is refused."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from container import layers
from container import registry as client
from container.code_image import TAR, Blob, open_source
from container.content import Content
from container.digests import Digests
from container.errors import ImageError
from container.layers import STORE
from container.outputs import open_output
from container.push import Row, check_limits, push, survey_image
from container.registry import Reference, Registry
from scripts.push_image import main
from tests.conftest import REPOSITORY
from tests.image.registries import Proxy, random_cuts, registry, tar_of, write_code_image
from tests.model_store import small_models, write_store

BASE = tar_of({"home": None, "usr": None, "usr/bin": None, "usr/bin/python3": b"#!" + bytes(30_000)})
MODEL_BYTES = 3 * 200_000
TOKEN = b"hf_" + b"abcdefghijklmnopqrstuvwxyzABCDEFGH"  # of the right shape, and nobody's


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Small models, small chunks, short waits, and nobody's logins."""
    write_store(tmp_path / "home", small_models(), monkeypatch)
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(Content, "chunk", 50_000)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "home"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    with registry(tmp_path / "registry") as host:
        yield host


@pytest.fixture
def code(tmp_path: Path) -> str:
    return write_code_image(tmp_path / "code.tar", [BASE, source_layer(b"print(1)")])


def source_layer(source: bytes) -> bytes:
    return tar_of({"home/bentoml": None, "home/bentoml/bento": None, "home/bentoml/bento/src/service.py": source})


def files_of(host: str, name: str) -> dict[str, bytes]:
    """What a container of the image sees, read layer by layer as an engine does; every digest is checked."""
    reference = Reference.parse(f"{host}/{name}")
    there, files = Registry(reference), dict[str, bytes]()
    manifest = there.manifest(reference.tag)
    assert manifest is not None
    config = b"".join(there.blob(manifest.json["config"]["digest"]))
    described = json.loads(config)
    assert manifest.json["config"]["digest"] == f"sha256:{sha256(config).hexdigest()}"
    assert described["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest.json["layers"]]
    history = [entry for entry in described["history"] if not entry.get("empty_layer")]
    assert len(history) == len(manifest.json["layers"])
    for layer in manifest.json["layers"]:
        content = b"".join(there.blob(layer["digest"]))
        assert (len(content), f"sha256:{sha256(content).hexdigest()}") == (layer["size"], layer["digest"])
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                if (file := archive.extractfile(member)) is not None:
                    files[member.name] = file.read()
    return files


def assert_whole(files: dict[str, bytes]) -> None:
    for name, model in small_models().items():
        for path, content in model.items():
            assert files[f"{STORE}/{name}/0123456789ab/{path}"] == content
        assert files[f"{STORE}/{name}/latest"] == b"0123456789ab"
    assert files["usr/bin/python3"].startswith(b"#!")


def manifest_of(host: str, name: str) -> dict[str, Any] | None:
    reference = Reference.parse(f"{host}/{name}")
    manifest = Registry(reference).manifest(reference.tag)
    return None if manifest is None else manifest.json


def test_an_image_arrives_whole_with_the_models_at_the_bottom(host: str, code: str) -> None:
    assert main([code, f"{host}/me/avatar:v1"]) == 0
    assert_whole(files_of(host, "me/avatar:v1"))
    manifest = manifest_of(host, "me/avatar:v1")
    assert manifest is not None
    assert [bool(layer.get("annotations")) for layer in manifest["layers"]] == [True] * 4 + [False] * 2
    assert {layer["mediaType"] for layer in manifest["layers"]} == {TAR}
    inspect = ["/usr/bin/skopeo", "inspect", "--tls-verify=false", f"docker://{host}/me/avatar:v1"]
    seen = json.loads(subprocess.run(inspect, check=True, capture_output=True).stdout)
    assert seen["Labels"] == {
        "org.opencontainers.image.version": "0.1.0",
        **{f"avatar-api.model.{name}": f"owner/{name}@0123456789ab{28 * 'c'}" for name in small_models()},
    }
    assert manifest["annotations"] == {"org.opencontainers.image.version": "0.1.0"}


def test_layers_of_new_code_are_not_read_a_second_time(host: str, code: str, tmp_path: Path) -> None:
    digests = Digests()
    output = open_output(f"{host}/me/avatar:v1", digests)
    survey = survey_image(layers.read_store(), open_source(code), output, digests)
    (tmp_path / "code.tar").unlink()
    push(survey, output, digests, replace=False, report=lambda *_: None)
    assert files_of(host, "me/avatar:v1")["home/bentoml/bento/src/service.py"] == b"print(1)"


def test_skopeo_accepts_it_from_a_registry_a_layout_and_an_archive(host: str, code: str, tmp_path: Path) -> None:
    layout, archive = f"oci:{tmp_path}/layout", f"docker-archive:{tmp_path}/image.tar"
    newer = write_code_image(tmp_path / "newer.tar", [BASE, source_layer(b"print(2)")])
    digests: list[list[str]] = []
    for target in (f"{host}/me/avatar:v1", layout, archive):
        assert main([code, target]) == 0
        assert main([newer, target]) == 2  # there is another image
        name = target if ":/" in target else f"docker://{target}"
        copy = ["/usr/bin/skopeo", "copy", "--src-tls-verify=false", name, f"dir:{tmp_path}/copy-{len(digests)}"]
        subprocess.run(copy, check=True, capture_output=True)
        manifest = json.loads((tmp_path / f"copy-{len(digests)}" / "manifest.json").read_text())
        digests.append([layer["digest"] for layer in manifest["layers"]])
    assert digests[0] == digests[1] == digests[2]


def test_a_layout_is_a_code_image_too(host: str, code: str, tmp_path: Path) -> None:
    source = f"oci:{tmp_path}/code"
    subprocess.run(["/usr/bin/skopeo", "copy", code, source], check=True, capture_output=True)  # gzips the layers
    assert main([source, f"{host}/me/avatar:v1"]) == 0
    manifest = manifest_of(host, "me/avatar:v1")
    assert manifest is not None
    assert [layer["mediaType"] for layer in manifest["layers"]] == [TAR] * 4 + [f"{TAR}+gzip"] * 2
    copy = [
        "/usr/bin/skopeo",
        "copy",
        "--src-tls-verify=false",
        f"docker://{host}/me/avatar:v1",
        f"dir:{tmp_path}/copy",
    ]
    subprocess.run(copy, check=True, capture_output=True)


def test_pushing_again_reads_no_model_and_sends_next_to_nothing(
    host: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(host) as proxy:
        assert main([code, f"{proxy.host}/me/avatar:v1"]) == 0
        assert proxy.sent > MODEL_BYTES
        before = proxy.sent
        monkeypatch.setattr(layers, "file_blocks", None)  # whoever reads a model fails
        assert main([code, f"{proxy.host}/me/avatar:v1"]) == 0
        assert main([code, f"{proxy.host}/me/avatar:v2"]) == 0
        assert proxy.sent - before < 20_000
    assert manifest_of(host, "me/avatar:v1") == manifest_of(host, "me/avatar:v2")


def test_a_machine_that_never_pushed_learns_the_digests_from_the_image_that_is_there(
    host: str, code: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([code, f"{host}/me/avatar:v1"]) == 0
    (store / "push" / "digests.json").unlink()
    monkeypatch.setattr(layers, "file_blocks", None)
    assert main([code, f"{host}/me/avatar:v1"]) == 0


def test_new_code_sends_no_model_again(host: str, code: str, tmp_path: Path) -> None:
    with Proxy(host) as proxy:
        assert main([code, f"{proxy.host}/me/avatar:v1"]) == 0
        before = proxy.sent
        newer = write_code_image(tmp_path / "newer.tar", [BASE, source_layer(b"print(2)")])
        assert main([newer, f"{proxy.host}/me/avatar:v2"]) == 0
        assert proxy.sent - before < 40_000
    files = files_of(host, "me/avatar:v2")
    assert_whole(files)
    assert files["home/bentoml/bento/src/service.py"] == b"print(2)"
    old, new = manifest_of(host, "me/avatar:v1"), manifest_of(host, "me/avatar:v2")
    assert old is not None
    assert new is not None
    assert old["layers"][:5] == new["layers"][:5]  # a host that has the old image pulls the last alone


def test_a_tag_that_has_another_image_is_moved_only_when_told_to(
    host: str, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([code, f"{host}/me/avatar:v1"]) == 0
    newer = write_code_image(tmp_path / "newer.tar", [BASE, source_layer(b"print(2)")])
    assert main([newer, f"{host}/me/avatar:v1"]) == 2
    assert "There is an image under this name already, with other content" in capsys.readouterr().err
    assert files_of(host, "me/avatar:v1")["home/bentoml/bento/src/service.py"] == b"print(1)"
    assert main([newer, f"{host}/me/avatar:v1", "--replace"]) == 0
    assert files_of(host, "me/avatar:v1")["home/bentoml/bento/src/service.py"] == b"print(2)"


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    host: str, code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(host) as proxy:
        assert main([code, f"{proxy.host}/me/avatar:v1", "--dry-run", "--bandwidth", "0.1"]) == 0
        assert proxy.sent < 20_000
    assert manifest_of(host, "me/avatar:v1") is None
    said = capsys.readouterr().out
    assert "6 layers" in said
    assert "0 bytes there already" in said
    assert "0:00:5" in said  # 0.7 MB at 0.1 Mbit/s
    assert "You may push to" in said
    assert main([code, f"{host}/me/avatar:v1"]) == 0
    capsys.readouterr()
    assert main([code, f"{host}/me/avatar:v1", "--dry-run"]) == 0
    assert "0 bytes to send" in capsys.readouterr().out


def test_twenty_cuts_at_random_points_change_nothing(host: str, code: str) -> None:
    with Proxy(host) as proxy:
        proxy.cuts = random_cuts(7, 20, MODEL_BYTES)
        assert main([code, f"{proxy.host}/me/avatar:v1"]) == 0
        assert proxy.cut == 20
    assert_whole(files_of(host, "me/avatar:v1"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_push_that_is_ended_in_the_middle_leaves_no_broken_tag_and_goes_on(
    host: str, code: str, tmp_path: Path, end: signal.Signals, earlier: bool, store: Path
) -> None:
    """`earlier`: the tag has an image already."""
    if earlier:
        elsewhere = write_code_image(tmp_path / "earlier.tar", [source_layer(b"print(0)")])
        assert main([elsewhere, f"{host}/me/avatar:v1"]) == 0
        file = store / "models" / "infinitetalk" / "0123456789ab" / "config.json"
        os.utime(file)  # its layer has to be read again
    before = manifest_of(host, "me/avatar:v1")
    script = [sys.executable, str(REPOSITORY / "scripts" / "push_image.py"), code]
    with Proxy(host) as proxy:
        proxy.hold_after = 25_000 if earlier else 500_000
        running = subprocess.Popen([*script, f"{proxy.host}/me/avatar:v1", "--replace"], stderr=subprocess.PIPE)
        assert proxy.holding.wait(60)
        running.send_signal(end)
        _, said = running.communicate(timeout=60)
        assert running.returncode == (130 if end == signal.SIGINT else -end)
        assert end == signal.SIGKILL or b"the same command goes on from here" in said
    assert manifest_of(host, "me/avatar:v1") == before
    subprocess.run([*script, f"{host}/me/avatar:v1", "--replace"], check=True)
    assert_whole(files_of(host, "me/avatar:v1"))


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"home/bentoml/bento/.wh.models": b""}, "/home/bentoml/bento/.wh.models would hide"),
        ({"home/.wh..wh..opq": b""}, r"/home/.wh..wh..opq would hide"),
        ({f"{STORE}/.wh.infinitetalk": b""}, "would hide the models' /home/bentoml/bento/models/infinitetalk"),
        (
            {f"{STORE}/infinitetalk/latest": b"x"},
            "would hide the models' /home/bentoml/bento/models/infinitetalk/latest",
        ),
        ({"home/bentoml/bento": b"a file"}, "would hide the models' /home/bentoml/bento"),
        ({f"{'long/' * 40}.env": b"HF_TOKEN=" + TOKEN}, r"long/.env has a Hugging Face token in it"),
        ({"root/.docker/config.json": b"{}"}, "/root/.docker/config.json is a file of logins"),
    ],
)
def test_a_code_image_that_hides_the_models_or_holds_a_secret_is_refused_before_anything_is_sent(
    host: str, tmp_path: Path, files: dict[str, bytes], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = write_code_image(tmp_path / "bad.tar", [BASE, tar_of(files)])
    with Proxy(host) as proxy:
        assert main([code, f"{proxy.host}/me/avatar:v1"]) == 2
        assert proxy.sent == 0
    said = capsys.readouterr()
    assert complaint in said.err
    assert TOKEN.decode() not in said.err + said.out


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"config": {"Env": ["HF_TOKEN=something"]}}, "its environment sets HF_TOKEN"),
        ({"history": [{"created_by": "ARG HF_TOKEN=abcdefgh"}, {}]}, "its history shows HF_TOKEN"),
        ({"config": {"Labels": {"note": TOKEN.decode()}}}, "its configuration has a Hugging Face token in it"),
        ({"architecture": "arm64"}, "it is for linux/arm64: build it on x86_64"),
    ],
)
def test_a_configuration_with_a_secret_or_of_another_machine_is_refused(
    host: str, tmp_path: Path, config: dict[str, Any], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = write_code_image(tmp_path / "bad.tar", [BASE, source_layer(b"")], config)
    assert main([code, f"{host}/me/avatar:v1"]) == 2
    assert complaint in capsys.readouterr().err
    assert manifest_of(host, "me/avatar:v1") is None


def test_a_secret_behind_the_first_of_several_gzip_streams_is_found(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = tar_of({"zeros": bytes(10_000_000), "app/.env": TOKEN})  # grows a thousand times as it is read
    compressed = gzip.compress(layer[:5_000_000]) + gzip.compress(layer[5_000_000:])
    diff_ids = {"rootfs": {"diff_ids": [f"sha256:{sha256(layer).hexdigest()}"]}}
    code = write_code_image(tmp_path / "bad.tar", [compressed], diff_ids)
    assert main([code, f"{host}/me/avatar:v1"]) == 2
    assert "/app/.env has a Hugging Face token in it" in capsys.readouterr().err


@pytest.mark.parametrize("failing", ["save", "image"])
def test_what_the_engine_says_when_it_has_no_image_or_breaks_off_is_told(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    for engine in ("podman", "docker"):
        program = tmp_path / engine
        program.write_text(
            f'#!/bin/sh\ntest $1 != {failing} || {{ echo "broken: storage" >&2; exit 125; }}; echo abc\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["avatar-api:latest", f"{host}/me/avatar:v1"]) == 2
    said = capsys.readouterr().err
    assert "broken: storage" in said
    assert ("podman save" if failing == "save" else "build it with scripts/build_image.py") in said


def test_a_secret_of_this_machine_is_found_whatever_it_looks_like(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery")
    content = bytes(2**20 - 10) + b"correct horse battery"  # across two blocks
    code = write_code_image(tmp_path / "bad.tar", [BASE, tar_of({"app/notes": content})])
    assert main([code, f"{host}/me/avatar:v1"]) == 2
    said = capsys.readouterr().err
    assert "/app/notes has the value of MY_SERVICE_PASSWORD in it" in said
    assert "correct horse" not in said


def test_a_model_that_is_damaged_on_the_disk_is_not_published(
    host: str, code: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = store / "models" / "infinitetalk" / "0123456789ab" / "config.json"
    file.write_bytes(b'{"dim": 5121}\n')
    assert main([code, f"{host}/me/avatar:v1"]) == 2
    assert "config.json is damaged" in capsys.readouterr().err
    assert manifest_of(host, "me/avatar:v1") is None


def test_what_githubs_registry_refuses_is_said_before_it_is_sent() -> None:
    row = Row("infinitetalk/t5.safetensors", 11_400_000_000, Blob("", "", 0, TAR), None, False)
    with pytest.raises(ImageError, match=r"refuses layers above 10 GB: infinitetalk/t5\.safetensors \(11\.4 GB\)"):
        check_limits(Reference.parse("ghcr.io/me/avatar"), [row])
    check_limits(Reference.parse("docker.io/me/avatar"), [row])


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("docker-archive:/nowhere.tar", "docker-archive:/nowhere.tar: there is no such file"),
        ("oci:/nowhere", "oci:/nowhere is no image in the OCI layout"),
    ],
)
def test_a_code_image_that_is_not_there_is_named(
    host: str, source: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([source, f"{host}/me/avatar:v1"]) == 2
    assert complaint in capsys.readouterr().err
