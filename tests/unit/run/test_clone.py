"""Sharing extents: with a stand-in for the system call, and on real filesystems where one can be mounted."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import Tiny, bits, read_distcp, read_safetensors, same

import shardway
from shardway.run.clone import Cloner
from shardway.run.files import Files

if TYPE_CHECKING:
    from collections.abc import Iterator

# Layers of 64 KiB and more, some of which are multiples of a block and some not.
MODEL = Tiny(layers=2, hidden=256, heads=4, groups=2, head_dim=64, ffn=300, vocab=500)


class Kernel:
    """FICLONERANGE, done by copying; refuses what a kernel refuses."""

    def __init__(self, refuse_after: int = 10**9) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.refuse_after = refuse_after

    def ioctl(self, target: int, request: int, argument: bytes) -> int:
        assert request == 0x4020940D
        source, offset, length, place = struct.unpack("qQQQ", argument)
        if offset % 4096 or length % 4096 or place % 4096 or not length:
            raise OSError(22, "Invalid argument")
        if len(self.calls) >= self.refuse_after:
            raise OSError(95, "Operation not supported")
        self.calls.append((offset, length, place))
        os.pwrite(target, os.pread(source, length, offset), place)
        return 0


@settings(max_examples=200, deadline=None)
@given(offset=st.integers(0, 20_000), shift=st.sampled_from([0, 4096, -4096, 1, 8]), num_bytes=st.integers(0, 30_000))
def test_what_is_shared_is_whole_blocks(offset: int, shift: int, num_bytes: int) -> None:
    place = offset + shift if offset + shift >= 0 else offset
    kernel = Kernel()
    with mock.patch.object(fcntl, "ioctl", kernel.ioctl), Files(Path("/dev"), writable=True) as files:
        cloner = Cloner(files, files)
        begin, end = cloner.share("null", offset, "null", place, num_bytes)
    assert cloner.supported
    if not kernel.calls:
        assert (begin, end) == (num_bytes, num_bytes)
        whole_blocks = (offset + num_bytes) // 4096 - -(-offset // 4096)
        assert (place - offset) % 4096 or whole_blocks <= 0
        return
    assert kernel.calls == [(offset + begin, end - begin, place + begin)]
    assert 0 <= begin < 4096
    assert num_bytes - 4096 < end <= num_bytes


def test_one_refusal_is_enough() -> None:
    kernel = Kernel(refuse_after=0)
    with mock.patch.object(fcntl, "ioctl", kernel.ioctl), Files(Path("/dev")) as files:
        cloner = Cloner(files, files)
        assert cloner.share("null", 0, "null", 0, 8192) == (8192, 8192)
        assert not cloner.supported
        kernel.refuse_after = 10
        assert cloner.share("null", 0, "null", 0, 8192) == (8192, 8192)
    assert kernel.calls == []


@pytest.mark.parametrize("refuse_after", [0, 1, 5, 10**9])
@pytest.mark.parametrize("options", [{}, {"layout": "per-layer"}, {"max_file_size": 200_000}, {"workers": 3}])
def test_an_import_is_the_same_with_and_without(
    refuse_after: int, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MODEL.write(tmp_path / "hf", num_files=2)
    shardway.import_hf(tmp_path / "hf", tmp_path / "plain", fsync=False, **options)  # type: ignore[arg-type]
    kernel = Kernel(refuse_after)
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    report = shardway.import_hf(tmp_path / "hf", tmp_path / "shared", fsync=False, verify=True, **options)  # type: ignore[arg-type]
    assert len(kernel.calls) == min(refuse_after, len(kernel.calls))
    if refuse_after > 10:
        assert sum(length for _, length, _ in kernel.calls) > report.num_bytes / 2
    per_layer = options.get("layout") == "per-layer"
    assert same(read_distcp(tmp_path / "shared"), MODEL.megatron(MODEL.weights(), per_layer=per_layer))
    for path in (tmp_path / "plain/iter_0000000").glob("*.distcp"):
        assert path.read_bytes() == (tmp_path / "shared/iter_0000000" / path.name).read_bytes()


def test_a_cast_shares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    Tiny(hidden=256, ffn=300).write(tmp_path / "hf")
    shardway.import_hf(tmp_path / "hf", tmp_path / "out", dtype="fp32", fsync=False)
    assert kernel.calls == []


@pytest.fixture(params=["xfs", "btrfs"])
def sharing_filesystem(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small filesystem that can share extents, mounted from a file; needs root and the filesystem's tools."""
    make = shutil.which(f"mkfs.{request.param}")
    if os.geteuid() != 0 or make is None or shutil.which("mount") is None:
        pytest.skip(f"needs root and mkfs.{request.param}")
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(400 * 2**20)
    mounted.mkdir()
    made = subprocess.run([make, "-q", image], capture_output=True, timeout=60)
    if made.returncode:
        pytest.skip(f"mkfs.{request.param} failed: {made.stderr.decode()[:200]}")
    done = subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip(f"can't mount a {request.param} image: {done.stderr.decode()[:200]}")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True, timeout=60)


def test_extents_are_shared(sharing_filesystem: Path) -> None:
    root = sharing_filesystem
    model = Tiny(layers=4, hidden=512, heads=8, groups=4, head_dim=64, ffn=1500, vocab=4001)
    model.write(root / "hf", num_files=2)
    os.sync()
    before = shutil.disk_usage(root).used
    report = shardway.import_hf(root / "hf", root / "out", verify=True)
    os.sync()
    taken = shutil.disk_usage(root).used - before
    assert same(read_distcp(root / "out"), model.megatron(model.weights()))
    assert taken < report.num_bytes / 3
    # What is shared is not the same file: a change of the source does not reach the copy.
    with (root / "hf/model-00001-of-00002.safetensors").open("r+b") as file:
        file.write(b"\xff" * 2**20)
    assert same(read_distcp(root / "out"), model.megatron(model.weights()))
    shardway.export_hf(root / "out", root / "back", verify=True)
    assert same(bits(read_safetensors(root / "back").items()), model.weights())
