"""A short run of the fuzzing that `make fuzz` does for minutes, and limits that have to hold on any bytes."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fuzz.__main__ import NAMES
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import Target, attempt, targets

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def run(*arguments: str) -> str:
    """The output of a process of its own, whose memory can be limited; it must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'src'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_target_takes_its_sound_input(made: dict[str, Target]) -> None:
    assert tuple(made) == NAMES
    for name, target in made.items():
        assert attempt(target, target.seeds[0]) is None, name


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(seed=st.integers(0, 2**64), edits=st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=9)), max_size=3))
def test_changed_inputs(made: dict[str, Target], name: str, seed: int, edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(mutated(made[name].seeds, random.Random(seed)))
    for at, part in edits:
        at %= len(data) + 1
        data[at : at + len(part)] = part
    attempt(made[name], bytes(data))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(data=st.binary(max_size=200))
def test_any_bytes(made: dict[str, Target], name: str, data: bytes) -> None:
    attempt(made[name], data)


def test_many_inputs_within_a_limit_of_memory(tmp_path: Path) -> None:
    output = run("-m", "tests.fuzz", "--here", "chance", "--inputs", "500", "--work", str(tmp_path))
    assert [line.split(":")[0] for line in output.splitlines()] == list(NAMES)
    assert output.count(": 500 inputs") == len(NAMES)


DENSE = """
import pathlib
import sys
from tests.conformance.malformed.attacks import BOMBS
from tests.fuzz.__main__ import limit_memory
from tests.fuzz.targets import PROTOCOL, attempt, targets

LENGTH = 2 << 20
OPCODES = (
    b"}", b"]", b"\\x8f", b"(\\x91", b"\\x85", b")\\x81", b"(", b"N", b"}NNN", b"\\x8a\\x02ab", b"\\x8c\\x02ab",
    b"G12345678", b"X\\x04\\0\\0\\0\\xf0\\x9f\\x98\\x80", b"cmegatron.a\\nb\\n", b"ccollections\\nOrderedDict\\n)R",
)
TEXTS = (b"[", b"[],", b'{"a":', b'"a",', b"1,", b"[1,2],", b'{"abc":{}},', b"\\xf0\\x9f\\x98\\x80")

def many(part):
    return part * (LENGTH // len(part))

def pickles():
    for _, code in BOMBS.values():
        yield PROTOCOL + code + b"."
    for part in OPCODES:
        yield PROTOCOL + b"(" + many(part) + b"t."

def texts():
    for part in TEXTS:
        yield many(part)
        yield b"[" + many(part) + b"1]"

def headers():
    for part in TEXTS:
        for text in (many(part), b'{"a":' + many(part), b'{"a":[' + many(part) + b"1]}"):
            yield len(text).to_bytes(8, "little") + text

made = targets(pathlib.Path(sys.argv[1]))
limit_memory(256 << 20)
for name, inputs in (("pickle", pickles()), ("metadata", pickles()), ("json", texts()), ("safetensors", headers())):
    print(name, len([attempt(made[name], data) for data in inputs]))
"""


def test_inputs_made_to_take_memory(tmp_path: Path) -> None:
    """All of 2 MiB, one after the other, in a process that has 256 MiB for them."""
    assert run("-c", DENSE, str(tmp_path)).split() == [
        "pickle",
        "34",
        "metadata",
        "34",
        "json",
        "16",
        "safetensors",
        "24",
    ]
