"""A filesystem that is really full: a small tmpfs, in a user and mount namespace of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import Tiny, read_distcp, same

import shardway

MODEL = Tiny(layers=4, hidden=32, ffn=64, vocab=64)
SCRIPT = """
import json, os, shutil, sys
from pathlib import Path
import shardway
from tests.faults.scenes import litter

hf, small, old, needed = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
found = []
class Usage:
    free = 10**12  # others take what was free when the run began
shutil.disk_usage = lambda path: Usage
for free in range(0, needed + 160_000, 8192):
    shutil.copytree(old, small / "out")
    have = os.statvfs(small)
    ballast = have.f_bavail * have.f_frsize - free
    if ballast > 0:
        with open(small / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, ballast)
    try:
        shardway.import_hf(hf, small / "out", if_exists="replace", max_file_size=20000)
        end = "done"
    except shardway.ShardwayError as error:
        end = sorted(error.codes)
        assert "free space" in str(error), str(error)
    whole = shardway.is_complete(small / "out")
    found.append([end, whole, bool(shardway.verify(hf, small / "out").equal), litter(small)])
    shutil.rmtree(small / "out")
    if ballast > 0:
        (small / "ballast").unlink()
print(json.dumps(found))
"""


def test_at_every_size(tmp_path: Path) -> None:
    hf = MODEL.write(tmp_path / "hf")
    shardway.import_hf(MODEL.write(tmp_path / "other", seed=5), tmp_path / "old", fsync=False)
    assert same(read_distcp(tmp_path / "old"), MODEL.megatron(MODEL.weights(5)))
    needed = shardway.plan(hf, max_file_size=20000).disk_bytes
    small = tmp_path / "small"
    small.mkdir()
    mount = f'mount -t tmpfs -o size={4 * needed + 2**20} none {small} && exec "$0" "$@"'
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT, str(hf), str(small), str(tmp_path / "old"), str(needed)]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, *command],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"},
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 20
    ends = [end for end, *_ in found]
    assert ends[0] == ["no-space"]
    assert ends[-1] == "done"
    assert ends == [["no-space"]] * ends.index("done") + ["done"] * (len(ends) - ends.index("done"))
    for end, whole, new, left in found:
        assert whole
        assert new is (end == "done")
        assert left == []
