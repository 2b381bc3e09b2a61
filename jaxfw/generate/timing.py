"""How fast a model reads and writes on this machine."""

import dataclasses

import numpy as np

from jaxfw.core.shapes import PyTree
from jaxfw.generate.engine import generate
from jaxfw.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Speed:
    """Tokens per second over all rows, medians of several runs."""

    prefill: float
    decode: float


def measure_speed(
    config: DecoderConfig, params: PyTree, *, batch: int, prompt: int, new: int, repeats: int = 5, seed: int = 0
) -> Speed:
    """Read `batch` random prompts of `prompt` tokens and write `new` >= 2 tokens each, after one run that compiles.

    The first new token comes out of the prefill, so decoding is counted over `new` - 1 tokens a row.
    """
    prompts = np.random.default_rng(seed).integers(0, config.vocab, (batch, prompt)).tolist()
    runs = [generate(config, params, prompts, max_new_tokens=new) for _ in range(repeats + 1)][1:]
    prefill, decode = (
        float(np.median([getattr(one, name) for one in runs])) for name in ("prefill_seconds", "decode_seconds")
    )
    return Speed(batch * prompt / prefill, batch * (new - 1) / decode)
