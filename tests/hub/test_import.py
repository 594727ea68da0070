"""Imports from the Hub: what is fetched, what is kept, and what happens when it does not come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.hub.conftest import stored_bytes
from tests.tiny import Tiny, write_model, write_safetensors

import shardway
from shardway import Code, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.hub.server import FakeHub

NAME = "org/model"
MODEL = Tiny(layers=6, hidden=16, ffn=24, vocab=40)
LARGER = Tiny(layers=10, hidden=64, ffn=512, vocab=64)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """The model, of five files, with code beside it and a tokenizer."""
    folder = write_in_order(tmp_path / "origin", MODEL, 5)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "modeling_model.py").write_text("raise SystemExit\n")
    (folder / "README.md").write_text("# a model\n")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"weights of another kind")
    return folder


@pytest.fixture
def sha(hub: FakeHub, origin: Path, elsewhere: Path) -> str:
    """The commit of the model on the Hub."""
    return hub.add(NAME, origin)


def write_in_order(path: Path, model: Tiny, num_files: int, seed: int = 0) -> Path:
    """Write a model as most are published: its layers lie in order, and files end in the midst of them."""
    weights = model.weights(seed)
    total, files, passed = sum(array.nbytes for array in weights.values()), {}, 0
    for name, array in weights.items():
        files[name] = f"model-{1 + passed * num_files // total:05d}-of-{num_files:05d}.safetensors"
        passed += array.nbytes
    write_model(path, model.config, {}, num_files=2)
    for file in set(files.values()):
        write_safetensors(path / file, {name: ("BF16", weights[name]) for name in weights if files[name] == file})
    for number in (1, 2):
        if num_files != 2:
            (path / f"model-{number:05d}-of-00002.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return path


def weights_of(origin: Path) -> set[str]:
    return {path.name for path in origin.glob("*.safetensors")}


@pytest.mark.parametrize("keep", [True, False])
def test_an_import_from_the_hub_is_that_of_the_directory(hub: FakeHub, origin: Path, sha: str, keep: bool) -> None:
    report = shardway.import_hf(NAME, "ckpt", keep_source=keep)
    assert shardway.verify(origin, "ckpt").equal
    assert shardway.verify("ckpt").equal
    assert report.source == NAME
    assert any(sha in note for note in report.notes)
    assert any("modeling_model.py" in note for note in report.notes)
    record = json.loads(Path("ckpt/iter_0000000/shardway.json").read_text())
    assert record["source"] == f"hub:{NAME}@{sha}"
    assert set(hub.fetched()) == weights_of(origin) | {
        "config.json", "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip
    assert len(hub.fetched()) == len(set(hub.fetched()))
    assert not [name for name in hub.asked() if name.endswith((".py", ".md", ".pth"))]
    assert sorted(path.name for path in Path("ckpt/iter_0000000/hf").iterdir()) == ["config.json", "tokenizer.json"]
    assert sorted(path.name for path in Path().iterdir()) == ["ckpt"]


def test_what_is_in_the_cache_is_not_fetched_again(hub: FakeHub, origin: Path, sha: str) -> None:
    shardway.import_hf(NAME, "ckpt")
    hub.requests.clear()
    assert not shardway.import_hf(NAME, "other").reused
    assert not hub.fetched()
    assert shardway.verify(origin, "other").equal


@pytest.mark.parametrize("keep", [True, False])
def test_the_same_commit_is_reused_without_a_download(hub: FakeHub, origin: Path, sha: str, keep: bool) -> None:
    shardway.import_hf(NAME, "ckpt", keep_source=keep)
    hub.requests.clear()
    assert shardway.import_hf(NAME, "ckpt", revision=sha, keep_source=keep, if_exists="reuse").reused
    assert not set(hub.fetched()) & weights_of(origin)
    hub.add(NAME, Tiny(layers=6, hidden=16, ffn=24, vocab=40).write(origin.parent / "new", seed=1, num_files=5))
    with pytest.raises(ShardwayError, match="made from other files") as error:
        shardway.import_hf(NAME, "ckpt", keep_source=keep, if_exists="reuse")
    assert error.value.code is Code.DESTINATION_EXISTS


def test_a_revision_is_what_is_imported(hub: FakeHub, origin: Path, sha: str) -> None:
    other = MODEL.write(origin.parent / "other", seed=7, num_files=2)
    hub.add(NAME, other, "v2")
    report = shardway.import_hf(NAME, "v2", revision="v2")
    assert shardway.verify(other, "v2").equal
    assert sha not in " ".join(report.notes)
    shardway.import_hf(NAME, "old", revision=sha)
    assert shardway.verify(origin, "old").equal


@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
def test_without_keeping_two_files_are_there_at_a_time(
    hub: FakeHub, tmp_path: Path, elsewhere: Path, cache: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardway.hub.supply import HubSupply

    origin = write_in_order(tmp_path / "origin", LARGER, 10)
    hub.add(NAME, origin)
    seen: list[tuple[int, int]] = []

    def look(*_: object) -> None:
        fetched = [path for path in elsewhere.rglob(".*/source-*/model-*") if not path.is_symlink()]
        seen.append((len(fetched), stored_bytes(elsewhere, cache)))

    hub.on_file = look
    for method in ("wait", "release"):  # when most is there
        real = getattr(HubSupply, method)

        def watched(supply: HubSupply, names: Iterable[str], real: Callable[..., None] = real) -> None:
            look()
            real(supply, names)
            look()

        monkeypatch.setattr(HubSupply, method, watched)
    shardway.import_hf(NAME, "ckpt", layout=layout, keep_source=False, fsync=False)
    assert shardway.verify(origin, "ckpt").equal
    largest = max(path.stat().st_size for path in origin.glob("*.safetensors"))
    assert max(count for count, _ in seen) == 2
    assert max(disk for _, disk in seen) <= stored_bytes(Path("ckpt")) + 2 * largest
    assert not cache.exists()
    assert stored_bytes(origin) > 7 * largest


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: FakeHub, origin: Path, sha: str) -> None:
    name = "model-00002-of-00005.safetensors"
    hub.break_off[name] = [1000]
    shardway.import_hf(NAME, "ckpt", keep_source=False)
    assert shardway.verify(origin, "ckpt").equal
    assert [span for _, path, span in hub.requests if path.startswith("/large") and path.endswith(name)][-2:] == [
        "", "bytes=1000-",
    ]  # fmt: skip


@pytest.mark.parametrize("keep", [True, False])
def test_bytes_that_are_not_what_the_hub_states_are_refused(
    hub: FakeHub, origin: Path, sha: str, cache: Path, keep: bool
) -> None:
    name = "model-00003-of-00005.safetensors"
    data = bytearray((origin / name).read_bytes())
    data[-1] ^= 1
    hub.lies[name] = bytes(data)
    with pytest.raises(ShardwayError, match="expected sha256") as error:
        shardway.import_hf(NAME, "ckpt", keep_source=keep)
    assert error.value.codes == {Code.DOWNLOAD_DAMAGED}
    assert not Path("ckpt/iter_0000000").exists()
    assert not [path for path in cache.rglob("*") if path.name == name]
    hub.lies.clear()
    hub.requests.clear()
    report = shardway.import_hf(NAME, "ckpt", keep_source=keep)
    assert shardway.verify(origin, "ckpt").equal
    assert name in hub.fetched()
    assert not report.resumed


def test_a_header_that_changes_between_two_requests_is_refused(hub: FakeHub, origin: Path, sha: str) -> None:
    """The plan was made by the first one, which gave two tensors each other's place."""
    name = "model-00003-of-00005.safetensors"
    data = (origin / name).read_bytes()
    swapped = data.replace(b"k_proj", b"@").replace(b"v_proj", b"k_proj").replace(b"@", b"v_proj")
    assert data.count(b"k_proj") == data.count(b"v_proj")
    assert swapped != data
    hub.header_lies[name] = swapped
    with pytest.raises(ShardwayError, match="header") as error:
        shardway.import_hf(NAME, "ckpt")
    assert error.value.codes == {Code.DOWNLOAD_DAMAGED}


def test_an_import_that_lost_its_network_goes_on(hub: FakeHub, tmp_path: Path, elsewhere: Path) -> None:
    origin = write_in_order(tmp_path / "origin", LARGER, 10)
    hub.add(NAME, origin)
    names = sorted(weights_of(origin))
    refused = f"/{NAME}/resolve/{hub.repos[NAME].branches['main']}/{names[6]}"
    hub.on_file = lambda name: hub.refuse.update({refused: 503} if name == names[4] else {})
    with pytest.raises(ShardwayError) as error:
        shardway.import_hf(NAME, "ckpt", keep_source=False, max_file_size=200_000)
    assert error.value.codes == {Code.HUB_UNREACHABLE}
    assert not Path("ckpt/iter_0000000").exists()
    assert set(hub.fetched()) & set(names) == set(names[:6])
    hub.refuse.clear()
    hub.on_file = lambda _: None
    hub.requests.clear()
    report = shardway.import_hf(NAME, "ckpt", keep_source=False, max_file_size=200_000)
    assert report.resumed > 3
    assert not set(hub.fetched()) & set(names[:4])
    assert shardway.verify(origin, "ckpt").equal
    assert shardway.verify("ckpt").equal
    assert sorted(path.name for path in Path("ckpt").iterdir()) == [
        "iter_0000000", "latest_checkpointed_iteration.txt", "latest_train_state.pt",
    ]  # fmt: skip


def test_what_was_left_is_removed_by_clean(hub: FakeHub, origin: Path, sha: str) -> None:
    refused = f"/{NAME}/resolve/{sha}/model-00004"
    hub.on_file = lambda name: hub.refuse.update({refused: 403} if name.startswith("model-00002") else {})
    with pytest.raises(ShardwayError) as error:
        shardway.import_hf(NAME, "ckpt", keep_source=False)
    assert error.value.codes == {Code.HUB_REFUSED}
    assert stored_bytes(Path()) > 0
    shardway.clean("ckpt/iter_0000000")
    shardway.clean("ckpt")
    assert stored_bytes(Path("ckpt")) == 0


@pytest.mark.parametrize("keep", [True, False])
def test_a_head_that_is_a_copy_is_compared_as_it_passes(
    hub: FakeHub, tmp_path: Path, elsewhere: Path, keep: bool
) -> None:
    model = Tiny(layers=2, tied=True)
    weights = model.weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    origin = write_model(tmp_path / "same", model.config, weights, "BF16", num_files=3)
    hub.add(NAME, origin)
    shardway.import_hf(NAME, "ckpt", keep_source=keep)
    assert shardway.verify(origin, "ckpt").equal
    weights["lm_head.weight"][3, 3] ^= 1
    hub.add("org/other", write_model(tmp_path / "other", model.config, weights, "BF16", num_files=3))
    with pytest.raises(ShardwayError) as error:
        shardway.import_hf("org/other", "other", keep_source=keep)
    assert error.value.codes == {Code.TIED_WEIGHTS_DIFFER}
    assert not Path("other").exists()


@pytest.mark.parametrize("keep", [True, False])
def test_quantised_weights_wait_for_their_scales(hub: FakeHub, tmp_path: Path, elsewhere: Path, keep: bool) -> None:
    """Which lie in another file."""
    weights = MODEL.weights()
    codes = {name: array for name, array in weights.items() if name.endswith("_proj.weight")}
    rng = np.random.default_rng(3)
    stored = {name: ("BF16", array) for name, array in weights.items() if name not in codes}
    stored |= {name: ("F8_E4M3", (array & 0x7E).astype(np.uint8)) for name, array in codes.items()}
    scales = {f"{name}_scale_inv": ("F32", rng.random((1, 1), np.float32).view(np.uint32)) for name in codes}
    config = {**MODEL.config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    origin = write_model(tmp_path / "origin", config, {}, num_files=2)
    files = {"model-00001-of-00002.safetensors": stored, "model-00002-of-00002.safetensors": scales}
    for file, tensors in files.items():
        write_safetensors(origin / file, tensors)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (origin / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    hub.add(NAME, origin)
    report = shardway.import_hf(NAME, "ckpt", keep_source=keep)
    assert sum(report.dequantised.values()) == len(codes)
    assert shardway.verify(origin, "ckpt").equal
