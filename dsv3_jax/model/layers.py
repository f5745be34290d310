"""Linear, RMSNorm and the SwiGLU feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.ops.feed_forward import fp8_feed_forward
from dsv3_jax.ops.linear import FP8Rows, linear
from dsv3_jax.ops.rms_norm import rms_norm, rms_norm_fp8
from dsv3_jax.ops.swiglu import swiglu
from dsv3_jax.ops.weights import is_fp8


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 weight drawn from a normal distribution (report 4.2)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Linear(nnx.Module):
    """A projection without bias; kernel is [in, out]."""

    def __init__(self, d_in: int, d_out: int, std: float, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (d_in, d_out), std)

    @property
    def is_fp8(self) -> bool:
        """Whether its products are in FP8."""
        return is_fp8(self.kernel.get_value())

    def __call__(self, x: Float[Array, "*batch d_in"] | FP8Rows) -> Float[Array, "*batch d_out"]:
        """x @ kernel in the type of x."""
        return linear(x, self.kernel.get_value())


class RMSNorm(nnx.Module):
    """Root-mean-square normalization with a gain, computed in float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """x over its root mean square, times the gain, in the type of x."""
        return rms_norm(x, self.scale.get_value(), self.eps)

    def into(self, linear: Linear, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"] | FP8Rows:
        """The normed x as a projection reads it: in FP8 tiles where its kernel is in FP8."""
        return rms_norm_fp8(x, self.scale.get_value(), self.eps) if linear.is_fp8 else self(x)

    def to_travel(self, x: Float[Array, "*batch width"]) -> FP8Rows:
        """The normed x in 16 bits, and in FP8 tiles with the power-of-two scales of what other devices read."""
        return rms_norm_fp8(x, self.scale.get_value(), self.eps, power_of_2=True, keep=True)


class FeedForward(nnx.Module):
    """SwiGLU feed-forward with the gate and up projections fused, gate first."""

    def __init__(self, d_model: int, d_ff: int, std: float, rngs: nnx.Rngs):
        self.gate_up = Linear(d_model, 2 * d_ff, std, rngs)
        self.down = Linear(d_ff, d_model, std, rngs)

    def __call__(self, x: Float[Array, "*batch d_model"] | FP8Rows) -> Float[Array, "*batch d_model"]:
        """down(silu(gate(x)) * up(x))."""
        if self.gate_up.is_fp8:
            return fp8_feed_forward(x, self.gate_up.kernel.get_value(), self.down.kernel.get_value())
        return self.down(swiglu(checkpoint_name(self.gate_up(x), "ffn")))
