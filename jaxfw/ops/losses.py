"""Losses over a vocabulary: from logits, or from final hidden states in chunks of tokens, whose logits never all exist.

A chunk is some tokens of *every* row: rows stay an axis of their own, so that on a mesh no activation moves. The
gradient of the vocabulary's matrix is summed apart on each shard of the batch [S V D], and over the shards once, behind
the last chunk. The matrix itself is gathered once, cut by vocabulary over `tensor`; a vocabulary that does not divide
is whole on every device of `tensor`, which all do the same work.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import BATCH_AXES, auto_sizes, constrain, fit
from jaxfw.core.shapes import Array, Float, Int
from jaxfw.ops.quant import Quantised, dequantise


@jax.custom_jvp
def token_log_probs(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Log-probability of each target, float32.

    >>> token_log_probs(jnp.zeros((1, 4)), jnp.array([2])).tolist()
    [-1.3862943649291992]
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@token_log_probs.defjvp
def _token_log_probs_jvp(primals, tangents):
    # One pass over the vocabulary: what autodiff makes of the lookup is a scatter into an array of all logits.
    logits, targets = primals
    log_probs = token_log_probs(logits, targets)
    wide = logits.astype(jnp.float32)
    probs = jnp.exp(wide - jax.nn.logsumexp(wide, axis=-1, keepdims=True))
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return log_probs, jnp.sum((is_target - probs) * tangents[0].astype(jnp.float32), axis=-1)


def summed_nll(
    x: Float[Array, "B T D"],
    matrix: Float[Array, "V D"] | Quantised,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
) -> Float[Array, ""]:
    """Weighted sum of the targets' negative log-likelihoods in nats, with logits of `chunk` tokens of a row at a time.

    What `-jnp.sum(weights * token_log_probs(x @ matrix.T, targets))` is. Differentiated (in reverse, once), gradients
    are made together with the loss (Hsu et al. 2024, arXiv:2410.10989): three products in all, none done again. What
    nobody asks for is not made: the gradient of a frozen matrix; a quantised one, which is widened first, has none.
    Products take x's dtype and sum in float32; logits are float32.

    A chunk of c tokens holds its logits [B c V] in float32 and their gradient in x's dtype. Beside these there are the
    gradients of x and, in float32, of the matrix.

    Args:
        x: final hidden states.
        matrix: the vocabulary's.
        targets: the token that each position predicts.
        weights: what each counts.
        chunk: tokens of a row, at most; chunks are made equal.

    Raises:
        InputError: a chunk below 1.
    """
    return _summed_nll(x, matrix, targets, weights, _checked(chunk))


def chunked_log_probs(
    x: Float[Array, "B T D"], matrix: Float[Array, "V D"] | Quantised, targets: Int[Array, "B T"], *, chunk: int
) -> Float[Array, "B T"]:
    """Log-probability of each target, float32, with logits of `chunk` tokens of a row at a time; for scoring."""
    parts = _Chunks(x, matrix, targets, None, _checked(chunk))

    def body(held, i):
        _, targets, _ = parts.at(i)
        return held, -_nll(parts.logits(i), targets)[0]

    _, nll = jax.lax.scan(body, None, jnp.arange(parts.n))
    return parts.join(nll)


def _checked(chunk: int) -> int:
    if not isinstance(chunk, int) or chunk < 1:
        raise InputError(
            f"chunk={chunk!r} must be a whole number from 1 on: tokens of a row whose logits exist at once."
        )
    return chunk


class _Chunks:
    """What the chunks read: n of `size` tokens a row. One chunk is [S R ...]: R tokens on each of S batch shards."""

    def __init__(self, x: Array, matrix: Array | Quantised, targets: Array, weights: Array | None, chunk: int):
        self.B, self.T, self.D = x.shape
        self.n = -(-self.T // chunk)
        self.size = -(-self.T // self.n)
        self.S = _batch_shards(self.B)
        wide = dequantise(matrix, x.dtype) if isinstance(matrix, Quantised) else matrix.astype(x.dtype)
        self.matrix = constrain(wide, "tensor", None)
        self._x, self._targets = self._filled(constrain(x, BATCH_AXES, None, None)), self._filled(targets)
        self._weights = None if weights is None else self._filled(weights.astype(jnp.float32))

    def _filled(self, x: Array) -> Array:
        spare = self.n * self.size - self.T
        return jnp.pad(x, ((0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2))) if spare else x

    def _cut(self, x: Array, i: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis=1)
        return part.reshape(self.S, -1, *part.shape[2:])

    def at(self, i: Array) -> tuple[Float[Array, "S R D"], Int[Array, "S R"], Any]:
        weights = None if self._weights is None else self._cut(self._weights, i)
        return self._cut(self._x, i), self._cut(self._targets, i), weights

    def logits(self, i: Array) -> Float[Array, "S R V"]:
        x, _, _ = self.at(i)
        logits = jnp.einsum("SRD,VD->SRV", x, self.matrix, preferred_element_type=jnp.float32)
        return constrain(logits, BATCH_AXES, None, "tensor")

    def zeros(self) -> Float[Array, "S"]:
        """For sums of each shard's own: one of all, in every chunk, would be a collective in every chunk."""
        return constrain(jnp.zeros(self.S, jnp.float32), BATCH_AXES)

    def join(self, parts: Array) -> Array:
        """[n S R ...], of all chunks, as [B T ...]."""
        parts = parts.reshape(self.n, self.B, self.size, *parts.shape[3:])
        return jnp.moveaxis(parts, 0, 1).reshape(self.B, -1, *parts.shape[3:])[:, : self.T]


def _batch_shards(B: int) -> int:
    """Over how many devices the rows lie on the mesh of the moment."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else auto_sizes(mesh)
    (axes,) = fit(sizes, (B,), (BATCH_AXES,))
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def _nll(logits: Float[Array, "S R V"], targets: Int[Array, "S R"]) -> tuple[Float[Array, "S R"], Array, Array]:
    """Negative log-likelihoods, the log of the sum of exponentials [S R 1], and where the targets are [S R V]."""
    # A lookup would gather logits whose vocabulary lies on several devices; the sum of one number is that number.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return lse[..., 0] - jnp.sum(jnp.where(is_target, logits, 0), axis=-1), lse, is_target


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed_nll(x, matrix, targets, weights, chunk):
    parts = _Chunks(x, matrix, targets, weights, chunk)

    def body(total, i):
        _, targets, weights = parts.at(i)
        return total + jnp.sum(weights * _nll(parts.logits(i), targets)[0], axis=1), None

    return jnp.sum(jax.lax.scan(body, parts.zeros(), jnp.arange(parts.n))[0])


def _summed_nll_forward(x, matrix, targets, weights, chunk):
    """The loss, and the gradients of what is differentiated, for a cotangent of 1."""
    wants_x, wants_weights = x.perturbed, weights.perturbed
    wants_matrix = not isinstance(matrix, Quantised) and matrix.perturbed
    x, matrix, targets, weights = jax.tree.map(
        lambda leaf: leaf.value, (x, matrix, targets, weights), is_leaf=lambda leaf: hasattr(leaf, "perturbed")
    )
    parts = _Chunks(x, matrix, targets, weights, chunk)
    V, D = matrix.shape

    def body(held, i):
        total, to_x, to_matrix = held
        rows, targets, weights = parts.at(i)
        logits = parts.logits(i)
        nll, lse, is_target = _nll(logits, targets)
        to_logits = ((jnp.exp(logits - lse) - is_target) * weights[..., None]).astype(x.dtype)
        to_logits = constrain(to_logits, BATCH_AXES, None, "tensor")
        if wants_x:
            part = jnp.einsum("SRV,VD->SRD", to_logits, parts.matrix, preferred_element_type=jnp.float32)
            part = constrain(part.astype(x.dtype).reshape(parts.B, parts.size, D), BATCH_AXES, None, None)
            to_x = jax.lax.dynamic_update_slice_in_dim(to_x, part, i * parts.size, axis=1)
        if wants_matrix:
            to_matrix += jnp.einsum("SRV,SRD->SVD", to_logits, rows, preferred_element_type=jnp.float32)
            to_matrix = constrain(to_matrix, BATCH_AXES, "tensor", None)
        return (total + jnp.sum(weights * nll, axis=1), to_x, to_matrix), nll if wants_weights else None

    to_x: Any = jnp.zeros((parts.B, parts.n * parts.size, D), x.dtype) if wants_x else None
    to_matrix: Any = jnp.zeros((parts.S, V, D), jnp.float32) if wants_matrix else None
    nll: Any
    (total, to_x, to_matrix), nll = jax.lax.scan(body, (parts.zeros(), to_x, to_matrix), jnp.arange(parts.n))
    to_x = to_x[:, : parts.T] if wants_x else None
    to_matrix = jnp.sum(to_matrix, axis=0) if wants_matrix else None
    to_weights = parts.join(nll) if wants_weights else None
    # Residuals are arrays alone: empty ones say of which dtypes the gradients are.
    like = (
        jnp.zeros(0, x.dtype),
        None if not wants_matrix else jnp.zeros(0, matrix.dtype),
        jnp.zeros(0, weights.dtype),
    )
    return jnp.sum(total), ((to_x, to_matrix, to_weights), like)


def _summed_nll_backward(chunk, residuals, cotangent):
    def scaled(gradient, like):
        return None if gradient is None else (gradient.astype(jnp.float32) * cotangent).astype(like.dtype)

    to_x, to_matrix, to_weights = map(scaled, *residuals)
    return to_x, to_matrix, None, to_weights


_summed_nll.defvjp(_summed_nll_forward, _summed_nll_backward, symbolic_zeros=True)
