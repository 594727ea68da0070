"""Problems and the error that carries them."""

from __future__ import annotations

import pickle

import pytest

from shardway.core.errors import Code, Problem, Problems, ShardwayError

PROBLEM = Problem(
    code=Code.SHAPE_MISMATCH,
    what="w has the wrong shape",
    tensor="w",
    file="f.safetensors",
    facts=("expected [1]", "got [2]"),
    cure="check the config",
)


def test_a_problem_in_text() -> None:
    assert str(PROBLEM) == (
        "shape-mismatch: w has the wrong shape\n  expected [1]\n  got [2]\n  file f.safetensors\n  check the config"
    )
    assert str(Problem(code=Code.IO_FAILED, what="broken")) == "io-failed: broken"


def test_an_error_carries_all_problems() -> None:
    other = Problem(code=Code.TENSOR_MISSING, what="v is missing")
    error = ShardwayError([PROBLEM, other])
    assert error.problems == (PROBLEM, other)
    assert error.code is Code.SHAPE_MISMATCH
    assert error.codes == {"shape-mismatch", "tensor-missing"}
    assert str(error) == f"{PROBLEM}\n{other}"


def test_an_error_travels_between_processes() -> None:
    again = pickle.loads(pickle.dumps(ShardwayError(PROBLEM)))
    assert isinstance(again, ShardwayError)
    assert again.problems == (PROBLEM,)


def test_problems_are_gathered() -> None:
    problems = Problems()
    problems.raise_if_any()
    problems.add(Code.IO_FAILED, "one", facts=(str(k) for k in range(2)))
    problems.extend([PROBLEM])
    assert len(problems) == 2
    with pytest.raises(ShardwayError) as caught:
        problems.raise_if_any()
    assert [problem.facts for problem in caught.value.problems] == [("0", "1"), PROBLEM.facts]


def test_codes_are_stable() -> None:
    assert len({code.value for code in Code}) == len(Code)
    assert all(code.value == code.name.lower().replace("_", "-") for code in Code)
