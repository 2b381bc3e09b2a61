"""Published models by name: their sizes, as their config.json files have them; no weights."""

from jaxfw.core.errors import unknown
from jaxfw.nn.config import DecoderConfig, MoEConfig
from jaxfw.ops.rope import Rope


def _llama_2(width: int, ffn: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab=32000, width=width, ffn=ffn, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=128,
        positions=4096, norm_eps=1e-5, param_dtype="bfloat16", dtype="bfloat16",
    )  # fmt: skip


def _llama_3(
    width: int, ffn: int, layers: int, heads: int, *, head_dim: int = 128, stretch: float, tied: bool = False
) -> DecoderConfig:
    rope = Rope(theta=500000.0, kind="llama3", factor=stretch, original_positions=8192)
    return DecoderConfig(
        vocab=128256, width=width, ffn=ffn, layers=layers, heads=heads, kv_heads=8, head_dim=head_dim,
        positions=131072, rope=rope, norm_eps=1e-5, tie_embeddings=tied, param_dtype="bfloat16", dtype="bfloat16",
    )  # fmt: skip


PRESETS = {
    "llama-2-7b": _llama_2(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama_2(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama_2(8192, 28672, 80, 64, 8),
    "llama-3.1-8b": _llama_3(4096, 14336, 32, 32, stretch=8.0),
    "llama-3.1-70b": _llama_3(8192, 28672, 80, 64, stretch=8.0),
    "llama-3.2-1b": _llama_3(2048, 8192, 16, 32, head_dim=64, stretch=32.0, tied=True),
    "llama-3.2-3b": _llama_3(3072, 8192, 28, 24, stretch=32.0, tied=True),
    "mixtral-8x7b": DecoderConfig(
        vocab=32000, width=4096, ffn=14336, layers=32, heads=32, kv_heads=8, head_dim=128, positions=32768,
        rope=Rope(theta=1e6), norm_eps=1e-5, moe=MoEConfig(experts=8, per_token=2, ffn=14336),
        param_dtype="bfloat16", dtype="bfloat16",
    ),
}  # fmt: skip


def preset(name: str) -> DecoderConfig:
    """The configuration of a published model, in bfloat16.

    >>> preset("llama-3.1-8b").layers
    32

    Raises:
        InputError: the name is not in `PRESETS`.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
