"""Quantising to float8_e4m3fn in blocks that share a scale, so that all that can be give their values back exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardway.run.dequantise import fp8_values

if TYPE_CHECKING:
    import numpy.typing as npt

    from shardway.core.dtypes import DType

    Array = npt.NDArray[Any]

LARGEST = 448.0  # the largest finite value of float8_e4m3fn
_NAN_CODE = 0x7F
_SMALLEST_NORMAL = 2.0**-6
_SUBNORMAL_STEPS = 2.0**9
# What the largest value of a block may have been as a code: every significand, with the largest exponent that it has.
_TOPS = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
_PROBED = 512  # values of a block that show nearly always whether a top is the right one


class Blocks(NamedTuple):
    """Quantised blocks.

    Attributes:
        codes: Codes of float8_e4m3fn [blocks, values].
        scales: float32 [blocks].
        exact: Whether each block gives its values back, bit for bit.
        error: Largest absolute difference of a finite value and what comes back for it.
    """

    codes: Array
    scales: Array
    exact: Array
    error: float


def quantise(values: Array, dtype: DType, *, powers: bool = False) -> Blocks:
    """Quantise blocks, each with a scale of its own.

    A block whose values are codes times a scale, rounded once to `dtype`, gets codes and a scale that give every bit of
    them back: all significands are tried for its largest code, and of each the range of scales that round to the
    values. Any other block gets the scale `largest value / 448`, and the nearest codes.

    Args:
        values: float32 [blocks, values]; NaN becomes the code that is none, infinities are no values that can be.
        dtype: What the values were rounded to: bfloat16, float16 or float32.
        powers: Take powers of two for scales, the smallest with which all values are within range.
    """
    magnitude = np.abs(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)).max(axis=1, initial=0.0)
    safe = np.where(magnitude > 0, magnitude, np.float32(1))
    with np.errstate(all="ignore"):
        if powers:
            scales = np.exp2(np.ceil(np.log2(safe / np.float32(LARGEST)))).astype(np.float32)
        else:
            scales = np.where(magnitude > 0, safe / np.float32(LARGEST), np.float32(1)).astype(np.float32)
        scales = np.maximum(scales, np.float32(2.0**-149))
        codes = nearest_codes(values / scales[:, None])
        exact = _gives_back(codes, scales, values, dtype)
        for top in () if powers else _TOPS:
            left = np.flatnonzero(~exact & (magnitude > 0))
            if not len(left):
                break
            _retry(left, values, safe / np.float32(top), dtype, codes, scales, exact)
        back = _rounded(fp8_values()[codes] * scales[:, None], dtype)
        error = np.abs(back - values)
    return Blocks(codes, scales, exact, float(np.max(error[np.isfinite(values)], initial=0.0)))


def nearest_codes(values: Array) -> Array:
    """The code of float8_e4m3fn that is nearest to each float32 value, ties to even; beyond the range the largest."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    rounded = (magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    normal = np.minimum(rounded.astype(np.int32) - ((127 - 7) << 3), 0x7E)
    wide = magnitude.view(np.float32)
    with np.errstate(invalid="ignore"):
        small = np.rint(np.where(wide < _SMALLEST_NORMAL, wide, np.float32(0)) * np.float32(_SUBNORMAL_STEPS))
        codes = np.where(wide < _SMALLEST_NORMAL, small.astype(np.int32), normal)
    codes[np.isnan(wide)] = _NAN_CODE
    return codes.astype(np.uint8) | (bits >> np.uint32(24)).astype(np.uint8) & np.uint8(0x80)


def _retry(left: Array, values: Array, guesses: Array, dtype: DType, codes: Array, scales: Array, exact: Array) -> None:
    """Look for exact codes and scales of some blocks, given about what their scales are; those found are noted."""
    step = max(1, values.shape[1] // _PROBED)
    probe = values[left, ::step]
    hopeful = left[_range_of(probe, nearest_codes(probe / guesses[left, None]), dtype)[2]]
    if not len(hopeful):
        return
    wanted = values[hopeful]
    found = nearest_codes(wanted / guesses[hopeful, None])
    low, high, possible = _range_of(wanted, found, dtype)
    middle = ((low + high) / 2).astype(np.float32)
    power = np.exp2(np.ceil(np.log2(low))).astype(np.float32)
    fitting = np.where(possible & (power >= low) & (power <= high), power, middle)
    good = possible & _gives_back(found, fitting, wanted, dtype)
    codes[hopeful[good]], scales[hopeful[good]], exact[hopeful[good]] = found[good], fitting[good], True


def _range_of(values: Array, codes: Array, dtype: DType) -> tuple[Array, Array, Array]:
    """Between which scales codes round to values, as float64, and whether there is any such scale."""
    kind = dtype.numpy()
    unsigned = np.dtype(f"u{kind.itemsize}")
    magnitude = np.abs(values).astype(kind)
    bits = magnitude.view(unsigned)
    above = (bits + unsigned.type(1)).view(kind).astype(np.float64)
    below = np.maximum(bits, 1).astype(unsigned)
    below = (below - unsigned.type(1)).view(kind).astype(np.float64)
    wide = magnitude.astype(np.float64)
    code = np.abs(fp8_values()[codes]).astype(np.float64)
    counts = (code > 0) & np.isfinite(wide)
    low = np.max(np.where(counts, (wide + below) / 2 / code, 0.0), axis=1)
    high = np.min(np.where(counts, (wide + above) / 2 / code, np.inf), axis=1)
    lost = np.any((code == 0) & (wide > 0), axis=1)
    return low, high, (low <= high) & np.isfinite(high) & ~lost


def _gives_back(codes: Array, scales: Array, values: Array, dtype: DType) -> Array:
    """For each block whether its codes and scale give its values, bit for bit (any NaN for NaN)."""
    back = _rounded(fp8_values()[codes] * scales[:, None], dtype)
    same = (back.view(np.uint32) == values.view(np.uint32)) | (np.isnan(back) & np.isnan(values))
    return np.asarray(np.all(same, axis=1))


def _rounded(values: Array, dtype: DType) -> Array:
    return np.asarray(values.astype(dtype.numpy()), np.float32)
