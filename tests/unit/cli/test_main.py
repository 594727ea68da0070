"""The command line as a user meets it: what is printed where, and the exit status."""

from __future__ import annotations

import ctypes
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import shardway
from shardway import __version__
from shardway.cli.main import main
from shardway.cli.progress import _Lines
from shardway.cli.text import human_bytes, human_count, plural, table
from shardway.formats.torch_dist import open_torch_dist
from shardway.run.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

LLAMA = Path(__file__).parents[2] / "fixtures" / "hf" / "llama"
BRIDGE = Path(__file__).parents[2] / "fixtures" / "megatron_bridge_0.7.0"


def test_import_verify_export_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, back = str(tmp_path / "checkpoint"), str(tmp_path / "back")
    assert main(["import", str(LLAMA), checkpoint, "--verify"]) == 0
    imported = capsys.readouterr()
    assert "imported LlamaForCausalLM: 39 tensors, 181 k parameters" in imported.out
    assert "1 file, stacked layout, read back and compared" in imported.out
    assert imported.err == ""  # no terminal, and too short for a line of progress
    assert main(["verify", str(LLAMA), checkpoint]) == 0
    assert "equal: 39 tensors, 362 kB, bit for bit, 31 recorded digests checked" in capsys.readouterr().out
    assert main(["export", checkpoint, back]) == 0
    assert main(["verify", back, str(LLAMA)]) == 0
    assert sorted(os.listdir(back)) == sorted(os.listdir(LLAMA))


def test_difference_gives_status_1_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint"
    assert main(["import", str(LLAMA), str(checkpoint), "--quiet"]) == 0
    (checkpoint / "iter_0000000" / "shardway.json").unlink()
    chunk = open_torch_dist(checkpoint).catalog.tensors["decoder.layers.mlp.linear_fc2.weight"].chunks[2]
    file = checkpoint / "iter_0000000" / chunk.file
    data = bytearray(file.read_bytes())
    data[chunk.offset + 2 * (5 * 128 + 7) + 1] ^= 0x80  # the sign of element [5, 7] of a bfloat16 matrix of 128 columns
    file.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(LLAMA), str(checkpoint)]) == 1
    out = capsys.readouterr().out
    header, row, summary = out.splitlines()
    assert header.split() == ["tensor", "what", "detail", "first", "at", "elements", "max", "abs"]
    assert row.startswith("model.layers.2.mlp.down_proj.weight  values  their bits differ  [5, 7]")
    assert summary == "different: 1 difference in 39 tensors compared"


def test_json_is_all_that_goes_to_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(tmp_path / "checkpoint")
    for arguments, key in (
        (["import", str(LLAMA), checkpoint], "num_tensors"),
        (["verify", str(LLAMA), checkpoint], "differences"),
        (["inspect", checkpoint, "--digest"], "tensors"),
        (["plan", checkpoint], "writes"),
        (["export", checkpoint, str(tmp_path / "back")], "num_files"),
    ):
        assert main([*arguments, "--json"]) == 0
        assert key in json.loads(capsys.readouterr().out)
    assert main(["families", "--json"]) == 0
    assert {"architecture": "Qwen3ForCausalLM", "family": "qwen3"} in json.loads(capsys.readouterr().out)


def test_inspect_digest_has_the_documented_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(BRIDGE / "llama_tp2"), "--digest", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    norm = document["tensors"]["decoder.final_layernorm.weight"]
    assert norm["shape"] == [64]
    assert norm["dtype"] == "bfloat16"
    assert norm["sha256"] == "25a896846c1649c164de71b38960388da051fcd1e001e35221d693ecab57d34a"
    assert not any("_extra_state" in name for name in document["tensors"])
    assert any("_extra_state" in name for name in document["objects"])


def test_errors_go_to_standard_error_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("not-a-checkpoint: ")
    assert main(["import", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["error"]
    assert problem["code"] == "not-a-checkpoint"
    assert os.listdir(tmp_path) == []


def test_plan_lists_problems_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("model.safetensors", "config.json"):
        (source / name).write_bytes((LLAMA / name).read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "mlp_bias": True}))
    assert main(["plan", str(source), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["feasible"] is False
    assert "model.layers.3.mlp.up_proj.weight" in document["unclaimed"]
    assert "model.layers.2.mlp.up_proj.bias" in document["missing"]
    assert main(["plan", str(source)]) == 1
    assert "describes 3 layers, and the weights hold 4" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["import", "a"],
        ["import", "a", "b", "--dtype", "int8"],
        ["import", "a", "b", "--release", "--iteration", "3"],
        ["export", "a", "b", "--if-exists", "ask"],
        ["convert"],
    ],
)
def test_wrong_usage_gives_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: shardway" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--workers", "0"], ["--max-file-size", "5 apples"], ["--iteration", "-1"]])
def test_impossible_values_are_errors(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(LLAMA), str(tmp_path / "out"), *option]) == 1
    assert capsys.readouterr().err.startswith("option-invalid: ")
    assert os.listdir(tmp_path) == []


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("import", "export", "verify", "inspect", "plan", "families"))
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"shardway {__version__}\n"


@pytest.mark.parametrize(
    ("redirected", "status", "told"),
    [
        ("| cat", 0, ""),
        (">&-", 0, ""),
        ("> /dev/full", 1, "shardway: could not write all of the output: No space left on device\n"),
    ],
)
def test_the_process_ends_when_its_output_is_written(redirected: str, status: int, told: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m shardway inspect {LLAMA} --json {redirected}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=buffered)
    assert (ended.returncode, ended.stderr) == (status, told)
    assert not ended.stdout or json.loads(ended.stdout)["architecture"] == "LlamaForCausalLM"
    assert bool(ended.stdout) == (redirected == "| cat")


def test_reports_share_nothing_with_what_they_are_printed_from(tmp_path: Path) -> None:
    shardway.import_hf(LLAMA, tmp_path / "megatron", fsync=False)
    report = shardway.export_hf(tmp_path / "megatron", tmp_path / "hf", fsync=False)
    printed = report.to_dict()
    assert isinstance(printed["dtypes"], dict)
    printed["dtypes"].clear()
    assert report.dtypes == {"bfloat16": 39}


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    """On a pseudo-terminal, with reads slowed down so that the bar has time to appear."""
    slow = (
        "import sys, time, os; real = os.preadv\n"
        "def preadv(*a):\n    time.sleep(0.03)\n    return real(*a)\n"
        "os.preadv = preadv\n"
        "from shardway.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "import", str(LLAMA), str(tmp_path / "out"), "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=child,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(child)
    drawn = io.BytesIO()
    try:
        while True:
            drawn.write(os.read(parent, 65536))
    except OSError:  # the terminal's other end is closed
        pass
    out, _ = process.communicate(timeout=60)
    os.close(parent)
    assert process.returncode == 0
    assert b"imported LlamaForCausalLM" in out
    assert b"copy" in drawn.getvalue()
    assert b"kB" in drawn.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr("shardway.cli.progress.time.monotonic", lambda: now)
    lines = _Lines()
    show: Callable[[Progress], None] = lines.show
    for second in range(13):
        now = float(second)
        show(Progress("copy", second * 10**9, 20 * 10**9))
    printed = capsys.readouterr().err.splitlines()
    assert printed == [
        "copy  25%  5 GB of 20 GB  1 GB/s  15 s left",
        "copy  50%  10 GB of 20 GB  1 GB/s  10 s left",
    ]


def test_numbers_and_tables() -> None:
    assert [human_bytes(n) for n in (0, 999, 2_480_000_000, 3e15)] == ["0 B", "999 B", "2.48 GB", "3e+03 TB"]
    assert [human_count(n) for n in (12, 180_800, 1.24e9, 1e12)] == ["12", "181 k", "1.24 B", "1 T"]
    assert [plural(n, "file") for n in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]
    assert (
        table(("name", "n", "empty"), [("a", "1", ""), ("bcd", "1,000", "")]) == "name      n\na         1\nbcd   1,000"
    )


def test_verify_of_one_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(LLAMA), str(tmp_path / "m"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "m")]) == 0
    assert capsys.readouterr().out.startswith("undamaged: 9 tensors, ")
    path = tmp_path / "m/iter_0000000/__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes((data[1000] ^ 4,)) + data[1001:])
    assert main(["verify", str(tmp_path / "m")]) == 1
    out = capsys.readouterr().out
    assert "damaged" in out
    assert str(path) in out
    assert out.endswith("damaged: 1 place not as recorded\n")
    assert main(["verify", str(tmp_path / "m"), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["equal"], document["b"], document["differences"][0]["file"]) == (False, None, str(path))
    assert main(["verify", str(LLAMA)]) == 1
    assert "record-missing" in capsys.readouterr().err


_BLOCKS = """
import ctypes
from shardway.cli.main import main

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks a b c d e f".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
main(["families"])
large = bytes(2**23)
del large  # from now on, glibc by itself takes blocks up to that size from its heap
before = libc.mallinfo2().hblks
kept = bytes(2**20)
print("blocks of their own:", libc.mallinfo2().hblks - before)
"""


@pytest.mark.parametrize(("setting", "found"), [(None, 1), (str(2**25), 0)], ids=["by itself", "the user's"])
def test_large_blocks_of_memory_are_given_back(setting: str | None, found: int) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("not glibc 2.33 or later")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if setting is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = setting
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKS], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.endswith(f"blocks of their own: {found}\n")
