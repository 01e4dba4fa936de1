"""Arrays rounded to 8 or 4 bits: codes, scales and the values that they stand for."""

from __future__ import annotations

from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import tensormoe_jax
import tensormoe_numpy
import tensormoe_torch
from tensormoe._rounding import (
    CODES,
    SCALES,
    checked_bits,
    code_shapes,
    entries_within,
    round_to_nearest,
    rounded_values,
    stored_bytes,
)
from tensormoe.errors import ShapeError, SpecError
from tests._rounded import decoded

NUMPY = tensormoe_numpy.BACKEND
TORCH = tensormoe_torch.BACKEND
JAX = tensormoe_jax.BACKEND
BITS = pytest.mark.parametrize("bits", [8, 4])
SHAPES = [(), (1,), (64,), (65,), (3, 5), (4, 64), (2, 3, 43), (0,), (3, 0, 2)]
# what float32 holds without losing digits to its smallest exponents
NUMBERS = st.floats(-1e6, 1e6, width=32).map(lambda each: 0.0 if abs(each) < 1e-20 else each)

# JAX compiles for each
SIZES = st.sampled_from([0, 65])


def rounded(array: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes, scales = round_to_nearest(array, bits, NUMPY)
    return codes, scales, rounded_values(codes, scales, array.shape, bits, NUMPY)


@BITS
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_codes_times_scales(
    bits: int, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    array = rng.standard_normal(shape, dtype="float32")
    codes, scales, values = rounded(np.asarray(array), bits)
    assert {CODES: codes.shape, SCALES: scales.shape} == code_shapes(shape, bits)
    assert codes.dtype == ("int8" if bits == 8 else "uint8")
    assert codes.nbytes + scales.nbytes == stored_bytes(shape, bits, 4)
    np.testing.assert_array_equal(values, decoded(codes, scales, shape, bits).astype("float32"))


@BITS
@given(data=arrays("float32", st.integers(1, 200), elements=NUMBERS))
def test_no_entry_is_off_by_more_than_half_a_step(bits: int, data: np.ndarray) -> None:
    codes, scales, values = rounded(data, bits)
    top = 2 ** (bits - 1)
    numbers = np.round(decoded(codes, np.ones(len(scales)), data.shape, bits))
    for start, scale in zip(range(0, len(data), 64), scales, strict=True):
        given, found = data[start : start + 64], values[start : start + 64]
        largest = np.abs(given).max()
        # eight significant bits of the scale, and the smallest scale that is tried
        assert abs(scale) * top <= largest * (1 + 2**-8)
        assert abs(scale) * top >= largest * (1.0 if bits == 8 else 0.75) * (1 - 2**-8)
        inside = np.abs(numbers[start : start + 64]) < top - 1
        assert (np.abs(found - given)[inside] <= 0.5001 * abs(scale)).all()
        # the rest is at the ends of the codes, on its own side
        assert (found * given >= 0)[~inside].all()


@BITS
def test_the_error_is_that_of_the_best_uniform_rounding(
    bits: int, rng: np.random.Generator
) -> None:
    """Next to plain rounding by the largest magnitude, of normal numbers and of heavy tails."""
    for data in (rng.standard_normal(2**16), rng.standard_t(5, 2**16)):
        array = data.astype("float32")
        groups = array.reshape(-1, 64)
        top = 2 ** (bits - 1) - 1
        scale = np.abs(groups).max(1, keepdims=True) / top
        plain = (np.round(groups / scale) * scale).reshape(-1)
        ours = np.linalg.norm(rounded(array, bits)[2] - array)
        theirs = np.linalg.norm(plain - array)
        assert ours < (1.001 if bits == 8 else 0.86) * theirs


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@given(data=arrays("float32", st.integers(1, 150), elements=st.floats(-6e4, 6e4, width=16)))
def test_what_was_rounded_has_the_same_codes_again(
    dtype: torch.dtype, bits: int, data: np.ndarray
) -> None:
    array = torch.tensor(data).to(dtype)
    codes, scales = round_to_nearest(array, bits, TORCH)
    values = rounded_values(codes, scales, tuple(array.shape), bits, TORCH)
    assert values.dtype == scales.dtype == dtype
    assert torch.isfinite(values).all()
    again = round_to_nearest(values, bits, TORCH)
    assert torch.equal(rounded_values(*again, tuple(array.shape), bits, TORCH), values)


@BITS
@given(data=SIZES.flatmap(lambda size: arrays("float32", size, elements=NUMBERS)))
def test_every_library_rounds_alike(bits: int, data: np.ndarray) -> None:
    codes, scales, values = rounded(data, bits)
    for array, backend in ((torch.tensor(data), TORCH), (jnp.asarray(data), JAX)):
        found: Any = round_to_nearest(array, bits, backend)
        np.testing.assert_array_equal(np.asarray(found[0]), codes)
        np.testing.assert_array_equal(np.asarray(found[1]), scales)
        made: Any = rounded_values(*found, data.shape, bits, backend)
        np.testing.assert_array_equal(np.asarray(made), values)


@BITS
@given(data=arrays("float32", st.integers(1, 150), elements=NUMBERS))
def test_scales_are_the_same_in_bfloat16(bits: int, data: np.ndarray) -> None:
    scales = torch.tensor(rounded(data, bits)[1])
    assert torch.equal(scales.bfloat16().float(), scales)


@BITS
def test_large_arrays_are_rounded_in_pieces(bits: int, rng: np.random.Generator) -> None:
    array = rng.standard_normal(2**20 + 2**10 + 7, dtype="float32")
    _, scales, values = rounded(array, bits)
    assert scales.shape == (-(-array.size // 64),)
    tail = array[2**20 :]
    own = rounded(tail, bits)
    np.testing.assert_array_equal(values[2**20 :], own[2])
    np.testing.assert_array_equal(scales[2**14 :], own[1])
    assert np.linalg.norm(values - array) < (0.007 if bits == 8 else 0.1) * np.linalg.norm(array)


@BITS
@pytest.mark.parametrize("exponent", [-100, -40, 40, 90])
def test_numbers_of_any_size_are_rounded_alike(
    bits: int, exponent: int, rng: np.random.Generator
) -> None:
    array = rng.standard_normal(300, dtype="float32")
    codes, scales, _ = rounded(array, bits)
    found = rounded(np.ldexp(array, exponent), bits)
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1], np.ldexp(scales, exponent))


@BITS
def test_the_largest_float16_stays_finite(bits: int) -> None:
    array = torch.tensor([65504.0, -65504.0, 3.0], dtype=torch.float16)
    codes, scales = round_to_nearest(array, bits, TORCH)
    values = rounded_values(codes, scales, (3,), bits, TORCH)
    assert torch.isfinite(values).all()
    assert values.abs().max() > 65000


@BITS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e31])
def test_what_has_no_scale_is_refused(bits: int, value: float) -> None:
    array = np.ones(70, "float32")
    array[66] = value
    with pytest.raises(ShapeError, match="finite"):
        round_to_nearest(array, bits, NUMPY)


@BITS
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@given(size=st.integers(0, 3000))
def test_as_many_entries_as_fit_in_bytes(bits: int, itemsize: int, size: int) -> None:
    count = entries_within(size, bits, itemsize)
    assert stored_bytes((count,), bits, itemsize) <= size
    assert stored_bytes((count + 1,), bits, itemsize) > size


def test_bytes_are_those_of_a_dtype_without_bits() -> None:
    assert stored_bytes((3, 5), None, 2) == 30
    assert entries_within(31, None, 2) == 15


@given(st.lists(st.integers(0, 9), max_size=3))
def test_codes_of_4_bits_take_half_a_byte(shape: list[int]) -> None:
    found = code_shapes(tuple(shape), 4)
    assert found[CODES] == (-(-prod(shape) // 64), 32)
    assert code_shapes(tuple(shape), 8)[CODES] == tuple(shape)


@pytest.mark.parametrize(("bits", "found"), [(None, None), (16, None), (8, 8), (4, 4)])
def test_bits_that_are_known(bits: Any, found: int | None) -> None:
    assert checked_bits(bits) == found


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 5, 32, True, "8", 8.5, -8])
def test_other_bits_are_refused(bits: Any) -> None:
    with pytest.raises(SpecError, match="bits must be 16, 8, 4 or None"):
        checked_bits(bits)
