"""A matrix with a low-rank term beside it (LoRA: Hu et al. 2021, arXiv:2106.09685), multiplied without their sum.

    x @ (W + scale * a @ b) = x @ W + ((scale * drop(x)) @ a) @ b

W may be `Quantised` (QLoRA: Dettmers et al. 2023, arXiv:2305.14314): it is read only, in whatever form. The second term
costs 2 * R * (D + F) operations a token beside 2 * D * F. Axis letters: D inputs, F outputs, R rank.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Float, PRNGKeyArray
from jaxfw.ops.quant import Quantised, dequantise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A kernel [D F] and what is learned beside it; of stacked layers, all arrays lead with L.

    Attributes:
        kernel: the matrix, an array or `Quantised`.
        a: from inputs to the rank, float32.
        b: from the rank to outputs, float32.
        key: of the inputs that are dropped, one a layer; None drops none.
        scale: of the second term.
        dropout: the probability that an input of the second term is dropped; the others are divided by 1 - dropout.
    """

    kernel: Array | Quantised
    a: Float[Array, "*L D R"]
    b: Float[Array, "*L R F"]
    key: PRNGKeyArray | None
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.kernel.shape


def added(x: Float[Array, "... D"], matrix: Adapted) -> Float[Array, "... F"]:
    """The second term of a product, in x's dtype.

    >>> one = Adapted(jnp.zeros((2, 1)), jnp.array([[1.0], [2.0]]), jnp.array([[3.0]]), None, scale=0.5, dropout=0.0)
    >>> added(jnp.array([1.0, 1.0]), one).tolist()
    [4.5]
    """
    if matrix.key is not None and matrix.dropout:
        kept = jax.random.bernoulli(matrix.key, 1 - matrix.dropout, x.shape)
        x = jnp.where(kept, x / (1 - matrix.dropout), 0).astype(x.dtype)
    return (matrix.scale * (x @ matrix.a.astype(x.dtype))) @ matrix.b.astype(x.dtype)


def whole(matrix: Array | Quantised | Adapted, dtype: Any) -> Float[Array, "D F"]:
    """The one matrix that a kernel of any form stands for; what is dropped in training is not."""
    if isinstance(matrix, Adapted):
        return (whole(matrix.kernel, jnp.float32) + low_rank(matrix.a, matrix.b, matrix.scale)).astype(dtype)
    return dequantise(matrix, dtype) if isinstance(matrix, Quantised) else matrix.astype(dtype)


def low_rank(a: Float[Array, "*L D R"], b: Float[Array, "*L R F"], scale: float) -> Float[Array, "*L D F"]:
    """The second term as a matrix, `scale * a @ b`, in full float32, which accelerators' default products are not."""
    return scale * jnp.matmul(a, b, precision="highest")
