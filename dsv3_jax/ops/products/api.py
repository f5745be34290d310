"""Products of 16-bit operands, accumulated and returned in float32."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def matmul_f32(a: Float[Array, "*batch m k"], b: Float[Array, "*batch k n"]) -> Float[Array, "*batch m n"]:
    """a @ b in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def transposed_matmul_f32(a: Float[Array, "*batch m k"], b: Float[Array, "*batch m n"]) -> Float[Array, "*batch k n"]:
    """a^T @ b in float32, as weight gradients need it."""
    if a.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and _has_matrix_instructions():
        return matmul_f32(_transposed(a), b)
    return jnp.einsum("...mk,...mn->...kn", a, b, preferred_element_type=jnp.float32)


@cache
def _has_matrix_instructions() -> bool:
    """Whether the host's processor multiplies 16-bit matrices by itself, as Intel's AMX does."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()


def _transposed(x: Float[Array, "*batch m k"]) -> Float[Array, "*batch k m"]:
    """x^T, written down.

    XLA's CPU backend uses matrix instructions for 16-bit products whose left side is contracted over its last axis and
    lies row by row in memory, and a loop several times slower for all others. Left to itself it makes a transpose a
    change of layout, and takes the loop; the constraint makes it copy.
    """
    return with_layout_constraint(jnp.swapaxes(x, -1, -2), Layout(tuple(range(x.ndim))))
