"""Keys and values in few bits: error bounds in closed form, exact bytes, and what the bytes come to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.packing import AXES, BITS, SYMMETRIC, Packed, pack, pack_symmetric, unpack, unpacked_codes


def normal(shape, seed=0, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def scale_of(packed):
    """The scale of every number."""
    at = -2 if packed.axis == "slots" else -1
    return np.repeat(np.asarray(packed.scale, np.float32), packed.group, axis=at)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", BITS)
def test_no_number_is_off_by_more_than_half_a_step(bits, axis, dtype):
    x = normal((3, 64, 96), bits, dtype) * 10 ** jax.random.uniform(jax.random.key(1), (3, 64, 1), minval=-3, maxval=3)
    x = x.astype(dtype)
    packed = pack(x, bits=bits, axis=axis, group=32)
    error = np.abs(np.asarray(unpack(packed, jnp.float32)) - np.asarray(x, np.float32))
    assert np.all(error <= scale_of(packed) * 0.5 + 1e-6 * np.abs(np.asarray(x, np.float32)))
    assert packed.shape == x.shape and packed.group == 32 and packed.scale.dtype == x.dtype


@pytest.mark.parametrize(("bits", "rms"), [(2, 0.3928), (4, 0.0782), (8, 0.0046)])
@pytest.mark.parametrize("axis", AXES)
def test_the_error_of_normal_numbers_is_what_it_must_be(bits, rms, axis):
    x = normal((8, 2048, 128))
    error = unpack(pack(x, bits=bits, axis=axis, group=32)) - x
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(error**2)), rms, rtol=0.01)


def test_symmetric_codes_err_as_they_must():
    x = normal((8, 2048, 128))
    error = unpack(pack_symmetric(x, "int8")) - x
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(error**2)), 0.00646, rtol=0.01)
    packed = pack_symmetric(x, "fp8")
    error = np.abs(np.asarray(unpack(packed)) - np.asarray(x))
    # Three bits behind the leading one; the smallest steps are 2^-9 of the scale.
    assert np.all(error <= np.maximum(np.abs(x) * 2.0**-4, np.asarray(packed.scale) * 2.0**-10) * 1.0001)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_group_comes_back_exactly(bits, axis, dtype):
    x = jnp.broadcast_to(jnp.asarray([0.0, 1.2345, -3e-5, 60000.0], dtype)[:, None, None], (4, 32, 32))
    packed = pack(x, bits=bits, axis=axis, group=32)
    np.testing.assert_array_equal(unpack(packed), x)
    assert not np.asarray(packed.scale).any() and not np.asarray(unpacked_codes(packed)).any()


@given(st.sampled_from(BITS), st.sampled_from([1, 2, 3]), st.sampled_from([8, 24, 80]), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_codes_come_back_bit_by_bit(bits, S, d, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (S, d), np.uint8)
    # Whole numbers from 0 to the largest code, both in each group: scale 1 and zero 0 give the codes themselves.
    codes[:, 0], codes[:, -1] = 0, 2**bits - 1
    packed = pack(jnp.asarray(codes, jnp.float32), bits=bits, axis="channels", group=d)
    np.testing.assert_array_equal(unpacked_codes(packed), codes)
    np.testing.assert_array_equal(unpack(packed), codes)
    assert packed.codes.nbytes == S * d * bits // 8


def test_bytes_hold_channels_by_parts_of_the_width():
    codes = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 15]], jnp.float32)
    packed = pack(codes, bits=4, axis="channels", group=8)
    np.testing.assert_array_equal(packed.codes, [[0 | 4 << 4, 1 | 5 << 4, 2 | 6 << 4, 3 | 15 << 4]])


@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.2002), (4, 0.3232), (8, 0.5693)])
def test_bytes_of_keys_and_values_against_bfloat16(bits, ratio):
    """8,192 tokens, the newest 128 of them in full width."""
    T, residual, d = 8192, 128, 128
    x = jax.ShapeDtypeStruct((1, 8, T - residual, d), jnp.bfloat16)
    pair = jax.eval_shape(lambda x: [pack(x, bits=bits, axis=axis, group=32) for axis in AXES], x)
    held = sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(pair)) + 2 * 8 * residual * d * 2
    np.testing.assert_allclose(held / (2 * 8 * T * d * 2), ratio, rtol=0.01)


def test_packed_numbers_are_a_pytree_of_arrays():
    packed = pack(normal((2, 32, 16)), bits=4, axis="slots", group=32)
    doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), packed)
    assert isinstance(doubled, Packed) and doubled.shape == (4, 32, 16)
    np.testing.assert_array_equal(unpack(doubled)[2:], unpack(packed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3, "axis": "slots", "group": 32}, r"bits=3 must be one of \(2, 4, 8\)"),
        ({"bits": 4, "axis": "rows", "group": 32}, r"axis='rows' one of \('slots', 'channels'\)"),
        ({"bits": 4, "axis": "slots", "group": 24}, r"S=32, d=6 does not split into groups of 24 slots in whole bytes"),
        ({"bits": 2, "axis": "slots", "group": 32}, r"in whole bytes"),
        ({"bits": 4, "axis": "channels", "group": 4}, r"groups of 4 channels"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pack(normal((32, 6)), **options)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"kind='int4' must be one of int8, fp8"):
        pack_symmetric(normal((2, 4)), next(kind for kind in ("int4",) if kind not in SYMMETRIC))
