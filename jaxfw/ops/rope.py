"""Rotary position embedding and the four ways in which published LLaMA checkpoints stretch it.

Frequencies are computed on the host, rounding to float32 where the reference implementation rounds: at position
4096 one unit in the last place of a frequency already moves an angle by 2e-4. Only `dynamic` depends on the length of
a sequence; here it is each row's own length, so that a row does not depend on its neighbours in a batch.

Sources: RoPE arXiv:2104.09864; linear arXiv:2306.15595; YaRN and dynamic NTK arXiv:2309.00071;
llama3: the Llama 3.1 release (frequency bands by wavelength).
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import Array, Float, Int

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """The static description of a rotary embedding; `kind` says which of the other fields are read.

    `original_positions` is the context length before stretching (dynamic, yarn, llama3). `attention_factor` None
    means YaRN's default, 0.1 ln(factor) + 1, or the ratio of the two `mscale`s where both are given.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("rope.kind", self.kind, KINDS)
        if self.theta <= 1:
            raise InputError(f"rope.theta={self.theta} must be above 1 (LLaMA 2: 10000, LLaMA 3: 500000).")
        if self.factor < 1:
            raise InputError(f"rope.factor={self.factor} must be at least 1: it stretches the context.")
        if self.kind in ("dynamic", "yarn", "llama3") and not self.original_positions:
            raise InputError(
                f"rope.original_positions={self.original_positions} is needed by rope.kind={self.kind!r}: "
                "give the context length before stretching."
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"rope.high_freq_factor={self.high_freq_factor} must be above "
                f"rope.low_freq_factor={self.low_freq_factor}."
            )


def inverse_frequencies(rope: Rope, width: int) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [d/2]; of `dynamic`, the frequencies before stretching.

    >>> inverse_frequencies(Rope(theta=100.0, kind="linear", factor=2.0), 4).tolist()
    [0.5, 0.05000000074505806]
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    plain = np.float32(1) / (np.float64(rope.theta) ** exponents.astype(np.float64)).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, width)
    return plain


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    assert rope.original_positions is not None
    wavelength = np.float32(2 * math.pi) / plain
    low, high, factor = rope.low_freq_factor, rope.high_freq_factor, np.float32(rope.factor)
    smooth = (np.float32(rope.original_positions) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    short = wavelength < rope.original_positions / high
    long = wavelength > rope.original_positions / low
    return np.where(short, plain, np.where(long, plain / factor, blended)).astype(np.float32)


def _yarn(rope: Rope, width: int) -> np.ndarray:
    original = rope.original_positions
    assert original is not None
    positions = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    base = (np.float64(rope.theta) ** positions.astype(np.float64)).astype(np.float32)
    extrapolated, interpolated = np.float32(1) / base, np.float32(1) / (np.float32(rope.factor) * base)

    def pair_turning(turns: float) -> float:
        """The (fractional) pair that makes `turns` turns over the original context."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1) - ramp
    return (interpolated * (1 - keep) + extrapolated * keep).astype(np.float32)


def attention_factor(rope: Rope) -> float:
    """What YaRN multiplies cosines and sines by (arXiv:2309.00071, eq. 15); 1 for the other kinds."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scaled(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scaled(rope.mscale) / scaled(rope.mscale_all_dim)
    return scaled(1.0)


def rotation(
    rope: Rope, positions: Int[Array, "B T"], *, width: int, seq_len: Int[Array, "B"]
) -> tuple[Float[Array, "B T d/2"], Float[Array, "B T d/2"]]:
    """Cosine and sine of every pair's angle, float32. Only `dynamic` reads `seq_len`, the tokens of the row so far."""
    if rope.kind == "dynamic":
        frequencies = _dynamic_frequencies(rope, width, seq_len)[:, None, :]
    else:
        frequencies = jnp.asarray(inverse_frequencies(rope, width))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    factor = attention_factor(rope)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _dynamic_frequencies(rope: Rope, width: int, seq_len: Int[Array, "B"]) -> Float[Array, "B d/2"]:
    assert rope.original_positions is not None
    original = rope.original_positions
    stretch = rope.factor * jnp.maximum(seq_len, original).astype(jnp.float32) / original - (rope.factor - 1)
    base = rope.theta * stretch ** (width / (width - 2))
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    # Rows within the original context take the host's frequencies: log and exp would cost them a few digits.
    stretched = 1 / base[:, None] ** exponents
    return jnp.where((seq_len > original)[:, None], stretched, inverse_frequencies(rope, width))


def rotate(
    x: Float[Array, "B T H d"], cos: Float[Array, "B T d/2"], sin: Float[Array, "B T d/2"]
) -> Float[Array, "B T H d"]:
    """Rotate each pair (i, i + d/2) by its angle; arithmetic in float32, result in `x.dtype`."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
