"""The models as layers: the same bytes on every machine, every file once, in its place, as its lock says."""

import io
import os
import random
import tarfile
from pathlib import Path

import bentoml
import pytest
from bentoml._internal.models import ModelStore

from container import layers
from container.content import Content
from container.errors import ImageError
from container.layers import Layer, LayerContent, fingerprint, plan, read_store
from tests.model_store import small_models, write_store

FIRST = "chinese-wav2vec2-base"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_store(tmp_path / "home", small_models(), monkeypatch)
    return tmp_path / "home"


def content_of(content: Content) -> bytes:
    return b"".join(bytes(block) for block in content.blocks(0, content.size))


def digest_of(layer: Layer) -> str:
    return LayerContent(layer).digest


def unpacked(layer: Layer) -> list[tarfile.TarInfo]:
    return tarfile.open(fileobj=io.BytesIO(content_of(LayerContent(layer)))).getmembers()


def test_the_same_models_give_the_same_digests_on_every_machine(store: Path) -> None:
    """These are digests that an earlier version has pushed: changing one makes everybody upload everything again."""
    assert [digest_of(layer) for layer in plan(read_store())[:-1]] == [
        "sha256:fc3a20b7be1ab1a8e23f3956c45933ede3171ffda805848da5c809099927fe16",
        "sha256:b59cdbf19575a903c2209d75d23b52c2fc146a8bad755b5432400d3ccf9400dc",
        "sha256:42b12bcfbff44cf13ab30d6abd6c631120c98572173a27d15712ba375f3943a1",
    ]


def test_where_a_store_lies_and_when_it_was_imported_changes_no_digest(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan(read_store())
    write_store(tmp_path / "elsewhere", small_models(), monkeypatch)
    for file in (tmp_path / "elsewhere").rglob("*.safetensors"):
        os.utime(file, (0, 0))
    after = plan(read_store())
    assert [layer.key for layer in after] == [layer.key for layer in before]
    assert [digest_of(layer) for layer in after] == [digest_of(layer) for layer in before]
    assert fingerprint(after[0]) != fingerprint(before[0])


def test_a_layer_holds_the_files_in_their_places_and_the_folders_above_them(store: Path) -> None:
    models = {f"{layers.STORE}/{name}/0123456789ab/{path}" for name, files in small_models().items() for path in files}
    registration = {
        f"{layers.STORE}/{name}/{path}"
        for name in small_models()
        for path in ("latest", "0123456789ab/model.yaml", "0123456789ab/snapshot.lock.json")
    }
    members = [member for layer in plan(read_store()) for member in unpacked(layer)]
    assert sorted(member.name for member in members if member.isfile()) == sorted(models | registration)
    for layer in plan(read_store()):
        folders = set()
        for member in unpacked(layer):
            assert member.name == "home" or os.path.dirname(member.name) in folders  # noqa: PTH120
            folders |= {member.name} if member.isdir() else set()
    for member in members:
        assert member.mode == (0o755 if member.isdir() else 0o644)
        assert member.mtime == 0
        assert (member.uid, member.gid) == ((0, 0) if member.name == "home" else (1034, 1034))


def test_bentoml_finds_the_models_of_unpacked_layers(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in plan(read_store()):
        with tarfile.open(fileobj=io.BytesIO(content_of(LayerContent(layer)))) as archive:
            archive.extractall(tmp_path / "image", filter="data")
    found = bentoml.models.get(f"{FIRST}:latest", _model_store=ModelStore(tmp_path / "image" / layers.STORE))
    assert found.info.metadata["repository"] == f"owner/{FIRST}"
    assert (Path(found.path) / "config.json").read_bytes() == small_models()[FIRST]["config.json"]


def test_a_large_file_has_a_layer_of_its_own_and_small_ones_share_layers(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "LARGE", 100_001)
    found = [[Path(file.path).name for file in layer.files] for layer in plan(read_store())[:-1]]
    large, small = ["model-00001-of-00002.safetensors"], ["config.json", "model-00002-of-00002.safetensors"]
    assert found == [large, small] * 3
    monkeypatch.setattr(layers, "FULL", 50_000)
    found = [[Path(file.path).name for file in layer.files] for layer in plan(read_store())[:-1]]
    assert found == [large, small[:1], small[1:]] * 3


def test_an_empty_file_is_a_small_one_also_where_it_is_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "LARGE", 100_001)
    models = small_models()
    write_store(tmp_path / "home", {**models, FIRST: {".empty": b"", **models[FIRST]}}, monkeypatch)
    large, small = plan(read_store())[:2]
    assert [Path(file.path).name for file in large.files] == ["model-00001-of-00002.safetensors"]
    assert Path(small.files[0].path).name == ".empty"


def test_a_file_that_changes_changes_only_its_own_layer_and_the_registration(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "LARGE", 100_001)
    before = {layer.name: layer.key for layer in plan(read_store())}
    models = small_models()
    changed = {**models[FIRST], "config.json": b'{"dim": 1536}\n'}
    write_store(tmp_path / "elsewhere", {**models, FIRST: changed}, monkeypatch)
    after = {layer.name: layer.key for layer in plan(read_store())}
    assert {name for name in after if after[name] != before[name]} == {
        f"{FIRST}/config.json and 1 more",
        "registration",
    }


def test_a_layer_can_be_read_from_any_position_on(store: Path) -> None:
    layer = plan(read_store())[0]
    whole = content_of(LayerContent(layer))
    assert len(whole) == layer.size
    chance, content = random.Random(1), LayerContent(layer)  # noqa: S311 - no secret
    for _ in range(100):
        start = chance.randrange(layer.size)
        end = chance.randrange(start, layer.size + 1)
        assert b"".join(bytes(block) for block in content.blocks(start, end)) == whole[start:end]
    assert content.digest == digest_of(layer)


def test_a_file_beyond_8_gib_has_its_size_in_a_pax_header(store: Path) -> None:
    size = 9 * 2**30
    layer = Layer("large", layers.with_directories([layers.Entry("home/large", size, Path("/dev/zero"), "0" * 64)]))
    start = b"".join(bytes(block) for block in LayerContent(layer).blocks(0, 8192))
    with tarfile.open(fileobj=io.BytesIO(start), mode="r|") as archive:
        folder, member = archive.next(), archive.next()
    assert folder is not None
    assert member is not None
    assert (folder.name, member.name, member.size) == ("home", "home/large", size)
    assert layer.size == 512 + 3 * 512 + size + 1024


@pytest.mark.parametrize("read", ["at once", "in pieces, some twice"])
def test_a_file_that_is_not_what_its_lock_says_is_named_when_it_is_read(store: Path, read: str) -> None:
    file = store / "models" / FIRST / "0123456789ab" / "weights" / "model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[50_000] ^= 1
    file.write_bytes(content)
    layer = LayerContent(plan(read_store())[0])
    with pytest.raises(ImageError, match=r"model-00002-of-00002\.safetensors is damaged.*--repair"):
        if read == "at once":
            assert layer.digest
        for start in range(0, layer.size, 30_000):
            for _ in layer.blocks(max(start - 10_000, 0), min(start + 30_000, layer.size)):
                pass


def test_an_intact_layer_that_is_read_in_pieces_and_some_of_them_twice_passes(store: Path) -> None:
    layer = plan(read_store())[0]
    content = LayerContent(layer)
    for start in range(0, layer.size, 30_000):
        for _ in content.blocks(max(start - 10_000, 0), min(start + 30_000, layer.size)):
            pass
    assert content.digest == digest_of(layer)


def test_a_store_that_is_not_whole_is_refused_with_the_cure(store: Path) -> None:
    folder = store / "models" / FIRST / "0123456789ab"
    with (folder / "config.json").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ImageError, match=r"config\.json has 15 bytes, and its lock says 14: .*--repair"):
        read_store()
    (folder / "config.json").unlink()
    with pytest.raises(ImageError, match=r"config\.json is missing: .*--repair"):
        read_store()
    (folder / "snapshot.lock.json").write_text("{")
    with pytest.raises(ImageError, match=r"snapshot\.lock\.json cannot be used .*--repair"):
        read_store()
    (folder.parent / "latest").unlink()
    with pytest.raises(ImageError, match=f"has no {FIRST}: python models/import_models.py --only {FIRST}"):
        read_store()
