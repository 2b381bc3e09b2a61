"""Shapes that kernels meet in real models, by name: for tests, compile tables, benchmarks and tuning.

A name is model/batch x cache length, `llama-3.1-8b/8x32768`; `/8 shards` is what one of eight tensor shards holds.
"""

import dataclasses

# (query heads, key heads, head width), as published.
HEADS = {
    "llama-2-7b": (32, 32, 128),
    "llama-3.1-8b": (32, 8, 128),
    "llama-3.1-8b, 8 shards": (4, 1, 128),
    "llama-3.1-70b": (64, 8, 128),
    "llama-3.1-70b, 8 shards": (8, 1, 128),
    "llama-3.2-1b": (32, 8, 64),
    "llama-3.2-3b": (24, 8, 128),
    "qwen2.5-0.5b": (14, 2, 64),
    "qwen2.5-7b": (28, 4, 128),
    "mistral-7b, mixtral-8x7b": (32, 8, 128),
    "phi-2": (32, 32, 80),
    "phi-3-mini": (32, 32, 96),
    "gemma-2b": (8, 1, 256),
}
BATCHES = ((1, 4096), (8, 32768), (32, 32768), (1, 131072))  # (rows, cache length): a chat, two ways to serve, a book


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """One new token for each of B rows, against a cache of S slots."""

    B: int
    H: int
    K: int
    S: int
    d: int


DECODE_SHAPES = {f"{name}/{B}x{S}": DecodeShape(B, H, K, S, d) for name, (H, K, d) in HEADS.items() for B, S in BATCHES}


@dataclasses.dataclass(frozen=True)
class RaggedShape:
    """One new token for each of B rows, against a pool of P slots that K heads share."""

    B: int
    H: int
    K: int
    P: int
    d: int


def _ragged(name: str, B: int, T: int, keep: float) -> RaggedShape:
    H, K, d = HEADS[name]
    return RaggedShape(B, H, K, (K * int(keep * T) + 31 * K) // 32 * 32, d)


RAGGED_SHAPES = {
    f"{name}/{B}x{T} at {keep}": _ragged(name, B, T, keep)
    for name, B, T, keep in (
        ("llama-3.1-8b", 8, 32768, 0.2),
        ("llama-3.1-8b", 64, 131072, 0.2),
        ("llama-3.1-8b", 64, 131072, 1.0),
        ("qwen2.5-7b", 8, 32768, 0.2),
    )
}
