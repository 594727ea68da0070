"""The table of element types against the libraries whose names it joins."""

from __future__ import annotations

import pytest

from shardway.core.dtypes import all_dtypes, dtype_of_safetensors, dtype_of_torch
from shardway.core.errors import ShardwayError


@pytest.mark.parametrize("dtype", all_dtypes(), ids=lambda dtype: dtype.name)
def test_names_lead_back(dtype: object) -> None:
    from shardway.core.dtypes import DType

    assert isinstance(dtype, DType)
    assert dtype_of_torch(dtype.name) is dtype
    assert dtype_of_torch(f"torch.{dtype.name}") is dtype
    if dtype.safetensors:
        assert dtype_of_safetensors(dtype.safetensors) is dtype
    if dtype.numpy_name:
        assert dtype.numpy().itemsize == dtype.itemsize


def test_sizes_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    for dtype in all_dtypes():
        theirs = getattr(torch, dtype.name, None)
        if theirs is None:  # 6-bit floats, which only safetensors has, and types newer than this torch
            continue
        if dtype.bits % 8 == 0:
            assert theirs.itemsize == dtype.itemsize, dtype.name
            assert (theirs.is_floating_point) == dtype.floating, dtype.name
        if dtype.storage is not None:
            assert torch.storage._dtype_to_storage_type_map()[theirs] == dtype.storage


def test_packed_elements() -> None:
    fp4 = dtype_of_safetensors("F4")
    assert [fp4.num_bytes(count) for count in (0, 1, 2, 3)] == [0, 1, 1, 2]
    for ask in (lambda: fp4.itemsize, fp4.numpy):
        with pytest.raises(ShardwayError) as caught:
            ask()
        assert caught.value.codes == {"dtype-unsupported"}


@pytest.mark.parametrize("look_up", [dtype_of_torch, dtype_of_safetensors])
@pytest.mark.parametrize("name", ["", "float", "bf16", "BFLOAT16"])
def test_there_is_no_default(look_up: object, name: str) -> None:
    assert callable(look_up)
    with pytest.raises(ShardwayError) as caught:
        look_up(name)
    assert caught.value.codes == {"dtype-unknown"}
    assert "known:" in str(caught.value)
