"""Rotation of interleaved pairs: as complex numbers, in float32, and back by its transpose."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.ops.rotary import rotate, rotate_heads

ANGLES = np.outer(np.arange(3, 8), [1.0, 0.3, 0.1, 0.03])
TURNS = jnp.asarray(np.cos(ANGLES), jnp.float32), jnp.asarray(np.sin(ANGLES), jnp.float32)


def test_neighbours_rotate_as_one_complex_number():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    rotated = np.asarray(rotate(x, *TURNS))
    expected = (np.asarray(x[..., 0::2]) + 1j * np.asarray(x[..., 1::2])) * np.exp(1j * ANGLES)
    np.testing.assert_allclose(rotated[..., 0::2], expected.real, atol=1e-5)
    np.testing.assert_allclose(rotated[..., 1::2], expected.imag, atol=1e-5)


def test_rotation_is_computed_in_float32_and_keeps_lengths_and_type():
    x = jax.random.normal(jax.random.key(0), (5, 8))
    np.testing.assert_allclose(jnp.linalg.norm(rotate(x, *TURNS), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    narrow = rotate(x.astype(jnp.bfloat16), *TURNS)
    assert narrow.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.bfloat16).astype(jnp.float32), *TURNS)
    np.testing.assert_array_equal(narrow, exact.astype(jnp.bfloat16))


def test_all_heads_of_a_position_rotate_alike():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    by_head = [rotate(x[:, :, head], *TURNS) for head in range(3)]
    np.testing.assert_array_equal(rotate_heads(x, TURNS), jnp.stack(by_head, axis=2))
