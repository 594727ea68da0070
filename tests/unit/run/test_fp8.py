"""Quantising to FP8: the codes are torch's, and values that came from blocks are given back to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.quantised import fp8_codes

from shardway.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from shardway.run.dequantise import fp8_values
from shardway.run.fp8 import nearest_codes, quantise


def as_dtype(values: Any, dtype: Any) -> Any:
    return values.astype(dtype.numpy()).astype(np.float32)


def came_back(found: Any, dtype: Any) -> Any:
    return as_dtype(fp8_values()[found.codes] * found.scales[:, None], dtype)


def test_codes_are_torchs() -> None:
    rng = np.random.default_rng(0)
    every = fp8_values()[np.arange(256)]
    finite = np.sort(every[np.isfinite(every)])
    ties = (finite[1:] + finite[:-1]) / 2
    values = np.concatenate(
        [
            every,
            ties,
            np.nextafter(ties, np.float32(np.inf)),
            np.nextafter(ties, np.float32(-np.inf)),
            rng.normal(0, 100, 20000).clip(-448, 448),
            rng.normal(0, 0.01, 20000),
            [1e-45, -1e-45, 2.0**-10, 2.0**-11, -0.0, 448, -448],
        ]
    ).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    numbers = np.isfinite(values)
    assert (nearest_codes(values)[numbers] == expected[numbers]).all()
    assert np.isnan(fp8_values()[nearest_codes(values)][~numbers]).all()
    assert (nearest_codes(np.array([460, 1e9, -np.inf], np.float32)) == [0x7E, 0x7E, 0xFE]).all()


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("top", [448, 416, 384, 352, 320, 288, 256, 240, 224, 13, 0.5])
def test_what_came_from_a_block_is_given_back_to_the_bit(top: float, dtype: Any) -> None:
    rng = np.random.default_rng(int(top))
    codes = fp8_codes(rng, (24, 1000), nans=True)
    codes[np.abs(np.nan_to_num(fp8_values()[codes])) > top] = 0x80
    codes[:, 7] = nearest_codes(np.array([top], np.float32))[0]
    scales = np.exp(rng.uniform(-12, 3, 24)).astype(np.float32)
    values = as_dtype(fp8_values()[codes] * scales[:, None], dtype)
    found = quantise(values, dtype)
    assert found.exact.all()
    assert found.error == 0
    back = came_back(found, dtype)
    numbers = ~np.isnan(values)
    assert (back[numbers].view(np.uint32) == values[numbers].view(np.uint32)).all()
    assert np.isnan(back[~numbers]).all()


def test_any_other_block_is_scaled_by_its_largest_value() -> None:
    rng = np.random.default_rng(1)
    values = as_dtype(rng.normal(0, 0.02, (8, 4096)).astype(np.float32), BFLOAT16)
    values[3] = 0
    values[4, 1:] = 0
    found = quantise(values, BFLOAT16)
    assert found.exact.tolist() == [False, False, False, True, True, False, False, False]
    largest = np.abs(values).max(axis=1)
    others = [0, 1, 2, 5, 6, 7]
    assert (found.scales[others] == largest[others] / np.float32(448)).all()
    expected = torch.from_numpy(values / found.scales[:, None]).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert (found.codes[others] == expected[others]).all()
    difference = np.abs(came_back(found, BFLOAT16) - values)
    assert found.error == difference.max()
    assert (difference <= np.maximum(np.abs(values) / 14, largest[:, None] * 2.0**-17)).all()


def test_scales_that_are_to_be_powers_of_two_are() -> None:
    rng = np.random.default_rng(2)
    scales = np.exp2(rng.integers(-12, 3, 16)).astype(np.float32)
    codes = fp8_codes(rng, (16, 512))
    codes[:, 0] = 0x7E
    values = fp8_values()[codes] * scales[:, None]
    found = quantise(values, BFLOAT16, powers=True)
    assert found.exact.all()
    assert (found.scales == scales).all()
    rough = quantise(rng.normal(0, 1, (4, 512)).astype(np.float32), FLOAT32, powers=True)
    assert (np.frexp(rough.scales)[0] == 0.5).all()
    assert (np.abs(fp8_values()[rough.codes]) <= 448).all()


def test_half_precision_and_the_smallest_values() -> None:
    values = np.array([[6e-8, 0, -6e-8, 1.2e-7], [65504, 1, 0, -1]], np.float16).astype(np.float32)
    found = quantise(values, FLOAT16)
    assert np.isfinite(came_back(found, FLOAT16)).all()
    assert found.exact[0]
    smallest = np.full((1, 4), 1e-45, np.float32)
    assert quantise(smallest, FLOAT32).error <= 1.5e-45
