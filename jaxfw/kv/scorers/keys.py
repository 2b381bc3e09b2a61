"""What keys say by themselves, whoever asks: their length, and how they differ from the others."""

import dataclasses

import jax.numpy as jnp

from jaxfw.kv.scorers.base import Context, Scores


@dataclasses.dataclass(frozen=True)
class Knorm:
    """Short keys stay: minus their Euclidean norm (arXiv:2406.11430)."""

    def __call__(self, c: Context) -> Scores:
        return Scores(-jnp.linalg.norm(c.k, axis=-1))


@dataclasses.dataclass(frozen=True)
class KeyDiff:
    """Unusual keys stay: minus their cosine with the mean of all keys' directions (arXiv:2504.15364)."""

    def __call__(self, c: Context) -> Scores:
        directions = c.k / jnp.maximum(jnp.linalg.norm(c.k, axis=-1, keepdims=True), 1e-12)
        valid = c.step.valid[:, None, :, None]
        mean = jnp.sum(jnp.where(valid, directions, 0), axis=2, keepdims=True)
        mean /= jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
        return Scores(-jnp.sum(directions * mean, axis=-1))
